// Managers that are ended in the middle of their load, in every way that there is, with another one in their place at once.
import { setImmediate, setTimeout } from 'node:timers/promises'
import { type InstanceContext, type ManagerOptions, WasmModuleManager } from '../../index.js'
import type { Book, Excuse, Outcome } from './book.ts'
import { codes, Stop } from './book.ts'
import { Crew, fn } from './crew.ts'
import { Ledger } from './ledger.ts'
import type { Random } from './random.ts'

const ends = [
  'close',
  'close at once',
  'destroy',
  'dispose',
  'both',
  'a hook that never settles',
  'out of a hook',
  'during a reload',
  'with a fork',
] as const

type End = (typeof ends)[number]

/** What a call may end with once its manager has been ended. */
const ended = codes('ERR_WASM_CLOSED', 'ERR_WASM_INTERRUPTED')

class Life {
  readonly book: Book
  readonly ledger: Ledger
  manager!: WasmModuleManager
  isEnding = false
  /** Runs in the next hook that is called. */
  inHook: (() => void | Promise<void>) | undefined
  readonly #random: Random

  constructor(book: Book, random: Random) {
    this.book = book
    this.ledger = new Ledger(book)
    this.#random = random
  }

  async open(source: string, options: ManagerOptions): Promise<void> {
    const random = this.#random
    const hook = () => this.inHook?.()
    const all: ManagerOptions = {
      ...options,
      instances: random.between(1, 3),
      imports: (instance: InstanceContext) => ({
        env: {
          ask: (value: number) => setTimeout(random.below(3), value + 1),
          note: (token: number, count: number) => this.ledger.note(token, count, instance),
        },
      }),
      initialize: hook,
      ...(random.chance(0.3) ? { saveState: hook, restoreState: () => {} } : {}),
    }
    const isSync = random.chance(0.3)
    this.manager = isSync ? WasmModuleManager.createSync(source, all) : await WasmModuleManager.create(source, all)
    this.book.listen(this.manager)
  }

  async call(what: string, excuse: Excuse): Promise<Outcome<unknown>> {
    const token = this.ledger.begin()
    const outcome = await this.book.follow(
      what,
      true,
      () => this.manager.call('tally', [token]),
      (answer) => answer === (token ^ 0x55555555),
      excuse,
    )
    this.ledger.end(token, what, outcome)
    return outcome
  }

  /** Calls one after the other until it is over. */
  async caller(): Promise<void> {
    const random = this.#random
    for (let isOver = false; !isOver; ) {
      const isLast = this.isEnding
      await random.weighted<() => Promise<unknown>>([
        [10, () => this.call('tally', (error) => this.isEnding && ended(error))],
        [
          2,
          () =>
            this.book.follow(
              'ask',
              true,
              () => this.manager.call('ask', [1]),
              (answer) => answer === 2,
              (error) => this.isEnding && ended(error),
            ),
        ],
        [2, () => this.lease()],
      ])()
      isOver = isLast
      if (random.chance(0.5)) await setTimeout(random.below(3))
    }
  }

  async lease(): Promise<void> {
    const stale = codes('ERR_WASM_STALE_HANDLE')
    await this.book.follow(
      'use',
      false,
      () =>
        this.manager.use(async (instance) => {
          const token = this.ledger.begin()
          const outcome = await this.book.follow(
            'tally in a lease',
            true,
            () => instance.call('tally', [token]),
            (answer) => answer === (token ^ 0x55555555),
            (error) => this.isEnding && (ended(error) || stale(error)),
          )
          this.ledger.end(token, 'tally in a lease', outcome)
          return true
        }),
      (isDone) => isDone,
      (error) => this.isEnding && ended(error),
    )
  }

  /** One that only the end stops. */
  spin(): Promise<unknown> {
    return this.book.follow(
      'spin',
      true,
      () => this.manager.call('spin'),
      () => false,
      ended,
    )
  }
}

export class MortalCrew extends Crew {
  async open(): Promise<void> {}

  protected actors() {
    return [
      { name: 'live', act: (random: Random) => this.#live(random), restMs: 30 },
      { name: 'live', act: (random: Random) => this.#live(random), restMs: 30 },
      { name: 'forget', act: (random: Random) => this.#forget(random), restMs: 400 },
    ]
  }

  /** One that nobody ends, and that no hook reaches, so that it can be collected. */
  async #forget(random: Random): Promise<void> {
    this.goneCount += 1
    const manager = await WasmModuleManager.create(this.setting.guests.counter, this.base({ memory: 1 << 20 }))
    const calls = random.between(1, 20)
    const call = (token: number) =>
      this.book.follow(
        'next',
        false,
        () => manager.call('next', [token, 1000]),
        (answer) => answer === (token ^ 0x55555555),
      )
    await Promise.all(Array.from({ length: calls }, (_, token) => call(token)))
    await this.book.follow(
      'count',
      false,
      () => manager.call('count'),
      (count) => count === calls,
    )
  }

  async #live(random: Random): Promise<void> {
    const book = this.newBook(`, number ${++this.goneCount}`)
    const life = new Life(book, random)
    const recycle = random.pick([{ calls: 20 }, { memory: 1 << 20, strategy: 'reset' as const }])
    await life.open(this.setting.guests.bench[0], this.base(recycle))
    this.managers.add(life.manager)
    const callers = Array.from({ length: random.between(1, 4) }, () => life.caller())
    await setTimeout(random.between(5, 300))
    const end = random.pick(ends)
    const others = await this.#end(end, life, random)
    await Promise.all([...callers, ...others])
    await book.settled()
    await life.call('tally after the end', codes('ERR_WASM_CLOSED'))
    this.managers.delete(life.manager)
    for (let turn = 0; turn < 5; turn++) await setImmediate()
    if (life.manager.state !== 'closed') book.problem(`after ${end} it is ${life.manager.state}`)
    book.compare(life.manager.stats())
    this.gone.absorb(book)
  }

  /** Resolves when the manager is closed, with what is still to be answered. */
  async #end(end: End, life: Life, random: Random): Promise<Promise<unknown>[]> {
    const { book, manager } = life
    const done = (what: string, run: () => Promise<unknown>, excuse?: Excuse) =>
      book.follow(what, false, run, (nothing) => nothing === undefined, excuse)
    const reload = (excuse: Excuse) =>
      book.follow(
        'reload',
        false,
        () => manager.reload(),
        () => true,
        excuse,
      )
    switch (end) {
      case 'close':
        life.isEnding = true
        await done(end, () => manager.close())
        return []
      case 'dispose':
        life.isEnding = true
        await done(end, () => manager[Symbol.asyncDispose]())
        return []
      case 'close at once': {
        const spin = random.chance(0.5) ? [life.spin()] : []
        life.isEnding = true
        await this.#closed(life, random.below(20))
        return spin
      }
      case 'destroy': {
        const spins = Array.from({ length: random.below(4) }, () => life.spin())
        if (random.chance(0.5)) await setTimeout(random.below(5))
        life.isEnding = true
        await done(end, () => manager.destroy())
        return spins
      }
      case 'both':
        life.isEnding = true
        await Promise.all([
          done(end, () => manager.close()),
          done(end, () => manager.destroy()),
          done(end, () => manager.close()),
        ])
        return []
      case 'a hook that never settles': {
        const [entered, enter] = signal()
        life.inHook = () => {
          enter()
          return new Promise<void>(() => {})
        }
        const reloading = reload(codes('ERR_WASM_CLOSED'))
        await entered
        life.isEnding = true
        await this.#closed(life, random.between(1, 30))
        return [reloading]
      }
      case 'out of a hook': {
        const [entered, enter] = signal()
        life.inHook = async () => {
          life.inHook = undefined
          life.isEnding = true
          enter()
          await done(end, () => manager.close())
        }
        const reloading = reload(codes('ERR_WASM_CLOSED'))
        await entered
        await reloading
        await done(end, () => manager.close())
        return []
      }
      case 'during a reload': {
        const reloads = [reload(codes('ERR_WASM_CLOSED')), reload(codes('ERR_WASM_CLOSED'))]
        if (random.chance(0.5)) await setTimeout(random.below(5))
        life.isEnding = true
        await done(end, () => (random.chance(0.5) ? manager.close() : manager.destroy()))
        return reloads
      }
      case 'with a fork': {
        const { value: fork } = await book.follow(
          'fork',
          false,
          () => manager.fork({ name: `${this.managerName}-fork` }),
          (fork) => fork.state === 'ready',
        )
        life.isEnding = true
        await done(end, () => manager.close())
        if (fork) await this.#outlives(fork)
        return []
      }
    }
  }

  /** A close that does not wait for ever, and if that was too short, the other way. */
  async #closed({ book, manager }: Life, drainTimeoutMs: number): Promise<void> {
    const { error } = await book.follow(
      'close, impatient',
      false,
      () => manager.close({ drainTimeoutMs }),
      (nothing) => nothing === undefined,
      codes('ERR_WASM_DRAIN_TIMEOUT'),
    )
    if (error === undefined) return
    await book.follow(
      'destroy',
      false,
      () => manager.destroy(),
      (nothing) => nothing === undefined,
    )
  }

  async #outlives(fork: WasmModuleManager): Promise<void> {
    const book = this.newBook(', a fork')
    book.listen(fork)
    book.sync(
      'add, synchronous',
      true,
      () => fn(fork.exports, 'add')(40, 2),
      (answer) => answer === 42,
    )
    const [controller, stop] = [new AbortController(), new Stop('fork')]
    const spin = book.follow(
      'spin with a signal',
      true,
      () => fork.call('spin', [], { signal: controller.signal }),
      () => false,
      (error) => error === stop,
    )
    controller.abort(stop)
    await spin
    await this.closeAndCompare(fork, book)
    this.gone.absorb(book)
  }

  protected async close(): Promise<void> {}
}

function signal(): [Promise<void>, () => void] {
  let open!: () => void
  const promise = new Promise<void>((resolve) => {
    open = resolve
  })
  return [promise, open]
}
