// npm run demo -- --scene quickjs [--scripts N --timeout MS --out FILE]: scripts that nobody trusts, run in four ways.
import { mkdirSync, writeFileSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { readFlags } from '../flags.ts'
import { follow } from '../side.ts'
import { bar, count, inside, megabytes, pad, paint, Redrawn, table } from '../terminal.ts'
import { drawChart } from './chart.ts'
import { type Ending, type News, noNews } from './news.ts'

const here = dirname(fileURLToPath(import.meta.url))
const { values: flags, positive } = readFlags('npm run demo -- --scene quickjs [--scripts N --timeout MS --out FILE]', {
  scripts: '1000',
  timeout: '500',
  out: resolve(here, 'out', 'scripts.svg'),
})
const total = positive('scripts')
const timeoutMs = positive('timeout')
/** What a script may use: scripts in one interpreter share it. */
const memoryMB = 16

export interface Lane extends News {
  name: 'isolated' | 'shared' | 'fresh' | 'worker'
  title: string
  what: string
  color: string
  /** Scripts to run: fewer, where each one takes long. */
  total: number
  ending?: Ending
  /** Set when the process itself went away. */
  lost?: string
}

const isolated = lane('isolated', 'per call', "wasm-molt, isolation: 'per-call'", '#1f77b4', total)
const shared = lane('shared', 'shared', 'wasm-molt, one interpreter for all', '#ff7f0e', total)
const fresh = lane('fresh', 'fresh', "Node's own WebAssembly, an instance each", '#d62728', atLeast(20, total / 5))
const worker = lane('worker', 'worker', 'the same in a worker thread each', '#9467bd', atLeast(10, total / 20))
const lanes = [isolated, shared, fresh, worker]

process.stdout.write(
  'QuickJS as a guest, with Handlebars in its heap, runs scripts of users, one by one.\n' +
    'They keep megabytes, overwrite JSON, Array.prototype and helpers, and never end.\n\n' +
    `${lanes.map(({ title, what }) => `${title.padEnd(10)}${what}`).join('\n')}\n\n`,
)
const screen = new Redrawn(80)
for (const each of lanes) await run(each)

const chart = resolve(flags.out)
mkdirSync(dirname(chart), { recursive: true })
writeFileSync(chart, await drawChart({ bars: lanes.map(barOf), shared, isolated, total, memoryMB }))
const apart = [isolated, fresh, worker]
process.stdout.write(
  `\n${summary()}\n\n${lanes.map((each) => `${`${each.title}:`.padEnd(10)}${verdict(each)}`).join('\n')}\n` +
    `\n${comparison()}\nChart: ${inside(chart)}\n`,
)
if (!apart.every(isClean)) process.exitCode = 1

/** One at a time: they would take the processor from each other. */
async function run(side: Lane): Promise<void> {
  const args = [side.name, String(side.total), String(timeoutMs), resolve(here, 'out', 'worker')]
  const end = await follow(resolve(here, 'ways.ts'), args, (message: News | Ending) => {
    if ('timesMs' in message) side.ending = message
    else Object.assign(side, message, { samples: [...side.samples, ...message.samples] })
    if (screen.isPossible) screen.draw(lanes.map(progress))
  })
  if (!side.ending) side.lost = `the process went away at script ${count(side.scripts + 1)} (${end ?? 'exit code 0'})`
  if (!screen.isPossible) process.stdout.write(`${progress(side)}\n`)
}

function progress(side: Lane): string {
  const color = isClean(side) ? 'green' : 'red'
  const done = `${count(side.scripts)} of ${count(side.total)}`
  const bad = side.wrong + side.failed
  const state = side.scripts === 0 ? '' : `${count(side.right)} right${bad > 0 ? `, ${count(bad)} not` : ''}`
  return `${side.title.padEnd(10)}${paint(color, bar(side.scripts / side.total, 24))}${pad(done.padStart(16), 18)}${state}`
}

/** One row per question, one column per way; no wider than 80 characters. */
function summary(): string {
  const rows: [string, (lane: Lane) => string][] = [
    ['', ({ title }) => title],
    ['scripts', ({ scripts }) => count(scripts)],
    ['right answers', ({ right }) => count(right)],
    ['wrong answers', ({ wrong }) => count(wrong)],
    ['failed', ({ failed }) => count(failed)],
    ["found another's leftovers", ({ leftovers }) => count(leftovers)],
    ['endless, stopped', ({ stopped, leftOut }) => (leftOut > 0 ? 'cannot' : count(stopped))],
    ['time of a script, median', (lane) => milliseconds(quantile(lane, 0.5))],
    ['time of a script, p99', (lane) => milliseconds(quantile(lane, 0.99))],
    ['first out of memory', ({ firstFull }) => (firstFull ? `script ${count(firstFull)}` : 'none')],
    ['scripts a second', (lane) => rate(lane, lane.ending?.timesMs.length ?? 0)],
    ['right answers a second', (lane) => rate(lane, lane.right)],
    ['module memory, highest', ({ samples }) => memory(highest(samples))],
    ['process memory, at the end', ({ ending }) => memory(ending?.rssBytes)],
    ['process memory, highest', ({ ending }) => memory(ending?.rssBytesPeak)],
    ['instances replaced', ({ ending }) => (ending?.generation ? count(ending.generation - 1) : '—')],
  ]
  return table(rows.map(([label, value]) => [label, ...lanes.map(value)]))
}

function verdict(side: Lane): string {
  const { right, wrong, failed, leftovers, found, firstFull, lost } = side
  if (lost) return paint('red', `${lost}.`)
  const answers = `${count(right)} right answers`
  if (isClean(side)) {
    return paint('green', `all ${answers}${endless(side)}; nothing found of others.`)
  }
  const more = [
    ...(leftovers > 0 ? [`${count(leftovers)} found what others left:`, `  ${found.join(', ')}.`] : []),
    ...(firstFull ? [`Memory was full for the first time at script ${count(firstFull)}.`] : []),
  ].map((line) => `\n${' '.repeat(10)}${line}`)
  return paint('red', `${answers}, ${count(wrong)} wrong, ${count(failed)} failed.${more.join('')}`)
}

function barOf(side: Lane) {
  const { what, right, scripts, leftovers } = side
  const found = leftovers > 0 ? `${count(leftovers)} found what others left` : 'nothing found of others'
  const text = `${what}: ${count(right)} right answers${endless(side)}, of ${count(scripts)} scripts; ${found}.`
  return { lane: side, medianMs: quantile(side, 0.5), p99Ms: quantile(side, 0.99), text }
}

function endless({ leftOut, stopped }: Lane): string {
  if (leftOut > 0) return `, ${count(leftOut)} endless left out`
  return stopped > 0 ? `, ${count(stopped)} endless stopped` : ''
}

function comparison(): string {
  const own = quantile(isolated, 0.5)
  const times = (side: Lane) => `${(quantile(side, 0.5) / own).toFixed(1)} ×`
  const what = isClean(isolated)
    ? `Isolated and warm: ${milliseconds(own)} a script, and none saw another.`
    : 'Isolated scripts did not come to what was expected: see above.'
  return paint('bold', `${what}\nA fresh instance each takes ${times(fresh)} as long, a worker each ${times(worker)}.`)
}

/** Every script came to what was expected, and none saw another. */
function isClean({ wrong, failed, leftovers, lost, right, stopped, leftOut, scripts }: Lane): boolean {
  return !lost && wrong + failed + leftovers === 0 && right + stopped + leftOut === scripts
}

function quantile({ ending }: Lane, share: number): number {
  const sorted = [...(ending?.timesMs ?? [])].sort((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN
}

function milliseconds(value: number): string {
  return Number.isNaN(value) ? '?' : `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`
}

/** Endless scripts apart: their time is the timeout's. */
function rate({ ending }: Lane, done: number): string {
  if (!ending) return '?'
  return count(Math.round((done * 1000) / ending.timesMs.reduce((sum, ms) => sum + ms, 0)))
}

function highest(samples: News['samples']): number | undefined {
  const most = Math.max(...samples.map(([, bytes]) => bytes))
  return most > 0 ? most : undefined
}

function memory(bytes: number | undefined): string {
  return bytes === undefined ? '—' : megabytes(bytes)
}

function atLeast(least: number, value: number): number {
  return Math.min(total, Math.max(least, Math.round(value)))
}

function lane(name: Lane['name'], title: string, what: string, color: string, scripts: number): Lane {
  return { ...noNews(), name, title, what, color, total: scripts }
}
