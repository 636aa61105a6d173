const { join } = require('node:path')
const { WasmModuleManager } = require('wasm-molt')

const GUEST = join(__dirname, '../../guests/words.wat')

/** What a program of a user has: one module of its own around the manager. */
class Words {
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

module.exports = { GUEST, Words }
