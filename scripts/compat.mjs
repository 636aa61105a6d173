// node scripts/compat.mjs [package …] [--rounds N]: real packages on this engine, against Node's.
// --save puts what came out into docs/compatibility.md.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { ensureDependencies, fail, root } from './tools.mjs'

const BEGIN = '<!-- compat:begin -->'
const END = '<!-- compat:end -->'

const { values, positionals } = read()
if (values.save && positionals.length > 0) fail('--save wants all packages')

ensureDependencies(join(root, 'compat'))
const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-compat-'))
try {
  const json = join(folder, 'compat.json')
  const rounds = values.rounds ? ['--rounds', values.rounds] : []
  const args = [join(root, 'compat/run.mjs'), ...positionals, ...rounds, '--json', json]
  const { status, signal } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' })
  if (values.save && (status === 0 || status === 1)) save(JSON.parse(readFileSync(json, 'utf8')))
  if (signal) fail(`compat/run.mjs ended with ${signal}`)
  process.exitCode = status
  if (positionals.length === 0) {
    const threaded = [join(root, 'compat/threaded.mjs'), ...rounds]
    const { status } = spawnSync(process.execPath, threaded, { cwd: root, stdio: 'inherit' })
    if (status !== 0) process.exitCode = 1
  }
} finally {
  rmSync(folder, { recursive: true, force: true })
}

function read() {
  try {
    const options = { save: { type: 'boolean', default: false }, rounds: { type: 'string' } }
    return parseArgs({ allowPositionals: true, options })
  } catch (error) {
    return fail(`${error.message}\nnode scripts/compat.mjs [package …] [--rounds N] [--save]`)
  }
}

function save({ rounds, leaks, node, rows }) {
  const path = join(root, 'docs/compatibility.md')
  const text = readFileSync(path, 'utf8')
  const [begin, end] = [text.indexOf(BEGIN), text.indexOf(END)]
  if (begin < 0 || end < begin) fail(`${path} has lost its markers`)
  const mib = (bytes) => (bytes / 2 ** 20).toFixed(bytes < 10 * 2 ** 20 ? 1 : 0)
  const lines = [
    `${rounds} reloads and ${rounds} resets in mid-use; memory over ${leaks} calls that leak. Against Node ${node.slice(1)}.`,
    '',
    '| package | made with | same results | reloads | resets | MiB on Node | MiB here |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for (const { npm, version, toolchain, steps, node, molt } of rows) {
    const sign = { ok: 'yes', fails: '**no**', 'not tried': '–' }
    const cells = [
      ...[`\`${npm}\` ${version}`, toolchain],
      ...['results', 'reloads', 'resets'].map((step) => sign[steps[step]]),
      node ? `${mib(node.before)} → ${mib(node.after)}` : '–',
      molt ? `${mib(molt.before)} → at most ${mib(molt.peak)}` : '–',
    ]
    lines.push(`| ${cells.join(' | ')} |`)
  }
  for (const { npm, failures } of rows) {
    for (const { step, message } of failures) lines.push('', `\`${npm}\`, ${step}: ${message.split('\n')[0]}`)
  }
  writeFileSync(path, `${text.slice(0, begin + BEGIN.length)}\n\n${lines.join('\n')}\n\n${text.slice(end)}`)
}
