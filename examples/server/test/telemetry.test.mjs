// The recipes for prom-client and OpenTelemetry, with the libraries themselves and managers at work.
import assert from 'node:assert/strict'
import { tracingChannel } from 'node:diagnostics_channel'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, test } from 'node:test'
import * as otel from '@opentelemetry/api'
import { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import { PrometheusExporter, PrometheusSerializer } from '@opentelemetry/exporter-prometheus'
import { MeterProvider } from '@opentelemetry/sdk-metrics'
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-base'
import client from 'prom-client'
import { WasmModuleManager } from '../../../index.js'
import { observeManagers, traceManagers } from '../../telemetry/opentelemetry.mjs'
import { collectManagers, observeCalls } from '../../telemetry/prom-client.mjs'
import { metricsOf, until } from './support.mjs'

const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-telemetry-'))
after(() => rmSync(folder, { recursive: true, force: true }))
const guest = join(folder, 'guest.wat')
writeFileSync(
  guest,
  `(module
    (import "env" "fail" (func $fail))
    (memory (export "memory") 1 1024)
    (func (export "allocate") (param i32) (result i32) (i32.const 1024))
    (func (export "deallocate") (param i32 i32))
    (func (export "echo") (param i32 i32 i32) (result i32)
      (i32.store (local.get 2) (local.get 1))
      (local.get 0))
    (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
    (func (export "leak") (drop (memory.grow (i32.const 1))))
    (func (export "fail") (call $fail))
    (func (export "boom") unreachable))`,
)

async function manage(t, name, options = {}) {
  const fail = () => {
    throw new Error('an import failed')
  }
  const manager = await WasmModuleManager.create(guest, { cache: false, name, imports: { env: { fail } }, ...options })
  t.after(() => manager.destroy())
  return manager
}

/** A manager with something of everything behind it. */
async function busy(t, name) {
  const manager = await manage(t, name, { instances: 2 })
  for (let i = 0; i < 5; i += 1) await manager.call('add', [i, 1])
  await manager.call('leak')
  await assert.rejects(manager.call('fail'))
  await assert.rejects(manager.call('boom'))
  await assert.rejects(manager.call('nobody'))
  await until(() => manager.stats().reloads.trap === 1, 'the trapped instance was replaced')
  await manager.reload()
  await manager.reload({ reason: 'the "why"' })
  await assert.rejects(manager.reload({ source: 'nowhere.wasm' }))
  await manager.snapshot()
  await manager.reset()
  return manager
}

// ---------------------------------------------------------------- prom-client

test('prom-client: what stats() says is what is scraped, for each manager', async (t) => {
  const registry = new client.Registry()
  const managers = new Set([await busy(t, 'one'), await manage(t, 'two')])
  collectManagers(client, managers, registry)
  const lease = await [...managers][1].acquire()
  const waiting = [...managers][1].acquire()
  const { values } = metricsOf(await registry.metrics())
  for (const manager of managers) {
    const { name, ...stats } = manager.stats()
    const of = (metric, labels = {}) => {
      const pairs = Object.entries({ manager: name, ...labels }).map(([key, value]) => `${key}="${value}"`)
      const key = `wasm_molt_${metric}{${pairs.sort().join(',')}}`
      assert.ok(values.has(key), key)
      return values.get(key)
    }
    const plain = {
      memory_bytes: stats.memoryBytes,
      memory_peak_bytes: stats.memoryBytesPeak,
      in_flight: stats.inFlight,
      queue_length: stats.queued,
      recycles_due: stats.recyclesDue,
      snapshots: stats.snapshots,
      generation: stats.generation,
      reload_failures_total: stats.reloadsFailed,
      resets_total: stats.resets,
    }
    for (const [metric, value] of Object.entries(plain)) assert.equal(of(metric), value, metric)
    for (const [outcome, count] of Object.entries(stats.calls)) assert.equal(of('calls_total', { outcome }), count)
    for (const [reason, count] of Object.entries(stats.reloads)) {
      assert.equal(of('reloads_total', { reason: reason.replaceAll('"', '\\"') }), count, reason)
    }
    assert.equal(of('reloads_total', { reason: 'memory' }), 0)
    assert.deepEqual([of('state', { state: 'ready' }), of('state', { state: 'failed' })], [1, 0])
    const { total, busy: used, poisoned } = stats.instances
    assert.equal(of('instances', { state: 'busy' }), used)
    assert.equal(of('instances', { state: 'poisoned' }), poisoned)
    assert.equal(of('instances', { state: 'idle' }), total - used - poisoned)
    for (const [metric, times] of [
      ['call_run_seconds', stats.runTime],
      ['call_wait_seconds', stats.waitTime],
      ['reload_pause_seconds', stats.pauseTime],
    ]) {
      assert.equal(of(`${metric}_count`), times.count)
      assert.ok(Math.abs(of(`${metric}_sum`) - (times.mean * times.count) / 1000) < 1e-9)
      if (times.count > 0) assert.equal(of(metric, { quantile: '0.99' }), times.p99 / 1000)
    }
  }
  // None of it is nothing against nothing.
  const one = (metric) => values.get(`wasm_molt_${metric}`)
  assert.equal(one('calls_total{manager="one",outcome="completed"}'), 6)
  assert.equal(one('calls_total{manager="one",outcome="failed"}'), 1)
  assert.equal(one('calls_total{manager="one",outcome="trapped"}'), 1)
  assert.equal(one('reloads_total{manager="one",reason="trap"}'), 1)
  assert.equal(one('reload_failures_total{manager="one"}'), 1)
  assert.equal(one('resets_total{manager="one"}'), 1)
  assert.equal(one('in_flight{manager="two"}'), 1)
  assert.equal(one('queue_length{manager="two"}'), 1)
  lease.release()
  ;(await waiting).release()
})

test('prom-client: names and types are as Prometheus wants them', async (t) => {
  const registry = new client.Registry()
  collectManagers(client, [await manage(t, 'one')], registry)
  t.after(observeCalls(client, registry))
  const metrics = await registry.getMetricsAsJSON()
  assert.equal(metrics.length, 17)
  for (const { name, type, help } of metrics) {
    assert.match(name, /^wasm_molt_[a-z]+(_[a-z]+)*$/)
    assert.match(help, /\.$/)
    assert.equal(name.endsWith('_total'), type === 'counter', name)
    // Base units, and nothing that a unit could be taken for.
    assert.doesNotMatch(name, /_(ms|millis|milliseconds|kb|mb|kib|mib|percent)(_|$)/)
    if (type === 'summary' || type === 'histogram') assert.match(name, /_seconds$/)
  }
})

test('prom-client: a scrape asks each manager once, and managers come and go', async (t) => {
  const registry = new client.Registry()
  const [one, two] = [await manage(t, 'one'), await manage(t, 'two')]
  const managers = new Set([one])
  collectManagers(client, managers, registry)
  const namesIn = async () => {
    const { values } = metricsOf(await registry.metrics())
    return ['one', 'two'].filter((name) => values.has(`wasm_molt_generation{manager="${name}"}`))
  }
  let asked = 0
  const stats = one.stats
  one.stats = function (...args) {
    asked += 1
    return stats.apply(this, args)
  }
  assert.deepEqual(await namesIn(), ['one'])
  assert.equal(asked, 1)
  managers.add(two)
  assert.deepEqual(await namesIn(), ['one', 'two'])
  managers.delete(one)
  await one.close()
  assert.deepEqual(await namesIn(), ['two'])
  assert.equal(asked, 2)
})

test('prom-client: every kind of call is in the histogram, until it is stopped', async (t) => {
  const registry = new client.Registry()
  const manager = await manage(t, 'one')
  const stop = observeCalls(client, registry)
  const calls = tracingChannel('wasm-molt:call')
  await manager.call('add', [1, 2])
  manager.callSync('add', [1, 2])
  await manager.use((instance) => instance.call('add', [1, 2]))
  await manager.invoke('echo', Buffer.from('abc'))
  await assert.rejects(manager.call('fail'))
  await assert.rejects(manager.call('nobody'))
  assert.throws(() => manager.callSync('nobody'))
  const text = await registry.metrics()
  const { values } = metricsOf(text)
  const count = (name) => values.get(`wasm_molt_call_duration_seconds_count{export="${name}",manager="one"}`)
  assert.deepEqual([count('add'), count('echo'), count('fail'), count('nobody')], [3, 1, 1, undefined])
  const sum = values.get('wasm_molt_call_duration_seconds_sum{export="add",manager="one"}')
  assert.ok(sum > 0 && sum < 10, `${sum} seconds`)
  assert.equal(calls.start.hasSubscribers, true)
  stop()
  assert.equal(calls.start.hasSubscribers || calls.end.hasSubscribers || calls.asyncEnd.hasSubscribers, false)
  assert.doesNotMatch(await registry.metrics(), /wasm_molt/)
})

// ---------------------------------------------------------------- OpenTelemetry

function listenToSpans(t) {
  const exporter = new InMemorySpanExporter()
  const provider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] })
  otel.context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable())
  otel.trace.setGlobalTracerProvider(provider)
  const stop = traceManagers(otel)
  t.after(async () => {
    stop()
    await provider.shutdown()
    otel.trace.disable()
    otel.context.disable()
  })
  return { exporter, stop, spans: () => exporter.getFinishedSpans() }
}

const parentOf = (span) => span.parentSpanContext?.spanId

test('OpenTelemetry: a call has the span around it as its parent', async (t) => {
  const manager = await manage(t, 'one', { instances: 2 })
  const { spans, exporter } = listenToSpans(t)
  const tracer = otel.trace.getTracer('a request')
  const handle = (name) =>
    tracer.startActiveSpan(name, async (span) => {
      await manager.call('add', [1, 2])
      // And in what comes after it, too.
      await manager.invoke('echo', Buffer.from('abc'))
      await manager.use((instance) => instance.call('add', [1, 2]))
      span.end()
      return span.spanContext()
    })
  const requests = await Promise.all([handle('first'), handle('second')])
  for (const { traceId, spanId } of requests) {
    const mine = spans().filter((span) => parentOf(span) === spanId)
    assert.deepEqual(mine.map(({ name }) => name).sort(), ['call add', 'call add', 'call echo'])
    const kinds = mine.map(({ attributes }) => attributes['wasm_molt.kind'])
    assert.deepEqual(kinds.sort(), ['call', 'invoke', 'leased'])
    for (const span of mine) {
      assert.equal(span.spanContext().traceId, traceId)
      assert.equal(span.status.code, otel.SpanStatusCode.UNSET)
      assert.equal(span.attributes['wasm_molt.manager'], 'one')
      assert.equal(span.attributes['wasm_molt.generation'], 1)
      assert.equal(span.instrumentationScope.name, 'wasm-molt')
    }
  }
  exporter.reset()
  // By itself: it wants the first instance, which a call may be in.
  const outer = tracer.startActiveSpan('sync', (span) => {
    manager.callSync('add', [1, 2])
    return span.spanContext()
  })
  await manager.call('add', [1, 2])
  assert.deepEqual(
    spans().map((span) => [span.attributes['wasm_molt.kind'], parentOf(span)]),
    [
      ['callSync', outer.spanId],
      ['call', undefined],
    ],
  )
})

test('OpenTelemetry: what fails ends as an error', async (t) => {
  const manager = await manage(t, 'one')
  const { spans, exporter } = listenToSpans(t)
  for (const [begin, type, message] of [
    [() => manager.call('boom'), 'ERR_WASM_TRAP', /unreachable/],
    [() => manager.call('fail'), 'Error', /an import failed/],
    [() => manager.call('nobody'), 'ERR_WASM_EXPORT_NOT_FOUND', /nobody/],
    [async () => manager.callSync('nobody'), 'ERR_WASM_EXPORT_NOT_FOUND', /nobody/],
    [() => manager.reload({ source: 'nowhere.wasm' }), 'ERR_WASM_RELOAD_FAILED', /nowhere/],
    [() => manager.reload({ drainTimeoutMs: -1 }), 'ERR_WASM_INVALID_ARGUMENT', /drainTimeoutMs/],
    [() => manager.reset(), 'ERR_WASM_INVALID_ARGUMENT', /snapshot/],
    [async () => manager.resetSync(), 'ERR_WASM_INVALID_ARGUMENT', /snapshot/],
  ]) {
    exporter.reset()
    const error = await begin().then(assert.fail, (error) => error)
    const [span, ...others] = spans()
    assert.deepEqual(others, [], `${begin}`)
    assert.equal(span.status.code, otel.SpanStatusCode.ERROR, `${begin}`)
    assert.equal(span.attributes['error.type'], type)
    assert.equal(span.status.message, error.message)
    assert.match(error.message, message)
    assert.deepEqual(
      span.events.map(({ name, attributes }) => [name, attributes['exception.message']]),
      [['exception', error.message]],
    )
  }
})

test('OpenTelemetry: reloads and resets are spans with their figures', async (t) => {
  const manager = await manage(t, 'one')
  const { spans, stop } = listenToSpans(t)
  await manager.call('leak')
  const tracer = otel.trace.getTracer('a deploy')
  const deploy = await tracer.startActiveSpan('deploy', async (span) => {
    await manager.reload({ reason: 'deploy', strategy: 'rolling' })
    span.end()
    return span.spanContext()
  })
  manager.reloadSync()
  manager.snapshotSync()
  await manager.reset()
  manager.resetSync()
  const [, first, , second, ...resets] = spans()
  assert.deepEqual(
    [first.name, parentOf(first), second.name, parentOf(second)],
    [...['reload', deploy.spanId], ...['reload', undefined]],
  )
  const { 'wasm_molt.pause_ms': pauseMs, ...attributes } = first.attributes
  assert.ok(pauseMs >= 0)
  assert.deepEqual(attributes, {
    'wasm_molt.manager': 'one',
    'wasm_molt.generation': 1,
    'wasm_molt.reason': 'deploy',
    'wasm_molt.strategy': 'rolling',
    'wasm_molt.memory_bytes_before': 131072,
    'wasm_molt.memory_bytes_after': 65536,
  })
  assert.deepEqual(
    resets.map(({ name, attributes }) => [name, attributes['wasm_molt.memory_bytes_after']]),
    [
      ['reset', 65536],
      ['reset', 65536],
    ],
  )
  const before = spans().length
  stop()
  await manager.call('add', [1, 2])
  await manager.reload()
  assert.equal(spans().length, before)
})

test('OpenTelemetry: a recycle is a trace of its own, with one outcome', async (t) => {
  const { spans } = listenToSpans(t)
  const manager = await manage(t, 'one', { recycle: { calls: 10, jitter: 0 } })
  const tracer = otel.trace.getTracer('a request')
  await tracer.startActiveSpan('request', async (span) => {
    for (let i = 0; i < 10; i += 1) await manager.call('add', [i, 1])
    await until(() => spans().some(({ name }) => name === 'recycle'), 'it was recycled')
    span.end()
  })
  const recycles = spans().filter(({ name }) => name === 'recycle')
  assert.equal(recycles.length, 1)
  const [recycle] = recycles
  assert.deepEqual([recycle.status.code, parentOf(recycle)], [otel.SpanStatusCode.UNSET, undefined])
  assert.equal(recycle.attributes['wasm_molt.reason'], 'calls')
  assert.equal(recycle.attributes['wasm_molt.instance'], 0)
  assert.equal(recycle.attributes['wasm_molt.memory_bytes_after'], 65536)
})

test('OpenTelemetry: the metrics are those of prom-client, by name, labels and value', async (t) => {
  const exporter = new PrometheusExporter({ preventServerStart: true })
  const provider = new MeterProvider({ readers: [exporter] })
  otel.metrics.setGlobalMeterProvider(provider)
  const registry = new client.Registry()
  const managers = new Set()
  const stop = observeManagers(otel, managers)
  t.after(async () => {
    stop()
    await provider.shutdown()
    otel.metrics.disable()
  })
  collectManagers(client, managers, registry)
  t.after(observeCalls(client, registry))
  managers.add(await busy(t, 'one'))
  const two = await manage(t, 'two')
  managers.add(two)

  const collect = async () => {
    const { resourceMetrics, errors } = await exporter.collect()
    assert.deepEqual(errors, [])
    return metricsOf(new PrometheusSerializer().serialize(resourceMetrics), ['otel_scope_name'])
  }
  const theirs = await collect()
  const ours = metricsOf(await registry.metrics())
  const isShared = ([name]) => name.startsWith('wasm_molt_') && !/_(run|wait|pause)_seconds/.test(name)
  const shared = (map) => Object.fromEntries([...map].filter(isShared).sort(([a], [b]) => (a < b ? -1 : 1)))
  assert.deepEqual(shared(theirs.types), shared(ours.types))
  // Times are measured by each on its own.
  const isTime = ([name]) => /_duration_seconds_(sum|bucket)/.test(name)
  const figures = (map) => Object.fromEntries(Object.entries(shared(map)).filter((entry) => !isTime(entry)))
  assert.deepEqual(figures(theirs.values), figures(ours.values))
  assert.ok(Object.keys(figures(theirs.values)).length > 60)
  assert.ok(theirs.values.get('wasm_molt_call_duration_seconds_sum{export="add",manager="one"}') > 0)

  // The SDK goes on with what it has read last.
  stop()
  await two.call('add', [1, 2])
  const later = await collect()
  assert.equal(later.values.get('wasm_molt_calls_total{manager="two",outcome="completed"}'), 0)
  assert.equal(later.values.has('wasm_molt_call_duration_seconds_count{export="add",manager="two"}'), false)
})

// ---------------------------------------------------------------- docs/telemetry.md

const page = readFileSync(new URL('../../../docs/telemetry.md', import.meta.url), 'utf8')

test('the page quotes what the files say', () => {
  const quotes = [...page.matchAll(/```js\n\/\/ (examples\/\S+)\n([\s\S]*?)```/g)]
  assert.equal(quotes.length, 6)
  for (const [, path, quoted] of quotes) {
    const lines = readFileSync(new URL(`../../../${path}`, import.meta.url), 'utf8').split('\n')
    const isIndented = quoted.startsWith(' ')
    for (const line of quoted.trimEnd().split('\n')) {
      const found = lines.some((one) => one === line || (!isIndented && one.trim() === line.trim()))
      assert.ok(found, `${path} does not say: ${line}`)
    }
  }
})

test('the table has the metrics that there are', async (t) => {
  const registry = new client.Registry()
  collectManagers(client, [await manage(t, 'one')], registry)
  t.after(observeCalls(client, registry))
  const metrics = await registry.getMetricsAsJSON()
  const rows = [...page.matchAll(/^\| `(wasm_molt_\w+)` \| (gauge|counter|histogram|summary) \|/gm)]
  assert.deepEqual(
    rows.map(([, name, type]) => `${type} ${name}`).sort(),
    metrics.map(({ name, type }) => `${type} ${name}`).sort(),
  )
})
