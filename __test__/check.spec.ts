// `npx wasm-molt check`: what it says of a package, and its exit codes.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryFolder } from './guests.ts'
import { LIMIT } from './support.ts'

const bin = createRequire(import.meta.url).resolve('../bin/wasm-molt.js')
const root = join(bin, '../..')

function check(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [bin, 'check', ...args], {
    cwd: root,
    encoding: 'utf8',
  })
  return { status, stdout, stderr }
}

test('a package that runs here: its modules, its hooks and a trial', LIMIT, () => {
  const { status, stdout } = check('@wasm-fmt/gofmt', '--json')
  assert.equal(status, 0)
  const report = JSON.parse(stdout)
  assert.equal(report.ok, true)
  assert.equal(report.trial.loads, true)
  assert.ok(report.trial.snapshot && report.trial.reset && report.trial.reload)
  assert.ok(report.trial.memoryBytes >= 65536)
  assert.ok(JSON.stringify(report.modules).includes('gofmt.wasm'))
  const text = check('@wasm-fmt/gofmt')
  assert.equal(text.status, 0)
  assert.match(text.stdout, /gofmt\.wasm.*TinyGo/)
  assert.match(text.stdout, /It runs here/)
})

test('glue that does not load says why, and exits with 1', LIMIT, () => {
  const path = join(temporaryFolder('check'), 'broken.cjs')
  writeFileSync(path, 'new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true })')
  const { status, stdout, stderr } = check(path)
  assert.equal(status, 1, stdout + stderr)
  assert.match(stdout + stderr, /shared memories/)
})

test('what is not there, or not said, exits with 2 and tells how to ask', LIMIT, () => {
  const missing = check('no-such-package')
  assert.equal(missing.status, 2)
  assert.match(missing.stderr, /no-such-package is not installed/)
  const nothing = check()
  assert.equal(nothing.status, 2)
  assert.match(nothing.stdout + nothing.stderr, /wasm-molt check <package/)
})
