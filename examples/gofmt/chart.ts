// Memory over calls as an SVG, drawn by Vega: both sides on one scale, and the managed side again from close by.
import { type Mark, parse, type Spec, View } from 'vega'
import type { Lane } from './main.ts'

export interface Run {
  plain: Lane
  managed: Lane
  total: number
  boundMB: number
}

const width = 900
const tall = 280
const low = 130
const gap = 50

export function drawChart(run: Run): Promise<string> {
  const { plain, managed, total, boundMB } = run
  const highest = Math.max(boundMB, ...[...plain.history, ...managed.history].map(([, bytes]) => bytes / 2 ** 20))
  const spec: Spec = {
    $schema: 'https://vega.github.io/schema/vega/v6.json',
    width,
    height: tall + gap + low,
    // No browser measures the text here, so the room around the panels is stated.
    autosize: 'none',
    padding: { top: 84, left: 80, right: 24, bottom: 50 },
    background: 'white',
    title: {
      text: `The Go formatter leaks: linear memory over ${count(total)} calls`,
      subtitle: [told(plain), told(managed)],
      anchor: 'start',
      fontSize: 15,
      subtitleFontSize: 12,
      subtitlePadding: 6,
      offset: 12,
    },
    data: [
      { name: 'both', values: [...points(plain, total), ...points(managed, total)] },
      { name: 'managed', values: points(managed, total) },
    ],
    scales: [
      { name: 'x', type: 'linear', domain: [0, total], range: [0, width] },
      {
        name: 'color',
        type: 'ordinal',
        domain: [plain.title, managed.title],
        range: [plain.color, managed.color],
      },
    ],
    marks: [
      panel({ top: 0, height: tall, domain: highest * 1.12, marks: [...lines('both'), ...names(run), ...death(run)] }),
      panel({
        top: tall + gap,
        height: low,
        domain: boundMB * 1.12,
        title: `${managed.title}, from close by`,
        marks: [...lines('managed'), bound(run)],
      }),
    ],
  }
  return new View(parse(spec), { renderer: 'none' }).toSVG()
}

interface Panel {
  top: number
  height: number
  /** Megabytes at the upper edge. */
  domain: number
  title?: string
  marks: Mark[]
}

function panel({ top, height, domain, title, marks }: Panel): Mark {
  return {
    type: 'group',
    encode: { enter: { y: { value: top }, width: { value: width }, height: { value: height } } },
    scales: [{ name: 'y', type: 'linear', domain: [0, domain], range: [height, 0] }],
    ...(title ? { title: { text: title, anchor: 'start', fontWeight: 'normal', fontSize: 12 } } : {}),
    axes: [
      { orient: 'bottom', scale: 'x', format: ',d', tickCount: 10, ...(title ? { title: 'calls' } : {}) },
      { orient: 'left', scale: 'y', title: 'MB', grid: true, format: ',d', tickCount: title ? 4 : 8 },
    ],
    marks,
  }
}

function lines(data: string): Mark[] {
  return [
    {
      type: 'group',
      from: { facet: { name: 'side', data, groupby: ['side', 'alive'] } },
      marks: [
        {
          type: 'line',
          from: { data: 'side' },
          encode: {
            enter: {
              x: { scale: 'x', field: 'call' },
              y: { scale: 'y', field: 'mb' },
              stroke: { scale: 'color', field: 'side' },
              strokeWidth: { value: 2 },
              interpolate: { value: 'step-after' },
              strokeDash: { signal: 'datum.alive ? [] : [3, 5]' },
            },
          },
        },
      ],
    },
  ]
}

/** Each line's name, on the line. */
function names({ plain, managed, total, boundMB }: Run): Mark[] {
  const name = (lane: Lane, call: number, mb: number): Mark => ({
    type: 'text',
    encode: {
      enter: {
        x: { scale: 'x', value: call },
        y: { scale: 'y', value: mb, offset: -9 },
        align: { value: 'right' },
        text: { value: lane.title },
        fill: { value: lane.color },
        fontSize: { value: 12 },
      },
    },
  })
  return [
    name(plain, plain.firstFailure?.call ?? plain.calls, plain.memoryBytes / 2 ** 20),
    name(managed, total, boundMB),
  ]
}

/** A cross where the left side died, and the words for it on the side where there is room. */
function death({ plain, total }: Run): Mark[] {
  if (!plain.firstFailure) return []
  const { call } = plain.firstFailure
  const early = call < total * 0.6
  const at = { x: { scale: 'x', value: call }, y: { scale: 'y', value: plain.memoryBytes / 2 ** 20 } }
  return [
    {
      type: 'symbol',
      encode: {
        enter: {
          ...at,
          shape: { value: 'cross' },
          size: { value: 240 },
          angle: { value: 45 },
          fill: { value: plain.color },
        },
      },
    },
    {
      type: 'text',
      encode: {
        enter: {
          x: { ...at.x, offset: early ? 16 : -16 },
          y: { ...at.y, offset: 18 },
          align: { value: early ? 'left' : 'right' },
          text: { value: `dead at call ${count(call)}: every call from here on fails` },
          fill: { value: plain.color },
          fontWeight: { value: 'bold' },
          fontSize: { value: 12 },
        },
      },
    },
  ]
}

function bound({ managed, boundMB }: Run): Mark {
  return {
    type: 'rule',
    encode: {
      enter: {
        x: { value: 0 },
        x2: { value: width },
        y: { scale: 'y', value: boundMB },
        stroke: { value: managed.color },
        strokeDash: { value: [6, 4] },
        opacity: { value: 0.6 },
      },
    },
  }
}

function told({ title, correct, failed, firstFailure, reloads }: Lane): string {
  const reloaded = reloads > 0 ? `, ${count(reloads)} reloads` : ''
  const broke = firstFailure ? `, ${count(failed)} calls failed with ${firstFailure.text}` : ''
  return `${title}: ${count(correct)} right answers${broke}${reloaded}.`
}

/** Steps of one side; what follows its death is a line of its own. */
function points({ title, history, firstFailure, calls }: Lane, total: number) {
  const point = (call: number, bytes: number, alive: boolean) => ({ side: title, call, mb: bytes / 2 ** 20, alive })
  const last = history.at(-1)?.[1] ?? 0
  const end = firstFailure?.call ?? calls
  const alive = history.filter(([call]) => call <= end).map(([call, bytes]) => point(call, bytes, true))
  const after = firstFailure ? [point(end, last, false), point(total, last, false)] : []
  return [...alive, point(end, last, true), ...after]
}

function count(value: number): string {
  return value.toLocaleString('en')
}
