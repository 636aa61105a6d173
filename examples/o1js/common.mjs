// What the scripts of the ladder share. o1js is looked for from the folder O1JS_DIR, or from the working directory.

import { readFileSync } from 'node:fs'
import { createRequire, syncBuiltinESMExports } from 'node:module'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

export const MIB = 2 ** 20
export const threads = Number(process.env.THREADS ?? 2)

/** o1js on this engine, or as it is. `isBare`: what it needs, but not o1js itself. */
export async function start({ isPlain = false, isBare = false } = {}) {
  process.env.O1JS_BACKEND ??= 'wasm'
  process.chdir(process.env.O1JS_DIR ?? process.cwd())
  let molt
  if (!isPlain) {
    forbidOthers()
    molt = await import('../../o1js/index.mjs')
    for (const event of ['snapshot', 'reset', 'reload'])
      molt.events.on(event, ({ ms } = {}) =>
        say(`  ${event}`, mib(molt), ms === undefined ? '' : `in ${ms.toFixed(1)} ms`),
      )
  }
  const entry = createRequire(join(process.cwd(), 'x.js')).resolve('o1js')
  say(
    `node ${process.version}, ${isPlain ? 'plain o1js' : `o1js ${molt.stats().version} on wasm-molt`}, ${threads} threads`,
  )
  if (isBare) return { molt, entry }
  const o1js = await import(pathToFileURL(entry.replace(/index\.cjs$/, 'index.js')).href)
  o1js.setNumberOfWorkers(threads)
  return { molt, o1js }
}

/** Neither Workers nor shared memories of Node's own engine. */
function forbidOthers() {
  const workers = createRequire(import.meta.url)('node:worker_threads')
  workers.Worker = class {
    constructor() {
      throw new Error('a Worker was started')
    }
  }
  syncBuiltinESMExports()
  const { Memory } = WebAssembly
  WebAssembly.Memory = (descriptor) => {
    if (descriptor.shared) throw new Error("a shared memory of Node's engine was made")
    return new Memory(descriptor)
  }
}

/** One method of 637 rows; programs with another `salt` are other programs. */
export function program({ ZkProgram, Field, Poseidon }, salt = 0) {
  return ZkProgram({
    name: `ladder-${salt}`,
    publicInput: Field,
    publicOutput: Field,
    methods: {
      run: {
        privateInputs: [Field],
        async method(x, y) {
          let hash = x.add(salt)
          for (let i = 0; i < 53; i++) hash = Poseidon.hash([hash, y])
          return { publicOutput: hash }
        },
      },
    },
  })
}

/** No keys from earlier runs, unless CACHE names a folder for them. */
export const compile = ({ Cache }, each) =>
  each.compile({ cache: process.env.CACHE === undefined ? Cache.None : Cache.FileSystem(process.env.CACHE) })

export function say(...words) {
  console.log(`${(performance.now() / 1000).toFixed(1).padStart(7)} s `, ...words)
}

export const mib = (molt) => `${(molt.stats().memoryBytes / MIB).toFixed(1)} MiB`

/** Says how long `act` took, and returns what it resolves with. */
export async function timed(what, act) {
  const [wall, cpu] = [performance.now(), process.cpuUsage()]
  const over = (outcome) => {
    const { user, system } = process.cpuUsage(cpu)
    const figures = `wall ${((performance.now() - wall) / 1000).toFixed(2)} s, CPU ${((user + system) / 1e6).toFixed(2)} s`
    say(`${what}${outcome}: ${figures}, RSS ${rss()} MiB`)
  }
  try {
    const value = await act()
    over('')
    return value
  } catch (error) {
    over(' (failed)')
    throw error
  }
}

const status = (name) => Number(new RegExp(`${name}:\\s+(\\d+)`).exec(readFileSync('/proc/self/status', 'utf8'))?.[1])
export const rss = () => Math.round(status('VmRSS') / 1024)
export const peakRss = () => Math.round(status('VmHWM') / 1024)

/** RSS when nothing is left to be done. */
export async function settled() {
  for (let i = 0; i < 3; i++) {
    globalThis.gc?.()
    await new Promise((resolve) => setTimeout(resolve, 300))
  }
  return rss()
}

export function check(condition, what) {
  if (!condition) throw new Error(`not so: ${what}`)
  say(`ok: ${what}`)
}

/** o1js 2.15 says nothing at the end of an operation, so the memory is put back at the next turn of the event loop. */
export const turn = () => new Promise(setImmediate)

/** What `act` rejects with. */
export async function rejection(act) {
  try {
    await act()
  } catch (error) {
    return error
  }
  throw new Error('not so: it was to reject')
}

const notes = []
/** What the table of scripts/o1js.mjs shows. */
export const note = (text) => notes.push(text)

export async function finish(molt) {
  if (molt !== undefined) say('stats', JSON.stringify(molt.stats()))
  say(`RSS: peak ${peakRss()} MiB, settled ${await settled()} MiB`)
  if (notes.length > 0) say(`notes: ${notes.join('; ')}`)
}
