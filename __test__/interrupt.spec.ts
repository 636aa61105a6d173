// Stopping a running guest: timeouts, signals, destroy; and what is left standing.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { ManagerOptions } from '../index.js'
import { buffers, wat, workbench } from './guests.ts'
import {
  bench,
  child,
  hasCode,
  idleImports,
  LIMIT,
  managed,
  managedSync,
  outcome,
  reported,
  turns,
  until,
  type WasmError,
  WasmModuleManager,
} from './support.ts'

/** Every way to run for ever that a guest has. */
const ENDLESS = wat(
  `(module $endless
    (import "env" "entered" (func $entered))
    (memory (export "memory") 1 1)
    (table 4 funcref)
    (elem (i32.const 0) $ping $pong)
    (type $void (func))
    (global $n (mut i32) (i32.const 0))
    (func (export "empty") (call $entered) (loop (br 0)))
    (func (export "counting") (local i64) (call $entered)
      (loop (local.set 0 (i64.add (local.get 0) (i64.const 1))) (br 0)))
    (func (export "nested") (call $entered) (loop (loop (br 1)) (br 0)))
    (func (export "condition") (param i32) (call $entered)
      (loop (br_if 0 (local.get 0)) (br_if 0 (i32.eqz (local.get 0)))))
    (func (export "arms") (local i32) (call $entered)
      (loop (local.set 0 (i32.xor (local.get 0) (i32.const 1))) (if (local.get 0) (then (br 1)) (else (br 1)))))
    (func (export "again") (call $entered) (loop (br_if 0 (i32.eqz (i32.load (i32.const 60000))))))
    (func (export "outwards") (local i32) (call $entered)
      (loop (local.set 0 (i32.const 0)) (loop
        (if (i32.gt_u (local.get 0) (i32.const 3)) (then (br 2)))
        (local.set 0 (i32.add (local.get 0) (i32.const 1))) (br 0))))
    (func $tree (param i32)
      (if (local.get 0) (then (loop
        (call $tree (i32.sub (local.get 0) (i32.const 1)))
        (call $tree (i32.sub (local.get 0) (i32.const 1)))
        (br_if 0 (i32.const 0))))))
    (func (export "loopless") (call $entered) (call $tree (i32.const 70)))
    (func (export "table") (call $entered) (loop (br_table 0 0 0 (i32.const 1))))
    (func (export "bulk") (call $entered)
      (loop (memory.fill (i32.const 0) (i32.const 7) (i32.const 65536)) (br 0)))
    (func (export "grow") (call $entered) (loop (drop (memory.grow (i32.const 0))) (br 0)))
    (func (export "store") (call $entered) (loop (i32.store (i32.const 0) (i32.const 1)) (br 0)))
    (func $leaf (param i32) (result i32) (i32.add (local.get 0) (i32.const 1)))
    (func (export "calling") (call $entered) (loop (global.set $n (call $leaf (global.get $n))) (br 0)))
    (func $fib (param i32) (result i32)
      (if (result i32) (i32.lt_s (local.get 0) (i32.const 2))
        (then (local.get 0))
        (else (i32.add
          (call $fib (i32.sub (local.get 0) (i32.const 1)))
          (call $fib (i32.sub (local.get 0) (i32.const 2)))))))
    (func (export "recursion") (call $entered) (drop (call $fib (i32.const 60))))
    (func $ping (type $void) (global.set $n (i32.add (global.get $n) (i32.const 1))) (return_call_indirect (type $void) (i32.const 1)))
    (func $pong (type $void) (return_call_indirect (type $void) (i32.const 0)))
    (func (export "tailIndirect") (call $entered) (call $ping))
    (func $even (return_call $odd))
    (func $odd (return_call $even))
    (func (export "tail") (call $entered) (call $even))
    (func (export "ok") (result i32) (i32.const 1)))`,
  'endless',
)
const WAYS = [
  'empty',
  'counting',
  'nested',
  'condition',
  'arms',
  'again',
  'outwards',
  'loopless',
  'table',
  'bulk',
  'grow',
  'store',
  'calling',
  'recursion',
  'tailIndirect',
  'tail',
]

async function endless(t: Parameters<typeof managed>[0], options: ManagerOptions = {}) {
  const waiting: (() => void)[] = []
  const manager = await managed(t, ENDLESS, {
    imports: {
      env: {
        entered: () => {
          for (const one of waiting.splice(0)) one()
        },
      },
    },
    ...options,
  })
  return { manager, entered: () => new Promise<void>((resolve) => waiting.push(resolve)) }
}

for (const engine of [{}, { signalsBasedTraps: false }] as const) {
  const mode = 'signalsBasedTraps' in engine ? ', with explicit bounds checks' : ''
  for (const way of WAYS) {
    test(`timeoutMs stops a guest that runs for ever (${way}${mode}), and the manager serves on`, LIMIT, async (t) => {
      const { manager } = await endless(t, { engine })
      const error = await outcome(manager.call(way, [], { timeoutMs: 30 }))
      assert.ok('error' in error)
      hasCode('ERR_WASM_TIMEOUT', /30/)(error.error)
      assert.equal(await manager.call('ok'), 1)
      assert.equal(manager.exports.ok?.(), 1)
    })
  }
}

/** Under a short limits.timeoutMs: on a busy machine any call at all may take that long. */
async function inTime<T>(call: () => Promise<T>): Promise<T> {
  for (;;) {
    const end = await outcome(call())
    if ('value' in end) return end.value
    hasCode('ERR_WASM_TIMEOUT')(end.error)
  }
}

test('limits.timeoutMs stops pool calls, synchronous calls and calls in a lease', LIMIT, async (t) => {
  const { manager } = await endless(t, { limits: { timeoutMs: 40 } })
  const timeout = hasCode('ERR_WASM_TIMEOUT', /40/)
  await assert.rejects(manager.call('empty'), timeout)
  assert.throws(() => manager.exports.empty?.(), timeout)
  assert.throws(() => manager.callSync('empty'), timeout)
  await manager.use(async (instance) => {
    assert.throws(() => instance.exports.empty?.(), timeout)
  })
  await manager.use(async (instance) => {
    await assert.rejects(instance.call('empty'), timeout)
  })
  assert.equal(manager.stats().calls.interrupted, 5)
  assert.equal(await inTime(() => manager.call('ok')), 1)
})

test('limits.timeoutMs counts the running only, timeoutMs of a call counts its waiting as well', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { limits: { timeoutMs: 20_000 } })
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const patient = manager.call('add', [1, 2])
  await assert.rejects(manager.call('add', [1, 2], { timeoutMs: 20 }), hasCode('ERR_WASM_TIMEOUT', /20/))
  release(1)
  assert.equal(await held, 1)
  assert.equal(await patient, 3)
  assert.equal(manager.generation, 1)
})

test('a call that timed out in the queue never ran and costs no instance', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  await assert.rejects(manager.call('count', [], { timeoutMs: 10 }), (error: WasmError) => {
    hasCode('ERR_WASM_TIMEOUT')(error)
    assert.doesNotMatch(error.message, /is replaced/)
    return true
  })
  release(1)
  await held
  assert.equal(await manager.call('peek'), 0)
  assert.equal(manager.generation, 1)
})

test('a timeout that does not pass changes nothing', LIMIT, async (t) => {
  const { manager } = await bench(t, { limits: { timeoutMs: 30_000 } })
  for (let i = 0; i < 200; i += 1) {
    assert.equal(await manager.call('add', [i, 1], { timeoutMs: 30_000 }), i + 1)
    assert.equal(manager.exports.add?.(i, 1), i + 1)
  }
  assert.equal(manager.generation, 1)
})

test('timeoutMs that is no whole number of milliseconds from 1 is refused', LIMIT, async (t) => {
  const { manager } = await bench(t)
  for (const timeoutMs of [0, -1, 1.5, Number.NaN, '10', 2 ** 53, Number.POSITIVE_INFINITY] as number[]) {
    await assert.rejects(
      manager.call('add', [1, 2], { timeoutMs }),
      hasCode('ERR_WASM_INVALID_ARGUMENT', /timeoutMs/),
      String(timeoutMs),
    )
  }
  assert.equal(await manager.call('add', [1, 2], { timeoutMs: 2 ** 53 - 1 }), 3)
})

// ---------------------------------------------------------------- signals

test('a signal that is aborted already rejects with its reason before anything runs', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const reason = { odd: 'reason' }
  const end = await outcome(manager.call('count', [], { signal: AbortSignal.abort(reason) }))
  assert.ok('error' in end)
  assert.equal(end.error, reason)
  for (const operation of [
    () => manager.invoke('add', new Uint8Array(1), { signal: AbortSignal.abort(reason) }),
    () => manager.acquire({ signal: AbortSignal.abort(reason) }),
    () => manager.use(() => 1, { signal: AbortSignal.abort(reason) }),
  ]) {
    const refused = await outcome(operation() as Promise<unknown>)
    assert.ok('error' in refused)
    assert.equal(refused.error, reason)
  }
  assert.equal(manager.exports.peek?.(), 0)
})

test('a signal interrupts a running guest, and the promise rejects with the very reason', LIMIT, async (t) => {
  const { manager, entered } = await endless(t)
  for (const reason of [new Error('enough'), undefined, null, 0, 'text']) {
    const controller = new AbortController()
    const inside = entered()
    const call = outcome(manager.call('empty', [], { signal: controller.signal }))
    await inside
    controller.abort(reason)
    const end = await call
    assert.ok('error' in end)
    assert.ok(Object.is(end.error, controller.signal.reason))
    assert.equal(await manager.call('ok'), 1)
  }
})

test('AbortSignal.timeout works as a deadline', LIMIT, async (t) => {
  const { manager } = await endless(t)
  const end = await outcome(manager.call('empty', [], { signal: AbortSignal.timeout(30) }))
  assert.ok('error' in end)
  assert.equal((end.error as Error).name, 'TimeoutError')
})

test('a signal takes a waiting call out of the queue: it never runs, the others keep their order', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const controller = new AbortController()
  const first = manager.call('count')
  const second = outcome(manager.call('count', [], { signal: controller.signal }))
  const third = manager.call('count')
  const reason = new Error('changed my mind')
  controller.abort(reason)
  const end = await second
  assert.ok('error' in end)
  assert.equal(end.error, reason)
  assert.equal(manager.stats().queued, 2)
  release(1)
  await held
  assert.deepEqual(await Promise.all([first, third]), [1, 2])
  assert.equal(manager.generation, 1)
})

test('a signal takes a waiting lease out of the queue', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const lease = await manager.acquire()
  const controller = new AbortController()
  let ran = false
  const waiting = [
    outcome(manager.acquire({ signal: controller.signal })),
    outcome(
      manager.use(
        () => {
          ran = true
        },
        { signal: controller.signal },
      ),
    ),
  ]
  controller.abort('no more')
  for (const end of await Promise.all(waiting)) {
    assert.ok('error' in end)
    assert.equal(end.error, 'no more')
  }
  lease.release()
  assert.equal(await manager.call('add', [1, 2]), 3)
  assert.equal(ran, false)
})

test('a signal aborted after the answer does nothing, and leaves no listener behind', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const controller = new AbortController()
  const { signal } = controller
  let listeners = 0
  const { addEventListener, removeEventListener } = signal
  signal.addEventListener = function (this: AbortSignal, ...args: Parameters<typeof addEventListener>) {
    listeners += 1
    addEventListener.apply(this, args)
  } as typeof addEventListener
  signal.removeEventListener = function (this: AbortSignal, ...args: Parameters<typeof removeEventListener>) {
    listeners -= 1
    removeEventListener.apply(this, args)
  } as typeof removeEventListener
  for (let i = 0; i < 20; i += 1) await manager.call('add', [1, 2], { signal })
  await turns()
  assert.equal(listeners, 0)
  controller.abort()
  assert.equal(await manager.call('add', [1, 2]), 3)
  assert.equal(manager.generation, 1)
})

test('something that is no signal is refused', LIMIT, async (t) => {
  const { manager } = await bench(t)
  for (const signal of [{}, new EventTarget(), { aborted: false }, 'abort', 5] as unknown as AbortSignal[]) {
    const refused = hasCode('ERR_WASM_INVALID_ARGUMENT', /options\.signal must be an AbortSignal/)
    await assert.rejects(manager.call('add', [1, 2], { signal }), refused)
    await assert.rejects(manager.acquire({ signal }), refused)
  }
})

test(
  'options of calls, leases and close() that are not known are refused, naming them and the known ones',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    const lease = await manager.acquire()
    const input = Uint8Array.of(1)
    type Any = Record<string, never>
    for (const [call, known] of [
      [(options: Any) => manager.call('add', [1, 2], options), 'signal, timeoutMs'],
      [(options: Any) => manager.invoke('reverse', input, options), 'signal, timeoutMs'],
      [(options: Any) => lease.call('add', [1, 2], options), 'signal, timeoutMs'],
      [(options: Any) => manager.acquire(options), 'signal'],
      [(options: Any) => manager.use(() => {}, options), 'signal'],
      [(options: Any) => manager.close(options), 'drainTimeoutMs'],
    ] as [(options: unknown) => Promise<unknown>, string][]) {
      const refused = (text: string) => hasCode('ERR_WASM_INVALID_ARGUMENT', new RegExp(text))
      await assert.rejects(call({ timeout: 5 }), refused(`options\\.timeout is not .*; known: ${known}$`))
      await assert.rejects(call('soon'), refused('options must be an object'))
    }
    assert.equal(manager.state, 'ready', 'a close() that was refused closes nothing')
    // undefined is as good as absent.
    assert.equal(await lease.call('add', [1, 2], { timeout: undefined } as unknown as Any), 3)
    lease.release()
  },
)

test(
  'a signal stops a call that waits for a promise of an import, and a late promise harms nobody',
  LIMIT,
  async (t) => {
    const { manager, close, arrived, release } = await bench(t)
    close(1)
    const controller = new AbortController()
    const call = outcome(manager.call('hold', [1], { signal: controller.signal }))
    await arrived(1)
    controller.abort('stop')
    const end = await call
    assert.ok('error' in end)
    assert.equal(end.error, 'stop')
    assert.equal(await manager.call('add', [1, 2]), 3)
    release(1)
    await turns()
    assert.equal(await manager.call('hold', [2]), 2)
  },
)

test('a promise import that never settles is ended by timeoutMs, limits.timeoutMs and destroy', LIMIT, async (t) => {
  const options = { imports: { env: { entered: () => {}, hold: () => new Promise<number>(() => {}) } } }
  const manager = await managed(t, workbench, options)
  await assert.rejects(manager.call('hold', [1], { timeoutMs: 20 }), hasCode('ERR_WASM_TIMEOUT'))
  assert.equal(await manager.call('add', [1, 2]), 3)
  const limited = await managed(t, workbench, { ...options, limits: { timeoutMs: 20 } })
  await assert.rejects(limited.call('hold', [1]), hasCode('ERR_WASM_TIMEOUT'))
  assert.equal(await inTime(() => limited.call('add', [1, 2])), 3)
  const call = outcome(manager.call('hold', [1]))
  await until(() => manager.stats().inFlight === 1)
  await manager.destroy()
  const end = await call
  assert.ok('error' in end)
  hasCode('ERR_WASM_INTERRUPTED')(end.error)
})

// ---------------------------------------------------------------- the neighbours

test('the neighbours of an interrupted instance run on, and keep their state', LIMIT, async (t) => {
  const { manager, entered, close, arrived, release } = await bench(t, { instances: 3, threads: 3 })
  close(1)
  const held = manager.call('holdThenCount', [1])
  await arrived(1)
  const inside = entered()
  const stop = new AbortController()
  const spin = outcome(manager.call('spin', [], { signal: stop.signal }))
  await inside
  const burning = manager.call('burn', [30_000_000])
  stop.abort('enough')
  assert.deepEqual(await spin, { error: 'enough' })
  release(1)
  assert.equal(await held, 1)
  assert.equal(typeof (await burning), 'number')
  assert.deepEqual(manager.stats().instances.total, 3)
  assert.deepEqual(await Promise.all([1, 2, 3].map((n) => manager.call('add', [n, n]))), [2, 4, 6])
})

test('other managers of the same module and engine are not disturbed', LIMIT, async (t) => {
  const [one, two] = [await bench(t), await bench(t)]
  const burning = two.manager.call('burn', [60_000_000])
  for (let i = 0; i < 5; i += 1) {
    await assert.rejects(one.manager.call('spin', [], { timeoutMs: 15 }), hasCode('ERR_WASM_TIMEOUT'))
  }
  assert.equal(typeof (await burning), 'number')
  assert.equal(two.manager.generation, 1)
})

test('an interrupted instance is replaced before it serves again: its state is gone', LIMIT, async (t) => {
  const { manager } = await bench(t)
  manager.exports.set?.(9)
  // One that has not begun in its time changes nothing.
  let hasBegun = false
  while (!hasBegun) {
    const error = await manager.call('spin', [], { timeoutMs: 20 }).catch((error: unknown) => error)
    hasCode('ERR_WASM_TIMEOUT')(error)
    hasBegun = !/still waiting/.test((error as Error).message)
  }
  assert.equal(await manager.call('peek'), 0)
  assert.equal(manager.generation, 2)
  assert.equal(manager.stats().reloads.trap, 1)
})

test(
  'calls that wait behind a call that is stopped, or that traps, are served without anybody coming by',
  LIMIT,
  async (t) => {
    for (const instances of [1, 2]) {
      const { manager } = await bench(t, { instances, threads: instances })
      const ends = await Promise.all(
        [
          ...Array.from({ length: instances }, () => manager.call('spin', [], { timeoutMs: 30 })),
          manager.call('add', [1, 2]),
          manager.call('boom'),
          manager.call('boom'),
          manager.call('add', [3, 4]),
          manager.use((instance) => instance.exports.add?.(5, 6)),
        ].map(outcome),
      )
      assert.deepEqual(
        ends.slice(instances).map((end) => ('value' in end ? end.value : (end.error as WasmError).code)),
        [3, 'ERR_WASM_TRAP', 'ERR_WASM_TRAP', 7, 11],
      )
    }
  },
)

test('interrupting again and again leaves threads, mappings and memory flat', { timeout: 120_000 }, async () => {
  const ended = await child(
    `
    import { readdirSync, readFileSync } from 'node:fs'
    const measure = () => {
      const [virtual, resident] = readFileSync('/proc/self/statm', 'utf8').split(' ')
      return {
        virtual: virtual * 4096, resident: resident * 4096,
        maps: readFileSync('/proc/self/maps', 'utf8').split('\\n').length,
        threads: readdirSync('/proc/self/task').length,
      }
    }
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const rounds = async (count) => {
      for (let i = 0; i < count; i += 1) {
        await manager.call('spin', [], { timeoutMs: 1 }).then(() => { throw new Error('it ended') }, (error) => {
          if (error.code !== 'ERR_WASM_TIMEOUT') throw error
        })
        assert.equal(await manager.call('add', [i, 1]), i + 1)
      }
    }
    await rounds(50)
    const before = measure()
    await rounds(300)
    await new Promise((resolve) => setTimeout(resolve, 50))
    const after = measure()
    report(Object.fromEntries(Object.keys(before).map((key) => [key, after[key] - before[key]])))
    `,
    { env: { WORKBENCH: workbench } },
  )
  const grown = reported<{ virtual: number; resident: number; maps: number; threads: number }>(ended)
  assert.ok(grown.virtual < 9 * 2 ** 30, `${grown.virtual} bytes more address space`)
  assert.ok(grown.resident < 32 * 2 ** 20, `${grown.resident} bytes more resident memory`)
  assert.ok(grown.maps < 60, `${grown.maps} more mappings`)
  assert.ok(grown.threads <= 2, `${grown.threads} more threads`)
})

test('destroy stops endless loops in every replica, with calls still waiting', LIMIT, async (t) => {
  const { manager } = await endless(t, { instances: 2, threads: 2 })
  const calls = Array.from({ length: 6 }, () => outcome(manager.call('empty')))
  await until(() => manager.stats().inFlight === 2)
  await manager.destroy()
  const codes = (await Promise.all(calls)).map((end) => ('error' in end ? (end.error as WasmError).code : 'value'))
  assert.deepEqual(codes.sort(), [
    'ERR_WASM_CLOSED',
    'ERR_WASM_CLOSED',
    'ERR_WASM_CLOSED',
    'ERR_WASM_CLOSED',
    'ERR_WASM_INTERRUPTED',
    'ERR_WASM_INTERRUPTED',
  ])
})

test('recursion without end is a stack-overflow trap, on both paths, and the manager serves on', LIMIT, async (t) => {
  const source = wat(`(module
    (func $deep (export "deep") (param i32) (result i32)
      (i32.add (call $deep (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))
    (func (export "ok") (result i32) (i32.const 1)))`)
  const manager = await managed(t, source)
  const overflow = (error: unknown) => {
    hasCode('ERR_WASM_TRAP')(error)
    assert.equal((error as WasmError).trap, 'stack-overflow')
    return true
  }
  for (let i = 0; i < 3; i += 1) {
    await assert.rejects(manager.call('deep', [0]), overflow)
    assert.throws(() => manager.exports.deep?.(0), overflow)
    await manager.use(async (instance) => assert.throws(() => instance.exports.deep?.(0), overflow))
    assert.equal(await manager.call('ok'), 1)
  }
})

for (const where of ['main', 'worker'] as const) {
  test(
    `a guest that recurses without end when JavaScript has used up the stack of its ${where} thread does not crash the process`,
    LIMIT,
    async () => {
      const body = `
      const manager = WasmModuleManager.createSync(process.env.DEEP, { cache: false })
      let deepest = 0
      const measure = (n) => { deepest = n; measure(n + 1) }
      try { measure(0) } catch {}
      const seen = new Set()
      const dive = (n, at) => {
        if (n < at) return dive(n + 1, at) + 1
        try { manager.exports.deep(0) } catch (error) { seen.add(error.code ?? error.name) }
        return 0
      }
      for (const share of [0.1, 0.5, 0.8, 0.9, 0.95]) {
        try { dive(0, Math.floor(deepest * share)) } catch (error) { seen.add(error.code ?? error.name) }
      }
      const result = [...seen].sort()
      assert.equal(manager.exports.ok(), 1)
    `
      const program =
        where === 'main'
          ? `${body}; report(result)`
          : `
          import { Worker } from 'node:worker_threads'
          const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(process.env.BODY)))
          worker.on('message', (result) => report(result))
          worker.on('error', (error) => { throw error })
        `
      const prologue = `import assert from 'node:assert/strict'; import { parentPort } from 'node:worker_threads'
      import { WasmModuleManager } from ${JSON.stringify(new URL('../index.js', import.meta.url).href)};`
      const ended = await child(program, {
        env: { DEEP, BODY: `${prologue}${body}; parentPort.postMessage(result)` },
      })
      const seen = reported<string[]>(ended)
      for (const how of seen) assert.ok(['ERR_WASM_TRAP', 'RangeError'].includes(how), how)
      assert.ok(seen.length > 0)
    },
  )
}

const DEEP = wat(`(module
  (func $deep (export "deep") (param i32) (result i32)
    (i32.add (call $deep (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))
  (func (export "ok") (result i32) (i32.const 1)))`)

test('limits.stackBytes bounds the depth: twice the bytes, about twice the depth', LIMIT, async (t) => {
  const source = wat(`(module
    (import "env" "at" (func $at (param i32)))
    (func $deep (export "deep") (param i32) (result i32)
      (if (i32.eqz (i32.rem_u (local.get 0) (i32.const 64))) (then (call $at (local.get 0))))
      (i32.add (call $deep (i32.add (local.get 0) (i32.const 1))) (i32.const 1))))`)
  const depthOf = async (stackBytes: number) => {
    let deepest = 0
    const at = (depth: number) => {
      deepest = Math.max(deepest, depth)
    }
    const imports = { env: { at } }
    const manager = managedSync(t, source, { imports, limits: { stackBytes } })
    assert.throws(
      () => manager.exports.deep?.(0),
      (error: unknown) => error instanceof Error,
    )
    return deepest
  }
  const [small, large] = [await depthOf(128 << 10), await depthOf(512 << 10)]
  assert.ok(large > 2.5 * small && large < 6 * small, `${small} and ${large}`)
})

test('a loop in the start function is stopped by limits.timeoutMs', LIMIT, async () => {
  const source = wat('(module (memory 1) (func $s (loop (br 0))) (start $s))')
  const end = await outcome(WasmModuleManager.create(source, { cache: false, limits: { timeoutMs: 50 } }))
  assert.ok('error' in end)
  hasCode('ERR_WASM_TIMEOUT')(end.error)
  assert.throws(
    () => WasmModuleManager.createSync(source, { cache: false, limits: { timeoutMs: 50 } }),
    hasCode('ERR_WASM_TIMEOUT'),
  )
})

test('an endless loop in a hook is stopped by limits.timeoutMs, and the reload rolls back', LIMIT, async (t) => {
  let isArmed = false
  const { manager } = await bench(t, {
    limits: { timeoutMs: 50 },
    saveState: async (instance) => {
      if (isArmed) await instance.call('spin')
    },
  })
  isArmed = true
  const end = await outcome(manager.reload())
  assert.ok('error' in end)
  hasCode('ERR_WASM_RELOAD_FAILED')(end.error)
  hasCode('ERR_WASM_TIMEOUT')((end.error as WasmError).cause)
  isArmed = false
  assert.equal(await inTime(() => manager.call('add', [1, 2])), 3)
})

test('destroy ends a hook that waits for ever, or loops in the guest', LIMIT, async () => {
  for (const saveState of [
    () => new Promise(() => {}),
    async (instance: { call(name: string): Promise<unknown> }) => await instance.call('spin'),
  ]) {
    let began = false
    const manager = await WasmModuleManager.create(workbench, {
      cache: false,
      imports: idleImports,
      saveState: (instance) => {
        began = true
        return saveState(instance)
      },
    })
    const reload = outcome(manager.reload())
    await until(() => began)
    await manager.destroy()
    const end = await reload
    assert.ok('error' in end)
    hasCode('ERR_WASM_CLOSED')(end.error)
  }
})

test('invoke is stopped like any call', LIMIT, async (t) => {
  const manager = await managed(t, buffers)
  await assert.rejects(manager.invoke('spin', new Uint8Array(3), { timeoutMs: 20 }), hasCode('ERR_WASM_TIMEOUT'))
  const controller = new AbortController()
  const call = outcome(manager.invoke('spin', new Uint8Array(3), { signal: controller.signal }))
  await until(() => manager.stats().inFlight === 1)
  controller.abort('enough')
  const end = await call
  assert.ok('error' in end)
  assert.equal(end.error, 'enough')
  assert.deepEqual(await manager.invoke('reverse', Uint8Array.of(1, 2, 3)), Uint8Array.of(3, 2, 1))
})

test('an import that calls back into the guest is no shelter: the nested loop is stopped as well', LIMIT, async (t) => {
  const source = wat(`(module
    (import "env" "again" (func $again))
    (func (export "spin") (loop (br 0)))
    (func (export "run") (call $again))
    (func (export "ok") (result i32) (i32.const 1)))`)
  const manager: WasmModuleManager = await managed(t, source, {
    imports: (instance) => ({ env: { again: () => instance.exports.spin?.() } }),
  })
  await assert.rejects(manager.call('run', [], { timeoutMs: 40 }), hasCode('ERR_WASM_TIMEOUT'))
  assert.equal(await manager.call('ok'), 1)
  const limited: WasmModuleManager = await managed(t, source, {
    limits: { timeoutMs: 40 },
    imports: (instance) => ({ env: { again: () => instance.exports.spin?.() } }),
  })
  assert.throws(() => limited.exports.run?.(), hasCode('ERR_WASM_TIMEOUT'))
  await assert.rejects(limited.call('run'), hasCode('ERR_WASM_TIMEOUT'))
  assert.equal(await inTime(async () => limited.exports.ok?.()), 1)
})

test('other work of the event loop goes on while a guest spins on the pool', LIMIT, async (t) => {
  const { manager, entered } = await bench(t)
  const inside = entered()
  const stop = new AbortController()
  const spin = outcome(manager.call('spin', [], { signal: stop.signal }))
  await inside
  let ticks = 0
  const counting = (async () => {
    for (; ticks < 20; ticks += 1) await new Promise((resolve) => setImmediate(resolve))
  })()
  await counting
  assert.equal(ticks, 20)
  stop.abort('enough')
  assert.deepEqual(await spin, { error: 'enough' })
})

for (const [what, text] of [
  ['without a memory', '(func (export "spin") (loop (br 0)))'],
  [
    'with a 64-bit memory',
    '(memory i64 1) (func (export "spin") (loop (i64.store (i64.const 0) (i64.const 1)) (br 0)))',
  ],
  [
    'with two memories',
    '(memory 1) (memory 1) (func (export "spin") (loop (i32.store 1 (i32.const 0) (i32.const 1)) (br 0)))',
  ],
  [
    'with a shared memory',
    '(memory 1 1 shared) (func (export "spin") (loop (drop (i32.atomic.rmw.add (i32.const 0) (i32.const 1))) (br 0)))',
  ],
  ['with an empty memory', '(memory 0) (func (export "spin") (loop (br 0)))'],
  [
    'with a loop that takes and gives values',
    '(func (export "spin") (i32.const 0) (loop (param i32) (i32.const 1) (i32.add) (br 0)))',
  ],
  ['with a loop in a loop in dead code', '(func (export "spin") (loop (br 0) (loop (br 0))))'],
  [
    'with exceptions thrown round and round',
    '(tag $e) (func (export "spin") (loop $again (block $caught (try_table (catch $e $caught) (throw $e))) (br $again)))',
  ],
] as const) {
  test(`a guest ${what} is stopped, and its neighbour in the same module runs on`, LIMIT, async (t) => {
    const source = wat(`(module ${text} (func (export "ok") (result i32) (i32.const 1)))`)
    const manager = await managed(t, source, { instances: 2, threads: 2, engine: { threads: true } })
    for (let round = 0; round < 3; round += 1) {
      const spin = outcome(manager.call('spin', [], { timeoutMs: 15 }))
      assert.equal(await manager.call('ok'), 1)
      const end = await spin
      assert.ok('error' in end)
      hasCode('ERR_WASM_TIMEOUT')(end.error)
    }
    assert.deepEqual(await Promise.all([manager.call('ok'), manager.call('ok')]), [1, 1])
  })
}
