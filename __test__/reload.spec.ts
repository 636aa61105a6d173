// Reload: gate, drain, save, instantiate, restore, commit; and back again from every phase.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { LeasedInstance, ManagerOptions, ReloadOptions } from '../index.js'
import { stamped, wat, workbench } from './guests.ts'
import {
  barrier,
  bench,
  child,
  hasCode,
  idleImports,
  LIMIT,
  managed,
  managedSync,
  outcome,
  reported,
  turns,
  until,
  type WasmError,
} from './support.ts'

const env = { WORKBENCH: workbench }

/** Carries the guest's counter over. */
const keepCount: ManagerOptions = {
  saveState: (instance) => instance.exports.peek?.(),
  restoreState: (instance, state: number) => {
    instance.exports.set?.(state)
  },
}

test('without hooks a reload starts from a fresh instance: memory, globals, size', LIMIT, async (t) => {
  const { manager } = await bench(t)
  manager.exports.count?.()
  manager.exports.store?.(0, 9)
  manager.exports.grow?.(5)
  await manager.reload()
  assert.deepEqual([manager.exports.peek?.(), manager.exports.load?.(0), manager.exports.size?.()], [0, 0, 1])
})

test('saveState reads the old instance and restoreState writes the new one, for every replica', LIMIT, async (t) => {
  const seen: unknown[] = []
  const { manager } = await bench(t, {
    instances: 3,
    saveState: (instance, replica) => {
      seen.push(['save', instance.generation, replica])
      return { replica, count: instance.exports.peek?.(), token: Symbol.for('kept') }
    },
    restoreState: (instance, state, replica) => {
      assert.equal(state.token, Symbol.for('kept'))
      seen.push(['restore', instance.generation, replica, state.replica, state.count])
      instance.exports.set?.(state.count + 1)
    },
  })
  manager.exports.set?.(10)
  await manager.reload()
  assert.deepEqual(seen, [
    ['save', 1, 0],
    ['save', 1, 1],
    ['save', 1, 2],
    ['restore', 2, 0, 0, 10],
    ['restore', 2, 1, 1, 0],
    ['restore', 2, 2, 2, 0],
  ])
  assert.equal(manager.exports.peek?.(), 11)
})

test('the hooks may be asynchronous, and the reload waits for them', LIMIT, async (t) => {
  const order: string[] = []
  const { manager } = await bench(t, {
    initialize: async (instance) => {
      await turns()
      order.push(`initialize ${instance.generation}`)
    },
    saveState: async (instance) => {
      await turns()
      const count = await instance.call('peek')
      order.push('save')
      return count
    },
    restoreState: async (instance, state) => {
      await turns()
      await instance.call('set', [state])
      order.push('restore')
    },
  })
  await manager.call('set', [5])
  await manager.reload()
  assert.deepEqual(order, ['initialize 1', 'initialize 2', 'save', 'restore'])
  assert.equal(await manager.call('peek'), 5)
})

test(
  'initialize can use the exports and the memory of its instance, also in the first generation',
  LIMIT,
  async (t) => {
    const seen: unknown[] = []
    const initialize = (instance: LeasedInstance) => {
      seen.push(instance.generation, instance.exports.add?.(1, 2), instance.memory.byteLength)
      instance.exports.store?.(7, 70)
    }
    const { manager } = await bench(t, { initialize })
    assert.equal(manager.exports.load?.(7), 70)
    await manager.reload()
    assert.equal(manager.exports.load?.(7), 70)
    const sync = managedSync(t, workbench, { imports: idleImports, initialize })
    assert.equal(sync.exports.load?.(7), 70)
    assert.deepEqual(seen, [1, 3, 65_536, 2, 3, 65_536, 1, 3, 65_536])
  },
)

test(
  'an asynchronous initialize can call into its instance off the JS thread, also in the first generation',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t, {
      initialize: async (instance) => {
        await instance.call('set', [(await instance.call('add', [40, 1])) as number])
      },
    })
    assert.equal(manager.exports.peek?.(), 41)
  },
)

test('nothing is restored where nothing was saved: without saveState, restoreState is not asked', LIMIT, async (t) => {
  let restored = 0
  const { manager } = await bench(t, {
    restoreState: () => {
      restored += 1
    },
  })
  await manager.reload()
  assert.equal(restored, 0)
})

test('state of any kind travels as the very same value, undefined included', LIMIT, async (t) => {
  let next: unknown
  const seen: unknown[] = []
  const { manager } = await bench(t, {
    saveState: () => next,
    restoreState: (_instance, state) => {
      seen.push(state)
    },
  })
  const values = [0, '', null, undefined, false, { deep: [1] }, () => {}, Symbol('s'), 2n, Number.NaN]
  for (const value of values) {
    next = value
    await manager.reload()
  }
  assert.equal(seen.length, values.length)
  for (const [index, value] of values.entries()) assert.ok(Object.is(seen[index], value), String(index))
})

test('hooks may return thenables that are no promises: they are awaited, as `await` would', LIMIT, async (t) => {
  const steps: unknown[] = []
  /** Bluebird and query builders are such objects. */
  const later = (step: string, value?: unknown) => ({
    // biome-ignore lint/suspicious/noThenProperty: that is what this test is about.
    then(resolve: (value: unknown) => void) {
      setImmediate(() => {
        steps.push(step)
        resolve(value)
      })
    },
  })
  const { manager } = await bench(t, {
    initialize: () => later('initialized') as unknown as Promise<void>,
    saveState: () => later('saved', 'state'),
    restoreState: (_, state) => {
      steps.push(state)
      return later('restored') as unknown as Promise<void>
    },
  })
  assert.deepEqual(steps.splice(0), ['initialized'])
  await manager.reload()
  assert.deepEqual(steps.splice(0), ['initialized', 'saved', 'state', 'restored'])
  assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_RELOAD_FAILED', /reloadSync|synchronous/))
  assert.deepEqual([steps, manager.generation], [[], 2])
})

test('the hooks get an instance whose handle ends with the hook', LIMIT, async (t) => {
  const kept: LeasedInstance[] = []
  const { manager } = await bench(t, {
    initialize: (instance) => void kept.push(instance),
    saveState: (instance) => {
      kept.push(instance)
      return 1
    },
    restoreState: (instance) => void kept.push(instance),
  })
  await manager.reload()
  assert.equal(kept.length, 4)
  for (const instance of kept) {
    assert.throws(() => instance.exports.add?.(1, 1), hasCode('ERR_WASM_STALE_HANDLE'))
    await assert.rejects(instance.call('add', [1, 1]), hasCode('ERR_WASM_STALE_HANDLE'))
  }
})

test('the report has every field, with sensible figures', LIMIT, async (t) => {
  const { manager } = await bench(t, { ...keepCount, instances: 2 })
  manager.exports.grow?.(3)
  const report = await manager.reload({ reason: 'the test' })
  assert.deepEqual(Object.keys(report).sort(), [
    'drainMs',
    'drained',
    'generation',
    'instantiateMs',
    'memoryBytesAfter',
    'memoryBytesBefore',
    'pauseMs',
    'previousGeneration',
    'queued',
    'reason',
    'restoreMs',
    'saveMs',
    'strategy',
  ])
  assert.deepEqual(
    [report.generation, report.previousGeneration, report.reason, report.strategy],
    [2, 1, 'the test', 'exclusive'],
  )
  assert.deepEqual([report.drained, report.queued], [0, 0])
  assert.deepEqual([report.memoryBytesBefore, report.memoryBytesAfter], [5 * 65_536, 2 * 65_536])
  for (const figure of [report.pauseMs, report.drainMs, report.saveMs, report.instantiateMs, report.restoreMs]) {
    assert.ok(figure >= 0 && figure < 60_000)
  }
  assert.ok(report.pauseMs + 0.5 >= report.drainMs + report.saveMs + report.restoreMs, JSON.stringify(report))
  assert.equal((await manager.reload()).reason, 'manual')
})

test('the report says how many were in flight and how many waited', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t, { instances: 2, threads: 2 })
  close(1)
  close(2)
  const running = [manager.call('hold', [1]), manager.call('hold', [2])]
  await Promise.all([arrived(1), arrived(2)])
  const reload = manager.reload()
  await until(() => manager.state === 'draining')
  const waiting = [manager.call('add', [1, 2]), manager.call('add', [3, 4]), manager.call('add', [5, 6])]
  release(1)
  release(2)
  const report = await reload
  assert.deepEqual([report.drained, report.queued], [2, 3])
  assert.deepEqual(await Promise.all(running), [1, 2])
  assert.deepEqual(await Promise.all(waiting), [3, 7, 11])
})

test(
  'a call that runs when the reload comes ends in the old generation, one that comes later runs in the new',
  LIMIT,
  async (t) => {
    const { manager, close, arrived, release } = await bench(t)
    manager.exports.set?.(100)
    close(1)
    const old = manager.call('holdThenCount', [1])
    await arrived(1)
    const reload = manager.reload()
    await until(() => manager.state === 'draining')
    const fresh = manager.call('count')
    release(1)
    assert.equal(await old, 101)
    assert.equal(await fresh, 1)
    await reload
  },
)

test('the old generation serves on while the next one is being made', LIMIT, async (t) => {
  const gate = barrier()
  const inside = barrier()
  const { manager } = await bench(t, {
    initialize: async (instance) => {
      if (instance.generation === 1) return
      inside.open()
      await gate.promise
    },
  })
  await manager.call('set', [3])
  const reload = manager.reload()
  await inside.promise
  assert.equal(await manager.call('peek'), 3)
  assert.equal(await manager.call('count'), 4)
  assert.equal(manager.generation, 1)
  gate.open()
  await reload
  assert.equal(await manager.call('peek'), 0)
})

test(
  'while a swap is under way synchronous calls throw ERR_WASM_RELOADING, and afterwards they run',
  LIMIT,
  async (t) => {
    const gate = barrier()
    const inside = barrier()
    const { manager } = await bench(t, {
      saveState: async () => {
        inside.open()
        await gate.promise
      },
    })
    const reload = manager.reload()
    await inside.promise
    assert.throws(() => manager.exports.add?.(1, 2), hasCode('ERR_WASM_RELOADING'))
    assert.throws(() => manager.callSync('add', [1, 2]), hasCode('ERR_WASM_RELOADING'))
    assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_RELOADING'))
    const waits = manager.call('add', [1, 2])
    gate.open()
    await reload
    assert.equal(await waits, 3)
    assert.equal(manager.exports.add?.(1, 2), 3)
  },
)

// ---------------------------------------------------------------- state left behind

test('skipSave leaves state behind and asks neither hook', LIMIT, async (t) => {
  const asked: string[] = []
  const { manager } = await bench(t, {
    saveState: () => {
      asked.push('save')
      throw new Error('the save is broken')
    },
    restoreState: () => void asked.push('restore'),
  })
  manager.exports.set?.(5)
  assert.equal((await manager.reload({ skipSave: true })).generation, 2)
  assert.equal(manager.exports.peek?.(), 0)
  assert.equal(manager.reloadSync({ skipSave: true }).generation, 3)
  assert.deepEqual(asked, [])
})

test('a poisoned instance is not asked to save', LIMIT, async (t) => {
  const asked: [number, number][] = []
  const { manager } = await bench(t, {
    instances: 2,
    threads: 2,
    saveState: (instance, replica) => {
      asked.push([instance.generation, replica])
      return instance.exports.peek?.()
    },
    restoreState: (instance, state) => {
      instance.exports.set?.(state)
    },
  })
  manager.exports.set?.(9)
  const lease = await manager.acquire()
  const other = await manager.acquire()
  assert.throws(() => lease.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
  other.exports.set?.(4)
  lease.release()
  other.release()
  await manager.reload()
  // Whether the trapped one was replaced before or by the reload, its memory was never read.
  for (const [generation, replica] of asked) assert.ok(generation > 1 || replica === 1 || replica === 0)
  const values = await Promise.all(
    [0, 1].map(async () => {
      const instance = await manager.acquire()
      const value = instance.exports.peek?.()
      return { instance, value }
    }),
  )
  for (const { instance } of values) instance.release()
  assert.deepEqual(values.map(({ value }) => value).sort(), [0, 4])
})

test(
  'a guest whose trap was never followed by a call is replaced by the reload without being asked',
  LIMIT,
  async (t) => {
    let asked = 0
    const { manager } = await bench(t, {
      saveState: (instance) => {
        asked += 1
        return instance.exports.peek?.()
      },
      restoreState: (instance, state) => {
        instance.exports.set?.(state)
      },
    })
    manager.exports.set?.(9)
    assert.throws(() => manager.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
    manager.reloadSync()
    assert.deepEqual([asked, manager.exports.peek?.()], [0, 0])
  },
)

// ---------------------------------------------------------------- several at once

test('reloads that want the same join into one', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const reloads = [manager.reload(), manager.reload(), manager.reload({ reason: 'manual' })]
  release(1)
  const reports = await Promise.all(reloads)
  assert.deepEqual(
    reports.map((report) => report.generation),
    [2, 2, 2],
  )
  assert.equal(manager.generation, 2)
  assert.equal(manager.stats().reloads.manual, 1)
  await held
})

test('a reload that wants something else runs after the one under way', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const held = manager.call('hold', [1])
  await arrived(1)
  const reloads = [manager.reload({ reason: 'a' }), manager.reload({ reason: 'b' }), manager.reload({ reason: 'a' })]
  release(1)
  const [first, second, third] = await Promise.all(reloads)
  assert.deepEqual([first?.generation, second?.generation, third?.generation], [2, 3, 2])
  assert.deepEqual([first?.reason, second?.reason], ['a', 'b'])
  await held
})

test('reloads one after another, with calls all the while: no call lost, none answered twice', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2, threads: 2, ...keepCount })
  let isDone = false
  let answers = 0
  const caller = async (id: number) => {
    let sent = 0
    while (!isDone) {
      sent += 1
      assert.equal(await manager.call('add', [id, sent]), id + sent)
      answers += 1
    }
    return sent
  }
  const callers = [1, 2, 3, 4, 5, 6].map(caller)
  for (let i = 0; i < 60; i += 1) await manager.reload({ reason: `round ${i}` })
  isDone = true
  const sent = (await Promise.all(callers)).reduce((sum, n) => sum + n, 0)
  assert.equal(answers, sent)
  assert.equal(manager.generation, 61)
  assert.equal(manager.stats().calls.completed >= sent, true)
})

test('several replicas carry their own state over and over, and no call sees a mixture', LIMIT, async (t) => {
  const replicas = 4
  const order: [string, number, number][] = []
  const manager = await managed(t, stamped, {
    instances: replicas,
    threads: 3,
    imports: { env: { pause: () => turns(1) } },
    initialize: (instance) => void instance.exports.stamp?.(instance.generation),
    saveState: async (instance, replica) => {
      order.push(['save', instance.generation, replica])
      return { replica, count: await instance.call('count') }
    },
    restoreState: (instance, state: { replica: number; count: number }, replica) => {
      order.push(['restore', instance.generation, replica])
      assert.equal(state.replica, replica)
      instance.exports.setCount?.(state.count)
    },
  })
  let isDone = false
  let counted = 0
  const reader = async () => {
    let latest = 0
    while (!isDone) {
      const [first, second] = (await manager.call('read', [1])) as [number, number]
      assert.equal(first, second)
      assert.ok(first >= latest, `generation ${first} after ${latest}`)
      latest = first
    }
  }
  const counter = async () => {
    while (!isDone) {
      await manager.call('next')
      counted += 1
    }
  }
  const callers = [reader(), reader(), reader(), counter(), counter(), counter()]
  for (let round = 0; round < 40; round += 1) {
    order.length = 0
    const { generation } = await manager.reload()
    const each = Array.from({ length: replicas }, (_, replica) => replica)
    assert.deepEqual(order, [
      ...each.map((replica) => ['save', generation - 1, replica]),
      ...each.map((replica) => ['restore', generation, replica]),
    ])
  }
  isDone = true
  await Promise.all(callers)
  const held = await Promise.all(Array.from({ length: replicas }, () => manager.acquire()))
  const sum = held.reduce((total, one) => total + (one.exports.count?.() as number), 0)
  for (const one of held) one.release()
  assert.ok(counted > 0)
  assert.equal(sum, counted)
})

// ---------------------------------------------------------------- reloadSync

test('reloadSync does the same without leaving the thread', LIMIT, async (t) => {
  const order: string[] = []
  const { manager } = await bench(t, {
    initialize: (instance) => void order.push(`initialize ${instance.generation}`),
    saveState: (instance) => {
      order.push(`save ${instance.generation}`)
      return instance.exports.peek?.()
    },
    restoreState: (instance, state) => {
      order.push(`restore ${instance.generation}`)
      instance.exports.set?.(state)
    },
  })
  manager.exports.set?.(31)
  const report = manager.reloadSync({ reason: 'now' })
  assert.deepEqual(order, ['initialize 1', 'initialize 2', 'save 1', 'restore 2'])
  assert.deepEqual([report.generation, report.reason, manager.generation, manager.state], [2, 'now', 2, 'ready'])
  assert.equal(manager.exports.peek?.(), 31)
})

test('reloadSync works at once after create, after a reload and after a trap has been answered', LIMIT, async (t) => {
  for (let round = 0; round < 20; round += 1) {
    const { manager } = await bench(t)
    assert.equal(manager.reloadSync().generation, 2)
    await manager.reload()
    assert.equal(manager.reloadSync().generation, 4)
  }
})

test('reloadSync throws ERR_WASM_BUSY while anything is in flight, and leaves all as it was', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const held = manager.call('holdThenCount', [1])
  await arrived(1)
  assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_BUSY'))
  release(1)
  assert.equal(await held, 1)
  const lease = await manager.acquire()
  assert.throws(() => manager.reloadSync(), hasCode('ERR_WASM_BUSY'))
  lease.release()
  assert.equal(manager.generation, 1)
  assert.equal(manager.reloadSync().generation, 2)
})

test('reloadSync refuses a hook that returns a promise, and rolls back', LIMIT, async (t) => {
  for (const options of [
    { saveState: async () => 1 },
    { saveState: () => 1, restoreState: async () => {} },
  ] as ManagerOptions[]) {
    const { manager } = await bench(t, options)
    manager.exports.set?.(8)
    const end = await outcome((async () => manager.reloadSync())())
    assert.ok('error' in end)
    hasCode('ERR_WASM_RELOAD_FAILED')(end.error)
    hasCode('ERR_WASM_ASYNC_IMPORT')((end.error as WasmError).cause)
    assert.deepEqual([manager.generation, manager.exports.peek?.()], [1, 8])
  }
})

// ---------------------------------------------------------------- options

test('reload refuses options that it does not know or cannot use, naming them', LIMIT, async (t) => {
  const { manager } = await bench(t)
  for (const [options, text] of [
    [{ reson: 'x' }, /reson/],
    [{ drainTimeoutMs: -1 }, /drainTimeoutMs/],
    [{ drainTimeoutMs: '5' }, /drainTimeoutMs/],
    [{ drainTimeoutMs: 1.5 }, /drainTimeoutMs/],
    [{ onDrainTimeout: 'kill' }, /onDrainTimeout.*'abort' or 'interrupt'/],
    [{ strategy: 'sideways' }, /strategy/],
    [{ skipSave: 'yes' }, /skipSave/],
    [{ reason: 5 }, /reason/],
    ['now', /options/],
  ] as [ReloadOptions, RegExp][]) {
    await assert.rejects(manager.reload(options), hasCode('ERR_WASM_INVALID_ARGUMENT', text))
    assert.throws(() => manager.reloadSync(options), hasCode('ERR_WASM_INVALID_ARGUMENT', text))
  }
  assert.equal(manager.generation, 1)
  assert.equal(manager.exports.add?.(1, 2), 3)
})

// ---------------------------------------------------------------- the point of it all

test('the memory of the old generation goes back to the system at the commit: RSS falls', LIMIT, async () => {
  const ended = await child(
    `
    import { readFileSync } from 'node:fs'
    const rss = () => Number(readFileSync('/proc/self/statm', 'utf8').split(' ')[1]) * 4096
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const seen = []
    for (const how of ['reload', 'reloadSync', 'reload', 'trap']) {
      const empty = rss()
      assert.notEqual(manager.exports.grow(4095), -1)
      manager.exports.touch(0, 256 * 2 ** 20)
      // Somebody keeps a view, as real programs do.
      globalThis.kept = new Uint8Array(manager.memory.buffer)
      const full = rss()
      if (how === 'trap') { await manager.call('boom').catch(() => {}); await manager.call('peek') } else await manager[how]()
      // A replaced instance is released right after its slot serves again; the others before the report.
      for (let i = 0; how === 'trap' && i < 500 && rss() - empty > 16 * 2 ** 20; i += 1) {
        await new Promise((resolve) => setTimeout(resolve, 10))
      }
      seen.push({ how, grew: full - empty, left: rss() - empty })
    }
    report(seen)
    `,
    { env },
  )
  const megabyte = 2 ** 20
  for (const { how, grew, left } of reported<{ how: string; grew: number; left: number }[]>(ended)) {
    assert.ok(grew > 250 * megabyte, `${how}: only ${grew} bytes were touched`)
    assert.ok(left < 16 * megabyte, `${how}: ${left} bytes of ${grew} are still resident`)
  }
})

test('a guest that leaks until it dies lives on under reloads that the application drives', LIMIT, async (t) => {
  const source = wat(`(module
    (memory (export "memory") 1 64)
    (global $top (mut i32) (i32.const 65536))
    (func (export "work") (param i32) (result i32)
      ;; Leaks a page per call and dies without one.
      (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))
      (i32.mul (local.get 0) (i32.const 2))))`)
  const plain = await managed(t, source)
  let lived = 0
  try {
    for (; lived < 1000; lived += 1) plain.exports.work?.(lived)
  } catch (error) {
    hasCode('ERR_WASM_TRAP')(error)
  }
  assert.equal(lived, 63)
  const manager = await managed(t, source)
  for (let i = 0; i < 1000; i += 1) {
    assert.equal(await manager.call('work', [i]), i * 2)
    if (manager.stats().memoryBytes > 48 * 65_536) await manager.reload()
  }
  assert.ok(manager.generation >= 20)
  assert.equal(manager.stats().calls.trapped, 0)
})

test('an imports function is called for every instance of every generation, with the right one', LIMIT, async (t) => {
  const seen: number[] = []
  const { manager } = await bench(t, {
    instances: 2,
    onImports: (instance) => void seen.push(instance.generation),
  })
  await manager.reload()
  manager.reloadSync()
  assert.deepEqual(seen, [1, 1, 2, 2, 3, 3])
})

test(
  'a manager whose replacement cannot be made fails its calls instead of letting them wait for ever',
  LIMIT,
  async (t) => {
    let fails = false
    const { manager } = await bench(t, {
      initialize: () => {
        if (fails) throw new Error('cannot start any more')
      },
    })
    fails = true
    await assert.rejects(manager.call('boom'), hasCode('ERR_WASM_TRAP'))
    const end = await outcome(manager.call('add', [1, 2]))
    assert.ok('error' in end)
    hasCode('ERR_WASM_RELOAD_FAILED')(end.error)
    assert.throws(() => manager.exports.add?.(1, 2), hasCode('ERR_WASM_RELOAD_FAILED'))
    // A reload may help.
    fails = false
    await manager.reload()
    assert.equal(await manager.call('add', [1, 2]), 3)
    assert.equal(manager.state, 'ready')
  },
)
