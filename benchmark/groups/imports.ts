// A JS function called from the guest, where the guest runs on this thread and where it runs on a pool thread.
import { WasmModuleManager } from '../../index.js'
import { contest, type Effort, hot, ratio } from '../contest.ts'
import { caller } from '../guests.ts'
import type { Group } from '../report.ts'

const many = 1000
const few = 100

export default async function importCalls(effort: Effort): Promise<Group> {
  const imports = { env: { next: (value: number) => (value + 1) | 0 } }
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(caller), imports)
  const v8 = exports as { run(n: number): number }
  const manager = await WasmModuleManager.create(caller, { imports })
  const live = manager.exports as { run(n: number): number }
  if (v8.run(many) !== live.run(many)) throw new Error('the engines count differently')

  const standings = await contest(effort.rounds, {
    V8: hot(effort, () => v8.run(many), many),
    'manager.exports, on this thread': hot(effort, () => live.run(many), many),
    'manager.call, from a pool thread': hot(effort, () => manager.call('run', [few]), few),
  })
  await manager.close()
  const against = (name: keyof typeof standings, where: string) => ({
    what: `the time of V8's import, ${where}`,
    ratio: ratio(standings[name], standings.V8),
  })
  return {
    name: 'imports: the guest calls JS',
    standings,
    figures: [
      against('manager.exports, on this thread', 'on this thread'),
      against('manager.call, from a pool thread', 'from a pool thread'),
    ],
  }
}
