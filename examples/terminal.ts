// What the scenes of the demo say in a terminal: tables, figures, colours, and text that is redrawn in place.

import { relative } from 'node:path'
import { clearScreenDown, moveCursor } from 'node:readline'
import { styleText } from 'node:util'

const out = process.stdout
const gap = '   '

/** Rows of cells, the first one a heading, as columns; the first column holds labels. */
export function table(rows: string[][]): string {
  const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? []
  const lines = rows.map((row) =>
    row
      .map((cell, column) => (column === 0 ? cell.padEnd(widths[0] ?? 0) : cell.padStart(widths[column] ?? 0)))
      .join(gap),
  )
  lines.splice(1, 0, '─'.repeat(lines[0]?.length ?? 0))
  return lines.join('\n')
}

/** Columns of lines, side by side. */
export function sideBySide(columns: string[][]): string[] {
  return columns[0]?.map((_, row) => columns.map((column) => column[row]).join(gap)) ?? []
}

/** How wide a terminal must be for columns side by side. */
export function widthOf(columns: number, columnWidth: number): number {
  return columns * columnWidth + (columns - 1) * gap.length
}

/** Lines that each drawing replaces. */
export class Redrawn {
  /** A line that wraps could not be drawn over, so a narrow terminal is treated as a pipe. */
  readonly isPossible: boolean
  /** Lines to go back over. */
  #drawn = 0

  constructor(width: number) {
    this.isPossible = out.isTTY && out.columns >= width
  }

  draw(lines: string[]): void {
    if (this.#drawn > 0) moveCursor(out, 0, -this.#drawn)
    clearScreenDown(out)
    out.write(`${lines.join('\n')}\n`)
    this.#drawn = lines.length
  }
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

export function bar(share: number, length: number): string {
  const full = Math.round(Math.min(1, share) * length)
  return '█'.repeat(full) + '░'.repeat(length - full)
}

/** Pads by what is seen: colours take no room. */
export function pad(text: string, width: number): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: colours begin with one
  const seen = text.replace(/\u001b\[\d+m/g, '').length
  return text + ' '.repeat(Math.max(0, width - seen))
}

/** A path as one would type it here. */
export function inside(path: string): string {
  const short = relative(process.cwd(), path)
  return short.startsWith('..') ? path : short
}
