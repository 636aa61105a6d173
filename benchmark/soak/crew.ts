// What all crews are made of: a manager, those who use it, and the account of what they did.
import { setImmediate, setTimeout } from 'node:timers/promises'
import type {
  GlueManager,
  ManagerOptions,
  RecyclePolicy,
  WasmModuleManager,
  WasmResult,
  WasmValue,
} from '../../index.js'
import { type Account, account, Book, merge } from './book.ts'
import type { Guests } from './guests.ts'
import { Random } from './random.ts'

export interface Setting {
  seed: number
  /** The environment, and which one of those that come and go: 'main', 'worker 3'. */
  where: string
  guests: Guests
  /** Compiled code is kept here. */
  cache: string
}

export type Managed = WasmModuleManager | GlueManager

export abstract class Crew {
  readonly name: string
  readonly book: Book
  /** Of managers that have come and gone. */
  readonly gone: Book
  goneCount = 0
  /** Those that there are now, for whoever looks at all of them. */
  readonly managers = new Set<Managed>()
  protected readonly setting: Setting
  #isOver = false
  #loops: Promise<void>[] = []

  constructor(name: string, setting: Setting) {
    this.name = name
    this.setting = setting
    this.book = this.newBook('')
    this.gone = this.newBook(', one that has gone')
  }

  protected newBook(which: string): Book {
    const { where } = this.setting
    return new Book(`${where === 'main' ? '' : `${where}, `}${this.name}${which}`)
  }

  protected random(actor: string): Random {
    return new Random(this.setting.seed, `${this.setting.where}/${this.name}/${actor}`)
  }

  get account(): Account {
    return merge(account(this.name, this.book), account(this.name, this.gone, this.goneCount))
  }

  /** Makes the manager. */
  abstract open(): Promise<void>
  /** Whoever uses it: each entry is called again and again. */
  protected abstract actors(): {
    name: string
    act: (random: Random, turn: number) => Promise<unknown>
    restMs: number
  }[]
  /** What must hold once everybody has left, and then the end of the manager. */
  protected abstract close(): Promise<void>

  get isOver(): boolean {
    return this.#isOver
  }

  start(): void {
    this.#loops = this.actors().map(({ name, act, restMs }, at) =>
      this.#loop(this.random(`${name}/${at}`), act, restMs),
    )
  }

  /** From here on hooks do not fail any more, and nobody begins anything. */
  stop(): void {
    this.#isOver = true
  }

  async end(): Promise<void> {
    await this.book.settled()
    await Promise.all(this.#loops)
    await this.close()
  }

  async #loop(random: Random, act: (random: Random, turn: number) => Promise<unknown>, restMs: number): Promise<void> {
    for (let turn = 0; !this.#isOver; turn++) {
      try {
        await act(random, turn)
      } catch (error) {
        this.book.problem(`the driver itself: ${error instanceof Error ? error.stack : error}`)
      }
      // Also keeps the event loop free where everything was synchronous.
      const rest = random.below(2 * restMs + 1)
      await (rest > 0 ? setTimeout(rest) : setImmediate())
    }
  }

  /** Threads have it as well, so that what a worker has left behind is told from ours. */
  protected get managerName(): string {
    return `${this.setting.where.charAt(0)}-${this.name}`
  }

  protected base(recycle: RecyclePolicy): ManagerOptions {
    return {
      name: this.managerName,
      cache: this.setting.cache,
      recycle: { backoff: { initialMs: 20, maxMs: 500 }, ...recycle },
    }
  }

  /** Reads along, and lets others look. */
  protected watch(manager: Managed, book = this.book): void {
    book.listen(manager)
    this.managers.add(manager)
  }

  /** Closes and compares; events are told from the event loop. */
  protected async closeAndCompare(manager: WasmModuleManager, book = this.book): Promise<void> {
    await manager.close()
    this.managers.delete(manager)
    for (let turn = 0; turn < 5; turn++) await setImmediate()
    book.compare(manager.stats())
  }
}

export type Exports = Record<string, (...args: WasmValue[]) => WasmResult>

/** A function of a guest, which is one of ours and has it. */
export function fn(exports: Exports, name: string): (...args: WasmValue[]) => WasmResult {
  const found = exports[name]
  if (!found) throw new Error(`the guest has no ${name}`)
  return found
}
