// Any value at any place of the public interface: an error that says what is wrong, what the value itself has thrown, or
// the right answer; and the manager answers on.
import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { after, before, test } from 'node:test'
import * as molt from '../index.js'
import { adder, temporaryFolder, wat } from './guests.ts'
import { Dice, hostileValues, Mischief, shown } from './hostile-values.ts'
import { child, reported, WasmError, WasmModuleManager } from './support.ts'

/** Thousands of managers are made here. */
const LIMIT = { timeout: 110_000 }

const guest = wat(
  `(module
    (memory (export "memory") 1 16)
    (global $at (mut i32) (i32.const 1024))
    (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
    (func (export "i64") (param i64) (result i64) (local.get 0))
    (func (export "f32") (param f32) (result f32) (local.get 0))
    (func (export "f64") (param f64) (result f64) (local.get 0))
    (func (export "held") (param externref) (result externref) (local.get 0))
    (func (export "func") (param funcref) (result funcref) (local.get 0))
    (func (export "spin") (param i32) (loop (br 0)))
    (func (export "vector") (param v128) (result v128) (local.get 0))
    (func (export "allocate") (param i32) (result i32) (i32.const 2048))
    (func (export "deallocate") (param i32 i32))
    (func (export "echo") (param i32 i32 i32) (result i32)
      (i32.store (local.get 2) (i32.const 0)) (local.get 0)))`,
  'hostile',
)

/** For those of which thousands are made. */
const little = adder()

let manager: WasmModuleManager
before(async () => {
  manager = await WasmModuleManager.create(guest, { cache: false, instances: 2 })
})
after(() => manager.destroy())

const isAlive = () => assert.equal(manager.callSync('add', [2, 3]), 5)
const values = hostileValues(() => manager.callSync('add', [20, 1]))

/** Constructors of errors that JavaScript itself, or the JS API, answers with. */
const plain = [
  TypeError,
  RangeError,
  SyntaxError,
  WebAssembly.LinkError,
  WebAssembly.CompileError,
  WebAssembly.RuntimeError,
]

/** An error that may come of a mistake: it has a message, and is no fault of ours. */
function assertProper(error: unknown, what: string): void {
  if (error instanceof Mischief) return
  assert.ok(error instanceof Error, `${what} threw ${shown(error)}`)
  assert.notEqual(error.message, '', `${what} threw an error without a message`)
  if (error instanceof WasmError) assert.notEqual(error.code, 'ERR_WASM_INTERNAL', `${what}: ${error.message}`)
  else assert.ok(plain.some((Plain) => error instanceof Plain) || 'code' in error, `${what} threw ${shown(error)}`)
}

/** Does it, and has whatever was made end again. */
async function attempt(what: string, act: () => unknown): Promise<unknown> {
  let made: unknown
  try {
    made = await act()
  } catch (error) {
    assertProper(error, what)
    return error
  }
  if (made === manager) return undefined
  if (made instanceof WasmModuleManager) await made.destroy()
  else if (typeof made === 'object' && made !== null && 'release' in made && typeof made.release === 'function')
    made.release()
  return undefined
}

// Rejections that nobody hears would end the process of whoever uses the package.
const unheard: unknown[] = []
process.on('unhandledRejection', (reason) => unheard.push(reason))
const turn = () => new Promise((resolve) => setImmediate(resolve))

/** Options by their place: how to give one, and which keys there are. */
const optionKeys: [string, string[], (options: object) => unknown][] = [
  [
    'createSync',
    [
      ...[
        'name',
        'instances',
        'threads',
        'imports',
        'initialize',
        'saveState',
        'restoreState',
        'abi',
        'limits',
        'maxQueue',
      ],
      ...['cache', 'engine', 'isolation', 'snapshots', 'reseed', 'recycle', 'unheardOf'],
    ],
    (options) => WasmModuleManager.createSync(little, { cache: false, ...keep(options) }),
  ],
  [
    'createSync limits',
    ['memoryBytes', 'tableElements', 'timeoutMs', 'fuel', 'stackBytes', 'unheardOf'],
    (limits) => WasmModuleManager.createSync(little, { cache: false, engine: { fuel: true }, limits }),
  ],
  [
    'createSync engine',
    [
      ...['interruptible', 'fuel', 'signalsBasedTraps', 'simd', 'relaxedSimd', 'threads', 'memoryReservationBytes'],
      'unheardOf',
    ],
    (engine) => WasmModuleManager.createSync(little, { cache: false, engine }),
  ],
  [
    'createSync recycle',
    ['memory', 'calls', 'ageMs', 'onTrap', 'predict', 'jitter', 'strategy', 'backoff', 'unheardOf'],
    (recycle) => WasmModuleManager.createSync(little, { cache: false, recycle }),
  ],
  [
    'createSync recycle.backoff',
    ['initialMs', 'maxMs', 'unheardOf'],
    (backoff) => WasmModuleManager.createSync(little, { cache: false, recycle: { backoff } }),
  ],
  [
    'createSync abi',
    ['allocate', 'deallocate', 'returns', 'unheardOf'],
    (abi) => WasmModuleManager.createSync(little, { cache: false, abi }),
  ],
  [
    'createSync snapshots',
    ['images', 'prepare', 'unheardOf'],
    (snapshots) => WasmModuleManager.createSync(little, { cache: false, snapshots }),
  ],
  ['call', ['signal', 'timeoutMs', 'unheardOf'], (options) => manager.call('add', [1, 2], options)],
  ['invoke', ['signal', 'timeoutMs', 'unheardOf'], (options) => manager.invoke('echo', new Uint8Array(8), options)],
  ['acquire', ['signal', 'unheardOf'], (options) => manager.acquire(options)],
  ['use', ['signal', 'unheardOf'], (options) => manager.use(() => 1, options)],
  [
    'reload',
    ['reason', 'drainTimeoutMs', 'onDrainTimeout', 'skipSave', 'strategy', 'source', 'unheardOf'],
    (options) => manager.reload(options),
  ],
  [
    'reloadSync',
    ['reason', 'drainTimeoutMs', 'onDrainTimeout', 'skipSave', 'strategy', 'source', 'unheardOf'],
    (options) => manager.reloadSync(options),
  ],
  ['snapshot', ['signal', 'unheardOf'], (options) => manager.snapshot(options)],
  ['reset', ['to', 'drainTimeoutMs', 'onDrainTimeout', 'unheardOf'], (options) => manager.reset(options)],
  ['resetSync', ['to', 'drainTimeoutMs', 'onDrainTimeout', 'unheardOf'], (options) => manager.resetSync(options)],
  ['fork', ['name', 'imports', 'limits', 'recycle', 'unheardOf'], (options) => manager.fork(options)],
  ['stats', ['pages', 'unheardOf'], (options) => manager.stats(options)],
  [
    'loadGlue',
    [
      ...['initialize', 'saveState', 'restoreState', 'expose', 'include', 'parentURL', 'name', 'threads', 'limits'],
      ...['maxQueue', 'cache', 'engine', 'snapshots', 'threadPool', 'recycle', 'unheardOf'],
    ],
    (options) => molt.loadGlue(glue, { cache: false, ...keep(options) }),
  ],
]

/** What is called otherwise in its errors. */
const called: Record<string, RegExp> = { source: /source|the module/ }

/** The same with its getters; a spread would run them here. */
function keep(options: object): object {
  return options
}

const glue = wat('', 'glue').replace(/guest\.wat$|glue\.wat$/, 'glue.cjs')

before(() => {
  writeFileSync(glue, 'exports.add = (a, b) => a + b')
  // A cache folder is a text, and any text is a folder.
  process.chdir(temporaryFolder('cwd'))
})

for (const [place, keys, give] of optionKeys) {
  test(`every option of ${place}, given every hostile value, is refused by its name or obeyed`, LIMIT, async () => {
    // Else there would be nothing to reset to.
    const snapshot = await manager.snapshot()
    for (const key of keys) {
      for (const [name, make] of values) {
        const what = `${place} with ${key}: ${name}`
        const error = await attempt(what, () => give({ [key]: make() }))
        if (key === 'unheardOf' && name !== 'undefined') {
          assert.ok(
            error instanceof WasmError && error.code === 'ERR_WASM_INVALID_ARGUMENT',
            `${what}: ${shown(error)}`,
          )
        }
        if (error instanceof WasmError && error.code === 'ERR_WASM_INVALID_ARGUMENT') {
          assert.match(error.message, called[key] ?? new RegExp(key), `${what} does not name it`)
        }
      }
    }
    snapshot.release()
    isAlive()
    await turn()
    assert.deepEqual(unheard, [])
  })
}

test('what is no options object at all is refused as such', LIMIT, async () => {
  for (const [place, , give] of optionKeys) {
    for (const [name, make] of values) {
      const options = make()
      await attempt(`${place} with ${name}`, () => give(options as object))
    }
    isAlive()
  }
  await turn()
  assert.deepEqual(unheard, [])
})

test('an option whose getter throws hands on what it threw, and one that goes back in is heard', LIMIT, async () => {
  for (const [place, keys, give] of optionKeys) {
    for (const key of keys.filter((key) => key !== 'unheardOf')) {
      const thrown = new Mischief(key)
      const options = Object.defineProperty({}, key, {
        enumerable: true,
        get() {
          throw thrown
        },
      })
      assert.equal(await attempt(`${place} with ${key}`, () => give(options)), thrown, `${place} with ${key}`)
      let asked = 0
      const reentering = Object.defineProperty({}, key, {
        enumerable: true,
        get() {
          asked += 1
          isAlive()
          return undefined
        },
      })
      await attempt(`${place} with ${key}`, () => give(reentering))
      assert.ok(asked > 0, `${place} never asks for ${key}`)
    }
  }
})

/** What JavaScript itself makes of an argument, before the guest sees it. */
const coerced: Record<string, (value: unknown) => unknown> = {
  i64: (value) => BigInt.asIntN(64, new BigInt64Array([value as bigint])[0] as bigint),
  f32: (value) => Math.fround(+(value as number)),
  f64: (value) => +(value as number),
  held: (value) => value,
}

test('every argument is coerced as JavaScript coerces it, or refused before anything runs', LIMIT, async () => {
  for (const [name, coerce] of Object.entries(coerced)) {
    for (const [value, make] of values) {
      for (const way of ['exports', 'callSync', 'call'] as const) {
        // A promise looks whether what it is resolved with is one, too, which runs its code.
        if (way === 'call' && name === 'held') continue
        const given = make()
        const what = `${way} ${name} with ${value}`
        let expected: unknown
        let refusal: unknown
        try {
          expected = coerce(given)
        } catch (error) {
          refusal = error
        }
        let answer: unknown
        let failure: unknown
        try {
          if (way === 'exports') answer = manager.exports[name]?.(given)
          else if (way === 'callSync') answer = manager.callSync(name, [given])
          else answer = await manager.call(name, [given])
        } catch (error) {
          failure = error
        }
        if (refusal === undefined) {
          assert.equal(failure, undefined, `${what}: ${shown(failure)}`)
          if (way !== 'call' || !(given instanceof Promise))
            assert.ok(Object.is(answer, expected), `${what}: ${shown(answer)}`)
        } else {
          assert.ok(failure !== undefined, `${what} was taken`)
          assert.equal((failure as Error).constructor, (refusal as Error).constructor, what)
        }
      }
    }
    isAlive()
  }
  for (const [value, make] of values) {
    const given = make()
    for (const call of [() => manager.exports.func?.(given), () => manager.callSync('func', [given])]) {
      if (given === null) assert.equal(call(), null)
      else assert.throws(call, TypeError, value)
    }
    assert.throws(() => manager.exports.vector?.(given), TypeError)
  }
})

test('every name, argument list and input is taken or refused with words', LIMIT, async () => {
  const places: [string, (value: never, other: never) => unknown][] = [
    ['createSync', (value) => WasmModuleManager.createSync(value, { cache: false })],
    ['create', (value) => WasmModuleManager.create(value, { cache: false })],
    [
      'new',
      (value, other) => new (WasmModuleManager as never as new (a: unknown, b: unknown) => unknown)(value, other),
    ],
    ['call', (value, other) => manager.call(value, other)],
    ['call args', (value) => manager.call('add', value)],
    ['callSync', (value, other) => manager.callSync(value, other)],
    ['callSync args', (value) => manager.callSync('add', value)],
    ['invoke', (value, other) => manager.invoke(value, other)],
    ['invoke input', (value) => manager.invoke('echo', value)],
    ['use', (value) => manager.use(value)],
    ['exports', (value) => (manager.exports as Record<PropertyKey, unknown>)[value]],
    ['read', (value, other) => manager.memory.read(value, other)],
    ['readString', (value, other) => manager.memory.readString(value, other)],
    ['write', (value, other) => manager.memory.write(value, other)],
    ['write bytes', (value) => manager.memory.write(0, value)],
    ['setMemoryBudget', (value) => molt.setMemoryBudget(value)],
    ['loadGlue', (value) => molt.loadGlue(value, { cache: false })],
    ['readiness', (value) => molt.readiness(value)],
    ['reload source', (value) => manager.reload({ source: value })],
    ['on', (value, other) => manager.on(value, other)],
    ['reset to', (value) => manager.reset({ to: value })],
    ['WebAssembly.validate', (value) => molt.WebAssembly.validate(value)],
    ['WebAssembly.compile', (value) => molt.WebAssembly.compile(value)],
    ['WebAssembly.instantiate', (value, other) => molt.WebAssembly.instantiate(value, other)],
    ['new Module', (value) => new molt.WebAssembly.Module(value)],
    ['new Instance', (value, other) => new molt.WebAssembly.Instance(value, other)],
    ['new Memory', (value) => new molt.WebAssembly.Memory(value)],
    ['new Table', (value, other) => new molt.WebAssembly.Table(value, other)],
    ['new Global', (value, other) => new molt.WebAssembly.Global(value, other)],
  ]
  // A listener that is called with nothing, and the budget, would outlive this test.
  const dice = new Dice()
  console.log(`WASM_MOLT_SEED=${dice.seed}`)
  for (const [place, act] of places) {
    for (const [name, make] of values) {
      const [other, makeOther] = dice.pick(values)
      const what = `${place}: ${name}, ${other} (seed ${dice.seed})`
      await attempt(what, () => act(make() as never, makeOther() as never))
      if (place === 'setMemoryBudget') molt.setMemoryBudget(null)
      if (place === 'on') manager.removeAllListeners()
    }
    isAlive()
  }
  await turn()
  assert.deepEqual(unheard, [])
})

test('a signal that is aborted by what an argument does, while it is converted, stops the call', LIMIT, async () => {
  const reason = new Mischief('aborted meanwhile')
  const controller = new AbortController()
  const aborts = {
    valueOf() {
      controller.abort(reason)
      return 1
    },
  }
  const call = manager.call('spin', [aborts as never], { signal: controller.signal })
  await assert.rejects(call, (error) => error === reason)
  isAlive()
})

test('methods are of their own objects, and say so to others', LIMIT, async () => {
  const snapshot = await manager.snapshot()
  const lease = await manager.acquire()
  const objects: [string, object][] = [
    ['manager', manager],
    ['memory', manager.memory],
    ['lease', lease],
    ['snapshot', snapshot],
  ]
  for (const [name, object] of objects) {
    const prototype = Object.getPrototypeOf(object)
    for (const key of Reflect.ownKeys(prototype)) {
      const { get, value } = Object.getOwnPropertyDescriptor(prototype, key) as PropertyDescriptor
      const method = get ?? value
      if (key === 'constructor' || typeof method !== 'function') continue
      for (const [other, make] of values) {
        const what = `${name}.${String(key)} of ${other}`
        const error = await attempt(what, () => Reflect.apply(method, make(), []))
        // What has a release() of its own is released.
        const isLike = /dispose/.test(String(key)) && other === 'an object that has everything'
        assert.ok(error !== undefined || isLike, `${what} went well`)
      }
    }
  }
  lease.release()
  snapshot.release()
  isAlive()
  await turn()
  assert.deepEqual(unheard, [])
})

test('random objects of options, with everything in them', LIMIT, async () => {
  const dice = new Dice()
  console.log(`WASM_MOLT_SEED=${dice.seed}`)
  for (let round = 0; round < 200; round += 1) {
    const [place, keys, give] = dice.pick(optionKeys)
    const options: Record<string, unknown> = dice.roll(4) === 0 ? Object.create(null) : {}
    const said: string[] = []
    for (let count = dice.roll(5); count > 0; count -= 1) {
      const key = dice.pick(keys)
      const [name, make] = dice.pick(values)
      said.push(`${key}: ${name}`)
      const found = dice.roll(5) > 0 ? { value: make() } : { get: make }
      Object.defineProperty(options, key, { configurable: true, enumerable: dice.roll(4) > 0, ...found })
    }
    await attempt(`seed ${dice.seed}, round ${round}: ${place} with { ${said.join(', ')} }`, () => give(options))
    isAlive()
  }
  await turn()
  assert.deepEqual(unheard, [])
})

test('a polluted prototype is what it is to any JavaScript, and harms nobody', LIMIT, async () => {
  const keys = ['limits', 'engine', 'instances', 'get', 'value', 'then', 'signal', 'source', 'code', 'constructor', '0']
  const ended = await child(
    `
    const keys = ${JSON.stringify(keys)}
    const text = ${JSON.stringify(guest)}
    const manager = WasmModuleManager.createSync(text, { cache: false })
    const seen = []
    for (const key of keys) {
      for (const value of [1, 'text', null, () => 1, Symbol('hostile')]) {
        const before = Object.getOwnPropertyDescriptor(Object.prototype, key)
        Object.defineProperty(Object.prototype, key, { value, configurable: true, writable: true, enumerable: false })
        try {
          WasmModuleManager.createSync(text, { cache: false }).destroy()
          manager.callSync('add', [1, 2])
          manager.exports.add(1, 2)
          manager.reloadSync()
          manager.snapshotSync().release()
          manager.memory.read(0, 8)
        } catch (error) {
          seen.push(error.code ?? error.constructor.name)
        } finally {
          if (before) Object.defineProperty(Object.prototype, key, before)
          else delete Object.prototype[key]
        }
        assert.equal(manager.callSync('add', [2, 3]), 5)
      }
    }
    await manager.destroy()
    report(seen)`,
  )
  const seen = reported<string[]>(ended)
  for (const what of seen) assert.ok(['ERR_WASM_INVALID_ARGUMENT', 'TypeError'].includes(what), what)
})
