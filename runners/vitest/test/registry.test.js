import { beforeEach, expect, test, vi } from 'vitest'

beforeEach(() => vi.resetModules())

test.each(Array.from({ length: 20 }, (_, n) => n))(
  'a registry that is reset gives a package that works (%i)',
  async (n) => {
    const { WasmError } = await import('wasm-molt')
    const { Words } = await import('../src/words.js')
    const words = await Words.open()
    expect(words.manager.exports.add(n, 1)).toBe(n + 1)
    await expect(words.manager.call('boom')).rejects.toBeInstanceOf(WasmError)
    await words.close()
  },
)
