// What guests have really run, as they say themselves by an import: a call that ran twice, or ran and was said not to have, shows here.
import { type InstanceContext, WasmError, type WasmErrorCode } from '../../index.js'
import type { Book, Outcome } from './book.ts'

/** Ends of calls that have not run. */
const neverRan: WasmErrorCode[] = [
  'ERR_WASM_QUEUE_FULL',
  'ERR_WASM_CLOSED',
  'ERR_WASM_RELOAD_FAILED',
  'ERR_WASM_RELOADING',
  'ERR_WASM_BUSY',
  'ERR_WASM_STALE_HANDLE',
]

/** Of calls that were stopped, an import may still be on its way; so many are remembered. */
const late = 1000

export class Ledger {
  readonly #book: Book
  readonly #runs = new Map<number, number>()
  readonly #stopped = new Map<number, number>()
  /** How many runs an instance has told of. */
  readonly #counts = new WeakMap<InstanceContext, number>()
  #next = 1

  constructor(book: Book) {
    this.#book = book
  }

  begin(): number {
    const token = this.#next
    this.#next = (this.#next + 1) & 0x3fffffff
    this.#runs.set(token, 0)
    return token
  }

  /** The import: `count` is what the guest has counted itself, in its memory's life. */
  note(token: number, count: number, instance: InstanceContext): void {
    const before = this.#counts.get(instance)
    if (before !== undefined && count !== before + 1) {
      this.#book.problem(`an instance has counted ${count} runs after ${before}`)
    }
    this.#counts.set(instance, count)
    const open = this.#runs.get(token)
    if (open !== undefined) {
      this.#runs.set(token, open + 1)
      return
    }
    const ended = this.#stopped.get(token)
    if (ended === undefined || ended > 0) this.#book.problem(`call ${token} ran after its answer`)
    else this.#stopped.set(token, 1)
  }

  end(token: number, what: string, outcome: Outcome<unknown>): void {
    const runs = this.#runs.get(token) ?? 0
    this.#runs.delete(token)
    const isError = 'error' in outcome
    const code = isError && outcome.error instanceof WasmError ? outcome.error.code : undefined
    const [least, most] = !isError ? [1, 1] : code && neverRan.includes(code) ? [0, 0] : [0, 1]
    if (runs < least || runs > most) {
      this.#book.problem(`${what} ran ${runs} times and ended with ${isError ? (code ?? outcome.error) : 'its answer'}`)
    }
    if (most === 0 || !isError) return
    this.#stopped.set(token, runs)
    if (this.#stopped.size <= late) return
    for (const oldest of this.#stopped.keys()) {
      this.#stopped.delete(oldest)
      break
    }
  }
}
