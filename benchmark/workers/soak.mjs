// An environment of the soak beside the main one: a manager of its own in a worker thread, which counts what it asked.
import { setImmediate } from 'node:timers/promises'
import { parentPort, workerData } from 'node:worker_threads'
import { WasmModuleManager } from '../../index.js'

const manager = await WasmModuleManager.create(workerData.guest, {
  name: 'worker',
  instances: 2,
  cache: workerData.cache,
  recycle: { memory: 4 * 2 ** 20, calls: 1000 },
})
const recycles = {}
manager.on('recycle', ({ reason }) => {
  recycles[reason] = (recycles[reason] ?? 0) + 1
})
let isOver = false
let asked = 0
let answered = 0
let trapped = 0
const problems = []
parentPort.on('message', () => {
  isOver = true
})
parentPort.postMessage({ ready: true })
await Promise.all([0, 1].map(call))
await manager.close()
for (let turn = 0; turn < 5; turn++) await setImmediate()
const { calls, reloads } = manager.stats()
parentPort.postMessage({ asked, answered, trapped, problems, recycles, calls, reloads })
parentPort.close()

async function call(caller) {
  for (let turn = caller; !isOver; turn += 2) {
    asked += 1
    const isTrap = turn % 200 === 199
    try {
      const answer = isTrap ? await manager.call('boom') : await manager.call('next', [turn, (turn * 37) % 16_384])
      if (answer !== (turn ^ 0x55555555)) problems.push(`next answered ${answer}`)
    } catch (error) {
      if (!isTrap || error.code !== 'ERR_WASM_TRAP') problems.push(`${error.code}: ${error.message}`)
      trapped += 1
    }
    answered += 1
    await new Promise((resolve) => setTimeout(resolve, turn % 4))
  }
}
