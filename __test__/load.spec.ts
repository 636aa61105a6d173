// Loading: every kind of source, the cache between processes, and every way a module can be refused.
import assert from 'node:assert/strict'
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { pathToFileURL } from 'node:url'
import type { ManagerOptions, ModuleSource, WasmErrorCode } from '../index.js'
import { adder, binary, bulky, temporaryFolder, WASM_HEADER, wat, workbench } from './guests.ts'
import {
  child,
  hasCode,
  INDEX_URL,
  idleImports,
  LIMIT,
  managed,
  managedSync,
  outcome,
  reported,
  type WasmError,
  WasmModuleManager,
} from './support.ts'

function file(bytes: Uint8Array | string, name: string): string {
  const path = join(temporaryFolder('file'), name)
  writeFileSync(path, bytes)
  return path
}

const ADD_TEXT = '(module (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1))))'

const sources: [string, () => ModuleSource][] = [
  ['a path to .wasm', () => file(adder(), 'adder.wasm')],
  ['a path to .wat', () => file(ADD_TEXT, 'adder.wat')],
  ['a path with spaces and other letters', () => file(adder(), 'ein Modul – größer.wasm')],
  ['a path to .wat that holds bytes', () => file(adder(), 'bytes.wat')],
  ['a file URL', () => pathToFileURL(file(adder(), 'a b%c.wasm'))],
  ['a Uint8Array', () => adder()],
  ['a Buffer', () => Buffer.from(adder())],
  ['an ArrayBuffer', () => adder().buffer],
  [
    'a view into the middle of a larger buffer',
    () => {
      const bytes = adder()
      const larger = new Uint8Array(bytes.length + 20).fill(255)
      larger.set(bytes, 10)
      return larger.subarray(10, 10 + bytes.length)
    },
  ],
]

for (const [what, make] of sources) {
  test(`${what} is a source, for create and for createSync`, LIMIT, async (t) => {
    const source = make()
    assert.equal((await managed(t, source)).exports.add?.(20, 3), 23)
    assert.equal(managedSync(t, source).exports.add?.(20, 3), 23)
  })
}

test('a relative path is taken from the working directory', LIMIT, async () => {
  const path = file(adder(), 'relative.wasm')
  const ended = await child(
    `
    process.chdir(process.env.FOLDER)
    const manager = await WasmModuleManager.create('relative.wasm', { cache: false })
    report(manager.exports.add(1, 2))
    `,
    { env: { FOLDER: join(path, '..') } },
  )
  assert.equal(reported(ended), 3)
})

test('bytes are taken at the call: what happens to them afterwards does not matter', LIMIT, async (t) => {
  const bytes = adder()
  const loading = managed(t, bytes)
  bytes.fill(0)
  assert.equal((await loading).exports.add?.(1, 2), 3)
})

test('require and import give the same package', LIMIT, async () => {
  const ended = await child(
    `
    import { createRequire } from 'node:module'
    const required = createRequire(${JSON.stringify(INDEX_URL)})('./index.js')
    assert.equal(required.WasmModuleManager, WasmModuleManager)
    assert.equal(required.WasmError, WasmError)
    report(Object.keys(required).sort())
    `,
  )
  assert.deepEqual(reported(ended), [
    ...[
      'WasmError',
      'WasmModuleManager',
      'WebAssembly',
      'errorCodes',
      'loadGlue',
      'readiness',
      'setMemoryBudget',
      'version',
    ],
  ])
})

test('the name comes from the option, else from the name section, else from the file', LIMIT, async (t) => {
  assert.equal((await managed(t, adder('inside'), { name: 'given' })).name, 'given')
  assert.equal((await managed(t, adder('inside'))).name, 'inside')
  assert.equal((await managed(t, file(adder('inside'), 'outside.wasm'))).name, 'inside')
  assert.equal((await managed(t, file(adder(), 'outside.wasm'))).name, 'outside')
  assert.equal((await managed(t, file('(module $text)', 'file.wat'))).name, 'text')
  assert.equal(typeof (await managed(t, adder())).name, 'string')
  await assert.rejects(managed(t, workbench, { name: 'my module' }), hasCode('ERR_WASM_LINK', /my module/))
})

// ---------------------------------------------------------------- start

test('the start function runs before anything else, _initialize after it, then initialize', LIMIT, async (t) => {
  const source = wat(`(module
    (import "env" "note" (func $note (param i32)))
    (func $start (call $note (i32.const 1)))
    (func (export "_initialize") (call $note (i32.const 2)))
    (func (export "note") (call $note (i32.const 4)))
    (start $start))`)
  for (const make of [managed, managedSync]) {
    const notes: number[] = []
    await make(t, source, {
      imports: { env: { note: (n: number) => void notes.push(n) } },
      initialize: () => void notes.push(3),
    })
    assert.deepEqual(notes, [1, 2, 3])
  }
})

test('_start is not run: a manager serves exports', LIMIT, async (t) => {
  const source = wat('(module (func (export "_start") unreachable))')
  const manager = await managed(t, source)
  assert.equal(manager.state, 'ready')
})

test('a start function that traps refuses the module with ERR_WASM_TRAP', LIMIT, async () => {
  const source = wat('(module (func $s unreachable) (start $s))')
  for (const end of await bothWays(source)) {
    hasCode('ERR_WASM_TRAP')(end)
    assert.equal((end as WasmError).trap, 'unreachable')
  }
})

test('what an import throws in the start function comes out as the cause, the very object', LIMIT, async () => {
  const source = wat('(module (import "env" "f" (func $f)) (start $f))')
  const thrown = new Error('during the start')
  for (const end of await bothWays(source, {
    imports: {
      env: {
        f: () => {
          throw thrown
        },
      },
    },
  })) {
    hasCode('ERR_WASM_RELOAD_FAILED')(end)
    assert.equal((end as WasmError).phase, 'instantiate')
    assert.equal((end as WasmError).cause, thrown)
  }
})

test('a failing initialize or imports function refuses the start, with phase and cause', LIMIT, async () => {
  const cause = new Error('not today')
  const fail = () => {
    throw cause
  }
  for (const [options, phase] of [
    [{ imports: idleImports, initialize: fail }, 'initialize'],
    [{ imports: fail }, 'instantiate'],
  ] as [ManagerOptions, string][]) {
    for (const end of await bothWays(workbench, options)) {
      hasCode('ERR_WASM_RELOAD_FAILED', /not today/)(end)
      assert.deepEqual([(end as WasmError).phase, (end as WasmError).cause], [phase, cause])
    }
  }
})

test('createSync refuses an asynchronous initialize and says what to do', LIMIT, () => {
  assert.throws(
    () => WasmModuleManager.createSync(workbench, { cache: false, imports: idleImports, initialize: async () => {} }),
    hasCode('ERR_WASM_ASYNC_IMPORT', /initialize/),
  )
})

test('many managers can be created at once, of one source and of several', LIMIT, async (t) => {
  const managers = await Promise.all(
    Array.from({ length: 12 }, (_, i) => managed(t, i % 2 ? workbench : adder(), { imports: idleImports })),
  )
  for (const manager of managers) assert.equal(manager.exports.add?.(1, 2), 3)
})

// ---------------------------------------------------------------- refusals

async function bothWays(source: unknown, options: ManagerOptions = {}): Promise<unknown[]> {
  const given = { cache: false, ...options }
  const ends = [
    await outcome(WasmModuleManager.create(source as ModuleSource, given)),
    await outcome((async () => WasmModuleManager.createSync(source as ModuleSource, given))()),
  ]
  return ends.map((end) => {
    if ('value' in end) {
      void end.value.destroy()
      assert.fail('the module was accepted')
    }
    return end.error
  })
}

const v128 = [...new Array<number>(16).fill(0)]
const simd = binary({ functions: [{ name: 'f', params: [], results: [], body: [0xfd, 0x0c, ...v128, 0x1a] }] })
const legacy = (body: number[]) => binary({ functions: [{ name: 'f', params: [], results: [], body }] })

const refusals: [string, () => unknown, WasmErrorCode, RegExp[], ManagerOptions?][] = [
  [
    'a path that does not exist',
    () => join(temporaryFolder(), 'nowhere.wasm'),
    'ERR_WASM_INVALID_ARGUMENT',
    [/nowhere\.wasm/, /No such file/],
  ],
  ['a folder', () => temporaryFolder('a-folder'), 'ERR_WASM_INVALID_ARGUMENT', [/a-folder/]],
  ['an http URL', () => new URL('http://example.com/x.wasm'), 'ERR_WASM_INVALID_ARGUMENT', [/file: URL/, /http:/]],
  ['a number', () => 5, 'ERR_WASM_INVALID_ARGUMENT', [/source/]],
  ['null', () => null, 'ERR_WASM_INVALID_ARGUMENT', [/source/]],
  ['undefined', () => undefined, 'ERR_WASM_INVALID_ARGUMENT', [/source/]],
  ['a plain object', () => ({}), 'ERR_WASM_INVALID_ARGUMENT', [/source/]],
  ['empty bytes', () => new Uint8Array(), 'ERR_WASM_COMPILE', [/empty|no WebAssembly/i]],
  ['an empty file', () => file('', 'empty.wasm'), 'ERR_WASM_COMPILE', [/empty|no WebAssembly/i]],
  [
    'text that is no WebAssembly',
    () => new TextEncoder().encode('<!DOCTYPE html>'),
    'ERR_WASM_COMPILE',
    [/no WebAssembly|is WebAssembly text/i],
  ],
  [
    'WebAssembly text as bytes',
    () => new TextEncoder().encode(ADD_TEXT),
    'ERR_WASM_COMPILE',
    [/no WebAssembly|is WebAssembly text/i, /\.wat/],
  ],
  [
    'WebAssembly text in a .wasm file',
    () => file(ADD_TEXT, 'text.wasm'),
    'ERR_WASM_COMPILE',
    [/no WebAssembly|is WebAssembly text/i, /\.wat/],
  ],
  [
    'a gzipped module',
    () => Uint8Array.of(0x1f, 0x8b, 8, 0, 0, 0, 0, 0),
    'ERR_WASM_COMPILE',
    [/no WebAssembly|is WebAssembly text/i],
  ],
  [
    'a header and nothing of its version',
    () => Uint8Array.of(0, 0x61, 0x73, 0x6d),
    'ERR_WASM_COMPILE',
    [/truncated|end-of-file/i],
  ],
  ['a version from the future', () => Uint8Array.of(0, 0x61, 0x73, 0x6d, 9, 0, 0, 0), 'ERR_WASM_COMPILE', [/version/i]],
  ['a component', () => Uint8Array.of(0, 0x61, 0x73, 0x6d, 0x0d, 0, 1, 0), 'ERR_WASM_COMPILE', [/component/i]],
  [
    'a truncated module',
    () => adder().slice(0, -6),
    'ERR_WASM_COMPILE',
    [/cut short/, /truncated|end-of-file/i, /again|complete/],
    { name: 'cut short' },
  ],
  [
    'a truncated file',
    () => file(adder().slice(0, -6), 'cut.wasm'),
    'ERR_WASM_COMPILE',
    [/cut/, /truncated|end-of-file/i, /again|complete/],
  ],
  [
    'a file that is no WebAssembly',
    () => file('<!DOCTYPE html>', 'page.wasm'),
    'ERR_WASM_COMPILE',
    [/page/, /no WebAssembly/],
  ],
  [
    'a section longer than the file',
    () => Uint8Array.from([...WASM_HEADER, 1, 100, 0]),
    'ERR_WASM_COMPILE',
    [/truncated|end-of-file/i],
  ],
  [
    'a module that does not validate',
    () => binary({ functions: [{ name: 'f', params: [], results: ['i32'], body: [] }] }),
    'ERR_WASM_COMPILE',
    [/type mismatch|expected/i],
  ],
  // One memory further is where the engine keeps its own.
  [
    'a module that names a memory it does not have',
    () =>
      wat(
        '(module (memory 1) (func (export "f") (loop (memory.fill 1 (i32.const 0) (i32.const 7) (i32.const 65536)) (br 0))))',
      ),
    'ERR_WASM_COMPILE',
    [/unknown memory 1/],
  ],
  [
    'a module that loads without a memory',
    () => wat('(module (func (export "f") (loop (drop (i32.load (i32.const 0))) (br 0))))'),
    'ERR_WASM_COMPILE',
    [/unknown memory 0/],
  ],
  [
    'a module that exports a memory it does not have',
    () => wat('(module (memory 1) (func loop end) (export "m" (memory 1)))'),
    'ERR_WASM_COMPILE',
    [/unknown memory 1/],
  ],
  [
    'text with a mistake',
    () => file('(module\n  (func (i32.addd)))', 'typo.wat'),
    'ERR_WASM_COMPILE',
    [/typo\.wat/, /i32\.addd|unknown operator/, /:2/],
  ],
  [
    'text that is no UTF-8',
    () => file(Uint8Array.of(0x28, 0xff, 0xfe), 'latin.wat'),
    'ERR_WASM_COMPILE',
    [/latin\.wat/, /UTF-8/],
  ],
  [
    'a missing import function',
    () => workbench,
    'ERR_WASM_LINK',
    [/'env'\.'entered'/, /function/, /options\.imports/],
    { imports: {} },
  ],
  ['a missing import namespace', () => workbench, 'ERR_WASM_LINK', [/'env'\.'entered'/, /options\.imports/]],
  [
    'the second import missing',
    () => workbench,
    'ERR_WASM_LINK',
    [/'env'\.'hold'/, /i32/],
    { imports: { env: { entered() {} } } },
  ],
  [
    'an import that is no function',
    () => workbench,
    'ERR_WASM_LINK',
    [/'env'\.'entered'/, /function/],
    { imports: { env: { entered: 5, hold() {} } } },
  ],
  [
    'a missing WASI import',
    () => wat('(module (import "wasi_snapshot_preview1" "proc_exit" (func (param i32))))'),
    'ERR_WASM_LINK',
    [/wasi_snapshot_preview1/, /proc_exit/],
  ],
  [
    'a missing memory',
    () => wat('(module (import "env" "m" (memory 2 5)))'),
    'ERR_WASM_LINK',
    [/'env'\.'m'/, /memory/, /initial: 2/],
  ],
  [
    "a memory of Node's own engine",
    () => wat('(module (import "env" "m" (memory 1 5)))'),
    'ERR_WASM_LINK',
    [/'env'\.'m'/, /\{ initial, maximum \}/],
    { imports: { env: { m: new WebAssembly.Memory({ initial: 1 }) } } },
  ],
  [
    'a memory that is too small',
    () => wat('(module (import "env" "m" (memory 3 5)))'),
    'ERR_WASM_LINK',
    [/'env'\.'m'|incompatible|memory/i],
    { imports: { env: { m: { initial: 1, maximum: 5 } } } },
  ],
  [
    'a missing global',
    () => wat('(module (import "env" "g" (global i32)))'),
    'ERR_WASM_LINK',
    [/'env'\.'g'/, /global/, /i32/],
  ],
  [
    'a global of the wrong type',
    () => wat('(module (import "env" "g" (global i64)))'),
    'ERR_WASM_LINK',
    [/'env'\.'g'/, /i64/],
    { imports: { env: { g: 1 } } },
  ],
  [
    'SIMD while engine.simd is off',
    () => simd,
    'ERR_WASM_COMPILE',
    [/SIMD/i, /engine\.simd: true/],
    { engine: { simd: false } },
  ],
  [
    'relaxed SIMD while engine.relaxedSimd is off',
    () => wat('(module (func (param v128 v128) (result v128) (i8x16.relaxed_swizzle (local.get 0) (local.get 1))))'),
    'ERR_WASM_COMPILE',
    [/relaxed/i, /engine\.relaxedSimd: true/],
    { engine: { relaxedSimd: false } },
  ],
  [
    'a shared memory while engine.threads is off',
    () => wat('(module (memory 1 2 shared))'),
    'ERR_WASM_COMPILE',
    [/thread|shared/i, /engine\.threads: true/],
    { engine: { threads: false } },
  ],
  [
    'an atomic instruction while engine.threads is off',
    () => wat('(module (memory 1) (func (drop (i32.atomic.load (i32.const 0)))))'),
    'ERR_WASM_COMPILE',
    [/thread|atomic/i, /engine\.threads: true/],
    { engine: { threads: false } },
  ],
  [
    'legacy exceptions: try',
    () => legacy([0x06, 0x40, 0x0b]),
    'ERR_WASM_COMPILE',
    [/legacy/i, /exception/i, /wasm-opt --translate-to-exnref/],
  ],
  [
    'legacy exceptions: try and catch_all',
    () => legacy([0x06, 0x40, 0x19, 0x0b]),
    'ERR_WASM_COMPILE',
    [/wasm-opt --translate-to-exnref/],
  ],
  [
    'legacy exceptions: try and delegate',
    () => legacy([0x06, 0x40, 0x18, 0x00]),
    'ERR_WASM_COMPILE',
    [/wasm-opt --translate-to-exnref/],
  ],
  [
    'legacy exceptions: rethrow',
    () => legacy([0x06, 0x40, 0x19, 0x09, 0x00, 0x0b]),
    'ERR_WASM_COMPILE',
    [/wasm-opt --translate-to-exnref/],
  ],
  [
    'more initial memory than limits.memoryBytes',
    () => wat('(module (memory 3))'),
    'ERR_WASM_INVALID_ARGUMENT',
    [/196608/, /100000/, /limits\.memoryBytes/],
    { limits: { memoryBytes: 100_000 } },
  ],
  [
    'more initial table elements than limits.tableElements',
    () => wat('(module (table 50 funcref))'),
    'ERR_WASM_INVALID_ARGUMENT',
    [/50/, /limits\.tableElements/],
    { limits: { tableElements: 10 } },
  ],
]

for (const [what, make, code, texts, options] of refusals) {
  test(`${what}: refused by create and createSync with ${code}, naming what is wrong`, LIMIT, async () => {
    const source = make()
    for (const error of await bothWays(source, options)) {
      for (const text of texts) hasCode(code, text)(error)
    }
  })
}

test('legacy exceptions by the new encoding are not refused: try_table runs', LIMIT, async (t) => {
  const source = wat(`(module
    (tag $e (param i32))
    (func (export "catch") (param i32) (result i32)
      (block $caught (result i32)
        (try_table (catch $e $caught) (throw $e (local.get 0)))
        (unreachable)))
    (func (export "throw") (throw $e (i32.const 1))))`)
  const manager = await managed(t, source)
  assert.equal(manager.exports.catch?.(42), 42)
  assert.equal(await manager.call('catch', [43]), 43)
  // An exception that nobody catches ends the call, and not the instance.
  for (const call of [() => manager.call('throw'), async () => manager.callSync('throw')]) {
    const end = await outcome(call())
    assert.ok('error' in end)
    hasCode('ERR_WASM_TRAP')(end.error)
    assert.equal((end.error as WasmError).trap, 'uncaught-exception')
  }
  assert.equal(manager.generation, 1)
})

test('no prefix of a module, and no single flipped byte, crashes or hangs the loader', LIMIT, async () => {
  const ended = await child(
    `
    const whole = Buffer.from(process.env.MODULE, 'base64')
    let refused = 0, accepted = 0
    const attempt = async (bytes) => {
      try {
        const manager = await WasmModuleManager.create(bytes, { cache: false, limits: { timeoutMs: 200, memoryBytes: 2 ** 24 }, imports: { env: { f() {} } } })
        accepted += 1
        await manager.destroy()
      } catch (error) {
        if (!/^ERR_WASM_(COMPILE|LINK|TRAP|TIMEOUT|INVALID_ARGUMENT)$/.test(error.code)) throw error
        refused += 1
      }
    }
    for (let length = 0; length < whole.length; length += 1) await attempt(whole.subarray(0, length))
    for (let at = 0; at < whole.length; at += 1) {
      for (const bit of [1, 0x80]) {
        const changed = Buffer.from(whole)
        changed[at] ^= bit
        await attempt(changed)
      }
    }
    report({ refused, accepted })
    `,
    {
      env: {
        MODULE: Buffer.from(
          binary({
            imports: [{ name: 'f', params: [], results: [] }],
            memory: 1,
            moduleName: 'fuzzed',
            functions: [
              { name: 'loop', params: ['i32'], results: ['i32'], body: [0x03, 0x40, 0x20, 0, 0x0d, 0, 0x0b, 0x20, 0] },
              { name: 'call', params: [], results: [], body: [0x10, 0] },
            ],
          }),
        ).toString('base64'),
      },
      timeoutMs: 50_000,
    },
  )
  const { refused } = reported<{ refused: number; accepted: number }>(ended)
  assert.ok(refused > 100, `${refused} refused`)
})

// ---------------------------------------------------------------- options

test('options that are not known or cannot be used are refused by name', LIMIT, async () => {
  for (const [options, text] of [
    [{ instance: 2 }, /instance\b.*known.*instances/],
    [{ wasi: true }, /wasi/],
    [{ instances: 0 }, /instances/],
    [{ instances: 1.5 }, /instances/],
    [{ instances: '2' }, /instances/],
    [{ instances: 1e9 }, /instances/],
    [{ threads: 0 }, /threads/],
    [{ maxQueue: -1 }, /maxQueue/],
    [{ name: 5 }, /name/],
    [{ imports: 'env' }, /imports/],
    [{ initialize: 1 }, /initialize/],
    [{ saveState: {} }, /saveState/],
    [{ restoreState: 'x' }, /restoreState/],
    [{ cache: 1 }, /cache/],
    [{ limits: { memory: 1 } }, /limits\.memory\b/],
    [{ limits: { memoryBytes: -1 } }, /memoryBytes/],
    [{ limits: { timeoutMs: 0 } }, /timeoutMs/],
    [{ limits: { stackBytes: 10 } }, /stackBytes/],
    [{ limits: { fuel: 10 } }, /engine\.fuel: true/],
    [{ limits: 5 }, /limits/],
    [{ engine: { simdd: true } }, /engine\.simdd/],
    [{ engine: { simd: 1 } }, /engine\.simd/],
    [{ abi: { returns: 'magic' } }, /'out-pointer', 'packed-i64' or 'multi-value'/],
    [{ abi: { allocate: 1 } }, /abi\.allocate/],
    [{ abi: { free: 'x' } }, /abi\.free/],
    ['options', /options/],
  ] as [ManagerOptions, RegExp][]) {
    await assert.rejects(
      WasmModuleManager.create(adder(), options),
      hasCode('ERR_WASM_INVALID_ARGUMENT', text),
      JSON.stringify(options),
    )
    assert.throws(
      () => WasmModuleManager.createSync(adder(), options),
      hasCode('ERR_WASM_INVALID_ARGUMENT', text),
      JSON.stringify(options),
    )
  }
})

test('an option that is undefined is as good as absent', LIMIT, async (t) => {
  const manager = await managed(t, adder(), {
    name: undefined,
    instances: undefined,
    imports: undefined,
    limits: undefined,
    engine: { simd: undefined },
    initialize: undefined,
  } as ManagerOptions)
  assert.equal(manager.exports.add?.(1, 2), 3)
})

test('what a getter of the options throws comes out as it is', LIMIT, async () => {
  const thrown = new Error('from the getter')
  const options = {
    get instances(): number {
      throw thrown
    },
  }
  const end = await outcome(WasmModuleManager.create(adder(), options))
  assert.ok('error' in end)
  assert.equal(end.error, thrown)
  const imports = {
    env: {
      get entered(): () => void {
        throw thrown
      },
    },
  }
  for (const error of await bothWays(workbench, { imports })) {
    assert.ok(error === thrown || (error as WasmError).cause === thrown, String(error))
  }
})

// ---------------------------------------------------------------- the cache

const filesIn = (folder: string): string[] =>
  readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .map((name) => join(folder, name))
    .filter((path) => statSync(path).isFile())

/** Creates a manager in a process of its own; answers the milliseconds that took. */
async function createIn(env: Record<string, string>, cache: string, module: string): Promise<number> {
  const ended = await child(
    `
    // Node and the addon are warm; what is measured is the module.
    await (await WasmModuleManager.create(process.env.SMALL, { cache: false })).close()
    const started = performance.now()
    const manager = await WasmModuleManager.create(process.env.MODULE, { cache: ${cache} })
    const took = performance.now() - started
    assert.equal(typeof manager.exports.f0(1, 2), 'number')
    await manager.close()
    report(took)
    `,
    { env: { ...env, MODULE: module, SMALL: file(adder(), 'small.wasm') } },
  )
  return reported<number>(ended)
}

test('compiled code is kept between processes: the second start is several times as fast', LIMIT, async () => {
  const module = file(bulky(400), 'bulky.wasm')
  const folder = temporaryFolder('cache')
  const option = JSON.stringify(folder)
  const cold = await createIn({}, option, module)
  assert.ok(filesIn(folder).length > 0, 'nothing was written to the cache folder')
  const warm = Math.min(await createIn({}, option, module), await createIn({}, option, module))
  assert.ok(warm < cold / 3, `cold ${cold} ms, warm ${warm} ms`)
})

/** Small functions that call each other: they are compiled all at once, and into each other. */
function calling(functions: number): string {
  const body =
    '(loop $again (local.set 0 (i32.add (i32.load (local.get 0)) (local.get 1))) (br_if $again (local.get 0)))'
  const text = Array.from({ length: functions }, (_, index) => {
    const result = index === 0 ? '(local.get 0)' : `(call ${index - 1} (local.get 0) (i32.const ${index}))`
    return `(func (export "f${index}") (param i32 i32) (result i32) ${body} ${result})`
  })
  return wat(`(module (memory 1) ${text.join('\n')})`)
}

test('what compiling has taken is given back', { ...LIMIT, skip: process.platform !== 'linux' }, async () => {
  const ended = await child(
    `
    const mebibytes = () => process.memoryUsage.rss() / 2 ** 20
    const compile = (path) => WasmModuleManager.create(path, { cache: false })
    await (await compile(process.env.SMALL)).close()
    const before = mebibytes()
    let most = 0
    for (const path of process.env.LARGE.split(' ')) {
      const manager = await compile(path)
      most = Math.max(most, mebibytes() - before)
      await manager.close()
    }
    // It is given back some seconds later.
    const until = performance.now() + 20_000
    while (mebibytes() - before > most / 3 && performance.now() < until) {
      gc()
      await new Promise((resolve) => setImmediate(resolve))
    }
    report([most, mebibytes() - before])
    `,
    {
      env: { SMALL: file(bulky(4), 'small.wasm'), LARGE: [3000, 3001, 3002].map(calling).join(' ') },
      flags: ['--expose-gc'],
    },
  )
  const [most, left] = reported<[number, number]>(ended)
  assert.ok(most > 40, `it took only ${most} MiB: nothing to give back`)
  assert.ok(left <= most / 3, `${left} MiB are left of ${most}`)
})

test('a folder that is named as the cache keeps what else is in it', LIMIT, async () => {
  const folder = temporaryFolder('shared')
  writeFileSync(join(folder, 'mine.txt'), 'mine')
  await createIn({}, JSON.stringify(folder), file(bulky(4), 'beside.wasm'))
  assert.ok(existsSync(join(folder, 'modules')))
  assert.equal(readFileSync(join(folder, 'mine.txt'), 'utf8'), 'mine')
})

test("cache: true is the user's cache folder, cache: false writes nowhere", LIMIT, async () => {
  const module = file(adder(), 'cached.wasm')
  const home = temporaryFolder('home')
  const env = { HOME: home, XDG_CACHE_HOME: join(home, '.cache'), XDG_CONFIG_HOME: join(home, '.config') }
  const create = (cache: string) =>
    child(
      `
      const manager = await WasmModuleManager.create(process.env.MODULE, ${cache})
      report(manager.exports.add(1, 2))
      `,
      { env: { ...env, MODULE: module } },
    )
  assert.equal(reported(await create('{ cache: false }')), 3)
  // Bun and Deno keep something there themselves.
  assert.deepEqual(
    filesIn(home).filter((path) => !/\.cache\/(bun|deno)\//.test(path)),
    [],
  )
  assert.equal(reported(await create('{ cache: true }')), 3)
  const written = filesIn(join(home, '.cache')).filter((path) => !/\.cache\/(bun|deno)\//.test(path))
  assert.ok(written.length > 0)
  assert.equal(reported(await create('{}')), 3)
  assert.equal(reported(await create('undefined')), 3)
})

test('a home that cannot be written to costs the cache, not the module', LIMIT, async () => {
  const blocked = file('a file, not a folder', 'blocked')
  const ended = await child(`report((await WasmModuleManager.create(process.env.MODULE)).exports.add(1, 2))`, {
    env: {
      MODULE: file(adder(), 'm.wasm'),
      HOME: blocked,
      XDG_CACHE_HOME: join(blocked, 'cache'),
      XDG_CONFIG_HOME: blocked,
    },
  })
  assert.equal(reported(ended), 3)
})

test('a cache folder that cannot be used is told by name and with a remedy', LIMIT, async () => {
  const blocked = join(file('a file, not a folder', 'blocked'), 'cache')
  await assert.rejects(
    WasmModuleManager.create(adder(), { cache: blocked }),
    hasCode('ERR_WASM_INVALID_ARGUMENT', /cache folder.*cache: false/s),
  )
})

test('a damaged cache entry is compiled again, not believed', LIMIT, async () => {
  const module = file(bulky(4), 'damaged.wasm')
  const folder = temporaryFolder('cache')
  const option = JSON.stringify(folder)
  await createIn({}, option, module)
  const kept = filesIn(folder)
  assert.ok(kept.length > 0)
  for (const damage of [
    (bytes: Buffer) => bytes.subarray(0, bytes.length / 2),
    (bytes: Buffer) => Buffer.from(bytes.map((byte, index) => (index % 97 === 50 ? byte ^ 0xff : byte))),
    () => Buffer.alloc(0),
    () => Buffer.from('not what was here'),
  ]) {
    for (const path of kept) writeFileSync(path, damage(readFileSync(path)))
    assert.ok((await createIn({}, option, module)) > 0)
  }
})

test('differently configured engines do not share entries: each runs what it compiled', LIMIT, async () => {
  const folder = temporaryFolder('cache')
  const ended = await child(
    `
    const results = []
    for (const engine of [{}, { interruptible: false }, { fuel: true }, { signalsBasedTraps: false }, { simd: false, relaxedSimd: false }, {}]) {
      const manager = await WasmModuleManager.create(process.env.MODULE, { cache: process.env.FOLDER, engine })
      results.push(manager.exports.add(20, 3))
      try { manager.exports.load(-4) } catch (error) { results.push(error.trap) }
      await manager.close()
    }
    report(results)
    `,
    {
      env: {
        FOLDER: folder,
        MODULE: wat(
          `(module (memory 1) (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
            (func (export "load") (param i32) (result i32) (i32.load (local.get 0))))`,
        ),
      },
    },
  )
  assert.deepEqual(reported(ended), Array.from({ length: 6 }, () => [23, 'out-of-bounds-memory']).flat())
})
