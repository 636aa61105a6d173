// Hooks: what becomes of a reload whose hook fails, never ends, breaks its guest, or leaves something behind.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { LeasedInstance, LinearMemory, ManagerOptions } from '../index.js'
import { wat } from './guests.ts'
import {
  barrier,
  bench,
  child,
  failure,
  hasCode,
  LIMIT,
  outcome,
  reported,
  thrownBy,
  turns,
  until,
  type WasmError,
} from './support.ts'

const stale = hasCode('ERR_WASM_STALE_HANDLE')

type BenchOptions = NonNullable<Parameters<typeof bench>[1]>

interface FailingPhase {
  phase: 'save' | 'instantiate' | 'initialize' | 'restore'
  options(error: unknown, armed: () => boolean): BenchOptions
}

const PHASES: FailingPhase[] = [
  {
    phase: 'save',
    options: (error, armed) => ({
      saveState: () => {
        if (armed()) throw error
      },
    }),
  },
  {
    phase: 'instantiate',
    options: (error, armed) => ({
      onImports: () => {
        if (armed()) throw error
      },
    }),
  },
  {
    phase: 'initialize',
    options: (error, armed) => ({
      initialize: () => {
        if (armed()) throw error
      },
    }),
  },
  {
    phase: 'restore',
    options: (error, armed) => ({
      saveState: () => 1,
      restoreState: () => {
        if (armed()) throw error
      },
    }),
  },
]

/** The same function, a few turns of the event loop later. */
const late =
  <A extends unknown[], R>(hook: (...args: A) => R) =>
  async (...args: A): Promise<Awaited<R>> => {
    await turns()
    return await hook(...args)
  }

const asynchronous = (options: BenchOptions): BenchOptions => {
  const { initialize, saveState, restoreState, ...rest } = options
  return {
    ...rest,
    ...(initialize && { initialize: late(initialize) }),
    ...(saveState && { saveState: late(saveState) }),
    ...(restoreState && { restoreState: late(restoreState) }),
  }
}

for (const { phase, options } of PHASES) {
  for (const kind of ['throws', 'rejects', 'throws in reloadSync'] as const) {
    if (phase === 'instantiate' && kind === 'rejects') continue
    test(
      `when ${phase} ${kind}, the old generation serves on untouched and the cause is the very object`,
      LIMIT,
      async (t) => {
        for (const cause of [new Error(`in ${phase}`), 'a string', undefined, null, Object.freeze({ odd: true })]) {
          let isArmed = false
          const given = options(cause, () => isArmed)
          const { manager } = await bench(t, { instances: 2, ...(kind === 'rejects' ? asynchronous(given) : given) })
          manager.exports.set?.(7)
          manager.exports.store?.(1, 8)
          isArmed = true
          const end =
            kind === 'throws in reloadSync'
              ? await outcome((async () => manager.reloadSync())())
              : await outcome(manager.reload())
          assert.ok('error' in end)
          hasCode('ERR_WASM_RELOAD_FAILED')(end.error)
          const error = end.error as WasmError
          assert.equal(error.phase, phase)
          assert.ok(Object.is(error.cause, cause), `cause: ${String(error.cause)}`)
          if (cause instanceof Error) assert.ok(error.message.includes(cause.message))
          assert.deepEqual([manager.state, manager.generation], ['ready', 1])
          assert.equal(manager.exports.peek?.(), 7)
          assert.equal(manager.exports.load?.(1), 8)
          assert.deepEqual(await Promise.all([manager.call('add', [1, 2]), manager.call('add', [3, 4])]), [3, 7])
          isArmed = false
          assert.equal((await manager.reload()).generation, 2)
        }
      },
    )
  }

  test(`calls that wait while ${phase} fails are answered by the old generation, in order`, LIMIT, async (t) => {
    let isArmed = false
    const started = barrier()
    const gate = barrier()
    const given = options(new Error('no'), () => isArmed)
    const { manager, close, arrived, release } = await bench(t, {
      ...given,
      // Whatever fails, fails late: first let calls queue up.
      ...(phase === 'save' && {
        saveState: async () => {
          started.open()
          await gate.promise
          throw new Error('no')
        },
      }),
      ...(phase === 'restore' && {
        restoreState: async () => {
          started.open()
          await gate.promise
          throw new Error('no')
        },
      }),
    })
    manager.exports.set?.(50)
    isArmed = true
    if (phase === 'save' || phase === 'restore') {
      const reload = outcome(manager.reload())
      await started.promise
      const waiting = [manager.call('count'), manager.call('count'), manager.use((i) => i.exports.count?.())]
      await turns()
      gate.open()
      assert.ok('error' in (await reload))
      assert.deepEqual(await Promise.all(waiting), [51, 52, 53])
    } else {
      // These phases run before the gate closes: calls are served all the while.
      close(1)
      const held = manager.call('holdThenCount', [1])
      await arrived(1)
      const waiting = [manager.call('count'), manager.call('count')]
      assert.ok('error' in (await outcome(manager.reload())))
      release(1)
      assert.deepEqual(await Promise.all([held, ...waiting]), [51, 52, 53])
    }
  })
}

test(
  'a guest that traps in saveState is replaced: the reload fails, later calls run in a fresh instance',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t, {
      saveState: (instance) => {
        instance.exports.boom?.()
      },
    })
    manager.exports.set?.(5)
    const end = await outcome(manager.reload())
    assert.ok('error' in end)
    hasCode('ERR_WASM_RELOAD_FAILED')(end.error)
    const error = end.error as WasmError
    assert.equal(error.phase, 'save')
    hasCode('ERR_WASM_TRAP')(error.cause)
    assert.equal(await manager.call('peek'), 0)
    assert.equal(manager.exports.add?.(1, 2), 3)
  },
)

test('a guest that traps in restoreState or initialize costs nothing but the new generation', LIMIT, async (t) => {
  let isArmed = false
  const trap = (instance: LeasedInstance) => {
    if (isArmed) instance.exports.boom?.()
  }
  for (const options of [{ initialize: trap }, { saveState: () => 1, restoreState: trap }] as ManagerOptions[]) {
    isArmed = false
    const { manager } = await bench(t, options)
    manager.exports.set?.(5)
    isArmed = true
    const end = await outcome(manager.reload())
    assert.ok('error' in end)
    hasCode('ERR_WASM_RELOAD_FAILED')(end.error)
    hasCode('ERR_WASM_TRAP')((end.error as WasmError).cause)
    assert.equal(manager.exports.peek?.(), 5)
    assert.equal(await manager.call('peek'), 5)
  }
})

// ---------------------------------------------------------------- each hook

const HOOKS = ['initialize', 'saveState', 'restoreState'] as const
type HookName = (typeof HOOKS)[number]
const PHASE = { initialize: 'initialize', saveState: 'save', restoreState: 'restore' } as const

/** The hooks of a manager, of which one does something from the first reload on. What it returns is returned. */
function misbehaving(name: HookName, body: (instance: LeasedInstance) => unknown): ManagerOptions {
  let isStarted = false
  const hook = (is: HookName, otherwise?: unknown) => (instance: LeasedInstance) => {
    if (is === 'initialize' && !isStarted) {
      isStarted = true
      return undefined
    }
    return is === name ? body(instance) : otherwise
  }
  return {
    initialize: hook('initialize') as () => void,
    saveState: hook('saveState', 1),
    restoreState: hook('restoreState') as () => void,
  }
}

for (const name of HOOKS) {
  test(
    `${name}: one that never settles keeps the reload pending, until close({ drainTimeoutMs })`,
    LIMIT,
    async (t) => {
      const inside = barrier<LeasedInstance>()
      const { manager } = await bench(
        t,
        misbehaving(name, (instance) => {
          inside.open(instance)
          return new Promise(() => {})
        }),
      )
      await manager.call('set', [9])
      const reload = outcome(manager.reload({ drainTimeoutMs: 1 }))
      const instance = await inside.promise
      await turns(20)
      assert.equal(manager.state, 'reloading')
      // The old generation serves on where the gate is still open.
      if (name === 'initialize') assert.equal(await manager.call('peek'), 9)
      await manager.close({ drainTimeoutMs: 20 })
      const end = await reload
      assert.ok('error' in end)
      hasCode('ERR_WASM_CLOSED')(end.error)
      assert.deepEqual([manager.state, manager.generation, manager.stats().memoryBytes], ['closed', 1, 0])
      assert.throws(() => instance.exports.peek?.(), stale)
    },
  )

  test(`${name}: one that never settles is cut by destroy, with what waited`, LIMIT, async (t) => {
    const inside = barrier()
    const { manager } = await bench(
      t,
      misbehaving(name, () => {
        inside.open()
        return new Promise(() => {})
      }),
    )
    const reload = failure(manager.reload(), 'ERR_WASM_CLOSED')
    await inside.promise
    const lease = name === 'initialize' ? await manager.acquire() : undefined
    const waits = failure(manager.call('count'), 'ERR_WASM_CLOSED')
    await manager.destroy()
    await Promise.all([reload, waits])
    assert.equal(manager.state, 'closed')
    assert.equal(lease?.generation, lease && 1)
  })

  for (const [late, end] of [
    ['returns', (door: () => void) => door()],
    ['rejects', (_door: () => void, fail: (reason: unknown) => void) => fail(new Error('too late'))],
  ] as const) {
    test(`${name}: one that ${late} after the close that gave it up changes nothing`, LIMIT, async (t) => {
      const inside = barrier<LeasedInstance>()
      const door = barrier()
      const { manager } = await bench(
        t,
        misbehaving(name, async (instance) => {
          inside.open(instance)
          await door.promise
        }),
      )
      const reload = failure(manager.reload(), 'ERR_WASM_CLOSED')
      const instance = await inside.promise
      await manager.close({ drainTimeoutMs: 0 })
      await reload
      // A rejection that nobody waits for any more must not be an unhandled one either: it would fail this test.
      end(door.open as () => void, door.fail)
      await turns()
      assert.throws(() => instance.exports.peek?.(), stale)
      assert.deepEqual([manager.state, manager.generation], ['closed', 1])
    })
  }

  test(`a close from outside waits for a reload whose ${name} is under way`, LIMIT, async (t) => {
    const inside = barrier()
    const door = barrier()
    const { manager } = await bench(
      t,
      misbehaving(name, async () => {
        inside.open()
        await door.promise
      }),
    )
    const order: string[] = []
    const reload = manager.reload().then((report) => order.push(`reload ${report.generation}`))
    await inside.promise
    const closed = manager.close().then(() => order.push('closed'))
    await failure(manager.call('count'), 'ERR_WASM_CLOSED')
    await failure(manager.reload(), 'ERR_WASM_CLOSED')
    await turns(10)
    assert.deepEqual([order.length, manager.state], [0, 'closing'])
    door.open()
    await Promise.all([reload, closed])
    assert.deepEqual(order, ['reload 2', 'closed'])
  })

  test(
    `what ${name} leaks is stale when it has ended: the handle, its functions, its memory and views`,
    LIMIT,
    async (t) => {
      for (const kind of ['async', 'sync', 'throwing'] as const) {
        const leaked: {
          instance?: LeasedInstance
          memory?: LinearMemory
          buffer?: ArrayBuffer
          add?: LeasedInstance['exports'][string] | undefined
        } = {}
        const { manager } = await bench(
          t,
          misbehaving(name, (instance) => {
            const { memory } = instance
            Object.assign(leaked, { instance, memory, buffer: memory.buffer, add: instance.exports.add })
            assert.equal(leaked.buffer?.byteLength, 65_536)
            if (kind === 'throwing') throw new Error('after the leak')
            return kind === 'async' ? turns() : undefined
          }),
        )
        if (kind === 'sync') manager.reloadSync()
        else await outcome(manager.reload())
        const { instance, memory, buffer, add } = leaked
        assert.ok(instance && memory && buffer && add)
        assert.equal(buffer.byteLength, 0)
        assert.throws(() => instance.exports.add?.(1, 2), stale)
        assert.throws(() => add(1, 2), stale)
        assert.throws(() => memory.buffer, stale)
        assert.throws(() => memory.write(0, 'x'), stale)
        await failure(instance.call('add', [1, 2]), 'ERR_WASM_STALE_HANDLE')
        instance.release()
        assert.equal(manager.exports.add?.(1, 2), 3)
        assert.equal(manager.memory.readString(0, 1), '\0')
      }
    },
  )

  test(`calls that ${name} leaves running are waited for, and their answers arrive`, LIMIT, async (t) => {
    let left: Promise<unknown> | undefined
    const { manager, close, arrived, release } = await bench(
      t,
      misbehaving(name, (instance) => {
        left = Promise.all([instance.call('hold', [1]), instance.call('add', [1, 2])])
      }),
    )
    close(1)
    const reload = manager.reload()
    await arrived(1)
    await turns(10)
    assert.deepEqual([manager.generation, manager.state], [1, 'reloading'])
    release(1)
    assert.deepEqual(await left, [1, 3])
    assert.equal((await reload).generation, 2)
  })

  test(`calls that ${name} leaves running are stopped by close({ drainTimeoutMs })`, LIMIT, async (t) => {
    let left: Promise<unknown> | undefined
    const { manager, entered } = await bench(
      t,
      misbehaving(name, (instance) => {
        left = outcome(instance.call('spin'))
      }),
    )
    const inside = entered()
    const reload = failure(manager.reload(), 'ERR_WASM_CLOSED')
    await inside
    await manager.close({ drainTimeoutMs: 10 })
    await reload
    const end = (await left) as { error: unknown }
    hasCode('ERR_WASM_INTERRUPTED')(end.error)
  })
}

for (const name of ['initialize', 'restoreState'] as const) {
  for (const [kind, trap] of Object.entries({
    'on this thread': (instance: LeasedInstance) => {
      assert.throws(() => instance.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
    },
    'on the pool': async (instance: LeasedInstance) => {
      await assert.rejects(instance.call('boom'), hasCode('ERR_WASM_TRAP'))
    },
    'behind its back': (instance: LeasedInstance) => {
      instance.call('boom').catch(() => {})
    },
  })) {
    test(`${name}: one that traps its guest ${kind} and hides it fails all the same`, LIMIT, async (t) => {
      let isArmed = true
      const { manager } = await bench(
        t,
        misbehaving(name, (instance) => (isArmed ? trap(instance) : undefined)),
      )
      manager.exports.set?.(4)
      const error = await failure(manager.reload(), 'ERR_WASM_RELOAD_FAILED')
      assert.equal(error.phase, PHASE[name])
      hasCode('ERR_WASM_TRAP')(error.cause)
      assert.deepEqual([manager.generation, manager.exports.count?.()], [1, 5])
      isArmed = false
      assert.equal((await manager.reload()).generation, 2)
    })
  }
}

test('a saveState that traps its guest and hides it has spoken: what it returned is carried over', LIMIT, async (t) => {
  const seen: unknown[] = []
  const { manager } = await bench(t, {
    saveState: (instance) => {
      const count = instance.exports.peek?.()
      assert.throws(() => instance.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
      return count
    },
    restoreState: (instance, state) => {
      seen.push(state)
      instance.exports.set?.(state)
    },
  })
  manager.exports.set?.(4)
  assert.equal((await manager.reload()).generation, 2)
  assert.deepEqual([seen, manager.exports.peek?.()], [[4], 4])
  assert.equal(manager.reloadSync().generation, 3)
  assert.deepEqual([seen, manager.exports.peek?.()], [[4, 4], 4])
})

test('a trap that saveState hides, followed by a failure, costs the old instance: it is replaced', LIMIT, async (t) => {
  let isArmed = true
  const { manager } = await bench(t, {
    instances: 2,
    saveState: (instance, replica) => {
      if (!isArmed) return instance.exports.peek?.()
      if (replica === 0) assert.throws(() => instance.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
      return 1
    },
    restoreState: () => {
      if (isArmed) throw new Error('no')
    },
  })
  const both = await Promise.all([manager.acquire(), manager.acquire()])
  for (const one of both) one.exports.set?.(6)
  for (const one of both) one.release()
  const error = await failure(manager.reload(), 'ERR_WASM_RELOAD_FAILED')
  assert.equal(error.phase, 'restore')
  isArmed = false
  const later = await Promise.all([manager.acquire(), manager.acquire()])
  assert.deepEqual(later.map((one) => one.exports.peek?.()).sort(), [0, 6])
  for (const one of later) one.release()
  assert.equal(manager.exports.peek?.(), 0)
})

test('a hook that fails for one replica of several leaves all of them as they were', LIMIT, async (t) => {
  for (const failing of ['saveState', 'restoreState', 'initialize'] as const) {
    let isArmed = false
    let initialized = 0
    const cause = new Error(`${failing} of the last replica`)
    const fail = (is: string, replica: number) => {
      if (isArmed && is === failing && replica === 2) throw cause
    }
    const { manager } = await bench(t, {
      instances: 3,
      initialize: () => {
        fail('initialize', initialized % 3)
        initialized += 1
      },
      saveState: (instance, replica) => {
        fail('saveState', replica)
        return instance.exports.peek?.()
      },
      restoreState: (instance, state, replica) => {
        fail('restoreState', replica)
        instance.exports.set?.(state + 100)
      },
    })
    const all = async () => {
      const held = await Promise.all([1, 2, 3].map(() => manager.acquire()))
      return { held, peeks: held.map((one) => one.exports.peek?.()).sort() }
    }
    const before = await all()
    for (const [index, one] of before.held.entries()) one.exports.set?.(index + 1)
    for (const one of before.held) one.release()
    isArmed = true
    const error = await failure(manager.reload(), 'ERR_WASM_RELOAD_FAILED')
    assert.ok(error.cause === cause)
    const after = await all()
    assert.deepEqual(after.peeks, [1, 2, 3])
    for (const one of after.held) one.release()
    assert.equal(manager.stats().memoryBytes, 3 * 65_536)
  }
})

test('a thenable of a hook is asked once, and what it does is inside the hook', LIMIT, async (t) => {
  let asked = 0
  const seen: unknown[] = []
  const { manager } = await bench(t, {
    saveState: () => ({
      // biome-ignore lint/suspicious/noThenProperty: this is the case.
      then: (resolve: (value: unknown) => void) => {
        asked += 1
        void manager.reload().catch((error: WasmError) => resolve(error.code))
      },
    }),
    restoreState: (_instance, state) => void seen.push(state),
  })
  await manager.reload()
  assert.deepEqual([asked, seen], [1, ['ERR_WASM_RELOADING']])
  const error = await failure(
    thrownBy(() => manager.reloadSync()),
    'ERR_WASM_RELOAD_FAILED',
  )
  hasCode('ERR_WASM_ASYNC_IMPORT')(error.cause)
  assert.equal(asked, 1)
  // Outside again.
  assert.equal((await Promise.all([manager.reload(), manager.call('peek')]))[0].generation, 3)
})

test(
  'an initialize that never settles during a replacement is given up by close, and cut by destroy',
  LIMIT,
  async (t) => {
    for (const end of ['close', 'destroy'] as const) {
      const inside = barrier()
      let hangs = true
      const { manager } = await bench(
        t,
        misbehaving('initialize', () => {
          inside.open()
          return hangs ? new Promise(() => {}) : undefined
        }),
      )
      await failure(manager.call('boom'), 'ERR_WASM_TRAP')
      await inside.promise
      const waits = outcome(manager.call('count'))
      hangs = false
      if (end === 'destroy') await manager.destroy()
      else {
        // Whether what waited is refused before the time is up, or just after it.
        const closed = await outcome(manager.close({ drainTimeoutMs: 10 }))
        if ('error' in closed) hasCode('ERR_WASM_DRAIN_TIMEOUT')(closed.error)
      }
      const answer = await waits
      assert.ok('error' in answer)
      assert.match((answer.error as WasmError).code, end === 'destroy' ? /CLOSED/ : /ERR_WASM_(CLOSED|RELOAD_FAILED)/)
      // What comes now waits for a replacement whose hook does settle.
      await manager.close()
      assert.equal(manager.state, 'closed')
    }
  },
)

test(
  'a reload that waits for a replacement whose hook never settles is given up with it, and not begun afterwards',
  LIMIT,
  async (t) => {
    const inside = barrier()
    const { manager } = await bench(
      t,
      misbehaving('initialize', () => {
        inside.open()
        return new Promise(() => {})
      }),
    )
    await failure(manager.call('boom'), 'ERR_WASM_TRAP')
    await inside.promise
    const reloading = outcome(manager.reload())
    // Time enough for the reload to come as far as it can.
    const closed = await outcome(manager.close({ drainTimeoutMs: 300 }))
    if ('error' in closed) hasCode('ERR_WASM_DRAIN_TIMEOUT')(closed.error)
    const end = await reloading
    assert.ok('error' in end)
    hasCode('ERR_WASM_CLOSED')(end.error)
    await manager.close()
    assert.equal(manager.state, 'closed')
  },
)

test(
  'a hook whose guest runs into limits.timeoutMs and hides it leaves an instance that does not serve',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t, {
      limits: { timeoutMs: 50 },
      ...misbehaving('initialize', async (instance) => {
        await assert.rejects(instance.call('spin'), hasCode('ERR_WASM_TIMEOUT'))
      }),
    })
    manager.exports.set?.(4)
    const error = await failure(manager.reload(), 'ERR_WASM_RELOAD_FAILED')
    assert.equal(error.phase, 'initialize')
    assert.equal(manager.exports.peek?.(), 4)
  },
)

test('hooks that fail at random leave exactly one generation, whose state is whole', LIMIT, async (t) => {
  const seed = Number(process.env.SEED ?? Math.floor(Math.random() * 2 ** 31))
  t.diagnostic(`SEED=${seed}`)
  let x = seed | 1
  const chance = (share: number) => {
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    return (x >>> 0) / 2 ** 32 < share
  }
  let isArmed = false
  const maybe = async () => {
    if (chance(0.5)) await turns(1)
    if (isArmed && chance(0.12)) throw new Error('by chance')
  }
  const { manager } = await bench(t, {
    instances: 2,
    threads: 2,
    initialize: maybe,
    saveState: async (instance) => {
      await maybe()
      return instance.exports.peek?.()
    },
    restoreState: async (instance, state) => {
      await maybe()
      instance.exports.set?.(state)
      await maybe()
    },
  })
  let counted = 0
  let committed = 0
  isArmed = true
  for (let round = 0; round < 100; round += 1) {
    const counts = [manager.call('count'), manager.call('count'), manager.call('count')]
    counted += counts.length
    const end = await outcome(manager.reload())
    if ('value' in end) committed += 1
    else hasCode('ERR_WASM_RELOAD_FAILED', /by chance/)(end.error)
    await Promise.all(counts)
    assert.deepEqual([manager.generation, manager.state], [committed + 1, 'ready'])
  }
  const both = await Promise.all([manager.acquire(), manager.acquire()])
  assert.equal(
    both.reduce((sum, one) => sum + (one.exports.peek?.() as number), 0),
    counted,
  )
  for (const one of both) one.release()
  assert.ok(committed > 5 && committed < 95, `${committed} of 100 went well`)
  await until(() => manager.stats().memoryBytes === 2 * 65_536)
})

test('promises of hooks and imports that never settle keep nothing of what was given up for them', {
  ...LIMIT,
  skip: process.platform !== 'linux',
}, async () => {
  const ended = await child(
    `
      import { readFileSync } from 'node:fs'
      // Each module has its code there.
      const codes = () => readFileSync('/proc/self/maps', 'utf8').split('\\n').filter((line) => / r-xp 0{8} 00:00 0 *$/.test(line)).length
      const never = () => new Promise(() => {})
      const turn = () => new Promise((resolve) => setTimeout(resolve, 5))
      const lives = {
        async hook() {
          let isHeld = false
          const hooks = { initialize: () => (isHeld ? never() : undefined) }
          const manager = await WasmModuleManager.create(process.env.GUEST, { cache: false, ...hooks, imports: { env: { ask() {} } } })
          isHeld = true
          const reloaded = manager.reload().catch((error) => error.code)
          await turn()
          await manager.close({ drainTimeoutMs: 1 })
          assert.equal(await reloaded, 'ERR_WASM_CLOSED')
        },
        async import() {
          const manager = await WasmModuleManager.create(process.env.GUEST, { cache: false, imports: { env: { ask: never } } })
          const asked = manager.call('run').catch((error) => error.code)
          await turn()
          await manager.destroy()
          assert.equal(await asked, 'ERR_WASM_INTERRUPTED')
        },
      }
      const settled = async () => {
        for (let i = 0; i < 5; i += 1) { gc(); await turn() }
        return codes()
      }
      const left = {}
      for (const [name, live] of Object.entries(lives)) {
        await live()
        const before = await settled()
        for (let i = 0; i < 10; i += 1) await live()
        left[name] = (await settled()) - before
      }
      report(left)
      `,
    {
      env: { GUEST: wat('(module (import "env" "ask" (func $ask)) (memory 1) (func (export "run") (call $ask)))') },
      flags: ['--expose-gc'],
    },
  )
  const left = reported<Record<string, number>>(ended)
  for (const [name, count] of Object.entries(left)) assert.ok(count < 3, `${name}: ${count} of 10 are left`)
})
