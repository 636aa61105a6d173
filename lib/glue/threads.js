'use strict'

// Native threads of guests, as glue and programs start them.

const workerThreads = require('node:worker_threads')

const binding = require('../binding.js')
const { WasmError } = require('../errors.js')
const { deferred } = require('../options.js')

let construct

/** One native thread of a guest. */
class GuestThread {
  static {
    construct = (calls, ended) => {
      const thread = new GuestThread()
      thread.#start(calls, ended)
      return thread
    }
  }

  #handle
  #end = deferred()
  generation

  constructor() {
    // Nobody may want to hear of it: what others have to know, the realm tells.
    this.#end.promise.catch(() => {})
  }

  #start(calls, ended) {
    const settle = (error, isByItself) => {
      ended(this, isByItself)
      if (error === undefined) this.#end.resolve()
      else this.#end.reject(error)
    }
    const [handle, generation] = binding.threadSpawn(calls, settle)
    this.#handle = handle
    Object.defineProperty(this, 'generation', { value: generation, enumerable: true })
  }

  get finished() {
    binding.threadHold(this.#handle)
    return this.#end.promise
  }

  async terminate() {
    binding.threadTerminate(this.#handle)
    // However it ended: it has.
    await this.finished.catch(() => {})
  }
}

/** `(...args)` that are all 0, as many as the function takes. */
const zeros = (fn) => Array.from({ length: fn.length }, () => 0)

/** The threads of one generation. */
class ThreadGroup {
  #running = new Set()
  /** One of them, since there was none, did not end by itself. */
  #wasCut = false
  /** There is to be a pool: threads were started, and did not all end by themselves. */
  isWanted = false
  /** The generation has a shared memory. */
  isShared = false
  /** The exports of the youngest instance that can be a worker of wasm-bindgen-rayon. */
  #rayon

  get size() {
    return this.#running.size
  }

  instantiated(exports) {
    if (typeof exports.wbg_rayon_start_worker === 'function') this.#rayon = exports
  }

  spawn(calls) {
    const thread = construct(calls, (it, isByItself) => {
      if (!this.#running.delete(it)) return
      if (!isByItself) this.#wasCut = true
      if (this.#running.size === 0 && !this.#wasCut) this.isWanted = false
    })
    if (this.#running.size === 0) this.#wasCut = false
    this.#running.add(thread)
    this.isWanted = true
    return thread
  }

  /** What has been started so far counts no more: the guest does not know of it. */
  forget() {
    this.#running.clear()
    this.#wasCut = false
  }

  /** In place of Node's module: a worker of it has Node's engine, and can share nothing with the guest. */
  makeWorkerThreads() {
    const construct = (Worker, args, newTarget) => {
      if (this.isShared) throw unknownWorker()
      return Reflect.construct(Worker, args, newTarget)
    }
    return { ...workerThreads, Worker: new Proxy(workerThreads.Worker, { construct }) }
  }

  /** In place of the worker that glue of wasm-bindgen-rayon starts: a thread does what that would. */
  makeWorker() {
    const group = this
    const rayon = () => this.#rayon
    return class Worker extends EventTarget {
      #thread
      onmessage = null

      postMessage(message) {
        const exports = rayon()
        const receiver = message?.receiver
        if (exports === undefined || typeof receiver !== 'number') throw unknownWorker()
        this.#thread = group.spawn(rayonCalls(exports, receiver))
        queueMicrotask(() => {
          const event = new MessageEvent('message', { data: { type: 'wasm_bindgen_worker_ready' } })
          this.onmessage?.(event)
          this.dispatchEvent(event)
        })
      }

      terminate() {
        this.#thread?.terminate()
      }
    }
  }
}

const unknownWorker = () =>
  new WasmError(
    'ERR_WASM_LINK',
    'glue with a shared memory wants to start a worker, which would have an engine of its own and could not share it. ' +
      'Threads are native ones here, and of the ways in which glue starts them that of wasm-bindgen-rayon is known (a ' +
      'message with a `receiver`, and a module that exports wbg_rayon_start_worker); what is missing for pthreads of ' +
      "Emscripten is the JavaScript side of its workers. Use a build without threads, or GlueManager's spawn()",
  )

/** What a worker of wasm-bindgen-rayon does from its beginning to its end. */
function rayonCalls(exports, receiver) {
  const calls = []
  const { __wbindgen_start: start, __wbindgen_thread_destroy: destroy } = exports
  // 0: the guest's own default for the stack.
  if (start !== undefined) calls.push(start.length > 0 ? [start, 0] : [start])
  calls.push([exports.wbg_rayon_start_worker, receiver])
  // Gives stack and thread-local storage back.
  if (destroy !== undefined) calls.push([destroy, ...zeros(destroy)])
  return calls
}

module.exports = { ThreadGroup }
