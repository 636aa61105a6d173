const seen = new Set()

beforeEach(() => jest.resetModules())

test.each(Array.from({ length: 20 }, (_, n) => n))(
  'a registry that is reset gives a package that works (%i)',
  async (n) => {
    const { WasmError } = require('wasm-molt')
    const { Words } = require('../src/words.js')
    expect(seen).not.toContain(WasmError)
    seen.add(WasmError)
    const words = await Words.open()
    expect(words.manager.exports.add(n, 1)).toBe(n + 1)
    await expect(words.manager.call('boom')).rejects.toBeInstanceOf(WasmError)
    await words.close()
  },
)

test('two registries at once do not mix', async () => {
  const copies = []
  for (let i = 0; i < 2; i += 1) {
    jest.isolateModules(() => copies.push([require('../src/words.js').Words, require('wasm-molt').WasmError]))
  }
  const [[One, OneError], [Other, OtherError]] = copies
  const [one, other] = [await One.open(), await Other.open()]
  expect([one.manager.exports.count(), other.manager.exports.count(), one.manager.exports.count()]).toEqual([1, 1, 2])
  await expect(one.manager.call('boom')).rejects.toBeInstanceOf(OneError)
  await expect(other.manager.call('boom')).rejects.toBeInstanceOf(OtherError)
  await Promise.all([one.close(), other.close()])
})
