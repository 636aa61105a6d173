'use strict'

// Glue behind a manager: each generation is a realm in which the glue was evaluated afresh.

const { setImmediate } = require('node:timers/promises')

const binding = require('../binding.js')
const { WasmError } = require('../errors.js')
const { leaseOf } = require('../instances.js')
const { Managed, LEASE_OPTIONS, handleOf, mayWait } = require('../manager.js')
const { EMPTY, makeError } = require('../namespace.js')
const { checkKeys, deferred, withSignal } = require('../options.js')
const { giveNamespace } = require('../scopes.js')
const { makeNamespace } = require('../webassembly.js')
const { makeFace, unwrapped } = require('./face.js')
const { makeFinalizers } = require('./finalizers.js')
const { prepare } = require('./load.js')
const { ThreadGroup } = require('./threads.js')
const { makeTimers } = require('./timers.js')

const GLUE_OPTIONS = [
  ...['initialize', 'saveState', 'restoreState', 'expose', 'include', 'parentURL'],
  ...['name', 'threads', 'limits', 'maxQueue', 'cache', 'engine', 'snapshots', 'threadPool', 'recycle'],
]

// Another build of a module is no matter of glue, which brings its own.
const RELOAD_OPTIONS = ['reason', 'strategy', 'skipSave', 'drainTimeoutMs', 'onDrainTimeout']

// Marks of snapshots that are kept; the oldest go.
const MOST_MARKS = 4096

/** What one evaluation of the glue has made. */
class GlueGeneration {
  number
  /** What `manager.module` shows of it. */
  module
  /** The exports of the first instance with anything in it. */
  exports
  threads = new ThreadGroup()
  #finalizers
  #marks = new Map()
  #begun = new Set()
  #gone = deferred()
  #isPoolOut = false
  poolStart

  constructor(lease, name, { threadPool, engine }) {
    this.number = lease.generation
    const realm = binding.leaseRealm(leaseOf(lease))
    this.realm = realm
    const isOpen = () => binding.realmIsOpen(realm)
    const timers = makeTimers(isOpen)
    this.#finalizers = makeFinalizers(isOpen)
    this.#finalizers.stale = () =>
      new WasmError(
        'ERR_WASM_STALE_HANDLE',
        `this object is newer than the snapshot that ${name} was reset to, and what it pointed to is gone; make it anew`,
        { manager: name, generation: this.number },
      )
    const observer = {
      exitThreads: () => {
        if (threadPool?.exit === undefined) return false
        askToExit(threadPool, this.module)
        this.#isPoolOut = true
        return true
      },
      captured: (snapshot) => {
        this.#marks.set(snapshot, this.#finalizers.mark())
        if (this.#marks.size > MOST_MARKS) this.#marks.delete(this.#marks.keys().next().value)
        this.poolIsBack(threadPool)
      },
      rewound: (snapshot) => {
        this.#finalizers.rewind(this.#marks.get(snapshot) ?? 0)
        if (this.threads.isWanted && threadPool !== undefined) this.startThreads(threadPool)
      },
      // Finalizers that are late do nothing, and neither do timers.
      expired: () => {
        this.#finalizers.expire()
        timers.expire()
        this.#gone.resolve(true)
      },
      shared: () => {
        this.threads.isShared = true
      },
      instantiated: (exports) => {
        this.threads.instantiated(exports)
        if (this.exports === undefined && Object.keys(exports).length > 0) this.exports = exports
      },
      began: (promise) => {
        const over = () => this.#begun.delete(promise)
        this.#begun.add(promise)
        promise.then(over, over)
      },
    }
    this.shadows = {
      WebAssembly: makeNamespace(binding, realm, makeError, observer),
      FinalizationRegistry: this.#finalizers.FinalizationRegistry,
      ...timers.shadows,
    }
    if (engine?.threads) {
      this.shadows.Worker = this.threads.makeWorker()
      this.shadows.builtins = { worker_threads: this.threads.makeWorkerThreads() }
    }
  }

  /** What has exited for a snapshot starts again, whatever became of that. */
  poolIsBack(threadPool) {
    if (this.#isPoolOut) this.startThreads(threadPool)
  }

  /** The pool that was there before the realm was captured, reset or replaced is there again afterwards. */
  startThreads(threadPool) {
    this.#isPoolOut = false
    this.threads.forget()
    // What fails is found out by whoever needs the pool; here it would go to nobody.
    this.poolStart = (async () => threadPool.start(this.module))()
    this.poolStart.catch(() => {})
  }

  /**
   * Glue may begin to instantiate while it is evaluated, or a few promises later, and leave it at that. Nobody waits
   * for it once more after a reload, so it has to be over when the generation begins to serve.
   */
  async settle() {
    await setImmediate()
    while (this.#begun.size > 0) {
      // What became of it is for the glue to say. Of a generation that is gone, nothing becomes of it.
      const isGone = await Promise.race([Promise.allSettled(this.#begun).then(() => false), this.#gone.promise])
      if (isGone) return
      // And what the glue does then, which may be more of the same.
      await setImmediate()
    }
  }
}

/** It is synchronous; what a promise comes to is nobody's. */
function askToExit(threadPool, module) {
  const asked = threadPool.exit(module)
  if (typeof asked?.then === 'function') asked.then(undefined, () => {})
}

/** Runs `f` on what a step made, at once or when that is there. */
const then = (value, f) => (typeof value?.then === 'function' ? value.then(f) : f(value))

let construct

class GlueManager extends Managed {
  static {
    construct = (...args) => {
      // Only from here.
      const manager = new GlueManager(args)
      return manager
    }
  }

  #generations
  #module
  #exports
  /** Scopes of `use` share a lease, for as long as its generation serves. */
  #held
  #pending
  #threadPool

  constructor([program, options, name]) {
    if (!(program && options)) throw new TypeError('use loadGlue()')
    const generations = { manager: undefined, current: undefined, next: undefined, isSync: false }
    const { initialize, saveState, restoreState, expose, threadPool } = options
    const hooks = {
      initialize: (lease) => {
        const made = new GlueGeneration(lease, name, options)
        generations.next = made
        const { shadows } = made
        giveNamespace(shadows.WebAssembly)
        const evaluated = generations.isSync ? program.evaluateSync(shadows) : program.evaluate(shadows)
        return then(evaluated, (glue) =>
          then(expose === undefined ? glue : expose(glue, shadows), (module) => {
            made.module = module
            return then(initialize?.(module), () => (generations.isSync ? undefined : made.settle()))
          }),
        )
      },
    }
    const inHook = (generation) => {
      giveNamespace(generation.shadows.WebAssembly)
      return generation.module
    }
    if (saveState !== undefined) hooks.saveState = () => saveState(inHook(generations.current))
    if (restoreState !== undefined) {
      hooks.restoreState = (_, state) => restoreState(inHook(generations.next), state)
    }
    super({ ...pick(options), name, ...hooks }, true, () => {
      const wantsPool = threadPool !== undefined && generations.current?.threads.isWanted === true
      generations.current = generations.next
      generations.next = undefined
      // Only now: where there was a snapshot, one of the new realm has just been taken.
      if (wantsPool && generations.current.threads.size === 0) generations.current.startThreads(threadPool)
      generations.current.poolIsBack(threadPool)
    })
    this.#generations = generations
    this.#threadPool = threadPool
    // Somebody may hold nothing but what the glue has made, so the manager lives until it is closed. (The hooks hold
    // the generations, and the native side the hooks.)
    generations.manager = this
  }

  get module() {
    this.#module ??= makeFace(() => this.#generations.current.module)
    return this.#module
  }

  get exports() {
    this.#exports ??= makeFace(() => this.#generations.current.exports ?? {})
    return this.#exports
  }

  async use(fn, options) {
    if (typeof fn !== 'function') {
      throw new WasmError('ERR_WASM_INVALID_ARGUMENT', 'use() needs a function that takes the module')
    }
    checkKeys(options, LEASE_OPTIONS)
    const held = await this.#join(options?.signal)
    try {
      return await fn(held.module)
    } finally {
      this.#leave(held)
    }
  }

  get guestThreads() {
    const { realm } = this.#generations.current
    const [state, total] = binding.threadCounts(realm)
    return { state, total }
  }

  spawn(calls) {
    const isCall = (call) => Array.isArray(call) && typeof call[0] === 'function'
    if (!Array.isArray(calls) || calls.length === 0 || !calls.every(isCall)) {
      throw new WasmError(
        'ERR_WASM_INVALID_ARGUMENT',
        'spawn() takes a list of [function, ...arguments], which are called one after the other',
      )
    }
    const plain = calls.map(([fn, ...args]) => [unwrapped(fn), ...args])
    const { current, next } = this.#generations
    // A generation that is being made may start threads, too.
    const owner = next !== undefined && binding.threadRealm(plain[0][0]) === next.number ? next : current
    return owner.threads.spawn(plain)
  }

  async recycleThreads(options) {
    checkKeys(options, LEASE_OPTIONS)
    const threadPool = this.#threadPool
    const generations = this.#generations
    if (threadPool?.exit === undefined) {
      throw new WasmError(
        'ERR_WASM_INVALID_ARGUMENT',
        `recycleThreads() of ${this.name} needs options.threadPool with exit and start, which say how its threads end and begin`,
        { manager: this.name },
      )
    }
    mayWait(this)
    // Everybody's scopes end first, and new ones wait.
    const held = await withSignal(
      options?.signal,
      (canAbort) => {
        const pending = this.#hold(true)
        if (!canAbort) return pending.promise
        const { promise, resolve, reject } = deferred()
        const asked = { isOver: false, reject, pending }
        pending.promise.then((held) => asked.isOver || resolve(held), reject)
        return [promise, asked]
      },
      (asked, reason) => {
        asked.isOver = true
        asked.reject(reason)
        asked.pending.leave(reason)
      },
    )
    const started = performance.now()
    try {
      const { current } = generations
      const [, before] = binding.threadCounts(current.realm)
      let begun
      binding.threadsRecycle(
        current.realm,
        () => askToExit(threadPool, current.module),
        () => {
          current.threads.forget()
          begun = threadPool.start(current.module)
        },
      )
      await begun
      const [, after] = binding.threadCounts(current.realm)
      return { threadsBefore: before, threadsAfter: after, durationMs: performance.now() - started }
    } finally {
      this.#leave(held)
    }
  }

  async snapshot(options) {
    try {
      return await super.snapshot(options)
    } finally {
      this.#generations.current.poolIsBack(this.#threadPool)
    }
  }

  snapshotSync(options) {
    try {
      return super.snapshotSync(options)
    } finally {
      this.#generations.current.poolIsBack(this.#threadPool)
    }
  }

  async reload(options) {
    checkKeys(options, RELOAD_OPTIONS)
    const report = await super.reload(options)
    // What became of it is for whoever uses the pool.
    await this.#generations.current.poolStart?.catch(() => {})
    return report
  }

  reloadSync(options) {
    checkKeys(options, RELOAD_OPTIONS)
    this.#generations.isSync = true
    try {
      return super.reloadSync(options)
    } finally {
      this.#generations.isSync = false
    }
  }

  async fork() {
    throw new WasmError(
      'ERR_WASM_SNAPSHOT_UNSUPPORTED',
      `${this.name} cannot be forked: what its glue holds in JavaScript cannot be copied; call loadGlue() once more`,
      { manager: this.name, generation: this.generation },
    )
  }

  /** One more scope on the generation that serves. */
  #join(signal) {
    const held = this.#held
    // Whoever would have to wait must not: those who wait for these scopes to end come first.
    if (held !== undefined && held.generation === this.generation && this.state === 'ready') {
      held.scopes += 1
      return held
    }
    mayWait(this)
    this.#pending ??= this.#hold()
    const pending = this.#pending
    return withSignal(
      signal,
      (canAbort) => {
        pending.scopes += 1
        if (!canAbort) return pending.promise
        const { promise, resolve, reject } = deferred()
        const asked = { isOver: false, reject }
        pending.promise.then((held) => asked.isOver || resolve(held), reject)
        return [promise, asked]
      },
      (asked, reason) => {
        asked.isOver = true
        asked.reject(reason)
        pending.leave(reason)
      },
    )
  }

  #leave(held) {
    held.scopes -= 1
    if (held.scopes > 0) return
    if (this.#held === held) this.#held = undefined
    binding.leaseRelease(held.lease)
  }

  /** Waits for a lease, for all that come until it is there; or for one that nobody shares. */
  #hold(isAlone = false) {
    const handle = handleOf(this)
    const [acquired, id] = binding.acquire(handle)
    const pending = { scopes: isAlone ? 1 : 0, held: undefined }
    pending.leave = (reason) => {
      if (pending.held !== undefined) return this.#leave(pending.held)
      pending.scopes -= 1
      if (pending.scopes === 0) binding.cancelAcquire(handle, id, reason)
    }
    const settled = () => {
      clearInterval(looking)
      if (this.#pending === pending) this.#pending = undefined
    }
    const { promise: joined, resolve: join } = deferred()
    // A swap that gives up leaves the scope that is open, and who waits may be what that scope waits for.
    const look = () => {
      const held = this.#held
      if (held === undefined || held.generation !== this.generation || this.state !== 'ready') return
      settled()
      held.scopes += pending.scopes
      pending.held = held
      join(held)
      binding.cancelAcquire(handle, id, new Error('joined'))
    }
    const looking = isAlone ? undefined : setInterval(look, 5)
    const got = acquired.then(
      (instance) => {
        settled()
        const lease = leaseOf(instance)
        if (pending.scopes === 0 || pending.held !== undefined) {
          binding.leaseRelease(lease)
          return undefined
        }
        const held = { lease, instance, scopes: pending.scopes, generation: instance.generation }
        held.module = this.#generations.current.module
        pending.held = held
        if (!isAlone) this.#held = held
        return held
      },
      (error) => {
        settled()
        if (pending.held !== undefined) return joined
        throw error
      },
    )
    pending.promise = Promise.race([got, joined])
    // Nobody may be left to hear of it.
    pending.promise.catch(() => {})
    return pending
  }
}

/** What the native side takes. */
function pick(options) {
  const picked = {}
  for (const key of ['threads', 'limits', 'maxQueue', 'cache', 'engine', 'snapshots', 'recycle']) {
    if (options[key] !== undefined) picked[key] = options[key]
  }
  return picked
}

function checkHooks(options) {
  const { threadPool } = options
  if (threadPool !== undefined && (typeof threadPool !== 'object' || threadPool === null)) {
    throw new WasmError('ERR_WASM_INVALID_ARGUMENT', 'options.threadPool must be { start(module), exit(module) }')
  }
  checkKeys(threadPool, ['exit', 'start'], 'options.threadPool')
  const given = ['initialize', 'saveState', 'restoreState', 'expose'].map((name) => [name, options[name]])
  if (threadPool !== undefined) {
    given.push(['threadPool.exit', threadPool.exit], ['threadPool.start', threadPool.start ?? null])
  }
  for (const [name, hook] of given) {
    if (hook === undefined || typeof hook === 'function') continue
    throw new WasmError('ERR_WASM_INVALID_ARGUMENT', `options.${name} must be a function`)
  }
}

/** Of packages in a list that somebody means. */
const MOST_NAMES = 65_536

/** Before any of it is turned into text: that of a list of 2^32 elements takes minutes on some engines. */
function checkPlaces(specifier, { parentURL, include }) {
  const isPlace = (value) => typeof value === 'string' || typeof value?.href === 'string'
  const check = (isGood, what) => {
    if (!isGood) throw new WasmError('ERR_WASM_INVALID_ARGUMENT', what)
  }
  check(isPlace(specifier), "the first argument of loadGlue must be what require() would be given, or a file's URL")
  check((parentURL ?? undefined) === undefined || isPlace(parentURL), 'options.parentURL must be a URL or a path')
  const isName = (name) => typeof name === 'string'
  check(
    include === undefined || (Array.isArray(include) && include.length <= MOST_NAMES && include.every(isName)),
    `options.include must be a list of names of packages, ${MOST_NAMES} at most`,
  )
}

const nameOf = (specifier) => {
  const text = specifier instanceof URL ? specifier.href : `${specifier}`
  const parts = text.split(/[\\/]/)
  return text.startsWith('.') || text.startsWith('/') || text.includes(':')
    ? parts.at(-1).replace(/\.[cm]?js$/, '')
    : parts.slice(0, text.startsWith('@') ? 2 : 1).join('/')
}

/** Where the function was called from: a path or a URL; undefined where nobody can tell. */
function callerOf(called) {
  const { prepareStackTrace, stackTraceLimit } = Error
  try {
    const holder = {}
    Error.stackTraceLimit = 1
    Error.prepareStackTrace = (_, sites) => sites
    Error.captureStackTrace(holder, called)
    return holder.stack?.[0]?.getFileName?.() ?? undefined
  } finally {
    Object.assign(Error, { prepareStackTrace, stackTraceLimit })
  }
}

/** The program of a package that nobody said where to look for: from the working directory, else from who asks. */
async function prepareFor(specifier, options, caller) {
  try {
    return await prepare(specifier, options)
  } catch (error) {
    const isPackage = typeof specifier === 'string' && !/^(?:\.{0,2}[\\/]|[a-z][a-z\d+.-]*:)/i.test(specifier)
    if (!isPackage || error?.code !== 'ERR_MODULE_NOT_FOUND' || caller === undefined) throw error
    try {
      return await prepare(specifier, { ...options, parentURL: caller })
    } catch {
      throw error
    }
  }
}

async function loadGlue(specifier, options = {}) {
  checkKeys(options, GLUE_OPTIONS)
  checkHooks(options)
  checkPlaces(specifier, options)
  const { include, parentURL, cache = true, name = nameOf(specifier) } = options
  const caller = (parentURL ?? undefined) === undefined ? callerOf(loadGlue) : undefined
  const program = await prepareFor(specifier, { parentURL, include, cache }, caller)
  const manager = construct(program, options, name)
  await binding.start(handleOf(manager), EMPTY)
  return manager
}

module.exports = { loadGlue }
