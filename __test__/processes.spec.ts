// Processes around us: signals and ends, caps of the system, children, clusters, workers with little memory.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { wat } from './guests.ts'
import { env, POINTS, SCENE } from './points.ts'
import { child, INDEX_URL, LIMIT, littleSpace, reported } from './support.ts'

/** Far less than the 5 seconds for which the end waits for guests that cannot be stopped; much for a loaded machine. */
const PROMPT_MS = 4_000

describe('a signal', { concurrency: 2 }, () => {
  for (const [name, point] of Object.entries(POINTS)) {
    // Where the event loop stands still nobody can listen; the system ends the process.
    const acts = (signal: string) => `const act = () => { process.kill(process.pid, '${signal}') }`

    test(`ends the program at once, as it would without us, while ${name}`, LIMIT, async () => {
      for (const signal of ['SIGTERM', 'SIGINT'] as const) {
        const ended = await child(`${SCENE}${acts(signal)}\n${point.program}\nsetInterval(() => {}, 1000)`, { env })
        assert.deepEqual([ended.code, ended.signal, ended.stderr], [null, signal, ''])
      }
    })

    if (point.isBlocking) continue

    test(`that the program listens to ends it with the code it says, while ${name}`, LIMIT, async () => {
      const ended = await child(
        `${SCENE}
        let since
        process.on('SIGTERM', () => { since = performance.now(); process.exit(6) })
        process.on('exit', () => report('told'))
        ${acts('SIGTERM')}
        ${point.program}
        setInterval(() => {}, 1000)`,
        { env },
      )
      assert.deepEqual([ended.code, ended.signal, ended.stderr], [6, null, ''])
      assert.match(ended.stdout, /told/)
    })
  }

  test('process.abort() is an abort, whatever runs', LIMIT, async () => {
    for (const name of [
      ...['nothing runs', 'a pool call runs', 'an endless synchronous call runs', 'a lease is held'],
      ...Object.keys(POINTS).filter((name) => name.includes('glue')),
    ]) {
      const { program } = POINTS[name] as { program: string }
      const ended = await child(
        `${SCENE}
        process.on('exit', () => report('never'))
        const act = () => process.abort()
        ${program}`,
        { env, mayCrash: true, under: ['sh', '-c', 'ulimit -c 0; exec "$0" "$@"'] },
      )
      assert.deepEqual([ended.code, ended.signal, ended.stdout], [null, 'SIGABRT', ''])
    }
  })
})

describe('what the program handles itself', { concurrency: 2 }, () => {
  test('uncaughtException and unhandledRejection listeners are told, and all goes on', LIMIT, async () => {
    const ended = await child(
      `
      const told = []
      process.on('uncaughtException', (error, origin) => told.push(origin + ': ' + error.message))
      process.on('unhandledRejection', (error) => told.push('rejection: ' + (error.code ?? error.message)))
      const failing = new Error('on purpose')
      const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
        cache: false, instances: 2, imports: { env: { entered() {}, hold: () => { throw failing } } },
      })
      manager.on('trap', () => { throw new Error('from a listener') })
      manager.on('reload', () => { throw new Error('from a reload') })
      setImmediate(() => manager.exports.hold(1))
      while (told.length < 1) await new Promise((resolve) => setImmediate(resolve))
      manager.call('hold', [1])
      manager.call('boom')
      while (told.length < 4) await new Promise((resolve) => setImmediate(resolve))
      await manager.reload()
      while (!told.includes('uncaughtException: from a reload')) await new Promise((resolve) => setImmediate(resolve))
      const sum = await manager.call('add', [1, 2])
      await manager.close()
      // A trapped replica is replaced, which is told as a reload, too.
      report({ told: [...new Set(told)].sort(), sum })
      `,
      { env },
    )
    assert.deepEqual(reported(ended), {
      told: [
        'rejection: ERR_WASM_TRAP',
        'rejection: on purpose',
        'uncaughtException: from a listener',
        'uncaughtException: from a reload',
        'uncaughtException: on purpose',
      ],
      sum: 3,
    })
  })
})

// ---------------------------------------------------------------- no exit is held up

const HANGS = wat(
  `(module
    (import "env" "never" (func $never (result i32)))
    (memory (export "memory") 1 16 shared)
    (func (export "spin") (loop (br 0)))
    (func (export "fill") (loop (memory.fill (i32.const 0) (i32.const 1) (i32.const 65536)) (br 0)))
    (func (export "ask") (result i32) (call $never))
    (func (export "wait") (result i32) (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))
    (func (export "deep") (param i32) (loop (br 0))))`,
  'hangs',
)

describe('the end of the process is prompt', { concurrency: 2 }, () => {
  for (const [what, begin] of [
    ['a guest spins on the pool', `call('spin')`],
    ['a guest fills memory for ever', `call('fill')`],
    ['a guest waits for a promise that nobody settles', `call('ask')`],
    ['a guest waits to be notified', `call('wait')`],
    [
      'guests do all of it, and others wait',
      `for (const name of ['spin', 'fill', 'ask', 'wait', 'spin', 'ask']) call(name)`,
    ],
    ['a lease is never given back', `globalThis.lease = await manager.acquire()`],
    ['a hook never settles', `manager.reload().catch(() => {})`],
    ['close() waits for a guest that never ends', `call('spin'); manager.close().catch(() => {})`],
  ] as const) {
    test(`while ${what}`, LIMIT, async () => {
      for (const end of ['process.exit(3)', `process.kill(process.pid, 'SIGTERM')`]) {
        const ended = await child(
          `
          const manager = await WasmModuleManager.create(process.env.HANGS, {
            cache: false, instances: 4, threads: 4, engine: { threads: true },
            imports: { env: { never: () => new Promise(() => {}) } },
            saveState: () => new Promise(() => {}),
          })
          const call = (name) => void manager.call(name).catch(() => {})
          ${begin}
          // A guest that spins tells nobody; a moment later it does.
          setTimeout(() => { report(Date.now()); ${end} }, 50)
          setInterval(() => {}, 1000)
          `,
          { env: { HANGS } },
        )
        const took = Date.now() - Number(/REPORT (\d+)/.exec(ended.stdout)?.[1])
        const isExit = end.startsWith('process.exit')
        assert.deepEqual([ended.code, ended.signal], isExit ? [3, null] : [null, 'SIGTERM'], ended.stderr)
        assert.ok(took < PROMPT_MS, `${end} took ${took} ms`)
      }
    })
  }
})

// ---------------------------------------------------------------- little of everything

describe('where little is to be had', { concurrency: 2 }, () => {
  const USE = `
    const use = async (manager) => {
      const seen = [manager.exports.add(1, 2), await manager.call('add', [3, 4])]
      manager.exports.set(7)
      const snapshot = await manager.snapshot()
      manager.exports.set(8)
      await manager.reset({ to: snapshot })
      seen.push(manager.exports.peek())
      const fork = await manager.fork()
      seen.push(fork.exports.peek(), fork.exports.grow(2))
      await fork.close()
      for (let i = 0; i < 5; i += 1) await manager.reload()
      seen.push(manager.generation, manager.exports.peek(), manager.exports.grow(15), manager.memory.byteLength)
      for (const name of ['boom', 'load']) await manager.call(name, [0x7fffffff]).catch((error) => seen.push(error.trap))
      await manager.call('spin', [], { timeoutMs: 20 }).catch((error) => seen.push(error.code))
      await manager.close()
      return seen
    }
    const imports = { env: { entered() {}, hold: (key) => key } }
  `
  const ALL = [3, 7, 7, 7, 1, 6, 7, 1, 1_048_576, 'unreachable', 'out-of-bounds-memory', 'ERR_WASM_TIMEOUT']

  test('of address space: the error names the option, and with it everything works', LIMIT, async () => {
    const ended = await child(
      `${USE}
      const failed = await WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports }).then(
        () => 'it went well', (error) => [error.code, error.message])
      const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
        cache: false, imports, engine: { memoryReservationBytes: 1 << 20 },
      })
      report([failed, await use(manager)])`,
      { env, ...(await littleSpace()) },
    )
    const [[code, message], seen] = reported<[[string, string], unknown[]]>(ended)
    assert.match(code, /^ERR_WASM_/)
    assert.match(message, /engine\.memoryReservationBytes/)
    assert.deepEqual(seen, ALL)
  })

  test('of heap for JavaScript: calls, reloads and views of a large memory work', LIMIT, async () => {
    const ended = await child(
      `${USE}
      const large = await WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports })
      large.exports.grow(1600)
      let sum = 0
      for (let i = 0; i < 50; i += 1) {
        large.memory.buffer
        sum += (await large.call('add', [i, 1])) + large.memory.read(0, 1 << 20).length
        if (i % 10 === 0) { await large.reload(); large.exports.grow(1600) }
      }
      report([sum, await use(await WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports }))])`,
      { env, flags: ['--max-old-space-size=24', '--max-semi-space-size=1'] },
    )
    assert.deepEqual(reported(ended), [(50 * 51) / 2 + 50 * 2 ** 20, ALL])
  })

  test('of what a worker may have: it works, or ends alone', LIMIT, async () => {
    const ended = await child(
      `${USE}
      import { Worker } from 'node:worker_threads'
      const launch = (body, resourceLimits) => {
        const text = \`
          import { parentPort } from 'node:worker_threads'
          import { WasmModuleManager } from \${JSON.stringify(${JSON.stringify(INDEX_URL)})}
          \${process.env.USE}
          const manager = await WasmModuleManager.create(\${JSON.stringify(process.env.WORKBENCH)}, { cache: false, imports })
          \${body}
        \`
        const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(text)), { resourceLimits })
        return new Promise((resolve) => {
          let said
          worker.once('message', (message) => { said = message })
          worker.once('error', (error) => { said = error.code })
          worker.once('exit', () => resolve(said))
        })
      }
      const little = { maxOldGenerationSizeMb: 16, maxYoungGenerationSizeMb: 1, stackSizeMb: 1 }
      const works = await launch("parentPort.postMessage(await use(manager)); process.exit()", little)
      const dies = await launch(
        "manager.call('spin').catch(() => {}); const kept = []; for (;;) kept.push(manager.memory.read(0, 8), { a: kept.length })", little)
      report([works, dies, await use(await WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports }))])`,
      { env: { ...env, USE }, timeoutMs: 55_000 },
    )
    assert.deepEqual(reported(ended), [ALL, 'ERR_WORKER_OUT_OF_MEMORY', ALL])
  })
})

// ---------------------------------------------------------------- several processes

describe('several processes', { concurrency: 2 }, () => {
  const SERVE = `
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, instances: 2, imports: { env: { entered() { process.send({ is: 'inside' }) }, hold: (key) => key } },
    })
    process.on('message', async ({ id, name, args }) => {
      if (name === 'reload') process.send({ id, value: (await manager.reload()).generation })
      else if (name === 'bytes') process.send({ id, value: manager.memory.read(0, 4) })
      else manager.call(name, args).then((value) => process.send({ id, value }), (error) => process.send({ id, code: error.code }))
    })
    process.send({ is: 'ready' })
  `

  const TALK = `
    const said = (worker, what) => new Promise((resolve) => {
      const listen = (message) => { if (message.is === what) { worker.off('message', listen); resolve() } }
      worker.on('message', listen)
    })
    let last = 0
    const ask = (worker, name, args = []) => new Promise((resolve) => {
      const id = last += 1
      const listen = (message) => { if (message.id === id) { worker.off('message', listen); resolve(message.value ?? message.code) } }
      worker.on('message', listen)
      worker.send({ id, name, args })
    })
    const ended = (worker) => new Promise((resolve) => worker.once('exit', (code, signal) => resolve(code ?? signal)))
  `

  test('child_process.fork: each has managers of its own, and a parent may kill one in mid-call', LIMIT, async () => {
    const ended = await child(
      `${TALK}
      import { fork } from 'node:child_process'
      import { writeFileSync } from 'node:fs'
      writeFileSync('serve.mjs', "import { WasmModuleManager } from " + JSON.stringify(${JSON.stringify(INDEX_URL)}) + "\\n" + process.env.SERVE)
      const children = Array.from({ length: 3 }, () => fork('./serve.mjs', { serialization: 'advanced' }))
      await Promise.all(children.map((one) => said(one, 'ready')))
      const [killed, stopped, kept] = children
      const seen = [await ask(killed, 'count'), await ask(killed, 'count'), await ask(kept, 'count'), await ask(stopped, 'reload')]
      const inside = said(killed, 'inside')
      ask(killed, 'spin')
      await inside
      killed.kill('SIGKILL')
      seen.push(await ended(killed))
      const insideToo = said(stopped, 'inside')
      ask(stopped, 'spin')
      await insideToo
      stopped.kill('SIGTERM')
      seen.push(await ended(stopped))
      seen.push(await ask(kept, 'boom'), await ask(kept, 'add', [1, 2]), [...(await ask(kept, 'bytes'))].length)
      kept.disconnect()
      seen.push(await ended(kept))
      report(seen)
      `,
      { env: { ...env, SERVE }, under: ['sh', '-c', 'cd "$(mktemp -d)" && exec "$0" "$@"'] },
    )
    // Disconnected, with nothing under way, it ends by itself.
    assert.deepEqual(reported(ended), [...[1, 2, 1, 2], ...['SIGKILL', 'SIGTERM', 'ERR_WASM_TRAP', 3, 4, 0]])
  })

  /** Loads glue whose guest tells when it is inside, and goes where it is told to. */
  const SERVE_GLUE = `
    import { loadGlue } from ${JSON.stringify(INDEX_URL)}
    const manager = await loadGlue(process.env.GLUE, { cache: false, engine: { threads: true } })
    const { guest } = manager.module
    manager.module.entered = () => process.send({ is: 'inside' })
    process.on('message', ({ id, name, args }) => {
      if (name === 'exit') process.exit(5)
      else if (name === 'thread') manager.spawn([[guest.entered], [guest.spin]])
      else if (name === 'forever') { guest.entered(); guest.spin() }
      else process.send({ id, value: guest[name](...args) })
    })
    process.send({ is: 'ready' })
  `

  for (const [what, make] of [
    ['child_process.fork', `const make = () => fork('./serve.mjs')`],
    ['cluster', `cluster.setupPrimary({ exec: join(process.cwd(), 'serve.mjs') }); const make = () => cluster.fork()`],
  ] as const) {
    test(`${what}: one ends while a guest of glue or its threads are inside, and the others go on`, LIMIT, async () => {
      const ended = await child(
        `${TALK}
        import { fork } from 'node:child_process'
        import cluster from 'node:cluster'
        import { writeFileSync } from 'node:fs'
        import { join } from 'node:path'
        writeFileSync('serve.mjs', process.env.SERVE)
        ${make}
        const ones = [make(), make(), make(), make()]
        await Promise.all(ones.map((one) => said(one, 'ready')))
        const enter = async (one, name) => {
          const inside = said(one, 'inside')
          one.send({ name })
          await inside
        }
        const kill = (one, signal) => process.kill((one.process ?? one).pid, signal)
        const [killed, stopped, exits, left] = ones
        await Promise.all(ones.map((one) => enter(one, 'thread')))
        const ends = ones.map(ended)
        await enter(killed, 'forever')
        kill(killed, 'SIGKILL')
        kill(stopped, 'SIGTERM')
        exits.send({ name: 'exit' })
        const seen = await Promise.all(ends.slice(0, 3))
        seen.push(await ask(left, 'add', [2, 3]))
        left.disconnect()
        seen.push(await ends[3])
        report(seen)
        `,
        { env: { ...env, SERVE: SERVE_GLUE }, under: ['sh', '-c', 'cd "$(mktemp -d)" && exec "$0" "$@"'] },
      )
      // Disconnected, with nothing but threads of a guest, it ends by itself.
      assert.deepEqual(reported(ended), ['SIGKILL', 'SIGTERM', 5, 5, 0])
    })
  }

  test('cluster: workers that die in mid-call are replaced, and the others serve on', LIMIT, async () => {
    const ended = await child(
      `${TALK}
      import cluster from 'node:cluster'
      import { writeFileSync } from 'node:fs'
      import { join } from 'node:path'
      writeFileSync('serve.mjs', "import { WasmModuleManager } from " + JSON.stringify(${JSON.stringify(INDEX_URL)}) + "\\n" + process.env.SERVE)
      cluster.setupPrimary({ exec: join(process.cwd(), 'serve.mjs') })
      const own = await WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports: { env: { entered() {}, hold: (k) => k } } })
      const workers = [cluster.fork(), cluster.fork()]
      await Promise.all(workers.map((worker) => said(worker, 'ready')))
      const seen = await Promise.all(workers.map((worker) => ask(worker, 'add', [2, 3])))
      const [first, second] = workers
      const inside = said(first, 'inside')
      ask(first, 'spin')
      await inside
      const gone = ended(first)
      process.kill(first.process.pid, 'SIGKILL')
      seen.push(await gone)
      const third = cluster.fork()
      await said(third, 'ready')
      seen.push(await ask(third, 'count'), await ask(second, 'reload'), await own.call('add', [4, 5]))
      const gones = [second, third].map(ended)
      cluster.disconnect()
      seen.push(...(await Promise.all(gones)))
      report(seen)
      `,
      { env: { ...env, SERVE }, under: ['sh', '-c', 'cd "$(mktemp -d)" && exec "$0" "$@"'] },
    )
    assert.deepEqual(reported(ended), [5, 5, 'SIGKILL', 1, 2, 9, 0, 0])
  })
})
