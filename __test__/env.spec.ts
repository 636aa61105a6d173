// Environments: worker threads, exits inside imports, several copies of the addon. See guest.spec.ts and workers.spec.ts, too.
import assert from 'node:assert/strict'
import { copyFileSync, cpSync, mkdirSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { temporaryFolder, wat, workbench } from './guests.ts'
import { child, INDEX_URL, LIMIT, reported } from './support.ts'

const ROOT = fileURLToPath(new URL('..', import.meta.url))

/** Runs in a worker: everything the addon does, a little. */
const WORKER = `
  import { parentPort, workerData } from 'node:worker_threads'
  import { WasmModuleManager } from ${JSON.stringify(INDEX_URL)}
  const { workbench, mode } = workerData
  const manager = await WasmModuleManager.create(workbench, {
    cache: false,
    imports: { env: {
      entered: () => { parentPort.postMessage('entered') },
      hold: async (key) => { if (key === 99) { parentPort.postMessage('entered'); await new Promise(() => {}) } return key },
    } },
  })
`
const LAUNCH = `
  import { Worker } from 'node:worker_threads'
  const launch = (mode, body) => new Worker(
    new URL('data:text/javascript,' + encodeURIComponent(process.env.WORKER + body)),
    { workerData: { workbench: process.env.WORKBENCH, mode } },
  )
  const message = (worker) => new Promise((resolve, reject) => {
    worker.once('message', resolve); worker.once('error', reject)
    worker.once('exit', (code) => reject(new Error('the worker ended with ' + code)))
  })
`
const env = { WORKER, WORKBENCH: workbench }

test('eight worker threads load the addon, use it at once, and end well', LIMIT, async () => {
  const ended = await child(
    `${LAUNCH}
    const body = \`
      let sum = 0
      for (let i = 0; i < 200; i += 1) {
        sum += manager.exports.add(i, 1)
        sum += await manager.call('add', [i, 1])
        if (i % 50 === 0) await manager.reload()
        new Uint8Array(manager.memory.buffer)[0] = i
      }
      const held = await manager.call('hold', [7])
      await manager.close()
      parentPort.postMessage({ sum, held, state: manager.state })
    \`
    const workers = Array.from({ length: 8 }, () => launch('use', body))
    const exits = workers.map((w) => new Promise((resolve) => w.once('exit', resolve)))
    const results = await Promise.all(workers.map(message))
    report({ results, exits: await Promise.all(exits) })
    `,
    { env, timeoutMs: 50_000 },
  )
  const { results, exits } = reported<{ results: object[]; exits: number[] }>(ended)
  assert.deepEqual(results, Array(8).fill({ sum: 40_200, held: 7, state: 'closed' }))
  assert.deepEqual(exits, Array(8).fill(0))
})

test(
  'process.exit() inside an import that the guest called on the JS thread ends the process with that code',
  LIMIT,
  async () => {
    const ended = await child(
      `
    const manager = WasmModuleManager.createSync(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered: () => process.exit(9), hold: () => 0 } },
    })
    manager.exports.entered()
    `,
      { env },
    )
    assert.deepEqual([ended.code, ended.signal, ended.stderr], [9, null, ''])
  },
)

test(
  'process.exit() inside an import that the guest called on a pool thread ends the process with that code',
  LIMIT,
  async () => {
    const ended = await child(
      `
    const manager = WasmModuleManager.createSync(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered: () => process.exit(9), hold: () => 0 } },
    })
    await manager.call('entered')
    `,
      { env },
    )
    assert.deepEqual([ended.code, ended.signal, ended.stderr], [9, null, ''])
  },
)

test('requiring the package twice, with an emptied cache, gives two working copies in one process', LIMIT, async () => {
  const ended = await child(
    `
    import { createRequire } from 'node:module'
    const require = createRequire(${JSON.stringify(INDEX_URL)})
    const first = require('./index.js')
    for (const key of Object.keys(require.cache)) delete require.cache[key]
    const second = require('./index.js')
    assert.notEqual(first, second)
    const imports = { env: { entered() {}, hold: (key) => key } }
    const managers = [first, second].map((copy) => copy.WasmModuleManager.createSync(process.env.WORKBENCH, { cache: false, imports }))
    const results = []
    for (const manager of managers) results.push(manager.exports.add(1, 2), await manager.call('hold', [3]))
    const codes = []
    for (const [index, manager] of managers.entries()) {
      try { manager.exports.boom() } catch (error) {
        codes.push(error.code, error instanceof [first, second][index].WasmError)
      }
      await manager.close()
    }
    report({ results, codes })
    `,
    { env },
  )
  assert.deepEqual(reported(ended), {
    results: [3, 3, 3, 3],
    codes: ['ERR_WASM_TRAP', true, 'ERR_WASM_TRAP', true],
  })
})

test('a second copy of the addon file lives beside the first', LIMIT, async () => {
  const folder = join(temporaryFolder('copy'), 'molt')
  mkdirSync(folder)
  for (const file of ['index.js', 'binding.js', 'package.json']) copyFileSync(join(ROOT, file), join(folder, file))
  cpSync(join(ROOT, 'lib'), join(folder, 'lib'), { recursive: true })
  const addon = `wasm-molt.${process.platform}-${process.arch}-gnu.node`
  copyFileSync(join(ROOT, addon), join(folder, addon))
  symlinkSync(join(ROOT, 'node_modules'), join(folder, 'node_modules'))
  const ended = await child(
    `
    import { createRequire } from 'node:module'
    const second = createRequire(process.env.COPY + '/')('./index.js')
    const imports = { env: { entered() {}, hold: (key) => key } }
    const results = []
    for (const copy of [{ WasmModuleManager, WasmError }, second]) {
      const manager = await copy.WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports })
      results.push(manager.exports.add(1, 2), await manager.call('hold', [4]))
      await manager.call('spin', [], { timeoutMs: 20 }).catch((error) => results.push(error.code))
      try { manager.exports.load(0x7fffffff) } catch (error) { results.push(error.trap) }
      await manager.close()
    }
    report(results)
    `,
    { env: { ...env, COPY: folder } },
  )
  const each = [3, 4, 'ERR_WASM_TIMEOUT', 'out-of-bounds-memory']
  assert.deepEqual(reported(ended), [...each, ...each])
})

test('a worker that ends while its manager is idle takes its memory and threads along', LIMIT, async () => {
  const ended = await child(
    `${LAUNCH}
    import { readdirSync, readFileSync } from 'node:fs'
    const measure = () => ({
      threads: readdirSync('/proc/self/task').length,
      virtual: Number(readFileSync('/proc/self/statm', 'utf8').split(' ')[0]) * 4096,
    })
    const round = async () => {
      const worker = launch('idle', "manager.memory.buffer; await manager.call('add', [1, 2]); parentPort.postMessage('used')")
      const ended = new Promise((resolve) => worker.once('exit', resolve))
      await message(worker)
      await worker.terminate()
      await ended
    }
    await round(); await round()
    const before = measure()
    for (let i = 0; i < 8; i += 1) await round()
    // Threads leave on their own time.
    for (let i = 0; i < 300 && measure().threads > before.threads; i += 1) {
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    const after = measure()
    report({ threads: after.threads - before.threads, gigabytes: Math.round((after.virtual - before.virtual) / 2 ** 30) })
    `,
    { env },
  )
  const grown = reported<{ threads: number; gigabytes: number }>(ended)
  // Bun has threads of its own, which come when it wants them.
  assert.ok(
    grown.threads <= (process.versions.bun === undefined ? 1 : 4),
    `${grown.threads} more threads after eight workers`,
  )
  assert.ok(grown.gigabytes <= 4, `${grown.gigabytes} GiB more address space after eight workers`)
})

for (const [what, call] of [
  // Endless guests are in workers.spec.ts.
  [
    'its own thread is inside an endless import of a synchronous call',
    `nested = () => { for (;;) {} }; setImmediate(() => manager.exports.entered())`,
  ],
  [
    'its own thread is inside an endless import of a pool call',
    `nested = () => { for (;;) {} }; void manager.call('entered')`,
  ],
] as const) {
  for (const [end, code] of [
    ['terminate()', 'await worker.terminate(); report("ended")'],
    ['process.exit()', 'report("ended"); process.exit(0)'],
  ] as const) {
    test(`${end} of a worker while ${what} neither crashes nor hangs`, LIMIT, async () => {
      const ended = await child(
        `
        import { Worker } from 'node:worker_threads'
        const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(process.env.BODY)))
        await new Promise((resolve) => worker.once('message', resolve))
        // The worker says so before it goes in; a moment later it is inside.
        await new Promise((resolve) => setTimeout(resolve, 50))
        ${code}
        `,
        {
          env: {
            ...env,
            BODY: `
              import { parentPort } from 'node:worker_threads'
              import { WasmModuleManager } from ${JSON.stringify(INDEX_URL)}
              let nested
              const manager = await WasmModuleManager.create(${JSON.stringify(workbench)}, {
                cache: false,
                imports: (instance) => ({ env: { hold: (key) => key, entered: () => { nested?.(instance) } } }),
              })
              parentPort.postMessage('going in')
              ${call}
              setInterval(() => {}, 1000)
            `,
          },
          timeoutMs: 8_000,
        },
      )
      assert.equal(reported(ended), 'ended')
    })
  }
}

// Where the runtime is not Node itself, the addon wakes the event loop by Node-API's own means.
for (const [what, flags] of [
  ["a handle of the event loop's", []],
  ['a thread-safe function', ['--import', 'data:text/javascript,globalThis.Bun={}']],
] as const) {
  // So long that nobody looks for the answer by himself any more.
  const slow = wat(
    `(module
      (func (export "slow") (result i32) (local i32)
        (loop (br_if 0 (i32.lt_u (local.tee 0 (i32.add (local.get 0) (i32.const 1))) (i32.const 30000000))))
        (local.get 0))
      (func (export "trap") (call 0) (drop) (unreachable)))`,
    'slow',
  )

  test(
    `woken by ${what}: promises and process.nextTick go on, and the process ends when nothing runs`,
    LIMIT,
    async () => {
      const ended = await child(
        `
      const manager = await WasmModuleManager.create(process.env.SLOW, { instances: 2 })
      const order = []
      for (let i = 0; i < 3; i += 1) {
        const result = manager.call('slow')
        // Nothing else keeps the event loop turning.
        await new Promise((resolve) => result.then((value) => {
          order.push(value)
          queueMicrotask(() => order.push('microtask'))
          process.nextTick(() => { order.push('tick'); resolve() })
        }))
      }
      report({ order, both: await Promise.all([manager.call('slow'), manager.call('slow')]) })
      `,
        { env: { SLOW: slow }, flags: [...flags] },
      )
      const one = [30_000_000, 'microtask', 'tick']
      assert.deepEqual(reported(ended), { order: [...one, ...one, ...one], both: [30_000_000, 30_000_000] })
    },
  )

  test(
    `woken by ${what}: what a listener throws is an uncaught exception, and what follows still comes`,
    LIMIT,
    async () => {
      const ended = await child(
        `
      const manager = await WasmModuleManager.create(process.env.SLOW)
      const uncaught = []
      process.on('uncaughtException', (error) => { uncaught.push(error.message) })
      manager.on('trap', () => { throw new Error('from the listener') })
      const codes = []
      for (let i = 0; i < 2; i += 1) await manager.call('trap').catch((error) => { codes.push(error.code) })
      report({ codes, uncaught, after: await manager.call('slow') })
      `,
        { env: { SLOW: slow }, flags: [...flags] },
      )
      assert.deepEqual(reported(ended), {
        codes: ['ERR_WASM_TRAP', 'ERR_WASM_TRAP'],
        uncaught: ['from the listener', 'from the listener'],
        after: 30_000_000,
      })
    },
  )

  test(`woken by ${what}: workers that end while answers are on their way leave nothing behind`, LIMIT, async () => {
    const ended = await child(
      `${LAUNCH}
      for (let round = 0; round < 20; round += 1) {
        const worker = launch('stop', \`
          const turn = () => manager.call('add', [1, 1]).then(turn, () => {})
          for (let i = 0; i < 8; i += 1) turn()
          parentPort.postMessage('busy')
          if (\${round % 2}) process.exit(0)
        \`)
        await message(worker)
        worker.removeAllListeners('exit')
        await worker.terminate()
      }
      report('survived')
      `,
      { env, flags: [...flags] },
    )
    assert.equal(reported(ended), 'survived')
  })
}
