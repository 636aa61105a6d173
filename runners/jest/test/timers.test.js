// Fake before anything is loaded, as setup files have it.
jest.useFakeTimers()
const { Words } = require('../src/words.js')

afterAll(() => jest.useRealTimers())

test('calls, timeouts, reloads and the end need no timer of the platform', async () => {
  const words = await Words.open()
  await expect(words.manager.call('add', [1, 2])).resolves.toBe(3)
  await expect(words.manager.call('spin', [], { timeoutMs: 20 })).rejects.toMatchObject({ code: 'ERR_WASM_TIMEOUT' })
  await words.manager.reload()
  await words.close()
})

test('an import that waits for a fake timer goes on when the test says so', async () => {
  const words = await Words.open({ tick: (n) => new Promise((resolve) => setTimeout(resolve, 60_000, n * 2)) })
  const asked = words.manager.call('ask', [4])
  while (jest.getTimerCount() === 0)
    await new Promise((resolve) => jest.requireActual('node:timers').setImmediate(resolve))
  jest.advanceTimersByTime(60_000)
  await expect(asked).resolves.toBe(8)
  await words.close()
})
