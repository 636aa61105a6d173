// Time per script of each way, on a scale of powers of ten, and memory over scripts where one interpreter takes them all, as an SVG.
import type { Mark } from 'vega'
import { cross, drawPage, gap, label, lines, panel, panelTitle, width } from '../chart.ts'
import { count } from '../terminal.ts'
import type { Lane } from './demo.ts'

export interface Run {
  /** All ways, each with its time per script in milliseconds and what is said of it. */
  bars: { lane: Lane; medianMs: number; p99Ms: number; text: string }[]
  /** Those whose memory is shown. */
  isolated: Lane
  shared: Lane
  total: number
  memoryMB: number
}

const barHeight = 38
const tall = 230

export function drawChart(run: Run): Promise<string> {
  const { bars, isolated, shared, total, memoryMB } = run
  const top = bars.length * barHeight
  return drawPage({
    height: top + 1.7 * gap + tall,
    left: 285,
    above: 24,
    title: `Scripts of ${count(total)} users in QuickJS, each of them able to spoil it for the others`,
    told: bars.map(({ text }) => text),
    colors: Object.fromEntries(bars.map(({ lane }) => [lane.what, lane.color])),
    data: [
      { name: 'bars', values: bars.map(({ lane, medianMs, p99Ms }) => ({ side: lane.what, medianMs, p99Ms })) },
      { name: 'memory', values: [...points(shared), ...points(isolated)] },
    ],
    marks: [
      times(run, top),
      panel({
        top: top + 1.7 * gap,
        height: tall,
        calls: total,
        megabytes: Math.max(1, ...[isolated, shared].map(highest)) * 1.2,
        title: `Linear memory that has pages behind it, after each script; it cannot grow beyond ${count(memoryMB)} MB`,
        counted: 'scripts',
        marks: [
          lines('memory'),
          // Under its line: the other one comes down to it from above.
          label(isolated.what, isolated.color, total, last(isolated) - highest(shared) * 0.12),
          label(`${shared.what}${replaced(shared)}`, shared.color, total, highest(shared)),
          ...full(shared),
        ],
      }),
    ],
  })
}

/** A bar to the median of each way, and a thin line on to the p99. */
function times({ bars }: Run, height: number): Mark {
  const all = bars.flatMap(({ medianMs, p99Ms }) => [medianMs, p99Ms]).filter((ms) => ms > 0)
  const domain = [10 ** Math.floor(Math.log10(Math.min(...all))), 10 ** Math.ceil(Math.log10(Math.max(...all)))]
  const middle = { scale: 'y', field: 'side', band: 0.5 }
  return {
    type: 'group',
    encode: { enter: { width: { value: width }, height: { value: height } } },
    title: panelTitle('Milliseconds a script: median, the thin line to the p99'),
    scales: [
      { name: 'x', type: 'log', domain, range: [0, width] },
      { name: 'y', type: 'band', domain: { data: 'bars', field: 'side' }, range: [0, height], padding: 0.3 },
    ],
    axes: [
      { orient: 'bottom', scale: 'x', grid: true, gridScale: 'y', format: '~r', values: powers(domain) },
      { orient: 'left', scale: 'y', ticks: false, domain: false, labelFontSize: 12, labelLimit: 0, labelPadding: 8 },
    ],
    marks: [
      {
        type: 'rect',
        from: { data: 'bars' },
        encode: {
          enter: {
            x: { value: 0 },
            x2: { scale: 'x', field: 'medianMs' },
            y: { scale: 'y', field: 'side' },
            height: { scale: 'y', band: 1 },
            fill: { scale: 'color', field: 'side' },
          },
        },
      },
      {
        type: 'rule',
        from: { data: 'bars' },
        encode: {
          enter: {
            x: { scale: 'x', field: 'medianMs' },
            x2: { scale: 'x', field: 'p99Ms' },
            y: middle,
            stroke: { scale: 'color', field: 'side' },
            strokeWidth: { value: 2 },
          },
        },
      },
      {
        type: 'text',
        from: { data: 'bars' },
        encode: {
          enter: {
            x: { scale: 'x', field: 'medianMs', offset: -6 },
            y: middle,
            align: { value: 'right' },
            baseline: { value: 'middle' },
            fill: { value: 'white' },
            fontWeight: { value: 'bold' },
            text: { signal: "format(datum.medianMs, '.3~r') + ' ms'" },
          },
        },
      },
    ],
  }
}

function powers([from = 1, to = 1]: number[]): number[] {
  return Array.from({ length: Math.round(Math.log10(to / from)) + 1 }, (_, at) => from * 10 ** at)
}

function last({ samples }: Lane): number {
  return (samples.at(-1)?.[1] ?? 0) / 2 ** 20
}

function highest({ samples }: Lane): number {
  return Math.max(0, ...samples.map(([, bytes]) => bytes)) / 2 ** 20
}

/** Where the line comes down. */
function replaced({ ending }: Lane): string {
  const times = (ending?.generation ?? 1) - 1
  return times > 0 ? `, replaced ${count(times)} × after an endless script` : ''
}

/** Where there was no room for the first time. */
function full(shared: Lane): Mark[] {
  const { firstFull, samples, color } = shared
  if (firstFull === undefined) return []
  const [, bytes = 0] = samples.filter(([script]) => script <= firstFull).at(-1) ?? []
  const words = `full at script ${count(firstFull)}`
  return [cross(color, firstFull, bytes / 2 ** 20), label(words, color, firstFull, highest(shared), 'left')]
}

function points({ what, samples, scripts }: Lane) {
  const end = samples.at(-1)?.[1] ?? 0
  return [...samples, [scripts, end] as const].map(([call, bytes]) => ({
    side: what,
    call,
    mb: bytes / 2 ** 20,
    alive: true,
  }))
}
