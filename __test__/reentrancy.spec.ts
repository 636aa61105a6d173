// The manager, used from inside what it calls: hooks, imports, the imports function, listeners. No deadlock, and one meaning each.
import assert from 'node:assert/strict'
import { AsyncLocalStorage } from 'node:async_hooks'
import type { EventEmitter } from 'node:events'
import { test } from 'node:test'
import type { InstanceContext, LeasedInstance, ManagerOptions } from '../index.js'
import { buffers, stamped, wat } from './guests.ts'
import {
  barrier,
  bench,
  failure,
  hasCode,
  managed,
  managedSync,
  outcome,
  turns,
  until,
  WasmError,
  type WasmModuleManager,
} from './support.ts'

/** A deadlock is a failure, and is told apart from a slow machine by this. */
const BOUND = { timeout: 20_000 }

/** What an action came to: `ok`, or the code of its error. */
async function came(action: () => unknown): Promise<string> {
  try {
    await action()
    return 'ok'
  } catch (error) {
    assert.ok(error instanceof WasmError, String(error))
    return error.code
  }
}

/** Everything a hook may want of its manager, apart from its end. Each is awaited. */
const ACTIONS: Record<string, (manager: WasmModuleManager) => unknown> = {
  call: (manager) => manager.call('add', [1, 2]),
  'call with a signal': (manager) => manager.call('add', [1, 2], { signal: new AbortController().signal }),
  use: (manager) => manager.use((instance) => instance.exports.add?.(1, 2)),
  acquire: async (manager) => {
    using instance = await manager.acquire()
    await instance.call('add', [1, 2])
  },
  exports: (manager) => manager.exports.add?.(1, 2),
  callSync: (manager) => manager.callSync('add', [1, 2]),
  reload: (manager) => manager.reload({ reason: 'from inside' }),
  'the same reload': (manager) => manager.reload(),
  'a rolling reload': (manager) => manager.reload({ strategy: 'rolling', skipSave: true }),
  reloadSync: (manager) => manager.reloadSync(),
}

const READING = (manager: WasmModuleManager) => [manager.generation, manager.name, manager.stats().generation]

async function all(manager: WasmModuleManager): Promise<Record<string, string>> {
  const results: Record<string, string> = {}
  for (const [name, action] of Object.entries(ACTIONS)) results[name] = await came(() => action(manager))
  assert.equal(READING(manager).length, 3)
  return results
}

const RELOADING = 'ERR_WASM_RELOADING'
const CLOSED = 'ERR_WASM_CLOSED'
const everything = (code: string, except: Record<string, string> = {}) => ({
  ...Object.fromEntries(Object.keys(ACTIONS).map((name) => [name, code])),
  ...except,
})
const calls = (code: string) => ({ call: code, 'call with a signal': code, use: code, acquire: code })

type Armed = { manager?: WasmModuleManager; do?: (instance: LeasedInstance) => unknown }

/** Hooks that do nothing until `armed.do` is set, and then do it once, in the hook of that name. */
function armable(name: 'initialize' | 'saveState' | 'restoreState', armed: Armed): ManagerOptions {
  const hook = (is: string) => (instance: LeasedInstance) => {
    if (is !== name || armed.do === undefined) return undefined
    const body = armed.do
    delete armed.do
    return body(instance)
  }
  const options: ManagerOptions = { initialize: hook('initialize') as () => void }
  // A rolling reload goes with `initialize` alone.
  if (name === 'initialize') return options
  return { ...options, saveState: hook('saveState'), restoreState: hook('restoreState') as () => void }
}

// ---------------------------------------------------------------- hooks

for (const name of ['saveState', 'restoreState'] as const) {
  test(`inside ${name} nothing waits for the swap that waits for it`, BOUND, async (t) => {
    const armed: Armed = {}
    const { manager } = await bench(t, { instances: 2, threads: 2, ...armable(name, armed) })
    let results: unknown
    armed.do = async () => {
      results = await all(manager)
    }
    assert.equal((await manager.reload()).generation, 2)
    assert.deepEqual(results, everything(RELOADING))
    assert.deepEqual(Object.keys(manager.stats().reloads), ['manual'])
    // Outside again, everything works again.
    assert.deepEqual(await all(manager), everything('ok'))
  })
}

for (const strategy of ['exclusive', 'rolling'] as const) {
  test(
    `inside initialize of an ${strategy} reload, what can begin at once does, on the old generation`,
    BOUND,
    async (t) => {
      const armed: Armed = {}
      const { manager } = await bench(t, { instances: 2, threads: 2, ...armable('initialize', armed) })
      let results: unknown
      let generation: unknown
      armed.do = async () => {
        results = await all(manager)
        generation = await manager.use((instance) => instance.generation)
      }
      assert.equal((await manager.reload({ strategy })).generation, 2)
      const sync = strategy === 'rolling' ? 'ok' : RELOADING
      assert.deepEqual(results, everything(RELOADING, { ...calls('ok'), exports: sync, callSync: sync }))
      assert.equal(generation, 1)
      assert.deepEqual(await all(manager), everything('ok'))
    },
  )
}

test('inside initialize, what would have to wait for an instance is refused', BOUND, async (t) => {
  const armed: Armed = {}
  const { manager } = await bench(t, armable('initialize', armed))
  const lease = await manager.acquire()
  let results: unknown
  armed.do = async () => {
    results = await all(manager)
    lease.release()
  }
  await manager.reload()
  assert.deepEqual(results, everything(RELOADING))
})

test('invoke inside a hook follows the rule of call', BOUND, async (t) => {
  for (const name of ['initialize', 'saveState', 'restoreState'] as const) {
    const armed: Armed = {}
    const manager = await managed(t, buffers, armable(name, armed))
    let result: unknown
    armed.do = async () => {
      result = await came(async () => {
        const output = await manager.invoke('reverse', Buffer.from('abc'))
        assert.equal(Buffer.from(output).toString(), 'cba')
      })
    }
    await manager.reload()
    assert.equal(result, name === 'initialize' ? 'ok' : RELOADING)
  }
})

test('a call that begins inside initialize is waited for by the very reload', BOUND, async (t) => {
  const armed: Armed = {}
  const { manager, close, arrived, release } = await bench(t, armable('initialize', armed))
  manager.exports.set?.(7)
  let held: Promise<unknown> | undefined
  armed.do = async () => {
    close(1)
    held = manager.call('holdThenCount', [1])
    await arrived(1)
  }
  const reload = manager.reload()
  await until(() => manager.state === 'draining')
  release(1)
  assert.equal(await held, 8)
  assert.equal((await reload).drained, 1)
})

test('inside initialize of a replacement after a trap, the other replicas can be used', BOUND, async (t) => {
  for (const instances of [1, 2]) {
    const armed: Armed = {}
    const { manager } = await bench(t, { instances, threads: 2, ...armable('initialize', armed) })
    let results: Record<string, string> | undefined
    const done = barrier()
    armed.do = async () => {
      const { exports: _exports, callSync: _callSync, ...others } = ACTIONS
      results = {}
      for (const [name, action] of Object.entries(others)) results[name] = await came(() => action(manager))
      done.open()
    }
    // With two, the pool takes the second, so the first one serves on.
    await failure(manager.call('boom'), 'ERR_WASM_TRAP')
    await done.promise
    const {
      exports: _exports,
      callSync: _callSync,
      ...expected
    } = everything(RELOADING, instances === 2 ? calls('ok') : {})
    assert.deepEqual(results, expected)
    assert.equal(await manager.call('add', [1, 2]), 3)
    assert.deepEqual(await all(manager), everything('ok'))
  }
})

test('a synchronous call inside initialize of a replacement ends, one way or the other', BOUND, async (t) => {
  let depth = 0
  const results: string[] = []
  const one: { manager?: WasmModuleManager } = {}
  const { manager } = await bench(t, {
    initialize: () => {
      const { manager } = one
      if (manager === undefined) return
      depth += 1
      assert.ok(depth < 10, 'it replaces without end')
      try {
        manager.exports.add?.(1, 2)
        results.push('ok')
      } catch (error) {
        results.push((error as WasmError).code)
      }
      depth -= 1
    },
  })
  one.manager = manager
  assert.throws(() => manager.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
  assert.equal(manager.exports.add?.(1, 2), 3)
  await failure(manager.call('boom'), 'ERR_WASM_TRAP')
  assert.equal(await manager.call('add', [1, 2]), 3)
  for (const result of results) assert.match(result, /^(ok|ERR_WASM_(RELOADING|RELOAD_FAILED|BUSY))$/)
})

test('hooks of reloadSync: the same, and what has begun makes it busy', BOUND, async (t) => {
  for (const name of ['saveState', 'restoreState', 'initialize'] as const) {
    const armed: Armed = {}
    const { manager } = await bench(t, { instances: 2, threads: 2, ...armable(name, armed) })
    const started: Record<string, Promise<string>> = {}
    const gateOpen = name === 'initialize'
    armed.do = () => {
      // It wants this thread, which is here: it cannot have ended by the time that somebody looks who is at work.
      if (gateOpen) started.held = came(() => manager.call('hold', [1]))
      for (const [action, run] of Object.entries(ACTIONS)) started[action] = came(() => run(manager))
    }
    if (gateOpen) assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_BUSY'))
    else assert.equal(manager.reloadSync().generation, 2)
    const results: Record<string, string> = {}
    for (const [action, result] of Object.entries(started)) results[action] = await result
    for (const action of ['reload', 'the same reload', 'a rolling reload', 'reloadSync']) {
      assert.equal(results[action], RELOADING, `${action} in ${name}`)
    }
    for (const action of Object.keys(calls(''))) {
      // Two instances, of which one is held: the first of them can begin at once while the gate is open.
      assert.match(results[action] as string, gateOpen ? /^(ok|ERR_WASM_RELOADING)$/ : /^ERR_WASM_RELOADING$/, action)
    }
    assert.equal(results.call, gateOpen ? 'ok' : RELOADING)
    assert.deepEqual(await all(manager), everything('ok'))
  }
})

for (const name of ['saveState', 'restoreState', 'initialize'] as const) {
  for (const how of ['awaited', 'not awaited', 'in reloadSync'] as const) {
    test(`close inside ${name}, ${how}: the reload rolls back, and the manager is closed`, BOUND, async (t) => {
      const armed: Armed = {}
      const { manager } = await bench(t, armable(name, armed))
      manager.exports.set?.(5)
      const order: string[] = []
      let closed: Promise<unknown> | undefined
      armed.do = () => {
        closed = manager.close().then(() => order.push('closed'))
        return how === 'awaited' ? closed : undefined
      }
      const events: string[] = []
      manager.on('close', () => events.push('close'))
      manager.on('reload:failed', () => events.push('reload:failed'))
      if (how === 'in reloadSync') assert.throws(() => manager.reloadSync(), hasCode(CLOSED))
      else await failure(manager.reload(), CLOSED)
      await closed
      assert.deepEqual([manager.state, manager.generation, manager.stats().memoryBytes], ['closed', 1, 0])
      await until(() => events.includes('close'))
      assert.deepEqual(events, ['reload:failed', 'close'])
      await manager.close()
    })

    test(`destroy inside ${name}, ${how}: the same, at once`, BOUND, async (t) => {
      const armed: Armed = {}
      const { manager, close, arrived } = await bench(t, { instances: 2, threads: 2, ...armable(name, armed) })
      let destroyed: Promise<unknown> | undefined
      armed.do = () => {
        destroyed = manager.destroy()
        return how === 'awaited' ? destroyed : undefined
      }
      if (how === 'in reloadSync') assert.throws(() => manager.reloadSync(), hasCode(CLOSED))
      else if (name === 'initialize') {
        // The gate is open: what runs is cut as well.
        close(1)
        const held = failure(manager.call('hold', [1]), 'ERR_WASM_INTERRUPTED')
        await arrived(1)
        await failure(manager.reload(), CLOSED)
        await held
      } else await failure(manager.reload(), CLOSED)
      await destroyed
      assert.deepEqual([manager.state, manager.generation], ['closed', 1])
    })
  }
}

test('close inside a hook lets the calls run that were admitted before', BOUND, async (t) => {
  const armed: Armed = {}
  const { manager } = await bench(t, armable('saveState', armed))
  manager.exports.set?.(5)
  const inside = barrier()
  const door = barrier()
  let closed: Promise<void> | undefined
  armed.do = async () => {
    inside.open()
    await door.promise
    closed = manager.close()
  }
  const reload = failure(manager.reload(), CLOSED)
  await inside.promise
  const waiting = [manager.call('count'), manager.use((instance) => [instance.generation, instance.exports.count?.()])]
  door.open()
  await reload
  // On the old generation: the reload was rolled back.
  assert.deepEqual(await Promise.all(waiting), [6, [1, 7]])
  await closed
})

test('close and destroy inside initialize of a replacement', BOUND, async (t) => {
  for (const end of ['close', 'destroy'] as const) {
    for (const sync of [false, true]) {
      const armed: Armed = {}
      const { manager } = await bench(t, armable('initialize', armed))
      let ended: Promise<void> | undefined
      armed.do = () => {
        ended = manager[end]()
        return sync ? undefined : ended
      }
      if (sync) {
        assert.throws(() => manager.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
        const result = await came(() => manager.exports.add?.(1, 2))
        assert.match(result, /^(ok|ERR_WASM_CLOSED|ERR_WASM_RELOAD_FAILED)$/)
      } else await failure(manager.call('boom'), 'ERR_WASM_TRAP')
      await until(() => ended !== undefined)
      await ended
      assert.equal(manager.state, 'closed')
    }
  }
})

test(
  'only the manager whose hook it is counts: another one can be used, reloaded and closed inside',
  BOUND,
  async (t) => {
    const armed: Armed = {}
    const { manager } = await bench(t, armable('saveState', armed))
    const { manager: other } = await bench(t)
    armed.do = async () => {
      assert.deepEqual(await all(other), everything('ok'))
      await other.close()
    }
    assert.equal((await manager.reload()).generation, 2)
    assert.equal(other.state, 'closed')
  },
)

test('two managers whose hooks reload each other do not wait for each other for ever', BOUND, async (t) => {
  const first: Armed = {}
  const second: Armed = {}
  const one = await bench(t, armable('saveState', first))
  const two = await bench(t, armable('saveState', second))
  const inner: string[] = []
  first.do = async () => inner.push(await came(() => two.manager.reload()))
  // Its context is that of its own reload; awaiting the first one would be a wait in a circle that nobody can see.
  second.do = () => void one.manager.reload({ reason: 'back' }).then(() => inner.push('back'))
  await one.manager.reload()
  await until(() => inner.length === 2)
  assert.deepEqual(inner, ['ok', 'back'])
  assert.deepEqual([one.manager.generation, two.manager.generation], [3, 2])
})

test('what a hook has left behind is inside no hook any more', BOUND, async (t) => {
  const armed: Armed = {}
  const { manager } = await bench(t, armable('saveState', armed))
  const door = barrier()
  let left: Promise<unknown> | undefined
  armed.do = () => {
    left = door.promise.then(() => manager.reload({ reason: 'later' }))
  }
  await manager.reload()
  // While the next hook runs, what the first one left behind wakes up: it waits like anybody else.
  const inside = barrier()
  const end = barrier()
  armed.do = async () => {
    inside.open()
    await end.promise
  }
  const reload = manager.reload()
  await inside.promise
  door.open()
  await turns()
  end.open()
  await reload
  assert.equal(((await left) as { generation: number }).generation, 4)
})

test('the context of a hook goes through timers, microtasks and emitters that it awaits', BOUND, async (t) => {
  const armed: Armed = {}
  const { manager } = await bench(t, armable('restoreState', armed))
  await manager.reload()
  const { manager: other } = await bench(t, armable('saveState', armed))
  const results: string[] = []
  armed.do = async () => {
    await new Promise((resolve) => setTimeout(resolve, 1))
    results.push(await came(() => other.reload()))
    await new Promise<void>((resolve) => queueMicrotask(resolve))
    results.push(await came(() => other.call('add', [1, 2])))
    await turns()
    await Promise.all([1, 2].map(async () => results.push(await came(() => other.acquire()))))
  }
  await other.reload()
  assert.deepEqual(results, [RELOADING, RELOADING, RELOADING, RELOADING])
})

// ---------------------------------------------------------------- imports that hooks reach

test('an import that a hook calls through its instance is inside the hook', BOUND, async (t) => {
  for (const path of ['exports', 'call'] as const) {
    const one: { manager?: WasmModuleManager; results: string[] } = { results: [] }
    const source = wat('(module (import "env" "f" (func $f)) (func (export "run") (call $f)))')
    let isArmed = false
    const manager = await managed(t, source, {
      imports: {
        env: {
          f: () => {
            if (!isArmed) return
            isArmed = false
            const { manager } = one
            assert.ok(manager)
            assert.throws(() => manager.reloadSync(), hasCode(RELOADING))
            void came(() => manager.reload({ reason: 'import' })).then((code) => one.results.push(code))
          },
        },
      },
      saveState: (instance) => (path === 'call' ? instance.call('run') : void instance.exports.run?.()),
    })
    one.manager = manager
    isArmed = true
    await manager.reload()
    await until(() => one.results.length === 1)
    // On this thread it is seen to be inside; from the pool it comes by itself, and is queued behind.
    assert.equal(one.results[0], path === 'exports' ? RELOADING : 'ok')
    assert.equal(manager.generation, path === 'exports' ? 2 : 3)
  }
})

// ---------------------------------------------------------------- imports of calls

/** A guest whose import does what it is told, once. */
async function withImport(t: Parameters<typeof managed>[0], options: ManagerOptions = {}) {
  const box: { body?: (context: InstanceContext) => unknown } = {}
  const source = wat(`(module
    (import "env" "f" (func $f (result i32)))
    (global $n (mut i32) (i32.const 0))
    (func (export "run") (result i32) (call $f))
    (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
    (func (export "boom") (unreachable)))`)
  const manager = await managed(t, source, {
    imports: (context) => ({
      env: {
        f: () => {
          const { body } = box
          delete box.body
          return body?.(context) ?? 0
        },
      },
    }),
    ...options,
  })
  return { manager, box }
}

test('inside an import of a synchronous call: what must wait comes after it', BOUND, async (t) => {
  const { manager, box } = await withImport(t)
  const later: Record<string, Promise<string>> = {}
  box.body = () => {
    assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_BUSY'))
    // The instance that called, on this very stack.
    assert.equal(manager.exports.add?.(1, 2), 3)
    assert.equal(manager.callSync('add', [1, 2]), 3)
    for (const name of ['call', 'use', 'acquire', 'reload', 'a rolling reload']) {
      later[name] = came(() => ACTIONS[name]?.(manager))
    }
    return 7
  }
  assert.equal(manager.exports.run?.(), 7)
  for (const [name, result] of Object.entries(later)) assert.equal(await result, 'ok', name)
  assert.equal(manager.generation, 3)
})

test('inside an import of a pool call: the same, with another replica at once', BOUND, async (t) => {
  for (const instances of [1, 2]) {
    const { manager, box } = await withImport(t, { instances, threads: instances })
    const later: Record<string, Promise<string>> = {}
    box.body = () => {
      assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_BUSY'))
      assert.equal(manager.exports.add?.(1, 2), 3)
      for (const name of ['call', 'use', 'acquire', 'reload']) later[name] = came(() => ACTIONS[name]?.(manager))
      return 7
    }
    assert.equal(await manager.call('run'), 7)
    for (const [name, result] of Object.entries(later)) assert.equal(await result, 'ok', name)
    assert.equal(manager.generation, 2)
  }
})

test('a promise import may await calls on another replica, and a rolling reload', BOUND, async (t) => {
  const { manager, box } = await withImport(t, { instances: 2, threads: 2 })
  const generations: number[] = []
  box.body = async (context) => {
    assert.equal(await manager.call('add', [1, 2]), 3)
    assert.equal(await manager.use((instance) => instance.call('add', [1, 2])), 3)
    generations.push((await manager.reload({ strategy: 'rolling' })).generation)
    // It goes on in the generation in which it began.
    assert.equal(context.exports.add?.(3, 4), 7)
    generations.push(context.generation, manager.generation)
    return 7
  }
  assert.equal(await manager.call('run'), 7)
  assert.deepEqual(generations, [2, 1, 2])
})

test('a promise import that awaits an exclusive reload waits for itself, until the drain timeout', BOUND, async (t) => {
  const { manager, box } = await withImport(t)
  box.body = () => manager.reload({ drainTimeoutMs: 20 })
  const error = await failure(manager.call('run'), 'ERR_WASM_DRAIN_TIMEOUT')
  assert.equal(error.inFlight, 1)
  assert.equal(manager.generation, 1)
  // Or until it is the one that is interrupted.
  let report: unknown
  box.body = async () => {
    report = await manager.reload({ drainTimeoutMs: 10, onDrainTimeout: 'interrupt' })
    return 7
  }
  await failure(manager.call('run'), 'ERR_WASM_INTERRUPTED')
  await until(() => report !== undefined)
  assert.equal(manager.generation, 2)
  box.body = () => manager.close({ drainTimeoutMs: 20 })
  const closing = await failure(manager.call('run'), 'ERR_WASM_DRAIN_TIMEOUT')
  assert.equal(closing.inFlight, 1)
  await manager.close()
})

test(
  'a promise import that awaits a call waits for itself where there is no other replica, until a timeout',
  BOUND,
  async (t) => {
    const { manager, box } = await withImport(t)
    box.body = () => manager.call('add', [1, 2], { timeoutMs: 20 })
    await failure(manager.call('run'), 'ERR_WASM_TIMEOUT')
    box.body = () => manager.use(() => 1, { signal: AbortSignal.timeout(20) })
    await assert.rejects(manager.call('run'), { name: 'TimeoutError' })
    assert.equal(await manager.call('run'), 0)
    assert.equal(manager.stats().queued, 0)
  },
)

test('close inside an import, not awaited, comes after the call', BOUND, async (t) => {
  for (const path of ['exports', 'call', 'promise'] as const) {
    const { manager, box } = await withImport(t)
    let closed: Promise<void> | undefined
    box.body = () => {
      closed = manager.close()
      return path === 'promise' ? turns().then(() => 7) : 7
    }
    assert.equal(path === 'exports' ? manager.exports.run?.() : await manager.call('run'), 7)
    await closed
    assert.equal(manager.state, 'closed')
  }
})

test('destroy inside an import cuts the call that it is in', BOUND, async (t) => {
  for (const path of ['exports', 'call', 'promise', 'awaited'] as const) {
    const { manager, box } = await withImport(t)
    let destroyed: Promise<void> | undefined
    box.body = () => {
      destroyed = manager.destroy()
      if (path === 'awaited') return destroyed
      return path === 'promise' ? new Promise(() => {}) : 7
    }
    const result =
      path === 'exports' ? await came(() => manager.exports.run?.()) : await came(() => manager.call('run'))
    assert.match(result, path === 'promise' || path === 'awaited' ? /INTERRUPTED/ : /^(ok|ERR_WASM_INTERRUPTED)$/)
    await destroyed
    assert.equal(manager.state, 'closed')
  }
})

// ---------------------------------------------------------------- the imports function

test('the imports function may ask for whatever it likes; it is never waited for', BOUND, async (t) => {
  for (const how of ['reload', 'rolling', 'reloadSync', 'replacement'] as const) {
    const box: { manager?: WasmModuleManager } = {}
    const later: Record<string, Promise<string>> = {}
    let sync: string | undefined
    const manager = await managed(
      t,
      wat(`(module
        (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
        (func (export "boom") (unreachable)))`),
      {
        instances: 2,
        threads: 2,
        imports: () => {
          const { manager } = box
          delete box.manager
          if (manager === undefined) return {}
          try {
            manager.reloadSync()
          } catch (error) {
            sync = (error as WasmError).code
          }
          // Calls would make a reloadSync busy, which is the next case.
          for (const name of ['reload', ...(how === 'reloadSync' ? [] : ['call', 'use'])]) {
            later[name] = came(() => ACTIONS[name]?.(manager))
          }
          return {}
        },
      },
    )
    box.manager = manager
    if (how === 'reloadSync') assert.equal(manager.reloadSync().generation, 2)
    else if (how === 'replacement') await failure(manager.call('boom'), 'ERR_WASM_TRAP')
    else await manager.reload(how === 'rolling' ? { strategy: 'rolling' } : {})
    await until(() => later.reload !== undefined)
    for (const [name, result] of Object.entries(later)) assert.equal(await result, 'ok', `${name} in ${how}`)
    assert.equal(sync, RELOADING, how)
    assert.equal(manager.generation, 3)
    assert.deepEqual(await all(manager), everything('ok'))
  }
})

test('calls from the imports function make reloadSync busy, and it rolls back', BOUND, async (t) => {
  const box: { manager?: WasmModuleManager; call?: Promise<unknown> } = {}
  const { manager, close, release } = await bench(t, {
    onImports: () => {
      const { manager } = box
      delete box.manager
      if (manager !== undefined) box.call = manager.call('hold', [1])
    },
  })
  // One that lasts: a short one may be over before the reload looks.
  close(1)
  box.manager = manager
  assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_BUSY'))
  release(1)
  assert.equal(await box.call, 1)
  assert.equal(manager.reloadSync().generation, 2)
})

test('close and destroy from the imports function', BOUND, async (t) => {
  for (const end of ['close', 'destroy'] as const) {
    for (const how of ['reload', 'reloadSync'] as const) {
      const box: { manager?: WasmModuleManager; ended?: Promise<void> } = {}
      const { manager } = await bench(t, {
        onImports: () => {
          const { manager } = box
          delete box.manager
          if (manager !== undefined) box.ended = manager[end]()
        },
      })
      box.manager = manager
      const result = await came(() => manager[how]())
      // A reload that was asked for before is waited for by close, and cut by destroy.
      assert.match(result, end === 'close' ? /^(ok|ERR_WASM_CLOSED)$/ : /^ERR_WASM_CLOSED$/)
      await box.ended
      assert.equal(manager.state, 'closed')
    }
  }
})

// ---------------------------------------------------------------- at create

test('the hooks of create have their instance only, and a failure there leaves nothing behind', BOUND, async (t) => {
  const seen: unknown[] = []
  const manager = await managed(t, stamped, {
    imports: (context) => ({ env: { pause: () => void seen.push(context.exports.count?.()) } }),
    initialize: async (instance) => {
      instance.exports.next?.()
      // An import that calls back into the guest of the hook.
      await instance.call('read', [0])
      seen.push(instance.generation, instance.exports.count?.())
    },
  })
  assert.deepEqual(seen, [1, 1, 1])
  assert.equal(manager.exports.count?.(), 1)
  const sync = managedSync(t, stamped, {
    imports: { env: { pause: () => {} } },
    initialize: (instance) => {
      // A manager can be made, used and reloaded while another one is being made.
      const inner = managedSync(t, stamped, { imports: { env: { pause: () => {} } } })
      inner.reloadSync()
      instance.exports.setCount?.(inner.generation)
    },
  })
  assert.equal(sync.exports.count?.(), 2)
})

// ---------------------------------------------------------------- listeners

test("listeners of 'reload' and 'reload:failed' may use, reload and close the manager", BOUND, async (t) => {
  for (const event of ['reload', 'reload:failed'] as const) {
    let fails = false
    const { manager } = await bench(t, {
      instances: 2,
      threads: 2,
      initialize: () => {
        if (fails) throw new Error('as told')
      },
    })
    const results = barrier<Record<string, string>>()
    // The two overloads do not take a union.
    const once = (listener: () => void) => (manager as EventEmitter).once(event, listener)
    once(async () => {
      fails = false
      const found: Record<string, string> = {}
      for (const name of ['call', 'use', 'acquire', 'reload', 'a rolling reload', 'call with a signal']) {
        found[name] = await came(() => ACTIONS[name]?.(manager))
      }
      results.open(found)
    })
    fails = event === 'reload:failed'
    await outcome(manager.reload())
    for (const [name, result] of Object.entries(await results.promise))
      assert.equal(result, 'ok', `${name} in ${event}`)
    const closed = barrier<string>()
    once(() => void came(() => manager.close()).then(closed.open))
    fails = event === 'reload:failed'
    await outcome(manager.reload({ reason: 'last' }))
    assert.equal(await closed.promise, 'ok')
    assert.equal(manager.state, 'closed')
  }
})

test("listeners of 'reload' find the generation that it tells of, or a later one", BOUND, async (t) => {
  const { manager } = await bench(t)
  const seen: boolean[] = []
  manager.on('reload', (report) => seen.push(manager.generation >= report.generation))
  for (let i = 0; i < 20; i += 1) await manager.reload({ strategy: i % 2 === 0 ? 'rolling' : 'exclusive' })
  await until(() => seen.length === 20)
  assert.ok(seen.every(Boolean))
})

test("a listener of 'trap' may call, reload and destroy", BOUND, async (t) => {
  const { manager } = await bench(t)
  const results = barrier<string[]>()
  manager.once('trap', async () => {
    results.open([
      await came(() => manager.call('add', [1, 2])),
      await came(() => manager.reload()),
      await came(() => manager.use((instance) => instance.call('add', [1, 2]))),
    ])
  })
  await failure(manager.call('boom'), 'ERR_WASM_TRAP')
  assert.deepEqual(await results.promise, ['ok', 'ok', 'ok'])
  const ended = barrier<string>()
  manager.once('trap', () => void came(() => manager.destroy()).then(ended.open))
  assert.throws(() => manager.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
  assert.equal(await ended.promise, 'ok')
  assert.equal(manager.state, 'closed')
})

test("a listener of 'close' finds a closed manager, and may close it again", BOUND, async (t) => {
  for (const end of ['close', 'destroy'] as const) {
    const { manager } = await bench(t)
    const results = barrier<Record<string, string>>()
    manager.on('close', async () => {
      const found = await all(manager)
      found.close = await came(() => manager.close())
      found.destroy = await came(() => manager.destroy())
      results.open(found)
    })
    await manager[end]()
    assert.deepEqual(await results.promise, { ...everything(CLOSED), close: 'ok', destroy: 'ok' })
  }
})

test('reloads from everywhere at once all end, one generation after the other', BOUND, async (t) => {
  let left = 30
  let asked = 0
  const seen: number[] = []
  const pending: Promise<unknown>[] = []
  const one: { manager?: WasmModuleManager } = {}
  const again = () => {
    const { manager } = one
    if (manager === undefined || left <= 0) return
    left -= 1
    asked += 1
    pending.push(outcome(manager.reload({ reason: `number ${asked}` })))
  }
  const manager = await managed(t, wat('(module (import "env" "f" (func $f)) (func (export "run") (call $f)))'), {
    instances: 2,
    threads: 2,
    imports: () => {
      again()
      return { env: { f: again } }
    },
  })
  one.manager = manager
  manager.on('reload', (report) => {
    seen.push(report.generation)
    again()
    manager.call('run').catch(() => {})
  })
  again()
  await until(() => left === 0)
  await Promise.all(pending)
  await until(() => seen.length === asked)
  assert.deepEqual(
    seen,
    seen.map((_, index) => index + 2),
  )
})

test(
  "what comes from a pool thread is in nobody's asynchronous context, whoever has handed a call over",
  BOUND,
  async (t) => {
    const context = new AsyncLocalStorage<string>()
    const seen: unknown[] = []
    const source = wat(
      '(module (import "env" "f" (func $f)) (func (export "run") (call $f)) (func (export "boom") (unreachable)))',
    )
    const manager = await managed(t, source, { imports: { env: { f: () => void seen.push(context.getStore()) } } })
    manager.on('trap', () => seen.push(context.getStore()))
    for (let i = 0; i < 20; i += 1) {
      await context.run('the caller', async () => {
        await manager.call('run')
        await manager.call('boom').catch(() => {})
        assert.equal(context.getStore(), 'the caller')
      })
    }
    await until(() => seen.length === 40)
    assert.deepEqual(new Set(seen), new Set([undefined]))
  },
)
