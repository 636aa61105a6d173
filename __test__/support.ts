// What all test files share: managers that clean up after themselves, barriers, child processes.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, type TestContext } from 'node:test'
import {
  type InstanceContext,
  type ManagerOptions,
  type ModuleSource,
  WasmError,
  type WasmErrorCode,
  WasmModuleManager,
  type WasmValue,
} from '../index.js'
import { temporaryFolder, workbench } from './guests.ts'

export { WasmError, WasmModuleManager }

/** Everything takes longer under a sanitizer (`npm run asan`). */
const PATIENCE = process.env.WASM_MOLT_ASAN === undefined ? 1 : 10

/** Generous for a loaded machine, and finite: a hang is a failure. */
export const LIMIT = { timeout: 110_000 * PATIENCE }

// A promise that nobody will ever settle must time its own test out, not end the process with all the others.
const awake = setInterval(() => {}, 60_000)
after(() => clearInterval(awake))

/** A promise and its way out. */
export interface Barrier<T = void> {
  promise: Promise<T>
  open(value: T): void
  fail(reason: unknown): void
}

export function barrier<T = void>(): Barrier<T> {
  let open!: (value: T) => void
  let fail!: (reason: unknown) => void
  const promise = new Promise<T>((resolve, reject) => {
    open = resolve
    fail = reject
  })
  // A barrier that fails before anybody waits is no unhandled rejection.
  promise.catch(() => {})
  return { promise, open, fail }
}

/** Matches a WasmError by its code, and its text where one is given. */
export function hasCode(code: WasmErrorCode, text?: RegExp): (error: unknown) => true {
  return (error) => {
    assert.ok(error instanceof WasmError, `expected ${code}, got ${inspectShort(error)}`)
    assert.equal(error.code, code, error.message)
    if (text !== undefined) assert.match(error.message, text)
    return true
  }
}

function inspectShort(error: unknown): string {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error)
}

/** What a promise came to, so that rejections can be collected without being unhandled. */
export function outcome<T>(promise: Promise<T>): Promise<{ value: T } | { error: unknown }> {
  return promise.then(
    (value) => ({ value }),
    (error: unknown) => ({ error }),
  )
}

/** The error of ours that a promise comes to; anything else is a failure of the test. */
export async function failure(promise: Promise<unknown>, code: WasmErrorCode, text?: RegExp): Promise<WasmError> {
  const end = await outcome(promise)
  assert.ok('error' in end, `expected ${code}, and it went well`)
  hasCode(code, text)(end.error)
  return end.error as WasmError
}

/** What a function throws or returns, as a promise. */
export async function thrownBy<T>(fn: () => T): Promise<T> {
  return fn()
}

/** A manager that does not outlive its test. */
export async function managed(
  t: TestContext,
  source: ModuleSource,
  options: ManagerOptions = {},
): Promise<WasmModuleManager> {
  const manager = await WasmModuleManager.create(source, { cache: false, ...options })
  t.after(() => manager.destroy())
  return manager
}

export function managedSync(t: TestContext, source: ModuleSource, options: ManagerOptions = {}): WasmModuleManager {
  const manager = WasmModuleManager.createSync(source, { cache: false, ...options })
  t.after(() => manager.destroy())
  return manager
}

/** The workbench with its two synchronisation points in the test's hands. */
export interface Bench {
  manager: WasmModuleManager
  /** Resolves when the guest next calls `entered`. */
  entered(): Promise<void>
  /** The guest waits in `hold(key)` until `release(key)`; a key that nobody holds passes through. */
  close(key: number): void
  release(key: number, value?: number): void
  /** Resolves when a guest waits in `hold(key)`. */
  arrived(key: number): Promise<void>
  /** Every key that came to `hold`, in order. */
  arrivals: number[]
}

/**
 * * `onImports`: runs whenever an instance collects its imports, and may throw.
 */
export async function bench(
  t: TestContext,
  { onImports, ...options }: ManagerOptions & { onImports?: (instance: InstanceContext) => void } = {},
): Promise<Bench> {
  const waiting: Barrier[] = []
  const doors = new Map<number, Barrier<number>>()
  const arrivalsOf = new Map<number, Barrier>()
  const arrivals: number[] = []
  const arrival = (key: number) => {
    const known = arrivalsOf.get(key) ?? barrier()
    arrivalsOf.set(key, known)
    return known
  }
  const imports = {
    env: {
      entered: () => {
        for (const one of waiting.splice(0)) one.open()
      },
      hold: (key: number) => {
        arrivals.push(key)
        arrival(key).open()
        return doors.get(key)?.promise ?? key
      },
    },
  }
  const manager = await managed(t, workbench, {
    imports: (instance) => {
      onImports?.(instance)
      return imports
    },
    ...options,
  })
  return {
    manager,
    arrivals,
    entered: () => {
      const next = barrier()
      waiting.push(next)
      return next.promise
    },
    close: (key) => {
      doors.set(key, barrier<number>())
      arrivalsOf.set(key, barrier())
    },
    release: (key, value = key) => {
      doors.get(key)?.open(value)
      doors.delete(key)
    },
    arrived: (key) => arrival(key).promise,
  }
}

/** Imports of the workbench where a test does not care about them. */
export const idleImports = { env: { entered: () => {}, hold: (key: number) => key } }

/**
 * How many of some twenty objects a collection may miss: JavaScriptCore takes whatever on the stack looks like a
 * pointer for one. V8 does not.
 */
export const STRAYS = process.versions.bun === undefined ? 0 : 4

/** Turns of the event loop: enough for whatever is ready to run. Not a wait for time to pass. */
export async function turns(count = 3): Promise<void> {
  for (let i = 0; i < count; i += 1) await new Promise((resolve) => setImmediate(resolve))
}

/** Repeats `look` until it is true; the test's own timeout is the bound. */
export async function until(look: () => boolean): Promise<void> {
  while (!look()) await new Promise((resolve) => setImmediate(resolve))
}

// ---------------------------------------------------------------- child processes

export interface Ended {
  code: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
  /** Milliseconds. */
  took: number
}

export interface ChildOptions {
  /** The program may read them as `process.env`. */
  env?: Record<string, string>
  flags?: string[]
  /** Killed after this; the result then carries the signal. */
  timeoutMs?: number
  /** Runs the program under this command, such as `sh -c 'ulimit …; exec "$@"' --`. */
  under?: string[]
  /** What the program does before anything else. */
  first?: string
  /** A crash is what the test is about. */
  mayCrash?: true
}

export const INDEX_URL = new URL('../index.js', import.meta.url).href

/**
 * Runs an ES module in a Node process of its own.
 * `WasmModuleManager`, `WasmError` and `assert` are there already; `report(value)` hands a value back.
 */
export async function child(program: string, options: ChildOptions = {}): Promise<Ended> {
  const prologue = `
    import assert from 'node:assert/strict'
    import { writeSync } from 'node:fs'
    import { WasmError, WasmModuleManager } from ${JSON.stringify(INDEX_URL)}
    const report = (value) => writeSync(1, 'REPORT ' + JSON.stringify(value) + '\\n')
  `
  // A file, because not every runtime takes a module on its command line.
  const file = join(temporaryFolder('child'), 'child.mjs')
  writeFileSync(file, prologue + (options.first ?? '') + program)
  return await runNode([...(options.flags ?? []), file], options)
}

/**
 * Has a program begin with 5 GiB of address space beside what its runtime has for itself. Bun and Deno take more on their
 * way up than they keep, and get the limit once they are there.
 */
export async function littleSpace(): Promise<ChildOptions> {
  const beside = (figure: string) => `5 * 2 ** 20 + Number(
    /${figure}:\\s+(\\d+) kB/.exec((await import('node:fs')).readFileSync('/proc/self/status', 'latin1'))[1])`
  if (process.versions.bun !== undefined || process.versions.deno !== undefined) {
    const args = `['--pid', String(process.pid), '--as=' + 1024 * (${beside('VmSize')}) + ':']`
    return {
      first: `{ const { execFileSync } = await import('node:child_process'); execFileSync('prlimit', ${args}) }\n`,
    }
  }
  const most = reported(await child(`report(${beside('VmPeak')})`))
  return { under: ['sh', '-c', `ulimit -v ${most}; exec "$0" "$@"`] }
}

/** The ways in which only a crash ends a process. */
const CRASHES: (NodeJS.Signals | null)[] = ['SIGSEGV', 'SIGBUS', 'SIGILL', 'SIGABRT', 'SIGTRAP', 'SIGFPE', 'SIGSYS']

export async function runNode(args: string[], options: ChildOptions = {}): Promise<Ended> {
  const started = performance.now()
  const [command, ...before] = [...(options.under ?? []), process.execPath]
  const process_ = spawn(command as string, [...before, ...args], {
    env: { ...process.env, NODE_OPTIONS: '', NODE_TEST_CONTEXT: '', ...options.env },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let stdout = ''
  let stderr = ''
  process_.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text
  })
  process_.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text
  })
  const timer = setTimeout(() => process_.kill('SIGKILL'), (options.timeoutMs ?? 30_000) * PATIENCE)
  const [code, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve, reject) => {
    process_.on('error', reject)
    process_.on('close', (code, signal) => resolve([code, signal]))
  })
  clearTimeout(timer)
  // No test may take it for one more way to end.
  assert.ok(options.mayCrash || !CRASHES.includes(signal), `the child crashed: ${signal}\n${stderr}\n${stdout}`)
  return { code, signal, stdout, stderr, took: performance.now() - started }
}

/** What the child reported; fails with everything it said if it did not end well. */
export function reported<T>(ended: Ended): T {
  assert.equal(ended.signal, null, `the child died of ${ended.signal}\n${ended.stderr}\n${ended.stdout}`)
  assert.equal(ended.code, 0, `the child ended with ${ended.code}\n${ended.stderr}\n${ended.stdout}`)
  const line = ended.stdout
    .split('\n')
    .filter((text) => text.startsWith('REPORT '))
    .at(-1)
  assert.ok(line !== undefined, `the child reported nothing\n${ended.stderr}\n${ended.stdout}`)
  return JSON.parse(line.slice('REPORT '.length)) as T
}

export type AnyFunction = (...args: WasmValue[]) => unknown
