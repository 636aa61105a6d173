// The right side: the same module behind a manager, and an application that reloads it when it has grown too large.
import { format, type Gofmt } from '@wasm-fmt/gofmt/gofmt_binding.js'
import { WasmModuleManager } from '../../index.js'
import { gofmtWasm, run } from './workload.ts'

const bound = Number(process.argv[3])
const manager = await WasmModuleManager.create(gofmtWasm, { name: 'gofmt' })

const pausesMs: number[] = []
manager.on('reload', (report) => pausesMs.push(report.pauseMs))

await run({
  format: async (source) => {
    if (manager.stats().memoryBytes >= bound) await manager.reload({ reason: 'memory' })
    // The glue makes several calls for one text: the lease keeps them in one instance.
    return manager.use((instance) => {
      const wasm = { ...instance.exports, memory: instance.memory } as unknown as Gofmt
      return format(wasm, source)
    })
  },
  memoryBytes: () => manager.stats().memoryBytes,
  pausesMs,
})

await manager.close()
