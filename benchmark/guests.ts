// Small guests as text: wabt turns them into bytes, so that both engines get the same ones.
import wabt from 'wabt'

const assembler = await wabt()

function assemble(name: string, text: string): Uint8Array<ArrayBuffer> {
  const module = assembler.parseWat(`${name}.wat`, text)
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
