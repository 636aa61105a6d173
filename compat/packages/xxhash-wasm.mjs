import { data } from '../inputs.mjs'

export const specifier = 'xxhash-wasm'
export const toolchain = 'hand-written WAT'
export const notes =
  'Bytes in the glue; WebAssembly.instantiate; exports take and return i64. The control: it does not leak.'
export const grows = false
export const smallCalls = 1_000

const inputs = Array.from({ length: 4 }, (_, n) => data(256 * 1024, n))
const strings = inputs.map((input) => Buffer.from(input.subarray(0, 20_000)).toString('latin1'))

export const expose = (xxhash) => xxhash()

export function work(module, i) {
  const input = inputs[i % 4]
  const [small, large] = [module.create32(i), module.create64(BigInt(i))]
  for (let at = 0; at < input.length; at += 5_000) {
    small.update(input.subarray(at, at + 5_000))
    large.update(input.subarray(at, at + 5_000))
  }
  return [
    ...[module.h32Raw(input, i), module.h32ToString(strings[i % 4], i), small.digest()],
    ...[module.h64Raw(input, BigInt(i)), module.h64ToString(strings[i % 4]), large.digest()],
  ].map(String)
}

export function workSmall(module, i) {
  let sum = 0
  for (let n = 0; n < smallCalls; n++) sum ^= module.h32('a short key', n + i)
  return sum
}

// Memory follows the largest input and stays there. Node: 0.3 MiB before and after 500 calls.
export const leak = (module, i) => module.h32Raw(inputs[i % 4], i)
