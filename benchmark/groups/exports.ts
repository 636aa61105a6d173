// A synchronous export call: what a singleton's callers pay when the singleton becomes a manager.
import { createRequire } from 'node:module'
import { WasmModuleManager } from '../../index.js'
import { contest, type Effort, hot, ratio } from '../contest.ts'
import { add } from '../guests.ts'
import type { Group } from '../report.ts'

export default async function exportCalls(effort: Effort): Promise<Group> {
  const v8 = new WebAssembly.Instance(new WebAssembly.Module(add)).exports as { add(a: number, b: number): number }
  const manager = await WasmModuleManager.create(add)
  const live = manager.exports as { add(a: number, b: number): number }
  const { __noop: noop } = createRequire(import.meta.url)('../../binding.js') as { __noop(): void }
  let seed = 1
  const standings = await contest(effort.rounds, {
    'V8 export, add(i32, i32)': hot(effort, () => {
      seed = v8.add(seed, 3)
    }),
    'manager.exports.add': hot(effort, () => {
      seed = live.add(seed, 3)
    }),
    'manager.callSync("add")': hot(effort, () => {
      seed = manager.callSync('add', [seed, 3]) as number
    }),
    'empty Node-API function': hot(effort, () => noop()),
  })
  await manager.close()
  const ours = standings['manager.exports.add']
  return {
    name: 'exports: one synchronous call',
    standings,
    figures: [
      {
        what: "manager.exports.add against V8's own export call",
        ratio: ratio(ours, standings['V8 export, add(i32, i32)']),
        unit: 'its time',
        goal: { atMost: 8 },
      },
      {
        what: 'manager.exports.add against an empty Node-API function',
        ratio: ratio(ours, standings['empty Node-API function']),
        unit: 'its time',
        goal: { atMost: 4 },
      },
    ],
  }
}
