'use strict'

// The namespace for code that uses it without a manager. Its realm is made when it is used first, and lives as long as
// the environment.

const binding = require('./binding.js')
const { WasmError } = require('./errors.js')
const { Managed, handleOf } = require('./manager.js')
const { namespaceHere } = require('./scopes.js')
const { makeNamespace } = require('./webassembly.js')

/** A module with nothing in it: a realm's own. */
const EMPTY = Uint8Array.of(0, 0x61, 0x73, 0x6d, 1, 0, 0, 0)
const MEMBERS = [
  ...['validate', 'compile', 'instantiate', 'compileStreaming', 'instantiateStreaming', 'Module', 'Instance'],
  ...['Memory', 'Table', 'Global', 'Tag', 'JSTag', 'Exception', 'CompileError', 'LinkError', 'RuntimeError'],
]

const makeError = (code, message, fields, cause) => new WasmError(code, message, fields, cause)

// Whoever imports the package reads its members, so what costs something is behind the members of this one.
const WebAssembly = {}
const settle = () => {
  const manager = new Managed({ name: 'WebAssembly' }, true)
  binding.startSync(handleOf(manager), EMPTY)
  // Glue that has a hook for it is handed this one by those who have no other: in a hook of a glue manager it means the
  // generation that is being made.
  const observer = { elsewhere: namespaceHere }
  const namespace = makeNamespace(binding, binding.managerRealm(handleOf(manager)), makeError, observer)
  Object.defineProperties(WebAssembly, Object.getOwnPropertyDescriptors(namespace))
  keep.add(manager)
}
const keep = new Set()
for (const name of [...MEMBERS, Symbol.toStringTag]) {
  const get = () => {
    settle()
    return WebAssembly[name]
  }
  Object.defineProperty(WebAssembly, name, { get, set: undefined, enumerable: false, configurable: true })
}

module.exports = { EMPTY, WebAssembly, makeError }
