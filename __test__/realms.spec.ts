// Values of other realms: what comes from a vm context is as good as our own.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import vm from 'node:vm'
import { adder, workbench } from './guests.ts'
import { hasCode, LIMIT, managed, outcome, WasmError, WasmModuleManager } from './support.ts'

/** Evaluates in a context of its own, whose `Object`, `Promise`, `Error` are not ours. */
const elsewhere = <T>(code: string, globals: object = {}): T =>
  vm.runInNewContext(code, { setImmediate, ...globals }) as T

test('options, imports, hooks and arguments of another realm are as good as our own', LIMIT, async (t) => {
  const steps: string[] = []
  const options = elsewhere<object>(
    `({
      cache: false,
      instances: 2,
      imports: (instance) => ({ env: { entered() {}, hold: async (key) => { await null; return key * 2 } } }),
      initialize: async () => { steps.push('initialize') },
      saveState: (instance) => Promise.resolve({ count: instance.exports.peek() }),
      restoreState: (instance, state) => { instance.exports.set(state.count); steps.push('restore ' + state.count) },
      limits: { timeoutMs: 30_000 },
    })`,
    { steps },
  )
  assert.ok(!(options instanceof Object))
  const manager = await managed(t, workbench, options)
  assert.deepEqual(steps.splice(0), ['initialize', 'initialize'])
  assert.equal(await manager.call('add', elsewhere('[1, { valueOf: () => 41 }]')), 42)
  assert.equal(manager.callSync('add', elsewhere('[1, 2]')), 3)
  assert.equal(await manager.call('hold', [21], elsewhere('({ timeoutMs: 20_000 })')), 42)
  assert.equal(manager.exports.add?.(elsewhere('new Number(5)'), 1), 6)
  manager.exports.set?.(9)
  await manager.reload(elsewhere(`({ reason: 'from elsewhere' })`))
  // Either replica may have been restored first.
  assert.deepEqual(steps.splice(0).sort(), ['initialize', 'initialize', 'restore 0', 'restore 9'])
  assert.equal(manager.stats().reloads['from elsewhere'], 1)
  assert.equal(manager.memory.write(8, elsewhere('new Uint8Array([1, 2, 3])')), 3)
  assert.deepEqual([...manager.memory.read(8, 3)], [1, 2, 3])
})

test('bytes of another realm are a source', LIMIT, async (t) => {
  const bytes: Uint8Array = elsewhere('new Uint8Array(bytes)', { bytes: [...adder()] })
  assert.equal(Object.prototype.isPrototypeOf.call(Uint8Array.prototype, bytes), false)
  for (const source of [bytes, bytes.buffer]) {
    const manager = await managed(t, source as Uint8Array)
    assert.equal(manager.exports.add?.(1, 2), 3)
  }
})

test('what code of another realm throws comes out as it is; what we throw is of our own realm', LIMIT, async (t) => {
  const thrown = elsewhere<Error>(`new TypeError('from elsewhere')`)
  const manager = await managed(t, workbench, {
    imports: elsewhere('({ env: { entered() { throw thrown }, hold: () => Promise.reject(thrown) } })', { thrown }),
  })
  assert.deepEqual(await outcome(manager.call('entered')), { error: thrown })
  assert.deepEqual(await outcome(manager.call('hold', [1])), { error: thrown })
  assert.throws(
    () => manager.exports.entered?.(),
    (error) => error === thrown,
  )
  // Called from there, too.
  const caught = elsewhere<unknown[]>(
    `[() => manager.exports.boom(), () => manager.exports.add(1n, 2), () => manager.memory.read(-1, 1)].map((f) => {
      try { return f() } catch (error) { return error }
    })`,
    { manager },
  )
  const [trap, type, range] = caught
  assert.ok(trap instanceof WasmError && trap instanceof Error && trap.code === 'ERR_WASM_TRAP', String(trap))
  assert.ok(type instanceof TypeError, String(type))
  assert.ok(range instanceof RangeError, String(range))
  const refused = elsewhere<Promise<unknown>>(`create(workbench, { instances: -1 }).catch((error) => error)`, {
    create: WasmModuleManager.create,
    workbench,
  })
  hasCode('ERR_WASM_INVALID_ARGUMENT')(await refused)
})
