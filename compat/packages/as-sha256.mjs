import { data, digest } from '../inputs.mjs'

export const specifier = '@chainsafe/as-sha256'
export const toolchain = 'AssemblyScript'
export const notes =
  'A start function; SIMD is probed for with validate(); views of the memory are kept for ever. new SHA256() makes an instance each.'
export const grows = false
export const smallCalls = 1_000

const inputs = Array.from({ length: 4 }, (_, n) => data(64 * 1024, n))

export function work(module, i) {
  const input = inputs[i % 4]
  const parts = [module.digest(input.subarray(i % 64))]
  for (let at = 0; at + 64 <= 8192; at += 64) parts.push(module.digest64(input.subarray(at, at + 64)))
  const four = [0, 1, 2, 3].map((n) => input.subarray(n * 64, n * 64 + 64))
  parts.push(...module.batchHash4UintArray64s(four))
  const objects = [0, 1, 2, 3, 4, 5, 6, 7].map((n) => module.byteArrayToHashObject(input, n * 32))
  for (const object of module.batchHash4HashObjectInputs(objects)) {
    const bytes = new Uint8Array(32)
    module.hashObjectToByteArray(object, bytes, 0)
    parts.push(bytes)
  }
  const level = new Uint8Array(input.length / 2)
  module.hashInto(input, level)
  parts.push(level)
  return {
    simd: module.simdEnabled,
    first: Buffer.from(parts[0]).toString('hex').slice(0, 16),
    digest: digest(...parts),
  }
}

export function workSmall(module, i) {
  let sum = 0
  for (let n = 0; n < smallCalls; n++) sum += module.digest64(inputs[i % 4].subarray(n, n + 64))[0]
  return sum
}

// An instance of 64 KiB each time: not a leak on Node, where the collector takes them (500 calls: 31 MiB, then none).
// Where all instances live in one store it is one, until that store goes.
export function leak(module, i) {
  const hash = new module.SHA256().init().update(inputs[i % 4].subarray(0, 4096))
  return Buffer.from(hash.final()).toString('hex').slice(0, 8)
}
