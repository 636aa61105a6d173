// Engine options and limits: each one has an effect that can be seen.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { EngineOptions, ManagerOptions } from '../index.js'
import { wat, workbench } from './guests.ts'
import {
  barrier,
  child,
  hasCode,
  idleImports,
  LIMIT,
  littleSpace,
  managed,
  managedSync,
  outcome,
  reported,
  WasmModuleManager,
} from './support.ts'

const PAGE = 65_536

/** Runs long, then says so: proves whether the guest ran to its end. */
const LONG = wat(`(module
  (import "env" "done" (func $done))
  (func (export "long") (param i32) (local $x i32)
    (loop
      (local.set $x (i32.add (i32.mul (local.get $x) (i32.const 1664525)) (local.get 0)))
      (local.set 0 (i32.sub (local.get 0) (i32.const 1)))
      (br_if 0 (local.get 0)))
    (if (i32.eq (local.get $x) (i32.const 12345)) (then (unreachable)))
    (call $done))
  (func (export "spin") (loop (br 0)))
  (func (export "ok") (result i32) (i32.const 1)))`)

test('interruptible: false lets running code run to its end, whatever the timeout; true does not', LIMIT, async (t) => {
  for (const interruptible of [false, true]) {
    let done = 0
    const manager = await managed(t, LONG, {
      engine: { interruptible },
      imports: {
        env: {
          done: () => {
            done += 1
          },
        },
      },
    })
    const attempt = () => outcome(manager.call('long', [400_000_000], { timeoutMs: 10 }))
    let end = await attempt()
    // On a busy machine the time may be over before a thread has taken the call.
    while ('error' in end && /still waiting/.test(String(end.error))) end = await attempt()
    if (interruptible) {
      assert.ok('error' in end)
      hasCode('ERR_WASM_TIMEOUT')(end.error)
    }
    assert.equal(done, interruptible ? 0 : 1, `interruptible: ${interruptible}`)
    assert.equal(await manager.call('ok'), 1)
  }
})

test('interruptible: false still stops what waits: in the queue, and for a promise', LIMIT, async (t) => {
  const manager = await managed(t, workbench, {
    engine: { interruptible: false },
    imports: { env: { entered: () => {}, hold: () => new Promise(() => {}) } },
  })
  const stop = new AbortController()
  const held = outcome(manager.call('hold', [1], { signal: stop.signal }))
  await assert.rejects(manager.call('add', [1, 2], { timeoutMs: 10 }), hasCode('ERR_WASM_TIMEOUT'))
  stop.abort('enough')
  assert.deepEqual(await held, { error: 'enough' })
  const end = await outcome(manager.call('hold', [1], { timeoutMs: 20 }))
  assert.ok('error' in end)
  hasCode('ERR_WASM_TIMEOUT')(end.error)
  assert.equal(await manager.call('add', [1, 2]), 3)
})

test(
  'fuel: a call that uses up limits.fuel ends with ERR_WASM_OUT_OF_FUEL, every call begins with a full tank',
  LIMIT,
  async (t) => {
    const options: ManagerOptions = {
      engine: { fuel: true },
      limits: { fuel: 10_000 },
      imports: { env: { done: () => {} } },
    }
    for (const manager of [await managed(t, LONG, options), managedSync(t, LONG, options)]) {
      for (let i = 0; i < 3; i += 1) {
        await assert.rejects(manager.call('spin'), hasCode('ERR_WASM_OUT_OF_FUEL', /limits\.fuel = 10000/))
        assert.throws(() => manager.exports.spin?.(), hasCode('ERR_WASM_OUT_OF_FUEL'))
      }
      for (let i = 0; i < 50; i += 1) {
        assert.equal(await manager.call('long', [500]), undefined)
        assert.equal(manager.exports.long?.(500), undefined)
      }
      await assert.rejects(manager.call('long', [100_000]), hasCode('ERR_WASM_OUT_OF_FUEL'))
    }
  },
)

test('fuel without a limit is no limit', LIMIT, async (t) => {
  const manager = await managed(t, LONG, { engine: { fuel: true }, imports: { env: { done: () => {} } } })
  assert.equal(manager.exports.long?.(3_000_000), undefined)
  assert.equal(await manager.call('long', [3_000_000]), undefined)
})

test('the same work takes the same fuel: the bound is exact to the unit', LIMIT, async (t) => {
  const ends = async (fuel: number) => {
    const manager = managedSync(t, LONG, {
      engine: { fuel: true },
      limits: { fuel },
      imports: { env: { done: () => {} } },
    })
    const here = await outcome((async () => manager.exports.long?.(1000))())
    const there = await outcome(manager.call('long', [1000]))
    assert.equal('error' in here, 'error' in there)
    return 'error' in here
  }
  let [low, high] = [1, 1_000_000]
  assert.equal(await ends(high), false)
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2)
    if (await ends(middle)) low = middle
    else high = middle
  }
  assert.ok(low > 1000, `${low} units for a thousand rounds`)
  assert.deepEqual([await ends(low), await ends(high)], [true, false])
})

/** SIGILL is caught by nobody but us and Bun, which reports its crashes: V8 has no use for it. */
const SIGNALS = `
  import { readFileSync } from 'node:fs'
  const caught = () => BigInt('0x' + /SigCgt:\\s*(\\w+)/.exec(readFileSync('/proc/self/status', 'utf8'))[1])
  const catches = (signal) => (caught() >> BigInt(signal - 1) & 1n) === 1n
  const SIGILL = 4
`

for (const signalsBasedTraps of [true, false]) {
  test(
    `signalsBasedTraps: ${signalsBasedTraps} ${signalsBasedTraps ? 'installs' : 'leaves alone the'} signal handlers, and every trap is a trap`,
    LIMIT,
    async () => {
      const ended = await child(
        `${SIGNALS}
      const before = catches(SIGILL)
      const manager = await WasmModuleManager.create(process.env.TRAPS, {
        cache: false, engine: { signalsBasedTraps: ${signalsBasedTraps} },
      })
      const kinds = []
      for (const [name, ...args] of [['load', -4], ['load', 65536], ['divide', 0], ['trap'], ['deep'], ['overflow'], ['load64', 65529]]) {
        try { kinds.push(manager.exports[name](...args)) } catch (error) { kinds.push(error.trap ?? String(error)) }
        await manager.call(name, args).then((value) => kinds.push(value), (error) => kinds.push(error.trap ?? String(error)))
      }
      const ok = [manager.exports.load(65532), await manager.call('divide', [5])]
      await manager.call('spin', [], { timeoutMs: 20 }).catch((error) => ok.push(error.code))
      manager.exports.grow(2)
      ok.push(manager.exports.load(65536))
      report({ kinds, ok, sigill: catches(SIGILL), before })
      `,
        {
          env: {
            TRAPS: wat(`(module
            (memory 1 10)
            (func (export "load") (param i32) (result i32) (i32.load (local.get 0)))
            (func (export "load64") (param i32) (result i64) (i64.load (local.get 0)))
            (func (export "divide") (param i32) (result i32) (i32.div_u (i32.const 10) (local.get 0)))
            (func (export "overflow") (result i32) (i32.div_s (i32.const 0x80000000) (i32.const -1)))
            (func (export "trap") unreachable)
            (func (export "spin") (loop (br 0)))
            (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
            (func $deep (export "deep") (result i32) (i32.add (call $deep) (i32.const 1))))`),
          },
        },
      )
      const { kinds, ok, sigill, before } = reported<{
        kinds: string[]
        ok: unknown[]
        sigill: boolean
        before: boolean
      }>(ended)
      const twice = (kind: string) => [kind, kind]
      assert.deepEqual(kinds, [
        ...twice('out-of-bounds-memory'),
        ...twice('out-of-bounds-memory'),
        ...twice('integer-divide-by-zero'),
        ...twice('unreachable'),
        ...twice('stack-overflow'),
        ...twice('integer-overflow'),
        ...twice('out-of-bounds-memory'),
      ])
      assert.deepEqual(ok, [0, 2, 'ERR_WASM_TIMEOUT', 0])
      assert.equal(sigill, signalsBasedTraps || before)
    },
  )
}

test(
  "the process' own SIGSEGV protection is left alone with signalsBasedTraps: false, V8's traps work beside it",
  LIMIT,
  async () => {
    const ended = await child(
      `
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, engine: { signalsBasedTraps: false }, imports: { env: { entered() {}, hold: (k) => k } },
    })
    const bytes = Uint8Array.from([0,97,115,109,1,0,0,0,1,6,1,96,1,127,1,127,3,2,1,0,5,3,1,0,1,7,5,1,1,108,0,0,10,9,1,7,0,32,0,40,2,0,11])
    const { l } = new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports
    const seen = []
    for (let i = 0; i < 10; i += 1) {
      try { l(-8) } catch (error) { seen.push(error instanceof WebAssembly.RuntimeError) }
      try { manager.exports.load(-8) } catch (error) { seen.push(error.trap) }
    }
    report(seen)
    `,
      { env: { WORKBENCH: workbench } },
    )
    assert.deepEqual(reported(ended), Array.from({ length: 10 }, () => [true, 'out-of-bounds-memory']).flat())
  },
)

const FEATURES: [keyof EngineOptions, string, number][] = [
  [
    'simd',
    `(module (func (export "f") (result i32)
      (i32x4.extract_lane 2 (i32x4.add (v128.const i32x4 1 2 3 4) (v128.const i32x4 10 20 30 40)))))`,
    33,
  ],
  [
    'relaxedSimd',
    `(module (func (export "f") (result i32)
      (i8x16.extract_lane_u 0 (i8x16.relaxed_swizzle (v128.const i64x2 0x0102030405060708 0) (v128.const i64x2 3 0)))))`,
    5,
  ],
  [
    'threads',
    `(module (memory 1 1) (func (export "f") (result i32)
      (i32.atomic.store (i32.const 0) (i32.const 40))
      (drop (i32.atomic.rmw.add (i32.const 0) (i32.const 2)))
      (i32.atomic.load (i32.const 0))))`,
    42,
  ],
]

for (const [feature, text, expected] of FEATURES) {
  const byDefault = feature !== 'threads'
  const usual = byDefault ? 'on' : 'off'
  test(
    `${feature} is ${usual} by default; on it works, off it refuses the module with the option to set`,
    LIMIT,
    async (t) => {
      const source = wat(text)
      for (const engine of byDefault ? [{}, { [feature]: true }] : [{ [feature]: true }]) {
        const manager = await managed(t, source, { engine })
        assert.equal(manager.exports.f?.(), expected)
        assert.equal(await manager.call('f'), expected)
      }
      for (const engine of byDefault ? [{ [feature]: false }] : [{}, { [feature]: false }]) {
        await assert.rejects(
          WasmModuleManager.create(source, { cache: false, engine }),
          hasCode('ERR_WASM_COMPILE', new RegExp(`engine\\.${feature}: true`)),
        )
      }
      // What does not use it is not disturbed.
      const plain = await managed(t, workbench, { imports: idleImports, engine: { [feature]: false } })
      assert.equal(plain.exports.add?.(1, 2), 3)
    },
  )
}

test('shared memories work with threads on: the module sees its own', LIMIT, async (t) => {
  const source = wat(`(module
    (memory (export "memory") 1 3 shared)
    (func (export "add") (param i32) (result i32) (i32.atomic.rmw.add (i32.const 8) (local.get 0)))
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "size") (result i32) (memory.size)))`)
  const manager = await managed(t, source, { engine: { threads: true } })
  assert.equal(manager.exports.add?.(5), 0)
  assert.equal(await manager.call('add', [1]), 5)
  assert.equal(manager.exports.grow?.(1), 1)
  assert.equal(manager.exports.grow?.(9), -1)
  assert.equal(manager.exports.size?.(), 2)
  manager.reloadSync()
  assert.equal(manager.exports.size?.(), 1)
})

test(
  'memoryReservationBytes: the address space per memory follows it, and the guest grows as before',
  LIMIT,
  async () => {
    const measure = async (bytes: number | undefined) => {
      const ended = await child(
        `
      import { readFileSync } from 'node:fs'
      const virtual = () => Number(readFileSync('/proc/self/statm', 'utf8').split(' ')[0]) * 4096
      const before = virtual()
      const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
        cache: false, instances: 4, imports: { env: { entered() {}, hold: (k) => k } },
        engine: ${bytes === undefined ? '{}' : `{ memoryReservationBytes: ${bytes} }`},
      })
      const used = virtual() - before
      const results = [manager.exports.add(1, 2), manager.exports.grow(15), manager.memory.byteLength]
      manager.exports.store(16 * 65536 - 1, 7)
      results.push(manager.exports.load(16 * 65536 - 1))
      try { manager.exports.load(16 * 65536) } catch (error) { results.push(error.trap) }
      await manager.call('spin', [], { timeoutMs: 20 }).catch((error) => results.push(error.code))
      report({ used, results })
      `,
        { env: { WORKBENCH: workbench } },
      )
      return reported<{ used: number; results: unknown[] }>(ended)
    }
    const [full, small] = [await measure(undefined), await measure(16 * 2 ** 20)]
    assert.ok(full.used > 4 * 4 * 2 ** 30, `${full.used} bytes for four memories by default`)
    assert.ok(small.used < 2 * 2 ** 30, `${small.used} bytes for four memories of 16 MiB`)
    for (const { results } of [full, small]) {
      assert.deepEqual(results, [3, 1, 16 * PAGE, 7, 'out-of-bounds-memory', 'ERR_WASM_TIMEOUT'])
    }
  },
)

test(
  'a module runs where virtual memory is capped, with a small reservation; without, it is refused and not killed',
  LIMIT,
  async () => {
    // Room for memories of the default size, but not for three of them.
    const space = await littleSpace()
    const run = (engine: string) =>
      child(
        `
      try {
        const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
          cache: false, instances: 3, imports: { env: { entered() {}, hold: (k) => k } }, engine: ${engine},
        })
        report(['runs', manager.exports.add(1, 2), manager.exports.grow(3)])
      } catch (error) { report([error.code, error.message]) }
      `,
        { env: { WORKBENCH: workbench }, ...space },
      )
    assert.deepEqual(reported(await run('{ memoryReservationBytes: 1 << 20 }')), ['runs', 3, 1])
    const [code, message] = reported<[string, string]>(await run('{}'))
    assert.match(code, /^ERR_WASM_/)
    assert.notEqual(code, 'ERR_WASM_INTERNAL', message)
    assert.match(message, /memory/i)
  },
)

test(
  'limits.memoryBytes holds for every memory of an instance, for imported ones and for a growth on any path',
  LIMIT,
  async (t) => {
    const source = wat(`(module
    (import "env" "m" (memory $i 1 100))
    (memory $d (export "memory") 1 100)
    (func (export "growImported") (param i32) (result i32) (memory.grow $i (local.get 0)))
    (func (export "growDefined") (param i32) (result i32) (memory.grow $d (local.get 0))))`)
    const manager = await managed(t, source, {
      imports: { env: { m: { initial: 1, maximum: 100 } } },
      limits: { memoryBytes: 3 * PAGE },
    })
    for (const name of ['growImported', 'growDefined']) {
      assert.equal(manager.exports[name]?.(2), 1, name)
      assert.equal(manager.exports[name]?.(1), -1, name)
      assert.equal(await manager.call(name, [1]), -1, name)
    }
  },
)

test('limits.tableElements makes table.grow fail beyond it', LIMIT, async (t) => {
  const source = wat(`(module
    (table 2 1000 externref)
    (func (export "grow") (param i32) (result i32) (table.grow (ref.null extern) (local.get 0)))
    (func (export "size") (result i32) (table.size)))`)
  const manager = await managed(t, source, { limits: { tableElements: 10 } })
  assert.equal(manager.exports.grow?.(8), 2)
  assert.equal(manager.exports.grow?.(1), -1)
  assert.equal(manager.exports.size?.(), 10)
})

test('limits.stackBytes: deeper stacks for those who ask', LIMIT, async (t) => {
  const source = wat(`(module
    (func $deep (export "deep") (param i32) (result i32)
      (if (result i32) (local.get 0)
        (then (i32.add (call $deep (i32.sub (local.get 0) (i32.const 1))) (i32.const 1)))
        (else (i32.const 0)))))`)
  const depth = 20_000
  const small = await managed(t, source, { limits: { stackBytes: 128 << 10 } })
  await assert.rejects(small.call('deep', [depth]), (error: unknown) => {
    hasCode('ERR_WASM_TRAP')(error)
    assert.equal((error as { trap?: string }).trap, 'stack-overflow')
    return true
  })
  const large = await managed(t, source, { limits: { stackBytes: 2 << 20 } })
  assert.equal(await large.call('deep', [depth]), depth)
})

test('limits.stackBytes outside its range is refused with the range', LIMIT, async () => {
  for (const stackBytes of [1, 1000, 2 ** 40]) {
    await assert.rejects(
      WasmModuleManager.create(workbench, { cache: false, imports: idleImports, limits: { stackBytes } }),
      hasCode('ERR_WASM_INVALID_ARGUMENT', /stackBytes.*between/),
    )
  }
})

test('managers with different engines live side by side and call each other', LIMIT, async (t) => {
  const engines: EngineOptions[] = [
    {},
    { interruptible: false },
    { signalsBasedTraps: false },
    { fuel: true },
    { simd: false },
    { memoryReservationBytes: 1 << 20 },
  ]
  const gate = barrier()
  const managers = await Promise.all(
    engines.map((engine) =>
      managed(t, workbench, { engine, imports: { env: { entered() {}, hold: () => gate.promise.then(() => 1) } } }),
    ),
  )
  const held = managers.map((manager) => manager.call('hold', [1]))
  gate.open()
  assert.deepEqual(
    await Promise.all(held),
    engines.map(() => 1),
  )
  for (const manager of managers) {
    assert.equal(manager.exports.add?.(1, 2), 3)
    assert.throws(() => manager.exports.load?.(-1), hasCode('ERR_WASM_TRAP'))
    assert.equal(await manager.call('add', [1, 2]), 3)
  }
})
