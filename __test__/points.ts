// The points of a manager's life at which a program or a worker may end, as texts of programs that get there.
import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import type { ReloadOptions } from '../index.js'
import { temporaryFolder, wat, workbench } from './guests.ts'
import { type Ended, INDEX_URL } from './support.ts'

/**
 * A point of a manager's life, as the text of a program that gets there.
 *
 * It calls `ready()` when it is there; `pending()` does so too, and returns a promise that `finish()` settles.
 * `create(options)` makes the manager, or `realm()` one of glue; `entered` is what the guest's import of that name does,
 * `settles(promise)` says which promise shows that the point has passed.
 */
export interface Point {
  program: string
  /** The thread does not come back from the guest: what ends the program happens inside an import, and is not caught. */
  isBlocking?: true
  /** How the point passes by itself; without, a program that forgets everything ends at once. */
  finish?: string
}

/** One row more when there is one more way to reload. */
const STRATEGIES: NonNullable<ReloadOptions['strategy']>[] = ['exclusive']

export const POINTS: Record<string, Point> = {
  'nothing runs': { program: `const manager = await create(); await manager.call('add', [1, 2]); ready()` },
  'a pool call runs': {
    program: `
      const manager = await create(); entered = ready
      const stop = new AbortController()
      settles(manager.call('spin', [], { signal: stop.signal }))
      finish = () => stop.abort()`,
    finish: 'finish()',
  },
  'pool calls run and others wait': {
    program: `
      const manager = await create({ instances: 2 }); entered = ready
      const stop = new AbortController()
      const calls = ['spin', 'spin', 'add', 'add', 'add'].map((name) => manager.call(name, [1, 2], { signal: stop.signal }))
      settles(Promise.allSettled(calls))
      finish = () => stop.abort()`,
    finish: 'finish()',
  },
  'an endless synchronous call runs': {
    program: `const manager = await create(); entered = ready; setImmediate(() => manager.exports.spin())`,
    isBlocking: true,
  },
  'an endless synchronous call runs without signals': {
    program: `
      const manager = await create({ engine: { signalsBasedTraps: false } })
      entered = ready; setImmediate(() => manager.exports.spin())`,
    isBlocking: true,
  },
  'a start function runs for ever in createSync': {
    program: `
      entered = ready
      setImmediate(() => WasmModuleManager.createSync(process.env.ENDLESS, { cache: false, imports: imports() }))`,
    isBlocking: true,
  },
  'an import of a synchronous call has called back into an endless guest': {
    program: `
      const manager = await create()
      entered = (instance) => { entered = ready; instance.exports.spin() }
      setImmediate(() => manager.exports.entered())`,
    isBlocking: true,
  },
  'an import of a pool call has called back into an endless guest': {
    program: `
      const manager = await create()
      entered = (instance) => { entered = ready; instance.exports.spin() }
      void manager.call('entered')`,
    isBlocking: true,
  },
  'a pool call waits for a promise of an import': {
    program: `const manager = await create(); settles(manager.call('hold', [1]))`,
    finish: 'finish()',
  },
  'the first initialize is pending': {
    program: `settles(create({ initialize: pending }))`,
    finish: 'finish()',
  },
  'a trapped instance waits for initialize': {
    program: `
      let count = 0
      const manager = await create({ initialize: () => (count += 1) > 1 ? pending() : undefined })
      await manager.call('boom').catch(() => {})
      settles(manager.call('add', [1, 2]))`,
    finish: 'finish()',
  },
  'a lease is held': { program: `const manager = await create(); globalThis.lease = await manager.acquire(); ready()` },
  'use() waits for a promise': {
    program: `const manager = await create(); settles(manager.use(pending))`,
  },
  'a call in a lease runs': {
    program: `
      const manager = await create(); entered = ready
      const stop = new AbortController()
      settles(manager.use((instance) => instance.call('spin', [], { signal: stop.signal })))
      finish = () => stop.abort()`,
    finish: 'finish()',
  },
  'a synchronous call in a lease runs for ever': {
    program: `
      const manager = await create(); entered = ready
      void manager.use((instance) => instance.exports.spin())`,
    isBlocking: true,
  },
  'a view is held, and used when all is over': {
    program: `
      const manager = await create()
      const view = new Uint8Array(manager.memory.buffer)
      process.on('exit', () => { view.fill(7); globalThis.sum = view.reduce((sum, byte) => sum + byte, 0) })
      // Collected, it would take the view along.
      globalThis.manager = manager
      ready()`,
  },
  'close() waits for a call': {
    program: `
      const manager = await create()
      manager.call('hold', [1]).catch(() => {})
      settles(manager.close())`,
    finish: 'finish()',
  },
  'destroy() is under way': {
    program: `
      const manager = await create({ instances: 2 })
      entered = () => { settles(manager.destroy()); ready() }
      manager.call('spin').catch(() => {})`,
    // It ends by itself.
    finish: '',
  },
  'guest threads of glue run and wait': {
    program: `
      const { manager, guest } = await realm()
      let count = 0
      entered = () => { count += 1 }
      for (const name of ['spin', 'wait', 'spin', 'wait']) manager.spawn([[guest.entered], [guest[name]]])
      // They alone keep nobody alive.
      while (count < 4) await new Promise((resolve) => setImmediate(resolve))
      ready()`,
  },
  'a guest in glue runs for ever, and so does a thread of it': {
    program: `
      const { manager, guest } = await realm()
      manager.spawn([[guest.spin]])
      setImmediate(() => { entered = ready; guest.entered(); guest.spin() })`,
    isBlocking: true,
  },
  'the JS thread waits in a guest of glue, and answers a thread of it': {
    program: `
      const { manager, guest } = await realm()
      entered = ready
      manager.spawn([[guest.entered], [guest.spin]])
      guest.wait()`,
    isBlocking: true,
  },
}

for (const strategy of STRATEGIES) {
  const started = `manager.reload({ strategy: '${strategy}' })`
  const reload = `settles(${started})`
  for (const hook of ['saveState', 'restoreState'] as const) {
    POINTS[`${hook} of a reload (${strategy}) is pending`] = {
      program: `const manager = await create({ saveState: () => 1, ${hook}: pending }); ${reload}`,
      finish: 'finish()',
    }
  }
  POINTS[`initialize of a reload (${strategy}) is pending`] = {
    program: `
      let count = 0
      const manager = await create({ initialize: () => (count += 1) > 1 ? pending() : undefined })
      ${reload}`,
    finish: 'finish()',
  }
  POINTS[`a hook of a reload (${strategy}) is inside an endless guest`] = {
    program: `
      const manager = await create({ saveState: (instance) => instance.exports.spin() })
      entered = ready
      void ${started}`,
    isBlocking: true,
  }
  POINTS[`a reload (${strategy}) drains`] = {
    program: `const manager = await create(); manager.call('hold', [1]).catch(() => {}); ${reload}`,
    finish: 'finish()',
  }
}

const ENDLESS = wat(
  `(module (import "env" "entered" (func $entered)) (func $start (call $entered) (loop (br 0))) (start $start))`,
  'endless',
)

/** The file of glue whose guest has threads. */
const GLUE = join(temporaryFolder('glue'), 'glue.cjs')
const bytes: Uint8Array = createRequire(import.meta.url)('../binding.js').__assemble(`(module
  (import "env" "entered" (func $entered))
  (memory (import "env" "memory") 1 1 shared)
  (func (export "entered") (call $entered))
  (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
  (func (export "spin") (loop (br 0)))
  (func (export "wait") (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))`)
writeFileSync(
  GLUE,
  `const memory = new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true })
  const env = { memory, entered: () => exports.entered() }
  const bytes = Buffer.from('${Buffer.from(bytes).toString('base64')}', 'base64')
  exports.guest = new WebAssembly.Instance(new WebAssembly.Module(bytes), { env }).exports`,
)

/** The same for programs and for workers; `act` is what they do at the point. */
export const SCENE = `
  import { loadGlue as loadRealm } from ${JSON.stringify(INDEX_URL)}
  let entered = () => {}
  let finish = () => {}
  const ready = () => act()
  const pending = () => new Promise((resolve) => { finish = () => resolve(1); ready() })
  const imports = () => (instance) => ({ env: { entered: () => { entered(instance) }, hold: pending } })
  const create = (options) => WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports: imports(), ...options })
  const realm = async () => {
    const manager = await loadRealm(process.env.GLUE, { cache: false, engine: { threads: true } })
    manager.module.entered = () => entered()
    return { manager, guest: manager.module.guest }
  }
  const settles = (promise) => promise.then(() => passed(), () => passed())
  let passed = () => {}
`

/** What ends it; in a blocking import at once, else when the point has been reached for sure. */
export const deferred = (act: string, point: Point) =>
  point.isBlocking ? `const act = () => { ${act} }` : `const act = () => { setImmediate(() => { ${act} }) }`

export const THROW = `throw new Error('on purpose')`
export const REJECT = `Promise.reject(new Error('on purpose'))`

export const env = { WORKBENCH: workbench, ENDLESS, GLUE }

/** As runtimes report what nobody has caught: some do not call it by its name. */
export const UNCAUGHT = /error: .*on purpose/i

/** What a program says whose worker has failed: Deno tells of that itself. */
export const WORKER_FAILED = process.versions.deno === undefined ? /^$/ : /^(error: Uncaught [\s\S]*)?$/

export function assertEnded(ended: Ended, code: number, stderr: RegExp = /^$/): void {
  assert.deepEqual([ended.code, ended.signal], [code, null], `${ended.stderr}\n${ended.stdout}`)
  assert.match(ended.stderr, stderr)
}
