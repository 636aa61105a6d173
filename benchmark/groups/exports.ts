// A synchronous export call: what a singleton's callers pay when the singleton becomes a manager.
// V8 inlines the call of its own export where a call site knows one target only; where it sees many, it calls, as everybody does.
import { createRequire } from 'node:module'
import { WasmModuleManager } from '../../index.js'
import { contest, type Effort, hot, ratio } from '../contest.ts'
import { manyAdds } from '../guests.ts'
import type { Group } from '../report.ts'

type Add = (a: number, b: number) => number
const many = 8

export default async function exportCalls(effort: Effort): Promise<Group> {
  const bytes = manyAdds(many)
  const manager = await WasmModuleManager.create(bytes)
  const ours = Object.values(manager.exports) as Add[]
  const v8s = Object.values(new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports) as Add[]
  const { __noop: noop } = createRequire(import.meta.url)('../../binding.js') as { __noop(): void }

  const [our, v8] = [ours[0], v8s[0]] as [Add, Add]
  let seed = 1
  let turn = 0
  const next = () => turn++ & (many - 1)
  const standings = await contest(effort.rounds, {
    'V8, one target (inlined)': hot(effort, () => {
      seed = v8(seed, 3)
    }),
    'manager.exports, one target': hot(effort, () => {
      seed = our(seed, 3)
    }),
    'V8, many targets': hot(effort, () => {
      seed = (v8s[next()] as Add)(seed, 3)
    }),
    'manager.exports, many targets': hot(effort, () => {
      seed = (ours[next()] as Add)(seed, 3)
    }),
    'manager.callSync': hot(effort, () => {
      seed = manager.callSync('add0', [seed, 3]) as number
    }),
    'empty Node-API function': hot(effort, () => noop()),
  })
  await manager.close()
  const against = (what: string, name: keyof typeof standings, peer: keyof typeof standings, atMost: number) => ({
    what,
    ratio: ratio(standings[name], standings[peer]),
    goal: { atMost },
  })
  const [one, several] = ['manager.exports, one target', 'manager.exports, many targets'] as const
  return {
    name: 'exports: one synchronous call of add(i32, i32)',
    standings,
    figures: [
      against("the time of V8's call, one target", one, 'V8, one target (inlined)', 8),
      against("the time of V8's call, many targets", several, 'V8, many targets', 8),
      against('the time of an empty Node-API function', one, 'empty Node-API function', 4),
    ],
  }
}
