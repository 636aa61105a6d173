// Metrics of wasm-molt in prom-client. Takes the client that the program has, and can be copied as it is.
import { tracingChannel } from 'node:diagnostics_channel'

// What is known beforehand begins at 0, so that the first of each is an increase like any other.
const REASONS = ['manual', 'trap', 'memory', 'predicted', 'calls', 'age', 'budget']
const STATES = ['starting', 'ready', 'reloading', 'draining', 'closing', 'closed', 'failed']
const BUCKETS = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
const QUANTILES = { p50: 0.5, p90: 0.9, p99: 0.99, p999: 0.999 }

/**
 * Registers what `stats()` says. It is asked when the registry is: without scrapes this costs nothing.
 * * `managers`: any iterable; looked through at each scrape, so that managers may come and go. Give each a name of its own.
 */
export function collectManagers(client, managers, registry = client.register) {
  // All metrics of a scrape ask in the same turn, and so get the same figures.
  let figures
  const read = () => {
    if (figures === undefined) {
      figures = Array.from(managers, (manager) => manager.stats())
      queueMicrotask(() => {
        figures = undefined
      })
    }
    return figures
  }

  /** * `valuesOf`: a number, or numbers by the values of `label`. */
  const register = (Metric, name, help, valuesOf, label) => {
    new Metric({
      name: `wasm_molt_${name}`,
      help,
      labelNames: label === undefined ? ['manager'] : ['manager', label],
      registers: [registry],
      collect() {
        // What is read are sums already, so that counters begin at 0 each time.
        this.reset()
        for (const stats of read()) {
          const values = valuesOf(stats)
          for (const [key, value] of label === undefined ? [[label, values]] : Object.entries(values)) {
            const labels = { manager: stats.name, ...(label !== undefined && { [label]: key }) }
            if (Metric === client.Counter) this.inc(labels, value)
            else this.set(labels, value)
          }
        }
      },
    })
  }
  const gauge = (...metric) => register(client.Gauge, ...metric)
  const counter = (...metric) => register(client.Counter, ...metric)

  gauge('memory_bytes', 'Linear memory, over all instances.', ({ memoryBytes }) => memoryBytes)
  gauge('memory_peak_bytes', 'The most linear memory that was seen.', ({ memoryBytesPeak }) => memoryBytesPeak)
  gauge('instances', 'Instances that serve, by what they do.', instancesOf, 'state')
  gauge('in_flight', 'Calls and leases that have an instance.', ({ inFlight }) => inFlight)
  gauge('queue_length', 'Calls and leases that wait for an instance.', ({ queued }) => queued)
  gauge('recycles_due', 'Instances that are to be recycled and have not been yet.', ({ recyclesDue }) => recyclesDue)
  gauge('snapshots', 'Snapshots that can be used.', ({ snapshots }) => snapshots)
  gauge('generation', 'The number of the generation that serves.', ({ generation }) => generation)
  gauge('state', '1 for the state that the manager is in.', stateOf, 'state')
  counter('calls_total', 'Calls, by how they ended.', ({ calls }) => calls, 'outcome')
  counter('reloads_total', 'Reloads, replacements and recycles, by reason.', reloadsOf, 'reason')
  counter('reload_failures_total', 'Those that did not happen.', ({ reloadsFailed }) => reloadsFailed)
  counter('resets_total', 'Resets that were asked for.', ({ resets }) => resets)

  /** prom-client's own observes by itself; these distributions are kept by the managers. */
  class KeptSummary extends client.Summary {
    timesOf
    async get() {
      const values = []
      for (const stats of read()) {
        const times = this.timesOf(stats)
        const labels = { manager: stats.name }
        if (times.count > 0) {
          for (const [key, quantile] of Object.entries(QUANTILES)) {
            values.push({ labels: { quantile, ...labels }, value: times[key] / 1000 })
          }
        }
        values.push({ metricName: `${this.name}_sum`, labels, value: (times.mean * times.count) / 1000 })
        values.push({ metricName: `${this.name}_count`, labels, value: times.count })
      }
      return { name: this.name, help: this.help, type: this.type, values, aggregator: this.aggregator }
    }
  }
  const summary = (name, help, timesOf) => {
    const options = { name: `wasm_molt_${name}`, help, labelNames: ['manager'], registers: [registry] }
    new KeptSummary(options).timesOf = timesOf
  }

  summary('call_run_seconds', 'In the guest, calls on pool threads.', ({ runTime }) => runTime)
  summary('call_wait_seconds', 'From the call to its start, calls on pool threads.', ({ waitTime }) => waitTime)
  summary('reload_pause_seconds', 'The pauses of reloads, replacements and recycles.', ({ pauseTime }) => pauseTime)
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

/**
 * Observes each call, from being made to being answered, in a histogram; those can be added up over processes.
 * Costs a message and an observation for each call. Returns what ends it.
 */
export function observeCalls(client, registry = client.register) {
  const seconds = new client.Histogram({
    name: 'wasm_molt_call_duration_seconds',
    help: 'From the call to its answer, waiting included.',
    labelNames: ['manager', 'export'],
    buckets: BUCKETS,
    registers: [registry],
  })
  const begun = new WeakMap()
  const observe = (context) => {
    const since = begun.get(context)
    // Names that nothing exports could be anybody's, without end.
    if (since === undefined || context.error?.code === 'ERR_WASM_EXPORT_NOT_FOUND') return
    begun.delete(context)
    seconds.observe({ manager: context.manager, export: context.name }, (performance.now() - since) / 1000)
  }
  const subscribers = {
    start: (context) => void begun.set(context, performance.now()),
    // Synchronous calls have no more than this.
    end: (context) => ('result' in context || 'error' in context) && observe(context),
    asyncEnd: observe,
  }
  const calls = tracingChannel('wasm-molt:call')
  calls.subscribe(subscribers)
  return () => {
    calls.unsubscribe(subscribers)
    registry.removeSingleMetric('wasm_molt_call_duration_seconds')
  }
}
