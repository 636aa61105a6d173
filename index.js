'use strict'

// The public face. What is behind it lives in lib/, over the functions of the binding.

const binding = require('./lib/binding.js')

// Older runtimes lack the well-known symbols; TypeScript's and Babel's `using` look for the same fallback.
Symbol.dispose ??= Symbol.for('Symbol.dispose')
Symbol.asyncDispose ??= Symbol.for('Symbol.asyncDispose')

require('./lib/setup.js')
const { WasmError } = require('./lib/errors.js')
const { loadGlue } = require('./lib/glue/manager.js')
const { WasmModuleManager } = require('./lib/manager.js')
const { WebAssembly } = require('./lib/namespace.js')
const { readiness } = require('./lib/readiness.js')

exports.WasmModuleManager = WasmModuleManager
exports.WasmError = WasmError
exports.WebAssembly = WebAssembly
exports.loadGlue = loadGlue
exports.readiness = readiness
exports.setMemoryBudget = binding.setMemoryBudget
exports.errorCodes = Object.freeze(binding.errorCodes())
exports.version = binding.version()
