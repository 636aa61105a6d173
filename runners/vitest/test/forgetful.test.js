import { expect, test } from 'vitest'
import { loadGlue } from 'wasm-molt'
import { Words } from '../src/words.js'

test('what nobody closes keeps no test runner waiting', async () => {
  const words = await Words.open({ manager: { instances: 2, limits: { timeoutMs: 60_000 } } })
  expect(words.manager.exports.add(1, 2)).toBe(3)
  await words.manager.call('add', [1, 2])
  await words.manager.snapshot()
  globalThis.lease = await words.manager.acquire()
  globalThis.glue = await loadGlue('xxhash-wasm', { cache: false })
})
