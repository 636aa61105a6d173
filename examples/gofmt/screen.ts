// The live view and the closing table: a terminal is redrawn in place, a pipe gets a line now and then.
import { clearScreenDown, moveCursor } from 'node:readline'
import { styleText } from 'node:util'
import type { Lane } from './main.ts'

const out = process.stdout
const width = 38

export class Screen {
  readonly #total: number
  readonly #lanes: Lane[]
  /** Terminal lines to go back over, or calls already told to a pipe. */
  #drawn = 0
  readonly #told = new Map<Lane, number>()

  constructor(total: number, lanes: Lane[]) {
    this.#total = total
    this.#lanes = lanes
  }

  show(): void {
    if (out.isTTY) this.#redraw()
    else for (const lane of this.#lanes) this.#tell(lane)
  }

  finish(): void {
    this.show()
  }

  #redraw(): void {
    const columns = this.#lanes.map((lane) => this.#column(lane))
    const rows = columns[0]?.map((_, row) => columns.map((column) => column[row]).join('   ')) ?? []
    if (this.#drawn > 0) moveCursor(out, 0, -this.#drawn)
    clearScreenDown(out)
    out.write(`${rows.join('\n')}\n`)
    this.#drawn = rows.length
  }

  #column(lane: Lane): string[] {
    const dead = lane.failed > 0 || lane.lost
    const paint = (text: string) => styleText(dead ? 'red' : 'green', text)
    const log = lane.memoryBytes > 2 ** 19 ? Math.log2(lane.memoryBytes / 2 ** 19) / 13 : 0
    const rows: [string, string][] = [
      ['calls', `${count(lane.calls)} of ${count(this.#total)}`],
      ['', paint(bar(lane.calls / this.#total))],
      ['correct', count(lane.correct)],
      ['failed', lane.failed > 0 ? styleText('red', count(lane.failed)) : '0'],
      ['memory', megabytes(lane.memoryBytes)],
      ['', paint(bar(log))],
      ['reloads', count(lane.reloads)],
    ]
    const ending = lane.lost ?? (lane.firstFailure && `dead since call ${count(lane.firstFailure.call)}`)
    return [
      pad(styleText('bold', lane.title)),
      ...rows.map(([label, value]) => pad(`${label.padEnd(9)}${value}`)),
      pad(ending ? styleText('red', ending) : ''),
    ]
  }

  #tell(lane: Lane): void {
    const next = (this.#told.get(lane) ?? 0) + Math.max(1, Math.min(5000, Math.ceil(this.#total / 5)))
    if (lane.calls < next && lane.calls < this.#total) return
    if (this.#told.get(lane) === lane.calls) return
    this.#told.set(lane, lane.calls)
    const dead = lane.firstFailure ? `  dead since call ${count(lane.firstFailure.call)}` : ''
    out.write(
      `${lane.title.padEnd(28)} ${count(lane.calls).padStart(7)} calls  ${megabytes(lane.memoryBytes).padStart(8)}  ` +
        `${count(lane.correct).padStart(7)} correct  ${count(lane.failed).padStart(7)} failed  ${lane.reloads} reloads${dead}\n`,
    )
  }
}

/** One row per question, one column per side. */
export function table(lanes: Lane[]): string {
  const peak = (lane: Lane) => Math.max(0, ...lane.history.map(([, bytes]) => bytes))
  const pauses = (lane: Lane) => [...(lane.ending?.pausesMs ?? [])].sort((a, b) => a - b)
  const rows: [string, (lane: Lane) => string][] = [
    ['', (lane) => lane.title],
    ['calls', (lane) => count(lane.calls)],
    ['answers as expected', (lane) => count(lane.correct)],
    ['answers that differ', (lane) => count(lane.wrong)],
    ['calls that failed', (lane) => count(lane.failed)],
    ['first failure', (lane) => lane.lost ?? (lane.firstFailure ? `call ${count(lane.firstFailure.call)}` : 'none')],
    ['linear memory, highest', (lane) => megabytes(peak(lane))],
    ['linear memory, at the end', (lane) => megabytes(lane.memoryBytes)],
    ['process memory (RSS), highest', (lane) => (lane.ending ? megabytes(lane.ending.rssBytesPeak) : '?')],
    ['process memory (RSS), at the end', (lane) => megabytes(lane.rssBytes)],
    ['reloads', (lane) => count(lane.reloads)],
    ['pause of a reload, median', (lane) => milliseconds(pauses(lane).at(pauses(lane).length >> 1))],
    ['pause of a reload, longest', (lane) => milliseconds(pauses(lane).at(-1))],
    ['seconds', (lane) => lane.ending?.seconds.toFixed(1) ?? '?'],
  ]
  const cells = rows.map(([label, value]) => [label, ...lanes.map(value)])
  const widths = cells[0]?.map((_, column) => Math.max(...cells.map((row) => row[column]?.length ?? 0))) ?? []
  const lines = cells.map((row) =>
    row
      .map((cell, column) => (column === 0 ? cell.padEnd(widths[0] ?? 0) : cell.padStart(widths[column] ?? 0)))
      .join('   '),
  )
  lines.splice(1, 0, '─'.repeat(lines[0]?.length ?? 0))
  return lines.join('\n')
}

function count(value: number): string {
  return value.toLocaleString('en')
}

function megabytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(bytes < 2 ** 20 ? 1 : 0)} MB`
}

function milliseconds(value: number | undefined): string {
  return value === undefined ? '—' : `${value.toFixed(2)} ms`
}

function bar(share: number): string {
  const length = width - 9
  const full = Math.round(Math.min(1, share) * length)
  return '█'.repeat(full) + '░'.repeat(length - full)
}

/** Pads by what is seen: colours take no room. */
function pad(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: colours begin with one
  const seen = text.replace(/\u001b\[\d+m/g, '').length
  return text + ' '.repeat(Math.max(0, width - seen))
}
