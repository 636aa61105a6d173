// One module on both engines, each ready to begin afresh.
import { readFileSync } from 'node:fs'
import { type EngineOptions, WasmModuleManager } from '../index.js'
import type { Guest, RealModule } from './modules/module.ts'

export interface Host {
  /** A fresh instance, opened: does one unit of work per call. */
  fresh(): Promise<() => string | number>
  close(): Promise<void>
}

export function onV8(module: RealModule): Host {
  const compiled = new WebAssembly.Module(readFileSync(module.path))
  return {
    async fresh() {
      let memory: WebAssembly.Memory | undefined
      const imports = module.imports?.(() => memory?.buffer as ArrayBuffer) ?? {}
      const { exports } = new WebAssembly.Instance(compiled, imports)
      memory = exports.memory as WebAssembly.Memory
      const functions = exports as unknown as Guest['exports']
      functions._initialize?.()
      return module.open({ exports: functions, memory: memory as Guest['memory'] })
    },
    async close() {},
  }
}

export async function onMolt(module: RealModule, engine?: EngineOptions): Promise<Host> {
  const { imports } = module
  const manager = await WasmModuleManager.create(module.path, {
    ...(imports ? { imports: (instance) => imports(() => instance.memory.buffer) } : {}),
    ...(engine ? { engine } : {}),
  })
  return {
    async fresh() {
      await manager.reload()
      return module.open({ exports: manager.exports as Guest['exports'], memory: manager.memory })
    },
    close: () => manager.close(),
  }
}
