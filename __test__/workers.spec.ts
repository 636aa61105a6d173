// Workers: every way in which one may end, at every point of a manager's life; many at once; V8's own engine beside us.
import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { isDeepStrictEqual } from 'node:util'
import { binary, temporaryFolder, wat } from './guests.ts'
import { assertEnded, deferred, env, POINTS, type Point, REJECT, SCENE, THROW, WORKER_FAILED } from './points.ts'
import { child, INDEX_URL, LIMIT, reported } from './support.ts'

const LAUNCH = `
  import { Worker } from 'node:worker_threads'
  const launch = (text) => {
    const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(text)))
    worker.there = new Promise((resolve) => worker.once('message', resolve))
    worker.failed = new Promise((resolve) => worker.once('error', (error) => resolve(error.message)))
    worker.ended = new Promise((resolve) => worker.once('exit', resolve))
    return worker
  }
  const { WORKBENCH } = process.env
  const use = async () => {
    const manager = await WasmModuleManager.create(WORKBENCH, { cache: false, imports: { env: { entered() {}, hold: (key) => key } } })
    const sum = await manager.call('add', [1, 2]) + manager.exports.add(3, 4)
    await manager.close()
    return sum
  }
`
const STAY = `setInterval(() => {}, 60_000)\n`
const WORKER = `
  import { parentPort } from 'node:worker_threads'
  import { WasmModuleManager } from ${JSON.stringify(INDEX_URL)}
`

/** The text of a worker that gets to `point` and does `act` there. */
const scene = (act: string, point: Point) => JSON.stringify(`${WORKER}${SCENE}${act}\n${STAY}${point.program}`)

/** An endless guest tells of itself before its loop, and cannot from within: a moment later it is inside. */
const isInside = (point: Point) => (point.isBlocking ? 'await new Promise((resolve) => setTimeout(resolve, 30))' : '')

/** What the runtime makes of what a worker of its own, without us, does not catch. */
let bare: Promise<object> | undefined
async function uncaughtInBare(): Promise<object> {
  const fails = (act: string) =>
    JSON.stringify(`import { parentPort } from 'node:worker_threads'\n${STAY}setImmediate(() => { ${act} })`)
  const ended = await child(`${LAUNCH}
    const seen = {}
    for (const [name, text] of [['uncaught', ${fails(THROW)}], ['unhandled', ${fails(REJECT)}]]) {
      const worker = launch(text)
      seen[name] = [(await worker.failed).endsWith('on purpose'), await worker.ended]
    }
    report(seen)`)
  return reported(ended)
}

describe('a worker ends', { concurrency: 2 }, () => {
  for (const [name, point] of Object.entries(POINTS)) {
    test(`however it is made to, while ${name}, and the program goes on`, LIMIT, async () => {
      const ended = await child(
        `${LAUNCH}
        const seen = {}
        const terminated = launch(${scene(`const act = () => parentPort.postMessage('there')`, point)})
        await terminated.there
        ${isInside(point)}
        seen.terminate = await terminated.terminate()
        const exited = launch(${scene(deferred('process.exit(7)', point), point)})
        seen.exit = await exited.ended
        const thrown = launch(${scene(deferred(THROW, point), point)})
        seen.uncaught = [(await thrown.failed).endsWith('on purpose'), await thrown.ended]
        ${
          point.isBlocking
            ? ''
            : `const rejected = launch(${scene(deferred(REJECT, point), point)})
               seen.unhandled = [(await rejected.failed).endsWith('on purpose'), await rejected.ended]`
        }
        seen.sum = await use()
        report(seen)
        `,
        { env },
      )
      assertEnded(ended, 0, WORKER_FAILED)
      bare ??= uncaughtInBare()
      const { uncaught, unhandled } = (await bare) as Record<'uncaught' | 'unhandled', unknown>
      const seen = reported<Record<string, unknown>>(ended)
      // What is thrown inside an import may end as the rejection of a call.
      const thrown = point.isBlocking && isDeepStrictEqual(seen.uncaught, unhandled) ? unhandled : uncaught
      const rejected = point.isBlocking ? {} : { unhandled }
      assert.deepEqual(seen, { terminate: 1, exit: 7, uncaught: thrown, ...rejected, sum: 10 })
    })

    test(`with the program, by process.exit(), while ${name}`, LIMIT, async () => {
      const text = scene(`const act = () => parentPort.postMessage('there')`, point)
      assertEnded(
        await child(`${LAUNCH}\nawait launch(${text}).there\n${isInside(point)}\nprocess.exit(5)`, { env }),
        5,
      )
    })
  }
})

/** Node 20 has `transfer` behind a flag of V8. */
const TRANSFER = 'transfer' in ArrayBuffer.prototype ? [] : ['--harmony-rab-gsab-transfer']

/** Makes `manager`, and `memory` as a program has it. */
const MEMORIES = {
  "a manager's": `const manager = await create(); const { memory } = manager`,
  "a glue's own": `const manager = await load(); const { memory } = manager.module`,
  "a glue's instance's": `const manager = await load(); const { memory } = manager.module.instance.exports`,
}

for (const [whose, make] of Object.entries(MEMORIES)) {
  test(
    `a view of ${whose} memory that a worker has handed over can be used when the worker is gone`,
    LIMIT,
    async () => {
      const glue = join(temporaryFolder('glue'), 'glue.cjs')
      writeFileSync(
        glue,
        `
    exports.memory = new WebAssembly.Memory({ initial: 1 })
    // (module (memory (export "memory") 1))
    const bytes = Uint8Array.of(0,97,115,109,1,0,0,0,5,3,1,0,1,7,10,1,6,109,101,109,111,114,121,2,0)
    exports.instance = new WebAssembly.Instance(new WebAssembly.Module(bytes))`,
      )
      const text = JSON.stringify(`${WORKER}${SCENE}${STAY}
    import { loadGlue } from ${JSON.stringify(INDEX_URL)}
    const load = () => loadGlue(${JSON.stringify(glue)}, { cache: false })
    ${make}
    new Uint8Array(memory.buffer).fill(3)
    // Node refuses to hand over the buffer itself, and does not see where it comes from any more after this.
    const buffer = memory.buffer.transfer()
    parentPort.postMessage(buffer, [buffer])
    parentPort.once('message', () => process.exit())
    manager.call?.('spin').catch(() => {})`)
      const ended = await child(
        `${LAUNCH}
    const views = []
    for (const end of ['terminate', 'postMessage', 'terminate']) {
      const worker = launch(${text})
      views.push(new Uint8Array(await worker.there))
      void worker[end]('it exits')
      await worker.ended
    }
    // The pages are gone with the instance; what is left reads zeros, and may be written.
    // Deno says that a worker has ended before it has let go of everything.
    const endsLater = process.versions.deno !== undefined
    const before = views.map((view) => [view.length, view.every((byte) => byte === 0 || (endsLater && byte === 3))])
    for (const view of views) view.fill(1)
    const after = views.map((view) => view.every((byte) => byte === 1 || (endsLater && byte === 0)))
    views.length = 0
    for (let i = 0; i < 3; i += 1) { gc(); await new Promise((resolve) => setImmediate(resolve)) }
    report({ before, after, sum: await use() })
    `,
        { env, flags: ['--expose-gc', ...TRANSFER] },
      )
      assertEnded(ended, 0)
      assert.deepEqual(reported(ended), { before: Array(3).fill([65_536, true]), after: Array(3).fill(true), sum: 10 })
    },
  )
}

test('guests that cannot be stopped hold a terminated worker up once, not once for each manager', LIMIT, async () => {
  const text = JSON.stringify(`${WORKER}${SCENE}${STAY}
    let count = 0
    entered = () => { if ((count += 1) === 3) parentPort.postMessage('there') }
    for (let i = 0; i < 3; i += 1) {
      const manager = await create({ engine: { interruptible: false } })
      manager.call('spin').catch(() => {})
    }`)
  const ended = await child(
    `${LAUNCH}
    const worker = launch(${text})
    await worker.there
    const since = performance.now()
    const code = await worker.terminate()
    report({ code, seconds: (performance.now() - since) / 1000 })
    `,
    { env },
  )
  assertEnded(ended, 0)
  const { code, seconds } = reported<{ code: number; seconds: number }>(ended)
  assert.equal(code, 1)
  // 5 seconds for all of them; it was 15.
  assert.ok(seconds < 10, `it took ${seconds} s`)
})

// ---------------------------------------------------------------- many at once, and V8 beside us

const TRAPS = wat(
  `(module $traps
    (import "env" "f" (func $f))
    (memory (export "memory") 1 1)
    (func (export "oob") (param i32) (result i32) (i32.load (local.get 0)))
    (func (export "unreachable") unreachable)
    (func (export "divide") (param i32 i32) (result i32) (i32.div_s (local.get 0) (local.get 1)))
    (func $deep (export "deep") (param i32) (result i32)
      (i32.add (call $deep (i32.add (local.get 0) (i32.const 1))) (i32.const 1)))
    (func (export "through") (result i32) (call $f) (i32.const 1))
    (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1))))`,
  'traps',
)

/** The same functions in bytes, for V8. */
const THEIRS = Buffer.from(
  binary({
    memory: 1,
    functions: [
      { name: 'oob', params: ['i32'], results: ['i32'], body: [0x20, 0, 0x28, 2, 0] },
      { name: 'unreachable', params: [], results: [], body: [0] },
      { name: 'divide', params: ['i32', 'i32'], results: ['i32'], body: [0x20, 0, 0x20, 1, 0x6d] },
      { name: 'deep', params: ['i32'], results: ['i32'], body: [0x20, 0, 0x41, 1, 0x6a, 0x10, 3, 0x41, 1, 0x6a] },
    ],
  }),
).toString('base64')

/** Calls, reloads and traps of ours with V8's own between them and inside them; answers what was seen. */
const MIX = `
  const mix = async (rounds, isLast = () => false) => {
    const theirs = new WebAssembly.Instance(new WebAssembly.Module(Buffer.from(process.env.THEIRS, 'base64'))).exports
    const args = { oob: [0x7ffffff0], unreachable: [], divide: [1, 0], deep: [0] }
    const seen = { calls: 0, reloads: 0 }
    const count = (what) => { seen[what] = (seen[what] ?? 0) + 1 }
    const trapOfV8 = (name) => {
      try { theirs[name](...args[name]); count('no trap of V8: ' + name) } catch (error) {
        if (!(error instanceof WebAssembly.RuntimeError || error instanceof RangeError)) throw error
        count('V8')
      }
    }
    const manager = await WasmModuleManager.create(process.env.TRAPS, {
      cache: false, instances: 2, threads: 1,
      // V8's trap with our guest below it on the stack.
      imports: { env: { f: () => { trapOfV8('oob'); trapOfV8('deep') } } },
    })
    for (let round = 0; round < rounds && !isLast(); round += 1) {
      for (const name of Object.keys(args)) {
        trapOfV8(name)
        try { manager.exports[name](...args[name]); count('no trap: ' + name) } catch (error) { count(error.trap ?? error.code) }
        await manager.call(name, args[name]).then(() => count('no trap: ' + name), (error) => count(error.trap ?? error.code))
      }
      manager.exports.through()
      const reload = manager.reload()
      const sums = await Promise.all(Array.from({ length: 8 }, (_, i) => manager.call('add', [i, round])))
      seen.calls += sums.filter((sum, i) => sum === i + round).length
      await reload
      seen.reloads += 1
      await manager.call('through')
    }
    await manager.close()
    return seen
  }
`
const traps = { TRAPS, THEIRS, MIX }
const ROUNDS = 4

test('sixteen workers and the main thread call, reload and trap at once, with V8 between them', LIMIT, async () => {
  const text = JSON.stringify(`${WORKER}${MIX}\nparentPort.postMessage(await mix(${ROUNDS}))`)
  const ended = await child(
    `${LAUNCH}${MIX}
    const workers = Array.from({ length: 16 }, () => launch(${text}))
    const ours = mix(${ROUNDS})
    report({ seen: [await ours, ...(await Promise.all(workers.map((w) => w.there)))], codes: await Promise.all(workers.map((w) => w.ended)) })
    `,
    { env: traps, timeoutMs: 55_000 },
  )
  assertEnded(ended, 0)
  const each = {
    calls: 8 * ROUNDS,
    reloads: ROUNDS,
    V8: 8 * ROUNDS,
    'out-of-bounds-memory': 2 * ROUNDS,
    unreachable: 2 * ROUNDS,
    'integer-divide-by-zero': 2 * ROUNDS,
    'stack-overflow': 2 * ROUNDS,
  }
  assert.deepEqual(reported(ended), { seen: Array(17).fill(each), codes: Array(16).fill(0) })
})

test(
  'sixteen workers are terminated in the midst of calls, reloads and traps, and the main thread goes on',
  LIMIT,
  async () => {
    const text = JSON.stringify(
      `${WORKER}${MIX}\nawait mix(1)\nparentPort.postMessage('there')\nfor (;;) await mix(1000)`,
    )
    const ended = await child(
      `${LAUNCH}${MIX}
    const workers = Array.from({ length: 16 }, () => launch(${text}))
    let isLast = false
    const ours = mix(1e9, () => isLast)
    await Promise.all(workers.map((w) => w.there))
    const codes = await Promise.all(workers.map((w) => w.terminate()))
    isLast = true
    const { calls, reloads } = await ours
    report({ codes, isRight: calls === 8 * reloads && reloads > 0 })
    `,
      { env: traps, timeoutMs: 55_000 },
    )
    assertEnded(ended, 0)
    assert.deepEqual(reported(ended), { codes: Array(16).fill(1), isRight: true })
  },
)
