// What goes on around: garbage, those who read along and leave again, those who look at figures.
import { type Channel, channel, type TracingChannel, tracingChannel } from 'node:diagnostics_channel'
import { readiness } from '../../index.js'
import { Crew } from './crew.ts'
import type { Random } from './random.ts'

const traced = ['call', 'reload', 'reset', 'recycle'].map((name) => tracingChannel(`wasm-molt:${name}`))
const told = ['reload:step', 'trap'].map((name) => channel(`wasm-molt:${name}`))

export class NoiseCrew extends Crew {
  readonly #crews: readonly Crew[]
  #garbage: unknown[] = []

  constructor(name: string, setting: Crew['setting'], crews: readonly Crew[]) {
    super(name, setting)
    this.#crews = crews
  }

  async open(): Promise<void> {}

  protected actors() {
    return [
      { name: 'garbage', act: async (random: Random) => this.#waste(random), restMs: 60 },
      { name: 'stats', act: async (random: Random) => this.#look(random), restMs: 40 },
      { name: 'trace', act: (random: Random) => this.#trace(random), restMs: 100 },
      { name: 'message', act: (random: Random) => this.#read(random), restMs: 100 },
    ]
  }

  #waste(random: Random): void {
    if (random.chance(0.2)) this.#garbage = []
    else if (random.chance(0.5)) this.#garbage.push(Buffer.allocUnsafeSlow(random.between(1, 1 << 20)))
    else this.#garbage.push(Array.from({ length: random.between(1, 20_000) }, (_, at) => ({ at })))
    if (this.#garbage.length > 8) this.#garbage = []
    if (random.chance(0.05)) globalThis.gc?.()
  }

  #look(random: Random): void {
    const all = this.#crews.flatMap(({ managers }) => [...managers])
    if (all.length === 0) return
    const manager = random.pick(all)
    const pages = random.chance(0.5)
    this.book.sync(
      'stats',
      false,
      () => manager.stats({ pages }),
      ({ instances, memoryBytes, memoryBytesPeak, inFlight, queued, calls, pages: taken, runTime }) =>
        instances.busy <= instances.total &&
        memoryBytes <= memoryBytesPeak &&
        Math.min(inFlight, queued, ...Object.values(calls)) >= 0 &&
        runTime.p50 <= runTime.max &&
        (taken ? taken.privateBytes <= taken.reservedBytes : !pages),
    )
    this.book.sync(
      'readiness',
      false,
      () => readiness(...all),
      ({ managers }) => managers.length === all.length,
    )
  }

  /** Every start that is told of has its end, as long as somebody listens. */
  async #trace(random: Random): Promise<void> {
    const about: TracingChannel = random.pick(traced)
    let [starts, ends] = [0, 0]
    const subscriber = {
      start: () => {
        starts += 1
      },
      end: () => {
        ends += 1
      },
      asyncStart: () => {},
      asyncEnd: () => {},
      error: () => {},
    }
    about.subscribe(subscriber)
    await pause(random)
    about.unsubscribe(subscriber)
    if (starts !== ends) this.book.problem(`of ${starts} starts that a channel told of ${ends} have ended`)
  }

  async #read(random: Random): Promise<void> {
    const about: Channel = random.pick(told)
    const problem = (text: string) => this.book.problem(text)
    const reader = (message: unknown) => {
      if (!(message as { manager?: string }).manager) problem('a message does not say whose it is')
    }
    about.subscribe(reader)
    await pause(random)
    about.unsubscribe(reader)
  }

  protected async close(): Promise<void> {
    this.#garbage = []
  }
}

function pause(random: Random): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, random.below(300)))
}
