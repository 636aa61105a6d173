// The smallest that proves and verifies across a reset. Most of it is work that any program costs: SRS, wrap key, wrap prover.

import { check, compile, finish, mib, note, start, timed, turn } from './common.mjs'

const { molt, o1js } = await start()
const { Field, ZkProgram } = o1js
const tiny = ZkProgram({
  name: 'smoke',
  publicInput: Field,
  methods: {
    run: {
      privateInputs: [Field],
      async method(square, root) {
        root.mul(root).assertEquals(square)
      },
    },
  },
})
await timed('compile', () => compile(o1js, tiny))
const proofs = []
for (const root of [3, 4]) {
  const { resets } = molt.stats()
  const { proof } = await timed('prove', () => tiny.run(Field(root * root), Field(root)))
  await turn()
  check(molt.stats().resets > resets, `the memory was reset: ${mib(molt)}`)
  check(await timed('verify', () => tiny.verify(proof)), 'the proof verifies')
  proofs.push(proof)
}
check(await tiny.verify(proofs[0]), 'so does the first again')
note(`two proofs, ${molt.stats().resets} resets, memory ${mib(molt)}`)
await finish(molt)
