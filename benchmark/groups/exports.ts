// A synchronous export call: what a singleton's callers pay when the singleton becomes a manager.
// V8 inlines the call of its own export where a call site knows one target only; where it sees many, it calls, as everybody does.
import { createRequire } from 'node:module'
import { WasmModuleManager } from '../../index.js'
import { contest, type Effort, hot, ratio } from '../contest.ts'
import { add } from '../guests.ts'
import type { Group } from '../report.ts'

type Add = (a: number, b: number) => number
const many = 8

export default async function exportCalls(effort: Effort): Promise<Group> {
  const managers = await Promise.all(Array.from({ length: many }, () => WasmModuleManager.create(add)))
  const ours = managers.map((manager) => manager.exports.add as Add)
  const module = new WebAssembly.Module(add)
  const v8s = Array.from({ length: many }, () => new WebAssembly.Instance(module).exports.add as Add)
  const { __noop: noop } = createRequire(import.meta.url)('../../binding.js') as { __noop(): void }

  const [manager] = managers as [WasmModuleManager]
  const live = manager.exports as { add: Add }
  const v8 = { add: v8s[0] as Add }
  let seed = 1
  let turn = 0
  const next = () => turn++ & (many - 1)
  const standings = await contest(effort.rounds, {
    'V8 export, one target (inlined)': hot(effort, () => {
      seed = v8.add(seed, 3)
    }),
    'manager.exports, one target': hot(effort, () => {
      seed = live.add(seed, 3)
    }),
    'V8 export, many targets': hot(effort, () => {
      seed = (v8s[next()] as Add)(seed, 3)
    }),
    'manager.exports, many targets': hot(effort, () => {
      seed = (ours[next()] as Add)(seed, 3)
    }),
    'empty Node-API function': hot(effort, () => noop()),
    'manager.callSync': hot(effort, () => {
      seed = manager.callSync('add', [seed, 3]) as number
    }),
  })
  await Promise.all(managers.map((each) => each.close()))
  const against = (what: string, name: keyof typeof standings, peer: keyof typeof standings, atMost: number) => ({
    what,
    ratio: ratio(standings[name], standings[peer]),
    unit: 'its time',
    goal: { atMost },
  })
  return {
    name: 'exports: one synchronous call of add(i32, i32)',
    standings,
    figures: [
      against(
        "manager.exports against V8's own, one target",
        'manager.exports, one target',
        'V8 export, one target (inlined)',
        8,
      ),
      against(
        "manager.exports against V8's own, many targets",
        'manager.exports, many targets',
        'V8 export, many targets',
        8,
      ),
      against(
        'manager.exports against an empty Node-API function',
        'manager.exports, one target',
        'empty Node-API function',
        4,
      ),
    ],
  }
}
