// Leases: an operation of many calls that no swap can cut in two.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { LeasedInstance } from '../index.js'
import { buffers, workbench } from './guests.ts'
import {
  type AnyFunction,
  barrier,
  bench,
  child,
  hasCode,
  LIMIT,
  managed,
  outcome,
  reported,
  turns,
  until,
  type WasmError,
} from './support.ts'

const stale = hasCode('ERR_WASM_STALE_HANDLE')

test('use runs the function with one instance, and answers with what it returned', LIMIT, async (t) => {
  const { manager } = await bench(t)
  assert.equal(await manager.use((instance) => instance.exports.add?.(1, 2)), 3)
  assert.equal(await manager.use(async (instance) => await instance.call('add', [3, 4])), 7)
  assert.equal(await manager.use(() => undefined), undefined)
})

test(
  'what the function throws or rejects with comes out as it is, and the instance is free again',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    for (const thrown of [new Error('mine'), 'text', undefined, null]) {
      for (const fn of [
        () => {
          throw thrown
        },
        async () => {
          await turns(1)
          throw thrown
        },
      ]) {
        const end = await outcome(manager.use(fn))
        assert.ok('error' in end)
        assert.ok(Object.is(end.error, thrown))
      }
    }
    assert.equal(manager.stats().inFlight, 0)
    assert.equal(manager.exports.add?.(1, 2), 3)
    assert.equal(manager.reloadSync().generation, 2)
  },
)

test('a real operation: allocate, write, call, read, free, on either path', LIMIT, async (t) => {
  const manager = await managed(t, buffers)
  const input = new TextEncoder().encode('a buffer through a guest')
  const output = await manager.use(async ({ exports, memory, call: _ }) => {
    const f = exports as Record<string, AnyFunction>
    const ptr = f.allocate?.(input.length) as number
    memory.write(ptr, input)
    const cell = f.allocate?.(4) as number
    const out = f.reverse?.(ptr, input.length, cell) as number
    const length = new DataView(memory.buffer).getUint32(cell, true)
    const text = memory.readString(out, length)
    for (const [p, n] of [
      [ptr, input.length],
      [cell, 4],
      [out, length],
    ] as const)
      f.deallocate?.(p, n)
    return text
  })
  assert.equal(output, [...'a buffer through a guest'].reverse().join(''))
  const later = await manager.use(async (instance) => {
    const ptr = (await instance.call('allocate', [input.length])) as number
    instance.memory.write(ptr, input)
    const cell = (await instance.call('allocate', [4])) as number
    const out = (await instance.call('reverse', [ptr, input.length, cell])) as number
    return instance.memory.readString(out, input.length)
  })
  assert.equal(later, output)
})

test('a reload waits for the lease: pointers stay valid inside, however many calls it makes', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const order: string[] = []
  let reload: Promise<unknown> | undefined
  await manager.use(async (instance) => {
    instance.memory.write(500, 'still here')
    reload = manager.reload().then(() => order.push('reloaded'))
    await until(() => manager.state === 'draining')
    for (let i = 0; i < 5; i += 1) {
      await instance.call('add', [i, i])
      assert.equal(instance.memory.readString(500, 10), 'still here')
      assert.equal(instance.generation, 1)
    }
    order.push('leased')
  })
  await reload
  assert.deepEqual(order, ['leased', 'reloaded'])
  assert.equal(manager.generation, 2)
})

test(
  'the handle expires when the function settles: everything it gave out throws ERR_WASM_STALE_HANDLE',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    let kept: LeasedInstance | undefined
    let add: AnyFunction | undefined
    await manager.use((instance) => {
      kept = instance
      add = instance.exports.add as AnyFunction
      instance.exports.set?.(5)
    })
    assert.ok(kept && add)
    const instance = kept
    assert.throws(() => add?.(1, 2), stale)
    assert.throws(() => instance.exports.add?.(1, 2), stale)
    assert.throws(() => instance.memory.buffer, stale)
    await assert.rejects(instance.call('add', [1, 2]), stale)
    assert.throws(() => instance.exports.hold?.(1), stale)
    // The same instance serves on for others, and the old handle does not come back to life with the next lease.
    const next = await manager.acquire()
    assert.equal(next.exports.peek?.(), 5)
    assert.throws(() => add?.(1, 2), stale)
    next.release()
    await manager.reload()
    assert.throws(() => add?.(1, 2), stale)
  },
)

test('a handle that was never looked into before it expired says the same', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const instance = await manager.acquire()
  instance.release()
  assert.throws(() => instance.exports.add?.(1, 2), stale)
  assert.throws(() => instance.memory.buffer, stale)
})

test(
  'acquire gives the instance for it alone; release is idempotent and Symbol.dispose is release',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    const instance = await manager.acquire()
    assert.equal(manager.stats().inFlight, 1)
    assert.equal(instance.generation, 1)
    const waiting = manager.call('add', [1, 2])
    await turns()
    assert.equal(manager.stats().queued, 1)
    instance.release()
    instance.release()
    assert.equal(await waiting, 3)
    const second = await manager.acquire()
    second[Symbol.dispose]()
    second[Symbol.dispose]()
    assert.throws(() => second.exports.add?.(1, 2), stale)
    assert.deepEqual([manager.stats().inFlight, manager.stats().queued], [0, 0])
  },
)

test('while a lease holds the only instance, manager.exports and callSync say ERR_WASM_BUSY', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const instance = await manager.acquire()
  assert.throws(() => manager.exports.add?.(1, 2), hasCode('ERR_WASM_BUSY'))
  assert.throws(() => manager.callSync('add', [1, 2]), hasCode('ERR_WASM_BUSY'))
  assert.equal(instance.exports.add?.(1, 2), 3)
  instance.release()
  assert.equal(manager.exports.add?.(1, 2), 3)
})

test('leases of several replicas are different instances, each with its own state', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 3, threads: 3 })
  const leases = await Promise.all([manager.acquire(), manager.acquire(), manager.acquire()])
  for (const [index, lease] of leases.entries()) lease.exports.set?.(index + 10)
  assert.deepEqual(
    leases.map((lease) => lease.exports.peek?.()),
    [10, 11, 12],
  )
  assert.deepEqual(await Promise.all(leases.map((lease) => lease.call('count'))), [11, 12, 13])
  let isServed = false
  const fourth = manager.acquire().then((lease) => {
    isServed = true
    return lease
  })
  await turns()
  assert.equal(isServed, false)
  leases[1]?.release()
  const got = await fourth
  assert.equal(got.exports.peek?.(), 12)
  got.release()
  leases[0]?.release()
  leases[2]?.release()
})

test('calls handed to a lease run one after the other, in order', LIMIT, async (t) => {
  const { manager, arrivals } = await bench(t)
  const instance = await manager.acquire()
  const calls = Array.from({ length: 50 }, (_, i) => instance.call('hold', [i]))
  assert.deepEqual(
    await Promise.all(calls),
    Array.from({ length: 50 }, (_, i) => i),
  )
  assert.deepEqual(
    arrivals,
    Array.from({ length: 50 }, (_, i) => i),
  )
  instance.release()
})

test('a synchronous call in a lease while its own pool call runs throws ERR_WASM_BUSY', LIMIT, async (t) => {
  const { manager, entered } = await bench(t)
  const instance = await manager.acquire()
  const inside = entered()
  const stop = new AbortController()
  const spin = outcome(instance.call('spin', [], { signal: stop.signal }))
  await inside
  assert.throws(() => instance.exports.add?.(1, 2), hasCode('ERR_WASM_BUSY'))
  stop.abort('enough')
  assert.deepEqual(await spin, { error: 'enough' })
  instance.release()
  assert.equal(await manager.call('add', [1, 2]), 3)
})

test(
  'a call that was handed over before the release still runs, and the instance goes back after it',
  LIMIT,
  async (t) => {
    const { manager, close, arrived, release } = await bench(t)
    const instance = await manager.acquire()
    close(1)
    const held = instance.call('hold', [1])
    const counted = instance.call('count')
    await arrived(1)
    instance.release()
    await assert.rejects(instance.call('count'), stale)
    const next = manager.call('count')
    await turns()
    assert.equal(manager.stats().inFlight, 1)
    release(1)
    assert.deepEqual(await Promise.all([held, counted, next]), [1, 1, 2])
  },
)

test(
  'a lease whose instance has trapped is stale at once, and the next one gets a fresh instance',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    const instance = await manager.acquire()
    instance.exports.set?.(5)
    assert.throws(() => instance.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
    assert.throws(() => instance.exports.peek?.(), stale)
    await assert.rejects(instance.call('peek'), stale)
    instance.release()
    assert.equal(await manager.use((fresh) => fresh.exports.peek?.()), 0)
    assert.equal(manager.generation, 2)
    const second = await manager.acquire()
    await assert.rejects(second.call('boom'), hasCode('ERR_WASM_TRAP'))
    await assert.rejects(second.call('peek'), stale)
    assert.throws(() => second.exports.peek?.(), stale)
    second.release()
    assert.equal(await manager.call('peek'), 0)
  },
)

test('destroy ends leases: their handles are stale, their calls interrupted', LIMIT, async (t) => {
  const { manager, entered } = await bench(t)
  const instance = await manager.acquire()
  const inside = entered()
  const spin = outcome(instance.call('spin'))
  const queued = outcome(instance.call('add', [1, 2]))
  await inside
  await manager.destroy()
  const [first, second] = await Promise.all([spin, queued])
  assert.ok('error' in first && 'error' in second)
  hasCode('ERR_WASM_INTERRUPTED')(first.error)
  assert.ok(
    ['ERR_WASM_CLOSED', 'ERR_WASM_STALE_HANDLE', 'ERR_WASM_INTERRUPTED'].includes((second.error as WasmError).code),
  )
  assert.throws(
    () => instance.exports.add?.(1, 2),
    (error: unknown) => {
      assert.ok(['ERR_WASM_CLOSED', 'ERR_WASM_STALE_HANDLE'].includes((error as WasmError).code))
      return true
    },
  )
  instance.release()
})

test(
  'destroy while use holds an instance: use ends with what its function does, and destroy does not wait for it',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    const gate = barrier()
    const held = barrier()
    const using = outcome(
      manager.use(async (instance) => {
        held.open()
        await gate.promise
        return instance.exports.add?.(1, 2)
      }),
    )
    await held.promise
    await manager.destroy()
    assert.equal(manager.state, 'closed')
    gate.open()
    const end = await using
    assert.ok('error' in end)
    assert.ok(['ERR_WASM_CLOSED', 'ERR_WASM_STALE_HANDLE'].includes((end.error as WasmError).code))
  },
)

test('leases and calls wait in one queue, in the order of their coming', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const first = await manager.acquire()
  // Each takes the next number from the guest: that is the order in which they had it.
  const waiting = [
    manager.call('count'),
    manager.use((lease) => lease.exports.count?.()),
    manager.call('count'),
    manager.acquire().then((lease) => {
      const number = lease.exports.count?.()
      lease.release()
      return number
    }),
    manager.use((lease) => lease.call('count')),
    manager.call('count'),
  ]
  await turns()
  assert.equal(manager.stats().queued, 6)
  assert.equal(first.exports.peek?.(), 0)
  first.release()
  assert.deepEqual(await Promise.all(waiting), [1, 2, 3, 4, 5, 6])
})

test('leases count against maxQueue, and one too many rejects with ERR_WASM_QUEUE_FULL', LIMIT, async (t) => {
  const { manager } = await bench(t, { maxQueue: 2 })
  const first = await manager.acquire()
  const waiting = [manager.acquire(), manager.call('add', [1, 2])]
  await assert.rejects(manager.acquire(), hasCode('ERR_WASM_QUEUE_FULL', /maxQueue.*2/))
  await assert.rejects(
    manager.use(() => 1),
    hasCode('ERR_WASM_QUEUE_FULL'),
  )
  first.release()
  const second = (await waiting[0]) as LeasedInstance
  second.release()
  assert.equal(await waiting[1], 3)
})

test('a lease inside a lease works with a second replica, and would wait with only one', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2, threads: 2 })
  const sum = await manager.use(async (outer) => {
    outer.exports.set?.(1)
    return await manager.use(async (inner) => {
      inner.exports.set?.(2)
      return (outer.exports.peek?.() as number) * 10 + (inner.exports.peek?.() as number)
    })
  })
  assert.equal(sum, 12)
})

test('use refuses what is no function', LIMIT, async (t) => {
  const { manager } = await bench(t)
  for (const bad of [undefined, null, 5, 'fn', {}] as unknown as (() => void)[]) {
    await assert.rejects(manager.use(bad), hasCode('ERR_WASM_INVALID_ARGUMENT', /function/))
  }
  assert.equal(manager.stats().inFlight, 0)
})

test('imports called within a lease mean the leased instance', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { instances: 2, threads: 2 })
  const leases = await Promise.all([manager.acquire(), manager.acquire()])
  for (const [index, lease] of leases.entries()) {
    lease.exports.set?.(100 * (index + 1))
    close(index)
  }
  const calls = leases.map((lease, index) => lease.call('holdThenCount', [index]))
  await Promise.all([arrived(0), arrived(1)])
  release(1)
  release(0)
  assert.deepEqual(await Promise.all(calls), [101, 201])
  for (const lease of leases) lease.release()
})

test('a lease that is forgotten is given back by garbage collection', LIMIT, async () => {
  const ended = await child(
    `
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const forget = async () => { const lease = await manager.acquire(); lease.exports.add(1, 2); lease.memory.buffer }
    await forget()
    for (let i = 0; i < 100 && manager.stats().inFlight > 0; i += 1) {
      global.gc()
      await new Promise((resolve) => setImmediate(resolve))
    }
    report({ inFlight: manager.stats().inFlight, sum: await manager.call('add', [1, 2], { timeoutMs: 2000 }) })
    `,
    { env: { WORKBENCH: workbench }, flags: ['--expose-gc'] },
  )
  assert.deepEqual(reported(ended), { inFlight: 0, sum: 3 })
})

test('leases taken and given back ten thousand times leave nothing behind', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const { gc } = globalThis as { gc?: () => void }
  const round = async (count: number) => {
    for (let i = 0; i < count; i += 1) {
      const lease = await manager.acquire()
      lease.exports.add?.(1, 2)
      lease.release()
    }
    gc?.()
  }
  await round(2000)
  const before = process.memoryUsage().heapUsed
  await round(8000)
  const grown = process.memoryUsage().heapUsed - before
  assert.ok(grown < 8 * 2 ** 20, `${grown} bytes of heap more`)
  assert.equal(manager.stats().inFlight, 0)
})

test('calls of leases that are taken away are counted once each, if they were let in', LIMIT, async (t) => {
  const manager = await managed(t, workbench, {
    instances: 2,
    threads: 2,
    imports: { env: { entered: () => {}, hold: (key: number) => key } },
  })
  let [counted, refused, cut] = [0, 0, 0]
  const count = (error?: WasmError) => {
    // Its handle had expired before: nothing of it has come to the manager.
    const isRefused = error?.code === 'ERR_WASM_STALE_HANDLE' && /has ended/.test(error.message)
    if (isRefused) refused += 1
    else counted += 1
    if (error?.code === 'ERR_WASM_INTERRUPTED') cut += 1
    else if (error && error.code !== 'ERR_WASM_STALE_HANDLE') throw error
  }
  const work = async (instance: LeasedInstance, rounds: number) => {
    for (let round = 0; round < rounds; round += 1) {
      const calls = [instance.call('burn', [20_000]), instance.call('add', [1, 2])]
      for (const end of await Promise.all(calls.map(outcome)))
        count('error' in end ? (end.error as WasmError) : undefined)
      try {
        instance.exports.add?.(1, 2)
        count()
      } catch (error) {
        // Not even the functions are there any more.
        count(error as WasmError)
      }
    }
  }
  for (let round = 0; round < 60; round += 1) {
    const leases = Promise.all([1, 2].map((n) => manager.use((instance) => work(instance, n + 2))))
    const direct = outcome(manager.call('add', [1, 2]))
    await turns(1)
    await manager.reload({ drainTimeoutMs: round % 3, onDrainTimeout: 'interrupt' })
    await leases
    const end = await direct
    count('error' in end ? (end.error as WasmError) : undefined)
  }
  const { completed, failed, trapped, interrupted, rejected } = manager.stats().calls
  assert.equal(completed + failed + trapped + interrupted + rejected, counted)
  assert.ok(refused > 0 && cut > 0, `${refused} refused, ${cut} cut: nothing was taken away`)
})
