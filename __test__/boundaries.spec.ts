// What a guest cannot do, whatever it tries: see what another instance has left, exceed its limits, hold the event loop up.
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { describe, type TestContext, test } from 'node:test'
import type { GlueManager, GlueOptions, LeasedInstance, ManagerOptions, WasmModuleManager } from '../index.js'
import { loadGlue } from '../index.js'
import { temporaryFolder, wat } from './guests.ts'
import { barrier, child, failure, hasCode, INDEX_URL, LIMIT, managed, outcome, reported, until } from './support.ts'

const binding = createRequire(import.meta.url)('../binding.js')

const PAGE = 65_536

/** Begins with eight bytes of its own, and can write over everything that it has, and count what is there. */
const hoarder = (memory: string) => `(module
  (import "env" "stained" (func $stained))
  (memory $m (export "memory") ${memory})
  (memory $second 1 8)
  (data (memory $m) (i32.const 4096) "original")
  (global $i (mut i32) (i32.const 0))
  (global $l (mut i64) (i64.const 0))
  (global $d (mut f64) (f64.const 0))
  (global $v (mut v128) (v128.const i64x2 0 0))
  (table $refs 4 64 externref)
  (table $funcs 4 64 funcref)
  (elem declare func $stain)
  (func $stain (export "stain") (param $secret externref)
    (drop (memory.grow $m (i32.const 14)))
    (drop (memory.grow $second (i32.const 3)))
    (memory.fill $m (i32.const 0) (i32.const 0xa5) (i32.mul (memory.size $m) (i32.const 65536)))
    (memory.fill $second (i32.const 0) (i32.const 0xa5) (i32.mul (memory.size $second) (i32.const 65536)))
    (global.set $i (i32.const 0xa5)) (global.set $l (i64.const 0xa5)) (global.set $d (f64.const 0xa5))
    (global.set $v (i32x4.splat (i32.const 0xa5)))
    (drop (table.grow $refs (local.get $secret) (i32.const 20)))
    (table.fill $refs (i32.const 0) (local.get $secret) (table.size $refs))
    (drop (table.grow $funcs (ref.func $stain) (i32.const 20)))
    (table.fill $funcs (i32.const 0) (ref.func $stain) (table.size $funcs)))
  (func (export "stainAndTrap") (param externref)
    (call $stain (local.get 0))
    (memory.fill $m (i32.const 0) (i32.const 0x5a) (i32.const 0x7fffffff)))
  (func (export "stainForEver") (param externref) (local i32)
    (call $stain (local.get 0))
    (call $stained)
    (loop
      (i32.store8 $m (local.get 1) (i32.const 0x5a))
      (local.set 1 (i32.and (i32.add (local.get 1) (i32.const 1)) (i32.const 0xffff)))
      (br 0)))
  ;; Words that are not zero in all that there is and all that can be had; globals, and elements that are not null.
  (func (export "look") (result i32 i32 i32 i32) (local $at i32) (local $words i32) (local $set i32) (local $size i32)
    (drop (memory.grow $m (i32.const 4)))
    (drop (memory.grow $second (i32.const 4)))
    (local.set $size (i32.mul (memory.size $m) (i32.const 65536)))
    (block (loop
      (br_if 1 (i32.ge_u (local.get $at) (local.get $size)))
      (local.set $words (i32.add (local.get $words) (i64.ne (i64.load $m (local.get $at)) (i64.const 0))))
      (local.set $at (i32.add (local.get $at) (i32.const 8)))
      (br 0)))
    (local.set $at (i32.const 0))
    (local.set $size (i32.mul (memory.size $second) (i32.const 65536)))
    (block (loop
      (br_if 1 (i32.ge_u (local.get $at) (local.get $size)))
      (local.set $words (i32.add (local.get $words) (i64.ne (i64.load $second (local.get $at)) (i64.const 0))))
      (local.set $at (i32.add (local.get $at) (i32.const 8)))
      (br 0)))
    (drop (table.grow $refs (ref.null extern) (i32.const 30)))
    (drop (table.grow $funcs (ref.null func) (i32.const 30)))
    (local.set $at (i32.const 0))
    (block (loop
      (br_if 1 (i32.ge_u (local.get $at) (table.size $refs)))
      (local.set $set (i32.add (local.get $set) (i32.eqz (ref.is_null (table.get $refs (local.get $at))))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (br 0)))
    (local.set $at (i32.const 0))
    (block (loop
      (br_if 1 (i32.ge_u (local.get $at) (table.size $funcs)))
      (local.set $set (i32.add (local.get $set) (i32.eqz (ref.is_null (table.get $funcs (local.get $at))))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (br 0)))
    (local.get $words)
    (i32.add (i32.add (i32.ne (global.get $i) (i32.const 0)) (i64.ne (global.get $l) (i64.const 0)))
      (i32.add (f64.ne (global.get $d) (f64.const 0)) (v128.any_true (global.get $v))))
    (local.get $set)
    (memory.size $m)))`

/** Only what the module itself begins with; and 4 pages more, which \`look\` has asked for. */
const CLEAN = [1, 0, 0, 6]
const STAINED = (words: number, pages: number) => [words, 4, 48, pages]

/** The whole memory as the host sees it. */
function bytesSet(instance: WasmModuleManager | LeasedInstance | GlueManager): number {
  const { memory } = instance
  const read = memory.read(0, memory.byteLength).reduce((sum, byte) => sum + Number(byte !== 0), 0)
  const seen = new Uint8Array(memory.buffer).reduce((sum, byte) => sum + Number(byte !== 0), 0)
  assert.equal(read, seen)
  return seen
}

const SECRET = { secret: true }

for (const [kind, memory, given] of [
  ['pages that are the memory’s own', '2 64', {}],
  ['pages that are copied', '2 64', { snapshots: { images: 'copy' } }],
  ['a small reservation, so that memories move', '2 64', { engine: { memoryReservationBytes: 1 << 18 } }],
  ['explicit bounds checks', '2 64', { engine: { signalsBasedTraps: false } }],
  ['shared memory', '2 64 shared', { engine: { threads: true } }],
] as [string, string, ManagerOptions][]) {
  describe(`nothing of another instance is seen, with ${kind}`, () => {
    const guest = wat(hoarder(memory), 'hoarder')
    let onStained = () => {}
    const options: ManagerOptions = { ...given, imports: { env: { stained: () => onStained() } } }
    const clean = async (manager: WasmModuleManager, what: string) => {
      // What has trapped is replaced before this runs; until then the host sees what is to be replaced.
      assert.deepEqual(await manager.call('look'), CLEAN, what)
      assert.equal(bytesSet(manager), 8, `${what}: as the host sees it`)
    }
    const stained = (manager: WasmModuleManager) => manager.call('stain', [SECRET])

    test('the stain is what these tests take it for', LIMIT, async (t) => {
      const manager = await managed(t, guest, options)
      await stained(manager)
      assert.equal(bytesSet(manager), 16 * PAGE)
      assert.deepEqual(await manager.call('look'), STAINED((16 + 4) * (PAGE / 8), 20))
    })

    test('after a reload of either strategy, again and again', LIMIT, async (t) => {
      const manager = await managed(t, guest, options)
      for (let round = 0; round < 6; round += 1) {
        const strategy = round % 2 === 0 ? 'exclusive' : 'rolling'
        await stained(manager)
        await manager.reload({ strategy })
        await clean(manager, strategy)
      }
      await stained(manager)
      manager.reloadSync()
      await clean(manager, 'reloadSync')
    })

    test('after a trap in the midst of writing, and after a stop', LIMIT, async (t) => {
      const manager = await managed(t, guest, options)
      for (let round = 0; round < 3; round += 1) {
        await failure(manager.call('stainAndTrap', [SECRET]), 'ERR_WASM_TRAP')
        await clean(manager, 'a trap')
        const inside = barrier()
        onStained = () => inside.open()
        const stop = new AbortController()
        const running = outcome(manager.call('stainForEver', [SECRET], { signal: stop.signal }))
        await inside.promise
        stop.abort('enough')
        assert.deepEqual(await running, { error: 'enough' })
        await clean(manager, 'a stop')
        assert.throws(() => manager.exports.stainAndTrap?.(SECRET), hasCode('ERR_WASM_TRAP'))
        await clean(manager, 'a synchronous trap')
      }
    })

    test('in another replica, while one is full of it', LIMIT, async (t) => {
      const manager = await managed(t, guest, { ...options, instances: 3 })
      const leases = await Promise.all([manager.acquire(), manager.acquire(), manager.acquire()])
      const [first, ...others] = leases as [LeasedInstance, ...LeasedInstance[]]
      first.exports.stain?.(SECRET)
      for (const other of others) {
        assert.equal(bytesSet(other), 8)
        assert.deepEqual(other.exports.look?.(), CLEAN)
      }
      for (const lease of leases) lease.release()
    })

    test('in another manager, of the same module or not, after the end of one', LIMIT, async (t) => {
      for (let round = 0; round < 6; round += 1) {
        const manager = await managed(t, guest, options)
        await clean(manager, `round ${round}`)
        await stained(manager)
        await manager.close()
      }
    })

    test('after a reset, to the first snapshot and to a later one', LIMIT, async (t) => {
      const manager = await managed(t, guest, options)
      const snapshot = await manager.snapshot()
      for (let round = 0; round < 4; round += 1) {
        await stained(manager)
        if (round % 2 === 0) await manager.reset({ to: snapshot })
        else manager.resetSync({ to: snapshot })
        await clean(manager, `round ${round}`)
        // What was asked for to be looked at is no part of it either.
        await manager.reset({ to: snapshot })
      }
      await failure(manager.call('stainAndTrap', [SECRET]), 'ERR_WASM_TRAP')
      await manager.reset({ to: snapshot })
      await clean(manager, 'a trap, and a reset')
    })

    test('in forks, of each other and of what comes after them', LIMIT, async (t) => {
      const parent = await managed(t, guest, options)
      const [one, two] = [await parent.fork(), await parent.fork()]
      t.after(() => Promise.all([one.destroy(), two.destroy()]))
      await stained(one)
      await clean(two, 'the other fork')
      await clean(parent, 'the parent')
      await stained(parent)
      await two.reload()
      await clean(two, 'a fork whose parent was written over')
    })

    test('after an instance was recycled by policy, in each way', LIMIT, async (t) => {
      for (const strategy of ['exclusive', 'rolling', 'reset'] as const) {
        const manager = await managed(t, guest, {
          ...options,
          recycle: { calls: 1, jitter: 0, strategy, backoff: { initialMs: 1, maxMs: 1 } },
        })
        if (strategy === 'reset') await manager.snapshot()
        for (let round = 0; round < 3; round += 1) {
          const recycled = once(manager, 'recycle')
          await stained(manager)
          await recycled
          // Looking is one more call, after which it is recycled again.
          const again = once(manager, 'recycle')
          assert.deepEqual(await manager.call('look'), CLEAN, strategy)
          await again
          assert.equal(bytesSet(manager), 8)
        }
      }
    })

    test('in the next call, with isolation per call', LIMIT, async (t) => {
      const manager = await managed(t, guest, { ...options, isolation: 'per-call', instances: 2 })
      for (let round = 0; round < 4; round += 1) {
        await stained(manager)
        assert.deepEqual(await manager.call('look'), CLEAN)
        await failure(manager.call('stainAndTrap', [SECRET]), 'ERR_WASM_TRAP')
        assert.deepEqual(await manager.call('look'), CLEAN)
      }
    })

    test('through a view that was kept: it is detached, and reading past the end is refused', LIMIT, async (t) => {
      const manager = await managed(t, guest, options)
      await stained(manager)
      const views = [new Uint8Array(manager.memory.buffer)]
      await manager.reload()
      views.push(new Uint8Array(manager.memory.buffer))
      await stained(manager)
      await failure(manager.call('stainAndTrap', [SECRET]), 'ERR_WASM_TRAP')
      assert.deepEqual(await manager.call('look'), CLEAN)
      assert.deepEqual(
        views.map((view) => view.length),
        [0, 0],
      )
      for (const [at, length] of [
        [manager.memory.byteLength - 1, 2],
        [manager.memory.byteLength, 1],
        [2 ** 32 - 1, 1],
      ] as const) {
        assert.throws(() => manager.memory.read(at, length), RangeError)
      }
    })
  })
}

// ---------------------------------------------------------------- realms

// biome-ignore lint/suspicious/noExplicitAny: glue has no types.
type Any = any

/**
 * The file of glue that instantiates a guest, which is a file as well.
 * * `memory`: what makes the memory that it imports, if it does.
 */
function glueFile(guest: string, memory = 'undefined'): string {
  const bytes: Uint8Array = binding.__assemble(readFileSync(guest, 'utf8'))
  const file = join(temporaryFolder('realm'), 'realm.cjs')
  writeFileSync(
    file,
    `
    const memory = ${memory}
    exports.stained = 0
    const env = { memory, stained() { exports.stained += 1 }, noop() {}, again: (depth) => guest.around(depth) }
    const bytes = Buffer.from('${Buffer.from(bytes).toString('base64')}', 'base64')
    const { exports: guest } = new WebAssembly.Instance(new WebAssembly.Module(bytes), { env })
    Object.assign(exports, { guest, memory: memory ?? guest.memory, WebAssembly })`,
  )
  return file
}

async function realm(t: TestContext, file: string, options: GlueOptions = {}): Promise<GlueManager<Any>> {
  const manager = await loadGlue<Any>(file, { cache: false, ...options })
  t.after(() => manager.destroy())
  return manager
}

const IMPORTED = '(import "env" "memory") 2 64'
const MADE = 'new WebAssembly.Memory({ initial: 2, maximum: 64 })'
const SHARED = 'new WebAssembly.Memory({ initial: 2, maximum: 64, shared: true })'

for (const [kind, memory, made, given] of [
  ['a memory of the instance’s own', '2 64', 'undefined', {}],
  ['a memory that the glue has made', IMPORTED, MADE, {}],
  ['pages that are copied', IMPORTED, MADE, { snapshots: { images: 'copy' } }],
  ['a small reservation, so that memories move', IMPORTED, MADE, { engine: { memoryReservationBytes: 1 << 18 } }],
  ['explicit bounds checks', IMPORTED, MADE, { engine: { signalsBasedTraps: false } }],
  ['shared memory', `${IMPORTED} shared`, SHARED, { engine: { threads: true } }],
] as [string, string, string, GlueOptions][]) {
  describe(`nothing of another generation of glue is seen, with ${kind}`, () => {
    const file = glueFile(wat(hoarder(memory), 'hoarder'), made)
    const clean = (manager: GlueManager<Any>, what: string) => {
      assert.deepEqual(manager.module.guest.look(), CLEAN, what)
      assert.equal(bytesSet(manager), 8, `${what}: as the host sees it`)
    }
    const stained = ({ module }: GlueManager<Any>) => module.guest.stain(SECRET)
    const trapped = ({ module }: GlueManager<Any>) =>
      assert.throws(() => module.guest.stainAndTrap(SECRET), { code: 'ERR_WASM_TRAP', trap: 'out-of-bounds-memory' })

    test(
      'after a reload in each way, of what was written, and of what trapped in the midst of it',
      LIMIT,
      async (t) => {
        const manager = await realm(t, file, given)
        clean(manager, 'the first one')
        for (const stain of [stained, trapped]) {
          for (const strategy of ['exclusive', 'rolling'] as const) {
            stain(manager)
            // A realm goes on after a trap, with what is its own.
            assert.deepEqual(bytesSet(manager), manager.memory.byteLength)
            await manager.reload({ strategy })
            clean(manager, strategy)
          }
          stain(manager)
          manager.reloadSync()
          clean(manager, 'reloadSync')
        }
      },
    )

    test('after a stop, by a reload and by a reset', LIMIT, async (t) => {
      const manager = await realm(t, file, { ...given, limits: { timeoutMs: 100 } })
      await manager.snapshot()
      const stop = () =>
        assert.throws(() => manager.module.guest.stainForEver(SECRET), { code: 'ERR_WASM_TIMEOUT' }, 'it is stopped')
      stop()
      await manager.reset()
      clean(manager, 'a reset')
      stop()
      await manager.reload()
      clean(manager, 'a reload')
    })

    test('after a reset, to the first snapshot and to a later one, of traps, too', LIMIT, async (t) => {
      const manager = await realm(t, file, given)
      const snapshot = await manager.snapshot()
      for (const stain of [stained, trapped, stained, trapped]) {
        stain(manager)
        if (stain === stained) await manager.reset({ to: snapshot })
        else manager.resetSync({ to: snapshot })
        clean(manager, stain.name)
        await manager.reset({ to: snapshot })
        manager.snapshotSync()
      }
      // The snapshot belongs to its generation, and one of the next is taken by itself.
      stained(manager)
      await manager.reload()
      clean(manager, 'a reload')
      stained(manager)
      await manager.reset()
      clean(manager, 'a reset in the next generation')
    })

    test('in another realm, beside one that is full of it and after the end of one', LIMIT, async (t) => {
      for (let round = 0; round < 3; round += 1) {
        const [one, other] = [await realm(t, file, given), await realm(t, file, given)]
        stained(one)
        clean(other, `beside it, round ${round}`)
        stained(other)
        await (round % 2 === 0 ? one.close() : one.destroy())
        await other.destroy()
      }
    })

    test('after it was recycled by policy, in each way', LIMIT, async (t) => {
      for (const strategy of ['exclusive', 'rolling', 'reset'] as const) {
        const manager = await realm(t, file, {
          ...given,
          recycle: { calls: 1, jitter: 0, strategy, backoff: { initialMs: 1, maxMs: 1 } },
        })
        if (strategy === 'reset') await manager.snapshot()
        for (let round = 0; round < 3; round += 1) {
          const recycled = once(manager, 'recycle')
          stained(manager)
          await recycled
          const again = once(manager, 'recycle')
          clean(manager, strategy)
          await again
        }
      }
    })

    test('in memories that glue makes later, nor through views that were kept', LIMIT, async (t) => {
      const manager = await realm(t, file, given)
      await manager.snapshot()
      const views: Uint8Array[] = []
      for (let round = 0; round < 4; round += 1) {
        const { WebAssembly } = manager.module
        const later = new WebAssembly.Memory({ initial: 3, maximum: 8 })
        assert.ok(new Uint8Array(later.buffer).every((byte) => byte === 0))
        stained(manager)
        views.push(new Uint8Array(manager.module.memory.buffer), new Uint8Array(later.buffer).fill(0xa5))
        if (round % 2 === 0) {
          await manager.reset()
          // What is newer than the snapshot has no pages afterwards, and fresh ones when it grows.
          assert.equal(later.buffer.byteLength, 0)
          later.grow(5)
          assert.ok(new Uint8Array(later.buffer).every((byte) => byte === 0))
        } else {
          await manager.reload()
        }
        clean(manager, `round ${round}`)
      }
      // The guest has grown its memory, so a reset takes its views as a reload does.
      assert.deepEqual(
        views.map((view) => view.length),
        views.map(() => 0),
      )
    })

    if (made !== SHARED) return

    test('of guest threads that write, trap, or are ended by force', LIMIT, async (t) => {
      const manager = await realm(t, file, given)
      await manager.snapshot()
      for (const renew of [() => manager.reset(), () => manager.reload()]) {
        const { guest } = manager.module
        await manager.spawn([[guest.stain, SECRET]]).finished
        assert.equal(bytesSet(manager), manager.memory.byteLength)
        await renew()
        clean(manager, 'a thread')
        await failure(manager.spawn([[manager.module.guest.stainAndTrap, SECRET]]).finished, 'ERR_WASM_TRAP')
        await renew()
        clean(manager, 'a thread that traps')
        // In the midst of writing: `renew` ends it.
        const before = manager.module.stained
        const thread = manager.spawn([[manager.module.guest.stainForEver, SECRET]])
        await until(() => manager.module.stained > before)
        await renew()
        await thread.finished
        clean(manager, 'a thread that never ends')
      }
    })
  })
}

// ---------------------------------------------------------------- limits

const greedy = wat(
  `(module
    (import "env" "again" (func $again (param i32) (result i32)))
    (memory $m (export "memory") 1 65536)
    (memory $second 1 65536)
    (table $t 1 10000000 externref)
    (table $f 4 4 funcref)
    (type $deep (func (param i32) (result i32)))
    (elem (table $f) (i32.const 0) func $indirect $mutual)
    (data $data "some bytes")
    (func (export "grow") (result i32 i32) (local i32)
      (loop (br_if 0 (i32.ne (memory.grow $m (i32.const 1)) (i32.const -1))))
      (loop (br_if 0 (i32.ne (memory.grow $second (i32.const 7)) (i32.const -1))))
      (memory.size $m) (memory.size $second))
    (func (export "leap") (param i32) (result i32) (memory.grow $m (local.get 0)))
    (func (export "growTable") (result i32)
      (loop (br_if 0 (i32.ne (table.grow $t (ref.null extern) (i32.const 3)) (i32.const -1))))
      (table.size $t))
    (func (export "leapTable") (param i32) (result i32) (table.grow $t (ref.null extern) (local.get 0)))
    (func (export "fill") (param i32 i32) (memory.fill $m (local.get 0) (i32.const 1) (local.get 1)))
    (func (export "copy") (param i32 i32) (memory.copy $m $second (local.get 0) (i32.const 0) (local.get 1)))
    (func (export "init") (param i32 i32) (memory.init $m $data (local.get 0) (i32.const 0) (local.get 1)))
    (func (export "fillTable") (param i32 i32) (table.fill $t (local.get 0) (ref.null extern) (local.get 1)))
    (func (export "load") (param i32) (result i64) (i64.load $m (local.get 0)))
    (func (export "far") (param i32) (i64.store $m offset=0xffffffff (local.get 0) (i64.const 1)))
    (func $direct (export "direct") (param i32) (result i32)
      (i32.add (call $direct (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))
    (func $indirect (export "indirect") (param i32) (result i32)
      (i32.add (call_indirect $f (type $deep) (i32.add (local.get 0) (i32.const 1)) (i32.const 0)) (i32.const 1)))
    (func $mutual (export "mutual") (param i32) (result i32)
      (i32.add (call_indirect $f (type $deep) (local.get 0) (i32.const 1)) (call $direct (local.get 0))))
    (func $around (export "around") (param i32) (result i32)
      (i32.add (call $again (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))
    (func (export "small") (result i32) (i32.const 1)))`,
  'greedy',
)

/** Keeps what it makes on the heap of references. */
const hoarding = wat(
  `(module
    (rec (type $list (struct (field (ref null $list)) (field (ref $bytes)))) (type $bytes (array (mut i64))))
    (memory (export "memory") 1)
    (global $kept (mut (ref null $list)) (ref.null $list))
    (func $keep (param i32)
      (global.set $kept (struct.new $list (global.get $kept) (array.new $bytes (i64.const 1) (local.get 0)))))
    (func (export "hoard") (loop (call $keep (i32.const 1024)) (br 0)))
    (func (export "leap") (call $keep (i32.const 100000000)))
    ;; What is not kept makes room.
    (func (export "churn") (param i32) (result i32)
      (loop
        (global.set $kept (ref.null $list))
        (call $keep (i32.const 1024))
        (local.set 0 (i32.sub (local.get 0) (i32.const 1)))
        (br_if 0 (local.get 0)))
      (i32.const 7)))`,
  'hoarding',
)

/** Calls of `greedy` that reach out of its memory, which has a page. */
const pastTheEnd: [string, ...number[]][] = [
  ['fill', PAGE - 8, 9],
  ['fill', 0, -1],
  ['fill', -1, 1],
  ['fill', PAGE + 1, 0],
  ['copy', PAGE - 1, 2],
  ['copy', 0, PAGE + 1],
  ['copy', -16, 32],
  ['init', PAGE - 2, 3],
  ['init', 0, 11],
  ['load', PAGE - 7],
  ['load', -8],
  ['far', 0],
  ['far', -1],
]

describe('limits', () => {
  const open = (t: Parameters<typeof managed>[0], options: ManagerOptions = {}) =>
    managed(t, greedy, {
      instances: 2,
      limits: { memoryBytes: 5 * PAGE, tableElements: 100 },
      imports: (instance) => ({ env: { again: (depth: number) => instance.exports.around?.(depth) ?? 0 } }),
      ...options,
    })

  test('no memory grows beyond limits.memoryBytes, bit by bit or at once', LIMIT, async (t) => {
    const manager = await open(t)
    assert.deepEqual(await manager.call('grow'), [5, 1])
    assert.deepEqual(manager.callSync('grow'), [5, 1])
    for (const pages of [5, 65_535, 65_536, -1]) {
      assert.equal(await manager.call('leap', [pages]), -1)
      assert.equal(manager.exports.leap?.(pages), -1)
    }
    assert.ok(manager.stats().memoryBytes <= 2 * (5 + 1) * PAGE, `${manager.stats().memoryBytes}`)
  })

  test('the heap of structs, arrays and references is bounded by limits.memoryBytes, too', LIMIT, async (t) => {
    const memoryBytes = 8 << 20
    const manager = await managed(t, hoarding, { limits: { memoryBytes, timeoutMs: 60_000 } })
    const before = process.memoryUsage.rss()
    for (const name of ['hoard', 'leap', 'hoard']) {
      for (const call of [() => manager.call(name), () => outcomeOf(() => manager.callSync(name))]) {
        const error = await failure(call(), 'ERR_WASM_TRAP')
        assert.equal(error.trap, 'allocation-failed', error.message)
      }
    }
    assert.equal(await manager.call('churn', [10_000]), 7)
    // Two heaps of that size at most, and whatever else this process does; without a bound it was 4 GiB.
    const grown = process.memoryUsage.rss() - before
    assert.ok(grown < 200 << 20, `${grown} bytes`)
  })

  test('no table grows beyond limits.tableElements, bit by bit or at once', LIMIT, async (t) => {
    const manager = await open(t)
    assert.equal(await manager.call('growTable'), 100)
    assert.equal(manager.exports.growTable?.(), 100)
    for (const elements of [100, 9_999_999, -1]) assert.equal(await manager.call('leapTable', [elements]), -1)
  })

  test(
    'nothing is read or written past the end, by bulk operations neither, and nothing before it is touched',
    LIMIT,
    async (t) => {
      const manager = await open(t)
      for (const [name, ...args] of pastTheEnd) {
        for (const call of [() => manager.call(name, args), () => outcomeOf(() => manager.callSync(name, args))]) {
          const error = await failure(call(), 'ERR_WASM_TRAP')
          assert.equal(error.trap, 'out-of-bounds-memory', `${name}(${args})`)
        }
        assert.ok(manager.memory.read(0, PAGE).every((byte) => byte === 0))
      }
      const error = await failure(manager.call('fillTable', [0, 2]), 'ERR_WASM_TRAP')
      assert.equal(error.trap, 'out-of-bounds-table')
    },
  )

  for (const name of ['direct', 'indirect', 'mutual', 'around']) {
    test(`recursion without end ends at limits.stackBytes: ${name}`, LIMIT, async (t) => {
      for (const stackBytes of [65_536, undefined, 4 << 20]) {
        const manager = await open(t, { limits: stackBytes === undefined ? {} : { stackBytes } })
        for (const way of ['pool', 'here']) {
          const call = way === 'pool' ? manager.call(name, [0]) : outcomeOf(() => manager.callSync(name, [0]))
          const end = await outcome(call)
          assert.ok('error' in end)
          // JavaScript between the frames may be the first to have no stack left.
          if (!(end.error instanceof RangeError && name === 'around')) {
            hasCode('ERR_WASM_TRAP')(end.error)
            assert.equal((end.error as { trap?: string }).trap, 'stack-overflow')
          }
          assert.equal(await manager.call('small'), 1)
          assert.equal(manager.exports.small?.(), 1)
        }
      }
    })
  }
})

describe('limits in glue', () => {
  const file = glueFile(greedy)
  const open = (t: TestContext, options: GlueOptions = {}) =>
    realm(t, file, { limits: { memoryBytes: 5 * PAGE, tableElements: 100 }, ...options })

  test('no memory grows beyond limits.memoryBytes, by the guest or by the glue', LIMIT, async (t) => {
    const manager = await open(t)
    for (const renew of [() => manager.reload(), () => {}]) {
      const { guest, memory, WebAssembly } = manager.module
      assert.deepEqual(guest.grow(), [5, 1])
      for (const pages of [5, 65_535, 65_536, -1]) assert.equal(guest.leap(pages), -1)
      for (const pages of [1, 65_531]) assert.throws(() => memory.grow(pages), RangeError)
      assert.throws(() => new WebAssembly.Memory({ initial: 6 }), RangeError)
      const made = new WebAssembly.Memory({ initial: 1 })
      assert.throws(() => made.grow(5), RangeError)
      assert.equal(made.grow(4), 1)
      assert.equal(manager.stats().memoryBytes, (5 + 1 + 5) * PAGE)
      await renew()
    }
  })

  test('an instance that begins with more memory or elements than it may have is none', LIMIT, async (t) => {
    const { WebAssembly } = (await open(t)).module
    for (const text of ['(module (memory 6))', '(module (table 101 funcref))']) {
      const module = new WebAssembly.Module(binding.__assemble(text))
      assert.throws(() => new WebAssembly.Instance(module), RangeError, text)
    }
  })

  test('no table grows beyond limits.tableElements, by the guest or by the glue', LIMIT, async (t) => {
    const { guest, WebAssembly } = (await open(t)).module
    assert.equal(guest.growTable(), 100)
    for (const elements of [100, 9_999_999, -1]) assert.equal(guest.leapTable(elements), -1)
    assert.throws(() => new WebAssembly.Table({ element: 'externref', initial: 101 }), RangeError)
    const made = new WebAssembly.Table({ element: 'anyfunc', initial: 1 })
    assert.throws(() => made.grow(100), RangeError)
    assert.equal(made.grow(99), 1)
  })

  test('the heap of structs, arrays and references is bounded by limits.memoryBytes, too', LIMIT, async (t) => {
    const manager = await realm(t, glueFile(hoarding), { limits: { memoryBytes: 8 << 20, timeoutMs: 60_000 } })
    const before = process.memoryUsage.rss()
    for (const name of ['hoard', 'leap', 'hoard']) {
      assert.throws(() => manager.module.guest[name](), { code: 'ERR_WASM_TRAP', trap: 'allocation-failed' })
    }
    assert.equal(manager.module.guest.churn(10_000), 7)
    const grown = process.memoryUsage.rss() - before
    assert.ok(grown < 200 << 20, `${grown} bytes`)
  })

  test('nothing is read or written past the end, and nothing before it is touched', LIMIT, async (t) => {
    const manager = await open(t)
    for (const [name, ...args] of pastTheEnd) {
      assert.throws(() => manager.module.guest[name](...args), { trap: 'out-of-bounds-memory' }, `${name}(${args})`)
      assert.ok(manager.memory.read(0, PAGE).every((byte) => byte === 0))
    }
    assert.throws(() => manager.module.guest.fillTable(0, 2), { trap: 'out-of-bounds-table' })
  })

  test('recursion without end ends at limits.stackBytes, again and again', LIMIT, async (t) => {
    for (const stackBytes of [65_536, undefined, 4 << 20]) {
      const manager = await open(t, { limits: stackBytes === undefined ? {} : { stackBytes } })
      for (const name of ['direct', 'indirect', 'mutual', 'around', 'direct']) {
        assert.throws(
          () => manager.module.guest[name](0),
          // JavaScript between the frames may be the first to have no stack left.
          (error: Any) => error.trap === 'stack-overflow' || (error instanceof RangeError && name === 'around'),
        )
        assert.equal(manager.module.guest.small(), 1)
      }
    }
  })

  test('guest threads are held to memory, tables and stack as well', LIMIT, async (t) => {
    const text = `(module
      (memory (import "env" "memory") 2 64 shared)
      (table $t 1 10000000 externref)
      (func (export "grow") (param i32)
        (loop (br_if 0 (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
        (loop (br_if 0 (i32.ne (table.grow $t (ref.null extern) (i32.const 3)) (i32.const -1))))
        (i32.store (local.get 0) (table.size $t)))
      (func $deep (export "deep") (param i32) (result i32) (i32.add (call $deep (local.get 0)) (i32.const 1))))`
    const manager = await realm(t, glueFile(wat(text, 'greedy-threads'), SHARED), {
      engine: { threads: true },
      limits: { memoryBytes: 5 * PAGE, tableElements: 100, stackBytes: 65_536 },
    })
    await manager.spawn([[manager.module.guest.grow, 8]]).finished
    assert.equal(manager.memory.byteLength, 5 * PAGE)
    assert.equal(manager.memory.read(8, 1)[0], 100)
    for (let round = 0; round < 3; round += 1) {
      const { finished } = manager.spawn([[manager.module.guest.deep, 0]])
      assert.equal((await failure(finished, 'ERR_WASM_TRAP')).trap, 'stack-overflow')
      await manager.reload()
    }
  })
})

function outcomeOf(fn: () => unknown): Promise<unknown> {
  return new Promise((resolve) => resolve(fn()))
}

// ---------------------------------------------------------------- time

const endless: [string, string, ManagerOptions?][] = [
  ['an empty loop', '(func (export "go") (loop (br 0)))'],
  ['a loop of loops', '(func (export "go") (loop (loop (br 1))))'],
  [
    'a loop that fills memory',
    '(memory 1) (func (export "go") (loop (memory.fill (i32.const 0) (i32.const 1) (i32.const 65536)) (br 0)))',
  ],
  [
    'a loop that copies memory',
    '(memory 16) (func (export "go") (loop (memory.copy (i32.const 0) (i32.const 8) (i32.const 1048568)) (br 0)))',
  ],
  [
    'a loop that grows memory by nothing',
    '(memory 1) (func (export "go") (loop (drop (memory.grow (i32.const 0))) (br 0)))',
  ],
  [
    'a loop that fills a table',
    '(table 1000 externref) (func (export "go") (loop (table.fill (i32.const 0) (ref.null extern) (i32.const 1000)) (br 0)))',
  ],
  ['a loop that calls an import', '(import "env" "noop" (func $noop)) (func (export "go") (loop (call $noop) (br 0)))'],
  ['tail calls of itself', '(func $go (export "go") (return_call $go))'],
  [
    'tail calls round a table',
    '(table 1 1 funcref) (elem (i32.const 0) func $go) (type $t (func)) (func $go (export "go") (return_call_indirect (type $t) (i32.const 0)))',
  ],
  [
    'calls that fan out for ever',
    `(func $0 ${'(call $1) '.repeat(2)}) ${Array.from({ length: 40 }, (_, n) => `(func $${n + 1} ${`(call $${n + 2}) `.repeat(2)})`).join(' ')} (func $41 (nop)) (func (export "go") (call $0))`,
  ],
  [
    'exceptions thrown round and round',
    '(tag $e) (func (export "go") (loop $again (block $caught (try_table (catch $e $caught) (throw $e))) (br $again)))',
  ],
  [
    'a wait that nobody ends',
    '(memory 1 1 shared) (func (export "go") (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1))))',
    { engine: { threads: true } },
  ],
  [
    'waits that end at once',
    '(memory 1 1 shared) (func (export "go") (loop (drop (memory.atomic.wait32 (i32.const 0) (i32.const 1) (i64.const 0))) (br 0)))',
    { engine: { threads: true } },
  ],
  [
    'a promise of an import that nobody settles',
    '(import "env" "never" (func $never)) (func (export "go") (call $never))',
  ],
]

describe('a guest that never ends', { concurrency: 2 }, () => {
  const imports = { env: { noop() {}, never: () => new Promise(() => {}) } }

  for (const [what, body, options] of endless) {
    for (const mode of [{}, { signalsBasedTraps: false }]) {
      test(
        `is stopped by timeoutMs, a signal and destroy(): ${what}${'signalsBasedTraps' in mode ? ', without signals' : ''}`,
        LIMIT,
        async (t) => {
          const guest = wat(`(module ${body} (func (export "small") (result i32) (i32.const 1)))`, 'endless')
          const manager = await managed(t, guest, {
            imports,
            ...options,
            engine: { ...options?.engine, ...mode },
          })
          await failure(manager.call('go', [], { timeoutMs: 30 }), 'ERR_WASM_TIMEOUT')
          assert.equal(await manager.call('small'), 1)
          const stop = new AbortController()
          const running = outcome(manager.call('go', [], { signal: stop.signal }))
          setTimeout(() => stop.abort('enough'), 30)
          assert.deepEqual(await running, { error: 'enough' })
          assert.equal(await manager.call('small'), 1)
          const last = outcome(manager.call('go'))
          await manager.destroy()
          const end = await last
          assert.ok('error' in end)
          hasCode('ERR_WASM_INTERRUPTED')(end.error)
        },
      )
    }
  }

  for (const [what, body] of [
    ['its start function', '(func $go (loop (br 0))) (start $go)'],
    ['_initialize', '(func (export "_initialize") (loop (br 0)))'],
  ] as const) {
    test(`is stopped by limits.timeoutMs in ${what}, and there is no manager then`, LIMIT, async (t) => {
      await failure(managed(t, wat(`(module ${body})`, 'start'), { limits: { timeoutMs: 30 } }), 'ERR_WASM_TIMEOUT')
    })
  }
})

describe('a guest that never ends, in glue', { concurrency: 2 }, () => {
  // There, a promise is a value like any other.
  const those = endless.filter(([what]) => !what.includes('promise'))

  for (const [what, body, options] of those) {
    for (const mode of [{}, { signalsBasedTraps: false }]) {
      test(
        `is stopped by limits.timeoutMs: ${what}${'signalsBasedTraps' in mode ? ', without signals' : ''}`,
        LIMIT,
        async (t) => {
          const guest = wat(`(module ${body} (func (export "small") (result i32) (i32.const 1)))`, 'endless')
          const engine = { ...options?.engine, ...mode }
          const manager = await realm(t, glueFile(guest), { limits: { timeoutMs: 30 }, engine })
          // With nobody who could end the wait it is found out at once.
          const code = what === 'a wait that nobody ends' ? 'ERR_WASM_TRAP' : 'ERR_WASM_TIMEOUT'
          for (let round = 0; round < 2; round += 1) {
            assert.throws(() => manager.module.guest.go(), { name: 'RuntimeError', code })
            assert.equal(manager.module.guest.small(), 1)
          }
        },
      )
    }
  }

  test('is stopped by limits.fuel', LIMIT, async (t) => {
    const guest = wat('(module (func (export "go") (loop (br 0))))', 'endless')
    const manager = await realm(t, glueFile(guest), { engine: { fuel: true }, limits: { fuel: 10_000 } })
    assert.throws(() => manager.module.guest.go(), { name: 'RuntimeError', code: 'ERR_WASM_OUT_OF_FUEL' })
  })

  // In a process of its own, because nothing else stops it.
  test('is stopped by limits.timeoutMs in its start function, and there is no manager then', LIMIT, async () => {
    const ended = await child(
      `
      import { loadGlue } from ${JSON.stringify(INDEX_URL)}
      const seen = await loadGlue(process.env.GLUE, { cache: false, limits: { timeoutMs: 30 } }).catch((error) => error)
      report([seen.code, seen.cause?.code])`,
      { env: { GLUE: glueFile(wat('(module (func $go (loop (br 0))) (start $go))', 'start')) }, timeoutMs: 3_000 },
    )
    assert.deepEqual(reported(ended), ['ERR_WASM_RELOAD_FAILED', 'ERR_WASM_TIMEOUT'])
  })
})

test('guests in glue do not keep the program from ending, by itself or by process.exit()', LIMIT, async () => {
  const text = `(module
    (import "env" "stained" (func $stained))
    (memory (import "env" "memory") 2 64 shared)
    (func (export "spin") (call $stained) (loop (br 0)))
    (func (export "wait") (call $stained)
      (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))`
  const env = { GLUE: glueFile(wat(text, 'inside'), SHARED) }
  for (const [end, code] of [
    ['', 0],
    ['process.exit(3)', 3],
  ] as const) {
    const ended = await child(
      `
      import { loadGlue } from ${JSON.stringify(INDEX_URL)}
      const manager = await loadGlue(process.env.GLUE, { cache: false, engine: { threads: true } })
      const { guest } = manager.module
      for (const name of ['spin', 'wait', 'spin', 'wait']) manager.spawn([[guest[name]]])
      while (manager.module.stained < 4) await new Promise((resolve) => setImmediate(resolve))
      report(manager.guestThreads)
      ${end}`,
      { env },
    )
    assert.deepEqual([ended.code, ended.signal], [code, null], ended.stderr)
    assert.match(ended.stdout, /REPORT \{"state":"running","total":4\}/)
  }
})

test('the event loop turns while every thread of the pool is busy with endless guests', LIMIT, async (t) => {
  const guest = wat(
    `(module (memory 16)
      (func (export "spin") (loop (br 0)))
      (func (export "fill") (loop (memory.fill (i32.const 0) (i32.const 1) (i32.const 1048576)) (br 0))))`,
    'busy',
  )
  const manager = await managed(t, guest, { instances: 4, threads: 4 })
  const calls = ['spin', 'fill', 'spin', 'fill', 'spin', 'fill'].map((name) => outcome(manager.call(name)))
  await until(() => manager.stats().instances.busy === 4)
  const delay = monitorEventLoopDelay({ resolution: 5 })
  delay.enable()
  for (let turn = 0; turn < 100; turn += 1) await new Promise((resolve) => setTimeout(resolve, 1))
  delay.disable()
  assert.equal(manager.stats().instances.busy, 4)
  assert.equal(manager.stats().queued, 2)
  // A guest that held it up would do so for ever; the rest is the machine's.
  assert.ok(delay.max < 5e9, `${delay.max / 1e6} ms between two turns`)
  await manager.destroy()
  for (const end of await Promise.all(calls)) assert.ok('error' in end)
})
