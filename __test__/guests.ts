// Guests as text or bytes, and the temporary files they live in while a test file runs.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

let root: string | undefined
let count = 0

/** A folder of this process; it is removed when the process ends. */
export function temporaryFolder(name = 'folder'): string {
  if (root === undefined) {
    const made = mkdtempSync(join(tmpdir(), 'wasm-molt-test-'))
    process.on('exit', () => rmSync(made, { recursive: true, force: true }))
    root = made
  }
  count += 1
  const folder = join(root, `${count}-${name}`)
  mkdirSync(folder)
  return folder
}

/** Writes a guest where the addon can load it from. The file's name becomes the manager's. */
export function wat(text: string, name = 'guest'): string {
  const path = join(temporaryFolder(name), `${name}.wat`)
  writeFileSync(path, text)
  return path
}

// ---------------------------------------------------------------- the workbench

/** Does one small thing per export; `entered` and `hold` are the synchronisation points. */
export const workbench = wat(
  `(module
    (import "env" "entered" (func $entered))
    (import "env" "hold" (func $hold (param i32) (result i32)))
    (memory (export "memory") 1 8192)
    (global $count (mut i32) (i32.const 0))
    (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
    (func (export "count") (result i32)
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (global.get $count))
    (func (export "peek") (result i32) (global.get $count))
    (func (export "set") (param i32) (global.set $count (local.get 0)))
    (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
    (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "size") (result i32) (memory.size))
    (func (export "boom") (unreachable))
    (func (export "entered") (call $entered))
    (func (export "hold") (param i32) (result i32) (call $hold (local.get 0)))
    (func (export "holdThenCount") (param i32) (result i32)
      (drop (call $hold (local.get 0)))
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (global.get $count))
    (func (export "holdThenGrow") (param i32) (result i32)
      (drop (call $hold (local.get 0)))
      (memory.grow (local.get 0)))
    (func (export "spin") (call $entered) (loop (br 0)))
    (func (export "burn") (param i32) (result i32) (local $x i32)
      (local.set $x (i32.const 1))
      (loop
        (local.set $x (i32.add (i32.mul (local.get $x) (i32.const 1664525)) (i32.const 1013904223)))
        (local.set 0 (i32.sub (local.get 0) (i32.const 1)))
        (br_if 0 (local.get 0)))
      (local.get $x))
    (func (export "touch") (param $from i32) (param $bytes i32) (local $end i32)
      (local.set $end (i32.add (local.get $from) (local.get $bytes)))
      (block (loop
        (br_if 1 (i32.ge_u (local.get $from) (local.get $end)))
        (i32.store8 (local.get $from) (i32.const 1))
        (local.set $from (i32.add (local.get $from) (i32.const 4096)))
        (br 0)))))`,
  'workbench',
)

/** Takes and returns buffers in all three forms; each answers the input reversed. */
export const buffers = wat(
  `(module
    (memory (export "memory") 1 1024)
    (global $top (mut i32) (i32.const 1024))
    (global $live (mut i32) (i32.const 0))
    (func $allocate (export "allocate") (param $size i32) (result i32) (local $ptr i32)
      (local.set $ptr (global.get $top))
      (global.set $top (i32.and (i32.add (i32.add (local.get $ptr) (local.get $size)) (i32.const 7)) (i32.const -8)))
      (block
        (br_if 0 (i32.le_u (global.get $top) (i32.mul (memory.size) (i32.const 65536))))
        (drop (memory.grow (i32.add
          (i32.div_u (i32.sub (global.get $top) (i32.mul (memory.size) (i32.const 65536))) (i32.const 65536))
          (i32.const 1)))))
      (global.set $live (i32.add (global.get $live) (i32.const 1)))
      (local.get $ptr))
    (func $free (export "deallocate") (param i32 i32)
      (global.set $live (i32.sub (global.get $live) (i32.const 1)))
      ;; Nothing is left: start over, so that tests can run for ever.
      (if (i32.eqz (global.get $live)) (then (global.set $top (i32.const 1024)))))
    (func (export "live") (result i32) (global.get $live))
    (func $reverse (param $ptr i32) (param $len i32) (result i32) (local $out i32) (local $i i32)
      ;; An empty answer needs no buffer, and is not given back.
      (if (i32.eqz (local.get $len)) (then (return (i32.const 0))))
      (local.set $out (call $allocate (local.get $len)))
      (block (loop
        (br_if 1 (i32.ge_u (local.get $i) (local.get $len)))
        (i32.store8
          (i32.sub (i32.add (local.get $out) (local.get $len)) (i32.add (local.get $i) (i32.const 1)))
          (i32.load8_u (i32.add (local.get $ptr) (local.get $i))))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br 0)))
      (local.get $out))
    (func (export "reverse") (param $ptr i32) (param $len i32) (param $cell i32) (result i32)
      (i32.store (local.get $cell) (local.get $len))
      (call $reverse (local.get $ptr) (local.get $len)))
    (func (export "reversePacked") (param $ptr i32) (param $len i32) (result i64)
      (i64.or
        (i64.shl (i64.extend_i32_u (call $reverse (local.get $ptr) (local.get $len))) (i64.const 32))
        (i64.extend_i32_u (local.get $len))))
    (func (export "reverseMulti") (param $ptr i32) (param $len i32) (result i32 i32)
      (call $reverse (local.get $ptr) (local.get $len))
      (local.get $len))
    (func (export "trap") (param i32 i32 i32) (result i32) (unreachable))
    (func (export "lie") (param $ptr i32) (param $len i32) (param $cell i32) (result i32)
      (i32.store (local.get $cell) (i32.const 0x7fffffff))
      (i32.const 16))
    (func (export "never") (param i32) (result i32) (i32.const 0))
    (func (export "spin") (param i32 i32 i32) (result i32) (loop (br 0)) (unreachable))
    (func (export "wrongType") (param i32) (result i32) (i32.const 0)))`,
  'buffers',
)

/**
 * Keeps one stamp in its memory and one in a global; `read` reads one, calls `pause`, and reads the other. `next` counts.
 * A call that saw a mixture of two instances would return two different stamps.
 */
export const stamped = wat(
  `(module
    (import "env" "pause" (func $pause (param i32)))
    (memory (export "memory") 1)
    (global $stamp (mut i32) (i32.const 0))
    (global $count (mut i32) (i32.const 0))
    (func (export "stamp") (param i32)
      (i32.store (i32.const 0) (local.get 0))
      (global.set $stamp (local.get 0)))
    (func (export "read") (param i32) (result i32 i32)
      (i32.load (i32.const 0))
      (call $pause (local.get 0))
      (global.get $stamp))
    (func (export "next") (result i32)
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (global.get $count))
    (func (export "count") (result i32) (global.get $count))
    (func (export "setCount") (param i32) (global.set $count (local.get 0))))`,
  'stamped',
)

// ---------------------------------------------------------------- bytes by hand

export type ValueType = 'i32' | 'i64' | 'f32' | 'f64' | 'v128' | 'funcref' | 'externref'

const TYPE_BYTES: Record<ValueType, number> = {
  i32: 0x7f,
  i64: 0x7e,
  f32: 0x7d,
  f64: 0x7c,
  v128: 0x7b,
  funcref: 0x70,
  externref: 0x6f,
}

export interface Type {
  params: ValueType[]
  results: ValueType[]
}

export interface BinaryModule {
  /** Function imports of the namespace `env`. Their indices come first. */
  imports?: (Type & { name: string })[]
  /** Functions that are exported under their names; `body` without locals and without the final `end`. */
  functions: (Type & { name: string; body: number[] })[]
  /** Minimum pages of an exported memory. */
  memory?: number
  /** The name section's module name. */
  moduleName?: string
}

export function leb(value: number): number[] {
  const bytes: number[] = []
  let rest = value
  do {
    const byte = rest & 0x7f
    rest >>>= 7
    bytes.push(rest === 0 ? byte : byte | 0x80)
  } while (rest !== 0)
  return bytes
}

const list = (items: number[][]): number[] => [leb(items.length), ...items].flat()
const text = (value: string): number[] => {
  const bytes = [...new TextEncoder().encode(value)]
  return [...leb(bytes.length), ...bytes]
}
const section = (id: number, bytes: number[]): number[] => [[id], leb(bytes.length), bytes].flat()

export const WASM_HEADER = [0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00]

/** A module in bytes: for what text cannot say, and for Node's own engine beside ours. */
export function binary(module: BinaryModule): Uint8Array<ArrayBuffer> {
  const imports = module.imports ?? []
  const types = [...imports, ...module.functions].map(({ params, results }) => [
    0x60,
    ...list(params.map((type) => [TYPE_BYTES[type]])),
    ...list(results.map((type) => [TYPE_BYTES[type]])),
  ])
  const sections = [WASM_HEADER, section(1, list(types))]
  if (imports.length > 0) {
    sections.push(section(2, list(imports.map(({ name }, index) => [...text('env'), ...text(name), 0, ...leb(index)]))))
  }
  sections.push(section(3, list(module.functions.map((_, index) => leb(imports.length + index)))))
  const exported = module.functions.map(({ name }, index) => [...text(name), 0, ...leb(imports.length + index)])
  if (module.memory !== undefined) {
    sections.push(section(5, list([[0, ...leb(module.memory)]])))
    exported.push([...text('memory'), 2, 0])
  }
  sections.push(section(7, list(exported)))
  const bodies = module.functions.map(({ body }) => {
    const code = [0, ...body, 0x0b]
    return [...leb(code.length), ...code]
  })
  sections.push(section(10, list(bodies)))
  if (module.moduleName !== undefined) {
    const name = text(module.moduleName)
    sections.push(section(0, [...text('name'), 0, ...leb(name.length), ...name]))
  }
  return Uint8Array.from(sections.flat())
}

/** `add(i32, i32) -> i32` and nothing else. */
export const adder = (moduleName?: string): Uint8Array<ArrayBuffer> =>
  binary({
    functions: [{ name: 'add', params: ['i32', 'i32'], results: ['i32'], body: [0x20, 0, 0x20, 1, 0x6a] }],
    ...(moduleName === undefined ? {} : { moduleName }),
  })

/** Takes a compiler a while: so many functions of a few hundred instructions each. */
export function bulky(functions: number): Uint8Array<ArrayBuffer> {
  const body = [0x20, 0]
  for (let step = 0; step < 150; step += 1) body.push(0x20, 1, 0x6c, 0x20, 0, 0x73, 0x20, 1, 0x6a)
  return binary({
    functions: Array.from({ length: functions }, (_, index) => ({
      name: `f${index}`,
      params: ['i32', 'i32'],
      results: ['i32'],
      body: [...body, 0x41, ...leb(index & 63), 0x6a],
    })),
  })
}
