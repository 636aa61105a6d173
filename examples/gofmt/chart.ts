// Memory over calls as an SVG, drawn by Vega: both sides on one scale, and the managed side's first reloads from close by.
import { type Mark, parse, type Spec, View } from 'vega'
import type { Lane } from './main.ts'
import { count } from './screen.ts'

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
/** As many reloads as the close view shows: few enough to see what happens between them. */
const seenClose = 6

export function drawChart(run: Run): Promise<string> {
  const { plain, managed, total, boundMB } = run
  const close = firstReloads(managed) ?? total
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
      { name: 'managed', values: points(managed, total, close) },
    ],
    scales: [
      {
        name: 'color',
        type: 'ordinal',
        domain: [plain.title, managed.title],
        range: [plain.color, managed.color],
      },
    ],
    marks: [
      panel({
        top: 0,
        height: tall,
        calls: total,
        megabytes: highest * 1.12,
        marks: [...lines('both'), ...names(run), ...death(run)],
      }),
      panel({
        top: tall + gap,
        height: low,
        calls: close,
        megabytes: boundMB * 1.12,
        title: close < total ? `${managed.title}: its first ${count(close)} calls` : managed.title,
        marks: [...lines('managed'), bound(run)],
      }),
    ],
  }
  return new View(parse(spec), { renderer: 'none' }).toSVG()
}

interface Panel {
  top: number
  height: number
  /** At the right edge. */
  calls: number
  /** At the upper edge. */
  megabytes: number
  title?: string
  marks: Mark[]
}

function panel({ top, height, calls, megabytes, title, marks }: Panel): Mark {
  return {
    type: 'group',
    encode: { enter: { y: { value: top }, width: { value: width }, height: { value: height } } },
    scales: [
      { name: 'x', type: 'linear', domain: [0, calls], range: [0, width] },
      { name: 'y', type: 'linear', domain: [0, megabytes], range: [height, 0] },
    ],
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

/** Until when the close view lasts; nothing if all there is fits. */
function firstReloads({ history }: Lane): number | undefined {
  const reloads = history.filter(([, bytes], at) => bytes < (history[at - 1]?.[1] ?? 0))
  return reloads.length > 2 * seenClose ? reloads[seenClose]?.[0] : undefined
}

/** Steps of one side, up to a call; what follows its death is a line of its own. */
function points({ title, history, firstFailure, calls }: Lane, total: number, until = total) {
  const point = (call: number, bytes: number, alive: boolean) => ({ side: title, call, mb: bytes / 2 ** 20, alive })
  const end = Math.min(until, firstFailure?.call ?? calls)
  const shown = history.filter(([call]) => call <= end)
  const last = shown.at(-1)?.[1] ?? 0
  const alive = shown.map(([call, bytes]) => point(call, bytes, true))
  const after = firstFailure && end < until ? [point(end, last, false), point(until, last, false)] : []
  return [...alive, point(end, last, true), ...after]
}
