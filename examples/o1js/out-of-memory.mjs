// A proof needs more memory than it may have: it rejects, nothing else is harmed, and the next one succeeds.

import { check, compile, finish, MIB, note, program, rejection, start, timed } from './common.mjs'

const { molt, o1js } = await start()
const { Field } = o1js
const small = program(o1js)
await timed('compile', () => compile(o1js, small))
const { proof: before } = await timed('prove', () => small.run(Field(0), Field(7)))
await timed('configure', () => molt.configure({ memoryBytes: Number(process.env.LIMIT_MIB ?? 200) * MIB }))
const error = await rejection(() => timed('prove', () => small.run(Field(1), Field(7))))
check(error instanceof WebAssembly.RuntimeError, `it rejects: ${error.message}`)
check(await timed('verify', () => small.verify(before)), 'within the same limit, a proof that was made before verifies')
await timed('configure', () => molt.configure({ memoryBytes: undefined }))
const { proof } = await timed('prove', () => small.run(Field(2), Field(7)))
check(await small.verify(proof), 'the next one verifies')
note('rejected within a limit of 200 MiB, the next proof verifies')
await finish(molt)
