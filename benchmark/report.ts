// Figures: what was measured, as a ratio to a peer of the same run, with its goal where there is one.
import { execFileSync } from 'node:child_process'
import { cpus } from 'node:os'
import type { Standing } from './contest.ts'

export interface Figure {
  what: string
  /** Ours over the peer's or the other way round, as `unit` says. */
  ratio: number
  unit: string
  goal?: { atMost: number } | { atLeast: number }
}

export interface Group {
  name: string
  standings: Record<string, Standing>
  figures: Figure[]
}

export function passes({ ratio, goal }: Figure): boolean | undefined {
  if (!goal) return undefined
  return 'atMost' in goal ? ratio <= goal.atMost : ratio >= goal.atLeast
}

export function show({ name, standings, figures }: Group): string {
  const width = Math.max(...Object.keys(standings).map((key) => key.length))
  const lines = [`\n${name}`]
  for (const [key, { ns, turns }] of Object.entries(standings)) {
    const spread = turns.length > 1 ? `   (${time(Math.min(...turns))} … ${time(Math.max(...turns))})` : ''
    lines.push(`  ${key.padEnd(width)}  ${time(ns).padStart(9)}${spread}`)
  }
  for (const figure of figures) lines.push(`  → ${figure.what}: ${verdict(figure)}`)
  return lines.join('\n')
}

export function verdict(figure: Figure): string {
  const { ratio, unit, goal } = figure
  const value = `${ratio.toFixed(ratio < 2 ? 3 : ratio < 10 ? 2 : 1)}× ${unit}`
  if (!goal) return value
  const wanted = 'atMost' in goal ? `at most ${goal.atMost}×` : `at least ${goal.atLeast}×`
  return `${value}, goal ${wanted}: ${passes(figure) ? 'PASS' : 'MISS'}`
}

export function time(ns: number): string {
  if (ns < 1e3) return `${ns.toFixed(1)} ns`
  if (ns < 1e6) return `${(ns / 1e3).toFixed(2)} µs`
  if (ns < 1e9) return `${(ns / 1e6).toFixed(2)} ms`
  return `${(ns / 1e9).toFixed(2)} s`
}

/** Where and when: a figure without that is a rumour. */
export function circumstances() {
  return {
    date: new Date().toISOString(),
    commit: commit(),
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: cpus().length,
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
