// Shared memories, and guests with native threads of their own.
import assert from 'node:assert/strict'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { type GlueManager, type GlueOptions, type GuestThread, loadGlue } from '../index.js'
import { temporaryFolder, wat } from './guests.ts'
import { barrier, failure, hasCode, LIMIT, managed, outcome, runNode, until } from './support.ts'

const binding = createRequire(import.meta.url)('../binding.js')
const base64 = (text: string) => Buffer.from(binding.__assemble(text)).toString('base64')

const INDEX = fileURLToPath(new URL('../index.js', import.meta.url))

// biome-ignore lint/suspicious/noExplicitAny: glue has no types.
type Any = any

/** Its threads meet at words of its memory: 0 is waited at, 64 holds results. */
const guest = `(module
  (import "env" "memory" (memory 1 100 shared))
  (import "env" "note" (func $note (param i32) (result i32)))
  (import "env" "ask" (func $ask (param i32) (result i32)))
  (import "env" "fail" (func $fail))
  (table (export "values") 4 externref)
  (global $own (export "own") (mut i32) (i32.const 7))
  (func (export "double") (param i32) (result i32)
    (global.set $own (local.get 0)) (i32.mul (local.get 0) (i32.const 2)))
  (func (export "get") (param i32) (result i32) (i32.atomic.load (local.get 0)))
  (func (export "set") (param i32 i32) (i32.atomic.store (local.get 0) (local.get 1)))
  (func (export "add") (param i32 i32) (result i32) (i32.atomic.rmw.add (local.get 0) (local.get 1)))
  (func (export "size") (result i32) (memory.size))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "wait") (param i32 i32) (result i32)
    (memory.atomic.wait32 (local.get 0) (local.get 1) (i64.const -1)))
  (func (export "wait64") (param i32 i64 i64) (result i32)
    (memory.atomic.wait64 offset=8 (local.get 0) (local.get 1) (local.get 2)))
  (func (export "waitFor") (param i32 i32 i64) (result i32)
    (memory.atomic.wait32 offset=4 (local.get 0) (local.get 1) (local.get 2)))
  (func $notify (export "notify") (param i32) (result i32)
    (memory.atomic.notify (local.get 0) (i32.const -1)))
  (func (export "work") (param i32)
    (drop (call $note (local.get 0)))
    (i32.atomic.store (i32.const 64) (call $ask (i32.const 21)))
    (drop (call $notify (i32.const 0))))
  (func (export "failing") (call $fail))
  (func (export "spin") (loop (br 0)))
  (func (export "bump") (loop (drop (i32.atomic.rmw.add (i32.const 128) (i32.const 1))) (br 0)))
  (func (export "die") unreachable)
  ;; A pool in the manner of rayon's: threads wait for the word at 512 to become 1, and then leave.
  (func (export "serve")
    (drop (i32.atomic.rmw.add (i32.const 516) (i32.const 1)))
    (loop $again
      (drop (memory.atomic.wait32 (i32.const 512) (i32.const 0) (i64.const -1)))
      (br_if $again (i32.eqz (i32.atomic.load (i32.const 512)))))
    (drop (i32.atomic.rmw.sub (i32.const 516) (i32.const 1))))
  (func (export "leave") (i32.atomic.store (i32.const 512) (i32.const 1)) (drop (call $notify (i32.const 512))))
  (func (export "open") (i32.atomic.store (i32.const 512) (i32.const 0))))`

const source = (text = guest) => `
const memory = new WebAssembly.Memory({ initial: 1, maximum: 100, shared: true })
const notes = []
const env = {
  memory,
  note(value) { notes.push(value); return 1 },
  ask(value) {
    instance.exports.values.set(1, { value })
    notes.push(instance.exports.values.get(1).value, instance.exports.own.value)
    return instance.exports.double(value)
  },
  fail() { throw new RangeError('thrown in an import') },
}
const instance = new WebAssembly.Instance(new WebAssembly.Module(Buffer.from('${base64(text)}', 'base64')), { env })
module.exports = { memory, notes, wasm: instance.exports, WebAssembly }
`

async function load(t: TestContext, options: GlueOptions = {}, text = source()): Promise<GlueManager<Any>> {
  const file = join(temporaryFolder('threads'), 'threads.cjs')
  writeFileSync(file, text)
  const manager = await loadGlue<Any>(file, { cache: false, engine: { threads: true }, ...options })
  t.after(() => manager.destroy())
  return manager
}

/** A manager whose pool is started by the hook. */
async function withPool(t: TestContext, count: number, options: GlueOptions = {}): Promise<GlueManager<Any>> {
  let manager: GlueManager<Any> | undefined
  const start = ({ wasm }: Any) => {
    wasm.open()
    for (let i = 0; i < count; i++) manager?.spawn([[wasm.serve]])
  }
  const exit = ({ wasm }: Any) => wasm.leave()
  manager = await load(t, { ...options, threadPool: { exit, start } })
  start(manager.module)
  return manager
}

interface Held {
  mappings: number
  rssBytes: number
}

/** What the process holds; undefined where the system does not tell. */
function held(): Held | undefined {
  if (process.platform !== 'linux') return undefined
  globalThis.gc?.()
  const mappings = readFileSync('/proc/self/maps', 'utf8').split('\n').length
  return { mappings, rssBytes: process.memoryUsage.rss() }
}

const nativeThreads = () => {
  const names = readdirSync('/proc/self/task').map((id) => {
    try {
      return readFileSync(`/proc/self/task/${id}/comm`, 'utf8').trim()
    } catch {
      return ''
    }
  })
  return names.filter((name) => /^molt-threads-g/.test(name)).length
}

test('a thread has an instance of its own over the same memory', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm, notes } = manager.module
  const thread = manager.spawn([[wasm.work, 5]])
  // The JS thread waits, and answers what the thread asks meanwhile; only the thread's own notify wakes it.
  assert.equal(wasm.wait(0, 0), 0)
  assert.equal(wasm.get(64), 42)
  assert.deepEqual([...notes], [5, 21, 7])
  // Table and global of the home instance are untouched: what the import named was the thread's.
  assert.equal(wasm.values.get(1), null)
  assert.equal(wasm.own.value, 7)
  await thread.finished
  assert.deepEqual(manager.guestThreads, { state: 'none', total: 0 })
})

test('imports of threads are answered by the event loop as well', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm, notes } = manager.module
  await Promise.all([1, 2, 3, 4].map((value) => manager.spawn([[wasm.work, value]]).finished))
  assert.equal(notes.length, 12)
  assert.equal(wasm.get(64), 42)
})

test('functions run one after the other', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm } = manager.module
  await manager.spawn([
    [wasm.set, 8, 1],
    [wasm.add, 8, 2],
    [wasm.add, 8, 4],
  ]).finished
  assert.equal(wasm.get(8), 7)
})

test('waits end as the specification says', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm } = manager.module
  assert.equal(wasm.wait(0, 1), 1, 'not equal')
  assert.equal(wasm.wait64(0, 1n, -1n), 1)
  assert.equal(wasm.waitFor(0, 0, 1_000_000n), 2, 'timed out')
  assert.equal(wasm.wait64(0, 0n, 1_000_000n), 2)
  assert.equal(wasm.waitFor(0, 0, 0n), 2)
  assert.throws(() => wasm.wait(2, 0), { name: 'RuntimeError', trap: 'unaligned-atomic' })
  assert.throws(() => wasm.wait(65536, 0), { name: 'RuntimeError', trap: 'out-of-bounds-memory' })
  assert.throws(() => wasm.waitFor(-4, 0, 0n), { name: 'RuntimeError', trap: 'out-of-bounds-memory' })
  assert.equal(wasm.notify(0), 0)
})

test('a shared memory is as the JS API has it, but for the kind of its buffer', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm, memory, WebAssembly } = manager.module
  const before = memory.buffer
  assert.equal(before.byteLength, 65536)
  const view = new Uint8Array(before)
  assert.equal(memory.grow(1), 1)
  // Old buffers stay as they are, and show the same bytes.
  assert.equal(before.byteLength, 65536)
  assert.equal(memory.buffer.byteLength, 131072)
  wasm.set(4, 99)
  assert.equal(view[4], 99)
  assert.equal(new Uint8Array(memory.buffer)[4], 99)
  assert.equal(wasm.grow(2), 2)
  assert.equal(memory.buffer.byteLength, 4 * 65536)
  assert.equal(view[4], 99)
  assert.throws(() => new WebAssembly.Memory({ initial: 1, shared: true }), TypeError)
  assert.equal(WebAssembly.validate(binding.__assemble('(module (memory 1 1 shared))')), true)
  // A growth on another thread shows here.
  await manager.spawn([[wasm.grow, 1]]).finished
  assert.equal(memory.buffer.byteLength, 5 * 65536)
  assert.throws(() => memory.grow(1000), RangeError)
})

test('limits hold for shared memories', LIMIT, async (t) => {
  const manager = await load(t, { limits: { memoryBytes: 3 * 65536 } })
  const { wasm, memory } = manager.module
  assert.equal(wasm.grow(2), 1)
  assert.equal(wasm.grow(1), -1)
  assert.throws(() => memory.grow(1), RangeError)
  await manager.spawn([[wasm.grow, 1]]).finished
  assert.equal(wasm.size(), 3)
})

test('without engine.threads there are no shared memories, and the error says so', LIMIT, async (t) => {
  await failure(load(t, { engine: {} }), 'ERR_WASM_RELOAD_FAILED').catch((error) => {
    assert.match(String(error), /threads: true/)
  })
})

test('threads that run and threads that wait are terminated', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm } = manager.module
  const threads = [
    manager.spawn([[wasm.spin]]),
    manager.spawn([[wasm.wait, 256, 0]]),
    manager.spawn([[wasm.wait64, 256, 0n, -1n]]),
    manager.spawn([[wasm.waitFor, 256, 0, -1n]]),
  ]
  assert.equal(manager.guestThreads.total, 4)
  await Promise.all(threads.map((thread) => thread.terminate()))
  assert.deepEqual(manager.guestThreads, { state: 'none', total: 0 })
  // Nothing is wrong with the others.
  assert.equal(wasm.add(8, 1), 0)
  await Promise.all(threads.map((thread) => thread.finished))
})

test('a thread that traps poisons the realm; who waits hears of it, and a reset heals', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm } = manager.module
  await manager.snapshot()
  wasm.set(8, 1)
  const other = manager.spawn([[wasm.wait, 256, 0]])
  const traps: unknown[] = []
  manager.on('trap', (error) => traps.push(error))
  const thread = manager.spawn([[wasm.die]])
  assert.throws(() => wasm.wait(0, 0), { name: 'RuntimeError', code: 'ERR_WASM_TRAP', trap: 'unreachable' })
  assert.throws(() => wasm.get(8), { name: 'RuntimeError', message: /before a reset\(\) or reload\(\)/ })
  await failure(thread.finished, 'ERR_WASM_TRAP').catch(() => {})
  await other.finished
  await manager.reset()
  assert.equal(wasm.get(8), 0)
  assert.equal(wasm.add(8, 5), 0)
  assert.deepEqual(manager.guestThreads, { state: 'none', total: 0 })
  assert.equal(manager.generation, 1)
})

test('a reload brings everything back as well', LIMIT, async (t) => {
  const manager = await load(t)
  const thread = manager.spawn([[manager.module.wasm.die]])
  await outcome(thread.finished)
  assert.throws(() => manager.module.wasm.get(0), { code: 'ERR_WASM_TRAP' })
  await assert.rejects(manager.snapshot(), { code: 'ERR_WASM_TRAP' })
  await manager.reload()
  assert.equal(manager.module.wasm.get(0), 0)
  assert.equal(manager.generation, 2)
})

test('what an import throws ends its thread, with that very error', LIMIT, async (t) => {
  const manager = await load(t)
  const thread = manager.spawn([[manager.module.wasm.failing]])
  await assert.rejects(thread.finished, { name: 'RangeError', message: 'thrown in an import' })
  await manager.reload()
  assert.equal(manager.module.wasm.get(0), 0)
})

test('a call that fails while threads run poisons, for they may be in the middle of it', LIMIT, async (t) => {
  const manager = await load(t, { limits: { timeoutMs: 100 } })
  const { wasm } = manager.module
  await manager.snapshot()
  const thread = manager.spawn([[wasm.bump]])
  assert.throws(() => wasm.wait(0, 0), { code: 'ERR_WASM_TIMEOUT' })
  await thread.finished
  assert.throws(() => wasm.get(0), { code: 'ERR_WASM_TIMEOUT' })
  await manager.reset()
  assert.equal(wasm.get(128), 0)
  // Without threads glue goes on, as after any trap.
  assert.throws(() => wasm.spin(), { code: 'ERR_WASM_TIMEOUT' })
  assert.equal(wasm.get(0), 0)
})

test('a reset ends the threads, and gives what the memory has grown by back', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm, memory } = manager.module
  const old = memory.buffer
  await manager.snapshot()
  const threads: GuestThread[] = [manager.spawn([[wasm.bump]]), manager.spawn([[wasm.wait, 256, 0]])]
  wasm.grow(50)
  wasm.set(8, 3)
  const report = await manager.reset()
  assert.equal(report.memoryBytesAfter, 65536)
  assert.equal(memory.buffer.byteLength, 65536)
  assert.equal(wasm.size(), 1)
  assert.equal(wasm.get(8), 0)
  assert.equal(wasm.get(128), 0)
  assert.equal(old.byteLength === 0 || old.byteLength === 65536, true)
  assert.equal(manager.guestThreads.total, 0)
  await Promise.all(threads.map((thread) => thread.finished))
  assert.throws(() => wasm.get(20 * 65536), { trap: 'out-of-bounds-memory' })
  assert.equal(manager.resetSync().memoryBytesAfter, 65536)
})

test('a guest all of whose threads wait for each other is no hang', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm } = manager.module
  await manager.snapshot()
  const deadlock = { name: 'RuntimeError', code: 'ERR_WASM_TRAP', trap: 'deadlock' }
  assert.throws(() => wasm.wait(0, 0), deadlock, 'nobody is there')
  assert.equal(wasm.get(0), 0, 'which harms nobody')
  manager.spawn([[wasm.wait, 256, 0]])
  manager.spawn([[wasm.wait64, 256, 0n, -1n]])
  assert.throws(() => wasm.wait(0, 0), deadlock, 'they wait as well')
  await manager.reset()
  manager.spawn([[wasm.set, 8, 1]])
  assert.throws(() => wasm.wait(0, 0), deadlock, 'it ends without a notify')
  await manager.reset()
  // Somebody will do something yet.
  manager.spawn([
    [wasm.waitFor, 256, 0, 300_000_000n],
    [wasm.notify, 0],
  ])
  assert.equal(wasm.wait(0, 0), 0)
})

test('a snapshot needs to know how threads end in good order', LIMIT, async (t) => {
  const manager = await load(t)
  const { wasm } = manager.module
  const thread = manager.spawn([[wasm.wait, 256, 0]])
  await failure(manager.snapshot(), 'ERR_WASM_SNAPSHOT_UNSUPPORTED', /1 of its threads run, and options\.threadPool/)
  await thread.terminate()
  await manager.snapshot()
})

test('a pool exits before a snapshot and is there again after it, and after a reset', LIMIT, async (t) => {
  const manager = await withPool(t, 3)
  const { wasm } = manager.module
  assert.equal(manager.guestThreads.total, 3)
  await manager.snapshot()
  assert.equal(manager.guestThreads.total, 3)
  wasm.set(8, 1)
  await manager.reset()
  assert.equal(wasm.get(8), 0)
  assert.equal(manager.guestThreads.total, 3)
  manager.snapshotSync()
  manager.resetSync()
  assert.equal(manager.guestThreads.total, 3)
  assert.equal(wasm.get(512), 0)
})

test('a pool is started in the next generation by itself', LIMIT, async (t) => {
  const manager = await withPool(t, 2)
  await manager.reload()
  assert.equal(manager.guestThreads.total, 2)
  assert.equal(manager.generation, 2)
})

test('recycling the pool alone waits for scopes, is quick and loses nothing', LIMIT, async (t) => {
  const manager = await withPool(t, 4)
  const { wasm } = manager.module
  wasm.set(8, 17)
  const gate = barrier()
  const scope = manager.use(async ({ wasm }: Any) => {
    await gate.promise
    return wasm.get(8)
  })
  let isDone = false
  const recycled = manager.recycleThreads().then((report) => {
    isDone = true
    return report
  })
  await new Promise(setImmediate)
  assert.equal(isDone, false)
  gate.open()
  assert.equal(await scope, 17)
  const report = await recycled
  assert.equal(report.threadsBefore, 4)
  assert.equal(report.threadsAfter, 4)
  // Far from the 5 s after which threads that do not leave are ended.
  assert.ok(report.durationMs < 4000, `${report.durationMs} ms`)
  assert.equal(wasm.get(8), 17)
  assert.equal(await manager.use(({ wasm }: Any) => wasm.get(8)), 17)
})

test('a pool is resized by its exit and another start', LIMIT, async (t) => {
  let manager: GlueManager<Any> | undefined
  let size = 2
  const start = ({ wasm }: Any) => {
    wasm.open()
    for (let i = 0; i < size; i++) manager?.spawn([[wasm.serve]])
  }
  manager = await load(t, { threadPool: { start, exit: ({ wasm }: Any) => wasm.leave() } })
  start(manager.module)
  size = 5
  const { threadsBefore, threadsAfter } = await manager.recycleThreads()
  assert.deepEqual([threadsBefore, threadsAfter, manager.guestThreads.total], [2, 5, 5])
  // They count when they come to run.
  await until(() => manager?.module.wasm.get(516) === 5)
})

test('a thread that the JS thread never answers says so, and is no hang', { timeout: 90_000 }, async (t) => {
  const manager = await load(t)
  const thread = manager.spawn([[manager.module.wasm.work, 1]])
  // Neither in the event loop nor in the guest.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 32_000)
  await failure(thread.finished, 'ERR_WASM_BUSY', /JavaScript thread/)
  await manager.reload()
  assert.equal(manager.module.wasm.get(0), 0)
})

test('recycling without knowing how is an error that says what is missing', LIMIT, async (t) => {
  const manager = await load(t)
  await failure(manager.recycleThreads(), 'ERR_WASM_INVALID_ARGUMENT', /options\.threadPool/)
})

test('what cannot run on another thread is refused', LIMIT, async (t) => {
  const plain = '(module (memory 1) (func (export "f")))'
  const manager = await load(
    t,
    {},
    `${source()}
    const plain = new WebAssembly.Instance(new WebAssembly.Module(Buffer.from('${base64(plain)}', 'base64')))
    module.exports.plain = plain.exports
    const linked = '(module)'
    module.exports.link = (bytes) => new WebAssembly.Instance(new WebAssembly.Module(bytes),
      { env: { memory, f: plain.exports.f, m: new WebAssembly.Memory({ initial: 1 }) } }).exports`,
  )
  const { wasm, plain: other, link } = manager.module
  const refusal = (code: Any, text: RegExp) => (error: Any) => {
    assert.equal(error.code, code, String(error))
    assert.match(error.message, text)
    return true
  }
  assert.throws(() => manager.spawn([]), refusal('ERR_WASM_INVALID_ARGUMENT', /list of \[function/))
  assert.throws(() => manager.spawn([[() => {}]] as Any), refusal('ERR_WASM_INVALID_ARGUMENT', /export/))
  assert.throws(() => manager.spawn([[other.f]]), refusal('ERR_WASM_INVALID_ARGUMENT', /shared memory/))
  assert.throws(() => manager.spawn([[wasm.spin], [other.f]]), refusal('ERR_WASM_INVALID_ARGUMENT', /one instance/))
  const functions = link(
    binding.__assemble(
      '(module (import "env" "memory" (memory 1 100 shared)) (import "env" "f" (func)) (func (export "g")))',
    ),
  )
  assert.throws(() => manager.spawn([[functions.g]]), refusal('ERR_WASM_LINK', /'env'\.'f' is a function of another/))
  const memories = link(
    binding.__assemble(
      '(module (import "env" "memory" (memory 1 100 shared)) (import "env" "m" (memory 1)) (func (export "g")))',
    ),
  )
  assert.throws(() => manager.spawn([[memories.g]]), refusal('ERR_WASM_LINK', /'env'\.'m' is a memory that is not sh/))
})

test('glue in the manner of wasm-bindgen-rayon starts native threads in place of workers', LIMIT, async (t) => {
  const rayon = guest.replace('(func (export "serve")', '(func (export "wbg_rayon_start_worker") (param i32)')
  const text = `${source(rayon)}
    module.exports.startWorkers = async (count) => Promise.all(Array.from({ length: count }, async () => {
      const worker = new Worker(new URL('file:///helper.js'), { type: 'module' })
      worker.postMessage({ module: undefined, memory, receiver: 1 })
      await new Promise((resolve) => worker.addEventListener('message', resolve, { once: true }))
      return worker
    }))
    module.exports.other = () => new Worker('file:///other.js').postMessage({ cmd: 'load' })`
  const manager = await load(t, {}, text)
  const { wasm, startWorkers, other } = manager.module
  const workers = await startWorkers(3)
  assert.equal(manager.guestThreads.total, 3)
  assert.throws(() => other(), hasCode('ERR_WASM_LINK', /wasm-bindgen-rayon/))
  workers[0].terminate()
  wasm.leave()
  while (manager.guestThreads.total > 0) await new Promise(setImmediate)
})

/** Glue of another guest, whose imports are given as text. */
const other = (text: string, env: string) => `
const memory = new WebAssembly.Memory({ initial: 1, maximum: 9, shared: true })
const env = { memory, ${env} }
const module_ = new WebAssembly.Module(Buffer.from('${base64(text)}', 'base64'))
let wasm = new Proxy({}, { get: (_, key) => instance.exports[key] })
const instance = new WebAssembly.Instance(module_, { env })
module.exports = { wasm: instance.exports, env, memory }`

const MEMORY = '(import "env" "memory" (memory 1 9 shared))'

test('start functions of threads may call imports, while the JS thread waits', LIMIT, async (t) => {
  const text = `(module ${MEMORY} (import "env" "note" (func $note))
    (func $start (call $note) (drop (i32.atomic.rmw.add (i32.const 4) (i32.const 1))))
    (func (export "wake") (i32.atomic.store (i32.const 0) (i32.const 1)) (drop (memory.atomic.notify (i32.const 0) (i32.const 1))))
    (func (export "join") (result i32) (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))
    (func (export "started") (result i32) (i32.atomic.load (i32.const 4)))
    (start $start))`
  const manager = await load(t, {}, other(text, 'note() { env.count = (env.count ?? 0) + 1 }'))
  const { wasm, env } = manager.module
  manager.spawn([[wasm.wake]])
  // 1: the thread was there before anybody waited.
  assert.ok([0, 1].includes(wasm.join()))
  assert.deepEqual([env.count, wasm.started()], [2, 2])
})

test('threads that call imports without end keep neither timers nor timeouts away', LIMIT, async (t) => {
  const text = `(module ${MEMORY} (import "env" "ask" (func $ask (result i32)))
    (func (export "storm") (loop (drop (call $ask)) (br 0)))
    (func (export "one") (result i32) (i32.const 1))
    (func (export "wait") (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))`
  const manager = await load(t, { limits: { timeoutMs: 300 } }, other(text, 'ask: () => wasm.one()'))
  const { wasm } = manager.module
  await manager.snapshot()
  const threads = [1, 2, 3].map(() => manager.spawn([[wasm.storm]]))
  for (let i = 0; i < 10; i++) await new Promise((resolve) => setTimeout(resolve, 1))
  assert.throws(() => wasm.wait(), { code: 'ERR_WASM_TIMEOUT' })
  await manager.reset()
  await Promise.all(threads.map((thread) => thread.finished))
})

test('limits hold for calls from imports that answer a thread', LIMIT, async (t) => {
  const text = `(module ${MEMORY} (import "env" "ask" (func $ask))
    (func (export "work") (call $ask)) (func (export "spin") (loop (br 0))))`
  const manager = await load(t, { limits: { timeoutMs: 100 } }, other(text, 'ask: () => wasm.spin()'))
  const thread = manager.spawn([[manager.module.wasm.work]])
  await assert.rejects(thread.finished, { code: 'ERR_WASM_TIMEOUT' })
  await manager.reload()
})

test('promises are values for threads, as they are at home', LIMIT, async (t) => {
  const text = `(module ${MEMORY} (import "env" "make" (func $make (result externref)))
    (import "env" "take" (func $take (param externref))) (import "env" "later" (func $later))
    (func (export "work") (call $later) (call $take (call $make))))`
  const env =
    'make: () => Promise.resolve(5), take(value) { env.taken = value }, later: async () => { await new Promise(() => {}) }'
  const manager = await load(t, {}, other(text, env))
  await manager.spawn([[manager.module.wasm.work]]).finished
  assert.ok(manager.module.env.taken instanceof Promise)
})

test('functions that are only in tables, and functions as arguments, mean those of the thread', LIMIT, async (t) => {
  const text = `(module ${MEMORY} (import "env" "ask" (func $ask (param funcref) (result funcref)))
    (table (export "table") 2 funcref) (elem (i32.const 0) $hidden)
    (global $seen (export "seen") (mut i32) (i32.const 0))
    (type $f (func (param i32) (result i32)))
    (func $hidden (type $f) (global.set $seen (local.get 0)) (i32.add (local.get 0) (i32.const 1)))
    (func (export "work") (table.set 0 (i32.const 1) (call $ask (table.get 0 (i32.const 0))))
      (i32.atomic.store (i32.const 0) (call_indirect (type $f) (i32.const 30) (i32.const 1)))
      (i32.atomic.store (i32.const 4) (global.get $seen)))
    (func (export "get") (param i32) (result i32) (i32.atomic.load (local.get 0))))`
  const env = `ask(given) {
    env.same = given === instance.exports.table.get(0)
    env.got = instance.exports.table.get(0)(10)
    return given
  }`
  const manager = await load(t, {}, other(text, env))
  const { wasm, env: seen } = manager.module
  await manager.spawn([[wasm.work]]).finished
  assert.deepEqual([seen.same, seen.got, wasm.get(0), wasm.get(4), wasm.seen.value], [true, 11, 31, 30, 0])
})

test('memory discard in glue is of the very instance that imports it, and of its threads', LIMIT, async (t) => {
  const text = `(module ${MEMORY} (import "env" "memory_discard" (func $discard (param i32 i32)))
    (func (export "fill") (memory.fill (i32.const 0) (i32.const 7) (i32.const 65536)))
    (func (export "discard") (param i32 i32) (call $discard (local.get 0) (local.get 1)))
    (func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0))))`
  const extra = `
    const second = new WebAssembly.Memory({ initial: 1, maximum: 9, shared: true })
    module.exports.second = new WebAssembly.Instance(module_, { env: { memory: second } }).exports`
  const manager = await load(t, {}, other(text, '') + extra)
  const { wasm, second } = manager.module
  for (const each of [wasm, second]) each.fill()
  second.discard(16, 100)
  assert.deepEqual([wasm.get(16), second.get(15), second.get(16), second.get(116)], [7, 7, 0, 7])
  await manager.spawn([[wasm.discard, 0, 8]]).finished
  assert.deepEqual([wasm.get(7), wasm.get(8), second.get(7)], [0, 7, 7])
})

test('a pool is back after a snapshot that came to nothing, and after an abort of its recycling', LIMIT, async (t) => {
  const manager = await withPool(t, 2)
  const pool = { state: 'running', total: 2 }
  // Something that no snapshot can hold.
  const { WebAssembly } = manager.module
  const bytes = binding.__assemble('(module (func (export "f") (elem.drop $e)) (func $g) (elem $e func $g))')
  new WebAssembly.Instance(new WebAssembly.Module(bytes))
  await failure(manager.snapshot(), 'ERR_WASM_SNAPSHOT_UNSUPPORTED', /elem\.drop/)
  while (manager.guestThreads.state !== 'running') await new Promise(setImmediate)
  assert.deepEqual(manager.guestThreads, pool)
  await assert.rejects(manager.recycleThreads({ signal: AbortSignal.abort(new Error('no')) }), /no/)
  const gate = barrier()
  const scope = manager.use(() => gate.promise)
  const controller = new AbortController()
  const recycled = manager.recycleThreads({ signal: controller.signal })
  controller.abort(new Error('enough'))
  await assert.rejects(recycled, /enough/)
  gate.open()
  await scope
  assert.equal(await manager.use(({ wasm }: Any) => wasm.get(516)), 2)
  assert.equal((await manager.recycleThreads()).threadsAfter, 2)
})

test('a process with waiting threads ends by itself, by exit() and by destroy()', LIMIT, async () => {
  const file = join(temporaryFolder('threads'), 'threads.cjs')
  writeFileSync(file, source())
  const program = (end: string) => `
    const { loadGlue } = require(${JSON.stringify(INDEX)})
    loadGlue(${JSON.stringify(file)}, { cache: false, engine: { threads: true } }).then(async (manager) => {
      const { wasm } = manager.module
      const threads = [manager.spawn([[wasm.wait, 0, 0]]), manager.spawn([[wasm.spin]])]
      console.log('running', manager.guestThreads.total)
      ${end}
    })`
  for (const end of [
    '',
    'process.exit()',
    'await manager.destroy(); console.log("destroyed")',
    'await manager.close()',
  ]) {
    const { code, stdout, stderr } = await runNode(['--eval', program(end)])
    assert.equal(code, 0, `${end}: ${stderr}`)
    assert.match(stdout, /^running 2\n(destroyed\n)?$/)
  }
})

test('a worker whose JS thread waits inside a guest can be terminated', LIMIT, async () => {
  const file = join(temporaryFolder('threads'), 'threads.cjs')
  writeFileSync(file, source())
  for (const threads of ['', 'manager.spawn([[wasm.spin]]);']) {
    const inside = `
      const { parentPort } = require('node:worker_threads')
      const { loadGlue } = require(${JSON.stringify(INDEX)})
      loadGlue(${JSON.stringify(file)}, { cache: false, engine: { threads: true } }).then((manager) => {
        const { wasm } = manager.module
        ${threads}
        parentPort.postMessage('waits')
        wasm.waitFor(0, 0, 60_000_000_000n)
      })`
    const { code, stdout, stderr } = await runNode([
      '--eval',
      `
      const { Worker } = require('node:worker_threads')
      const worker = new Worker(${JSON.stringify(inside)}, { eval: true })
      worker.on('message', () => setTimeout(async () => {
        console.log('ended', await worker.terminate())
      }, 50))`,
    ])
    assert.equal(code, 0, stderr)
    assert.match(stdout, /^ended 1\n$/)
  }
})

test('a call on the pool that waits can be stopped', LIMIT, async (t) => {
  for (const engine of [{ threads: true }, { threads: true, signalsBasedTraps: false }]) {
    const manager = await managed(
      t,
      wat(`(module (memory 1 1 shared)
        (func (export "wait") (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))`),
      { cache: false, engine },
    )
    await failure(manager.call('wait', [], { timeoutMs: 50 }), 'ERR_WASM_TIMEOUT')
    const controller = new AbortController()
    const aborted = manager.call('wait', [], { signal: controller.signal })
    setImmediate(() => controller.abort(new Error('enough')))
    await assert.rejects(aborted, /enough/)
    const running = outcome(manager.call('wait'))
    await manager.destroy()
    assert.ok('error' in (await running))
  }
})

test('starts, ends, traps and resets at random leave nothing behind', { timeout: 120_000 }, async (t) => {
  const manager = await withPool(t, 2)
  const { wasm } = manager.module
  await manager.snapshot()
  const seed = Number(process.env.MOLT_SEED ?? 1)
  let state = seed
  const random = (below: number) => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0
    return (state >>> 8) % below
  }
  const rounds = Number(process.env.MOLT_ROUNDS ?? 400)
  let settled: Held | undefined
  for (let round = 0; round < rounds; round++) {
    const kinds = ['spin', 'bump', 'wait', 'work', 'die', 'failing']
    const threads = Array.from({ length: 1 + random(4) }, () => {
      const kind = kinds[random(kinds.length)]
      try {
        return manager.spawn([kind === 'wait' ? [wasm.wait, 256, 0] : [wasm[kind as string], 1]])
      } catch (error) {
        assert.match((error as Any).code, /TRAP|INTERRUPTED/, `seed ${seed}, round ${round}`)
        return undefined
      }
    })
    if (random(2) === 0) await new Promise(setImmediate)
    if (random(3) === 0) await Promise.all(threads.slice(0, 2).map((thread) => thread?.terminate()))
    if (random(4) === 0) {
      try {
        wasm.waitFor(300, 0, BigInt(random(2_000_000)))
      } catch {
        // A thread has trapped meanwhile.
      }
    }
    await manager.reset()
    assert.equal(wasm.get(128), 0, `seed ${seed}, round ${round}`)
    assert.equal(manager.guestThreads.total, 2, `seed ${seed}, round ${round}`)
    for (const thread of threads) void thread?.finished.catch(() => {})
    if (round === 100) settled = held()
  }
  if (settled !== undefined) {
    const now = held() as Held
    // The C library keeps up to 40 MiB of stacks for the next threads, and its arenas.
    assert.ok(now.mappings < settled.mappings + 150, `mappings ${settled.mappings} -> ${now.mappings}`)
    assert.ok(now.rssBytes < settled.rssBytes + 120e6, `RSS ${settled.rssBytes} -> ${now.rssBytes}`)
    if (rounds > 500) console.log(settled, now)
  }
  // The system lists a thread for a moment after it was waited for.
  if (process.platform === 'linux') await until(() => nativeThreads() === 2)
  await manager.destroy()
  if (process.platform === 'linux') await until(() => nativeThreads() === 0)
})
