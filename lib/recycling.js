'use strict'

// What the native side tells of recycling, as events and as traces.

const { emitWarning } = require('node:process')
const { isTraced, recycles } = require('./tracing.js')

/**
 * Hears `(kind, payload, decision)`, and answers whether that was about recycling.
 *
 * * `name()`: the manager's. `emit(event, payload)`: to its listeners.
 */
function makeRecycling(name, emit) {
  // Contexts of decisions that somebody traces and that have no outcome yet.
  const decided = new Map()

  const settle = (decision, outcome) => {
    const context = decided.get(decision)
    if (context === undefined) return
    decided.delete(decision)
    Object.assign(context, outcome)
    if ('error' in context) recycles.error.publish(context)
    recycles.asyncStart.publish(context)
    recycles.asyncEnd.publish(context)
  }

  const kinds = {
    pressure(pressure, decision) {
      if (decision !== undefined && isTraced(recycles)) {
        const { reason, instance, generation } = pressure
        const context = { manager: name(), generation, reason, instance, pressure }
        decided.set(decision, context)
        recycles.start.publish(context)
        recycles.end.publish(context)
      }
      emit('pressure', pressure)
    },
    recycle(report, decision) {
      settle(decision, { result: report })
      emit('recycle', report)
    },
    // The event for it is `reload:failed`.
    'recycle:failed': (error, decision) => settle(decision, { error }),
    'recycle:superseded': (_, decision) => settle(decision, {}),
    'memory:kept': ([expected, returned]) =>
      emitWarning(
        `after recycling ${name()}, ${expected} bytes of its memory should have gone back to the system and ${returned} did; ` +
          'what the process holds does not shrink as it should (docs/recycling.md says where to look)',
        { type: 'WasmMoltWarning', code: 'WASM_MOLT_MEMORY_NOT_RETURNED' },
      ),
  }

  return (kind, payload, decision) => {
    if (!Object.hasOwn(kinds, kind)) return false
    kinds[kind](payload, decision)
    return true
  }
}

module.exports = { makeRecycling }
