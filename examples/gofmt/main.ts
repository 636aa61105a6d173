// npm run demo -- --scene gofmt [-- --calls N --bound MB --out FILE]: a leaking module on Node's own engine and behind a manager, side by side.
import { mkdirSync, writeFileSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { readFlags } from '../flags.ts'
import { follow } from '../side.ts'
import { count, inside, megabytes, paint } from '../terminal.ts'
import { drawChart } from './chart.ts'
import { Screen, summary } from './screen.ts'
import type { Ending, News } from './workload.ts'

const here = dirname(fileURLToPath(import.meta.url))
const { values: flags, positive } = readFlags('npm run demo -- --scene gofmt [--calls N --bound MB --out FILE]', {
  calls: '50000',
  bound: '128',
  out: resolve(here, 'out', 'memory.svg'),
})
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
  side(lanes.plain, 'plain.ts', [String(total)]),
  side(lanes.managed, 'managed.ts', [String(total), String(boundMB * 2 ** 20)]),
])
screen.show()

const { plain, managed } = lanes
const chart = resolve(flags.out)
mkdirSync(dirname(chart), { recursive: true })
writeFileSync(chart, await drawChart({ plain, managed, total, boundMB }))
const isClean = managed.correct === total
process.stdout.write(
  `\n${summary([plain, managed])}\n\n` +
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

/** Starts one side and takes its news until it ends. */
async function side(lane: Lane, program: string, args: string[]): Promise<void> {
  const end = await follow(resolve(here, program), args, (message: News | Ending) => {
    if ('seconds' in message) {
      lane.ending = message
    } else {
      lane.history.push(...message.samples)
      Object.assign(lane, message)
      screen.show()
    }
  })
  if (!lane.ending) lane.lost = `the process went away at call ${lane.calls + 1} (${end ?? 'exit code 0'})`
}

function lane(title: string, color: string): Lane {
  const nothing = { calls: 0, correct: 0, wrong: 0, failed: 0, memoryBytes: 0, rssBytes: 0, reloads: 0, samples: [] }
  return { ...nothing, title, color, history: [] }
}
