// The guests of the soak, as files of text in a folder of their own.
import { writeFileSync } from 'node:fs'
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
  (memory (export "memory") 1 1024)
  ${leaks}
  (func (export "version") (result i32) (i32.const ${version}))
  (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
  (func (export "ask") (param i32) (result i32) (call $ask (local.get 0)))
  (func (export "leak") (param i32) (result i32) (call $leak (local.get 0)) (memory.size))
  (func (export "boom") (unreachable))
  (func (export "beyond") (result i32) (i32.load (i32.const -4)))
  (func (export "spin") (loop (br 0)))
  (func (export "reverse") (param $at i32) (param $size i32) (param $cell i32) (result i32)
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
    (i32.store (local.get $cell) (local.get $size))
    (local.get $out)))`

/** Lacks what is in use. */
const poor = '(module (memory (export "memory") 1) (func (export "version") (result i32) (i32.const 3)))'

export interface Guests {
  counter: string
  bench: [string, string]
  poor: string
  converter: string
}

export function writeGuests(folder: string): Guests {
  const write = (name: string, text: string) => {
    const path = join(folder, `${name}.wat`)
    writeFileSync(path, text)
    return path
  }
  return {
    counter: write('counter', counter),
    bench: [write('bench-1', bench(1)), write('bench-2', bench(2))],
    poor: write('poor', poor),
    converter: write('converter', converterText),
  }
}
