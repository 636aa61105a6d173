// The drain of a reload: what is in flight ends, is waited for in vain, or is stopped.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { InstanceContext, WasmValue } from '../index.js'
import { wat } from './guests.ts'
import { barrier, bench, failure, hasCode, LIMIT, managed, outcome, turns, until, type WasmError } from './support.ts'

const stale = hasCode('ERR_WASM_STALE_HANDLE')
const interrupt = { drainTimeoutMs: 10, onDrainTimeout: 'interrupt' } as const

/** What was stopped is given at least 5 seconds to notice; whatever needs them was not stopped. */
const AT_ONCE = 4_500

async function quick<T>(action: () => Promise<T>): Promise<T> {
  const started = performance.now()
  const value = await action()
  const took = performance.now() - started
  assert.ok(took < AT_ONCE, `it took ${took} ms`)
  return value
}

test('a reload waits for a lease, and the lease holder may call as often as it likes', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const lease = await manager.acquire()
  const reload = manager.reload()
  await until(() => manager.state === 'draining')
  lease.exports.set?.(12)
  assert.equal(await lease.call('count'), 13)
  assert.equal(lease.exports.peek?.(), 13)
  assert.equal(manager.generation, 1)
  lease.release()
  assert.equal((await reload).drained, 1)
})

test("onDrainTimeout 'abort' gives up: the old generation serves on, calls in flight end well", LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  manager.exports.set?.(3)
  close(1)
  const held = manager.call('holdThenCount', [1])
  await arrived(1)
  const started = performance.now()
  const end = await outcome(manager.reload({ drainTimeoutMs: 30 }))
  const took = performance.now() - started
  assert.ok('error' in end)
  hasCode('ERR_WASM_DRAIN_TIMEOUT', /30 ms/)(end.error)
  assert.equal((end.error as WasmError).inFlight, 1)
  assert.ok(took >= 25, `gave up after ${took} ms`)
  assert.deepEqual([manager.state, manager.generation], ['ready', 1])
  const waits = manager.call('count')
  release(1)
  assert.deepEqual(await Promise.all([held, waits]), [4, 5])
  assert.equal(manager.stats().reloadsFailed, 1)
  assert.equal((await manager.reload()).generation, 2)
})

test("onDrainTimeout 'interrupt' stops what still runs with ERR_WASM_INTERRUPTED, and commits", LIMIT, async (t) => {
  const { manager, entered, close, arrived } = await bench(t, { instances: 2, threads: 2 })
  close(1)
  const inside = entered()
  const spin = outcome(manager.call('spin'))
  await inside
  const held = outcome(manager.call('hold', [1]))
  await arrived(1)
  const report = await manager.reload({ drainTimeoutMs: 20, onDrainTimeout: 'interrupt' })
  assert.equal(report.generation, 2)
  assert.equal(report.drained, 2)
  for (const end of await Promise.all([spin, held])) {
    assert.ok('error' in end)
    hasCode('ERR_WASM_INTERRUPTED')(end.error)
  }
  assert.deepEqual(await Promise.all([manager.call('add', [1, 2]), manager.call('add', [3, 4])]), [3, 7])
})

test('an interrupted instance is not asked to save by the very reload that interrupted it', LIMIT, async (t) => {
  let asked = 0
  const { manager, entered } = await bench(t, {
    saveState: () => {
      asked += 1
    },
  })
  const inside = entered()
  const spin = outcome(manager.call('spin'))
  await inside
  await manager.reload({ drainTimeoutMs: 0, onDrainTimeout: 'interrupt' })
  assert.ok('error' in (await spin))
  assert.equal(asked, 0)
})

test('a drain timeout of 0 commits at once when nothing is in flight', LIMIT, async (t) => {
  const { manager } = await bench(t)
  assert.equal((await manager.reload({ drainTimeoutMs: 0 })).generation, 2)
})

// ---------------------------------------------------------------- abort

test("'abort' counts leases as well, and leaves them valid", LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { instances: 3, threads: 3 })
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const leases = [await manager.acquire(), await manager.acquire()]
  const error = await failure(manager.reload({ drainTimeoutMs: 0 }), 'ERR_WASM_DRAIN_TIMEOUT')
  assert.deepEqual([error.inFlight, manager.state, manager.generation], [3, 'ready', 1])
  for (const lease of leases) {
    assert.equal(lease.exports.add?.(1, 2), 3)
    assert.equal(await lease.call('add', [1, 2]), 3)
    lease.release()
  }
  release(1)
  assert.equal(await held, 1)
})

test("after 'abort' nothing is stopped, and what waited runs on the old generation, in order", LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  manager.exports.set?.(10)
  close(1)
  const held = manager.call('holdThenCount', [1])
  await arrived(1)
  const reload = failure(manager.reload({ drainTimeoutMs: 20 }), 'ERR_WASM_DRAIN_TIMEOUT')
  await until(() => manager.state === 'draining')
  const waiting = [
    manager.call('count'),
    manager.use((i) => [i.generation, i.exports.count?.()]),
    manager.call('count'),
  ]
  await reload
  release(1)
  assert.deepEqual(await Promise.all([held, ...waiting]), [11, 12, [1, 13], 14])
  assert.equal(manager.stats().calls.interrupted, 0)
})

test("a promise import that never settles: 'abort' leaves the call waiting, 'interrupt' ends it", LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const held = failure(manager.call('hold', [1]), 'ERR_WASM_INTERRUPTED')
  await arrived(1)
  const error = await failure(manager.reload({ drainTimeoutMs: 0 }), 'ERR_WASM_DRAIN_TIMEOUT')
  assert.equal(error.inFlight, 1)
  assert.equal((await quick(() => manager.reload(interrupt))).generation, 2)
  await held
  // It settles after all, and nobody is there for it.
  release(1)
  await turns()
  assert.equal(await manager.call('hold', [3]), 3)
})

// ---------------------------------------------------------------- interrupt

test("'interrupt' takes a lease away that is never released; its state is still saved", LIMIT, async (t) => {
  const { manager } = await bench(t, {
    saveState: (instance) => instance.exports.peek?.(),
    restoreState: (instance, state) => void instance.exports.set?.(state),
  })
  const lease = await manager.acquire()
  lease.exports.set?.(7)
  const { exports, memory } = lease
  const { buffer } = memory
  const report = await quick(() => manager.reload(interrupt))
  assert.deepEqual([report.generation, report.drained], [2, 1])
  assert.equal(buffer.byteLength, 0)
  assert.throws(() => exports.peek?.(), stale)
  assert.throws(() => memory.read(0, 1), stale)
  assert.throws(() => lease.memory.byteLength, stale)
  await failure(lease.call('peek'), 'ERR_WASM_STALE_HANDLE')
  assert.equal(lease.generation, 1)
  // It was idle, so its instance was in order.
  assert.equal(manager.exports.peek?.(), 7)
  lease.release()
  lease.release()
  assert.equal(await manager.call('peek'), 7)
  assert.deepEqual([manager.stats().inFlight, manager.stats().reloads], [0, { manual: 1 }])
})

test("'interrupt' ends a use() that never settles; what it comes to later is its own affair", LIMIT, async (t) => {
  const { manager } = await bench(t)
  const inside = barrier()
  const door = barrier()
  const using = manager.use(async (instance) => {
    inside.open()
    await door.promise
    assert.throws(() => instance.exports.add?.(1, 2), stale)
    return 'settled'
  })
  await inside.promise
  assert.equal((await quick(() => manager.reload(interrupt))).generation, 2)
  assert.equal(manager.exports.add?.(1, 2), 3)
  door.open()
  assert.equal(await using, 'settled')
})

test("'interrupt' stops the call that runs in a lease and refuses those that wait in it", LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  const lease = await manager.acquire()
  close(1)
  const calls = [lease.call('hold', [1]), lease.call('count'), lease.call('spin')]
  const ends = calls.map((call) => failure(call, 'ERR_WASM_INTERRUPTED', /onDrainTimeout: 'interrupt'/))
  await arrived(1)
  await quick(() => manager.reload(interrupt))
  await Promise.all(ends)
  assert.throws(() => lease.exports.add?.(1, 2), stale)
  release(1)
  assert.equal(await manager.call('count'), 1)
})

for (const options of [undefined, { timeoutMs: 50_000 }, { signal: new AbortController().signal }]) {
  const kind = options === undefined ? 'plain calls' : `calls with ${Object.keys(options)}`
  test(`'interrupt' reaches ${kind} that hold an instance and wait for a thread`, LIMIT, async (t) => {
    // Three instances and one thread: two calls have a ticket each, and no thread.
    const { manager, close, arrived, release } = await bench(t, { instances: 3, threads: 1 })
    close(1)
    close(2)
    const call = (key: number) => manager.call('hold', [key], options)
    const first = call(1)
    await arrived(1)
    const ends = [first, call(2), call(2)].map((one) => failure(one, 'ERR_WASM_INTERRUPTED'))
    assert.equal(manager.stats().inFlight, 3)
    const waits = manager.call('add', [1, 2])
    const report = await quick(() => manager.reload(interrupt))
    assert.deepEqual([report.drained, report.generation], [3, 2])
    await Promise.all(ends)
    assert.equal(await waits, 3)
    for (const key of [1, 2]) release(key)
    assert.deepEqual(await Promise.all([1, 2, 3].map((n) => manager.call('add', [n, n]))), [2, 4, 6])
  })
}

test('what waits at the gate is not interrupted: it runs in the new generation', LIMIT, async (t) => {
  const { manager, entered } = await bench(t)
  const inside = entered()
  const spin = failure(manager.call('spin'), 'ERR_WASM_INTERRUPTED')
  await inside
  const waiting = [
    manager.call('count'),
    manager.use((i) => [i.generation, i.exports.count?.()]),
    manager.call('count'),
  ]
  const report = await quick(() => manager.reload(interrupt))
  await spin
  assert.equal(report.queued, 3)
  assert.deepEqual(await Promise.all(waiting), [1, [2, 2], 3])
  assert.equal(manager.stats().calls.interrupted, 1)
})

test(
  "'interrupt' reaches a call that is inside a nested call, and one that waits in an import after it",
  LIMIT,
  async (t) => {
    const source = wat(`(module
    (import "env" "f" (func $f (result i32)))
    (func (export "run") (result i32) (call $f))
    (func (export "one") (result i32) (i32.const 1)))`)
    const inside = barrier()
    const door = barrier()
    let late: Promise<unknown> | undefined
    let context: InstanceContext | undefined
    const manager = await managed(t, source, {
      imports: (given) => {
        context ??= given
        return {
          env: {
            f: () => {
              late = (async () => {
                assert.equal(given.exports.one?.(), 1)
                inside.open()
                await door.promise
                // The guest that waited is gone, and with it the instance.
                assert.throws(() => given.exports.one?.(), stale)
                return 1
              })()
              return late
            },
          },
        }
      },
    })
    const run = failure(manager.call('run'), 'ERR_WASM_INTERRUPTED')
    await inside.promise
    await quick(() => manager.reload(interrupt))
    await run
    door.open()
    await late
    assert.throws(() => context?.exports.one?.(), stale)
    assert.equal(manager.exports.one?.(), 1)
  },
)

test('of several replicas only those that were interrupted lose their state', LIMIT, async (t) => {
  const asked: [string, number][] = []
  const { manager, entered } = await bench(t, {
    instances: 3,
    threads: 3,
    saveState: (instance, replica) => {
      asked.push(['save', replica])
      return instance.exports.peek?.()
    },
    restoreState: (instance, state, replica) => {
      asked.push(['restore', replica])
      instance.exports.set?.(state)
    },
  })
  const leases = await Promise.all([manager.acquire(), manager.acquire(), manager.acquire()])
  for (const lease of leases) lease.exports.set?.(5)
  const inside = entered()
  const spin = failure((leases[1] as (typeof leases)[0]).call('spin'), 'ERR_WASM_INTERRUPTED')
  await inside
  await quick(() => manager.reload(interrupt))
  await spin
  const saved = asked.filter(([hook]) => hook === 'save').map(([, replica]) => replica)
  const restored = asked.filter(([hook]) => hook === 'restore').map(([, replica]) => replica)
  assert.equal(saved.length, 2)
  assert.deepEqual(restored, saved)
  const fresh = await Promise.all([manager.acquire(), manager.acquire(), manager.acquire()])
  assert.deepEqual(fresh.map((one) => one.exports.peek?.()).sort(), [0, 5, 5])
  for (const one of fresh) one.release()
})

test('a reload that fails after it has interrupted leaves a manager that serves', LIMIT, async (t) => {
  let isArmed = true
  const cause = new Error('no')
  const { manager, close, arrived, release } = await bench(t, {
    instances: 2,
    threads: 2,
    saveState: () => {
      if (isArmed) throw cause
    },
  })
  const lease = await manager.acquire()
  lease.exports.set?.(5)
  close(1)
  const held = failure(manager.call('hold', [1]), 'ERR_WASM_INTERRUPTED')
  await arrived(1)
  const error = await failure(
    quick(() => manager.reload(interrupt)),
    'ERR_WASM_RELOAD_FAILED',
  )
  assert.ok(error.cause === cause)
  await held
  release(1)
  assert.throws(() => lease.exports.peek?.(), stale)
  // The one that was interrupted is replaced, the other one keeps what it had; neither is still being stopped.
  isArmed = false
  const both = await Promise.all([manager.acquire(), manager.acquire()])
  const peeks: WasmValue[] = await Promise.all(both.map((one) => one.call('peek')))
  assert.deepEqual(peeks.sort(), [0, 5])
  for (const one of both) one.release()
  assert.equal((await manager.reload()).reason, 'manual')
})

test('interrupting again and again leaves nothing in flight and nothing stopped', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { instances: 2, threads: 2 })
  for (let round = 1; round <= 20; round += 1) {
    close(round)
    const held = failure(manager.call('hold', [round]), 'ERR_WASM_INTERRUPTED')
    await arrived(round)
    await manager.acquire()
    const report = await quick(() => manager.reload({ drainTimeoutMs: 0, onDrainTimeout: 'interrupt' }))
    assert.equal(report.generation, round + 1)
    await held
    release(round)
    assert.deepEqual(await Promise.all([manager.call('add', [1, 2]), manager.call('add', [3, 4])]), [3, 7])
    assert.equal(manager.exports.add?.(1, 2), 3)
  }
  assert.deepEqual(manager.stats().reloads, { manual: 20 })
})

// ---------------------------------------------------------------- the end, meanwhile

for (const strategy of ['exclusive', 'rolling'] as const) {
  test(`close({ drainTimeoutMs }) ends an ${strategy} reload that still drains, and then itself`, LIMIT, async (t) => {
    const { manager, close, arrived, release } = await bench(t)
    const lease = await manager.acquire()
    // A rolling one waits for what an earlier one has left behind.
    if (strategy === 'rolling') await manager.reload({ strategy })
    else {
      close(1)
      void outcome(lease.call('hold', [1]))
      await arrived(1)
    }
    const { generation } = manager
    const reload = failure(manager.reload({ strategy, reason: 'late' }), 'ERR_WASM_CLOSED')
    const error = await failure(
      quick(() => manager.close({ drainTimeoutMs: 20 })),
      'ERR_WASM_DRAIN_TIMEOUT',
    )
    await reload
    assert.deepEqual([error.inFlight, manager.state, manager.generation], [1, 'closing', generation])
    const closed = manager.close()
    release(1)
    lease.release()
    await closed
    assert.deepEqual([manager.state, manager.stats().memoryBytes], ['closed', 0])
  })

  test(`destroy cuts an ${strategy} reload that still drains`, LIMIT, async (t) => {
    const { manager } = await bench(t)
    const lease = await manager.acquire()
    if (strategy === 'rolling') await manager.reload({ strategy })
    const reload = failure(manager.reload({ strategy, reason: 'late' }), 'ERR_WASM_CLOSED')
    if (strategy === 'exclusive') await until(() => manager.state === 'draining')
    const waits = strategy === 'exclusive' ? failure(manager.call('count'), 'ERR_WASM_CLOSED') : undefined
    await quick(() => manager.destroy())
    await Promise.all([reload, waits])
    assert.throws(() => lease.exports.add?.(1, 2), stale)
    assert.equal(manager.state, 'closed')
  })
}
