// What the process holds, once a second, and whether that stays as it is.
import { readdirSync, readFileSync } from 'node:fs'

export interface Sample {
  /** Since the start. */
  seconds: number
  /** Bytes. */
  resident: number
  /** Bytes, after a collection. */
  heap: number
  /** Of the worker, while there is one. */
  workerHeap?: number
  /** What the heaps of both hold outside of them. */
  external: number
  /** Not counted where there is no /proc. */
  descriptors?: number
  threads?: number
  mappings?: number
  /** Since the start. */
  answers: number
  recycles: number
  /** Both environments were at work. */
  isWhole: boolean
}

export type Held = 'resident' | 'heap' | 'workerHeap' | 'external' | 'descriptors' | 'threads' | 'mappings'

interface Tolerance {
  title: string
  /** Of the middle third. */
  share: number
  /** On top of it. */
  more: number
  /** What one of the chart's units is. */
  unit: number
  suffix: string
}

const mib = 2 ** 20

/**
 * By how much the last third may lie above the second: the medians of both, so that one busy second says nothing.
 * Threads and mappings come and go with every change, and on a busy machine they stay for longer.
 */
export const tolerances: Record<Held, Tolerance> = {
  resident: { title: 'resident set', share: 0.05, more: 8 * mib, unit: mib, suffix: ' MiB' },
  heap: { title: 'JS heap', share: 0.05, more: 1 * mib, unit: mib, suffix: ' MiB' },
  workerHeap: { title: "worker's JS heap", share: 0.1, more: 4 * mib, unit: mib, suffix: ' MiB' },
  external: { title: 'external memory', share: 0.2, more: 16 * mib, unit: mib, suffix: ' MiB' },
  descriptors: { title: 'file descriptors', share: 0, more: 4, unit: 1, suffix: '' },
  threads: { title: 'threads', share: 0.05, more: 3, unit: 1, suffix: '' },
  mappings: { title: 'memory mappings', share: 0.05, more: 20, unit: 1, suffix: '' },
}

export interface Verdict {
  held: Held
  /** Medians. */
  middle: number
  last: number
  most: number
  /** There were samples enough. */
  canTell: boolean
  isFlat: boolean
}

/** With fewer samples a third says nothing: in its first minutes a process still gets larger. */
const fewest = 40

export function sample(
  since: number,
  answers: number,
  recycles: number,
  worker?: { heap: number; external: number },
  isWhole = false,
): Sample {
  globalThis.gc?.()
  const { rss: resident, heapUsed: heap, external } = process.memoryUsage()
  return {
    seconds: (performance.now() - since) / 1e3,
    resident,
    heap,
    ...(worker ? { workerHeap: worker.heap } : {}),
    external: external + (worker?.external ?? 0),
    ...fromProc(),
    answers,
    recycles,
    isWhole,
  }
}

function fromProc(): Pick<Sample, 'descriptors' | 'threads' | 'mappings'> {
  try {
    return {
      descriptors: readdirSync('/proc/self/fd').length,
      threads: readdirSync('/proc/self/task').length,
      mappings: readFileSync('/proc/self/maps', 'utf8').split('\n').length,
    }
  } catch {
    return {}
  }
}

/** The values of one kind, if there are any. */
export function values(samples: Sample[], held: Held): number[] {
  return samples.map((one) => one[held]).filter((value) => value !== undefined)
}

/** Of a worker that has just begun, or is about to end, there is less of everything: only what is whole is compared. */
export function judge(samples: Sample[]): Verdict[] {
  const kinds = (Object.keys(tolerances) as Held[]).filter((held) => values(samples, held).length > 0)
  const [middle, last] = thirds(samples).map((third) => third.filter(({ isWhole }) => isWhole)) as [Sample[], Sample[]]
  const canTell = Math.min(middle.length, last.length) >= fewest
  return kinds.map((held) => {
    const before = median(values(middle, held))
    const after = median(values(last, held))
    const { share, more } = tolerances[held]
    const most = before * (1 + share) + more
    return { held, middle: before, last: after, most, canTell, isFlat: !canTell || after <= most }
  })
}

/** The second and the third, by time. */
export function thirds(samples: Sample[]): [Sample[], Sample[]] {
  const end = samples.at(-1)?.seconds ?? 0
  const from = (third: number) => (end * third) / 3
  return [
    samples.filter(({ seconds }) => seconds >= from(1) && seconds < from(2)),
    samples.filter(({ seconds }) => seconds >= from(2)),
  ]
}

function median(numbers: number[]): number {
  const sorted = [...numbers].sort((a, b) => a - b)
  return sorted[sorted.length >> 1] ?? Number.NaN
}
