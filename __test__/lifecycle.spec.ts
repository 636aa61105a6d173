// A manager's life: states, generations, events, figures, its end, and what it means for the process.
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { test } from 'node:test'
import type { ReloadReport } from '../index.js'
import { adder, wat, workbench } from './guests.ts'
import {
  bench,
  child,
  hasCode,
  idleImports,
  LIMIT,
  managed,
  outcome,
  reported,
  STRAYS,
  turns,
  until,
  WasmError,
  WasmModuleManager,
} from './support.ts'

const env = { WORKBENCH: workbench }
const CREATE = `
  const imports = { env: { entered() {}, hold: (key) => key } }
  const create = (options) => WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports, ...options })
`

test('a manager comes from create and createSync only', () => {
  const Constructor = WasmModuleManager as unknown as new (...args: unknown[]) => unknown
  assert.throws(() => new Constructor(), TypeError)
  assert.throws(() => new Constructor(workbench, {}), TypeError)
})

test('state goes from starting to ready to closed, and is seen on the way', LIMIT, async () => {
  const seen: string[] = []
  let manager: WasmModuleManager | undefined
  manager = await WasmModuleManager.create(workbench, {
    cache: false,
    imports: idleImports,
    initialize: () => {
      seen.push(manager?.state ?? 'starting')
    },
    saveState: () => {
      seen.push(manager?.state ?? '?')
    },
    restoreState: () => {
      seen.push(manager?.state ?? '?')
    },
  })
  seen.push(manager.state)
  await manager.reload()
  seen.push(manager.state)
  const closing = manager.close()
  seen.push(manager.state)
  await closing
  seen.push(manager.state)
  assert.deepEqual(seen.slice(0, 2), ['starting', 'ready'])
  assert.deepEqual(seen.slice(-3), ['ready', 'closing', 'closed'])
  for (const during of seen.slice(2, -3)) assert.equal(during, 'reloading')
})

test('state is draining while a swap waits for what is in flight', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const call = manager.call('hold', [1])
  await arrived(1)
  const reload = manager.reload()
  await until(() => manager.state === 'draining')
  release(1)
  assert.equal(await call, 1)
  await reload
  assert.equal(manager.state, 'ready')
})

test(
  'generation counts from 1 and goes up by one with every committed reload, never with a failed one',
  LIMIT,
  async (t) => {
    let fails = false
    const { manager } = await bench(t, {
      initialize: () => {
        if (fails) throw new Error('not now')
      },
    })
    assert.equal(manager.generation, 1)
    for (let expected = 2; expected <= 6; expected += 1) {
      const report = await manager.reload()
      assert.deepEqual([report.previousGeneration, report.generation], [expected - 1, expected])
      assert.equal(manager.generation, expected)
    }
    fails = true
    await assert.rejects(manager.reload(), hasCode('ERR_WASM_RELOAD_FAILED'))
    assert.equal(manager.generation, 6)
    fails = false
    assert.equal((await manager.reload()).generation, 7)
  },
)

test('the reload event carries the very figures of the report, once per commit', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const events: ReloadReport[] = []
  manager.on('reload', (report) => events.push(report))
  const reports = [await manager.reload({ reason: 'one' }), await manager.reload({ reason: 'two' })]
  await turns()
  assert.deepEqual(events, reports)
})

test(
  'a failed reload tells of itself by the event reload:failed, with the error that it rejected with',
  LIMIT,
  async (t) => {
    const cause = new Error('the hook')
    const { manager } = await bench(t, {
      saveState: () => {
        throw cause
      },
    })
    const failures: WasmError[] = []
    manager.on('reload:failed', (error) => failures.push(error))
    const error = await outcome(manager.reload())
    await turns()
    assert.equal(failures.length, 1)
    const [failure] = failures
    assert.ok(failure instanceof WasmError && 'error' in error)
    hasCode('ERR_WASM_RELOAD_FAILED')(failure)
    assert.equal(failure.phase, 'save')
    assert.equal(failure.cause, cause)
    assert.equal((error.error as WasmError).cause, cause)
  },
)

test(
  'the trap event tells of every trap of the guest, on both paths, and the reload event of the replacement',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    const traps: WasmError[] = []
    const reasons: string[] = []
    manager.on('trap', (error) => traps.push(error))
    manager.on('reload', (report) => reasons.push(report.reason))
    await assert.rejects(manager.call('boom'), hasCode('ERR_WASM_TRAP'))
    assert.equal(await manager.call('add', [1, 2]), 3)
    assert.throws(() => manager.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
    assert.equal(manager.exports.add?.(1, 2), 3)
    await until(() => reasons.length === 2)
    assert.deepEqual(
      traps.map((error) => [error.code, error.trap]),
      [
        ['ERR_WASM_TRAP', 'unreachable'],
        ['ERR_WASM_TRAP', 'unreachable'],
      ],
    )
    assert.deepEqual(reasons, ['trap', 'trap'])
    assert.equal(manager.generation, 3)
  },
)

test('what an import throws is no trap and costs no instance', LIMIT, async (t) => {
  const source = wat('(module (import "env" "f" (func $f)) (func (export "run") (call $f)))')
  const manager = await managed(t, source, {
    imports: {
      env: {
        f: () => {
          throw new Error('mine')
        },
      },
    },
  })
  let traps = 0
  manager.on('trap', () => {
    traps += 1
  })
  await assert.rejects(manager.call('run'), /mine/)
  assert.throws(() => manager.exports.run?.(), /mine/)
  await turns()
  assert.deepEqual([traps, manager.generation, manager.stats().calls.trapped], [0, 1, 0])
})

test('the close event comes once, whichever way and however often the manager is closed', LIMIT, async () => {
  for (const end of ['close', 'destroy'] as const) {
    const manager = await WasmModuleManager.create(adder(), { cache: false })
    let closed = 0
    manager.on('close', () => {
      closed += 1
    })
    await Promise.all([manager[end](), manager.close(), manager.destroy(), manager[end]()])
    await manager.close()
    await manager.destroy()
    await turns()
    assert.equal(closed, 1, end)
    assert.equal(manager.state, 'closed')
  }
})

test('await using closes the manager', LIMIT, async () => {
  const manager = await WasmModuleManager.create(adder(), { cache: false })
  await manager[Symbol.asyncDispose]()
  assert.equal(manager.state, 'closed')
  await manager[Symbol.asyncDispose]()
})

test('everything that needs an instance says ERR_WASM_CLOSED after the end', LIMIT, async () => {
  for (const end of ['close', 'destroy'] as const) {
    const { exports, manager } = await (async () => {
      const manager = await WasmModuleManager.create(workbench, { cache: false, imports: idleImports })
      return { manager, exports: manager.exports }
    })()
    const kept = exports.add
    await manager[end]()
    const closed = hasCode('ERR_WASM_CLOSED')
    await assert.rejects(manager.call('add', [1, 2]), closed)
    await assert.rejects(
      manager.use(() => 1),
      closed,
    )
    await assert.rejects(manager.acquire(), closed)
    await assert.rejects(manager.reload(), closed)
    assert.throws(() => manager.reloadSync(), closed)
    assert.throws(() => manager.callSync('add', [1, 2]), closed)
    assert.throws(() => exports.add?.(1, 2), closed)
    assert.throws(() => kept?.(1, 2), closed)
    // Looking is always allowed.
    assert.equal(manager.state, 'closed')
    assert.equal(manager.generation, 1)
    assert.equal(manager.name, 'workbench')
    assert.equal(manager.stats().memoryBytes, 0)
    assert.equal(manager.stats().state, 'closed')
  }
})

test('close waits for running and for queued calls, and refuses new ones', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const running = manager.call('hold', [1])
  await arrived(1)
  const queued = [manager.call('hold', [2]), manager.call('add', [20, 3])]
  let isClosed = false
  const closing = manager.close().then(() => {
    isClosed = true
  })
  await assert.rejects(manager.call('add', [1, 1]), hasCode('ERR_WASM_CLOSED'))
  assert.throws(() => manager.exports.add?.(1, 1), hasCode('ERR_WASM_CLOSED'))
  await turns()
  assert.equal(isClosed, false)
  assert.equal(manager.state, 'closing')
  release(1)
  assert.deepEqual(await Promise.all([running, ...queued]), [1, 2, 23])
  await closing
  assert.equal(manager.state, 'closed')
})

test('close waits for a lease, whose holder may go on working', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const lease = await manager.acquire()
  const closing = manager.close()
  await turns()
  assert.equal(manager.state, 'closing')
  assert.equal(lease.exports.add?.(1, 2), 3)
  assert.equal(await lease.call('add', [3, 4]), 7)
  lease.release()
  await closing
  assert.equal(manager.state, 'closed')
})

test(
  'close with drainTimeoutMs gives up with ERR_WASM_DRAIN_TIMEOUT and says how many are in flight',
  LIMIT,
  async (t) => {
    const { manager, close, arrived, release } = await bench(t)
    close(1)
    const running = manager.call('hold', [1])
    await arrived(1)
    await assert.rejects(manager.close({ drainTimeoutMs: 10 }), (error: WasmError) => {
      hasCode('ERR_WASM_DRAIN_TIMEOUT')(error)
      assert.equal(error.inFlight, 1)
      return true
    })
    release(1)
    assert.equal(await running, 1)
    // Asked again, it can end now.
    await manager.close()
    assert.equal(manager.state, 'closed')
  },
)

test('destroy rejects what waits with ERR_WASM_CLOSED and interrupts what runs', LIMIT, async (t) => {
  const { manager, entered } = await bench(t)
  const inside = entered()
  const running = outcome(manager.call('spin'))
  await inside
  const waiting = [outcome(manager.call('add', [1, 2])), outcome(manager.acquire())]
  const reloading = outcome(manager.reload())
  await manager.destroy()
  const ends = await Promise.all([running, ...waiting, reloading])
  const codes = ends.map((end) => ('error' in end ? (end.error as WasmError).code : 'value'))
  assert.deepEqual(codes, ['ERR_WASM_INTERRUPTED', 'ERR_WASM_CLOSED', 'ERR_WASM_CLOSED', 'ERR_WASM_CLOSED'])
  assert.equal(manager.state, 'closed')
})

test('destroy during close cuts the waiting short, and both end', LIMIT, async (t) => {
  const { manager, entered } = await bench(t)
  const inside = entered()
  const running = outcome(manager.call('spin'))
  await inside
  const closing = outcome(manager.close())
  await turns()
  await manager.destroy()
  const end = await running
  assert.ok('error' in end)
  hasCode('ERR_WASM_INTERRUPTED')(end.error)
  assert.ok('value' in (await closing), 'close() ended')
  assert.equal(manager.state, 'closed')
})

for (const how of ['close', 'destroy'] as const) {
  test(`${how} may be called from inside a hook without a deadlock`, LIMIT, async () => {
    const manager: WasmModuleManager = await WasmModuleManager.create(workbench, {
      cache: false,
      imports: idleImports,
      saveState: () => {
        ending = manager[how]()
      },
    })
    let ending: Promise<void> | undefined
    await outcome(manager.reload())
    await ending
    assert.equal(manager.state, 'closed')
  })

  test(`${how} may be called from inside an import, on both paths`, LIMIT, async () => {
    const source = wat('(module (import "env" "f" (func $f)) (func (export "run") (call $f)))')
    for (const path of ['call', 'callSync'] as const) {
      let ending: Promise<void> | undefined
      const manager: WasmModuleManager = await WasmModuleManager.create(source, {
        cache: false,
        imports: {
          env: {
            f: () => {
              ending = manager[how]()
            },
          },
        },
      })
      await outcome((async () => manager[path]('run'))())
      await ending
      assert.equal(manager.state, 'closed')
    }
  })

  test(`${how} may be called inside use, and ends once the holder has let go`, LIMIT, async (t) => {
    const { manager } = await bench(t)
    let ending: Promise<void> | undefined
    await manager.use(() => {
      ending = manager[how]()
    })
    await ending
    assert.equal(manager.state, 'closed')
  })
}

test('a failed create leaves nothing behind and says what failed', LIMIT, async () => {
  await assert.rejects(WasmModuleManager.create(workbench, { cache: false }), hasCode('ERR_WASM_LINK'))
  assert.throws(() => WasmModuleManager.createSync(workbench, { cache: false }), hasCode('ERR_WASM_LINK'))
})

// ---------------------------------------------------------------- figures

test('stats can be polled: a thousand looks at sixteen replicas take less than a second', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 16 })
  await Promise.all(Array.from({ length: 500 }, () => manager.call('add', [1, 2])))
  const started = performance.now()
  for (let look = 0; look < 1000; look += 1) manager.stats()
  const took = performance.now() - started
  assert.ok(took < 1000, `${took} ms`)
})

test('stats is a plain object of that moment, with every member of the contract', LIMIT, async (t) => {
  const { manager } = await bench(t, { name: 'figures' })
  const before = manager.stats()
  assert.equal(Object.getPrototypeOf(before), Object.prototype)
  assert.deepEqual(Object.keys(before).sort(), [
    'calls',
    'generation',
    'inFlight',
    'instances',
    'memoryBytes',
    'memoryBytesPeak',
    'name',
    'pauseTime',
    'queued',
    'recyclesDue',
    'reloads',
    'reloadsFailed',
    'resets',
    'runTime',
    'snapshots',
    'state',
    'waitTime',
  ])
  assert.deepEqual(before.calls, { completed: 0, failed: 0, trapped: 0, interrupted: 0, rejected: 0 })
  assert.deepEqual(before.instances, { total: 1, busy: 0, poisoned: 0 })
  assert.deepEqual(Object.keys(before.runTime), ['count', 'min', 'mean', 'p50', 'p90', 'p99', 'p999', 'max'])
  assert.deepEqual([before.name, before.state, before.generation], ['figures', 'ready', 1])
  await manager.call('add', [1, 2])
  assert.equal(before.calls.completed, 0)
  assert.equal(manager.stats().calls.completed, 1)
  JSON.stringify(before)
})

test('stats counts calls by how they ended', LIMIT, async (t) => {
  const { manager, entered, close, arrived, release } = await bench(t, { maxQueue: 1 })
  manager.exports.add?.(1, 2)
  manager.callSync('add', [1, 2])
  await manager.call('add', [1, 2])
  await manager.use((instance) => instance.exports.add?.(1, 2))
  assert.equal(manager.stats().calls.completed, 4)
  await assert.rejects(manager.call('boom'))
  assert.equal(manager.stats().calls.trapped, 1)
  const inside = entered()
  const stop = new AbortController()
  const spin = outcome(manager.call('spin', [], { signal: stop.signal }))
  await inside
  stop.abort()
  await spin
  assert.equal(manager.stats().calls.interrupted, 1)
  close(5)
  const held = manager.call('hold', [5])
  await arrived(5)
  const waits = manager.call('add', [1, 2])
  await assert.rejects(manager.call('add', [1, 2]), hasCode('ERR_WASM_QUEUE_FULL'))
  assert.deepEqual([manager.stats().inFlight, manager.stats().queued, manager.stats().instances.busy], [1, 1, 1])
  assert.equal(manager.stats().calls.rejected, 1)
  release(5)
  await Promise.all([held, waits])
  await turns()
  assert.deepEqual([manager.stats().inFlight, manager.stats().queued], [0, 0])
})

test('a call that ends by what an import threw counts as failed', LIMIT, async (t) => {
  const source = wat('(module (import "env" "f" (func $f)) (func (export "run") (call $f)))')
  const manager = await managed(t, source, {
    imports: {
      env: {
        f: () => {
          throw new Error('mine')
        },
      },
    },
  })
  await assert.rejects(manager.call('run'))
  assert.throws(() => manager.exports.run?.())
  assert.deepEqual(manager.stats().calls, { completed: 0, failed: 2, trapped: 0, interrupted: 0, rejected: 0 })
})

test('stats counts reloads by reason, and failed ones', LIMIT, async (t) => {
  let fails = false
  const { manager } = await bench(t, {
    saveState: () => {
      if (fails) throw new Error('no')
    },
  })
  await manager.reload()
  await manager.reload({ reason: 'nightly' })
  await manager.reload({ reason: 'nightly' })
  await assert.rejects(manager.call('boom'))
  await manager.call('add', [1, 2])
  fails = true
  await assert.rejects(manager.reload())
  const stats = manager.stats()
  assert.deepEqual({ ...stats.reloads }, { manual: 1, nightly: 2, trap: 1 })
  assert.equal(stats.reloadsFailed, 1)
})

test('a reason such as __proto__ is counted like any other', LIMIT, async (t) => {
  const { manager } = await bench(t)
  await manager.reload({ reason: '__proto__' })
  await manager.reload({ reason: 'constructor' })
  const { reloads } = manager.stats()
  assert.equal(Object.getOwnPropertyDescriptor(reloads, '__proto__')?.value, 1)
  assert.equal(Object.getOwnPropertyDescriptor(reloads, 'constructor')?.value, 1)
})

test('memoryBytes follows the guest, and the peak survives the reload', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2 })
  assert.equal(manager.stats().memoryBytes, 2 * 65_536)
  manager.exports.grow?.(9)
  assert.equal(manager.stats().memoryBytes, 11 * 65_536)
  const report = await manager.reload()
  assert.deepEqual([report.memoryBytesBefore, report.memoryBytesAfter], [11 * 65_536, 2 * 65_536])
  assert.equal(manager.stats().memoryBytes, 2 * 65_536)
  // Both generations were there when the new one took over.
  assert.equal(manager.stats().memoryBytesPeak, 13 * 65_536)
})

test('the histograms measure running, waiting and pausing in milliseconds', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const started = performance.now()
  const held = manager.call('hold', [1])
  await arrived(1)
  const waits = manager.call('add', [1, 2])
  // Something to measure: a synchronous stretch of this thread's time.
  const from = performance.now()
  while (performance.now() - from < 30) Math.sqrt(2)
  release(1)
  await Promise.all([held, waits])
  await manager.reload()
  const took = performance.now() - started
  const { runTime, waitTime, pauseTime } = manager.stats()
  assert.equal(runTime.count, 2)
  assert.equal(waitTime.count, 2)
  assert.equal(pauseTime.count, 1)
  for (const histogram of [runTime, waitTime, pauseTime]) {
    const { min, p50, p90, p99, p999, max, mean } = histogram
    const sorted = [min, p50, p90, p99, p999, max]
    for (let i = 1; i < sorted.length; i += 1) assert.ok((sorted[i - 1] as number) <= (sorted[i] as number) + 1e-9)
    assert.ok(min >= 0 && mean >= min && mean <= max && max <= took * 1.05, JSON.stringify(histogram))
  }
  assert.ok(runTime.max >= 29 && waitTime.max >= 29, JSON.stringify({ runTime, waitTime }))
})

// ---------------------------------------------------------------- the process

test('a program that forgot to close ends by itself', LIMIT, async () => {
  const ended = await child(
    `${CREATE}
    const manager = await create()
    assert.equal(await manager.call('add', [1, 2]), 3)
    manager.memory.buffer
    await manager.reload()
    report('end of program')
    `,
    { env },
  )
  assert.equal(reported(ended), 'end of program')
  assert.ok(ended.took < 20_000, `it took ${ended.took} ms`)
})

test('a program that forgot a lease ends by itself', LIMIT, async () => {
  const ended = await child(`${CREATE} const manager = await create(); await manager.acquire(); report('end')`, { env })
  assert.equal(reported(ended), 'end')
})

test('a running call keeps the process alive until it is answered', LIMIT, async () => {
  const ended = await child(
    `${CREATE}
    const manager = await create()
    void manager.call('burn', [300_000_000]).then((value) => { report('answered'); process.exitCode = 3 })
    `,
    { env },
  )
  assert.equal(ended.code, 3, ended.stderr)
  assert.match(ended.stdout, /answered/)
})

test('queued calls, reload and close keep the process alive until they are answered', LIMIT, async () => {
  const ended = await child(
    `${CREATE}
    const manager = await create()
    const order = []
    void manager.call('burn', [50_000_000]).then(() => order.push('first'))
    void manager.call('burn', [50_000_000]).then(() => order.push('second'))
    void manager.reload().then(() => order.push('reload'))
    void manager.close().then(() => { order.push('close'); report(order) })
    `,
    { env },
  )
  const order = reported<string[]>(ended)
  assert.deepEqual([...order].sort(), ['close', 'first', 'reload', 'second'])
  assert.equal(order.at(-1), 'close')
})

test(
  'a call that waits for a promise that never settles keeps the process alive no longer than Node would',
  LIMIT,
  async () => {
    // Node ends with 13 when the top level still awaits; the call itself is under way, so it may also stay: it must not crash.
    const ended = await child(
      `
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: () => new Promise(() => {}) } },
    })
    setTimeout(() => { report('still alive'); process.exit(4) }, 200)
    await manager.call('hold', [1])
    `,
      { env },
    )
    assert.equal(ended.code, 4, ended.stderr)
    assert.match(ended.stdout, /still alive/)
  },
)

test(
  'an idle manager does not keep a timer-less program alive, and an uncalled destroy is harmless at exit',
  LIMIT,
  async () => {
    const ended = await child(
      `${CREATE}
    globalThis.managers = await Promise.all([create(), create({ instances: 3 }), create({ threads: 2, instances: 2 })])
    process.on('exit', (code) => { report({ code, states: managers.map((m) => m.state) }) })
    `,
      { env },
    )
    assert.deepEqual(reported(ended), { code: 0, states: ['ready', 'ready', 'ready'] })
  },
)

test('calls made in an exit handler do not crash the process', LIMIT, async () => {
  const ended = await child(
    `${CREATE}
    const manager = await create()
    process.on('exit', () => {
      assert.equal(manager.exports.add(2, 2), 4)
      manager.reloadSync()
      void manager.call('add', [1, 2])
      void manager.destroy()
      report('exit handler done')
    })
    `,
    { env },
  )
  assert.equal(reported(ended), 'exit handler done')
})

test('close and destroy give back threads, address space and resident memory', LIMIT, async () => {
  const ended = await child(
    `${CREATE}
    import { readdirSync, readFileSync } from 'node:fs'
    const measure = () => {
      const [virtual, resident] = readFileSync('/proc/self/statm', 'utf8').split(' ')
      return { threads: readdirSync('/proc/self/task').length, virtual: virtual * 4096, resident: resident * 4096 }
    }
    const settle = async (bound) => {
      // Threads leave on their own time; the bound is the test's.
      for (let i = 0; i < 200; i += 1) {
        global.gc()
        if (measure().threads <= bound) break
        await new Promise((resolve) => setTimeout(resolve, 10))
      }
    }
    const round = async (end) => {
      const manager = await create({ instances: 2, threads: 2 })
      manager.exports.grow(64); manager.exports.touch(0, 64 * 65536)
      manager.memory.buffer
      await Promise.all([manager.call('add', [1, 2]), manager.call('add', [1, 2])])
      await manager[end]()
    }
    for (const end of ['close', 'destroy']) await round(end)
    await settle(Number.POSITIVE_INFINITY)
    const before = measure()
    for (let i = 0; i < 20; i += 1) await round(i % 2 ? 'close' : 'destroy')
    await settle(before.threads)
    const after = measure()
    report(Object.fromEntries(Object.keys(before).map((key) => [key, after[key] - before[key]])))
    `,
    { env, flags: ['--expose-gc'] },
  )
  const grown = reported<{ threads: number; virtual: number; resident: number }>(ended)
  assert.ok(grown.threads <= 2, `${grown.threads} more threads after twenty managers`)
  assert.ok(grown.virtual < 5 * 2 ** 30, `${grown.virtual} bytes more address space`)
  assert.ok(grown.resident < 48 * 2 ** 20, `${grown.resident} bytes more resident memory`)
})

test('a manager that is forgotten without close is released by garbage collection', LIMIT, async () => {
  const ended = await child(
    `${CREATE}
    import { readdirSync, readFileSync } from 'node:fs'
    const measure = () => ({
      threads: readdirSync('/proc/self/task').length,
      virtual: Number(readFileSync('/proc/self/statm', 'utf8').split(' ')[0]) * 4096,
    })
    const forget = async () => { const manager = await create(); await manager.call('add', [1, 2]); manager.exports.add(1, 2); manager.memory.buffer }
    await forget()
    const before = measure()
    for (let i = 0; i < 10; i += 1) await forget()
    for (let i = 0; i < 200; i += 1) {
      global.gc()
      await new Promise((resolve) => setTimeout(resolve, 10))
      if (measure().threads <= before.threads && measure().virtual - before.virtual < 9 * 2 ** 30) break
    }
    const after = measure()
    report({ threads: after.threads - before.threads, gigabytes: (after.virtual - before.virtual) / 2 ** 30 })
    `,
    { env, flags: ['--expose-gc'] },
  )
  const grown = reported<{ threads: number; gigabytes: number }>(ended)
  assert.ok(grown.threads <= 1 + STRAYS, `${grown.threads} more threads after ten forgotten managers`)
  assert.ok(grown.gigabytes < 9 + 9 * STRAYS, `${grown.gigabytes} GiB more address space after ten forgotten managers`)
})

test('listeners that throw are uncaught exceptions of the program, not ours', LIMIT, async () => {
  const ended = await child(
    `${CREATE}
    const manager = await create()
    const uncaught = []
    process.on('uncaughtException', (error) => uncaught.push(error.message))
    manager.on('reload', () => { throw new Error('from the listener') })
    await manager.reload()
    await new Promise((resolve) => setImmediate(resolve))
    assert.equal(await manager.call('add', [1, 2]), 3)
    report(uncaught)
    `,
    { env },
  )
  assert.deepEqual(reported(ended), ['from the listener'])
})

test('a rejection nobody handles is reported by Node with our code', LIMIT, async () => {
  const ended = await child(`${CREATE} const manager = await create(); void manager.call('boom')`, { env })
  assert.equal(ended.code, 1)
  assert.match(ended.stderr, /ERR_WASM_TRAP/)
})

test('once works on managers as on any EventEmitter', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const seen = once(manager, 'reload')
  const report = await manager.reload({ reason: 'emitter' })
  assert.deepEqual(await seen, [report])
})

test('close serves what was admitted even if a trap came before it', LIMIT, async (t) => {
  for (const instances of [1, 2]) {
    const { manager } = await bench(t, { instances, threads: instances })
    const ends = [
      outcome(manager.call('boom')),
      outcome(manager.call('boom')),
      outcome(manager.call('add', [1, 2])),
      outcome(manager.use((instance) => instance.exports.add?.(3, 4))),
      outcome(manager.close()),
    ]
    const [first, second, ...rest] = await Promise.all(ends)
    assert.ok(first && second && 'error' in first && 'error' in second)
    assert.deepEqual(rest, [{ value: 3 }, { value: 7 }, { value: undefined }])
    assert.equal(manager.state, 'closed')
  }
})

test('close right after a synchronous trap ends', LIMIT, async (t) => {
  const { manager } = await bench(t)
  assert.throws(() => manager.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
  await manager.close()
  assert.equal(manager.state, 'closed')
})

test('close and reload asked for together both end', LIMIT, async (t) => {
  for (const order of ['reload first', 'close first'] as const) {
    const { manager, close, arrived, release } = await bench(t)
    close(1)
    const held = manager.call('hold', [1])
    await arrived(1)
    const ends =
      order === 'reload first'
        ? [outcome(manager.reload()), outcome(manager.close())]
        : [outcome(manager.close()), outcome(manager.reload())]
    release(1)
    assert.equal(await held, 1)
    await Promise.all(ends)
    assert.equal(manager.state, 'closed')
  }
})
