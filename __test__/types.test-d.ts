// The public types, tested as types: `npm run test:types` compiles this file, nothing runs it.
// What stands behind @ts-expect-error must stay refused; the compiler fails when it is accepted.
import type { EventEmitter } from 'node:events'
import { expectTypeOf } from 'expect-type'
import * as everything from '../index.js'
import {
  type BufferAbi,
  type CallOptions,
  type DrainOptions,
  type EngineOptions,
  errorCodes,
  type ForkOptions,
  type GlueManager,
  type GlueOptions,
  type Histogram,
  type ImportDescriptor,
  type Imports,
  type InstanceContext,
  type LeasedInstance,
  type LeaseOptions,
  type Limits,
  type LinearMemory,
  loadGlue,
  type ManagerOptions,
  type ManagerStats,
  type ModuleSource,
  type PageStats,
  type Pressure,
  type Readiness,
  type RecycleReport,
  type ReloadOptions,
  type ReloadReport,
  type ReloadStep,
  type ReloadTrace,
  type ResetOptions,
  type ResetReport,
  type Snapshot,
  version,
  WasmError,
  type WasmErrorCode,
  WasmModuleManager,
  type WasmResult,
  type WasmValue,
} from '../index.js'

declare const manager: WasmModuleManager
declare const instance: LeasedInstance
declare const context: InstanceContext
declare const memory: LinearMemory
declare const error: WasmError
declare const signal: AbortSignal

// ---------------------------------------------------------------- what there is at run time, and nothing more

// A CommonJS module has a default as well: the module itself.
expectTypeOf<Exclude<keyof typeof everything, 'default'>>().toEqualTypeOf<
  | 'WasmModuleManager'
  | 'WasmError'
  | 'WebAssembly'
  | 'loadGlue'
  | 'setMemoryBudget'
  | 'readiness'
  | 'errorCodes'
  | 'version'
>()
expectTypeOf(errorCodes).toEqualTypeOf<readonly WasmErrorCode[]>()
expectTypeOf(version).toEqualTypeOf<string>()
// @ts-expect-error the list is frozen
errorCodes.push('ERR_WASM_TRAP')
// @ts-expect-error names of later capabilities are absent, not stubs
everything.Component

// ---------------------------------------------------------------- making one

expectTypeOf<ModuleSource>().toEqualTypeOf<string | URL | Uint8Array | ArrayBuffer>()
expectTypeOf(WasmModuleManager.create).toEqualTypeOf<
  (source: ModuleSource, options?: ManagerOptions) => Promise<WasmModuleManager>
>()
expectTypeOf(WasmModuleManager.createSync).toEqualTypeOf<
  (source: ModuleSource, options?: ManagerOptions) => WasmModuleManager
>()
WasmModuleManager.createSync(Buffer.from([]))
// @ts-expect-error made by create and createSync only
new WasmModuleManager()
// @ts-expect-error a number is no source
WasmModuleManager.create(1)
// @ts-expect-error a source is needed
WasmModuleManager.create()

expectTypeOf<keyof ManagerOptions>().toEqualTypeOf<
  | 'name'
  | 'instances'
  | 'threads'
  | 'imports'
  | 'initialize'
  | 'saveState'
  | 'restoreState'
  | 'abi'
  | 'limits'
  | 'maxQueue'
  | 'recycle'
  | 'cache'
  | 'engine'
  | 'isolation'
  | 'snapshots'
  | 'reseed'
>()
expectTypeOf<ManagerOptions>().toExtend<Partial<ManagerOptions>>()
expectTypeOf<ManagerOptions['cache']>().toEqualTypeOf<boolean | string | undefined>()
expectTypeOf<Limits>().toEqualTypeOf<{
  memoryBytes?: number
  tableElements?: number
  timeoutMs?: number
  fuel?: number
  stackBytes?: number
}>()
expectTypeOf<EngineOptions>().toEqualTypeOf<{
  interruptible?: boolean
  fuel?: boolean
  signalsBasedTraps?: boolean
  simd?: boolean
  relaxedSimd?: boolean
  threads?: boolean
  memoryReservationBytes?: number
}>()
expectTypeOf<BufferAbi>().toEqualTypeOf<{
  allocate?: string
  deallocate?: string | null
  returns?: 'out-pointer' | 'packed-i64' | 'multi-value'
}>()

const options: ManagerOptions = {
  name: 'x',
  instances: 2,
  threads: 2,
  imports: { env: { f: (x: number) => x, async g() {}, memory: { initial: 1, maximum: 2 }, big: 1n } },
  initialize: async (fresh) => {
    expectTypeOf(fresh).toEqualTypeOf<LeasedInstance>()
  },
  saveState: (old, replica) => {
    expectTypeOf(old).toEqualTypeOf<LeasedInstance>()
    expectTypeOf(replica).toEqualTypeOf<number>()
    return { anything: true }
  },
  restoreState: (fresh, state, replica) => {
    expectTypeOf(fresh).toEqualTypeOf<LeasedInstance>()
    expectTypeOf(state).toBeAny()
    expectTypeOf(replica).toEqualTypeOf<number>()
  },
}
expectTypeOf(options).toExtend<ManagerOptions>()
expectTypeOf<Extract<ManagerOptions['imports'], (...args: never) => unknown>>().toEqualTypeOf<
  (instance: InstanceContext) => Imports
>()
const shared: ImportDescriptor = { initial: 1 }
expectTypeOf({ env: { memory: shared } }).toExtend<Imports>()

// @ts-expect-error a misspelt option
WasmModuleManager.create('x.wasm', { instance: 2 })
// @ts-expect-error a misspelt limit
WasmModuleManager.create('x.wasm', { limits: { memory: 1 } })
// @ts-expect-error [wasi] has not arrived
WasmModuleManager.create('x.wasm', { wasi: true })
// @ts-expect-error a misspelt threshold
WasmModuleManager.create('x.wasm', { recycle: { call: 1 } })
// @ts-expect-error no such way
WasmModuleManager.create('x.wasm', { recycle: { strategy: 'fork' } })
WasmModuleManager.create('x.wasm', {
  recycle: {
    memory: '75%',
    calls: 10_000,
    ageMs: 3_600_000,
    onTrap: 'keep',
    predict: true,
    jitter: 0.2,
    strategy: 'reset',
    backoff: { initialMs: 100, maxMs: 1000 },
  },
})
WasmModuleManager.create('x.wasm', {
  isolation: 'per-call',
  snapshots: { images: 'copy', prepare: true },
  reseed: 'seed',
})
WasmModuleManager.create('x.wasm', { reseed: async (instance) => void instance.exports.seed?.(1) })
// @ts-expect-error no such isolation
WasmModuleManager.create('x.wasm', { isolation: 'per-process' })
// @ts-expect-error no such images
WasmModuleManager.create('x.wasm', { snapshots: { images: 'zip' } })
// @ts-expect-error no such form
WasmModuleManager.create('x.wasm', { abi: { returns: 'pair' } })
// @ts-expect-error bytes are numbers
WasmModuleManager.create('x.wasm', { limits: { memoryBytes: '64MB' } })
// @ts-expect-error the imports function is synchronous
WasmModuleManager.create('x.wasm', { imports: async () => ({ env: {} }) })

// ---------------------------------------------------------------- the manager

expectTypeOf(manager).toExtend<EventEmitter>()
expectTypeOf(manager).toExtend<AsyncDisposable>()
expectTypeOf(manager.name).toEqualTypeOf<string>()
expectTypeOf(manager.generation).toEqualTypeOf<number>()
expectTypeOf(manager.state).toEqualTypeOf<
  'starting' | 'ready' | 'draining' | 'reloading' | 'closing' | 'closed' | 'failed'
>()
expectTypeOf(manager.memory).toEqualTypeOf<LinearMemory>()
expectTypeOf(manager.exports).toEqualTypeOf<Record<string, (...args: WasmValue[]) => WasmResult>>()
// @ts-expect-error read only
manager.generation = 2
// @ts-expect-error read only
manager.exports = {}

expectTypeOf(manager.call).toEqualTypeOf<
  (name: string, args?: readonly WasmValue[], options?: CallOptions) => Promise<WasmResult>
>()
expectTypeOf(manager.callSync).toEqualTypeOf<(name: string, args?: readonly WasmValue[]) => WasmResult>()
expectTypeOf(manager.invoke).toEqualTypeOf<
  (name: string, input: Uint8Array, options?: CallOptions) => Promise<Uint8Array>
>()
manager.call('f', [1, 2n, {}, null] as const, { signal, timeoutMs: 5 })
// @ts-expect-error arguments travel in an array
manager.call('f', 1)
// @ts-expect-error a misspelt option
manager.call('f', [], { timeout: 5 })
// @ts-expect-error a synchronous call cannot be stopped by a signal
manager.callSync('f', [], { signal })
// @ts-expect-error bytes, not text
manager.invoke('f', 'text')

expectTypeOf<CallOptions>().toEqualTypeOf<{ signal?: AbortSignal; timeoutMs?: number }>()
expectTypeOf<LeaseOptions>().toEqualTypeOf<{ signal?: AbortSignal }>()

expectTypeOf(manager.use(() => 7)).toEqualTypeOf<Promise<number>>()
expectTypeOf(manager.use(async (held) => held.generation, { signal })).toEqualTypeOf<Promise<number>>()
manager.use((held) => expectTypeOf(held).toEqualTypeOf<LeasedInstance>())
expectTypeOf(manager.acquire).toEqualTypeOf<(options?: LeaseOptions) => Promise<LeasedInstance>>()
// @ts-expect-error a lease needs something to do
manager.use()
// @ts-expect-error waiting for a lease has no timeout; use AbortSignal.timeout
manager.acquire({ timeoutMs: 5 })

// ---------------------------------------------------------------- reload

expectTypeOf(manager.reload).toEqualTypeOf<(options?: ReloadOptions) => Promise<ReloadReport>>()
expectTypeOf(manager.reloadSync).toEqualTypeOf<(options?: ReloadOptions) => ReloadReport>()
expectTypeOf<keyof ReloadOptions>().toEqualTypeOf<
  'reason' | 'source' | 'strategy' | 'skipSave' | 'drainTimeoutMs' | 'onDrainTimeout'
>()
expectTypeOf<ReloadOptions['strategy']>().toEqualTypeOf<'exclusive' | 'rolling' | undefined>()
expectTypeOf<ReloadOptions['source']>().toEqualTypeOf<ModuleSource | undefined>()
expectTypeOf<DrainOptions>().toEqualTypeOf<{ drainTimeoutMs?: number; onDrainTimeout?: 'abort' | 'interrupt' }>()
expectTypeOf<ReloadReport>().toEqualTypeOf<{
  generation: number
  previousGeneration: number
  reason: string
  strategy: 'exclusive' | 'rolling'
  drained: number
  queued: number
  pauseMs: number
  drainMs: number
  saveMs: number
  instantiateMs: number
  restoreMs: number
  memoryBytesBefore: number
  memoryBytesAfter: number
}>()
expectTypeOf<ReloadTrace>().toEqualTypeOf<{
  manager: string
  generation: number
  reason: string
  strategy: 'exclusive' | 'rolling'
  result?: ReloadReport
  error?: unknown
}>()
expectTypeOf<ReloadStep>().toEqualTypeOf<{
  manager: string
  generation: number
  reason: string
  strategy: 'exclusive' | 'rolling'
  step: 'instantiate' | 'drain' | 'save' | 'restore' | 'commit'
  durationMs: number
}>()
manager.reload({ strategy: 'rolling', source: new URL('file:///other.wasm') })
manager.reloadSync({ source: new Uint8Array() })
// @ts-expect-error no such strategy
manager.reload({ strategy: 'sideways' })
// @ts-expect-error a compiled module of Node's own engine is no source
manager.reload({ source: new WebAssembly.Module(new Uint8Array()) })
// @ts-expect-error no such answer to a drain timeout
manager.reload({ onDrainTimeout: 'wait' })

// ---------------------------------------------------------------- snapshot, reset, fork

expectTypeOf(manager.snapshot).toEqualTypeOf<(options?: { signal?: AbortSignal }) => Promise<Snapshot>>()
expectTypeOf(manager.snapshotSync).toEqualTypeOf<() => Snapshot>()
expectTypeOf(manager.reset).toEqualTypeOf<(options?: ResetOptions) => Promise<ResetReport>>()
expectTypeOf(manager.resetSync).toEqualTypeOf<(options?: ResetOptions) => ResetReport>()
expectTypeOf(manager.fork).toEqualTypeOf<(options?: ForkOptions) => Promise<WasmModuleManager>>()
expectTypeOf<ResetOptions>().toExtend<DrainOptions & { to?: Snapshot }>()
expectTypeOf<ForkOptions>().toEqualTypeOf<Partial<Pick<ManagerOptions, 'name' | 'imports' | 'limits' | 'recycle'>>>()
expectTypeOf<Snapshot>().toExtend<Disposable>()
expectTypeOf<keyof ResetReport>().toEqualTypeOf<
  'generation' | 'memoryBytesBefore' | 'memoryBytesAfter' | 'dirtyBytes' | 'durationMs'
>()
// @ts-expect-error a number is no snapshot
manager.reset({ to: 1 })
// @ts-expect-error a fork has its parent's threads
manager.fork({ threads: 2 })

// ---------------------------------------------------------------- the end

expectTypeOf(manager.close).toEqualTypeOf<(options?: { drainTimeoutMs?: number }) => Promise<void>>()
expectTypeOf(manager.destroy).toEqualTypeOf<() => Promise<void>>()
expectTypeOf(manager[Symbol.asyncDispose]).returns.toExtend<PromiseLike<void>>()
// @ts-expect-error destroy does not drain
manager.destroy({ drainTimeoutMs: 1 })

// ---------------------------------------------------------------- events

manager.on('reload', (report) => expectTypeOf(report).toEqualTypeOf<ReloadReport>())
manager.on('reload:failed', (failure) => expectTypeOf(failure).toEqualTypeOf<WasmError>())
manager.on('trap', (trap) => expectTypeOf(trap).toEqualTypeOf<WasmError>())
manager.on('close', (...nothing) => expectTypeOf(nothing).toEqualTypeOf<[]>())
manager.once('reload', (report) => expectTypeOf(report).toEqualTypeOf<ReloadReport>())
manager.off('trap', (trap) => expectTypeOf(trap).toEqualTypeOf<WasmError>())
expectTypeOf(manager.on('close', () => {})).toEqualTypeOf<WasmModuleManager>()
manager.on('pressure', (pressure) => expectTypeOf(pressure).toEqualTypeOf<Pressure>())
manager.once('recycle', (report) => expectTypeOf(report).toEqualTypeOf<RecycleReport>())
// @ts-expect-error Node's 'drain' means something else, and is never emitted
manager.on('drain', () => {})
// @ts-expect-error a report is no error
manager.on('reload', (failure: WasmError) => failure.code)

// ---------------------------------------------------------------- instances and memory

expectTypeOf<keyof LeasedInstance>().toEqualTypeOf<
  'generation' | 'exports' | 'memory' | 'call' | 'release' | typeof Symbol.dispose
>()
expectTypeOf(instance).toExtend<Disposable>()
expectTypeOf(instance.call).toEqualTypeOf<
  (name: string, args?: readonly WasmValue[], options?: CallOptions) => Promise<WasmResult>
>()
expectTypeOf(instance.release).toEqualTypeOf<() => void>()
expectTypeOf(instance.memory).toEqualTypeOf<LinearMemory>()
expectTypeOf(context).toEqualTypeOf<{
  readonly generation: number
  readonly exports: Record<string, (...args: WasmValue[]) => WasmResult>
  readonly memory: LinearMemory
}>()
// @ts-expect-error a context is lent: there is nothing to release
context.release()
// @ts-expect-error a lease does not reload
instance.reload()

expectTypeOf(memory).toEqualTypeOf<{
  readonly byteLength: number
  readonly buffer: ArrayBuffer
  read(ptr: number, byteLength: number): Uint8Array
  readString(ptr: number, byteLength: number): string
  write(ptr: number, bytes: Uint8Array | string): number
}>()
// @ts-expect-error memory grows in the guest
memory.grow(1)
// @ts-expect-error pointers are numbers
memory.read(0n, 1)

expectTypeOf<WasmResult>().toBeUnknown()

// ---------------------------------------------------------------- errors

expectTypeOf(error).toExtend<Error>()
expectTypeOf(error.code).toEqualTypeOf<WasmErrorCode>()
expectTypeOf(error.manager).toEqualTypeOf<string | undefined>()
expectTypeOf(error.generation).toEqualTypeOf<number | undefined>()
expectTypeOf(error.trap).toEqualTypeOf<string | undefined>()
expectTypeOf(error.wasmStack).toEqualTypeOf<string | undefined>()
expectTypeOf(error.phase).toEqualTypeOf<'drain' | 'save' | 'instantiate' | 'initialize' | 'restore' | undefined>()
expectTypeOf(error.inFlight).toEqualTypeOf<number | undefined>()
expectTypeOf<'ERR_WASM_TRAP'>().toExtend<WasmErrorCode>()
expectTypeOf<'ERR_WASM_OOPS'>().not.toExtend<WasmErrorCode>()
// @ts-expect-error made by the package only
new WasmError('text')
// @ts-expect-error read only
error.code = 'ERR_WASM_TRAP'
// @ts-expect-error [wasi] has not arrived
error.exitCode
// @ts-expect-error no such code
if (error.code === 'ERR_WASM_OOPS') throw error

// ---------------------------------------------------------------- figures

expectTypeOf(manager.stats).toEqualTypeOf<(options?: { pages?: boolean }) => ManagerStats>()
expectTypeOf<ManagerStats['pages']>().toEqualTypeOf<PageStats | undefined>()
expectTypeOf<PageStats>().toEqualTypeOf<Record<'privateBytes' | 'sharedBytes' | 'reservedBytes', number>>()
expectTypeOf<ManagerStats['state']>().toEqualTypeOf<WasmModuleManager['state']>()
expectTypeOf<ManagerStats['instances']>().toEqualTypeOf<{ total: number; busy: number; poisoned: number }>()
expectTypeOf<ManagerStats['calls']>().toEqualTypeOf<{
  completed: number
  failed: number
  trapped: number
  interrupted: number
  rejected: number
}>()
expectTypeOf<ManagerStats['reloads']>().toEqualTypeOf<Record<string, number>>()
expectTypeOf<ManagerStats['pauseTime']>().toEqualTypeOf<Histogram>()
expectTypeOf<Histogram>().toEqualTypeOf<
  Record<'count' | 'min' | 'mean' | 'p50' | 'p90' | 'p99' | 'p999' | 'max', number>
>()

// ---------------------------------------------------------------- JS glue

/** What some package exports. */
interface Glue {
  add(a: number, b: number): number
  Cell: new (value: number) => { value: number }
}
declare const glue: GlueManager<Glue>

expectTypeOf(everything.WebAssembly).toEqualTypeOf<typeof globalThis.WebAssembly>()
new everything.WebAssembly.Memory({ initial: 1 }).buffer.byteLength

expectTypeOf(loadGlue<Glue>).toEqualTypeOf<
  (specifier: string | URL, options?: GlueOptions) => Promise<GlueManager<Glue>>
>()
expectTypeOf(loadGlue('x')).resolves.toEqualTypeOf<GlueManager>()
expectTypeOf<GlueManager['module']>().toBeAny()
expectTypeOf<keyof GlueOptions>().toEqualTypeOf<
  | 'name'
  | 'threads'
  | 'limits'
  | 'maxQueue'
  | 'cache'
  | 'engine'
  | 'snapshots'
  | 'recycle'
  | 'threadPool'
  | 'initialize'
  | 'saveState'
  | 'restoreState'
  | 'expose'
  | 'include'
  | 'parentURL'
>()
loadGlue<Glue>('x', {
  expose: async (raw, shadows) => {
    expectTypeOf(raw).toBeAny()
    expectTypeOf(shadows.WebAssembly).toEqualTypeOf<typeof globalThis.WebAssembly>()
    expectTypeOf(shadows.FinalizationRegistry).toEqualTypeOf<FinalizationRegistryConstructor>()
    return raw.create()
  },
  initialize: async (module) => module.init(),
  saveState: (module) => module.read(),
  restoreState: (module, state) => module.write(state),
  include: ['y'],
  parentURL: import.meta.url,
  limits: { memoryBytes: 1 },
})
loadGlue(new URL('file:///x.cjs'), { parentURL: new URL(import.meta.url) })
// @ts-expect-error a realm is one replica
loadGlue('x', { instances: 2 })
// @ts-expect-error the imports are the glue's
loadGlue('x', { imports: {} })
// @ts-expect-error a misspelt option
loadGlue('x', { includes: ['y'] })
// @ts-expect-error bytes are no glue
loadGlue(new Uint8Array())

expectTypeOf(glue).toExtend<EventEmitter>()
expectTypeOf(glue).toExtend<AsyncDisposable>()
expectTypeOf(glue.module).toEqualTypeOf<Glue>()
expectTypeOf(glue.memory).toEqualTypeOf<LinearMemory>()
expectTypeOf(glue.state).toEqualTypeOf<WasmModuleManager['state']>()
expectTypeOf(glue.exports.anything).toBeAny()
expectTypeOf(glue.use((module) => new module.Cell(module.add(1, 2)).value)).toEqualTypeOf<Promise<number>>()
expectTypeOf(glue.use(async () => 'text', { signal })).toEqualTypeOf<Promise<string>>()
expectTypeOf(glue.reload).toEqualTypeOf<(options?: Omit<ReloadOptions, 'source'>) => Promise<ReloadReport>>()
expectTypeOf(glue.reloadSync).toEqualTypeOf<(options?: Omit<ReloadOptions, 'source'>) => ReloadReport>()
expectTypeOf(glue.fork()).toEqualTypeOf<Promise<never>>()
expectTypeOf(glue.on('reload', (report) => expectTypeOf(report).toEqualTypeOf<ReloadReport>())).toEqualTypeOf<
  GlueManager<Glue>
>()
// What both kinds of managers have, they have alike.
type Shared = 'name' | 'generation' | 'state' | 'memory' | 'exports' | 'stats' | 'close' | 'destroy'
type Snapshots = 'snapshot' | 'snapshotSync' | 'reset' | 'resetSync' | 'fork'
expectTypeOf<GlueManager>().toExtend<Pick<WasmModuleManager, Shared | Snapshots>>()
declare const reloadOptions: ReloadOptions
glue.reload(reloadOptions)
class Subclass extends glue.module.Cell {
  twice() {
    return this.value * 2
  }
}
expectTypeOf(new Subclass(1).twice()).toEqualTypeOf<number>()
// @ts-expect-error everything runs on this thread
glue.call('add', [1, 2])
// @ts-expect-error a scope of `use` is held by its function
glue.acquire()
// @ts-expect-error another build is another loadGlue()
glue.reload({ source: 'x.wasm' })
// @ts-expect-error read only
glue.module = { add: (a, b) => a + b, Cell: Subclass }

// ---------------------------------------------------------------- with the language

async function scopes() {
  await using scoped = await WasmModuleManager.create('x.wasm')
  using held = await scoped.acquire()
  return held.exports
}
expectTypeOf(scopes).returns.resolves.toEqualTypeOf<LeasedInstance['exports']>()

// ---------------------------------------------------------------- recycling, readiness

expectTypeOf(everything.setMemoryBudget).toEqualTypeOf<(bytes: number | null) => void>()
// @ts-expect-error nothing is no budget; null is
everything.setMemoryBudget()
expectTypeOf(everything.readiness(manager)).toEqualTypeOf<Readiness>()
expectTypeOf<Readiness['status']>().toEqualTypeOf<'starting' | 'serving' | 'draining' | 'failed'>()
expectTypeOf<RecycleReport>().toExtend<Omit<ReloadReport, 'strategy'>>()
expectTypeOf<RecycleReport['strategy']>().toEqualTypeOf<'exclusive' | 'rolling' | 'reset'>()
expectTypeOf<RecycleReport['returnedBytes']>().toEqualTypeOf<number | undefined>()
