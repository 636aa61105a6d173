// isolation: 'per-call': each call begins with the snapshot and leaves nothing behind.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import type { ManagerOptions } from '../index.js'
import { wat } from './guests.ts'
import { failure, hasCode, LIMIT, managed, managedSync, outcome } from './support.ts'

const guest = wat(
  `(module
    (import "env" "host" (func $host (param i32) (result i32)))
    (memory (export "memory") 2 1000)
    (global $count (mut i32) (i32.const 0))
    (table $refs 1 100 externref)
    (func (export "bump") (result i32)
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (i32.store (i32.const 16) (i32.add (i32.load (i32.const 16)) (i32.const 1)))
      (i32.add (i32.mul (global.get $count) (i32.const 1000)) (i32.load (i32.const 16))))
    (func (export "warm") (param i32) (i32.store (i32.const 32) (local.get 0)))
    (func (export "warmth") (result i32) (i32.load (i32.const 32)))
    (func (export "grow") (result i32 i32) (memory.grow (i32.const 10)) (memory.size))
    (func (export "keep") (param externref) (result i32) (table.grow $refs (local.get 0) (i32.const 1)))
    (func (export "trap") (i32.store (i32.const 16) (i32.const 99)) (unreachable))
    (func (export "spin") (i32.store (i32.const 16) (i32.const 99)) (loop (br 0)))
    (func (export "ask") (param i32) (result i32) (local $r i32)
      (i32.store (i32.const 16) (local.get 0))
      (local.set $r (call $host (local.get 0)))
      (i32.add (local.get $r) (i32.load (i32.const 16))))
    (global $seed (mut i64) (i64.const 0))
    (func (export "seed") (param i64) (global.set $seed (local.get 0)))
    (func (export "random") (result i64) (global.get $seed))
    (global $top (mut i32) (i32.const 1024))
    (func $allocate (export "allocate") (param i32) (result i32) (global.get $top)
      (global.set $top (i32.add (global.get $top) (local.get 0))))
    (func (export "deallocate") (param i32 i32))
    (func (export "reverse") (param $p i32) (param $n i32) (param $out i32) (result i32) (local $i i32) (local $r i32)
      (local.set $r (call $allocate (local.get $n)))
      (block $done (loop $next
        (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
        (i32.store8 (i32.add (local.get $r) (local.get $i))
          (i32.load8_u (i32.add (local.get $p) (i32.sub (i32.sub (local.get $n) (local.get $i)) (i32.const 1)))))
        (local.set $i (i32.add (local.get $i) (i32.const 1))) (br $next)))
      (i32.store (local.get $out) (local.get $n))
      (local.get $r)))`,
  'isolated',
)

const imports = { env: { host: (n: number) => n } }

for (const images of ['copy-on-write', 'copy'] as const) {
  const base: ManagerOptions = { imports, isolation: 'per-call', snapshots: { images } }
  describe(`isolation per call (${images})`, LIMIT, () => {
    test('every call is the first', async (t) => {
      const manager = await managed(t, guest, base)
      for (let i = 0; i < 20; i++) {
        assert.equal(await manager.call('bump'), 1001)
        assert.deepEqual(await manager.call('grow'), [2, 12])
        assert.equal(await manager.call('keep', [{ i }]), 1)
      }
      assert.equal(manager.memory.byteLength, 2 * 65536)
      assert.equal(manager.generation, 1)
      assert.equal(Buffer.from(await manager.invoke('reverse', Buffer.from('abc'))).toString(), 'cba')
    })

    test('it begins warm: after initialize, or with a later snapshot', async (t) => {
      const manager = await managed(t, guest, {
        ...base,
        instances: 2,
        initialize: (instance) => void instance.exports.warm?.(5),
      })
      assert.deepEqual(await Promise.all(Array.from({ length: 8 }, () => manager.call('warmth'))), Array(8).fill(5))
      await manager.call('warm', [6])
      assert.equal(await manager.call('warmth'), 5, 'a call leaves nothing behind')
      manager.exports.warm?.(7)
      assert.equal(manager.exports.warmth?.(), 7, 'what exports leave stays')
      await manager.snapshot()
      assert.deepEqual(await Promise.all(Array.from({ length: 8 }, () => manager.call('warmth'))), Array(8).fill(7))
      await manager.use(async (instance) => {
        instance.exports.warm?.(8)
        assert.equal(await instance.call('warmth'), 8, 'a lease is no isolated call')
      })
      assert.deepEqual(await Promise.all(Array.from({ length: 8 }, () => manager.call('warmth'))), Array(8).fill(7))
      await manager.reload()
      assert.equal(await manager.call('warmth'), 7)
    })

    test('what the host writes into memory is gone as well', async (t) => {
      const manager = await managed(t, guest, base)
      manager.memory.write(32, Uint8Array.of(9, 0, 0, 0))
      assert.equal(await manager.call('warmth'), 0)
      const view = new Int32Array(manager.memory.buffer)
      view[8] = 10
      assert.equal(await manager.call('warmth'), 0)
      new Int32Array(manager.memory.buffer)[8] = 11
      assert.equal(await manager.call('warmth'), 0)
    })

    test('a trap, a timeout and an abort are the matter of that call alone', async (t) => {
      const manager = await managed(t, guest, base)
      const traps: unknown[] = []
      manager.on('trap', (error) => traps.push(error))
      for (let i = 0; i < 10; i++) {
        await failure(manager.call('trap'), 'ERR_WASM_TRAP')
        await failure(manager.call('spin', [], { timeoutMs: 5 }), 'ERR_WASM_TIMEOUT')
        const controller = new AbortController()
        const spinning = outcome(manager.call('spin', [], { signal: controller.signal }))
        controller.abort('enough')
        assert.deepEqual(await spinning, { error: 'enough' })
        assert.equal(await manager.call('bump'), 1001)
      }
      assert.equal(manager.generation, 1, 'nothing was replaced')
      assert.equal(manager.stats().calls.trapped, 10)
      assert.ok(traps.length > 0)
      assert.deepEqual(manager.stats().reloads, {})
    })

    test('calls at the same time on several replicas never see each other', async (t) => {
      const manager = await managed(t, guest, { ...base, instances: 4, threads: 4, maxQueue: 10_000 })
      const answers = await Promise.all(Array.from({ length: 2000 }, (_, i) => manager.call('ask', [i])))
      assert.deepEqual(
        answers,
        Array.from({ length: 2000 }, (_, i) => 2 * i),
      )
      const bumps = await Promise.all(Array.from({ length: 2000 }, () => manager.call('bump')))
      assert.deepEqual(new Set(bumps), new Set([1001]))
    })

    test('an import that throws, or calls back, finds the call’s own instance', async (t) => {
      const error = new Error('mine')
      let depth = 0
      const manager = await managed(t, guest, {
        ...base,
        imports: (instance) => ({
          env: {
            host: (n: number) => {
              if (n === 13) throw error
              depth = instance.exports.bump?.() as number
              return n
            },
          },
        }),
      })
      assert.deepEqual(await outcome(manager.call('ask', [13])), { error })
      assert.equal(await manager.call('ask', [1]), 3)
      assert.equal(depth, 1002)
      assert.equal(await manager.call('bump'), 1001)
    })

    test('each call draws its own random numbers', async (t) => {
      const manager = await managed(t, guest, { ...base, reseed: 'seed' })
      const seen = new Set(await Promise.all(Array.from({ length: 50 }, () => manager.call('random'))))
      assert.equal(seen.size, 50)
    })

    test('createSync, reloads, resets and forks go with it', async (t) => {
      const manager = managedSync(t, guest, base)
      assert.equal(await manager.call('bump'), 1001)
      manager.exports.warm?.(3)
      manager.snapshotSync()
      await manager.reload({ strategy: 'rolling' })
      assert.equal(await manager.call('warmth'), 3)
      await using child = await manager.fork()
      assert.equal(await child.call('bump'), 1001)
      assert.equal(await child.call('warmth'), 3)
      manager.exports.warm?.(4)
      await manager.reset()
      assert.equal(manager.exports.warmth?.(), 3)
    })

    test('state that a reload carries over is what the next calls begin with', async (t) => {
      const manager = await managed(t, guest, {
        ...base,
        instances: 2,
        saveState: (instance) => instance.exports.warmth?.(),
        restoreState: (instance, value) => void instance.exports.warm?.((value as number) + 1),
      })
      for (let i = 1; i <= 3; i++) {
        await manager.reload()
        assert.deepEqual(await Promise.all(Array.from({ length: 4 }, () => manager.call('warmth'))), Array(4).fill(i))
      }
    })

    test('another build brings a snapshot of its own', async (t) => {
      const manager = await managed(t, guest, { ...base, initialize: (instance) => void instance.exports.warm?.(1) })
      manager.exports.warm?.(2)
      await manager.snapshot()
      await manager.reload({ source: guest })
      assert.equal(await manager.call('warmth'), 1)
      assert.equal(await manager.call('bump'), 1001)
      assert.equal(await manager.call('bump'), 1001)
    })

    test('100,000 calls leave nothing behind', async (t) => {
      const manager = await managed(t, guest, { ...base, maxQueue: 10_000 })
      const run = async (count: number) => {
        for (let left = count; left > 0; left -= 1000) {
          await Promise.all(Array.from({ length: 1000 }, (_, i) => manager.call(i % 3 ? 'bump' : 'grow')))
        }
      }
      const readings: number[] = []
      for (let round = 0; round < 8; round += 1) {
        await run(images === 'copy' ? 4_000 : 20_000)
        globalThis.gc?.()
        readings.push(process.memoryUsage.rss())
      }
      // A leak shows in every round, the collector's habits do not; in five they once did.
      const least = Math.min(...readings.slice(1).map((reading, i) => reading - Number(readings[i])))
      assert.ok(least < 1 << 20, `RSS grew by at least ${(least / 2 ** 20).toFixed(1)} MiB in each round`)
      assert.equal(manager.stats().calls.failed, 0)
    })
  })
}

test('the first snapshot is there from the start, so a trap leaves nothing behind', LIMIT, async (t) => {
  const manager = await managed(t, guest, { imports, isolation: 'per-call' })
  assert.equal(manager.stats().snapshots, 1)
  await assert.rejects(manager.call('trap'), hasCode('ERR_WASM_TRAP'))
  assert.equal(await manager.call('bump'), 1001)
})

test('a reload of the same build keeps the snapshots: calls begin with what was restored', LIMIT, async (t) => {
  const manager = await managed(t, guest, {
    imports,
    isolation: 'per-call',
    saveState: () => 'anything',
    restoreState: (lease) => {
      lease.exports.warm?.(7)
    },
  })
  const handle = await manager.snapshot()
  await manager.reload()
  assert.equal(await manager.call('warmth'), 7)
  await manager.reset({ to: handle })
  assert.equal(await manager.call('warmth'), 7, 'a call begins with the newest')
  manager.exports.warm?.(3)
  const other = await manager.snapshot()
  assert.equal(await manager.call('warmth'), 3)
  other.release()
  assert.equal(await manager.call('warmth'), 7, 'the one of the reload is newer than the first handle')
  handle.release()
  assert.equal(await manager.call('bump'), 1001)
})
