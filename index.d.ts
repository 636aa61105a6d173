/**
 * wasm-molt: reloadable WebAssembly modules for Node.js.
 *
 * `require('wasm-molt')` and `import { … } from 'wasm-molt'` both work.
 * Bytes are bytes, times are milliseconds, and the unit stands last in the name.
 * Every error that this package makes is a {@link WasmError} with a stable `code`; docs/errors.md has a paragraph on each.
 * What is a plain programming mistake for JavaScript itself stays a `TypeError` or `RangeError`, and is named where it can occur.
 *
 * Terms: a *replica* is one instance with a linear memory of its own; a *generation* is everything that one load or
 * reload made; a call or lease is *in flight* while it has a replica and *queued* while it waits for one; a *swap* is
 * what `reload` does inside. *Glue* is the JavaScript that a toolchain puts around a module; a *realm* is a generation of it.
 */
/// <reference types="node" />
import { EventEmitter } from 'node:events'

// ---------------------------------------------------------------- values

/**
 * A value that crosses between JavaScript and the guest.
 *
 * i32, f32 and f64 are numbers; i64 is a bigint; externref is any value; funcref is a function of an instance, or null.
 * Arguments are coerced as the WebAssembly JavaScript API coerces them, and what it refuses is refused with the same
 * `TypeError`, before anything runs.
 * v128, exception and GC references cannot cross: a call of an export that has one in its signature throws a `TypeError`.
 *
 * Source: WebAssembly JavaScript Interface, ToWebAssemblyValue and ToJSValue.
 */
export type WasmValue = number | bigint | unknown

/** undefined for no result, the value for one, an array for several. */
export type WasmResult = WasmValue | WasmValue[] | undefined

/**
 * Where a module comes from: a path to a .wasm or .wat file, a file: URL, or the bytes of a binary module.
 *
 * Paths are relative to the working directory of the process. Text is only read from .wat files, not from bytes.
 */
export type ModuleSource = string | URL | Uint8Array | ArrayBuffer

// ---------------------------------------------------------------- manager

/**
 * A WebAssembly module whose instances can be replaced while the program uses it.
 *
 * It stands where `const wasm = require('./x_wasm.cjs')` stood: keep it, its `exports` and its `memory` as long as you like.
 * Made by {@link WasmModuleManager.create} and {@link WasmModuleManager.createSync}; the constructor throws a `TypeError`.
 *
 * A manager that is idle does not keep the process alive; a promise of it that is not settled does.
 * Close it when you are done. One that is forgotten is released when it is collected, which may be late or never:
 * the collector does not see how much linear memory hangs on it.
 */
export class WasmModuleManager extends EventEmitter implements AsyncDisposable {
  private constructor()

  /**
   * Compiles a module (or loads its compiled code from the cache), instantiates it, and resolves when the first generation serves.
   *
   * Reads and compiles on other threads; the event loop stays free.
   * Each replica in turn gets its imports, runs its start function, then `_initialize` if the module exports one without
   * parameters and results, then `initialize` of the options.
   *
   * Errors (there is no manager afterwards, and nothing is left behind):
   * - ERR_WASM_INVALID_ARGUMENT: an option or the source cannot be used; unknown options are refused by name.
   * - ERR_WASM_COMPILE: not a module that this engine can compile; names the option where a feature is off.
   * - ERR_WASM_LINK: an import is missing or is something else than the module needs.
   * - ERR_WASM_TRAP, ERR_WASM_TIMEOUT, ERR_WASM_OUT_OF_FUEL: how the guest's own start ended.
   * - ERR_WASM_ASYNC_IMPORT: the imports function returned a promise.
   * - ERR_WASM_RELOAD_FAILED: `initialize`, the imports function or an import threw; `phase` says where and `cause` is what it threw.
   *
   * Cost: compiling dominates, and follows the size of the module; with the cache, a module that was compiled before
   * with the same options is only read.
   */
  static create(source: ModuleSource, options?: ManagerOptions): Promise<WasmModuleManager>

  /**
   * The same, blocking this thread: for code that today says `const wasm = require('./x_wasm.cjs')`.
   *
   * `initialize` and the imports must be synchronous.
   * A pool of the manager's own still compiles and later runs `call`.
   *
   * Errors: as {@link WasmModuleManager.create}, thrown; and ERR_WASM_ASYNC_IMPORT if `initialize` returns a promise.
   */
  static createSync(source: ModuleSource, options?: ManagerOptions): WasmModuleManager

  /** In errors, events and thread names. See {@link ManagerOptions.name}. */
  readonly name: string

  /**
   * The number of the generation that serves.
   *
   * Counts from 1; goes up by one with every committed reload, and with every replica that is replaced because it
   * trapped or was stopped; never reused.
   */
  readonly generation: number

  /**
   * Where the manager is in its life.
   *
   * - `starting`: the first generation is not there yet.
   * - `ready`: serving.
   * - `reloading`: a reload is under way; the gate may still be open.
   * - `draining`: a reload has closed the gate and waits for what is in flight.
   * - `closing`: `close()` or `destroy()` was called; nothing new is admitted.
   * - `closed`: everything is released.
   * - `failed`: no replica can serve, because the replacement of a trapped one failed.
   *   The next call and the next `reload()` try again.
   */
  readonly state: 'starting' | 'ready' | 'draining' | 'reloading' | 'closing' | 'closed' | 'failed'

  /**
   * Calls an export on a pool thread; never blocks the event loop.
   *
   * Takes whichever replica is free. While none is, and while a swap has the gate closed, it waits its turn, first in, first out.
   * Arguments are coerced before `call` returns. An import that returns a promise makes the guest wait for it.
   * * `name`: an exported function.
   * * `args`: its arguments; missing ones count as undefined, surplus ones are ignored.
   *
   * Errors:
   * - ERR_WASM_EXPORT_NOT_FOUND, ERR_WASM_INVALID_ARGUMENT, `TypeError`: nothing was called.
   * - ERR_WASM_QUEUE_FULL, ERR_WASM_CLOSED: it never ran.
   * - ERR_WASM_TRAP: the guest trapped; the replica is replaced before it serves again.
   * - ERR_WASM_TIMEOUT: `timeoutMs` or `limits.timeoutMs` has passed; if it ran, the replica is replaced.
   * - ERR_WASM_OUT_OF_FUEL, ERR_WASM_INTERRUPTED: it was stopped while it ran; the replica is replaced.
   * - ERR_WASM_RELOAD_FAILED: it waited for the replacement of a trapped replica, which failed; it never ran.
   * - ERR_WASM_RELOADING: it was made inside a hook of this manager and could not begin at once; it never ran.
   * - `signal.reason`: the signal was aborted.
   * - Whatever an import threw: the same object; the replica serves on.
   *
   * Cost: two thread changes; see docs/perf.md.
   */
  call(name: string, args?: readonly WasmValue[], options?: CallOptions): Promise<WasmResult>

  /**
   * Calls an export on this thread, in the replica that `exports` uses.
   *
   * Blocks this thread, and with it every timer and signal; only `limits.timeoutMs` and `limits.fuel` can stop it.
   * If that replica has trapped before, it is replaced first, on this thread.
   *
   * Errors, thrown, beyond those of {@link WasmModuleManager.call}:
   * - ERR_WASM_RELOADING: an exclusive `reload()` has not settled; nothing was called. While a rolling one is prepared it runs.
   * - ERR_WASM_BUSY: a pool thread is inside the replica, or a lease holds it; nothing was called.
   * - ERR_WASM_ASYNC_IMPORT: an import returned a promise; the guest was unwound, the replica serves on.
   * - ERR_WASM_RELOAD_FAILED: the trapped replica could not be replaced (`initialize` must be synchronous for that).
   */
  callSync(name: string, args?: readonly WasmValue[]): WasmResult

  /**
   * Sends bytes through a guest that takes and returns buffers: allocate, copy in, call, copy out, free, all off the JS thread
   * as one operation in flight.
   *
   * The input is copied before `invoke` returns, so it may be changed at once. How the buffers travel is said by {@link BufferAbi}.
   * * `name`: an exported function of the signature that `abi.returns` names.
   *
   * Errors: as {@link WasmModuleManager.call}, and
   * - ERR_WASM_EXPORT_NOT_FOUND, ERR_WASM_INVALID_ARGUMENT before anything runs: the function or an allocator function is
   *   missing or has another signature, or the module has no memory.
   * - ERR_WASM_TRAP with `trap` 'allocation-failed': the guest's allocator answered 0; the replica is replaced.
   * - ERR_WASM_INVALID_ARGUMENT afterwards: the guest named a buffer outside its memory; the replica serves on.
   *
   * Cost: O(input + output) bytes, each copied twice.
   */
  invoke(name: string, input: Uint8Array, options?: CallOptions): Promise<Uint8Array>

  /**
   * The functions that the module exports, as a live object: `manager.exports.f(1)` always runs in the current generation, on this thread.
   *
   * Safe to keep for ever, the object and each of its functions. Exported memories, tables and globals are not in it.
   * Inside a host call it stands for the instance that called.
   * Its functions cannot be assigned to. A swap to another build changes the object: new functions appear, gone ones disappear, and those
   * that stay keep their identity.
   *
   * Errors, thrown by its functions: as {@link WasmModuleManager.callSync}. While an exclusive `reload()` has not settled they
   * throw ERR_WASM_RELOADING. A function that was kept, and that the present build does not have any more, throws
   * ERR_WASM_EXPORT_NOT_FOUND.
   */
  readonly exports: Record<string, (...args: WasmValue[]) => WasmResult>

  /**
   * A live view of the memory of the current generation's first replica.
   *
   * It shows the exported memory named `memory`, else the first exported one, else the first there is.
   * Inside a host call it stands for the instance that called.
   *
   * Errors, thrown by its members: ERR_WASM_CLOSED once the manager is closed.
   */
  readonly memory: LinearMemory

  /**
   * Runs `fn` with one instance held for it alone, and resolves with what it returns.
   *
   * The whole run counts as one operation in flight: a swap waits for it, so pointers stay valid inside.
   * When `fn` settles the handle expires (ERR_WASM_STALE_HANDLE).
   * Inside `fn`, call through the instance: `manager.call` would wait for another replica, and `await manager.reload()` for this very lease.
   *
   * Errors:
   * - What `fn` throws or rejects with, as it is.
   * - ERR_WASM_QUEUE_FULL, ERR_WASM_CLOSED, `signal.reason`: `fn` was not called.
   * - ERR_WASM_RELOADING: inside a hook of this manager, and no instance was free at once; `fn` was not called.
   * - ERR_WASM_RELOAD_FAILED: it waited for the replacement of a trapped replica, which failed; `fn` was not called.
   */
  use<T>(fn: (instance: LeasedInstance) => T | Promise<T>, options?: LeaseOptions): Promise<T>

  /**
   * The same as an explicit resource: `using instance = await manager.acquire()`.
   *
   * An instance that is never released holds its replica, and every swap, until it is garbage collected.
   *
   * Errors: as {@link WasmModuleManager.use}.
   */
  acquire(options?: LeaseOptions): Promise<LeasedInstance>

  /**
   * Replaces every instance by a fresh one.
   *
   * 'exclusive', the default: instantiate and `initialize` the new ones while the old ones serve; then close the gate, drain,
   * `saveState`, `restoreState`, commit, and open the gate. Calls and leases that come meanwhile wait and run on the new generation.
   * 'rolling': the new ones are made, and then new calls go to them at once, while what is in flight ends on the old ones. It
   * resolves when the new generation serves. Each old instance is released as soon as its call or lease has ended.
   *
   * On any failure before the commit what waits runs on the old generation, whose state is untouched.
   * A reload that equals one under way or one that waits joins it, unless one with another `source` was asked for in between;
   * another one runs after it. A replica that has trapped and was not replaced yet is not asked by `saveState`.
   *
   * Errors (the old generation serves on):
   * - ERR_WASM_RELOAD_FAILED: `phase` says where and `cause` is why; what a hook threw is the very object. A `source` that cannot
   *   be read or compiled is phase 'instantiate', with a `cause` that has its own code.
   * - ERR_WASM_INCOMPATIBLE_MODULE: `source` does not offer what is in use, or needs an import that was not given.
   * - ERR_WASM_DRAIN_TIMEOUT: `inFlight` operations did not end within `drainTimeoutMs`.
   * - ERR_WASM_INVALID_ARGUMENT: an option cannot be used; nothing was begun.
   * - ERR_WASM_RELOADING: it was called inside a hook of this manager, and would wait for that hook; nothing was begun.
   * - ERR_WASM_CLOSED: the manager is closed, or was destroyed meanwhile, or closed by a hook or with `drainTimeoutMs`.
   *
   * docs/reloads.md says it in full, and what may be called from inside hooks, imports and listeners.
   *
   * It settles when its hooks do: a hook that never settles keeps it pending, with `state` 'reloading', until
   * `close({ drainTimeoutMs })` or `destroy()`.
   *
   * Told to the diagnostics channels 'wasm-molt:reload' (a tracing channel) and 'wasm-molt:reload:step'; see {@link ReloadTrace}.
   *
   * Cost: old and new instances exist side by side until the commit, with 'rolling' until the old ones are left; then the old
   * linear memory goes back to the system. The pause, in `pauseMs`, is drain + save + restore.
   */
  reload(options?: ReloadOptions): Promise<ReloadReport>

  /**
   * The same without leaving this thread; hooks must be synchronous, and nothing may be in flight. With nothing in flight the two
   * strategies do the same.
   *
   * Errors, thrown, beyond those of {@link WasmModuleManager.reload}:
   * - ERR_WASM_BUSY: calls or leases are in flight, among them the call that this is called from; nothing was begun.
   * - ERR_WASM_RELOADING: another reload, or a replacement, is under way; nothing was begun.
   * - ERR_WASM_RELOAD_FAILED with ERR_WASM_ASYNC_IMPORT as `cause`: a hook returned a promise.
   */
  reloadSync(options?: ReloadOptions): ReloadReport

  /**
   * Captures the state of the first replica: contents and size of every memory, mutable globals (hidden ones too), tables.
   *
   * Drains as an exclusive reload does (30 seconds at most), captures, serves on. From here on new generations, replacements of
   * trapped replicas, and resets begin with it: neither the start function nor `_initialize` nor `initialize` runs then, only
   * `reseed`. `saveState` and `restoreState` still run on a reload.
   * The newest snapshot is kept until it is released, or another build takes over (`reload({ source })`), whether the handle is
   * kept or not; older ones live as long as their handles. docs/snapshots.md has the rules.
   * * `signal`: gives up waiting; rejects with `signal.reason`.
   *
   * Errors (nothing was captured, the manager serves on):
   * - ERR_WASM_SNAPSHOT_UNSUPPORTED: the module has state that cannot be captured; the text says which.
   * - ERR_WASM_DRAIN_TIMEOUT, ERR_WASM_CLOSED, `signal.reason`.
   * - ERR_WASM_RELOADING: it was called inside a hook of this manager.
   * - ERR_WASM_INTERNAL: the system has no memory or file descriptor left for it.
   *
   * Cost: the pages that were written since the last snapshot are copied once, while calls wait; with `snapshots.prepare` the first
   * capture remaps instead. Benchmark: `snapshots`.
   */
  snapshot(options?: { signal?: AbortSignal }): Promise<Snapshot>

  /**
   * The same without leaving this thread; nothing may be in flight.
   *
   * Errors, thrown, beyond those of {@link WasmModuleManager.snapshot}:
   * - ERR_WASM_BUSY: calls or leases are in flight. ERR_WASM_RELOADING: a reload, reset or snapshot is under way.
   */
  snapshotSync(): Snapshot

  /**
   * Puts every replica back to `to`, in place: contents, size (`memory.size` goes down, pages beyond it trap, growing again works),
   * globals, tables. Pages go back to the system.
   *
   * Not a new generation: exports, leases taken later and pointers older than the snapshot stay valid; pointers that are newer mean
   * nothing any more, and `memory.buffer` is detached. A replica that has trapped is in order again.
   * Drains first, as {@link DrainOptions} say; calls that come meanwhile wait.
   * * `to`: a snapshot of this manager. Default: the newest that was not released.
   *
   * Errors (unless said otherwise nothing was reset, and the manager serves on):
   * - ERR_WASM_INVALID_ARGUMENT: there is no snapshot, or `to` is another manager's, or an option cannot be used.
   * - ERR_WASM_STALE_HANDLE: `to` was released. ERR_WASM_INCOMPATIBLE_MODULE: it is of a build that no longer serves.
   * - ERR_WASM_DRAIN_TIMEOUT, ERR_WASM_CLOSED, and inside a hook ERR_WASM_RELOADING.
   * - What `reseed` throws, as it is; everything was reset.
   * - ERR_WASM_INTERNAL: the system refused; the replicas concerned are replaced by new ones from the newest snapshot.
   *
   * Cost: follows the dirty pages, not the size; finding them is a walk over the page tables of what the guest has touched, which is
   * milliseconds for each GiB that it has read since. Benchmark: `snapshots`.
   */
  reset(options?: ResetOptions): Promise<ResetReport>

  /**
   * The same without leaving this thread; nothing may be in flight, and `reseed` must be synchronous.
   *
   * Errors, thrown, beyond those of {@link WasmModuleManager.reset}:
   * - ERR_WASM_BUSY: calls or leases are in flight. ERR_WASM_RELOADING: a reload, reset or snapshot is under way.
   */
  resetSync(options?: ResetOptions): ResetReport

  /**
   * A manager of its own whose replicas begin as a copy-on-write copy of this one's first replica, as fork(2) copies a process.
   *
   * Pages are shared until either side writes. The parent is not changed and serves on; neither sees what the other does from then
   * on, and either may be closed first. The copy is the child's first snapshot: its reloads, replacements and resets begin with it.
   * The child has the parent's options except for those given; `limits` are merged. `initialize` does not run, `reseed` does:
   * a copy has the parent's random numbers and whatever else the guest has cached of the world.
   *
   * Errors (the parent is not changed, and there is no child):
   * - ERR_WASM_SNAPSHOT_UNSUPPORTED: as for {@link WasmModuleManager.snapshot}, or the instance holds values of JavaScript
   *   (externref) or has changed function references in a table or global.
   * - ERR_WASM_INVALID_ARGUMENT: an option that cannot be used, a memory beyond `limits.memoryBytes`, another `limits.stackBytes`.
   * - ERR_WASM_LINK: the imports do not fit. What `reseed` throws is the `cause` of ERR_WASM_RELOAD_FAILED.
   * - ERR_WASM_DRAIN_TIMEOUT, ERR_WASM_CLOSED, and inside a hook ERR_WASM_RELOADING.
   *
   * Cost: an instantiation and a few mappings, whatever the size, done at once if nothing is in flight. Where the parent was used
   * since its last snapshot or fork, the pages that it has written are looked for (as for {@link WasmModuleManager.reset}) and copied
   * once. A fork starts no thread before its first `call`. Benchmark: `forks`.
   */
  fork(options?: ForkOptions): Promise<WasmModuleManager>

  /**
   * A plain object taken at this moment; read again for later figures. Usable in every state.
   * * `pages`: adds what linear memory really takes. Walks page tables: microseconds for small memories, up to some 10 ms for each
   *   GiB in use. Default false.
   */
  stats(options?: { pages?: boolean }): ManagerStats

  /**
   * Stops admitting, lets what was admitted end (what is queued, and reloads that were asked for, included), releases.
   *
   * Idempotent: every caller gets the same completion. State `closing` from here on.
   * Called inside a hook of this manager it does not wait for that hook: the reload ends at once (it rejects with ERR_WASM_CLOSED,
   * rolled back), and then the manager is closed.
   * * `drainTimeoutMs`: longest wait for hooks, and for what is in flight or queued. Default: as long as it takes. 0: do not wait.
   *   Hooks that have not settled by then are given up, and their reload rejects with ERR_WASM_CLOSED, rolled back.
   *
   * Errors:
   * - ERR_WASM_DRAIN_TIMEOUT: `inFlight` operations did not end in time. Nothing is released, what runs goes on, nothing is
   *   admitted; `close()` again waits again, `destroy()` ends it.
   * - ERR_WASM_INVALID_ARGUMENT: not a whole number of milliseconds, or an option that is not known; nothing is closed.
   */
  close(options?: { drainTimeoutMs?: number }): Promise<void>

  /**
   * Interrupts what runs (ERR_WASM_INTERRUPTED), rejects what waits (ERR_WASM_CLOSED), ends leases, releases. Idempotent.
   *
   * With `engine.interruptible: false` it waits for what runs.
   */
  destroy(): Promise<void>

  /** `close()`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>

  /**
   * A new generation serves. Reason 'trap': one replica was replaced because it trapped or was stopped; reasons of a policy
   * ('memory', 'predicted', 'calls', 'age', 'budget'): one replica was recycled. The others served on.
   *
   * Events are emitted from the event loop, after what they tell of; those of synchronous operations as well.
   */
  on(event: 'reload', listener: (report: ReloadReport) => void): this
  /** A reload, the replacement of a trapped replica, or a recycle, did not happen. */
  on(event: 'reload:failed', listener: (error: WasmError) => void): this
  /** A call trapped (ERR_WASM_TRAP). */
  on(event: 'trap', listener: (error: WasmError) => void): this
  /**
   * A threshold was crossed; see {@link Pressure}. With `recycle` the replica is recycled by itself, and `recycle` or
   * `reload:failed` follows; without, the application decides, and nothing else happens.
   *
   * Once for each crossing of a replica: again after it was replaced or reset, or has shrunk below the threshold.
   */
  on(event: 'pressure', listener: (pressure: Pressure) => void): this
  /**
   * A replica was recycled, and its old memory was let go of. One that was replaced (not reset) is told of by `reload` before.
   */
  on(event: 'recycle', listener: (report: RecycleReport) => void): this
  /** Everything is released. */
  on(event: 'close', listener: () => void): this

  once(event: 'reload', listener: (report: ReloadReport) => void): this
  once(event: 'reload:failed', listener: (error: WasmError) => void): this
  once(event: 'trap', listener: (error: WasmError) => void): this
  once(event: 'pressure', listener: (pressure: Pressure) => void): this
  once(event: 'recycle', listener: (report: RecycleReport) => void): this
  once(event: 'close', listener: () => void): this

  off(event: 'reload', listener: (report: ReloadReport) => void): this
  off(event: 'reload:failed', listener: (error: WasmError) => void): this
  off(event: 'trap', listener: (error: WasmError) => void): this
  off(event: 'pressure', listener: (pressure: Pressure) => void): this
  off(event: 'recycle', listener: (report: RecycleReport) => void): this
  off(event: 'close', listener: () => void): this
}

/**
 * What a manager is made of.
 *
 * Unknown names are refused (ERR_WASM_INVALID_ARGUMENT), here and in `limits`, `engine` and `abi`, so that a misspelt limit is never ignored.
 */
export interface ManagerOptions {
  /** In errors, events and thread names. Default: the name in the module's name section, else its file name without extension, else 'wasm'. */
  name?: string
  /**
   * Replicas, each with a linear memory of its own; `call` uses whichever is free. Default 1. Range 1 to 4096.
   *
   * State that the guest keeps is kept per replica. `exports`, `callSync` and `memory` always use the first one.
   */
  instances?: number
  /** Threads of the pool that compiles and runs `call`. Default: min(instances, available parallelism). Range 1 to 4096. */
  threads?: number
  /**
   * What the module imports, as for `WebAssembly.instantiate`; a function is called once per instance, so that imports can close over *their* instance.
   *
   * A promise-returning import makes the guest wait, as does one that returns any other thenable, unless its result is a
   * reference (then the thenable is the value); that needs a pool thread (`call`, `invoke`), and is ERR_WASM_ASYNC_IMPORT in a synchronous call.
   * Imports run on the JS thread. What one throws comes out of the call as the same object, and the instance serves on.
   */
  imports?: Imports | ((instance: InstanceContext) => Imports)
  /**
   * Runs in each fresh instance before it serves, after its start function and `_initialize`: at the start, in every reload,
   * and when a trapped instance is replaced. Not in one that begins with a snapshot, which has it behind itself: there `reseed` runs.
   *
   * A promise or another thenable is awaited, but it must be synchronous for `createSync`, for `reloadSync`, and for synchronous calls that find a trapped instance.
   */
  initialize?: (instance: LeasedInstance) => void | Promise<void>
  /**
   * Reads what must survive out of the OLD, quiescent instance. Any JS value; a promise or another thenable is awaited by `reload`.
   *
   * Not called with `skipSave`, nor for an instance that has trapped or was interrupted. A rolling reload cannot hand state over.
   * * `replica`: its number, from 0.
   */
  saveState?: (instance: LeasedInstance, replica: number) => unknown
  /**
   * Puts it into the NEW instance before it serves, after `initialize`.
   *
   * Called only where `saveState` was; not when a trapped instance is replaced, because nothing was saved.
   * * `replica`: its number, from 0, as it was for `saveState`.
   */
  // biome-ignore lint/suspicious/noExplicitAny: what saveState returned, which only its author can type
  restoreState?: (instance: LeasedInstance, state: any, replica: number) => void | Promise<void>
  /**
   * Runs wherever an instance is given the state of a snapshot: in a fork, in new generations and replacements, after a reset.
   * Default: nothing.
   *
   * Copies have the random numbers of the original, and whatever else the guest has cached of the world (clocks, host names): have
   * it seed itself anew here. A string names an export that takes nothing, an i32 or an i64, and is called with random bits of the
   * system; with `isolation: 'per-call'` it must be that, and is called before each call.
   */
  reseed?: string | ((instance: LeasedInstance) => void | Promise<void>)
  /**
   * 'per-call': every `call` and `invoke` begins with the newest snapshot's state and leaves nothing behind, a trap included.
   * Default 'shared'.
   *
   * Where nobody has taken one, or all are released, the snapshot is that of the first replica after `initialize`. What
   * `exports`, `callSync` and leases leave in an instance stays until the next call there: warm up through them, and take a snapshot.
   * A trapped or stopped instance is put back, not replaced, and the generation stays.
   *
   * Errors: ERR_WASM_SNAPSHOT_UNSUPPORTED at the start, for a module that cannot be captured.
   *
   * Cost: a reset after each call, microseconds plus the pages that it wrote. Benchmark: `isolation`.
   */
  isolation?: 'shared' | 'per-call'
  /** How snapshots keep memory; see {@link SnapshotOptions}. */
  snapshots?: SnapshotOptions
  /**
   * When a replica is replaced without being asked; see {@link RecyclePolicy}. Default: only after a trap.
   *
   * `{}` sets no threshold of its own, and lets {@link setMemoryBudget} recycle this manager.
   */
  recycle?: RecyclePolicy
  /** For `invoke`. Default names: allocate, deallocate. */
  abi?: BufferAbi
  /** Limits refuse or stop; see {@link Limits}. */
  limits?: Limits
  /**
   * Calls and leases that may wait for a free instance or for a swap; one more rejects with ERR_WASM_QUEUE_FULL. Default 1024. From 0.
   *
   * What starts at once does not count. It also bounds the calls that wait within one lease.
   */
  maxQueue?: number
  /**
   * Where compiled code is kept between processes. true: the user's cache folder; string: the folder `modules` in that one; false:
   * nowhere. Default true.
   *
   * With true, a process without a usable cache folder runs without. Of a folder that was named, `modules` must be, or become, one
   * that is this user's and that nobody else can write to (ERR_WASM_INVALID_ARGUMENT).
   * What is kept is machine code. It runs only if this user has written it (it has a keyed hash, and only this user can read the
   * key), whole, for this module, these options and this version; anything else is compiled again and overwritten.
   */
  cache?: boolean | string
  /** How guests are compiled; see {@link EngineOptions}. Managers with equal options share one engine. */
  engine?: EngineOptions
}

/** How snapshots keep memory. */
export interface SnapshotOptions {
  /**
   * 'copy-on-write': snapshots are memory files that instances are mapped on, and a copy costs what it writes. 'copy': they are
   * copies, and so is every reset and fork; slower, with the same results. Default: 'copy-on-write' on Linux, 'copy' elsewhere, where
   * there is nothing else.
   */
  images?: 'copy-on-write' | 'copy'
  /**
   * Linear memory begins on pages that the first snapshot takes over instead of copying them: touching fresh memory costs about half
   * as much again, and the first capture a tenth (benchmark `snapshots`). Default: where a snapshot is certain or likely, which is
   * with `isolation: 'per-call'`, and for another build (`reload({ source })`) if a snapshot was taken of the one before.
   * Linux only, with 'copy-on-write'; ignored elsewhere.
   */
  prepare?: boolean
}

/** What one instance, or one call, may use. */
export interface Limits {
  /**
   * Bytes that a linear memory may reach; memory.grow beyond it fails in the guest as the spec says. Default: what the module declares.
   *
   * Each memory of each replica is held to it by itself, and so is its heap of structs, arrays and references, whose end is a trap
   * ('allocation-failed'). A module that starts with more is refused (ERR_WASM_INVALID_ARGUMENT).
   * During a reload old and new instances exist side by side.
   */
  memoryBytes?: number
  /** Elements that a table may reach; table.grow beyond it fails in the guest. Default: 10 000 000, at most what the module declares. */
  tableElements?: number
  /**
   * Milliseconds that one call may run, waiting for imports included, waiting for a replica not; synchronous calls too. Default: none. From 1.
   *
   * Also bounds the start function of a module. Needs `engine.interruptible`.
   */
  timeoutMs?: number
  /** Fuel units for one call; each outermost call starts with all of it. Needs `engine.fuel: true`. Default: none. From 1. */
  fuel?: number
  /**
   * Bytes of native stack that a call may use, nested calls included; beyond it the guest traps with 'stack-overflow'. Default 512 KiB. Range 64 KiB to 256 MiB.
   *
   * A synchronous call needs as much on the JS thread, whose stack the runtime has made (often 8 MiB, in a worker 4 MiB):
   * where less is left it ends with 'stack-overflow' before the guest is entered, and the instance serves on.
   */
  stackBytes?: number
}

/**
 * How guests are compiled and checked.
 *
 * Always on: multi-value, bulk memory, reference types, multi-memory, memory64, tail calls, extended constants,
 * typed function references, GC, and exceptions in their final encoding. Components are refused.
 */
export interface EngineOptions {
  /**
   * Running code can be interrupted by timeouts, AbortSignal and destroy(). Default true; docs/perf.md says what it costs.
   *
   * With false, those only reach calls that wait: for a replica, or for a promise of an import.
   */
  interruptible?: boolean
  /** Instructions are counted, for `limits.fuel`. Default false. */
  fuel?: boolean
  /**
   * false: explicit bounds checks instead of signal handlers, for processes that own SIGSEGV. Default true.
   *
   * Handlers of others that were there before get what is no trap. One that is installed later, and hands nothing on, is a crash
   * at the next trap; whenever an instance is made (create, reload, fork) ours is put before it, at most four times.
   */
  signalsBasedTraps?: boolean
  /** Default true. */
  simd?: boolean
  /** Default true; needs `simd`. */
  relaxedSimd?: boolean
  /**
   * Atomics and shared memories in guests. Default false, so that glue which asks what there is takes its build without threads.
   *
   * A guest inside `memory.atomic.wait` is stopped by timeouts, signals and `destroy()` like any other.
   * Threads are started by glue of wasm-bindgen-rayon, in place of its workers, or with {@link GlueManager.spawn}.
   * Cost: a wait takes a detour through the host; `npm run bench -- threads` prints it. Everything else is as without.
   */
  threads?: boolean
  /**
   * Bytes of address space reserved per memory. Default 4 GiB; lower it where virtual memory is capped.
   *
   * Below 4 GiB bounds are checked by explicit code, and a memory that outgrows the reservation moves: one copy of its contents. A shared one cannot move.
   */
  memoryReservationBytes?: number
}

/** How a call may be stopped. Unknown names are refused (ERR_WASM_INVALID_ARGUMENT). */
export interface CallOptions {
  /**
   * Takes the call out of the queue, or interrupts it even while the guest runs; the promise rejects with signal.reason; the pool stays.
   *
   * If it ran, the replica is replaced; with `isolation: 'per-call'` it is put back.
   */
  signal?: AbortSignal
  /** Milliseconds from the call, waiting included; then ERR_WASM_TIMEOUT. Default: none. From 1. */
  timeoutMs?: number
}

/** How the wait for a lease may be stopped. Unknown names are refused (ERR_WASM_INVALID_ARGUMENT). */
export interface LeaseOptions {
  /** Gives up waiting; does nothing once the instance is held. */
  signal?: AbortSignal
}

/** How long a reload waits for what is in flight. */
export interface DrainOptions {
  /** Default 30 000. From 0: do not wait. */
  drainTimeoutMs?: number
  /**
   * 'abort': give up, the old generation serves on (ERR_WASM_DRAIN_TIMEOUT). 'interrupt': stop what still runs (those calls
   * reject with ERR_WASM_INTERRUPTED), take leases away from their holders (they are stale from then on), and go on. Default 'abort'.
   *
   * Calls that wait for a promise of an import are stopped as well, and so are calls that wait within a lease.
   * What was stopped is waited for as long again, and at least 5 seconds; ERR_WASM_DRAIN_TIMEOUT if even that does not suffice,
   * which takes an import that blocks the JS thread, one long bulk-memory operation, or `engine.interruptible: false`.
   */
  onDrainTimeout?: 'abort' | 'interrupt'
}

/** How a reload is done. Unknown names are refused (ERR_WASM_INVALID_ARGUMENT). */
export interface ReloadOptions extends DrainOptions {
  /** In the report and in `stats().reloads`. Default 'manual'. */
  reason?: string
  /**
   * Another build of the module to swap to; later reloads, and replacements after a trap, stay on it.
   *
   * It must offer every function in use with the same type, and a memory if the module that serves has one; it must do with the
   * imports that were given (ERR_WASM_INCOMPATIBLE_MODULE, nothing was touched).
   * A function is in use once it was called, or looked up by name for a call, through whatever path.
   * The source is read when the reload begins; bytes are copied at once.
   */
  source?: ModuleSource
  /**
   * 'exclusive': new calls wait while the old generation drains. 'rolling': new calls go to the new generation at once while the
   * old one drains behind. Default 'exclusive'.
   *
   * 'rolling' cannot hand state over: with a `saveState` hook it is refused (ERR_WASM_INVALID_ARGUMENT) unless `skipSave` is true.
   * With it `drainTimeoutMs` bounds two waits: before the reload, for what an earlier rolling reload has left behind, so that there
   * are never more than two generations; and behind it, for what this one leaves behind, where 'interrupt' then stops it and
   * 'abort' lets it run on.
   */
  strategy?: 'exclusive' | 'rolling'
  /** Leave state behind, for a guest whose save traps: neither `saveState` nor `restoreState` is called. Default false. */
  skipSave?: boolean
}

/**
 * The context of the tracing channel 'wasm-molt:reload' (`diagnostics_channel.tracingChannel`), which tells of every `reload()`
 * and `reloadSync()`: `start` and `end` around the call, `asyncStart` and `asyncEnd` when the promise settles, `error` when it fails.
 */
export interface ReloadTrace {
  /** The manager's name. */
  manager: string
  /** What served when the reload was asked for. */
  generation: number
  reason: string
  strategy: 'exclusive' | 'rolling'
  /** From `asyncStart` on, or for `reloadSync` at `end`: what it resolved with. */
  result?: ReloadReport
  /** From `error` on: what it rejected with or threw. */
  error?: unknown
}

/**
 * The message of the channel 'wasm-molt:reload:step': one for each step that went well, in their order, from the event loop,
 * before the reload settles. Exclusive: instantiate, drain, save (not with `skipSave`), restore, commit. Rolling: drain, instantiate, commit.
 *
 * Only reloads that are asked for while the channel has a subscriber are told of.
 */
export interface ReloadStep {
  /** The manager's name. */
  manager: string
  /** What the reload is to bring. */
  generation: number
  reason: string
  strategy: 'exclusive' | 'rolling'
  step: 'instantiate' | 'drain' | 'save' | 'restore' | 'commit'
  /** Milliseconds; the same figure as in the report, where that has it. */
  durationMs: number
}

/** How a reset waits, and where it goes. */
export interface ResetOptions extends DrainOptions {
  /** A snapshot of this manager. Default: the newest that was not released. */
  to?: Snapshot
}

/** What a fork has of its own; all else is its parent's. */
export type ForkOptions = Partial<Pick<ManagerOptions, 'name' | 'imports' | 'limits' | 'recycle'>>

/** What a reset did. */
export interface ResetReport {
  /** The one that serves, as before. */
  generation: number
  /** Linear-memory bytes over all replicas. */
  memoryBytesBefore: number
  memoryBytesAfter: number
  /** Bytes of the pages that had been written since the replicas were last at a snapshot, and are given back. */
  dirtyBytes: number
  /** Milliseconds that the reset itself took, `reseed` included, once nothing was in flight. */
  durationMs: number
}

/**
 * The state of one instance at one moment.
 *
 * Collected without a release it is released, unless it is the newest, which the manager keeps.
 */
export interface Snapshot extends Disposable {
  /** Unique in the process, rising. */
  readonly id: number
  /** The generation that served. */
  readonly generation: number
  /** Bytes of linear memory in it. */
  readonly memoryBytes: number
  /** Bytes of pages that are held for it, shared with instances and other snapshots that stand on them; 0 once released. */
  readonly residentBytes: number
  /**
   * Lets go of it. If it was the newest, the one before it that is still there is the newest; with none left, new generations start cold.
   *
   * Its pages go back to the system as soon as no instance stands on them. Idempotent.
   */
  release(): void
}

/** What a reload did. */
export interface ReloadReport {
  /** What serves now. */
  generation: number
  /** What served before. */
  previousGeneration: number
  /** As given; 'trap' for a replica that was replaced because it trapped or was stopped. */
  reason: string
  strategy: 'exclusive' | 'rolling'
  /** In flight when the gate closed; rolling: what was left behind on the old generation. */
  drained: number
  /** Waited at the gate when it opened. 0 with 'rolling', where nobody waits for the swap. */
  queued: number
  /**
   * Milliseconds that the gate was closed: at least drainMs + saveMs + restoreMs. Rolling: how long the change-over took, with the
   * gate open. For reason 'trap': how long the replacement took, with the gate open.
   */
  pauseMs: number
  /** Of the pause: waiting for what was in flight. Rolling: before it, waiting for what an earlier rolling reload had left behind. */
  drainMs: number
  /** Of the pause: `saveState`. 0 with `skipSave`. */
  saveMs: number
  /** Before the pause: making the new instances, `initialize` included; with `source`, reading and compiling too. */
  instantiateMs: number
  /** Of the pause: `restoreState`. */
  restoreMs: number
  /** Linear-memory bytes of the old instances, over all replicas that were replaced. */
  memoryBytesBefore: number
  /** Linear-memory bytes of the new ones. */
  memoryBytesAfter: number
}

/**
 * One instance, held. Expires when released.
 *
 * Hooks get one as well, which expires when the hook settles. After its end every member but `generation` and `release`
 * throws ERR_WASM_STALE_HANDLE; so do calls after a trap inside the lease, because the instance is replaced when the lease ends.
 */
export interface LeasedInstance extends Disposable {
  readonly generation: number
  /** The instance's functions, called on this thread. ERR_WASM_BUSY while a `call` of this lease runs. */
  readonly exports: Record<string, (...args: WasmValue[]) => WasmResult>
  readonly memory: LinearMemory
  /**
   * Calls an export on a pool thread, in this instance; calls of one lease run one after the other.
   *
   * Errors: as {@link WasmModuleManager.call}; ERR_WASM_ASYNC_IMPORT in a hook of a synchronous operation.
   */
  call(name: string, args?: readonly WasmValue[], options?: CallOptions): Promise<WasmResult>
  /** Ends the lease; calls that were handed over still run. Idempotent. */
  release(): void
}

/**
 * What an imports function may keep: the instance its imports belong to.
 *
 * Usable inside host calls, also after an `await` in one, where `exports` re-enters the guest that waits.
 * Outside of one it works as `manager.exports` does if it is the first replica, and throws ERR_WASM_BUSY otherwise.
 * Once the instance is replaced everything but `generation` throws ERR_WASM_STALE_HANDLE.
 */
export interface InstanceContext {
  readonly generation: number
  readonly exports: Record<string, (...args: WasmValue[]) => WasmResult>
  readonly memory: LinearMemory
}

/**
 * The bytes of one linear memory, as they are now.
 *
 * `ptr` is a byte offset; a negative one is read as the unsigned 32-bit number of the same bits, because that is how
 * JavaScript sees i32 pointers beyond 2 GiB. A fraction is a `RangeError`, another type a `TypeError`.
 * A module without memory has one of 0 bytes.
 */
export interface LinearMemory {
  readonly byteLength: number
  /**
   * Zero-copy. Detached (byteLength 0) when memory grows, on reload and when a lease on this instance ends: take it again.
   * A view kept by mistake can never crash the process: what was transferred away may read zeros once the instance is gone.
   *
   * The same object until then. Where the runtime forbids external buffers (Electron) it is a copy of this moment.
   */
  readonly buffer: ArrayBuffer
  /** Copies out. RangeError out of bounds. */
  read(ptr: number, byteLength: number): Uint8Array
  /** Decodes UTF-8; what is not valid becomes U+FFFD. RangeError out of bounds. */
  readString(ptr: number, byteLength: number): string
  /** Copies in, a string as UTF-8 without a terminator, and returns the number of bytes. RangeError out of bounds: nothing is written. */
  write(ptr: number, bytes: Uint8Array | string): number
}

/**
 * Module name, import name, value:
 * - for a function, a function; its result is coerced as the WebAssembly JavaScript API coerces it;
 * - for a global, its (initial) value: a number, a bigint for i64, anything for externref, null for funcref;
 * - for a memory or a table, an {@link ImportDescriptor}: each instance gets one of its own, which ends with it.
 *   Objects of Node's own `WebAssembly` are refused (ERR_WASM_LINK).
 */
export type Imports = Record<string, Record<string, unknown>>

/** The size of an imported memory, in pages of 64 KiB, or of an imported table, in elements. */
export interface ImportDescriptor {
  initial: number
  /** Must be given, and not be larger, where the module declares one. */
  maximum?: number
}

/** How a guest takes and returns buffers. Pointers and lengths are 32-bit. */
export interface BufferAbi {
  /** (size: i32) -> ptr. Default 'allocate'. 0 means failure. */
  allocate?: string
  /** (ptr: i32, size: i32). Default 'deallocate'; null where the guest has none. Called for the input, the length cell, and an output that is not empty. */
  deallocate?: string | null
  /** 'out-pointer': f(ptr, len, out_len_ptr) -> ptr. 'packed-i64': f(ptr, len) -> (ptr << 32 | len). 'multi-value': f(ptr, len) -> (ptr, len). Default 'out-pointer'. */
  returns?: 'out-pointer' | 'packed-i64' | 'multi-value'
}

// ---------------------------------------------------------------- JS glue

/**
 * The WebAssembly JavaScript API over this engine, for code that instantiates by itself and takes the namespace as a value.
 *
 * Also the module 'wasm-molt/webassembly', with a named export for each member. Nothing global is replaced.
 * All that is made with it lives in one realm, which is made at the first use of a member and lives as long as the environment
 * (the main thread or a worker): instances are not collected one by one. Where memory is to come back, use {@link loadGlue}.
 * In the hooks of a glue manager it means the generation of the hook instead, so that it can be handed to glue that takes one.
 * `CompileError`, `LinkError` and `RuntimeError` are Node's own classes, and carry a `code` of {@link WasmErrorCode} here.
 * docs/glue.md has the differences from Node's own engine.
 *
 * Errors: as the API specifies them. A shared memory is a `TypeError`; sizes that cannot be had are a `RangeError`.
 *
 * Source: WebAssembly JavaScript Interface.
 */
export const WebAssembly: typeof globalThis.WebAssembly

/**
 * Loads the JavaScript that a toolchain has put around a WebAssembly module (its glue), unmodified, so that what it instantiates
 * can be reloaded and reset.
 *
 * `(await loadGlue('x')).module` stands where `require('x')` or `import * as x from 'x'` stood.
 * The glue's files are read and compiled once, and evaluated afresh for each generation, in which `WebAssembly` means this
 * engine and `FinalizationRegistry` the generation's own. The glue's files are those of the package (or, outside any package, of
 * the folder) that `specifier` leads to, and of the packages in `include`; all others are shared with the rest of the program.
 * * `specifier`: a package or an entry of one, a path, or a file: URL, of CommonJS or of ES modules. It is looked for as `require`
 *   does it, then as `import` does, then in the package's field `module`.
 *
 * Errors (there is no manager afterwards, and nothing is left behind):
 * - ERR_WASM_INVALID_ARGUMENT: an option cannot be used; unknown options are refused by name.
 * - ERR_WASM_RELOAD_FAILED with phase 'initialize': a file of the glue, `expose` or `initialize` threw, or its guest trapped;
 *   `cause` is the very object.
 * - What Node has for a file that is not there or cannot be parsed (ERR_MODULE_NOT_FOUND, `SyntaxError`, …), as it is.
 *
 * Cost: reading and parsing the files, once; then what evaluating them costs, in which compiling the module dominates. With the
 * cache, a module that was compiled before is only read; a later generation finds the compiled module in the manager.
 */
// biome-ignore lint/suspicious/noExplicitAny: what glue exports, which only its own types can tell
export function loadGlue<T = any>(specifier: string | URL, options?: GlueOptions): Promise<GlueManager<T>>

/**
 * How glue is loaded. Unknown names are refused (ERR_WASM_INVALID_ARGUMENT).
 *
 * There is one replica, and its imports are the glue's.
 */
export interface GlueOptions
  extends Pick<ManagerOptions, 'limits' | 'maxQueue' | 'cache' | 'engine' | 'snapshots' | 'recycle'> {
  /** In errors, events and thread names. Default: the package's name, for a path or URL the file's name without extension. */
  name?: string
  /**
   * Where compiled code, and what the sources of the glue were turned into, are kept between processes. true: the user's cache
   * folder (for the sources `wasm-molt/glue` in it); string: that folder (`modules` and `glue` in it); false: nowhere. Default true.
   *
   * A kept source is used only if it is whole and nobody but the user can have written it.
   */
  cache?: boolean | string
  /** Threads of the pool, which only compiles here. Default: the available parallelism. Range 1 to 4096. */
  threads?: number
  /**
   * What {@link GlueManager.module} shows of a generation. Default: what the glue exports.
   *
   * For glue that exports a factory, such as Emscripten's, or that wants to be handed a module or a function that instantiates
   * one: `shadows.WebAssembly` is the namespace for that.
   * Runs once in each generation, after the glue was evaluated and before `initialize`. A promise or another thenable is
   * awaited; it must be synchronous for `reloadSync`.
   * * `glue`: what the glue exports, of this generation alone.
   */
  expose?: (
    // biome-ignore lint/suspicious/noExplicitAny: see loadGlue
    glue: any,
    shadows: { WebAssembly: typeof globalThis.WebAssembly; FinalizationRegistry: FinalizationRegistryConstructor },
  ) => unknown
  /**
   * Runs in each generation before it serves; for glue with an `init()` to await.
   *
   * A promise or another thenable is awaited; it must be synchronous for `reloadSync`.
   * * `module`: what `expose` has returned, else what the glue exports; of this generation, not the stable face.
   */
  // biome-ignore lint/suspicious/noExplicitAny: see loadGlue
  initialize?: (module: any) => unknown
  /**
   * Reads what must survive out of the OLD generation. Any JS value that does not belong to it: an object of the glue would be
   * stale afterwards. A promise or another thenable is awaited by `reload`.
   *
   * Not called with `skipSave`. A rolling reload cannot hand state over.
   */
  // biome-ignore lint/suspicious/noExplicitAny: see loadGlue
  saveState?: (module: any) => unknown
  /** Puts it into the NEW generation before it serves, after `initialize`. Called only where `saveState` was. */
  // biome-ignore lint/suspicious/noExplicitAny: see loadGlue
  restoreState?: (module: any, state: any) => unknown
  /**
   * How the guest's pool of threads exits and starts, for guests that keep one (see {@link GlueManager.spawn}).
   *
   * With it, a snapshot has the pool exit before and start again after; a reset, which ends threads by force, and a reload start
   * it again where there was one; and {@link GlueManager.recycleThreads} replaces it. Without it, a snapshot while threads run is
   * refused (ERR_WASM_SNAPSHOT_UNSUPPORTED), and nothing starts threads again.
   * Both get the module of the generation, not the stable face.
   * * `exit`: for guests whose pool can; without it, a snapshot while threads run is refused. Synchronous; asks the guest to end its threads in good order, as `exitThreadPool()` of a guest does. They are then
   *   waited for, for 5 seconds at most (ERR_WASM_BUSY; the snapshot or recycling is not done then, and no thread can be started
   *   before those have ended).
   * * `start`: starts as many as there are to be. May return a promise, which only `recycleThreads` and a reload wait for.
   */
  // biome-ignore lint/suspicious/noExplicitAny: see loadGlue
  threadPool?: { exit?: (module: any) => unknown; start: (module: any) => unknown }
  /**
   * Names of further packages to evaluate with the glue, afresh for each generation and with the same shadows. Default: none.
   *
   * For packages that instantiate, or that keep objects of the glue in variables of their own.
   */
  include?: string[]
  /**
   * Where `specifier` is resolved from, if it is a package or a relative path: a URL or path of a file, or of a folder with a
   * slash at its end. Default: the working directory; and, for a package that is not found from there, the file that calls
   * loadGlue. In a package of your own pass `import.meta.url` or `__filename`.
   */
  parentURL?: string | URL
}

/** A native thread of a guest. See {@link GlueManager.spawn}. */
export interface GuestThread {
  /** The generation that it belongs to, and ends with. */
  readonly generation: number
  /**
   * When the thread has ended: after its last function, or because it was ended. Rejects with what ended it otherwise; nothing
   * is unhandled if nobody asks. Whoever has asked keeps the process alive; the thread alone does not.
   */
  readonly finished: Promise<void>
  /**
   * Ends it, whatever it is doing, and resolves when it has. Its stack and thread-local storage in the guest's memory are lost,
   * and so is what it holds locked: as with `Worker.terminate()`, the guest has to cope with that.
   */
  terminate(): Promise<void>
}

/**
 * Glue whose generations can be replaced while the program uses it.
 *
 * A generation is a *realm*: one store with all the instances, memories, tables, globals and tags that the glue made in it, and
 * the glue's own JavaScript. They live together and go together.
 * Everything runs on the JS thread, as with Node's own engine, so there is no `call`, `callSync`, `invoke` or `acquire`.
 *
 * It lives until it is closed: whoever holds an object of the glue needs it, and nothing tells who does.
 * An idle one does not keep the process alive.
 *
 * docs/glue.md says what follows a reload and what does not.
 */
// biome-ignore lint/suspicious/noExplicitAny: see loadGlue
export interface GlueManager<T = any> extends EventEmitter, AsyncDisposable {
  /** In errors, events and thread names. See {@link GlueOptions.name}. */
  readonly name: string

  /** The number of the generation that serves. Counts from 1; goes up by one with every committed reload; never reused. */
  readonly generation: number

  /** As {@link WasmModuleManager.state}. A trap does not change it: a realm goes on after one. */
  readonly state: WasmModuleManager['state']

  /**
   * What the glue exports (see {@link GlueOptions.expose}), as a stable face: always the same object, which always means the
   * generation that serves.
   *
   * Functions, classes and plain objects that are read off it are faces as well, and may be kept for ever: `const { f } =
   * manager.module` follows. Classes can be constructed and subclassed; their instances belong to the generation that made them,
   * and `instanceof` holds for those of every generation. All other values are what they are at the moment. What a call returns
   * is as the glue returned it.
   *
   * Errors, thrown by what is behind it (nothing was called):
   * - ERR_WASM_STALE_HANDLE: an object of a generation that is gone, or, after a reset, one that is newer than the snapshot.
   * - ERR_WASM_RELOADING: a call after `saveState` of an exclusive reload and before its commit, whose effect would be lost.
   * - ERR_WASM_CLOSED: the manager is closed.
   * And what the glue and its guest throw, as on Node's engine: a trap is a `WebAssembly.RuntimeError`, here with `code`
   * ERR_WASM_TRAP, `trap`, `wasmStack`, `manager` and `generation`; a call that `limits` has stopped is one with the code that
   * says so. The realm goes on after either. What an import threw is the same object.
   *
   * Cost: a function that was taken off costs one more call of a function; reading a property goes through a Proxy.
   */
  readonly module: T

  /**
   * The exports of the first instance with any, as a stable face: functions, and memories, tables, globals and tags of the
   * generation that serves. Empty until there is one.
   */
  // biome-ignore lint/suspicious/noExplicitAny: functions, memories, tables, globals and tags
  readonly exports: Record<string, any>

  /** A live view of the first memory that an instance of the generation that serves has had or imported; 0 bytes until there is one. */
  readonly memory: LinearMemory

  /**
   * Runs `fn` with the generation that serves held for it, and resolves with what it returns.
   *
   * The whole run counts as one operation in flight: a reload or reset waits for it, so what the glue made stays valid inside,
   * over every `await`. Scopes share the generation: any number of them run at once, and beside synchronous calls.
   * A scope that comes while a reload is under way waits, unless none runs and the gate is still open.
   * Inside `fn`, do not await `reload`, `snapshot`, `reset` or `close` of this manager: they wait for this very scope.
   * * `fn`: gets the module of the generation itself, not the stable face.
   *
   * Errors:
   * - What `fn` throws or rejects with, as it is.
   * - ERR_WASM_QUEUE_FULL, ERR_WASM_CLOSED, `signal.reason`: `fn` was not called.
   * - ERR_WASM_RELOADING: inside a hook of this manager, and it could not begin at once; `fn` was not called.
   * - ERR_WASM_INVALID_ARGUMENT: `fn` is no function, or an option is not known.
   */
  use<R>(fn: (module: T) => R | Promise<R>, options?: LeaseOptions): Promise<R>

  /**
   * Starts a native thread of the guest: an instance of its own of the same module, over the same shared memories, that calls
   * these functions one after the other and ends. Needs `engine.threads`.
   *
   * What the thread imports are the functions that the home instance was given. They run on this thread, from the event loop, and
   * also while it waits inside the guest (`memory.atomic.wait`); what they call, and the tables and globals that they use, is
   * then the thread's own. The start function of the module runs on the thread first. Tables and globals that the module imports
   * are made anew for each thread, globals with their values of now.
   * * `calls`: functions that one instance exports, taken from `module` or inside a hook, each with its arguments; missing ones are
   *   undefined.
   *
   * Errors, thrown; nothing was started: ERR_WASM_INVALID_ARGUMENT (no such list, or a function that no instance over a shared
   * memory exports), ERR_WASM_LINK (the instance imports a memory that is not shared, or a function of another instance),
   * ERR_WASM_BUSY (its threads are being ended), ERR_WASM_INTERNAL (the system refuses a thread).
   *
   * If a thread traps, or an import that it called throws, the others may wait for it for ever, so the realm is poisoned: what runs
   * in it stops with that error, every call throws it, and `reset()` or `reload()` brings everything back. So it is with a call on
   * this thread that traps, or is stopped, while there are threads.
   *
   * Cost: 0.1 to 0.5 ms, and `limits.stackBytes` of native stack plus 1 MiB, of which what is touched is taken.
   */
  // biome-ignore lint/suspicious/noExplicitAny: exported functions take numbers, bigints and references
  spawn(calls: [fn: (...args: any[]) => unknown, ...args: WasmValue[]][]): GuestThread

  /** The threads of the guest, as they are now. */
  readonly guestThreads: {
    /**
     * 'none'; 'initializing' until all have begun to run; 'running'; 'recycling' during {@link GlueManager.recycleThreads};
     * 'exiting' while they are being ended. While it is one of the last two, `spawn` throws ERR_WASM_BUSY.
     */
    state: 'none' | 'initializing' | 'running' | 'recycling' | 'exiting'
    total: number
  }

  /**
   * Replaces the pool of threads and nothing else: memory and objects stay. Waits until no scope of `use` runs, has
   * {@link GlueOptions.threadPool} exit, joins the threads, and has it start again. Without threads it does nothing.
   *
   * Errors (the generation serves on): ERR_WASM_INVALID_ARGUMENT without `options.threadPool`, ERR_WASM_BUSY if the threads do not
   * end, `signal.reason`, ERR_WASM_CLOSED, and what the hooks throw.
   */
  recycleThreads(options?: LeaseOptions): Promise<{
    threadsBefore: number
    threadsAfter: number
    /** Milliseconds, without the wait for scopes. */
    durationMs: number
  }>

  /**
   * Evaluates the glue afresh, and lets the generation before go with all that it made.
   *
   * As {@link WasmModuleManager.reload}, with the hooks of {@link GlueOptions}; there is no `source`: the files are those that
   * were read at the start.
   * Synchronous calls are served meanwhile: by the old generation until its state is saved, and by the new one from the commit on.
   * In between they throw ERR_WASM_RELOADING; without `saveState`, and with 'rolling', they never do.
   * If a snapshot was taken and not released, one of the new generation is taken by itself, after `restoreState`; older ones are
   * stale from then on.
   *
   * Errors (the old generation serves on): as {@link WasmModuleManager.reload}. Whatever the glue, `expose` or `initialize` throws is
   * the `cause` of ERR_WASM_RELOAD_FAILED with phase 'initialize'.
   *
   * Cost: both generations exist side by side until the commit, and each memory of them has its address space.
   */
  reload(options?: Omit<ReloadOptions, 'source'>): Promise<ReloadReport>

  /**
   * The same without leaving this thread: the glue, `expose` and the hooks must be synchronous, and nothing may be in flight.
   *
   * Errors, thrown: as {@link WasmModuleManager.reloadSync}; ERR_WASM_RELOAD_FAILED with ERR_WASM_ASYNC_IMPORT as `cause` also for
   * glue with a top-level await.
   */
  reloadSync(options?: Omit<ReloadOptions, 'source'>): ReloadReport

  /**
   * Captures the realm: contents and size of every memory, mutable globals (hidden ones too), tables. What the glue holds in
   * JavaScript is no part of it, so take it when the glue is warm; docs/glue.md says why.
   *
   * Drains as an exclusive reload does (30 seconds at most), captures, serves on. Only resets go back to it: a new generation
   * always begins by evaluating the glue.
   * * `signal`: gives up waiting; rejects with `signal.reason`.
   *
   * Errors (nothing was captured, the manager serves on): as {@link WasmModuleManager.snapshot}.
   *
   * Cost: the pages that were written since the last snapshot are copied once, on the JS thread.
   */
  snapshot(options?: { signal?: AbortSignal }): Promise<Snapshot>

  /** The same without leaving this thread; nothing may be in flight. Errors: as {@link WasmModuleManager.snapshotSync}. */
  snapshotSync(): Snapshot

  /**
   * Puts the realm back, in place: memories, mutable globals, tables. Not a new generation: objects of the glue that are older than
   * the snapshot stay usable.
   *
   * A memory that its guest has grown since becomes smaller, and its views are detached. One that only the glue has grown keeps
   * its size and its views; what lies beyond the snapshot becomes zeros, and its pages go back to the system. A memory that has
   * not grown keeps its views in both cases. Memories that are newer than the snapshot have no pages afterwards.
   * Objects of wasm-bindgen's that are newer throw ERR_WASM_STALE_HANDLE, and their finalizers do nothing.
   * * `to`: a snapshot of this generation. Default: the newest that was not released.
   *
   * Errors (nothing was reset, and the manager serves on):
   * - ERR_WASM_INVALID_ARGUMENT: there is no snapshot, or `to` is another manager's, or an option cannot be used.
   * - ERR_WASM_STALE_HANDLE: `to` was released, or is of a generation that is gone.
   * - ERR_WASM_DRAIN_TIMEOUT, ERR_WASM_CLOSED, and inside a hook ERR_WASM_RELOADING.
   * - ERR_WASM_INTERNAL: the system refused; the realm is in an unknown state and is replaced.
   *
   * Cost: follows the dirty pages, and the elements of tables that have changed.
   */
  reset(options?: ResetOptions): Promise<ResetReport>

  /** The same without leaving this thread; nothing may be in flight. Errors: as {@link WasmModuleManager.resetSync}. */
  resetSync(options?: ResetOptions): ResetReport

  /** Always rejects with ERR_WASM_SNAPSHOT_UNSUPPORTED: what glue holds in JavaScript cannot be copied. Call {@link loadGlue} once more. */
  fork(options?: ForkOptions): Promise<never>

  /** As {@link WasmModuleManager.stats}. Synchronous calls are counted in `calls`, not timed; `memoryBytes` is over all memories of the realm. */
  stats(options?: { pages?: boolean }): ManagerStats

  /** As {@link WasmModuleManager.close}: waits for scopes of `use`, then releases the realm and all that the glue made. */
  close(options?: { drainTimeoutMs?: number }): Promise<void>

  /** As {@link WasmModuleManager.destroy}: does not wait for scopes, whose calls throw ERR_WASM_CLOSED from then on. */
  destroy(): Promise<void>

  /** `close()`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>

  /** A new generation serves. Events are emitted from the event loop, after what they tell of. */
  on(event: 'reload', listener: (report: ReloadReport) => void): this
  /** A reload did not happen. */
  on(event: 'reload:failed', listener: (error: WasmError) => void): this
  /** A call trapped. The error is a {@link WasmError}; what the caller got is the `RuntimeError`. */
  on(event: 'trap', listener: (error: WasmError) => void): this
  /**
   * A threshold was crossed; see {@link Pressure}. With `recycle` the replica is recycled by itself, and `recycle` or
   * `reload:failed` follows; without, the application decides, and nothing else happens.
   *
   * Once for each crossing of a replica: again after it was replaced or reset, or has shrunk below the threshold.
   */
  on(event: 'pressure', listener: (pressure: Pressure) => void): this
  /**
   * A replica was recycled, and its old memory was let go of. One that was replaced (not reset) is told of by `reload` before.
   */
  on(event: 'recycle', listener: (report: RecycleReport) => void): this
  /** Everything is released. */
  on(event: 'close', listener: () => void): this

  once(event: 'reload', listener: (report: ReloadReport) => void): this
  once(event: 'reload:failed', listener: (error: WasmError) => void): this
  once(event: 'trap', listener: (error: WasmError) => void): this
  once(event: 'pressure', listener: (pressure: Pressure) => void): this
  once(event: 'recycle', listener: (report: RecycleReport) => void): this
  once(event: 'close', listener: () => void): this

  off(event: 'reload', listener: (report: ReloadReport) => void): this
  off(event: 'reload:failed', listener: (error: WasmError) => void): this
  off(event: 'trap', listener: (error: WasmError) => void): this
  off(event: 'pressure', listener: (pressure: Pressure) => void): this
  off(event: 'recycle', listener: (report: RecycleReport) => void): this
  off(event: 'close', listener: () => void): this
}

// ---------------------------------------------------------------- recycling

/**
 * When an instance is replaced without being asked.
 *
 * Each replica is judged by itself, after each call, and replaced in the middle of load, one at a time: the fresh instance is made
 * while the old one serves, and then the replica is out of service for `saveState` and `restoreState` alone, while the others serve.
 * Memory is the threshold to set; `calls` and `ageMs` are for what memory does not show (leaked handles, fragmentation).
 * docs/recycling.md says how to choose.
 *
 * Glue has one replica, in use as long as there are scopes of `use`; it is recycled by a reload (or reset) as soon as there are
 * none, from the event loop. Ranges are checked when the manager is made (ERR_WASM_INVALID_ARGUMENT).
 */
export interface RecyclePolicy {
  /**
   * Bytes of linear memory, over all memories of a replica, or a share of the limit such as '75%'. Default: no threshold.
   *
   * The limit is `limits.memoryBytes`, or the maximum that the module declares, or 4 GiB; with several memories their sum.
   * A threshold that a fresh instance exceeds cannot be kept: such recycles count as failed, and back off.
   * From 1; '1%' to '100%'.
   */
  memory?: number | string
  /** Calls that a replica runs, synchronous ones included. Default: no threshold. From 1. */
  calls?: number
  /** Milliseconds since the instance was made; judged by a timer as well, so that an idle replica is recycled too. Default: no threshold. From 1. */
  ageMs?: number
  /**
   * 'reload': a trapped instance is replaced before it serves again. 'keep': it serves on, with whatever the trap has left in it.
   * Default 'reload'. What was stopped (timeout, signal, fuel) is replaced always. Glue goes on after a trap in either case.
   *
   * With a policy, 100 replacements in a row without one call that completed are a crash loop: the manager ends in state 'failed',
   * and calls reject with ERR_WASM_RELOAD_FAILED, whose cause is the last trap, until a `reload()` succeeds.
   */
  onTrap?: 'reload' | 'keep'
  /**
   * Recycle before the growth of the last calls would cross the limit: reason 'predicted'. Default true when `memory` is set.
   *
   * The growth per call is the median of the slopes between the last growths (Theil-Sen), which single large allocations do not move;
   * 'the next calls' are 16, or as many as ran during twice the last recycle if that is more.
   */
  predict?: boolean
  /**
   * 0 to 1: spreads the thresholds over replicas and generations, so that they do not go together. Default 0.1.
   *
   * Each instance has its thresholds lowered by a share of its own between 0 and this, never raised.
   */
  jitter?: number
  /**
   * 'exclusive': waits for the call or lease that has the replica, then hands state over. 'rolling': new calls go to the fresh
   * instance at once, and the old one goes when whoever is inside has left; no state is handed over, so it is refused together with
   * `saveState`. 'reset': puts the replica back to the newest snapshot in place, without a new generation; where there is no
   * snapshot, and where `saveState` must be able to fail without loss, it is 'exclusive'. Default 'exclusive'.
   */
  strategy?: 'exclusive' | 'rolling' | 'reset'
  /**
   * Milliseconds before a recycle that failed is tried again, doubled with each failure up to `maxMs`. The old instance serves on.
   * Default `{ initialMs: 100, maxMs: 30_000 }`. From 1; `maxMs` not below `initialMs`.
   *
   * Replacements of trapped instances that fail (their `initialize` throws) back off as well; five in a row with nothing left to
   * serve end in state 'failed'.
   */
  backoff?: { initialMs?: number; maxMs?: number }
}

/**
 * A threshold was crossed.
 *
 * Without `recycle` the thresholds are 75% of the limit, prediction, and the budget of the process.
 */
export interface Pressure {
  /** 'memory', 'predicted', 'calls', 'age' or 'budget'. */
  reason: string
  /** The replica, from 0. */
  instance: number
  /** What served. */
  generation: number
  /** Linear-memory bytes of the replica. */
  memoryBytes: number
  /** What was crossed, jitter included: bytes for 'memory', the limit for 'predicted', the budget for 'budget'; absent for 'calls' and 'age'. */
  thresholdBytes?: number
  /** Calls that the instance has run. */
  calls: number
  /** The estimate that predictions are made with; 0 where nothing grows. */
  growthBytesPerCall: number
}

/** What a recycle did. */
export interface RecycleReport extends Omit<ReloadReport, 'strategy'> {
  /** How it was done in the end. With 'reset' `generation` and `previousGeneration` are the same. */
  strategy: 'exclusive' | 'rolling' | 'reset'
  /** The replica, from 0. */
  instance: number
  /** Calls that the old instance had run. */
  calls: number
  /** Milliseconds that it had lived. */
  ageMs: number
  /** Bytes in pages that belonged to the old instance alone, as the system counted them just before they were let go of. */
  expectedBytes: number
  /**
   * By how much the resident set of the process fell when they were. undefined where the system does not say (Linux does).
   *
   * Other threads allocate at the same time, so single figures are rough. Where less than half of 8 MiB or more came back, twice
   * in a row, a process warning with the code WASM_MOLT_MEMORY_NOT_RETURNED says so, once for each manager.
   */
  returnedBytes?: number
}

/**
 * One allowance of linear memory over all managers of the process, those of worker threads included. null: none (default).
 *
 * When it is exceeded, replicas of managers with `recycle` are recycled, reason 'budget', whoever gives back the most for the time
 * that it takes first, idle ones included, until the sum is within it. Managers without `recycle` are not touched, and told by `pressure`.
 * It is judged after calls, so memory may exceed it by what one call allocates. Bytes from 1.
 *
 * Errors: ERR_WASM_INVALID_ARGUMENT, and the budget stays as it was.
 */
export function setMemoryBudget(bytes: number | null): void

/** One word for a server's readiness endpoint, over all managers that it needs. */
export interface Readiness {
  /** Every manager can take calls now, or soon without being asked (a reload is under way): `status` is 'serving'. */
  isReady: boolean
  /** The worst of the managers: 'failed', 'draining' (closing or closed), 'starting', 'serving'. */
  status: 'starting' | 'serving' | 'draining' | 'failed'
  managers: { name: string; state: WasmModuleManager['state']; status: Readiness['status']; generation: number }[]
}

/** See {@link Readiness}. With no manager it is ready. Cheap: reads states alone. */
export function readiness(...managers: Pick<WasmModuleManager, 'name' | 'state' | 'generation'>[]): Readiness

/**
 * The context of the tracing channel 'wasm-molt:call': every `call`, `callSync` and `invoke` of managers and `call` of leases.
 * Functions of `exports` are not told of; they are too quick to be looked at each time.
 */
export interface CallTrace {
  manager: string
  /** What served when the call was made. */
  generation: number
  /** The export. */
  name: string
  kind: 'call' | 'callSync' | 'invoke' | 'leased'
  result?: unknown
  error?: unknown
}

/** The context of the tracing channel 'wasm-molt:reset': every `reset()` and `resetSync()`. */
export interface ResetTrace {
  manager: string
  generation: number
  result?: ResetReport
  error?: unknown
}

/**
 * The context of the tracing channel 'wasm-molt:recycle': `start` and `end` when the decision is made, then `asyncStart` and
 * `asyncEnd` with its outcome, `error` before them if it failed. Every decision has exactly one outcome.
 *
 * `pressure` is what was crossed. A replica that something else replaced meanwhile (a reload, a trap, the end of the manager) has
 * neither `result` nor `error`.
 */
export interface RecycleTrace {
  manager: string
  generation: number
  reason: string
  instance: number
  pressure: Pressure
  result?: RecycleReport
  error?: unknown
}

/** The message of the channel 'wasm-molt:trap'. */
export interface TrapMessage {
  manager: string
  generation: number
  error: WasmError
}

// ---------------------------------------------------------------- errors

/** The stable codes. docs/errors.md says for each whose fault it is, the state afterwards, and what to do. */
export type WasmErrorCode =
  | 'ERR_WASM_INVALID_ARGUMENT'
  | 'ERR_WASM_COMPILE'
  | 'ERR_WASM_LINK'
  | 'ERR_WASM_EXPORT_NOT_FOUND'
  | 'ERR_WASM_TRAP'
  | 'ERR_WASM_EXIT'
  | 'ERR_WASM_TIMEOUT'
  | 'ERR_WASM_OUT_OF_FUEL'
  | 'ERR_WASM_INTERRUPTED'
  | 'ERR_WASM_ASYNC_IMPORT'
  | 'ERR_WASM_BUSY'
  | 'ERR_WASM_RELOADING'
  | 'ERR_WASM_QUEUE_FULL'
  | 'ERR_WASM_STALE_HANDLE'
  | 'ERR_WASM_DRAIN_TIMEOUT'
  | 'ERR_WASM_RELOAD_FAILED'
  | 'ERR_WASM_INCOMPATIBLE_MODULE'
  | 'ERR_WASM_SNAPSHOT_UNSUPPORTED'
  | 'ERR_WASM_CLOSED'
  | 'ERR_WASM_INTERNAL'

/** Every code there is, in the order of {@link WasmErrorCode}. Frozen. */
export const errorCodes: readonly WasmErrorCode[]

/** The version of the package's native part. */
export const version: string

/**
 * Match on `code`. What a host import or a hook throws keeps its identity: rethrown as it is by calls, `cause` elsewhere.
 *
 * Made by this package only.
 */
export class WasmError extends Error {
  private constructor()
  readonly code: WasmErrorCode
  /** The manager's name, where one is concerned. */
  readonly manager?: string
  /** What served when the error was made. */
  readonly generation?: number
  /**
   * For ERR_WASM_TRAP, the kind: 'unreachable', 'out-of-bounds-memory', 'out-of-bounds-table', 'out-of-bounds-array',
   * 'stack-overflow', 'integer-divide-by-zero', 'integer-overflow', 'invalid-conversion-to-integer', 'indirect-call-to-null',
   * 'indirect-call-type-mismatch', 'null-reference', 'cast-failure', 'unaligned-atomic', 'atomic-wait-on-unshared-memory',
   * 'deadlock' (all threads of the guest would wait for ever), 'allocation-too-large', 'allocation-failed', 'uncaught-exception',
   * 'other'.
   */
  readonly trap?: string
  /** For ERR_WASM_TRAP: the guest's frames, innermost first, one a line, names demangled. Empty where there are none. */
  readonly wasmStack?: string
  /** For ERR_WASM_RELOAD_FAILED: where it failed. */
  readonly phase?: 'drain' | 'save' | 'instantiate' | 'initialize' | 'restore'
  /** For ERR_WASM_DRAIN_TIMEOUT: calls and leases that had not ended. */
  readonly inFlight?: number
}

// ---------------------------------------------------------------- figures

/** What linear memory really takes, over all replicas of a manager. */
export interface PageStats {
  /** Bytes of pages that belong to these replicas alone: what closing the manager gives back. */
  privateBytes: number
  /** Bytes of pages of the snapshots that the replicas are mapped on; counted once for each replica. */
  sharedBytes: number
  /** Bytes of address space, most of it without any memory behind. */
  reservedBytes: number
}

/** Figures of one moment. Counts are exact below 2^53. */
export interface ManagerStats {
  name: string
  state: WasmModuleManager['state']
  generation: number
  /** Replicas: all, in use, and waiting to be replaced after a trap or a stop. */
  instances: { total: number; busy: number; poisoned: number }
  /** Calls and leases that have a replica; being inside a synchronous call counts as one. */
  inFlight: number
  /** Calls and leases that wait for one. */
  queued: number
  /** Linear-memory bytes over all replicas. */
  memoryBytes: number
  /** The most seen by any `stats()` and by any reload. */
  memoryBytesPeak: number
  /**
   * Calls by how they ended; leases are not counted, the calls in them are.
   *
   * completed: returned. failed: an import threw, or the arguments cannot be used. trapped: ERR_WASM_TRAP.
   * interrupted: stopped while they ran, by timeout, signal, fuel, reload or destroy(). rejected: never ran.
   */
  calls: { completed: number; failed: number; trapped: number; interrupted: number; rejected: number }
  /**
   * By reason: 'manual', 'trap', 'memory', 'predicted', 'calls', 'age', 'budget', or the caller's own words. Beyond 64 different
   * ones, further ones count as 'other'.
   *
   * 'trap' counts replicas that were replaced because a call trapped or was stopped; the reasons of a policy count replicas that
   * were recycled, those that were reset among them.
   */
  reloads: Record<string, number>
  /** Reloads, replacements and recycles that did not happen. */
  reloadsFailed: number
  /** Replicas that are to be recycled, and have not been yet: waiting for their turn, for whoever is inside, or for a backoff. */
  recyclesDue: number
  /** Resets that succeeded, those of policies included; those of `isolation: 'per-call'` are not counted. */
  resets: number
  /** Snapshots that can be used. */
  snapshots: number
  /** With `stats({ pages: true })`. */
  pages?: PageStats
  /** Milliseconds in the guest, of pool calls. Synchronous calls are counted in `calls`, not timed. */
  runTime: Histogram
  /** Milliseconds from the call to its start, of pool calls. */
  waitTime: Histogram
  /** `pauseMs` of every report. */
  pauseTime: Histogram
}

/** A distribution of times in milliseconds, to two significant digits, since the manager was made. All 0 while `count` is 0. */
export interface Histogram {
  count: number
  min: number
  mean: number
  p50: number
  p90: number
  p99: number
  p999: number
  max: number
}
