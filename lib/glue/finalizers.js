'use strict'

// The FinalizationRegistry of one generation. A callback of the glue frees a pointer, so it may only run while that
// pointer means what it meant: not after the memory was set back to a time before it, and not after it is gone.

const Real = FinalizationRegistry

/** What wasm-bindgen calls the pointer in its objects, in both of its times. */
const POINTERS = ['__wbg_ptr', 'ptr']

/** `isOpen()`: whether the guest could be called now. What is late because it could not is done as soon as it can. */
function makeFinalizers(isOpen = () => true) {
  // In the order of registration. A record goes when its callback has run, or never will.
  const records = new Set()
  let now = 0
  let expired = false
  const late = []

  function retry() {
    while (late.length > 0 && (expired || isOpen())) {
      const [cleanup, record] = late.shift()
      finish(cleanup, record)
    }
    if (late.length > 0) wait()
  }

  // Nothing to keep a process alive for.
  const wait = () => setTimeout(retry, 5).unref()

  function finish(cleanup, record) {
    forget(record)
    if (!record.void && !expired) cleanup(record.held)
  }

  function forget(record) {
    records.delete(record)
    record.siblings?.delete(record)
  }

  const finalizers = {
    FinalizationRegistry: class {
      #real
      // token => its record, or the Set of them. Weak, as the tokens are in the real one.
      #byToken = new WeakMap()

      constructor(cleanup) {
        // Complains as the platform does.
        if (typeof cleanup !== 'function') new Real(cleanup)
        this.#real = new Real((record) => {
          if (record.void || expired || isOpen()) return finish(cleanup, record)
          late.push([cleanup, record])
          if (late.length === 1) wait()
        })
      }

      // The optional parameter does not count: as in the platform, register.length is 2.
      register(target, held, token = undefined) {
        // The real one sees a record in place of the held value, and so cannot tell.
        if (target === held) this.#real.register(target, held)
        // It holds the real one: with that collected first, the record would never go.
        const record = { held, time: now, target: undefined, void: false, siblings: undefined, real: this.#real }
        this.#real.register(target, record, token)
        if (expired) return
        record.target = new WeakRef(target)
        records.add(record)
        if (token === undefined) return
        const known = this.#byToken.get(token)
        if (known === undefined) {
          this.#byToken.set(token, record)
        } else {
          const siblings = known instanceof Set ? known : new Set([known])
          siblings.add(record)
          record.siblings = siblings
          if (known === siblings) return
          known.siblings = siblings
          this.#byToken.set(token, siblings)
        }
      }

      unregister(token) {
        const found = this.#real.unregister(token)
        const known = found ? this.#byToken.get(token) : undefined
        if (known === undefined) return found
        this.#byToken.delete(token)
        if (known instanceof Set) for (const record of known) records.delete(record)
        else records.delete(known)
        return found
      }

      get [Symbol.toStringTag]() {
        return 'FinalizationRegistry'
      }
    },

    /** What an object says whose pointer means nothing any more. */
    stale: () => new Error('The object belongs to a state of the module that is gone'),

    /** A snapshot is taken now. */
    mark: () => ++now,

    /** The generation is again what it was at the mark. */
    rewind(mark) {
      for (const record of records) {
        if (record.time < mark) continue
        record.void = true
        forget(record)
        const target = record.target.deref()
        if (target !== undefined) spoil(target, record.held)
      }
    },

    /** The generation is gone, and its memory with it. */
    expire() {
      expired = true
      records.clear()
    },
  }

  function spoil(target, held) {
    const isObject = typeof held === 'object' && held !== null
    const pointer = isObject ? held.ptr : held
    if (pointer !== undefined) {
      for (const name of POINTERS) if (Object.hasOwn(target, name) && target[name] === pointer) poison(target, name)
    }
    // The state of a wasm-bindgen closure, which reads `a` at each call.
    if (isObject && typeof held.a === 'number' && 'cnt' in held) poison(held, 'a')
  }

  function poison(object, name) {
    const get = () => {
      throw finalizers.stale()
    }
    // Who frees the object sets its pointer to 0. To what was no pointer any more, that does nothing.
    Reflect.defineProperty(object, name, { get, set() {}, configurable: true, enumerable: true })
  }

  return finalizers
}

module.exports = { makeFinalizers }
