// Calls off the event loop, against the pools of workers that do the same with V8.
import { availableParallelism } from 'node:os'
import { fileURLToPath } from 'node:url'
import { Piscina } from 'piscina'
import { Tinypool } from 'tinypool'
import { WasmModuleManager } from '../../index.js'
import { contest, type Effort, hot, ratio } from '../contest.ts'
import { add, echo } from '../guests.ts'
import type { Group } from '../report.ts'

const filename = fileURLToPath(new URL('../workers/peer.mjs', import.meta.url))
const size = 64 * 1024
const crowd = 1000

export default async function calls(effort: Effort): Promise<Group> {
  const threads = availableParallelism()
  const settings = { filename, minThreads: threads, maxThreads: threads, workerData: { add, echo } }
  const piscina = new Piscina(settings)
  const tinypool = new Tinypool(settings)
  const adder = await WasmModuleManager.create(add, { instances: threads })
  const echoer = await WasmModuleManager.create(echo)

  // The peer gets its buffer back by transfer and sends it again: nobody allocates.
  let ball = new Uint8Array(size).fill(7)
  const input = new Uint8Array(size).fill(7)
  const pingPong = async () => {
    ball = await piscina.run(ball, { name: 'process', transferList: [ball.buffer] })
  }
  await pingPong()
  const answer = await echoer.invoke('process', input)
  if (Buffer.compare(answer, input) !== 0 || Buffer.compare(ball, input) !== 0) throw new Error('the echo differs')

  const all = (one: () => Promise<unknown>) => () => Promise.all(Array.from({ length: crowd }, one))
  const standings = await contest(effort.rounds, {
    'one by one: manager.call': hot(effort, () => adder.call('add', [40, 2])),
    'one by one: piscina': hot(effort, () => piscina.run([40, 2], { name: 'sum' })),
    'one by one: tinypool': hot(effort, () => tinypool.run([40, 2], { name: 'sum' })),
    '1,000 at once: manager.call': hot(
      effort,
      all(() => adder.call('add', [40, 2])),
      crowd,
    ),
    '1,000 at once: piscina': hot(
      effort,
      all(() => piscina.run([40, 2], { name: 'sum' })),
      crowd,
    ),
    '1,000 at once: tinypool': hot(
      effort,
      all(() => tinypool.run([40, 2], { name: 'sum' })),
      crowd,
    ),
    '64 KiB: manager.invoke': hot(effort, () => echoer.invoke('process', input)),
    '64 KiB: piscina, transfer': hot(effort, pingPong),
  })
  await Promise.all([adder.close(), echoer.close(), piscina.destroy(), tinypool.destroy()])

  const cheaper = (what: string, ours: keyof typeof standings, peer: keyof typeof standings, atLeast?: number) => ({
    what,
    ratio: ratio(standings[peer], standings[ours]),
    ...(atLeast ? { goal: { atLeast } } : {}),
  })
  return {
    name: 'calls: off the event loop and back, time for one',
    standings,
    figures: [
      cheaper('as cheap as piscina, one by one', 'one by one: manager.call', 'one by one: piscina', 4),
      cheaper('as cheap as tinypool, one by one', 'one by one: manager.call', 'one by one: tinypool'),
      cheaper('as cheap as piscina, 1,000 at once', '1,000 at once: manager.call', '1,000 at once: piscina', 10),
      cheaper('as cheap as tinypool, 1,000 at once', '1,000 at once: manager.call', '1,000 at once: tinypool'),
      cheaper('as cheap as piscina, 64 KiB there and back', '64 KiB: manager.invoke', '64 KiB: piscina, transfer'),
    ],
  }
}
