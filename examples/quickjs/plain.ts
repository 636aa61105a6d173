// The same guest in Node's own WebAssembly: an instance that guest.ts talks to as it talks to a manager's.
import type { Imports, InstanceContext, LinearMemory } from '../../index.js'
import { createImports, type Interpreter, load, type Source, start } from './guest.ts'

/** A cold instance. */
export function instantiate(
  module: WebAssembly.Module,
  makeImports: (instance: InstanceContext) => Imports = createImports(),
): InstanceContext {
  const exports: InstanceContext['exports'] = {}
  const memories: WebAssembly.Memory[] = []
  const instance: InstanceContext = {
    generation: 1,
    exports,
    get memory() {
      return viewOf(memories[0] as WebAssembly.Memory)
    },
  }
  const imports = makeImports(instance) as WebAssembly.Imports
  for (const { module: from, name, kind } of WebAssembly.Module.imports(module)) {
    const offered = imports[from]
    if (kind !== 'memory' || !offered) continue
    const memory = new WebAssembly.Memory(offered[name] as unknown as WebAssembly.MemoryDescriptor)
    memories.push(memory)
    offered[name] = memory
  }
  Object.assign(exports, new WebAssembly.Instance(module, imports).exports)
  return instance
}

/** A warm interpreter in an instance of its own. */
export function instantiateWarm(
  module: WebAssembly.Module,
  sources: readonly Source[],
): [InstanceContext, Interpreter] {
  const instance = instantiate(module)
  const interpreter = start(instance)
  load(instance, interpreter, sources)
  return [instance, interpreter]
}

function viewOf({ buffer }: WebAssembly.Memory): LinearMemory {
  const bytes = Buffer.from(buffer)
  return {
    byteLength: buffer.byteLength,
    buffer,
    read: (ptr, byteLength) => new Uint8Array(buffer, ptr, byteLength).slice(),
    readString: (ptr, byteLength) => bytes.toString('utf8', ptr, ptr + byteLength),
    write: (ptr, data) => {
      const written = typeof data === 'string' ? Buffer.from(data) : data
      bytes.set(written, ptr)
      return written.length
    },
  }
}
