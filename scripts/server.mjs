// node scripts/server.mjs [test file …]: the example server and the telemetry recipes, tested with the libraries that they are for.
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { buildAddon, ensureDependencies, fail, files, node, root, step } from './tools.mjs'

const words = process.argv.slice(2)
const tests = words.length > 0 ? words : files('examples/server/test', (path) => path.endsWith('.test.mjs'))
const missing = tests.filter((path) => !existsSync(join(root, path)))
if (missing.length > 0) fail(`no such test file: ${missing.join(', ')}`)

if (!readdirSync(root).some((name) => /^wasm-molt\..*\.node$/.test(name))) buildAddon()
ensureDependencies(join(root, 'examples', 'server'))
step('example server and telemetry recipes')
// A server that hangs must fail, not wait. One file after the other: each takes both cores.
node(['--test', '--test-reporter=spec', '--test-timeout=120000', '--test-concurrency=1', ...tests])
