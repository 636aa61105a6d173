// The FinalizationRegistry of one generation: that of the platform, until memory goes back in time or away.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createRequire } from 'node:module'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'

interface Finalizers {
  FinalizationRegistry: FinalizationRegistryConstructor
  stale(): Error
  mark(): number
  rewind(mark: number): void
  expire(): void
}
const PATH = fileURLToPath(new URL('../lib/glue/finalizers.js', import.meta.url))
const { makeFinalizers } = createRequire(import.meta.url)(PATH) as { makeFinalizers(): Finalizers }

const LIMIT = { timeout: 110_000 }

/** Collects until `look` is true; the test's own timeout is the bound. Looking keeps what is looked at for a turn. */
async function until(look: () => boolean): Promise<void> {
  do {
    await new Promise((resolve) => setImmediate(resolve))
    globalThis.gc?.()
  } while (!look())
}

/** A registry that lists what it cleaned, and objects that are garbage at once. */
function registryOf(finalizers: Finalizers) {
  const cleaned: unknown[] = []
  const registry = new finalizers.FinalizationRegistry<unknown>((held) => cleaned.push(held))
  const drop = (held: unknown, token?: WeakKey) => registry.register({}, held, token)
  return { registry, cleaned, drop }
}

/** Returns when an object that was dropped after all others has been cleaned by the platform. */
async function swept(): Promise<void> {
  let done = 0
  const real = new FinalizationRegistry(() => {
    done += 1
  })
  for (let i = 1; i <= 3; i += 1) {
    ;(() => real.register({}, i))()
    await until(() => done === i)
  }
}

test('it has the interface of the platform', () => {
  const { FinalizationRegistry: Ours } = makeFinalizers()
  const registry = new Ours(() => {})
  assert.deepEqual([Ours.name, Ours.length], ['FinalizationRegistry', 1])
  assert.equal(Object.prototype.toString.call(registry), '[object FinalizationRegistry]')
  assert.deepEqual(
    Object.getOwnPropertyNames(Ours.prototype).sort(),
    Object.getOwnPropertyNames(FinalizationRegistry.prototype).sort(),
  )
  assert.deepEqual([Ours.prototype.register.length, Ours.prototype.unregister.length], [2, 1])
  assert.equal(registry.register({}, 1), undefined)
  const token = {}
  registry.register({}, 1, token)
  assert.deepEqual(
    [registry.unregister(token), registry.unregister(token), registry.unregister({})],
    [true, false, false],
  )

  const real = new FinalizationRegistry(() => {})
  const same = {}
  const wrong: ((Class: typeof FinalizationRegistry, made: FinalizationRegistry<unknown>) => unknown)[] = [
    (Class) => new Class(5 as never),
    (Class) => (Class as never as () => void)(),
    (_, made) => made.register(1 as never, 1),
    (_, made) => made.register(same, same),
    (_, made) => made.register({}, 1, 1 as never),
    (_, made) => made.unregister(1 as never),
    (Class) => Class.prototype.register.call({} as never, {}, 1),
  ]
  for (const one of wrong) {
    assert.throws(() => one(FinalizationRegistry, real), TypeError)
    assert.throws(() => one(Ours, registry), TypeError, one.toString())
  }
  class Sub extends Ours<number> {}
  assert.ok(new Sub(() => {}) instanceof Ours)
})

test('callbacks run with what was held, but not for what was unregistered', LIMIT, async () => {
  const finalizers = makeFinalizers()
  const { registry, cleaned, drop } = registryOf(finalizers)
  const token = {}
  drop('a')
  drop('b', token)
  drop('c', token)
  drop('d', {})
  assert.equal(registry.unregister(token), true)
  // In a later turn: JavaScriptCore takes what is still on the stack for held.
  await new Promise((resolve) => setImmediate(resolve))
  const alive = {}
  registry.register(alive, 'alive')
  await until(() => cleaned.length >= 2)
  await swept()
  assert.deepEqual(cleaned.sort(), ['a', 'd'])
  assert.ok(alive)
})

test('after a rewind, what was registered after the mark is void, what was before is not', LIMIT, async () => {
  const finalizers = makeFinalizers()
  const { registry, cleaned, drop } = registryOf(finalizers)
  const token = {}
  drop('before')
  drop('unregistered', token)
  const first = finalizers.mark()
  const second = finalizers.mark()
  assert.ok(second > first)
  drop('after')
  // Whatever the memory says again: the object has been freed by its owner.
  registry.unregister(token)
  finalizers.rewind(second)
  drop('then')
  await until(() => cleaned.length >= 2)
  await swept()
  assert.deepEqual(cleaned.sort(), ['before', 'then'])
  // Again to the same mark, and to one before it.
  cleaned.length = 0
  drop('then too')
  finalizers.rewind(second)
  drop('and')
  finalizers.rewind(first)
  drop('last')
  await until(() => cleaned.length >= 1)
  await swept()
  assert.deepEqual(cleaned, ['last'])
})

test('what was collected before the rewind, and not yet cleaned, is void too', LIMIT, async () => {
  const finalizers = makeFinalizers()
  const { cleaned, drop } = registryOf(finalizers)
  const mark = finalizers.mark()
  drop('pending')
  await Promise.resolve()
  globalThis.gc?.()
  finalizers.rewind(mark)
  await swept()
  assert.deepEqual(cleaned, [])
})

test('a generation that is gone cleans nothing, silently', LIMIT, async () => {
  const finalizers = makeFinalizers()
  const { registry, cleaned, drop } = registryOf(finalizers)
  const token = {}
  drop('a')
  drop('b', token)
  finalizers.expire()
  drop('c')
  drop('d', token)
  assert.equal(registry.unregister(token), true)
  await swept()
  assert.deepEqual(cleaned, [])
  // Others are not concerned.
  const other = registryOf(makeFinalizers())
  other.drop('other')
  await until(() => other.cleaned.length === 1)
})

// ---------------------------------------------------------------- objects whose pointer is void

/** As wasm-bindgen writes them. */
function bindgen(finalizers: Finalizers) {
  const freed: number[] = []
  const finalization = new finalizers.FinalizationRegistry<number>((ptr) => freed.push(ptr))
  let next = 1000
  return class Foo {
    __wbg_ptr: number
    other = 'kept'
    static freed = freed
    constructor() {
      this.__wbg_ptr = next++ >>> 0
      finalization.register(this, this.__wbg_ptr, this)
    }
    __destroy_into_raw() {
      const ptr = this.__wbg_ptr
      this.__wbg_ptr = 0
      finalization.unregister(this)
      return ptr
    }
    free() {
      freed.push(this.__destroy_into_raw())
    }
    get() {
      return this.__wbg_ptr
    }
  }
}

test('objects registered after the mark say that they are stale; older ones live on', () => {
  const finalizers = makeFinalizers()
  const Foo = bindgen(finalizers)
  const before = new Foo()
  const mark = finalizers.mark()
  const after = new Foo()
  const freed = new Foo()
  freed.free()
  finalizers.rewind(mark)
  assert.throws(() => after.get(), /gone/)
  const error = new Error('stale')
  finalizers.stale = () => error
  for (const use of [() => after.get(), () => after.free(), () => after.__wbg_ptr]) {
    assert.throws(use, (thrown) => thrown === error)
  }
  after.__wbg_ptr = 0
  assert.throws(
    () => after.get(),
    (thrown) => thrown === error,
  )
  assert.deepEqual([after.other, Object.keys(after).sort()], ['kept', ['__wbg_ptr', 'other']])
  assert.deepEqual([before.get(), freed.get()], [1000, 0])
  before.free()
  const then = new Foo()
  assert.deepEqual([then.get(), Foo.freed], [1003, [1002, 1000]])
})

test('pointers of older glue, held objects, closures; other properties and frozen objects stay', () => {
  const finalizers = makeFinalizers()
  const registry = new finalizers.FinalizationRegistry<unknown>(() => {})
  const mark = finalizers.mark()
  const old = { ptr: 8 }
  const holding = { ptr: 16, __wbg_ptr: 17 }
  const moved = { ptr: 24 }
  const unrelated = { pointer: 32, value: 32 }
  const frozen = Object.freeze({ ptr: 40 })
  const inherited = Object.create({ ptr: 48 })
  registry.register(old, 8)
  registry.register(holding, { ptr: 16 })
  registry.register(moved, 24)
  moved.ptr = 25
  registry.register(unrelated, 32)
  registry.register(frozen, 40)
  registry.register(inherited, 48)
  registry.register({}, undefined)
  registry.register({}, null)
  const state = { a: 1, b: 2, cnt: 1, dtor: 3 }
  const closure = () => state.a
  registry.register(closure, state, state)
  finalizers.rewind(mark)
  assert.throws(() => old.ptr, /gone/)
  assert.throws(() => holding.ptr, /gone/)
  assert.throws(closure, /gone/)
  assert.deepEqual(
    [holding.__wbg_ptr, moved.ptr, unrelated, frozen.ptr, inherited.ptr],
    [17, 25, { pointer: 32, value: 32 }, 40, 48],
  )
})

// ---------------------------------------------------------------- the platform's ways

test('a callback that throws does what it does on the platform', LIMIT, () => {
  const script = (make: string) => `
    const { makeFinalizers } = require(${JSON.stringify(PATH)})
    const Registry = ${make}
    let errors = 0
    process.on('uncaughtException', (error) => { errors += 1; console.log(error.message) })
    const registry = new Registry((held) => { throw new Error('of ' + held) })
    ;(() => { registry.register({}, 1); registry.register({}, 2) })()
    let turns = 0
    const turn = () => { gc(); turns += 1; if (errors < 2 && turns < 100) setImmediate(turn); else registry }
    setImmediate(turn)`
  const run = (make: string) =>
    execFileSync(process.execPath, ['--expose-gc', '-e', script(make)], { encoding: 'utf8', timeout: 50_000 })
      .trim()
      .split('\n')
      .sort()
  assert.deepEqual(run('makeFinalizers().FinalizationRegistry'), run('FinalizationRegistry'))
})

test('what is registered, unregistered and collected leaves nothing behind', LIMIT, async () => {
  const finalizers = makeFinalizers()
  const { registry, cleaned } = registryOf(finalizers)
  const long = {}
  // Not asynchronous itself: that would keep its last objects.
  const fill = () => {
    for (let i = 0; i < 2000; i += 1) {
      const one = {}
      registry.register(one, i, one)
      if (i % 2 === 0) registry.unregister(one)
      registry.register({}, i, long)
      // A registry that is dropped with what it holds.
      if (i % 100 === 0) new finalizers.FinalizationRegistry(() => {}).register({}, new Array(1000).fill(i))
    }
    finalizers.rewind(finalizers.mark())
  }
  const round = async () => {
    fill()
    await until(() => cleaned.length === 3000)
    cleaned.length = 0
    await swept()
  }
  for (let i = 0; i < 3; i += 1) await round()
  globalThis.gc?.()
  const before = process.memoryUsage().heapUsed
  for (let i = 0; i < 20; i += 1) await round()
  globalThis.gc?.()
  const grown = process.memoryUsage().heapUsed - before
  assert.ok(grown < 500_000, `${grown} bytes`)
  assert.ok(long)
})

test('a generation is collected with its registries', LIMIT, async () => {
  const refs: WeakRef<object>[] = []
  const alive: object[] = []
  const one = (i: number) => {
    const finalizers = makeFinalizers()
    const Foo = bindgen(finalizers)
    alive.push(new Foo())
    refs.push(new WeakRef(finalizers))
    if (i % 2 === 0) finalizers.expire()
  }
  for (let i = 0; i < 5; i += 1) one(i)
  // Objects hold their class, and so their registry: as long as they live, no longer.
  alive.length = 0
  await until(() => refs.every((ref) => ref.deref() === undefined))
})
