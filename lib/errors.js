'use strict'

class WasmError extends Error {
  constructor(code, message, fields, cause) {
    super(message, cause === undefined ? undefined : { cause })
    this.code = code
    Object.assign(this, fields)
  }

  get name() {
    return 'WasmError'
  }
}

exports.WasmError = WasmError
