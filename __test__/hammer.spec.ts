// Memory that JavaScript holds on to in every wrong way, environments that end in the middle of anything: the process lives.
import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { temporaryFolder, wat } from './guests.ts'
import { child, INDEX_URL, LIMIT, reported, runNode } from './support.ts'

/** Node 20 has `transfer` behind a flag of V8. */
const TRANSFER = 'transfer' in ArrayBuffer.prototype ? [] : ['--harmony-rab-gsab-transfer']
const HAMMER = fileURLToPath(new URL('./hammer.mjs', import.meta.url))
/** A sanitizer keeps what is freed for a while. */
const IS_MEASURED = process.platform === 'linux' && process.env.WASM_MOLT_ASAN === undefined

interface Reading {
  resident: number
  space: number
  mappings: number
  threads: number
}

/** Another seed each time; the one that fails is in what the child says. */
const seed = Number(process.env.WASM_MOLT_SEED ?? Date.now() % 1_000_000_007)
const rounds = Number(process.env.WASM_MOLT_ROUNDS ?? 3000)

test('views in wrong hands, in random order', { timeout: 300_000 }, async () => {
  const args = ['--seed', String(seed), '--rounds', String(rounds), '--workers', '16']
  const ended = await runNode(['--expose-gc', ...TRANSFER, HAMMER, ...args], { timeoutMs: 290_000 })
  const { readings, codes } = reported<{ readings: Reading[]; codes: number[] }>(ended)
  // terminate, exit, throw, fall off the end
  assert.deepEqual(
    codes,
    codes.map((_, index) => [1, 0, 1, 0][index % 4]),
  )
  if (!IS_MEASURED) return
  const [, early] = readings
  const late = readings.at(-1)
  assert.ok(early && late)
  const text = JSON.stringify(readings)
  // Ten managers, and threads whose arenas come when they want.
  assert.ok(late.resident - early.resident < 160 << 20, `resident memory grows: ${text}`)
  assert.ok(late.space - early.space < 64 * 2 ** 30, `address space grows: ${text}`)
  assert.ok(late.mappings - early.mappings < 700, `mappings grow: ${text}`)
  assert.ok(late.threads - early.threads < 8, `threads grow: ${text}`)
})

// ---------------------------------------------------------------- an environment that ends in the middle

const LAUNCH = `
  import { Worker } from 'node:worker_threads'
  const launch = (text, workerData) => {
    const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(text)), { workerData })
    worker.there = new Promise((resolve) => worker.once('message', resolve))
    return worker
  }`

const glue = (text: string) => {
  const path = join(temporaryFolder('glue'), 'glue.cjs')
  writeFileSync(path, text)
  return path
}

const EMPTY = `
  exports.memory = new WebAssembly.Memory({ initial: 0 })
  exports.buffer = exports.memory.buffer
  exports.full = new WebAssembly.Memory({ initial: 1 })
  exports.bytes = exports.full.buffer`

test('a worker is terminated in a hook of a synchronous reload of glue, whose memory has no pages', LIMIT, async () => {
  const text = `
    import { parentPort } from 'node:worker_threads'
    import { loadGlue } from ${JSON.stringify(INDEX_URL)}
    const restoreState = () => { parentPort.postMessage('there'); for (;;); }
    const manager = await loadGlue(process.env.GLUE, { saveState: () => 1, restoreState })
    manager.reloadSync()`
  const ended = await child(
    `
    ${LAUNCH}
    const worker = launch(${JSON.stringify(text)})
    await worker.there
    report(await worker.terminate())
    `,
    { env: { GLUE: glue(EMPTY) } },
  )
  assert.equal(reported(ended), 1)
})

test('a hook of a synchronous reload of glue runs into the timeout of node:vm', LIMIT, async () => {
  const ended = await child(
    `
    import vm from 'node:vm'
    import { loadGlue } from ${JSON.stringify(INDEX_URL)}
    const sandbox = vm.createContext({})
    const restoreState = vm.runInContext('() => { for (;;); }', sandbox)
    const manager = await loadGlue(process.env.GLUE, { saveState: () => 1, restoreState })
    const { bytes } = manager.module
    sandbox.reload = () => manager.reloadSync()
    assert.throws(() => vm.runInContext('reload()', sandbox, { timeout: 100 }), { code: 'ERR_SCRIPT_EXECUTION_TIMEOUT' })
    report([manager.state, manager.generation, bytes.byteLength])
    await manager.close()
    `,
    { env: { GLUE: glue(EMPTY) } },
  )
  assert.deepEqual(reported(ended), ['ready', 1, 65_536])
})

for (const [what, program] of [
  ['of glue', `const { full } = (await loadGlue(process.env.GLUE)).module; const moved = full.buffer.transfer()`],
  ['of the namespace', `const moved = new WebAssembly.Memory({ initial: 1 }).buffer.transfer()`],
  [
    'of glue with threads, that has grown since',
    `const memory = (await loadGlue(process.env.SHARED, { engine: { threads: true } })).module.memory
     const before = memory.buffer
     memory.grow(1)
     memory.buffer
     const moved = before.transfer()`,
  ],
  [
    'of glue with threads, whose buffer of before is collected',
    `const memory = (await loadGlue(process.env.SHARED, { engine: { threads: true } })).module.memory
     const move = () => {
       const before = memory.buffer
       memory.grow(1)
       memory.buffer
       return before.transfer()
     }
     const moved = move()
     for (let i = 0; i < 3; i += 1) { gc(); await new Promise((resolve) => setImmediate(resolve)) }
     memory.grow(1)
     memory.buffer`,
  ],
  [
    'of glue, where native code was at work when its life ended',
    // Bun does not detach such a buffer; elsewhere there is nothing left to move.
    `const { promisify } = await import('node:util')
     const { deflate } = await import('node:zlib')
     const manager = await loadGlue(process.env.GLUE)
     const { buffer } = manager.module.full
     const work = promisify(deflate)(new Uint8Array(buffer), { chunkSize: 1 << 20 })
     manager.reloadSync()
     await work
     const moved = buffer.byteLength > 0 ? buffer.transfer() : new ArrayBuffer(65536)`,
  ],
] as const) {
  test(`bytes that a worker has moved out of a memory ${what} outlive the worker`, LIMIT, async () => {
    const text = `
      import { parentPort } from 'node:worker_threads'
      import { loadGlue, WebAssembly } from ${JSON.stringify(INDEX_URL)}
      const gc = globalThis.gc ?? (() => Bun.gc(true))
      ${program}
      new Uint8Array(moved).fill(3)
      parentPort.postMessage(moved, [moved])
      setInterval(() => {}, 60_000)`
    const ended = await child(
      `
      ${LAUNCH}
      const seen = []
      for (let i = 0; i < 3; i += 1) {
        const worker = launch(${JSON.stringify(text)})
        const bytes = new Uint8Array(await worker.there)
        await worker.terminate()
        seen.push([bytes.length, bytes.every((byte) => byte === 0 || byte === 3)])
        bytes.fill(5)
        // Deno says that a worker has ended before it has let go of everything.
        seen.push(bytes.every((byte) => byte === 5 || (process.versions.deno !== undefined && byte === 0)))
      }
      for (let i = 0; i < 3; i += 1) { gc(); await new Promise((resolve) => setImmediate(resolve)) }
      report(seen)
      `,
      {
        env: {
          GLUE: glue(EMPTY),
          SHARED: glue('exports.memory = new WebAssembly.Memory({ initial: 1, maximum: 4, shared: true })'),
        },
        flags: ['--expose-gc', ...TRANSFER],
      },
    )
    const each = [[65_536, true], true]
    assert.deepEqual(reported(ended), [...each, ...each, ...each])
  })
}

test('a program ends by process.exit() with everything alive, and by every kind of finalizer', LIMIT, async () => {
  for (const end of ['process.exit(0)', 'process.reallyExit(0)', 'setImmediate(() => process.exit(0))', 'void 0']) {
    const ended = await child(
      `
      import { loadGlue, WebAssembly } from ${JSON.stringify(INDEX_URL)}
      const guest = process.env.GUEST
      const kept = globalThis.kept = []
      const registry = new FinalizationRegistry((view) => kept.push(view))
      for (let i = 0; i < 4; i += 1) {
        const manager = await WasmModuleManager.create(guest, { cache: false, instances: 2 })
        const snapshot = await manager.snapshot()
        const lease = await manager.acquire()
        const glue = await loadGlue(process.env.GLUE)
        const views = [manager.memory.buffer, lease.memory.buffer, glue.module.full.buffer, new WebAssembly.Memory({ initial: 1 }).buffer]
        kept.push(manager, snapshot, lease, glue, views, manager.exports.f, lease.exports.f, manager.call('f'), manager.reload().catch(() => {}))
        for (const view of views) registry.register(view, i)
        kept.push(new Uint8Array(views[0].transfer()))
        if (i === 2) { kept.splice(0, 12); gc() }
      }
      process.on('exit', () => { gc(); for (const it of kept) if (it instanceof Uint8Array) it.fill(1) })
      report('there')
      ${end === 'void 0' ? 'for (const it of kept.splice(0)) it?.release?.()' : end}
      `,
      {
        env: { GUEST: wat('(module (memory (export "memory") 1) (func (export "f")))', 'f'), GLUE: glue(EMPTY) },
        flags: ['--expose-gc', ...TRANSFER],
      },
    )
    assert.equal(reported(ended), 'there')
  }
})

// ---------------------------------------------------------------- handles

test(
  'a function of the binding that is given a handle of something else says so, and does not take it for its own',
  LIMIT,
  async () => {
    const ended = await child(
      `
    import { createRequire } from 'node:module'
    import { loadGlue } from ${JSON.stringify(INDEX_URL)}
    const require = createRequire(${JSON.stringify(INDEX_URL)})
    const binding = require(process.env.BINDING)
    // What the package holds, taken on its way.
    const handles = new Map()
    for (const name of ['newManager', 'managerMemory', 'leaseRealm', 'managerRealm', 'moduleCompile'])
      binding[name] = ((original) => (...args) => {
        const made = original(...args)
        handles.set(name, made)
        return made
      })(binding[name])
    for (const name of ['leaseGeneration', 'contextGeneration', 'snapshotFacts'])
      binding[name] = ((original) => (handle) => {
        handles.set(name, handle)
        return original(handle)
      })(binding[name])
    const guest = process.env.GUEST
    const manager = await WasmModuleManager.create(guest, { cache: false, imports: (context) => { context.generation; return {} } })
    manager.memory.buffer
    const snapshot = await manager.snapshot()
    snapshot.id
    await manager.use((lease) => lease.generation)
    const glue = await loadGlue(process.env.GLUE)
    const given = [...handles.values()]
    const refused = []
    const isRefused = (f) => {
      try {
        f()
      } catch (error) {
        return Number(error instanceof TypeError && /a handle of something else/.test(error.message))
      }
      return 0
    }
    const skipped = new Set(['setup', 'settleHost', 'look', 'newManager', 'newScratch', 'isSetUp', 'setMemoryBudget', 'version', 'errorCodes', 'helpers'])
    for (const [name, f] of Object.entries(binding)) {
      if (typeof f !== 'function' || skipped.has(name) || name.startsWith('__')) continue
      let count = 0
      for (const handle of given) count += isRefused(() => f(handle))
      refused.push([name, count])
    }
    const of = handles.get('newManager')
    const second = [['cancelSnapshot', of, of], ['cancelAcquire', of, of], ['reset', of, {}, of], ['resetSync', of, {}, of]]
    for (const [name, ...args] of second) refused.push([name, isRefused(() => binding[name](...args)) * given.length])
    report({ kinds: given.length, refused })
    process.exit(0)
    `,
      {
        env: {
          BINDING: fileURLToPath(new URL('../lib/binding.js', import.meta.url)),
          GUEST: wat('(module (memory (export "memory") 1) (func (export "f")))', 'f'),
          GLUE: glue(EMPTY),
        },
      },
    )
    const { kinds, refused } = reported<{ kinds: number; refused: [string, number][] }>(ended)
    assert.ok(kinds >= 6, `${kinds} kinds of handles`)
    const wants = refused.filter(([name]) => !['threadSpawn', 'threadRealm', 'functionType', 'isBusy'].includes(name))
    for (const [name, count] of wants) assert.ok(count >= kinds - 1, `${name} has refused ${count} of ${kinds}`)
  },
)

test(
  'bytes that another thread writes, and that are linear memory, are copied and not looked at twice',
  LIMIT,
  async () => {
    const ended = await child(
      `
    ${LAUNCH}
    const manager = await WasmModuleManager.create(process.env.GUEST, { cache: false })
    const shared = new Uint8Array(new SharedArrayBuffer(8192)).fill(1)
    const scribe = \`
      import { parentPort, workerData as bytes } from 'node:worker_threads'
      parentPort.postMessage(0)
      for (let n = 0; ; n = (n + 1) % 3) bytes.fill(1 + n)\`
    const worker = launch(scribe, shared)
    await worker.there
    let count = 0
    for (let i = 0; i < 2000; i += 1) {
      manager.memory.write(0, shared)
      if (manager.memory.read(0, 8192).every((byte) => byte >= 1 && byte <= 3)) count += 1
      manager.memory.write(4096, new Uint8Array(manager.memory.buffer, 0, 8192))
    }
    await worker.terminate()
    report(count)
    await manager.close()
    `,
      { env: { GUEST: wat('(module (memory (export "memory") 1) (func (export "f")))', 'f') } },
    )
    assert.equal(reported(ended), 2000)
  },
)
