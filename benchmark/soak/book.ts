// The driver's own account of one manager: what was asked, how each of it ended, and whether that was to be expected.
import { setTimeout } from 'node:timers/promises'
import { type ManagerStats, type RecycleReport, type ReloadReport, WasmError, type WasmErrorCode } from '../../index.js'
import { wasStalled } from './machine.ts'

/** Says of an error whether what was done explains it. */
export type Excuse = (error: unknown) => boolean

export type Outcome<T> = { value: T; error?: undefined } | { value?: undefined; error: unknown }

/** What the manager should have counted. A driver cannot tell whether a call that was stopped had begun, so those two are one. */
interface Counted {
  completed: number
  failed: number
  trapped: number
  stopped: number
}

/** Beyond these, problems are only counted. */
const told = 20

/** How long an answer may take on a busy machine before it counts as lost. */
const lostMs = 300_000

export const codes =
  (...expected: WasmErrorCode[]): Excuse =>
  (error) =>
    error instanceof WasmError && expected.includes(error.code)

/** The very object. */
export const exactly =
  (...expected: unknown[]): Excuse =>
  (error) =>
    expected.includes(error)

export class Book {
  readonly name: string
  asked = 0
  answered = 0
  /** Answers by how they ended: 'ok', a code, or the name of an error. */
  readonly endings = new Map<string, number>()
  readonly problems: string[] = []
  problemCount = 0
  /** What is under way, and since when. */
  readonly #open = new Map<number, { what: string; since: number }>()
  readonly #counted: Counted = { completed: 0, failed: 0, trapped: 0, stopped: 0 }
  readonly #events = { reload: new Map<string, number>(), recycle: new Map<string, number>(), failed: 0, trap: 0 }
  /** Recycles that were resets have no event `reload`. */
  readonly #replaced = new Map<string, number>()
  pressures = 0
  /** What the manager says of itself, for what is not answered. */
  look: () => string = () => ''

  constructor(name: string) {
    this.name = name
  }

  get recycles(): number {
    return sum(this.#events.recycle)
  }

  get reloads(): ReadonlyMap<string, number> {
    return this.#events.reload
  }

  /** By reason. */
  get recycled(): ReadonlyMap<string, number> {
    return this.#events.recycle
  }

  get failures(): number {
    return this.#events.failed
  }

  problem(text: string): void {
    this.problemCount += 1
    if (this.problems.length < told) this.problems.push(`${this.name}: ${text}`)
  }

  /** Follows a call, or anything else that is answered once. `isCall`: the manager counts it. Never rejects. */
  async follow<T>(
    what: string,
    isCall: boolean,
    begin: () => Promise<T>,
    verify: (value: T) => boolean,
    excuse: Excuse = () => false,
  ): Promise<Outcome<T>> {
    const id = this.asked++
    this.#open.set(id, { what, since: performance.now() })
    let outcome: Outcome<T>
    try {
      const value = await begin()
      outcome = { value }
    } catch (error) {
      outcome = { error }
    }
    this.#open.delete(id)
    this.#settle(what, isCall, outcome, verify, excuse, false)
    return outcome
  }

  /** The same for what is answered at once. */
  sync<T>(what: string, isCall: boolean, run: () => T, verify: (value: T) => boolean, excuse?: Excuse): Outcome<T> {
    this.asked += 1
    let outcome: Outcome<T>
    try {
      outcome = { value: run() }
    } catch (error) {
      outcome = { error }
    }
    this.#settle(what, isCall, outcome, verify, excuse ?? (() => false), true)
    return outcome
  }

  /** A call that was made elsewhere, such as in a hook. */
  count(how: keyof Counted, times = 1): void {
    this.#counted[how] += times
  }

  #settle<T>(
    what: string,
    isCall: boolean,
    outcome: Outcome<T>,
    verify: (value: T) => boolean,
    excuse: Excuse,
    isSync: boolean,
  ): void {
    this.answered += 1
    if ('error' in outcome) {
      const { error } = outcome
      add(this.endings, ending(error))
      if (isCall) {
        const how = countedAs(error, isSync)
        if (how) this.#counted[how] += 1
      }
      if (!excuse(error) && !isStarved(error)) this.problem(`${what} ended with ${describe(error)}`)
    } else {
      add(this.endings, 'ok')
      if (isCall) this.#counted.completed += 1
      if (!verify(outcome.value as T)) this.problem(`${what} answered ${String(outcome.value).slice(0, 200)}`)
    }
  }

  /** Takes over what another book has to tell, so that managers which come and go leave nothing behind. */
  absorb(other: Book): void {
    this.asked += other.asked
    this.answered += other.answered
    this.pressures += other.pressures
    this.problemCount += other.problemCount
    this.problems.push(...other.problems.slice(0, Math.max(0, told - this.problems.length)))
    for (const [how, times] of other.endings) add(this.endings, how, times)
    for (const what of ['reload', 'recycle'] as const) {
      for (const [reason, times] of other.#events[what]) add(this.#events[what], reason, times)
    }
    this.#events.failed += other.#events.failed
  }

  /** Reads along with the events of a manager. */
  listen(manager: {
    on(event: 'reload', listener: (report: ReloadReport) => void): unknown
    on(event: 'recycle', listener: (report: RecycleReport) => void): unknown
    on(event: 'reload:failed' | 'trap', listener: (error: WasmError) => void): unknown
    on(event: 'pressure', listener: () => void): unknown
    stats(): ManagerStats
  }): void {
    this.look = () => {
      const { state, generation, instances, inFlight, queued, recyclesDue } = manager.stats()
      return JSON.stringify({ state, generation, instances, inFlight, queued, recyclesDue })
    }
    manager.on('reload', ({ reason }) => add(this.#events.reload, reason))
    manager.on('recycle', ({ reason, strategy }) => {
      add(this.#events.recycle, reason)
      if (strategy !== 'reset') add(this.#replaced, reason)
    })
    manager.on('reload:failed', () => {
      this.#events.failed += 1
    })
    manager.on('trap', () => {
      this.#events.trap += 1
    })
    manager.on('pressure', () => {
      this.pressures += 1
    })
  }

  /** Resolves when everything was answered; what is not by then is a problem. */
  async settled(): Promise<void> {
    const until = performance.now() + lostMs
    while (this.#open.size > 0 && performance.now() < until) await setTimeout(10)
    for (const { what, since } of this.#open.values()) {
      this.problem(`${what} was not answered in ${Math.round((performance.now() - since) / 1e3)} s; ${this.look()}`)
    }
  }

  /** Once the manager is closed and its events are out: what it counted against what was seen. */
  compare(stats: ManagerStats): void {
    const { calls, reloads, reloadsFailed } = stats
    const { completed, failed, trapped, stopped } = this.#counted
    const same = (what: string, theirs: number, ours: number) => {
      if (theirs !== ours) this.problem(`${what}: the manager counted ${theirs}, the driver ${ours}`)
    }
    same('calls completed', calls.completed, completed)
    same('calls failed', calls.failed, failed)
    same('calls trapped', calls.trapped, trapped)
    same('calls interrupted or rejected', calls.interrupted + calls.rejected, stopped)
    same('answers', this.answered, this.asked)
    same("failed reloads, by the event 'reload:failed'", reloadsFailed, this.#events.failed)
    same("traps, by the event 'trap'", calls.trapped, this.#events.trap)
    const policies = new Set(['memory', 'predicted', 'calls', 'age', 'budget'])
    for (const reason of new Set([
      ...Object.keys(reloads),
      ...this.#events.reload.keys(),
      ...this.#events.recycle.keys(),
    ])) {
      const counted = reloads[reason] ?? 0
      const told = this.#events.reload.get(reason) ?? 0
      if (!policies.has(reason)) {
        same(`reloads for ${reason}, by the event 'reload'`, counted, told)
        continue
      }
      same(`recycles for ${reason}, by the event 'recycle'`, counted, this.#events.recycle.get(reason) ?? 0)
      same(`recycles for ${reason} that replaced, by the event 'reload'`, this.#replaced.get(reason) ?? 0, told)
    }
  }
}

/** What a crew has to tell of itself, so that environments can tell each other. */
export interface Account {
  name: string
  asked: number
  answered: number
  endings: Map<string, number>
  recycled: Map<string, number>
  reloads: Map<string, number>
  failures: number
  /** Managers that have come and gone. */
  gone: number
  problems: string[]
  problemCount: number
}

export function account(name: string, book: Book, gone = 0): Account {
  const { asked, answered, failures, problemCount } = book
  const [endings, recycled, reloads] = [new Map(book.endings), new Map(book.recycled), new Map(book.reloads)]
  return {
    name,
    asked,
    answered,
    endings,
    recycled,
    reloads,
    failures,
    gone,
    problems: [...book.problems],
    problemCount,
  }
}

export function merge(one: Account, other: Account): Account {
  const both = { ...one }
  for (const what of ['asked', 'answered', 'failures', 'gone', 'problemCount'] as const) both[what] += other[what]
  for (const what of ['endings', 'recycled', 'reloads'] as const) {
    both[what] = new Map(one[what])
    for (const [key, times] of other[what]) add(both[what], key, times)
  }
  both.problems = [...one.problems, ...other.problems].slice(0, told)
  return both
}

/** Half a minute was not enough, on a machine that did not let us run. */
function isStarved(error: unknown): boolean {
  const { code } = error as { code?: string }
  return (code === 'ERR_WASM_DRAIN_TIMEOUT' || code === 'ERR_WASM_BUSY') && wasStalled()
}

/** undefined: the manager does not count it, because nothing was called. */
function countedAs(error: unknown, isSync: boolean): keyof Counted | undefined {
  if (!(error instanceof WasmError)) {
    if (error instanceof TypeError) return undefined
    return error instanceof Stop ? 'stopped' : 'failed'
  }
  switch (error.code) {
    case 'ERR_WASM_TRAP':
      return 'trapped'
    case 'ERR_WASM_ASYNC_IMPORT':
      return 'failed'
    case 'ERR_WASM_STALE_HANDLE':
      // Handed over, and refused because a call before it has trapped; a lease that has ended takes nothing any more.
      return !isSync && error.message.startsWith('the leased instance') ? 'stopped' : undefined
    case 'ERR_WASM_EXPORT_NOT_FOUND':
    case 'ERR_WASM_INVALID_ARGUMENT':
    case 'ERR_WASM_BUSY':
      return undefined
    case 'ERR_WASM_TIMEOUT':
    case 'ERR_WASM_INTERRUPTED':
    case 'ERR_WASM_OUT_OF_FUEL':
      return 'stopped'
    default:
      return isSync ? undefined : 'stopped'
  }
}

/** What a signal is aborted with here. */
export class Stop extends Error {
  override name = 'Stop'
}

/** What hooks and imports throw here. */
export class Deliberate extends Error {
  override name = 'Deliberate'
}

function ending(error: unknown): string {
  if (error instanceof WasmError) return error.code
  return error instanceof Error ? error.name : typeof error
}

export function describe(error: unknown): string {
  if (error instanceof WasmError) {
    const cause = error.cause === undefined ? '' : `, because of ${describe(error.cause)}`
    return `${error.code}${error.phase ? ` (${error.phase})` : ''}: ${error.message}${cause}`
  }
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error)
}

export function add(counts: Map<string, number>, key: string, more = 1): void {
  counts.set(key, (counts.get(key) ?? 0) + more)
}

export function sum(counts: ReadonlyMap<string, number>): number {
  return [...counts.values()].reduce((total, count) => total + count, 0)
}
