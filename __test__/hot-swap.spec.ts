// reload({ source }): another build of the module takes over, if it offers what is in use.
import assert from 'node:assert/strict'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { pathToFileURL } from 'node:url'
import type { InstanceContext, ManagerOptions, ModuleSource, ReloadReport, WasmErrorCode } from '../index.js'
import { binary, buffers, temporaryFolder, wat } from './guests.ts'
import { barrier, failure, hasCode, LIMIT, managed, thrownBy, turns, until, type WasmModuleManager } from './support.ts'

const PAGE = 65_536

/** A build that answers its number, carries a counter, and has whatever else is given. */
function build(number: number, more = '', memory = '(memory (export "memory") 1)'): string {
  return wat(
    `(module
      ${memory}
      (global $count (mut i32) (i32.const 0))
      (func (export "version") (result i32) (i32.const ${number}))
      (func (export "count") (result i32)
        (global.set $count (i32.add (global.get $count) (i32.const 1)))
        (global.get $count))
      (func (export "peek") (result i32) (global.get $count))
      (func (export "set") (param i32) (global.set $count (local.get 0)))
      (func (export "boom") (unreachable))
      ${more})`,
    'build',
  )
}

const answer = (name: string, value: number, type = 'i32') =>
  `(func (export "${name}") (result ${type}) (${type}.const ${value}))`

const first = build(1)
const second = build(2)

const keepCount: ManagerOptions = {
  saveState: (instance) => instance.exports.peek?.(),
  restoreState: (instance, state: number) => void instance.exports.set?.(state),
}

const incompatible = 'ERR_WASM_INCOMPATIBLE_MODULE'

// ---------------------------------------------------------------- the swap

test('another build takes over, on every path, and the report is that of any reload', LIMIT, async (t) => {
  const manager = await managed(t, first, { instances: 2 })
  assert.equal(manager.exports.version?.(), 1)
  const report = await manager.reload({ source: second, reason: 'deploy' })
  assert.deepEqual(
    [report.generation, report.previousGeneration, report.reason, report.strategy],
    [2, 1, 'deploy', 'exclusive'],
  )
  assert.equal(manager.exports.version?.(), 2)
  assert.equal(manager.callSync('version'), 2)
  assert.equal(await manager.call('version'), 2)
  assert.equal(await manager.use((instance) => instance.exports.version?.()), 2)
  assert.equal(await manager.use(async (instance) => await instance.call('version')), 2)
  assert.equal(manager.name, 'build')
})

test('state travels from one build to the other through the hooks', LIMIT, async (t) => {
  const manager = await managed(t, first, keepCount)
  manager.exports.set?.(40)
  await manager.reload({ source: second })
  assert.deepEqual([manager.exports.version?.(), manager.exports.count?.()], [2, 41])
  manager.reloadSync({ source: first })
  assert.deepEqual([manager.exports.version?.(), manager.exports.count?.()], [1, 42])
})

/** The same in bytes: `version` and nothing else. */
const inBytes = (version: number) =>
  binary({ functions: [{ name: 'version', params: [], results: ['i32'], body: [0x41, version] }] })

test('the source is a path, a file: URL or bytes, as in create; bytes are copied at once', LIMIT, async (t) => {
  const text = wat(`(module ${answer('version', 2)})`)
  const path = join(temporaryFolder(), 'other.wasm')
  writeFileSync(path, inBytes(2))
  const sources = [() => text, () => pathToFileURL(text), () => path, () => inBytes(2), () => inBytes(2).buffer]
  for (const make of sources) {
    for (const kind of ['async', 'sync'] as const) {
      const manager = await managed(t, wat(`(module ${answer('version', 1)})`))
      assert.equal(manager.exports.version?.(), 1)
      const source: ModuleSource = make()
      const swap = kind === 'sync' ? thrownBy(() => manager.reloadSync({ source })) : manager.reload({ source })
      if (source instanceof Uint8Array) source.fill(0)
      assert.equal((await swap).generation, 2)
      assert.equal(manager.exports.version?.(), 2)
    }
  }
})

test('later reloads, of any kind, and replacements after a trap stay on the new build', LIMIT, async (t) => {
  const manager = await managed(t, first)
  await manager.reload({ source: second })
  await manager.reload()
  assert.equal(manager.exports.version?.(), 2)
  manager.reloadSync()
  assert.equal(manager.exports.version?.(), 2)
  await manager.reload({ strategy: 'rolling' })
  assert.equal(manager.exports.version?.(), 2)
  await failure(manager.call('boom'), 'ERR_WASM_TRAP')
  assert.equal(await manager.call('version'), 2)
  assert.throws(() => manager.exports.boom?.(), hasCode('ERR_WASM_TRAP'))
  assert.equal(manager.exports.version?.(), 2)
  await manager.reload({ source: first })
  assert.equal(manager.exports.version?.(), 1)
})

test('the file is read again at each swap', LIMIT, async (t) => {
  const path = wat(`(module ${answer('version', 1)})`)
  const manager = await managed(t, path)
  writeFileSync(path, `(module ${answer('version', 2)})`)
  await manager.reload()
  assert.equal(manager.exports.version?.(), 1)
  await manager.reload({ source: path })
  assert.equal(manager.exports.version?.(), 2)
})

test('all replicas swap as one generation', LIMIT, async (t) => {
  const manager = await managed(t, first, { instances: 4, threads: 2 })
  await manager.reload({ source: second })
  const held = await Promise.all([1, 2, 3, 4].map(() => manager.acquire()))
  assert.deepEqual(
    held.map((instance) => [instance.generation, instance.exports.version?.()]),
    [1, 2, 3, 4].map(() => [2, 2]),
  )
  for (const instance of held) instance.release()
})

// ---------------------------------------------------------------- what is in use

/** Each way to use a function named `used`. */
const USES: Record<string, (manager: WasmModuleManager, contexts: InstanceContext[]) => unknown> = {
  call: (manager) => manager.call('used'),
  callSync: (manager) => manager.callSync('used'),
  'its exports': (manager) => manager.exports.used?.(),
  'its exports, by destructuring': (manager) => {
    const { used } = manager.exports
    used?.()
  },
  "a lease's exports": (manager) => manager.use((instance) => instance.exports.used?.()),
  "a lease's call": (manager) => manager.use(async (instance) => await instance.call('used')),
  'an instance context': (_manager, contexts) => contexts[0]?.exports.used?.(),
}

for (const [path, use] of Object.entries(USES)) {
  test(`a function that was used through ${path} must be there with the same type`, LIMIT, async (t) => {
    const contexts: InstanceContext[] = []
    const options: ManagerOptions = {
      imports: (context) => {
        contexts.push(context)
        return {}
      },
    }
    const source = build(1, answer('used', 5) + answer('idle', 6))
    const manager = await managed(t, source, options)
    await use(manager, contexts)
    await failure(manager.reload({ source: second }), incompatible, /'used' .* is missing/)
    const other = build(3, answer('used', 5, 'i64'))
    await failure(manager.reload({ source: other }), incompatible, /'used' \(\) -> i32 is \(\) -> i64|'used'.*i32.*i64/)
    // One that nobody used may go, or change.
    const fits = build(4, answer('used', 7) + answer('idle', 8, 'f64'))
    assert.equal((await manager.reload({ source: fits })).generation, 2)
    assert.deepEqual([manager.exports.used?.(), manager.exports.idle?.()], [7, 8])
    // Used before the swap is used after it, and what is used of the new build counts from now on.
    await failure(manager.reload({ source: second }), incompatible, /'used'.*'idle'/)
  })
}

test('invoke uses its function and the allocator that it is given', LIMIT, async (t) => {
  const manager = await managed(t, buffers)
  const text = readFileSync(buffers, 'utf8')
  assert.deepEqual(await manager.invoke('reverse', Buffer.from('abc')), new Uint8Array(Buffer.from('cba')))
  for (const name of ['reverse', 'allocate', 'deallocate']) {
    const source = wat(text.replace(`(export "${name}")`, ''))
    await failure(manager.reload({ source }), incompatible, new RegExp(`'${name}'`))
  }
  const source = wat(text.replace('(export "reversePacked")', ''))
  await manager.reload({ source })
  assert.deepEqual(await manager.invoke('reverse', Buffer.from('abc')), new Uint8Array(Buffer.from('cba')))
})

test('a call that waits at the gate uses its function', LIMIT, async (t) => {
  const manager = await managed(t, build(1, answer('used', 5)))
  const lease = await manager.acquire()
  const waits = manager.call('used')
  await failure(manager.reload({ source: second }), incompatible, /'used'/)
  lease.release()
  assert.equal(await waits, 5)
})

test('the error lists everything that is missing, and nothing has been touched', LIMIT, async (t) => {
  const asked: string[] = []
  const one = answer('one', 1)
  const two = answer('two', 2)
  const manager = await managed(t, build(1, one + two), {
    instances: 2,
    imports: (context) => {
      asked.push(`imports ${context.generation}`)
      return {}
    },
    initialize: (instance) => void asked.push(`initialize ${instance.generation}`),
    saveState: () => void asked.push('save'),
    restoreState: () => void asked.push('restore'),
  })
  manager.exports.set?.(9)
  manager.exports.one?.()
  manager.exports.two?.()
  const { buffer } = manager.memory
  const before = [...asked]
  const events: unknown[] = []
  manager.on('reload:failed', (error) => events.push(error))
  const source = build(2, answer('two', 2, 'f32'), '')
  for (const reload of [() => manager.reload({ source }), () => thrownBy(() => manager.reloadSync({ source }))]) {
    const error = await failure(reload(), incompatible)
    for (const text of [/'one'/, /'two'/, /memory/]) assert.match(error.message, text)
    assert.equal(error.cause, undefined)
    assert.deepEqual([manager.generation, manager.state, manager.exports.peek?.()], [1, 'ready', 9])
    assert.equal(buffer.byteLength, PAGE)
    assert.deepEqual(asked, before)
  }
  await until(() => events.length === 2)
  assert.equal(manager.stats().reloadsFailed, 2)
  // And the build that does not fit is forgotten.
  await manager.reload()
  assert.equal(manager.exports.version?.(), 1)
})

test('a memory must be there if there was one, under whatever name, and may be new', LIMIT, async (t) => {
  const manager = await managed(t, first)
  manager.memory.write(0, 'x')
  await failure(manager.reload({ source: build(2, '', '') }), incompatible, /memory/)
  await manager.reload({ source: build(3, '', '(memory (export "other") 2)') })
  assert.equal(manager.memory.byteLength, 2 * PAGE)
  const none = await managed(t, build(1, '', ''))
  assert.equal(none.memory.byteLength, 0)
  await none.reload({ source: first })
  assert.equal(none.memory.byteLength, PAGE)
})

test('the imports that were given must do for the new build', LIMIT, async (t) => {
  const needs = (name: string, type: string) =>
    wat(`(module (import "env" "${name}" (func $f ${type})) (memory (export "memory") 1)
      (func (export "version") (result i32) (call $f)))`)
  const asked: number[] = []
  for (const imports of [
    { env: { six: () => 6 } },
    (context: InstanceContext) => {
      asked.push(context.generation)
      return { env: { six: () => 6 } }
    },
  ]) {
    const manager = await managed(t, first, { imports })
    assert.equal(manager.exports.version?.(), 1)
    manager.memory.write(0, 'x')
    const missing = await failure(manager.reload({ source: needs('seven', '(result i32)') }), incompatible, /seven/)
    hasCode('ERR_WASM_LINK', /seven/)(missing.cause)
    assert.deepEqual([manager.generation, manager.memory.readString(0, 1), manager.state], [1, 'x', 'ready'])
    const sync = await failure(
      thrownBy(() => manager.reloadSync({ source: needs('seven', '(result i32)') })),
      incompatible,
    )
    hasCode('ERR_WASM_LINK')(sync.cause)
  }
  const manager = await managed(t, first, { imports: { env: { six: () => 6 } } })
  manager.exports.version?.()
  await manager.reload({ source: needs('six', '(result i32)') })
  assert.equal(manager.exports.version?.(), 6)
})

// ---------------------------------------------------------------- sources that cannot be used

test('a source that cannot be read or compiled fails in phase instantiate, and says why', LIMIT, async (t) => {
  const manager = await managed(t, wat(`(module (memory (export "memory") 1) ${answer('version', 1)})`), {
    instances: 2,
    limits: { memoryBytes: 4 * PAGE },
  })
  const version = answer('version', 2)
  const cases: [ModuleSource, WasmErrorCode][] = [
    [join(temporaryFolder(), 'absent.wasm'), 'ERR_WASM_INVALID_ARGUMENT'],
    [wat('(module (func (export "f") (result i32)))'), 'ERR_WASM_COMPILE'],
    [new Uint8Array([1, 2, 3]), 'ERR_WASM_COMPILE'],
    [wat(`(module (func $s (unreachable)) (start $s) (memory (export "memory") 1) ${version})`), 'ERR_WASM_TRAP'],
    [wat(`(module (memory (export "memory") 9) ${version})`), 'ERR_WASM_INVALID_ARGUMENT'],
  ]
  for (const [source, code] of cases) {
    for (const reload of [
      () => manager.reload({ source }),
      () => manager.reload({ source, strategy: 'rolling' }),
      () => thrownBy(() => manager.reloadSync({ source })),
    ]) {
      const error = await failure(reload(), 'ERR_WASM_RELOAD_FAILED')
      assert.equal(error.phase, 'instantiate')
      hasCode(code)(error.cause)
      assert.deepEqual([manager.generation, manager.state], [1, 'ready'])
    }
  }
  assert.equal(manager.exports.version?.(), 1)
})

test('what is no source is refused before anything is begun', LIMIT, async (t) => {
  const manager = await managed(t, first)
  for (const source of [5, null, {}, new URL('https://example.org/x.wasm')] as unknown as ModuleSource[]) {
    await failure(manager.reload({ source }), 'ERR_WASM_INVALID_ARGUMENT')
    await failure(
      thrownBy(() => manager.reloadSync({ source })),
      'ERR_WASM_INVALID_ARGUMENT',
    )
  }
  assert.deepEqual([manager.generation, manager.stats().reloadsFailed], [1, 0])
})

test('a hook that fails rolls back to the old build, and the next attempt may succeed', LIMIT, async (t) => {
  const cause = new Error('not this build')
  let isArmed = true
  const manager = await managed(t, first, {
    ...keepCount,
    initialize: (instance) => {
      if (isArmed && instance.exports.version?.() === 2) throw cause
    },
  })
  manager.exports.set?.(3)
  const error = await failure(manager.reload({ source: second }), 'ERR_WASM_RELOAD_FAILED')
  assert.deepEqual([error.phase, error.cause === cause], ['initialize', true])
  assert.deepEqual([manager.exports.version?.(), manager.exports.count?.()], [1, 4])
  await manager.reload()
  assert.deepEqual([manager.exports.version?.(), manager.exports.peek?.()], [1, 4])
  isArmed = false
  await manager.reload({ source: second })
  assert.deepEqual([manager.exports.version?.(), manager.exports.peek?.()], [2, 4])
})

// ---------------------------------------------------------------- functions that are kept

test('manager.exports is live: the same object, with the functions of the build that serves', LIMIT, async (t) => {
  const manager = await managed(t, build(1, answer('gone', 1)))
  const { exports } = manager
  const { version, gone } = exports
  assert.deepEqual(Object.keys(exports).sort(), ['boom', 'count', 'gone', 'peek', 'set', 'version'])
  await manager.reload({ source: build(2, answer('fresh', 3)) })
  assert.ok(manager.exports === exports && exports.version === version)
  assert.deepEqual(Object.keys(exports).sort(), ['boom', 'count', 'fresh', 'peek', 'set', 'version'])
  assert.deepEqual(['gone' in exports, exports.gone, exports.fresh?.(), version?.()], [false, undefined, 3, 2])
  assert.throws(() => gone?.(), hasCode('ERR_WASM_EXPORT_NOT_FOUND', /gone/))
  await failure(manager.call('gone'), 'ERR_WASM_EXPORT_NOT_FOUND')
  assert.throws(() => manager.callSync('gone'), hasCode('ERR_WASM_EXPORT_NOT_FOUND'))
  await manager.use((instance) => assert.deepEqual(Object.keys(instance.exports).includes('gone'), false))
  assert.throws(() => {
    ;(exports as Record<string, unknown>).version = () => 0
  }, TypeError)
})

test('a function whose type has changed is another one', LIMIT, async (t) => {
  const manager = await managed(t, build(1, answer('shape', 1)))
  const before = manager.exports.shape
  await manager.reload({ source: build(2, answer('shape', 2, 'i64')) })
  assert.equal(manager.exports.shape?.(), 2n)
  assert.ok(manager.exports.shape !== before)
  assert.throws(() => before?.(), hasCode('ERR_WASM_EXPORT_NOT_FOUND'))
})

test('a build that comes back brings its functions back', LIMIT, async (t) => {
  const source = build(1, answer('gone', 1))
  const manager = await managed(t, source)
  for (let round = 0; round < 5; round += 1) {
    await manager.reload({ source: second })
    assert.equal('gone' in manager.exports, false)
    await manager.reload({ source })
    assert.equal('gone' in manager.exports, true)
    assert.equal(Object.keys(manager.exports).length, 6)
  }
  assert.deepEqual([manager.exports.gone?.(), await manager.call('gone')], [1, 1])
})

test('handles of the old build expire with it', LIMIT, async (t) => {
  const contexts: InstanceContext[] = []
  const manager = await managed(t, first, {
    imports: (context) => {
      contexts.push(context)
      return {}
    },
  })
  const { buffer } = manager.memory
  await manager.reload({ source: second })
  assert.equal(buffer.byteLength, 0)
  assert.throws(() => contexts[0]?.exports.version?.(), hasCode('ERR_WASM_STALE_HANDLE'))
  assert.equal(contexts[1]?.exports.version?.(), 2)
})

// ---------------------------------------------------------------- under load

test('calls that wait at the gate across the swap run in the new build, in order', LIMIT, async (t) => {
  const inside = barrier()
  const door = barrier()
  const manager = await managed(t, first, {
    saveState: async () => {
      inside.open()
      await door.promise
    },
  })
  const swap = manager.reload({ source: second })
  await inside.promise
  const waiting = [manager.call('version'), manager.call('count'), manager.use((i) => i.exports.version?.())]
  await turns()
  door.open()
  assert.equal((await swap).queued, 3)
  assert.deepEqual(await Promise.all(waiting), [2, 1, 2])
})

test('a rolling swap leaves leases on the old build and takes new calls to the new one', LIMIT, async (t) => {
  const manager = await managed(t, first)
  const lease = await manager.acquire()
  const { version } = manager.exports
  await manager.reload({ source: second, strategy: 'rolling' })
  assert.deepEqual([lease.exports.version?.(), await lease.call('version')], [1, 1])
  assert.deepEqual([version?.(), await manager.call('version')], [2, 2])
  lease.release()
})

test('swaps back and forth under load: each call runs in one build, none is lost', LIMIT, async (t) => {
  for (const strategy of ['exclusive', 'rolling'] as const) {
    const manager = await managed(t, first, { instances: 2, threads: 2 })
    let isDone = false
    const seen = new Set<unknown>()
    const caller = async () => {
      while (!isDone) {
        await manager.use(async (instance) => {
          const before = instance.exports.version?.()
          assert.equal(await instance.call('version'), before)
          assert.equal(before, instance.generation % 2 === 1 ? 1 : 2)
          seen.add(before)
        })
        await manager.call('version')
      }
    }
    const callers = [1, 2, 3, 4].map(caller)
    for (let i = 0; i < 20; i += 1) await manager.reload({ source: i % 2 === 0 ? second : first, strategy })
    isDone = true
    await Promise.all(callers)
    assert.deepEqual([...seen].sort(), [1, 2])
    assert.equal(manager.generation, 21)
  }
})

// ---------------------------------------------------------------- joining

test('a reload joins an equal one, unless another source was asked for in between', LIMIT, async (t) => {
  const manager = await managed(t, first)
  const lease = await manager.acquire()
  const asked: Promise<ReloadReport>[] = [
    manager.reload(),
    manager.reload({ source: second }),
    manager.reload({ source: second }),
    manager.reload({ source: first }),
    manager.reload({ source: second }),
    manager.reload(),
    manager.reload(),
  ]
  lease.release()
  const generations = (await Promise.all(asked)).map((report) => report.generation)
  assert.deepEqual(generations, [2, 3, 3, 4, 5, 6, 6])
  assert.equal(manager.exports.version?.(), 2)
})

test('equal bytes are the same source, other bytes another', LIMIT, async (t) => {
  const bytes = inBytes(1)
  const other = inBytes(2)
  const manager = await managed(t, bytes)
  const lease = await manager.acquire()
  const asked = [bytes.slice(), bytes.slice(), other].map((source) => manager.reload({ source }))
  lease.release()
  assert.deepEqual(
    (await Promise.all(asked)).map((report) => report.generation),
    [2, 2, 3],
  )
})
