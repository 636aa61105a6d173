// Contestants measured in turns: round after round, each once, so that a busy minute of the machine hits all alike.
import { measure } from 'mitata'

/** One turn: nanoseconds for one operation. */
export type Turn = () => number | Promise<number>

export interface Standing {
  /** Median over the rounds, nanoseconds for one operation. */
  ns: number
  turns: number[]
}

export interface Effort {
  rounds: number
  /** Milliseconds that mitata spends on one turn of a hot function. */
  turnMs: number
  /** Scales loops of slow operations: 1 in full, less for a look. */
  share: number
  /** What stands for a large memory, MiB. */
  largeMib: number
}

/** Everything runs and nothing is learned: for CI. */
export const smoke: Effort = { rounds: 1, turnMs: 5, share: 0.02, largeMib: 64 }
export const full: Effort = { rounds: 9, turnMs: 150, share: 1, largeMib: 1024 }

export async function contest<Name extends string>(
  rounds: number,
  turns: Record<Name, Turn>,
): Promise<Record<Name, Standing>> {
  const names = Object.keys(turns) as Name[]
  const taken = Object.fromEntries(names.map((name) => [name, [] as number[]])) as Record<Name, number[]>
  await takeTurns(rounds, names, async (name) => void taken[name].push(await turns[name]()))
  const standing = (name: Name): Standing => ({ ns: median(taken[name]), turns: taken[name] })
  return Object.fromEntries(names.map((name) => [name, standing(name)])) as Record<Name, Standing>
}

/** A turn for a function that may be as quick as a few nanoseconds; mitata knows how to batch those. `per`: operations in one call. */
export function hot(effort: Effort, fn: () => unknown, per = 1): Turn {
  return async () => {
    const nanoseconds = effort.turnMs * 1e6
    const { p50 } = await measure(fn, { min_cpu_time: nanoseconds, min_samples: 3 })
    return p50 / per
  }
}

const settings = 3

/**
 * A turn for work of many microseconds: the mean of `count` calls after each other, each the best of three fresh settings.
 * What another process takes away falls out; what the work itself needs now and then, as growing memory, stays in.
 */
export function slow(count: number, prepare: () => (() => unknown) | Promise<() => unknown>): Turn {
  return async () => {
    const best = new Array<number>(Math.max(1, Math.ceil(count))).fill(Number.POSITIVE_INFINITY)
    for (let setting = 0; setting < settings; setting++) {
      const fn = await prepare()
      for (let call = 0; call < best.length; call++) {
        const start = process.hrtime.bigint()
        fn()
        best[call] = Math.min(best[call] ?? 0, since(start))
      }
    }
    return best.reduce((sum, ns) => sum + ns, 0) / best.length
  }
}

/** A turn for what has a part before or after it that is not measured: the median of so many times `once` gives. */
export function repeated(count: number, once: () => number | Promise<number>): Turn {
  return async () => {
    const taken: number[] = []
    while (taken.length < count) taken.push(await once())
    return median(taken)
  }
}

/** Nanoseconds since a moment. */
export function since(start: bigint): number {
  return Number(process.hrtime.bigint() - start)
}

/** Rounds in which all have their turn. The order turns round, so that nobody always follows the same neighbour. */
export async function takeTurns<Contestant>(
  rounds: number,
  contestants: readonly Contestant[],
  turn: (contestant: Contestant) => Promise<void>,
): Promise<void> {
  for (let round = 0; round < rounds; round++) {
    for (let at = 0; at < contestants.length; at++) {
      await turn(contestants[(at + round) % contestants.length] as Contestant)
    }
  }
}

/** A quantile of milliseconds, over all rounds and of each. */
export function percentile(rounds: number[][], p: number): Standing {
  const ns = (values: number[]) => quantile(values, p) * 1e6
  return { ns: ns(rounds.flat()), turns: rounds.map(ns) }
}

/** The ratio of two contestants, round by round, and then its median: what disturbs a whole round cancels out. */
export function ratio(over: Standing, under: Standing): number {
  return ratios(over, under).ratio
}

/** The same, with the smallest and the greatest of the rounds. */
export function ratios(over: Standing, under: Standing): { ratio: number; spread: [number, number] } {
  const all = over.turns.map((ns, round) => ns / (under.turns[round] ?? under.ns))
  return { ratio: median(all), spread: [Math.min(...all), Math.max(...all)] }
}

export function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  const upper = sorted[middle] ?? Number.NaN
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] ?? upper)) / 2
}

/** The smallest value that a share `p` of all does not exceed. */
export function quantile(values: number[], p: number): number {
  const sorted = [...values].sort((a, b) => a - b)
  return sorted[Math.max(0, Math.ceil(p * sorted.length) - 1)] ?? Number.NaN
}
