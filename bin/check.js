'use strict'

// npx wasm-molt check <package>: what an installed package's WebAssembly is made of, and whether its glue runs on this engine.
// What can be read is read; what cannot is tried, in a process of its own.

const { fork } = require('node:child_process')
const { existsSync, readdirSync, readFileSync, realpathSync, statSync } = require('node:fs')
const { basename, dirname, extname, isAbsolute, join, relative, resolve, sep } = require('node:path')
const { setTimeout: turn } = require('node:timers/promises')
const { fileURLToPath, pathToFileURL } = require('node:url')
const { parseArgs } = require('node:util')
const { describe } = require('./check-wasm.js')

const DEFAULT_TIMEOUT_MS = 120_000
/** Smaller ones are probes for a feature, or helpers. */
const MIN_EMBEDDED_BYTES = 128
const MAX_GLUE_FILES = 400
const SETTLE_MS = 500
const MAX_GLUE_BYTES = 64 * 1024 * 1024

/**
 * @typedef {object} Trial What became of the glue on this engine.
 * @property {boolean} loads It was evaluated, and what it instantiates by itself was.
 * @property {string} [error]
 * @property {string[]} [stack]
 * @property {number} [loadMs]
 * @property {string} [began] How it came to instantiate something: 'by itself', or the hook that was called.
 * @property {number} [memoryBytes]
 * @property {boolean | string} [snapshot] true, or why not.
 * @property {boolean | string} [reset]
 * @property {boolean | string} [reload]
 * @property {string} [unhandled] What a promise was rejected with that the glue forgot.
 *
 * @typedef {object} Report
 * @property {string} specifier
 * @property {string} [name]
 * @property {string} [version]
 * @property {string} folder
 * @property {string | undefined} entry
 * @property {(import('./check-wasm.js').Description & { file: string, also: string[], here?: boolean, node: boolean })[]} modules
 * @property {string[]} hooks
 * @property {Trial} trial
 * @property {boolean} ok It loads, and a snapshot and a reset work if there is anything to take one of.
 */

// ---------------------------------------------------------------- what can be read

/**
 * @param {string} specifier a package, one of its entries, or a path
 * @param {{ cwd?: string, loadGlue?: Function, WebAssembly?: any, timeoutMs?: number }} [options]
 *   loadGlue: tried in this process with it; otherwise in one of its own, with the package this file is part of.
 * @returns {Promise<Report>}
 */
async function check(
  specifier,
  {
    cwd = process.cwd(),
    loadGlue,
    WebAssembly: ours = require('../index.js').WebAssembly,
    timeoutMs = DEFAULT_TIMEOUT_MS,
  } = {},
) {
  const { folder, entry, manifest } = locate(specifier, cwd)
  const glue = entry ? glueFiles(entry, folder) : []
  const found = unlike([...wasmFiles(folder), ...embedded(glue, folder)])
  const modules = found.map(({ file, also, bytes }) => {
    return { file, also, ...describe(bytes), here: ours?.validate(bytes), node: WebAssembly.validate(bytes) }
  })
  // The file beside the entry is the likeliest to be meant.
  const beside = ({ path }) => (path && entry && dirname(path) === dirname(entry) ? 0 : 1)
  const nearest = found.toSorted((a, b) => beside(a) - beside(b))
  const files = nearest.flatMap(({ path }) => path ?? [])
  const task = { specifier: entry ?? specifier, parent: join(cwd, 'package.json'), files }
  let told
  if (loadGlue) told = await attempt(task, nearest, { loadGlue })
  else told = await attemptApart(task, timeoutMs)
  const { trial, unhandled } = told
  if (unhandled) trial.unhandled = unhandled
  const fine = (part) => part === undefined || part === true
  const ok = trial.loads && fine(trial.snapshot) && fine(trial.reset) && fine(trial.reload)
  const { name, version } = manifest
  return { specifier, name, version, folder, entry, modules, hooks: hooksIn(glue), trial, ok }
}

/** Finds the package's folder and the file that stands for the specifier. */
function locate(specifier, cwd) {
  if (specifier.startsWith('file:')) specifier = fileURLToPath(specifier)
  if (/^\.{0,2}\//.test(specifier) || isAbsolute(specifier) || specifier === '.') {
    const path = resolve(cwd, specifier)
    if (!existsSync(path)) throw new CheckError(`there is no ${path}`)
    if (statSync(path).isDirectory()) {
      const manifest = readManifest(path)
      return { folder: path, manifest, entry: entryOf(path, manifest, '.') }
    }
    const folder = owner(path)
    return { folder, manifest: readManifest(folder), entry: path }
  }
  const [, name, rest] = /^(@[^/]+\/[^/]+|[^/]+)(\/.*)?$/.exec(specifier) ?? []
  for (let at = resolve(cwd); ; at = dirname(at)) {
    const folder = join(at, 'node_modules', name)
    if (existsSync(join(folder, 'package.json'))) {
      const real = realpathSync(folder)
      const manifest = readManifest(real)
      const entry = entryOf(real, manifest, `.${rest ?? ''}`)
      if (rest && !entry) throw new CheckError(`${name} does not offer ${specifier}`)
      return { folder: real, manifest, entry }
    }
    if (at === dirname(at)) throw new CheckError(`${name} is not installed: looked in node_modules from ${cwd} upwards`)
  }
}

class CheckError extends Error {}

function readManifest(folder) {
  const path = join(folder, 'package.json')
  return existsSync(path) ? JSON.parse(readFileSync(path, 'utf8')) : {}
}

/** The nearest folder upwards that has a package.json with a name. */
function owner(path) {
  for (let at = dirname(path); at !== dirname(at); at = dirname(at)) if (readManifest(at).name) return at
  return dirname(path)
}

/** As Node does, for `require` first and then for `import`: what both find is what loads most places. */
function entryOf(folder, manifest, subpath) {
  const { exports, main } = manifest
  if (exports !== undefined) {
    for (const system of ['require', 'import']) {
      const target = exported(exports, subpath, ['node', system, 'module-sync', 'default', 'node-addons'])
      if (target && existsSync(join(folder, target))) return join(folder, target)
    }
    return undefined
  }
  const tried = subpath === '.' ? [main, 'index.js'] : [subpath]
  for (const start of tried.filter(Boolean)) {
    for (const end of ['', '.js', '.json', '/index.js']) {
      const path = join(folder, start + end)
      if (existsSync(path) && statSync(path).isFile()) return path
    }
  }
  return undefined
}

function exported(exports, subpath, conditions) {
  const choose = (target) => {
    if (typeof target === 'string' || target === null) return target
    if (Array.isArray(target)) return target.map(choose).find(Boolean)
    for (const [condition, inner] of Object.entries(target)) {
      if (!conditions.includes(condition)) continue
      const chosen = choose(inner)
      if (chosen !== undefined) return chosen
    }
    return undefined
  }
  const paths = typeof exports === 'object' && exports !== null && Object.keys(exports)[0]?.startsWith('.')
  if (!paths) return subpath === '.' ? choose(exports) : undefined
  if (subpath in exports) return choose(exports[subpath])
  const patterns = Object.keys(exports).filter((key) => key.includes('*'))
  for (const key of patterns.sort((a, b) => b.indexOf('*') - a.indexOf('*'))) {
    const [before, after] = key.split('*')
    if (!subpath.startsWith(before) || !subpath.endsWith(after) || subpath.length < key.length) continue
    return choose(exports[key])?.replaceAll('*', subpath.slice(before.length, subpath.length - after.length))
  }
  return undefined
}

/** The entry and what it requires and imports of its own package, by relative path or by its own name. */
function glueFiles(entry, folder) {
  const found = new Map()
  const queue = [entry]
  let bytes = 0
  while (queue.length > 0 && found.size < MAX_GLUE_FILES && bytes < MAX_GLUE_BYTES) {
    const path = queue.shift()
    if (found.has(path) || !/\.[cm]?js$/.test(path)) continue
    const text = readFileSync(path, 'utf8')
    bytes += text.length
    found.set(path, text)
    // Large files are data or bundles: they import nothing of interest, and searching them takes long.
    if (text.length > 4 * 1024 * 1024) continue
    for (const [, wanted] of text.matchAll(/(?:\bfrom|\bimport|\brequire)\s*\(?\s*["']([^"'\n]+)["']/g)) {
      const next = within(wanted, path, folder)
      if (next) queue.push(next)
    }
  }
  return [...found].map(([path, text]) => ({ path, text }))
}

function within(wanted, from, folder) {
  try {
    let path
    if (wanted.startsWith('.')) {
      path = ['', '.js', '.cjs', '.mjs', '/index.js'].map((end) => resolve(dirname(from), wanted + end)).find(isFile)
    } else {
      const manifest = readManifest(folder)
      if (wanted !== manifest.name && !wanted.startsWith(`${manifest.name}/`)) return undefined
      path = entryOf(folder, manifest, `.${wanted.slice(manifest.name.length)}`)
    }
    return path?.startsWith(folder + sep) ? path : undefined
  } catch {
    return undefined
  }
}

function isFile(path) {
  return existsSync(path) && statSync(path).isFile()
}

/** Every .wasm file of the package, whether or not this entry uses it. */
function wasmFiles(folder) {
  const found = []
  for (const entry of readdirSync(folder, { withFileTypes: true, recursive: true })) {
    const path = join(entry.parentPath ?? entry.path, entry.name)
    const file = relative(folder, path)
    if (!entry.isFile() || extname(path) !== '.wasm' || file.split(sep).includes('node_modules')) continue
    const bytes = readFileSync(path)
    if (bytes.length >= 8 && bytes.readUInt32LE(0) === 0x6d736100) found.push({ file, path, bytes })
  }
  return found.sort((a, b) => (a.file < b.file ? -1 : 1))
}

/** Modules inside the glue's text: base64, a string, or a list of bytes. */
function embedded(glue, folder) {
  const found = []
  for (const { path, text } of glue) {
    const add = (bytes) => {
      if (bytes.length < MIN_EMBEDDED_BYTES || bytes.readUInt32LE(0) !== 0x6d736100) return
      found.push({ file: `${relative(folder, path)} (embedded)`, bytes })
    }
    for (const [run] of text.matchAll(/AGFzbQEAAAA?[A-Za-z0-9+/]{8,}={0,2}/g)) add(Buffer.from(run, 'base64'))
    for (const { index } of text.matchAll(/(?<=["'])(?:\W|\\0|\\x00|\\u0100)asm/g)) add(stringAt(text, index))
    for (const [run] of text.matchAll(/\b0,\s*97,\s*115,\s*109,\s*1,\s*0,\s*0,\s*0(?:,\s*\d{1,3})*/g)) {
      add(Buffer.from(run.split(',').map(Number)))
    }
  }
  return found
}

/** A string literal, a character for a byte, as newer Emscripten writes it: with U+0100 for 0. */
function stringAt(text, start) {
  const bytes = []
  const quote = text[start - 1]
  for (let at = start; text[at] !== quote; at++) {
    let code = text.charCodeAt(at)
    if (Number.isNaN(code)) return Buffer.alloc(0)
    if (text[at] === '\\') {
      const escaped = text[++at]
      const digits = { x: 2, u: 4 }[escaped] ?? 0
      code = { n: 10, r: 13, t: 9, b: 8, f: 12, v: 11, 0: 0 }[escaped] ?? escaped.charCodeAt(0)
      if (digits > 0) code = Number.parseInt(text.slice(at + 1, at + 1 + digits), 16)
      at += digits
    }
    bytes.push(code)
  }
  return Buffer.from(bytes)
}

/** Packages carry the same module for several kinds of glue. */
function unlike(found) {
  const kept = []
  for (const one of found) {
    const same = kept.find(({ bytes }) => bytes.equals(one.bytes))
    if (same) same.also.push(one.file)
    else kept.push({ ...one, also: [] })
  }
  return kept
}

/** What glue offers for instantiating with something else than its own file. */
const HOOKS = {
  instantiateWasm: /\binstantiateWasm\b/,
  wasmBinary: /\bwasmBinary\b/,
  wasmModule: /\b(?:Module|moduleArg|options|opts|\w)\??\.wasmModule\b/,
  wasmMemory: /(?:\[["']wasmMemory["']\]|\.wasmMemory\b)/,
  locateFile: /\blocateFile\b/,
  instantiator: /\binstantiator\b/,
  initSync: /\binitSync\b/,
  'init(module_or_path)': /\b(?:__wbg_init|initAsync|module_or_path)\b/,
  'init(callback)': /function init\(callback\)/,
  __wbg_set_wasm: /\b__wbg_set_wasm\b/,
  'importObject of Go': /\bgo\.importObject\b|\bthis\.importObject\s*=/,
  importObject: /\bimportObject\s*[,:)]/,
}

function hooksIn(glue) {
  return Object.entries(HOOKS)
    .filter(([, pattern]) => glue.some(({ text }) => pattern.test(text)))
    .map(([name]) => name)
}

// ---------------------------------------------------------------- what has to be tried

function attemptApart(task, timeoutMs) {
  return new Promise((done) => {
    const told = { step: 'start', trial: { loads: false, error: 'nothing happened' } }
    let said = ''
    const apart = fork(__filename, [], { stdio: ['ignore', 'pipe', 'pipe', 'ipc'], execArgv: [] })
    const timer = setTimeout(() => {
      told.late = true
      apart.kill('SIGKILL')
    }, timeoutMs)
    for (const stream of [apart.stdout, apart.stderr]) {
      stream.on('data', (chunk) => {
        said = `${said}${chunk}`.slice(-4_000)
      })
    }
    apart.on('message', (message) => Object.assign(told, message))
    apart.on('error', (error) => {
      told.trial.error = error.message
    })
    apart.on('close', (code, signal) => {
      clearTimeout(timer)
      if (told.late) told.trial.error = `${told.step}: not done after ${timeoutMs / 1e3} s`
      else if (!told.ended) told.trial.error = `${told.step}: the process ended with ${signal ?? `exit code ${code}`}`
      if (!told.ended) {
        told.trial.loads = false
        told.trial.stack = said.trim().split('\n').slice(-5)
      }
      done(told)
    })
    apart.send(task)
  })
}

/** @returns {Promise<{ trial: Trial, unhandled?: string }>} */
async function attempt({ specifier, parent }, found, { loadGlue }, tell = () => {}) {
  tell({ step: 'load' })
  const trial = { loads: false }
  let manager
  try {
    const options = { parentURL: pathToFileURL(parent).href }
    const begun = performance.now()
    manager = await loadGlue(specifier, options)
    trial.loads = true
    trial.loadMs = performance.now() - begun
    // What it began to instantiate without anybody waiting for it.
    const until = performance.now() + SETTLE_MS
    while (manager.stats().memoryBytes === 0 && performance.now() < until) await turn(10)
    trial.memoryBytes = manager.stats().memoryBytes
    if (trial.memoryBytes > 0) trial.began = 'by itself'
    if (!trial.began) {
      await manager.close()
      manager = undefined
      tell({ trial, step: 'init' })
      manager = await loadGlue(specifier, {
        ...options,
        expose: (glue, namespace) => begin(glue, found, namespace, trial),
      })
      trial.memoryBytes = manager.stats().memoryBytes
      if (trial.memoryBytes === 0) delete trial.began
    }
    if (trial.began) {
      const part = async (name, run) => {
        tell({ trial, step: name })
        try {
          await run()
          trial[name] = true
        } catch (error) {
          trial[name] = sentence(error)
        }
      }
      await part('snapshot', () => manager.snapshot())
      if (trial.snapshot === true) await part('reset', () => manager.reset())
      await part('reload', () => manager.reload())
    }
  } catch (error) {
    trial.loads = false
    trial.error = sentence(error)
    trial.stack = error?.stack
      ?.split('\n')
      .filter((line) => /^\s+at /.test(line))
      .slice(0, 4)
      .map((line) => line.trim())
  } finally {
    await manager?.close().catch(() => {})
  }
  return { trial }
}

/** Glue that waits to be asked: the usual ways to ask, one after the other, with each file that it may mean. */
async function begin(glue, found, { WebAssembly: namespace }, trial) {
  const files = found.flatMap(({ bytes }) => (bytes ? [bytes] : []))
  const faces = [glue, glue.default].filter((face) => face !== null && ['object', 'function'].includes(typeof face))
  const itself = (face) => (typeof face === 'function' ? face : face.default)
  const hooked = (file) => (imports) => namespace.instantiate(file, imports)
  const ways = [
    ['initSync({ module })', (face) => face.initSync, (fn, file) => fn({ module: new namespace.Module(file) })],
    ['initSync(bytes)', (face) => face.initSync, (fn, file) => fn(file)],
    ['loadWASM({ instantiator })', (face) => face.loadWASM, (fn, file) => fn({ instantiator: hooked(file) })],
    ['init(callback)', (face) => face.init, (fn, file) => fn(hooked(file))],
    ['init(bytes)', (face) => face.init, (fn, file) => fn(file)],
    ['the default export, called', itself, (fn) => fn()],
    ['the default export, called with bytes', itself, (fn, file) => fn(file)],
    ['what makes modules, called', (face) => makers(face), (fn) => fn()],
    ['the only function, called', (face) => only(face), (fn) => fn()],
  ]
  for (const [name, pick, ask] of ways) {
    for (const fn of faces.map(pick).filter((fn) => typeof fn === 'function')) {
      for (const file of ask.length > 1 ? files : [undefined]) {
        try {
          const made = await ask(fn, file)
          trial.began = name
          return made && typeof made === 'object' ? made : glue
        } catch {}
      }
    }
  }
  return glue
}

/** Emscripten's factories under names of their own. */
function makers(face) {
  const found = Object.entries(face).filter(([name, value]) => {
    return typeof value === 'function' && /^(?:create|load|new)\w*(?:Module|Wasm|WASM)$/.test(name)
  })
  if (found.length > 0) return () => Promise.all(found.map(([, make]) => make())).then((made) => ({ made }))
}

function only(face) {
  const functions = Object.values(face).filter((value) => typeof value === 'function')
  return functions.length === 1 ? functions[0] : undefined
}

function sentence(error) {
  if (!(error instanceof Error)) return `threw ${String(error)}`
  const cause = error.cause instanceof Error ? ` (${error.cause.message})` : ''
  return `${error.code ? `${error.code}: ` : ''}${error.message}${cause}`
}

async function apart(task) {
  const { loadGlue } = require('../index.js')
  if (!loadGlue) throw new Error('this build has no loadGlue')
  const found = task.files.map((path) => ({ bytes: readFileSync(path) }))
  // A promise that the glue forgot tells nothing about the rest.
  process.on('unhandledRejection', (error) => {
    process.send({ unhandled: sentence(error) })
  })
  const told = await attempt(task, found, { loadGlue }, (message) => process.send(message))
  await new Promise((sent) => process.send({ ...told, ended: true }, sent))
  // Glue may keep timers or sockets of its own.
  process.exit(0)
}

// ---------------------------------------------------------------- the command

const USAGE = `npx wasm-molt check <package | path> [--json] [--timeout seconds]

Says what the WebAssembly of an installed package is made of, which hooks its glue has, and whether it loads on this engine,
in a process of its own. Exit code: 0 if it does, 1 if it does not, 2 if there is nothing to check.`

/** @param {string[]} argv what comes after the program's name @returns {Promise<number>} the exit code */
async function main(argv) {
  let given
  try {
    const options = { json: { type: 'boolean' }, timeout: { type: 'string' }, help: { type: 'boolean' } }
    given = parseArgs({ args: argv, options, allowPositionals: true })
  } catch (error) {
    console.error(`${error.message}\n\n${USAGE}`)
    return 2
  }
  const { values, positionals } = given
  const [command, specifier] = positionals
  const seconds = Number(values.timeout ?? DEFAULT_TIMEOUT_MS / 1e3)
  if (values.help) {
    console.log(USAGE)
    return 0
  }
  if (command !== 'check' || specifier === undefined || positionals.length > 2 || !(seconds > 0)) {
    console.error(USAGE)
    return 2
  }
  let report
  try {
    report = await check(specifier, { timeoutMs: seconds * 1e3 })
  } catch (error) {
    if (!(error instanceof CheckError)) throw error
    console.error(error.message)
    return 2
  }
  console.log(values.json ? JSON.stringify(report, undefined, 2) : text(report))
  return report.ok ? 0 : 1
}

/** @param {Report} report */
function text(report) {
  const { specifier, name, version, folder, entry, modules, hooks, trial } = report
  const lines = [`${name ? `${name} ${version ?? ''}`.trim() : specifier}, in ${folder}`]
  lines.push(`  entry: ${entry ? relative(folder, entry) || basename(entry) : 'none that Node would load'}`)
  if (modules.length === 0) lines.push('  no WebAssembly found')
  for (const module of modules) {
    const imports = Object.entries(module.imports).map(([from, count]) => `${from} (${count})`)
    lines.push('', `  ${module.file}: ${size(module.bytes)}, ${module.toolchain}`)
    if (module.also.length > 0) lines.push(`    also      ${module.also.join(', ')}`)
    if (module.error) lines.push(`    cannot be read: ${module.error}`)
    lines.push(`    imports   ${imports.join(', ') || 'none'}`)
    lines.push(`    exports   ${module.exports}`)
    lines.push(`    memory    ${module.memories.map(memoryText).join('; ') || 'none'}`)
    lines.push(`    features  ${module.features.join(', ') || 'none beyond the first version'}`)
    const answer = (yes) => (yes === undefined || yes === null ? 'not asked' : yes ? 'yes' : 'NO')
    lines.push(`    valid     here: ${answer(module.here)}, on Node ${process.versions.node}: ${answer(module.node)}`)
  }
  lines.push('', `  hooks: ${hooks.join(', ') || 'none found'}`)
  if (!trial.loads) {
    lines.push(`  loads here: NO: ${trial.error}`, ...(trial.stack ?? []).map((line) => `    ${line}`))
  } else {
    const began = trial.began
      ? `instantiates: ${trial.began}, ${size(trial.memoryBytes)} of memory`
      : 'instantiated nothing yet'
    lines.push(`  loads here: yes, in ${Math.round(trial.loadMs)} ms; ${began}`)
    for (const part of ['snapshot', 'reset', 'reload']) {
      if (trial[part] !== undefined) lines.push(`  ${part}: ${trial[part] === true ? 'works' : `NO: ${trial[part]}`}`)
    }
    if (trial.unhandled) lines.push(`  a promise was rejected that nobody waited for: ${trial.unhandled}`)
  }
  lines.push('', `  ${verdict(report)}`)
  return lines.join('\n')
}

function verdict({ ok, modules, trial }) {
  if (!ok) return 'It does not run here as it is.'
  if (trial.began) return 'It runs here.'
  if (modules.length === 0)
    return 'There is nothing to run: its JavaScript was evaluated, and no WebAssembly was found.'
  return 'It loads, and waits to be asked to instantiate: give loadGlue an `expose` that calls its hook.'
}

function memoryText({ imported, initial, maximum, shared, is64 }) {
  const most = maximum === undefined ? 'no maximum' : `at most ${maximum}`
  return `${imported ? 'imported' : 'its own'}, ${initial} pages, ${most}${shared ? ', shared' : ''}${is64 ? ', 64 bits' : ''}`
}

function size(bytes) {
  return bytes < 1024 * 1024 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / 1024 / 1024).toFixed(1)} MiB`
}

module.exports = { check, main }

if (require.main === module && process.send) {
  process.once('message', (task) => {
    apart(task).catch((error) => {
      const trial = { loads: false, error: sentence(error) }
      process.send({ trial, ended: true }, () => process.exit(1))
    })
  })
}
