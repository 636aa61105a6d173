// Ten proofs, with a reset after each: all verify, and the linear memory returns to one size each time.

import { check, compile, finish, MIB, mib, note, program, say, settled, start, timed, turn } from './common.mjs'

const count = Number(process.env.PROOFS ?? 10)
const { molt, o1js } = await start()
const { Field } = o1js
const small = program(o1js)
await timed('compile', () => compile(o1js, small))
const proofs = []
const sizes = []
const resident = []
for (let i = 0; i < count; i++) {
  const { proof } = await timed(`prove ${i}`, () => small.run(Field(i), Field(7)))
  await turn()
  proofs.push(proof)
  sizes.push(molt.stats().memoryBytes)
  resident.push(await settled())
}
say('memory after each, MiB:', sizes.map((size) => (size / MIB).toFixed(1)).join(' '))
say('settled RSS after each, MiB:', resident.join(' '))
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
const [least, most] = [Math.min(...resident.slice(1)), Math.max(...resident.slice(1))]
note(
  `${count} proofs verify; memory ${mib(molt)} after each; settled RSS ${least} to ${most} MiB, last ${resident.at(-1)}`,
)
await finish(molt)
