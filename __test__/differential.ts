// The same modules on V8's engine and on ours: what validates, what comes back, what traps and what is left behind.
//
// wasm-smith makes the modules (crates/testkit/examples/smith.rs), of a seed. What may differ stands here, with its
// reason, and nowhere else.
import assert from 'node:assert/strict'
import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { WebAssembly as ours, WasmError, WasmModuleManager } from '../index.js'
import { Dice } from './hostile-values.ts'

const theirs = globalThis.WebAssembly
type Namespace = typeof theirs
type Values = Record<string, unknown>

const root = fileURLToPath(new URL('..', import.meta.url))

/** One module of the generator. */
interface Generated {
  seed: string
  /** What wasmparser says, with our features and with V8's. */
  ours: boolean
  theirs: boolean
  /** Valid for V8 only with exception handling. */
  throws: boolean
  /** Why not for V8, in the validator's words. */
  why: string
  bytes: Uint8Array<ArrayBuffer>
  /** In their order. */
  imports: Shape[]
  exports: Shape[]
}

type Shape =
  | { kind: 'function'; params: string[]; results: string[] }
  | { kind: 'memory'; initial: number; maximum: number; is64: boolean }
  | { kind: 'table'; element: string; initial: number; maximum: number; is64: boolean }
  | { kind: 'global'; value: string; mutable: boolean }
  | { kind: 'tag' }

export interface Tally {
  modules: number
  valid: number
  /** Instances that both engines made. */
  made: number
  calls: number
  traps: number
  /** Differences that are explained, by their explanation. */
  explained: Record<string, number>
}

const bytesOf = (...parts: (number | number[])[]): Uint8Array<ArrayBuffer> =>
  Uint8Array.from([0, 97, 115, 109, 1, 0, 0, 0, ...parts.flat()])
const oneFunction = (...body: number[]): Uint8Array<ArrayBuffer> =>
  bytesOf([1, 4, 1, 0x60, 0, 0], [3, 2, 1, 0], [10, body.length + 4, 1, body.length + 2, 0], body, 0x0b)

/** The smallest modules that need a feature, by wasmparser's name for it. */
const probes: Record<string, Uint8Array<ArrayBuffer>> = {
  // A structure without fields.
  GC: bytesOf([1, 3, 1, 0x5f, 0]),
  FUNCTION_REFERENCES: bytesOf([1, 8, 2, 0x60, 0, 0, 0x60, 1, 0x64, 0, 0].with(1, 9)),
  // A memory and a table with 64-bit addresses: the memories alone came first (V8 12.4).
  MEMORY64: bytesOf([4, 4, 1, 0x70, 4, 1], [5, 3, 1, 4, 1]),
  MULTI_MEMORY: bytesOf([5, 5, 2, 0, 1, 0, 1]),
  // try_table with nothing to catch.
  EXCEPTIONS: oneFunction(0x1f, 0x40, 0, 0x0b),
  // try … end of the encoding before.
  LEGACY_EXCEPTIONS: oneFunction(0x06, 0x40, 0x19, 0x0b),
  TAIL_CALL: oneFunction(0x12, 0),
  EXTENDED_CONST: bytesOf([6, 9, 1, 0x7f, 0, 0x41, 1, 0x41, 1, 0x6a, 0x0b]),
  SIMD: oneFunction(0x41, 0, 0xfd, 0x0f, 0x1a),
  RELAXED_SIMD: oneFunction(0x41, 0, 0xfd, 0x0f, 0x41, 0, 0xfd, 0x0f, 0xfd, 0x80, 0x02, 0x1a),
  THREADS: bytesOf([5, 4, 1, 3, 1, 1]),
}
/** What every V8 of a supported Node has had for long. */
const ALWAYS = [
  ...['MUTABLE_GLOBAL', 'SATURATING_FLOAT_TO_INT', 'SIGN_EXTENSION', 'REFERENCE_TYPES', 'MULTI_VALUE'],
  ...['BULK_MEMORY', 'BULK_MEMORY_OPT', 'CALL_INDIRECT_OVERLONG', 'FLOATS', 'GC_TYPES'],
]

export function featuresOfV8(): string[] {
  return [...ALWAYS, ...Object.keys(probes).filter((name) => theirs.validate(probes[name] as never))]
}

/** The generator, built beside the addon, out of the same build of the engine. */
function smith(): string {
  const target = ['--target', 'host-tuple']
  const built = spawnSync(
    'cargo',
    ['build', '--release', '--workspace', '--exclude', 'wasm-molt-fuzz', '--example', 'smith', ...target],
    {
      cwd: root,
      encoding: 'utf8',
    },
  )
  assert.equal(built.status, 0, `the generator cannot be built:\n${built.error ?? built.stderr}`)
  const host = /^host: (.+)$/m.exec(spawnSync('rustc', ['-vV'], { encoding: 'utf8' }).stdout)?.[1]
  const name = process.platform === 'win32' ? 'smith.exe' : 'smith'
  return join(root, 'target', host as string, 'release', 'examples', name)
}

async function* generated(seed: number, count: number, kind: string): AsyncGenerator<Generated> {
  const child = spawn(smith(), [String(seed), String(count), kind, ...featuresOfV8()], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = new Promise<number | null>((resolve, reject) => {
    child.on('error', reject)
    child.on('close', resolve)
  })
  for await (const line of createInterface({ input: child.stdout })) {
    const { bytes, ...rest } = JSON.parse(line)
    yield { ...rest, bytes: new Uint8Array(Buffer.from(bytes, 'hex')) }
  }
  assert.equal(await ended, 0, 'the generator failed')
}

// ---------------------------------------------------------------- one engine

const held = [{ held: 0 }, { held: 1 }]
const heldNames = new Map<unknown, string>(held.map((object, index) => [object, `held ${index}`]))

/** A value of that type that both engines can have; undefined where there is none. */
function plain(type: string): unknown {
  const plains: Record<string, unknown> = { i32: 7, i64: 7n, f32: 1.5, f64: 2.5, externref: held[0], funcref: null }
  return plains[type]
}

/**
 * Whether the JS API of both engines shows values of that type: ours shows no vector, no exception and no reference of GC
 * (docs/limits.md), and V8 shows some of them, by its line.
 */
const canCross = (type: string) => ['i32', 'i64', 'f32', 'f64', 'externref', 'funcref'].includes(type)

/** What a module imports, of that engine, and the same in both. */
function importsOf(module: Generated, wasm: Namespace, notes: unknown[]): Values {
  const needs = theirs.Module.imports(new theirs.Module(module.bytes))
  const imports: Record<string, Values> = {}
  for (const [index, shape] of module.imports.entries()) {
    const { module: space, name } = needs[index] as WebAssembly.ModuleImportDescriptor
    imports[space] ??= {}
    // Of two with one name the first must do for both, and where it does not, neither engine can link them.
    imports[space][name] ??= importOf(shape, wasm, (args) => notes.push(`${index}: ${args.map(shown)}`))
  }
  return imports
}

function importOf(shape: Shape, wasm: Namespace, note: (args: unknown[]) => void): unknown {
  const sizes = (initial: number, maximum: number, is64: boolean) =>
    is64 ? { address: 'i64', initial: BigInt(initial), maximum: BigInt(maximum) } : { initial, maximum }
  switch (shape.kind) {
    case 'function':
      return (...args: unknown[]) => {
        note(args)
        const results = shape.results.map(plain)
        return results.length > 1 ? results : results[0]
      }
    case 'memory':
      return new wasm.Memory(sizes(shape.initial, shape.maximum, shape.is64) as never)
    case 'table': {
      const element = shape.element === 'funcref' ? 'anyfunc' : shape.element
      return new wasm.Table({ element, ...sizes(shape.initial, shape.maximum, shape.is64) } as never)
    }
    case 'global':
      return new wasm.Global({ value: shape.value, mutable: shape.mutable } as never, plain(shape.value) as never)
    case 'tag':
      return undefined
  }
}

/** One engine with one instance in it. */
interface Side {
  exports: [string, unknown, Shape][]
  imports: Values
  notes: unknown[]
}

/** How something ended, in words that both engines share. */
function wordOf(error: unknown, wasm: Namespace): string {
  // Each engine has a heap of its own size for objects of GC.
  if (error instanceof Error && /GC heap out of memory/.test(error.message)) return 'trap: allocation'
  if (error instanceof WasmError && error.trap === 'uncaught-exception') return 'an exception'
  if (error instanceof WasmError)
    return error.code === 'ERR_WASM_TRAP' ? `trap: ${trapOf(error.trap ?? '')}` : `error: ${error.code}`
  if (error instanceof wasm.RuntimeError) return `trap: ${trapOf(error.message)}`
  if (error instanceof RangeError && /call stack/i.test(error.message)) return 'trap: stack'
  const { Exception } = wasm as never as { Exception?: new () => object }
  if (Exception !== undefined && error instanceof Exception) return 'an exception'
  if (error instanceof Error) return error.constructor.name
  return `something else: ${String(error)}`
}

/** V8's words, and ours. */
const traps: [RegExp, string][] = [
  [/stack/, 'stack'],
  [/unreachable/, 'unreachable'],
  [/memory access out of bounds|out-of-bounds-memory|out of bounds memory|data segment.*out of bounds/, 'memory'],
  [
    /table index is out of bounds|table access out of bounds|out-of-bounds-table|out of bounds table|undefined element|element segment.*out of bounds|table (?:initializer|.*) is out of bounds/,
    'table',
  ],
  [/divide by zero|remainder by zero|integer-divide-by-zero/, 'division by zero'],
  // V8 has a word for divisions and one for conversions; the specification one for NaN and one for all else.
  [
    /divide result unrepresentable|integer-overflow|integer overflow|float unrepresentable|invalid-conversion|invalid conversion/,
    'not representable',
  ],
  // Older lines of V8 have one message for both.
  [
    /null function or function signature|signature mismatch|indirect-call|indirect call|uninitialized element/,
    'indirect call',
  ],
  [/dereferencing a null|null-reference|null reference|rethrowing null/, 'null'],
  [/illegal cast|cast-failure|cast failure/, 'cast'],
  [/array.*out of bounds|out-of-bounds-array|out of bounds array/, 'array'],
  [/array is too large|allocation-too-large|allocation size too large/, 'allocation'],
]

function trapOf(text: string): string {
  return traps.find(([pattern]) => pattern.test(text))?.[1] ?? text
}

/** A value as both engines must show it: objects of an engine by what they are. */
function shown(value: unknown): string {
  if (typeof value === 'bigint') return `${value}n`
  if (typeof value === 'number') return Object.is(value, -0) ? '-0' : String(value)
  if (typeof value === 'function') return 'a function'
  if (Array.isArray(value)) return `[${value.map(shown).join(', ')}]`
  // A reference of GC that was made external is null with us (crates/engine/tests/wast.rs has it on its list).
  if (typeof value === 'object' && value !== null) return heldNames.get(value) ?? 'null'
  return String(value)
}

/** Arguments of a function, of the same dice for both. */
function argument(type: string, dice: Dice): unknown {
  const numbers = [0, -0, 1, -1, 2 ** 31, -(2 ** 31), 2 ** 32 - 1, 0.5, 1e308, Number.NaN, Number.POSITIVE_INFINITY]
  const bigints = [0n, 1n, -1n, 2n ** 31n, 2n ** 63n, 2n ** 64n - 1n, BigInt(dice.roll(2 ** 31))]
  switch (type) {
    case 'i64':
      return dice.pick(bigints)
    case 'externref':
      return dice.pick([null, ...held])
    case 'funcref':
      return null
    case 'i32':
    case 'f32':
    case 'f64':
      return dice.roll(2) === 0 ? dice.pick(numbers) : dice.roll(64)
    default:
      return null
  }
}

function hash(buffer: ArrayBuffer): string {
  return createHash('sha1').update(new Uint8Array(buffer)).digest('hex').slice(0, 16)
}

/** What is left behind: memories, globals and tables, imported and exported. */
function stateOf(side: Side, wasm: Namespace): string[] {
  const state: string[] = []
  const look = (name: string, item: unknown) => {
    try {
      if (item instanceof wasm.Memory) state.push(`${name}: ${item.buffer.byteLength} ${hash(item.buffer)}`)
      else if (item instanceof wasm.Global) state.push(`${name}: ${shown(item.value)}`)
      else if (item instanceof wasm.Table) {
        const elements = Array.from({ length: Math.min(Number(item.length), 64) }, (_, at) => {
          // A table with 64-bit indices.
          const index = typeof item.length === 'bigint' ? BigInt(at) : at
          return shown(item.get(index as number))
        })
        state.push(`${name}: ${item.length} ${elements.join(' ')}`)
      }
    } catch (error) {
      // A type that cannot be shown.
      state.push(`${name}: ${wordOf(error, wasm)}`)
    }
  }
  for (const [space, items] of Object.entries(side.imports)) {
    for (const [name, item] of Object.entries(items as Values)) look(`import ${space}.${name}`, item)
  }
  for (const [name, item, shape] of side.exports) {
    const type = shape.kind === 'global' ? shape.value : shape.kind === 'table' ? shape.element : 'i32'
    if (canCross(type)) look(`export ${name}`, item)
  }
  return [...state, `notes ${side.notes.join(' ')}`]
}

// ---------------------------------------------------------------- two engines

/** Where the engines may differ, and why; the rest of the module is then no comparison any more. */
class Explained extends Error {}

function compare(what: string, left: string, right: string): void {
  if (left === right) return
  // How deep a stack goes is up to the engine: frames of different size, stacks of different size.
  if (left === 'trap: stack' || right === 'trap: stack') throw new Explained('the depth of the stack')
  // How large an object of GC may be, too.
  if (left === 'trap: allocation' || right === 'trap: allocation') throw new Explained('the size of an object of GC')
  assert.equal(right, left, what)
}

const call = (fn: unknown, args: unknown[]) => (fn as (...args: unknown[]) => unknown)(...args)

function ended(act: () => unknown, wasm: Namespace): string {
  try {
    return shown(act())
  } catch (error) {
    return wordOf(error, wasm)
  }
}

/** In the order of the module, which is not that of the object where names are numbers. */
function exportsOf(
  { exports }: Generated,
  module: WebAssembly.Module,
  instance: WebAssembly.Instance,
  wasm: Namespace,
): Side['exports'] {
  return wasm.Module.exports(module).map(({ name }, index) => [name, instance.exports[name], exports[index] as Shape])
}

function compareNamespaces(module: Generated, tally: Tally): void {
  const crosses = (shape: Shape) =>
    shape.kind === 'global' ? canCross(shape.value) : shape.kind === 'table' ? canCross(shape.element) : true
  if (!module.imports.every(crosses)) throw new Explained('imports of a type that our JS API does not show')
  const make = (wasm: Namespace): { side?: Side; word: string } => {
    const notes: unknown[] = []
    try {
      const imports = importsOf(module, wasm, notes)
      const compiled = new wasm.Module(module.bytes)
      const instance = new wasm.Instance(compiled, imports as never)
      return { side: { exports: exportsOf(module, compiled, instance, wasm), imports, notes }, word: 'made' }
    } catch (error) {
      return { word: wordOf(error, wasm) }
    }
  }
  const [left, right] = [make(theirs), make(ours)]
  compare(`${module.seed}: instantiation`, left.word, right.word)
  if (left.side === undefined || right.side === undefined) return
  tally.made += 1
  const names = ({ exports }: Side) => exports.map(([name, value]) => `${name}: ${typeof value}`).join()
  compare(`${module.seed}: exports`, names(left.side), names(right.side))
  const dice = new Dice(Number(module.seed))
  for (const [index, type] of module.exports.entries()) {
    if (type.kind !== 'function' || ![...type.params, ...type.results].every(canCross)) continue
    const args = type.params.map((parameter) => argument(parameter, dice))
    const what = `${module.seed}: export ${index} of (${type.params}) -> (${type.results}) with ${shown(args)}`
    const word = ended(() => call(left.side?.exports[index]?.[1], args), theirs)
    compare(
      what,
      word,
      ended(() => call(right.side?.exports[index]?.[1], args), ours),
    )
    tally.calls += 1
    if (word.startsWith('trap')) tally.traps += 1
    compare(`${what}, afterwards`, stateOf(left.side, theirs).join('\n'), stateOf(right.side, ours).join('\n'))
  }
}

/** The same through a manager, which makes imports and instance by itself. */
function compareManager(module: Generated, tally: Tally): void {
  // Memories, tables, globals and tags are shared by the instances of a realm, not of a manager: the namespaces have
  // been compared with them.
  const isPlain = (shape: Shape) =>
    // A manager refuses at once to link what could not be called, where the JS API refuses the call.
    shape.kind === 'function' && [...shape.params, ...shape.results].every(canCross)
  if (!module.imports.every(isPlain)) return
  const notes: [unknown[], unknown[]] = [[], []]
  let instance: WebAssembly.Instance | undefined
  const word = ended(() => {
    instance = new theirs.Instance(new theirs.Module(module.bytes), importsOf(module, theirs, notes[0]) as never)
  }, theirs)
  let manager: WasmModuleManager | undefined
  const managed = ended(() => {
    manager = WasmModuleManager.createSync(module.bytes, {
      cache: false,
      imports: importsOf(module, theirs, notes[1]) as never,
      limits: { stackBytes: 4 << 20 },
      // What a trap leaves behind is compared, too.
      recycle: { onTrap: 'keep' },
      engine: { memoryReservationBytes: 16 << 20 },
    })
  }, theirs)
  if (instance === undefined || manager === undefined) {
    manager?.destroy()
    // In whose words they say no is the business of the namespaces.
    const made = (it: unknown, words: string) => (it === undefined ? words : 'made')
    if (instance !== manager) compare(`${module.seed}: a manager`, made(instance, word), made(manager, managed))
    return
  }
  try {
    const dice = new Dice(Number(module.seed))
    const names = theirs.Module.exports(new theirs.Module(module.bytes)).map(({ name }) => name)
    for (const [index, type] of module.exports.entries()) {
      if (type.kind !== 'function' || ![...type.params, ...type.results].every(canCross)) continue
      const name = names[index] as string
      const args = type.params.map((parameter) => argument(parameter, dice))
      const what = `${module.seed}: manager's ${index} of (${type.params}) -> (${type.results}) with ${shown(args)}`
      const left = ended(() => call(instance?.exports[name], args), theirs)
      compare(
        what,
        left,
        ended(() => manager?.callSync(name, args as never), theirs),
      )
      tally.calls += 1
    }
    assert.deepEqual(notes[1], notes[0], `${module.seed}: what the imports heard`)
  } finally {
    manager.destroy()
  }
}

/** Whether both take it for a module; the reason where they need not. */
function compareValidity(module: Generated, tally: Tally): boolean {
  const [v8, molt] = [theirs.validate(module.bytes), ours.validate(module.bytes)]
  assert.equal(molt, module.ours, `${module.seed}: validate() and wasmparser do not agree`)
  if (v8 === molt) return v8
  const why = whyValid(module, v8)
  const words = () => {
    try {
      ;new (v8 ? ours : theirs).Module(module.bytes)
    } catch (error) {
      return (error as Error).message
    }
  }
  assert.ok(why !== undefined, `${module.seed}: V8 says ${v8}, and we ${molt}: ${words()}`)
  tally.explained[why] = (tally.explained[why] ?? 0) + 1
  return false
}

function whyValid(module: Generated, v8: boolean): string | undefined {
  // The same validator with exactly V8's features says what V8 says: it is the features.
  if (module.theirs === v8) return v8 ? 'a feature that only V8 has on' : 'a feature that this V8 does not have'
  // Found with V8 14.6: `elem declare i64` with nothing in it, which the specification calls malformed.
  if (v8 && module.why === 'malformed reference type') return 'V8 takes an empty element segment of numbers'
  // In code that nothing reaches V8 takes any operands for it (to 14.6), where the specification wants references.
  if (v8 && module.why.startsWith('type mismatch: expected subtype of eqref')) return 'V8 does not check ref.eq there'
  // Shared ones, which `validate` refuses here where threads are off.
  if (v8 && module.why.startsWith('memory64 must be enabled')) return 'V8 12 has 64-bit memories before 64-bit tables'
  // Node 22: it reads `try_table` after a draft, and loses its place behind it.
  if (!v8 && module.throws && process.versions.v8?.startsWith('12.')) return 'V8 12 has a draft of exception handling'
  return undefined
}

/** Modules of a seed, through both engines. */
export async function differential(seed: number, count: number): Promise<Tally> {
  const tally: Tally = { modules: 0, valid: 0, made: 0, calls: 0, traps: 0, explained: {} }
  for await (const module of generated(seed, count, 'comparison')) {
    tally.modules += 1
    if (!compareValidity(module, tally)) continue
    tally.valid += 1
    for (const compareOne of [compareNamespaces, compareManager]) {
      try {
        compareOne(module, tally)
      } catch (error) {
        if (!(error instanceof Explained)) throw error
        tally.explained[error.message] = (tally.explained[error.message] ?? 0) + 1
      }
    }
  }
  return tally
}

/**
 * Whether both engines refuse the same bytes: damaged modules of a seed, or (`corpus`) what the fuzzer has kept.
 */
export async function validity(seed: number, count: number, kind: 'almost' | 'corpus' = 'almost'): Promise<Tally> {
  const tally: Tally = { modules: 0, valid: 0, made: 0, calls: 0, traps: 0, explained: {} }
  for await (const module of generated(seed, count, kind)) {
    tally.modules += 1
    if (compareValidity(module, tally)) tally.valid += 1
  }
  return tally
}
