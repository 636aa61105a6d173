'use strict'

// What calls share about their options.

const { fileURLToPath } = require('node:url')
const { WasmError } = require('./errors.js')

/** A misspelt option must not be a silent default. Here rather than in the binding: crossing over for it would cost more. */
function checkKeys(options, known) {
  if (options === undefined || options === null) return
  if (typeof options !== 'object') {
    throw new WasmError('ERR_WASM_INVALID_ARGUMENT', 'options must be an object')
  }
  for (const key in options) {
    if (known.includes(key) || options[key] === undefined) continue
    throw new WasmError(
      'ERR_WASM_INVALID_ARGUMENT',
      `options.${key} is not an option of this version; known: ${known.join(', ')}`,
    )
  }
}

/** Runs `start(canAbort)`, which answers `[promise, control]` where a signal may stop it. */
function withSignal(signal, start, abort) {
  if (signal === undefined || signal === null) return start(false)
  if (typeof signal.addEventListener !== 'function' || typeof signal.aborted !== 'boolean') {
    throw new WasmError('ERR_WASM_INVALID_ARGUMENT', 'options.signal must be an AbortSignal')
  }
  if (signal.aborted) throw signal.reason
  const [promise, control] = start(true)
  const onAbort = () => abort(control, signal.reason)
  signal.addEventListener('abort', onAbort, { once: true })
  const forget = () => signal.removeEventListener('abort', onAbort)
  promise.then(forget, forget)
  return promise
}

/** Paths stay strings, bytes stay bytes; URLs become paths. */
function toSource(source) {
  if (!(source instanceof URL)) return source
  if (source.protocol !== 'file:') {
    throw new WasmError(
      'ERR_WASM_INVALID_ARGUMENT',
      `the module's URL must be a file: URL, and is ${source.protocol}; fetch it and pass the bytes`,
    )
  }
  return fileURLToPath(source)
}

/** `ReloadOptions` with the source as the native side takes it. */
function toReload(options) {
  if (!(options?.source instanceof URL)) return options
  return Object.create(options, { source: { value: toSource(options.source), enumerable: true } })
}

/** `Promise.withResolvers`, which Node 20 lacks. */
function deferred() {
  const parts = {}
  parts.promise = new Promise((resolve, reject) => Object.assign(parts, { resolve, reject }))
  return parts
}

module.exports = { checkKeys, withSignal, toSource, toReload, deferred }
