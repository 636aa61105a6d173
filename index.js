'use strict'

// The public face: events, AbortSignal, disposal, private handles. No decisions live here.

const { AsyncLocalStorage } = require('node:async_hooks')
const { channel, tracingChannel } = require('node:diagnostics_channel')
const { EventEmitter } = require('node:events')
const { fileURLToPath } = require('node:url')
const { isPromise } = require('node:util').types
const { isMainThread } = require('node:worker_threads')
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

// Numbers cross in memory that both sides see: stores cost less than Node-API calls. That all exports call
// one and the same native function lets V8 call it directly, also where a call site meets many exports.
const scratch = new ArrayBuffer(64)
const f64 = new Float64Array(scratch)
const i32 = new Int32Array(scratch)
// In its last place native code counts what makes a LinearMemory mean another buffer.
const EPOCH = 7

class LinearMemory {
  #handle
  #buffer
  #epoch

  constructor(handle) {
    this.#handle = handle
  }

  get byteLength() {
    return binding.memoryByteLength(this.#handle)
  }

  // Nearly always the same object. It is another one when this one is detached, or in another epoch.
  get buffer() {
    const kept = this.#buffer
    if (this.#epoch === f64[EPOCH] && kept.byteLength !== 0) return kept
    const made = binding.memoryBuffer(this.#handle)
    if (made.buffer !== undefined) return made.buffer
    this.#epoch = f64[EPOCH]
    this.#buffer = made
    return made
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
const SNAPSHOT_OPTIONS = ['signal']
const FORK_OPTIONS = ['name', 'imports', 'limits']
const STATS_OPTIONS = ['pages']

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

class Snapshot {
  #handle
  #facts

  constructor(handle) {
    this.#handle = handle
    this.#facts = binding.snapshotFacts(handle)
  }

  get id() {
    return this.#facts[0]
  }

  get generation() {
    return this.#facts[1]
  }

  get memoryBytes() {
    return this.#facts[2]
  }

  get residentBytes() {
    return binding.snapshotResidentBytes(this.#handle)
  }

  release() {
    binding.snapshotRelease(this.#handle)
  }

  [Symbol.dispose]() {
    this.release()
  }

  /** The handle of what a user passed as a snapshot. */
  static handleOf(snapshot) {
    if (snapshot === undefined) return undefined
    if (typeof snapshot === 'object' && snapshot !== null && #handle in snapshot) return snapshot.#handle
    throw new WasmError('ERR_WASM_INVALID_ARGUMENT', 'options.to must be a snapshot that snapshot() has returned')
  }
}
const { handleOf } = Snapshot
delete Snapshot.handleOf

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
const lookNext = () => setImmediate(look)
// Whatever a look brings (imports, events) belongs to nobody's asynchronous context, least of all to that of a hook
// which happened to hand a call over.
const outside = AsyncLocalStorage.snapshot()

const result = (kind) => (kind === 1 ? i32[2] : kind === 0 ? undefined : f64[1])

// By the number of parameters. All arguments are numbers before the first is stored: coercion may run JavaScript,
// which may call an export. The function passes itself on, so that it outlives the call.
const exportMakers = [
  (at, kind) => {
    const f = () => {
      f64[0] = at
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a) => {
      a = +a
      f64[0] = at
      f64[1] = a
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b) => {
      a = +a
      b = +b
      f64[0] = at
      f64[1] = a
      f64[2] = b
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b, c) => {
      a = +a
      b = +b
      c = +c
      f64[0] = at
      f64[1] = a
      f64[2] = b
      f64[3] = c
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b, c, d) => {
      a = +a
      b = +b
      c = +c
      d = +d
      f64[0] = at
      f64[1] = a
      f64[2] = b
      f64[3] = c
      f64[4] = d
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b, c, d, e) => {
      a = +a
      b = +b
      c = +c
      d = +d
      e = +e
      f64[0] = at
      f64[1] = a
      f64[2] = b
      f64[3] = c
      f64[4] = d
      f64[5] = e
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b, c, d, e, g) => {
      a = +a
      b = +b
      c = +c
      d = +d
      e = +e
      g = +g
      f64[0] = at
      f64[1] = a
      f64[2] = b
      f64[3] = c
      f64[4] = d
      f64[5] = e
      f64[6] = g
      callExport(f)
      return result(kind)
    }
    return f
  },
]

const callExport = binding.setup({
  scratch,
  makeExport: (name, params, kind, at) =>
    Object.defineProperty(exportMakers[params](at, kind), 'name', { value: name, configurable: true }),
  isMainThread,
  lookSoon: () => {
    outside(lookNext)
  },
  error: (code, message, fields, cause) => new WasmError(code, message, fields, cause),
  toBigInt64: (value) => BigInt.asIntN(64, value),
  toArray: (iterable) => [...iterable],
  follow: (thenable, id) => {
    Promise.resolve(thenable).then(
      (value) => binding.settleHost(id, true, value),
      (reason) => binding.settleHost(id, false, reason),
    )
  },
  makeLease: (lease) => new LeasedInstance(lease),
  makeContext: (context) => new InstanceContext(context),
  makeSnapshot: (snapshot) => new Snapshot(snapshot),
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

/** `ReloadOptions` with the source as the native side takes it. */
function toReload(options) {
  if (!(options?.source instanceof URL)) return options
  return Object.create(options, { source: { value: toSource(options.source), enumerable: true } })
}

// What runs inside a hook, so that it is not made to wait for the very swap that waits for the hook. Only
// in use while there is a hook: following asynchronous contexts makes every promise of the process dearer.
const hookScope = new AsyncLocalStorage()
let hooksRunning = 0

/** * `token`: stands for the manager, which the hook must not keep alive. */
function scoped(token, hook) {
  return (...args) => {
    const scope = { token, outer: hookScope.getStore(), isOver: true }
    const begin = () => {
      scope.isOver = false
      hooksRunning += 1
    }
    const end = () => {
      scope.isOver = true
      hooksRunning -= 1
      if (hooksRunning === 0) hookScope.disable()
    }
    begin()
    let isPending = false
    try {
      const outcome = hookScope.run(scope, () => hook(...args))
      isPending = isPromise(outcome)
      if (isPending) outcome.then(end, end)
      else if (typeof outcome?.then === 'function') return inScope(outcome, scope, begin, end)
      return outcome
    } finally {
      if (!isPending) end()
    }
  }
}

/** A thenable that goes on with the hook once somebody asks it, which starts some of them: so not before, and not twice. */
function inScope(thenable, scope, begin, end) {
  return {
    // biome-ignore lint/suspicious/noThenProperty: it stands for one that has it.
    then: (onValue, onReason) => {
      begin()
      const followed = new Promise((resolve, reject) => {
        hookScope.run(scope, () => thenable.then(resolve, reject))
      })
      followed.then(end, end)
      followed.then(onValue, onReason)
    },
  }
}

function isInHook(token) {
  if (hooksRunning === 0) return false
  for (let scope = hookScope.getStore(); scope !== undefined; scope = scope.outer) {
    // What a hook has left behind, such as a timer, outlives it and is inside no hook.
    if (scope.token === token && !scope.isOver) return true
  }
  return false
}

/** The same options, with each hook in its scope; what is no function is for the native side to refuse. */
function withScopes(token, options) {
  if (typeof options !== 'object' || options === null) return options
  const hooks = {}
  for (const name of ['initialize', 'saveState', 'restoreState', 'reseed']) {
    const hook = options[name]
    if (typeof hook === 'function') hooks[name] = { value: scoped(token, hook), enumerable: true }
  }
  return Object.create(options, hooks)
}

/** `Promise.withResolvers`, which Node 20 lacks. */
function deferred() {
  const parts = {}
  parts.promise = new Promise((resolve, reject) => Object.assign(parts, { resolve, reject }))
  return parts
}

const reloads = tracingChannel('wasm-molt:reload')
const steps = channel('wasm-molt:reload:step')

/** Older runtimes tell it of each channel, not of all five. */
function isTraced({ start, end, asyncStart, asyncEnd, error }) {
  return [start, end, asyncStart, asyncEnd, error].some((one) => one.hasSubscribers)
}

// Instances come from `create` and `createSync` only.
const construction = Symbol('construction')

class WasmModuleManager extends EventEmitter {
  #handle
  #exports
  #memory
  #token = {}
  #isWatched = false
  #options

  constructor(key, options) {
    super()
    if (key !== construction) {
      throw new TypeError('use WasmModuleManager.create() or WasmModuleManager.createSync()')
    }
    // Weak: the native side must not keep a forgotten manager alive.
    const self = new WeakRef(this)
    // What a fork inherits is what was given, whatever becomes of the object.
    this.#options = typeof options === 'object' ? { ...options } : undefined
    this.#handle = binding.newManager(withScopes(this.#token, options), (kind, payload) => {
      if (kind === 'step') steps.publish(payload)
      else self.deref()?.emit(kind, ...(kind === 'close' ? [] : [payload]))
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
    this.#exports ??= binding.exports(this.#handle)
    return this.#exports
  }

  get memory() {
    this.#memory ??= new LinearMemory(binding.managerMemory(this.#handle))
    return this.#memory
  }

  // Not `async`: the native promise is the answer, and a second one around it would cost.
  call(name, args, options) {
    try {
      this.#mayWait()
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
    this.#mayWait()
    checkKeys(options, CALL_OPTIONS)
    return withSignal(
      options?.signal,
      (canAbort) => binding.invoke(this.#handle, name, input, options?.timeoutMs, canAbort),
      binding.abort,
    )
  }

  async acquire(options) {
    this.#mayWait()
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
    if (isInHook(this.#token)) throw this.#inHook('reload()')
    const source = toReload(options)
    this.#watch()
    if (!isTraced(reloads)) return binding.reload(this.#handle, source)
    return reloads.tracePromise(() => binding.reload(this.#handle, source), this.#trace(options))
  }

  reloadSync(options) {
    const source = toReload(options)
    this.#watch()
    if (!isTraced(reloads)) return binding.reloadSync(this.#handle, source)
    return reloads.traceSync(() => binding.reloadSync(this.#handle, source), this.#trace(options))
  }

  async snapshot(options) {
    if (isInHook(this.#token)) throw this.#inHook('snapshot()')
    checkKeys(options, SNAPSHOT_OPTIONS)
    return withSignal(
      options?.signal,
      (canAbort) => {
        const [asking, control] = binding.snapshot(this.#handle)
        const accept = (snapshot) => {
          binding.snapshotAccept(this.#handle)
          return snapshot
        }
        if (!canAbort) return asking.then(accept)
        const { promise, resolve, reject } = deferred()
        // One that is taken all the same is nobody's.
        const asked = { control, reject, isOver: false }
        asking.then((snapshot) => (asked.isOver ? snapshot.release() : resolve(accept(snapshot))), reject)
        return [promise, asked]
      },
      (asked, reason) => {
        asked.isOver = true
        asked.reject(reason)
        binding.cancelSnapshot(this.#handle, asked.control)
      },
    )
  }

  snapshotSync() {
    return binding.snapshotSync(this.#handle)
  }

  async reset(options) {
    if (isInHook(this.#token)) throw this.#inHook('reset()')
    return binding.reset(this.#handle, options, handleOf(options?.to))
  }

  resetSync(options) {
    return binding.resetSync(this.#handle, options, handleOf(options?.to))
  }

  async fork(options) {
    if (isInHook(this.#token)) throw this.#inHook('fork()')
    checkKeys(options, FORK_OPTIONS)
    const limits =
      options?.limits === undefined ? this.#options?.limits : { ...this.#options?.limits, ...options.limits }
    const child = new WasmModuleManager(construction, { name: this.name, ...this.#options, ...options, limits })
    await binding.fork(this.#handle, child.#handle)
    return child
  }

  stats(options) {
    checkKeys(options, STATS_OPTIONS)
    return binding.stats(this.#handle, options?.pages)
  }

  async close(options) {
    checkKeys(options, CLOSE_OPTIONS)
    return binding.close(this.#handle, options?.drainTimeoutMs, isInHook(this.#token))
  }

  async destroy() {
    return binding.destroy(this.#handle)
  }

  async [Symbol.asyncDispose]() {
    await this.close()
  }

  /** What cannot begin at once must not wait inside a hook. */
  #mayWait() {
    if (isInHook(this.#token) && binding.wouldWait(this.#handle)) throw this.#inHook('the call')
  }

  #inHook(what) {
    return new WasmError(
      'ERR_WASM_RELOADING',
      `${what} on ${this.name} was made inside a hook and would wait for the swap that waits for that hook; ` +
        'use the instance that the hook was given, or do it after the hook',
      { manager: this.name, generation: this.generation },
    )
  }

  /** The native side tells of steps only where somebody listens. */
  #watch() {
    if (steps.hasSubscribers === this.#isWatched) return
    this.#isWatched = steps.hasSubscribers
    binding.watchSteps(this.#handle, this.#isWatched)
  }

  #trace(options) {
    return {
      manager: this.name,
      generation: this.generation,
      reason: options?.reason ?? 'manual',
      strategy: options?.strategy ?? 'exclusive',
    }
  }
}

exports.WasmModuleManager = WasmModuleManager
exports.WasmError = WasmError
exports.errorCodes = Object.freeze(binding.errorCodes())
exports.version = binding.version()
