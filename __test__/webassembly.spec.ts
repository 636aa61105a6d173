// The WebAssembly namespace by itself. (The official suite of the JS API runs by scripts/js-api.mjs.)
import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import { createRequire } from 'node:module'
import type { AddressInfo } from 'node:net'
import { test } from 'node:test'
import { Worker } from 'node:worker_threads'
import { loadGlue, WebAssembly as molt, version } from '../index.js'
import { temporaryFolder } from './guests.ts'
import { LIMIT } from './support.ts'

// biome-ignore lint/suspicious/noExplicitAny: the namespace offers more than lib.dom knows (Tag, Exception).
type Any = any
const W = molt as Any
const binding = createRequire(import.meta.url)('../binding.js')
const bytes = (text: string): Uint8Array => binding.__assemble(text)
const make = (text: string, imports?: Any): Any => new W.Instance(new W.Module(bytes(text)), imports).exports

test('it is all there, as data properties, and no part of the global one but the errors', LIMIT, () => {
  assert.equal(W.validate(bytes('(module)')), true)
  for (const name of ['Module', 'Instance', 'Memory', 'Table', 'Global', 'Tag', 'Exception']) {
    assert.equal(typeof W[name], 'function')
    assert.equal(Object.getOwnPropertyDescriptor(W, name)?.writable, true, name)
    assert.notEqual(W[name], (globalThis.WebAssembly as Any)[name])
  }
  for (const name of ['CompileError', 'LinkError', 'RuntimeError']) {
    assert.equal(W[name], (globalThis.WebAssembly as Any)[name])
  }
  assert.equal(Object.prototype.toString.call(W), '[object WebAssembly]')
  assert.ok(version)
})

test('wasm-molt/webassembly is the same object, for require and import', LIMIT, async () => {
  const required = createRequire(import.meta.url)('../webassembly.js')
  const imported = (await import('../webassembly.mjs' as string)) as Any
  assert.equal(required, W)
  assert.equal(imported.default, W)
  assert.equal(imported.WebAssembly, W)
  assert.equal(imported.Memory, W.Memory)
})

test('bytes that are no module are a CompileError with our code; validate says no', LIMIT, async () => {
  const junk = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 9, 9])
  assert.equal(W.validate(junk), false)
  assert.throws(() => new W.Module(junk), { name: 'CompileError', code: 'ERR_WASM_COMPILE' })
  await assert.rejects(W.compile(junk), { name: 'CompileError', code: 'ERR_WASM_COMPILE' })
  assert.throws(() => new W.Module('no bytes'), TypeError)
})

test('imports that are missing or wrong are LinkErrors and TypeErrors that name them', LIMIT, () => {
  const text = '(module (import "env" "f" (func (param i32))) (import "env" "m" (memory 2)))'
  const f = () => {}
  assert.throws(() => make(text), TypeError)
  assert.throws(() => make(text, {}), TypeError)
  assert.throws(() => make(text, { env: { m: new W.Memory({ initial: 2 }) } }), {
    name: 'LinkError',
    message: /env.*f/,
  })
  assert.throws(() => make(text, { env: { f, m: 1 } }), { name: 'LinkError' })
  assert.throws(() => make(text, { env: { f, m: new W.Memory({ initial: 1 }) } }), {
    name: 'LinkError',
    code: 'ERR_WASM_LINK',
  })
  make(text, { env: { f, m: new W.Memory({ initial: 2 }) } })
})

test('instantiate answers in both forms, and takes its bytes at once', LIMIT, async () => {
  const source = bytes('(module (func (export "f") (result i32) (i32.const 7)))')
  const copy = source.slice()
  const pending = W.instantiate(copy)
  copy.fill(0)
  const { module, instance } = await pending
  assert.ok(module instanceof W.Module && instance instanceof W.Instance)
  assert.equal(instance.exports.f(), 7)
  const second = await W.instantiate(module)
  assert.ok(second instanceof W.Instance)
  assert.equal(second.exports.f(), 7)
  assert.ok(Object.isFrozen(instance.exports) && Object.getPrototypeOf(instance.exports) === null)
})

test('streaming takes responses of the right type', LIMIT, async (t) => {
  const body = bytes('(module (func (export "f") (result i32) (i32.const 8)))')
  const server = createServer((request, response) => {
    response.setHeader('Content-Type', request.url === '/wasm' ? 'application/wasm' : 'text/plain')
    response.end(body)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.after(() => server.close())
  const url = (path: string) => `http://127.0.0.1:${(server.address() as AddressInfo).port}${path}`
  const { instance } = await W.instantiateStreaming(fetch(url('/wasm')))
  assert.equal(instance.exports.f(), 8)
  assert.ok((await W.compileStreaming(await fetch(url('/wasm')))) instanceof W.Module)
  await assert.rejects(W.compileStreaming(fetch(url('/text'))), TypeError)
})

test('exported functions keep their identity through tables, globals, re-exports and imports', LIMIT, () => {
  const a = make(`(module
    (table (export "table") 4 funcref)
    (global (export "held") (mut funcref) (ref.null func))
    (func (export "f") (param i32) (result i32) (i32.add (local.get 0) (i32.const 1)))
    (func (export "call") (param i32 i32) (result i32) (call_indirect (param i32) (result i32) (local.get 1) (local.get 0)))
    (elem (i32.const 3) func 0))`)
  assert.equal(a.table.get(3), a.f)
  assert.equal(a.f.name, '0')
  assert.equal(a.f.length, 1)
  a.table.set(0, a.f)
  a.held.value = a.f
  assert.equal(a.held.value, a.f)
  const b = make(
    `(module
      (import "a" "f" (func $f (param i32) (result i32)))
      (import "a" "table" (table 4 funcref))
      (elem (i32.const 1) func $f)
      (export "again" (func $f)) (export "same" (table 0))
      (func (export "own") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 2))))`,
    { a },
  )
  assert.equal(b.again, a.f)
  assert.equal(b.same, a.table)
  assert.equal(a.table.get(1), a.f)
  a.table.set(2, b.own)
  assert.equal(a.call(0, 5), 6)
  assert.equal(a.call(2, 5), 10)
  assert.throws(() => a.table.set(0, () => 1), TypeError)
  assert.throws(() => a.table.get(4), RangeError)
})

test('a helper module puts a JavaScript function into the table of another instance (addFunction)', LIMIT, () => {
  const main = make(`(module
    (table (export "__indirect_function_table") 1 funcref)
    (func (export "dyn") (param i32 i32) (result i32) (call_indirect (param i32) (result i32) (local.get 1) (local.get 0))))`)
  // Emscripten's convertJsFunctionToWasm, for 'ii': 34 bytes.
  const helper = Uint8Array.of(
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 6, 1, 0x60, 1, 0x7f, 1, 0x7f],
    ...[2, 7, 1, 1, 0x65, 1, 0x66, 0, 0, 7, 5, 1, 1, 0x66, 0, 0],
  )
  const wrapped = new W.Instance(new W.Module(helper), { e: { f: (n: number) => n * 3 } }).exports.f
  const table = main.__indirect_function_table
  const index = table.grow(1)
  table.set(index, wrapped)
  assert.equal(table.length, 2)
  assert.equal(table.get(index), wrapped)
  assert.equal(main.dyn(index, 14), 42)
})

test('memories, tables, globals and tags are shared between instances', LIMIT, () => {
  const memory = new W.Memory({ initial: 1, maximum: 4 })
  const table = new W.Table({ element: 'externref', initial: 2 }, 'x')
  const global = new W.Global({ value: 'i64', mutable: true }, 5n)
  const tag = new W.Tag({ parameters: ['i32'] })
  const env = { memory, table, global, tag, five: 5, big: 6n }
  const text = `(module
    (import "env" "memory" (memory 1)) (import "env" "table" (table 2 externref))
    (import "env" "global" (global $g (mut i64))) (import "env" "tag" (tag $t (param i32)))
    (import "env" "five" (global $five i32)) (import "env" "big" (global $big i64))
    (export "memory" (memory 0)) (export "table" (table 0)) (export "global" (global $g)) (export "tag" (tag $t))
    (func (export "poke") (param i32 i32) (i32.store (local.get 0) (local.get 1)))
    (func (export "add") (global.set $g (i64.add (global.get $g) (i64.add (global.get $big) (i64.extend_i32_s (global.get $five))))))
    (func (export "grow") (result i32) (memory.grow (i32.const 1)))
    (func (export "get") (param i32) (result externref) (table.get (local.get 0))))`
  const [a, b] = [make(text, { env }), make(text, { env })]
  for (const it of [a, b]) {
    assert.equal(it.memory, memory)
    assert.equal(it.table, table)
    assert.equal(it.global, global)
    assert.equal(it.tag, tag)
  }
  a.poke(8, 77)
  assert.equal(new Int32Array(memory.buffer)[2], 77)
  a.add()
  b.add()
  assert.equal(global.value, 27n)
  assert.equal(b.get(1), 'x')
  const held = { an: 'object' }
  table.set(0, held)
  assert.equal(a.get(0), held)
  assert.equal(a.grow(), 1)
  assert.equal(b.grow(), 2)
  assert.equal(memory.buffer.byteLength, 3 * 65536)
})

test('a buffer is one object until growth, and every growth detaches it, also inside a call', LIMIT, () => {
  let inside: unknown[] = []
  const it = make(
    `(module (import "env" "look" (func $look)) (memory (export "memory") 1 8)
      (func (export "grow") (drop (memory.grow (i32.const 1))) (call $look))
      (func (export "nothing") (drop (memory.grow (i32.const 0))) ))`,
    {
      env: {
        look: () => {
          inside = [first.byteLength, it.memory.buffer === first, it.memory.buffer.byteLength]
        },
      },
    },
  )
  const first = it.memory.buffer
  assert.equal(it.memory.buffer, first)
  it.grow()
  assert.deepEqual(inside, [0, false, 2 * 65536])
  const second = it.memory.buffer
  assert.equal(it.memory.grow(0), 2)
  assert.equal(second.byteLength, 0)
  assert.notEqual(it.memory.buffer, second)
  assert.throws(() => it.memory.grow(100), RangeError)
})

test('values are coerced as the JS API coerces them', LIMIT, () => {
  const it = make(`(module
    (func (export "i") (param i32) (result i32) (local.get 0))
    (func (export "l") (param i64) (result i64) (local.get 0))
    (func (export "f") (param f32) (result f32) (local.get 0))
    (func (export "d") (param f64) (result f64) (local.get 0))
    (func (export "two") (result i32 i64) (i32.const 1) (i64.const 2))
    (func (export "v") (param v128)))`)
  assert.equal(it.i(2 ** 32 + 5.9), 5)
  assert.equal(it.i('7'), 7)
  assert.equal(it.i(), 0)
  assert.throws(() => it.i(1n), TypeError)
  assert.equal(it.l(2n ** 64n - 1n), -1n)
  assert.throws(() => it.l(1), TypeError)
  assert.equal(it.f(0.1), Math.fround(0.1))
  assert.ok(Number.isNaN(it.d(undefined)))
  assert.deepEqual(it.two(), [1, 2n])
  assert.throws(() => it.v(), TypeError)
  const global = new W.Global({ value: 'i32' }, 3)
  assert.throws(() => {
    global.value = 4
  }, TypeError)
})

test('a trap is a RuntimeError, and the instance goes on', LIMIT, () => {
  const it = make(`(module (memory 1)
    (func (export "load") (param i32) (result i32) (i32.load (local.get 0)))
    (func (export "deep") (call 1))
    (func (export "zero") (result i32) (i32.div_s (i32.const 1) (i32.const 0))))`)
  assert.throws(() => it.load(65536), { name: 'RuntimeError', code: 'ERR_WASM_TRAP', trap: 'out-of-bounds-memory' })
  assert.throws(() => it.zero(), { name: 'RuntimeError', trap: 'integer-divide-by-zero' })
  assert.throws(() => it.deep(), { name: 'RuntimeError', trap: 'stack-overflow' })
  assert.equal(it.load(0), 0)
})

test('a start function that traps leaves nothing unusable behind', LIMIT, () => {
  const memory = new W.Memory({ initial: 1 })
  const text =
    '(module (import "e" "m" (memory 1)) (func $s (i32.store (i32.const 0) (i32.const 9)) unreachable) (start $s))'
  assert.throws(() => make(text, { e: { m: memory } }), { name: 'RuntimeError', trap: 'unreachable' })
  assert.equal(new Uint8Array(memory.buffer)[0], 9)
})

test('exceptions: what is thrown on either side is caught on the other, as the same object', LIMIT, () => {
  const tag = new W.Tag({ parameters: ['i32', 'externref'] })
  const payload = { some: 'thing' }
  const thrown = new W.Exception(tag, [7, payload])
  let throws: () => unknown = () => {
    throw thrown
  }
  const it = make(
    `(module
      (import "env" "tag" (tag $t (param i32 externref))) (import "env" "f" (func $f))
      (func (export "pass") (call $f))
      (func (export "catch") (result i32)
        (block $h (result i32 externref) (try_table (catch $t $h) (call $f)) (return (i32.const -1)))
        (drop))
      (func (export "all") (result i32)
        (block $h (try_table (catch_all $h) (call $f)) (return (i32.const 0)))
        (i32.const 1))
      (func (export "throw") (param i32 externref) (throw $t (local.get 0) (local.get 1))))`,
    { env: { tag, f: () => throws() } },
  )
  assert.throws(it.pass, (error) => error === thrown)
  assert.equal(it.catch(), 7)
  assert.equal(it.all(), 1)
  assert.throws(
    () => it.throw(3, payload),
    (error: Any) =>
      error instanceof W.Exception && error.is(tag) && error.getArg(tag, 0) === 3 && error.getArg(tag, 1) === payload,
  )
  const plain = new RangeError('plain')
  throws = () => {
    throw plain
  }
  assert.throws(it.pass, (error) => error === plain)
  assert.throws(it.catch, (error) => error === plain)
  // JavaScript's own exceptions can be caught by whoever catches all, and traps by nobody.
  assert.equal(it.all(), 1)
  const trap = make('(module (func (export "trap") unreachable))').trap
  throws = () => trap()
  assert.throws(it.all, { name: 'RuntimeError', trap: 'unreachable' })
})

test('imports call back into exports, deeply, and growth on the way is seen', LIMIT, () => {
  const it = make(
    `(module (import "env" "down" (func $down (param i32) (result i32))) (memory (export "memory") 1 200)
      (func (export "step") (param i32) (result i32)
        (if (result i32) (i32.eqz (local.get 0)) (then (memory.grow (i32.const 1)))
          (else (call $down (i32.sub (local.get 0) (i32.const 1)))))))`,
    { env: { down: (n: number) => it.step(n) + 1 } },
  )
  const buffer = it.memory.buffer
  assert.equal(it.step(40), 41)
  assert.equal(buffer.byteLength, 0)
  assert.equal(it.memory.buffer.byteLength, 2 * 65536)
})

test('customs, imports and exports of a module', LIMIT, () => {
  const module = new W.Module(
    bytes(`(module (@custom "note" "one") (@custom "note" "two")
      (import "a" "f" (func)) (import "a" "g" (global i32)) (memory (export "m") 1) (table (export "t") 1 funcref))`),
  )
  assert.deepEqual(W.Module.imports(module), [
    { module: 'a', name: 'f', kind: 'function' },
    { module: 'a', name: 'g', kind: 'global' },
  ])
  assert.deepEqual(W.Module.exports(module), [
    { name: 'm', kind: 'memory' },
    { name: 't', kind: 'table' },
  ])
  const sections = W.Module.customSections(module, 'note').map((it: ArrayBuffer) => Buffer.from(it).toString())
  assert.deepEqual(sections, ['one', 'two'])
  assert.deepEqual(W.Module.customSections(module, 'other'), [])
})

test('memory64 and tables with 64-bit indices take bigints', LIMIT, () => {
  const memory = new W.Memory({ initial: 1n, maximum: 3n, address: 'i64' })
  assert.equal(memory.grow(1n), 1n)
  assert.equal(memory.buffer.byteLength, 2 * 65536)
  const table = new W.Table({ element: 'externref', initial: 1n, address: 'i64' })
  assert.equal(table.length, 1n)
  assert.equal(table.grow(2n), 1n)
})

test('shared memories are refused with a word, so that probes find none', LIMIT, () => {
  assert.throws(() => new W.Memory({ initial: 1, maximum: 1, shared: true }), /without threads/)
  const text = '(module (memory 1 1 shared))'
  assert.equal(W.validate(bytes(text)), false)
  assert.equal(W.validate(bytes('(module (import "e" "m" (memory 1 1 shared)))')), false)
  assert.throws(() => make(text), { name: 'LinkError', message: /shared memory.*without threads/ })
})

test('atomic instructions work on an ordinary memory, and waiting traps there', LIMIT, () => {
  const it = make(`(module (memory 1)
    (func (export "add") (param i32) (result i32) (i32.atomic.rmw.add (i32.const 8) (local.get 0)))
    (func (export "notify") (result i32) (memory.atomic.notify (i32.const 8) (i32.const 1)))
    (func (export "wait") (result i32) (memory.atomic.wait32 (i32.const 8) (i32.const 0) (i64.const -1))))`)
  assert.equal(it.add(3), 0)
  assert.equal(it.add(4), 3)
  assert.equal(it.notify(), 0)
  assert.throws(it.wait, { name: 'RuntimeError', code: 'ERR_WASM_TRAP' })
})

test('each environment has a namespace of its own, and its end disturbs nobody', LIMIT, async () => {
  const worker = new Worker(
    `const { workerData, parentPort } = require('node:worker_threads')
     const { WebAssembly } = require(workerData.index)
     const it = new WebAssembly.Instance(new WebAssembly.Module(workerData.bytes)).exports
     const view = new Uint8Array(it.memory.buffer)
     parentPort.postMessage(it.f(4) + view.length)`,
    {
      eval: true,
      workerData: {
        index: createRequire(import.meta.url).resolve('../index.js'),
        bytes: bytes(
          '(module (memory (export "memory") 1) (func (export "f") (param i32) (result i32) (local.get 0)))',
        ),
      },
    },
  )
  const answer = await new Promise((resolve, reject) => {
    worker.on('message', resolve)
    worker.on('error', reject)
  })
  assert.equal(answer, 65540)
  await worker.terminate()
  assert.equal(make('(module (func (export "f") (result i32) (i32.const 1)))').f(), 1)
})

test('what belongs to another realm is refused as an import, and its functions are called as any', LIMIT, async (t) => {
  const { writeFileSync } = await import('node:fs')
  const { join } = await import('node:path')
  const file = join(temporaryFolder('other'), 'other.cjs')
  writeFileSync(file, 'exports.W = WebAssembly')
  const manager = await loadGlue<Any>(file, { cache: false })
  t.after(() => manager.destroy())
  const other = await manager.use((glue) => glue.W)
  const memory = new other.Memory({ initial: 1 })
  assert.ok(memory instanceof W.Memory && memory instanceof other.Memory)
  assert.throws(() => make('(module (import "e" "m" (memory 1)))', { e: { m: memory } }), {
    name: 'LinkError',
    message: /e.*m/,
  })
  const text =
    '(module (import "e" "f" (func $f (param i32) (result i32))) (func (export "g") (param i32) (result i32) (call $f (local.get 0))))'
  const theirs = new other.Instance(
    new other.Module(
      bytes('(module (func (export "f") (param i32) (result i32) (i32.add (local.get 0) (i32.const 2))))'),
    ),
  )
  assert.equal(make(text, { e: { f: theirs.exports.f } }).g(5), 7)
  // Modules belong to nobody.
  const module = new other.Module(bytes('(module (func (export "f") (result i32) (i32.const 4)))'))
  assert.equal(new W.Instance(module).exports.f(), 4)
})
