// The same unmodified glue of ten packages on Node's engine and on ours (compat/bench.mjs: engines alternate, each turn
// in a process of its own).
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { loadGlue } from '../../index.js'
import { contest, type Effort, hot, median, type Standing } from '../contest.ts'
import type { Figure, Group } from '../report.ts'

interface Row {
  name: string
  error?: string
  work: { node: number; molt: number; speed: number }
  small: { node: number; molt: number; speed: number }
  cold: { node: number; cached: number; uncached: number }
  reload: { pause: number; wall: number }
}

interface Report {
  warmSpeed: number
  smallSpeed: number
  coldFromCache: number
  packages: Row[]
}

export default async function glue(effort: Effort): Promise<Group> {
  const isSmoke = effort.share < 1
  const only = isSmoke ? ['gofmt', 'snappy-wasm'] : []
  const rounds = isSmoke ? 1 : Math.min(effort.rounds, 3)
  const report = await measured([...only, '--rounds', `${rounds}`, '--ms', isSmoke ? '50' : '1500'])
  const standings: Record<string, Standing> = {}
  for (const { name, error, work, cold, reload } of report.packages) {
    if (error !== undefined) throw new Error(`${name}: ${error}`)
    const note = (what: string, ms: number) => {
      standings[`${name}: ${what}`] = { ns: ms * 1e6, turns: [ms * 1e6] }
    }
    note('work, Node', work.node)
    note('work', work.molt)
    note('first answer, Node', cold.node)
    note('first answer, cached', cold.cached)
    note('first answer, compiled anew', cold.uncached)
    note('reload', reload.wall)
  }
  const face = await measuredFace(effort)
  Object.assign(standings, face.standings)
  const figures: Figure[] = [
    {
      what: "speed of warm work relative to Node's engine, geometric mean",
      ratio: report.warmSpeed,
      goal: { atLeast: 0.9 },
    },
    {
      what: 'time to the first answer from the compiled cache relative to Node, geometric mean',
      ratio: report.coldFromCache,
      goal: { atMost: 1 },
    },
    {
      what: "calls per second where glue makes tiny calls, relative to Node's engine, geometric mean",
      ratio: report.smallSpeed,
    },
    { what: 'longest pause of a reload of glue', ms: Math.max(...report.packages.map(({ reload }) => reload.pause)) },
    face.figure,
    ...report.packages.map(({ name, work }) => ({ what: `speed of warm work, ${name}`, ratio: work.speed })),
  ]
  return { name: "glue: ten packages on Node's engine and here", standings, figures }
}

/** What it costs to look a function up on `manager.module` each time, beside the call behind it. */
async function measuredFace(effort: Effort): Promise<{ standings: Record<string, Standing>; figure: Figure }> {
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-face-'))
  try {
    const path = join(folder, 'glue.cjs')
    writeFileSync(
      path,
      `// (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
       const bytes = Uint8Array.of(0,97,115,109,1,0,0,0,1,7,1,96,2,127,127,1,127,3,2,1,0,7,7,1,3,97,100,100,0,0,10,9,1,7,0,32,0,32,1,106,11)
       const { exports: wasm } = new WebAssembly.Instance(new WebAssembly.Module(bytes))
       exports.add = (a, b) => wasm.add(a, b)`,
    )
    const manager = await loadGlue<{ add(a: number, b: number): number }>(path)
    const wasm = manager.module
    const raw = await manager.use((glue) => glue.add)
    let sum = 0
    const standings = await contest(effort.rounds, {
      'the call itself': hot(effort, () => {
        sum = raw(sum, 1)
      }),
      'manager.module.add()': hot(effort, () => {
        sum = wasm.add(sum, 1)
      }),
    })
    await manager.close()
    const [call, looked] = [standings['the call itself'], standings['manager.module.add()']]
    const more = looked.turns.map((ns, round) => (ns - (call.turns[round] ?? call.ns)) / (call.turns[round] ?? call.ns))
    return {
      standings,
      figure: { what: 'cost of manager.module.f beside the call behind it', ratio: median(more), goal: { atMost: 1 } },
    }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

function measured(args: string[]): Promise<Report> {
  const path = fileURLToPath(new URL('../../compat/bench.mjs', import.meta.url))
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [path, ...args, '--json'], { stdio: ['ignore', 'pipe', 'inherit'] })
    let text = ''
    child.stdout.on('data', (chunk) => {
      text += chunk
    })
    child.on('error', reject)
    child.on('close', () => {
      try {
        resolve(JSON.parse(text))
      } catch {
        reject(new Error(`compat/bench.mjs gave no figures: ${text.slice(0, 500)}`))
      }
    })
  })
}
