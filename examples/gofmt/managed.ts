// The right side: the same module behind a manager, and an application that reloads it when it has grown too large.
import { format, type Gofmt } from '@wasm-fmt/gofmt/gofmt_binding.js'
import { WasmModuleManager } from '../../index.js'
import { gofmtWasm, run } from './workload.ts'

const bound = Number(process.argv[3])
const manager = await WasmModuleManager.create(gofmtWasm, { name: 'gofmt' })
// Still a singleton: these functions and this memory always belong to the current generation.
const wasm = { ...manager.exports, memory: manager.memory } as unknown as Gofmt

const pausesMs: number[] = []
manager.on('reload', (report) => pausesMs.push(report.pauseMs))

await run({
  format: async (source) => {
    if (manager.stats().memoryBytes >= bound) await manager.reload({ reason: 'memory' })
    return format(wasm, source)
  },
  memoryBytes: () => manager.memory.byteLength,
  pausesMs,
})

await manager.close()
