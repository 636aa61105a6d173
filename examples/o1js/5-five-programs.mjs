// Five programs in one process: the memory grows by what each of them keeps, and by nothing else.

import { check, compile, finish, MIB, program, say, start, timed, turn } from './common.mjs'

const count = Number(process.env.PROGRAMS ?? 5)
const { molt, o1js } = await start()
const { Field } = o1js
const programs = []
const sizes = []
for (let i = 0; i < count; i++) {
  const each = program(o1js, i)
  programs.push(each)
  await timed(`compile ${i}`, () => compile(o1js, each))
  const { proof } = await timed(`prove ${i}`, () => each.run(Field(i), Field(7)))
  check(await each.verify(proof), 'it verifies')
  await turn()
  sizes.push(molt.stats().memoryBytes)
}
say('memory after each, MiB:', sizes.map((size) => (size / MIB).toFixed(1)).join(' '))
for (let i = 1; i < count; i++) check(sizes[i] - sizes[i - 1] <= 100 * MIB, `program ${i} keeps at most 100 MiB`)
const { proof } = await timed('prove with the first again', () => programs[0].run(Field(9), Field(7)))
check(await programs[0].verify(proof), 'it verifies')
await turn()
check(molt.stats().memoryBytes === sizes.at(-1), 'and left nothing')
await finish(molt)
