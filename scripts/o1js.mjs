// npm run o1js [-- rung …]: o1js from npm on this engine, rung by rung (examples/o1js), each in a process of its own.
// smoke is the smallest that proves and verifies across a reset; compare measures against o1js as it is.
// --version 2.14.0 (default: all)  --node 24 (default: this one)  --json FILE
import { spawn } from 'node:child_process'
import { readdirSync, writeFileSync } from 'node:fs'
import { cpus, loadavg } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { programOf } from './programs.mjs'
import { buildAddon, ensureDependencies, fail, root, step } from './tools.mjs'

const FOLDER = join(root, 'examples', 'o1js')
const VERSIONS = ['2.14.0', '2.15.0']
/** Of one rung. Ten proofs take five minutes on two slow cores. */
const TIMEOUT_MS = 30 * 60_000
/** What is no rung: shared code, and what is run only when it is named. */
const [SHARED, ON_DEMAND] = [['common'], ['smoke', 'compare']]

const all = readdirSync(FOLDER)
  .filter((name) => name.endsWith('.mjs'))
  .map((name) => name.slice(0, -4))
  .filter((name) => !SHARED.includes(name))
const { values, positionals } = read()
const rungs = positionals.length === 0 ? all.filter((name) => !ON_DEMAND.includes(name)) : positionals.map(rungOf)
// The smallest rung is one run.
const isSmoke = positionals.length > 0 && rungs.every((name) => name === 'smoke')
const versions = versionsOf(values.version ?? (isSmoke ? VERSIONS[0] : 'all'))

if (!readdirSync(root).some((name) => /^wasm-molt\..*\.node$/.test(name))) buildAddon()
for (const version of versions) ensureDependencies(join(FOLDER, `v${version}`))
const bin = values.node === undefined ? process.execPath : programOf(`node${values.node}`)

const load = loadavg()[0].toFixed(1)
const results = []
for (const version of versions) {
  for (const rung of rungs) {
    step(`${rung}, o1js ${version}`)
    results.push(await climb(rung, version))
  }
}
report()

function read() {
  const options = { version: { type: 'string' }, node: { type: 'string' }, json: { type: 'string' } }
  try {
    return parseArgs({ allowPositionals: true, options })
  } catch (error) {
    return fail(`${error.message}\nnpm run o1js -- [${all.join(' | ')}] [--version …] [--node …] [--json FILE]`)
  }
}

/** `3` is as good as `3-ten-proofs`. */
function rungOf(word) {
  const found = all.find((name) => name === word || name.startsWith(`${word}-`))
  return found ?? fail(`there is no rung ${word}; there are ${all.join(', ')}`)
}

function versionsOf(word) {
  if (word === 'all') return VERSIONS
  return VERSIONS.includes(word) ? [word] : fail(`o1js ${word} is not among ${VERSIONS.join(', ')}`)
}

function climb(rung, version) {
  return new Promise((resolve) => {
    const began = performance.now()
    let out = ''
    const child = spawn(bin, ['--expose-gc', join(FOLDER, `${rung}.mjs`)], {
      env: { ...process.env, O1JS_DIR: join(FOLDER, `v${version}`), O1JS_BACKEND: 'wasm' },
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    let isLate = false
    const timer = setTimeout(() => {
      isLate = true
      child.kill('SIGKILL')
    }, TIMEOUT_MS)
    child.stdout.on('data', (data) => {
      process.stderr.write(data)
      out += data
    })
    child.on('close', (status, signal) => {
      clearTimeout(timer)
      const notes = /^.*notes: (.*)$/m.exec(out)?.[1] ?? ''
      const node = /node v(\S+),/.exec(out)?.[1] ?? '?'
      const failure = isLate ? `took longer than ${TIMEOUT_MS / 60_000} min` : `ended with ${signal ?? status}`
      const ok = status === 0
      resolve({ rung, version, node, ok, seconds: (performance.now() - began) / 1000, notes: ok ? notes : failure })
    })
  })
}

function report() {
  const { length: cores, 0: cpu } = cpus()
  const date = new Date().toISOString().slice(0, 10)
  const machine = `${date}, ${cores} cores (${cpu.model.trim()}), ${process.platform} ${process.arch}, load ${load} when it began`
  const lines = [
    ...[machine, '', '| rung | o1js | Node | ok | wall | notes |', '| --- | --- | --- | --- | --- | --- |'],
    ...results.map(
      ({ rung, version, node, ok, seconds, notes }) =>
        `| ${rung} | ${version} | ${node} | ${ok ? 'yes' : '**no**'} | ${seconds.toFixed(0)} s | ${notes} |`,
    ),
  ]
  process.stdout.write(`\n${lines.join('\n')}\n`)
  if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify({ machine, results }, undefined, 2)}\n`)
  process.exitCode = results.every(({ ok }) => ok) ? 0 : 1
}
