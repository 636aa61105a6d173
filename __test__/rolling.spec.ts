// Rolling reloads: new calls go to the new generation at once, while the old one drains behind.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { InstanceContext, LeasedInstance, ReloadReport } from '../index.js'
import { stamped } from './guests.ts'
import {
  barrier,
  bench,
  failure,
  hasCode,
  LIMIT,
  managed,
  outcome,
  thrownBy,
  turns,
  until,
  type WasmModuleManager,
} from './support.ts'

const PAGE = 65_536
const rolling = { strategy: 'rolling' } as const
const stale = hasCode('ERR_WASM_STALE_HANDLE')

/** Calls on `replicas` of them that hold their instances until they are released. */
async function holding(one: Awaited<ReturnType<typeof bench>>, keys: number[]) {
  for (const key of keys) one.close(key)
  const calls = keys.map((key) => one.manager.call('holdThenCount', [key]))
  await Promise.all(keys.map((key) => one.arrived(key)))
  return calls
}

test('a rolling reload resolves when the new generation serves, and the old one ends behind it', LIMIT, async (t) => {
  const one = await bench(t)
  const { manager, release } = one
  manager.exports.set?.(100)
  const [held] = await holding(one, [1])
  const report = await manager.reload({ ...rolling, reason: 'roll' })
  assert.deepEqual(
    [report.generation, report.previousGeneration, report.reason, report.strategy],
    [2, 1, 'roll', 'rolling'],
  )
  // Left behind, and nobody had to wait.
  assert.deepEqual([report.drained, report.queued, report.saveMs, report.restoreMs], [1, 0, 0, 0])
  assert.deepEqual([manager.generation, manager.state], [2, 'ready'])
  assert.deepEqual([await manager.call('count'), manager.exports.count?.()], [1, 2])
  release(1)
  assert.equal(await held, 101)
  assert.equal(await manager.call('peek'), 2)
})

test('what waits when the gate rolls begins at once, in the new generation, in order', LIMIT, async (t) => {
  const one = await bench(t)
  const { manager, release } = one
  manager.exports.set?.(50)
  const [held] = await holding(one, [1])
  const waiting = [
    manager.call('count'),
    manager.use((i) => [i.generation, i.exports.count?.()]),
    manager.call('count'),
  ]
  assert.equal(manager.stats().queued, 3)
  await manager.reload(rolling)
  assert.deepEqual(await Promise.all(waiting), [1, [2, 2], 3])
  release(1)
  assert.equal(await held, 51)
})

test('inFlight and memoryBytes count both generations, busy only the replicas that serve', LIMIT, async (t) => {
  const one = await bench(t, { instances: 3, threads: 3 })
  const { manager, release } = one
  const held = await holding(one, [1, 2])
  manager.exports.grow?.(4)
  const full = manager.stats().memoryBytes
  assert.equal(full, 7 * PAGE)
  const report = await manager.reload(rolling)
  assert.deepEqual([report.memoryBytesBefore, report.memoryBytesAfter], [7 * PAGE, 3 * PAGE])
  // The third old instance was free, and went at the roll, with the pages that it had grown to.
  let { inFlight, instances, memoryBytes, memoryBytesPeak } = manager.stats()
  assert.deepEqual([inFlight, instances.busy, instances.total, memoryBytes], [2, 0, 3, 5 * PAGE])
  assert.equal(memoryBytesPeak, 10 * PAGE)
  const lease = await manager.acquire()
  ;({ inFlight, instances, memoryBytes, memoryBytesPeak } = manager.stats())
  assert.deepEqual([inFlight, instances.busy], [3, 1])
  lease.release()
  // Each of the others goes as soon as its own call is over.
  release(1)
  assert.equal(await held[0], 1)
  await until(() => manager.stats().memoryBytes === 4 * PAGE)
  assert.equal(manager.stats().inFlight, 1)
  release(2)
  assert.equal(await held[1], 1)
  await until(() => manager.stats().memoryBytes === 3 * PAGE)
  assert.equal(manager.stats().inFlight, 0)
})

test('a lease on the old generation stays valid until it is released', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const lease = await manager.acquire()
  lease.exports.set?.(7)
  lease.memory.write(100, 'kept')
  const { buffer } = lease.memory
  await manager.reload(rolling)
  assert.deepEqual([lease.generation, manager.generation], [1, 2])
  assert.deepEqual([lease.exports.count?.(), await lease.call('count')], [8, 9])
  assert.equal(lease.memory.readString(100, 4), 'kept')
  assert.ok(lease.memory.buffer === buffer && buffer.byteLength === PAGE)
  assert.deepEqual([manager.exports.peek?.(), manager.memory.readString(100, 4)], [0, '\0\0\0\0'])
  assert.ok(manager.memory.buffer !== buffer)
  const { add } = lease.exports
  lease.release()
  assert.equal(buffer.byteLength, 0)
  assert.throws(() => add?.(1, 2), stale)
  await until(() => manager.stats().memoryBytes === PAGE)
})

test('views and functions of old instances that nobody holds end at the roll', LIMIT, async (t) => {
  const contexts: InstanceContext[] = []
  const { manager } = await bench(t, { onImports: (instance) => void contexts.push(instance) })
  const { buffer } = manager.memory
  const { add } = manager.exports
  await manager.reload(rolling)
  assert.equal(buffer.byteLength, 0)
  assert.equal(add?.(1, 2), 3)
  assert.throws(() => contexts[0]?.exports.add?.(1, 2), stale)
  assert.equal(contexts[1]?.exports.add?.(1, 2), 3)
})

test(
  'synchronous calls go on while the new generation is being made, and change over at the roll',
  LIMIT,
  async (t) => {
    const inside = barrier()
    const gate = barrier()
    const { manager } = await bench(t, {
      initialize: async (instance) => {
        if (instance.generation === 1) return
        inside.open()
        await gate.promise
      },
    })
    manager.exports.set?.(10)
    const reload = manager.reload(rolling)
    await inside.promise
    assert.equal(manager.state, 'reloading')
    assert.deepEqual([manager.exports.count?.(), manager.callSync('count'), await manager.call('count')], [11, 12, 13])
    assert.equal(await manager.use((instance) => instance.generation), 1)
    assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_RELOADING'))
    gate.open()
    await reload
    assert.equal(manager.exports.count?.(), 1)
  },
)

// ---------------------------------------------------------------- never more than two generations

test('a further rolling reload waits until the generation before the serving one is left', LIMIT, async (t) => {
  const made: number[] = []
  const one = await bench(t, { initialize: (instance) => void made.push(instance.generation) })
  const { manager, release } = one
  const [held] = await holding(one, [1])
  await manager.reload(rolling)
  const second = manager.reload({ ...rolling, reason: 'second' })
  // The one that serves is in use as well, and is not what is waited for.
  const [later] = await holding(one, [2])
  assert.equal(await manager.use((i) => i.generation, { signal: AbortSignal.timeout(1) }).catch(() => 'waits'), 'waits')
  assert.deepEqual(made, [1, 2])
  assert.equal(manager.generation, 2)
  release(1)
  assert.equal((await second).generation, 3)
  assert.deepEqual(made, [1, 2, 3])
  assert.equal(await held, 1)
  assert.equal(manager.stats().memoryBytes, 2 * PAGE)
  release(2)
  assert.equal(await later, 1)
})

test(
  'a further rolling reload that would wait too long gives up with inFlight; both generations run on',
  LIMIT,
  async (t) => {
    const one = await bench(t, { instances: 2, threads: 2 })
    const { manager, release } = one
    const held = await holding(one, [1, 2])
    await manager.reload(rolling)
    const [later] = await holding(one, [3])
    const error = await failure(manager.reload({ ...rolling, drainTimeoutMs: 20 }), 'ERR_WASM_DRAIN_TIMEOUT', /20 ms/)
    // Two of the generation before; the call of the serving one is not waited for.
    assert.equal(error.inFlight, 2)
    assert.deepEqual([manager.generation, manager.state, manager.stats().reloadsFailed], [2, 'ready', 1])
    for (const key of [1, 2, 3]) release(key)
    assert.deepEqual(await Promise.all([...held, later]), [1, 1, 1])
    assert.equal((await manager.reload(rolling)).generation, 3)
  },
)

test(
  "a further rolling reload with 'interrupt' stops the generation before, and not the one that serves",
  LIMIT,
  async (t) => {
    let kept: LeasedInstance | undefined
    let sum: unknown
    const one = await bench(t, {
      instances: 2,
      threads: 2,
      // After the generation before is gone, and before the roll.
      initialize: (instance) => {
        if (instance.generation === 3) sum = kept?.exports.add?.(1, 2)
      },
    })
    const { manager } = one
    const held = await holding(one, [1])
    const first = failure(held[0] as Promise<unknown>, 'ERR_WASM_INTERRUPTED')
    const lease = await manager.acquire()
    await manager.reload(rolling)
    const later = await holding(one, [3])
    const second = failure(later[0] as Promise<unknown>, 'ERR_WASM_INTERRUPTED')
    kept = await manager.acquire()
    const report = await manager.reload({ ...rolling, drainTimeoutMs: 10, onDrainTimeout: 'interrupt' })
    assert.deepEqual([report.generation, report.drained, sum], [3, 2, 3])
    await first
    assert.throws(() => lease.exports.add?.(1, 2), stale)
    // Left behind by this roll, whose patience ends as well.
    await second
    await until(() => manager.stats().inFlight === 0)
    assert.throws(() => kept?.exports.add?.(1, 2), stale)
    assert.equal(await manager.call('add', [1, 2]), 3)
  },
)

test('an exclusive reload after a rolling one waits for both generations', LIMIT, async (t) => {
  const one = await bench(t)
  const { manager, release } = one
  const [old] = await holding(one, [1])
  await manager.reload(rolling)
  const [present] = await holding(one, [2])
  const reload = manager.reload()
  await until(() => manager.state === 'draining')
  const waits = manager.call('count')
  release(2)
  assert.equal(await present, 1)
  await turns(10)
  assert.deepEqual([manager.state, manager.generation], ['draining', 2])
  release(1)
  assert.equal((await reload).drained, 2)
  assert.deepEqual([await old, await waits, manager.generation], [1, 1, 3])
})

test('reloadSync is busy while an earlier generation is in use', LIMIT, async (t) => {
  const one = await bench(t)
  const { manager, release } = one
  const [held] = await holding(one, [1])
  await manager.reload(rolling)
  assert.equal(manager.exports.add?.(1, 2), 3)
  assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_BUSY'))
  assert.throws(() => manager.reloadSync(rolling), hasCode('ERR_WASM_BUSY'))
  release(1)
  assert.equal(await held, 1)
  await until(() => manager.stats().memoryBytes === PAGE)
  assert.equal(manager.reloadSync(rolling).generation, 3)
})

// ---------------------------------------------------------------- who is left behind

test("onDrainTimeout 'interrupt' stops what is left after drainTimeoutMs, and takes leases away", LIMIT, async (t) => {
  const one = await bench(t, { instances: 3, threads: 3 })
  const { manager, entered } = one
  const [held] = await holding(one, [1])
  const inside = entered()
  const spin = manager.call('spin')
  const ends = Promise.all([
    failure(held as Promise<unknown>, 'ERR_WASM_INTERRUPTED'),
    failure(spin, 'ERR_WASM_INTERRUPTED'),
  ])
  await inside
  const lease = await manager.acquire()
  const { buffer } = lease.memory
  const report = await manager.reload({ ...rolling, drainTimeoutMs: 10, onDrainTimeout: 'interrupt' })
  assert.equal(report.drained, 3)
  const fresh = manager.call('count')
  await ends
  await until(() => buffer.byteLength === 0)
  assert.throws(() => lease.exports.add?.(1, 2), stale)
  await failure(lease.call('add', [1, 2]), 'ERR_WASM_STALE_HANDLE')
  assert.equal(await fresh, 1)
  await until(() => manager.stats().memoryBytes === 3 * PAGE)
  assert.deepEqual([manager.stats().inFlight, manager.generation], [0, 2])
  // What was stopped was left behind already: nothing has to be replaced.
  assert.deepEqual(manager.stats().reloads, { manual: 1 })
})

test("onDrainTimeout 'abort' lets what is left run on, however long it takes", LIMIT, async (t) => {
  const one = await bench(t, { instances: 2, threads: 2 })
  const { manager, release } = one
  manager.exports.set?.(5)
  const [held] = await holding(one, [1])
  const lease = await manager.acquire()
  await manager.reload({ ...rolling, drainTimeoutMs: 0, onDrainTimeout: 'abort' })
  await turns(20)
  assert.equal(manager.stats().inFlight, 2)
  assert.equal(lease.exports.add?.(1, 2), 3)
  release(1)
  assert.equal(typeof (await held), 'number')
  lease.release()
  await until(() => manager.stats().memoryBytes === 2 * PAGE)
})

test('a call that traps on the old generation costs the new one nothing', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const traps: unknown[] = []
  manager.on('trap', (error) => traps.push(error.code))
  const lease = await manager.acquire()
  await manager.reload(rolling)
  await failure(lease.call('boom'), 'ERR_WASM_TRAP')
  assert.throws(() => lease.exports.add?.(1, 2), stale)
  lease.release()
  await until(() => manager.stats().memoryBytes === PAGE)
  assert.deepEqual([manager.generation, manager.stats().instances.poisoned], [2, 0])
  assert.equal(manager.exports.add?.(1, 2), 3)
  await until(() => traps.length === 1)
  assert.deepEqual(manager.stats().reloads, { manual: 1 })
})

test('a trapped replica that was not replaced yet is replaced by the roll', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2 })
  assert.throws(() => manager.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
  const report = await manager.reload(rolling)
  assert.equal(manager.generation, report.generation)
  // Both at once: two calls may follow each other on one of them.
  const leases = await Promise.all([manager.acquire(), manager.acquire()])
  assert.deepEqual(
    leases.map((lease) => lease.exports.count?.()),
    [1, 1],
  )
  for (const lease of leases) lease.release()
  assert.deepEqual([manager.exports.add?.(1, 2), manager.stats().instances.poisoned], [3, 0])
})

test(
  'an import of the old generation still reaches its own instance, and its errors the old call',
  LIMIT,
  async (t) => {
    const arrived = barrier()
    const door = barrier<unknown>()
    const manager = await managed(t, stamped, {
      imports: (instance) => ({
        env: {
          pause: async (key: number) => {
            if (key === 0) return
            arrived.open()
            const thrown = await door.promise
            // After the roll: the guest that waits is the one of before.
            instance.exports.stamp?.(70 + instance.generation)
            if (thrown !== undefined) throw thrown
          },
        },
      }),
      initialize: (instance) => void instance.exports.stamp?.(instance.generation),
    })
    const old = manager.call('read', [1])
    await arrived.promise
    await manager.reload(rolling)
    door.open(undefined)
    assert.deepEqual(await old, [1, 71])
    assert.deepEqual(await manager.call('read', [0]), [2, 2])
    const thrown = new Error('from the old one')
    const other = await bench(t)
    other.close(1)
    const held = outcome(other.manager.call('hold', [1]))
    await other.arrived(1)
    await other.manager.reload(rolling)
    other.release(1, Promise.reject(thrown) as never)
    assert.deepEqual(await held, { error: thrown })
  },
)

// ---------------------------------------------------------------- not with state

test('rolling is refused where state is saved, unless it is left behind', LIMIT, async (t) => {
  const asked: string[] = []
  const { manager } = await bench(t, {
    saveState: () => void asked.push('save'),
    restoreState: () => void asked.push('restore'),
  })
  await failure(manager.reload(rolling), 'ERR_WASM_INVALID_ARGUMENT', /rolling.*saveState.*skipSave/s)
  await failure(
    thrownBy(() => manager.reloadSync(rolling)),
    'ERR_WASM_INVALID_ARGUMENT',
    /saveState/,
  )
  assert.deepEqual([manager.generation, manager.state, manager.stats().reloadsFailed], [1, 'ready', 0])
  assert.equal((await manager.reload({ ...rolling, skipSave: true })).generation, 2)
  assert.equal(manager.reloadSync({ ...rolling, skipSave: true }).generation, 3)
  assert.equal(asked.length, 0)
  const restoring = await bench(t, { restoreState: () => void asked.push('restore') })
  assert.equal((await restoring.manager.reload(rolling)).generation, 2)
  assert.equal(asked.length, 0)
})

test('reloadSync with rolling does it on this thread', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2 })
  manager.exports.set?.(5)
  const report = manager.reloadSync(rolling)
  assert.deepEqual([report.strategy, report.generation, report.drained], ['rolling', 2, 0])
  assert.equal(manager.exports.peek?.(), 0)
})

test('a rolling reload that fails leaves everything as it was, and no call waits for it', LIMIT, async (t) => {
  let isArmed = false
  const cause = new Error('not today')
  const one = await bench(t, {
    instances: 2,
    threads: 2,
    initialize: () => {
      if (isArmed) throw cause
    },
  })
  const { manager, release } = one
  manager.exports.set?.(5)
  const { buffer } = manager.memory
  const [held] = await holding(one, [1])
  isArmed = true
  const events: unknown[] = []
  manager.on('reload:failed', (error) => events.push(error))
  const error = await failure(manager.reload(rolling), 'ERR_WASM_RELOAD_FAILED')
  assert.deepEqual([error.phase, error.cause === cause], ['initialize', true])
  assert.deepEqual([manager.generation, manager.state, manager.exports.peek?.()], [1, 'ready', 5])
  assert.equal(buffer.byteLength, PAGE)
  release(1)
  assert.equal(await held, 1)
  await until(() => events.length === 1)
  isArmed = false
  assert.equal((await manager.reload(rolling)).generation, 2)
})

// ---------------------------------------------------------------- joining, the end, load

test('equal rolling reloads join; another strategy runs after it', LIMIT, async (t) => {
  const one = await bench(t)
  const { manager, release } = one
  const reports: ReloadReport[] = []
  manager.on('reload', (report) => reports.push(report))
  const [held] = await holding(one, [1])
  const asked = [manager.reload(rolling), manager.reload(rolling), manager.reload(), manager.reload(rolling)]
  const [first, joined] = await Promise.all(asked.slice(0, 2))
  assert.deepEqual([first?.generation, joined?.generation], [2, 2])
  release(1)
  await held
  const later = await Promise.all(asked.slice(2))
  assert.equal(later[0]?.strategy, 'exclusive')
  assert.equal(reports.length, manager.generation - 1)
})

test('close waits for what was left behind', LIMIT, async (t) => {
  const one = await bench(t)
  const { manager, release } = one
  const [held] = await holding(one, [1])
  await manager.reload(rolling)
  const error = await failure(manager.close({ drainTimeoutMs: 10 }), 'ERR_WASM_DRAIN_TIMEOUT')
  assert.equal(error.inFlight, 1)
  const closing = manager.close()
  release(1)
  assert.equal(await held, 1)
  await closing
  assert.deepEqual([manager.state, manager.stats().memoryBytes], ['closed', 0])
})

test('destroy stops what was left behind, and ends leases on it', LIMIT, async (t) => {
  const one = await bench(t, { instances: 2, threads: 2 })
  const { manager } = one
  const [held] = await holding(one, [1])
  const lease = await manager.acquire()
  await manager.reload(rolling)
  await Promise.all([manager.destroy(), failure(held as Promise<unknown>, 'ERR_WASM_INTERRUPTED')])
  assert.throws(() => lease.exports.add?.(1, 2), stale)
  assert.deepEqual([manager.state, manager.stats().memoryBytes], ['closed', 0])
})

/** Calls all the while; each reads the stamp of its instance twice, before and after an asynchronous import. */
async function loaded(manager: WasmModuleManager, reload: () => Promise<void>): Promise<[number, number][]> {
  let isDone = false
  const answers: [number, number][] = []
  const caller = async () => {
    let latest = 0
    while (!isDone) {
      const [first, second] = (await manager.call('read', [1])) as [number, number]
      answers.push([first, second])
      // What is asked for later never runs in an earlier generation.
      assert.ok(first >= latest, `generation ${first} after ${latest}`)
      latest = first
    }
  }
  const callers = [1, 2, 3, 4, 5].map(caller)
  await reload()
  isDone = true
  await Promise.all(callers)
  return answers
}

test('under load no call sees a mixture of two generations, is lost, or runs in an earlier one', LIMIT, async (t) => {
  for (const strategy of ['rolling', 'exclusive'] as const) {
    const manager = await managed(t, stamped, {
      instances: 3,
      threads: 3,
      imports: { env: { pause: () => turns(1) } },
      initialize: (instance) => void instance.exports.stamp?.(instance.generation),
    })
    const rounds = 40
    const answers = await loaded(manager, async () => {
      for (let i = 0; i < rounds; i += 1) {
        const before = manager.generation
        const report = await manager.reload({ strategy, drainTimeoutMs: 20_000 })
        assert.deepEqual([report.previousGeneration, report.generation], [before, before + 1])
        assert.equal(await manager.use((instance) => instance.generation), before + 1)
      }
    })
    for (const [first, second] of answers) assert.equal(first, second, strategy)
    assert.ok(new Set(answers.map(([first]) => first)).size > rounds / 2, 'the load met most generations')
    const { calls } = manager.stats()
    assert.deepEqual([calls.failed, calls.trapped, calls.interrupted, calls.rejected], [0, 0, 0, 0])
    await until(() => manager.stats().memoryBytes === 3 * PAGE)
  }
})
