// A proof is stopped in the middle of a prover, by a time limit; the pool and the next proof are fine.

import { check, compile, finish, note, program, rejection, start, timed } from './common.mjs'

const { molt, o1js } = await start()
const { Field } = o1js
const small = program(o1js)
await timed('compile', () => compile(o1js, small))
await timed('configure', () => molt.configure({ proofTimeoutMs: 1000 }))
const error = await rejection(() => timed('prove', () => small.run(Field(1), Field(7))))
check(
  error instanceof WebAssembly.RuntimeError && error.code === 'ERR_WASM_TIMEOUT',
  `it was stopped: ${error.message}`,
)
check(molt.stats().traps === 1, 'one call was stopped')
await timed('configure', () => molt.configure({ proofTimeoutMs: undefined }))
const { proof } = await timed('prove', () => small.run(Field(2), Field(7)))
check(await small.verify(proof), 'the next one verifies')
note('stopped after a second, the next proof verifies')
await finish(molt)
