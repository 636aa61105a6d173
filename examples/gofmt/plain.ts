// The left side: Node's own WebAssembly, one instance for the life of the process.
import { readFileSync } from 'node:fs'
import { format, type Gofmt } from '@wasm-fmt/gofmt/gofmt_binding.js'
import { gofmtWasm, run } from './workload.ts'

const instance = new WebAssembly.Instance(new WebAssembly.Module(readFileSync(gofmtWasm)))
const wasm = instance.exports as unknown as Gofmt & { _initialize(): void }
wasm._initialize()

await run({
  format: (source) => format(wasm, source),
  memoryBytes: () => wasm.memory.buffer.byteLength,
})
