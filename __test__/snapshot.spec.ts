// snapshot() and reset(): in place, whole, and never silently wrong. Every test runs with both kinds of images.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import type { ManagerOptions } from '../index.js'
import { wat } from './guests.ts'
import { barrier, bench, failure, hasCode, LIMIT, managed, managedSync, outcome, WasmModuleManager } from './support.ts'

/** State of every kind: two memories, globals of each type (one hidden), tables of both kinds, an imported mutable global. */
const state = wat(
  `(module
    (import "env" "base" (global $base (mut i32)))
    (import "env" "memory" (memory $imported 1 10))
    (memory $own (export "memory") 2 100)
    (global $i (mut i32) (i32.const 1))
    (global $l (mut i64) (i64.const 2))
    (global $f (mut f32) (f32.const 3))
    (global $d (mut f64) (f64.const 4))
    (global $v (mut v128) (v128.const i64x2 5 6))
    (table $refs 2 1000 externref)
    (table $funcs 4 funcref)
    (elem (table $funcs) (i32.const 0) func $one $two)
    (elem declare func $three)
    (type $fi (func (result i32)))
    (func $one (result i32) (i32.const 1))
    (func $two (result i32) (i32.const 2))
    (func $three (result i32) (i32.const 3))
    (func (export "poke") (param i32 i32) (i32.store8 $own (local.get 0) (local.get 1)))
    (func (export "peek") (param i32) (result i32) (i32.load8_u $own (local.get 0)))
    (func (export "pokeImported") (param i32 i32) (i32.store8 $imported (local.get 0) (local.get 1)))
    (func (export "peekImported") (param i32) (result i32) (i32.load8_u $imported (local.get 0)))
    (func (export "grow") (param i32) (result i32) (memory.grow $own (local.get 0)))
    (func (export "growImported") (param i32) (result i32) (memory.grow $imported (local.get 0)))
    (func (export "sizes") (result i32 i32) (memory.size $imported) (memory.size $own))
    (func (export "setGlobals") (param i32)
      (global.set $base (local.get 0)) (global.set $i (local.get 0)) (global.set $l (i64.extend_i32_s (local.get 0)))
      (global.set $f (f32.convert_i32_s (local.get 0))) (global.set $d (f64.convert_i32_s (local.get 0)))
      (global.set $v (i32x4.splat (local.get 0))))
    (func (export "globals") (result i32 i32 i64 f32 f64 i32)
      (global.get $base) (global.get $i) (global.get $l) (global.get $f) (global.get $d)
      (i32x4.extract_lane 0 (global.get $v)))
    (func (export "setRef") (param i32 externref) (table.set $refs (local.get 0) (local.get 1)))
    (func (export "getRef") (param i32) (result externref) (table.get $refs (local.get 0)))
    (func (export "growRefs") (param i32 externref) (result i32) (table.grow $refs (local.get 1) (local.get 0)))
    (func (export "refs") (result i32) (table.size $refs))
    (func (export "setFunc") (param i32) (table.set $funcs (local.get 0) (ref.func $three)))
    (func (export "apply") (param i32) (result i32) (call_indirect $funcs (type $fi) (local.get 0)))
    (func (export "trap") (i32.store8 $own (i32.const 0) (i32.const 255)) (unreachable)))`,
  'state',
)

const imports = { env: { base: 10, memory: { initial: 1, maximum: 10 } } }

const leaky = wat(
  `(module
    (memory (export "memory") 1 4096)
    (global $count (mut i32) (i32.const 0))
    (func (export "leak") (param $pages i32) (result i32) (local $at i32) (local $end i32)
      (local.set $at (i32.mul (memory.size) (i32.const 65536)))
      (drop (memory.grow (local.get $pages)))
      (local.set $end (i32.mul (memory.size) (i32.const 65536)))
      (block $done (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
        (i32.store (local.get $at) (i32.const 7))
        (local.set $at (i32.add (local.get $at) (i32.const 4096)))
        (br $next)))
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (global.get $count))
    (func (export "count") (result i32) (global.get $count))
    (func (export "size") (result i32) (memory.size))
    (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
    (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "trap") (unreachable))
    (func (export "spin") (loop (br 0))))`,
  'leaky',
)

const KINDS: [string, ManagerOptions][] = [
  ['copy-on-write', { snapshots: { images: 'copy-on-write' } }],
  ['copy-on-write, prepared', { snapshots: { images: 'copy-on-write', prepare: true } }],
  ['copy', { snapshots: { images: 'copy' } }],
]

for (const [kind, options] of KINDS) {
  describe(`snapshot and reset (${kind})`, LIMIT, () => {
    test('a reset puts back everything that an instance holds', async (t) => {
      const manager = await managed(t, state, { imports, ...options })
      const { exports } = manager
      const objects = [{ a: 1 }, { b: 2 }]
      exports.poke?.(100, 42)
      exports.pokeImported?.(200, 43)
      exports.grow?.(3)
      exports.setGlobals?.(7)
      exports.setRef?.(0, objects[0])
      assert.equal(exports.growRefs?.(3, objects[1]), 2)
      exports.setFunc?.(2)
      const look = () => ({
        bytes: [exports.peek?.(100), exports.peekImported?.(200), exports.peek?.(4 * 65536)],
        sizes: exports.sizes?.(),
        globals: exports.globals?.(),
        refs: Array.from({ length: exports.refs?.() as number }, (_, i) => exports.getRef?.(i)),
        funcs: [exports.apply?.(0), exports.apply?.(1), exports.apply?.(2)],
      })
      const before = look()
      const snapshot = await manager.snapshot()
      assert.deepEqual(look(), before, 'a snapshot changes nothing')
      assert.equal(snapshot.memoryBytes, 6 * 65536)
      assert.equal(snapshot.generation, 1)
      assert.ok(snapshot.residentBytes > 0)

      exports.poke?.(100, 1)
      exports.poke?.(4 * 65536, 1)
      exports.pokeImported?.(200, 1)
      exports.grow?.(10)
      exports.growImported?.(4)
      exports.poke?.(14 * 65536, 1)
      exports.setGlobals?.(-3)
      exports.setRef?.(0, null)
      exports.setRef?.(1, { c: 3 })
      exports.growRefs?.(5, objects[0])
      exports.setFunc?.(0)
      const report = await manager.reset()
      assert.deepEqual(look(), before)
      assert.equal(exports.getRef?.(0), objects[0], 'the very object')
      assert.equal(report.generation, 1)
      assert.equal(report.memoryBytesBefore, (5 + 15) * 65536)
      assert.equal(report.memoryBytesAfter, 6 * 65536)
      assert.ok(report.dirtyBytes >= 4 * 4096, `${report.dirtyBytes} dirty bytes`)
      assert.equal(manager.generation, 1)
      assert.equal(manager.stats().resets, 1)

      // What is beyond is gone, and comes back as zeros.
      assert.throws(() => exports.peek?.(5 * 65536), hasCode('ERR_WASM_TRAP', /out of bounds/))
      await manager.reset()
      assert.throws(() => exports.getRef?.(5), hasCode('ERR_WASM_TRAP', /table/))
      await manager.reset()
      assert.equal(exports.grow?.(10), 5)
      assert.equal(exports.peek?.(14 * 65536), 0)
      assert.equal(exports.growRefs?.(2, objects[1]), 5, 'a table grows from where it was')
      assert.equal(exports.getRef?.(6), objects[1])
    })

    test('resetSync does the same without leaving the thread', (t) => {
      const manager = managedSync(t, leaky, options)
      const { exports } = manager
      const taken = manager.snapshotSync()
      assert.equal(taken.memoryBytes, 65536)
      for (let i = 0; i < 50; i++) {
        assert.equal(exports.leak?.(4), 1)
        assert.equal(exports.size?.(), 5)
        const report = manager.resetSync()
        assert.deepEqual([exports.size?.(), exports.count?.()], [1, 0])
        assert.ok(report.dirtyBytes >= 4 * 65536, `${report.dirtyBytes}`)
      }
      assert.equal(manager.memory.byteLength, 65536)
    })

    test('the buffer is detached by a reset, even where the size stays', async (t) => {
      const manager = await managed(t, leaky, options)
      await manager.snapshot()
      const before = manager.memory.buffer
      new Uint8Array(before)[10] = 99
      await manager.reset()
      assert.equal(before.byteLength, 0)
      assert.equal(new Uint8Array(manager.memory.buffer)[10], 0)
      const again = manager.memory.buffer
      manager.resetSync()
      assert.equal(again.byteLength, 0)
      const moved = structuredClone(manager.memory.buffer, { transfer: [] })
      assert.equal(moved.byteLength, 65536)
    })

    test('a view that was moved away reads on, and sees nothing of what comes after', async (t) => {
      const manager = await managed(t, leaky, options)
      await manager.snapshot()
      manager.exports.grow?.(20)
      // biome-ignore lint/suspicious/noExplicitAny: not in the types of Node 20
      const buffer = manager.memory.buffer as any
      if (typeof buffer.transfer !== 'function') return
      const kept = new Uint8Array(buffer.transfer())
      kept[15 * 65536] = 1
      manager.resetSync()
      await manager.reset()
      manager.exports.store?.(100, 77)
      assert.notEqual(kept[100], 77)
      kept[100] = 5
      kept[15 * 65536] = 2
      assert.equal(manager.exports.load?.(100), 77)
    })

    test('several snapshots are alive at once, and each can be gone back to', async (t) => {
      const manager = await managed(t, leaky, options)
      const { exports } = manager
      const taken = []
      for (let i = 0; i < 6; i++) {
        exports.store?.(5000 * i, i + 1)
        exports.leak?.(1)
        taken.push(await manager.snapshot())
      }
      const look = () => [
        exports.size?.(),
        exports.count?.(),
        ...[0, 1, 2, 3, 4, 5].map((i) => exports.load?.(5000 * i)),
      ]
      const expected = (i: number) => [i + 2, i + 1, ...[1, 2, 3, 4, 5, 6].map((n) => (n <= i + 1 ? n : 0))]
      for (const i of [3, 0, 5, 1, 4, 2, 2]) {
        await manager.reset({ to: taken[i] })
        assert.deepEqual(look(), expected(i), `snapshot ${i}`)
        exports.store?.(1234, 9)
        exports.leak?.(2)
      }
      for (const i of [0, 1, 4]) taken[i]?.release()
      await manager.reset({ to: taken[2] })
      assert.deepEqual(look(), expected(2))
      await manager.reset()
      assert.deepEqual(look(), expected(5), 'the newest is the default')
      taken[5]?.release()
      await manager.reset()
      assert.deepEqual(look(), expected(3), 'then the one before it')
      await failure(manager.reset({ to: taken[4] }), 'ERR_WASM_STALE_HANDLE', /was released/)
      assert.equal(taken[4]?.residentBytes, 0)
      assert.equal(manager.stats().snapshots, 2)
    })

    test('a reload begins with the snapshot: nothing is run again', async (t) => {
      let initialized = 0
      const initialize = (instance: { exports: Record<string, (...args: number[]) => unknown> }) => {
        initialized += 1
        instance.exports.store?.(0, 1)
      }
      const manager = await managed(t, leaky, { ...options, initialize: initialize as never, instances: 2 })
      assert.equal(initialized, 2)
      manager.exports.leak?.(10)
      manager.exports.store?.(1, 2)
      await manager.snapshot()
      manager.exports.store?.(1, 3)
      for (const strategy of ['exclusive', 'rolling'] as const) {
        const report = await manager.reload({ strategy })
        assert.equal(report.memoryBytesAfter, 2 * 11 * 65536)
        const all = await Promise.all(Array.from({ length: 8 }, () => manager.call('load', [1])))
        assert.deepEqual(all, Array(8).fill(2), strategy)
        assert.equal(manager.exports.count?.(), 1)
      }
      manager.reloadSync()
      assert.equal(manager.exports.load?.(1), 2)
      assert.equal(initialized, 2)
      assert.equal(manager.generation, 4)
    })

    test('saveState and restoreState still run on top of it', async (t) => {
      const manager = await managed(t, leaky, {
        ...options,
        saveState: (instance) => instance.exports.load?.(9),
        restoreState: (instance, value) => void instance.exports.store?.(9, value),
      })
      manager.exports.store?.(8, 1)
      await manager.snapshot()
      manager.exports.store?.(9, 5)
      await manager.reload()
      assert.deepEqual([manager.exports.load?.(8), manager.exports.load?.(9)], [1, 5])
    })

    test('a trapped replica is replaced from the snapshot, and a reset puts it in order', async (t) => {
      const manager = await managed(t, leaky, options)
      manager.exports.store?.(3, 33)
      await manager.snapshot()
      await failure(manager.call('trap'), 'ERR_WASM_TRAP')
      assert.equal(await manager.call('load', [3]), 33)
      assert.throws(() => manager.exports.trap?.(), hasCode('ERR_WASM_TRAP'))
      await manager.reset()
      assert.equal(manager.exports.load?.(3), 33)
      assert.throws(() => manager.exports.trap?.(), hasCode('ERR_WASM_TRAP'))
      manager.resetSync()
      assert.equal(manager.exports.load?.(3), 33)
      assert.equal(manager.stats().instances.poisoned, 0)
    })

    test('a replacement that a reset has made needless keeps no synchronous reset away', async (t) => {
      // The replacement of the first trap ends on a thread of its own, at any moment of the reset.
      for (let round = 0; round < 15; round += 1) {
        const manager = await managed(t, leaky, options)
        await manager.snapshot()
        await failure(manager.call('trap'), 'ERR_WASM_TRAP')
        assert.equal(await manager.call('load', [3]), 0)
        for (const reset of [() => manager.reset(), () => manager.resetSync()]) {
          assert.throws(() => manager.exports.trap?.(), hasCode('ERR_WASM_TRAP'))
          await reset()
        }
        manager.destroy()
      }
    })

    test('a snapshot after a trap is of what took the place of the trapped instance', async (t) => {
      const manager = await managed(t, leaky, options)
      manager.exports.store?.(3, 33)
      assert.throws(() => manager.exports.trap?.(), hasCode('ERR_WASM_TRAP'))
      await manager.snapshot()
      assert.equal(manager.exports.load?.(3), 0)
    })

    test('all replicas go back to the snapshot of the first', async (t) => {
      const manager = await managed(t, state, { imports, ...options, instances: 3 })
      manager.exports.poke?.(1, 11)
      manager.exports.setRef?.(1, 'kept')
      manager.exports.setFunc?.(3)
      manager.exports.growRefs?.(4, 'more')
      await manager.snapshot()
      await manager.reset()
      // Three leases at once are three different instances.
      const leases = await Promise.all([manager.acquire(), manager.acquire(), manager.acquire()])
      for (const lease of leases) {
        assert.equal(lease.exports.peek?.(1), 11)
        assert.equal(lease.exports.getRef?.(1), 'kept')
        assert.equal(lease.exports.getRef?.(5), 'more')
        assert.equal(lease.exports.refs?.(), 6)
        assert.equal(lease.exports.apply?.(3), 3, 'functions are those of the instance')
        lease.release()
      }
    })

    test('under load: calls wait, none is lost, none sees a mixture', async (t) => {
      const manager = await managed(t, leaky, { ...options, instances: 2, maxQueue: 100_000 })
      await manager.snapshot()
      const calls = []
      const resets = []
      for (let i = 0; i < 2000; i++) {
        calls.push(manager.call('leak', [1]))
        if (i % 100 === 0) resets.push(i % 200 === 0 ? manager.reset() : manager.snapshot())
        if (i % 500 === 499) resets.push(manager.reload({ reason: `${i}` }))
        if (i % 50 === 0) await calls[i]
      }
      const counts = await Promise.all(calls)
      await Promise.all(resets)
      assert.equal(counts.length, 2000)
      assert.ok(counts.every((n) => Number.isInteger(n) && (n as number) > 0))
      assert.equal(manager.stats().calls.completed, 2000)
    })

    test('warm reloads under load', async (t) => {
      const manager = await managed(t, leaky, { ...options, instances: 2 })
      manager.exports.store?.(77, 7)
      await manager.snapshot()
      // The second replica has its own state until then.
      await manager.reset()
      const answers: Promise<unknown>[] = []
      for (let i = 0; i < 40; i++) {
        for (let n = 0; n < 10; n++) answers.push(manager.call('load', [77]))
        await manager.reload({ strategy: i % 2 ? 'rolling' : 'exclusive' })
      }
      assert.deepEqual(new Set(await Promise.all(answers)), new Set([7]))
    })
  })
}

describe('snapshots: refusals and waits', LIMIT, () => {
  test('a reset without a snapshot says what to do', async (t) => {
    const manager = await managed(t, leaky)
    await failure(manager.reset(), 'ERR_WASM_INVALID_ARGUMENT', /take one first, with snapshot\(\)/)
    assert.throws(() => manager.resetSync(), hasCode('ERR_WASM_INVALID_ARGUMENT'))
  })

  test('a snapshot of another manager, or no snapshot at all, is refused', async (t) => {
    const [one, other] = [await managed(t, leaky), await managed(t, leaky)]
    await one.snapshot()
    const foreign = await other.snapshot()
    await failure(one.reset({ to: foreign }), 'ERR_WASM_INVALID_ARGUMENT', /another manager/)
    for (const to of [{}, 5, null, 'x']) {
      await failure(one.reset({ to: to as never }), 'ERR_WASM_INVALID_ARGUMENT', /options\.to/)
    }
    await failure(one.reset({ too: 1 } as never), 'ERR_WASM_INVALID_ARGUMENT', /too is not an option/)
    await failure(one.snapshot({ signl: 1 } as never), 'ERR_WASM_INVALID_ARGUMENT', /signl is not an option/)
  })

  test('another build that takes over makes snapshots unusable', async (t) => {
    const manager = await managed(t, leaky, { name: 'same' })
    manager.exports.store?.(1, 1)
    const taken = await manager.snapshot()
    await manager.reload({ source: leaky })
    assert.equal(manager.exports.load?.(1), 0, 'the new build starts cold')
    await failure(manager.reset({ to: taken }), 'ERR_WASM_INCOMPATIBLE_MODULE', /another build/)
    await failure(manager.reset(), 'ERR_WASM_INVALID_ARGUMENT')
    assert.equal(manager.stats().snapshots, 0)
  })

  test('a released newest snapshot leaves reloads cold', async (t) => {
    const manager = await managed(t, leaky)
    manager.exports.store?.(1, 1)
    {
      using _taken = await manager.snapshot()
    }
    assert.equal(manager.stats().snapshots, 0)
    await manager.reload()
    assert.equal(manager.exports.load?.(1), 0)
  })

  test('shared memories are captured, reset and forked like others', async (t) => {
    const text = (memory: string) => `(module ${memory}
      (func (export "grow") (result i32) (memory.grow (i32.const 3)))
      (func (export "store") (param i32) (i32.atomic.store (i32.const 8) (local.get 0)))
      (func (export "load") (result i32) (i32.atomic.load (i32.const 8))))`
    const cases: [string, ManagerOptions][] = [
      [text('(memory (export "memory") 1 9 shared)'), {}],
      [
        text('(import "env" "memory" (memory 1 9 shared))'),
        { imports: { env: { memory: { initial: 1, maximum: 9 } } } },
      ],
    ]
    for (const [module, options] of cases) {
      const manager = await managed(t, wat(module), { ...options, engine: { threads: true } })
      const { store, load, grow } = manager.exports as Record<string, (value?: number) => number>
      store?.(5)
      await manager.snapshot()
      store?.(6)
      assert.equal(grow?.(), 1)
      assert.equal(manager.memory.byteLength, 4 * 65536)
      const fork = await manager.fork()
      t.after(() => fork.destroy())
      await manager.reset()
      assert.equal(load?.(), 5)
      assert.equal(manager.memory.byteLength, 65536)
      assert.equal(fork.exports.load?.(), 6)
      fork.exports.store?.(7)
      assert.equal(load?.(), 5)
      await manager.reload()
      assert.equal(manager.exports.load?.(), 5)
    }
  })

  test('what cannot be captured is refused with its reason, and the manager serves on', async (t) => {
    const cases: [string, RegExp, ManagerOptions?][] = [
      [
        `(module (type $s (struct (field i32))) (global (mut (ref null $s)) (ref.null $s))
          (func (export "f") (result i32) (i32.const 1)))`,
        /garbage-collected/,
      ],
      [
        `(module (table 1 funcref) (elem $e func $f) (func $f (export "f") (result i32) (i32.const 1))
          (func (export "drop") (elem.drop $e)))`,
        /elem\.drop/,
      ],
    ]
    for (const [text, reason, options] of cases) {
      const manager = await managed(t, wat(text), options)
      await failure(manager.snapshot(), 'ERR_WASM_SNAPSHOT_UNSUPPORTED', reason)
      assert.throws(() => manager.snapshotSync(), hasCode('ERR_WASM_SNAPSHOT_UNSUPPORTED', reason))
      await failure(manager.fork(), 'ERR_WASM_SNAPSHOT_UNSUPPORTED', reason)
      assert.equal(await manager.call('f'), 1)
      assert.equal(manager.state, 'ready')
      const perCall = WasmModuleManager.create(wat(text), { ...options, isolation: 'per-call' })
      await failure(perCall, 'ERR_WASM_SNAPSHOT_UNSUPPORTED', reason)
    }
  })

  test('a snapshot waits for what is in flight, and a signal takes it back', async (t) => {
    const { manager, close, arrived, release } = await bench(t)
    close(1)
    const held = manager.call('hold', [1])
    await arrived(1)
    const controller = new AbortController()
    const asked = outcome(manager.snapshot({ signal: controller.signal }))
    const behind = manager.call('add', [1, 2])
    const reason = new Error('not any more')
    controller.abort(reason)
    assert.deepEqual(await asked, { error: reason })
    release(1)
    await held
    assert.equal(await behind, 3)
    assert.equal(manager.stats().snapshots, 0)
    assert.deepEqual(await outcome(manager.snapshot({ signal: AbortSignal.abort(reason) })), { error: reason })
  })

  test('a drain that does not end gives up, or interrupts', async (t) => {
    const { manager, entered } = await bench(t)
    await manager.snapshot()
    const inside = entered()
    const spinning = outcome(manager.call('spin'))
    await inside
    const gaveUp = await failure(manager.reset({ drainTimeoutMs: 20 }), 'ERR_WASM_DRAIN_TIMEOUT', /the reset/)
    assert.equal(gaveUp.inFlight, 1)
    assert.throws(() => manager.resetSync(), hasCode('ERR_WASM_BUSY'))
    assert.throws(() => manager.snapshotSync(), hasCode('ERR_WASM_BUSY'))
    await manager.reset({ drainTimeoutMs: 20, onDrainTimeout: 'interrupt' })
    const ended = await spinning
    assert.ok('error' in ended)
    hasCode('ERR_WASM_INTERRUPTED')(ended.error)
    assert.equal(await manager.call('add', [2, 2]), 4)
    assert.equal(manager.generation, 1, 'a stopped instance is put back, not replaced')
  })

  test('a lease holds resets and snapshots off', async (t) => {
    const manager = await managed(t, leaky)
    await manager.snapshot()
    const inside = barrier()
    const free = barrier()
    const using = manager.use(async (instance) => {
      instance.exports.store?.(5, 5)
      inside.open()
      await free.promise
      assert.equal(instance.exports.load?.(5), 5)
    })
    await inside.promise
    const reset = manager.reset()
    assert.throws(() => manager.exports.load?.(5), hasCode('ERR_WASM_RELOADING'))
    free.open()
    await using
    await reset
    assert.equal(manager.exports.load?.(5), 0)
  })

  test('inside a hook they are refused; after close() and destroy() too', async (t) => {
    const errors: unknown[] = []
    const manager: WasmModuleManager = await managed(t, leaky, {
      saveState: async () => {
        for (const action of [() => manager.snapshot(), () => manager.reset(), () => manager.fork()]) {
          errors.push(await outcome<unknown>(action()))
        }
      },
    })
    await manager.reload()
    assert.equal(errors.length, 3)
    for (const end of errors as { error: unknown }[]) hasCode('ERR_WASM_RELOADING', /inside a hook/)(end.error)
    const taken = await manager.snapshot()
    await manager.close()
    for (const action of [() => manager.snapshot(), () => manager.reset(), () => manager.fork()]) {
      await failure(action(), 'ERR_WASM_CLOSED')
    }
    assert.throws(() => manager.resetSync(), hasCode('ERR_WASM_CLOSED'))
    taken.release()
  })

  test('destroy() during a snapshot, a reset and a fork that wait', async (t) => {
    for (const action of ['snapshot', 'reset', 'fork'] as const) {
      const { manager, entered } = await bench(t)
      await manager.snapshot()
      const inside = entered()
      const spinning = outcome(manager.call('spin'))
      await inside
      const asked = outcome<unknown>(manager[action]() as Promise<unknown>)
      await manager.destroy()
      const end = await asked
      assert.ok('error' in end, action)
      hasCode('ERR_WASM_CLOSED')(end.error)
      await spinning
    }
  })

  test('reseed runs wherever an instance is given the state of a snapshot', async (t) => {
    const seeded: number[] = []
    let seed = 100
    const manager = await managed(t, leaky, {
      reseed: (instance) => {
        seed += 1
        seeded.push(instance.generation)
        instance.exports.store?.(50, seed)
      },
    })
    assert.deepEqual(seeded, [])
    await manager.snapshot()
    await manager.reset()
    assert.equal(manager.exports.load?.(50), 101)
    await manager.reload()
    assert.equal(manager.exports.load?.(50), 102)
    await using child = await manager.fork()
    assert.equal(child.exports.load?.(50), 103)
    assert.equal(manager.exports.load?.(50), 102)
    manager.resetSync()
    assert.equal(manager.exports.load?.(50), 104)
    assert.equal(seeded.length, 4)
  })

  test('reseed may name an export, which gets bits of the system', async (t) => {
    const seeded = wat(
      `(module (global $s (mut i64) (i64.const 0))
        (func (export "seed") (param i64) (global.set $s (local.get 0)))
        (func (export "get") (result i64) (global.get $s))
        (func (export "wrong") (param f64)))`,
    )
    const manager = await managed(t, seeded, { reseed: 'seed' })
    await manager.snapshot()
    const seen = new Set()
    for (let i = 0; i < 5; i++) {
      await manager.reset()
      seen.add(manager.exports.get?.())
    }
    assert.equal(seen.size, 5)
    assert.ok(!seen.has(0n))
    const none = await managed(t, seeded, { reseed: 'nothing' })
    await none.snapshot()
    await failure(none.reset(), 'ERR_WASM_EXPORT_NOT_FOUND', /nothing/)
    const wrong = await managed(t, seeded, { reseed: 'wrong' })
    await wrong.snapshot()
    await failure(wrong.reset(), 'ERR_WASM_INVALID_ARGUMENT', /options\.reseed names 'wrong'/)
    assert.equal(await wrong.call('get'), 0n)
  })

  test('options of snapshots are checked', async () => {
    const cases: [object, RegExp][] = [
      [{ isolation: 'per-process' }, /options\.isolation is 'per-process'/],
      [{ snapshots: { images: 'zip' } }, /options\.snapshots\.images is 'zip'/],
      [{ snapshots: { prepare: 1 } }, /options\.snapshots\.prepare must be true or false/],
      [{ snapshots: { image: 'copy' } }, /options\.snapshots\.image is not an option/],
      [{ reseed: 5 }, /options\.reseed must be the name of an export, or a function/],
      [{ isolation: 'per-call', reseed: () => {} }, /must be the name of an export with isolation 'per-call'/],
    ]
    for (const [options, text] of cases) {
      await failure(WasmModuleManager.create(leaky, options), 'ERR_WASM_INVALID_ARGUMENT', text)
    }
  })

  test('memory is told apart: private, shared, reserved', async (t) => {
    const manager = await managed(t, leaky)
    manager.exports.leak?.(255)
    const before = manager.stats({ pages: true }).pages
    assert.ok(before && before.privateBytes >= 255 * 65536 && before.sharedBytes === 0, JSON.stringify(before))
    assert.ok(before.reservedBytes >= 4 * 2 ** 30)
    const taken = await manager.snapshot()
    const after = manager.stats({ pages: true }).pages
    assert.ok(after && after.privateBytes < 65536, JSON.stringify(after))
    assert.equal(after.sharedBytes, taken.residentBytes)
    assert.ok(taken.residentBytes >= 255 * 65536 && taken.residentBytes <= 257 * 65536, `${taken.residentBytes}`)
    manager.exports.store?.(65536, 1)
    assert.equal(manager.stats({ pages: true }).pages?.privateBytes, 4096)
    assert.equal(manager.stats().pages, undefined)
  })
})
