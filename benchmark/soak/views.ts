// Views of memory that are kept for longer than they are good for, and buffers that were moved away.
import { setTimeout } from 'node:timers/promises'
import { MessageChannel, receiveMessageOnPort } from 'node:worker_threads'
import { type LeasedInstance, WasmModuleManager } from '../../index.js'
import { codes } from './book.ts'
import { Crew, fn } from './crew.ts'
import type { Random } from './random.ts'

/** What moved buffers are written to, and what leases check; guests use neither. */
const [played, checked] = [0, 512]
const most = 8

export class ViewsCrew extends Crew {
  #manager!: WasmModuleManager
  readonly #kept: Uint8Array[] = []
  readonly #moved: Uint8Array[] = []

  async open(): Promise<void> {
    this.#manager = await WasmModuleManager.create(this.setting.guests.bench[0], {
      ...this.base({ memory: 2 << 20, calls: 300, strategy: 'rolling' }),
      instances: 2,
      imports: { env: { ask: () => 0, note: () => {} } },
    })
    this.watch(this.#manager)
  }

  protected actors() {
    return [
      { name: 'lease', act: (random: Random) => this.#lease(random), restMs: 10 },
      { name: 'touch', act: async (random: Random) => this.#touch(random), restMs: 10 },
      { name: 'own', act: async (random: Random) => this.#own(random), restMs: 20 },
      { name: 'reload', act: (random: Random) => this.#reload(random), restMs: 400 },
    ]
  }

  async #lease(random: Random): Promise<void> {
    let view: Uint8Array | undefined
    const seed = random.below(256)
    await this.book.follow(
      'use',
      false,
      () =>
        this.#manager.use(async (instance) => {
          const bytes = Buffer.alloc(random.between(1, 256), seed)
          instance.memory.write(checked, bytes)
          if (random.chance(0.3)) this.#grow(instance, random)
          if (random.chance(0.2)) this.#move(instance.memory.buffer, random)
          view = new Uint8Array(instance.memory.buffer)
          if (random.chance(0.3)) await setTimeout(random.below(3))
          const seen = Buffer.from(instance.memory.buffer, checked, bytes.length)
          return seen.equals(bytes) && Buffer.from(instance.memory.read(checked, bytes.length)).equals(bytes)
        }),
      (isRight) => isRight,
    )
    if (!view) return
    if (view.length !== 0) this.book.problem(`a view of a lease that has ended has ${view.length} bytes`)
    this.#keep(this.#kept, view)
  }

  #grow(instance: LeasedInstance, random: Random): void {
    const before = instance.memory.buffer
    const size = before.byteLength
    const { value: pages } = this.book.sync(
      'leak in a lease',
      true,
      () => fn(instance.exports, 'leak')(random.between(1, 100_000)),
      (pages) => Number(pages) * 65536 >= size,
    )
    const hasGrown = Number(pages) * 65536 > size
    if (hasGrown !== (before.byteLength === 0)) {
      this.book.problem(`after ${hasGrown ? 'a' : 'no'} growth the buffer has ${before.byteLength} bytes`)
    }
  }

  /** Somebody else has it from then on, for as long as they like. */
  #move(buffer: ArrayBuffer, random: Random): void {
    const size = buffer.byteLength
    const transfer = (buffer as { transfer?(): ArrayBuffer }).transfer?.bind(buffer)
    const ways = [
      () => structuredClone(buffer, { transfer: [buffer] }),
      () => posted(buffer),
      ...(transfer ? [transfer] : []),
    ]
    const moved = random.pick(ways)()
    // Some engines copy what is not their own: then it stays whole.
    if (![0, size].includes(buffer.byteLength) || moved.byteLength !== size) {
      this.book.problem(`of ${size} bytes that were moved ${buffer.byteLength} stayed, and ${moved.byteLength} came`)
    }
    this.#keep(this.#moved, new Uint8Array(moved))
  }

  #keep(list: Uint8Array[], view: Uint8Array): void {
    list.push(view)
    if (list.length > most) list.shift()
  }

  #touch(random: Random): void {
    for (const view of this.#kept) {
      if (view[played] !== undefined) this.book.problem('a view that was detached shows a byte')
      view[played] = 1
    }
    for (const view of this.#moved) {
      const at = played + random.below(checked)
      view[at] = (view[at] ?? 0) + 1
      if (random.chance(0.1)) view.fill(random.below(256), played, checked)
    }
    if (random.chance(0.1)) this.#moved.splice(random.below(most), 1)
  }

  /** The manager's own memory, which a reload takes away at any moment. */
  #own(random: Random): void {
    const { memory } = this.#manager
    const { buffer } = memory
    if (buffer !== memory.buffer) this.book.problem('the buffer changes within one turn')
    this.#keep(this.#kept, new Uint8Array(buffer, 0, 0))
    const { byteLength } = memory
    this.book.sync(
      'read beyond the end',
      false,
      () => memory.read(byteLength - 1, 2),
      () => false,
      (error) => error instanceof RangeError,
    )
    if (random.chance(0.1)) this.#move(buffer, random)
  }

  async #reload(random: Random): Promise<void> {
    const view = new Uint8Array(this.#manager.memory.buffer)
    if (random.chance(0.2)) {
      const { error } = this.book.sync(
        'reloadSync',
        false,
        () => this.#manager.reloadSync(),
        () => true,
        codes('ERR_WASM_BUSY', 'ERR_WASM_RELOADING'),
      )
      if (error !== undefined) return
    } else {
      await this.book.follow(
        'reload',
        false,
        () => this.#manager.reload({ strategy: random.pick(['exclusive', 'rolling']) }),
        () => true,
      )
    }
    if (view.length !== 0) this.book.problem(`a view from before a reload has ${view.length} bytes`)
    this.#keep(this.#kept, view)
  }

  protected async close(): Promise<void> {
    await this.closeAndCompare(this.#manager)
    for (const view of this.#moved) view.fill(1, played, checked)
    this.#moved.length = 0
  }
}

function posted(buffer: ArrayBuffer): ArrayBuffer {
  const { port1, port2 } = new MessageChannel()
  port1.postMessage(buffer, [buffer])
  const received = receiveMessageOnPort(port2)?.message as ArrayBuffer
  port1.close()
  return received
}
