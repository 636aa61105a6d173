'use strict'

// The public face: events, AbortSignal, disposal, private handles. No decisions live here.

const { EventEmitter } = require('node:events')
const { fileURLToPath } = require('node:url')
const binding = require('./binding.js')

// Older runtimes lack the well-known symbols; TypeScript's and Babel's `using` look for the same fallback.
Symbol.dispose ??= Symbol.for('Symbol.dispose')
Symbol.asyncDispose ??= Symbol.for('Symbol.asyncDispose')

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

class LinearMemory {
  #handle

  constructor(handle) {
    this.#handle = handle
  }

  get byteLength() {
    return binding.memoryByteLength(this.#handle)
  }

  get buffer() {
    return binding.memoryBuffer(this.#handle)
  }

  read(ptr, byteLength) {
    return binding.memoryRead(this.#handle, ptr, byteLength)
  }

  readString(ptr, byteLength) {
    return binding.memoryReadString(this.#handle, ptr, byteLength)
  }

  write(ptr, bytes) {
    return binding.memoryWrite(this.#handle, ptr, bytes)
  }
}

const CALL_OPTIONS = ['signal', 'timeoutMs']
const LEASE_OPTIONS = ['signal']
const CLOSE_OPTIONS = ['drainTimeoutMs']

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

class LeasedInstance {
  #lease
  #exports
  #memory

  constructor(lease) {
    this.#lease = lease
  }

  get generation() {
    return binding.leaseGeneration(this.#lease)
  }

  get exports() {
    this.#exports ??= Object.freeze(binding.leaseExports(this.#lease))
    return this.#exports
  }

  get memory() {
    this.#memory ??= new LinearMemory(binding.leaseMemory(this.#lease))
    return this.#memory
  }

  async call(name, args, options) {
    checkKeys(options, CALL_OPTIONS)
    return withSignal(
      options?.signal,
      (canAbort) => binding.leaseCall(this.#lease, name, args, options?.timeoutMs, canAbort),
      binding.abort,
    )
  }

  release() {
    binding.leaseRelease(this.#lease)
  }

  [Symbol.dispose]() {
    this.release()
  }
}

class InstanceContext {
  #context
  #exports
  #memory

  constructor(context) {
    this.#context = context
  }

  get generation() {
    return binding.contextGeneration(this.#context)
  }

  get exports() {
    this.#exports ??= Object.freeze(binding.contextExports(this.#context))
    return this.#exports
  }

  get memory() {
    this.#memory ??= new LinearMemory(binding.contextMemory(this.#context))
    return this.#memory
  }
}

// Taken now: a test's fake timers must not get between a call and its answer.
const { setImmediate } = globalThis
const look = () => {
  if (binding.look()) setImmediate(look)
}

binding.setup({
  lookSoon: () => {
    setImmediate(look)
  },
  error: (code, message, fields, cause) => new WasmError(code, message, fields, cause),
  toBigInt64: (value) => BigInt.asIntN(64, value),
  toArray: (iterable) => [...iterable],
  follow: (promise, id) => {
    promise.then(
      (value) => binding.settleHost(id, true, value),
      (reason) => binding.settleHost(id, false, reason),
    )
  },
  makeLease: (lease) => new LeasedInstance(lease),
  makeContext: (context) => new InstanceContext(context),
})

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

// Instances come from `create` and `createSync` only.
const construction = Symbol('construction')

class WasmModuleManager extends EventEmitter {
  #handle
  #exports
  #memory

  constructor(key, options) {
    super()
    if (key !== construction) {
      throw new TypeError('use WasmModuleManager.create() or WasmModuleManager.createSync()')
    }
    // Weak: the native side must not keep a forgotten manager alive.
    const self = new WeakRef(this)
    this.#handle = binding.newManager(options, (kind, payload) => {
      self.deref()?.emit(kind, ...(kind === 'close' ? [] : [payload]))
    })
  }

  static async create(source, options) {
    const manager = new WasmModuleManager(construction, options)
    await binding.start(manager.#handle, toSource(source))
    return manager
  }

  static createSync(source, options) {
    const manager = new WasmModuleManager(construction, options)
    binding.startSync(manager.#handle, toSource(source))
    return manager
  }

  get name() {
    return binding.name(this.#handle)
  }

  get generation() {
    return binding.generation(this.#handle)
  }

  get state() {
    return binding.state(this.#handle)
  }

  get exports() {
    this.#exports ??= Object.freeze(binding.exports(this.#handle))
    return this.#exports
  }

  get memory() {
    this.#memory ??= new LinearMemory(binding.managerMemory(this.#handle))
    return this.#memory
  }

  // Not `async`: the native promise is the answer, and a second one around it would cost.
  call(name, args, options) {
    try {
      if (options === undefined) return binding.call(this.#handle, name, args)
      checkKeys(options, CALL_OPTIONS)
      return withSignal(
        options?.signal,
        (canAbort) => binding.call(this.#handle, name, args, options?.timeoutMs, canAbort),
        binding.abort,
      )
    } catch (error) {
      return Promise.reject(error)
    }
  }

  callSync(name, args) {
    return binding.callSync(this.#handle, name, args)
  }

  async invoke(name, input, options) {
    checkKeys(options, CALL_OPTIONS)
    return withSignal(
      options?.signal,
      (canAbort) => binding.invoke(this.#handle, name, input, options?.timeoutMs, canAbort),
      binding.abort,
    )
  }

  async acquire(options) {
    checkKeys(options, LEASE_OPTIONS)
    return withSignal(
      options?.signal,
      (canAbort) => {
        const pair = binding.acquire(this.#handle)
        return canAbort ? pair : pair[0]
      },
      (id, reason) => binding.cancelAcquire(this.#handle, id, reason),
    )
  }

  async use(fn, options) {
    if (typeof fn !== 'function') {
      throw new WasmError('ERR_WASM_INVALID_ARGUMENT', 'use() needs a function that takes the instance')
    }
    const instance = await this.acquire(options)
    try {
      return await fn(instance)
    } finally {
      instance.release()
    }
  }

  async reload(options) {
    return binding.reload(this.#handle, options)
  }

  reloadSync(options) {
    return binding.reloadSync(this.#handle, options)
  }

  stats() {
    return binding.stats(this.#handle)
  }

  async close(options) {
    checkKeys(options, CLOSE_OPTIONS)
    return binding.close(this.#handle, options?.drainTimeoutMs)
  }

  async destroy() {
    return binding.destroy(this.#handle)
  }

  async [Symbol.asyncDispose]() {
    await this.close()
  }
}

exports.WasmModuleManager = WasmModuleManager
exports.WasmError = WasmError
exports.errorCodes = Object.freeze(binding.errorCodes())
exports.version = binding.version()
