// Five programs in one process, one after the other: what proofs leave goes with each reset, and the keys of a program with
// the program. KEEP=1: all programs are kept, so the memory grows by what each of them keeps, and by nothing else.

import { check, compile, finish, MIB, note, program, say, settled, start, timed, turn } from './common.mjs'

const count = Number(process.env.PROGRAMS ?? 5)
const isKept = process.env.KEEP === '1'
const { molt, o1js } = await start()
const { Field } = o1js
const programs = []
const sizes = []
for (let i = 0; i < count; i++) {
  const each = program(o1js, i)
  if (isKept) programs.push(each)
  await timed(`compile ${i}`, () => compile(o1js, each))
  const { proof } = await timed(`prove ${i}`, () => each.run(Field(i), Field(7)))
  check(await each.verify(proof), 'it verifies')
  await turn()
  sizes.push(molt.stats().memoryBytes)
  // Finalizers free the keys of those that are gone.
  say('settled RSS', await settled())
}
const inMib = sizes.map((size) => (size / MIB).toFixed(0))
say('memory after each, MiB:', inMib.join(' '))
note(`${isKept ? 'kept' : 'let go'}, memory after each: ${inMib.join(', ')} MiB`)
const before = sizes.slice(1).map((size, i) => size - sizes[i])
if (isKept) {
  check(
    before.every((growth) => growth <= 100 * MIB),
    'each keeps at most 100 MiB',
  )
  const { proof } = await timed('prove with the first again', () => programs[0].run(Field(9), Field(7)))
  check(await programs[0].verify(proof), 'it verifies')
  await turn()
  check(molt.stats().memoryBytes === sizes.at(-1), 'and left nothing')
} else {
  // One is still there while the next is compiled. From then on some 2 MiB for each stay, where plain o1js grows by 80 until V8 collects the keys.
  check(
    before.slice(1).every((growth) => growth <= 4 * MIB),
    'from the third on the memory grows by at most 4 MiB each',
  )
}
await finish(molt)
