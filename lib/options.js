'use strict'

// What calls share about their options.

const { fileURLToPath } = require('node:url')
const { WasmError } = require('./errors.js')

/**
 * A misspelt option must not be a silent default. Here rather than in the binding: crossing over for it would cost more.
 *
 * `path`: how errors call it.
 */
function checkKeys(options, known, path = 'options') {
  if (options === undefined || options === null) return
  if (typeof options !== 'object') {
    throw new WasmError('ERR_WASM_INVALID_ARGUMENT', `${path} must be an object`)
  }
  for (const key in options) {
    if (known.includes(key) || options[key] === undefined) continue
    throw new WasmError(
      'ERR_WASM_INVALID_ARGUMENT',
      `${path}.${key} is not an option of this version; known: ${known.join(', ')}`,
    )
  }
}

/** Runs `start(canAbort)`, which answers `[promise, control]` where a signal may stop it. */
function withSignal(signal, start, abort) {
  if (signal === undefined || signal === null) return start(false)
  const { addEventListener, removeEventListener, aborted } = signal
  if (
    typeof addEventListener !== 'function' ||
    typeof removeEventListener !== 'function' ||
    typeof aborted !== 'boolean'
  ) {
    throw new WasmError('ERR_WASM_INVALID_ARGUMENT', 'options.signal must be an AbortSignal')
  }
  if (aborted) throw signal.reason
  let begun
  let isAborted = false
  const onAbort = () => {
    isAborted = true
    if (begun !== undefined) abort(begun[1], reasonOf(signal))
  }
  const forget = () => {
    try {
      signal.removeEventListener('abort', onAbort)
    } catch {
      // A signal of somebody's own making; the call has ended, and nobody is left to hear of it.
    }
  }
  // Before anything begins: what a signal throws here must not leave a call behind whose answer nobody gets.
  signal.addEventListener('abort', onAbort, { once: true })
  if (isAborted) throw signal.reason
  try {
    begun = start(true)
  } catch (error) {
    forget()
    throw error
  }
  const [promise, control] = begun
  promise.then(forget, forget)
  // The arguments may have code of their own, which may have aborted it.
  if (isAborted) abort(control, reasonOf(signal))
  return promise
}

function reasonOf(signal) {
  try {
    return signal.reason
  } catch (error) {
    return error
  }
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
