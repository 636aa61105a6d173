// Metrics and spans of wasm-molt in OpenTelemetry. Takes the API that the program has, and can be copied as it is.
import { tracingChannel } from 'node:diagnostics_channel'

const SCOPE = 'wasm-molt'
// What is known beforehand begins at 0, so that the first of each is an increase like any other.
const REASONS = ['manual', 'trap', 'memory', 'predicted', 'calls', 'age', 'budget']
const BUCKETS = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
const STATES = ['starting', 'ready', 'reloading', 'draining', 'closing', 'closed', 'failed']

/**
 * Instruments that read `stats()` whenever metrics are collected, and a histogram of calls. Returns what ends it.
 *
 * The names are those of the recipe for prom-client, so that dashboards fit both; exporters leave them as they are.
 * * `managers`: any iterable; looked through at each collection. The SDK goes on with the last figures of one that is gone.
 */
export function observeManagers({ metrics }, managers) {
  const meter = metrics.getMeter(SCOPE)
  const instruments = []
  const observations = []
  const instrument = (kind, name, unit, description, valuesOf, attribute) => {
    const made = meter[`createObservable${kind}`](`wasm_molt_${name}`, { unit, description })
    instruments.push(made)
    observations.push((result, stats) => {
      const manager = { manager: stats.name }
      const values = valuesOf(stats)
      if (attribute === undefined) result.observe(made, values, manager)
      else {
        for (const [key, value] of Object.entries(values)) result.observe(made, value, { ...manager, [attribute]: key })
      }
    })
  }
  const sum = (...made) => instrument('UpDownCounter', ...made)
  const counter = (...made) => instrument('Counter', ...made)
  const gauge = (...made) => instrument('Gauge', ...made)

  sum('memory_bytes', 'By', 'Linear memory, over all instances.', ({ memoryBytes }) => memoryBytes)
  gauge('memory_peak_bytes', 'By', 'The most linear memory that was seen.', ({ memoryBytesPeak }) => memoryBytesPeak)
  sum('instances', '{instance}', 'Instances that serve, by what they do.', instancesOf, 'state')
  sum('in_flight', '{call}', 'Calls and leases that have an instance.', ({ inFlight }) => inFlight)
  sum('queue_length', '{call}', 'Calls and leases that wait for an instance.', ({ queued }) => queued)
  sum('recycles_due', '{instance}', 'Instances that are to be recycled.', ({ recyclesDue }) => recyclesDue)
  sum('snapshots', '{snapshot}', 'Snapshots that can be used.', ({ snapshots }) => snapshots)
  gauge('generation', '', 'The number of the generation that serves.', ({ generation }) => generation)
  gauge('state', '', '1 for the state that the manager is in.', stateOf, 'state')
  counter('calls_total', '{call}', 'Calls, by how they ended.', ({ calls }) => calls, 'outcome')
  counter('reloads_total', '{reload}', 'Reloads, replacements and recycles, by reason.', reloadsOf, 'reason')
  counter('reload_failures_total', '{reload}', 'Those that did not happen.', ({ reloadsFailed }) => reloadsFailed)
  counter('resets_total', '{reset}', 'Resets that were asked for.', ({ resets }) => resets)

  const observe = (result) => {
    for (const manager of managers) {
      const stats = manager.stats()
      for (const observation of observations) observation(result, stats)
    }
  }
  meter.addBatchObservableCallback(observe, instruments)

  const seconds = meter.createHistogram('wasm_molt_call_duration_seconds', {
    unit: 's',
    description: 'From the call to its answer, waiting included.',
    advice: { explicitBucketBoundaries: BUCKETS },
  })
  const stop = follow('wasm-molt:call', {
    begin: () => performance.now(),
    end: ({ manager, name, error }, since) => {
      // Names that nothing exports could be anybody's, without end.
      if (error?.code === 'ERR_WASM_EXPORT_NOT_FOUND') return
      seconds.record((performance.now() - since) / 1000, { manager, export: name })
    },
  })
  return () => {
    stop()
    meter.removeBatchObservableCallback(observe, instruments)
  }
}

/**
 * A span for each call, reload, reset and recycle. Returns what ends it.
 *
 * It begins where the operation was asked for, and so has the span that is active there as its parent. Recycles are
 * nobody's request, and begin a trace of their own.
 */
export function traceManagers({ trace, context, SpanKind, SpanStatusCode }) {
  const tracer = trace.getTracer(SCOPE)
  const stops = ['call', 'reload', 'reset', 'recycle'].map((operation) =>
    follow(`wasm-molt:${operation}`, {
      begin: (told) =>
        tracer.startSpan(
          told.name === undefined ? operation : `${operation} ${told.name}`,
          { kind: SpanKind.INTERNAL, attributes: attributesOf(told) },
          context.active(),
        ),
      end: ({ result, error }, span) => {
        if (error !== undefined) {
          span.recordException(error)
          span.setAttribute('error.type', typeOf(error))
          span.setStatus({ code: SpanStatusCode.ERROR, message: error?.message })
        } else if (operation !== 'call' && result !== undefined) {
          span.setAttributes(figuresOf(result))
        }
        span.end()
      },
    }),
  )
  return () => {
    for (const stop of stops) stop()
  }
}

/** Pairs what begins with what ends: at `asyncEnd`, or for synchronous operations, which are settled by then, at `end`. */
function follow(name, { begin, end }) {
  const begun = new WeakMap()
  const finish = (told) => {
    if (!begun.has(told)) return
    const value = begun.get(told)
    begun.delete(told)
    end(told, value)
  }
  const subscribers = {
    start: (told) => void begun.set(told, begin(told)),
    end: (told) => ('result' in told || 'error' in told) && finish(told),
    asyncEnd: finish,
  }
  const channel = tracingChannel(name)
  channel.subscribe(subscribers)
  return () => channel.unsubscribe(subscribers)
}

function attributesOf({ manager, generation, name, kind, reason, strategy, instance }) {
  return {
    'wasm_molt.manager': manager,
    'wasm_molt.generation': generation,
    'wasm_molt.export': name,
    'wasm_molt.kind': kind,
    'wasm_molt.reason': reason,
    'wasm_molt.strategy': strategy,
    'wasm_molt.instance': instance,
  }
}

function figuresOf({ pauseMs, memoryBytesBefore, memoryBytesAfter }) {
  return {
    'wasm_molt.pause_ms': pauseMs,
    'wasm_molt.memory_bytes_before': memoryBytesBefore,
    'wasm_molt.memory_bytes_after': memoryBytesAfter,
  }
}

function instancesOf({ instances: { total, busy, poisoned } }) {
  return { idle: Math.max(0, total - busy - poisoned), busy, poisoned }
}

function stateOf({ state }) {
  return Object.fromEntries(STATES.map((one) => [one, one === state ? 1 : 0]))
}

function reloadsOf({ reloads }) {
  return { ...Object.fromEntries(REASONS.map((reason) => [reason, 0])), ...reloads }
}

const typeOf = (error) => error?.code ?? error?.name ?? typeof error
