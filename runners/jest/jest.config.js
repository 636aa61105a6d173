module.exports = {
  testMatch: ['**/test/*.test.js'],
  // Compiles without the cache, on whatever machine.
  testTimeout: 60_000,
  collectCoverageFrom: ['src/**'],
  coverageReporters: ['text'],
}
