// Everything at once, from fixed seeds: nothing may crash, hang, be lost or be answered twice.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { workbench } from './guests.ts'
import { child, reported } from './support.ts'

const env = { WORKBENCH: workbench }

/** In a child: `read` tells what the process holds of everything that could be left behind. */
const READ = `
  const { readdirSync, readFileSync } = await import('node:fs')
  const read = async () => {
    // What is let go of is dropped on the event loop and by the collector, in turns.
    for (let i = 0; i < 6; i += 1) { gc(); await new Promise((resolve) => setImmediate(resolve)) }
    const status = readFileSync('/proc/self/status', 'utf8')
    const bytes = (key) => Number(new RegExp(key + ':\\\\s+(\\\\d+)').exec(status)[1]) * 1024
    return {
      heap: process.memoryUsage().heapUsed,
      resident: bytes('VmRSS'),
      space: bytes('VmSize'),
      mappings: readFileSync('/proc/self/maps', 'utf8').split('\\n').length,
      descriptors: readdirSync('/proc/self/fd').length,
      threads: readdirSync('/proc/self/task').length,
    }
  }
`

type Reading = Record<'heap' | 'resident' | 'space' | 'mappings' | 'descriptors' | 'threads', number>

/** From the third reading to the last each of these has grown by less than that. */
function assertFlat(readings: Reading[], bounds: Partial<Reading>): void {
  const [, , early] = readings
  const late = readings.at(-1)
  assert.ok(early && late)
  for (const [what, bound] of Object.entries(bounds)) {
    const key = what as keyof Reading
    assert.ok(late[key] - early[key] < bound, `${what}: ${JSON.stringify(readings)}`)
  }
}

const PROGRAM = `
  const seed = Number(process.env.SEED), options = JSON.parse(process.env.OPTIONS), operations = Number(process.env.OPERATIONS)
  let state = seed >>> 0
  const random = (below) => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) % below
  }
  const allowed = new Set([
    'ERR_WASM_TRAP', 'ERR_WASM_TIMEOUT', 'ERR_WASM_BUSY', 'ERR_WASM_RELOADING', 'ERR_WASM_RELOAD_FAILED',
    'ERR_WASM_DRAIN_TIMEOUT', 'ERR_WASM_INTERRUPTED', 'ERR_WASM_STALE_HANDLE', 'ERR_WASM_ASYNC_IMPORT', 'aborted',
  ])
  const endings = {}
  const note = (kind, error) => {
    const how = error === undefined ? 'ok' : error === 'aborted' ? 'aborted' : error.code ?? String(error?.stack ?? error)
    if (how !== 'ok' && !allowed.has(how)) throw new Error(kind + ': ' + how + ' ' + error?.message, { cause: error })
    endings[how] = (endings[how] ?? 0) + 1
  }
  let isBroken = false
  const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
    cache: false, maxQueue: 100000, ...options,
    imports: (instance) => ({ env: {
      entered() {},
      hold(key) {
        switch (random(6)) {
          case 0: return new Promise((resolve) => setImmediate(resolve, key))
          case 1: return instance.exports.add(key, 0)
          case 2: { instance.memory.write(100, 'abc'); instance.exports.grow(1); return key }
          case 3: { const buffer = instance.memory.buffer; new Uint8Array(buffer)[0] = 1; return key }
          case 4: return (async () => { await null; return instance.exports.add(key, 0) })()
          default: return key
        }
      },
    } }),
    initialize: async (instance) => { if (random(20) === 0) await instance.call('add', [1, 2]) },
    saveState: async (instance) => {
      if (random(10) === 0) throw 'aborted'
      if (random(15) === 0) instance.exports.boom()
      return random(2) ? instance.exports.peek() : await instance.call('peek')
    },
    restoreState: (instance, value) => { if (random(15) === 0) throw 'aborted'; instance.exports.set(value) },
  })
  const open = new Set()
  let answers = 0, asked = 0
  const follow = (kind, promise, check) => {
    asked += 1
    let times = 0
    const done = promise.then(
      (value) => { times += 1; check?.(value); note(kind) },
      (error) => { times += 1; note(kind, error) },
    ).then(() => { if (times !== 1) throw new Error(kind + ' was answered ' + times + ' times'); answers += 1; open.delete(done) })
    open.add(done)
  }
  const sync = (kind, run) => { try { run(); note(kind) } catch (error) { note(kind, error) } }
  const same = (expected) => (value) => { if (value !== expected) throw new Error(value + ' instead of ' + expected) }
  const kept = []
  const snapshots = [await manager.snapshot()]
  const step = (i) => {
    switch (random(30)) {
      case 0: case 1: case 2: case 3: return follow('call', manager.call('add', [i, 1]), same(i + 1))
      case 4: case 5: return follow('hold', manager.call('hold', [i]), same(i))
      case 6: return follow('boom', manager.call('boom'))
      case 7: return follow('timeout', manager.call('burn', [1 + random(3000000)], { timeoutMs: 1 + random(4) }))
      case 8: {
        const controller = new AbortController()
        follow('abort', manager.call(random(2) ? 'spin' : 'hold', [i], { signal: controller.signal, timeoutMs: 200 }))
        if (random(2)) controller.abort('aborted'); else setTimeout(() => controller.abort('aborted'), random(4))
        return
      }
      case 9: case 10: return sync('exports', () => same(i + 2)(manager.exports.add(i, 2)))
      case 11: return sync('sync boom', () => manager.exports.boom())
      case 12: return sync('sync hold', () => same(i)(manager.callSync('hold', [i])))
      case 13: case 14: return follow('use', manager.use(async (instance) => {
        const number = instance.exports.count()
        if (random(3) === 0) await null
        if (random(3) === 0) same(number + 1)(await instance.call('count')); else same(number + 1)(instance.exports.count())
        if (random(20) === 0) instance.exports.boom()
        if (random(10) === 0) kept.push(instance)
        return number
      }))
      case 15: return follow('acquire', manager.acquire().then(async (lease) => {
        for (let k = random(3); k > 0; k -= 1) await new Promise((resolve) => setImmediate(resolve))
        const call = random(2) ? lease.call('hold', [i]) : null
        lease.release()
        if (call) same(i)(await call)
      }))
      case 16: return follow('reload', manager.reload({ reason: 'r' + random(3) }))
      case 17: return follow('reload, interrupting', manager.reload({ drainTimeoutMs: random(3), onDrainTimeout: random(2) ? 'interrupt' : 'abort' }))
      case 18: return sync('reloadSync', () => manager.reloadSync({ skipSave: random(2) === 0 }))
      case 19: { kept.push(new Uint8Array(manager.memory.buffer)); return sync('grow', () => manager.exports.grow(random(3))) }
      case 20: {
        for (const thing of kept.splice(0, 5)) {
          if (thing instanceof Uint8Array) thing[0] = 1
          else sync('kept', () => thing.exports.add(1, 1))
        }
        return
      }
      case 21: { global.gc(); return }
      case 22: { const stats = manager.stats(); if (stats.inFlight > stats.instances.total) throw new Error(JSON.stringify(stats)); return }
      case 23: return follow('snapshot', manager.snapshot().then((it) => { if (random(3)) snapshots.push(it) }))
      case 24: case 25: return follow('reset', manager.reset({
        to: snapshots[random(4)], drainTimeoutMs: random(20), onDrainTimeout: random(2) ? 'interrupt' : 'abort',
      }))
      case 26: return sync('resetSync', () => manager.resetSync())
      case 27: return sync('snapshotSync', () => snapshots.push(manager.snapshotSync()))
      case 28: {
        if (snapshots.length > 4) snapshots.splice(random(4), 1)[0].release()
        return follow('fork', manager.fork({ name: 'child' }).then(async (it) => {
          try { same(i + 3)(await it.call('add', [i, 3])); if (random(2)) await it.reset(); it.exports.count() } finally { await it.close() }
        }))
      }
      default: return follow('lease abort', (() => {
        const controller = new AbortController()
        const promise = manager.acquire({ signal: controller.signal }).then((lease) => lease.release())
        if (random(2)) controller.abort('aborted')
        return promise
      })())
    }
  }
  for (let i = 0; i < operations; i += 1) {
    // A closed door is part of it: the memory of a manager between two instances may say so.
    try { step(i) } catch (error) { if (!allowed.has(error.code)) throw error }
    if (random(4) === 0) await new Promise((resolve) => setImmediate(resolve))
    if (open.size > 40) await Promise.race(open)
  }
  await Promise.all(open)
  // Whatever happened: it serves, nothing is in flight, and nothing waits.
  assert.equal(await manager.call('add', [20, 3]), 23)
  assert.equal(answers, asked)
  await manager.use((instance) => instance.exports.add(1, 1))
  const { inFlight, queued, instances } = manager.stats()
  assert.deepEqual([inFlight, queued, instances.busy], [0, 0, 0])
  assert.equal(manager.state, 'ready')
  await manager.close()
  report({ endings, asked })
`

for (const [what, options] of [
  ['one replica', {}],
  ['one replica and limits.timeoutMs', { limits: { timeoutMs: 100 } }],
  ['three replicas on two threads', { instances: 3, threads: 2 }],
  ['two replicas, isolated calls', { instances: 2, threads: 2, isolation: 'per-call' }],
  ['two replicas, snapshots by copies', { instances: 2, snapshots: { images: 'copy' } }],
  ['two replicas, explicit bounds checks', { instances: 2, threads: 2, engine: { signalsBasedTraps: false } }],
] as const) {
  for (const seed of [1, 2, 3]) {
    test(`calls, traps, timeouts, signals, leases, reloads, resets and forks at once, seed ${seed}: ${what}`, {
      timeout: 60_000,
    }, async () => {
      const ended = await child(PROGRAM, {
        env: { ...env, SEED: String(seed), OPTIONS: JSON.stringify(options), OPERATIONS: '600' },
        flags: ['--expose-gc'],
        timeoutMs: 40_000,
      })
      const { endings, asked } = reported<{ endings: Record<string, number>; asked: number }>(ended)
      assert.ok(asked > 200)
      // The run met what it was made for.
      for (const how of ['ok', 'ERR_WASM_TRAP', 'aborted']) {
        assert.ok((endings[how] ?? 0) > 0, `${how} never happened: ${JSON.stringify(endings)}`)
      }
      assert.ok(Object.keys(endings).length >= 5, JSON.stringify(endings))
    })
  }
}

test('a million isolated calls leave nothing behind: memory, address space, mappings, descriptors', {
  timeout: 120_000,
  skip: process.platform !== 'linux' && 'reads /proc',
}, async () => {
  const ended = await child(
    `
    ${READ}
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, instances: 2, isolation: 'per-call', maxQueue: 100000,
      imports: { env: { entered() {}, hold: (key) => key } },
      initialize: (instance) => { instance.exports.set(41) },
    })
    const readings = []
    for (let round = 0; round < 10; round += 1) {
      for (let turn = 0; turn < 100; turn += 1) {
        const calls = []
        for (let i = 0; i < 1000; i += 1) {
          // Counts, grows, and traps now and then: each from where the snapshot is.
          calls.push(i % 100 === 99 ? manager.call('boom').catch((e) => e.code)
            : i % 10 === 9 ? manager.call('grow', [4]) : manager.call('count'))
        }
        const answers = await Promise.all(calls)
        for (let i = 0; i < 1000; i += 1) {
          const expected = i % 100 === 99 ? 'ERR_WASM_TRAP' : i % 10 === 9 ? 1 : 42
          if (answers[i] !== expected) throw new Error(i + ': ' + answers[i])
        }
      }
      readings.push(await read())
    }
    report({ generation: manager.generation, calls: manager.stats().calls, readings })
    await manager.close()
    `,
    { env, flags: ['--expose-gc'], timeoutMs: 110_000 },
  )
  interface Report {
    generation: number
    calls: { completed: number; trapped: number }
    readings: Reading[]
  }
  const { generation, calls, readings } = reported<Report>(ended)
  assert.equal(generation, 1)
  // One more: what `initialize` calls, in the first replica only.
  assert.deepEqual([calls.completed, calls.trapped], [990_001, 10_000])
  const own = process.versions.deno === undefined ? 12 : 32
  assertFlat(readings, { resident: own << 20, space: 64 << 20, mappings: 40, descriptors: 1 })
})

test('a thousand forks of a parent of 256 MiB fit where the parent fits', {
  timeout: 120_000,
  skip: process.platform !== 'linux' && 'reads /proc',
}, async () => {
  const ended = await child(
    `
    ${READ}
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    manager.exports.grow(256 * 16 - manager.memory.buffer.byteLength / 65536)
    new Uint32Array(manager.memory.buffer).fill(7)
    manager.exports.set(41)
    const { byteLength } = manager.memory.buffer
    const readings = [await read()]
    for (let round = 0; round < 2; round += 1) {
      const forks = []
      for (let i = 0; i < 1000; i += 1) forks.push(await manager.fork())
      readings.push(await read())
      for (const [i, fork] of forks.entries()) {
        fork.exports.set(i)
        const words = new Uint32Array(fork.memory.buffer)
        if (words.byteLength !== byteLength || words.at(-1) !== 7) throw new Error('contents of ' + i)
      }
      for (const [i, fork] of forks.entries()) if (fork.exports.peek() !== i) throw new Error('state of ' + i)
      if (manager.exports.peek() !== 41) throw new Error('the parent')
      readings.push(await read())
      await Promise.all(forks.map((fork) => fork.close()))
      forks.length = 0
      readings.push(await read())
    }
    report({ byteLength, readings, sharedBytes: manager.stats({ pages: true }).pages.sharedBytes })
    await manager.close()
    `,
    { env, flags: ['--expose-gc'], timeoutMs: 110_000 },
  )
  const { byteLength, readings, sharedBytes } = reported<
    Record<'byteLength' | 'sharedBytes', number> & { readings: Reading[] }
  >(ended)
  const text = JSON.stringify(readings)
  const [before, forked, written, closed, forkedAgain, writtenAgain, closedAgain] = readings
  assert.ok(before && forked && written && closed && forkedAgain && writtenAgain && closedAgain)
  assert.equal(byteLength, 256 << 20)
  assert.ok(before.resident > 256 << 20, text)
  // From the first fork on the state is in the snapshot, once, which only stats() counts.
  assert.ok(Math.max(forked.resident, written.resident, writtenAgain.resident) < before.resident, text)
  assert.ok(sharedBytes > 250 << 20 && sharedBytes <= byteLength, `${sharedBytes}`)
  // Bun and Deno have threads and mappings of their own, which come when they want them.
  const { bun, deno } = process.versions
  const others = bun === undefined && deno === undefined ? 0 : 2
  assert.ok(forked.threads <= before.threads + others, text)
  assert.ok(forked.descriptors - before.descriptors < 4 + 2 * others, text)
  // What the allocator keeps for the next thousand is there once.
  assert.ok(forkedAgain.resident - forked.resident < 32 << 20, text)
  assert.ok(closedAgain.resident - closed.resident < 16 << 20, text)
  assert.ok(closedAgain.mappings - closed.mappings < (others === 0 ? 40 : 120), text)
  assert.ok(closedAgain.descriptors <= closed.descriptors, text)
})

// On other systems nothing tells mappings, descriptors and threads apart as cheaply.
test('ten thousand reloads in a row keep nothing: memory, mappings, descriptors, threads, JavaScript objects', {
  timeout: 120_000,
  skip: process.platform !== 'linux' && 'reads /proc',
}, async () => {
  const ended = await child(
    `
    ${READ}
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, instances: 2,
      imports: (instance) => ({ env: { entered() {}, hold: (key) => instance.exports.add(key, 0) } }),
      saveState: (instance) => instance.exports.peek(),
      restoreState: async (instance, value) => { instance.exports.set(value + 1) },
    })
    const { add, hold } = manager.exports
    const readings = []
    for (let round = 0; round < 10; round += 1) {
      for (let i = 0; i < 500; i += 1) {
        const view = manager.memory.buffer
        const [, answer] = await Promise.all([manager.reload(), manager.call('hold', [i])])
        if (answer !== i || view.byteLength !== 0) throw new Error('reload ' + i + ' of round ' + round)
        await manager.reload({ strategy: 'rolling', skipSave: true })
        if (add(i, 1) !== i + 1 || hold(i) !== i) throw new Error('exports')
      }
      readings.push(await read())
    }
    report({ generation: manager.generation, readings })
    await manager.close()
    `,
    { env, flags: ['--expose-gc'], timeoutMs: 100_000 },
  )
  const { generation, readings } = reported<{ generation: number; readings: Reading[] }>(ended)
  assert.equal(generation, 10_001)
  assertFlat(readings, { heap: 1 << 20, resident: 12 << 20, mappings: 40, descriptors: 1, threads: 3 })
})
