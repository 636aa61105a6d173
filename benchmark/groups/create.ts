// From nothing to the first answer, in a fresh process each time, because that is where start-up is paid.
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { contest, type Effort, ratio } from '../contest.ts'
import { add } from '../guests.ts'
import { dprint } from '../modules/dprint.ts'
import type { Group } from '../report.ts'

const child = fileURLToPath(new URL('../start.ts', import.meta.url))

export default async function create(effort: Effort): Promise<Group> {
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-bench-'))
  try {
    const small = join(folder, 'add.wasm')
    writeFileSync(small, add)
    const cache = join(folder, 'cache')
    const start = (...args: string[]) => {
      const text = execFileSync(process.execPath, ['--import', 'tsx', child, ...args], { encoding: 'utf8' })
      return JSON.parse(text) as { firstNs: number; workNs: number }
    }
    const cold = start('molt', dprint.path, cache)
    start('molt', small, cache)

    // One start gives two times; the second is kept for its own contestant.
    const first = (...args: string[]) => ({ first: () => start(...args).firstNs, work: () => start(...args).workNs })
    const rounds = Math.min(effort.rounds, 7)
    const v8 = first('v8', dprint.path, cache)
    const molt = first('molt', dprint.path, cache)
    const standings = await contest(rounds, {
      'small, first call: V8': first('v8', small, cache).first,
      'small, first call: manager': first('molt', small, cache).first,
      '4.2 MB, first call: V8': v8.first,
      '4.2 MB, first call: manager': molt.first,
      '4.2 MB, first file formatted: V8': v8.work,
      '4.2 MB, first file formatted: manager': molt.work,
    })
    const against = (of: 'small, first call' | '4.2 MB, first call' | '4.2 MB, first file formatted') => ({
      what: `V8's time from compile to ${of.replace(/(.*), (.*)/, '$2, $1 module')}`,
      ratio: ratio(standings[`${of}: manager`], standings[`${of}: V8`]),
    })
    return {
      name: 'create: in a fresh process, compiled code cached',
      standings: { ...standings, '4.2 MB, nothing cached: manager': { ns: cold.firstNs, turns: [cold.firstNs] } },
      figures: [against('small, first call'), against('4.2 MB, first call'), against('4.2 MB, first file formatted')],
    }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}
