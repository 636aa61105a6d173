// Glue behind a manager: generations, the stable face, leases, snapshots and resets of realms.
import assert from 'node:assert/strict'
import { mkdirSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { pathToFileURL } from 'node:url'
import { type GlueManager, type GlueOptions, loadGlue, WebAssembly as molt } from '../index.js'
import { temporaryFolder } from './guests.ts'
import { barrier, failure, hasCode, LIMIT } from './support.ts'

const binding = createRequire(import.meta.url)('../binding.js')
const base64 = (text: string) => Buffer.from(binding.__assemble(text)).toString('base64')

/** Allocates by growing its own memory, as Rust's guests do. */
const guest = `(module
  (import "env" "note" (func $note (param i32) (result i32)))
  (memory (export "memory") 1)
  (table (export "table") 2 funcref)
  (global $next (export "next") (mut i32) (i32.const 1024))
  (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
  (func (export "alloc") (param $n i32) (result i32)
    (local $at i32)
    (local.set $at (global.get $next))
    (global.set $next (i32.add (local.get $at) (local.get $n)))
    (block $fits
      (loop $more
        (br_if $fits (i32.le_u (global.get $next) (i32.mul (memory.size) (i32.const 65536))))
        (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))
        (br $more)))
    (local.get $at))
  (func (export "get") (param i32) (result i32) (i32.load (local.get 0)))
  (func (export "set") (param i32 i32) (i32.store (local.get 0) (local.get 1)))
  (func (export "noted") (param i32) (result i32) (call $note (local.get 0)))
  (func (export "trap") unreachable)
  (func (export "spin") (loop (br 0))))`

const source = (extra = '') => `
let live = true
const imports = { env: { note: (n) => exports.onNote(n) } }
const module_ = new WebAssembly.Module(Buffer.from('${base64(guest)}', 'base64'))
const instance = new WebAssembly.Instance(module_, imports)
const wasm = instance.exports
exports.wasm = wasm
exports.WebAssembly = WebAssembly
exports.onNote = (n) => n + 1
exports.add = (a, b) => wasm.add(a, b)
exports.noted = (n) => wasm.noted(n)
exports.trap = () => wasm.trap()
exports.spin = () => wasm.spin()
exports.memory = () => wasm.memory
exports.version = '1'
exports.nested = { add: (a, b) => wasm.add(a, b) }
const registry = new FinalizationRegistry((ptr) => { wasm.set(ptr, -1); exports.finalized = (exports.finalized ?? 0) + 1 })
exports.Cell = class Cell {
  static made = 0
  constructor(value) {
    this.__wbg_ptr = wasm.alloc(4)
    registry.register(this, this.__wbg_ptr, this)
    Cell.made += 1
    this.value = value
  }
  get value() { return wasm.get(this.__wbg_ptr) }
  set value(value) { wasm.set(this.__wbg_ptr, value) }
  static of(value) { return new Cell(value) }
}
${extra}`

function glueFile(text = source(), name = 'glue.cjs'): string {
  const folder = temporaryFolder('glue')
  writeFileSync(join(folder, 'package.json'), JSON.stringify({ name: 'some-glue', main: name }))
  writeFileSync(join(folder, name), text)
  return join(folder, name)
}

// biome-ignore lint/suspicious/noExplicitAny: glue has no types.
type Any = any

const ours = molt as Any

async function load(t: TestContext, options: GlueOptions = {}, file = glueFile()): Promise<GlueManager<Any>> {
  const manager = await loadGlue<Any>(file, { cache: false, ...options })
  t.after(() => manager.destroy())
  return manager
}

test('the module of a CommonJS file works, and is what require would give', LIMIT, async (t) => {
  const manager = await load(t)
  const wasm = manager.module
  assert.equal(wasm.add(1, 2), 3)
  assert.equal(wasm.version, '1')
  assert.equal(wasm.nested.add(2, 3), 5)
  assert.equal(manager.generation, 1)
  assert.equal(manager.state, 'ready')
  assert.equal(manager.name, 'glue')
  assert.equal(new wasm.Cell(7).value, 7)
  assert.equal(wasm.Cell.of(8).value, 8)
  assert.equal(manager.stats().memoryBytes, 65536)
  assert.equal(manager.memory.byteLength, 65536)
  assert.equal(manager.exports.add(3, 4), 7)
})

test('paths, file URLs and package names load alike', LIMIT, async (t) => {
  const file = glueFile()
  assert.equal((await load(t, {}, file)).module.add(1, 1), 2)
  assert.equal((await load(t, {}, pathToFileURL(file).href)).module.add(1, 1), 2)
  const byUrl = await loadGlue<Any>(pathToFileURL(file), { cache: false })
  t.after(() => byUrl.destroy())
  assert.equal(byUrl.module.add(1, 1), 2)
  const folder = temporaryFolder('app')
  const home = join(folder, 'node_modules', 'some-glue')
  mkdirSync(home, { recursive: true })
  writeFileSync(join(home, 'package.json'), JSON.stringify({ name: 'some-glue', main: 'index.js' }))
  writeFileSync(join(home, 'index.js'), source())
  const byName = await loadGlue<Any>('some-glue', {
    cache: false,
    parentURL: pathToFileURL(join(folder, 'app.js')).href,
  })
  t.after(() => byName.destroy())
  assert.equal(byName.module.add(1, 1), 2)
  assert.equal(byName.name, 'some-glue')
})

test('a package that the working directory does not know is looked for where loadGlue was called', LIMIT, async (t) => {
  const folder = temporaryFolder('caller')
  const home = join(folder, 'node_modules', 'glue-beside-the-caller')
  mkdirSync(home, { recursive: true })
  writeFileSync(join(home, 'package.json'), JSON.stringify({ name: 'glue-beside-the-caller', main: 'index.js' }))
  writeFileSync(join(home, 'index.js'), source())
  const text = 'exports.load = (loadGlue, name) => loadGlue(name, { cache: false })'
  writeFileSync(join(folder, 'caller.cjs'), text)
  const caller = createRequire(import.meta.url)(join(folder, 'caller.cjs'))
  const manager = await caller.load(loadGlue, 'glue-beside-the-caller')
  t.after(() => manager.destroy())
  assert.equal(manager.module.add(1, 1), 2)
  await assert.rejects(caller.load(loadGlue, 'glue-that-is-nowhere'), {
    code: 'ERR_MODULE_NOT_FOUND',
    message: /glue-that-is-nowhere/,
  })
  await assert.rejects(loadGlue('glue-beside-the-caller'), { code: 'ERR_MODULE_NOT_FOUND' })
})

test('functions that were taken off the module follow reloads, also after the tenth', LIMIT, async (t) => {
  const manager = await load(t)
  const { add, Cell, nested } = manager.module
  const first = await manager.use((glue) => glue.wasm)
  for (let i = 2; i <= 12; i += 1) {
    const report = await manager.reload()
    assert.equal(report.generation, i)
    assert.equal(add(i, 1), i + 1)
    assert.equal(nested.add(i, 2), i + 2)
    assert.equal(new Cell(i).value, i)
  }
  assert.equal(manager.module.add, add)
  assert.throws(() => first.add(1, 2), hasCode('ERR_WASM_STALE_HANDLE', /restoreState/))
})

test('classes can be subclassed across reloads, and instanceof holds', LIMIT, async (t) => {
  const manager = await load(t)
  const { Cell } = manager.module
  class Named extends Cell {
    name: string
    constructor(value: number, name: string) {
      super(value)
      this.name = name
    }
    twice() {
      return (this as Any).value * 2
    }
  }
  const before = new Named(4, 'a') as Any
  assert.equal(before.twice(), 8)
  assert.ok(before instanceof Named && before instanceof Cell)
  await manager.reload()
  const after = new Named(5, 'b') as Any
  assert.equal(after.twice(), 10)
  assert.ok(after instanceof Named && after instanceof Cell && before instanceof Cell)
  assert.throws(() => before.value, hasCode('ERR_WASM_STALE_HANDLE'))
})

test('an object of an older generation throws and never touches the new memory', LIMIT, async (t) => {
  const manager = await load(t)
  const old = new manager.module.Cell(1)
  await manager.reload()
  const now = new manager.module.Cell(2)
  assert.equal(old.__wbg_ptr, now.__wbg_ptr)
  assert.throws(
    () => {
      old.value = 99
    },
    hasCode('ERR_WASM_STALE_HANDLE', /generation 1 of glue/),
  )
  assert.equal(now.value, 2)
})

test('memories, tables and globals of an older generation throw; its views are detached', LIMIT, async (t) => {
  const manager = await load(t)
  const { memory, table, next } = manager.module.wasm
  const view = new Uint8Array(memory.buffer)
  await manager.reload()
  assert.equal(view.byteLength, 0)
  for (const use of [
    () => memory.buffer,
    () => memory.grow(1),
    () => table.get(0),
    () => table.length,
    () => next.value,
  ]) {
    assert.throws(use, hasCode('ERR_WASM_STALE_HANDLE'))
  }
})

test('initialize, saveState and restoreState get the module of their generation', LIMIT, async (t) => {
  const seen: string[] = []
  const manager = await load(t, {
    initialize: async (glue: Any) => {
      await undefined
      seen.push(`initialize ${glue.add(1, 1)}`)
      glue.tag = seen.length
    },
    saveState: (glue: Any) => ({ value: glue.cell?.value ?? 0 }),
    restoreState: (glue: Any, state: Any) => {
      glue.cell = new glue.Cell(state.value)
    },
  })
  assert.deepEqual(seen, ['initialize 2'])
  manager.module.cell = new manager.module.Cell(41)
  const report = await manager.reload()
  assert.equal(report.generation, 2)
  assert.deepEqual(seen, ['initialize 2', 'initialize 2'])
  assert.equal(manager.module.cell.value, 41)
  manager.module.cell.value = 43
  await manager.reload()
  assert.equal(manager.module.cell.value, 43)
})

test('the exported WebAssembly means the generation in its hooks, and its own realm elsewhere', LIMIT, async (t) => {
  // Glue with an injection hook, as tiktoken/init and vscode-oniguruma have it.
  const file = glueFile(`
    let wasm
    exports.init = async (instantiator) => { wasm = (await instantiator({ env: { note: (n) => n } })).instance.exports }
    exports.add = (a, b) => wasm.add(a, b)
    exports.wasm = () => wasm`)
  const bytes = Buffer.from(base64(guest), 'base64')
  for (const initialize of [
    (glue: Any) => glue.init((imports: Any) => ours.instantiate(bytes, imports)),
    (glue: Any) =>
      glue.init(async (imports: Any) =>
        ours.instantiate(await ours.compile(bytes), imports).then((instance: Any) => ({ instance })),
      ),
    (glue: Any) =>
      glue.init(async (imports: Any) => ({ instance: new ours.Instance(new ours.Module(bytes), imports) })),
  ]) {
    const manager = await load(t, { initialize }, file)
    assert.equal(manager.module.add(1, 2), 3)
    assert.equal(manager.stats().memoryBytes, 65536)
    const before = await manager.use((glue) => glue.wasm())
    await manager.reload()
    assert.equal(manager.module.add(2, 2), 4)
    assert.throws(() => before.add(1, 1), hasCode('ERR_WASM_STALE_HANDLE'))
    await manager.close()
  }
  const elsewhere = new ours.Instance(new ours.Module(bytes), { env: { note: (n: number) => n } }).exports
  assert.equal(elsewhere.add(1, 1), 2)
})

test('expose decides what the module shows', LIMIT, async (t) => {
  const manager = await load(t, {
    expose: async (glue: Any, { WebAssembly }: Any) => {
      assert.equal(glue.WebAssembly, WebAssembly)
      return { plus: glue.add }
    },
  })
  assert.equal(manager.module.plus(2, 2), 4)
  assert.equal(manager.module.add, undefined)
  await manager.reload()
  assert.equal(manager.module.plus(2, 3), 5)
})

test('a reload that fails leaves the old generation serving', LIMIT, async (t) => {
  for (const phase of ['initialize', 'save', 'restore'] as const) {
    let fails = false
    const boom = new Error('boom')
    const maybe = () => {
      if (fails) throw boom
      return 1
    }
    const manager = await load(t, {
      initialize: () => (phase === 'initialize' ? maybe() : undefined),
      saveState: () => (phase === 'save' ? maybe() : 1),
      restoreState: () => (phase === 'restore' ? maybe() : undefined),
    })
    const cell = new manager.module.Cell(5)
    fails = true
    const error = await failure(manager.reload(), 'ERR_WASM_RELOAD_FAILED')
    assert.equal(error.phase, phase)
    assert.equal(error.cause, boom)
    assert.equal(manager.generation, 1)
    assert.equal(cell.value, 5)
    assert.equal(manager.module.add(1, 2), 3)
    fails = false
    await manager.reload()
    assert.equal(manager.module.add(1, 2), 3)
  }
})

test('what glue instantiates without waiting for it is there when a generation serves', LIMIT, async (t) => {
  const late = (read: string) => `
    const bytes = Buffer.from('${base64(guest)}', 'base64')
    let exports_
    const instantiate = (bytes) => WebAssembly.instantiate(bytes, { env: { note: (n) => n } })
    exports.ready = ${read}.then(({ instance }) => instance).then((instance) => {
      exports_ = instance.exports
      exports_.set(0, exports_.add(1, 2))
    })
    exports.add = (a, b) => exports_.add(a, b)
    exports.get = (at) => exports_.get(at)`
  const ways = ['instantiate(bytes)', 'Promise.resolve(bytes).then(instantiate)']
  for (const way of [...ways, 'WebAssembly.compile(bytes).then(instantiate).then((instance) => ({ instance }))']) {
    const manager = await load(t, {}, glueFile(late(way)))
    const { add, get } = manager.module
    assert.equal(add(1, 2), 3, way)
    for (let i = 0; i < 3; i += 1) {
      await manager.reload({ strategy: i === 1 ? 'rolling' : 'exclusive' })
      assert.equal(add(i, 2), i + 2, way)
      assert.equal(get(0), 3, way)
      await manager.module.ready
    }
  }
})

test('a module that glue cannot instantiate, and does not wait for, fails as the glue has it', LIMIT, async (t) => {
  const text = `
    exports.failed = WebAssembly.instantiate(Uint8Array.of(0, 1)).then(() => 'no', (error) => error.name)`
  const manager = await load(t, {}, glueFile(text))
  assert.equal(await manager.module.failed, 'CompileError')
  await manager.reload()
  assert.equal(await manager.module.failed, 'CompileError')
})

test('what glue waits for when its generation goes does not end the process', LIMIT, async (t) => {
  const unhandled: unknown[] = []
  const note = (reason: unknown) => unhandled.push(reason)
  process.on('unhandledRejection', note)
  t.after(() => process.off('unhandledRejection', note))
  const file = glueFile(
    source(`
      const big = Buffer.from('${base64(guest)}', 'base64')
      exports.again = () => { WebAssembly.compile(big).then((made) => WebAssembly.instantiate(made, imports)).then(() => {}) }`),
  )
  const manager = await load(t, {}, file)
  for (let round = 0; round < 10; round += 1) {
    manager.module.again()
    if (round % 2 === 0) manager.reloadSync()
    else await manager.reload()
  }
  const { again, W } = await manager.use((glue) => ({ again: glue.again, W: glue.WebAssembly }))
  again()
  await manager.close()
  await new Promise(setImmediate)
  await new Promise(setImmediate)
  assert.deepEqual(unhandled, [])
  // Whoever asks a realm that is gone is told.
  await assert.rejects(W.instantiate(Buffer.from(base64('(module)'), 'base64')), hasCode('ERR_WASM_CLOSED'))
})

test('scopes that run while the manager closes are waited for, and served', LIMIT, async (t) => {
  const manager = await load(t)
  const inside = barrier()
  const used = manager.use(async (glue) => {
    await inside.promise
    return glue.add(20, 3)
  })
  await new Promise(setImmediate)
  const closed = manager.close()
  await new Promise(setImmediate)
  inside.open()
  assert.equal(await used, 23)
  await closed
  assert.throws(() => manager.module.add(1, 1), hasCode('ERR_WASM_CLOSED'))
})

test('a generation that is being made can be used by what its glue has begun', LIMIT, async (t) => {
  const restore = barrier()
  const file = glueFile(
    source(`
      let tick
      exports.ticks = 0
      exports.ticked = new Promise((resolve) => {
        const step = () => { exports.ticks = wasm.add(exports.ticks, 1); exports.ticks < 5 ? setImmediate(step) : resolve(exports.ticks) }
        setImmediate(step)
      })`),
  )
  let waited: Promise<number> | undefined
  const manager = await load(
    t,
    {
      saveState: () => 1,
      restoreState: (glue: Any) => {
        waited = glue.ticked
        return restore.promise
      },
    },
    file,
  )
  const reloading = manager.reload()
  while (waited === undefined) await new Promise(setImmediate)
  assert.equal(await waited, 5)
  restore.open()
  await reloading
  assert.equal(manager.module.ticks, 5)
})

test('glue that throws while it is evaluated fails the load, and a reload of it rolls back', LIMIT, async (t) => {
  const thrown = await loadGlue(glueFile('throw new RangeError("not today")')).then(
    () => undefined,
    (error) => error,
  )
  assert.match(`${thrown.message} ${thrown.cause?.message}`, /not today/)
  const file = glueFile(source('if (globalThis.__glueFails) throw new Error("later")'))
  const manager = await load(t, {}, file)
  ;(globalThis as Any).__glueFails = true
  t.after(() => delete (globalThis as Any).__glueFails)
  await failure(manager.reload(), 'ERR_WASM_RELOAD_FAILED', /later/)
  assert.equal(manager.module.add(4, 4), 8)
})

test('nothing global is replaced, and glue that looks for it there finds ours', LIMIT, async (t) => {
  const native = globalThis.WebAssembly
  const registry = globalThis.FinalizationRegistry
  const file = glueFile(source('exports.found = globalThis.WebAssembly === WebAssembly'))
  const manager = await load(t, {}, file)
  assert.equal(globalThis.WebAssembly, native)
  assert.equal(globalThis.FinalizationRegistry, registry)
  assert.equal(manager.module.found, true)
  assert.notEqual(manager.module.WebAssembly, native)
})

test('a trap is a RuntimeError with our code, and the module goes on', LIMIT, async (t) => {
  const manager = await load(t)
  const traps: unknown[] = []
  manager.on('trap', (error) => traps.push(error))
  for (let i = 0; i < 3; i += 1) {
    assert.throws(
      () => manager.module.trap(),
      (error: Any) => {
        assert.ok(error instanceof WebAssembly.RuntimeError)
        assert.ok(error instanceof manager.module.WebAssembly.RuntimeError)
        const { code, trap, generation } = error as Any
        assert.deepEqual({ code, trap, generation }, { code: 'ERR_WASM_TRAP', trap: 'unreachable', generation: 1 })
        return true
      },
    )
    assert.equal(manager.module.add(i, 1), i + 1)
  }
  assert.equal(manager.stats().calls.trapped, 3)
  await manager.reload()
  assert.equal(traps.length, 3)
  assert.equal(manager.module.add(1, 1), 2)
})

test('what an import throws passes through the guest as the same object', LIMIT, async (t) => {
  const manager = await load(t)
  const thrown = { not: 'an error' }
  manager.module.onNote = () => {
    throw thrown
  }
  assert.throws(
    () => manager.module.noted(1),
    (error) => error === thrown,
  )
  manager.module.onNote = (n: number) => manager.module.add(n, 10)
  assert.equal(manager.module.noted(5), 15)
})

test('a promise that an import returns is a value like any other', LIMIT, async (t) => {
  const manager = await load(t)
  manager.module.onNote = async () => 5
  assert.equal(manager.module.noted(1), 0)
})

test('use holds the generation over an asynchronous operation', LIMIT, async (t) => {
  const manager = await load(t)
  const inside = barrier()
  const order: string[] = []
  const used = manager.use(async (glue) => {
    const cell = new glue.Cell(3)
    await inside.promise
    order.push(`used ${manager.generation}`)
    return cell.value + glue.add(1, 1)
  })
  // Scopes share a generation: nobody waits for anybody.
  assert.equal(await manager.use((glue) => glue.add(2, 2)), 4)
  assert.equal(manager.module.add(3, 3), 6)
  const reloaded = manager.reload().then((report) => order.push(`reloaded ${report.generation}`))
  const late = manager.use((glue) => {
    order.push(`late ${manager.generation}`)
    return glue.add(5, 5)
  })
  inside.open()
  assert.equal(await used, 5)
  assert.equal(await late, 10)
  await reloaded
  // The scope that came late did not make the reload wait for one more: it ran at once, or after.
  assert.ok(order.indexOf('used 1') < order.indexOf('reloaded 2'))
  assert.ok(order.some((line) => line.startsWith('late')))
  assert.equal(manager.stats().inFlight, 0)
})

test('scopes that end let a reload through, however many there are', LIMIT, async (t) => {
  const manager = await load(t)
  const scopes = Array.from({ length: 50 }, (_, i) => manager.use(async (glue) => glue.add(i, 1)))
  const [results, report] = await Promise.all([Promise.all(scopes), manager.reload()])
  assert.deepEqual(
    results,
    Array.from({ length: 50 }, (_, i) => i + 1),
  )
  assert.equal(report.generation, 2)
})

test('a signal takes a scope that waits back, and nothing stays held', LIMIT, async (t) => {
  const manager = await load(t)
  const inside = barrier()
  const used = manager.use(() => inside.promise)
  const reloading = manager.reload()
  const abort = new AbortController()
  const waiting = manager.use(() => assert.fail('it was taken back'), { signal: abort.signal })
  abort.abort(new Error('enough'))
  await assert.rejects(waiting, /enough/)
  inside.open()
  await used
  await reloading
  await manager.reload()
  assert.equal(manager.generation, 3)
})

test('what a scope throws is thrown by use, and the scope ends', LIMIT, async (t) => {
  const manager = await load(t)
  await assert.rejects(
    manager.use(() => {
      throw new Error('mine')
    }),
    /mine/,
  )
  await failure(manager.use('no function' as Any), 'ERR_WASM_INVALID_ARGUMENT')
  await manager.reload()
})

test('a drain that takes too long is given up, or interrupts', LIMIT, async (t) => {
  const manager = await load(t)
  const inside = barrier()
  const used = manager.use(async (glue) => {
    await inside.promise
    return glue.add(1, 1)
  })
  await failure(manager.reload({ drainTimeoutMs: 1 }), 'ERR_WASM_DRAIN_TIMEOUT')
  assert.equal(manager.module.add(1, 2), 3)
  const report = await manager.reload({ drainTimeoutMs: 1, onDrainTimeout: 'interrupt' })
  assert.equal(report.generation, 2)
  inside.open()
  await failure(used, 'ERR_WASM_STALE_HANDLE')
})

test('glue that knows nothing of reloads is called all the while, and none of its calls fails', LIMIT, async (t) => {
  const manager = await load(t)
  const { add } = manager.module
  await manager.snapshot()
  for (const change of [() => manager.reload(), () => manager.reset(), () => manager.snapshot()]) {
    for (let round = 0; round < 10; round += 1) {
      const inside = barrier()
      const used = manager.use(() => inside.promise)
      let isDone = false
      const done = change().then(() => {
        isDone = true
      })
      for (let calls = 0; !isDone; calls += 1) {
        assert.equal(add(calls, 1), calls + 1)
        if (calls === 10) inside.open()
        await new Promise(setImmediate)
      }
      await done
      await used
    }
  }
})

test(
  'once the state is saved the old generation takes no calls, and takes them again if the reload fails',
  LIMIT,
  async (t) => {
    const saved = barrier()
    const restore = barrier()
    const manager = await load(t, {
      saveState: () => {
        saved.open()
        return 1
      },
      restoreState: () => restore.promise,
    })
    const { add } = manager.module
    assert.equal(add(1, 2), 3)
    const reloading = manager.reload()
    await saved.promise
    await new Promise(setImmediate)
    assert.throws(() => add(1, 2), hasCode('ERR_WASM_RELOADING'))
    const waiting = manager.use((glue) => glue.add(3, 4))
    restore.fail(new Error('no'))
    await failure(reloading, 'ERR_WASM_RELOAD_FAILED', /no/)
    assert.equal(await waiting, 7)
    assert.equal(add(1, 2), 3)
    assert.equal(manager.generation, 1)
  },
)

test('reloadSync evaluates without leaving the thread', LIMIT, async (t) => {
  const manager = await load(t)
  const report = manager.reloadSync({ reason: 'now' })
  assert.equal(report.generation, 2)
  assert.equal(manager.module.add(1, 2), 3)
  assert.deepEqual(manager.stats().reloads, { now: 1 })
})

test('a rolling reload serves without a pause, and old scopes keep their generation', LIMIT, async (t) => {
  const manager = await load(t)
  const inside = barrier()
  const used = manager.use(async (glue) => {
    const cell = new glue.Cell(6)
    await inside.promise
    return cell.value
  })
  const reloading = manager.reload({ strategy: 'rolling' })
  const next = async (): Promise<void> => {
    while (manager.generation === 1) {
      assert.equal(manager.module.add(1, 1), 2)
      await new Promise(setImmediate)
    }
  }
  await next()
  assert.equal(manager.module.add(2, 2), 4)
  inside.open()
  assert.equal(await used, 6)
  await reloading
})

test('a timeout stops a synchronous call of glue, and the module goes on', LIMIT, async (t) => {
  const manager = await load(t, { limits: { timeoutMs: 20 } })
  assert.throws(
    () => manager.module.spin(),
    (error: Any) => error instanceof WebAssembly.RuntimeError && (error as Any).code === 'ERR_WASM_TIMEOUT',
  )
  assert.equal(manager.module.add(1, 2), 3)
})

test('limits hold for what glue makes', LIMIT, async (t) => {
  const manager = await load(t, { limits: { memoryBytes: 2 * 65536, tableElements: 10 } })
  const { Memory, Table } = manager.module.WebAssembly
  assert.throws(() => new Memory({ initial: 3 }), RangeError)
  const memory = new Memory({ initial: 1 })
  assert.equal(memory.grow(1), 1)
  assert.throws(() => memory.grow(1), RangeError)
  assert.throws(() => new Table({ element: 'anyfunc', initial: 11 }), RangeError)
  const table = new Table({ element: 'externref', initial: 10 })
  assert.throws(() => table.grow(1), RangeError)
  // Glue that has reached the limit still reloads to a small one.
  assert.throws(() => {
    for (;;) manager.module.wasm.alloc(65536 / 8)
  }, globalThis.WebAssembly.RuntimeError)
  await manager.reload()
  assert.equal(manager.stats().memoryBytes, 65536)
})

test('reset puts the realm back in place: objects older than the snapshot stay usable', LIMIT, async (t) => {
  const manager = await load(t)
  // The generation's own, without the face: functions go into tables as they are.
  const glue = await manager.use((glue) => glue)
  const cell = new glue.Cell(1)
  glue.wasm.table.set(0, glue.wasm.add)
  const snapshot = await manager.snapshot()
  assert.equal(snapshot.memoryBytes, 65536)
  for (let round = 0; round < 50; round += 1) {
    cell.value = 100 + round
    const newer = new glue.Cell(7)
    glue.wasm.table.set(0, null)
    glue.wasm.table.set(1, glue.wasm.get)
    for (let i = 0; i < 20; i += 1) glue.wasm.alloc(8192)
    assert.ok(glue.wasm.memory.buffer.byteLength > 65536)
    const report = await manager.reset()
    assert.ok(report.memoryBytesBefore > 65536)
    assert.equal(report.memoryBytesAfter, 65536)
    assert.equal(manager.generation, 1)
    assert.equal(cell.value, 1)
    assert.equal(glue.wasm.memory.buffer.byteLength, 65536)
    assert.equal(glue.wasm.table.get(0), glue.wasm.add)
    assert.equal(glue.wasm.table.get(1), null)
    // Pointers that are newer than the snapshot mean nothing any more.
    assert.throws(() => newer.value, hasCode('ERR_WASM_STALE_HANDLE', /newer than the snapshot/))
  }
  assert.equal(glue.add(1, 2), 3)
})

test('resetSync does the same at once', LIMIT, async (t) => {
  const manager = await load(t)
  const cell = new manager.module.Cell(1)
  const snapshot = manager.snapshotSync()
  cell.value = 2
  manager.snapshotSync()
  cell.value = 3
  manager.resetSync()
  assert.equal(cell.value, 2)
  manager.resetSync({ to: snapshot })
  assert.equal(cell.value, 1)
})

test('views that did not outgrow the snapshot stay attached over a reset', LIMIT, async (t) => {
  const manager = await load(t)
  const view = new Uint8Array(manager.module.wasm.memory.buffer)
  view[5000] = 1
  await manager.snapshot()
  view[5000] = 2
  await manager.reset()
  assert.equal(view.byteLength, 65536)
  assert.equal(view[5000], 1)
  view[5000] = 9
  assert.equal(manager.module.wasm.get(5000) & 0xff, 9)
  await manager.reset()
  assert.equal(view[5000], 1)
})

test('memory that only glue grows keeps its size, its views and no contents over a reset', LIMIT, async (t) => {
  // As Emscripten's glue does: the views are looked at when it grows the memory, and at no other time.
  const file = glueFile(
    source(`
      const heap = new WebAssembly.Memory({ initial: 1, maximum: 100 })
      exports.heap = heap
      let HEAPU8 = new Uint8Array(heap.buffer)
      exports.poke = (at, value) => {
        while (at >= heap.buffer.byteLength) { heap.grow(1); HEAPU8 = new Uint8Array(heap.buffer) }
        HEAPU8[at] = value
      }
      exports.peek = (at) => HEAPU8[at]`),
  )
  const manager = await load(t, {}, file)
  const { poke, peek, heap } = manager.module
  poke(100, 1)
  await manager.snapshot()
  for (let round = 0; round < 20; round += 1) {
    poke(100, 2)
    poke(5 * 65536 + round, 3)
    const resident = manager.stats({ pages: true }).pages?.privateBytes ?? 0
    await manager.reset()
    assert.equal(heap.buffer.byteLength, 6 * 65536)
    assert.equal(peek(100), 1)
    assert.equal(peek(5 * 65536 + round), 0)
    const left = manager.stats({ pages: true }).pages?.privateBytes ?? 0
    assert.ok(left < resident, `${left} bytes are held after the reset, ${resident} before`)
  }
})

test('a reload after a snapshot takes one of the new generation', LIMIT, async (t) => {
  const manager = await load(t, {
    restoreState: (glue: Any) => {
      glue.cell = new glue.Cell(12)
    },
    saveState: () => 1,
  })
  const old = await manager.snapshot()
  await manager.reload()
  const { cell } = manager.module
  cell.value = 13
  await manager.reset()
  assert.equal(cell.value, 12)
  await failure(manager.reset({ to: old }), 'ERR_WASM_STALE_HANDLE')
})

test('without a snapshot a reset says what to do, and a fork is refused with the reason', LIMIT, async (t) => {
  const manager = await load(t)
  await failure(manager.reset(), 'ERR_WASM_INVALID_ARGUMENT', /snapshot\(\)/)
  await failure((manager as Any).fork(), 'ERR_WASM_SNAPSHOT_UNSUPPORTED', /loadGlue/)
})

test('a reset waits for scopes of use', LIMIT, async (t) => {
  const manager = await load(t)
  const cell = new manager.module.Cell(1)
  await manager.snapshot()
  const inside = barrier()
  const used = manager.use(async () => {
    cell.value = 2
    await inside.promise
    return cell.value
  })
  const reset = manager.reset()
  inside.open()
  assert.equal(await used, 2)
  await reset
  assert.equal(cell.value, 1)
})

test('late finalizers do nothing: not after a reload, not after a reset', LIMIT, async (t) => {
  const { gc } = globalThis as Any
  assert.equal(typeof gc, 'function', 'run with --expose-gc')
  const manager = await load(t)
  const collect = async () => {
    for (let i = 0; i < 20; i += 1) {
      gc()
      await new Promise(setImmediate)
    }
  }
  // One that is as old as the generation is finalized.
  ;(() => new manager.module.Cell(1))()
  await collect()
  assert.equal(manager.module.finalized, 1)
  await manager.snapshot()
  ;(() => new manager.module.Cell(2))()
  await manager.reset()
  await collect()
  assert.equal(manager.module.finalized, 1)
  ;(() => new manager.module.Cell(3))()
  await manager.reload()
  await collect()
  assert.equal(manager.module.finalized, undefined)
})

test('a closed manager says so, whatever one holds of it', LIMIT, async (t) => {
  const manager = await load(t)
  const { add, wasm } = manager.module
  await manager.close()
  assert.equal(manager.state, 'closed')
  assert.throws(() => add(1, 2), hasCode('ERR_WASM_CLOSED'))
  assert.throws(() => wasm.memory.buffer, hasCode('ERR_WASM_CLOSED'))
  await failure(
    manager.use(() => 1),
    'ERR_WASM_CLOSED',
  )
})

test('bad options are told with what is known', LIMIT, async () => {
  await failure(loadGlue(glueFile(), { instances: 2 } as Any), 'ERR_WASM_INVALID_ARGUMENT', /instances/)
  const manager = await loadGlue<Any>(glueFile(), { cache: false })
  await failure(manager.reload({ source: 'x.wasm' } as Any), 'ERR_WASM_INVALID_ARGUMENT', /source/)
  await manager.close()
  await failure(loadGlue(glueFile(), { initialize: 1 } as Any), 'ERR_WASM_INVALID_ARGUMENT', /initialize/)
  // No place, though text can be made of it: of the list that takes minutes on JavaScriptCore.
  for (const parentURL of [7, ['file:///'], new Array(2 ** 32 - 1)]) {
    await failure(loadGlue(glueFile(), { parentURL } as Any), 'ERR_WASM_INVALID_ARGUMENT', /parentURL/)
  }
  for (const include of ['a package', [7], new Array(2 ** 32 - 1)]) {
    await failure(loadGlue(glueFile(), { include } as Any), 'ERR_WASM_INVALID_ARGUMENT', /include/)
  }
  await failure(loadGlue([glueFile()] as Any), 'ERR_WASM_INVALID_ARGUMENT', /first argument/)
  await assert.rejects(loadGlue('./no-such-file.cjs'), /no-such-file/)
})

test('what 1,000 generations have evaluated is collected, in CommonJS and as ES modules', {
  timeout: 300_000,
}, async (t) => {
  const { gc } = globalThis as Any
  const esm = `
    const wasm = new WebAssembly.Instance(new WebAssembly.Module(Buffer.from('${base64(guest)}', 'base64')), { env: { note: (n) => n } }).exports
    export const add = (a, b) => wasm.add(a, b)
    export const ballast = new Array(10_000).fill(0).map((_, i) => ({ i }))`
  const cjs = `${source()}\nexports.ballast = new Array(10_000).fill(0).map((_, i) => ({ i }))`
  for (const file of [glueFile(cjs), glueFile(esm, 'glue.mjs')]) {
    const manager = await load(t, {}, file)
    const heap = async (reloads: number) => {
      for (let i = 0; i < reloads; i += 1) {
        await manager.reload()
        assert.equal(manager.module.add(i, 1), i + 1)
      }
      for (let i = 0; i < 5; i += 1) {
        gc()
        await new Promise(setImmediate)
      }
      return process.memoryUsage().heapUsed
    }
    const before = await heap(50)
    const after = await heap(1000)
    // One generation weighs about half a megabyte.
    assert.ok(after - before < 4e6, `the heap has grown by ${after - before} bytes in 1,000 reloads`)
  }
})
