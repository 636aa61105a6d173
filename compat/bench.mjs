// node compat/bench.mjs [package …] [--json] [--rounds 3] [--ms 1500]
// The same glue on Node's engine and on ours, in one run. Engines alternate, each in a process of its own, so that what the machine
// does meanwhile and what one engine leaves in a process (code, collected memory) weighs on both alike.
import { fork } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { availableParallelism, cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { addon, names, open, packageOf } from './engines.mjs'
import { versionOf, withoutDigests } from './inputs.mjs'

const INPUTS = 10
const RELOADS = 10

if (process.argv[2] === '--child') await child(JSON.parse(process.argv[3]))
else await main()

// ---------------------------------------------------------------- the parent

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      json: { type: 'boolean', default: false },
      rounds: { type: 'string', default: '3' },
      ms: { type: 'string', default: '1500' },
    },
  })
  const rounds = Number(values.rounds)
  const packages = []
  for (const name of positionals.length > 0 ? positionals : names) {
    process.stderr.write(`${name} …\n`)
    packages.push(await measure(name, rounds, Number(values.ms)))
  }
  const whole = packages.filter((figures) => figures.error === undefined)
  const machine = { cpu: cpus()[0]?.model, threads: availableParallelism(), node: process.version }
  const report = {
    ...machine,
    rounds,
    /** Above 1 is faster than Node's engine. */
    warmSpeed: geometricMean(whole.map(({ work }) => work.speed)),
    smallSpeed: geometricMean(whole.map(({ small }) => small.speed)),
    /** Below 1 is sooner than Node's. */
    coldFromCache: geometricMean(whole.map(({ cold }) => cold.cached / cold.node)),
    packages,
  }
  if (values.json) console.log(JSON.stringify(report, undefined, 2))
  else print(report)
  if (whole.length < packages.length) process.exitCode = 1
}

async function measure(name, rounds, ms) {
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-bench-'))
  try {
    const version = versionOf(name)
    const warm = { node: [], molt: [] }
    const cold = { node: [], cached: [], uncached: [] }
    // Fills the folder; nothing of it counts.
    await run({ name, engine: 'molt', what: 'cold', cache: folder })
    for (let round = 0; round < rounds; round++) {
      warm.node.push(await run({ name, engine: 'node', what: 'warm', ms }))
      warm.molt.push(await run({ name, engine: 'molt', what: 'warm', ms, cache: folder }))
    }
    for (let round = 0; round < rounds * 2; round++) {
      cold.node.push(await run({ name, engine: 'node', what: 'cold' }))
      cold.cached.push(await run({ name, engine: 'molt', what: 'cold', cache: folder }))
      if (round < 2) cold.uncached.push(await run({ name, engine: 'molt', what: 'cold', cache: false }))
    }
    const all = (runs, key) => median(runs.flatMap((run) => run[key]))
    const work = { node: all(warm.node, 'workMs'), molt: all(warm.molt, 'workMs') }
    const small = { node: all(warm.node, 'callsPerSecond'), molt: all(warm.molt, 'callsPerSecond') }
    return {
      ...{ name, version },
      work: { ...work, speed: work.node / work.molt },
      small: { ...small, speed: small.molt / small.node },
      cold: {
        node: all(cold.node, 'firstMs'),
        cached: all(cold.cached, 'firstMs'),
        uncached: all(cold.uncached, 'firstMs'),
        addon: all(cold.cached, 'addonMs'),
      },
      reload: { pause: all(warm.molt, 'pauseMs'), wall: all(warm.molt, 'reloadMs') },
      samples: { warm, cold },
    }
  } catch (error) {
    return { name, error: error.message }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

function run(task) {
  return new Promise((resolve, reject) => {
    let figures
    let said = ''
    const process_ = fork(fileURLToPath(import.meta.url), ['--child', JSON.stringify(task)], {
      stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
    })
    process_.stderr.on('data', (chunk) => {
      said = `${said}${chunk}`.slice(-2_000)
    })
    process_.on('message', (message) => {
      figures = message
    })
    process_.on('close', (code, signal) => {
      if (figures) resolve(figures)
      else reject(new Error(`${task.what} on ${task.engine}: ${signal ?? `exit code ${code}`}\n${said.trim()}`))
    })
  })
}

function print(report) {
  const lines = [
    ['package', 'work ms: Node', 'here', 'speed', 'small calls/s: Node', 'here', 'speed'],
    [],
    ['package', 'first answer ms: Node', 'cached', 'uncached', 'reload pause ms', 'reload ms'],
  ]
  const second = []
  for (const { name, error, work, small, cold, reload } of report.packages) {
    if (error !== undefined) continue
    lines.splice(-2, 0, [
      ...[name, round(work.node), round(work.molt), times(work.speed)],
      ...[`${Math.round(small.node)}`, `${Math.round(small.molt)}`, times(small.speed)],
    ])
    second.push([name, ...[cold.node, cold.cached, cold.uncached, reload.pause, reload.wall].map(round)])
  }
  const all = [...lines, ...second]
  const widths = Array.from({ length: 7 }, (_, column) => Math.max(...all.map((line) => line[column]?.length ?? 0)))
  for (const line of all) {
    const cells = line.map((cell, column) => (column === 0 ? cell.padEnd(widths[0]) : cell.padStart(widths[column])))
    console.log(cells.join('  '))
  }
  for (const { name, error } of report.packages) if (error) console.log(`\n${name}: ${error}`)
  console.log(`\n${report.cpu}, ${report.threads} threads, Node ${report.node}`)
  console.log(
    `Warm work, geometric mean of the speed relative to Node's engine: ${times(report.warmSpeed)} (goal: at least 0.90)`,
  )
  console.log(`Small calls: ${times(report.smallSpeed)}`)
  console.log(
    `First answer from the cache, geometric mean of the time relative to Node's engine: ${times(report.coldFromCache)}`,
  )
}

function round(ms) {
  return Number.isFinite(ms) ? ms.toFixed(ms < 10 ? 3 : 1) : '–'
}

function times(ratio) {
  return Number.isFinite(ratio) ? ratio.toFixed(2) : '–'
}

function geometricMean(ratios) {
  return Math.exp(ratios.reduce((sum, ratio) => sum + Math.log(ratio), 0) / ratios.length)
}

function median(numbers) {
  const sorted = numbers.filter(Number.isFinite).sort((a, b) => a - b)
  const middle = sorted.length / 2
  return sorted.length % 2 ? sorted[Math.floor(middle)] : (sorted[middle - 1] + sorted[middle]) / 2
}

// ---------------------------------------------------------------- the child

async function child({ name, engine, what, cache, ms }) {
  const pkg = await packageOf(name)
  withoutDigests()
  // Loading the addon belongs to the start of a process, as loading Node's engine does; it is told apart.
  let addonMs = 0
  if (engine === 'molt') [addonMs] = timed(addon)
  const before = performance.now()
  const side = await open(engine, pkg, { cache })
  pkg.work(side.module(), 0)
  const firstMs = performance.now() - before
  const figures = what === 'cold' ? { firstMs, addonMs } : await warm(pkg, side, ms)
  await new Promise((sent) => process.send(figures, sent))
  process.disconnect()
  await side.close()
}

async function warm(pkg, side, ms) {
  // A sample is one round over all inputs: they take unlike times.
  const cycle = () => {
    const module = side.module()
    for (let i = 0; i < INPUTS; i++) pkg.work(module, i)
  }
  repeat(ms / 2, 3, cycle)
  const workMs = repeat(ms, 5, cycle).map((sample) => sample / INPUTS)
  const small = () => pkg.workSmall(side.module(), 1)
  repeat(ms / 4, 3, small)
  const callsPerSecond = repeat(ms / 4, 5, small).map((sample) => (pkg.smallCalls / sample) * 1e3)
  const [pauseMs, reloadMs] = [[], []]
  for (let n = 0; side.reload && n < RELOADS; n++) {
    const before = performance.now()
    const report = await side.reload()
    reloadMs.push(performance.now() - before)
    pauseMs.push(report.pauseMs)
    pkg.work(side.module(), n)
  }
  return { workMs, callsPerSecond, pauseMs, reloadMs }
}

/** At least that long and that often; what takes microseconds is timed in lots. @returns {number[]} milliseconds each */
function repeat(ms, times, run) {
  const samples = []
  const lot = Math.max(1, Math.ceil(2 / timed(run)[0]))
  const until = performance.now() + ms
  while (samples.length < times || performance.now() < until) {
    const [whole] = timed(() => {
      for (let n = 0; n < lot; n++) run()
    })
    samples.push(whole / lot)
  }
  return samples
}

function timed(run) {
  const before = performance.now()
  const made = run()
  return [performance.now() - before, made]
}
