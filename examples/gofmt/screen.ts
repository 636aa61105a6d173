// The live view and the closing table: a terminal is redrawn in place, a pipe gets a line now and then.
import { bar, count, megabytes, pad, paint, Redrawn, sideBySide, table, widthOf } from '../terminal.ts'
import type { Lane } from './main.ts'

const columnWidth = 38
const labelWidth = 9
const barLength = columnWidth - labelWidth
/** All that a 32-bit module can ever address: what its memory bar is a share of. */
const mostMB = 4096

export class Screen {
  readonly #total: number
  readonly #lanes: Lane[]
  readonly #redrawn = new Redrawn(widthOf(2, columnWidth))
  /** Calls already told of. */
  readonly #told = new Map<Lane, number>()

  constructor(total: number, lanes: Lane[]) {
    this.#total = total
    this.#lanes = lanes
  }

  show(): void {
    if (this.#redrawn.isPossible) this.#redrawn.draw(sideBySide(this.#lanes.map((lane) => this.#column(lane))))
    else for (const lane of this.#lanes) this.#tell(lane)
  }

  #column(lane: Lane): string[] {
    const color = isDead(lane) ? 'red' : 'green'
    const memoryMB = lane.memoryBytes / 2 ** 20
    const rows: [string, string][] = [
      ['calls', `${count(lane.calls)} of ${count(this.#total)}`],
      ['', paint(color, bar(lane.calls / this.#total, barLength))],
      ['memory', `${megabytes(lane.memoryBytes)} of ${count(mostMB)}`],
      ['', paint(color, bar(memoryMB / mostMB, barLength))],
      ['right', count(lane.correct)],
      ['failed', lane.failed > 0 ? paint('red', count(lane.failed)) : '0'],
      ['reloads', count(lane.reloads)],
    ]
    const ending = lane.lost ?? (lane.firstFailure && `dead since call ${count(lane.firstFailure.call)}`)
    return [
      pad(paint('bold', lane.title), columnWidth),
      ...rows.map(([label, value]) => pad(`${label.padEnd(labelWidth)}${value}`, columnWidth)),
      pad(ending ? paint('red', ending.slice(0, columnWidth)) : '', columnWidth),
    ]
  }

  #tell(lane: Lane): void {
    const told = this.#told.get(lane) ?? 0
    const isNews = lane.calls >= told + Math.max(1, Math.min(5000, Math.ceil(this.#total / 5)))
    const isLast = lane.calls === this.#total && told < this.#total
    if (!isNews && !isLast) return
    this.#told.set(lane, lane.calls)
    const state = lane.firstFailure ? `dead since ${count(lane.firstFailure.call)}` : `${lane.reloads} reloads`
    process.stdout.write(
      `${lane.title.padEnd(28)}${count(lane.calls).padStart(8)} calls${megabytes(lane.memoryBytes).padStart(10)}` +
        `${count(lane.failed).padStart(8)} failed  ${state}\n`,
    )
  }
}

/** One row per question, one column per side; no wider than 80 characters. */
export function summary(lanes: Lane[]): string {
  const peak = (lane: Lane) => Math.max(0, ...lane.history.map(([, bytes]) => bytes))
  const rows: [string, (lane: Lane) => string][] = [
    ['', (lane) => lane.title],
    ['right answers', (lane) => count(lane.correct)],
    ['wrong answers', (lane) => count(lane.wrong)],
    ['failed calls', (lane) => count(lane.failed)],
    ['first failure', failure],
    ['module memory, highest', (lane) => megabytes(peak(lane))],
    ['process memory, highest', (lane) => (lane.ending ? megabytes(lane.ending.rssBytesPeak) : '?')],
    ['reloads', (lane) => count(lane.reloads)],
    ['pause of a reload', pauses],
    ['right answers a second', rate],
  ]
  return table(rows.map(([label, value]) => [label, ...lanes.map(value)]))
}

function isDead(lane: Lane): boolean {
  return lane.failed > 0 || lane.lost !== undefined
}

function failure({ firstFailure, lost, calls }: Lane): string {
  const call = firstFailure?.call ?? (lost ? calls + 1 : undefined)
  return call === undefined ? 'none' : `call ${count(call)}`
}

function pauses({ ending }: Lane): string {
  const sorted = [...(ending?.pausesMs ?? [])].sort((a, b) => a - b)
  const [median, longest] = [sorted.at(sorted.length >> 1), sorted.at(-1)]
  if (median === undefined || longest === undefined) return '—'
  return `${median.toFixed(2)} ms (longest ${longest.toFixed(0)})`
}

/** While the side lived: calls that only throw are quick. */
function rate({ correct, firstFailure, ending }: Lane): string {
  const seconds = firstFailure?.seconds ?? ending?.seconds
  return seconds ? count(Math.round(correct / seconds)) : '?'
}
