// What the charts of the demo share: a page with a title, and panels of megabytes over calls. Drawn by Vega.
import { type Mark, parse, type Spec, View } from 'vega'

export const width = 900
export const gap = 50

/** Room to the left is for the labels of an axis. */
const padding = { left: 80, right: 24, bottom: 50 }

export interface Page extends Pick<Spec, 'data' | 'marks'> {
  height: number
  title: string
  /** One line for each side. */
  told: string[]
  /** Each side's colour, by its name: the scale `color`. */
  colors: Record<string, string>
  /** More room to the left. */
  left?: number
  /** More room above, for the title of a first panel. */
  above?: number
}

export function drawPage({
  height,
  title,
  told,
  colors,
  data,
  marks,
  left = padding.left,
  above = 0,
}: Page): Promise<string> {
  const spec: Spec = {
    $schema: 'https://vega.github.io/schema/vega/v6.json',
    width,
    height,
    // No browser measures the text here, so the room around the panels is stated.
    autosize: 'none',
    padding: { ...padding, left, top: 50 + above + 17 * told.length },
    background: 'white',
    title: {
      text: title,
      subtitle: told,
      anchor: 'start',
      frame: 'group',
      fontSize: 15,
      subtitleFontSize: 12,
      subtitlePadding: 6,
      offset: 12 + above,
    },
    data,
    scales: [{ name: 'color', type: 'ordinal', domain: Object.keys(colors), range: Object.values(colors) }],
    marks,
  }
  return new View(parse(spec), { renderer: 'none' }).toSVG()
}

export interface Panel {
  top: number
  height: number
  /** At the right edge. */
  calls: number
  /** At the upper edge. */
  megabytes: number
  title?: string
  /** What the lower axis counts. Default: nothing is said. */
  counted?: string
  marks: Mark[]
}

/** Its scales are `x`, in calls, and `y`, in megabytes. */
export function panel({ top, height, calls, megabytes, title, counted, marks }: Panel): Mark {
  return {
    type: 'group',
    encode: { enter: { y: { value: top }, width: { value: width }, height: { value: height } } },
    scales: [
      { name: 'x', type: 'linear', domain: [0, calls], range: [0, width] },
      { name: 'y', type: 'linear', domain: [0, megabytes], range: [height, 0] },
    ],
    ...(title ? { title: panelTitle(title) } : {}),
    axes: [
      { orient: 'bottom', scale: 'x', format: ',d', tickCount: 10, ...(counted ? { title: counted } : {}) },
      { orient: 'left', scale: 'y', title: 'MB', grid: true, format: ',d', tickCount: height < 200 ? 4 : 8 },
    ],
    marks,
  }
}

export function panelTitle(text: string) {
  return { text, anchor: 'start', frame: 'group', fontWeight: 'normal', fontSize: 12 } as const
}

/** A line for each side in the data: fields `side`, `call`, `mb`, and `alive`, without which it is dotted. */
export function lines(data: string): Mark {
  return {
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
  }
}

/** A side's name, or other words, at a point of a panel. */
export function label(text: string, color: string, call: number, mb: number, align: 'left' | 'right' = 'right'): Mark {
  return {
    type: 'text',
    encode: {
      enter: {
        x: { scale: 'x', value: call },
        y: { scale: 'y', value: mb, offset: -9 },
        align: { value: align },
        text: { value: text },
        fill: { value: color },
        fontSize: { value: 12 },
      },
    },
  }
}

/** Where a line comes to its end. */
export function cross(color: string, call: number, mb: number): Mark {
  return {
    type: 'symbol',
    encode: {
      enter: {
        x: { scale: 'x', value: call },
        y: { scale: 'y', value: mb },
        shape: { value: 'cross' },
        size: { value: 240 },
        angle: { value: 45 },
        fill: { value: color },
      },
    },
  }
}

/** A dashed line across a panel. */
export function bound(mb: number, color: string): Mark {
  return {
    type: 'rule',
    encode: {
      enter: {
        x: { value: 0 },
        x2: { value: width },
        y: { scale: 'y', value: mb },
        stroke: { value: color },
        strokeDash: { value: [6, 4] },
        opacity: { value: 0.6 },
      },
    },
  }
}
