// The heaviest work below a proof, without the TypeScript of o1js: a structured reference string and a Lagrange basis of it,
// through the glue alone, on the guest's own thread pool.

import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { check, finish, mib, note, say, start, threads, timed } from './common.mjs'

const LOG_SIZE = Number(process.env.LOG_SIZE ?? 12)

const { molt, entry } = await start({ isBare: true })
const require = createRequire(entry)
const compiled = join(dirname(entry), 'bindings/compiled/node_bindings')
const glue = require(join(compiled, molt.stats().version === '2.15.0' ? 'kimchi_wasm.cjs' : 'plonk_wasm.cjs'))

// o1js has it for its Workers.
globalThis.startWorkers = async () => {}
globalThis.terminateWorkers = async () => {}
await glue.initThreadPool(threads, '')
check(molt.stats().threads === threads, `${threads} native threads`)

const srs = await timed('SRS of 2^16', async () => glue.caml_fp_srs_create_parallel(2 ** 16))
// The blinding point comes first.
const points = Array.from(glue.caml_fp_srs_get(srs), (ptr) => wrap('WasmGVesta', ptr))
check(points.length === 2 ** 16 + 1, 'it has 2^16 points, and one to blind with')
await timed(`Lagrange basis of 2^${LOG_SIZE}`, async () => glue.caml_fp_srs_add_lagrange_basis(srs, LOG_SIZE))
say(`the memory is ${mib(molt)}`)

// The polynomials of a Lagrange basis add up to 1, so their commitments add up to that of 1, which is the first point.
check(sameAs(points[1], sumOfBasis()), 'the commitments add up to the first point')
for (const point of points) point.free()

await molt.snapshot()
const before = molt.stats().memoryBytes
glue.caml_fp_srs_add_lagrange_basis(srs, 8)
await molt.reset()
check(molt.stats().threads === threads, 'after a reset there are as many threads')
await timed('reload', () => molt.reload())
say(`memory before the reset ${(before / 2 ** 20).toFixed(1)} MiB, after the reload ${mib(molt)}`)
const first = wrap('WasmGVesta', glue.caml_fp_srs_get(srs)[1])
check(sameAs(first, sumOfBasis()), 'the SRS and its basis are what they were')
note(`2^16 points, basis of 2^${LOG_SIZE}, ${threads} native threads; the same after a reset and a reload`)
await glue.exitThreadPool()
await finish(molt)

function wrap(name, ptr) {
  const object = Object.create(glue[name].prototype)
  object.__wbg_ptr = ptr
  return object
}

function sumOfBasis() {
  let sum
  for (let i = 0; i < 2 ** LOG_SIZE; i++) {
    const [ptr] = glue.caml_fp_srs_lagrange_commitment(srs, 2 ** LOG_SIZE, i).unshifted
    const point = glue.caml_vesta_of_affine(wrap('WasmGVesta', ptr))
    sum = sum === undefined ? point : glue.caml_vesta_add(sum, point)
  }
  return glue.caml_vesta_to_affine(sum)
}

function sameAs(a, b) {
  return Buffer.compare(a.x, b.x) === 0 && Buffer.compare(a.y, b.y) === 0
}
