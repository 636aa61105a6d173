'use strict'

// The timers of one generation. What they call mostly goes into the module, and nobody is there to catch what it throws
// once that is gone: a timer that is left over would end the process.

const { promisify } = require('node:util')

/** `isOpen()`: whether the guest could be called now. What comes while it cannot runs as soon as it can. */
function makeTimers(isOpen = () => true) {
  let expired = false
  // Timers whose time came too early => what tries again.
  const late = new WeakMap()

  function run(timer, callback) {
    late.delete(timer)
    if (!expired && !isOpen()) {
      // Nothing to keep a process alive for.
      late.set(timer, setTimeout(run, 5, timer, callback).unref())
      return
    }
    // What has nothing to do with the module goes on: somebody may wait for it.
    const { exitCode } = process
    try {
      const result = callback()
      if (expired && typeof result?.then === 'function') result.then(undefined, () => {})
    } catch (error) {
      if (!expired) throw error
      clearInterval(timer)
    } finally {
      // Emscripten's glue sets it as it gives up. Bun does not take it back to undefined.
      if (expired) {
        process.exitCode = exitCode
        if (exitCode === undefined && process.exitCode !== undefined) process.exitCode = 0
      }
    }
  }

  // The platform's own is looked up at each call: programs that are tested replace it.
  const starter = (name) => {
    const start = (callback, ...rest) => {
      // Complains as the platform does.
      if (typeof callback !== 'function') return globalThis[name](callback, ...rest)
      const timer = globalThis[name](
        function (...args) {
          if (!late.has(timer)) run(timer, () => Reflect.apply(callback, this, args))
        },
        ...rest,
      )
      return timer
    }
    Object.defineProperty(start, 'name', { value: name, configurable: true })
    // Their promises call nothing.
    // Some realms do not have all of them.
    const promised = globalThis[name]?.[promisify.custom]
    return promised === undefined ? start : Object.defineProperty(start, promisify.custom, { value: promised })
  }

  const stopper = (name) => {
    const stop = (timer) => {
      const retry = typeof timer === 'object' && timer !== null ? late.get(timer) : undefined
      if (retry !== undefined) clearTimeout(retry)
      late.delete(timer)
      return globalThis[name](timer)
    }
    return Object.defineProperty(stop, 'name', { value: name, configurable: true })
  }

  return {
    shadows: {
      setTimeout: starter('setTimeout'),
      setInterval: starter('setInterval'),
      setImmediate: starter('setImmediate'),
      clearTimeout: stopper('clearTimeout'),
      clearInterval: stopper('clearInterval'),
      clearImmediate: stopper('clearImmediate'),
    },

    /** The generation is gone. */
    expire() {
      expired = true
    },
  }
}

module.exports = { makeTimers }
