// QuickJS as a guest: what its module imports, and the few of its exports that make an interpreter and run source in it.
import { fileURLToPath } from 'node:url'
import type { Imports, InstanceContext } from '../../index.js'

export const quickjsWasm = fileURLToPath(import.meta.resolve('@jitl/quickjs-wasmfile-release-sync/wasm'))

/** An instance to talk to: a lease, the context of a host call, or a manager that has one replica. */
export type Instance = Pick<InstanceContext, 'exports' | 'memory'>

/** Addresses in linear memory: they hold in every copy of it. */
export interface Interpreter {
  readonly runtime: number
  readonly context: number
}

/** What is evaluated in an interpreter to warm it up. */
export interface Source {
  name: string
  text: string
}

/** Called by guest code, with its instance and its arguments as text; what it returns is a string to the guest, or undefined. */
export type HostFunction = (instance: InstanceContext, ...args: string[]) => string | undefined

/** What guest code threw, as text. */
export class ScriptError extends Error {
  override readonly name = 'ScriptError'
}

// The build shortens all names. These lists were read from dist/emscripten-module.mjs of the version that package.json pins.
export const exportNames = {
  __wasm_call_ctors: 'u',
  malloc: 'v',
  free: 'M',
  QTS_Throw: 'w',
  QTS_RuntimeSetMaxStackSize: 'D',
  QTS_RuntimeComputeMemoryUsage: 'z',
  QTS_GetUndefined: 'E',
  QTS_NewRuntime: 'K',
  QTS_NewContext: 'N',
  QTS_FreeValuePointer: 'P',
  QTS_FreeCString: 'S',
  QTS_NewArrayBuffer: 'X',
  QTS_NewString: '_',
  QTS_GetString: '$',
  QTS_GetPropNumber: 'ia',
  QTS_Call: 'ma',
  QTS_ResolveException: 'na',
  QTS_Dump: 'oa',
  QTS_Eval: 'pa',
  QTS_NewFunction: 'Da',
} as const

const importNames = {
  memory: 'a',
  __assert_fail: 'b',
  fd_write: 'c',
  fd_close: 'd',
  environ_get: 'e',
  environ_sizes_get: 'f',
  qts_host_normalize_module: 'g',
  qts_host_load_module_source: 'h',
  qts_host_interrupt_handler: 'i',
  _setitimer_js: 'j',
  emscripten_resize_heap: 'k',
  _emscripten_runtime_keepalive_clear: 'l',
  _localtime_js: 'm',
  _tzset_js: 'n',
  fd_seek: 'o',
  emscripten_date_now: 'p',
  _abort_js: 'q',
  proc_exit: 'r',
  qts_host_call_function: 's',
  qts_host_free_host_ref: 't',
} as const

/** As the module declares it; what is offered must not be larger. */
const maximumPages = 32768
const pageBytes = 65536
/** What `QTS_ArgvGetJSValueConstPointer` multiplies by: each call from the host back into a guest on a pool thread costs two thread changes. */
const valueBytes = 8
/** WASI's numbers. */
const errno = { success: 0, nosys: 52, spipe: 70 }
/** How much of the module's shadow stack (5 MiB) a script may use before QuickJS throws "stack overflow" in it. */
const scriptStackBytes = 256 * 1024
/** Native stack for as deep a script, with room to spare: where it ends first, the script traps instead of being told. */
export const nativeStackBytes = 2 * 2 ** 20

export interface ImportOptions {
  /** What {@link createFunction} makes guest functions of. */
  functions?: readonly HostFunction[]
  /** Bytes of the guest's memory. An import cannot grow it, so this is all that scripts get. Default 16 MiB, the least. */
  memoryBytes?: number
}

/** The module's imports, for `WasmModuleManager.create`. Nothing in them is of one instance but the context. */
export function createImports(options: ImportOptions = {}): (instance: InstanceContext) => Imports {
  const { functions = [], memoryBytes = 16 * 2 ** 20 } = options
  return (instance) => {
    const offered: Record<keyof typeof importNames, unknown> = {
      memory: { initial: Math.ceil(memoryBytes / pageBytes), maximum: maximumPages },
      // 0 is failure: malloc then answers 0, and QuickJS throws "out of memory" in the script.
      emscripten_resize_heap: () => 0,
      emscripten_date_now: () => Date.now(),
      _localtime_js: (seconds: bigint, ptr: number) => writeTime(instance, Number(seconds), ptr),
      _tzset_js: (offset: number, daylight: number, standardName: number, daylightName: number) => {
        writeWords(instance, offset, [0])
        writeWords(instance, daylight, [0])
        for (const name of [standardName, daylightName]) instance.memory.write(name, 'UTC\0')
      },
      environ_sizes_get: (count: number, byteLength: number) => {
        writeWords(instance, count, [0])
        writeWords(instance, byteLength, [0])
        return errno.success
      },
      environ_get: () => errno.success,
      fd_write: (fd: number, vectors: number, count: number, written: number) => {
        writeWords(instance, written, [print(instance, fd, vectors, count)])
        return errno.success
      },
      fd_close: () => errno.nosys,
      fd_seek: () => errno.spipe,
      qts_host_call_function: (context: number, _self: number, count: number, values: number, id: number) =>
        callHost(instance, context, functions[id - 1], count, values),
      qts_host_free_host_ref: () => {},
      _emscripten_runtime_keepalive_clear: () => {},
      __assert_fail: (condition: number, file: number, line: number) => {
        throw new Error(`QuickJS: ${readText(instance, condition)} failed at ${readText(instance, file)}:${line}`)
      },
      _abort_js: refused('abort'),
      proc_exit: refused('exit'),
      _setitimer_js: refused('timers'),
      // Switched off in the runtime: a script is stopped by its call's timeout or signal.
      qts_host_interrupt_handler: refused('the interrupt handler'),
      qts_host_load_module_source: refused('import'),
      qts_host_normalize_module: refused('import'),
    }
    const names = Object.keys(importNames) as (keyof typeof importNames)[]
    return { a: Object.fromEntries(names.map((name) => [importNames[name], offered[name]])) }
  }
}

function refused(what: string) {
  return () => {
    throw new Error(`QuickJS: ${what} is not there for guests`)
  }
}

/** Makes an interpreter in a fresh instance. */
export function start(instance: Instance): Interpreter {
  call(instance, '__wasm_call_ctors')
  const runtime = call(instance, 'QTS_NewRuntime')
  const context = call(instance, 'QTS_NewContext', runtime, 0)
  call(instance, 'QTS_RuntimeSetMaxStackSize', runtime, scriptStackBytes)
  return { runtime, context }
}

/** Warms an interpreter up: evaluates sources, in their order. Errors: {@link ScriptError}. */
export function load(instance: Instance, interpreter: Interpreter, sources: readonly Source[]): void {
  for (const { name, text } of sources) {
    freeValue(instance, interpreter, evaluateToValue(instance, interpreter, text, name))
  }
}

/** Runs a script and answers with its value as text. Errors: {@link ScriptError}. */
export function evaluate(instance: Instance, interpreter: Interpreter, source: string, name = 'script.js'): string {
  const value = evaluateToValue(instance, interpreter, source, name)
  try {
    return textOf(instance, interpreter, value)
  } finally {
    freeValue(instance, interpreter, value)
  }
}

/** The same, but the value stays in the guest, at the address that is returned, until {@link freeValue}. */
export function evaluateToValue(instance: Instance, interpreter: Interpreter, source: string, name: string): number {
  return withText(instance, source, (code, byteLength) =>
    withText(instance, name, (file) =>
      settled(instance, interpreter, call(instance, 'QTS_Eval', interpreter.context, code, byteLength, file, 0, 0)),
    ),
  )
}

/** A guest function, as a value, that calls `functions[index]` of {@link ImportOptions}. */
export function createFunction(instance: Instance, { context }: Interpreter, index: number, name: string): number {
  // Numbered from 1: QuickJS takes 0 for no function.
  return withText(instance, name, (text) => call(instance, 'QTS_NewFunction', context, text, 0, 0, index + 1))
}

/** Calls a guest function with values; answers with a value. */
export function callFunction(
  instance: Instance,
  interpreter: Interpreter,
  fn: number,
  args: readonly number[],
): number {
  const list = allocate(instance, 4 * args.length)
  try {
    writeWords(instance, list, args)
    const self = call(instance, 'QTS_GetUndefined')
    const value = call(instance, 'QTS_Call', interpreter.context, fn, self, args.length, list)
    return settled(instance, interpreter, value)
  } finally {
    call(instance, 'free', list)
  }
}

/** An `ArrayBuffer`, as a value, and where its bytes are, which the host and the guest then share. */
export function createBuffer(instance: Instance, { context }: Interpreter, byteLength: number) {
  const address = allocate(instance, byteLength)
  return { address, value: call(instance, 'QTS_NewArrayBuffer', context, address, byteLength) }
}

export function freeValue(instance: Instance, { context }: Interpreter, value: number): void {
  call(instance, 'QTS_FreeValuePointer', context, value)
}

/** What QuickJS has allocated, in bytes. */
export function heapBytes(instance: Instance, interpreter: Interpreter): number {
  const { runtime, context } = interpreter
  const usage = call(instance, 'QTS_RuntimeComputeMemoryUsage', runtime, context)
  try {
    return JSON.parse(takeText(instance, context, call(instance, 'QTS_Dump', context, usage))).memory_used_size
  } finally {
    freeValue(instance, interpreter, usage)
  }
}

function call(instance: Instance, name: keyof typeof exportNames, ...args: number[]): number {
  return instance.exports[exportNames[name]]?.(...args) as number
}

/** Passes a value on, or throws the exception that it stands for. */
function settled(instance: Instance, interpreter: Interpreter, value: number): number {
  const exception = call(instance, 'QTS_ResolveException', interpreter.context, value)
  if (exception === 0) return value
  try {
    throw new ScriptError(textOf(instance, interpreter, exception))
  } finally {
    freeValue(instance, interpreter, exception)
    freeValue(instance, interpreter, value)
  }
}

/** What `String(value)` says; where that throws, as for a symbol, QuickJS's own words. */
function textOf(instance: Instance, { context }: Pick<Interpreter, 'context'>, value: number): string {
  const text = call(instance, 'QTS_GetString', context, value) || call(instance, 'QTS_Dump', context, value)
  return takeText(instance, context, text)
}

function takeText(instance: Instance, context: number, ptr: number): string {
  if (ptr === 0) throw new ScriptError('out of memory')
  const text = readText(instance, ptr)
  call(instance, 'QTS_FreeCString', context, ptr)
  return text
}

function readText({ memory }: Instance, ptr: number): string {
  return memory.readString(ptr, new Uint8Array(memory.buffer).indexOf(0, ptr) - ptr)
}

/** Lends the guest a text, with the zero behind it that C wants. */
function withText<T>(instance: Instance, text: string, fn: (ptr: number, byteLength: number) => T): T {
  const bytes = Buffer.from(`${text}\0`)
  const ptr = allocate(instance, bytes.length)
  try {
    instance.memory.write(ptr, bytes)
    return fn(ptr, bytes.length - 1)
  } finally {
    call(instance, 'free', ptr)
  }
}

function allocate(instance: Instance, byteLength: number): number {
  const ptr = call(instance, 'malloc', byteLength)
  if (ptr === 0) throw new ScriptError('out of memory')
  return ptr
}

/** Guest code calls the host. What that throws becomes an exception in the guest: passing through, it would tear QuickJS's stack. */
function callHost(
  instance: InstanceContext,
  context: number,
  fn: HostFunction | undefined,
  count: number,
  values: number,
): number {
  try {
    const args = Array.from({ length: count }, (_, at) => textOf(instance, { context }, values + at * valueBytes))
    const answer = fn?.(instance, ...args)
    return answer === undefined ? 0 : newString(instance, context, answer) // no value at all is undefined
  } catch (error) {
    const text = newString(instance, context, String(error))
    const thrown = call(instance, 'QTS_Throw', context, text)
    call(instance, 'QTS_FreeValuePointer', context, text)
    return thrown
  }
}

function newString(instance: Instance, context: number, text: string): number {
  return withText(instance, text, (ptr) => call(instance, 'QTS_NewString', context, ptr))
}

function writeWords({ memory }: Instance, ptr: number, words: readonly number[]): void {
  memory.write(ptr, new Uint8Array(Int32Array.from(words).buffer))
}

/** What the guest writes to its standard streams goes to the host's. */
function print({ memory }: Instance, fd: number, vectors: number, count: number): number {
  const view = new DataView(memory.buffer)
  let byteLength = 0
  for (let vector = vectors; vector < vectors + 8 * count; vector += 8) {
    const bytes = memory.read(view.getUint32(vector, true), view.getUint32(vector + 4, true))
    ;(fd === 1 ? process.stdout : process.stderr).write(bytes)
    byteLength += bytes.length
  }
  return byteLength
}

/** A `struct tm`, always in UTC: guests answer the same wherever they run. */
function writeTime(instance: Instance, seconds: number, ptr: number): void {
  const time = new Date(seconds * 1000)
  const year = time.getUTCFullYear()
  const dayOfYear = Math.floor((time.getTime() - Date.UTC(year, 0, 1)) / 86_400_000)
  const clock = [time.getUTCSeconds(), time.getUTCMinutes(), time.getUTCHours()]
  const date = [time.getUTCDate(), time.getUTCMonth(), year - 1900, time.getUTCDay(), dayOfYear]
  const zone = [0, 0] // no daylight saving, no offset
  writeWords(instance, ptr, [...clock, ...date, ...zone])
}
