// The registry: one set of codes in the addon, in the types and in the docs; and every code that can occur, provoked.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { test } from 'node:test'
import { inspect } from 'node:util'
import { errorCodes, type ManagerOptions, version, type WasmErrorCode } from '../index.js'
import { adder, wat, workbench } from './guests.ts'
import {
  bench,
  hasCode,
  idleImports,
  LIMIT,
  managed,
  managedSync,
  outcome,
  WasmError,
  WasmModuleManager,
} from './support.ts'

/** Arrives with another capability. */
const NOT_YET: WasmErrorCode[] = ['ERR_WASM_EXIT', 'ERR_WASM_INCOMPATIBLE_MODULE']

/** Holds a value of JavaScript from its start on. */
const holder = wat(
  `(module (import "env" "value" (global $g externref)) (table 1 externref)
    (func $start (table.set (i32.const 0) (global.get $g))) (start $start))`,
)
/** Can drop an element segment. */
const dropper = wat('(module (table 1 funcref) (elem $e func $f) (func $f (elem.drop $e)))')

const read = (path: string) => readFileSync(new URL(`../${path}`, import.meta.url), 'utf8')

// ---------------------------------------------------------------- the registry

test('the codes of the addon are a frozen list without repetition', () => {
  assert.ok(Object.isFrozen(errorCodes))
  assert.ok(errorCodes.length >= 20)
  assert.equal(new Set(errorCodes).size, errorCodes.length)
  for (const code of errorCodes) assert.match(code, /^ERR_WASM_[A-Z_]+$/)
})

test('the type WasmErrorCode lists exactly the codes of the addon', () => {
  const text = read('index.d.ts')
  const union = /type WasmErrorCode\s*=([\s\S]*?)(?:\n\n|;\n|\nexport |\n\/\*\*)/.exec(text)?.[1]
  assert.ok(union, 'index.d.ts has no type WasmErrorCode')
  const codes = [...union.matchAll(/'(ERR_WASM_[A-Z_]+)'/g)].map(([, code]) => code)
  assert.deepEqual(codes.sort(), [...errorCodes].sort())
})

test('docs/errors.md has one paragraph for each code of the addon, and for no other', () => {
  const text = read('docs/errors.md')
  const sections = text.split(/^## /m).slice(1)
  const codes = sections.map((section) => /^`?(ERR_WASM_[A-Z_]+)`?\s*$/m.exec(section)?.[1])
  assert.deepEqual(codes.filter((code) => code !== undefined).sort(), [...errorCodes].sort())
  for (const [index, section] of sections.entries()) {
    if (codes[index] === undefined) continue
    const words = section.split(/\s+/).length
    // A code that cannot occur yet need only say what brings it.
    const least = NOT_YET.includes(codes[index] as WasmErrorCode) ? 12 : 25
    assert.ok(words >= least, `${codes[index]} has only ${words} words`)
  }
  // A code that is mentioned anywhere exists.
  for (const [code] of text.matchAll(/ERR_WASM_[A-Z_]+[A-Z]/g)) {
    assert.ok((errorCodes as readonly string[]).includes(code), `${code} is mentioned and does not exist`)
  }
})

test('the native part and the package have the same version', () => {
  assert.equal(version, (JSON.parse(read('package.json')) as { version: string }).version)
})

// ---------------------------------------------------------------- every code

type Provocation = (t: Parameters<typeof managed>[0]) => Promise<unknown>

const fails = async (run: () => unknown): Promise<unknown> => {
  const end = await outcome((async () => await run())())
  assert.ok('error' in end, 'it did not fail')
  return end.error
}
const create = (options: ManagerOptions, source: string | Uint8Array = workbench) =>
  WasmModuleManager.create(source, { cache: false, ...options })
const createSync = (options: ManagerOptions, source: string | Uint8Array = workbench) =>
  WasmModuleManager.createSync(source, { cache: false, ...options })
const quiet: ManagerOptions = { imports: idleImports }

/** One by a promise and one by a throw, where both can be. */
const PROVOKED: Partial<Record<WasmErrorCode, { rejects: Provocation; throws?: Provocation }>> = {
  ERR_WASM_INVALID_ARGUMENT: {
    rejects: () => fails(() => create({ instances: -1 })),
    throws: () => fails(() => createSync({ instances: -1 })),
  },
  ERR_WASM_COMPILE: {
    rejects: () => fails(() => create({}, new Uint8Array(4))),
    throws: () => fails(() => createSync({}, new Uint8Array(4))),
  },
  ERR_WASM_LINK: {
    rejects: () => fails(() => create({})),
    throws: () => fails(() => createSync({})),
  },
  ERR_WASM_EXPORT_NOT_FOUND: {
    rejects: async (t) => fails(async () => (await managed(t, workbench, quiet)).call('nope')),
    throws: (t) => fails(() => managedSync(t, workbench, quiet).callSync('nope')),
  },
  ERR_WASM_TRAP: {
    rejects: async (t) => fails(async () => (await managed(t, workbench, quiet)).call('boom')),
    throws: (t) => fails(() => managedSync(t, workbench, quiet).exports.boom?.()),
  },
  ERR_WASM_TIMEOUT: {
    rejects: async (t) => fails(async () => (await managed(t, workbench, quiet)).call('spin', [], { timeoutMs: 10 })),
    throws: (t) => fails(() => managedSync(t, workbench, { ...quiet, limits: { timeoutMs: 10 } }).exports.spin?.()),
  },
  ERR_WASM_OUT_OF_FUEL: {
    rejects: async (t) =>
      fails(async () =>
        (await managed(t, workbench, { ...quiet, engine: { fuel: true }, limits: { fuel: 1000 } })).call('spin'),
      ),
    throws: (t) =>
      fails(() =>
        managedSync(t, workbench, { ...quiet, engine: { fuel: true }, limits: { fuel: 1000 } }).exports.spin?.(),
      ),
  },
  ERR_WASM_INTERRUPTED: {
    rejects: async (t) => {
      const { manager, entered } = await bench(t)
      const inside = entered()
      const end = fails(() => manager.call('spin'))
      await inside
      await manager.destroy()
      return await end
    },
  },
  ERR_WASM_ASYNC_IMPORT: {
    rejects: () => fails(() => create({ imports: (async () => ({})) as never })),
    throws: (t) =>
      fails(() =>
        managedSync(t, workbench, { imports: { env: { entered() {}, hold: async () => 1 } } }).exports.hold?.(1),
      ),
  },
  ERR_WASM_BUSY: {
    rejects: async (t) => {
      const { manager } = await bench(t)
      const lease = await manager.acquire()
      const error = await fails(async () => manager.exports.add?.(1, 2))
      lease.release()
      return error
    },
    throws: async (t) => {
      const { manager } = await bench(t)
      const lease = await manager.acquire()
      const error = await fails(() => manager.reloadSync())
      lease.release()
      return error
    },
  },
  ERR_WASM_RELOADING: {
    rejects: async (t) => {
      const { manager } = await bench(t)
      const reload = manager.reload()
      const error = await fails(async () => manager.callSync('add', [1, 2]))
      await reload
      return error
    },
  },
  ERR_WASM_QUEUE_FULL: {
    rejects: async (t) => {
      const { manager } = await bench(t, { maxQueue: 0 })
      const lease = await manager.acquire()
      const error = await fails(() => manager.call('add', [1, 2]))
      lease.release()
      return error
    },
  },
  ERR_WASM_STALE_HANDLE: {
    rejects: async (t) => {
      const { manager } = await bench(t)
      const lease = await manager.acquire()
      lease.release()
      return await fails(() => lease.call('add', [1, 2]))
    },
    throws: async (t) => {
      const { manager } = await bench(t)
      const lease = await manager.acquire()
      lease.release()
      return await fails(() => lease.exports.add?.(1, 2))
    },
  },
  ERR_WASM_DRAIN_TIMEOUT: {
    rejects: async (t) => {
      const { manager } = await bench(t)
      const lease = await manager.acquire()
      const error = await fails(() => manager.reload({ drainTimeoutMs: 5 }))
      lease.release()
      return error
    },
  },
  ERR_WASM_RELOAD_FAILED: {
    rejects: async (t) => {
      const { manager } = await bench(t, { saveState: () => Promise.reject(new Error('no')) })
      return await fails(() => manager.reload())
    },
    throws: async (t) => {
      const { manager } = await bench(t, {
        saveState: () => {
          throw new Error('no')
        },
      })
      return await fails(() => manager.reloadSync())
    },
  },
  ERR_WASM_CLOSED: {
    rejects: async (t) => {
      const { manager } = await bench(t)
      await manager.close()
      return await fails(() => manager.call('add', [1, 2]))
    },
    throws: async (t) => {
      const { manager } = await bench(t)
      await manager.close()
      return await fails(() => manager.exports.add?.(1, 2))
    },
  },
  ERR_WASM_SNAPSHOT_UNSUPPORTED: {
    rejects: async (t) => {
      const manager = await managed(t, holder, { imports: { env: { value: {} } } })
      return fails(() => manager.fork())
    },
    throws: async (t) => {
      const manager = await managed(t, dropper)
      return fails(() => manager.snapshotSync())
    },
  },
  ERR_WASM_INTERNAL: {
    // Nothing that a user can do leads here; the hook panics inside the addon, on this thread.
    rejects: async () => {
      const binding = createRequire(import.meta.url)('../binding.js') as Record<string, () => unknown>
      return await fails(() => binding.__panic?.())
    },
  },
}

test('every code of the addon is provoked here, or arrives with another capability', () => {
  assert.deepEqual([...Object.keys(PROVOKED), ...NOT_YET].sort(), [...errorCodes].sort())
})

for (const [code, { rejects, throws }] of Object.entries(PROVOKED) as [
  WasmErrorCode,
  { rejects: Provocation; throws?: Provocation },
][]) {
  for (const [how, provoke] of [
    ['by a promise', rejects],
    ['by a throw', throws],
  ] as const) {
    if (provoke === undefined) continue
    test(`${code} comes ${how} as a WasmError with its code and a text that helps`, LIMIT, async (t) => {
      const error = await provoke(t)
      hasCode(code)(error)
      assert.ok(error instanceof WasmError && error instanceof Error)
      assert.equal(error.name, 'WasmError')
      assert.equal(Object.prototype.toString.call(error), '[object Error]')
      assert.ok(error.message.length >= 20, error.message)
      assert.match(error.stack ?? '', /WasmError/)
      assert.ok(inspect(error).includes(code), inspect(error))
      assert.ok((errorCodes as readonly string[]).includes(error.code))
    })
  }
}

test('errors of a manager say which one and which generation', LIMIT, async (t) => {
  const { manager } = await bench(t, { name: 'the name' })
  await manager.reload()
  for (const run of [() => manager.call('boom'), () => manager.call('nope'), () => manager.callSync('nope')]) {
    const error = (await fails(run)) as WasmError
    assert.deepEqual([error.manager, error.generation], ['the name', 2])
  }
})

test('fields that do not belong to an error are absent, not undefined', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const trap = (await fails(() => manager.call('boom'))) as WasmError
  assert.deepEqual(Object.keys(trap).sort(), ['code', 'generation', 'manager', 'trap', 'wasmStack'])
  const missing = (await fails(() => manager.call('nope'))) as WasmError
  assert.deepEqual(Object.keys(missing).sort(), ['code', 'generation', 'manager'])
  assert.equal(Object.hasOwn(missing, 'cause'), false)
})

test('a failed hook keeps phase and cause; a cause of undefined is still a cause', LIMIT, async (t) => {
  const { manager } = await bench(t, {
    saveState: () => {
      throw undefined
    },
  })
  const error = (await fails(() => manager.reload())) as WasmError
  assert.deepEqual([error.phase, error.cause], ['save', undefined])
})

test(
  'the stack of a synchronous error leads to the caller, that of a promise at least names the error',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    function theCaller() {
      manager.exports.boom?.()
    }
    const error = (await fails(theCaller)) as WasmError
    assert.match(error.stack ?? '', /theCaller/)
  },
)

test(
  'the remedy stands in the text: what to do about a full queue, a swap, a busy instance, a closed manager',
  LIMIT,
  async (t) => {
    const expected: [WasmErrorCode, RegExp][] = [
      ['ERR_WASM_QUEUE_FULL', /raise maxQueue/],
      ['ERR_WASM_RELOADING', /use call\(\)/],
      ['ERR_WASM_BUSY', /call\(\)|reload\(\)/],
      ['ERR_WASM_CLOSED', /create a new manager/],
      ['ERR_WASM_STALE_HANDLE', /use\(\) or acquire\(\)/],
      ['ERR_WASM_DRAIN_TIMEOUT', /onDrainTimeout: 'interrupt'/],
      ['ERR_WASM_LINK', /options\.imports/],
      ['ERR_WASM_ASYNC_IMPORT', /imports object itself/],
    ]
    for (const [code, text] of expected) hasCode(code, text)(await PROVOKED[code]?.rejects(t))
  },
)

test(
  'an error that crosses to another thread by structured clone is still an Error with its text',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    const error = (await fails(() => manager.call('boom'))) as WasmError
    const copy = structuredClone(error)
    assert.ok(copy instanceof Error)
    assert.equal(copy.message, error.message)
  },
)

test('an import that throws an Error of its own with a code of ours is passed on, not mistaken', LIMIT, async (t) => {
  const source = wat('(module (import "env" "f" (func $f)) (func (export "run") (call $f)))')
  const thrown = Object.assign(new Error('mine'), { code: 'ERR_WASM_TRAP' })
  const manager = await managed(t, source, {
    imports: {
      env: {
        f: () => {
          throw thrown
        },
      },
    },
  })
  assert.equal(await fails(() => manager.call('run')), thrown)
  assert.equal(await fails(() => manager.exports.run?.()), thrown)
  assert.equal(manager.generation, 1)
})

test('a WasmError of another manager passes through an import as itself', LIMIT, async (t) => {
  const source = wat('(module (import "env" "f" (func $f)) (func (export "run") (call $f)))')
  const inner = await managed(t, wat('(module (func (export "boom") unreachable))', 'inner'))
  const outer = await managed(t, source, { imports: { env: { f: () => inner.exports.boom?.() } } })
  for (const run of [() => outer.exports.run?.(), () => outer.call('run')]) {
    const error = (await fails(run)) as WasmError
    hasCode('ERR_WASM_TRAP')(error)
    assert.equal(error.manager, 'inner')
  }
  // The outer instance was not at fault.
  assert.equal(outer.generation, 1)
  assert.equal(outer.stats().calls.trapped, 0)
})

test('a module that needs nothing still says its name in errors', LIMIT, async (t) => {
  const manager = await managed(t, adder('tiny'))
  await assert.rejects(manager.call('nope'), hasCode('ERR_WASM_EXPORT_NOT_FOUND', /tiny/))
})
