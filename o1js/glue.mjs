// Finds the glue that o1js ships, and evaluates it before o1js does: once for the life of the process, because o1js keeps
// its classes and functions in variables, and with another meaning of a few names.

import { existsSync, readFileSync } from 'node:fs'
import Module, { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { compileFunction } from 'node:vm'

const PLONK = { file: 'plonk_wasm.cjs', keepsPool: false }
/** Versions of o1js whose glue was read. `keepsPool`: its threads stay between operations. */
const GLUES = {
  ...{ '2.12.0': PLONK, '2.13.0': PLONK, '2.14.0': PLONK },
  '2.15.0': { file: 'kimchi_wasm.cjs', keepsPool: true },
}

const SHADOWS = ['WebAssembly', 'FinalizationRegistry', 'startWorkers', 'terminateWorkers']

/** Where the glue is that the program is going to load, and of which version. */
export function findGlue() {
  const from = [process.argv[1], join(process.cwd(), 'x.js')].filter((path) => path !== undefined)
  const entry = from.reduce((found, path) => found ?? resolveFrom(path), undefined)
  if (entry === undefined) {
    throw new Error(`wasm-molt/o1js: o1js was not found from ${from.map(dirname).join(' nor from ')}; npm install o1js`)
  }
  // …/dist/node/index.cjs. `exports` of the package hides everything else.
  const node = dirname(entry)
  const { version } = JSON.parse(readFileSync(join(node, '../../package.json'), 'utf8'))
  const glue = GLUES[version]
  if (glue === undefined) {
    throw new Error(
      `wasm-molt/o1js: ${node} is o1js ${version}, whose glue is not known; ` +
        `use one of ${Object.keys(GLUES).join(', ')}, or leave wasm-molt/o1js away`,
    )
  }
  const path = join(node, 'bindings/compiled/node_bindings', glue.file)
  if (!existsSync(path)) throw new Error(`wasm-molt/o1js: o1js ${version} has no ${path}; install it again`)
  return { path, version, keepsPool: glue.keepsPool }
}

function resolveFrom(path) {
  try {
    return createRequire(pathToFileURL(path)).resolve('o1js')
  } catch {
    return undefined
  }
}

/**
 * Puts the glue where both its users will look, node-backend.js and the OCaml bundle. It is evaluated when the first of
 * them asks: a program that never loads o1js pays for neither the glue nor its module.
 *
 * `evaluated(exports, handles)` runs before anybody sees the exports; `handles` are what the glue keeps in JavaScript for its guest.
 */
export function installGlue({ path }, shadows, evaluated) {
  const { cache } = createRequire(path)
  if (cache[path] !== undefined) {
    throw new Error(
      `wasm-molt/o1js: ${path} is loaded already; import wasm-molt/o1js before o1js, or start with node --import wasm-molt/o1js`,
    )
  }
  const module = new Module(path)
  Object.assign(module, { filename: path, paths: Module._nodeModulePaths(dirname(path)), loaded: true })
  const data = (value) => ({ value, writable: true, enumerable: true, configurable: true })
  const lazy = {
    get() {
      const exports = {}
      Object.defineProperty(module, 'exports', data(exports))
      try {
        evaluated(exports, evaluate(module, shadows))
      } catch (error) {
        Object.defineProperty(module, 'exports', lazy)
        throw error
      }
      return module.exports
    },
    set(value) {
      Object.defineProperty(module, 'exports', data(value))
    },
    enumerable: true,
    configurable: true,
  }
  Object.defineProperty(module, 'exports', lazy)
  cache[path] = module
}

function evaluate(module, shadows) {
  const { filename } = module
  // Glue with a heap of its own has numbers for JavaScript's objects in the guest's memory: they go back together.
  const source = `${readFileSync(filename, 'utf8')}
;return typeof heap === 'undefined' ? undefined : {
  save: () => [heap.slice(), heap_next],
  restore: ([values, next]) => { heap.length = 0; for (const value of values) heap.push(value); heap_next = next },
}`
  const parameters = ['exports', 'require', 'module', '__filename', '__dirname', ...SHADOWS]
  const run = compileFunction(source, parameters, { filename })
  const { exports } = module
  const values = SHADOWS.map((name) => shadows[name])
  return run.call(exports, exports, createRequire(filename), module, filename, dirname(filename), ...values)
}
