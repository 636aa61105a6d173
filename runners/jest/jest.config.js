module.exports = { testMatch: ['**/test/*.test.js'], collectCoverageFrom: ['src/**'], coverageReporters: ['text'] }
