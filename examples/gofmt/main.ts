// npm run demo [-- --calls N --bound MB --out FILE]: a leaking module on Node's own engine and behind a manager, side by side.
import { type ChildProcess, fork } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { dirname, relative, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { drawChart } from './chart.ts'
import { count, megabytes, paint, Screen, table } from './screen.ts'
import type { Ending, News } from './workload.ts'

const here = dirname(fileURLToPath(import.meta.url))
const flags = readFlags()
const total = positive('calls')
const boundMB = positive('bound')

export interface Lane extends News {
  title: string
  color: string
  /** All samples since the start. */
  history: [number, number][]
  ending?: Ending
  /** Set when the process itself went away. */
  lost?: string
}

const lanes = {
  plain: lane("Node's own WebAssembly", '#d62728'),
  managed: lane(`wasm-molt, reload at ${boundMB} MB`, '#1f77b4'),
}
const screen = new Screen(total, [lanes.plain, lanes.managed])
process.stdout.write(
  `The Go formatter (@wasm-fmt/gofmt, unmodified) leaks a little on every call.\n` +
    `${count(total)} calls on each side, every answer compared with the expected text.\n\n`,
)
await Promise.all([
  follow(lanes.plain, 'plain.ts', [String(total)]),
  follow(lanes.managed, 'managed.ts', [String(total), String(boundMB * 2 ** 20)]),
])
screen.show()

const { plain, managed } = lanes
const chart = resolve(flags.out)
mkdirSync(dirname(chart), { recursive: true })
writeFileSync(chart, await drawChart({ plain, managed, total, boundMB }))
const isClean = managed.correct === total
process.stdout.write(
  `\n${table([plain, managed])}\n\n` +
    `Left:  ${verdict(plain)}\n` +
    `Right: ${verdict(managed)}\n` +
    (plain.firstFailure || plain.lost
      ? ''
      : 'The left side lives for about 16,000 calls: --calls 20000 shows its end.\n') +
    `Chart: ${inside(chart)}\n`,
)
if (!isClean) process.exitCode = 1

function verdict(side: Lane): string {
  const { correct, wrong, failed, firstFailure, lost, reloads, memoryBytes } = side
  if (lost) return paint('red', `${lost}.`)
  if (firstFailure) {
    const { call, text } = firstFailure
    return paint('red', `dead since call ${count(call)} (${text}): ${count(failed)} calls failed.`)
  }
  if (wrong > 0) return paint('red', `${count(wrong)} wrong answers.`)
  const kept =
    reloads > 0 ? `across ${count(reloads)} reloads` : `but it holds ${megabytes(memoryBytes)} and gives none back`
  return paint(reloads > 0 ? 'green' : 'bold', `all ${count(correct)} answers are right, ${kept}.`)
}

/** A path as one would type it here. */
function inside(path: string): string {
  const short = relative(process.cwd(), path)
  return short.startsWith('..') ? path : short
}

/** Starts one side in a process of its own, so that each has its own memory to show, and takes its news until it ends. */
function follow(side: Lane, program: string, args: string[]): Promise<void> {
  const child: ChildProcess = fork(resolve(here, program), args, { execArgv: ['--import', 'tsx'] })
  child.on('message', (message: News | Ending) => {
    if ('seconds' in message) {
      side.ending = message
    } else {
      side.history.push(...message.samples)
      Object.assign(side, message)
      screen.show()
    }
  })
  return new Promise((done) => {
    child.on('exit', (code, signal) => {
      if (!side.ending) side.lost = `the process went away at call ${side.calls + 1} (${signal ?? `exit code ${code}`})`
      done()
    })
  })
}

function lane(title: string, color: string): Lane {
  const nothing = { calls: 0, correct: 0, wrong: 0, failed: 0, memoryBytes: 0, rssBytes: 0, reloads: 0, samples: [] }
  return { ...nothing, title, color, history: [] }
}

function readFlags() {
  try {
    const { values } = parseArgs({
      options: {
        calls: { type: 'string', default: '50000' },
        bound: { type: 'string', default: '128' },
        out: { type: 'string', default: resolve(here, 'out', 'memory.svg') },
      },
    })
    return values
  } catch (error) {
    return refuse((error as Error).message)
  }
}

function positive(name: 'calls' | 'bound'): number {
  const value = Number(flags[name])
  if (Number.isInteger(value) && value > 0) return value
  return refuse(`--${name} must be a positive whole number, not "${flags[name]}"`)
}

function refuse(why: string): never {
  process.stderr.write(`${why}\nnpm run demo [-- --calls N --bound MB --out FILE]\n`)
  process.exit(2)
}
