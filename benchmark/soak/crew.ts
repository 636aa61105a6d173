// What all crews are made of: a manager, those who use it, and the account of what they did.
import { setImmediate, setTimeout } from 'node:timers/promises'
import type { ManagerOptions, RecyclePolicy, WasmModuleManager, WasmResult, WasmValue } from '../../index.js'
import { Book } from './book.ts'
import type { Guests } from './guests.ts'
import { Random } from './random.ts'

export interface Setting {
  seed: number
  guests: Guests
  /** Compiled code is kept here. */
  cache: string
}

export abstract class Crew {
  readonly name: string
  readonly book: Book
  /** Of managers that have come and gone. */
  readonly forks: Book
  forkCount = 0
  protected readonly setting: Setting
  #isOver = false
  #loops: Promise<void>[] = []

  constructor(name: string, setting: Setting) {
    this.name = name
    this.setting = setting
    this.book = new Book(name)
    this.forks = new Book(`${name}, a fork`)
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
      this.#loop(new Random(this.setting.seed, `${this.name}/${name}/${at}`), act, restMs),
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

  protected base(recycle: RecyclePolicy): ManagerOptions {
    return {
      name: this.name,
      cache: this.setting.cache,
      recycle: { backoff: { initialMs: 20, maxMs: 500 }, ...recycle },
    }
  }

  /** Closes and compares; events are told from the event loop. */
  protected async closeAndCompare(
    manager: Pick<WasmModuleManager, 'close' | 'stats'>,
    book = this.book,
  ): Promise<void> {
    await manager.close()
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
