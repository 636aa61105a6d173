// Whether the machine lets this thread run at all. Where it does not, the patience of half a minute that drains and threads have runs out
// with nobody to blame.

/** How often it is looked at, how late that may be, and for how long it explains what comes after. */
const [lookMs, stallMs, afterMs] = [500, 5000, 90_000]

let last = performance.now()
let stalledAt = Number.NEGATIVE_INFINITY
let count = 0

function look(): void {
  const now = performance.now()
  if (now - last > lookMs + stallMs) {
    stalledAt = now
    count += 1
  }
  last = now
}

setInterval(look, lookMs).unref()

/** Lately, or at this very moment. */
export function wasStalled(): boolean {
  look()
  return performance.now() - stalledAt < afterMs
}

export const stalls = (): number => count
