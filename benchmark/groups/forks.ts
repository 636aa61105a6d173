// A running instance once more: its copy, against fork(2) of a process of that size, and against making it anew.
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { WasmModuleManager } from '../../index.js'
import { contest, type Effort, median, ratios, repeated, type Standing, since, type Turn } from '../contest.ts'
import { type Pages, pageBytes, pages } from '../guests.ts'
import { type Figure, type Group, size } from '../report.ts'

/** Pages, of the turns that say so. */
const few = 16

export default async function forks(effort: Effort): Promise<Group> {
  const group: Group = { name: 'forks: a copy of an idle instance, every page written', standings: {}, figures: [] }
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-bench-'))
  try {
    for (const mib of new Set([1, 64, effort.largeMib])) {
      const forked = forkProcess(mib, effort)
      const standings = await contestAt(mib, effort, join(folder, 'cache'))
      for (const [name, standing] of Object.entries(standings)) group.standings[`${size(mib)}, ${name}`] = standing
      if (forked) group.standings[`${size(mib)}, fork(2) of a process`] = forked
      group.figures.push(...figures(mib, effort, standings, forked))
    }
    return group
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

async function contestAt(mib: number, { rounds, share }: Effort, cache: string) {
  const bytes = mib << 20
  const bytecode = pages(mib)
  const module = new WebAssembly.Module(bytecode)
  const initialize = ({ exports }: { exports: object }) => (exports as Pages).fill(0, bytes, 1)
  const parent = await WasmModuleManager.create(bytecode, { cache, initialize })
  const guest = parent.exports as unknown as Pages

  const often = Math.max(2, Math.ceil(50 * share))
  const fork = (before: () => unknown, first: (child: WasmModuleManager) => unknown, of = parent): Turn =>
    repeated(often, async () => {
      before()
      const start = process.hrtime.bigint()
      const child = await of.fork()
      await first(child)
      const taken = since(start)
      await child.close()
      return taken
    })
  const nothing = () => {}
  const answered = (sum: unknown) => {
    if (sum !== mib * 256) throw new Error('the copy differs')
  }

  // The first one copies the parent's pages; from then on they are shared.
  const begun = process.hrtime.bigint()
  const first = await parent.fork()
  const capture = since(begun)
  answered((first.exports as unknown as Pages).sum(0, bytes))
  await first.close()
  // One that has all its pages in its page tables.
  const reader = await parent.fork()
  const readerGuest = reader.exports as unknown as Pages
  answered(readerGuest.sum(0, bytes))

  const standings = await contest(rounds, {
    fork: fork(nothing, nothing),
    'fork to the first call answered': fork(nothing, (child) => child.call('sum', [0, pageBytes])),
    'fork to the first synchronous call': fork(nothing, (child) => child.callSync('sum', [0, pageBytes])),
    'fork, 16 pages written since': fork(() => guest.fill(0, few * pageBytes, 1), nothing),
    'create and initialize': async () => {
      const start = process.hrtime.bigint()
      const fresh = await WasmModuleManager.create(bytecode, { cache, initialize })
      const taken = since(start)
      await fresh.close()
      return taken
    },
    'V8, new instance and initialize': () => {
      const start = process.hrtime.bigint()
      initialize(new WebAssembly.Instance(module))
      const taken = since(start)
      globalThis.gc?.()
      return taken
    },
    'fork, entered since, every page read': fork(() => readerGuest.sum(0, pageBytes), nothing, reader),
    'fork, entered since': fork(() => guest.sum(0, pageBytes), nothing),
  })
  await Promise.all([reader.close(), parent.close()])
  return { ...standings, 'the first fork': { ns: capture, turns: [capture] } as Standing }
}

type Standings = Awaited<ReturnType<typeof contestAt>>

/** Until fork(2) has returned, which is before the child runs. Node itself cannot fork without loading a program. */
function forkProcess(mib: number, { rounds, share }: Effort): Standing | undefined {
  const each = Math.max(2, Math.ceil(5 * share))
  for (const [program, script] of [
    ['python3', 'fork.py'],
    ['perl', 'fork.pl'],
  ] as const) {
    try {
      const path = fileURLToPath(new URL(`../workers/${script}`, import.meta.url))
      const text = execFileSync(program, [path, `${mib}`, `${rounds * each}`], { encoding: 'utf8' })
      const taken = JSON.parse(text) as number[]
      const turns = Array.from({ length: rounds }, (_, round) => median(taken.slice(round * each, (round + 1) * each)))
      return { ns: median(turns), turns }
    } catch {
      // The next one, then.
    }
  }
  process.stdout.write('Neither python3 nor perl is there: nothing to compare with fork(2).\n')
  return undefined
}

function figures(mib: number, effort: Effort, standings: Standings, forked: Standing | undefined): Figure[] {
  const { fork } = standings
  const of = `${size(mib)}, every page written`
  const times = (what: string, peer: Standing, atLeast?: number): Figure => ({
    what,
    ...ratios(peer, fork),
    ...(atLeast ? { goal: { atLeast } } : {}),
  })
  const figures: Figure[] = [{ what: `for a fork of ${of}`, ms: fork.ns / 1e6, goal: { atMost: 0.1 } }]
  if (forked) {
    const atLeast = mib === effort.largeMib ? 100 : undefined
    figures.push(times(`as cheap as fork(2) of a process, ${of}`, forked, atLeast))
  }
  figures.push(
    times(`as cheap as create and initialize, ${of}`, standings['create and initialize']),
    times(`as cheap as V8's new instance and initialize, ${of}`, standings['V8, new instance and initialize']),
  )
  return figures
}
