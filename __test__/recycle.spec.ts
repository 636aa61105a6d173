// Replicas that are replaced or reset without being asked: thresholds, ways, failures, the budget, and what is told of it.
import assert from 'node:assert/strict'
import { tracingChannel } from 'node:diagnostics_channel'
import { once } from 'node:events'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { Worker } from 'node:worker_threads'
import {
  type LeasedInstance,
  loadGlue,
  type ManagerOptions,
  type Pressure,
  type RecyclePolicy,
  type RecycleReport,
  type RecycleTrace,
  setMemoryBudget,
  WasmModuleManager,
} from '../index.js'
import { temporaryFolder, wat } from './guests.ts'
import {
  barrier,
  failure,
  hasCode,
  INDEX_URL,
  LIMIT,
  managed,
  managedSync,
  outcome,
  thrownBy,
  turns,
  until,
  WasmError,
} from './support.ts'

const PAGE = 65_536
const MIB = 1 << 20

/** Each call of `leak` keeps so many pages more, all of them written, and counts. */
const leaky = wat(
  `(module
    (memory (export "memory") 1 8192)
    (global $count (mut i32) (i32.const 0))
    (func (export "leak") (param $pages i32) (result i32) (local $at i32)
      (local.set $at (i32.mul (memory.size) (i32.const 65536)))
      (if (i32.eq (memory.grow (local.get $pages)) (i32.const -1)) (then (unreachable)))
      (memory.fill (local.get $at) (i32.const 7) (i32.mul (local.get $pages) (i32.const 65536)))
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (global.get $count))
    (func (export "next") (result i32)
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (global.get $count))
    (func (export "count") (result i32) (global.get $count))
    (func (export "setCount") (param i32) (global.set $count (local.get 0)))
    (func (export "boom") (unreachable)))`,
  'leaky',
)

const carry: ManagerOptions = {
  saveState: (instance) => instance.exports.count?.(),
  restoreState: (instance, count) => void instance.exports.setCount?.(count),
}

const exact = (recycle: RecyclePolicy): RecyclePolicy => ({ jitter: 0, ...recycle })

interface Told {
  pressure: Pressure[]
  recycles: RecycleReport[]
  failed: WasmError[]
}

function listen(manager: WasmModuleManager): Told {
  const told: Told = { pressure: [], recycles: [], failed: [] }
  manager.on('pressure', (pressure) => told.pressure.push(pressure))
  manager.on('recycle', (report) => told.recycles.push(report))
  manager.on('reload:failed', (error) => told.failed.push(error))
  return told
}

/** Nothing is decided that has not had its outcome. */
async function settled(manager: WasmModuleManager): Promise<void> {
  await until(() => manager.stats().recyclesDue === 0)
  await turns(2)
}

// ---------------------------------------------------------------- thresholds

test('memory stays below its threshold, every call is counted, and the report adds up', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { ...carry, recycle: exact({ memory: 20 * PAGE }) })
  const told = listen(manager)
  let most = 0
  for (let call = 1; call <= 200; call += 1) {
    assert.equal(await manager.call('leak', [1]), call)
    most = Math.max(most, manager.stats().memoryBytes)
  }
  await settled(manager)
  const stats = manager.stats()
  // While a fresh instance is made the old one runs on; both count for a moment.
  assert.ok(most <= 45 * PAGE, `${most / PAGE} pages at most`)
  assert.ok(told.recycles.length >= 5, `${told.recycles.length} recycles`)
  assert.deepEqual(stats.reloads, { memory: told.recycles.length })
  assert.equal(told.pressure.length, told.recycles.length)
  assert.equal(stats.generation, 1 + told.recycles.length)
  // The hooks call as well.
  assert.equal(stats.calls.completed, 200 + 2 * told.recycles.length)
  for (const [index, report] of told.recycles.entries()) {
    assert.equal(report.reason, 'memory')
    assert.equal(report.strategy, 'exclusive')
    assert.equal(report.instance, 0)
    assert.equal(report.generation, index + 2)
    assert.equal(report.previousGeneration, index + 1)
    assert.ok(report.memoryBytesBefore >= 20 * PAGE && report.memoryBytesAfter === PAGE, JSON.stringify(report))
    assert.ok(report.calls >= 19 && report.ageMs > 0)
    assert.ok(report.pauseMs >= report.drainMs + report.saveMs + report.restoreMs - 1e-6)
  }
  for (const pressure of told.pressure) {
    assert.equal(pressure.thresholdBytes, 20 * PAGE)
    assert.ok(pressure.memoryBytes >= 20 * PAGE)
    assert.ok(
      pressure.growthBytesPerCall > PAGE / 2 && pressure.growthBytesPerCall < 2 * PAGE,
      `${pressure.growthBytesPerCall}`,
    )
  }
})

test('a share of the limit is a threshold as well', LIMIT, async (t) => {
  const manager = await managed(t, leaky, {
    limits: { memoryBytes: 40 * PAGE },
    recycle: exact({ memory: '50%', predict: false }),
  })
  const told = listen(manager)
  while (told.recycles.length === 0) await manager.call('leak', [1])
  assert.equal(told.pressure[0]?.thresholdBytes, 20 * PAGE)
})

test('calls are counted for each replica, synchronous ones too', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { recycle: exact({ calls: 10 }) })
  const told = listen(manager)
  for (let call = 0; call < 5; call += 1) await manager.call('next')
  for (let call = 0; call < 4; call += 1) manager.exports.next?.()
  assert.equal(manager.generation, 1)
  manager.callSync('next')
  assert.equal(manager.generation, 2, 'at the boundary of the tenth call')
  await settled(manager)
  assert.equal(told.recycles[0]?.reason, 'calls')
  assert.equal(told.recycles[0]?.calls, 10)
})

test('an instance that nobody calls gets too old', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { ...carry, recycle: exact({ ageMs: 30 }) })
  manager.exports.setCount?.(41)
  const [report] = (await once(manager, 'recycle')) as [RecycleReport]
  assert.equal(report.reason, 'age')
  assert.ok(report.ageMs >= 30, `${report.ageMs}`)
  assert.equal(await manager.call('next'), 42)
  await once(manager, 'recycle')
})

test('what will not fit is foreseen: no call traps', LIMIT, async (t) => {
  const manager = await managed(t, leaky, {
    limits: { memoryBytes: 200 * PAGE },
    recycle: { predict: true, jitter: 0 },
  })
  const told = listen(manager)
  for (let call = 0; call < 300; call += 1) await manager.call('leak', [2])
  await settled(manager)
  assert.ok(told.recycles.length >= 3)
  assert.deepEqual(Object.keys(manager.stats().reloads), ['predicted'])
  assert.equal(told.pressure[0]?.thresholdBytes, 200 * PAGE)
  assert.ok((told.pressure[0]?.memoryBytes ?? 0) > 120 * PAGE, 'not long before')
})

test(
  'one large allocation is no trend; where it does not fit, the trap has the instance replaced',
  LIMIT,
  async (t) => {
    const manager = await managed(t, leaky, {
      limits: { memoryBytes: 100 * PAGE },
      recycle: { predict: true, jitter: 0 },
    })
    const told = listen(manager)
    for (let call = 0; call < 20; call += 1) await manager.call('next')
    await manager.call('leak', [60])
    for (let call = 0; call < 20; call += 1) await manager.call('next')
    assert.equal(told.pressure.length, 0)
    await failure(manager.call('leak', [60]), 'ERR_WASM_TRAP', /memoryBytes/)
    assert.equal(await manager.call('next'), 1)
    assert.deepEqual(manager.stats().reloads, { trap: 1 })
  },
)

test('jitter keeps replicas from going together', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { instances: 4, recycle: { calls: 200, jitter: 0.5 } })
  const calls: number[] = []
  manager.on('recycle', (report) => calls.push(report.calls))
  while (calls.length < 12) await Promise.all(Array.from({ length: 40 }, () => manager.call('next')))
  assert.ok(new Set(calls.map((count) => Math.round(count / 10))).size >= 4, `${calls}`)
  assert.ok(
    calls.every((count) => count >= 100),
    `${calls}`,
  )
})

// ---------------------------------------------------------------- in the middle of load

test('with two replicas nobody waits for a recycle', LIMIT, async (t) => {
  const door = barrier()
  const inside = barrier()
  const manager = await managed(t, leaky, {
    instances: 2,
    saveState: () => ({}),
    restoreState: () => {
      inside.open()
      return door.promise
    },
    recycle: exact({ calls: 5 }),
  })
  const told = listen(manager)
  while (told.pressure.length === 0) await manager.call('next')
  await inside.promise
  // One is out of service for as long as its hook takes; the other serves.
  for (let call = 0; call < 50; call += 1) await manager.call('next')
  assert.equal(told.recycles.length, 0)
  assert.ok(manager.stats().recyclesDue >= 1)
  assert.equal(manager.stats().queued, 0)
  door.open()
  await until(() => told.recycles.length >= 2)
})

test('one at a time: a second one that is due waits for its turn', LIMIT, async (t) => {
  let running = 0
  let most = 0
  const manager = await managed(t, leaky, {
    instances: 3,
    saveState: async () => {
      running += 1
      most = Math.max(most, running)
      await turns(5)
      return 0
    },
    restoreState: async () => {
      await turns(5)
      running -= 1
    },
    recycle: exact({ calls: 4 }),
  })
  const told = listen(manager)
  while (told.recycles.length < 10) await Promise.all(Array.from({ length: 12 }, () => manager.call('next')))
  assert.equal(most, 1)
})

test('under load every call has one answer, of the state that it was carried over with', LIMIT, async (t) => {
  const manager = await managed(t, leaky, {
    ...carry,
    instances: 2,
    maxQueue: 5000,
    recycle: exact({ memory: 30 * PAGE }),
  })
  const before = listen(manager)
  const answers = await Promise.all(Array.from({ length: 2000 }, () => manager.call('leak', [1])))
  await settled(manager)
  assert.equal(answers.length, 2000)
  // Each replica counts its own; together they count every call once.
  const counts: number[] = []
  const leases = [await manager.acquire(), await manager.acquire()]
  for (const lease of leases) counts.push(lease.exports.count?.() as number)
  for (const lease of leases) lease.release()
  assert.equal((counts[0] ?? 0) + (counts[1] ?? 0), 2000)
  assert.ok(before.recycles.length >= 8, `${before.recycles.length}`)
  // With both due it does not wait long for one that a slow machine has not come to.
  for (const error of before.failed) hasCode('ERR_WASM_DRAIN_TIMEOUT')(error)
})

test('a lease keeps its instance, which is judged when it ends', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { ...carry, recycle: exact({ memory: 10 * PAGE }) })
  const told = listen(manager)
  await manager.use(async (instance) => {
    for (let call = 0; call < 20; call += 1) await instance.call('leak', [1])
    for (let call = 0; call < 20; call += 1) instance.exports.leak?.(1)
    await turns(5)
    assert.equal(instance.exports.count?.(), 40)
    assert.equal(told.recycles.length, 0)
  })
  await until(() => told.recycles.length === 1)
  assert.equal(await manager.call('count'), 40)
  assert.equal(told.recycles[0]?.calls, 41)
})

// ---------------------------------------------------------------- the synchronous path

test('a loop of synchronous calls that never comes to the event loop stays within its memory', LIMIT, (t) => {
  const manager = managedSync(t, leaky, { ...carry, recycle: exact({ memory: 20 * PAGE }) })
  const leak = manager.exports.leak as (pages: number) => number
  for (let call = 1; call <= 500; call += 1) {
    assert.equal(leak(1), call)
    assert.ok(manager.memory.byteLength < 20 * PAGE)
  }
  assert.deepEqual(manager.stats().reloads, { memory: 26 })
})

test('not inside a call: a guest that calls back is judged when the outermost call has ended', LIMIT, async (t) => {
  const nested = wat(
    `(module (import "env" "back" (func $back))
      (memory (export "memory") 1 1000)
      (func (export "leak") (drop (memory.grow (i32.const 1))))
      (func (export "outer") (result i32) (call $back) (memory.size)))`,
    'nested',
  )
  let generations: number[] = []
  const manager = managedSync(t, nested, {
    imports: (instance) => ({
      env: {
        back: () => {
          for (let i = 0; i < 50; i += 1) instance.exports.leak?.()
          generations.push(manager.generation)
        },
      },
    }),
    recycle: exact({ memory: 10 * PAGE }),
  })
  assert.equal(manager.exports.outer?.(), 51)
  assert.deepEqual(generations, [1])
  assert.equal(manager.generation, 2)
  generations = []
})

test('asynchronous hooks have it done from the event loop', LIMIT, async (t) => {
  const manager = await managed(t, leaky, {
    saveState: async (instance) => {
      await turns(1)
      return instance.exports.count?.()
    },
    restoreState: async (instance, count) => {
      await turns(1)
      instance.exports.setCount?.(count)
    },
    recycle: exact({ memory: 10 * PAGE }),
  })
  const told = listen(manager)
  for (let call = 0; call < 15; call += 1) manager.exports.leak?.(1)
  assert.equal(manager.generation, 1)
  await until(() => told.recycles.length === 1)
  assert.equal(await manager.call('count'), 15)
  assert.equal(told.failed.length, 0, 'that was no failure')
})

// ---------------------------------------------------------------- ways

test('rolling: new calls run on the fresh instance while a lease keeps the old one', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { recycle: exact({ calls: 3, strategy: 'rolling' }) })
  const told = listen(manager)
  const door = barrier()
  const reloaded = once(manager, 'reload')
  await manager.call('next')
  await manager.call('next')
  // Judged at the third call; by then somebody may be inside already.
  const [, leased] = await Promise.all([
    manager.call('next'),
    manager.use(async (instance) => {
      instance.exports.setCount?.(100)
      await reloaded
      assert.equal(await manager.call('next'), 1, 'of a fresh instance, though the only replica is held')
      await door.promise
      return instance.exports.next?.()
    }),
    reloaded
      .then(() => turns(3))
      .then(() => assert.equal(told.recycles.length, 0))
      .then(door.open),
  ])
  assert.equal(leased, 101)
  await until(() => told.recycles.length >= 1)
  assert.equal(told.recycles[0]?.strategy, 'rolling')
  assert.equal(told.recycles[0]?.drained, 1)
})

test('rolling with saveState is refused, because state cannot be handed over', LIMIT, async () => {
  await failure(
    WasmModuleManager.create(leaky, { ...carry, recycle: { strategy: 'rolling' } }),
    'ERR_WASM_INVALID_ARGUMENT',
    /rolling.*saveState/s,
  )
})

test('reset: the generation stays, and so do handles; memory shrinks', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { recycle: exact({ memory: 20 * PAGE, strategy: 'reset' }) })
  const told = listen(manager)
  manager.exports.setCount?.(1000)
  await manager.snapshot()
  for (let call = 0; call < 60; call += 1) await manager.call('leak', [1])
  await settled(manager)
  assert.ok(told.recycles.length >= 2)
  assert.equal(manager.generation, 1)
  for (const report of told.recycles) {
    assert.equal(report.strategy, 'reset')
    assert.equal(report.generation, report.previousGeneration)
    assert.equal(report.memoryBytesAfter, PAGE)
  }
  const stats = manager.stats()
  assert.deepEqual(stats.reloads, { memory: told.recycles.length })
  assert.equal(stats.resets, told.recycles.length)
  assert.ok(((await manager.call('count')) as number) >= 1000)
})

test('reset on the synchronous path', LIMIT, async (t) => {
  const manager = managedSync(t, leaky, { recycle: exact({ memory: 20 * PAGE, strategy: 'reset' }) })
  manager.snapshotSync()
  const { buffer } = manager.memory
  for (let call = 0; call < 100; call += 1) {
    manager.exports.leak?.(1)
    assert.ok(manager.memory.byteLength < 20 * PAGE)
  }
  assert.equal(buffer.byteLength, 0)
  assert.equal(manager.generation, 1)
  assert.deepEqual(manager.stats().reloads, { memory: 5 })
})

test('reset without a snapshot, or with state to keep, is done as an exclusive one', LIMIT, async (t) => {
  for (const [options, hasSnapshot] of [
    [{}, false],
    [carry, true],
  ] as [ManagerOptions, boolean][]) {
    const manager = await managed(t, leaky, { ...options, recycle: exact({ memory: 10 * PAGE, strategy: 'reset' }) })
    const told = listen(manager)
    if (hasSnapshot) await manager.snapshot()
    for (let call = 0; call < 20; call += 1) await manager.call('leak', [1])
    await settled(manager)
    assert.equal(told.recycles[0]?.strategy, 'exclusive')
    if (hasSnapshot) assert.equal(await manager.call('count'), 20)
  }
})

test('with isolation per call nothing is left to recycle but age and count', LIMIT, async (t) => {
  const manager = await managed(t, leaky, {
    isolation: 'per-call',
    recycle: exact({ memory: 10 * PAGE, calls: 25 }),
  })
  const told = listen(manager)
  for (let call = 0; call < 60; call += 1) assert.equal(await manager.call('leak', [20]), 1)
  await settled(manager)
  assert.deepEqual([...new Set(told.recycles.map((report) => report.reason))], ['calls'])
})

// ---------------------------------------------------------------- failures

test(
  'a recycle that fails keeps the old instance serving, backs off, and goes through in the end',
  LIMIT,
  async (t) => {
    let failures = 0
    const at: number[] = []
    const manager = await managed(t, leaky, {
      saveState: (instance) => instance.exports.count?.(),
      restoreState: (instance, count) => {
        if (failures < 4) {
          failures += 1
          at.push(performance.now())
          throw new RangeError('not yet')
        }
        instance.exports.setCount?.(count)
      },
      recycle: exact({ memory: 10 * PAGE, backoff: { initialMs: 20, maxMs: 80 } }),
    })
    const told = listen(manager)
    for (let call = 0; call < 20; call += 1) await manager.call('leak', [1])
    // Nobody calls it any more: it is tried again all the same.
    await until(() => told.recycles.length === 1)
    assert.equal(told.failed.length, 4)
    for (const error of told.failed) {
      hasCode('ERR_WASM_RELOAD_FAILED')(error)
      assert.equal(error.phase, 'restore')
      assert.ok(error.cause instanceof RangeError)
    }
    const waits = at.slice(1).map((time, index) => time - (at[index] as number))
    for (const [index, least] of [20, 40, 80].entries()) {
      // The wait begins after the throw, and the next try when it is over; clocks differ by a rounding.
      assert.ok((waits[index] as number) >= least - 1, `${waits}`)
    }
    assert.equal(await manager.call('count'), 20)
    assert.equal(manager.stats().reloadsFailed, 4)
  },
)

test('hooks that trap, throw or reject lose nothing', LIMIT, async (t) => {
  const bad: [string, ManagerOptions][] = [
    ['initialize', { initialize: failing('initialize') }],
    ['save', { saveState: failing('save') }],
    ['saveTraps', { saveState: (instance: LeasedInstance) => instance.exports.boom?.() }],
    ['restore', { saveState: () => 1, restoreState: failing('restore') }],
    [
      'restoreTraps',
      { saveState: () => 1, restoreState: (instance: LeasedInstance) => void instance.exports.boom?.() },
    ],
  ]
  function failing(what: string) {
    let calls = 0
    return async () => {
      calls += 1
      // The first generation has to come about.
      if (what !== 'initialize' || calls > 1) throw new Error(what)
    }
  }
  for (const [name, options] of bad) {
    const manager = await managed(t, leaky, {
      ...options,
      recycle: exact({ calls: 5, backoff: { initialMs: 1, maxMs: 5 } }),
    })
    const told = listen(manager)
    let last = 0
    for (let call = 0; call < 40 || told.failed.length < 2; call += 1) {
      const answer = (await manager.call('next')) as number
      assert.ok(answer > last || name.startsWith('save'), `${name}: ${answer} after ${last}`)
      last = answer
      await turns(1)
    }
    assert.equal(manager.state, 'ready')
    await manager.destroy()
  }
})

test('a fresh instance that has too much itself is not recycled over and over', LIMIT, async (t) => {
  const manager = await managed(t, leaky, {
    initialize: (instance) => void instance.exports.leak?.(30),
    recycle: exact({ memory: 20 * PAGE, backoff: { initialMs: 200, maxMs: 1000 } }),
  })
  const told = listen(manager)
  for (let call = 0; call < 300; call += 1) await manager.call('next')
  await settled(manager)
  assert.ok(told.recycles.length <= 3, `${told.recycles.length} in 300 calls`)
})

test("'keep' has a trapped instance serve on", LIMIT, async (t) => {
  for (const call of [
    (manager: WasmModuleManager, name: string) => manager.call(name),
    async (manager: WasmModuleManager, name: string) => manager.exports[name]?.(),
  ]) {
    const manager = await managed(t, leaky, { recycle: { onTrap: 'keep' } })
    await call(manager, 'next')
    await failure(call(manager, 'boom'), 'ERR_WASM_TRAP')
    assert.equal(await call(manager, 'next'), 2)
    assert.equal(manager.generation, 1)
  }
})

test('whatever is called traps: a crash loop ends, and a reload begins again', LIMIT, async (t) => {
  for (const call of [
    (manager: WasmModuleManager, name: string) => manager.call(name),
    async (manager: WasmModuleManager, name: string) => manager.exports[name]?.(),
  ]) {
    const manager = await managed(t, leaky, { recycle: {} })
    await call(manager, 'next')
    let traps = 0
    for (;;) {
      const end = await outcome(call(manager, 'boom'))
      assert.ok('error' in end && end.error instanceof WasmError)
      if (end.error.code === 'ERR_WASM_RELOAD_FAILED') {
        assert.match(end.error.message, /100 instances in a row trapped/)
        hasCode('ERR_WASM_TRAP')(end.error.cause)
        break
      }
      hasCode('ERR_WASM_TRAP')(end.error)
      traps += 1
      assert.ok(traps < 110)
    }
    assert.equal(manager.state, 'failed')
    await failure(manager.call('next'), 'ERR_WASM_RELOAD_FAILED')
    await failure(manager.acquire(), 'ERR_WASM_RELOAD_FAILED')
    await manager.reload()
    assert.equal(manager.state, 'ready')
    assert.equal(await call(manager, 'next'), 1)
  }
})

test('a call that completes now and then is no crash loop', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { recycle: {} })
  for (let call = 0; call < 300; call += 1) {
    await failure(manager.call('boom'), 'ERR_WASM_TRAP')
    if (call % 50 === 0) await manager.call('next')
  }
  assert.equal(manager.state, 'ready')
})

test('replacements that cannot be made are tried five times, with pauses, and then no more', LIMIT, async (t) => {
  let attempts = 0
  const manager = await managed(t, leaky, {
    initialize: () => {
      attempts += 1
      if (attempts > 1) throw new Error('no more')
    },
    recycle: { backoff: { initialMs: 5, maxMs: 20 } },
  })
  await failure(manager.call('boom'), 'ERR_WASM_TRAP')
  for (;;) {
    const end = await outcome(manager.call('next'))
    assert.ok('error' in end && end.error instanceof WasmError)
    hasCode('ERR_WASM_RELOAD_FAILED')(end.error)
    if (/times in a row/.test(end.error.message)) break
  }
  assert.equal(attempts, 6)
  for (let call = 0; call < 100; call += 1) await failure(manager.call('next'), 'ERR_WASM_RELOAD_FAILED')
  assert.equal(attempts, 6, 'no CPU is burnt')
  assert.equal(manager.state, 'failed')
})

// ---------------------------------------------------------------- together with others

test('a reload that comes meanwhile goes first, and the decision has its outcome', LIMIT, async (t) => {
  const traces: RecycleTrace[] = []
  const ends: RecycleTrace[] = []
  const subscribers = {
    start: (context: RecycleTrace) => void traces.push(context),
    end: () => {},
    asyncStart: () => {},
    asyncEnd: (context: RecycleTrace) => void ends.push(context),
    error: () => {},
  }
  const channel = tracingChannel<string, RecycleTrace>('wasm-molt:recycle')
  channel.subscribe(subscribers as never)
  t.after(() => channel.unsubscribe(subscribers as never))
  const manager = await managed(t, leaky, { name: 'first', recycle: exact({ calls: 3 }) })
  const lease = await manager.acquire()
  for (let call = 0; call < 5; call += 1) lease.exports.next?.()
  const reloading = manager.reload({ reason: 'mine' })
  lease.release()
  await reloading
  await settled(manager)
  const mine = (all: RecycleTrace[]) => all.filter((context) => context.manager === 'first')
  await until(() => mine(ends).length === mine(traces).length)
  for (const context of mine(ends)) assert.equal(context.error, undefined)
  // And again, with somebody inside when it is due.
  const held = await manager.acquire()
  const pressure = once(manager, 'pressure')
  for (let call = 0; call < 5; call += 1) held.exports.next?.()
  held.release()
  await pressure
  const next = await manager.acquire()
  const other = manager.reload({ reason: 'mine' })
  next.release()
  await other
  await settled(manager)
  await until(() => mine(ends).length === mine(traces).length)
})

test('the end comes first: close and destroy do not wait for a recycle that waits for somebody', LIMIT, async (t) => {
  for (const end of ['close', 'destroy'] as const) {
    const manager = await managed(t, leaky, { instances: 2, recycle: exact({ calls: 3 }) })
    const pressure = once(manager, 'pressure')
    const first = await manager.acquire()
    const second = await manager.acquire()
    for (let call = 0; call < 5; call += 1) first.exports.next?.()
    first.release()
    await pressure
    const again = await manager.acquire()
    const ending = manager[end]()
    again.release()
    second.release()
    await ending
    assert.equal(manager.state, 'closed')
    assert.equal(manager.stats().recyclesDue, 0)
  }
})

test('a fork is recycled as its parent is', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { recycle: exact({ calls: 5 }) })
  const child = await manager.fork()
  t.after(() => child.destroy())
  const own = await manager.fork({ recycle: exact({ calls: 2 }) })
  t.after(() => own.destroy())
  for (let call = 0; call < 5; call += 1) child.exports.next?.()
  assert.equal(child.generation, 2)
  for (let call = 0; call < 5; call += 1) own.exports.next?.()
  assert.equal(own.generation, 3)
})

test('another build is recycled, too', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { ...carry, recycle: exact({ memory: 10 * PAGE }) })
  await manager.reload({ source: leaky })
  const told = listen(manager)
  for (let call = 1; call <= 30; call += 1) assert.equal(await manager.call('leak', [1]), call)
  await settled(manager)
  assert.ok(told.recycles.length >= 1)
})

// ---------------------------------------------------------------- pressure alone

test('without a policy pressure is told once, and what follows is up to the application', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { limits: { memoryBytes: 100 * PAGE } })
  const told = listen(manager)
  for (let call = 0; call < 40; call += 1) await manager.call('leak', [2])
  await turns(2)
  assert.equal(told.pressure.length, 1)
  const [pressure] = told.pressure
  assert.ok(pressure?.reason === 'predicted' || pressure?.reason === 'memory')
  assert.equal(manager.generation, 1)
  await manager.reload({ reason: pressure?.reason as string })
  for (let call = 0; call < 40; call += 1) await manager.call('leak', [2])
  await turns(2)
  assert.equal(told.pressure.length, 2)
  assert.deepEqual(manager.stats().reloads, { [pressure?.reason as string]: 1 })
})

// ---------------------------------------------------------------- the budget

test('one budget for all: whoever gives back the most goes first, idle or not', LIMIT, async (t) => {
  t.after(() => setMemoryBudget(null))
  const large = await managed(t, leaky, { name: 'large', ...carry, recycle: { jitter: 0 } })
  const small = await managed(t, leaky, { name: 'small', ...carry, recycle: { jitter: 0 } })
  const none = await managed(t, leaky, { name: 'none' })
  const told = { large: listen(large), small: listen(small), none: listen(none) }
  await large.call('leak', [400])
  await small.call('leak', [40])
  await none.call('leak', [40])
  const others = 0
  setMemoryBudget(300 * PAGE + others)
  await until(() => told.large.recycles.length === 1)
  await settled(small)
  assert.equal(told.large.recycles[0]?.reason, 'budget')
  assert.equal(told.large.pressure[0]?.thresholdBytes, 300 * PAGE)
  assert.equal(told.small.recycles.length, 0, 'that was enough')
  assert.equal(told.none.recycles.length, 0)
  assert.equal(told.none.pressure[0]?.reason, 'budget')
  assert.equal(await large.call('count'), 1, 'with its state')
  // In the middle of load, a manager that is idle makes room as well.
  while (told.small.recycles.length === 0) {
    await none.call('leak', [4])
    await turns(1)
  }
  assert.equal(none.generation, 1)
})

test('a loop of synchronous calls keeps to the budget', LIMIT, async (t) => {
  t.after(() => setMemoryBudget(null))
  const manager = managedSync(t, leaky, { ...carry, recycle: {} })
  setMemoryBudget(100 * PAGE)
  for (let call = 1; call <= 300; call += 1) {
    assert.equal(manager.exports.leak?.(1), call)
    assert.ok(manager.stats().memoryBytes <= 101 * PAGE)
  }
  assert.ok((manager.stats().reloads.budget ?? 0) >= 2)
})

test('the budget reaches into worker threads', LIMIT, async (t) => {
  t.after(() => setMemoryBudget(null))
  const program = `
    const { parentPort, workerData } = require('node:worker_threads')
    const { WasmModuleManager } = require(workerData.index)
    WasmModuleManager.create(workerData.source, { cache: false, recycle: {} }).then(async (manager) => {
      manager.on('recycle', (report) => parentPort.postMessage(report.reason))
      await manager.call('leak', [300])
      parentPort.postMessage('ready')
      parentPort.on('message', async () => { await manager.close(); parentPort.close() })
    })`
  const worker = new Worker(program, { eval: true, workerData: { index: new URL(INDEX_URL).pathname, source: leaky } })
  t.after(() => worker.terminate())
  assert.deepEqual(await once(worker, 'message'), ['ready'])
  setMemoryBudget(100 * PAGE)
  assert.deepEqual(await once(worker, 'message'), ['budget'])
  worker.postMessage('end')
  await once(worker, 'exit')
})

test('budgets that are none', () => {
  for (const bad of [0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, '1', undefined, {}]) {
    assert.throws(() => setMemoryBudget(bad as number), hasCode('ERR_WASM_INVALID_ARGUMENT', /memory budget/))
  }
  setMemoryBudget(null)
})

// ---------------------------------------------------------------- what is told

test('the system says that memory came back', { ...LIMIT, skip: process.platform !== 'linux' }, async (t) => {
  const manager = await managed(t, leaky, { recycle: exact({ memory: 64 * MIB }) })
  const told = listen(manager)
  while (told.recycles.length < 3) await manager.call('leak', [64])
  for (const report of told.recycles) {
    assert.ok(report.expectedBytes >= 60 * MIB, `${report.expectedBytes}`)
    assert.ok((report.returnedBytes as number) >= report.expectedBytes / 2, JSON.stringify(report))
  }
})

test('where memory does not come back a warning of the process says so', LIMIT, async () => {
  const require = createRequire(import.meta.url)
  const { makeRecycling } = require('../lib/recycling.js') as {
    makeRecycling(name: () => string, emit: () => void): (kind: string, payload: unknown) => boolean
  }
  const warned = once(process, 'warning')
  const tell = makeRecycling(
    () => 'leaky',
    () => assert.fail('no event'),
  )
  assert.equal(tell('memory:kept', [100 * MIB, MIB]), true)
  assert.equal(tell('reload', {}), false)
  const [warning] = (await warned) as [Error & { code: string }]
  assert.equal(warning.code, 'WASM_MOLT_MEMORY_NOT_RETURNED')
  assert.match(warning.message, /leaky, 104857600 bytes .* 1048576 did/)
})

test('every decision that is traced has one outcome', LIMIT, async (t) => {
  const events: [string, RecycleTrace][] = []
  const hear = (event: string) => (context: RecycleTrace) => void events.push([event, { ...context }])
  const subscribers = Object.fromEntries(
    ['start', 'end', 'asyncStart', 'asyncEnd', 'error'].map((event) => [event, hear(event)]),
  )
  const channel = tracingChannel<string, RecycleTrace>('wasm-molt:recycle')
  channel.subscribe(subscribers as never)
  t.after(() => channel.unsubscribe(subscribers as never))
  let fails = true
  const manager = await managed(t, leaky, {
    name: 'traced',
    saveState: () => {
      if (fails) throw new Error('no')
    },
    recycle: exact({ calls: 3, backoff: { initialMs: 1, maxMs: 1 } }),
  })
  const told = listen(manager)
  while (told.failed.length < 2) await manager.call('next')
  fails = false
  while (told.recycles.length < 2) await manager.call('next')
  await settled(manager)
  const mine = events.filter(([, context]) => context.manager === 'traced')
  const count = (event: string) => mine.filter(([name]) => name === event).length
  assert.equal(count('start'), count('end'))
  assert.equal(count('start'), count('asyncEnd'))
  assert.equal(count('asyncStart'), count('asyncEnd'))
  assert.equal(count('error'), told.failed.length)
  const ends = mine.filter(([name]) => name === 'asyncEnd').map(([, context]) => context)
  assert.equal(ends.filter((context) => context.result !== undefined).length, told.recycles.length)
  for (const context of ends) {
    assert.equal(context.reason, 'calls')
    assert.equal(context.instance, 0)
    assert.equal(context.pressure.reason, 'calls')
  }
})

// ---------------------------------------------------------------- glue

async function glue(t: TestContext, recycle: RecyclePolicy, options: object = {}) {
  const folder = temporaryFolder('leaky-glue')
  const binding = createRequire(import.meta.url)('../binding.js') as { __assemble(text: string): Uint8Array }
  writeFileSync(join(folder, 'leaky.wasm'), binding.__assemble(readFileSync(leaky, 'utf8')))
  writeFileSync(
    join(folder, 'leaky.cjs'),
    `const bytes = require('node:fs').readFileSync(require('node:path').join(__dirname, 'leaky.wasm'))
    const { exports: wasm } = new WebAssembly.Instance(new WebAssembly.Module(bytes))
    module.exports = { leak: (pages) => wasm.leak(pages), count: () => wasm.count(), setCount: (n) => wasm.setCount(n) }`,
  )
  interface Leaky {
    leak(pages: number): number
    count(): number
    setCount(count: number): void
  }
  const manager = await loadGlue<Leaky>(join(folder, 'leaky.cjs'), { cache: false, recycle, ...options })
  t.after(() => manager.destroy())
  return manager
}

test('glue is recycled from the event loop, between scopes, with its state', LIMIT, async (t) => {
  const manager = await glue(t, exact({ memory: 20 * PAGE }), {
    saveState: (module: { count(): number }) => module.count(),
    restoreState: (module: { setCount(n: number): void }, count: number) => module.setCount(count),
  })
  const recycles: RecycleReport[] = []
  manager.on('recycle', (report) => recycles.push(report))
  await manager.use(async (module) => {
    for (let call = 1; call <= 30; call += 1) assert.equal(module.leak(1), call)
    await turns(5)
    assert.equal(module.leak(1), 31, 'the scope holds its generation')
  })
  await until(() => recycles.length === 1)
  assert.equal(recycles[0]?.reason, 'memory')
  assert.equal(manager.module.count(), 31)
  let calls = 31
  while (recycles.length < 4) {
    // With state to carry there is a moment in which calls outside of a scope are refused.
    await manager.use((module) => module.leak(1))
    calls += 1
    await turns(1)
  }
  await until(() => manager.stats().recyclesDue === 0)
  await turns(3)
  assert.equal(manager.module.count(), calls)
  assert.equal(manager.stats().reloads.memory, recycles.length)
})

test('glue is put back to its snapshot where that is the strategy', LIMIT, async (t) => {
  const manager = await glue(t, exact({ memory: 20 * PAGE, strategy: 'reset' }))
  const recycles: RecycleReport[] = []
  manager.on('recycle', (report) => recycles.push(report))
  const { leak } = manager.module
  await manager.snapshot()
  while (recycles.length < 3) {
    leak(1)
    await turns(1)
  }
  assert.equal(manager.generation, 1)
  assert.ok(
    recycles.every((report) => report.strategy === 'reset' && report.memoryBytesAfter < report.memoryBytesBefore),
  )
})

// ---------------------------------------------------------------- what a review has found

test("a synchronous call keeps away from an instance that a recycle's hook is still inside", LIMIT, async (t) => {
  const guest = wat(
    `(module
      (import "env" "hold" (func $hold (result i32)))
      (memory (export "memory") 1 100)
      (func (export "next") (result i32) (i32.const 1))
      (func (export "boom") (unreachable))
      (func (export "outer") (result i32) (i32.add (call $hold) (i32.load (i32.const 0)))))`,
    'held',
  )
  const door = barrier<number>()
  const inside = barrier()
  let leased: LeasedInstance | undefined
  const manager = await managed(t, guest, {
    imports: {
      env: {
        hold: () => {
          // Poisons the instance, which goes on.
          assert.throws(() => leased?.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
          inside.open()
          return door.promise
        },
      },
    },
    saveState: async (instance) => {
      leased = instance
      await outcome(instance.call('outer'))
      return 1
    },
    restoreState: () => {},
    recycle: exact({ calls: 2 }),
  })
  const told = listen(manager)
  await manager.call('next')
  await manager.call('next')
  await inside.promise
  assert.throws(() => manager.exports.next?.(), hasCode('ERR_WASM_RELOADING'))
  door.open(1)
  await until(() => told.recycles.length + told.failed.length >= 1)
  assert.equal(await manager.call('next'), 1)
})

test('whatever was decided and forgotten at the end, accepted calls are answered', LIMIT, async (t) => {
  for (const strategy of ['exclusive', 'rolling'] as const) {
    const gate = barrier()
    const isExclusive = strategy === 'exclusive'
    const manager = await managed(t, leaky, {
      ...(isExclusive ? { saveState: () => gate.promise, restoreState: () => {} } : { initialize: hold() }),
      recycle: exact({ memory: 10 * PAGE, predict: false, strategy }),
    })
    function hold() {
      let calls = 0
      return () => {
        calls += 1
        return calls > 1 ? gate.promise : undefined
      }
    }
    const lease = await manager.acquire()
    const reloading = isExclusive ? outcome(manager.reload()) : undefined
    lease.exports.leak?.(30)
    lease.release()
    await until(() => manager.stats().recyclesDue === 1)
    const calls = Array.from({ length: 4 }, () => outcome(manager.call('leak', [1])))
    await turns(3)
    const closing = manager.close()
    await turns(3)
    gate.fail(new Error('no'))
    await reloading
    for (const call of calls) assert.ok('value' in (await call))
    await closing
  }
})

test('views of an instance that a roll has left behind end before its pages go', LIMIT, async (t) => {
  const manager = await managed(t, leaky, {
    recycle: exact({ memory: 200 * PAGE, predict: false, strategy: 'rolling' }),
  })
  const told = listen(manager)
  while (told.recycles.length < 20) {
    await manager.call('leak', [150])
    const { buffer } = manager.memory
    const view = new Uint8Array(buffer)
    const calls = manager.call('leak', [100])
    for (;;) {
      // Of the fresh one already.
      if (view.byteLength < 121 * PAGE) break
      assert.equal(view[120 * PAGE], 7)
      if (told.recycles.length > 0 && manager.memory.buffer !== buffer) break
      await turns(1)
    }
    await calls
  }
})

test('synchronous calls that complete are calls that complete', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { recycle: {} })
  for (let round = 0; round < 130; round += 1) {
    await failure(manager.call('boom'), 'ERR_WASM_TRAP')
    for (;;) {
      const next = await outcome(thrownBy(() => manager.exports.next?.()))
      if ('value' in next) break
      hasCode('ERR_WASM_RELOADING')(next.error)
      await turns(1)
    }
  }
  assert.equal(manager.state, 'ready')
})

test('synchronous calls that fail are judged like others', LIMIT, (t) => {
  const guest = wat(
    `(module (import "env" "fail" (func $fail)) (memory (export "memory") 1 1000)
      (func (export "leak") (drop (memory.grow (i32.const 1))) (call $fail)))`,
    'failing',
  )
  const mine = new RangeError('mine')
  const manager = managedSync(t, guest, {
    imports: {
      env: {
        fail: () => {
          throw mine
        },
      },
    },
    recycle: exact({ memory: 10 * PAGE }),
  })
  for (let call = 0; call < 100; call += 1) {
    assert.throws(
      () => manager.exports.leak?.(),
      (error) => error === mine,
    )
    assert.ok(manager.memory.byteLength < 10 * PAGE)
  }
})

test('a synchronous loop is bounded while another replica is being recycled', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { instances: 2, recycle: exact({ memory: 20 * PAGE }) })
  await Promise.all(Array.from({ length: 8 }, () => manager.call('leak', [3])))
  const pressure = once(manager, 'pressure')
  await Promise.all(Array.from({ length: 40 }, () => manager.call('leak', [3])))
  await pressure
  for (let call = 0; call < 500; call += 1) {
    const end = await outcome(thrownBy(() => manager.exports.leak?.(1)))
    // Where a decision has waited for this very thread, it may have gone twice the way.
    if ('value' in end) assert.ok(manager.memory.byteLength < 45 * PAGE, `${manager.memory.byteLength / PAGE}`)
    else await turns(1)
  }
})

test('what a budget has already won is not taken twice', LIMIT, async (t) => {
  t.after(() => setMemoryBudget(null))
  const large = await managed(t, leaky, { name: 'large', recycle: { jitter: 0 } })
  const small = await managed(t, leaky, { name: 'small', recycle: { jitter: 0 } })
  await large.call('leak', [4000])
  setMemoryBudget(1000 * PAGE)
  const told = listen(small)
  while ((large.stats().reloads.budget ?? 0) === 0) await small.call('leak', [1])
  for (let call = 0; call < 20; call += 1) await small.call('next')
  await settled(small)
  assert.equal(told.recycles.length, 0)
})

test('glue that is due lets new scopes begin while one is open', LIMIT, async (t) => {
  const manager = await glue(t, exact({ memory: 10 * PAGE }))
  const recycled = once(manager, 'recycle')
  await manager.use(async (module) => {
    module.leak(30)
    await turns(5)
    // Also where a swap was about to begin, and has given up.
    await manager.use((inner) => assert.equal(inner.leak(1), 2))
  })
  await recycled
  assert.equal(manager.stats().reloadsFailed, 0)
})

test('glue is recycled under load, where some scope is always open', LIMIT, async (t) => {
  for (const strategy of ['exclusive', 'reset'] as const) {
    const manager = await glue(t, exact({ memory: 10 * PAGE, strategy }), { limits: { memoryBytes: 2000 * PAGE } })
    const recycles: RecycleReport[] = []
    manager.on('recycle', (report) => recycles.push(report))
    if (strategy === 'reset') await manager.snapshot()
    const scopes = async () => {
      while (recycles.length < 3) {
        await manager.use(async (module) => {
          module.leak(1)
          await turns(2)
        })
      }
    }
    await Promise.all([scopes(), scopes(), scopes()])
    assert.equal(manager.stats().reloadsFailed, 0)
    await manager.close()
  }
})

test('a decision that waits for the event loop does not reset what a full loop has just reset', LIMIT, async (t) => {
  const manager = await managed(t, leaky, { recycle: exact({ memory: 20 * PAGE, strategy: 'reset' }) })
  manager.snapshotSync()
  for (let round = 0; round < 20; round += 1) {
    await manager.call('leak', [25])
    const before = manager.stats().resets
    for (let call = 0; call < 40; call += 1) {
      const end = await outcome(thrownBy(() => manager.exports.leak?.(1)))
      if ('error' in end) break
    }
    const generation = manager.generation
    await settled(manager)
    assert.equal(manager.generation, generation)
    assert.ok(manager.stats().resets - before <= 4, `${manager.stats().resets - before} resets`)
  }
})

test('threads of rolled generations go with the leases that were on them, not with their handles', LIMIT, async (t) => {
  const threads = () => readdirSync('/proc/self/task').length
  if (process.platform !== 'linux') return
  const manager = await managed(t, leaky, { threads: 4, recycle: exact({ calls: 2, strategy: 'rolling' }) })
  const told = listen(manager)
  const before = threads()
  const handles: LeasedInstance[] = []
  while (told.recycles.length < 40) {
    const lease = await manager.acquire()
    handles.push(lease)
    await lease.call('next')
    lease.release()
    await manager.call('next')
  }
  await until(() => threads() <= before + 16)
  assert.ok(handles.length >= 40)
})

// ---------------------------------------------------------------- options

test('policies that are none', LIMIT, async () => {
  const bad: [unknown, RegExp][] = [
    [5, /options\.recycle must be an object/],
    [{ memroy: 5 }, /options\.recycle\.memroy is not an option/],
    [{ memory: 0 }, /options\.recycle\.memory/],
    [{ memory: -1 }, /options\.recycle\.memory/],
    [{ memory: '75' }, /options\.recycle\.memory.*'75'/],
    [{ memory: 'much' }, /options\.recycle\.memory/],
    [{ memory: '0%' }, /above '0%'/],
    [{ memory: '101%' }, /up to '100%'/],
    [{ calls: 0 }, /options\.recycle\.calls/],
    [{ calls: 1.5 }, /options\.recycle\.calls/],
    [{ ageMs: 0 }, /options\.recycle\.ageMs/],
    [{ onTrap: 'ignore' }, /'reload' or 'keep'/],
    [{ predict: 1 }, /options\.recycle\.predict/],
    [{ jitter: 1.1 }, /between 0 and 1/],
    [{ jitter: Number.NaN }, /between 0 and 1/],
    [{ jitter: 'some' }, /options\.recycle\.jitter/],
    [{ strategy: 'fork' }, /'exclusive', 'rolling' or 'reset'/],
    [{ backoff: { initialMs: 0 } }, /initialMs/],
    [{ backoff: { initialMs: 10, maxMs: 5 } }, /maxMs is 5/],
    [{ backoff: { max: 5 } }, /options\.recycle\.backoff\.max is not/],
  ]
  for (const [recycle, text] of bad) {
    await failure(
      WasmModuleManager.create(leaky, { recycle: recycle as RecyclePolicy }),
      'ERR_WASM_INVALID_ARGUMENT',
      text,
    )
  }
})
