// What calls, resets and traps tell the world, and the one word for a readiness endpoint.
import assert from 'node:assert/strict'
import { AsyncLocalStorage } from 'node:async_hooks'
import { channel, type TracingChannelSubscribers, tracingChannel } from 'node:diagnostics_channel'
import { writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import {
  type CallTrace,
  loadGlue,
  type ManagerOptions,
  type Readiness,
  type ReloadTrace,
  type ResetTrace,
  readiness,
  type TrapMessage,
  type WasmModuleManager,
} from '../index.js'
import { buffers, temporaryFolder, workbench } from './guests.ts'
import { barrier, bench, child, failure, LIMIT, managed, outcome, reported, thrownBy, turns, until } from './support.ts'

const binding = createRequire(import.meta.url)('../binding.js')

type Event = 'start' | 'end' | 'asyncStart' | 'asyncEnd' | 'error'

interface Told<T> {
  event: Event
  context: T
  /** As it was at that moment. */
  hasResult: boolean
  hasError: boolean
}

function listen<T extends object>(t: TestContext, name: string): Told<T>[] {
  const told: Told<T>[] = []
  const hear = (event: Event) => (context: T) => {
    told.push({ event, context, hasResult: 'result' in context, hasError: 'error' in context })
  }
  const subscribers = {
    start: hear('start'),
    end: hear('end'),
    asyncStart: hear('asyncStart'),
    asyncEnd: hear('asyncEnd'),
    error: hear('error'),
  } as TracingChannelSubscribers<T>
  const traced = tracingChannel<string, T>(name)
  traced.subscribe(subscribers)
  t.after(() => traced.unsubscribe(subscribers))
  return told
}

const listenToCalls = (t: TestContext) => listen<CallTrace>(t, 'wasm-molt:call')
const listenToResets = (t: TestContext) => listen<ResetTrace>(t, 'wasm-molt:reset')

function listenToTraps(t: TestContext): TrapMessage[] {
  const told: TrapMessage[] = []
  const hear = (message: unknown) => void told.push(message as TrapMessage)
  const traps = channel('wasm-molt:trap')
  traps.subscribe(hear)
  t.after(() => traps.unsubscribe(hear))
  return told
}

const eventsOf = (told: { event: Event }[]) => told.map(({ event }) => event)
const SETTLED = ['start', 'end', 'asyncStart', 'asyncEnd']
const REJECTED = ['start', 'end', 'error', 'asyncStart', 'asyncEnd']

/** All of one operation, with one context. */
function contextOf<T>(told: Told<T>[]): T {
  const [first] = told
  assert.ok(first && told.every(({ context }) => context === first.context))
  return first.context
}

// ---------------------------------------------------------------- calls

test('a call is told from start to end, with one context', LIMIT, async (t) => {
  const { manager } = await bench(t, { name: 'traced' })
  const told = listenToCalls(t)
  assert.equal(await manager.call('add', [40, 2]), 42)
  assert.deepEqual(eventsOf(told), SETTLED)
  assert.deepEqual(contextOf(told), { manager: 'traced', generation: 1, name: 'add', kind: 'call', result: 42 })
  assert.deepEqual(
    told.map(({ hasResult }) => hasResult),
    [false, false, true, true],
  )
  told.length = 0
  await manager.reload()
  await manager.call('add', [1, 2], { timeoutMs: 60_000 })
  assert.deepEqual(eventsOf(told), SETTLED)
  assert.equal(contextOf(told).generation, 2)
})

test('so are invoke and the call of a lease, and callSync without the second half', LIMIT, async (t) => {
  const manager = await managed(t, buffers)
  const told = listenToCalls(t)
  const answer = await manager.invoke('reverse', Buffer.from('abc'))
  assert.equal(Buffer.from(answer).toString(), 'cba')
  assert.deepEqual(eventsOf(told), SETTLED)
  const { result, ...invoked } = contextOf(told)
  assert.ok(result === answer)
  assert.deepEqual(invoked, { manager: 'buffers', generation: 1, name: 'reverse', kind: 'invoke' })

  told.length = 0
  assert.equal(await manager.use((instance) => instance.call('live')), 0)
  assert.deepEqual(eventsOf(told), SETTLED)
  assert.deepEqual(contextOf(told), { manager: 'buffers', generation: 1, name: 'live', kind: 'leased', result: 0 })

  told.length = 0
  assert.equal(manager.callSync('live'), 0)
  assert.deepEqual(eventsOf(told), ['start', 'end'])
  assert.deepEqual(contextOf(told), { manager: 'buffers', generation: 1, name: 'live', kind: 'callSync', result: 0 })
  assert.deepEqual(
    told.map(({ hasResult }) => hasResult),
    [false, true],
  )
})

test('a result of nothing is a result', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const told = listenToCalls(t)
  manager.callSync('set', [1])
  await manager.call('set', [1])
  assert.deepEqual(
    told.map(({ event, hasResult }) => [event, hasResult]),
    [
      ['start', false],
      ['end', true],
      ['start', false],
      ['end', false],
      ['asyncStart', true],
      ['asyncEnd', true],
    ],
  )
})

test('what fails is told with the very error', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { maxQueue: 0 })
  const told = listenToCalls(t)
  const trapped = await failure(manager.call('boom'), 'ERR_WASM_TRAP')
  assert.deepEqual(eventsOf(told), REJECTED)
  assert.ok(contextOf(told).error === trapped && !told.some(({ hasResult }) => hasResult))
  assert.deepEqual(
    told.map(({ hasError }) => hasError),
    [false, false, true, true, true],
  )

  // What is refused at once is a failed call like any other.
  const reason = new Error('enough')
  const unknown = { timeout: 1 } as object
  const input = new Uint8Array(1)
  await until(() => manager.stats().instances.poisoned === 0)
  const lease = await manager.acquire()
  for (const [begin, code] of [
    [() => manager.call('nobody'), 'ERR_WASM_EXPORT_NOT_FOUND'],
    [() => manager.call('add', [1, 2], unknown), 'ERR_WASM_INVALID_ARGUMENT'],
    [() => manager.call('add', [1, 2]), 'ERR_WASM_QUEUE_FULL'],
    [() => manager.invoke('nobody', input), 'ERR_WASM_EXPORT_NOT_FOUND'],
    [() => manager.invoke('add', input, unknown), 'ERR_WASM_INVALID_ARGUMENT'],
    [() => lease.call('nobody'), 'ERR_WASM_EXPORT_NOT_FOUND'],
    [() => lease.call('add', [1, 2], unknown), 'ERR_WASM_INVALID_ARGUMENT'],
  ] as const) {
    told.length = 0
    const error = await failure(begin(), code)
    assert.deepEqual(eventsOf(told), REJECTED, `${begin}`)
    assert.ok(contextOf(told).error === error, `${begin}`)
  }
  for (const begin of [
    () => manager.call('add', [1, 2], { signal: AbortSignal.abort(reason) }),
    () => manager.invoke('add', input, { signal: AbortSignal.abort(reason) }),
    () => lease.call('add', [1, 2], { signal: AbortSignal.abort(reason) }),
  ]) {
    told.length = 0
    assert.deepEqual(await outcome(begin()), { error: reason })
    assert.deepEqual(eventsOf(told), REJECTED, `${begin}`)
    assert.ok(contextOf(told).error === reason, `${begin}`)
  }
  lease.release()

  told.length = 0
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const busy = await failure(
    thrownBy(() => manager.callSync('add', [1, 2])),
    'ERR_WASM_BUSY',
  )
  release(1)
  await held
  const sync = told.filter(({ context }) => context.kind === 'callSync')
  assert.deepEqual(eventsOf(sync), ['start', 'error', 'end'])
  assert.ok(contextOf(sync).error === busy)

  told.length = 0
  await manager.close()
  await failure(manager.call('add', [1, 2]), 'ERR_WASM_CLOSED')
  assert.deepEqual(eventsOf(told), REJECTED)
})

test('calls at the same time have a context each', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2 })
  const told = listenToCalls(t)
  const sums = await Promise.all(Array.from({ length: 50 }, (_, i) => manager.call('add', [i, 1])))
  const contexts = new Map<CallTrace, Event[]>()
  for (const { event, context } of told) contexts.set(context, [...(contexts.get(context) ?? []), event])
  assert.equal(contexts.size, 50)
  for (const events of contexts.values()) assert.deepEqual(events, SETTLED)
  assert.deepEqual(
    [...contexts.keys()].map(({ result }) => result),
    sums,
  )
})

test('arguments and input are read before the call returns, traced or not', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const other = await managed(t, buffers)
  listenToCalls(t)
  const args = [1, 2]
  const input = Buffer.from('abc')
  const [sum, text] = [manager.call('add', args), other.invoke('reverse', input)]
  args[0] = 100
  input.fill('x')
  assert.deepEqual([await sum, Buffer.from(await text).toString()], [3, 'cba'])
})

test('leases of hooks say whose they are, from the first start on', LIMIT, async (t) => {
  const told = listenToCalls(t)
  const hooks: ManagerOptions = {
    initialize: async (instance) => void (await instance.call('set', [7])),
    saveState: (instance) => instance.call('peek'),
    restoreState: async (instance, count) => void (await instance.call('set', [count])),
  }
  const { manager } = await bench(t, hooks)
  assert.deepEqual(
    told.filter(({ event }) => event === 'asyncEnd').map(({ context }) => context),
    [{ manager: 'workbench', generation: 1, name: 'set', kind: 'leased', result: undefined }],
  )
  told.length = 0
  await manager.reload()
  assert.deepEqual(
    told
      .filter(({ event }) => event === 'asyncEnd')
      .map(({ context: { manager, generation, name } }) => [manager, generation, name]),
    [
      ['workbench', 2, 'set'],
      ['workbench', 1, 'peek'],
      ['workbench', 2, 'set'],
    ],
  )
  const named = await bench(t, { ...hooks, name: 'named' })
  assert.equal(told.at(-1)?.context.manager, 'named')
  const child = await named.manager.fork({ name: 'forked' })
  t.after(() => child.destroy())
  await child.use((instance) => instance.call('peek'))
  assert.equal(told.at(-1)?.context.manager, 'forked')
})

test('functions of exports are not told of', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const told = listenToCalls(t)
  assert.equal(manager.exports.add?.(1, 2), 3)
  await manager.use((instance) => instance.exports.add?.(1, 2))
  assert.deepEqual(told, [])
})

test('one listener of one of the five is enough, and a store can be bound to the call', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const traced = tracingChannel<string, CallTrace>('wasm-molt:call')
  for (const event of ['start', 'end', 'asyncStart', 'asyncEnd', 'error'] as const) {
    const seen: string[] = []
    const hear = (context: unknown) => void seen.push((context as CallTrace).name)
    traced[event].subscribe(hear)
    await outcome(manager.call('boom'))
    traced[event].unsubscribe(hear)
    await outcome(manager.call('boom'))
    assert.deepEqual(seen, ['boom'], event)
  }
  const spans = new AsyncLocalStorage<string>()
  const seen: unknown[] = []
  const hear = () => void seen.push(spans.getStore())
  traced.start.bindStore(spans, ({ name }) => `span of ${name}`)
  traced.asyncEnd.subscribe(hear)
  t.after(() => {
    traced.start.unbindStore(spans)
    traced.asyncEnd.unsubscribe(hear)
  })
  await manager.call('add', [1, 2])
  assert.deepEqual([seen, spans.getStore()], [['span of add'], undefined])
})

test('where nobody listens nothing is made, and call answers with the native promise', LIMIT, async () => {
  // The channels' own ways out are counted: a message that is made and dropped would show.
  const ended = await child(
    `
    import { channel, tracingChannel } from 'node:diagnostics_channel'
    import { writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
    const counted = [channel('wasm-molt:trap')]
    for (const name of ['wasm-molt:call', 'wasm-molt:reset', 'wasm-molt:recycle']) {
      const { start, end, asyncStart, asyncEnd, error } = tracingChannel(name)
      counted.push(start, end, asyncStart, asyncEnd, error)
    }
    let published = 0
    for (const one of counted) {
      for (const way of ['publish', 'runStores']) {
        const real = one[way]
        Object.defineProperty(one, way, {
          configurable: true,
          value: function (...args) {
            published += 1
            return real.apply(this, args)
          },
        })
      }
    }
    const binding = createRequire(process.env.INDEX)('./lib/binding.js')
    const { call } = binding
    let made
    binding.call = (...args) => (made = call(...args))
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const isNative = []
    const run = async () => {
      const calls = [() => manager.call('add', [1, 2]), () => manager.call('add', [1, 2], { timeoutMs: 60_000 })]
      for (const begin of calls) {
        const promise = begin()
        isNative.push(promise === made)
        await promise
      }
      await manager.use((instance) => instance.call('add', [1, 2]))
      manager.callSync('add', [1, 2])
      await manager.call('boom').catch(() => {})
      await manager.snapshot()
      await manager.reset()
      manager.resetSync()
      await new Promise((resolve) => setImmediate(resolve))
    }
    await run()
    const silent = published
    // And that this counts at all.
    tracingChannel('wasm-molt:call').subscribe({ start() {} })
    await run()
    const told = published
    await manager.close()
    report({ silent, isTold: told > 0, isNative })
    `,
    { env: { WORKBENCH: workbench, INDEX: new URL('../index.js', import.meta.url).pathname } },
  )
  assert.deepEqual(reported(ended), { silent: 0, isTold: true, isNative: [true, true, false, false] })
})

test('a subscriber that throws is an uncaught exception of the program, and the call goes on', LIMIT, async () => {
  const ended = await child(
    `
    import { channel, tracingChannel } from 'node:diagnostics_channel'
    const uncaught = []
    process.on('uncaughtException', (error) => uncaught.push(error.message))
    const shout = (text) => () => { throw new Error(text) }
    tracingChannel('wasm-molt:call').subscribe({ start: shout('start'), asyncEnd: shout('asyncEnd') })
    channel('wasm-molt:trap').subscribe(shout('trap'))
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const sum = await manager.call('add', [40, 2])
    const heard = []
    manager.on('trap', ({ code }) => heard.push(code))
    await manager.call('boom').catch(({ code }) => heard.push(code))
    while (heard.length < 2) await new Promise((resolve) => setImmediate(resolve))
    await new Promise((resolve) => setImmediate(resolve))
    await manager.close()
    report({ sum, uncaught: uncaught.sort(), heard })
    `,
    { env: { WORKBENCH: workbench } },
  )
  assert.deepEqual(reported(ended), {
    sum: 42,
    uncaught: ['asyncEnd', 'asyncEnd', 'start', 'start', 'trap'],
    heard: ['ERR_WASM_TRAP', 'ERR_WASM_TRAP'],
  })
})

test('subscribers may use the manager', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2, threads: 2 })
  const inner: Promise<unknown>[] = []
  const traced = tracingChannel<string, CallTrace>('wasm-molt:call')
  const hear = (context: unknown) => {
    if ((context as CallTrace).name === 'count') inner.push(manager.call('add', [1, inner.length]))
  }
  for (const event of ['start', 'asyncEnd'] as const) {
    traced[event].subscribe(hear)
    t.after(() => traced[event].unsubscribe(hear))
  }
  await manager.call('count')
  assert.deepEqual(await Promise.all(inner), [1, 2])
})

// ---------------------------------------------------------------- resets

test('resets are told, of both kinds of managers', LIMIT, async (t) => {
  const { manager } = await bench(t, { name: 'guest' })
  const glue = await loadGlue(glueFile(), { cache: false, name: 'glue' })
  t.after(() => glue.destroy())
  const told = listenToResets(t)
  for (const [one, name] of [
    [manager, 'guest'],
    [glue, 'glue'],
  ] as const) {
    await one.snapshot()
    told.length = 0
    const report = await one.reset()
    assert.deepEqual(eventsOf(told), SETTLED)
    assert.deepEqual(contextOf(told), { manager: name, generation: 1, result: report })
    assert.ok(contextOf(told).result === report)
    told.length = 0
    const second = one.resetSync()
    assert.deepEqual(eventsOf(told), ['start', 'end'])
    assert.ok(contextOf(told).result === second)
  }
})

test('so are resets that fail, those that are refused at once among them', LIMIT, async (t) => {
  let inHook: (() => Promise<unknown>) | undefined
  const { manager } = await bench(t, { saveState: async () => void (await inHook?.()) })
  const told = listenToResets(t)
  const refused = await failure(manager.reset(), 'ERR_WASM_INVALID_ARGUMENT')
  assert.deepEqual(eventsOf(told), REJECTED)
  assert.ok(contextOf(told).error === refused)

  await manager.snapshot()
  for (const [begin, code] of [
    [() => manager.reset({ drainTimeoutMs: -1 }), 'ERR_WASM_INVALID_ARGUMENT'],
    [() => manager.reset({ to: {} as never }), 'ERR_WASM_INVALID_ARGUMENT'],
  ] as const) {
    told.length = 0
    const error = await failure(begin(), code)
    assert.deepEqual(eventsOf(told), REJECTED)
    assert.ok(contextOf(told).error === error)
  }
  told.length = 0
  inHook = () => failure(manager.reset(), 'ERR_WASM_RELOADING')
  await manager.reload()
  assert.deepEqual(eventsOf(told), REJECTED)

  told.length = 0
  const thrown = await failure(
    thrownBy(() => manager.resetSync({ to: {} as never })),
    'ERR_WASM_INVALID_ARGUMENT',
  )
  assert.deepEqual(eventsOf(told), ['start', 'error', 'end'])
  assert.ok(contextOf(told).error === thrown)
})

// ---------------------------------------------------------------- reloads

test('reloads that are refused at once are told of as well', LIMIT, async (t) => {
  let inHook: (() => Promise<unknown>) | undefined
  const { manager } = await bench(t, { saveState: async () => void (await inHook?.()) })
  const told = listen<ReloadTrace>(t, 'wasm-molt:reload')
  const elsewhere = new URL('https://example.com/guest.wasm')
  for (const [begin, code] of [
    [() => manager.reload({ drainTimeoutMs: -1 }), 'ERR_WASM_INVALID_ARGUMENT'],
    [() => manager.reload({ source: elsewhere }), 'ERR_WASM_INVALID_ARGUMENT'],
  ] as const) {
    told.length = 0
    const error = await failure(begin(), code)
    assert.deepEqual(eventsOf(told), REJECTED, `${begin}`)
    assert.ok(contextOf(told).error === error)
  }
  told.length = 0
  await failure(
    thrownBy(() => manager.reloadSync({ source: elsewhere })),
    'ERR_WASM_INVALID_ARGUMENT',
  )
  assert.deepEqual(eventsOf(told), ['start', 'error', 'end'])

  told.length = 0
  inHook = () => failure(manager.reload({ reason: 'inner' }), 'ERR_WASM_RELOADING')
  await manager.reload()
  assert.deepEqual(eventsOf(told.filter(({ context }) => context.reason === 'inner')), REJECTED)
})

// ---------------------------------------------------------------- traps

test('each trap is told once, with the error of the event', LIMIT, async (t) => {
  const { manager } = await bench(t, { name: 'trapping' })
  const events: unknown[] = []
  manager.on('trap', (error) => events.push(error))
  const told = listenToTraps(t)
  const error = await failure(manager.call('boom'), 'ERR_WASM_TRAP')
  await until(() => told.length === 1 && events.length === 1)
  const [message] = told
  assert.ok(message && message.error === events[0])
  const { code, trap } = message.error
  assert.deepEqual([code, trap, message.error.message], ['ERR_WASM_TRAP', 'unreachable', error.message])
  assert.deepEqual([message.manager, message.generation], ['trapping', 1])
  assert.deepEqual(Object.keys(message), ['manager', 'generation', 'error'])

  await manager.call('add', [1, 2])
  await failure(
    thrownBy(() => manager.callSync('boom')),
    'ERR_WASM_TRAP',
  )
  await until(() => told.length === 2)
  assert.equal(told[1]?.generation, 2)

  // What was stopped has not trapped.
  await failure(manager.call('spin', [], { timeoutMs: 20 }), 'ERR_WASM_TIMEOUT')
  await manager.call('add', [1, 2])
  await turns()
  assert.equal(told.length, 2)
})

test('traps of glue are told as well', LIMIT, async (t) => {
  const glue = await loadGlue(glueFile(), { cache: false, name: 'glue' })
  t.after(() => glue.destroy())
  const told = listenToTraps(t)
  assert.throws(() => glue.module.boom())
  await until(() => told.length === 1)
  const [message] = told
  assert.deepEqual(
    [message?.manager, message?.generation, message?.error.code, message?.error.trap],
    ['glue', 1, 'ERR_WASM_TRAP', 'unreachable'],
  )
})

const glueGuest = `(module (memory (export "memory") 1) (func (export "boom") unreachable))`

function glueFile(): string {
  const bytes = Buffer.from(binding.__assemble(glueGuest)).toString('base64')
  const module_ = `new WebAssembly.Module(Buffer.from('${bytes}', 'base64'))`
  const path = join(temporaryFolder('glue'), 'glue.cjs')
  writeFileSync(path, `module.exports = new WebAssembly.Instance(${module_}).exports`)
  return path
}

// ---------------------------------------------------------------- readiness

test('readiness follows a manager through its life', LIMIT, async (t) => {
  const inside = barrier()
  const door = barrier()
  let isHeld = false
  const { manager, close, arrived, release } = await bench(t, {
    name: 'one',
    initialize: async () => {
      if (!isHeld) return
      inside.open()
      await door.promise
    },
  })
  const expected = (state: WasmModuleManager['state'], status: Readiness['status'], generation: number): Readiness => ({
    isReady: status === 'serving',
    status,
    managers: [{ name: 'one', state, status, generation }],
  })
  assert.deepEqual(readiness(manager), expected('ready', 'serving', 1))

  // Calls wait a moment, and are answered.
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  isHeld = true
  const reload = manager.reload()
  await inside.promise
  assert.deepEqual(readiness(manager), expected('reloading', 'serving', 1))
  isHeld = false
  door.open()
  await until(() => manager.state === 'draining')
  assert.deepEqual(readiness(manager), expected('draining', 'serving', 1))
  release(1)
  await Promise.all([held, reload])
  assert.deepEqual(readiness(manager), expected('ready', 'serving', 2))

  const lease = await manager.acquire()
  const closed = manager.close()
  assert.deepEqual(readiness(manager), expected('closing', 'draining', 2))
  lease.release()
  await closed
  assert.deepEqual(readiness(manager), expected('closed', 'draining', 2))
})

test('a manager that cannot serve has failed, and is back after a reload', LIMIT, async (t) => {
  let isBroken = false
  const { manager } = await bench(t, {
    initialize: () => {
      if (isBroken) throw new Error('broken')
    },
  })
  isBroken = true
  await failure(manager.call('boom'), 'ERR_WASM_TRAP')
  await until(() => manager.state === 'failed')
  assert.deepEqual([readiness(manager).isReady, readiness(manager).status], [false, 'failed'])
  isBroken = false
  await manager.reload()
  assert.deepEqual([readiness(manager).isReady, readiness(manager).status], [true, 'serving'])
})

test('over several managers the worst counts, in any order; none is ready', LIMIT, async (t) => {
  const { manager: good } = await bench(t, { name: 'good' })
  const { manager: gone } = await bench(t, { name: 'gone' })
  await gone.close()
  for (const [managers, names] of [
    [
      [good, gone],
      ['good', 'gone'],
    ],
    [
      [gone, good],
      ['gone', 'good'],
    ],
  ] as const) {
    const ready = readiness(...managers)
    assert.deepEqual([ready.isReady, ready.status], [false, 'draining'])
    assert.deepEqual(
      ready.managers.map(({ name }) => name),
      names,
    )
  }
  // Anything with these three will do; no manager can be caught in each state.
  const inState = (state: WasmModuleManager['state']) => ({ name: state, state, generation: 1 })
  const worst = (...states: WasmModuleManager['state'][]) => readiness(...states.map(inState)).status
  assert.equal(worst('ready', 'reloading', 'draining'), 'serving')
  assert.equal(worst('starting', 'ready'), 'starting')
  assert.equal(worst('ready', 'closing', 'starting'), 'draining')
  assert.equal(worst('closed', 'failed', 'ready'), 'failed')
  assert.deepEqual(readiness(), { isReady: true, status: 'serving', managers: [] })
})

// ---------------------------------------------------------------- figures

test('stats can be polled: asking does not depend on how much memory there is, and calls go on', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 8, threads: 2 })
  // 16 MiB each, with a page table entry for every page: walking them would take milliseconds each time.
  const pages = 256
  for (const lease of await Promise.all(Array.from({ length: 8 }, () => manager.acquire()))) {
    await lease.call('grow', [pages - 1])
    await lease.call('touch', [0, pages * 65536])
    lease.release()
  }
  assert.equal(manager.stats().memoryBytes, 8 * pages * 65536)
  let answered = 0
  let isOver = false
  const load = async () => {
    while (!isOver) {
      await manager.call('burn', [1000])
      answered += 1
    }
  }
  const loads = [load(), load()]
  await until(() => answered > 0)
  const started = performance.now()
  for (let i = 0; i < 1000; i += 1) manager.stats()
  const took = performance.now() - started
  isOver = true
  await Promise.all(loads)
  // A thousand seconds of polling within one.
  assert.ok(took < 1000, `${took} ms for 1,000`)
  assert.equal(manager.stats().calls.completed, answered + 16)
})
