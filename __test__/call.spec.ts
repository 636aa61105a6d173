// Calls: values of every type, coerced exactly as the WebAssembly JS API coerces.
// The measure is Node's own engine: the same module, the same odd values, the same answers.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { WasmModuleManager, WasmValue } from '../index.js'
import { binary, buffers, type ValueType, wat } from './guests.ts'
import { type AnyFunction, bench, child, hasCode, LIMIT, managed, outcome, reported, WasmError } from './support.ts'

// ---------------------------------------------------------------- against Node's own engine

const NUMERIC = ['i32', 'i64', 'f32', 'f64'] as const
const PASSING = [...NUMERIC, 'externref'] as const

/** Echoes each type; takes and gives each type through imports; mixes them. */
const MODULE = binary({
  imports: [
    ...PASSING.map((type) => ({ name: `give_${type}`, params: [], results: [type] as ValueType[] })),
    ...PASSING.map((type) => ({ name: `take_${type}`, params: [type] as ValueType[], results: [] })),
    { name: 'give_pair', params: [], results: ['i32', 'i64'] },
    { name: 'give_none', params: [], results: [] },
  ],
  functions: [
    ...PASSING.map((type) => ({
      name: `echo_${type}`,
      params: [type] as ValueType[],
      results: [type] as ValueType[],
      body: [0x20, 0],
    })),
    ...PASSING.map((type, index) => ({
      name: `from_import_${type}`,
      params: [],
      results: [type] as ValueType[],
      body: [0x10, index],
    })),
    ...PASSING.map((type, index) => ({
      name: `to_import_${type}`,
      params: [type] as ValueType[],
      results: [],
      body: [0x20, 0, 0x10, PASSING.length + index],
    })),
    { name: 'pair_from_import', params: [], results: ['i32', 'i64'], body: [0x10, 2 * PASSING.length] },
    { name: 'none_from_import', params: [], results: [], body: [0x10, 2 * PASSING.length + 1] },
    {
      name: 'rotate',
      params: ['i32', 'i64', 'f32', 'f64'],
      results: ['f64', 'f32', 'i64', 'i32'],
      body: [0x20, 3, 0x20, 2, 0x20, 1, 0x20, 0],
    },
    { name: 'nothing', params: [], results: [], body: [] },
    { name: 'two', params: ['i32', 'i32'], results: ['i32', 'i32'], body: [0x20, 1, 0x20, 0] },
    {
      name: 'seventeen',
      params: Array<ValueType>(17).fill('i32'),
      results: ['i32'],
      body: [0x20, 0, ...Array.from({ length: 16 }, (_, i) => [0x41, 3, 0x6c, 0x20, i + 1, 0x6a]).flat()],
    },
    {
      name: 'mixed20',
      params: Array.from({ length: 20 }, (_, i) => NUMERIC[i % 4] as ValueType),
      results: Array.from({ length: 20 }, (_, i) => NUMERIC[(19 - i) % 4] as ValueType),
      body: Array.from({ length: 20 }, (_, i) => [0x20, 19 - i]).flat(),
    },
  ],
})

const thrown = new Error('from valueOf')
const symbol = Symbol('s')
const someFunction = () => 1
const someObject = { a: 1 }

/** Values of every odd kind; made afresh where they keep count. */
const ODD: [string, () => unknown][] = [
  ['0', () => 0],
  ['-0', () => -0],
  ['1', () => 1],
  ['-1', () => -1],
  ['1.9', () => 1.9],
  ['-1.9', () => -1.9],
  ['2**31', () => 2 ** 31],
  ['2**31-1', () => 2 ** 31 - 1],
  ['-(2**31)', () => -(2 ** 31)],
  ['2**32', () => 2 ** 32],
  ['2**32+5', () => 2 ** 32 + 5],
  ['2**53', () => 2 ** 53],
  ['2**53+2', () => 2 ** 53 + 2],
  ['2**63', () => 2 ** 63],
  ['1e300', () => 1e300],
  ['5e-324', () => 5e-324],
  ['0.1', () => 0.1],
  ['16777217', () => 16_777_217],
  ['3.5e38', () => 3.5e38],
  ['NaN', () => Number.NaN],
  ['Infinity', () => Number.POSITIVE_INFINITY],
  ['-Infinity', () => Number.NEGATIVE_INFINITY],
  ["'7'", () => '7'],
  ["' 0x10 '", () => ' 0x10 '],
  ["''", () => ''],
  ["'seven'", () => 'seven'],
  ["'9007199254740993'", () => '9007199254740993'],
  ['true', () => true],
  ['false', () => false],
  ['null', () => null],
  ['undefined', () => undefined],
  ['[]', () => []],
  ['[5]', () => [5]],
  ['[1, 2]', () => [1, 2]],
  ['{}', () => someObject],
  ['a function', () => someFunction],
  ['a Date', () => new Date(12_345)],
  ['valueOf 42.7', () => ({ valueOf: () => 42.7 })],
  ['valueOf a bigint', () => ({ valueOf: () => 42n })],
  ['valueOf a string', () => ({ valueOf: () => '43' })],
  ['valueOf a symbol', () => ({ valueOf: () => symbol })],
  ['toString 44', () => ({ valueOf: () => ({}), toString: () => '44' })],
  ['no primitive', () => ({ valueOf: () => ({}), toString: () => ({}) })],
  ['Symbol.toPrimitive', () => ({ [Symbol.toPrimitive]: (hint: string) => (hint === 'number' ? 45 : 'no') })],
  [
    'valueOf throws',
    () => ({
      valueOf: () => {
        throw thrown
      },
    }),
  ],
  ['a symbol', () => symbol],
  ['0n', () => 0n],
  ['-1n', () => -1n],
  ['2n**63n', () => 2n ** 63n],
  ['2n**64n+5n', () => 2n ** 64n + 5n],
  ['-(2n**63n)-1n', () => -(2n ** 63n) - 1n],
  ['a huge bigint', () => -(2n ** 200n) + 77n],
  ['Object(5n)', () => Object(5n)],
  ['new Number(6)', () => Object(6)],
]

/** What happened, comparable: -0 and NaN are themselves, objects are by identity. */
type Happened = { value: unknown } | { error: unknown } | { error: string }

function settle(run: () => unknown): Happened {
  try {
    return { value: run() }
  } catch (error) {
    return failed(error)
  }
}

/** Errors of the engines are compared by class, other objects by identity. */
function failed(error: unknown): Happened {
  if (error === thrown) return { error }
  return { error: error instanceof Error ? error.constructor.name : error }
}

const settleLater = async (run: () => Promise<unknown>): Promise<Happened> => {
  try {
    return { value: await run() }
  } catch (error) {
    return failed(error)
  }
}

function same(label: string, ours: Happened, theirs: Happened) {
  const show = (h: Happened) => ('value' in h ? `value ${show1(h.value)}` : `error ${show1(h.error)}`)
  const show1 = (v: unknown): string =>
    Array.isArray(v)
      ? `[${v.map(show1).join(', ')}]`
      : Object.is(v, -0)
        ? '-0'
        : typeof v === 'bigint'
          ? `${v}n`
          : typeof v === 'object' && v !== null
            ? 'an object'
            : String(v)
  const equal = (a: unknown, b: unknown): boolean =>
    Object.is(a, b) ||
    (Array.isArray(a) && Array.isArray(b) && a.length === b.length && a.every((v, i) => equal(v, b[i])))
  const isSame =
    'value' in ours && 'value' in theirs
      ? equal(ours.value, theirs.value)
      : 'error' in ours && 'error' in theirs && Object.is(ours.error, theirs.error)
  assert.ok(isSame, `${label}: ours ${show(ours)}, V8's ${show(theirs)}`)
}

interface Pair {
  ours: WasmModuleManager
  theirs: Record<string, AnyFunction>
  /** What the imports give back, and what they were given last. */
  give: { value: unknown }
  taken: unknown[]
}

async function pair(t: Parameters<typeof managed>[0]): Promise<Pair> {
  const give: { value: unknown } = { value: undefined }
  const taken: unknown[] = []
  const env: Record<string, (...args: unknown[]) => unknown> = {
    give_pair: () => give.value,
    give_none: () => give.value,
  }
  for (const type of PASSING) {
    env[`give_${type}`] = () => give.value
    env[`take_${type}`] = (...args) => void taken.push(...args)
  }
  const imports = { env }
  const ours = await managed(t, MODULE, { imports })
  const module = new WebAssembly.Module(MODULE)
  const theirs = new WebAssembly.Instance(module, imports as WebAssembly.Imports).exports as Record<string, AnyFunction>
  return { ours, theirs, give, taken }
}

for (const type of PASSING) {
  test(`arguments and results of type ${type} are coerced as V8 coerces them, on every path`, LIMIT, async (t) => {
    const { ours, theirs } = await pair(t)
    const name = `echo_${type}`
    const lease = await ours.acquire()
    for (const [label, make] of ODD) {
      const value = make() as WasmValue
      const expected = settle(() => theirs[name]?.(value))
      same(
        `lease.exports.${name}(${label})`,
        settle(() => lease.exports[name]?.(value)),
        expected,
      )
      same(`lease.call ${name}(${label})`, await settleLater(() => lease.call(name, [value])), expected)
    }
    lease.release()
    for (const [label, make] of ODD) {
      const value = make() as WasmValue
      const expected = settle(() => theirs[name]?.(value))
      same(
        `exports.${name}(${label})`,
        settle(() => ours.exports[name]?.(value)),
        expected,
      )
      same(
        `callSync ${name}(${label})`,
        settle(() => ours.callSync(name, [value])),
        expected,
      )
      same(`call ${name}(${label})`, await settleLater(() => ours.call(name, [value])), expected)
    }
  })

  test(
    `what imports are given and give back as ${type} is coerced as V8 coerces it, on both paths`,
    LIMIT,
    async (t) => {
      const { ours, theirs, give, taken } = await pair(t)
      for (const [label, make] of ODD) {
        give.value = make()
        const expected = settle(() => theirs[`from_import_${type}`]?.())
        same(
          `import gives ${label}`,
          settle(() => ours.exports[`from_import_${type}`]?.()),
          expected,
        )
        same(`import gives ${label} to the pool`, await settleLater(() => ours.call(`from_import_${type}`)), expected)
        // A promise of the value is the value, for a call on the pool. (Objects with `then` are none of the table.)
        const { value } = give
        give.value = Promise.resolve(value)
        if (type !== 'externref') {
          same(`import promises ${label}`, await settleLater(() => ours.call(`from_import_${type}`)), expected)
        }
        const argument = make() as WasmValue
        const take = (run: () => unknown) => {
          taken.length = 0
          const happened = settle(run)
          return 'value' in happened ? { value: [...taken] } : happened
        }
        const given = take(() => theirs[`to_import_${type}`]?.(argument))
        same(
          `import takes ${label}`,
          take(() => ours.exports[`to_import_${type}`]?.(argument)),
          given,
        )
        taken.length = 0
        const later = await settleLater(() => ours.call(`to_import_${type}`, [argument]))
        same(`import takes ${label} on the pool`, 'value' in later ? { value: [...taken] } : later, given)
      }
      assert.equal(ours.generation, 1)
    },
  )
}

test('missing arguments are undefined, superfluous ones are ignored, as in V8', LIMIT, async (t) => {
  const { ours, theirs } = await pair(t)
  const cases: [string, unknown[]][] = [
    ['two', []],
    ['two', [1]],
    ['two', [1, 2, 3, 4]],
    ['nothing', [1, 2]],
    ['echo_i32', []],
    ['echo_f64', []],
    ['echo_i64', []],
    ['echo_externref', []],
    ['rotate', [1]],
    ['rotate', [1, 2n, 3.25, 4.5]],
    ['rotate', ['1', true, '0.5', null]],
    ['seventeen', Array.from({ length: 17 }, (_, i) => i + 1)],
    ['seventeen', Array.from({ length: 10 }, (_, i) => i + 1)],
    ['seventeen', Array.from({ length: 30 }, (_, i) => i + 1)],
    ['mixed20', Array.from({ length: 20 }, (_, i) => (i % 4 === 1 ? BigInt(i) * -7n : i * 1.5))],
    ['mixed20', Array.from({ length: 20 }, (_, i) => (i % 4 === 1 ? 1n : i))],
    ['mixed20', [1]],
  ]
  for (const [name, values] of cases) {
    const args = values as WasmValue[]
    const expected = settle(() => theirs[name]?.(...args))
    const label = `${name}(${args.map(String).join(', ')})`
    same(
      `exports.${label}`,
      settle(() => ours.exports[name]?.(...args)),
      expected,
    )
    same(
      `callSync ${label}`,
      settle(() => ours.callSync(name, args)),
      expected,
    )
    same(`call ${label}`, await settleLater(() => ours.call(name, args)), expected)
  }
})

test('no result is undefined, one is the value, several are an array', LIMIT, async (t) => {
  const { ours } = await pair(t)
  for (const run of [
    async (name: string, args: WasmValue[]) => ours.exports[name]?.(...args),
    async (name: string, args: WasmValue[]) => ours.callSync(name, args),
    async (name: string, args: WasmValue[]) => await ours.call(name, args),
  ]) {
    assert.equal(await run('nothing', []), undefined)
    assert.equal(await run('echo_i32', [5]), 5)
    const several = await run('two', [1, 2])
    assert.ok(Array.isArray(several))
    assert.deepEqual(several, [2, 1])
  }
})

test('several results of an import come from any iterable, of the right length, as in V8', LIMIT, async (t) => {
  const { ours, theirs, give } = await pair(t)
  const cases: [string, () => unknown][] = [
    ['an array', () => [1, 2n]],
    ['values to coerce', () => ['3', true]],
    ['a Set', () => new Set<unknown>([4, 5n])],
    [
      'a generator',
      function* () {
        yield 6
        yield 7n
      },
    ],
    ['a Map', () => new Map<unknown, unknown>([[1, 2]])],
    ['too few', () => [1]],
    ['too many', () => [1, 2n, 3]],
    ['none', () => []],
    ['a string', () => '12'],
    ['a number', () => 5],
    ['undefined', () => undefined],
    ['null', () => null],
    ['an object', () => ({})],
    ['the wrong type', () => [1, 2]],
    ['an array-like', () => ({ length: 2, 0: 1, 1: 2n })],
    [
      'an iterator that throws',
      function* () {
        yield 1
        throw thrown
      },
    ],
  ]
  for (const [label, make] of cases) {
    give.value = make()
    const expected = settle(() => theirs.pair_from_import?.())
    give.value = make()
    same(
      `exports: ${label}`,
      settle(() => ours.exports.pair_from_import?.()),
      expected,
    )
    give.value = make()
    same(`call: ${label}`, await settleLater(() => ours.call('pair_from_import')), expected)
    const value = make()
    give.value = Promise.resolve(value)
    same(`promised: ${label}`, await settleLater(() => ours.call('pair_from_import')), expected)
  }
  assert.equal(ours.generation, 1)
})

test('an import without results may return anything', LIMIT, async (t) => {
  const { ours, give } = await pair(t)
  for (const [, make] of ODD) {
    give.value = make()
    assert.equal(ours.exports.none_from_import?.(), undefined)
    assert.equal(await ours.call('none_from_import'), undefined)
  }
})

test('arguments are coerced in order, once each, before the guest runs, as in V8', LIMIT, async (t) => {
  const { ours, theirs } = await pair(t)
  const trace = (run: (args: WasmValue[]) => unknown) => {
    const order: string[] = []
    const noted = (name: string, value: number | bigint) => ({
      valueOf: () => {
        order.push(name)
        return value
      },
    })
    const args = [noted('a', 1), noted('b', 2n), noted('c', 3), noted('d', 4)]
    return { result: run(args), order }
  }
  const expected = trace((args) => theirs.rotate?.(...args))
  assert.deepEqual(
    trace((args) => ours.exports.rotate?.(...args)),
    expected,
  )
  assert.deepEqual(
    trace((args) => ours.callSync('rotate', args)),
    expected,
  )
  const { result, order } = trace((args) => ours.call('rotate', args))
  assert.deepEqual({ result: await (result as Promise<unknown>), order }, expected)
})

test('coercion that calls back into the manager is not caught between two stools', LIMIT, async (t) => {
  const { ours } = await pair(t)
  const nested = { valueOf: () => (ours.exports.echo_i32?.(20) as number) + 1 }
  assert.equal(ours.exports.echo_i32?.(nested), 21)
  assert.equal(await ours.call('echo_i32', [nested]), 21)
  const reloading = {
    valueOf: () => {
      ours.reloadSync()
      return 5
    },
  }
  assert.equal(ours.exports.echo_i32?.(reloading), 5)
  assert.equal(ours.generation, 2)
})

test('an argument array is read at the call, holes and all; something else is refused', LIMIT, async (t) => {
  const { ours } = await pair(t)
  const args: WasmValue[] = [1, 2]
  const call = ours.call('two', args)
  args[0] = 99
  assert.deepEqual(await call, [2, 1])
  const holes: WasmValue[] = []
  holes[1] = 7
  assert.deepEqual(await ours.call('two', holes), [7, 0])
  for (const bad of [5, 'ab', {}, new Set([1, 2]), () => {}] as unknown as WasmValue[][]) {
    await assert.rejects(ours.call('two', bad), hasCode('ERR_WASM_INVALID_ARGUMENT', /array/))
    assert.throws(() => ours.callSync('two', bad), hasCode('ERR_WASM_INVALID_ARGUMENT', /array/))
  }
})

test('f32 carries single precision both ways, NaN comes out as NaN', LIMIT, async (t) => {
  const { ours } = await pair(t)
  assert.equal(await ours.call('echo_f32', [0.1]), Math.fround(0.1))
  assert.ok(Number.isNaN(ours.exports.echo_f32?.(Number.NaN)))
  assert.ok(Object.is(ours.exports.echo_f64?.(-0), -0))
  assert.ok(Object.is(await ours.call('echo_f32', [-0]), -0))
})

// ---------------------------------------------------------------- references

test('externref keeps the identity of any value, through calls, globals and tables', LIMIT, async (t) => {
  const source = wat(`(module
    (table $t 4 externref)
    (global $g (mut externref) (ref.null extern))
    (func (export "echo") (param externref) (result externref) (local.get 0))
    (func (export "put") (param i32 externref) (table.set $t (local.get 0) (local.get 1)))
    (func (export "get") (param i32) (result externref) (table.get $t (local.get 0)))
    (func (export "keep") (param externref) (global.set $g (local.get 0)))
    (func (export "kept") (result externref) (global.get $g))
    (func (export "isNull") (param externref) (result i32) (ref.is_null (local.get 0)))
    (func (export "swap") (param externref externref) (result externref externref) (local.get 1) (local.get 0)))`)
  const manager = await managed(t, source)
  const values: unknown[] = [
    0,
    -0,
    Number.NaN,
    '',
    'text',
    true,
    false,
    null,
    undefined,
    5n,
    symbol,
    someObject,
    someFunction,
    [],
    new Map(),
    new Proxy({}, {}),
    Object.create(null),
    globalThis,
    manager,
    Promise.resolve(1),
    new Error('e'),
  ]
  const f = manager.exports as Record<string, AnyFunction>
  for (const value of values as WasmValue[]) {
    assert.ok(Object.is(f.echo?.(value), value))
    // `call` answers with a promise, which would swallow a thenable; a promise is one.
    if (!(value instanceof Promise)) assert.ok(Object.is(await manager.call('echo', [value]), value))
    f.keep?.(value)
    assert.ok(Object.is(f.kept?.(), value))
    f.put?.(2, value)
    assert.ok(Object.is(f.get?.(2), value))
    // Only null is null: undefined is a value.
    assert.equal(f.isNull?.(value), value === null ? 1 : 0)
  }
  assert.deepEqual(await manager.call('swap', [someObject, 'b']), ['b', someObject])
})

test('what a guest holds by externref stays alive, and what nobody holds is given back', LIMIT, async () => {
  const ended = await child(
    `
    const manager = await WasmModuleManager.create(process.env.REFS, { cache: false })
    let collected = 0
    const registry = new FinalizationRegistry(() => { collected += 1 })
    const make = (size) => { const value = { big: new Array(size).fill(1) }; registry.register(value, 0); return value }
    // Held: the guest's table keeps them.
    for (let i = 0; i < 10; i += 1) manager.exports.put(i, make(10))
    // Not held: a thousand pass through.
    for (let i = 0; i < 1000; i += 1) manager.exports.echo(make(10))
    for (let i = 0; i < 1000; i += 1) await manager.call('echo', [make(10)])
    for (let i = 0; i < 50 && collected < 1900; i += 1) {
      // The engine collects its own garbage when it is asked for room.
      for (let k = 0; k < 2000; k += 1) manager.exports.echo({})
      await manager.call('echo', [{}])
      global.gc()
      await new Promise((resolve) => setImmediate(resolve))
    }
    const whileHeld = []
    for (let i = 0; i < 10; i += 1) whileHeld.push(manager.exports.get(i).big.length)
    const before = collected
    await manager.reload()
    for (let i = 0; i < 20; i += 1) { global.gc(); await new Promise((resolve) => setImmediate(resolve)) }
    report({ whileHeld, before, after: collected })
    `,
    {
      env: {
        REFS: wat(`(module (table $t 16 externref)
          (func (export "echo") (param externref) (result externref) (local.get 0))
          (func (export "put") (param i32 externref) (table.set $t (local.get 0) (local.get 1)))
          (func (export "get") (param i32) (result externref) (table.get $t (local.get 0))))`),
      },
      flags: ['--expose-gc'],
    },
  )
  const { whileHeld, before, after } = reported<{ whileHeld: number[]; before: number; after: number }>(ended)
  assert.deepEqual(whileHeld, Array(10).fill(10))
  assert.ok(before >= 1900 && before <= 2000, `${before} of 2000 passing values were collected`)
  assert.equal(after, 2010, 'a reload gives back what the old generation held')
})

const FUNCREFS = wat(`(module
  (type $unary (func (param i32) (result i32)))
  (table $t (export "table") 4 funcref)
  (elem declare func $double $triple)
  (func $double (export "double") (type $unary) (i32.mul (local.get 0) (i32.const 2)))
  (func $triple (type $unary) (i32.mul (local.get 0) (i32.const 3)))
  (func (export "getDouble") (result funcref) (ref.func $double))
  (func (export "getTriple") (result funcref) (ref.func $triple))
  (func (export "getNull") (result funcref) (ref.null func))
  (func (export "echo") (param funcref) (result funcref) (local.get 0))
  (func (export "isNull") (param funcref) (result i32) (ref.is_null (local.get 0)))
  (func (export "put") (param i32 funcref) (table.set $t (local.get 0) (local.get 1)))
  (func (export "get") (param i32) (result funcref) (table.get $t (local.get 0)))
  (func (export "apply") (param i32 i32) (result i32)
    (call_indirect $t (type $unary) (local.get 1) (local.get 0))))`)

test('funcref: null, identity and calls go both ways', LIMIT, async (t) => {
  const manager = await managed(t, FUNCREFS)
  const f = manager.exports as Record<string, AnyFunction>
  assert.equal(f.getNull?.(), null)
  assert.equal(f.echo?.(null), null)
  assert.equal(f.isNull?.(null), 1)
  assert.equal(await manager.call('getNull'), null)
  const triple = f.getTriple?.() as AnyFunction
  assert.equal(typeof triple, 'function')
  assert.equal(triple(14), 42)
  assert.equal(f.getTriple?.(), triple)
  assert.equal(f.echo?.(triple), triple)
  assert.equal(await manager.call('getTriple'), triple)
  assert.equal(await manager.call('echo', [triple]), triple)
  f.put?.(1, triple)
  assert.equal(f.get?.(1), triple)
  assert.equal(f.apply?.(1, 5), 15)
  assert.equal(await manager.call('apply', [1, 5]), 15)
  const double = f.getDouble?.() as AnyFunction
  assert.notEqual(double, triple)
  assert.equal(double(4), 8)
})

test('an export of the module is a funcref of its own', LIMIT, async (t) => {
  const manager = await managed(t, FUNCREFS)
  const f = manager.exports as Record<string, AnyFunction>
  f.put?.(0, f.double)
  assert.equal(f.apply?.(0, 21), 42)
  await manager.call('put', [2, f.double])
  assert.equal(await manager.call('apply', [2, 4]), 8)
  const echoed = f.echo?.(f.double) as AnyFunction
  assert.equal(echoed(3), 6)
  await manager.use((instance) => {
    const e = instance.exports as Record<string, AnyFunction>
    e.put?.(3, e.double)
    assert.equal(e.apply?.(3, 50), 100)
  })
})

test('a function that is not of this instance is no funcref: TypeError, before anything runs', LIMIT, async (t) => {
  const manager = await managed(t, FUNCREFS)
  const other = await managed(t, FUNCREFS)
  const theirs = new WebAssembly.Instance(
    new WebAssembly.Module(binary({ functions: [{ name: 'f', params: [], results: [], body: [] }] })),
  ).exports.f
  for (const foreign of [() => 1, someObject, 5, 'double', undefined, class {}, theirs, 5n, symbol] as WasmValue[]) {
    assert.throws(() => manager.exports.echo?.(foreign), TypeError, String(typeof foreign))
    assert.throws(() => manager.callSync('echo', [foreign]), TypeError)
    await assert.rejects(manager.call('echo', [foreign]), TypeError)
  }
  for (const foreign of [other.exports.double, other.exports.getTriple?.()] as WasmValue[]) {
    assert.throws(
      () => manager.exports.echo?.(foreign),
      (error: unknown) => error instanceof TypeError || error instanceof WasmError,
    )
    await assert.rejects(
      manager.call('echo', [foreign]),
      (error: unknown) => error instanceof TypeError || error instanceof WasmError,
    )
  }
  assert.equal(manager.generation, 1)
  assert.equal(manager.exports.isNull?.(null), 1)
})

test('a funcref of an old generation is stale, never somebody else', LIMIT, async (t) => {
  const manager = await managed(t, FUNCREFS)
  const f = manager.exports as Record<string, AnyFunction>
  const old = f.getTriple?.() as AnyFunction
  await manager.reload()
  assert.throws(() => old(1), hasCode('ERR_WASM_STALE_HANDLE'))
  for (const run of [() => f.echo?.(old), () => f.put?.(0, old), () => manager.callSync('echo', [old])]) {
    assert.throws(run, (error: unknown) => error instanceof TypeError || hasCode('ERR_WASM_STALE_HANDLE')(error))
  }
  await assert.rejects(
    manager.call('echo', [old]),
    (error: unknown) => error instanceof TypeError || hasCode('ERR_WASM_STALE_HANDLE')(error),
  )
  const fresh = f.getTriple?.() as AnyFunction
  assert.equal(fresh(2), 6)
})

test('a funcref of one replica is not taken by another, and never runs in it', LIMIT, async (t) => {
  const manager = await managed(t, FUNCREFS, { instances: 2, threads: 2 })
  const [one, two] = [await manager.acquire(), await manager.acquire()]
  const triple = one.exports.getTriple?.() as AnyFunction
  assert.equal(triple(2), 6)
  assert.throws(
    () => two.exports.echo?.(triple),
    (error: unknown) => error instanceof TypeError || error instanceof WasmError,
  )
  await assert.rejects(
    two.call('echo', [triple]),
    (error: unknown) => error instanceof TypeError || error instanceof WasmError,
  )
  one.release()
  two.release()
})

test('v128 and its like cannot cross: TypeError before anything runs, on every path', LIMIT, async (t) => {
  const source = wat(`(module
    (global $ran (mut i32) (i32.const 0))
    (func (export "takes") (param v128) (global.set $ran (i32.const 1)))
    (func (export "gives") (result v128) (global.set $ran (i32.const 1)) (v128.const i64x2 0 0))
    (func (export "ran") (result i32) (global.get $ran)))`)
  const manager = await managed(t, source)
  for (const name of ['takes', 'gives']) {
    assert.throws(() => manager.exports[name]?.(1), TypeError)
    assert.throws(() => manager.callSync(name, [1]), TypeError)
    await assert.rejects(manager.call(name, [1]), TypeError)
    await manager.use(async (instance) => {
      assert.throws(() => instance.exports[name]?.(1), TypeError)
      await assert.rejects(instance.call(name, [1]), TypeError)
    })
  }
  assert.equal(manager.exports.ran?.(), 0)
  assert.equal(manager.generation, 1)
})

// ---------------------------------------------------------------- names and promises

test('an export that is not there is told by name, with those that are', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const missing = hasCode('ERR_WASM_EXPORT_NOT_FOUND', /'ad'.*add/s)
  await assert.rejects(manager.call('ad'), missing)
  assert.throws(() => manager.callSync('ad'), missing)
  await assert.rejects(manager.invoke('ad', new Uint8Array()), missing)
  await manager.use(async (instance) => {
    await assert.rejects(instance.call('ad'), missing)
    assert.equal(instance.exports.ad, undefined)
  })
  assert.equal(manager.exports.ad, undefined)
  // An export that is no function is none either.
  await assert.rejects(manager.call('memory'), hasCode('ERR_WASM_EXPORT_NOT_FOUND', /'memory'/))
  for (const odd of ['', '__proto__', 'constructor', 'toString']) {
    await assert.rejects(manager.call(odd), hasCode('ERR_WASM_EXPORT_NOT_FOUND'))
  }
  for (const odd of [undefined, null, 5, symbol, {}] as unknown as string[]) {
    await assert.rejects(manager.call(odd), hasCode('ERR_WASM_INVALID_ARGUMENT', /string/))
    assert.throws(() => manager.callSync(odd), hasCode('ERR_WASM_INVALID_ARGUMENT', /string/))
  }
})

test('exports may have any name: empty, __proto__, unicode', LIMIT, async (t) => {
  const names = ['', '__proto__', 'constructor', 'toString', 'then', 'größe 🦀', 'a b', '0']
  const module = binary({
    functions: names.map((name, index) => ({ name, params: [], results: ['i32'], body: [0x41, index] })),
  })
  const manager = await managed(t, module)
  for (const [index, name] of names.entries()) {
    assert.equal(await manager.call(name), index, name)
    assert.equal(manager.callSync(name), index, name)
    const own = Object.getOwnPropertyDescriptor(manager.exports, name)?.value as (() => number) | undefined
    assert.equal(own?.(), index, `exports[${JSON.stringify(name)}]`)
  }
  assert.deepEqual(Object.keys(manager.exports).sort(), [...names].sort())
})

test('call always answers by its promise: it never throws', LIMIT, async (t) => {
  const { manager } = await bench(t)
  for (const start of [
    () => manager.call('nope'),
    () => manager.call('add', 5 as unknown as []),
    () => manager.call('add', [symbol, 1]),
    () => manager.call('boom'),
    () => manager.call(undefined as unknown as string),
    () => manager.invoke('add', 5 as unknown as Uint8Array),
    () => manager.use(5 as unknown as () => void),
    () => manager.reload(5 as never),
  ]) {
    const promise: Promise<unknown> = start()
    assert.ok(promise instanceof Promise)
    assert.ok('error' in (await outcome(promise)))
  }
})

test('a thousand calls at once are all answered, each with its own result', LIMIT, async (t) => {
  const { manager } = await bench(t, { instances: 2, threads: 2 })
  const calls = Array.from({ length: 1000 }, (_, i) => manager.call('add', [i, i]))
  assert.deepEqual(
    await Promise.all(calls),
    Array.from({ length: 1000 }, (_, i) => 2 * i),
  )
  assert.equal(manager.stats().calls.completed, 1000)
})

test('callSync and call see the same instance when there is one', LIMIT, async (t) => {
  const { manager } = await bench(t)
  assert.equal(manager.callSync('count'), 1)
  assert.equal(await manager.call('count'), 2)
  assert.equal(manager.exports.count?.(), 3)
})

test(
  'a synchronous call while a pool thread is inside throws ERR_WASM_BUSY, and works again after',
  LIMIT,
  async (t) => {
    const { manager, close, arrived, release } = await bench(t)
    const isFree = () => manager.exports.add?.(1, 2)
    close(1)
    const held = manager.call('hold', [1])
    await arrived(1)
    // The import has answered with a promise and the guest waits for it; another caller is not that guest.
    const busy = await outcome((async () => manager.callSync('add', [1, 2]))())
    release(1)
    await held
    assert.ok('error' in busy || busy.value === 3)
    if ('error' in busy) hasCode('ERR_WASM_BUSY')(busy.error)
    assert.equal(isFree(), 3)
  },
)

test('a synchronous call while the guest computes on the pool throws ERR_WASM_BUSY', LIMIT, async (t) => {
  const { manager, entered } = await bench(t)
  const inside = entered()
  const stop = new AbortController()
  const spin = outcome(manager.call('spin', [], { signal: stop.signal }))
  await inside
  assert.throws(() => manager.exports.add?.(1, 2), hasCode('ERR_WASM_BUSY'))
  assert.throws(() => manager.callSync('add', [1, 2]), hasCode('ERR_WASM_BUSY'))
  stop.abort()
  assert.ok('error' in (await spin))
  assert.equal(manager.exports.add?.(1, 2), 3)
})

// ---------------------------------------------------------------- invoke

const REVERSED = Uint8Array.of(5, 4, 3, 2, 1)
const INPUT = Uint8Array.of(1, 2, 3, 4, 5)

for (const [returns, name] of [
  ['out-pointer', 'reverse'],
  ['packed-i64', 'reversePacked'],
  ['multi-value', 'reverseMulti'],
] as const) {
  test(
    `invoke sends bytes through a guest that returns by ${returns}, and frees what it allocated`,
    LIMIT,
    async (t) => {
      const manager = await managed(t, buffers, returns === 'out-pointer' ? {} : { abi: { returns } })
      const output = await manager.invoke(name, INPUT)
      assert.ok(output instanceof Uint8Array)
      assert.deepEqual(output, REVERSED)
      assert.deepEqual(await manager.invoke(name, new Uint8Array()), new Uint8Array())
      const large = Uint8Array.from({ length: 300_000 }, (_, i) => i * 7)
      assert.deepEqual(await manager.invoke(name, large), large.slice().reverse())
      assert.deepEqual(await manager.invoke(name, Buffer.from('abc')), new Uint8Array(Buffer.from('cba')))
      assert.deepEqual(await manager.invoke(name, new Uint8Array([9, 1, 2, 9]).subarray(1, 3)), Uint8Array.of(2, 1))
      // Input, output and the length's cell all went back.
      assert.equal(manager.exports.live?.(), 0)
      assert.equal(manager.stats().calls.completed >= 5, true)
    },
  )
}

test('invoke copies its input at the call, and its output is the caller own', LIMIT, async (t) => {
  const manager = await managed(t, buffers)
  const input = INPUT.slice()
  const call = manager.invoke('reverse', input)
  input.fill(0)
  const output = await call
  assert.deepEqual(output, REVERSED)
  await manager.invoke('reverse', new Uint8Array(100).fill(7))
  await manager.reload()
  assert.deepEqual(output, REVERSED)
  assert.equal(output.byteLength, output.buffer.byteLength)
})

test('many invokes at once come out right, over several replicas', LIMIT, async (t) => {
  const manager = await managed(t, buffers, { instances: 2, threads: 2 })
  const inputs = Array.from({ length: 200 }, (_, i) => Uint8Array.from({ length: i * 13 }, (_, k) => i + k))
  const outputs = await Promise.all(inputs.map((input) => manager.invoke('reverse', input)))
  for (const [index, output] of outputs.entries()) assert.deepEqual(output, inputs[index]?.slice().reverse())
})

test('invoke refuses what does not fit, before the guest runs, with the name to set right', LIMIT, async (t) => {
  const manager = await managed(t, buffers)
  await assert.rejects(
    manager.invoke('wrongType', INPUT),
    hasCode('ERR_WASM_INVALID_ARGUMENT', /'wrongType'.*abi\.returns/s),
  )
  for (const bad of [null, undefined, 'abc', [1, 2], {}, 5] as unknown as Uint8Array[]) {
    await assert.rejects(manager.invoke('reverse', bad), hasCode('ERR_WASM_INVALID_ARGUMENT', /Uint8Array/))
  }
  const wrong = await managed(t, buffers, { abi: { allocate: 'malloc' } })
  await assert.rejects(wrong.invoke('reverse', INPUT), hasCode('ERR_WASM_EXPORT_NOT_FOUND', /'malloc'.*abi\.allocate/s))
  const free = await managed(t, buffers, { abi: { deallocate: 'free' } })
  await assert.rejects(
    free.invoke('reverse', INPUT),
    hasCode('ERR_WASM_EXPORT_NOT_FOUND', /'free'.*abi\.deallocate.*null/s),
  )
  assert.equal(manager.generation, 1)
  assert.equal(manager.exports.live?.(), 0)
})

test('invoke works for a guest that has nothing to free with: deallocate: null', LIMIT, async (t) => {
  const manager = await managed(t, buffers, { abi: { deallocate: null } })
  assert.deepEqual(await manager.invoke('reverse', INPUT), REVERSED)
  assert.equal(manager.exports.live?.(), 3)
})

test('an allocator that answers 0 ends invoke as a trap of its own kind', LIMIT, async (t) => {
  const manager = await managed(t, buffers, { abi: { allocate: 'never' } })
  const end = await outcome(manager.invoke('reverse', INPUT))
  assert.ok('error' in end)
  hasCode('ERR_WASM_TRAP')(end.error)
  assert.equal((end.error as WasmError).trap, 'allocation-failed')
})

test('a guest that traps in invoke is replaced; one that lies about its output is caught', LIMIT, async (t) => {
  const manager = await managed(t, buffers)
  await assert.rejects(manager.invoke('trap', INPUT), hasCode('ERR_WASM_TRAP'))
  assert.deepEqual(await manager.invoke('reverse', INPUT), REVERSED)
  assert.equal(manager.generation, 2)
  const end = await outcome(manager.invoke('lie', INPUT))
  assert.ok('error' in end)
  assert.ok(end.error instanceof WasmError, String(end.error))
  assert.match(end.error.message, /2147483647/)
  assert.deepEqual(await manager.invoke('reverse', INPUT), REVERSED)
})
