// A new instance in the middle of a proof: when the step prover has returned, and before the wrap prover begins.

import { check, compile, finish, mib, note, program, say, start, timed } from './common.mjs'

const { molt, o1js } = await start()
const { Field } = o1js
const small = program(o1js)
await timed('compile', () => compile(o1js, small))
let seen = []
const pauses = []
for (const event of ['step', 'reload', 'wrap']) molt.events.on(event, () => seen.push(event))
for (let i = 0; i < 2; i++) {
  seen = []
  const { generation } = molt.stats()
  molt.events.once('step', () => {
    const began = performance.now()
    molt.reload().then(() => {
      pauses.push((performance.now() - began).toFixed())
      say(`reload in the gap: ${pauses.at(-1)} ms, ${mib(molt)}`)
    })
  })
  const { proof } = await timed(`prove ${i}`, () => small.run(Field(i), Field(7)))
  check(seen.join() === 'step,reload,wrap', 'step prover, reload, wrap prover, in this order')
  check(molt.stats().generation === generation + 1, 'another generation has finished the proof')
  check(await small.verify(proof), 'it verifies')
}
note(`reload in the gap of ${pauses.length} proofs: ${pauses.join(' and ')} ms`)
await finish(molt)
