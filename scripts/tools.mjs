// What the scripts share. Plain Node: these run before anything is installed.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = dirname(dirname(fileURLToPath(import.meta.url)))

/** Specs of tests that run at a time. Much of a spec is waiting, so that two serve one core. */
export const jobs = Math.max(2, availableParallelism() - 1)

/** Says what comes next. To stderr, so that it stays in order with what the tools print. */
export function step(text) {
  process.stderr.write(`\n── ${text}\n`)
}

/** Ends the script with a sentence instead of a stack trace. */
export function fail(text) {
  process.stderr.write(`\n${text}\n`)
  process.exit(1)
}

/** Runs a program with our streams; whatever it says is our exit code. */
export function run(command, args = [], { cwd = root, env, quiet = false } = {}) {
  const stdio = ['inherit', quiet ? 'ignore' : 'inherit', 'inherit']
  const done = spawnSync(command, args, { cwd, env: { ...process.env, ...env }, stdio })
  if (done.error?.code === 'ENOENT') fail(`${command} is not on the PATH. ${remedy(command)}`)
  if (done.error) throw done.error
  if (done.status !== 0) {
    fail(`failed: ${[command, ...args].join(' ')} (${done.signal ?? done.status})`)
  }
}

function remedy(command) {
  return command === 'cargo' ? 'The addon is built from source: install Rust (rustup.rs), stable, 1.95 or newer.' : ''
}

/** Runs a script with this very Node, so that versions cannot mix. */
export function node(args, options) {
  run(process.execPath, args, options)
}

/** Runs the command-line tool of an installed package without a shell: .bin holds no files that spawn on Windows. */
export function tool(name, bin, args, options) {
  const require = createRequire(join(root, 'package.json'))
  const manifest = join(root, 'node_modules', name, 'package.json')
  const { bin: bins } = require(manifest)
  node([join(dirname(manifest), typeof bins === 'string' ? bins : bins[bin]), ...args], options)
}

/**
 * napi builds for a named target, in that target's folder. Whoever else asks cargo names it too, so that one build of
 * the engine serves the addon and the tests.
 */
export const hostTarget = ['--target', 'host-tuple']

/** All crates but the fuzzer, which needs a C++ compiler. */
export const workspace = ['--workspace', '--exclude', 'wasm-molt-fuzz']

/** Installs a folder's npm packages when they are missing or older than its lock file. */
export function ensureDependencies(folder = root) {
  const lock = join(folder, 'package-lock.json')
  const installed = join(folder, 'node_modules', '.package-lock.json')
  if (existsSync(installed) && statSync(installed).mtimeMs >= statSync(lock).mtimeMs) return
  step(`npm packages${folder === root ? '' : ` of ${relative(root, folder)}`}`)
  npm(['ci', '--loglevel=error'], { cwd: folder })
}

/** npm as it was started (any version manager's), else the one on the PATH. */
export function npm(args, options) {
  const self = process.env.npm_execpath
  if (self?.endsWith('.js')) node([self, ...args], options)
  else if (process.platform === 'win32') run('cmd', ['/c', 'npm', ...args], options)
  else run('npm', args, options)
}

/**
 * Builds the addon in place. Always asks cargo: it alone knows what is stale, and it answers in a second.
 * Debug builds are for looking inside; tests and figures use the release build.
 */
export function buildAddon({ debug = false } = {}) {
  ensureDependencies()
  step(`addon (${debug ? 'debug' : 'release; the first build takes minutes'})`)
  tool('@napi-rs/cli', 'napi', [
    ...['build', '--platform', '--js', 'binding.js', '--dts', 'binding.d.ts'],
    ...(debug ? [] : ['--release']),
  ])
}

/** Files under a folder for which `keep` holds, with forward slashes, sorted. */
export function files(folder, keep) {
  const top = join(root, folder)
  if (!existsSync(top)) return []
  const found = []
  for (const entry of readdirSync(top, { withFileTypes: true })) {
    const path = `${folder}/${entry.name}`
    if (entry.name === 'node_modules' || entry.name === 'target') continue
    if (entry.isDirectory()) found.push(...files(path, keep))
    else if (keep(path)) found.push(path)
  }
  return found.sort()
}

/** Writes what a page of docs has between `<!-- name -->` and `<!-- /name -->`. */
export function fill(page, name, text) {
  const [begin, end] = [`<!-- ${name} -->`, `<!-- /${name} -->`]
  const path = join(root, page)
  const before = readFileSync(path, 'utf8')
  const [from, to] = [before.indexOf(begin), before.indexOf(end)]
  if (from < 0 || to < from) fail(`${page} has no ${begin} … ${end}`)
  writeFileSync(path, `${before.slice(0, from)}${begin}\n\n${text}\n\n${before.slice(to)}`)
}
