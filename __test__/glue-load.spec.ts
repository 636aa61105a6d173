// The loader of unmodified glue: every way by which files reach one another, afresh for each generation.
// Most shadows are marked stand-ins, because the loader does not care whose WebAssembly it hands on.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdirSync, realpathSync, symlinkSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { test } from 'node:test'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { inspect } from 'node:util'
import { adder, temporaryFolder } from './guests.ts'
import { STRAYS } from './support.ts'

/** What glue exports is for glue to say. */
type Any = ReturnType<typeof JSON.parse>

interface Program {
  evaluate(shadows: object): Promise<Any>
  evaluateSync(shadows: object): Any
}
interface Options {
  parentURL?: string | URL
  include?: string[]
  conditions?: 'require' | 'import'
}
const LOADER = fileURLToPath(new URL('../lib/glue/load.js', import.meta.url))
const { prepare } = createRequire(import.meta.url)(LOADER) as {
  prepare(specifier: string | URL, options?: Options): Promise<Program>
}
const HERE = new URL('..', import.meta.url)
const REAL = { WebAssembly, FinalizationRegistry }

/** Stand-ins that say which generation they are of. */
const generation = (mark: number) => ({ WebAssembly: { mark }, FinalizationRegistry: { mark: -mark } })

/** Writes files (JSON where the value is an object) and returns their real folder. */
function folder(files: Record<string, string | object>): string {
  const made = realpathSync(temporaryFolder('glue'))
  for (const [name, content] of Object.entries(files)) {
    const path = join(made, name)
    mkdirSync(dirname(path), { recursive: true })
    const plain = typeof content === 'string' || content instanceof Uint8Array
    writeFileSync(path, plain ? content : JSON.stringify(content))
  }
  return made
}

/** A package `x` with these files, its entry being the first. */
async function glue(files: Record<string, string | object>, json: object = {}, options: Options = {}) {
  const main = `./${Object.keys(files)[0]}`
  const root = folder({ ...files, 'package.json': { name: 'x', main, ...json } })
  return { root, program: await prepare(join(root, main), options) }
}

const code = (value: string, message: RegExp) => (error: Any) => {
  assert.equal(error.code, value, inspect(error))
  assert.match(error.message, message)
  return true
}

/** Collects, and lets what collecting brings about happen, until `look` is true or it takes too long. */
async function collected(look: () => boolean = () => false, most = 5): Promise<void> {
  for (let i = 0; i < most && !look(); i += 1) {
    await new Promise((resolve) => setImmediate(resolve))
    globalThis.gc?.()
  }
}

// ---------------------------------------------------------------- CommonJS

test('CommonJS is evaluated afresh with the shadows of each generation', async () => {
  const { program } = await glue({
    'a.js': 'exports.w = WebAssembly; exports.f = FinalizationRegistry; exports.b = require("./b"); exports.n = {}',
    'b.js': 'module.exports = { w: WebAssembly, f: FinalizationRegistry, real: globalThis }',
  })
  const one = await program.evaluate(generation(1))
  const two = program.evaluateSync(generation(2))
  for (const [module, mark] of [
    [one, 1],
    [two, 2],
  ]) {
    assert.deepEqual([module.w.mark, module.f.mark, module.b.w.mark, module.b.f.mark], [mark, -mark, mark, -mark])
    // No Proxy where the source does not need one.
    assert.equal(module.b.real, globalThis)
  }
  assert.notEqual(one.n, two.n)
  assert.notEqual(one.b, two.b)
  assert.equal(typeof globalThis.WebAssembly.instantiate, 'function')
})

test('CommonJS files see what Node gives them', async () => {
  const { root, program } = await glue({
    'lib/a.js': `
      exports.self = this === module.exports && this === exports
      exports.sloppy = (function () { return this === globalThis })()
      exports.strict = (function () { 'use strict'; return this })()
      exports.names = [__filename, __dirname, module.id, module.filename, require.resolve('./b')]
      exports.main = require.main === module
      exports.parent = module.parent != null
      exports.module = module
      exports.loadedThen = module.loaded
      exports.json = require('../data.json')
      exports.jsonAgain = require('../data') === exports.json
      exports.viaModule = module.require('./b') === require('./b.js')
      exports.cached = require.cache[require.resolve('./b')].exports === require('./b')
      const before = require('./b')
      delete require.cache[require.resolve('./b')]
      exports.evicted = require('./b') !== before
      exports.cache = require.cache
      exports.fs = require('fs') === require('node:fs')
      exports.bytes = require('fs').readFileSync(require('path').join(__dirname, 'x.wasm')).length
      exports.args = arguments.length
    `,
    'lib/b.js': '"use strict"; module.exports = { strict: (function () { return this })() === undefined }',
    'lib/x.wasm': adder(),
    'data.json': { answer: 42 },
  })
  const one = await program.evaluate(generation(1))
  const two = await program.evaluate(generation(2))
  const a = join(root, 'lib', 'a.js')
  assert.deepEqual(one.names, [a, dirname(a), a, a, join(root, 'lib', 'b.js')])
  assert.deepEqual(
    [one.self, one.sloppy, one.strict, one.main, one.parent, one.loadedThen, one.module.loaded],
    [true, true, undefined, false, true, false, true],
  )
  assert.deepEqual(one.json, { answer: 42 })
  assert.deepEqual(
    [one.jsonAgain, one.viaModule, one.cached, one.evicted, one.fs, one.args],
    [true, true, true, true, true, 5],
  )
  assert.equal(one.bytes, adder().length)
  assert.equal(one.module.children.length, 3)
  assert.notEqual(one.cache, two.cache)
  assert.notEqual(one.json, two.json)
  assert.equal(createRequire(import.meta.url).cache[a], undefined)
})

test('CommonJS: cycles, a strict entry, module.exports that is a function, a file that fails and is tried again', async () => {
  const { program } = await glue({
    'a.js': `'use strict'
      module.exports = function f() { return undeclared }
      module.exports.early = 1
      module.exports.fromB = require('./b').seen
      module.exports.late = 2
      try { assigned = 1 } catch (error) { module.exports.error = error.name }
      globalThis.__tries = 0
      for (let i = 0; i < 2; i++) try { module.exports.third = require('./fails') } catch (error) { module.exports.thrown = error }
      delete globalThis.__tries`,
    'b.js': 'const a = require("./a"); exports.seen = { early: a.early, late: a.late }',
    'fails.js': 'if (++globalThis.__tries === 1) throw "mine"; module.exports = globalThis.__tries',
  })
  const module = await program.evaluate(REAL)
  assert.equal(module.name, 'f')
  assert.deepEqual(module.fromB, { early: 1, late: undefined })
  assert.equal(module.error, 'ReferenceError')
  assert.deepEqual([module.thrown, module.third], ['mine', 2])
})

// ---------------------------------------------------------------- ES modules

test('ES modules are evaluated afresh with the shadows of each generation', async () => {
  const { program } = await glue(
    {
      'a.js': `import { w, box } from './b.js'
        export { w, box }
        export const f = FinalizationRegistry
        export let wasm
        export function init() { wasm = WebAssembly }
        export default class Foo {}`,
      'b.js': 'export const w = WebAssembly\nexport const box = {}',
    },
    { type: 'module' },
  )
  const one = await program.evaluate(generation(1))
  const two = program.evaluateSync(generation(2))
  assert.deepEqual([one.w.mark, one.f.mark, two.w.mark, two.f.mark], [1, -1, 2, -2])
  assert.notEqual(one.box, two.box)
  assert.notEqual(one.default, two.default)
  assert.equal(one.default.name, 'Foo')
  // Live, extensible, and only by the module itself to be assigned.
  assert.equal(one.wasm, undefined)
  one.init()
  assert.deepEqual([one.wasm.mark, two.wasm], [1, undefined])
  assert.throws(() => {
    one.wasm = 1
  }, TypeError)
  one.extra = 5
  assert.deepEqual(Object.keys(one), ['box', 'default', 'f', 'init', 'w', 'wasm', 'extra'])
  assert.equal(one[Symbol.toStringTag], 'Module')
})

/** The entries of a namespace, and of those in it. */
function flat(namespace: object): [string, Any][] {
  return Object.entries(namespace).map(([key, value]) => [
    key,
    value?.[Symbol.toStringTag] === 'Module' ? flat(value) : value,
  ])
}

/** What Node itself says of the same files. Only a module that has no state may be asked so. */
async function likeNode(files: Record<string, string>): Promise<Any> {
  const { root, program } = await glue(files, { type: 'module' })
  const ours = await program.evaluate(REAL)
  writeFileSync(
    join(root, 'asked.mjs'),
    `import * as ns from ${JSON.stringify(pathToFileURL(join(root, Object.keys(files)[0] ?? '')).href)}
    const { inspect } = await import('node:util')
    const flat = ${flat}
    process.stdout.write(inspect(flat(ns), { depth: 9 }))`,
  )
  const theirs = execFileSync(process.execPath, [join(root, 'asked.mjs')], { encoding: 'utf8' })
  assert.equal(inspect(flat(ours), { depth: 9 }), theirs)
  return ours
}

test('every form of import and export means what it means in Node', async () => {
  await likeNode({
    'a.js': `import def, { named as other, "a string" as quoted, default as again } from './b.js'
import * as all from './b.js'
import './side.js'
export { def, other as "x y", quoted, again as default }
export * from './b.js'
export * from './c.js'
export * as inner from './c.js'
export { default as fromC, c as renamed } from './c.js'
export { other as await }
export const [p, { q, ...r }, s = 3] = [1, { q: 2, t: 4, u: 5 }]
export var v1 = 1, v2
export let l1
l1 = 'assigned'
export function hoisted() { return other }
export async function* gen() {}
export const effect = globalThis.__glueSide, same = all.named === other, called = hoisted()
export {}
delete globalThis.__glueSide
`,
    'b.js': `export default function () {}
const a = 1
export { a as named, a as "a string" }
export const onlyB = 'b', both = 'from b'
export const local = 'kept'
`,
    'c.js': `export default (class {})
export const c = 'c', both = 'from c', onlyC = 'c'
`,
    'side.js': 'globalThis.__glueSide = "ran"',
  })
})

test('default exports have the names that they have in Node', async () => {
  const sources = [
    'export default function () {}',
    'export default async function /* ( */ * // (\n () {}',
    'export default function named() {}',
    'export default class {}',
    'export default class Named {}\n(function () {})()',
    'export default class {}\n(function () {})()',
    'export default () => {}',
    'export default (() => {});',
    'export default (class {})',
    'export default (1, function () {}) // end',
    'export default { default: 1 } /* end */ ;',
    'export default async () => await 1',
    'export default [1, 2]\nexport const x = 1',
    'const d = function () {}\nexport default d',
  ]
  for (const source of sources) await likeNode({ 'a.js': source })
})

test('imported names are replaced where they mean the import, and nowhere else', async () => {
  const module = await likeNode({
    'a.js': `import { f, x, tag, K } from './b.js'
export const out = []
const log = (...values) => out.push(values.map(String).join())
log(x, f(), (f)(), f?.(), new f().constructor === f, typeof f, tag\`t\`)
log({ x }.x, { x: 1 }.x, { [x]: 2 }[x], { f() { return 'method' } }.f(), { x, f }.f === f)
log((function (x) { return x })('parameter'), ((x) => x)('arrow'), ((y = x) => y)(), (({ x }) => x)({ x: 'pattern' }))
log((function f() { return typeof f })(), (function () { var x = 'var'; return x })(), (function () { { var x } return x })())
log((function (a = x) { var x = 'body'; return a })(), (function () { return x; function x() {} })().name)
{ let x = 'block'; log(x) }
{ function f() { return 'in block' } log(f()) }
for (let x = 0; x < 1; x++) log('for', x)
for (const x of ['of']) log(x)
for (const x in { in: 1 }) log(x)
for (const y of [x]) log(y)
try { throw 'caught' } catch (x) { log(x) }
try { throw 'kept' } catch { log(x) }
try { throw { x: 'destructured' } } catch ({ x }) { log(x) }
switch (1) { case 1: let x = 'case'; log(x) }
switch (x) { case x: log('switched')
f() }
class A extends K { x = x; static x = x; [x + x]() { return super.k() } static { var x2 = x; log(x2) } static { let x = 'static'; log(x) } get f() { return f } }
log(new A().x, A.x, new A()[x + x](), new A().f === f, (class x { static n = x.name }).n, (class { x() { return x } }).name)
x: for (;;) { break x }
f: for (const _ of [1]) { continue f }
let y = x
f()
y = x
;[y] = [x + 1]
log(y)
if (y) f()
else f()
do f()
while (false)
const o = { x: { x } }
log(o.x.x, o?.x, o['x'] === o.x, \`\${x}\`)
let z
({ z = x } = {})
log(z)
const errors = []
try { x = 1 } catch (error) { errors.push(error.name) }
try { x++ } catch (error) { errors.push(error.name) }
try { ({ x } = { x: 1 }) } catch (error) { errors.push(error.name) }
try { [x = 5] = [] } catch (error) { errors.push(error.name) }
log(errors, x)
var $molt = 'taken', $molt_ = 'too'
log($molt, $molt_, this, typeof exports, typeof require)
`,
    'b.js': `export function f() { return this }
export const x = 'x', tag = function (strings) { return [this, strings[0]] }
export class K { k() { return 'k' } }
`,
  })
  assert.equal(module.out[0], 'x,undefined,undefined,undefined,true,function,,t')
})

test('ES modules: cycles see hoisted functions, dead zones and live bindings', async () => {
  const { program } = await glue(
    {
      'a.js': `import { early, late } from './b.js'
        export function hoisted() { return 'hoisted' }
        export default function () { return 'default' }
        export let count = 1
        export const bump = () => ++count
        export { early, late }`,
      'b.js': `import def, { hoisted, count } from './a.js'
        import * as a from './a.js'
        export const early = [hoisted(), def(), def.name]
        try { count } catch (error) { early.push(error.name) }
        try { a.count } catch (error) { early.push(error.name) }
        export const late = () => [count, a.count]`,
    },
    { type: 'module' },
  )
  const module = await program.evaluate(REAL)
  assert.deepEqual(module.early, ['hoisted', 'default', 'default', 'ReferenceError', 'ReferenceError'])
  assert.deepEqual(module.late(), [1, 1])
  module.bump()
  assert.deepEqual([module.count, ...module.late()], [2, 2, 2])
})

test('names that are not there, or are there twice, are errors before anything runs', async () => {
  const b = 'export const b = 1\nglobalThis.__ran = true'
  for (const source of [
    'import { no } from "./b.mjs"',
    'export { no } from "./b.mjs"',
    'import no from "./b.mjs"',
    'import { no } from "./star.mjs"',
    'import { c as no } from "./twice.mjs"',
    'import { no } from "node:fs"',
    'import { no } from "./c.cjs"',
  ]) {
    const { program } = await glue({
      'a.mjs': source,
      'b.mjs': b,
      'star.mjs': 'export * from "./b.mjs"; export * from "./star.mjs"',
      'twice.mjs': 'export * from "./c1.mjs"; export * from "./c2.mjs"',
      'c1.mjs': 'export const c = 1',
      'c2.mjs': 'export const c = 2',
      'c.cjs': 'exports.yes = 1',
    })
    await assert.rejects(program.evaluate(REAL), { name: 'SyntaxError', message: /does not provide an export named/ })
    assert.equal((globalThis as Any).__ran, undefined, source)
  }
})

test('modules run once, in the order of the source; an error stays an error', async () => {
  const { program } = await glue(
    {
      'a.js': `export * from './b.js'
        import './c.js'
        export const order = globalThis.__order
        export const again = () => Promise.allSettled([import('./fails.js'), import('./fails.js'), import('./needs.js')])`,
      'b.js': 'import "./d.js"; globalThis.__order.push("b"); export const b = 1',
      'c.js': 'import "./d.js"; globalThis.__order.push("c")',
      'd.js': '(globalThis.__order = []).push("d")',
      'fails.js': 'globalThis.__order.push("f"); throw new RangeError("own")',
      'needs.js': 'import "./fails.js"; globalThis.__order.push("never")',
    },
    { type: 'module' },
  )
  const module = await program.evaluate(REAL)
  assert.deepEqual(module.order, ['d', 'b', 'c'])
  const results = await module.again()
  assert.deepEqual(module.order, ['d', 'b', 'c', 'f'])
  assert.ok(results.every(({ reason }: Any) => reason instanceof RangeError && reason === results[0].reason))
  delete (globalThis as Any).__order
})

test('top-level await: waited for where it can be, a clear error where not', async () => {
  const files = {
    'a.mjs': `import { b } from './b.mjs'
      import { late } from './c.mjs'
      export const seen = [b, late]
      export { order } from './order.mjs'
      import { order } from './order.mjs'
      order.push('a')`,
    'b.mjs': `import { order } from './order.mjs'
      order.push('b')
      export const b = await new Promise((resolve) => setImmediate(resolve, 'awaited'))
      for await (const one of [1]) order.push('b' + one)`,
    'c.mjs':
      'import { order } from "./order.mjs"; order.push("c"); export const late = (async () => await 1)() instanceof Promise',
    'order.mjs': 'export const order = []',
    'sync.cjs': 'module.exports = require("./a.mjs")',
    'rejects.mjs': 'await Promise.reject(new RangeError("own"))',
    'needs.mjs': 'import "./rejects.mjs"',
  }
  const { root, program } = await glue(files)
  assert.throws(() => program.evaluateSync(REAL), code('ERR_WASM_ASYNC_IMPORT', /b\.mjs has a top-level await/))
  const module = await program.evaluate(REAL)
  assert.deepEqual(
    [module.seen, module.order],
    [
      ['awaited', true],
      ['b', 'c', 'b1', 'a'],
    ],
  )
  const sync = await prepare(join(root, 'sync.cjs'))
  await assert.rejects(sync.evaluate(REAL), code('ERR_WASM_ASYNC_IMPORT', /top-level await/))
  const needs = await prepare(join(root, 'needs.mjs'))
  await assert.rejects(needs.evaluate(REAL), { name: 'RangeError', message: 'own' })
})

test('import.meta', async () => {
  const { root, program } = await glue(
    {
      'sub/a.js': `const { url, dirname, filename } = import.meta
        export { url, dirname, filename }
        export const b = import.meta.resolve('./b.js'), fs = import.meta.resolve('fs'), self = import.meta.resolve('x/b')
        export const same = import.meta === import.meta
        import.meta.mine = 1
        export const mine = () => import.meta.mine
        export { other } from './b.js'`,
      'sub/b.js': 'export const other = import.meta.url',
    },
    { type: 'module', exports: { '.': './sub/a.js', './b': './sub/b.js' } },
  )
  const module = await program.evaluate(REAL)
  const url = (name: string) => pathToFileURL(join(root, 'sub', name)).href
  assert.deepEqual(
    [module.url, module.filename, module.dirname],
    [url('a.js'), join(root, 'sub', 'a.js'), join(root, 'sub')],
  )
  assert.deepEqual([module.b, module.self, module.fs, module.other], [url('b.js'), url('b.js'), 'node:fs', url('b.js')])
  assert.deepEqual([module.same, module.mine()], [true, 1])
})

test('import.meta.resolve does not look whether there is such a file, as with Node', async () => {
  const text = `
    const { resolve } = import.meta
    export const beside = resolve('./none.wasm'), above = resolve('../none.js'), url = resolve('file:///none.js')
    export let error
    try { resolve('none') } catch (e) { error = e.code }`
  const { root, program } = await glue({ 'a.mjs': text })
  const { beside, above, url, error } = await program.evaluate(REAL)
  assert.equal(beside, pathToFileURL(join(root, 'none.wasm')).href)
  assert.equal(above, pathToFileURL(join(dirname(root), 'none.js')).href)
  assert.equal(url, 'file:///none.js')
  assert.equal(error, 'ERR_MODULE_NOT_FOUND')
  // Bun's own must not be taken off.
  writeFileSync(join(root, 'native.mjs'), "export const beside = import.meta.resolve('./none.wasm')")
  const { beside: nodes } = await import(pathToFileURL(join(root, 'native.mjs')).href)
  assert.equal(beside, nodes)
})

test('packages made for bundlers may leave endings out', async () => {
  const { program } = await glue(
    {
      'a.js': `export { b } from './b'; export { c } from './c'; export const d = import('./c/d').then(({ d }) => d)`,
      'b.js': 'export const b = 1',
      'c/index.js': `export { d as c } from './d'`,
      'c/d.js': 'export const d = 2',
    },
    { type: 'module' },
  )
  const { b, c, d } = await program.evaluate(REAL)
  assert.deepEqual([b, c, await d], [1, 2, 2])
  const { program: exact } = await glue(
    { 'a.js': `export { b } from './b'`, b: 'module.exports = 0', 'b.js': 'export const b = 1' },
    { type: 'module' },
  )
  await assert.rejects(exact.evaluate(REAL), SyntaxError)
})

test('dynamic import, from both kinds of files and of both kinds of files', async () => {
  const b = 'export const w = WebAssembly, box = {}; export default 7'
  const load = `
    const b = () => import('./b.mjs')
    const c = () => import(\`./c.\${'cjs'}\`, {})
    const text = "import('./no.mjs')" // import('./no.mjs')
    const none = () => import('./none.mjs')
    const fs = () => import('fs')
    const source = () => new Function('return import("node:path")')()`
  const { root, program } = await glue({
    'a.cjs': `${load}\nmodule.exports = { b, c, text, none, fs, source }`,
    'a.mjs': `${load}\nexport { b, c, text, none, fs, source }`,
    'b.mjs': b,
    'c.cjs': 'exports.w = WebAssembly; exports.later = 1; exports.default = 2',
  })
  for (const one of [program, await prepare(join(root, 'a.mjs'))]) {
    const module = one.evaluateSync(generation(3))
    const namespace = await module.b()
    assert.deepEqual([namespace.w.mark, namespace.default], [3, 7])
    assert.equal(await module.b(), namespace)
    assert.notEqual((await one.evaluateSync(generation(3)).b()).box, namespace.box)
    const common = await module.c()
    assert.deepEqual([common.w.mark, common.later, common.default.default], [3, 1, 2])
    assert.equal(module.text, "import('./no.mjs')")
    await assert.rejects(module.none(), code('ERR_MODULE_NOT_FOUND', /none\.mjs/))
    assert.equal((await module.fs()).readFileSync, (await import('node:fs')).readFileSync)
    assert.equal(typeof (await module.source()).join, 'function')
  }
})

test('JSON with attributes; builtins with and without prefix; CommonJS as a default import and by name', async () => {
  const { program } = await glue({
    'a.mjs': `import data from './data.json' with { type: 'json' }
      import { readFileSync as one } from 'fs'
      import fs, { readFileSync as two } from 'node:fs'
      import * as path from 'path'
      import c, { yes, w } from './c.cjs'
      import * as all from './c.cjs'
      export * from './c.cjs'
      export * from './star.mjs'
      export const same = [one === two, fs.readFileSync === one, path.default.join === path.join]
      export const dynamic = (await import('./data.json', { with: { type: 'json' } })).default === data
      export { data, c, yes, w, all }
      export { both } from './mixed.mjs'`,
    'mixed.mjs': 'export * from "./c.cjs"; export * from "./esm.mjs"',
    'esm.mjs': 'export const both = "of the ES module"',
    'star.mjs': 'export * from "./late.cjs"',
    'c.cjs': 'module.exports = { yes: 1, both: 0, w: WebAssembly, get lazy() { throw new Error("asked") } }',
    'late.cjs': 'exports.late = "late"',
    'data.json': { deep: { answer: 42 } },
  })
  const module = await program.evaluate(generation(1))
  assert.deepEqual(module.data, { deep: { answer: 42 } })
  assert.deepEqual([module.same, module.dynamic], [[true, true, true], true])
  assert.deepEqual([module.c.yes, module.yes, module.all.yes, module.w.mark], [1, 1, 1, 1])
  assert.equal(module.all.default, module.c)
  assert.deepEqual([module.late, module.both], ['late', 'of the ES module'])
})

// ---------------------------------------------------------------- WebAssembly as a module

/** Imports hook(i32) -> i32 from `from`; exports run = hook(x) + 1, answer = 42 and count, how often it ran. */
function bound(from: string): Uint8Array {
  const text = (value: string) => [value.length, ...Buffer.from(value)]
  const section = (id: number, ...bytes: number[]) => [id, bytes.length, ...bytes]
  const body = [0, 0x23, 1, 0x41, 1, 0x6a, 0x24, 1, 0x20, 0, 0x10, 0, 0x41, 1, 0x6a, 0x0b]
  return Uint8Array.from([
    ...[0, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(1, 1, 0x60, 1, 0x7f, 1, 0x7f),
    ...section(2, 1, ...text(from), ...text('hook'), 0, 0),
    ...section(3, 1, 0),
    ...section(6, 2, 0x7f, 0, 0x41, 42, 0x0b, 0x7f, 1, 0x41, 0, 0x0b),
    ...section(7, 3, ...text('run'), 0, 1, ...text('answer'), 3, 0, ...text('count'), 3, 1),
    ...section(10, 1, body.length, ...body),
  ])
}

test('wasm-bindgen for bundlers: x_bg.js and x_bg.wasm import one another, in the old way and the new', async () => {
  const bg = 'export function hook(value) { return value * 2 }\nexport function run(value) { return wasm.run(value) }\n'
  const variants = [
    {
      'x.js': `import * as wasm from './x_bg.wasm'
        export * from './x_bg.js'
        import { __wbg_set_wasm } from './x_bg.js'
        __wbg_set_wasm(wasm)
        export { wasm }`,
      'x_bg.js': `let wasm\nexport function __wbg_set_wasm(value) { wasm = value }\n${bg}`,
    },
    {
      'x.js': "import * as wasm from './x_bg.wasm'\nexport * from './x_bg.js'\nexport { wasm }",
      'x_bg.js': `import * as wasm from './x_bg.wasm'\n${bg}`,
    },
  ]
  for (const files of variants) {
    const { program } = await glue({ ...files, 'x_bg.wasm': bound('./x_bg.js') }, { type: 'module' })
    const made: WebAssembly.Module[] = []
    class Module extends WebAssembly.Module {
      constructor(bytes: BufferSource) {
        super(bytes)
        made.push(this)
      }
    }
    const shadows = {
      WebAssembly: Object.create(WebAssembly, { Module: { value: Module }, Instance: { value: WebAssembly.Instance } }),
      FinalizationRegistry,
    }
    const one = await program.evaluate(shadows)
    const two = program.evaluateSync(shadows)
    assert.equal(one.run(20), 41)
    assert.deepEqual([one.wasm.answer, one.wasm.count, two.wasm.count], [42, 1, 0])
    assert.equal(one.run(1), 3)
    assert.deepEqual(Object.keys(one.wasm).sort(), ['answer', 'count', 'run'])
    assert.deepEqual([one.wasm.count, two.wasm.count, made.length], [2, 0, 2])
  }
})

test('import { add }, re-export, and import source, of a .wasm file', async () => {
  const { root, program } = await glue({
    'a.mjs': `import { add } from './add.wasm'
      import source module from './bound.wasm'
      export * from './add.wasm'
      export const three = add(1, 2), isModule = module instanceof WebAssembly.Module
      export const dynamic = async () => [(await import('./add.wasm')).add === add, await import.source('./bound.wasm') === module]`,
    'add.wasm': adder(),
    'bound.wasm': bound('nobody'),
    'bad.mjs': 'import "./bad.wasm"',
    'bad.wasm': bound('./none.mjs'),
    'less.mjs': 'import "./less.wasm"',
    'less.wasm': bound('./empty.mjs'),
    'empty.mjs': '',
  })
  const module = program.evaluateSync(REAL)
  assert.deepEqual([module.three, module.add(4, 5), module.isModule], [3, 9, true])
  assert.deepEqual(await module.dynamic(), [true, true])
  await assert.rejects((await prepare(join(root, 'bad.mjs'))).evaluate(REAL), code('ERR_MODULE_NOT_FOUND', /none\.mjs/))
  const less = await prepare(join(root, 'less.mjs'))
  await assert.rejects(less.evaluate(REAL), { name: 'SyntaxError', message: /empty\.mjs.*named 'hook'/ })
})

// ---------------------------------------------------------------- shadows

test('the global object answers the shadows where a file asks it', async () => {
  const asks = `[
    globalThis.WebAssembly, global.WebAssembly, globalThis['WebAssembly'], globalThis?.WebAssembly,
    (typeof self !== 'undefined' ? self : globalThis).WebAssembly, globalThis.globalThis.WebAssembly, WebAssembly,
    destructured]`
  const common = `
    const { WebAssembly: destructured } = globalThis
    const marks = ${asks}.map((one) => one.mark)
    const registry = globalThis.FinalizationRegistry.mark
    const has = 'WebAssembly' in globalThis && !('nothing' in globalThis)
    globalThis.__glueShared = 'shared'
    const kinds = [typeof globalThis.setTimeout, globalThis.performance.now() > 0, globalThis.Array === Array,
      typeof self, typeof window, typeof globalThis.process.pid, globalThis === global]
    const assigned = () => { globalThis.WebAssembly = { mark: 'own' }; return globalThis.WebAssembly.mark }`
  for (const source of [
    `${common}\nmodule.exports = { marks, registry, has, kinds, assigned }`,
    `${common}\nexport { marks, registry, has, kinds, assigned }`,
  ]) {
    const { program } = await glue({ 'a.js': source })
    const module = await program.evaluate(generation(4))
    assert.deepEqual([module.marks, module.registry, module.has], [Array(8).fill(4), -4, true])
    assert.deepEqual(module.kinds, ['function', true, true, typeof self, 'undefined', 'number', true])
    assert.equal((globalThis as Any).__glueShared, 'shared')
    delete (globalThis as Any).__glueShared
    assert.equal(module.assigned(), 'own')
    assert.equal(globalThis.WebAssembly, WebAssembly)
    assert.equal((await program.evaluate(generation(5))).marks[0], 5)
  }
})

test('a file may declare the shadowed names itself', async () => {
  const declarations = [
    'const WebAssembly = { mark: "own" }, FinalizationRegistry = 1',
    'var WebAssembly = { mark: "own" }; var global = 1, globalThis = 2, self',
    'class FinalizationRegistry {}; let WebAssembly = { mark: "own" }',
    'function WebAssembly() {} WebAssembly.mark = "own"; function FinalizationRegistry() {}',
  ]
  for (const declaration of declarations) {
    for (const end of ['exports.mark = WebAssembly.mark', 'export const mark = WebAssembly.mark']) {
      const { program } = await glue({ 'a.js': `${declaration}\n${end}\nconst asks = () => globalThis.WebAssembly` })
      assert.equal(program.evaluateSync(generation(1)).mark, 'own')
    }
  }
  const { program } = await glue({
    'a.mjs': 'import { WebAssembly } from "./b.mjs"\nexport const { mark } = WebAssembly',
    'b.mjs': 'export const WebAssembly = { mark: "own" }',
  })
  assert.equal(program.evaluateSync(generation(1)).mark, 'own')
})

// ---------------------------------------------------------------- what belongs to the glue

test('other packages are shared, included ones are not; a nameless package.json is no border', async () => {
  const dep = (name: string) => ({
    [`node_modules/${name}/package.json`]: { name, exports: { import: './i.mjs', require: './r.cjs' } },
    [`node_modules/${name}/i.mjs`]: 'export const w = WebAssembly; export const box = {}',
    [`node_modules/${name}/r.cjs`]: 'exports.w = WebAssembly; exports.box = {}',
  })
  const root = folder({
    'package.json': { name: 'x' },
    'cjs.cjs':
      'exports.deps = [require("plain"), require("@in/cluded")]; exports.own = require("./esm/own.js"); exports.away = [require("nameless"), require("loose")]',
    'node_modules/nameless/package.json': {},
    'node_modules/nameless/index.js': 'module.exports = WebAssembly',
    'node_modules/loose.js': 'module.exports = WebAssembly',
    'esm/package.json': { type: 'module' },
    'esm/a.js':
      'import * as p from "plain"; import * as i from "@in/cluded"; import * as own from "./own.js"\nexport const deps = [p, i]; export { own }',
    'esm/own.js': 'export const w = WebAssembly, box = {}',
    ...dep('plain'),
    ...dep('@in/cluded'),
  })
  for (const entry of ['cjs.cjs', 'esm/a.js']) {
    const program = await prepare(join(root, entry), { include: ['@in/cluded'] })
    const one = await program.evaluate(generation(1))
    const two = program.evaluateSync(generation(2))
    assert.equal(one.deps[0].w, WebAssembly)
    assert.equal(one.deps[0].box, two.deps[0].box)
    assert.deepEqual([one.deps[1].w.mark, two.deps[1].w.mark], [1, 2])
    assert.notEqual(one.deps[1].box, two.deps[1].box)
    assert.deepEqual([one.own.w.mark, two.own.w.mark], [1, 2])
    if (entry === 'cjs.cjs') assert.deepEqual(one.away, [WebAssembly, WebAssembly])
    // Without being included it is shared.
    const shared = await (await prepare(join(root, entry))).evaluate(generation(3))
    assert.equal(shared.deps[1].w, WebAssembly)
  }
})

test('outside any package the glue is what lies in the same folder', async () => {
  const root = folder({
    'glue/a.cjs': 'exports.inside = require("./sub/b.cjs"); exports.outside = require("../c.cjs")',
    'glue/sub/b.cjs': 'exports.w = WebAssembly',
    'c.cjs': 'exports.w = WebAssembly',
  })
  const module = await (await prepare(join(root, 'glue/a.cjs'))).evaluate(generation(1))
  assert.equal(module.inside.w.mark, 1)
  assert.equal(module.outside.w, WebAssembly)
})

test('createRequire leads to the files of the glue, and to all others', async () => {
  const { program } = await glue({
    'a.mjs': `import module, { createRequire, builtinModules } from 'node:module'
      const require = createRequire(import.meta.url)
      export const b = require('./b.cjs'), same = module.createRequire(import.meta.filename)('./b.cjs') === b
      export const inner = b.create()('./b.cjs') === b
      export const dynamic = (await import('module')).createRequire(new URL('./none.js', import.meta.url))('./b.cjs') === b
      export const fs = require('fs').readFileSync === createRequire(process.cwd() + '/')('node:fs').readFileSync
      export const rest = builtinModules.includes('fs') && new module('id').id`,
    'b.cjs': 'exports.w = WebAssembly; exports.create = () => require("module").createRequire(__filename)',
  })
  const module = await program.evaluate(generation(1))
  assert.equal(module.b.w.mark, 1)
  assert.deepEqual([module.same, module.inner, module.dynamic, module.fs, module.rest], [true, true, true, true, 'id'])
})

// ---------------------------------------------------------------- finding and reading

test('specifiers: packages and their exports, imports and self-references, paths, URLs', async (t) => {
  const root = folder({
    'package.json': { name: 'app' },
    'local.js': 'exports.is = "local"',
    'node_modules/dual/package.json': {
      name: 'dual',
      exports: {
        '.': { import: './i.mjs', require: './r.cjs' },
        './sub/*': './subs/*.js',
        './only': { import: './i.mjs' },
      },
      imports: { '#inner': './subs/inner.js' },
    },
    'node_modules/dual/i.mjs':
      'import inner from "#inner"; import self from "dual/sub/inner"; export const is = "import", w = inner, same = inner === self',
    'node_modules/dual/r.cjs': 'exports.is = "require"',
    'node_modules/dual/subs/inner.js': 'module.exports = WebAssembly',
    'node_modules/@s/old/package.json': { name: '@s/old', main: 'lib' },
    'node_modules/@s/old/lib/index.js': 'exports.is = "main"',
    'node_modules/pack/package.json': { name: 'pack', module: 'pack.js' },
    'node_modules/pack/pack.js': 'export const is = "module"',
  })
  const parentURL = pathToFileURL(join(root, 'anything.js')).href
  const is = async (specifier: string | URL, options: Options = { parentURL }) =>
    (await (await prepare(specifier, options)).evaluate(generation(1))).is
  assert.equal(await is('dual'), 'require')
  assert.equal(await is('dual', { parentURL, conditions: 'import' }), 'import')
  assert.equal(await is('dual/only'), 'import')
  assert.equal((await (await prepare('dual/sub/inner', { parentURL })).evaluate(generation(1))).mark, 1)
  const dual = await (await prepare('dual/only', { parentURL })).evaluate(generation(1))
  assert.deepEqual([dual.w.mark, dual.same], [1, true])
  assert.equal(await is('@s/old'), 'main')
  assert.equal(await is('pack'), 'module')
  const local = pathToFileURL(join(root, 'local.js'))
  const ways = ['./local', './local.js', join(root, 'local.js'), local.href, local]
  for (const way of ways) assert.equal(await is(way), 'local')
  // A folder as the parent, and the current one without any.
  assert.equal(await is('dual', { parentURL: pathToFileURL(`${root}/`) }), 'require')
  const before = process.cwd()
  t.after(() => process.chdir(before))
  process.chdir(root)
  assert.equal(await is('./local.js', {}), 'local')
  assert.equal(await is('@s/old', {}), 'main')
})

test('what cannot be found is said by its specifier; other failures are their own', async () => {
  const root = folder({
    'package.json': { name: 'app' },
    'node_modules/closed/package.json': { name: 'closed', exports: { './a': './a.js' } },
    'bad.mjs': 'export const a = 1\nlet b = ;\n',
    'bad.cjs': 'let a\nlet b = ;\n',
    'static.mjs': 'import "./nowhere.mjs"',
    'package.mjs': 'import "not-installed"',
    'require.cjs': 'require("./nowhere")',
    'throws.cjs': 'throw Object.freeze({ mine: true })',
    'throws.mjs': 'throw null',
  })
  const parentURL = `${pathToFileURL(root).href}/`
  const load = async (name: string) => (await prepare(name, { parentURL })).evaluate(REAL)
  const away = ['not-installed', '@scope/none/sub', './nowhere.js', join(root, 'nowhere'), 'file:///nowhere/x.js', 'fs']
  for (const specifier of away) {
    await assert.rejects(prepare(specifier, { parentURL }), (error: Any) => {
      assert.ok(error.message.includes(specifier), error.message)
      return error.code === 'ERR_MODULE_NOT_FOUND'
    })
  }
  await assert.rejects(load('closed'), code('ERR_PACKAGE_PATH_NOT_EXPORTED', /closed/))
  await assert.rejects(load('./bad.mjs'), { name: 'SyntaxError', message: /bad\.mjs:2/ })
  await assert.rejects(load('./bad.cjs'), { name: 'SyntaxError', stack: /bad\.cjs:2/ })
  // Found before anything runs.
  await assert.rejects(prepare('./static.mjs', { parentURL }), code('ERR_MODULE_NOT_FOUND', /nowhere\.mjs/))
  await assert.rejects(prepare('./package.mjs', { parentURL }), code('ERR_MODULE_NOT_FOUND', /not-installed/))
  await assert.rejects(load('./require.cjs'), code('MODULE_NOT_FOUND', /nowhere/))
  await assert.rejects(load('./throws.cjs'), { mine: true })
  const thrown = await load('./throws.mjs').then(
    () => 'nothing',
    (error) => error,
  )
  assert.equal(thrown, null)
})

test('the kind of a file: by extension, by type, by syntax', async () => {
  const esm = 'export const kind = typeof module'
  const cjs = 'exports.kind = typeof module'
  const cases: [string, object, string, string][] = [
    ['a.mjs', { type: 'commonjs' }, esm, 'undefined'],
    ['a.cjs', { type: 'module' }, cjs, 'object'],
    ['a.js', { type: 'module' }, esm, 'undefined'],
    ['a.js', { type: 'commonjs' }, cjs, 'object'],
    ['a.js', {}, esm, 'undefined'],
    ['a.js', {}, cjs, 'object'],
    ['a.js', {}, `import.meta.url; ${esm}`, 'undefined'],
    ['a.js', {}, `await 1; ${esm}`, 'undefined'],
    ['a.js', {}, `${cjs}; const word = "import x from 'y'; export default"; import('fs')`, 'object'],
    ['a.js', {}, `#!/usr/bin/env node\n${cjs}`, 'object'],
    ['a.js', {}, `\uFEFF#!/usr/bin/env node\n${esm}`, 'undefined'],
  ]
  for (const [name, json, source, kind] of cases) {
    const { program } = await glue({ [name]: source }, json)
    assert.equal((await program.evaluate(REAL)).kind, kind, `${name} ${JSON.stringify(json)} ${source}`)
  }
  await assert.rejects(glue({ 'a.js': esm }, { type: 'commonjs' }), { name: 'SyntaxError' })
})

test('stack traces show the file and the line, and the column of the first line', async () => {
  const at = { 'import x': 4, first: 1 }
  const { root, program } = await glue({
    'a.mjs': `#! hashbang
import {
  fail } from './b.cjs'
export const thrown = () => { throw new Error('esm') }
export { fail }`,
    'b.cjs': 'exports.fail = () => { throw new Error("cjs") }',
  })
  const module = await program.evaluate(REAL)
  const stack = (fn: () => void): string => {
    try {
      fn()
    } catch (error) {
      return (error as Any).stack.split('\n')[1]
    }
    return ''
  }
  assert.ok(stack(module.thrown).includes(`${pathToFileURL(join(root, 'a.mjs')).href}:${at['import x']}:31`))
  assert.ok(stack(module.fail).includes(`${join(root, 'b.cjs')}:${at.first}:30`), stack(module.fail))
})

test('a linked package is the glue, wherever it is linked from', async () => {
  const real = folder({
    'package.json': { name: 'linked', main: 'a.js' },
    'a.js': 'exports.w = require("linked/b.js"); exports.dirname = __dirname',
    'b.js': 'module.exports = WebAssembly',
  })
  const root = folder({ 'package.json': { name: 'app' }, 'node_modules/empty.txt': '' })
  symlinkSync(real, join(root, 'node_modules', 'linked'), 'junction')
  symlinkSync(root, join(folder({}), 'app'), 'junction')
  mkdirSync(join(real, 'node_modules'))
  symlinkSync(real, join(real, 'node_modules', 'linked'), 'junction')
  const module = await (await prepare('linked', { parentURL: pathToFileURL(`${root}/`) })).evaluate(generation(1))
  assert.deepEqual([module.w.mark, module.dirname], [1, real])
})

// ---------------------------------------------------------------- without waiting

test('evaluateSync: external ES modules are there since prepare(); one that shows up late cannot be waited for', () => {
  const root = folder({
    'package.json': { name: 'x', type: 'module' },
    'a.js': 'export { value } from "external"',
    'late.js': 'import { run } from "./late.wasm"\nexport { run }',
    'late.wasm': bound('external/late'),
    'node_modules/external/package.json': {
      name: 'external',
      type: 'module',
      exports: { '.': './e.js', './late': './l.js' },
    },
    'node_modules/external/e.js': 'export const value = await Promise.resolve("external")',
    'node_modules/external/l.js': 'export const hook = await Promise.resolve((value) => value * 10)',
    // Without tsx, which has its own idea of ES modules that are required.
    'main.cjs': `const { prepare } = require(${JSON.stringify(LOADER)})
      const shadows = { WebAssembly, FinalizationRegistry }
      async function main() {
        const out = []
        out.push((await prepare(__dirname + '/a.js')).evaluateSync(shadows).value)
        const late = await prepare(__dirname + '/late.js')
        try { late.evaluateSync(shadows) } catch (error) { out.push(error.code, /l\\.js is an ES module/.test(error.message)) }
        out.push((await late.evaluate(shadows)).run(4))
        // Known now, and so no longer waited for.
        out.push(late.evaluateSync(shadows).run(5))
        process.stdout.write(JSON.stringify(out))
      }
      main()`,
  })
  const out = execFileSync(process.execPath, [join(root, 'main.cjs')], { encoding: 'utf8' })
  assert.deepEqual(JSON.parse(out), ['external', 'ERR_WASM_ASYNC_IMPORT', true, 41, 51])
})

test('require() of an ES module of the glue', async () => {
  const { program } = await glue({
    'a.cjs':
      'const m = require("./m.mjs"); exports.w = m.w; exports.same = m === require("./m.mjs"); exports.named = require("./e.mjs")',
    'm.mjs': 'import { c } from "./c.cjs"; export const w = WebAssembly; export { c }',
    'c.cjs': 'exports.c = 1',
    'e.mjs': 'const value = () => 1; export { value as "module.exports" }',
  })
  const module = program.evaluateSync(generation(1))
  assert.deepEqual([module.w.mark, module.same, module.named()], [1, true, 1])
})

// ---------------------------------------------------------------- memory

for (const [kind, files] of Object.entries<Record<string, string | object>>({
  CommonJS: {
    'a.js': `const big = new Array(20_000).fill(WebAssembly)
      const { big: other } = require('./b')
      exports.dynamic = () => import('./c.mjs')
      exports.use = () => big.length + other.length + globalThis.WebAssembly.mark`,
    'b.js':
      'exports.big = new Array(100).fill(require("./a")); require("module").createRequire(__filename)("./data.json")',
    'c.mjs': 'export const value = import.meta.url',
    'data.json': { a: 1 },
  },
  'ES modules': {
    'a.mjs': `import { big as other } from './b.mjs'
      import * as wasm from './add.wasm'
      import c from './c.cjs'
      import { createRequire } from 'module'
      const big = new Array(20_000).fill(WebAssembly)
      export const dynamic = () => import('./c.mjs')
      export const self = createRequire(import.meta.url)('./c.cjs') === c
      export const use = () => big.length + other.length + wasm.add(1, 2) + globalThis.performance.now()
      const kept = () => globalThis.WebAssembly`,
    'b.mjs': 'import { use } from "./a.mjs"; export const big = new Array(100).fill(() => use)',
    'c.mjs': 'export const value = await import.meta.url',
    'c.cjs': 'module.exports = {}',
    'add.wasm': adder(),
  },
})) {
  test(`a thousand generations of ${kind} leave nothing behind`, { timeout: 120_000 }, async () => {
    const { program } = await glue(files)
    const refs: WeakRef<object>[] = []
    const one = async (index: number) => {
      const module = await program.evaluate({
        WebAssembly: Object.create(WebAssembly),
        FinalizationRegistry: { index },
      })
      module.use()
      await module.dynamic()
      if (index % 100 === 0) refs.push(new WeakRef(module))
    }
    for (let i = 0; i < 100; i += 1) await one(i)
    await collected()
    const before = process.memoryUsage().heapUsed
    for (let i = 0; i < 1000; i += 1) await one(i)
    let grown = Infinity
    let left = Infinity
    // One generation alone is 160 KB.
    const isLittle = () => {
      grown = process.memoryUsage().heapUsed - before
      left = refs.filter((ref) => ref.deref() !== undefined).length
      return grown < 500_000 && left <= STRAYS
    }
    await collected(isLittle, 100)
    assert.ok(grown < 500_000 && left <= STRAYS, `${grown} bytes more, and ${left} of ${refs.length} are left`)
  })
}

// ---------------------------------------------------------------- packages from npm

test('@wasm-fmt/gofmt: for Node, as a source phase import, for bundlers', async () => {
  for (const specifier of ['@wasm-fmt/gofmt', '@wasm-fmt/gofmt/esm', '@wasm-fmt/gofmt/bundler']) {
    const program = await prepare(specifier, { parentURL: HERE })
    for (const module of [await program.evaluate(REAL), program.evaluateSync(REAL)]) {
      assert.equal(module.format('package main\nfunc  main( ) { }'), 'package main\n\nfunc main() {}\n')
    }
  }
})

test('@jitl/quickjs-wasmfile-release-sync: Emscripten in both kinds', async () => {
  let modules = 0
  const Spy = Object.create(WebAssembly, {
    instantiate: {
      value: (...args: [BufferSource]) => {
        modules += 1
        return WebAssembly.instantiate(...args)
      },
    },
    RuntimeError: { value: WebAssembly.RuntimeError },
  })
  for (const conditions of ['require', 'import'] as const) {
    modules = 0
    const program = await prepare('@jitl/quickjs-wasmfile-release-sync', { parentURL: HERE, conditions })
    for (let i = 0; i < 2; i += 1) {
      const variant = (await program.evaluate({ WebAssembly: Spy, FinalizationRegistry })).default
      const [load, FFI] = [await variant.importModuleLoader(), await variant.importFFI()]
      const quickjs = await load()
      const ffi = new FFI(quickjs)
      const runtime = ffi.QTS_NewRuntime()
      const context = ffi.QTS_NewContext(runtime, 0)
      const source = Buffer.from('6 * 7\0')
      const at = quickjs._malloc(source.length)
      quickjs.HEAPU8.set(source, at)
      const value = ffi.QTS_Eval(context, at, source.length - 1, 'a.js', 0, 0)
      assert.equal(ffi.QTS_GetFloat64(context, value), 42)
    }
    assert.equal(modules, 2)
  }
})
