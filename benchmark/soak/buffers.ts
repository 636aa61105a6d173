// Buffers in the forms that `invoke` knows, in guests that run out of memory if nobody recycles them.
import { type BufferAbi, type WasmError, WasmModuleManager } from '../../index.js'
import { codes } from './book.ts'
import { Crew } from './crew.ts'
import type { Random } from './random.ts'

const limit = 4 << 20

export class BuffersCrew extends Crew {
  #manager!: WasmModuleManager
  readonly #returns: NonNullable<BufferAbi['returns']>
  readonly #strategy: 'exclusive' | 'rolling' | 'reset'

  constructor(
    name: string,
    setting: Crew['setting'],
    returns: NonNullable<BufferAbi['returns']>,
    strategy: 'exclusive' | 'rolling' | 'reset',
  ) {
    super(name, setting)
    this.#returns = returns
    this.#strategy = strategy
  }

  async open(): Promise<void> {
    this.#manager = await WasmModuleManager.create(this.setting.guests.buffers, {
      ...this.base({ memory: '50%', strategy: this.#strategy }),
      instances: 2,
      limits: { memoryBytes: limit },
      abi: { returns: this.#returns },
    })
    this.watch(this.#manager)
    if (this.#strategy === 'reset') await this.#manager.snapshot()
  }

  protected actors() {
    return Array.from({ length: 2 }, () => ({ name: 'send', act: (random: Random) => this.#send(random), restMs: 4 }))
  }

  #send(random: Random): Promise<unknown> {
    const { book } = this
    const trap = (kind: string) => (error: unknown) =>
      codes('ERR_WASM_TRAP')(error) && (error as WasmError).trap === kind
    const act = random.weighted<() => Promise<unknown>>([
      [30, () => this.#reverse(random)],
      [
        1,
        () =>
          book.follow(
            'more than there is memory for',
            true,
            () => this.#manager.invoke(this.#name('reverse'), Buffer.alloc(limit)),
            () => false,
            trap('allocation-failed'),
          ),
      ],
      [
        1,
        async () => {
          const { error } = await book.follow(
            'a buffer outside of memory',
            false,
            () => this.#manager.invoke(this.#name('lie'), Buffer.alloc(100)),
            () => false,
            codes('ERR_WASM_INVALID_ARGUMENT'),
          )
          if (error !== undefined) book.count('failed')
        },
      ],
    ])
    return act()
  }

  #reverse(random: Random): Promise<unknown> {
    // The same bytes are changed at once: what was given counts.
    const bytes = Buffer.alloc(random.between(0, 30_000), random.next().toString())
    const reversed = Buffer.from(bytes).reverse()
    return this.book.follow(
      'reverse',
      true,
      () => {
        const answer = this.#manager.invoke(this.#name('reverse'), bytes)
        bytes.fill(0)
        return answer
      },
      (answer) => Buffer.compare(answer, reversed) === 0,
    )
  }

  #name(what: 'reverse' | 'lie'): string {
    return { 'out-pointer': what, 'packed-i64': `${what}_packed`, 'multi-value': `${what}_pair` }[this.#returns]
  }

  protected async close(): Promise<void> {
    await this.closeAndCompare(this.#manager)
  }
}
