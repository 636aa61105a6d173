import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['test/*.test.js'],
    // Compiles without the cache, on whatever machine.
    testTimeout: 60_000,
    hookTimeout: 60_000,
    coverage: { include: ['src/**'], reporter: ['text'] },
  },
})
