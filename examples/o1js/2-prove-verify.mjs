// One program, one proof, on this engine; no reload.

import { check, compile, finish, mib, note, program, start, timed, turn } from './common.mjs'

const { molt, o1js } = await start()
const { Field } = o1js
const small = program(o1js)
await timed('compile', () => compile(o1js, small))
const { proof } = await timed('prove', () => small.run(Field(1), Field(7)))
check(await timed('verify', () => small.verify(proof)), 'the proof verifies')
await turn()
check(molt.stats().resets > 0 || process.env.WASM_MOLT_O1JS !== undefined, 'the memory was reset after it')
note(`memory ${mib(molt)} after it`)
await finish(molt)
