// npm run soak [-- --minutes N --seed N]: everything at once for a while, as chance has it, and everything accounted for.
//   --minutes  how long (default 10; may be a fraction)
//   --seed     of what is done (default: another one each time; it is printed)
// What the process holds must not rise from the second third of the time to the last one; exit 1 if it does, or if any answer was
// wrong, missing or unexpected. Writes results/soak.svg and results/soak.json.
import { tracingChannel } from 'node:diagnostics_channel'
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { setTimeout as wait } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs, styleText } from 'node:util'
import { circumstances } from './report.ts'
import { add, sum } from './soak/book.ts'
import { drawSoak } from './soak/chart.ts'
import { CounterCrew } from './soak/counter.ts'
import type { Setting } from './soak/crew.ts'
import { writeGuests } from './soak/guests.ts'
import { ConverterCrew, GlueCrew, GofmtCrew } from './soak/real.ts'
import { RoughCrew } from './soak/rough.ts'
import { judge, type Sample, sample, tolerances } from './soak/samples.ts'
import { IsolatedCrew, WarmCrew } from './soak/warm.ts'
import { WorkerCrew } from './soak/worker.ts'

/** With fewer samples a third says nothing. */
const fewest = 30
/** How long the end may take. */
const endMs = 120_000

const { minutes, seed } = readFlags()
const context = circumstances()
process.stdout.write(
  `${context.cpu}, ${context.cores} cores, Node ${context.node}, ${context.commit}\n` +
    `Soak: ${count(minutes)} min, seed ${seed} (the same again: npm run soak -- --minutes ${minutes} --seed ${seed})\n`,
)

const problems: string[] = []
process.on('warning', (warning) => {
  problems.push(`the process warned: ${warning.name}: ${warning.message}`)
})
const decisions = { made: 0, done: 0, failed: 0 }
tracingChannel('wasm-molt:recycle').subscribe({
  start: () => {
    decisions.made += 1
  },
  end: () => {},
  asyncStart: () => {},
  asyncEnd: () => {
    decisions.done += 1
  },
  error: () => {
    decisions.failed += 1
  },
})

const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-soak-'))
process.on('exit', () => rmSync(folder, { recursive: true, force: true }))
const setting: Setting = { seed, guests: writeGuests(folder), cache: join(folder, 'cache') }
mkdirSync(setting.cache)

const crews = [
  new CounterCrew('counter', setting),
  new RoughCrew('rough', setting, {
    instances: 3,
    recycle: { memory: 1 << 20, calls: 60, ageMs: 3000, strategy: 'rolling', jitter: 0.3 },
    fuel: false,
    interrupts: true,
    swaps: true,
    failing: 0.1,
  }),
  new RoughCrew('single', setting, {
    instances: 1,
    recycle: { memory: '1%', calls: 40, strategy: 'exclusive' },
    fuel: true,
    interrupts: false,
    swaps: true,
    failing: 0.1,
  }),
  new RoughCrew('kept', setting, {
    instances: 2,
    recycle: { memory: 512 << 10, onTrap: 'keep' },
    fuel: false,
    interrupts: false,
    swaps: false,
    failing: 0,
  }),
  new WarmCrew('warm', setting),
  new IsolatedCrew('isolated', setting),
  new ConverterCrew('converter', setting),
  new GofmtCrew('gofmt', setting),
  new GlueCrew('glue', setting),
  new WorkerCrew(setting),
]
const before = sample(performance.now(), 0, 0)
for (const crew of crews) await crew.open()

const samples: Sample[] = []
const begun = performance.now()
for (const crew of crews) crew.start()
while (performance.now() - begun < minutes * 60_000) {
  await wait(Math.min(1000, minutes * 60_000 - (performance.now() - begun)))
  const one = sample(begun, answers(), recycles())
  samples.push(one)
  if (samples.length % 10 === 0) process.stdout.write(`${progress(one)}\n`)
}
for (const crew of crews) crew.stop()
const late = setTimeout(() => {
  problems.push(`the end took more than ${endMs / 1e3} s`)
  finish()
}, endMs)
await Promise.all(crews.map((crew) => crew.end()))
clearTimeout(late)
if (decisions.made !== decisions.done) {
  problems.push(`${decisions.made} recycles were decided on, and ${decisions.done} had an outcome`)
}
finish()

function finish(): never {
  const after = sample(begun, answers(), recycles())
  const books = crews.flatMap(({ book, forks }) => [book, forks])
  const verdicts = judge(samples)
  const isLong = samples.length >= fewest
  process.stdout.write(`\n${table()}\n\n`)
  for (const { held, middle, last, most, isFlat } of verdicts) {
    const { title, unit, suffix } = tolerances[held]
    const [start, end] = [before[held] ?? 0, after[held] ?? 0]
    const shown = (value: number) => `${count(Number((value / unit).toFixed(unit === 1 ? 0 : 1)))}${suffix}`
    const said = !isLong ? 'too short to tell' : isFlat ? paint('green', 'flat') : paint('red', 'NOT FLAT')
    process.stdout.write(
      `${title.padEnd(16)} second third ${shown(middle)}, last third ${shown(last)} (at most ${shown(most)}): ${said}; ` +
        `before all ${shown(start)}, after all ${shown(end)}\n`,
    )
    if (isLong && !isFlat)
      problems.push(`${title} rose from ${shown(middle)} to ${shown(last)}, more than to ${shown(most)}`)
  }
  for (const book of books) {
    problems.push(...book.problems)
    const more = book.problemCount - book.problems.length
    if (more > 0) problems.push(`${book.name}: ${count(more)} more`)
  }
  const total = answers()
  const told = [
    `${count(total)} answers, each accounted for once; ${count(recycles())} recycles (${listed(reasons('recycled'))}).`,
    `Green: the medians of the second and the last third. Red, dashed: what the last may be at most.`,
  ]
  const results = new URL('results/', import.meta.url)
  mkdirSync(results, { recursive: true })
  const path = (name: string) => fileURLToPath(new URL(name, results))
  writeFileSync(path('soak.svg'), drawSoak(samples, verdicts, `Soak: ${count(minutes)} min, seed ${seed}`, told))
  writeFileSync(
    path('soak.json'),
    `${JSON.stringify({ ...context, minutes, seed, before, after, verdicts, decisions, samples, problems })}\n`,
  )
  process.stdout.write(`Chart: ${relative(process.cwd(), path('soak.svg'))}\n`)
  for (const problem of problems) process.stdout.write(`${paint('red', problem)}\n`)
  const closing =
    problems.length > 0
      ? paint('red', `Soak FAILED: ${count(problems.length)} problems, seed ${seed}.`)
      : paint(
          'green',
          `Soak passed: ${count(minutes)} min, seed ${seed}; ${count(total)} answers, every one accounted for; ` +
            `${count(recycles())} recycles, ${count(sum(reasons('reloads')))} reloads and replacements` +
            `${isLong ? '; memory, descriptors, threads, mappings and heap flat' : ''}.`,
        )
  process.stdout.write(`${closing}\n`)
  process.exit(problems.length > 0 ? 1 : 0)
}

function answers(): number {
  return crews.reduce((total, { book, forks }) => total + book.answered + forks.answered, 0)
}

function recycles(): number {
  return crews.reduce((total, { book, forks }) => total + book.recycles + forks.recycles, 0)
}

/** By reason, over all. */
function reasons(what: 'recycled' | 'reloads'): Map<string, number> {
  const all = new Map<string, number>()
  for (const { book, forks } of crews) {
    for (const one of [book, forks]) for (const [reason, times] of one[what]) add(all, reason, times)
  }
  return all
}

/** A line for each crew: what was answered, and how. */
function table(): string {
  return crews
    .map(({ name, book, forks, forkCount }) => {
      const endings = new Map(book.endings)
      for (const [how, times] of forks.endings) add(endings, how, times)
      const recycled = new Map(book.recycled)
      for (const [reason, times] of forks.recycled) add(recycled, reason, times)
      return (
        `${name.padEnd(10)}${count(book.answered + forks.answered).padStart(10)} answers: ${listed(endings)}\n` +
        `${''.padEnd(10)}${count(sum(recycled)).padStart(10)} recycles: ${listed(recycled)}; ` +
        `${count(book.failures + forks.failures)} failed reloads${forkCount > 0 ? `, ${count(forkCount)} forks` : ''}`
      )
    })
    .join('\n')
}

function progress({ seconds, resident, heap, threads, descriptors, answers }: Sample): string {
  const mib = (bytes: number) => `${count(Math.round(bytes / 2 ** 20))} MiB`
  return (
    `${count(Math.round(seconds)).padStart(5)} s${count(answers).padStart(12)} answers, ${count(recycles())} recycles, ` +
    `resident ${mib(resident)}, heap ${mib(heap)}, ${threads ?? '?'} threads, ${descriptors ?? '?'} descriptors`
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

function readFlags(): { minutes: number; seed: number } {
  const refuse = (why: string): never => {
    process.stderr.write(`${why}\nnpm run soak [-- --minutes N --seed N]\n`)
    process.exit(2)
  }
  try {
    const { values } = parseArgs({ options: { minutes: { type: 'string', default: '10' }, seed: { type: 'string' } } })
    const minutes = Number(values.minutes)
    const seed = values.seed === undefined ? Date.now() % 2 ** 31 : Number(values.seed)
    if (!(minutes > 0)) refuse(`--minutes must be a positive number, not "${values.minutes}"`)
    if (!(Number.isInteger(seed) && seed >= 0)) refuse(`--seed must be a whole number from 0, not "${values.seed}"`)
    return { minutes, seed }
  } catch (error) {
    return refuse((error as Error).message)
  }
}
