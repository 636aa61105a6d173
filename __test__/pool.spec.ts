// The pool: replicas in parallel, a queue that is bounded and first in, first out.
import assert from 'node:assert/strict'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryFolder, wat } from './guests.ts'
import { bench, child, hasCode, INDEX_URL, LIMIT, outcome, reported, turns, until } from './support.ts'

/** Of a thread that may just be ending. */
function nameOf(id: string): string {
  try {
    return readFileSync(`/proc/self/task/${id}/comm`, 'utf8').trim()
  } catch {
    return ''
  }
}

/** Nanoseconds that the threads of that name ran, or stood ready to run while the machine had no core for them. */
function wantedToRun(name: string): number {
  let sum = 0
  for (const id of readdirSync('/proc/self/task')) {
    if (!nameOf(id).includes(name)) continue
    const [ran, waited] = readFileSync(`/proc/self/task/${id}/schedstat`, 'utf8').split(' ')
    sum += Number(ran) + Number(waited)
  }
  return sum
}

test('two replicas run two computations at the same time: the two take the time of one', LIMIT, async (t) => {
  assert.ok(availableParallelism() >= 2, 'this promise needs two cores')
  const one = await bench(t, { name: 'single' })
  const two = await bench(t, { name: 'double', instances: 2, threads: 2 })
  const rounds = 20_000_000
  const time = async ({ manager }: typeof one) => {
    const before = wantedToRun(manager.name)
    const started = performance.now()
    await Promise.all([manager.call('burn', [rounds]), manager.call('burn', [rounds])])
    const took = performance.now() - started
    return { took, threads: (wantedToRun(manager.name) - before) / 1e6 / took }
  }
  await time(one)
  await time(two)
  // Interleaved, so that other load meets both alike, and several times, because load only ever adds.
  // Where others leave us one core's worth of time, no clock can show two: then it counts
  // that two threads were at work, or ready for it, all the while.
  const seen: string[] = []
  let isParallel = false
  for (let i = 0; i < 20 && !isParallel; i += 1) {
    const serial = await time(one)
    const parallel = await time(two)
    const ratio = parallel.took / serial.took
    seen.push(`${ratio.toFixed(2)} (${serial.threads.toFixed(2)} and ${parallel.threads.toFixed(2)} threads)`)
    isParallel = serial.threads < 1.2 && (ratio < 0.65 || parallel.threads > 1.6)
  }
  assert.ok(isParallel, `parallel to serial: ${seen.join(', ')}`)
})

test('as many calls are inside guests at once as there are replicas', LIMIT, async (t) => {
  const { manager, close, arrived, release, arrivals } = await bench(t, { instances: 4, threads: 4 })
  const keys = [1, 2, 3, 4, 5, 6]
  for (const key of keys) close(key)
  const calls = keys.map((key) => manager.call('hold', [key]))
  await Promise.all([1, 2, 3, 4].map(arrived))
  await turns()
  assert.deepEqual([...arrivals].sort(), [1, 2, 3, 4])
  assert.deepEqual([manager.stats().inFlight, manager.stats().queued, manager.stats().instances.busy], [4, 2, 4])
  release(3)
  await arrived(5)
  for (const key of keys) release(key)
  assert.deepEqual(await Promise.all(calls), keys)
})

test(
  'fewer threads than replicas: only so many run, the others wait for a thread, all are answered',
  LIMIT,
  async (t) => {
    const { manager, close, arrived, release, arrivals } = await bench(t, { instances: 3, threads: 1 })
    close(1)
    const calls = [manager.call('hold', [1]), manager.call('hold', [2]), manager.call('hold', [3])]
    await arrived(1)
    await turns(10)
    assert.deepEqual(arrivals, [1])
    release(1)
    assert.deepEqual(await Promise.all(calls), [1, 2, 3])
  },
)

test('calls wait in the order of their coming', LIMIT, async (t) => {
  const { manager, close, arrived, release, arrivals } = await bench(t)
  close(0)
  const first = manager.call('hold', [0])
  await arrived(0)
  const rest = Array.from({ length: 200 }, (_, i) => manager.call('hold', [i + 1]))
  release(0)
  await Promise.all([first, ...rest])
  assert.deepEqual(
    arrivals,
    Array.from({ length: 201 }, (_, i) => i),
  )
})

test('answers come in the order in which the calls ended', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const order: number[] = []
  await Promise.all(
    Array.from({ length: 100 }, (_, i) => manager.call('add', [i, 0]).then((v) => order.push(v as number))),
  )
  assert.deepEqual(
    order,
    Array.from({ length: 100 }, (_, i) => i),
  )
})

test(
  'a call that comes later never overtakes one that waits, even when the instance is free for a moment',
  LIMIT,
  async (t) => {
    const { manager, close, arrived, release, arrivals } = await bench(t)
    close(1)
    const first = manager.call('hold', [1])
    await arrived(1)
    const second = manager.call('hold', [2]).then(() => manager.call('hold', [4]))
    const third = manager.call('hold', [3])
    release(1)
    await Promise.all([first, second, third])
    assert.deepEqual(arrivals, [1, 2, 3, 4])
  },
)

test('maxQueue calls may wait; one more rejects with ERR_WASM_QUEUE_FULL and has not run', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { maxQueue: 3 })
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const waiting = [1, 2, 3].map(() => manager.call('count'))
  const refused = await Promise.all([
    outcome(manager.call('count')),
    outcome(manager.invoke('count', new Uint8Array())),
  ])
  for (const end of refused.slice(0, 1)) {
    assert.ok('error' in end)
    hasCode('ERR_WASM_QUEUE_FULL', /maxQueue = 3/)(end.error)
  }
  release(1)
  assert.equal(await held, 1)
  assert.deepEqual(await Promise.all(waiting), [1, 2, 3])
  // Room again.
  assert.equal(await manager.call('count'), 4)
})

test('maxQueue: 0 means that nobody waits', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { maxQueue: 0 })
  assert.equal(await manager.call('add', [1, 2]), 3)
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  await assert.rejects(manager.call('add', [1, 2]), hasCode('ERR_WASM_QUEUE_FULL'))
  release(1)
  await held
  assert.equal(await manager.call('add', [1, 2]), 3)
})

test('by default 1024 may wait', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const waiting = Array.from({ length: 1024 }, (_, i) => manager.call('add', [i, 0]))
  await assert.rejects(manager.call('add', [1, 2]), hasCode('ERR_WASM_QUEUE_FULL', /1024/))
  release(1)
  await held
  assert.deepEqual(
    await Promise.all(waiting),
    Array.from({ length: 1024 }, (_, i) => i),
  )
})

test('a call that left the queue makes room in it', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { maxQueue: 1 })
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const controller = new AbortController()
  const first = outcome(manager.call('add', [1, 1], { signal: controller.signal }))
  await assert.rejects(manager.call('add', [2, 2]), hasCode('ERR_WASM_QUEUE_FULL'))
  controller.abort()
  await first
  const second = manager.call('add', [3, 3])
  release(1)
  assert.equal(await held, 1)
  assert.equal(await second, 6)
})

test('calls waiting for a swap count against maxQueue too', LIMIT, async (t) => {
  let open = () => {}
  let began = false
  const { manager } = await bench(t, {
    maxQueue: 2,
    saveState: () => {
      began = true
      return new Promise<void>((resolve) => {
        open = resolve
      })
    },
  })
  const reload = manager.reload()
  await until(() => began)
  const waiting = [manager.call('add', [1, 1]), manager.call('add', [2, 2])]
  await assert.rejects(manager.call('add', [3, 3]), hasCode('ERR_WASM_QUEUE_FULL'))
  open()
  await reload
  assert.deepEqual(await Promise.all(waiting), [2, 4])
})

const threadNames = () => readdirSync('/proc/self/task').map(nameOf)

test('the pool is the manager own: its threads carry its name and end with it', LIMIT, async (t) => {
  const { manager } = await bench(t, { name: 'mine', instances: 2, threads: 2 })
  await Promise.all([manager.call('add', [1, 2]), manager.call('add', [1, 2])])
  const mine = () => threadNames().filter((name) => name.includes('mine'))
  await until(() => mine().length === 2)
  await manager.close()
  await until(() => mine().length === 0)
})

test('by default a pool has no more threads than replicas, nor than cores', LIMIT, async (t) => {
  const { manager } = await bench(t, { name: 'few', instances: 64 })
  await Promise.all(Array.from({ length: 64 }, (_, i) => manager.call('add', [i, i])))
  const count = threadNames().filter((name) => /few.*\d/.test(name)).length
  assert.ok(count >= 1 && count <= availableParallelism(), `${count} threads`)
})

test('many replicas of a small guest are no burden', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 100, threads: 2 })
  assert.equal(manager.stats().instances.total, 100)
  const answers = await Promise.all(Array.from({ length: 500 }, (_, i) => manager.call('add', [i, i])))
  assert.equal(answers[499], 998)
  await manager.reload()
  assert.equal(await manager.call('add', [1, 2]), 3)
})

test('the event loop stays free while the pool computes', LIMIT, async (t) => {
  const { manager } = await bench(t)
  let isDone = false
  const call = manager.call('burn', [60_000_000]).then(() => {
    isDone = true
  })
  let ticks = 0
  while (!isDone) {
    await turns(1)
    ticks += 1
  }
  await call
  assert.ok(ticks > 10, `${ticks} turns of the event loop during the computation`)
})

test('replicas that trap are replaced one by one while the others serve', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 3, threads: 3 })
  const ends = await Promise.all(
    Array.from({ length: 60 }, (_, i) => outcome(i % 3 === 0 ? manager.call('boom') : manager.call('add', [i, i]))),
  )
  for (const [i, end] of ends.entries()) {
    if (i % 3 === 0) {
      assert.ok('error' in end)
      hasCode('ERR_WASM_TRAP')(end.error)
    } else assert.deepEqual(end, { value: 2 * i })
  }
  // The one that synchronous calls use may be replaced only when the next call needs it.
  assert.equal(manager.exports.add?.(1, 2), 3)
  await until(() => manager.stats().instances.poisoned === 0)
  assert.equal(manager.generation, 21)
  assert.equal(manager.stats().reloads.trap, 20)
})

test("no thread is left once everything is closed, not even of rayon's global pool", LIMIT, async () => {
  const glue = join(temporaryFolder('glue'), 'glue.cjs')
  // The bytes: a module with one function, which a validator has to look at.
  writeFileSync(
    glue,
    `const bytes = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 4, 1, 2, 0, 11])
    exports.isValid = WebAssembly.validate(bytes)
    exports.pages = new WebAssembly.Memory({ initial: 3 }).buffer.byteLength / 65536`,
  )
  const ended = await child(
    `
    import { readdirSync, readFileSync } from 'node:fs'
    const { loadGlue } = await import(${JSON.stringify(INDEX_URL)})
    // What nobody has named is called as whoever has started it.
    const threads = () => {
      if (process.platform !== 'linux') return []
      const names = readdirSync('/proc/self/task').map((id) => {
        try { return readFileSync('/proc/self/task/' + id + '/comm', 'utf8').trim() } catch { return '' }
      })
      // Bun has threads of its own, which come when it wants them; those that we do not name would be called 'bun'.
      const others = process.versions.bun === undefined ? /^$/ : /^(Heap|JIT|Bun )|^$/
      return names.filter((name) => !others.test(name) && name !== 'molt-timer').sort()
    }
    const before = threads()
    const glue = await loadGlue(process.env.GLUE, { cache: false })
    const manager = await WasmModuleManager.create(process.env.GUEST, {
      cache: false, imports: { env: { memory: { initial: 2 } } },
    })
    report([manager.memory.byteLength / 65536, glue.module.isValid, glue.module.pages])
    await Promise.all([manager.close(), glue.close()])
    const until = performance.now() + 10_000
    while (threads().length > before.length && performance.now() < until) await new Promise(setImmediate)
    assert.deepEqual(threads(), before)
    `,
    { env: { GUEST: wat('(module (import "env" "memory" (memory 1)) (func (export "f")))'), GLUE: glue } },
  )
  assert.deepEqual(reported(ended), [2, true, 3])
})
