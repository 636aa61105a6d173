'use strict'

// The native side of this copy of the package. Test runners evaluate packages anew for each test file, and give every
// evaluation the addon that was loaded first; but what the addon knows of JavaScript is of one copy.

// Node's own: what runners give in its place does not say what has been loaded.
const Module = process.getBuiltinModule?.('node:module') ?? require('node:module')
const { toNamespacedPath } = require('node:path')
const loaded = require('../binding.js')

function another() {
  // The same file, loaded once more, is an addon with a state of its own.
  const found = Object.values(Module._cache ?? {}).find(
    (module) => module?.exports === loaded && module.filename?.endsWith('.node'),
  )
  if (found === undefined) {
    throw new Error(
      'wasm-molt was evaluated again, over an addon that require() does not know; clear its cache as well',
    )
  }
  const module = { exports: {} }
  process.dlopen(module, toNamespacedPath(found.filename))
  return module.exports
}

// An object of this copy, which setup.js can have keep things for as long as the copy is in use. The addon's own is
// never let go of.
module.exports = { ...(loaded.isSetUp() ? another() : loaded) }
