// A new instance between two proofs: everything that o1js holds goes on meaning what it meant.

import { check, compile, finish, mib, note, program, say, start, timed } from './common.mjs'

const { molt, o1js } = await start()
const { Field } = o1js
const pauses = []
const [first, second] = [program(o1js, 0), program(o1js, 1)]
await timed('compile', () => compile(o1js, first))
const { proof: before } = await timed('prove', () => first.run(Field(0), Field(7)))
for (let i = 0; i < 2; i++) {
  await reload()
  say('memory', mib(molt))
  check(await first.verify(before), 'a proof that was made before verifies')
  const { proof } = await timed('prove', () => first.run(Field(i + 1), Field(7)))
  check(await first.verify(proof), 'one that was made after, too')
}
await timed('compile another program', () => compile(o1js, second))
await reload()
const { proof } = await timed('prove', () => second.run(Field(5), Field(7)))
check(await second.verify(proof), 'it verifies')
note(`reloads: ${pauses.join(', ')} ms; memory ${mib(molt)}`)
await finish(molt)

async function reload() {
  const began = performance.now()
  await timed('reload', () => molt.reload())
  pauses.push((performance.now() - began).toFixed())
}
