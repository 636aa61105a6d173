// Ten proofs, with a reset after each: all verify, and the linear memory returns to one size each time.

import { check, compile, finish, MIB, program, say, start, timed, turn } from './common.mjs'

const count = Number(process.env.PROOFS ?? 10)
const { molt, o1js } = await start()
const { Field } = o1js
const small = program(o1js)
await timed('compile', () => compile(o1js, small))
const proofs = []
const sizes = []
for (let i = 0; i < count; i++) {
  const { proof } = await timed(`prove ${i}`, () => small.run(Field(i), Field(7)))
  await turn()
  proofs.push(proof)
  sizes.push(molt.stats().memoryBytes)
}
say('memory after each, MiB:', sizes.map((size) => (size / MIB).toFixed(1)).join(' '))
for (const [i, proof] of proofs.entries()) {
  if (!(await small.verify(proof))) throw new Error(`not so: proof ${i} verifies`)
}
check(true, `all ${count} verify`)
await turn()
// The first one may bring Lagrange bases that stay.
check(
  sizes.slice(1).every((size) => size === sizes[1]),
  'the memory is as large after each proof',
)
check(molt.stats().memoryBytes === sizes[1], 'and after the verifications')
await finish(molt)
