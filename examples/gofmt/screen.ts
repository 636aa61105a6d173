// The live view and the closing table: a terminal is redrawn in place, a pipe gets a line now and then.
import { clearScreenDown, moveCursor } from 'node:readline'
import { styleText } from 'node:util'
import type { Lane } from './main.ts'

const out = process.stdout
const columnWidth = 38
const gap = '   '
/** All that a 32-bit module can ever address: what its memory bar is a share of. */
const mostMB = 4096

export class Screen {
  readonly #total: number
  readonly #lanes: Lane[]
  /** A line that wraps could not be drawn over, so a narrow terminal is treated as a pipe. */
  readonly #isRedrawn = out.isTTY && out.columns >= 2 * columnWidth + gap.length
  /** Lines to go back over. */
  #drawn = 0
  /** Calls already told of. */
  readonly #told = new Map<Lane, number>()

  constructor(total: number, lanes: Lane[]) {
    this.#total = total
    this.#lanes = lanes
  }

  show(): void {
    if (this.#isRedrawn) this.#redraw()
    else for (const lane of this.#lanes) this.#tell(lane)
  }

  #redraw(): void {
    const columns = this.#lanes.map((lane) => this.#column(lane))
    const rows = columns[0]?.map((_, row) => columns.map((column) => column[row]).join(gap)) ?? []
    if (this.#drawn > 0) moveCursor(out, 0, -this.#drawn)
    clearScreenDown(out)
    out.write(`${rows.join('\n')}\n`)
    this.#drawn = rows.length
  }

  #column(lane: Lane): string[] {
    const color = isDead(lane) ? 'red' : 'green'
    const memoryMB = lane.memoryBytes / 2 ** 20
    const rows: [string, string][] = [
      ['calls', `${count(lane.calls)} of ${count(this.#total)}`],
      ['', paint(color, bar(lane.calls / this.#total))],
      ['memory', `${megabytes(lane.memoryBytes)} of ${count(mostMB)}`],
      ['', paint(color, bar(memoryMB / mostMB))],
      ['right', count(lane.correct)],
      ['failed', lane.failed > 0 ? paint('red', count(lane.failed)) : '0'],
      ['reloads', count(lane.reloads)],
    ]
    const ending = lane.lost ?? (lane.firstFailure && `dead since call ${count(lane.firstFailure.call)}`)
    return [
      pad(paint('bold', lane.title)),
      ...rows.map(([label, value]) => pad(`${label.padEnd(9)}${value}`)),
      pad(ending ? paint('red', ending.slice(0, columnWidth)) : ''),
    ]
  }

  #tell(lane: Lane): void {
    const told = this.#told.get(lane) ?? 0
    const isNews = lane.calls >= told + Math.max(1, Math.min(5000, Math.ceil(this.#total / 5)))
    const isLast = lane.calls === this.#total && told < this.#total
    if (!isNews && !isLast) return
    this.#told.set(lane, lane.calls)
    const state = lane.firstFailure ? `dead since ${count(lane.firstFailure.call)}` : `${lane.reloads} reloads`
    out.write(
      `${lane.title.padEnd(28)}${count(lane.calls).padStart(8)} calls${megabytes(lane.memoryBytes).padStart(10)}` +
        `${count(lane.failed).padStart(8)} failed  ${state}\n`,
    )
  }
}

/** One row per question, one column per side; no wider than 80 characters. */
export function table(lanes: Lane[]): string {
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
  const cells = rows.map(([label, value]) => [label, ...lanes.map(value)])
  const widths = cells[0]?.map((_, column) => Math.max(...cells.map((row) => row[column]?.length ?? 0))) ?? []
  const lines = cells.map((row) =>
    row
      .map((cell, column) => (column === 0 ? cell.padEnd(widths[0] ?? 0) : cell.padStart(widths[column] ?? 0)))
      .join(gap),
  )
  lines.splice(1, 0, '─'.repeat(lines[0]?.length ?? 0))
  return lines.join('\n')
}

export function count(value: number): string {
  return value.toLocaleString('en')
}

export function megabytes(bytes: number): string {
  return `${count(Math.round(bytes / 2 ** 20))} MB`
}

/** Colours text where a terminal shows it. */
export function paint(format: 'red' | 'green' | 'bold', text: string): string {
  return out.isTTY && out.hasColors() ? styleText(format, text) : text
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

function bar(share: number): string {
  const length = columnWidth - 9
  const full = Math.round(Math.min(1, share) * length)
  return '█'.repeat(full) + '░'.repeat(length - full)
}

/** Pads by what is seen: colours take no room. */
function pad(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: colours begin with one
  const seen = text.replace(/\u001b\[\d+m/g, '').length
  return text + ' '.repeat(Math.max(0, columnWidth - seen))
}
