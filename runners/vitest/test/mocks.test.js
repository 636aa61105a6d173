import { expect, test, vi } from 'vitest'
import { WasmModuleManager } from 'wasm-molt'
import { GUEST, Words } from '../src/words.js'

vi.mock('wasm-molt')

test('the whole package can be mocked', async () => {
  WasmModuleManager.create.mockResolvedValue({ invoke: vi.fn().mockResolvedValue(new TextEncoder().encode('as told')) })
  const words = await Words.open()
  await expect(words.reversed('whatever')).resolves.toBe('as told')
  expect(WasmModuleManager.create).toHaveBeenCalledWith(GUEST, expect.objectContaining({ cache: false }))
})

test('one method can be spied on, with the real one behind it', async () => {
  const real = await vi.importActual('wasm-molt')
  const tick = vi.fn((n) => n * 2)
  const manager = await real.WasmModuleManager.create(GUEST, { cache: false, imports: { env: { tick } } })
  const call = vi.spyOn(manager, 'call')
  await expect(manager.call('ask', [21])).resolves.toBe(42)
  expect(call).toHaveBeenCalledTimes(1)
  expect(tick).toHaveBeenCalledWith(21)
  const failure = new Error('as told')
  tick.mockImplementation(() => {
    throw failure
  })
  await expect(manager.call('ask', [1])).rejects.toBe(failure)
  expect(() => manager.exports.ask(1)).toThrow('as told')
  await manager.close()
})
