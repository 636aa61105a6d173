// V8's engine and ours agree on modules that nobody has written. More of them: npm run differential.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { differential, validity } from './differential.ts'
import { Dice } from './hostile-values.ts'

/** With the time that the generator's build takes. */
const LIMIT = { timeout: 115_000 }

test('modules that are valid do the same on both engines', LIMIT, async () => {
  const { seed } = new Dice()
  console.log(`WASM_MOLT_SEED=${seed}`)
  const tally = await differential(seed, 150)
  console.log(tally)
  // Else nothing was compared. On Deno's 2 MiB of stack V8 ends more calls in its depth, and with them their modules.
  const [made, calls] = process.versions.deno === undefined ? [75, 100] : [15, 15]
  assert.ok(tally.made > made && tally.calls > calls, JSON.stringify(tally))
})

test('both engines refuse the same damaged modules', LIMIT, async () => {
  const { seed } = new Dice()
  console.log(`WASM_MOLT_SEED=${seed}`)
  const tally = await validity(seed, 400)
  console.log(tally)
  assert.ok(tally.valid > 20 && tally.valid < tally.modules - 100, JSON.stringify(tally))
})

test('both engines refuse the same of what the fuzzer has kept', LIMIT, async () => {
  const tally = await validity(0, 0, 'corpus')
  console.log(tally)
  assert.ok(tally.modules > 50 && tally.valid > 5, JSON.stringify(tally))
})
