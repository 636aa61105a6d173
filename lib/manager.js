'use strict'

// What both kinds of managers are: reloads, snapshots, resets, the end; and the one of a single module.

const { EventEmitter } = require('node:events')
const binding = require('./binding.js')
const { WasmError } = require('./errors.js')
const { CALL_OPTIONS, adopt, snapshotOf } = require('./instances.js')
const { LinearMemory } = require('./memory.js')
const { checkKeys, deferred, toReload, toSource, withSignal } = require('./options.js')
const { makeRecycling } = require('./recycling.js')
const { hasAsyncHooks, isInHook, withScopes } = require('./scopes.js')
const { calls, isTraced, reloads, resets, steps, traps } = require('./tracing.js')

const LEASE_OPTIONS = ['signal']
const CLOSE_OPTIONS = ['drainTimeoutMs']
const SNAPSHOT_OPTIONS = ['signal']
const FORK_OPTIONS = ['name', 'imports', 'limits', 'recycle']
const STATS_OPTIONS = ['pages']

// Managers come from functions that start them.
const construction = Symbol('construction')

let handleOf
let lend
let mayWait
let inHookError

class Managed extends EventEmitter {
  static {
    handleOf = (manager) => manager.#handle
    // A lease says in what is told of its calls whose it is.
    lend = (manager, instance) => manager.#token.adopt(instance)
    // What cannot begin at once must not wait inside a hook.
    mayWait = (manager) => {
      if (isInHook(manager.#token) && binding.wouldWait(manager.#handle)) throw manager.#inHook('the call')
    }
    inHookError = (manager, what) => (isInHook(manager.#token) ? manager.#inHook(what) : undefined)
  }

  #handle
  #memory
  #token = {}
  #isWatched = false

  /**
   * `told(kind, payload)` hears, at once, of what is no event of the user's.
   */
  constructor(options, isRealm, told) {
    super()
    // Weak: the native side must not keep a forgotten manager alive.
    const self = new WeakRef(this)
    let name
    this.#token.adopt = (instance) => {
      name ??= self.deref()?.name
      return adopt(instance, name)
    }
    const recycling = makeRecycling(
      () => self.deref()?.name ?? name,
      (event, payload) => self.deref()?.emit(event, payload),
    )
    const tell = (kind, payload, decision) => {
      if (kind === 'trap' && traps.hasSubscribers) {
        traps.publish({ manager: payload.manager, generation: payload.generation, error: payload })
      }
      if (kind === 'step') steps.publish(payload)
      else if (kind === 'replaced') told?.(payload)
      else if (!recycling(kind, payload, decision)) self.deref()?.emit(kind, ...(kind === 'close' ? [] : [payload]))
    }
    this.#handle = binding.newManager(withScopes(this.#token, options), tell, isRealm, hasAsyncHooks(options))
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

  get memory() {
    this.#memory ??= new LinearMemory(binding.managerMemory(this.#handle))
    return this.#memory
  }

  async reload(options) {
    const reload = () => {
      if (isInHook(this.#token)) throw this.#inHook('reload()')
      const source = toReload(options)
      this.#watch()
      return binding.reload(this.#handle, source)
    }
    if (!isTraced(reloads)) return reload()
    // `async`: what is refused at once is told of like what fails later.
    return reloads.tracePromise(async () => reload(), this.#trace(options))
  }

  reloadSync(options) {
    const reload = () => {
      const source = toReload(options)
      this.#watch()
      return binding.reloadSync(this.#handle, source)
    }
    if (!isTraced(reloads)) return reload()
    return reloads.traceSync(reload, this.#trace(options))
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
    const reset = () => {
      if (isInHook(this.#token)) throw this.#inHook('reset()')
      return binding.reset(this.#handle, options, snapshotOf(options?.to))
    }
    if (!isTraced(resets)) return reset()
    return resets.tracePromise(async () => reset(), { manager: this.name, generation: this.generation })
  }

  resetSync(options) {
    const reset = () => binding.resetSync(this.#handle, options, snapshotOf(options?.to))
    if (!isTraced(resets)) return reset()
    return resets.traceSync(reset, { manager: this.name, generation: this.generation })
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

/** The context of what is told of a call. */
const callTrace = ({ name: manager, generation }, name, kind) => ({ manager, generation, name, kind })

// Not `async`: the native promise is the answer, and a second one around it would cost.
function call(manager, name, args, options) {
  try {
    mayWait(manager)
    if (options === undefined) return binding.call(handleOf(manager), name, args)
    checkKeys(options, CALL_OPTIONS)
    return withSignal(
      options?.signal,
      (canAbort) => binding.call(handleOf(manager), name, args, options?.timeoutMs, canAbort),
      binding.abort,
    )
  } catch (error) {
    return Promise.reject(error)
  }
}

async function invoke(manager, name, input, options) {
  mayWait(manager)
  checkKeys(options, CALL_OPTIONS)
  return withSignal(
    options?.signal,
    (canAbort) => binding.invoke(handleOf(manager), name, input, options?.timeoutMs, canAbort),
    binding.abort,
  )
}

class WasmModuleManager extends Managed {
  #exports
  #options

  constructor(key, options) {
    if (key !== construction) {
      throw new TypeError('use WasmModuleManager.create() or WasmModuleManager.createSync()')
    }
    super(options, false)
    // What a fork inherits is what was given, whatever becomes of the object.
    this.#options = typeof options === 'object' ? { ...options } : undefined
  }

  static async create(source, options) {
    const manager = new WasmModuleManager(construction, options)
    await binding.start(handleOf(manager), toSource(source))
    return manager
  }

  static createSync(source, options) {
    const manager = new WasmModuleManager(construction, options)
    binding.startSync(handleOf(manager), toSource(source))
    return manager
  }

  get exports() {
    this.#exports ??= binding.exports(handleOf(this))
    return this.#exports
  }

  call(name, args, options) {
    if (!isTraced(calls)) return call(this, name, args, options)
    return calls.tracePromise(() => call(this, name, args, options), callTrace(this, name, 'call'))
  }

  callSync(name, args) {
    if (!isTraced(calls)) return binding.callSync(handleOf(this), name, args)
    return calls.traceSync(() => binding.callSync(handleOf(this), name, args), callTrace(this, name, 'callSync'))
  }

  invoke(name, input, options) {
    if (!isTraced(calls)) return invoke(this, name, input, options)
    return calls.tracePromise(() => invoke(this, name, input, options), callTrace(this, name, 'invoke'))
  }

  async acquire(options) {
    mayWait(this)
    checkKeys(options, LEASE_OPTIONS)
    const instance = await withSignal(
      options?.signal,
      (canAbort) => {
        const pair = binding.acquire(handleOf(this))
        return canAbort ? pair : pair[0]
      },
      (id, reason) => binding.cancelAcquire(handleOf(this), id, reason),
    )
    return lend(this, instance)
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

  async fork(options) {
    const refused = inHookError(this, 'fork()')
    if (refused !== undefined) throw refused
    checkKeys(options, FORK_OPTIONS)
    const limits =
      options?.limits === undefined ? this.#options?.limits : { ...this.#options?.limits, ...options.limits }
    const child = new WasmModuleManager(construction, { name: this.name, ...this.#options, ...options, limits })
    await binding.fork(handleOf(this), handleOf(child))
    return child
  }
}

module.exports = { Managed, WasmModuleManager, handleOf, inHookError, mayWait, LEASE_OPTIONS }
