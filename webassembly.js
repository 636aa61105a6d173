'use strict'

// The WebAssembly object as a module of its own. Its members are looked up when they are asked for.

const { WebAssembly } = require('./index.js')

module.exports = WebAssembly
Object.defineProperty(WebAssembly, 'WebAssembly', { value: WebAssembly, configurable: true, writable: true })
