// Small guests as text: wabt turns them into bytes, so that both engines get the same ones.
import wabt from 'wabt'
import { converterText } from './converter.ts'

const assembler = await wabt()

function assemble(name: string, text: string, features: { threads?: boolean } = {}): Uint8Array<ArrayBuffer> {
  const module = assembler.parseWat(`${name}.wat`, text, features)
  const { buffer } = module.toBinary({})
  module.destroy()
  return new Uint8Array(buffer)
}

export const add = assemble(
  'add',
  `(module
    (func (export "add") (param i32 i32) (result i32)
      (i32.add (local.get 0) (local.get 1))))`,
)

/** add0, add1, …: for a call site that sees many targets. */
export function manyAdds(count: number): Uint8Array<ArrayBuffer> {
  const one = (index: number) => `
    (func (export "add${index}") (param i32 i32) (result i32)
      (i32.add (local.get 0) (local.get 1)))`
  return assemble('many', `(module ${Array.from({ length: count }, (_, index) => one(index)).join('')})`)
}

/** Takes and returns buffers, as a codec would. The arena goes round, because what is measured is the way there and back. */
export const echo = assemble(
  'echo',
  `(module
    (memory (export "memory") 33)
    (global $next (mut i32) (i32.const 65536))
    (func $allocate (export "allocate") (param $size i32) (result i32)
      (local $at i32)
      (local.set $size (i32.and (i32.add (local.get $size) (i32.const 15)) (i32.const -16)))
      (if (i32.gt_u (i32.add (global.get $next) (local.get $size)) (i32.const 2162688))
        (then (global.set $next (i32.const 65536))))
      (local.set $at (global.get $next))
      (global.set $next (i32.add (local.get $at) (local.get $size)))
      (local.get $at))
    (func (export "deallocate") (param i32 i32))
    (func (export "process") (param $at i32) (param $size i32) (param $outSize i32) (result i32)
      (local $out i32)
      (local.set $out (call $allocate (local.get $size)))
      (memory.copy (local.get $out) (local.get $at) (local.get $size))
      (i32.store (local.get $outSize) (local.get $size))
      (local.get $out)))`,
)

/** Calls its import n times. */
export const caller = assemble(
  'caller',
  `(module
    (import "env" "next" (func $next (param i32) (result i32)))
    (func (export "run") (param $n i32) (result i32)
      (local $value i32)
      (loop $again
        (local.set $value (call $next (local.get $value)))
        (br_if $again (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
      (local.get $value)))`,
)

/** Bytes of state that a ledger has: how many entries it took, and where they left their marks. */
export const ledgerBytes = 64 * 1024

/** Turns text into HTML and leaves about 62 KB behind each time: see converter.ts. */
export const converter = assemble('converter', converterText)

/** Keeps state: counts its calls at address 0, and each call spends some tens of microseconds on marking the rest. */
export const ledger = assemble(
  'ledger',
  `(module
    (memory (export "memory") 1)
    (func (export "count") (result i32) (i32.load (i32.const 0)))
    (func (export "work") (param $value i32) (result i32)
      (local $left i32)
      (local $at i32)
      (local.set $left (i32.const 20000))
      (loop $again
        (local.set $value (i32.xor (local.get $value) (i32.shl (local.get $value) (i32.const 13))))
        (local.set $value (i32.xor (local.get $value) (i32.shr_u (local.get $value) (i32.const 17))))
        (local.set $value (i32.xor (local.get $value) (i32.shl (local.get $value) (i32.const 5))))
        (local.set $at (i32.or (i32.and (local.get $value) (i32.const 65532)) (i32.const 4)))
        (i32.store (local.get $at) (i32.add (i32.load (local.get $at)) (i32.const 1)))
        (br_if $again (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
      (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))
      (local.get $value)))`,
)

/** Writes, or reads, a word of each page between two addresses, of a memory that begins with so many MiB. */
export function pages(mib: number): Uint8Array<ArrayBuffer> {
  return assemble(
    'pages',
    `(module
      (memory (export "memory") ${mib * 16} 32768)
      (func (export "fill") (param $from i32) (param $to i32) (param $value i32)
        (block $end
          (loop $again
            (br_if $end (i32.ge_u (local.get $from) (local.get $to)))
            (i32.store (local.get $from) (local.get $value))
            (local.set $from (i32.add (local.get $from) (i32.const 4096)))
            (br $again))))
      (func (export "sum") (param $from i32) (param $to i32) (result i32)
        (local $sum i32)
        (block $end
          (loop $again
            (br_if $end (i32.ge_u (local.get $from) (local.get $to)))
            (local.set $sum (i32.add (local.get $sum) (i32.load (local.get $from))))
            (local.set $from (i32.add (local.get $from) (i32.const 4096)))
            (br $again)))
        (local.get $sum)))`,
  )
}

export const pageBytes = 4096

/** What `pages` exports. */
export interface Pages {
  fill(from: number, to: number, value: number): void
  sum(from: number, to: number): number
}

/** Threads over a shared memory. Words: 64 whose turn it is, 4 leave, 8 how many serve, 12 done. */
export const threaded = assemble(
  'threaded',
  `(module
    (import "env" "memory" (memory 2 1024 shared))
    (import "env" "ask" (func $ask (param i32) (result i32)))
    (func (export "miss") (result i32)
      (memory.atomic.wait32 (i32.const 0) (i32.const -1) (i64.const -1)))
    (func (export "clear") (i32.atomic.store (i32.const 64) (i32.const 0)) (i32.atomic.store (i32.const 12) (i32.const 0)))
    (func (export "play") (param $me i32) (param $times i32)
      (loop $again
        (block $mine
          (loop $wait
            (br_if $mine (i32.eq (i32.atomic.load (i32.const 64)) (local.get $me)))
            (drop (memory.atomic.wait32 (i32.const 64) (i32.sub (i32.const 1) (local.get $me)) (i64.const -1)))
            (br $wait)))
        (i32.atomic.store (i32.const 64) (i32.sub (i32.const 1) (local.get $me)))
        (drop (memory.atomic.notify (i32.const 64) (i32.const 1)))
        (br_if $again (local.tee $times (i32.sub (local.get $times) (i32.const 1))))))
    (func (export "ask") (param $times i32)
      (loop $again
        (drop (call $ask (local.get $times)))
        (br_if $again (local.tee $times (i32.sub (local.get $times) (i32.const 1)))))
      (i32.atomic.store (i32.const 12) (i32.const 1))
      (drop (memory.atomic.notify (i32.const 12) (i32.const -1))))
    (func (export "join")
      (drop (memory.atomic.wait32 (i32.const 12) (i32.const 0) (i64.const -1))))
    (func (export "open")
      (i32.atomic.store (i32.const 4) (i32.const 0)) (i32.atomic.store (i32.const 8) (i32.const 0)))
    (func (export "served") (result i32) (i32.atomic.load (i32.const 8)))
    (func (export "serve")
      (drop (i32.atomic.rmw.add (i32.const 8) (i32.const 1)))
      (loop $again
        (drop (memory.atomic.wait32 (i32.const 4) (i32.const 0) (i64.const -1)))
        (br_if $again (i32.eqz (i32.atomic.load (i32.const 4))))))
    (func (export "leave")
      (i32.atomic.store (i32.const 4) (i32.const 1))
      (drop (memory.atomic.notify (i32.const 4) (i32.const -1)))))`,
  { threads: true },
)
