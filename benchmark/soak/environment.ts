// All crews of one environment: the main thread and the worker have the same.
import { tracingChannel } from 'node:diagnostics_channel'
import { type Account, merge, sum } from './book.ts'
import { BuffersCrew } from './buffers.ts'
import { CounterCrew } from './counter.ts'
import type { Crew, Setting } from './crew.ts'
import { CellsCrew, RewoundCrew } from './glue.ts'
import { MortalCrew } from './mortal.ts'
import { NoiseCrew } from './noise.ts'
import { ConverterCrew, GlueCrew, GofmtCrew } from './real.ts'
import { RoughCrew } from './rough.ts'
import { ThreadsCrew } from './threads.ts'
import { ViewsCrew } from './views.ts'
import { IsolatedCrew, WarmCrew } from './warm.ts'

export class Environment {
  readonly crews: Crew[]
  /** Recycles that were decided on. */
  readonly decisions = { made: 0, done: 0, failed: 0 }

  /** Crews that are about to end. */
  busy: string[] = []

  constructor(setting: Setting) {
    tracingChannel('wasm-molt:recycle').subscribe({
      start: () => {
        this.decisions.made += 1
      },
      end: () => {},
      asyncStart: () => {},
      asyncEnd: () => {
        this.decisions.done += 1
      },
      error: () => {
        this.decisions.failed += 1
      },
    })
    const crews: Crew[] = [
      new CounterCrew('counter', setting),
      new RoughCrew('rough', setting, {
        instances: 3,
        recycle: { memory: 1 << 20, calls: 60, ageMs: 3000, strategy: 'rolling', jitter: 0.3 },
        interrupts: true,
        swaps: true,
        failing: 0.1,
      }),
      new RoughCrew('single', setting, {
        instances: 1,
        recycle: { memory: '1%', calls: 40, strategy: 'exclusive' },
        fuel: 20_000_000,
        swaps: true,
        failing: 0.1,
      }),
      new RoughCrew('kept', setting, { instances: 2, recycle: { memory: 512 << 10, onTrap: 'keep' } }),
      new RoughCrew('timed', setting, {
        instances: 2,
        recycle: { ageMs: 1500, memory: 1 << 20, strategy: 'rolling' },
        timeoutMs: 100,
        interrupts: true,
      }),
      new WarmCrew('warm', setting),
      new IsolatedCrew('isolated', setting),
      new BuffersCrew('packed', setting, 'packed-i64', 'exclusive'),
      new BuffersCrew('pair', setting, 'multi-value', 'rolling'),
      new BuffersCrew('pointer', setting, 'out-pointer', 'reset'),
      new ViewsCrew('views', setting),
      new MortalCrew('mortal', setting),
      new ConverterCrew('converter', setting),
      new GofmtCrew('gofmt', setting),
      new GlueCrew('glue', setting),
      new CellsCrew('cells', setting),
      new RewoundCrew('rewound', setting),
      new ThreadsCrew('threads', setting),
    ]
    this.crews = [...crews, new NoiseCrew('noise', setting, crews)]
  }

  /** One by one: a machine that compiles everything at once says nothing of what comes after. */
  async open(): Promise<void> {
    for (const crew of this.crews) await crew.open()
  }

  start(): void {
    for (const crew of this.crews) crew.start()
  }

  async end(): Promise<void> {
    for (const crew of this.crews) crew.stop()
    this.busy = this.crews.map(({ name }) => name)
    const ended = (gone: string) => {
      this.busy = this.busy.filter((name) => name !== gone)
    }
    await Promise.all(this.crews.map((crew) => crew.end().then(() => ended(crew.name))))
    const { made, done } = this.decisions
    if (made !== done) {
      this.crews[0]?.book.problem(`${made} recycles were decided on here, and ${done} had an outcome`)
    }
  }

  get accounts(): Account[] {
    return this.crews.map(({ account }) => account)
  }
}

/** By the names of the crews. */
export function mergeAll(...lists: Account[][]): Account[] {
  const all = new Map<string, Account>()
  for (const account of lists.flat()) {
    const known = all.get(account.name)
    all.set(account.name, known ? merge(known, account) : account)
  }
  return [...all.values()]
}

export const answersOf = (accounts: Account[]) => accounts.reduce((total, { answered }) => total + answered, 0)

export const recyclesOf = (accounts: Account[]) => accounts.reduce((total, { recycled }) => total + sum(recycled), 0)
