// node scripts/js-api.mjs <checkout of WebAssembly/spec> [--engine node|molt|<file>] [--filter text] [--verbose] [--update]
// Runs the official JS-API suite (test/js-api) on our namespace, or on Node's own. The suite is not in this repository:
//   git clone --depth 1 https://github.com/WebAssembly/spec
// idlharness is no part of it there. What a test leaves on the global object must not reach the next file, and a crash
// must not end the run: so each file has a process to itself.
import { spawn } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, relative, resolve, sep } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { fail, root } from './tools.mjs'

const expectedPath = join(root, 'scripts/js-api-expected.json')
// limits.any.js alone takes minutes: a million functions, a module of a gigabyte.
const TIMEOUT_MS = 900_000

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    engine: { type: 'string', default: 'molt' },
    filter: { type: 'string' },
    verbose: { type: 'boolean', default: false },
    update: { type: 'boolean', default: false },
    file: { type: 'string' },
  },
})
const suite = join(resolve(positionals[0] ?? '.'), 'test/js-api')
if (!existsSync(suite)) fail(`there is no test/js-api in ${positionals[0] ?? 'the current folder'}. ${usage()}`)

function usage() {
  return 'usage: node scripts/js-api.mjs <checkout of WebAssembly/spec> [--engine node|molt] [--filter text] [--verbose] [--update]'
}

async function main() {
  const files = readdirSync(suite, { recursive: true })
    .filter((file) => file.endsWith('.any.js'))
    .map((file) => file.replaceAll(sep, '/'))
    .filter((file) => options.filter === undefined || file.includes(options.filter))
    .sort()
  const expected = options.engine === 'molt' ? readExpected() : undefined
  const failures = []
  const surprises = []
  let passed = 0
  let total = 0
  for (const file of files) {
    const results = await resultsOf(file)
    const failed = results.filter((result) => result.message !== undefined)
    passed += results.length - failed.length
    total += results.length
    failures.push(...failed.map((result) => ({ file, ...result })))
    console.log(`${file}: ${results.length - failed.length} of ${results.length}`)
    for (const { name, message } of results) {
      const isKnown = expected?.get(file)?.has(name) ?? false
      const isFailure = message !== undefined
      if (options.verbose && isFailure) console.log(`  failed: ${name}\n    ${message.replaceAll('\n', '\n    ')}`)
      if (expected === undefined || isKnown === isFailure) continue
      surprises.push(
        isFailure ? `failed: ${file}: ${name}: ${message}` : `passed, is listed as failing: ${file}: ${name}`,
      )
    }
    for (const name of expected?.get(file)?.keys() ?? []) {
      if (!results.some((result) => result.name === name))
        surprises.push(`is listed, but did not run: ${file}: ${name}`)
    }
  }
  console.log(`js-api: ${passed} passed, ${total - passed} failed of ${total}`)
  if (options.update && expected !== undefined) {
    writeExpected(failures, expected)
  } else if (surprises.length > 0) {
    fail(`not as scripts/js-api-expected.json says:\n${surprises.join('\n')}`)
  }
}

/** Which tests fail, and why: by file, then by name. */
function readExpected() {
  const groups = existsSync(expectedPath) ? JSON.parse(readFileSync(expectedPath, 'utf8')) : []
  const expected = new Map()
  for (const { file, why, tests } of groups) {
    if (!expected.has(file)) expected.set(file, new Map())
    for (const name of tests) expected.get(file).set(name, why)
  }
  return expected
}

/** One group for each file and reason; a new one's reason is what the test said, for somebody to replace. */
function writeExpected(failures, known) {
  const groups = new Map()
  const add = (file, why, name) => {
    const key = JSON.stringify([file, why])
    if (!groups.has(key)) groups.set(key, { file, why, tests: [] })
    groups.get(key).tests.push(name)
  }
  const fails = (file, name) => failures.some((one) => one.file === file && one.name === name)
  // What a filter has left out stays.
  const ran = (file) => options.filter === undefined || file.includes(options.filter)
  for (const [file, tests] of known) {
    for (const [name, why] of tests) if (!ran(file) || fails(file, name)) add(file, why, name)
  }
  for (const { file, name, message } of failures) {
    if (!known.get(file)?.has(name)) add(file, `to explain: ${message.split('\n')[0].slice(0, 200)}`, name)
  }
  const sorted = [...groups.values()].sort((a, b) => (a.file < b.file ? -1 : a.file > b.file ? 1 : 0))
  writeFileSync(expectedPath, `${JSON.stringify(sorted, null, 2)}\n`)
  console.log(`wrote ${relative(root, expectedPath)}`)
}

/** What the file's own process has to tell. */
function resultsOf(file) {
  return new Promise((settle) => {
    const args = [fileURLToPath(import.meta.url), dirname(dirname(suite)), '--engine', options.engine, '--file', file]
    const child = spawn(process.execPath, [...process.execArgv, ...args], {
      stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
      timeout: TIMEOUT_MS,
    })
    const results = []
    let isComplete = false
    let said = ''
    child.stderr.on('data', (chunk) => {
      said = (said + chunk).slice(-2000)
    })
    child.on('message', (message) => {
      if (message.isComplete) isComplete = true
      else results.push(message)
    })
    child.on('close', (code, signal) => {
      if (!isComplete) results.push({ name: '(the file)', message: `ended early (${signal ?? code}): ${said}` })
      settle(results)
    })
  })
}

/** Runs a file with a harness that has of testharness.js what the suite uses. */
async function runFile(file) {
  // At once: a crash must not take along what is known by then.
  const report = (result) => new Promise((sent) => process.send(result, sent))
  const pending = []
  const names = new Map()

  const uniqueName = (name = 'unnamed') => {
    const count = (names.get(name) ?? 0) + 1
    names.set(name, count)
    return count === 1 && name !== 'unnamed' ? name : `${name} (${count})`
  }
  const failed = (name, error) => ({ name, message: `${error?.stack ?? format(error)}` })
  const context = () => {
    const cleanups = []
    return {
      cleanups,
      add_cleanup: (cleanup) => cleanups.push(cleanup),
      unreached_func: (description) => () => harness.assert_unreached(description),
      step_func: (step) => step,
    }
  }

  // A promise that nobody looks at is a failed assertion all the same.
  process.on('unhandledRejection', (error) => report(failed(uniqueName('(unhandled rejection)'), error)))

  const harness = {
    ...assertions,
    setup: (...args) => {
      const run = args.find((arg) => typeof arg === 'function')
      try {
        run?.()
      } catch (error) {
        report(failed(uniqueName('(setup)'), error))
      }
    },
    test: (run, name) => {
      const unique = uniqueName(name)
      const t = context()
      try {
        run(t)
        report({ name: unique })
      } catch (error) {
        report(failed(unique, error))
      } finally {
        for (const cleanup of t.cleanups) cleanup()
      }
    },
    promise_test: (run, name) => {
      const unique = uniqueName(name)
      pending.push(async () => {
        const t = context()
        try {
          await run(t)
          report({ name: unique })
        } catch (error) {
          report(failed(unique, error))
        } finally {
          for (const cleanup of t.cleanups) await cleanup()
        }
      })
    },
  }

  const global = Object.defineProperty({}, 'WebAssembly', {
    value: engine(),
    writable: true,
    enumerable: false,
    configurable: true,
  })
  try {
    const run = new Function('WebAssembly', 'self', ...Object.keys(harness), `${sourceOf(file)}\n//# sourceURL=${file}`)
    run.call(global, global.WebAssembly, global, ...Object.values(harness))
  } catch (error) {
    report(failed(uniqueName('(the file)'), error))
  }
  for (const run of pending) await run()
  // What was started beside the tests, and what it rejects.
  await new Promise((done) => setTimeout(done, 50))
  await report({ isComplete: true })
  process.exit()
}

function engine() {
  if (options.engine === 'node') return globalThis.WebAssembly
  const path = options.engine === 'molt' ? join(root, 'index.js') : resolve(options.engine)
  const { WebAssembly } = createRequire(import.meta.url)(path)
  if (WebAssembly === undefined) throw new Error(`${path} exports no WebAssembly`)
  // The package fills it at its first use.
  WebAssembly.validate(new Uint8Array(0))
  return WebAssembly
}

/** The file with what it includes, in one scope, as in a browser. */
function sourceOf(file) {
  const source = readFileSync(join(suite, file), 'utf8')
  const includes = [...source.matchAll(/^\/\/ META: script=(.*)$/gm)].map(([, path]) =>
    path.startsWith('/wasm/jsapi/') ? path.slice('/wasm/jsapi/'.length) : join(dirname(file), path),
  )
  return [...includes.map((path) => readFileSync(join(suite, path.trim()), 'utf8')), source].join('\n')
}

function format(value) {
  if (typeof value === 'string') return JSON.stringify(value)
  if (typeof value === 'bigint') return `${value}n`
  if (Object.is(value, -0)) return '-0'
  if (Array.isArray(value)) return `[${value.map(format).join(', ')}]`
  if (typeof value === 'object' && value !== null) return `object "${tryString(value)}"`
  if (typeof value === 'function') return `function "${value.name}"`
  return String(value)
}

function tryString(value) {
  try {
    return String(value)
  } catch {
    return Object.prototype.toString.call(value)
  }
}

function assert(holds, what, description) {
  if (!holds) throw new Error(`${description === undefined ? '' : `${description}: `}${what}`)
}

function thrownBy(run, description) {
  try {
    run()
  } catch (error) {
    return error
  }
  throw new Error(`${description === undefined ? '' : `${description}: `}it did not throw`)
}

function assertError(error, Class, description) {
  const isOne = Object(error) === error && error.constructor === Class
  assert(isOne, `threw ${error?.stack ?? format(error)}, expected a ${Class.name}`, description)
}

function assertNamed(error, wanted, description) {
  assert(error?.name === wanted.name, `threw ${format(error)}, expected a ${wanted.name}`, description)
}

const assertions = {
  format_value: format,
  assert_true: (actual, description) => assert(actual === true, `expected true, is ${format(actual)}`, description),
  assert_false: (actual, description) => assert(actual === false, `expected false, is ${format(actual)}`, description),
  assert_equals: (actual, expected, description) =>
    assert(Object.is(actual, expected), `expected ${format(expected)}, is ${format(actual)}`, description),
  assert_not_equals: (actual, expected, description) =>
    assert(!Object.is(actual, expected), `expected anything but ${format(expected)}`, description),
  assert_array_equals: (actual, expected, description) => {
    const isSame = actual.length === expected.length && expected.every((one, index) => Object.is(actual[index], one))
    assert(isSame, `expected ${format([...expected])}, is ${format([...actual])}`, description)
  },
  assert_unreached: (description) => assert(false, 'reached what must not be reached', description),
  assert_class_string: (object, name, description) =>
    assertions.assert_equals(Object.prototype.toString.call(object), `[object ${name}]`, description),
  assert_own_property: (object, name, description) =>
    assert(Object.hasOwn(object, name), `expected the property ${String(name)}`, description),
  assert_not_own_property: (object, name, description) =>
    assert(!Object.hasOwn(object, name), `expected no property ${String(name)}`, description),
  assert_throws_js: (Class, run, description) => assertError(thrownBy(run, description), Class, description),
  assert_throws_exactly: (wanted, run, description) =>
    assert(Object.is(thrownBy(run, description), wanted), `expected that it throws ${format(wanted)}`, description),
  assert_throws: (wanted, run, description) => assertNamed(thrownBy(run, description), wanted, description),
  promise_rejects_js: async (_test, Class, promise, description) =>
    assertError(await rejectionOf(promise, description), Class, description),
  promise_rejects: async (_test, wanted, promise, description) =>
    assertNamed(await rejectionOf(promise, description), wanted, description),
}

function rejectionOf(promise, description) {
  return promise.then(
    () => assert(false, 'it did not reject', description),
    (error) => error,
  )
}

if (options.file === undefined) await main()
else await runFile(options.file)
