// What a reload tells the world: the report's figures, the tracing channel, the channel of steps.
import assert from 'node:assert/strict'
import { channel, type TracingChannelSubscribers, tracingChannel } from 'node:diagnostics_channel'
import { type TestContext, test } from 'node:test'
import type { ManagerOptions, ReloadReport, ReloadStep, ReloadTrace } from '../index.js'
import { workbench } from './guests.ts'
import {
  barrier,
  bench,
  child,
  failure,
  hasCode,
  LIMIT,
  outcome,
  reported,
  thrownBy,
  turns,
  until,
  WasmError,
} from './support.ts'

const traced = tracingChannel<string, ReloadTrace>('wasm-molt:reload')

interface Told {
  event: 'start' | 'end' | 'asyncStart' | 'asyncEnd' | 'error'
  context: ReloadTrace
  /** As it was at that moment. */
  result: unknown
  error: unknown
}

function listenToReloads(t: TestContext): Told[] {
  const told: Told[] = []
  const hear = (event: Told['event']) => (context: ReloadTrace) => {
    told.push({ event, context, result: context.result, error: context.error })
  }
  const subscribers = {
    start: hear('start'),
    end: hear('end'),
    asyncStart: hear('asyncStart'),
    asyncEnd: hear('asyncEnd'),
    error: hear('error'),
  } as TracingChannelSubscribers<ReloadTrace>
  traced.subscribe(subscribers)
  t.after(() => traced.unsubscribe(subscribers))
  return told
}

function listenToSteps(t: TestContext): { steps: ReloadStep[]; stop: () => void } {
  const steps: ReloadStep[] = []
  const hear = (message: unknown) => void steps.push(message as ReloadStep)
  const steps_ = channel('wasm-molt:reload:step')
  steps_.subscribe(hear)
  const stop = () => void steps_.unsubscribe(hear)
  t.after(stop)
  return { steps, stop }
}

/** Hooks that take a moment each. */
const slow: ManagerOptions = {
  initialize: () => turns(2),
  saveState: () => turns(4),
  restoreState: () => turns(3),
}

/** What pauses must hold, to the resolution of the figures. */
function addsUp(report: ReloadReport): void {
  const { pauseMs, drainMs, saveMs, restoreMs, instantiateMs } = report
  const text = JSON.stringify(report)
  for (const figure of [pauseMs, drainMs, saveMs, restoreMs, instantiateMs]) {
    assert.ok(Number.isFinite(figure) && figure >= 0, text)
  }
  // Sums of doubles: a nanosecond is less than any clock tells apart.
  if (report.strategy === 'exclusive') assert.ok(pauseMs >= drainMs + saveMs + restoreMs - 1e-6, text)
}

const FIGURE = {
  instantiate: 'instantiateMs',
  drain: 'drainMs',
  save: 'saveMs',
  restore: 'restoreMs',
} as const

/** Each step's time is the one in the report. */
function agrees(steps: ReloadStep[], report: ReloadReport): void {
  for (const { step, durationMs } of steps) {
    assert.ok(Number.isFinite(durationMs) && durationMs >= 0, step)
    // The commit has no figure of its own in the report.
    if (step !== 'commit') assert.equal(durationMs, report[FIGURE[step]], step)
  }
}

// ---------------------------------------------------------------- the figures

test("the report's figures add up, whatever the reload does", LIMIT, async (t) => {
  for (const options of [{}, slow, { ...slow, instances: 3 }, { instances: 2 }] as ManagerOptions[]) {
    const { manager } = await bench(t, options)
    for (const given of [{}, { skipSave: true }, { strategy: 'rolling', skipSave: true }] as const) {
      const started = performance.now()
      const report = await manager.reload(given)
      const took = performance.now() - started
      addsUp(report)
      assert.ok(report.pauseMs + report.instantiateMs <= took + 1, `${took} ms for ${JSON.stringify(report)}`)
      if ('skipSave' in given) assert.equal(report.saveMs, 0)
    }
  }
  const { manager } = await bench(t)
  addsUp(manager.reloadSync())
  addsUp(manager.reloadSync({ strategy: 'rolling' }))
})

test('each figure measures its own step', LIMIT, async (t) => {
  /** Long against whatever else a reload does, on a busy machine too. */
  const busy = () => {
    const end = performance.now() + 150
    while (performance.now() < end);
  }
  const cases = { initialize: 'instantiateMs', saveState: 'saveMs', restoreState: 'restoreMs' } as const
  for (const [hook, figure] of Object.entries(cases)) {
    const { manager } = await bench(t, {
      saveState: () => 1,
      restoreState: () => {},
      [hook]: busy,
    })
    for (const report of [await manager.reload(), manager.reloadSync()]) {
      assert.ok(report[figure] >= 149, `${figure} in ${JSON.stringify(report)}`)
      if (figure === 'instantiateMs') assert.ok(report.pauseMs < report.instantiateMs, JSON.stringify(report))
      else assert.ok(report.pauseMs >= report[figure])
    }
  }
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const reload = manager.reload()
  await until(() => manager.state === 'draining')
  busy()
  release(1)
  await held
  const report = await reload
  // The drain begins a moment after the state says so, which is long where the cores are taken.
  assert.ok(report.drainMs >= 20 && report.pauseMs >= 149, JSON.stringify(report))
})

test('stats agree with the reports', LIMIT, async (t) => {
  const { manager } = await bench(t, slow)
  const reports = [await manager.reload(), await manager.reload({ reason: 'b' }), await manager.reload({ reason: 'b' })]
  const { pauseTime, reloads } = manager.stats()
  assert.deepEqual(reloads, { manual: 1, b: 2 })
  assert.equal(pauseTime.count, 3)
  const longest = Math.max(...reports.map((report) => report.pauseMs))
  // Histograms keep two significant digits.
  assert.ok(Math.abs(pauseTime.max - longest) <= longest * 0.02 + 0.01, `${pauseTime.max} against ${longest}`)
})

// ---------------------------------------------------------------- the tracing channel

test('the tracing channel tells of a reload from start to end, with one context', LIMIT, async (t) => {
  const { manager } = await bench(t, { name: 'traced' })
  const told = listenToReloads(t)
  const report = await manager.reload({ reason: 'why', strategy: 'rolling' })
  assert.deepEqual(
    told.map(({ event }) => event),
    ['start', 'end', 'asyncStart', 'asyncEnd'],
  )
  const context = told[0]?.context
  assert.ok(context && told.every((one) => one.context === context))
  const { manager: name, generation, reason, strategy } = context
  assert.deepEqual([name, generation, reason, strategy], ['traced', 1, 'why', 'rolling'])
  assert.deepEqual(
    told.map(({ result }) => result === report),
    [false, false, true, true],
  )
  told.length = 0
  const second = await manager.reload()
  assert.deepEqual(
    [told[0]?.context.generation, told[0]?.context.reason, told[0]?.context.strategy, told[3]?.result === second],
    [2, 'manual', 'exclusive', true],
  )
})

test('reloadSync is traced as well: start and end', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const told = listenToReloads(t)
  const report = manager.reloadSync({ reason: 'now' })
  assert.deepEqual(
    told.map(({ event, result }) => [event, result === report]),
    [
      ['start', false],
      ['end', true],
    ],
  )
  assert.equal(told[0]?.context.reason, 'now')
})

test('failures are told with the very error, and rejected with it', LIMIT, async (t) => {
  const cause = new Error('no')
  let isArmed = false
  const { manager } = await bench(t, {
    initialize: () => {
      if (isArmed) throw cause
    },
  })
  isArmed = true
  const told = listenToReloads(t)
  const error = await failure(manager.reload(), 'ERR_WASM_RELOAD_FAILED')
  assert.deepEqual(
    told.map(({ event, error: one }) => [event, one === error]),
    [
      ['start', false],
      ['end', false],
      ['error', true],
      ['asyncStart', true],
      ['asyncEnd', true],
    ],
  )
  told.length = 0
  const thrown = await failure(
    thrownBy(() => manager.reloadSync()),
    'ERR_WASM_RELOAD_FAILED',
  )
  assert.deepEqual(
    told.map(({ event, error: one }) => [event, one === thrown]),
    [
      ['start', false],
      ['error', true],
      ['end', true],
    ],
  )
  told.length = 0
  // What is refused at once is a failed reload like any other.
  const refused = await failure(manager.reload({ drainTimeoutMs: -1 }), 'ERR_WASM_INVALID_ARGUMENT')
  assert.ok(told.some(({ event, error: one }) => event === 'error' && one === refused))
})

test('reloads that join are traced each, and told once as steps', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const told = listenToReloads(t)
  const { steps } = listenToSteps(t)
  await Promise.all([manager.reload(), manager.reload()])
  assert.equal(told.filter(({ event }) => event === 'start').length, 2)
  assert.equal(new Set(told.map(({ context }) => context)).size, 2)
  assert.equal(steps.filter(({ step }) => step === 'commit').length, 1)
})

test('one listener of one of the five is enough, and a store can be bound to the reload', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const seen: unknown[] = []
  const hear = (context: unknown) => void seen.push((context as ReloadTrace).result)
  traced.asyncEnd.subscribe(hear)
  t.after(() => traced.asyncEnd.unsubscribe(hear))
  const report = await manager.reload()
  assert.ok(seen.length === 1 && seen[0] === report)
})

// ---------------------------------------------------------------- the channel of steps

test('the steps come in order, before the reload settles, with the figures of its report', LIMIT, async (t) => {
  const { steps } = listenToSteps(t)
  const { manager } = await bench(t, { ...slow, name: 'stepping', instances: 2 })
  for (const [given, expected] of [
    [{ reason: 'x' }, ['instantiate', 'drain', 'save', 'restore', 'commit']],
    [{ reason: 'x', skipSave: true }, ['instantiate', 'drain', 'restore', 'commit']],
    [{ reason: 'x', skipSave: true, strategy: 'rolling' }, ['drain', 'instantiate', 'commit']],
  ] as const) {
    steps.length = 0
    const report = await manager.reload(given)
    assert.deepEqual(
      steps.map(({ step }) => step),
      expected,
    )
    for (const { manager: name, generation, reason, strategy } of steps) {
      assert.deepEqual([name, generation, reason, strategy], ['stepping', report.generation, 'x', report.strategy])
    }
    agrees(steps, report)
    addsUp(report)
  }
  assert.deepEqual(Object.keys(steps[0] ?? {}).sort(), [
    'durationMs',
    'generation',
    'manager',
    'reason',
    'step',
    'strategy',
  ])
})

test('the steps of reloadSync come from the event loop, after it', LIMIT, async (t) => {
  const { steps } = listenToSteps(t)
  const { manager } = await bench(t)
  const report = manager.reloadSync()
  await until(() => steps.length === 5)
  agrees(steps, report)
})

test('a reload that fails tells of the steps that went well, and of no other', LIMIT, async (t) => {
  const { steps } = listenToSteps(t)
  let failing: string | undefined
  const fail = (hook: string) => () => {
    if (failing === hook) throw new Error(hook)
  }
  const { manager } = await bench(t, {
    initialize: fail('initialize'),
    saveState: fail('saveState'),
    restoreState: fail('restoreState'),
  })
  for (const [hook, expected] of [
    ['initialize', []],
    ['saveState', ['instantiate', 'drain']],
    ['restoreState', ['instantiate', 'drain', 'save']],
  ] as const) {
    steps.length = 0
    failing = hook
    // `restoreState` is asked where something was saved.
    assert.ok('error' in (await outcome(manager.reload())), hook)
    assert.deepEqual(
      steps.map(({ step }) => step),
      expected,
    )
  }
  failing = undefined
  const lease = await manager.acquire()
  steps.length = 0
  await failure(manager.reload({ drainTimeoutMs: 0 }), 'ERR_WASM_DRAIN_TIMEOUT')
  assert.deepEqual(
    steps.map(({ step }) => step),
    ['instantiate'],
  )
  lease.release()
})

test('a drain is told as soon as it is over, not at the end', LIMIT, async (t) => {
  const { steps } = listenToSteps(t)
  const inside = barrier()
  const door = barrier()
  const { manager } = await bench(t, {
    saveState: async () => {
      inside.open()
      await door.promise
    },
  })
  const reload = manager.reload()
  await inside.promise
  assert.deepEqual(
    steps.map(({ step }) => step),
    ['instantiate', 'drain'],
  )
  door.open()
  await reload
})

test('without subscribers nothing is told, and whoever subscribes later hears of later reloads', LIMIT, async (t) => {
  const { manager } = await bench(t)
  await manager.reload()
  const { steps, stop } = listenToSteps(t)
  await turns()
  assert.equal(steps.length, 0)
  await manager.reload()
  assert.equal(steps.length, 5)
  stop()
  const other = listenToReloads(t)
  await manager.reload()
  assert.deepEqual([steps.length, other.length], [5, 4])
})

test('steps are not even made where nobody listens', LIMIT, async () => {
  // The channel's own `publish` is counted: a message that is made and dropped would show.
  const ended = await child(
    `
    import { channel, tracingChannel } from 'node:diagnostics_channel'
    const steps = channel('wasm-molt:reload:step')
    const reloads = tracingChannel('wasm-molt:reload')
    let published = 0
    for (const one of [steps, reloads.start, reloads.end, reloads.asyncStart, reloads.asyncEnd, reloads.error]) {
      Object.defineProperty(one, 'publish', { configurable: true, value: () => { published += 1 } })
    }
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    for (let i = 0; i < 10; i += 1) await manager.reload()
    manager.reloadSync()
    await new Promise((resolve) => setImmediate(resolve))
    await manager.close()
    report(published)
    `,
    { env: { WORKBENCH: workbench } },
  )
  assert.equal(reported<number>(ended), 0)
})

test('a subscriber that throws is an uncaught exception of the program, and the reload goes on', LIMIT, async () => {
  const ended = await child(
    `
    import { channel } from 'node:diagnostics_channel'
    const uncaught = []
    process.on('uncaughtException', (error) => uncaught.push(error.message))
    channel('wasm-molt:reload:step').subscribe(({ step }) => { throw new Error(step) })
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const { generation } = await manager.reload()
    await new Promise((resolve) => setImmediate(resolve))
    await manager.close()
    report({ uncaught, generation })
    `,
    { env: { WORKBENCH: workbench } },
  )
  assert.deepEqual(reported(ended), {
    uncaught: ['instantiate', 'drain', 'save', 'restore', 'commit'],
    generation: 2,
  })
})

test('subscribers of the steps may use the manager', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2, threads: 2 })
  const sums: Promise<unknown>[] = []
  const hear = () => void sums.push(manager.call('add', [1, 2]))
  const steps = channel('wasm-molt:reload:step')
  steps.subscribe(hear)
  t.after(() => steps.unsubscribe(hear))
  await manager.reload()
  assert.equal(sums.length, 5)
  assert.deepEqual(await Promise.all(sums), [3, 3, 3, 3, 3])
})

test(
  'a call inside a hook that is refused tells so to its caller, with the manager and its generation',
  LIMIT,
  async (t) => {
    let error: unknown
    const { manager } = await bench(t, {
      name: 'named',
      saveState: async () => {
        error = await manager.call('add', [1, 2]).catch((reason: unknown) => reason)
      },
    })
    await manager.reload()
    assert.ok(error instanceof WasmError)
    hasCode('ERR_WASM_RELOADING', /named.*hook/)(error)
    assert.deepEqual([error.manager, error.generation], ['named', 1])
  },
)
