// SECURITY.md names the tests that hold what it promises; they have to be there.
import assert from 'node:assert/strict'
import { existsSync, readFileSync } from 'node:fs'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'

const ROOT = fileURLToPath(new URL('..', import.meta.url))

test('each test that SECURITY.md names is there, under that name', () => {
  const text = readFileSync(`${ROOT}SECURITY.md`, 'utf8')
  const named = [...text.matchAll(/`([\w./-]+\.(?:spec\.ts|rs))`(?::((?: "[^"]+",?)+))?/g)]
  assert.ok(named.length > 20, `${named.length} tests are named`)
  for (const [, file, names] of named) {
    const path = [`${ROOT}${file}`, `${ROOT}__test__/${file}`].find((path) => existsSync(path))
    assert.ok(path !== undefined, `there is no ${file}`)
    const source = readFileSync(path, 'utf8')
    for (const [, name] of names?.matchAll(/"([^"]+?)(?: …)?"/g) ?? []) {
      assert.ok(source.includes(name as string), `${file} has no test "${name}"`)
    }
  }
})

test('every promise in SECURITY.md names a test', () => {
  const text = readFileSync(`${ROOT}SECURITY.md`, 'utf8')
  const promises = text.slice(text.indexOf('## What is promised'), text.indexOf('## What is not promised'))
  const rows = promises.split('\n').filter((line) => /^\| (?!promise|---)/.test(line))
  assert.ok(rows.length > 15, `${rows.length} promises`)
  for (const row of rows) assert.match(row, /\.spec\.ts|\.rs|same|runners|\.md/, row)
})
