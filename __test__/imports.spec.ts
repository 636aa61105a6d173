// Imports from JavaScript, for guests on the JS thread and on pool threads.
import assert from 'node:assert/strict'
import { AsyncLocalStorage } from 'node:async_hooks'
import { test } from 'node:test'
import type { Imports, InstanceContext, WasmModuleManager as Manager, ManagerOptions } from '../index.js'
import { wat } from './guests.ts'
import {
  barrier,
  bench,
  child,
  hasCode,
  INDEX_URL,
  LIMIT,
  managed,
  managedSync,
  outcome,
  reported,
  turns,
  until,
} from './support.ts'

type Run = (manager: Manager, name: string, args?: unknown[]) => Promise<unknown>

/** The ways into a guest. Whatever an import does must come out the same. */
const PATHS: [string, Run][] = [
  ['exports', async (manager, name, args = []) => manager.exports[name]?.(...args)],
  ['callSync', async (manager, name, args = []) => manager.callSync(name, args)],
  ['call', (manager, name, args = []) => manager.call(name, args)],
  ['lease.exports', (manager, name, args = []) => manager.use((instance) => instance.exports[name]?.(...args))],
  ['lease.call', (manager, name, args = []) => manager.use((instance) => instance.call(name, args))],
]
const POOL = PATHS.filter(([name]) => name === 'call' || name === 'lease.call')
const HERE = PATHS.filter(([name]) => name !== 'call' && name !== 'lease.call')

const SIMPLE = wat(`(module
  (import "env" "f" (func $f (param i32) (result i32)))
  (memory (export "memory") 1 100)
  (global $n (mut i32) (i32.const 0))
  (func (export "run") (param i32) (result i32) (i32.add (call $f (local.get 0)) (i32.const 1)))
  (func (export "twice") (param i32) (result i32) (call $f (call $f (local.get 0))))
  (func (export "inc") (result i32)
    (global.set $n (i32.add (global.get $n) (i32.const 1)))
    (global.get $n))
  (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "boom") (unreachable))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))`)

type F = (n: number) => unknown
const simple = (f: F, options: ManagerOptions = {}): ManagerOptions => ({ imports: { env: { f } }, ...options })

for (const [path, run] of PATHS) {
  test(`${path}: an import gets its arguments, without a this, and its result goes to the guest`, LIMIT, async (t) => {
    const seen: unknown[] = []
    const manager = await managed(t, SIMPLE, {
      imports: {
        env: {
          f(this: unknown, ...args: unknown[]) {
            seen.push(this, args)
            return (args[0] as number) * 10
          },
        },
      },
    })
    assert.equal(await run(manager, 'run', [4]), 41)
    assert.equal(await run(manager, 'twice', [4]), 400)
    assert.deepEqual(seen[1], [4])
    assert.equal(seen[0], undefined)
  })

  test(
    `${path}: what an import throws comes out as the very same value, and the instance stays usable`,
    LIMIT,
    async (t) => {
      let next: unknown
      const manager = await managed(
        t,
        SIMPLE,
        simple(() => {
          throw next
        }),
      )
      const values: unknown[] = [
        new Error('mine'),
        new TypeError('mine'),
        Object.freeze(new Error('frozen')),
        'a string',
        '',
        42,
        0,
        -0,
        Number.NaN,
        true,
        false,
        null,
        undefined,
        7n,
        Symbol('s'),
        { odd: 1 },
        () => {},
        [1],
        Object.create(null),
        new Proxy({}, {}),
      ]
      await run(manager, 'inc')
      for (const value of values) {
        next = value
        const end = await outcome(run(manager, 'run', [1]))
        assert.ok('error' in end)
        assert.ok(Object.is(end.error, value), `${typeof value} ${String((value as Error)?.message ?? typeof value)}`)
      }
      assert.equal(await run(manager, 'inc'), 2)
      assert.equal(manager.generation, 1)
    },
  )

  test(`${path}: an import may call back into the guest, which may call back, to depth 50`, LIMIT, async (t) => {
    let deepest = 0
    const manager = await managed(t, SIMPLE, {
      imports: (instance: InstanceContext) => ({
        env: {
          f: (n: number) => {
            deepest = Math.max(deepest, n)
            return n >= 50 ? 1000 : instance.exports.run?.(n + 1)
          },
        },
      }),
    })
    assert.equal(await run(manager, 'run', [1]), 1050)
    assert.equal(deepest, 50)
    assert.equal(await run(manager, 'inc'), 1)
  })

  test(`${path}: re-entrance as deep as the stack allows, and beyond it a clean end`, LIMIT, async (t) => {
    const levels = 128
    let deepest = 0
    const manager = await managed(t, SIMPLE, {
      imports: (instance: InstanceContext) => ({
        env: {
          f: (n: number) => {
            deepest = Math.max(deepest, n)
            return n === levels ? 1000 : instance.exports.run?.(n + 1)
          },
        },
      }),
    })
    assert.equal(await run(manager, 'run', [1]), 1000 + levels)
    deepest = 0
    // Without an end: whoever's stack is used up first says so, the guest's or JavaScript's own.
    const { error } = (await outcome(run(manager, 'run', [levels + 1]))) as { error: { code?: string; trap?: string } }
    assert.ok(deepest > 2 * levels)
    if (!(error instanceof RangeError)) {
      assert.deepEqual([error.code, error.trap], ['ERR_WASM_TRAP', 'stack-overflow'])
    }
    assert.equal(await run(manager, 'inc'), 1)
  })

  test(
    `${path}: an exception crosses every level of re-entrance as itself, and can be caught on the way`,
    LIMIT,
    async (t) => {
      const thrown = { from: 'the depth' }
      let caught = 0
      const manager = await managed(t, SIMPLE, {
        imports: (instance: InstanceContext) => ({
          env: {
            f: (n: number) => {
              if (n >= 20) throw thrown
              try {
                return instance.exports.run?.(n + 1)
              } catch (error) {
                assert.equal(error, thrown)
                caught += 1
                if (n === 5) return 0
                throw error
              }
            },
          },
        }),
      })
      // Caught at 5, so the call itself ends well: 0 + 1 for each level from 5 up to 1.
      assert.equal(await run(manager, 'run', [1]), 5)
      assert.equal(caught, 15)
      const end = await outcome(run(manager, 'run', [6]))
      assert.ok('error' in end)
      assert.equal(end.error, thrown)
      assert.equal(manager.generation, 1)
    },
  )

  test(`${path}: exports of the manager, too, mean the calling instance inside an import`, LIMIT, async (t) => {
    const manager: Manager = await managed(t, SIMPLE, {
      instances: 2,
      threads: 2,
      imports: {
        env: {
          f: () => {
            manager.exports.store?.(5, 77)
            return manager.callSync('load', [5])
          },
        },
      },
    })
    assert.equal(await run(manager, 'run', [1]), 78)
  })

  test(
    `${path}: a trap in a nested call comes out as a trap, and the instance is replaced even if JavaScript caught it`,
    LIMIT,
    async (t) => {
      let swallow = false
      const manager = await managed(t, SIMPLE, {
        imports: (instance: InstanceContext) => ({
          env: {
            f: () => {
              try {
                instance.exports.boom?.()
              } catch (error) {
                hasCode('ERR_WASM_TRAP')(error)
                if (!swallow) throw error
              }
              return 1
            },
          },
        }),
      })
      const end = await outcome(run(manager, 'run', [1]))
      assert.ok('error' in end)
      hasCode('ERR_WASM_TRAP')(end.error)
      await run(manager, 'inc')
      swallow = true
      await outcome(run(manager, 'run', [1]))
      assert.equal(await run(manager, 'inc'), 1)
      assert.equal(manager.generation, 3)
    },
  )

  test(
    `${path}: an import that returns an object with then, but no promise, is coerced like any object`,
    LIMIT,
    async (t) => {
      const manager = await managed(
        t,
        SIMPLE,
        // biome-ignore lint/suspicious/noThenProperty: that is what this test is about.
        simple(() => ({ then: 5, valueOf: () => 8 })),
      )
      assert.equal(await run(manager, 'run', [1]), 9)
    },
  )

  test(`${path}: an import may grow the memory through its instance, and everybody sees it`, LIMIT, async (t) => {
    const manager = await managed(t, SIMPLE, {
      imports: (instance: InstanceContext) => ({
        env: {
          f: (n: number) => {
            const before = instance.memory.buffer
            const pages = before.byteLength / 65_536
            assert.equal(instance.exports.grow?.(n), pages)
            assert.equal(before.byteLength, 0)
            return instance.memory.byteLength / 65_536
          },
        },
      }),
    })
    assert.equal(await run(manager, 'run', [2]), 4)
    assert.equal(await run(manager, 'twice', [1]), 4 + 4)
  })
}

for (const [path, run] of POOL) {
  test(`${path}: an import may return a promise: the guest waits, the event loop does not`, LIMIT, async (t) => {
    const gate = barrier<number>()
    const arrived = barrier()
    const manager = await managed(
      t,
      SIMPLE,
      simple(() => {
        arrived.open()
        return gate.promise
      }),
    )
    const call = run(manager, 'run', [1])
    await arrived.promise
    let ticks = 0
    for (; ticks < 50; ticks += 1) await new Promise((resolve) => setImmediate(resolve))
    gate.open(99)
    assert.equal(await call, 100)
    assert.equal(ticks, 50)
  })

  test(`${path}: what a promise of an import rejects with comes out as the very same value`, LIMIT, async (t) => {
    let next: unknown
    const manager = await managed(
      t,
      SIMPLE,
      simple(async () => {
        await turns(1)
        throw next
      }),
    )
    for (const value of [new Error('mine'), 'text', 0, null, undefined, 5n, Symbol('s'), Object.freeze({})]) {
      next = value
      const end = await outcome(run(manager, 'run', [1]))
      assert.ok('error' in end)
      assert.ok(Object.is(end.error, value))
    }
    assert.equal(await run(manager, 'inc'), 1)
    assert.equal(manager.generation, 1)
  })

  test(`${path}: after an await the import may still use its instance, in turn with others`, LIMIT, async (t) => {
    const manager = await managed(t, SIMPLE, {
      imports: (instance: InstanceContext) => ({
        env: {
          f: async (n: number) => {
            instance.exports.store?.(0, n)
            await turns()
            const before = instance.exports.load?.(0) as number
            instance.exports.store?.(0, before + 1)
            await turns()
            return instance.exports.load?.(0)
          },
        },
      }),
    })
    assert.equal(await run(manager, 'run', [40]), 42)
    assert.equal(await run(manager, 'twice', [10]), 12)
    assert.equal(manager.generation, 1)
  })

  test(`${path}: several calls wait for promises at once, each in its own instance`, LIMIT, async (t) => {
    const gates = new Map<number, ReturnType<typeof barrier<number>>>()
    const manager = await managed(t, SIMPLE, {
      ...simple((n) => {
        const gate = barrier<number>()
        gates.set(n, gate)
        return gate.promise
      }),
      instances: 3,
      threads: 3,
    })
    const calls = [1, 2, 3].map((n) => run(manager, 'run', [n]))
    await until(() => gates.size === 3)
    // Answered in another order than asked.
    for (const n of [2, 3, 1]) gates.get(n)?.open(n * 100)
    assert.deepEqual(await Promise.all(calls), [101, 201, 301])
  })

  test(
    `${path}: a promise in a nested call cannot be waited for: ERR_WASM_ASYNC_IMPORT, and the outer call goes on`,
    LIMIT,
    async (t) => {
      let isAsync = false
      const manager = await managed(t, SIMPLE, {
        imports: (instance: InstanceContext) => ({
          env: {
            f: (n: number) => {
              if (n === 2) return isAsync ? Promise.resolve(5) : 5
              isAsync = true
              assert.throws(() => instance.exports.run?.(2), hasCode('ERR_WASM_ASYNC_IMPORT', /'?env\.f'?/))
              isAsync = false
              return instance.exports.run?.(2)
            },
          },
        }),
      })
      assert.equal(await run(manager, 'run', [1]), 7)
      assert.equal(manager.generation, 1)
    },
  )
}

/** Like a query builder: nothing happens before somebody asks. */
function lazy(value: unknown, fails = false) {
  const made = {
    asked: 0,
    // biome-ignore lint/suspicious/noThenProperty: that is what these tests are about.
    then(resolve: (value: unknown) => void, reject: (reason: unknown) => void) {
      made.asked += 1
      setImmediate(() => (fails ? reject(value) : resolve(value)))
    },
  }
  return made
}

for (const [path, run] of POOL) {
  test(`${path}: a thenable that is no promise is waited for like one`, LIMIT, async (t) => {
    const reason = { why: 'refused' }
    const returned = [lazy(5), Object.assign(() => {}, lazy(6)), lazy(lazy(7)), lazy(reason, true)]
    const manager = await managed(
      t,
      SIMPLE,
      simple(() => returned.shift()),
    )
    assert.deepEqual(
      [await run(manager, 'run', [1]), await run(manager, 'run', [1]), await run(manager, 'run', [1])],
      [6, 7, 8],
    )
    assert.deepEqual(await outcome(run(manager, 'run', [1])), { error: reason })
    assert.equal(manager.generation, 1)
  })

  test(`${path}: a getter of then that throws is what the call ends with`, LIMIT, async (t) => {
    const reason = new Error('from the getter')
    const manager = await managed(
      t,
      SIMPLE,
      simple(() => Object.defineProperty({}, 'then', { get: () => assert.fail(reason) })),
    )
    const end = await outcome(run(manager, 'run', [1]))
    assert.ok('error' in end)
    assert.equal(end.error, reason)
  })
}

test('where the result is a reference, a thenable that is no promise is the value itself', LIMIT, async (t) => {
  const thenable = lazy(1)
  const source = wat(
    `(module (import "env" "f" (func $f (result externref)))
      (func (export "is") (param externref) (result externref) (call $f)))`,
  )
  const manager = await managed(t, source, { imports: { env: { f: () => thenable } } })
  assert.equal(manager.exports.is?.(null), thenable)
  assert.equal(thenable.asked, 0)
})

for (const [path, run] of HERE) {
  test(`${path}: a thenable cannot be waited for either, and a lazy one is not started`, LIMIT, async (t) => {
    const thenable = lazy(1)
    const manager = await managed(
      t,
      SIMPLE,
      simple(() => thenable),
    )
    const end = await outcome(run(manager, 'run', [1]))
    assert.ok('error' in end)
    hasCode('ERR_WASM_ASYNC_IMPORT', /'?env\.f'?[\s\S]*call\(\)/)(end.error)
    assert.equal(thenable.asked, 0)
  })

  test(
    `${path}: a promise of an import cannot be waited for: ERR_WASM_ASYNC_IMPORT names the import and the remedy`,
    LIMIT,
    async (t) => {
      const manager = await managed(
        t,
        SIMPLE,
        simple(async () => 1),
      )
      const end = await outcome(run(manager, 'run', [1]))
      assert.ok('error' in end)
      hasCode('ERR_WASM_ASYNC_IMPORT', /'?env\.f'?[\s\S]*call\(\)/)(end.error)
      assert.equal(await manager.call('run', [1]), 2)
      assert.equal(manager.generation, 1)
    },
  )
}

test(
  'a rejected promise that a synchronous call could not wait for does not end the process later',
  LIMIT,
  async () => {
    const ended = await child(
      `
    const unhandled = []
    process.on('unhandledRejection', (reason) => unhandled.push(String(reason)))
    const manager = WasmModuleManager.createSync(process.env.SIMPLE, {
      cache: false, imports: { env: { f: () => Promise.reject('lost') } },
    })
    let code
    try { manager.exports.run(1) } catch (error) { code = error.code }
    // Node tells of it at the end of a turn.
    for (let i = 0; i < 5; i += 1) await new Promise((resolve) => setImmediate(resolve))
    report({ code, unhandled })
    `,
      { env: { SIMPLE } },
    )
    assert.deepEqual(reported(ended), { code: 'ERR_WASM_ASYNC_IMPORT', unhandled: [] })
  },
)

// ---------------------------------------------------------------- whose instance

test(
  'an imports function is called once per instance and gets the instance that its imports belong to',
  LIMIT,
  async (t) => {
    const contexts: InstanceContext[] = []
    const manager = await managed(t, SIMPLE, {
      instances: 3,
      threads: 3,
      imports: (instance: InstanceContext) => {
        contexts.push(instance)
        const own = contexts.length
        return {
          env: {
            f: (n: number) => {
              // Writes into its own memory, and reads from it.
              instance.memory.write(n, Uint8Array.of(own))
              return (instance.exports.load?.(n) as number) * 100 + own
            },
          },
        }
      },
    })
    assert.equal(contexts.length, 3)
    const leases = await Promise.all([manager.acquire(), manager.acquire(), manager.acquire()])
    const seen = new Set<number>()
    for (const lease of leases) {
      const here = lease.exports.run?.(10) as number
      const there = (await lease.call('run', [10])) as number
      assert.equal(here, there)
      const own = (here - 1) % 100
      assert.equal(here, own * 101 + 1)
      assert.equal(lease.exports.load?.(10), own)
      seen.add(own)
    }
    assert.deepEqual([...seen].sort(), [1, 2, 3])
    for (const lease of leases) lease.release()
    assert.deepEqual(
      contexts.map((context) => context.generation),
      [1, 1, 1],
    )
  },
)

test('the context of an old generation is stale once it is replaced', LIMIT, async (t) => {
  const contexts: InstanceContext[] = []
  const manager = await managed(t, SIMPLE, {
    imports: (instance: InstanceContext) => {
      contexts.push(instance)
      return { env: { f: (n: number) => n } }
    },
  })
  await manager.reload()
  const [old, current] = contexts
  assert.ok(old && current)
  assert.equal(current.generation, 2)
  assert.throws(() => old.exports.inc?.(), hasCode('ERR_WASM_STALE_HANDLE'))
  assert.throws(() => old.memory.buffer, hasCode('ERR_WASM_STALE_HANDLE'))
  assert.throws(() => old.memory.read(0, 1), hasCode('ERR_WASM_STALE_HANDLE'))
})

test(
  'an imports function may return nothing where nothing is needed, and must not return a promise',
  LIMIT,
  async (t) => {
    const source = wat('(module (func (export "one") (result i32) (i32.const 1)))')
    assert.equal(
      (await managed(t, source, { imports: (() => undefined) as unknown as () => Imports })).exports.one?.(),
      1,
    )
    const asynchronous = (async () => ({})) as unknown as () => Imports
    await assert.rejects(
      managed(t, SIMPLE, { imports: asynchronous }),
      hasCode('ERR_WASM_ASYNC_IMPORT', /imports function/),
    )
  },
)

test('the imports object may be a glue module full of functions, with prototypes and getters', LIMIT, async (t) => {
  class Glue {
    static shift = 5
    get f() {
      return (n: number) => n + Glue.shift
    }
  }
  const namespace = Object.create({ inherited: true }) as Imports
  namespace.env = new Glue() as unknown as Record<string, unknown>
  const manager = await managed(t, SIMPLE, { imports: namespace })
  assert.equal(manager.exports.run?.(1), 7)
  assert.equal(await manager.call('run', [1]), 7)
})

test(
  'imports are read when the instance is made: later changes of the object do not matter until the next one',
  LIMIT,
  async (t) => {
    const env: Record<string, F> = { f: () => 1 }
    const manager = await managed(t, SIMPLE, { imports: { env } })
    env.f = () => 10
    assert.equal(manager.exports.run?.(0), 2)
    manager.reloadSync()
    assert.equal(manager.exports.run?.(0), 11)
  },
)

test('several hundred imports are bound to the right functions', LIMIT, async (t) => {
  const count = 400
  const source = wat(`(module
    ${Array.from({ length: count }, (_, i) => `(import "m${i % 7}" "f${i}" (func $f${i} (result i32)))`).join('\n')}
    ${Array.from({ length: count }, (_, i) => `(func (export "g${i}") (result i32) (call $f${i}))`).join('\n')})`)
  const imports: Imports = {}
  for (let i = 0; i < count; i += 1) {
    const name = `m${i % 7}`
    imports[name] = { ...imports[name], [`f${i}`]: () => i * 3 }
  }
  const manager = await managed(t, source, { imports })
  for (let i = 0; i < count; i += 1) assert.equal(manager.exports[`g${i}`]?.(), i * 3)
  assert.equal(await manager.call('g399'), 399 * 3)
})

test('an import may be another manager export, or a built-in', LIMIT, async (t) => {
  const inner = await managed(
    t,
    SIMPLE,
    simple((n) => n * 2),
  )
  const outer = await managed(t, SIMPLE, { imports: { env: { f: inner.exports.run } } })
  assert.equal(outer.exports.run?.(4), 10)
  assert.equal(await outer.call('run', [4]), 10)
  const builtin = await managed(t, SIMPLE, { imports: { env: { f: Math.abs } } })
  assert.equal(builtin.exports.run?.(-4), 5)
})

// ---------------------------------------------------------------- what imports may do

test('an import may start asynchronous work on its own manager and others', LIMIT, async (t) => {
  const later: Promise<unknown>[] = []
  const manager: Manager = await managed(t, SIMPLE, {
    imports: {
      env: {
        f: (n: number) => {
          later.push(
            manager.call('inc'),
            manager.use((instance) => instance.exports.inc?.()),
          )
          return n
        },
      },
    },
  })
  assert.equal(manager.exports.run?.(1), 2)
  assert.equal(await manager.call('run', [1]), 2)
  assert.deepEqual((await Promise.all(later)).sort(), [1, 2, 3, 4])
})

test(
  'an import that waits for a call of its own manager with one instance is a deadlock that a timeout ends',
  LIMIT,
  async (t) => {
    const manager: Manager = await managed(t, SIMPLE, {
      imports: { env: { f: () => manager.call('inc') } },
    })
    await assert.rejects(manager.call('run', [1], { timeoutMs: 50 }), hasCode('ERR_WASM_TIMEOUT'))
    assert.equal(await manager.call('inc').then(() => 'served'), 'served')
  },
)

test('imports of several managers interleave without mixing up', LIMIT, async (t) => {
  const managers: Manager[] = []
  for (let index = 0; index < 4; index += 1) {
    managers.push(
      await managed(t, SIMPLE, {
        imports: {
          env: {
            // Goes round through all the others, by turns on this thread.
            f: (n: number): unknown => (n <= 0 ? index : managers[(index + 1) % 4]?.exports.run?.(n - 1)),
          },
        },
      }),
    )
  }
  assert.equal(managers[0]?.exports.run?.(3), 3 + 4)
  assert.equal(await managers[0]?.call('run', [3]), 3 + 4)
  // All the way round comes back to an instance that is busy with this very call: it is re-entered.
  assert.equal(managers[0]?.exports.run?.(9), 1 + 10)
})

test('callbacks from the guest keep their order, thousands of them, on both paths', LIMIT, async (t) => {
  const source = wat(`(module
    (import "env" "note" (func $note (param i32)))
    (func (export "many") (param i32) (local $i i32)
      (loop
        (call $note (local.get $i))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if 0 (i32.lt_u (local.get $i) (local.get 0))))))`)
  const notes: number[] = []
  const manager = await managed(t, source, { imports: { env: { note: (n: number) => void notes.push(n) } } })
  manager.exports.many?.(20_000)
  assert.equal(notes.length, 20_000)
  assert.ok(notes.every((n, index) => n === index))
  notes.length = 0
  await manager.call('many', [2_000])
  assert.equal(notes.length, 2_000)
  assert.ok(notes.every((n, index) => n === index))
})

test(
  'a guest exception (exnref) passes over an import that does not throw, and what an import throws passes over guest handlers',
  LIMIT,
  async (t) => {
    const source = wat(`(module
    (import "env" "f" (func $f))
    (func (export "guarded") (result i32)
      (block $caught
        (try_table (catch_all $caught) (call $f))
        (return (i32.const 0)))
      (i32.const 1)))`)
    const thrown = new Error('host')
    const manager = await managed(t, source, {
      imports: {
        env: {
          f: () => {
            throw thrown
          },
        },
      },
    })
    for (const run of [() => manager.call('guarded'), async () => manager.exports.guarded?.()]) {
      const end = await outcome(run())
      // V8 lets catch_all catch what JavaScript throws; wasmtime does not. Either way nothing is lost.
      if ('error' in end) assert.equal(end.error, thrown)
      else assert.equal(end.value, 1)
    }
    assert.equal(manager.generation, 1)
  },
)

test('the async context of the caller is not mixed up by imports on the pool', LIMIT, async (t) => {
  const storage = new AsyncLocalStorage<string>()
  const manager = await managed(t, SIMPLE, { ...simple((n) => n), instances: 2, threads: 2 })
  const seen = await Promise.all(
    ['a', 'b', 'c'].map((name) =>
      storage.run(name, async () => {
        await manager.call('run', [1])
        return storage.getStore()
      }),
    ),
  )
  assert.deepEqual(seen, ['a', 'b', 'c'])
})

test('microtasks that an import starts on the pool path run before the next thing', LIMIT, async (t) => {
  const order: string[] = []
  const manager = await managed(
    t,
    SIMPLE,
    simple((n) => {
      order.push('import')
      void Promise.resolve().then(() => order.push('microtask'))
      return n
    }),
  )
  await manager.call('run', [1])
  order.push('answer')
  assert.deepEqual(order, ['import', 'microtask', 'answer'])
})

test('many calls with imports at once over several replicas: no answer lost, none mixed up', LIMIT, async (t) => {
  const manager = await managed(t, SIMPLE, {
    instances: 4,
    threads: 4,
    imports: (instance: InstanceContext) => ({
      env: {
        f: (n: number) => {
          switch (n % 4) {
            case 0:
              return n
            case 1:
              return Promise.resolve(n)
            case 2:
              instance.exports.store?.(n % 60_000, n % 200)
              return (instance.exports.load?.(n % 60_000) as number) === n % 200 ? n : -1
            default:
              return turns(1).then(() => n)
          }
        },
      },
    }),
  })
  const calls = Array.from({ length: 1000 }, (_, n) => manager.call('run', [n]))
  assert.deepEqual(
    await Promise.all(calls),
    Array.from({ length: 1000 }, (_, n) => n + 1),
  )
})

test('globals, tables and memories can be imported by value or description', LIMIT, async (t) => {
  const marker = { the: 'object' }
  const source = wat(`(module
    (import "env" "i" (global $i i32))
    (import "env" "l" (global $l i64))
    (import "env" "d" (global $d f64))
    (import "env" "x" (global $x externref))
    (import "env" "t" (table $t 2 10 funcref))
    (import "env" "m" (memory 1 4))
    (func $seven (result i32) (i32.const 7))
    (elem (i32.const 1) $seven)
    (func (export "i") (result i32) (global.get $i))
    (func (export "l") (result i64) (global.get $l))
    (func (export "d") (result f64) (global.get $d))
    (func (export "x") (result externref) (global.get $x))
    (func (export "table") (result i32) (table.size $t))
    (func (export "memory") (result i32) (memory.size))
    (func (export "seven") (result i32) (call_indirect $t (result i32) (i32.const 1))))`)
  for (const make of [managed, managedSync]) {
    const manager = await make(t, source, {
      imports: {
        env: { i: 5, l: -6n, d: 0.5, x: marker, t: { initial: 3, maximum: 10 }, m: { initial: 2, maximum: 4 } },
      },
    })
    const f = manager.exports
    assert.deepEqual([f.i?.(), f.l?.(), f.d?.(), f.table?.(), f.memory?.(), f.seven?.()], [5, -6n, 0.5, 3, 2, 7])
    assert.equal(f.x?.(), marker)
    await manager.reload()
    assert.deepEqual([f.i?.(), f.x?.(), f.seven?.()], [5, marker, 7])
  }
})

test('the workbench holds a call at a promise for as long as the test likes', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const call = manager.call('hold', [1])
  await arrived(1)
  assert.equal(manager.stats().inFlight, 1)
  release(1, 123)
  assert.equal(await call, 123)
})

test(
  'an import may create, use, reload and close other managers, synchronously and not, on both paths',
  LIMIT,
  async (t) => {
    const others: Manager[] = []
    const manager = await managed(t, SIMPLE, {
      imports: {
        env: {
          f: (n: number) => {
            const other = managedSync(
              t,
              SIMPLE,
              simple((m) => m * 2),
            )
            others.push(other)
            const result = other.exports.run?.(n) as number
            other.reloadSync()
            assert.equal(other.exports.run?.(n), result)
            void other.close()
            return result
          },
        },
      },
    })
    assert.equal(manager.exports.run?.(5), 12)
    assert.equal(await manager.call('run', [5]), 12)
    await Promise.all(others.map((other) => other.close()))
    assert.deepEqual(
      others.map((other) => other.state),
      ['closed', 'closed'],
    )
  },
)

test(
  'an import that recurses into the guest without end is a stack overflow, not a crash, on every path and thread',
  LIMIT,
  async () => {
    const body = `
    const manager = await WasmModuleManager.create(process.env.SIMPLE, {
      cache: false, imports: (instance) => ({ env: { f: (n) => instance.exports.run(n + 1) } }),
    })
    const seen = []
    for (let i = 0; i < 3; i += 1) {
      try { manager.exports.run(0) } catch (error) { seen.push(error.trap ?? error.name) }
      await manager.call('run', [0]).catch((error) => seen.push(error.trap ?? error.name))
      await manager.use((lease) => lease.exports.run(0)).catch((error) => seen.push(error.trap ?? error.name))
    }
    seen.push(manager.exports.inc())
  `
    const ended = await child(
      `
    import { Worker } from 'node:worker_threads'
    ${body}
    const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(process.env.BODY)))
    const there = await new Promise((resolve, reject) => { worker.once('message', resolve); worker.once('error', reject) })
    report([...seen, ...there])
    `,
      {
        env: {
          SIMPLE,
          BODY: `import { parentPort } from 'node:worker_threads'
          import { WasmModuleManager } from ${JSON.stringify(INDEX_URL)}
          ${body}
          parentPort.postMessage(seen)`,
        },
      },
    )
    const seen = reported<(string | number)[]>(ended)
    assert.equal(seen.length, 20)
    for (const how of seen) assert.ok(['stack-overflow', 'RangeError', 1].includes(how), String(how))
  },
)
