import { expect, test } from 'vitest'
import { loadGlue } from 'wasm-molt'

test('glue in CommonJS, across a reload', async () => {
  const glue = await loadGlue('xxhash-wasm', { cache: false, expose: (xxhash) => xxhash() })
  expect(glue.module.h32('abc')).toBe(0x32d153ff)
  await glue.reload()
  expect(glue.module.h32('abc')).toBe(0x32d153ff)
  expect(() => glue.module.h64('abc', 1)).toThrow(TypeError)
  await glue.close()
})

test('glue that is an ES module', async () => {
  const glue = await loadGlue('@wasm-fmt/gofmt', { cache: false })
  expect(glue.module.format('package p\nvar x=1\n')).toBe('package p\n\nvar x = 1\n')
  expect(() => glue.module.format('package p\nfunc ( {\n')).toThrow(Error)
  expect(() => glue.module.format('package p\nfunc ( {\n')).toThrow('expected')
  await glue.reload()
  await glue.close()
})
