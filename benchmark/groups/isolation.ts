// What isolation costs each call, against what else gives each call an instance that nobody has used.
import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import { WasmModuleManager } from '../../index.js'
import { contest, type Effort, hot, median, ratio, repeated, type Standing, since } from '../contest.ts'
import { type Pages, pageBytes, pages } from '../guests.ts'
import type { Figure, Group } from '../report.ts'

const crowd = 1000
/** Of the work: a few pages. */
const written = 4 * pageBytes
const warmBytes = 1 << 20

const filename = new URL('../workers/once.mjs', import.meta.url)

export default async function isolation(effort: Effort): Promise<Group> {
  const threads = availableParallelism()
  const bytecode = pages(warmBytes >> 20)
  const module = new WebAssembly.Module(bytecode)
  const work = [0, written, 2] as const
  const warmUp = [0, warmBytes, 1] as const
  const initialize = ({ exports }: { exports: object }) => (exports as Pages).fill(...warmUp)
  const shared = await WasmModuleManager.create(bytecode, { instances: threads })
  const isolated = await WasmModuleManager.create(bytecode, { instances: threads, isolation: 'per-call' })
  const warm = await WasmModuleManager.create(bytecode, { instances: threads, isolation: 'per-call', initialize })
  await check(isolated, 0)
  await check(warm, 1)

  const all = (manager: WasmModuleManager) => () =>
    Promise.all(Array.from({ length: crowd }, () => manager.call('fill', work)))
  const onV8 = (...fills: (readonly [number, number, number])[]) =>
    hot(effort, () => {
      const guest = new WebAssembly.Instance(module).exports as unknown as Pages
      for (const fill of fills) guest.fill(...fill)
    })
  const worker = (...fills: (readonly [number, number, number])[]) =>
    repeated(Math.max(3, Math.ceil(20 * effort.share)), () => inWorker({ module, fills }))
  const standings = await contest(effort.rounds, {
    'one by one: shared': hot(effort, () => shared.call('fill', work)),
    'one by one: per call': hot(effort, () => isolated.call('fill', work)),
    'one by one: V8, a new instance each': onV8(work),
    'one by one: a worker thread each': worker(work),
    '1,000 at once: shared': hot(effort, all(shared), crowd),
    '1,000 at once: per call': hot(effort, all(isolated), crowd),
    'warmed up, one by one: per call': hot(effort, () => warm.call('fill', work)),
    'warmed up, 1,000 at once: per call': hot(effort, all(warm), crowd),
    'warmed up, one by one: V8, a new instance each': onV8(warmUp, work),
    'warmed up, one by one: a worker thread each': worker(warmUp, work),
  })
  await Promise.all([shared.close(), isolated.close(), warm.close()])
  globalThis.gc?.()

  const more = (how: string, over: Standing, under: Standing): Figure => ({
    what: `more for each call than shared, ${how}`,
    ms: median(over.turns.map((ns, round) => ns - (under.turns[round] ?? under.ns))) / 1e6,
    goal: { atMost: 0.03 },
  })
  const cheaper = (what: string, ours: keyof typeof standings, peer: keyof typeof standings): Figure => ({
    what,
    ratio: ratio(standings[peer], standings[ours]),
  })
  return {
    name: 'isolation: a call that writes 4 pages, time for one',
    standings,
    figures: [
      more('one by one', standings['one by one: per call'], standings['one by one: shared']),
      more('1,000 at once', standings['1,000 at once: per call'], standings['1,000 at once: shared']),
      cheaper('as cheap as a new V8 instance each', 'one by one: per call', 'one by one: V8, a new instance each'),
      cheaper('as cheap as a worker thread each', 'one by one: per call', 'one by one: a worker thread each'),
      cheaper(
        'as cheap as a new V8 instance each, 1,000 at once',
        '1,000 at once: per call',
        'one by one: V8, a new instance each',
      ),
      cheaper(
        'as cheap as a new V8 instance each, 1 MiB of warm-up',
        'warmed up, one by one: per call',
        'warmed up, one by one: V8, a new instance each',
      ),
      cheaper(
        'as cheap as a worker thread each, 1 MiB of warm-up',
        'warmed up, one by one: per call',
        'warmed up, one by one: a worker thread each',
      ),
    ],
  }
}

/** The second call must not see what the first has written. */
async function check(manager: WasmModuleManager, value: number): Promise<void> {
  await manager.call('fill', [0, written, 2])
  if ((await manager.call('sum', [0, pageBytes])) !== value) throw new Error('a call has seen another one')
}

/** Until it has answered; its end is waited for, and not timed. */
async function inWorker(workerData: object): Promise<number> {
  const start = process.hrtime.bigint()
  const worker = new Worker(filename, { workerData, execArgv: [] })
  let taken = 0
  await new Promise<void>((resolve, reject) => {
    worker.once('message', () => {
      taken = since(start)
    })
    worker.once('error', reject)
    worker.once('exit', () => resolve())
  })
  return taken
}
