// npm run test:runtimes [-- node20 node22 node24 node26 bun deno]: the JS tests on other runtimes, or on all of them.
// --file reload (may be repeated): only these specs. --jobs N: that many specs at a time. --save: writes what came out
// into docs/runtimes.md. --update: writes what failed into scripts/runtimes-expected.json, where each needs a reason.
// --check runs nothing, and says whether that page has a row for each of the present versions, and the present reasons.
// Each spec has a process to itself. What fails must be listed there, and what is listed must fail; a crash is no
// difference that could be listed.
import { spawn } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join, relative } from 'node:path'
import { parseArgs } from 'node:util'
import sax from 'sax'
import { programOf, programs } from './programs.mjs'
import { buildAddon, ensureDependencies, fail, files, jobs, root, step } from './tools.mjs'

const expectedPath = join(root, 'scripts/runtimes-expected.json')
const docsPath = join(root, 'docs/runtimes.md')
const MARKS = ['<!-- runtimes:begin -->', '<!-- runtimes:end -->']
const KINDS = ['differs', 'does not apply']
/** Of one test; the runners of Node and Bun are told, that of Deno goes by the tests' own limits. */
const TEST_MS = 120_000
/** Of one spec. */
const SPEC_MS = 900_000
/** What says so in the report of a test whose child process it was. */
const CRASH = /\bSIG(SEGV|BUS|ILL|ABRT|TRAP|FPE|SYS)\b|Segmentation fault|has crashed|has panicked|panicked at/

/** How each runs one spec and leaves a report in JUnit's form; its `gc` is for the tests of what is collected. */
const runners = {
  Node: (spec, report) => [
    ...['--expose-gc', '--import', 'tsx', `--test-timeout=${TEST_MS}`],
    ...['--test-reporter=junit', `--test-reporter-destination=${report}`, spec],
  ],
  Bun: (spec, report) => [
    ...['test', '--preload', './__test__/bun.ts', '--timeout', `${TEST_MS}`],
    ...['--reporter=junit', `--reporter-outfile=${report}`, `./${spec}`],
  ],
  Deno: (spec, report) => [
    ...['test', '--allow-all', '--no-check', '--no-lock', '--v8-flags=--expose-gc', `--junit-path=${report}`, spec],
  ],
}

const { values: options, positionals } = read()
if (options.check) {
  check()
  process.exit()
}
const named = positionals.length > 0 ? positionals : Object.keys(programs)
const specs = files('__test__', (path) => path.endsWith('.spec.ts')).filter(isPicked)
if (specs.length === 0) fail(`no spec is called ${options.file.join(' or ')}`)
if (options.save && options.file) fail('--save wants all specs')
const atOnce = options.jobs === undefined ? jobs : Number(options.jobs)
if (!(atOnce >= 1)) fail(`--jobs must be a number from 1 on, and is ${options.jobs}`)

ensureDependencies()
buildAddon()
const homes = new Map(named.map((name) => [name, programOf(name)]))
const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-runtimes-'))
const ran = []
try {
  for (const name of named) ran.push(await runAll(name))
} finally {
  rmSync(folder, { recursive: true, force: true })
}
if (options.update) update()
const table = ran.map(rowOf)
console.log(`\n${layout(table)}`)
const surprises = options.update ? [] : ran.flatMap(surprisesOf)
const crashes = ran.flatMap(({ name, tests }) =>
  tests.filter((one) => one.isCrash).map((one) => `${name}: ${say(one)}`),
)
if (crashes.length > 0) fail(`crashed:\n${crashes.join('\n')}`)
if (surprises.length > 0) fail(`not as ${relative(root, expectedPath)} says:\n${surprises.join('\n')}`)
// Only what is as it should be is published.
if (options.save) save()

function read() {
  const options = {
    file: { type: 'string', multiple: true },
    jobs: { type: 'string' },
    save: { type: 'boolean', default: false },
    update: { type: 'boolean', default: false },
    check: { type: 'boolean', default: false },
  }
  try {
    return parseArgs({ allowPositionals: true, options })
  } catch (error) {
    const usage = `npm run test:runtimes -- [${Object.keys(programs).join(' | ')}] [--file …] [--jobs N] [--save] [--update] [--check]`
    return fail(`${error.message}\n${usage}`)
  }
}

function isPicked(spec) {
  return options.file === undefined || options.file.some((file) => basename(file, '.spec.ts') === nameOf(spec))
}

function nameOf(spec) {
  return basename(spec, '.spec.ts')
}

// ---------------------------------------------------------------- running

async function runAll(name) {
  const { title, version } = programs[name]
  step(`${title} ${version}`)
  const since = performance.now()
  const waiting = [...specs]
  const tests = []
  const worker = async () => {
    for (let spec = waiting.shift(); spec !== undefined; spec = waiting.shift()) {
      const results = await runOne(name, spec)
      tests.push(...results)
      const passed = results.filter(({ state }) => state === 'passed').length
      console.log(`${name} ${nameOf(spec)}: ${passed} of ${results.length}`)
    }
  }
  await Promise.all(Array.from({ length: atOnce }, worker))
  return { name, tests, seconds: (performance.now() - since) / 1000 }
}

/** The tests of a spec, or one that stands for the file where it has left no report. */
async function runOne(name, spec) {
  const report = join(folder, `${name}-${nameOf(spec)}.xml`)
  const { said, end } = await run(homes.get(name), runners[programs[name].title](spec, report))
  const tests = existsSync(report) ? parse(readFileSync(report, 'utf8')) : []
  const isWell = end === 0 || (end === 1 && tests.some(isFailed))
  if (!isWell) {
    const isCrash = typeof end === 'string' || end > 128
    tests.push({ name: '(the file)', state: 'failed', message: `ended with ${end}: ${said}`, isCrash })
  }
  return tests.map((test) => ({ ...test, file: nameOf(spec), isCrash: test.isCrash ?? CRASH.test(test.message) }))
}

/** What a process says last, and how it ends: a code, a signal, or that it had to be ended. */
function run(command, args) {
  return new Promise((settle, reject) => {
    // A group of its own, so that what hangs is ended with its children.
    const child = spawn(command, args, {
      cwd: root,
      detached: true,
      env: environment(),
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    let said = ''
    let isLate = false
    const timer = setTimeout(() => {
      isLate = true
      process.kill(-child.pid, 'SIGKILL')
    }, SPEC_MS)
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text) => {
        said = (said + text).slice(-4000)
      })
    }
    child.on('error', reject)
    child.on('close', (code, signal) => {
      clearTimeout(timer)
      settle({ said, end: isLate ? `no end within ${SPEC_MS / 1000} s` : (signal ?? code) })
    })
  })
}

function environment() {
  const { NODE_OPTIONS: _, NODE_TEST_CONTEXT: __, ...env } = process.env
  return { ...env, NO_COLOR: '1' }
}

function isFailed({ state }) {
  return state === 'failed'
}

/** The tests in a report; those of a `describe` have its name before theirs, whoever writes it how. */
function parse(xml) {
  const tests = []
  const suites = []
  const parser = sax.parser(true)
  let test
  parser.onopentag = ({ name, attributes }) => {
    // Some suites are files: the spec, or the one of Deno's that runs what a `describe` holds.
    if (name === 'testsuite') suites.push(/\.spec\.ts$|^ext:/.test(attributes.name) ? undefined : attributes.name)
    else if (name === 'testcase') test = { name: pathOf(attributes.name), state: 'passed', message: '' }
    else if (name === 'failure' || name === 'error') {
      test.state = 'failed'
      test.message = attributes.message ?? ''
    } else if (name === 'skipped') test.state = 'skipped'
  }
  parser.ontext = (text) => {
    if (test?.state === 'failed') test.message += text
  }
  parser.onclosetag = (name) => {
    if (name === 'testsuite') suites.pop()
    else if (name === 'testcase') {
      tests.push(test)
      test = undefined
    }
  }
  const counts = new Map()
  const pathOf = (name) => {
    const path = [...suites.filter(Boolean), name].join(' > ')
    const count = (counts.get(path) ?? 0) + 1
    counts.set(path, count)
    return count === 1 ? path : `${path} (${count})`
  }
  parser.write(xml).close()
  // To Deno a `describe` is a test as well, which fails when one in it does.
  return tests.filter((one) => {
    const inside = tests.filter(({ name }) => name.startsWith(`${one.name} > `))
    return inside.length === 0 || (isFailed(one) && !inside.some(isFailed))
  })
}

// ---------------------------------------------------------------- what was expected

/** Groups of tests that come out differently for one reason: `{ runtimes, kind, why, tests: { file: [name] } }`. */
function readExpected() {
  return existsSync(expectedPath) ? JSON.parse(readFileSync(expectedPath, 'utf8')) : []
}

/** The group that lists a test of a runtime. */
function groupOf(groups, runtime, { file, name }) {
  return groups.find(({ runtimes, tests }) => runtimes.includes(runtime) && tests[file]?.includes(name))
}

function surprisesOf({ name: runtime, tests }) {
  const groups = readExpected()
  const surprises = []
  for (const test of tests) {
    const isListed = groupOf(groups, runtime, test) !== undefined
    if (test.state === 'failed' && !isListed) surprises.push(`${runtime}: failed: ${say(test)}`)
    if (test.state === 'skipped' && !isListed) surprises.push(`${runtime}: skipped: ${say(test)}`)
    if (test.state === 'passed' && isListed) surprises.push(`${runtime}: passed, and is listed: ${say(test)}`)
  }
  const has = (file, name) => tests.some((one) => one.file === file && one.name === name)
  for (const group of groups.filter(({ runtimes }) => runtimes.includes(runtime))) {
    for (const [file, names] of Object.entries(group.tests)) {
      if (!specs.some((spec) => nameOf(spec) === file)) continue
      for (const name of names) {
        if (!has(file, name)) surprises.push(`${runtime}: is listed, and did not run: ${file}: ${name}`)
      }
    }
  }
  // A runner that leaves a test out says nothing of it.
  const model = ran.find(({ name }) => programs[name].title === 'Node')
  for (const { file, name } of model?.tests ?? []) {
    if (!has(file, name)) surprises.push(`${runtime}: runs on ${model.name} and did not here: ${file}: ${name}`)
  }
  return surprises
}

function say({ file, name, message }) {
  return [`${file}: ${name}`, ...message.trim().split('\n').slice(0, 12)].join('\n    ')
}

/** What failed and is not listed gets into a group of what it said, for somebody to explain. */
function update() {
  const groups = readExpected()
  for (const { name: runtime, tests } of ran) {
    for (const test of tests.filter(({ state, isCrash }) => state !== 'passed' && !isCrash)) {
      if (groupOf(groups, runtime, test) !== undefined) continue
      const why = `to explain: ${test.message.trim().split('\n')[0].slice(0, 160)}`
      let group = groups.find((one) => one.why === why && one.runtimes.join() === runtime)
      if (group === undefined) {
        group = { runtimes: [runtime], kind: 'differs', why, tests: {} }
        groups.push(group)
      }
      group.tests[test.file] = [...(group.tests[test.file] ?? []), test.name]
    }
  }
  writeFileSync(expectedPath, `${JSON.stringify(groups, null, 2)}\n`)
}

// ---------------------------------------------------------------- the table

function rowOf({ name, tests, seconds }) {
  const groups = readExpected()
  const { title, version } = programs[name]
  const listed = (kind) => tests.filter((test) => groupOf(groups, name, test)?.kind === kind).length
  const passed = tests.filter(({ state }) => state === 'passed').length
  return [title, version, passed, ...KINDS.map(listed), `${Math.round(seconds)} s`].map(String)
}

function layout(rows) {
  const head = ['runtime', 'version', 'passed', 'differ', 'do not apply', 'took']
  return [head, head.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |`).join('\n')
}

/** The page around what is between the marks, and the rows that are there. */
function readPage() {
  const text = readFileSync(docsPath, 'utf8')
  const [begin, end] = MARKS.map((mark) => text.indexOf(mark))
  if (begin < 0 || end < begin) fail(`${relative(root, docsPath)} has lost its marks`)
  const between = text.slice(begin + MARKS[0].length, end)
  const rows = [...between.matchAll(/^\| (?:Node|Bun|Deno) \|.*$/gm)].map(([line]) => line.slice(2, -2).split(' | '))
  return { text, begin, end, between, rows }
}

function between(rows) {
  return `\n\n${[layout(rows), explain()].filter((part) => part !== '').join('\n\n')}\n\n`
}

/** Rows of runtimes that were not run stay. */
function save() {
  const { text, begin, end, rows: old } = readPage()
  const rows = Object.values(programs).flatMap(({ title, version }) => {
    const isIt = ([one, other]) => one === title && other === version
    const row = table.find(isIt) ?? old.find(isIt)
    return row === undefined ? [] : [row]
  })
  writeFileSync(docsPath, text.slice(0, begin + MARKS[0].length) + between(rows) + text.slice(end))
}

function check() {
  const remedy = 'Run: npm run test:runtimes -- --save'
  const { between: present, rows } = readPage()
  const groups = readExpected()
  for (const [name, { title, version }] of Object.entries(programs)) {
    const row = rows.find(([one, other]) => one === title && other === version)
    if (row === undefined) fail(`${relative(root, docsPath)} has no row for ${title} ${version}. ${remedy}`)
    const counts = KINDS.map((kind) => {
      const here = groups.filter((group) => group.kind === kind && group.runtimes.includes(name))
      return String(here.flatMap(({ tests }) => Object.values(tests).flat()).length)
    })
    if (counts.join() !== row.slice(3, 5).join()) {
      fail(
        `${title} ${version}: ${counts.join(' and ')} tests are listed, the page says ${row.slice(3, 5).join(' and ')}. ${remedy}`,
      )
    }
  }
  const open = groups.find(({ why }) => why.startsWith('to explain'))
  if (open !== undefined) fail(`${relative(root, expectedPath)} has no reason yet for ${JSON.stringify(open.tests)}`)
  if (present !== between(rows)) fail(`${relative(root, docsPath)} is not what would be written. ${remedy}`)
  console.log('runtimes: the page is up to date')
}

/** Each reason once, with how many tests of which specs it is about. */
function explain() {
  return readExpected()
    .map(({ runtimes, kind, why, tests }) => {
      const titles = [...new Set(runtimes.map((name) => programs[name].title))].join(', ')
      const where = Object.entries(tests).map(([file, names]) => `${file} ${names.length}`)
      return `- **${titles}, ${kind}:** ${why} (${where.join(', ')})`
    })
    .join('\n')
}
