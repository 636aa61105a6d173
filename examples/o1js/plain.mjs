// The same work on o1js as it is, to compare with.

import { check, compile, finish, program, start, timed } from './common.mjs'

const count = Number(process.env.PROOFS ?? 3)
const { o1js } = await start({ isPlain: true })
const { Field } = o1js
const small = program(o1js)
await timed('compile', () => compile(o1js, small))
for (let i = 0; i < count; i++) {
  const { proof } = await timed(`prove ${i}`, () => small.run(Field(i), Field(7)))
  check(await timed('verify', () => small.verify(proof)), 'it verifies')
}
await finish()
process.exit(0)
