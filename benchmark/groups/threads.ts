// Guests with threads: native ones here, against workers that share a memory on V8.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import { type GlueManager, loadGlue } from '../../index.js'
import { contest, type Effort, hot, ratio, repeated, since } from '../contest.ts'
import { threaded } from '../guests.ts'
import type { Group } from '../report.ts'

const POOL = 4

// biome-ignore lint/suspicious/noExplicitAny: glue has no types
type Any = any

const source = `
const memory = new WebAssembly.Memory({ initial: 2, maximum: 1024, shared: true })
const bytes = Buffer.from('${Buffer.from(threaded).toString('base64')}', 'base64')
const { exports: wasm } = new WebAssembly.Instance(new WebAssembly.Module(bytes), { env: { memory, ask: (x) => x } })
module.exports = { memory, wasm }`

export default async function threads(effort: Effort): Promise<Group> {
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-bench-'))
  const file = join(folder, 'threaded.cjs')
  writeFileSync(file, source)
  let manager: GlueManager<Any> | undefined
  const start = ({ wasm }: Any) => {
    wasm.open()
    for (let i = 0; i < POOL; i++) manager?.spawn([[wasm.serve]])
  }
  manager = await loadGlue<Any>(file, {
    cache: false,
    engine: { threads: true },
    threadPool: { start, exit: ({ wasm }: Any) => wasm.leave() },
  })
  const { wasm } = manager.module
  const v8 = onV8()

  const ours = manager
  const spawned = (calls: [string, ...number[]][][]) =>
    Promise.all(calls.map((its) => ours.spawn(its.map(([name, ...args]) => [wasm[name], ...args])).finished))
  const swaps = Math.ceil(20_000 * effort.share)
  /** Two threads that wake each other in turns. */
  const pingPong = async () => {
    wasm.clear()
    const begin = process.hrtime.bigint()
    await spawned([[['play', 0, swaps]], [['play', 1, swaps]]])
    return since(begin) / swaps
  }
  const asks = Math.ceil(20_000 * effort.share)
  const standings = await contest(effort.rounds, {
    'a wait that need not wait: here': hot(effort, () => wasm.miss()),
    'a wait that need not wait: V8': hot(effort, () => v8.exports.miss()),
    'two threads wake each other: here': repeated(1, pingPong),
    'an import of a thread, the JS thread waits in the guest': repeated(1, async () => {
      const begin = process.hrtime.bigint()
      wasm.clear()
      ours.spawn([[wasm.ask, asks]])
      wasm.join()
      return since(begin) / asks
    }),
    [`${POOL} threads start and end: here`]: repeated(Math.ceil(20 * effort.share), async () => {
      const begin = process.hrtime.bigint()
      await spawned(Array.from({ length: POOL }, () => [['served']]))
      return since(begin)
    }),
    [`${POOL} threads start and end: workers`]: repeated(Math.ceil(5 * effort.share), async () => {
      const begin = process.hrtime.bigint()
      await v8.run(Array.from({ length: POOL }, () => [['served']]))
      return since(begin)
    }),
    'recycling the pool': repeated(Math.ceil(20 * effort.share), async () => {
      if (ours.guestThreads.total === 0) start(ours.module)
      return (await ours.recycleThreads()).durationMs * 1e6
    }),
    'a reset with the pool': repeated(Math.ceil(20 * effort.share), async () => {
      if (ours.guestThreads.total === 0) start(ours.module)
      await ours.snapshot()
      const begin = process.hrtime.bigint()
      await ours.reset()
      const took = since(begin)
      // The next contestant begins without one.
      wasm.leave()
      while (ours.guestThreads.total > 0) await new Promise(setImmediate)
      return took
    }),
  })
  await manager.destroy()
  rmSync(folder, { recursive: true })
  const all = standings as Record<string, Any>
  return {
    name: 'threads: native threads of a guest, against workers on V8',
    standings,
    figures: [
      {
        what: 'the time of V8 for a wait that need not wait',
        ratio: ratio(all['a wait that need not wait: here'], all['a wait that need not wait: V8']),
      },
      {
        what: `as quick as workers to start and end ${POOL} threads`,
        ratio: ratio(all[`${POOL} threads start and end: workers`], all[`${POOL} threads start and end: here`]),
      },
      { what: `recycling a pool of ${POOL}`, ms: all['recycling the pool'].ns / 1e6, goal: { atMost: 100 } },
      {
        what: `a reset, with a pool of ${POOL} ended and started`,
        ms: all['a reset with the pool'].ns / 1e6,
        goal: { atMost: 100 },
      },
    ],
  }
}

/** The same module on Node's engine: the JS thread's instance, and workers. */
function onV8() {
  const memory = new WebAssembly.Memory({ initial: 2, maximum: 1024, shared: true })
  const module = new WebAssembly.Module(threaded as Uint8Array<ArrayBuffer>)
  const { exports } = new WebAssembly.Instance(module, { env: { memory, ask: (x: number) => x } })
  const file = new URL('../workers/threaded.mjs', import.meta.url)
  const run = (calls: [string, ...number[]][][]) =>
    Promise.all(
      calls.map(
        (its) =>
          new Promise((resolve, reject) => {
            const worker = new Worker(file, { workerData: { module, memory, calls: its }, execArgv: [] })
            worker.on('exit', resolve)
            worker.on('error', reject)
          }),
      ),
    )
  return { exports: exports as Any, run }
}
