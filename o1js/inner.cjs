'use strict'

// The glue that `loadGlue` manages: evaluated afresh for each generation, in which `WebAssembly` means this engine.
// The glue that o1js ships is evaluated once, outside (glue.mjs), and reaches the generation that serves through here.

/** `toImports(memory)`: the imports, with the one memory that they share. */
exports.instantiate = (bytes, descriptor, toImports) => {
  const memory = new WebAssembly.Memory(descriptor)
  return new WebAssembly.Instance(new WebAssembly.Module(bytes), toImports(memory)).exports
}
