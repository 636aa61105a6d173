// node --import tsx examples/quickjs/main.ts [--compiler]: what a warm interpreter costs to make, holds, and saves.
import { heapBytes } from './guest.ts'
import { compiler, createWarm } from './warm.ts'

const subject = process.argv.includes('--compiler')
  ? {
      options: { sources: compiler(), memoryBytes: 128 * 2 ** 20 },
      script: (at: number) =>
        `ts.transpile('enum Level { low, high = ${at} }; export const level: Level = Level.high')`,
      rounds: 100,
    }
  : {
      options: {},
      script: (at: number) =>
        `render('{{#each some}}{{> article}}{{/each}}', { some: goods.slice(${at % 990}).slice(0, 10) })`,
      rounds: 1000,
    }

const { manager, interpreter, run } = await createWarm(subject.options)
const { instantiateMs, memoryBytesAfter } = await manager.reload()
const heap = await manager.use((instance) => heapBytes(instance, interpreter))

async function millisecondsEach(script: (at: number) => string): Promise<number> {
  const started = performance.now()
  for (let at = 0; at < subject.rounds; at += 1) await run(script(at))
  return (performance.now() - started) / subject.rounds
}

console.table({
  'warm up, ms': instantiateMs,
  'heap in use, bytes': heap,
  'memory, bytes': memoryBytesAfter,
  'one script that does nothing, ms': await millisecondsEach(() => '0'),
  'one script that uses the library, ms': await millisecondsEach(subject.script),
})
await manager.close()
