// Several evaluations of the package over one addon, as test runners make them: for each test file, or on resetModules.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { workbench } from './guests.ts'
import { child, INDEX_URL, LIMIT, reported } from './support.ts'

/** `evaluate(context)`: the package once more, in a realm of its own where one is given, with the addon that is there. */
const EVALUATE = `
  import { createRequire } from 'node:module'
  import { readFileSync } from 'node:fs'
  import { dirname } from 'node:path'
  import vm from 'node:vm'
  const native = createRequire(${JSON.stringify(INDEX_URL)})
  const evaluate = (context) => {
    const modules = new Map()
    const load = (path) => {
      if (modules.has(path)) return modules.get(path).exports
      const module = { exports: {} }
      modules.set(path, module)
      const params = ['exports', 'require', 'module', '__filename', '__dirname']
      const from = createRequire(path)
      const require = (name) => {
        if (name.startsWith('node:')) return native(name)
        const found = from.resolve(name)
        return found.endsWith('.js') && found.startsWith(process.env.ROOT) ? load(found) : native(found)
      }
      const code = \`(function (\${params}) {\${readFileSync(path, 'utf8')}\\n})\`
      const body = context === undefined ? vm.runInThisContext(code, path) : vm.runInContext(code, context, path)
      body(module.exports, require, module, path, dirname(path))
      return module.exports
    }
    return load(native.resolve('./index.js'))
  }
  const realm = () => vm.createContext({ process, console, Buffer, URL, TextDecoder, TextEncoder, AbortController })
  const imports = { env: { entered() {}, hold: (key) => key } }
`
const env = { WORKBENCH: workbench, ROOT: fileURLToPath(new URL('..', import.meta.url)) }

test('evaluating the package again over the same addon gives a copy of its own, beside the others', LIMIT, async () => {
  const ended = await child(
    `${EVALUATE}
    const copies = [{ WasmModuleManager, WasmError }, evaluate(), evaluate(), evaluate(realm())]
    const seen = []
    const managers = []
    for (const { WasmModuleManager } of copies) {
      managers.push(await WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports }))
    }
    // In turns, so that what one of them leaves behind would be found by the others.
    for (let round = 0; round < 3; round += 1) {
      for (const [index, manager] of managers.entries()) {
        const own = copies[index].WasmError
        const rejected = await manager.call('boom').catch((error) => error instanceof own)
        let thrown = false
        try { manager.exports.boom() } catch (error) { thrown = error instanceof own }
        await manager.reload()
        manager.memory.buffer
        seen.push([rejected, thrown, manager.exports.add(round, index), await manager.call('hold', [index]), manager.exports.count()])
      }
    }
    for (const manager of managers) await manager.close()
    report(seen)
    `,
    { env },
  )
  const round = (number: number) => [0, 1, 2, 3].map((index) => [true, true, number + index, index, 1])
  assert.deepEqual(reported(ended), [...round(0), ...round(1), ...round(2)])
})

test('errors, arrays and objects are of the realm in which the package was evaluated', LIMIT, async () => {
  const ended = await child(
    `${EVALUATE}
    const context = realm()
    const copy = evaluate(context)
    const manager = copy.WasmModuleManager.createSync(process.env.WORKBENCH, { cache: false, imports })
    const name = (run) => {
      try { run() } catch (error) {
        const there = (text) => vm.runInContext(text, context)
        return ['RangeError', 'TypeError', 'Error'].filter((kind) => error instanceof there(kind))
      }
    }
    report([
      name(() => manager.memory.read(-1, 1)),
      name(() => manager.memory.write(0, {})),
      name(() => manager.exports.add(Symbol('none'), 1)),
      name(() => manager.callSync('add', [1n, 2])),
      name(() => manager.exports.boom()),
      name(() => new copy.WebAssembly.Memory({ initial: 2, maximum: 1 })),
      ...[manager.stats(), manager.stats().calls, manager.exports, await manager.reload()].map((object) =>
        Object.getPrototypeOf(object) === vm.runInContext('Object.prototype', context)),
      Object.getPrototypeOf(copy.WebAssembly.Module.exports(new copy.WebAssembly.Module(Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0))))
        === vm.runInContext('Array.prototype', context),
    ])
    await manager.close()
    `,
    { env },
  )
  const [range, type] = [
    ['RangeError', 'Error'],
    ['TypeError', 'Error'],
  ]
  assert.deepEqual(reported(ended), [range, type, type, type, ['Error'], range, true, true, true, true, true])
})

test('whoever looks for what keeps a process alive finds nothing of ours while nothing runs', LIMIT, async () => {
  const ended = await child(
    `${EVALUATE}
    import { createHook } from 'node:async_hooks'
    const made = []
    const hook = createHook({ init: (id, type, trigger, resource) => made.push([type, resource]) }).enable()
    const copy = evaluate(realm())
    hook.disable()
    // As jest --detectOpenHandles asks: what does not say is taken for open, but for promises and a function of napi-rs.
    const kinds = () => made.filter(([type, resource]) => !['PROMISE', 'CustomGC'].includes(type) && (!('hasRef' in resource) || resource.hasRef())).map(([type]) => type)
    const loaded = kinds()
    const manager = await copy.WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: () => new Promise((resolve) => { asked = resolve }) } },
    })
    let asked
    const idle = kinds()
    const call = manager.call('hold', [1])
    const busy = kinds()
    while (asked === undefined) await new Promise((resolve) => setImmediate(resolve))
    asked(2)
    await call
    report({ loaded, idle, busy, after: kinds() })
    `,
    { env },
  )
  const seen = reported<Record<string, string[]>>(ended)
  assert.deepEqual([seen.loaded, seen.idle, seen.after], [[], [], []])
  assert.ok(seen.busy?.includes('wasm-molt'), `while a call runs: ${seen.busy}`)
})

test('glue that is loaded in another realm is evaluated in it, ES modules too', LIMIT, async () => {
  const ended = await child(
    `${EVALUATE}
    import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
    import { tmpdir } from 'node:os'
    import { join } from 'node:path'
    const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-test-'))
    process.on('exit', () => rmSync(folder, { recursive: true }))
    writeFileSync(join(folder, 'glue.mjs'), \`
      import { join } from 'node:path'
      export const fail = () => { throw new Error(join('on', 'purpose')) }
      export const list = () => [1, 2]
    \`)
    const context = realm()
    const glue = await evaluate(context).loadGlue(join(folder, 'glue.mjs'), { cache: false })
    let error
    try { glue.module.fail() } catch (thrown) { error = thrown }
    const there = (text) => vm.runInContext(text, context)
    report([error.message, error instanceof there('Error'), /glue\\.mjs:3/.test(error.stack), Object.getPrototypeOf(glue.module.list()) === there('Array.prototype')])
    await glue.close()
    `,
    { env },
  )
  assert.deepEqual(reported(ended), ['on/purpose', true, true, true])
})

test('a copy that nobody uses any more is collected, with the realm that it was evaluated in', LIMIT, async () => {
  const ended = await child(
    `${EVALUATE}
    const use = async () => {
      const context = realm()
      const copy = evaluate(context)
      const manager = await copy.WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports, instances: 2 })
      manager.on('trap', () => {})
      await manager.call('boom').catch(() => {})
      await manager.reload()
      await manager.use((instance) => instance.call('add', [1, 2]))
      manager.memory.buffer
      await manager.close()
      return [new WeakRef(copy.WasmError), new WeakRef(vm.runInContext('Object', context))]
    }
    const held = []
    for (let i = 0; i < 5; i += 1) held.push(await use())
    const left = () => held.flat().filter((reference) => reference.deref() !== undefined).length
    // What was looked at stays until the turn is over.
    const turn = () => new Promise((resolve) => setImmediate(resolve))
    for (let i = 0; i < 50 && left() > 0; i += 1) {
      await turn()
      gc()
      await turn()
    }
    report(left())
    `,
    { env, flags: ['--expose-gc'] },
  )
  // The engine may keep the last one in some cache of its own.
  const left = reported<number>(ended)
  assert.ok(left <= 2, `${left} of 10 are still there`)
})
