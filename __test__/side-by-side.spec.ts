// The rest of a real process at work beside guests: V8's own engine, profilers, debuggers, snapshots of the heap, other processes.
// Each in a process of its own, while calls, traps, interrupts, reloads, resets and forks of ours go on.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { request } from 'node:http'
import { createRequire } from 'node:module'
import type { Socket } from 'node:net'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { binary, temporaryFolder, wat } from './guests.ts'
import { child, INDEX_URL, LIMIT, reported } from './support.ts'

const text = (memory: string) => `(module
    (import "env" "ask" (func $ask (param i32) (result i32)))
    (memory (export "memory") ${memory})
    (global $count (mut i32) (i32.const 0))
    (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
    (func (export "count") (result i32)
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      (global.get $count))
    (func (export "ask") (param i32) (result i32) (call $ask (local.get 0)))
    (func (export "grow") (result i32) (memory.grow (i32.const 1)))
    (func (export "oob") (param i32) (result i32) (i32.load (i32.const 0x7ffffff0)))
    (func (export "unreachable") (param i32) unreachable)
    (func (export "divide") (param i32) (result i32) (i32.div_s (i32.const 1) (local.get 0)))
    (func $deep (export "deep") (param i32) (result i32) (i32.add (call $deep (local.get 0)) (i32.const 1)))
    (func (export "spin") (loop (br 0)))
    (func (export "burn") (param i32) (result i32) (local $x i32)
      (local.set $x (i32.const 1))
      (loop
        (local.set $x (i32.add (i32.mul (local.get $x) (i32.const 1664525)) (i32.const 1013904223)))
        (i32.store (i32.and (local.get $x) (i32.const 0xfffc)) (local.get $x))
        (local.set 0 (i32.sub (local.get 0) (i32.const 1)))
        (br_if 0 (local.get 0)))
      (local.get $x)))`
const GUEST = wat(text('2 64'), 'beside')

/** The same guest in glue, over a memory that its threads share. */
const GLUE = join(temporaryFolder('glue'), 'glue.cjs')
const assembled: Uint8Array = createRequire(import.meta.url)('../binding.js').__assemble(
  text('(import "env" "memory") 2 64 shared'),
)
writeFileSync(
  GLUE,
  `exports.memory = new WebAssembly.Memory({ initial: 2, maximum: 64, shared: true })
  exports.ask = (n) => n + 1
  const env = { memory: exports.memory, ask: (n) => exports.ask(n) }
  const bytes = Buffer.from('${Buffer.from(assembled).toString('base64')}', 'base64')
  exports.guest = new WebAssembly.Instance(new WebAssembly.Module(bytes), { env }).exports`,
)

/** The traps of the guest in bytes, for V8. */
const THEIRS = Buffer.from(
  binary({
    memory: 1,
    functions: [
      { name: 'oob', params: ['i32'], results: ['i32'], body: [0x41, 0xf0, 0xff, 0xff, 0xff, 0x07, 0x28, 2, 0] },
      { name: 'unreachable', params: ['i32'], results: [], body: [0] },
      { name: 'divide', params: ['i32'], results: ['i32'], body: [0x41, 1, 0x20, 0, 0x6d] },
      { name: 'deep', params: ['i32'], results: ['i32'], body: [0x20, 0, 0x10, 3, 0x41, 1, 0x6a] },
    ],
  }),
).toString('base64')

/**
 * `work(manager)`: everything that we do, a little of each; answers what was seen, which is the same each time.
 * `theirs(name)`: the same trap in V8.
 */
const WORK = `
  const TRAPS = ['oob', 'unreachable', 'divide', 'deep']
  let asked = async (n) => n + 1
  const create = (options = {}) => WasmModuleManager.create(process.env.GUEST, {
    cache: false, instances: 2, imports: { env: { ask: (n) => asked(n) } }, ...options,
  })
  const theirs = (() => {
    const { exports } = new WebAssembly.Instance(new WebAssembly.Module(Buffer.from(process.env.THEIRS, 'base64')))
    return (name) => {
      try { exports[name](0) } catch (error) { return error instanceof WebAssembly.RuntimeError || error instanceof RangeError }
    }
  })()
  const work = async (manager, { rounds = 2, beside = () => {} } = {}) => {
    const seen = []
    // Another one's pool is busy all the while.
    const other = await create()
    let isOver = false
    const busy = (async () => { while (!isOver) await Promise.all([other.call('burn', [50_000]), other.call('add', [1, 1])]) })()
    for (let round = 0; round < rounds; round += 1) {
      beside()
      const sums = Promise.all(Array.from({ length: 8 }, (_, i) => manager.call('add', [i, 1])))
      await manager.call('burn', [200_000])
      seen.push((await sums).join())
      manager.exports.burn(100_000)
      for (const name of TRAPS) {
        try { manager.exports[name](0) } catch (error) { seen.push(error.trap) }
        beside(name)
        await manager.call(name, [0]).catch((error) => seen.push(error.trap))
      }
      seen.push(await manager.call('ask', [round]))
      await manager.call('spin', [], { timeoutMs: 10 }).catch((error) => seen.push(error.code))
      const snapshot = await manager.snapshot()
      seen.push(manager.exports.count(), manager.exports.grow())
      const fork = await manager.fork()
      seen.push(fork.exports.count())
      await fork.close()
      await manager.reset({ to: snapshot })
      const lease = await manager.acquire()
      seen.push(lease.exports.add(1, 1), new Uint8Array(lease.memory.buffer).length)
      lease.release()
      snapshot.release()
      await manager.reload()
    }
    isOver = true
    await busy
    await other.close()
    return seen
  }
  const run = async (options) => {
    const manager = await create()
    const seen = await work(manager, options)
    await manager.close()
    return seen
  }
`

/** `workInGlue(ask)`: the same of glue and its guest threads; `ask` is the import that both call. */
const WORK_IN_GLUE = `
  import { loadGlue } from ${JSON.stringify(INDEX_URL)}
  const loadIt = () => loadGlue(process.env.GLUE, { cache: false, engine: { threads: true }, limits: { timeoutMs: 20_000 } })
  const workInGlue = async (ask = (n) => n + 1) => {
    const manager = await loadIt()
    const seen = []
    for (let round = 0; round < 2; round += 1) {
      const { module } = manager
      const { guest } = module
      let asked = 0
      module.ask = (n) => { asked += 1; return ask(n) }
      await manager.snapshot()
      for (const name of TRAPS) try { guest[name](0) } catch (error) { seen.push(error.trap) }
      seen.push(guest.ask(1), guest.grow())
      const threads = [1, 2, 3].map((n) => manager.spawn([[guest.burn, 50_000], [guest.ask, n]]))
      guest.burn(100_000)
      await Promise.all(threads.map(({ finished }) => finished))
      seen.push(asked)
      for (const name of TRAPS) {
        // It is stopped by the other's trap.
        const spins = manager.spawn([[guest.spin]])
        await manager.spawn([[guest[name], 0]]).finished.catch((error) => seen.push(error.trap))
        await spins.finished
        await manager.reset()
      }
      seen.push(manager.memory.byteLength)
      await manager.reload()
    }
    await manager.close()
    return seen
  }
`

const TRAPS = ['out-of-bounds-memory', 'unreachable', 'integer-divide-by-zero', 'stack-overflow']
const ROUND = (round: number) => [
  '1,2,3,4,5,6,7,8',
  ...TRAPS.flatMap((trap) => [trap, trap]),
  ...[round + 1, 'ERR_WASM_TIMEOUT', 1, 2, 1 + 1, 2, 131_072],
]
const SEEN = [...ROUND(0), ...ROUND(1)]
const ROUND_IN_GLUE = [...TRAPS, 2, 2, 4, ...TRAPS, 131_072]
const SEEN_IN_GLUE = [...ROUND_IN_GLUE, ...ROUND_IN_GLUE]
const env = { GUEST, GLUE, THEIRS }
/** Node has it since 20.15 and 22.2. */
const WITHOUT_TRAP_HANDLER = ['--disable-wasm-trap-handler'].filter((flag) =>
  process.allowedNodeEnvironmentFlags.has(flag),
)

describe('beside us', { concurrency: 2 }, () => {
  for (const [what, flags] of [
    ["V8's own engine traps", []],
    ["V8's own engine traps without its trap handler", WITHOUT_TRAP_HANDLER],
    ["V8's own engine traps in compiled code of each tier", ['--no-wasm-tier-up', '--liftoff-only']],
  ] as const) {
    test(`${what}, in turns with ours and at the same time in a worker`, LIMIT, async () => {
      const ended = await child(
        `${WORK}
        import { Worker } from 'node:worker_threads'
        const text = \`
          import { parentPort } from 'node:worker_threads'
          import { WasmModuleManager } from \${JSON.stringify(${JSON.stringify(INDEX_URL)})}
          \${process.env.WORK}
          let count = 0
          parentPort.once('message', async () => { parentPort.postMessage([count, await run()]); process.exit() })
          const turn = () => { for (const name of TRAPS) if (theirs(name)) count += 1; setImmediate(turn) }
          turn()
        \`
        const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(text)))
        let count = 0
        let refused = 0
        const seen = await run({ beside: () => { for (const name of TRAPS) theirs(name) ? (count += 1) : (refused += 1) } })
        worker.postMessage('and now')
        const [theirCount, theirSeen] = await new Promise((resolve) => worker.once('message', resolve))
        report({ seen, theirSeen, refused, traps: count > 0 && theirCount > 0 })
        `,
        { env: { ...env, WORK }, flags: [...flags], timeoutMs: 55_000 },
      )
      assert.deepEqual(reported(ended), { seen: SEEN, theirSeen: SEEN, refused: 0, traps: true })
    })
  }

  test("V8's own engine traps, in turns with glue's and with those of guest threads", LIMIT, async () => {
    const ended = await child(
      `${WORK}${WORK_IN_GLUE}
      let count = 0
      // On the JS thread, while it answers a guest thread as well.
      const ask = (n) => { for (const name of TRAPS) count += Number(theirs(name)); return n + 1 }
      const seen = await Promise.all([workInGlue(ask), workInGlue(ask), run()])
      report({ seen, count })`,
      { env },
    )
    const seen = [SEEN_IN_GLUE, SEEN_IN_GLUE, SEEN]
    assert.deepEqual(reported(ended), { seen, count: 2 * 2 * 4 * TRAPS.length })
  })

  test('--cpu-prof and --heap-prof write their profiles', LIMIT, async () => {
    const folder = temporaryFolder('profiles')
    const ended = await child(`${WORK}${WORK_IN_GLUE}report([await run(), await workInGlue()])`, {
      env,
      flags: [
        ...['--cpu-prof', '--cpu-prof-interval=100', `--cpu-prof-dir=${folder}`],
        ...['--heap-prof', `--heap-prof-dir=${folder}`],
      ],
    })
    assert.deepEqual(reported(ended), [SEEN, SEEN_IN_GLUE])
    const files = readdirSync(folder).sort()
    assert.deepEqual(
      files.map((name) => name.split('.').at(-1)),
      ['cpuprofile', 'heapprofile'],
    )
    const { nodes, samples } = JSON.parse(readFileSync(join(folder, files[0] as string), 'utf8'))
    assert.ok(nodes.length > 10 && samples.length > 100, `${nodes.length} nodes, ${samples.length} samples`)
  })

  test('--prof, --perf-basic-prof and --track-heap-objects change nothing', LIMIT, async () => {
    const folder = temporaryFolder('logs')
    const ended = await child(`process.chdir(${JSON.stringify(folder)});${WORK}report(await run())`, {
      env,
      flags: ['--prof', `--logfile=${join(folder, 'v8.log')}`, '--perf-basic-prof', '--track-heap-objects'],
    })
    assert.deepEqual(reported(ended), SEEN)
  })

  test('snapshots of the heap are written while views, leases, calls and an import are there', LIMIT, async () => {
    const folder = temporaryFolder('heaps')
    const ended = await child(
      `${WORK}
      import { getHeapSnapshot, writeHeapSnapshot, setFlagsFromString } from 'node:v8'
      import { statSync } from 'node:fs'
      const manager = await create()
      const path = (name) => process.env.FOLDER + '/' + name + '.heapsnapshot'
      const sizes = []
      const write = (name) => sizes.push(statSync(writeHeapSnapshot(path(name))).size)
      const view = new Uint8Array(manager.memory.buffer)
      const lease = await manager.acquire()
      const call = manager.call('spin', [], { timeoutMs: 300 }).catch((error) => error.code)
      write('held')
      const code = await call
      lease.release()
      // On the guest's own stack.
      asked = (n) => { write('inside'); return n }
      manager.exports.ask(1)
      asked = async (n) => { write('from the pool'); return n }
      await manager.call('ask', [2])
      asked = async (n) => n + 1
      let bytes = 0
      for await (const chunk of getHeapSnapshot()) bytes += chunk.length
      report({ code, all: sizes.length === 3 && sizes.every((size) => size > 100_000) && bytes > 100_000, seen: await work(manager), view: view.length })
      `,
      { env: { ...env, FOLDER: folder }, timeoutMs: 55_000 },
    )
    // The view is detached by the first reload.
    assert.deepEqual(reported(ended), { code: 'ERR_WASM_TIMEOUT', all: true, seen: SEEN, view: 0 })
  })

  test(
    'snapshots of the heap are written inside an import that a guest thread has called, and in glue',
    LIMIT,
    async () => {
      const ended = await child(
        `${WORK}${WORK_IN_GLUE}
      import { writeHeapSnapshot } from 'node:v8'
      import { statSync } from 'node:fs'
      const manager = await loadIt()
      const view = new Uint8Array(manager.module.memory.buffer)
      const sizes = []
      manager.module.ask = (n) => {
        sizes.push(statSync(writeHeapSnapshot(process.env.FOLDER + '/' + n + '.heapsnapshot')).size)
        return n
      }
      const { guest } = manager.module
      const spins = manager.spawn([[guest.spin]])
      guest.ask(1)
      await manager.spawn([[guest.ask, 2]]).finished
      await spins.terminate()
      report({ all: sizes.length === 2 && sizes.every((size) => size > 100_000), view: view.length, seen: await workInGlue() })
      await manager.close()
      `,
        { env: { ...env, FOLDER: temporaryFolder('heaps') } },
      )
      assert.deepEqual(reported(ended), { all: true, view: 131_072, seen: SEEN_IN_GLUE })
    },
  )

  test('diagnostic reports are written, on demand, inside an import and by a signal', LIMIT, async () => {
    const folder = temporaryFolder('reports')
    const ended = await child(
      `${WORK}
      import { readdirSync } from 'node:fs'
      const manager = await create()
      asked = (n) => { process.report.writeReport('inside.json'); return n }
      manager.exports.ask(1)
      asked = async (n) => n + 1
      const working = work(manager)
      process.kill(process.pid, 'SIGUSR2')
      const seen = await working
      process.report.writeReport('after.json')
      // The signal's is written by a thread of Node's, when the event loop comes by.
      const reports = () => readdirSync(process.env.FOLDER)
      while (reports().length < 3) await new Promise((resolve) => setTimeout(resolve, 10))
      report({ seen, state: manager.state, reports: reports().length, header: process.report.getReport().header.event.length > 0 })
      process.exit()
      `,
      {
        env: { ...env, FOLDER: folder },
        flags: ['--report-on-signal', `--report-directory=${folder}`],
      },
    )
    assert.deepEqual(reported(ended), { seen: SEEN, state: 'ready', reports: 3, header: true })
    for (const name of readdirSync(folder)) JSON.parse(readFileSync(join(folder, name), 'utf8'))
  })

  test('asynchronous hooks and the observers of perf_hooks see it all, and change nothing', LIMIT, async () => {
    const ended = await child(
      `${WORK}
      import { createHook, executionAsyncResource } from 'node:async_hooks'
      import { monitorEventLoopDelay, PerformanceObserver, performance } from 'node:perf_hooks'
      const alive = new Set()
      let befores = 0
      createHook({
        init: (id) => alive.add(id), destroy: (id) => alive.delete(id),
        before: () => { befores += 1; executionAsyncResource() }, after() {}, promiseResolve() {},
      }).enable()
      const delay = monitorEventLoopDelay({ resolution: 1 })
      delay.enable()
      const entries = []
      new PerformanceObserver((list) => entries.push(...list.getEntries())).observe({ entryTypes: ['function', 'gc'] })
      const timed = performance.timerify(run)
      const seen = await timed()
      delay.disable()
      await new Promise((resolve) => setImmediate(resolve))
      report({ seen, hooks: befores > 0, delay: delay.count > 0, timed: entries.some(({ name }) => name === 'run') })
      `,
      { env },
    )
    assert.deepEqual(reported(ended), { seen: SEEN, hooks: true, delay: true, timed: true })
  })
})

// ---------------------------------------------------------------- a debugger

/** As much of a WebSocket as a debugger's client needs, which Node 20 does not have. */
async function attach(url: string) {
  const { host, pathname } = new URL(url)
  const upgrade = request(`http://${host}${pathname}`, {
    headers: {
      ...{ connection: 'Upgrade', upgrade: 'websocket', 'sec-websocket-version': '13' },
      'sec-websocket-key': randomBytes(16).toString('base64'),
    },
  })
  upgrade.end()
  const [, socket] = (await once(upgrade, 'upgrade')) as [unknown, Socket]
  const events = new EventEmitter()
  const waiting = new Map<number, (message: Message) => void>()
  let bytes = Buffer.alloc(0)
  socket.on('data', (chunk: Buffer) => {
    bytes = Buffer.concat([bytes, chunk])
    for (;;) {
      if (bytes.length < 2) return
      const short = (bytes[1] as number) & 0x7f
      const head = short < 126 ? 2 : short === 126 ? 4 : 10
      if (bytes.length < head) return
      const length = short < 126 ? short : short === 126 ? bytes.readUInt16BE(2) : Number(bytes.readBigUInt64BE(2))
      if (bytes.length < head + length) return
      const message = JSON.parse(bytes.subarray(head, head + length).toString()) as Message
      bytes = bytes.subarray(head + length)
      if (message.id === undefined) events.emit(message.method as string, message.params)
      else waiting.get(message.id)?.(message)
    }
  })
  let last = 0
  const post = (method: string, params: object = {}) => {
    last += 1
    const text = Buffer.from(JSON.stringify({ id: last, method, params }))
    const head = text.length < 126 ? Buffer.from([0x81, 0x80 | text.length]) : Buffer.from([0x81, 0xfe, 0, 0])
    if (text.length >= 126) head.writeUInt16BE(text.length, 2)
    // With a mask of zeros the bytes are what they are.
    socket.write(Buffer.concat([head, Buffer.alloc(4), text]))
    // biome-ignore lint/suspicious/noExplicitAny: what a method answers is its own.
    return new Promise<any>((resolve, reject) => {
      waiting.set(last, ({ error, result }) => (error ? reject(new Error(error.message)) : resolve(result)))
    })
  }
  return { post, events, end: () => socket.destroy() }
}

interface Message {
  id?: number
  method?: string
  params?: object
  result?: object
  error?: { message: string }
}

describe('a debugger', { concurrency: 2 }, () => {
  test('in the process itself evaluates calls, stops at exceptions, shows objects and samples', LIMIT, async () => {
    const ended = await child(
      `${WORK}${WORK_IN_GLUE}
      import inspector from 'node:inspector'
      const session = new inspector.Session()
      session.connect()
      const post = (method, params) => new Promise((resolve, reject) => {
        session.post(method, params, (error, result) => (error ? reject(error) : resolve(result)))
      })
      await post('Runtime.enable')
      await post('Debugger.enable')
      await post('Debugger.setPauseOnExceptions', { state: 'all' })
      await post('Profiler.enable')
      await post('Profiler.start')
      await post('HeapProfiler.startSampling')
      const evaluated = await post('Runtime.evaluate', { expression: '1 + 1' })
      globalThis.manager = await create()
      const sum = await post('Runtime.evaluate', { expression: "manager.call('add', [20, 22])", awaitPromise: true })
      const trap = await post('Runtime.evaluate', { expression: 'manager.exports.oob(0)' })
      const shown = await post('Runtime.evaluate', { expression: '[manager, manager.exports, manager.memory, manager.stats()]', generatePreview: true })
      globalThis.glue = await loadIt()
      const inGlue = await post('Runtime.evaluate', { expression: 'glue.module.guest.add(20, 22)' })
      await post('Runtime.evaluate', { expression: '[glue, glue.module, glue.module.guest, glue.memory]', generatePreview: true })
      const seen = [await work(manager), await workInGlue()]
      const { profile } = await post('Profiler.stop')
      report({ inGlue: inGlue.result.value, evaluated: evaluated.result.value, sum: sum.result.value, trap: trap.exceptionDetails.exception.className,
        shown: shown.result.preview.properties.length, seen, samples: profile.samples.length > 0 })
      process.exit()
      `,
      { env },
    )
    const seen = [SEEN, SEEN_IN_GLUE]
    const values = { inGlue: 42, evaluated: 2, sum: 42, trap: 'WasmError' }
    assert.deepEqual(reported(ended), { ...values, shown: 4, seen, samples: true })
  })

  test(
    'over a socket pauses while a guest is on the stack, calls its exports, steps out of it and goes on',
    LIMIT,
    async (t) => {
      const folder = temporaryFolder('debugged')
      const file = join(folder, 'main.mjs')
      writeFileSync(
        file,
        `import { WasmError, WasmModuleManager } from ${JSON.stringify(INDEX_URL)}
      ${WORK}${WORK_IN_GLUE}
      globalThis.manager = await create()
      globalThis.start = async () => {
        asked = (n) => {
          debugger
          const twice = n * 2
          return twice
        }
        const sum = manager.exports.ask(20) + (await manager.call('ask', [1]))
        asked = async (n) => n + 1
        return JSON.stringify([sum, await work(manager), await workInGlue()])
      }
      console.log('ready')
      setInterval(() => {}, 1000)`,
      )
      const debugged = spawn(process.execPath, ['--inspect=127.0.0.1:0', file], {
        env: { ...process.env, ...env, NODE_OPTIONS: '', NODE_TEST_CONTEXT: '' },
        stdio: ['ignore', 'pipe', 'pipe'],
      })
      t.after(() => debugged.kill('SIGKILL'))
      const url = new Promise<string>((resolve) => {
        let text = ''
        debugged.stderr.setEncoding('utf8').on('data', (chunk: string) => {
          text += chunk
          const found = /ws:\S+/.exec(text)
          if (found) resolve(found[0])
        })
      })
      const { post, events, end } = await attach(await url)
      await once(debugged.stdout, 'data')
      await post('Runtime.enable')
      await post('Debugger.enable')
      const paused = async () => {
        const [{ callFrames }] = (await once(events, 'Debugger.paused')) as [{ callFrames: Frame[] }]
        return callFrames
      }
      interface Frame {
        callFrameId: string
        functionName: string
      }
      const seen: unknown[] = []
      let next = paused()
      const done = post('Runtime.evaluate', { expression: 'start()', awaitPromise: true })
      for (const where of ['on the stack', 'on the pool']) {
        let frames = await next
        const { callFrameId } = frames[0] as Frame
        const evaluate = async (expression: string) =>
          (await post('Debugger.evaluateOnCallFrame', { callFrameId, expression, returnByValue: true })).result.value
        seen.push(
          where,
          await evaluate('n'),
          await evaluate('manager.exports.count()'),
          await evaluate('manager.memory.read(0, 4).length'),
        )
        seen.push(await evaluate('manager.exports.burn(1000) !== 0'))
        for (const step of ['stepOver', 'stepOver', 'stepOut']) {
          next = paused()
          await post(`Debugger.${step}`)
          // A step may go on to where no JavaScript is, and then nothing is paused until the next statement.
          if (step === 'stepOut') break
          frames = await next
          seen.push(frames[0]?.functionName)
        }
        if (where === 'on the stack') {
          // Out of the import means through the guest, to who called it.
          frames = await next
          seen.push(frames[0]?.functionName.length !== undefined)
          next = paused()
          await post('Debugger.resume')
        } else {
          await post('Debugger.disable')
        }
      }
      const [sum, work, inGlue] = JSON.parse((await done).result.value)
      end()
      assert.deepEqual(seen, [
        ...['on the stack', 20, 1, 4, true, 'asked', 'asked', true],
        ...['on the pool', 1, 1, 4, true, 'asked', 'asked'],
      ])
      assert.equal(sum, 42)
      assert.equal(work.length, SEEN.length)
      assert.deepEqual(inGlue, SEEN_IN_GLUE)
    },
  )
})

// ---------------------------------------------------------------- the end that Node documents

/** Others do not have its flags. */
const IS_NODE = process.versions.bun === undefined && process.versions.deno === undefined

describe('a fatal end is as Node documents it', { concurrency: 2 }, () => {
  /** Guests in every place where they may be. */
  const BUSY = `${WORK}${WORK_IN_GLUE}
    const manager = await create()
    const glue = await loadIt()
    const { guest } = glue.module
    for (const name of TRAPS) for (const { [name]: trap } of [guest, manager.exports]) try { trap(0) } catch { theirs(name) }
    manager.exports.add(1, 1)
    let count = 0
    glue.module.ask = asked = (n) => { count += 1; return n }
    for (let i = 0; i < 2; i += 1) {
      manager.call('spin').catch(() => {})
      glue.spawn([[guest.ask, i], [guest.spin]])
    }
    while (count < 2 || manager.stats().instances.busy < 2) await new Promise((resolve) => setImmediate(resolve))
  `
  const abort = `${BUSY}
    process.on('SIGABRT', () => report('never'))
    process.on('exit', () => report('never'))
    glue.module.ask = () => process.abort()
    guest.ask(1)`

  for (const [what, flags, program, signals] of [
    ['process.abort() inside an import of glue, with a listener for SIGABRT', [], abort, ['SIGABRT']],
    [
      // Node ends by a trap instruction there, V8 by abort().
      'an exception that nobody catches, with --abort-on-uncaught-exception',
      ['--abort-on-uncaught-exception'],
      `${BUSY} setImmediate(() => { throw new Error('on purpose') })`,
      ['SIGABRT', 'SIGTRAP', 'SIGILL'],
    ],
    [
      'no heap left, with --report-on-fatalerror',
      ['--report-on-fatalerror', '--max-old-space-size=40'],
      `${BUSY} const kept = []; for (;;) kept.push(new Array(1000).fill(kept.length))`,
      ['SIGABRT', 'SIGTRAP'],
    ],
  ] as const) {
    // Bun now and then does not end for minutes after abort() with a listener, where all cores are busy.
    if (!IS_NODE) continue

    test(what, LIMIT, async () => {
      const folder = temporaryFolder('fatal')
      const ended = await child(program, {
        env,
        flags: [...flags, `--report-directory=${folder}`],
        ...{ mayCrash: true, under: ['sh', '-c', 'ulimit -c 0; exec "$0" "$@"'] },
      })
      assert.ok(
        signals.some((signal) => signal === ended.signal),
        `${ended.signal ?? ended.code}\n${ended.stderr}`,
      )
      assert.equal(ended.stdout, '')
      const reports = readdirSync(folder)
      assert.equal(reports.length, what.includes('report') ? 1 : 0)
      for (const name of reports) {
        assert.equal(JSON.parse(readFileSync(join(folder, name), 'utf8')).header.trigger, 'OOMError')
      }
    })
  }

  const test_ = IS_NODE ? test : test.skip
  test_('an exception that nobody catches, with --report-uncaught-exception', LIMIT, async () => {
    const folder = temporaryFolder('fatal')
    const ended = await child(`${BUSY} setImmediate(() => { throw new Error('on purpose') })`, {
      env,
      flags: ['--report-uncaught-exception', `--report-directory=${folder}`],
    })
    assert.deepEqual([ended.code, ended.signal], [1, null], ended.stderr)
    const [name, ...others] = readdirSync(folder)
    assert.deepEqual(others, [])
    const { header } = JSON.parse(readFileSync(join(folder, name as string), 'utf8'))
    assert.equal(header.trigger, 'Exception')
  })

  test('SIGABRT from outside, with a listener, is no end at all', LIMIT, async () => {
    const ended = await child(
      `${BUSY}
      const told = new Promise((resolve) => process.once('SIGABRT', resolve))
      process.kill(process.pid, 'SIGABRT')
      const name = await told
      await Promise.all([manager.destroy(), glue.destroy()])
      report([name, await workInGlue()])
      `,
      { env },
    )
    assert.deepEqual(reported(ended), ['SIGABRT', SEEN_IN_GLUE])
  })
})
