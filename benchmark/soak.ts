// npm run soak [-- --minutes N --seed N]: everything at once for a while, as chance has it, and everything accounted for.
//   --minutes  how long (default 10; may be a fraction)
//   --seed     of what is done (default: another one each time; it is printed)
//   --save     the name of the chart in results/ (default soak-last, which is not kept)
//   --record   a file for what came of it; scripts/soak.mjs keeps it with the seed
// What the process holds must not rise from the second third of the time to the last one, and must be gone at the end; exit 1 if not, or
// if any answer was wrong, missing or unexpected.
import { mkdirSync, mkdtempSync, readdirSync, readlinkSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { setTimeout as wait } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs, styleText } from 'node:util'
import { setMemoryBudget } from '../index.js'
import { circumstances } from './report.ts'
import { type Account, sum } from './soak/book.ts'
import { drawSoak } from './soak/chart.ts'
import type { Setting } from './soak/crew.ts'
import { answersOf, Environment, mergeAll, recyclesOf } from './soak/environment.ts'
import { writeGuests } from './soak/guests.ts'
import { stalls } from './soak/machine.ts'
import { judge, type Sample, sample, tolerances } from './soak/samples.ts'
import { threads, Workers } from './soak/worker.ts'

/** How long the end may take, then what is left may go, and the process may exit. */
const [endMs, goneMs, exitMs] = [900_000, 60_000, 60_000]
/** Of samples that are written down: an hour's are thinned out. */
const mostWritten = 600

const { minutes, seed, save, record } = readFlags()
const context = circumstances()
process.stdout.write(
  `${context.cpu}, ${context.cores} cores, Node ${context.node}, ${context.commit}\n` +
    `Soak: ${count(minutes)} min, seed ${seed} (the same again: npm run soak -- --minutes ${minutes} --seed ${seed})\n`,
)

const problems: string[] = []
write(0)
process.on('warning', (warning) => {
  problems.push(`the process warned: ${warning.name}: ${warning.message}`)
})
const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-soak-'))
const setting: Setting = { seed, where: 'main', guests: writeGuests(folder), cache: join(folder, 'cache') }
mkdirSync(setting.cache)
const [rehearsal, main] = ['rehearsal', 'main'].map((where) => new Environment({ ...setting, where })) as [
  Environment,
  Environment,
]
const workers = new Workers(setting)
let canTell = false
process.on('exit', (code) => tellEnd(code))

// Some things there are once for a process: an engine for each set of options, the timer, a descriptor for figures.
await rehearsal.open()
rehearsal.start()
await wait(1000)
await rehearsal.end()
await quiet()
const before = sample(performance.now(), 0, 0)
const heldBefore = held()
await main.open()

const samples: Sample[] = []
const begun = performance.now()
main.start()
workers.start()
while (performance.now() - begun < minutes * 60_000) {
  await wait(Math.min(1000, minutes * 60_000 - (performance.now() - begun)))
  const all = accounts()
  const one = sample(begun, answersOf(all), recyclesOf(all), workers.now, workers.isAtWork)
  samples.push(one)
  if (samples.length % 10 === 0) process.stdout.write(`${progress(one, found(all))}\n`)
}
const late = setTimeout(() => {
  problems.push(
    `the end took more than ${endMs / 1e3} s; of the main thread ${main.busy.join(', ') || 'nobody'} is still there`,
  )
  process.exit(1)
}, endMs)
await Promise.all([main.end(), workers.end()])
clearTimeout(late)
setMemoryBudget(null)
await everythingGone()
rmSync(folder, { recursive: true, force: true })

const verdicts = judge(samples)
canTell = verdicts.some(({ canTell }) => canTell)
const all = accounts()
const after = sample(begun, answersOf(all), recyclesOf(all))
tellFigures()
writeChart()
// Whoever keeps the process alive from here on is what was not closed.
setTimeout(() => {
  problems.push(
    `the process did not exit by itself in ${exitMs / 1e3} s: ${process.getActiveResourcesInfo().join(', ')}`,
  )
  process.exit(1)
}, exitMs).unref()

function accounts(): Account[] {
  return mergeAll(rehearsal.accounts, main.accounts, workers.accounts)
}

/** Until no thread comes or goes any more. */
async function quiet(): Promise<void> {
  const until = performance.now() + goneMs
  for (let [same, last] = [0, ''], now = ''; same < 10 && performance.now() < until; last = now) {
    globalThis.gc?.()
    await wait(50)
    now = held().join()
    same = now === last ? same + 1 : 0
  }
}

/** Threads and descriptors are to be what they were at the beginning; some of them take a moment. */
async function everythingGone(): Promise<void> {
  const until = performance.now() + goneMs
  while (more().length > 0 && performance.now() < until) {
    globalThis.gc?.()
    await wait(100)
  }
  if (more().length > 0) problems.push(`these are left of what was not there at the beginning: ${more().join(', ')}`)
}

function more(): string[] {
  const left = [...heldBefore]
  return held().filter((one) => {
    const at = left.indexOf(one)
    if (at >= 0) left.splice(at, 1)
    return at < 0
  })
}

/** Threads by their names, and descriptors by what they are open on. */
function held(): string[] {
  try {
    const open = readdirSync('/proc/self/fd').flatMap((id) => {
      try {
        // Pipes, sockets and the like have numbers; which of them it is says nothing.
        return [`descriptor of ${readlinkSync(`/proc/self/fd/${id}`).replace(/\[\d+\]$/, '')}`]
      } catch {
        // The one that this very look has opened.
        return []
      }
    })
    return [...threads().map((name) => `thread ${name}`), ...open].sort()
  } catch {
    return []
  }
}

function tellFigures(): void {
  process.stdout.write(`\n${table(all)}\n\n`)
  for (const { held, middle, last, most, canTell, isFlat } of verdicts) {
    const { title, unit, suffix } = tolerances[held]
    const [start, end] = [before[held] ?? 0, after[held] ?? 0]
    const shown = (value: number) => `${count(Number((value / unit).toFixed(unit === 1 ? 0 : 1)))}${suffix}`
    const said = !canTell ? 'too short to tell' : isFlat ? paint('green', 'flat') : paint('red', 'NOT FLAT')
    process.stdout.write(
      `${title.padEnd(17)} second third ${shown(middle)}, last third ${shown(last)} (at most ${shown(most)}): ${said}; ` +
        `before all ${shown(start)}, after all ${shown(end)}\n`,
    )
    if (!isFlat) {
      problems.push(`${title} rose from ${shown(middle)} to ${shown(last)}, more than to ${shown(most)}`)
    }
  }
}

function writeChart(): void {
  const told = [
    `${count(answersOf(all))} answers, each accounted for once; ${count(recyclesOf(all))} recycles; ${workersTold()}.`,
    `Green: the medians of the second and the last third. Red, dashed: what the last may be at most.`,
  ]
  const results = new URL('results/', import.meta.url)
  mkdirSync(results, { recursive: true })
  const path = (kind: string) => fileURLToPath(new URL(`${save}.${kind}`, results))
  const step = Math.ceil(samples.length / mostWritten)
  const thin = samples.filter((_, at) => at % step === 0)
  const title = `Soak: ${count(minutes)} min, seed ${seed}, ${context.commit}`
  writeFileSync(path('svg'), drawSoak(thin, verdicts, title, told))
  const { decisions } = main
  const whole = { ...context, minutes, seed, before, after, verdicts, decisions, samples: thin, problems }
  writeFileSync(path('json'), `${JSON.stringify(whole)}\n`)
  process.stdout.write(`Chart: ${relative(process.cwd(), path('svg'))}\n`)
}

/** The last words, whichever way it ends. */
function tellEnd(code: number): void {
  const all = accounts()
  problems.push(...workers.problems)
  for (const { name, asked, answered, problems: own, problemCount } of all) {
    problems.push(...own)
    if (problemCount > own.length) problems.push(`${name}: ${count(problemCount - own.length)} more`)
    if (asked < answered) problems.push(`${name}: ${asked} were asked, and ${answered} answered`)
  }
  if (code !== 0 && problems.length === 0) problems.push(`the process ended with ${code}`)
  if (stalls() > 0) {
    process.stdout.write(`The machine kept the event loop waiting for more than 5 s ${count(stalls())} times.\n`)
  }
  for (const problem of problems) process.stdout.write(`${paint('red', problem)}\n`)
  const isWhole = problems.length === 0
  const answers = answersOf(all)
  const closing = !isWhole
    ? paint('red', `Soak FAILED: ${count(problems.length)} problems, seed ${seed}.`)
    : paint(
        'green',
        `Soak passed: ${count(minutes)} min, seed ${seed}; ${count(answers)} answers, every one accounted for; ` +
          `${count(recyclesOf(all))} recycles, ${count(all.reduce((total, { reloads }) => total + sum(reloads), 0))} reloads ` +
          `and replacements; ${workersTold()}${canTell ? '; memory, descriptors, threads, mappings and heap flat' : ''}; ` +
          'the process exited by itself.',
      )
  process.stdout.write(`${closing}\n`)
  write(answers)
  if (!isWhole) process.exitCode = 1
}

/** Also at the beginning: of a process that dies this is all there will be. */
function write(answers: number): void {
  if (record === undefined) return
  const { date, commit, node } = context
  writeFileSync(record, JSON.stringify({ date, commit, node, seed, minutes, answers, problems: problems.slice(0, 5) }))
}

function workersTold(): string {
  const { ended, cut } = workers.count
  return `${count(ended + cut)} workers, ${count(cut)} of them terminated in the middle`
}

/** A line for each crew: what was answered, and how. */
function table(all: Account[]): string {
  return all
    .map(({ name, answered, endings, recycled, failures, gone }) => {
      return (
        `${name.padEnd(10)}${count(answered).padStart(10)} answers: ${listed(endings)}\n` +
        `${''.padEnd(10)}${count(sum(recycled)).padStart(10)} recycles: ${listed(recycled)}; ` +
        `${count(failures)} failed reloads${gone > 0 ? `, ${count(gone)} managers came and went` : ''}`
      )
    })
    .join('\n')
}

function found(all: Account[]): number {
  return all.reduce((total, { problemCount }) => total + problemCount, problems.length + workers.problems.length)
}

function progress(
  { seconds, resident, heap, threads, descriptors, answers, recycles }: Sample,
  problemCount: number,
): string {
  const mib = (bytes: number) => `${count(Math.round(bytes / 2 ** 20))} MiB`
  return (
    `${count(Math.round(seconds)).padStart(5)} s${count(answers).padStart(12)} answers, ${count(recycles)} recycles, ` +
    `resident ${mib(resident)}, heap ${mib(heap)}, ${threads ?? '?'} threads, ${descriptors ?? '?'} descriptors, ${workersTold()}` +
    `${problemCount > 0 ? `, ${count(problemCount)} problems` : ''}`
  )
}

function listed(counts: ReadonlyMap<string, number>): string {
  const sorted = [...counts].sort(([, a], [, b]) => b - a)
  return sorted.length === 0 ? 'none' : sorted.map(([what, times]) => `${what} ${count(times)}`).join(', ')
}

function count(value: number): string {
  return value.toLocaleString('en')
}

function paint(color: 'green' | 'red', text: string): string {
  return process.stdout.isTTY && process.stdout.hasColors() ? styleText(color, text) : text
}

function readFlags(): { minutes: number; seed: number; save: string; record: string | undefined } {
  const refuse = (why: string): never => {
    process.stderr.write(`${why}\nnpm run soak [-- --minutes N --seed N --save NAME]\n`)
    process.exit(2)
  }
  try {
    const { values } = parseArgs({
      options: {
        minutes: { type: 'string', default: '10' },
        seed: { type: 'string' },
        save: { type: 'string', default: 'soak-last' },
        record: { type: 'string' },
      },
    })
    const minutes = Number(values.minutes)
    const seed = values.seed === undefined ? Date.now() % 2 ** 31 : Number(values.seed)
    if (!(minutes > 0)) refuse(`--minutes must be a positive number, not "${values.minutes}"`)
    if (!(Number.isInteger(seed) && seed >= 0)) refuse(`--seed must be a whole number from 0, not "${values.seed}"`)
    if (!/^[\w-]+$/.test(values.save))
      refuse(`--save must be a name of letters, digits and dashes, not "${values.save}"`)
    return { minutes, seed, save: values.save, record: values.record }
  } catch (error) {
    return refuse((error as Error).message)
  }
}
