import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { WasmError, WasmModuleManager, WebAssembly } from 'wasm-molt'
import { GUEST, Words } from '../src/words.js'

describe('a module in use', () => {
  let words
  beforeEach(async () => {
    words = await Words.open({ manager: { instances: 2 } })
  })
  afterEach(() => words.close())

  test('answers in each way of calling', async () => {
    expect(await words.manager.call('add', [1, 2])).toBe(3)
    expect(words.manager.exports.add(1, 2)).toBe(3)
    expect(words.manager.callSync('both', [1, 2])).toStrictEqual([2, 1])
    expect(words.manager.exports.wide(5n)).toBe(15n)
    await expect(words.reversed('molt')).resolves.toBe('tlom')
    await expect(words.manager.use((instance) => instance.call('ask', [1]))).resolves.toBe(2)
  })

  test('fails with errors that are what they seem', async () => {
    expect(() => words.manager.exports.boom()).toThrow(WasmError)
    expect(() => words.manager.exports.boom()).toThrow(Error)
    await expect(words.manager.call('boom')).rejects.toBeInstanceOf(WasmError)
    await expect(words.manager.call('boom')).rejects.toMatchObject({ code: 'ERR_WASM_TRAP', trap: 'unreachable' })
    await expect(words.manager.call('spin', [], { timeoutMs: 20 })).rejects.toThrow('timeoutMs = 20')
    await expect(words.manager.call('none')).rejects.toThrow(/none/)
    expect(() => words.manager.exports.add(1n, 2)).toThrow(TypeError)
    expect(() => words.manager.callSync('add', [1n, 2])).toThrow(TypeError)
    expect(() => words.manager.memory.read(-1, 1)).toThrow(RangeError)
    await expect(WasmModuleManager.create(GUEST, { cache: false, imports: 1 })).rejects.toThrow(WasmError)
  })

  test('gives back what the realm of the tests knows', async () => {
    expect(words.manager.memory.read(0, 2)).toEqual(new Uint8Array(2))
    expect(words.manager.memory.buffer).toBeInstanceOf(ArrayBuffer)
    expect(words.manager.stats()).toMatchObject({ state: 'ready', generation: 1 })
    expect(words.manager.stats().instances).toStrictEqual({ total: 2, busy: 0, poisoned: 0 })
    expect(Object.keys(words.manager.exports)).toContain('reverse')
  })

  test('reloads, takes a snapshot and resets to it', async () => {
    const { manager } = words
    manager.exports.count()
    const snapshot = await manager.snapshot()
    expect([manager.exports.count(), manager.exports.count()]).toEqual([2, 3])
    await manager.reset({ to: snapshot })
    expect(manager.exports.count()).toBe(2)
    const report = await manager.reload({ reason: 'a test' })
    expect(report).toMatchObject({ generation: 2, reason: 'a test' })
    expect(manager.exports.count()).toBe(2)
  })

  test('shows a namespace whose classes are those of its objects', () => {
    const memory = new WebAssembly.Memory({ initial: 1, maximum: 2 })
    expect(memory).toBeInstanceOf(WebAssembly.Memory)
    expect(() => memory.grow(2)).toThrow(RangeError)
    expect(() => new WebAssembly.Module(new Uint8Array(4))).toThrow(WebAssembly.CompileError)
  })
})
