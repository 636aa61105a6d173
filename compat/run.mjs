// node compat/run.mjs [package …] [--rounds 50] [--leaks 500] [--early] [--json file]
// Real packages on Node's engine and on ours: the same results, also after reloads and resets in mid-use, and bounded memory.
// Each engine has a process of its own for each package, so that a crash is one line of the table.
import { fork } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { setImmediate as turn } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { names, open, packageOf } from './engines.mjs'
import { packageName, versionOf } from './inputs.mjs'

const INPUTS = 10
/** How many leaking calls lie between two resets (and four times as many between two reloads). */
const LEAKS_PER_RESET = 25
const STEP_TIMEOUT_MS = 120_000
/** 'early' is tried on demand: resets to a snapshot that is older than the first use. */
const STEPS = ['loads', 'results', 'reloads', 'resets', 'bounded']

/**
 * @typedef {{ step: string, message: string, stack: string[] }} Failure
 * @typedef {object} Row
 * @property {string} name
 * @property {string} npm What the package is called there.
 * @property {string} version
 * @property {string} toolchain
 * @property {string} notes
 * @property {Record<string, 'ok' | 'fails' | 'not tried'>} steps those of STEPS, and early
 * @property {{ before: number, after: number }} [node] Bytes of linear memory around the leaking calls, on Node's engine.
 * @property {{ before: number, peak: number, afterReset: number, afterReload: number }} [molt] The same on ours, with resets, then reloads.
 * @property {Failure[]} failures
 * @property {string[]} warnings
 */

if (process.argv[2] === '--child') await child(process.argv[3], process.argv[4], JSON.parse(process.argv[5]))
else await main()

// ---------------------------------------------------------------- the parent

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      rounds: { type: 'string', default: '50' },
      leaks: { type: 'string', default: '500' },
      early: { type: 'boolean', default: false },
      json: { type: 'string' },
    },
  })
  const unknown = positionals.filter((name) => !names.includes(name))
  if (unknown.length > 0) {
    console.error(`no package "${unknown[0]}"; there are ${names.join(', ')}`)
    process.exit(2)
  }
  const size = { rounds: Number(values.rounds), leaks: Number(values.leaks), early: values.early }
  /** @type {Row[]} */
  const rows = []
  for (const name of positionals.length > 0 ? positionals : names) {
    process.stderr.write(`${name} …\n`)
    rows.push(await compare(name, size))
  }
  print(rows)
  if (values.json)
    writeFileSync(values.json, `${JSON.stringify({ ...size, node: process.version, rows }, undefined, 2)}\n`)
  if (rows.some((row) => row.failures.length > 0)) process.exitCode = 1
}

/** @returns {Promise<Row>} */
async function compare(name, size) {
  const { toolchain, notes, grows } = await packageOf(name)
  const native = await inChild('node', name, size)
  const ours = await inChild('molt', name, { ...size, expected: native.data.results })
  const steps = {}
  for (const step of size.early ? [...STEPS, 'early'] : STEPS) {
    steps[step] = ours.failures.some((failure) => failure.step === step)
      ? 'fails'
      : ours.data[step]
        ? 'ok'
        : 'not tried'
  }
  const failures = [
    ...native.failures.map((failure) => ({ ...failure, step: `node: ${failure.step}` })),
    ...ours.failures,
  ]
  const [node, molt] = [native.data.bounded, ours.data.bounded]
  if (node && molt) {
    const wrong = unbounded(node, molt, grows)
    if (wrong) {
      steps.bounded = 'fails'
      failures.push({ step: 'bounded', message: wrong, stack: [] })
    }
  }
  return {
    name,
    npm: packageName(name),
    version: versionOf(name),
    toolchain,
    notes,
    steps,
    node,
    molt,
    failures,
    warnings: ours.warnings,
  }
}

/** What is wrong with our memory, seeing what Node's did in as many calls. */
function unbounded(node, molt, grows) {
  const grown = node.after - node.before
  if (grows && grown <= 0) return `it should grow on Node, but stayed at ${mib(node.after)}`
  if (molt.afterReset > molt.before)
    return `${mib(molt.before)} when the snapshot was taken, ${mib(molt.afterReset)} after the last reset`
  if (grows === true && molt.peak - molt.before >= grown)
    return `grew by ${mib(molt.peak - molt.before)}, on Node by ${mib(grown)}`
  if (molt.afterReload > molt.before) return `${mib(molt.afterReload)} after the last reload`
  return undefined
}

/** Runs the steps of one engine; whatever ends the process early is the failure of the step that was under way. */
function inChild(engine, name, task) {
  return new Promise((resolve) => {
    const found = { data: {}, failures: [], warnings: [] }
    let step = 'loads'
    let said = ''
    let timer
    const process_ = fork(fileURLToPath(import.meta.url), ['--child', engine, name, JSON.stringify(task)], {
      execArgv: ['--expose-gc'],
      stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
    })
    const watch = () => {
      clearTimeout(timer)
      timer = setTimeout(() => process_.kill('SIGKILL'), STEP_TIMEOUT_MS)
    }
    watch()
    for (const stream of [process_.stdout, process_.stderr])
      stream.on('data', (chunk) => (said = `${said}${chunk}`.slice(-4_000)))
    process_.on('message', (message) => {
      watch()
      if (message.begin) step = message.begin
      if (message.done) found.data[message.done] = message.data ?? true
      if (message.failure) found.failures.push(message.failure)
      if (message.warning) found.warnings.push(message.warning)
      if (message.end) step = undefined
    })
    process_.on('close', (code, signal) => {
      clearTimeout(timer)
      if (step !== undefined || signal) {
        const how =
          signal === 'SIGKILL'
            ? `nothing for ${STEP_TIMEOUT_MS / 1e3} s`
            : `the process ended: ${signal ?? `exit code ${code}`}`
        const stack = said.trim().split('\n').slice(-40)
        found.failures.push({ step: step ?? 'end', message: how, stack })
      }
      resolve(found)
    })
  })
}

/** @param {Row[]} rows */
function print(rows) {
  const sign = { ok: 'yes', fails: 'NO', 'not tried': '–' }
  const lines = [
    ['package', 'toolchain', 'loads', 'results', 'reloads', 'resets', 'bounded', 'memory on Node', 'memory here'],
  ]
  for (const { name, version, toolchain, steps, node, molt } of rows) {
    lines.push([
      ...[`${name} ${version}`, toolchain],
      ...STEPS.map((step) => sign[steps[step]]),
      node ? `${mib(node.before)} → ${mib(node.after)}` : '–',
      molt ? `${mib(molt.before)} → ${mib(molt.peak)} → ${mib(molt.afterReset)}` : '–',
    ])
  }
  const widths = lines[0].map((_, column) => Math.max(...lines.map((line) => line[column].length)))
  for (const line of lines)
    console.log(
      line
        .map((cell, column) => cell.padEnd(widths[column]))
        .join('  ')
        .trimEnd(),
    )
  for (const { name, failures, warnings } of rows) {
    for (const { step, message, stack } of failures) {
      console.log(`\n${name}, ${step}: ${message}`)
      for (const line of stack) console.log(`    ${line}`)
    }
    for (const warning of warnings) console.log(`\n${name}, warning: ${warning}`)
  }
}

function mib(bytes) {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`
}

// ---------------------------------------------------------------- the child

async function child(engine, name, task) {
  const pkg = await packageOf(name)
  process.on('warning', (warning) => process.send({ warning: `${warning.name}: ${warning.message}` }))
  await (engine === 'node' ? onNode(pkg, task) : onMolt(pkg, task))
  // Disconnected at once, it would lose what is not sent yet.
  await new Promise((sent) => process.send({ end: true }, sent))
  process.disconnect()
}

async function onNode(pkg, { leaks }) {
  let side
  const ready = await attempt('loads', async () => {
    side = await open('node', pkg, { watch: true })
  })
  if (!ready) return
  await attempt('results', () => results(pkg, side.module()))
  await attempt('bounded', async () => {
    const before = side.memoryBytes()
    for (let i = 0; i < leaks; i++) {
      pkg.leak(side.module(), i)
      // Finalizers get their chance, as they would in a program that waits for something now and then.
      if (i % LEAKS_PER_RESET === 0) await turn()
    }
    return { before, after: side.memoryBytes() }
  })
}

async function onMolt(pkg, { rounds, leaks, early, expected }) {
  let side
  const load = async () => {
    side = await open('molt', pkg)
  }
  if (!(await attempt('loads', load))) return
  /** A step that failed leaves nothing to the next one. */
  const step = async (name, run) => {
    if (await attempt(name, run)) return
    try {
      await side.close()
    } catch {}
    await load()
  }
  const right = (i, module = side.module(), when = '') => {
    const [wanted, got] = [expected[i % INPUTS], JSON.stringify(pkg.work(module, i % INPUTS))]
    if (got !== wanted) throw new Error(`work(${i % INPUTS})${when}: ${difference(wanted, got)}`)
  }

  await step('results', () => {
    const found = results(pkg, side.module())
    for (const [i, wanted] of expected.entries()) {
      if (found[i] !== wanted)
        throw new Error(`${i < INPUTS ? `work(${i})` : 'workSmall'}: ${difference(wanted, found[i])}`)
    }
    return true
  })

  await step('reloads', async () => {
    const kept = side.module()
    for (let round = 0; round < rounds; round++) {
      right(round)
      leave(pkg, side, round)
      await side.reload()
      right(round + 1, round % 2 ? kept : side.module(), ` after reload ${round + 1}`)
      await collect(round)
    }
    right(0, kept, ' after the last reload and a collection')
    return true
  })

  await step('resets', async () => {
    // Glue allocates when something is used for the first time: warm-up makes that part of the snapshot.
    for (let i = 0; i < INPUTS; i++) right(i)
    pkg.workSmall(side.module(), 0)
    await side.snapshot()
    const kept = side.module()
    for (let round = 0; round < rounds; round++) {
      right(round)
      for (let n = 0; n < 3; n++) leave(pkg, side, round * 3 + n)
      await side.reset()
      right(round + 1, round % 2 ? kept : side.module(), ` after reset ${round + 1}`)
      await collect(round)
    }
    right(0, kept, ' after the last reset and a collection')
    return true
  })

  await step('bounded', async () => {
    const warm = () => {
      for (let i = 0; i < INPUTS; i++) right(i)
    }
    warm()
    await side.snapshot()
    await side.reset()
    const before = side.memoryBytes()
    let peak = before
    const run = async (every, clean) => {
      for (let i = 0; i < leaks; i++) {
        pkg.leak(side.module(), i)
        peak = Math.max(peak, side.memoryBytes())
        if ((i + 1) % every === 0) {
          await clean()
          right(i, side.module(), ` after ${i + 1} leaking calls`)
        }
      }
      await clean()
      return side.memoryBytes()
    }
    const afterReset = await run(LEAKS_PER_RESET, () => side.reset())
    const afterReload = await run(LEAKS_PER_RESET * 4, () => side.reload())
    return { before, peak, afterReset, afterReload }
  })

  if (early) {
    await step('early', async () => {
      await side.close()
      await load()
      await side.snapshot()
      for (let round = 0; round < rounds; round++) {
        right(round)
        leave(pkg, side, round)
        await side.reset()
        right(round + 1, side.module(), ` after reset ${round + 1}, to a snapshot from before the first use`)
        await collect(round)
      }
      return true
    })
  }

  await attempt('close', () => side.close())
}

/** What a program forgets, so that a finalizer finds it after the memory that it lay in is another. */
function leave(pkg, side, i) {
  pkg.leak(side.module(), i)
}

async function collect(round) {
  if (round % 5 !== 4) return
  globalThis.gc()
  await turn()
  await turn()
}

function results(pkg, module) {
  const found = Array.from({ length: INPUTS }, (_, i) => JSON.stringify(pkg.work(module, i)))
  found.push(JSON.stringify(pkg.workSmall(module, 0)))
  return found
}

/** Where two results part. */
function difference(wanted, got = 'undefined') {
  let at = 0
  while (at < wanted.length && wanted[at] === got[at]) at++
  const around = (text) => text.slice(Math.max(0, at - 20), at + 40)
  return `Node says ${around(wanted)}, here it is ${around(got)}`
}

/** Runs a step and tells the parent how it went. @returns {Promise<boolean>} */
async function attempt(step, run) {
  process.send({ begin: step })
  try {
    process.send({ done: step, data: await run() })
    return true
  } catch (error) {
    process.send({ failure: { step, ...told(error) } })
    return false
  }
}

function told(error) {
  if (!(error instanceof Error)) return { message: `threw ${String(error)}`, stack: [] }
  const stack = error.stack?.split('\n').filter((line) => /^\s+at /.test(line)) ?? []
  const code = error.code ? `${error.code}: ` : ''
  const cause =
    error.cause instanceof Error ? ` (cause: ${error.cause.message}, ${error.cause.stack?.split('\n')[1]?.trim()})` : ''
  return { message: `${code}${error.message}${cause}`, stack: stack.slice(0, 5).map((line) => line.trim()) }
}
