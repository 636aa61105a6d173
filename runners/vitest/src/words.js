import { fileURLToPath } from 'node:url'
import { WasmModuleManager } from 'wasm-molt'

export const GUEST = fileURLToPath(new URL('../../guests/words.wat', import.meta.url))

/** What a program of a user has: one module of its own around the manager. */
export class Words {
  static async open(options = {}) {
    const tick = options.tick ?? ((n) => n + 1)
    const manager = await WasmModuleManager.create(GUEST, {
      cache: false,
      imports: { env: { tick } },
      ...options.manager,
    })
    return new Words(manager)
  }

  constructor(manager) {
    this.manager = manager
  }

  async reversed(text) {
    const bytes = await this.manager.invoke('reverse', new TextEncoder().encode(text))
    return new TextDecoder().decode(bytes)
  }

  close() {
    return this.manager.close()
  }
}
