// Snapshots: recycles and resets in place, forks, and calls that each begin with the snapshot.
import { setTimeout } from 'node:timers/promises'
import { type Snapshot, type WasmError, WasmModuleManager } from '../../index.js'
import { type Book, codes, type Excuse } from './book.ts'
import { Crew, fn } from './crew.ts'
import type { Random } from './random.ts'

/** What `initialize` has counted, and what every copy begins with. */
const base = 100

export class WarmCrew extends Crew {
  #manager!: WasmModuleManager
  /** Taken by hand; the oldest is kept, so that one is always there. */
  readonly #snapshots: Snapshot[] = []

  async open(): Promise<void> {
    this.#manager = await WasmModuleManager.create(this.setting.guests.counter, {
      ...this.base({ memory: 3 << 20, calls: 500, strategy: 'reset' }),
      instances: 2,
      initialize: (instance) => {
        fn(instance.exports, 'set')(base, 0)
        this.book.count('completed')
      },
    })
    this.watch(this.#manager)
    this.#snapshots.push(await this.#manager.snapshot())
  }

  protected actors() {
    return [
      ...Array.from({ length: 3 }, () => ({ name: 'call', act: (random: Random) => this.#call(random), restMs: 1 })),
      { name: 'fork', act: (random: Random) => this.#forks(random), restMs: 200 },
      { name: 'hand', act: (random: Random) => this.#hand(random), restMs: 300 },
    ]
  }

  async #call(random: Random): Promise<void> {
    const token = random.below(1 << 30)
    if (random.chance(0.01)) {
      await this.book.follow(
        'boom',
        true,
        () => this.#manager.call('boom'),
        () => false,
        codes('ERR_WASM_TRAP'),
      )
    } else if (random.chance(0.1)) {
      await this.book.follow(
        'count',
        true,
        () => this.#manager.call('count'),
        (count) => Number(count) >= base,
      )
    } else {
      await this.#next(this.book, this.#manager, token, random.below(16 << 10))
    }
  }

  #next(book: Book, manager: WasmModuleManager, token: number, size: number): Promise<unknown> {
    return book.follow(
      'next',
      true,
      () => manager.call('next', [token, size]),
      (answer) => answer === (token ^ 0x55555555),
    )
  }

  /** A copy, and copies of the copy. */
  #forks(random: Random): Promise<void> {
    return this.#fork(random, this.#manager, this.book, base, random.between(1, 3))
  }

  async #fork(
    random: Random,
    parent: WasmModuleManager,
    parentBook: Book,
    least: number,
    depth: number,
  ): Promise<void> {
    this.goneCount += 1
    const book = this.newBook(`, fork ${this.goneCount}`)
    const name = `${this.managerName}-fork-${this.goneCount}`
    const recycle = random.pick([undefined, { calls: 5 }, { memory: 1 << 20, strategy: 'rolling' as const }])
    const { value: fork } = await parentBook.follow(
      'fork',
      false,
      () => parent.fork({ name, ...(recycle ? { recycle } : {}) }),
      (fork) => fork.name === name,
    )
    if (!fork) return
    this.watch(fork, book)
    const begun = await book.follow(
      'count',
      true,
      () => fork.call('count'),
      (count) => Number(count) >= least,
    )
    const next = () => this.#next(book, fork, random.below(1 << 30), random.below(32 << 10))
    await Promise.all(Array.from({ length: random.below(20) }, next))
    const again = () =>
      book.follow(
        'count',
        true,
        () => fork.call('count'),
        (count) => count === begun.value,
      )
    if (random.chance(0.5)) {
      // Recycles go back to where the fork began, as resets do.
      await book.follow(
        'reset',
        false,
        () => fork.reset(),
        ({ generation }) => generation === fork.generation,
      )
      await again()
    }
    if (random.chance(0.2)) {
      await book.follow(
        'reload',
        false,
        () => fork.reload(),
        ({ reason }) => reason === 'manual',
      )
      await again()
    }
    // Either may be closed first.
    const child = depth > 1 ? this.#fork(random, fork, book, begun.value as number, depth - 1) : undefined
    if (random.chance(0.5)) await child
    await book.settled()
    await this.closeAndCompare(fork, book)
    await child
    this.gone.absorb(book)
  }

  async #hand(random: Random): Promise<void> {
    const manager = this.#manager
    const { book } = this
    await random.weighted<() => Promise<unknown>>([
      [
        4,
        () =>
          book.follow(
            'reset',
            false,
            () => manager.reset({ to: random.pick(this.#snapshots) }),
            (report) => report.generation <= manager.generation,
          ),
      ],
      [
        2,
        async () => {
          const { value } = await book.follow(
            'snapshot',
            false,
            () => manager.snapshot(),
            ({ memoryBytes }) => memoryBytes > 0,
          )
          if (value) this.#snapshots.push(value)
        },
      ],
      [
        2,
        async () => {
          // The newest goes, and the one before it is what everything begins with.
          if (this.#snapshots.length > 1) this.#snapshots.pop()?.release()
        },
      ],
      [
        1,
        () =>
          book.follow(
            'reload',
            false,
            () => manager.reload(),
            ({ generation }) => generation <= manager.generation,
          ),
      ],
    ])()
    while (this.#snapshots.length > 3) this.#snapshots.splice(1, 1)[0]?.release()
  }

  protected async close(): Promise<void> {
    for (const snapshot of this.#snapshots.splice(0)) snapshot.release()
    await this.closeAndCompare(this.#manager)
  }
}

/** Every call answers as the first one would. */
export class IsolatedCrew extends Crew {
  #manager!: WasmModuleManager

  async open(): Promise<void> {
    this.#manager = await WasmModuleManager.create(this.setting.guests.counter, {
      ...this.base({ memory: '50%', calls: 2000, ageMs: 5000 }),
      instances: 2,
      isolation: 'per-call',
      initialize: (instance) => {
        fn(instance.exports, 'set')(base, 0)
        this.book.count('completed')
      },
    })
    this.watch(this.#manager)
  }

  protected actors() {
    return Array.from({ length: 2 }, () => ({ name: 'call', act: (random: Random) => this.#call(random), restMs: 2 }))
  }

  async #call(random: Random): Promise<void> {
    const { book } = this
    const manager = this.#manager
    const token = random.below(1 << 30)
    const trap: Excuse = (error) => codes('ERR_WASM_TRAP')(error) && (error as WasmError).trap === 'unreachable'
    await random.weighted<() => Promise<unknown>>([
      [
        10,
        () =>
          book.follow(
            'count',
            true,
            () => manager.call('count'),
            (count) => count === base,
          ),
      ],
      [
        10,
        () =>
          book.follow(
            'next',
            true,
            () => manager.call('next', [token, random.below(128 << 10)]),
            (answer) => answer === (token ^ 0x55555555),
          ),
      ],
      [
        1,
        () =>
          book.follow(
            'boom',
            true,
            () => manager.call('boom'),
            () => false,
            trap,
          ),
      ],
      [
        0.5,
        () =>
          book.follow(
            'spin',
            true,
            () => manager.call('spin', [], { timeoutMs: random.between(1, 3) }),
            () => false,
            codes('ERR_WASM_TIMEOUT'),
          ),
      ],
    ])()
    if (random.chance(0.01)) await setTimeout(random.below(50))
  }

  protected async close(): Promise<void> {
    await this.closeAndCompare(this.#manager)
  }
}
