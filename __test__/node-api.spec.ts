// The level of Node-API that the addon needs: what it calls is there on every runtime that has this level.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'

const require = createRequire(import.meta.url)
const { symbols } = require('node-api-headers') as {
  symbols: Record<string, { js_native_api_symbols: string[]; node_api_symbols: string[] }>
}
const LEVEL = 8

/** Names are kept as C strings, whatever the system's format; on macOS with an underscore before them. */
function namesIn(bytes: Buffer): Set<string> {
  const text = bytes.toString('latin1')
  return new Set(Array.from(text.matchAll(/(?<=\0_?)(?:napi|node_api)_[a-z0-9_]+(?=\0)/g), ([name]) => name))
}

function addon(): Buffer {
  require('../index.js')
  const path = Object.keys(require.cache).find((file) => file.endsWith('.node'))
  return readFileSync(
    path ?? fileURLToPath(new URL(`../wasm-molt.${process.platform}-${process.arch}-gnu.node`, import.meta.url)),
  )
}

const at = (level: number): Set<string> => {
  const { js_native_api_symbols: ofJs = [], node_api_symbols: ofNode = [] } = symbols[`v${level}`] ?? {}
  return new Set([...ofJs, ...ofNode])
}

test(`the addon calls nothing of Node-API that is newer than level ${LEVEL}, and something that is no older`, () => {
  const names = namesIn(addon())
  const known = at(10)
  const called = [...names].filter((name) => known.has(name))
  assert.ok(called.includes('napi_create_function'), `only ${called.length} names were found`)
  const [allowed, older] = [at(LEVEL), at(LEVEL - 1)]
  assert.deepEqual(
    called.filter((name) => !allowed.has(name)),
    [],
  )
  assert.deepEqual(called.filter((name) => !older.has(name)).sort(), [
    'napi_add_async_cleanup_hook',
    'napi_check_object_type_tag',
    'napi_remove_async_cleanup_hook',
    'napi_type_tag_object',
  ])
  // Experimental ones are of no level at all.
  const exported = /^napi_register_module_v1$/
  assert.deepEqual(
    [...names].filter((name) => !known.has(name) && !exported.test(name)),
    [],
  )
})

test('the level is the one that Cargo.toml asks for', () => {
  const manifest = readFileSync(new URL('../Cargo.toml', import.meta.url), 'utf8')
  const [, features] = /^napi = .*features = \[(.*)\]/m.exec(manifest) ?? []
  assert.equal(features, `"napi${LEVEL}"`)
  assert.ok(Number(process.versions.napi) >= LEVEL, `this runtime has level ${process.versions.napi}`)
})
