// What the workloads share: input files, digests, numbers that look random and are the same everywhere.
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'

const require = createRequire(import.meta.url)

/** @param {string} name of a file in inputs/ */
export const text = (name) => readFileSync(new URL(`inputs/${name}`, import.meta.url), 'utf8')

/** The bytes of a package's file. @param {string} specifier */
export const bytesOf = (specifier) => readFileSync(require.resolve(specifier))

let digests = true

/** For timings, where the same digests on both sides would hide differences. */
export function withoutDigests() {
  digests = false
}

/** Short, and different for different bytes. @param {...(string | Uint8Array)} parts */
export function digest(...parts) {
  if (!digests) return ''
  const hash = createHash('sha256')
  for (const part of parts) hash.update(part)
  return hash.digest('hex').slice(0, 16)
}

/** xorshift32: numbers from 0 up to 1. @param {number} seed */
export function random(seed) {
  let x = (seed + 1) * 0x9e3779b1
  return () => {
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    return (x >>> 0) / 2 ** 32
  }
}

/** Bytes that compress about as text does. @param {number} length @param {number} seed */
export function data(length, seed) {
  const next = random(seed)
  const words = Array.from({ length: 64 }, () =>
    Buffer.from(
      next()
        .toString(36)
        .slice(2, 4 + next() * 8),
    ),
  )
  const bytes = Buffer.alloc(length)
  for (let at = 0; at < length; ) at += words[(next() * 64) | 0].copy(bytes, at) + 1
  return new Uint8Array(bytes.buffer, bytes.byteOffset, length)
}

const packages = {
  gofmt: '@wasm-fmt/gofmt',
  oniguruma: 'vscode-oniguruma',
  quickjs: '@jitl/quickjs-wasmfile-release-sync',
  'as-sha256': '@chainsafe/as-sha256',
  'cedar-wasm': '@cedar-policy/cedar-wasm',
}

/** What a workload's package is called. @param {string} name */
export const packageName = (name) => packages[name] ?? name

/** Its pinned version. @param {string} name */
export const versionOf = (name) => require('./package.json').dependencies[packageName(name)]
