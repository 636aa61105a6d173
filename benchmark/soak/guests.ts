// The guests of the soak, as files in a folder of their own.
import { mkdirSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { converterText } from '../converter.ts'

/** A pointer that only goes up; each call that takes from it touches what it took, and never gives it back. */
const leaks = `
  (global $top (mut i32) (i32.const 1024))
  (func $allocate (export "allocate") (param $size i32) (result i32)
    (local $at i32) (local $pages i32)
    (local.set $at (global.get $top))
    (local.set $pages (i32.shr_u
      (i32.add (i32.add (local.get $at) (local.get $size)) (i32.const 65551)) (i32.const 16)))
    (if (i32.gt_u (local.get $pages) (memory.size))
      (then
        (if (i32.eq (memory.grow (i32.sub (local.get $pages) (memory.size))) (i32.const -1))
          (then (return (i32.const 0))))))
    (global.set $top (i32.and (i32.add (i32.add (local.get $at) (local.get $size)) (i32.const 15)) (i32.const -16)))
    (local.get $at))
  (func (export "deallocate") (param i32 i32))
  (func $leak (param $size i32)
    (local $at i32)
    (local.set $at (call $allocate (local.get $size)))
    (if (i32.eqz (local.get $at)) (then (unreachable)))
    (memory.fill (local.get $at) (i32.const 7) (local.get $size)))`

/** A copy of what lies there, turned round; over `leaks`. */
const reversed = `
  (func $reversed (param $at i32) (param $size i32) (result i32)
    (local $out i32) (local $to i32)
    (local.set $out (call $allocate (local.get $size)))
    (if (i32.eqz (local.get $out)) (then (unreachable)))
    (local.set $to (i32.add (local.get $out) (local.get $size)))
    (block $end
      (loop $next
        (br_if $end (i32.eq (local.get $to) (local.get $out)))
        (local.set $to (i32.sub (local.get $to) (i32.const 1)))
        (i32.store8 (local.get $to) (i32.load8_u (local.get $at)))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (local.get $out))`

/** Counts its calls and adds up what they brought, so that a call that is lost, or that ran twice, shows in the end. */
const counter = `(module
  (memory (export "memory") 1 1024)
  (global $count (mut i32) (i32.const 0))
  (global $sum (mut i32) (i32.const 0))
  ${leaks}
  (func (export "next") (param $token i32) (param $size i32) (result i32)
    (call $leak (local.get $size))
    (global.set $count (i32.add (global.get $count) (i32.const 1)))
    (global.set $sum (i32.add (global.get $sum) (local.get $token)))
    (i32.xor (local.get $token) (i32.const 0x55555555)))
  (func (export "count") (result i32) (global.get $count))
  (func (export "sum") (result i32) (global.get $sum))
  (func (export "set") (param i32 i32) (global.set $count (local.get 0)) (global.set $sum (local.get 1)))
  (func (export "boom") (unreachable))
  (func (export "spin") (loop (br 0))))`

/** Does one small thing per export. Its builds differ in `version` alone. */
const bench = (version: number) => `(module
  (import "env" "ask" (func $ask (param i32) (result i32)))
  (import "env" "note" (func $note (param i32 i32)))
  (memory (export "memory") 1 1024)
  (global $tallies (mut i32) (i32.const 0))
  ${leaks}
  (func (export "version") (result i32) (i32.const ${version}))
  (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
  (func (export "ask") (param i32) (result i32) (call $ask (local.get 0)))
  (func (export "tally") (param $token i32) (result i32)
    (global.set $tallies (i32.add (global.get $tallies) (i32.const 1)))
    (call $note (local.get $token) (global.get $tallies))
    (i32.xor (local.get $token) (i32.const 0x55555555)))
  (func (export "leak") (param i32) (result i32) (call $leak (local.get 0)) (memory.size))
  (func (export "boom") (unreachable))
  (func (export "beyond") (result i32) (i32.load (i32.const -4)))
  (func (export "spin") (loop (br 0)))
  ${reversed}
  (func (export "reverse") (param $at i32) (param $size i32) (param $cell i32) (result i32)
    (local $out i32)
    (local.set $out (call $reversed (local.get $at) (local.get $size)))
    (i32.store (local.get $cell) (local.get $size))
    (local.get $out)))`

/** Turns a buffer round, in each form in which buffers come back; what is behind the end of memory, too. */
const buffers = `(module
  (memory (export "memory") 1 1024)
  ${leaks}
  ${reversed}
  (func $packed (param i32 i32) (result i64)
    (i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1))))
  (func (export "reverse") (param i32 i32 i32) (result i32)
    (i32.store (local.get 2) (local.get 1))
    (call $reversed (local.get 0) (local.get 1)))
  (func (export "reverse_packed") (param i32 i32) (result i64)
    (call $packed (call $reversed (local.get 0) (local.get 1)) (local.get 1)))
  (func (export "reverse_pair") (param i32 i32) (result i32 i32)
    (call $reversed (local.get 0) (local.get 1)) (local.get 1))
  (func (export "lie") (param i32 i32 i32) (result i32)
    (i32.store (local.get 2) (i32.const 100)) (i32.const -16))
  (func (export "lie_packed") (param i32 i32) (result i64) (call $packed (i32.const -16) (i32.const 100)))
  (func (export "lie_pair") (param i32 i32) (result i32 i32) (i32.const -16) (i32.const 100)))`

/** What wasm-bindgen would have made of it is below. A cell that is used or freed after it was freed is a trap. */
const cells = `(module
  (import "./cells_bg.js" "__wbg_note" (func $note (param i32) (result i32)))
  (memory (export "memory") 1 1024)
  (global $count (mut i32) (i32.const 0))
  (global $sum (mut i32) (i32.const 0))
  (global $alive (mut i32) (i32.const 0))
  ${leaks}
  (func (export "next") (param $token i32) (param $size i32) (result i32)
    (call $leak (local.get $size))
    (global.set $count (i32.add (global.get $count) (i32.const 1)))
    (global.set $sum (i32.add (global.get $sum) (local.get $token)))
    (call $note (local.get $token)))
  (func (export "count") (result i32) (global.get $count))
  (func (export "sum") (result i32) (global.get $sum))
  (func (export "set") (param i32 i32) (global.set $count (local.get 0)) (global.set $sum (local.get 1)))
  (func (export "alive") (result i32) (global.get $alive))
  (func (export "boom") (unreachable))
  (func $check (param i32)
    (if (i32.ne (i32.load (local.get 0)) (i32.const 0x5ce11)) (then (unreachable))))
  (func (export "cell_new") (param $value i32) (result i32)
    (local $at i32)
    (local.set $at (call $allocate (i32.const 8)))
    (i32.store (local.get $at) (i32.const 0x5ce11))
    (i32.store offset=4 (local.get $at) (local.get $value))
    (global.set $alive (i32.add (global.get $alive) (i32.const 1)))
    (local.get $at))
  (func (export "cell_get") (param i32) (result i32)
    (call $check (local.get 0))
    (i32.load offset=4 (local.get 0)))
  (func (export "__wbg_cell_free") (param i32 i32)
    (call $check (local.get 0))
    (i32.store (local.get 0) (i32.const 0))
    (global.set $alive (i32.sub (global.get $alive) (i32.const 1))))
  (func (export "sum_of") (param $at i32) (param $size i32) (result i32)
    (local $sum i32) (local $end i32)
    (local.set $end (i32.add (local.get $at) (local.get $size)))
    (block $done
      (loop $next
        (br_if $done (i32.eq (local.get $at) (local.get $end)))
        (local.set $sum (i32.add (local.get $sum) (i32.load8_u (local.get $at))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (local.get $sum)))`

/** In the manner of wasm-bindgen's for Node. */
const cellsGlue = `
let wasm
let cached = null
function memory() {
  if (cached === null || cached.byteLength === 0) cached = new Uint8Array(wasm.memory.buffer)
  return cached
}
const CellFinalization = new FinalizationRegistry((ptr) => wasm.__wbg_cell_free(ptr >>> 0, 1))
class Cell {
  constructor(value) {
    this.__wbg_ptr = wasm.cell_new(value) >>> 0
    CellFinalization.register(this, this.__wbg_ptr, this)
  }
  free() {
    const ptr = this.__wbg_ptr
    this.__wbg_ptr = 0
    CellFinalization.unregister(this)
    wasm.__wbg_cell_free(ptr, 0)
  }
  get value() {
    return wasm.cell_get(this.__wbg_ptr)
  }
}
module.exports.Cell = Cell
for (const name of ['next', 'count', 'sum', 'set', 'alive', 'boom']) module.exports[name] = (...args) => wasm[name](...args)
module.exports.sumOf = (text) => {
  const bytes = new TextEncoder().encode(text)
  const ptr = wasm.allocate(bytes.length) >>> 0
  memory().set(bytes, ptr)
  return wasm.sum_of(ptr, bytes.length) >>> 0
}
module.exports.__wbg_note = (token) => wasm.sum() === undefined ? 0 : token ^ 0x55555555
const bytes = require('fs').readFileSync(require('path').join(__dirname, 'cells_bg.wasm'))
wasm = new WebAssembly.Instance(new WebAssembly.Module(bytes), { './cells_bg.js': module.exports }).exports
`

/** Threads add to a word of their own, and one waits for the others at another. */
const threads = `(module
  (import "env" "memory" (memory 1 256 shared))
  (import "env" "note" (func $note (param i32) (result i32)))
  (func (export "add") (param $at i32) (param $times i32)
    (block $done
      (loop $next
        (br_if $done (i32.eqz (local.get $times)))
        (drop (i32.atomic.rmw.add (local.get $at) (i32.const 1)))
        (local.set $times (i32.sub (local.get $times) (i32.const 1)))
        (br $next))))
  (func (export "get") (param i32) (result i32) (i32.atomic.load (local.get 0)))
  (func (export "set") (param i32 i32) (i32.atomic.store (local.get 0) (local.get 1)))
  (func (export "tell") (param i32)
    (drop (i32.atomic.rmw.add (i32.const 8) (call $note (local.get 0)))))
  (func (export "wait") (param i32) (result i32)
    (memory.atomic.wait32 (local.get 0) (i32.const 0) (i64.const -1)))
  (func (export "wake") (param i32) (result i32)
    (i32.atomic.store (local.get 0) (i32.const 1))
    (memory.atomic.notify (local.get 0) (i32.const -1)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "spin") (loop (br 0)))
  (func (export "die") (unreachable)))`

const threadsGlue = `
const memory = new WebAssembly.Memory({ initial: 1, maximum: 256, shared: true })
const notes = []
const bytes = require('fs').readFileSync(require('path').join(__dirname, 'threads_bg.wasm'))
const env = { memory, note: (value) => notes.push(value) && 1 }
module.exports = { notes, wasm: new WebAssembly.Instance(new WebAssembly.Module(bytes), { env }).exports }
`

/** Lacks what is in use. */
const poor = '(module (memory (export "memory") 1) (func (export "version") (result i32) (i32.const 3)))'

export interface Guests {
  counter: string
  bench: [string, string]
  poor: string
  converter: string
  buffers: string
  /** Files of glue. */
  cells: string
  threads: string
}

const { __assemble: assemble } = createRequire(import.meta.url)('../../binding.js') as {
  __assemble(text: string): Uint8Array
}

export function writeGuests(folder: string): Guests {
  const write = (name: string, text: string) => {
    const path = join(folder, `${name}.wat`)
    writeFileSync(path, text)
    return path
  }
  const glue = (name: string, text: string, script: string) => {
    const home = join(folder, name)
    mkdirSync(home)
    writeFileSync(join(home, 'package.json'), JSON.stringify({ name: `soak-${name}`, main: `${name}.js` }))
    writeFileSync(join(home, `${name}_bg.wasm`), assemble(text))
    writeFileSync(join(home, `${name}.js`), script)
    return join(home, `${name}.js`)
  }
  return {
    counter: write('counter', counter),
    bench: [write('bench-1', bench(1)), write('bench-2', bench(2))],
    poor: write('poor', poor),
    converter: write('converter', converterText),
    buffers: write('buffers', buffers),
    cells: glue('cells', cells, cellsGlue),
    threads: glue('threads', threads, threadsGlue),
  }
}
