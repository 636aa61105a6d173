// Figures: what was measured, as a ratio to a peer of the same run, with its goal where there is one.
import { execFileSync } from 'node:child_process'
import { cpus, loadavg } from 'node:os'
import { styleText } from 'node:util'
import type { Standing } from './contest.ts'

export type Figure = {
  /** Reads on from the number: "3.9× the time of an empty Node-API function". */
  what: string
  goal?: { atMost: number } | { atLeast: number }
  /** Of the rounds: the smallest and the greatest. */
  spread?: [number, number]
} & ({ ratio: number } | { /** Where the goal is a time. */ ms: number })

/** What is no time. */
export interface Measure {
  unit: string
  /** Median over the rounds. */
  value: number
  turns: number[]
}

export interface Group {
  name: string
  standings: Record<string, Standing>
  measures?: Record<string, Measure>
  figures: Figure[]
}

export function passes(figure: Figure): boolean | undefined {
  const { goal } = figure
  const value = 'ms' in figure ? figure.ms : figure.ratio
  if (!goal) return undefined
  return 'atMost' in goal ? value <= goal.atMost : value >= goal.atLeast
}

export function show({ name, standings, measures = {}, figures }: Group): string {
  const width = Math.max(...[standings, measures].flatMap((all) => Object.keys(all).map((key) => key.length)))
  const lines = [`\n${name}`]
  const line = (key: string, value: number, turns: number[], told: (value: number) => string) => {
    const spread = turns.length > 1 ? `   ${told(Math.min(...turns))} … ${told(Math.max(...turns))}` : ''
    lines.push(`  ${key.padEnd(width)}  ${told(value).padStart(9)}${spread}`)
  }
  for (const [key, { ns, turns }] of Object.entries(standings)) line(key, ns, turns, time)
  for (const [key, { value, turns, unit }] of Object.entries(measures)) {
    line(key, value, turns, (value) => `${value < 100 ? Number(value.toFixed(1)) : value.toFixed(0)} ${unit}`)
  }
  return [...lines, ...figures.map(verdict)].join('\n')
}

/** One line: number, meaning, goal, and whether it is met. */
export function verdict(figure: Figure): string {
  const { what, goal, spread } = figure
  const unit = 'ms' in figure ? ' ms' : '×'
  const range = spread ? ` (${spread.map(number).join(' … ')})` : ''
  const line = `  ${`${number('ms' in figure ? figure.ms : figure.ratio)}${unit}`.padStart(8)} ${what}${range}`
  if (!goal) return line
  const wanted = 'atMost' in goal ? `at most ${goal.atMost}${unit}` : `at least ${goal.atLeast}${unit}`
  return `${line}; goal: ${wanted}  ${passes(figure) ? paint('green', 'PASS') : paint('red', 'MISS')}`
}

/** Three digits: a goal of 1.03 needs them. */
function number(value: number): string {
  return value.toFixed(value < 2 ? 3 : value < 10 ? 2 : value < 100 ? 1 : 0)
}

function paint(color: 'green' | 'red', text: string): string {
  return process.stdout.isTTY && process.stdout.hasColors() ? styleText(color, text) : text
}

export function time(ns: number): string {
  if (ns < 1e3) return `${ns.toFixed(1)} ns`
  if (ns < 1e6) return `${(ns / 1e3).toFixed(2)} µs`
  if (ns < 1e9) return `${(ns / 1e6).toFixed(2)} ms`
  return `${(ns / 1e9).toFixed(2)} s`
}

/** Of a memory. */
export function size(mib: number): string {
  return mib < 1024 ? `${mib} MiB` : `${mib / 1024} GiB`
}

/** Where and when: a figure without that is a rumour. */
export function circumstances() {
  return {
    date: new Date().toISOString(),
    commit: commit(),
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: cpus().length,
    /** Of the last minute; 0 where the system does not tell. */
    load: loadavg()[0] ?? 0,
    node: process.version,
    v8: process.versions.v8,
    system: `${process.platform} ${process.arch}`,
  }
}

function commit(): string {
  try {
    return execFileSync('git', ['describe', '--always', '--dirty'], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    }).trim()
  } catch {
    return 'none'
  }
}
