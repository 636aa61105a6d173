// A warm interpreter: a library and some state are loaded once per instance, and every script finds them in its heap; with
// `isolation: 'per-call'` it finds nothing else, because each one runs in a copy of its own.
import { randomFillSync } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { isDeepStrictEqual } from 'node:util'
import {
  type CallOptions,
  type ForkOptions,
  type InstanceContext,
  type LeasedInstance,
  type ManagerOptions,
  WasmModuleManager,
} from '../../index.js'
import {
  callFunction,
  createBuffer,
  createFunction,
  createImports,
  evaluateToValue,
  exportNames,
  freeValue,
  type HostFunction,
  type Interpreter,
  load,
  nativeStackBytes,
  quickjsWasm,
  ScriptError,
  type Source,
  start,
} from './guest.ts'

export interface WarmOptions extends Omit<ManagerOptions, 'imports' | 'initialize'> {
  /** What is evaluated before the first script, in this order. Default: {@link shop}. */
  sources?: readonly Source[]
  /** Bytes of memory of each instance, which does not grow. Default 16 MiB. */
  memoryBytes?: number
}

export interface Warm {
  manager: WasmModuleManager
  /** Where the interpreter is, in the memory of every replica. */
  interpreter: Interpreter
  /**
   * Runs a script as one call, on a pool thread, and resolves with its value as text.
   *
   * Errors: {@link ScriptError} with what the script threw; beyond that, as `WasmModuleManager.call`.
   */
  run(script: string, options?: CallOptions): Promise<string>
  /** A warm interpreter of its own, as `WasmModuleManager.fork` makes it: it begins with what this one's first replica holds. */
  fork(options?: Omit<ForkOptions, 'imports'>): Promise<Warm>
}

/** How a warm instance is addressed. Nothing else is known of it outside, so that a copy of its memory is as good as itself. */
interface Warmed extends Interpreter {
  /** The value that {@link bootstrap} makes. */
  jobs: number
  /** Where the host reads and writes: a head of {@link headWords}, then {@link chunkLength} UTF-16 units. */
  mailbox: number
}

interface Job {
  script: string
  /** How much of the script the guest has, in UTF-16 units. */
  sent: number
  answer?: { hasFailed: boolean; text: string }
}

/** UTF-16 units at a time: the guest makes a string of them in one call, and they are its arguments. */
const chunkLength = 8192
const wordBytes = 4
const seedWords = 4
const headWords = 2 + seedWords
const headBytes = headWords * wordBytes
const mailboxBytes = headBytes + 2 * chunkLength

/**
 * Lets a script and its answer travel in one call of one export: who reads element n of this object, as `QTS_GetPropNumber` does,
 * runs job n. No script can reach or replace what it works with.
 *
 * The script comes through the mailbox: `next` is told the job in `head[0]`, and answers with a chunk, whose length is `head[1]`.
 * The answer leaves as JSON, because a zero would end a C string; `head[1]` says whether it is an exception.
 *
 * QuickJS seeds `Math.random` when an interpreter is made, and exports nothing to do it again: all copies of a warm one would draw the
 * same numbers. So this takes its place (sfc32), with a seed that comes with each script.
 */
const bootstrap = `(function (mailbox, next, done) {
  'use strict'
  const head = new Int32Array(mailbox, 0, ${headWords})
  const units = new Uint16Array(mailbox, ${headBytes})
  const { apply } = Reflect
  const { fromCharCode } = String
  const { stringify } = JSON
  const evaluate = eval
  const text = String
  let a = 0
  let b = 0
  let c = 0
  let d = 1
  function bits() {
    const sum = (((a + b) | 0) + d) | 0
    d = (d + 1) | 0
    a = b ^ (b >>> 9)
    b = (c + (c << 3)) | 0
    c = (((c << 21) | (c >>> 11)) + sum) | 0
    return sum >>> 0
  }
  Math.random = { random: () => ((bits() >>> 5) * 2 ** 26 + (bits() >>> 6)) / 2 ** 53 }.random
  function receive(job) {
    let script = ''
    do {
      head[0] = job
      next()
      script += apply(fromCharCode, undefined, units.subarray(0, head[1]))
    } while (head[1] === units.length)
    a = head[2]
    b = head[3]
    c = head[4]
    d = head[5]
    return script
  }
  function run(job) {
    let answer
    let hasFailed = 0
    try {
      answer = text(evaluate(receive(job)))
    } catch (error) {
      hasFailed = 1
      try {
        answer = text(error)
      } catch {
        answer = 'an exception without text'
      }
    }
    head[0] = job
    head[1] = hasFailed
    done(stringify(answer))
  }
  return new Proxy({}, { __proto__: null, get: (_, job) => run(job) })
})`

export async function createWarm(options: WarmOptions = {}): Promise<Warm> {
  const { sources = shop(), memoryBytes, limits, ...rest } = options
  const jobs = new Map<number, Job>()
  let lastJob = 0
  /** The first instance's addresses, once it is warm. */
  const first: Warmed[] = []
  const mailbox = () => first[0]?.mailbox ?? 0

  /** The job that an instance is at, and the word beside its number. */
  const readHead = ({ memory }: InstanceContext) => {
    const [id = 0, word = 0] = new Int32Array(memory.read(mailbox(), 2 * wordBytes).slice().buffer)
    return { job: jobs.get(id), word }
  }
  const next: HostFunction = (instance) => {
    const { job } = readHead(instance)
    const chunk = job?.script.slice(job.sent, job.sent + chunkLength) ?? ''
    if (job) job.sent += chunk.length
    const bytes = Buffer.alloc(headBytes - wordBytes + 2 * chunk.length)
    bytes.writeInt32LE(chunk.length)
    randomFillSync(bytes, wordBytes, seedWords * wordBytes)
    bytes.write(chunk, headBytes - wordBytes, 'utf16le')
    instance.memory.write(mailbox() + wordBytes, bytes)
    return undefined
  }
  const done: HostFunction = (instance, json = '') => {
    const { job, word } = readHead(instance)
    if (job) job.answer = { hasFailed: word !== 0, text: JSON.parse(json) }
    return undefined
  }

  const manager = await WasmModuleManager.create(quickjsWasm, {
    name: 'quickjs',
    ...rest,
    limits: { stackBytes: nativeStackBytes, ...limits },
    imports: createImports({ functions: [next, done], memoryBytes }),
    initialize: (instance) => {
      const warmed = warmUp(instance, sources)
      if (first.length === 0) first.push(warmed)
      // A call takes any replica. The same sources in a fresh heap come to lie at the same addresses; if ever not, say so.
      if (!isDeepStrictEqual(warmed, first[0])) {
        throw new Error('QuickJS: the sources do not warm up to the same addresses each time; what in them is random?')
      }
    },
  })
  const [{ runtime, context, jobs: list }] = first as [Warmed]

  const warm = (manager: WasmModuleManager): Warm => ({
    manager,
    interpreter: { runtime, context },
    run: async (script, callOptions) => {
      // Both an i32 and an array index.
      lastJob = (lastJob + 1) % 2 ** 31
      const id = lastJob
      const job: Job = { script, sent: 0 }
      jobs.set(id, job)
      try {
        await manager.call(exportNames.QTS_GetPropNumber, [context, list, id], callOptions)
      } finally {
        jobs.delete(id)
      }
      // Only for want of memory does a job end without an answer.
      const { hasFailed, text } = job.answer ?? { hasFailed: true, text: 'out of memory' }
      if (hasFailed) throw new ScriptError(text)
      return text
    },
    // The imports hold for every instance there is: each is told which one calls.
    fork: async (forkOptions) => warm(await manager.fork(forkOptions)),
  })
  return warm(manager)
}

/** All that makes a fresh instance a warm one. */
function warmUp(instance: LeasedInstance, sources: readonly Source[]): Warmed {
  const interpreter = start(instance)
  load(instance, interpreter, sources)
  const make = evaluateToValue(instance, interpreter, bootstrap, 'bootstrap.js')
  const mailbox = createBuffer(instance, interpreter, mailboxBytes)
  const hosts = ['next', 'done'].map((name, index) => createFunction(instance, interpreter, index, name))
  const jobs = callFunction(instance, interpreter, make, [mailbox.value, ...hosts])
  for (const value of [make, mailbox.value, ...hosts]) freeValue(instance, interpreter, value)
  return { ...interpreter, jobs, mailbox: mailbox.address }
}

/** Handlebars and a shop's goods, for templates of users: it compiles them to code, which one would not run in one's own process. */
export function shop(): Source[] {
  return [read(import.meta.resolve('handlebars/dist/handlebars.js')), read(new URL('shop.js', import.meta.url))]
}

/** The TypeScript compiler: the most that there is to warm up here. Needs `memoryBytes` of 128 MiB. */
export function compiler(): Source[] {
  // Compiles something, so that what the compiler makes on first use is made.
  const text = "ts.transpile('export const one: number = 1')"
  return [read(import.meta.resolve('typescript')), { name: 'compiler.js', text }]
}

function read(url: string | URL): Source {
  return { name: new URL(url).pathname.split('/').at(-1) ?? '', text: readFileSync(new URL(url), 'utf8') }
}
