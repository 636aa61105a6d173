// Memory over calls as an SVG: both sides on one scale, and the managed side's first reloads from close by.
import type { Mark } from 'vega'
import { bound, cross, drawPage, gap, label, lines, panel } from '../chart.ts'
import { count } from '../terminal.ts'
import type { Lane } from './main.ts'

export interface Run {
  plain: Lane
  managed: Lane
  total: number
  boundMB: number
}

const tall = 280
const low = 130
/** As many reloads as the close view shows: few enough to see what happens between them. */
const seenClose = 6

export function drawChart(run: Run): Promise<string> {
  const { plain, managed, total, boundMB } = run
  const close = firstReloads(managed) ?? total
  const highest = Math.max(boundMB, ...[...plain.history, ...managed.history].map(([, bytes]) => bytes / 2 ** 20))
  return drawPage({
    height: tall + gap + low,
    title: `The Go formatter leaks: linear memory over ${count(total)} calls`,
    told: [told(plain), told(managed)],
    colors: { [plain.title]: plain.color, [managed.title]: managed.color },
    data: [
      { name: 'both', values: [...points(plain, total), ...points(managed, total)] },
      { name: 'managed', values: points(managed, total, close) },
    ],
    marks: [
      panel({
        top: 0,
        height: tall,
        calls: total,
        megabytes: highest * 1.12,
        marks: [
          lines('both'),
          label(plain.title, plain.color, plain.firstFailure?.call ?? plain.calls, plain.memoryBytes / 2 ** 20),
          label(managed.title, managed.color, total, boundMB),
          ...death(run),
        ],
      }),
      panel({
        top: tall + gap,
        height: low,
        calls: close,
        megabytes: boundMB * 1.12,
        title: close < total ? `${managed.title}: its first ${count(close)} calls` : managed.title,
        counted: 'calls',
        marks: [lines('managed'), bound(boundMB, managed.color)],
      }),
    ],
  })
}

/** A cross where the left side died, and the words for it on the side where there is room. */
function death({ plain, total }: Run): Mark[] {
  if (!plain.firstFailure) return []
  const { call } = plain.firstFailure
  const early = call < total * 0.6
  const at = { x: { scale: 'x', value: call }, y: { scale: 'y', value: plain.memoryBytes / 2 ** 20 } }
  return [
    cross(plain.color, call, plain.memoryBytes / 2 ** 20),
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
