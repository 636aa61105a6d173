// The same glue on Node's engine and on ours, behind one face.
import { createRequire } from 'node:module'

const require = createRequire(import.meta.url)

/**
 * @typedef {object} Package What a file in packages/ exports.
 * @property {string} specifier What is loaded: a package's entry, or a path.
 * @property {string[]} [include] Other packages that have to be evaluated with the glue.
 * @property {string} toolchain What made the module.
 * @property {string} notes What it imports, which hook it has.
 * @property {(glue: any, namespace: { WebAssembly: typeof WebAssembly }) => any} [expose] Runs once a generation.
 * @property {(module: any, i: number) => unknown} work One call's worth; the result depends on i alone.
 * @property {(module: any, i: number) => unknown} workSmall A series of tiny calls into the module.
 * @property {number} smallCalls How many of the package's calls `workSmall` makes.
 * @property {(module: any, i: number) => unknown} [leak] Leaves something behind.
 * @property {boolean | 'peak'} grows What `leak` does to memory on Node's engine; 'peak': only up to the largest input.
 */

/**
 * @typedef {object} Side A package on an engine.
 * @property {() => any} module What the work uses; ask again after every reload, or keep it: both have to do.
 * @property {() => number} memoryBytes The length of its linear memories.
 * @property {(options?: object) => Promise<any>} [reload]
 * @property {() => Promise<any>} [snapshot]
 * @property {() => Promise<any>} [reset]
 * @property {() => Promise<void>} close
 */

/** What there is, in the order of the table. */
export const names = [
  ...['gofmt', 'oniguruma', 'draco3d', 'quickjs', 'tiktoken'],
  ...['as-sha256', 'xxhash-wasm', 'sql.js', 'snappy-wasm', 'cedar-wasm'],
]

/** @param {string} name @returns {Promise<Package>} */
export const packageOf = (name) => import(`./packages/${name}.mjs`)

/**
 * @param {'node' | 'molt'} engine
 * @param {Package} pkg
 * @param {{ watch?: boolean, cache?: boolean | string }} [options] watch: count Node's memories, for `memoryBytes`.
 * @returns {Promise<Side>}
 */
export function open(engine, pkg, options = {}) {
  return engine === 'node' ? openNode(pkg, options) : openMolt(pkg, options)
}

async function openNode(pkg, { watch = false }) {
  const memoryBytes = watch ? watchMemories() : () => Number.NaN
  const glue = await load(pkg.specifier)
  const module = pkg.expose ? await pkg.expose(glue, { WebAssembly }) : glue
  return { module: () => module, memoryBytes, close: async () => {} }
}

/** As loadGlue finds it: what `require` finds, if that is there and is CommonJS. */
async function load(specifier) {
  try {
    return require(specifier)
  } catch (error) {
    if (error.code !== 'ERR_REQUIRE_ESM' && error.code !== 'ERR_PACKAGE_PATH_NOT_EXPORTED') throw error
    return import(specifier)
  }
}

async function openMolt(pkg, { cache }) {
  const { loadGlue } = addon()
  const { include, expose } = pkg
  const given = { include, expose, cache, parentURL: import.meta.url }
  const options = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined))
  const manager = await loadGlue(pkg.specifier, options)
  return {
    module: () => manager.module,
    memoryBytes: () => manager.stats().memoryBytes,
    reload: (with_) => manager.reload(with_),
    snapshot: () => manager.snapshot(),
    reset: () => manager.reset(),
    close: () => manager.close(),
  }
}

/** Loads the addon, which is not part of loading a package. @returns {any} */
export function addon() {
  const molt = require('../index.js')
  if (!molt.loadGlue) throw new Error('this build of wasm-molt has no loadGlue')
  return molt
}

/**
 * Node tells nobody how large the memories are that glue keeps to itself. Here each instance is asked for its own as it is made.
 * Only where memory is measured: timings are taken without.
 */
function watchMemories() {
  const memories = new Set()
  const { Instance, instantiate, Memory } = WebAssembly
  const see = (value) => value instanceof Memory && memories.add(new WeakRef(value))
  const seen = (instance) => {
    for (const value of Object.values(instance.exports)) see(value)
    return instance
  }
  const watched = (of, seen) =>
    new Proxy(of, {
      construct(target, args) {
        const made = Reflect.construct(target, args)
        seen(made)
        return made
      },
    })
  WebAssembly.Memory = watched(Memory, see)
  WebAssembly.Instance = watched(Instance, seen)
  WebAssembly.instantiate = async (...args) => {
    const made = await instantiate(...args)
    seen(made instanceof Instance ? made : made.instance)
    return made
  }
  return () => [...memories].reduce((sum, memory) => sum + (memory.deref()?.buffer.byteLength ?? 0), 0)
}
