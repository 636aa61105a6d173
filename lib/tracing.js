'use strict'

// The diagnostics channels, and whether anybody listens to them.

const { channel, tracingChannel } = require('node:diagnostics_channel')

const calls = tracingChannel('wasm-molt:call')
const recycles = tracingChannel('wasm-molt:recycle')
const reloads = tracingChannel('wasm-molt:reload')
const resets = tracingChannel('wasm-molt:reset')
const steps = channel('wasm-molt:reload:step')
const traps = channel('wasm-molt:trap')

/** Older runtimes tell it of each channel, not of all five. Spelt out, because every call asks. */
function isTraced({ start, end, asyncStart, asyncEnd, error }) {
  return (
    start.hasSubscribers ||
    end.hasSubscribers ||
    asyncStart.hasSubscribers ||
    asyncEnd.hasSubscribers ||
    error.hasSubscribers
  )
}

module.exports = { calls, isTraced, recycles, reloads, resets, steps, traps }
