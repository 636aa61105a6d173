'use strict'

class WasmError extends Error {
  constructor(code, message, fields, cause) {
    super(message, cause === undefined ? undefined : { cause })
    this.code = code
    Object.assign(this, fields)
  }
}
// No getter: JavaScriptCore runs none when it writes the first line of a stack.
Object.defineProperty(WasmError.prototype, 'name', { value: 'WasmError', configurable: true })

exports.WasmError = WasmError
