// State that is carried over, with hooks that fail at times: in the end everything that was answered must have been counted, once.
import { setTimeout } from 'node:timers/promises'
import { WasmError, WasmModuleManager } from '../../index.js'
import { codes, Deliberate, type Excuse } from './book.ts'
import { Crew, fn } from './crew.ts'
import type { Random } from './random.ts'

const replicas = 2

export class CounterCrew extends Crew {
  #manager!: WasmModuleManager
  #next = 1
  #answered = { count: 0, sum: 0 }
  /** The last that hooks have thrown: what failed must name one of these. */
  readonly #thrown: Deliberate[] = []
  readonly #hooks = this.random('hooks')

  async open(): Promise<void> {
    const { book } = this
    let isOpen = false
    this.#manager = await WasmModuleManager.create(this.setting.guests.counter, {
      ...this.base({ memory: 3 << 20, calls: 400, strategy: 'exclusive' }),
      instances: replicas,
      initialize: () => {
        if (isOpen) this.#fail('initialize', 0.05)
      },
      saveState: async (instance) => {
        this.#fail('saveState', 0.05)
        const count = fn(instance.exports, 'count')() as number
        book.count('completed')
        // What ends the manager, or replaces the replica otherwise, takes the instance away from a hook. A recycle that a synchronous
        // call has brought about tries its hooks on the spot, once, and is done again elsewhere if they want to wait.
        const refused = codes(
          'ERR_WASM_CLOSED',
          'ERR_WASM_STALE_HANDLE',
          'ERR_WASM_ASYNC_IMPORT',
          'ERR_WASM_INTERRUPTED',
        )
        const sum = () => instance.call('sum')
        const { value, error } = await book.follow('sum in a hook', false, sum, Number.isInteger, refused)
        book.count(error ? 'stopped' : 'completed')
        if (error) throw error
        return [count, value]
      },
      restoreState: async (instance, state: [number, number]) => {
        if (this.#hooks.chance(0.3)) await setTimeout(1)
        fn(instance.exports, 'set')(...state)
        book.count('completed')
        this.#fail('restoreState', 0.05)
      },
    })
    isOpen = true
    this.watch(this.#manager)
    this.#manager.on('reload:failed', (error) => {
      // A recycle that would keep others waiting for a lease for too long is put off.
      if (!this.#isOurs(error) && error.code !== 'ERR_WASM_DRAIN_TIMEOUT')
        book.problem(`a reload failed with ${error.code}: ${error.message}`)
    })
  }

  protected actors() {
    return [
      ...Array.from({ length: 3 }, () => ({ name: 'call', act: (random: Random) => this.#call(random), restMs: 1 })),
      { name: 'sync', act: async (random: Random) => this.#sync(random), restMs: 5 },
      { name: 'lease', act: (random: Random) => this.#lease(random), restMs: 5 },
      { name: 'reload', act: (random: Random) => this.#reload(random), restMs: 700 },
    ]
  }

  #fail(where: string, share: number): void {
    if (this.isOver || !this.#hooks.chance(share)) return
    const error = new Deliberate(where)
    this.#thrown.push(error)
    if (this.#thrown.length > 100) this.#thrown.shift()
    throw error
  }

  #isOurs(error: unknown): boolean {
    return (
      error instanceof WasmError &&
      error.code === 'ERR_WASM_RELOAD_FAILED' &&
      error.cause instanceof Deliberate &&
      this.#thrown.includes(error.cause)
    )
  }

  #token(): number {
    this.#next = (Math.imul(this.#next, 1664525) + 1013904223) | 0
    return this.#next
  }

  #verified(token: number): (answer: unknown) => boolean {
    return (answer) => {
      this.#answered.count += 1
      this.#answered.sum = (this.#answered.sum + token) | 0
      return answer === (token ^ 0x55555555)
    }
  }

  async #call(random: Random): Promise<void> {
    const many = random.chance(0.1) ? random.between(2, 40) : 1
    const one = () => {
      const token = this.#token()
      const args = [token, random.below(16 << 10)]
      return this.book.follow('next', true, () => this.#manager.call('next', args), this.#verified(token))
    }
    await Promise.all(Array.from({ length: many }, one))
  }

  #sync(random: Random): void {
    const token = this.#token()
    const excuse = codes('ERR_WASM_BUSY', 'ERR_WASM_RELOADING')
    const size = random.below(8 << 10)
    const run = () =>
      random.chance(0.5)
        ? fn(this.#manager.exports, 'next')(token, size)
        : this.#manager.callSync('next', [token, size])
    this.book.sync('next, synchronous', true, run, this.#verified(token), excuse)
  }

  async #lease(random: Random): Promise<void> {
    const { book } = this
    await book.follow(
      'use',
      false,
      () =>
        this.#manager.use(async (instance) => {
          const before = fn(instance.exports, 'count')() as number
          book.count('completed')
          const calls = random.between(1, 4)
          for (let call = 0; call < calls; call++) {
            const token = this.#token()
            const args = [token, 100]
            if (random.chance(0.5)) {
              await book.follow('next in a lease', true, () => instance.call('next', args), this.#verified(token))
            } else {
              book.sync(
                'next in a lease, synchronous',
                true,
                () => fn(instance.exports, 'next')(...args),
                this.#verified(token),
              )
            }
          }
          const after = fn(instance.exports, 'count')() as number
          book.count('completed')
          return after - before === calls
        }),
      (isAlone) => isAlone,
    )
  }

  async #reload(random: Random): Promise<void> {
    const excuse: Excuse = (error) => this.#isOurs(error)
    const { generation } = this.#manager
    await this.book.follow(
      'reload',
      false,
      () => this.#manager.reload({ reason: random.pick(['manual', 'by hand']) }),
      (report) => report.generation > generation,
      excuse,
    )
  }

  protected async close(): Promise<void> {
    const { book } = this
    const leases = await Promise.all(Array.from({ length: replicas }, () => this.#manager.acquire()))
    let [count, sum] = [0, 0]
    for (const { exports } of leases) {
      count += fn(exports, 'count')() as number
      sum = (sum + (fn(exports, 'sum')() as number)) | 0
      book.count('completed', 2)
    }
    for (const lease of leases) lease.release()
    if (count !== this.#answered.count || sum !== this.#answered.sum) {
      book.problem(
        `the guest has counted ${count} calls (sum ${sum}), and ${this.#answered.count} were answered (${this.#answered.sum})`,
      )
    }
    await this.closeAndCompare(this.#manager)
  }
}
