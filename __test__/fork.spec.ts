// fork(): a manager of its own, copy-on-write, and nobody sees what the other does.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import type { ManagerOptions } from '../index.js'
import { wat } from './guests.ts'
import { bench, failure, hasCode, LIMIT, managed, outcome, type WasmModuleManager } from './support.ts'

const cells = wat(
  `(module
    (import "env" "host" (func $host (param i32) (result i32)))
    (memory (export "memory") 1 8192)
    (global $g (mut i32) (i32.const 0))
    (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
    (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "size") (result i32) (memory.size))
    (func (export "set") (param i32) (global.set $g (local.get 0)))
    (func (export "get") (result i32) (global.get $g))
    (func (export "fill") (param $from i32) (param $to i32) (param $with i32)
      (block $done (loop $next
        (br_if $done (i32.ge_u (local.get $from) (local.get $to)))
        (i32.store (local.get $from) (local.get $with))
        (local.set $from (i32.add (local.get $from) (i32.const 4096)))
        (br $next))))
    (func (export "ask") (param i32) (result i32) (call $host (local.get 0)))
    (func (export "trap") (unreachable)))`,
  'cells',
)

const imports = { env: { host: (n: number) => n + 1 } }

const KINDS: [string, ManagerOptions][] = [
  ['copy-on-write', { imports, snapshots: { images: 'copy-on-write' } }],
  ['copy', { imports, snapshots: { images: 'copy' } }],
]

for (const [kind, options] of KINDS) {
  describe(`fork (${kind})`, LIMIT, () => {
    test('a child begins as the parent is, and from then on they are strangers', async (t) => {
      const parent = await managed(t, cells, options)
      parent.exports.store?.(100, 1)
      parent.exports.grow?.(2)
      parent.exports.store?.(2 * 65536, 2)
      parent.exports.set?.(3)
      const child = await parent.fork()
      const look = (m: WasmModuleManager) => [
        m.exports.load?.(100),
        m.exports.load?.(2 * 65536),
        m.exports.get?.(),
        m.exports.size?.(),
      ]
      assert.deepEqual(look(child), [1, 2, 3, 3])
      assert.equal(child.state, 'ready')
      assert.equal(child.generation, 1)
      child.exports.store?.(100, 10)
      child.exports.set?.(30)
      child.exports.grow?.(5)
      parent.exports.store?.(2 * 65536, 20)
      assert.deepEqual(look(parent), [1, 20, 3, 3])
      assert.deepEqual(look(child), [10, 2, 30, 8])
      assert.equal(await child.call('ask', [5]), 6)
      await parent.close()
      assert.deepEqual(look(child), [10, 2, 30, 8], 'a child outlives its parent')
      await child.close()
      await failure(child.call('get'), 'ERR_WASM_CLOSED')
    })

    test('forks of forks, and forks of what was reset', async (t) => {
      const root = await managed(t, cells, options)
      const line = [root]
      for (let i = 1; i <= 8; i++) {
        const parent = line[i - 1] as WasmModuleManager
        parent.exports.store?.(4096 * i, i)
        parent.exports.set?.(i)
        line.push(await parent.fork())
      }
      for (const [depth, m] of line.entries()) {
        const expected = Array.from({ length: 8 }, (_, i) => (i + 1 <= depth + (depth < 8 ? 1 : 0) ? i + 1 : 0))
        assert.deepEqual(
          expected.map((_, i) => m.exports.load?.(4096 * (i + 1))),
          expected,
          `depth ${depth}`,
        )
      }
      // Ancestors go, in no order; the others stay as they are.
      for (const i of [4, 0, 7, 2]) await line[i]?.close()
      assert.deepEqual(
        [1, 2, 3, 5].map((n) => line[8]?.exports.load?.(4096 * n)),
        [1, 2, 3, 5],
      )
      line[8]?.exports.store?.(4096, 99)
      await line[8]?.reset()
      assert.equal(line[8]?.exports.load?.(4096), 1, 'a child goes back to the fork')
      await line[8]?.reload()
      assert.equal(line[8]?.exports.load?.(4096 * 5), 5, 'and begins anew with it')
      for (const m of line) await m.close()
    })

    test('a trap in a child is the child’s affair, which begins with the fork again', async (t) => {
      const parent = await managed(t, cells, options)
      parent.exports.set?.(7)
      await using child = await parent.fork()
      child.exports.set?.(8)
      await failure(child.call('trap'), 'ERR_WASM_TRAP')
      assert.equal(await child.call('get'), 7)
      assert.equal(parent.generation, 1)
      assert.equal(parent.stats().calls.trapped, 0)
    })

    test('a fork has options of its own; the others are its parent’s', async (t) => {
      const parent = await managed(t, cells, {
        ...options,
        name: 'parent',
        limits: { memoryBytes: 640 * 1024, tableElements: 5 },
      })
      await using child = await parent.fork({
        name: 'child',
        imports: { env: { host: (n: number) => n * 100 } },
        limits: { memoryBytes: 128 * 1024 },
      })
      assert.deepEqual([parent.name, child.name], ['parent', 'child'])
      assert.deepEqual([parent.exports.ask?.(2), child.exports.ask?.(2)], [3, 200])
      assert.deepEqual([child.exports.grow?.(1), child.exports.grow?.(1)], [1, -1])
      await using twin = await parent.fork()
      assert.equal(twin.name, 'parent')
      assert.equal(parent.exports.grow?.(5), 1)
      await failure(parent.fork({ limits: { memoryBytes: 128 * 1024 } }), 'ERR_WASM_INVALID_ARGUMENT', /393216 bytes/)
      await failure(
        parent.fork({ limits: { stackBytes: 1 << 20 } }),
        'ERR_WASM_INVALID_ARGUMENT',
        /stackBytes of a fork/,
      )
      await failure(parent.fork({ threads: 2 } as never), 'ERR_WASM_INVALID_ARGUMENT', /threads is not an option/)
      await failure(parent.fork({ imports: {} }), 'ERR_WASM_LINK')
      assert.equal(parent.exports.size?.(), 6)
      assert.equal(parent.state, 'ready')
    })

    test('replicas of a child all begin with the first of the parent', async (t) => {
      const parent = await managed(t, cells, { ...options, instances: 3 })
      parent.exports.set?.(5)
      await using child = await parent.fork()
      const leases = await Promise.all([child.acquire(), child.acquire(), child.acquire()])
      assert.deepEqual(
        leases.map((lease) => lease.exports.get?.()),
        [5, 5, 5],
      )
      for (const lease of leases) lease.release()
    })

    test('initialize does not run in a child, state hooks do in its reloads', async (t) => {
      let initialized = 0
      const parent = await managed(t, cells, {
        ...options,
        initialize: () => {
          initialized += 1
        },
        saveState: (instance) => instance.exports.get?.(),
        restoreState: (instance, n) => void instance.exports.set?.(n + 1),
      })
      parent.exports.set?.(1)
      await using child = await parent.fork()
      child.exports.set?.(10)
      await child.reload()
      assert.deepEqual([child.exports.get?.(), parent.exports.get?.(), initialized], [11, 1, 1])
    })

    test('a fork waits its turn behind what runs, and the parent serves on', async (t) => {
      const { manager, close, arrived, release } = await bench(t, { snapshots: options.snapshots })
      close(1)
      const held = manager.call('hold', [1])
      await arrived(1)
      const forked = manager.fork()
      const behind = manager.call('add', [1, 1])
      release(1)
      await using child = await forked
      assert.equal(await behind, 2)
      await held
      assert.equal(await child.call('add', [2, 3]), 5)
    })

    test('forks under load, each one a moment of its parent', async (t) => {
      const parent = await managed(t, cells, { ...options, maxQueue: 10_000 })
      const writes: Promise<unknown>[] = []
      const forks: Promise<WasmModuleManager>[] = []
      for (let i = 0; i < 300; i++) {
        // Two stores as one call would be; `fill` writes the same number everywhere.
        writes.push(parent.call('fill', [0, 65536, i]))
        if (i % 10 === 0) forks.push(parent.fork())
        if (i % 30 === 0) await writes[i]
      }
      await Promise.all(writes)
      const children = await Promise.all(forks)
      for (const child of children) {
        const seen = new Set(Array.from({ length: 16 }, (_, page) => child.exports.load?.(page * 4096)))
        assert.equal(seen.size, 1, 'no mixture of two calls')
      }
      await Promise.all(children.map((child) => child.close()))
      assert.equal(parent.stats().calls.completed, 300)
    })
  })
}

describe('fork: what it cannot copy, and what it gives back', LIMIT, () => {
  test('values of JavaScript and changed functions are refused, in place they are fine', async (t) => {
    const refs = wat(
      `(module
        (table $refs 4 externref) (table $funcs 2 funcref)
        (elem (table $funcs) (i32.const 0) func $one) (elem declare func $two)
        (global $e (mut externref) (ref.null extern)) (global $f (mut funcref) (ref.null func))
        (type $i (func (result i32)))
        (func $one (result i32) (i32.const 1)) (func $two (result i32) (i32.const 2))
        (func (export "keep") (param i32 externref) (table.set $refs (local.get 0) (local.get 1)))
        (func (export "kept") (param i32) (result externref) (table.get $refs (local.get 0)))
        (func (export "global") (param externref) (global.set $e (local.get 0)))
        (func (export "swap") (table.set $funcs (i32.const 0) (ref.func $two)))
        (func (export "globalFunc") (global.set $f (ref.func $two)))
        (func (export "apply") (result i32) (call_indirect $funcs (type $i) (i32.const 0))))`,
      'refs',
    )
    const spoil: [(m: WasmModuleManager) => void, RegExp][] = [
      [(m) => m.exports.keep?.(1, {}), /externref/],
      [(m) => m.exports.global?.('x'), /externref/],
      [(m) => m.exports.swap?.(), /funcref/],
      [(m) => m.exports.globalFunc?.(), /funcref/],
    ]
    for (const [action, reason] of spoil) {
      const manager = await managed(t, refs)
      await using fine = await manager.fork()
      assert.equal(fine.exports.apply?.(), 1)
      action(manager)
      await failure(manager.fork(), 'ERR_WASM_SNAPSHOT_UNSUPPORTED', reason)
      assert.equal(manager.state, 'ready')
      const expected = [manager.exports.apply?.(), manager.exports.kept?.(1)]
      await manager.snapshot()
      await manager.reload()
      assert.deepEqual([manager.exports.apply?.(), manager.exports.kept?.(1)], expected, 'a reload carries them over')
      manager.exports.keep?.(1, 'other')
      await manager.reset()
      assert.deepEqual([manager.exports.apply?.(), manager.exports.kept?.(1)], expected)
      await failure(manager.fork(), 'ERR_WASM_SNAPSHOT_UNSUPPORTED', reason)
    }
    // Taken back, it can be copied again.
    const manager = await managed(t, refs)
    manager.exports.keep?.(1, {})
    manager.exports.keep?.(1, null)
    await using child = await manager.fork()
    assert.equal(child.exports.kept?.(1), null)
  })

  test('a closed or failed manager cannot be forked', async (t) => {
    const manager = await managed(t, cells, { imports })
    await manager.destroy()
    await failure(manager.fork(), 'ERR_WASM_CLOSED')
  })

  test('a manager made by createSync forks as well', async (t) => {
    const { managedSync } = await import('./support.ts')
    const manager = managedSync(t, cells, { imports })
    manager.exports.set?.(4)
    await using child = await manager.fork()
    assert.equal(child.exports.get?.(), 4)
  })

  test('a reseed that fails leaves no child behind', async (t) => {
    const error = new Error('no seed')
    const manager = await managed(t, cells, {
      imports,
      reseed: () => {
        throw error
      },
    })
    const failed = await failure(manager.fork(), 'ERR_WASM_RELOAD_FAILED')
    assert.equal(failed.cause, error)
    assert.equal(failed.phase, 'initialize')
    assert.equal(manager.exports.get?.(), 0)
  })

  test('an asynchronous reseed is awaited', async (t) => {
    const manager = await managed(t, cells, {
      imports,
      reseed: async (instance) => {
        await Promise.resolve()
        await instance.call('set', [77])
      },
    })
    await using child = await manager.fork()
    assert.deepEqual([child.exports.get?.(), manager.exports.get?.()], [77, 0])
    await manager.snapshot()
    assert.throws(() => manager.resetSync(), hasCode('ERR_WASM_ASYNC_IMPORT'))
  })

  test('100 forks of 64 MiB fit where one parent fits', async (t) => {
    const parent = await managed(t, cells, { imports })
    parent.exports.grow?.(1023)
    parent.exports.fill?.(0, 64 << 20, 5)
    const rss = () => process.memoryUsage.rss()
    const first = await parent.fork()
    const before = rss()
    const children = [first]
    for (let i = 1; i < 100; i++) children.push(await parent.fork())
    for (const child of children) {
      assert.equal(child.exports.load?.(63 << 20), 5)
      child.exports.store?.(1, 1)
    }
    const grown = rss() - before
    assert.ok(grown < 64 << 20, `100 forks took ${(grown / 2 ** 20).toFixed(1)} MiB`)
    const [some] = children
    assert.ok((some?.stats({ pages: true }).pages?.privateBytes ?? 0) <= 16384)
    const ends = await Promise.all(children.map((child) => outcome(child.close())))
    assert.ok(ends.every((end) => 'value' in end))
  })
})
