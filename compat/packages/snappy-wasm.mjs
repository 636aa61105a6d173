import { data, digest, text } from '../inputs.mjs'

// Found by `require` alone: the file for `import` is an ES module that does not say so.
export const specifier = 'snappy-wasm'
export const toolchain = 'wasm-bindgen'
export const notes =
  'The imports are module.exports itself; instantiated while the glue is evaluated (CommonJS, an old wasm-bindgen).'
export const grows = 'peak'
export const smallCalls = 1_000

const inputs = Array.from({ length: 4 }, (_, n) => data(512 * 1024, n))
const strings = ['prose.txt', 'app.ts.txt'].map(text)

export function work(module, i) {
  const packed = module.compress_raw(inputs[i % 4])
  const unpacked = module.decompress_raw(packed)
  const string = `${strings[i % 2]}${i}`
  const small = module.compress(string)
  let refused
  try {
    module.decompress_raw(packed.subarray(0, 1_000))
  } catch (error) {
    refused = String(error.message ?? error)
  }
  return {
    bytes: packed.length,
    same: module.decompress(small) === string,
    refused,
    digest: digest(packed, unpacked, small),
  }
}

export function workSmall(module, i) {
  let sum = 0
  const input = inputs[i % 4]
  for (let n = 0; n < smallCalls; n++) sum += module.compress_raw(input.subarray(n, n + 16)).length
  return sum
}

// Now and then a large one: memory stays at the largest there ever was. Node: 2.3 to 54 MiB at the first.
const large = data(24 * 1024 * 1024, 9)
export const leak = (module, i) => module.compress_raw(i % 50 === 20 ? large : inputs[i % 4].subarray(0, 4_096)).length
