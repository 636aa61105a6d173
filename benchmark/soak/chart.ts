// The soak as an SVG: a panel for each thing that is held, over time, and one for what was done meanwhile.
import { type Held, type Sample, tolerances, type Verdict } from './samples.ts'

const [width, height, gap, left, right, top] = [900, 110, 42, 80, 24, 76]
const [ink, faint, line, good, bad] = ['#222', '#ddd', '#1f77b4', '#2ca02c', '#d62728']

interface Panel {
  title: string
  color: string
  points: [seconds: number, value: number][]
  /** The medians that were compared. */
  verdict?: { middle: number; last: number; most: number; isFlat: boolean }
}

export function drawSoak(samples: Sample[], verdicts: Verdict[], title: string, told: string[]): string {
  const end = samples.at(-1)?.seconds ?? 1
  const panels: Panel[] = [
    ...verdicts.map(({ held, middle, last, most, isFlat }) => {
      const { unit } = tolerances[held]
      return {
        title: panelTitle(held),
        color: line,
        points: points(samples, held, unit),
        verdict: { middle: middle / unit, last: last / unit, most: most / unit, isFlat },
      }
    }),
    { title: 'answers a second', color: '#9467bd', points: rates(samples, 'answers') },
    { title: 'recycles a second', color: '#8c564b', points: rates(samples, 'recycles') },
  ]
  const tall = top + panels.length * (height + gap)
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${left + width + right}" height="${tall}" viewBox="0 0 ${left + width + right} ${tall}" font-family="sans-serif" fill="${ink}">`,
    `<rect width="100%" height="100%" fill="white"/>`,
    `<text x="${left}" y="24" font-size="15" font-weight="bold">${escaped(title)}</text>`,
    ...told.map((text, at) => `<text x="${left}" y="${43 + 16 * at}" font-size="12">${escaped(text)}</text>`),
    ...panels.map((panel, at) => draw(panel, end, top + at * (height + gap) + 20)),
    '</svg>',
  ]
  return `${parts.join('\n')}\n`
}

function panelTitle(held: Held): string {
  const { title, suffix } = tolerances[held]
  return suffix ? `${title},${suffix}` : title
}

function draw({ title, color, points, verdict }: Panel, end: number, y: number): string {
  const inner = height - 20
  const highest = Math.max(1e-9, verdict?.most ?? 0, ...points.map(([, value]) => value)) * 1.1
  const px = (seconds: number) => number((seconds / end) * width)
  const py = (value: number) => number(inner - (value / highest) * inner)
  const parts = [`<g transform="translate(${left} ${y})">`, `<text y="-6" font-size="12">${escaped(title)}</text>`]
  for (const value of ticks(highest, 3)) {
    parts.push(
      `<line x2="${width}" y1="${py(value)}" y2="${py(value)}" stroke="${faint}"/>`,
      `<text x="-6" y="${py(value) + 4}" font-size="11" text-anchor="end">${value.toLocaleString('en')}</text>`,
    )
  }
  for (const value of ticks(end, 10)) {
    parts.push(
      `<text x="${px(value)}" y="${inner + 14}" font-size="11" text-anchor="middle">${value.toLocaleString('en')} s</text>`,
    )
  }
  parts.push(
    `<polyline fill="none" stroke="${color}" stroke-width="1.5" points="${points.map(([x, value]) => `${px(x)},${py(value)}`).join(' ')}"/>`,
  )
  if (verdict) {
    const level = (from: number, to: number, value: number, stroke: string, dash = '') =>
      `<line x1="${px(from)}" x2="${px(to)}" y1="${py(value)}" y2="${py(value)}" stroke="${stroke}" stroke-width="2"${dash && ` stroke-dasharray="${dash}"`}/>`
    const stroke = verdict.isFlat ? good : bad
    parts.push(
      level(end / 3, (2 * end) / 3, verdict.middle, stroke),
      level((2 * end) / 3, end, verdict.last, stroke),
      level((2 * end) / 3, end, verdict.most, bad, '6 4'),
    )
  }
  parts.push('</g>')
  return parts.join('\n')
}

function points(samples: Sample[], held: Held, unit: number): Panel['points'] {
  return samples.flatMap((one) => {
    const value = one[held]
    return value === undefined ? [] : [[one.seconds, value / unit] as [number, number]]
  })
}

function rates(samples: Sample[], what: 'answers' | 'recycles'): Panel['points'] {
  return samples.slice(1).map((one, at) => {
    const before = samples[at] as Sample
    return [one.seconds, (one[what] - before[what]) / Math.max(0.001, one.seconds - before.seconds)]
  })
}

/** Round numbers from 0 to at most the end. */
function ticks(end: number, about: number): number[] {
  const raw = end / about
  const power = 10 ** Math.floor(Math.log10(raw))
  const step = ([1, 2, 5, 10].find((factor) => factor * power >= raw) ?? 10) * power
  return Array.from({ length: Math.floor(end / step) + 1 }, (_, at) => number(at * step))
}

function number(value: number): number {
  return Number(value.toFixed(2))
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
}
