// Guests that leak as those do that people meet: a converter through invoke, gofmt through leases, and gofmt's own glue.
import { type GlueManager, type LeasedInstance, loadGlue, setMemoryBudget, WasmModuleManager } from '../../index.js'
import { convert } from '../converter.ts'
import { expected, gofmt, input } from '../modules/gofmt.ts'
import { Crew, fn } from './crew.ts'
import type { Random } from './random.ts'

const text = input.toString()

export class ConverterCrew extends Crew {
  #manager!: WasmModuleManager

  async open(): Promise<void> {
    this.#manager = await WasmModuleManager.create(this.setting.guests.converter, {
      ...this.base({ memory: 8 << 20 }),
      instances: 2,
    })
    this.watch(this.#manager)
  }

  protected actors() {
    return [
      ...Array.from({ length: 3 }, () => ({
        name: 'convert',
        act: (random: Random) => this.#convert(random),
        restMs: 2,
      })),
      { name: 'budget', act: async (random: Random) => this.#budget(random), restMs: 1500 },
    ]
  }

  async #convert(random: Random): Promise<void> {
    const from = random.below(text.length)
    const strange = random.pick(['', 'ä', '€', '😀'])
    const piece = `${text.slice(from)}${text}${text}`.slice(0, random.between(0, 8000)) + strange
    await this.book.follow(
      'convert',
      true,
      () => this.#manager.invoke('convert', Buffer.from(piece)),
      (answer) => Buffer.from(answer).toString() === convert(piece),
    )
  }

  /** Over all managers here and in the worker: at times it is what recycles. */
  #budget(random: Random): void {
    const budget = random.pick([null, null, null, 48 << 20, 96 << 20])
    this.book.sync(
      'setMemoryBudget',
      false,
      () => setMemoryBudget(budget),
      () => true,
    )
  }

  protected async close(): Promise<void> {
    await this.closeAndCompare(this.#manager)
  }
}

export class GofmtCrew extends Crew {
  #manager!: WasmModuleManager

  async open(): Promise<void> {
    this.#manager = await WasmModuleManager.create(gofmt.path, {
      ...this.base({ memory: 12 << 20, strategy: 'rolling' }),
      instances: 2,
    })
    this.watch(this.#manager)
  }

  protected actors() {
    return Array.from({ length: 2 }, () => ({ name: 'format', act: () => this.#format(), restMs: 8 }))
  }

  async #format(): Promise<void> {
    await this.book.follow(
      'format',
      false,
      () => this.#manager.use((instance) => this.#formatted(instance)),
      (formatted) => formatted === expected,
    )
  }

  async #formatted(instance: LeasedInstance): Promise<string> {
    const { book } = this
    const sync = (name: string, ...args: number[]) => {
      const value = fn(instance.exports, name)(...args) as number
      book.count('completed')
      return value
    }
    instance.memory.write(sync('alloc', input.length), input)
    await book.follow(
      'format on the pool',
      true,
      () => instance.call('format'),
      () => true,
    )
    const formatted = instance.memory.readString(sync('output_ptr'), sync('output_len'))
    sync('dispose')
    return formatted
  }

  protected async close(): Promise<void> {
    await this.closeAndCompare(this.#manager)
  }
}

interface Gofmt {
  format(source: string): string
}

export class GlueCrew extends Crew {
  #manager!: GlueManager<Gofmt>

  async open(): Promise<void> {
    this.#manager = await loadGlue<Gofmt>('@wasm-fmt/gofmt', {
      parentURL: import.meta.url,
      name: this.managerName,
      cache: this.setting.cache,
      recycle: { memory: 12 << 20 },
    })
    this.watch(this.#manager)
  }

  protected actors() {
    return [
      { name: 'format', act: async () => this.#format(), restMs: 15 },
      { name: 'scope', act: (random: Random) => this.#scope(random), restMs: 40 },
      { name: 'reload', act: () => this.#reload(), restMs: 1500 },
    ]
  }

  #format(): void {
    this.book.sync(
      'format',
      false,
      () => this.#manager.module.format(text),
      (formatted) => formatted === expected,
    )
  }

  async #scope(random: Random): Promise<void> {
    await this.book.follow(
      'use',
      false,
      () =>
        this.#manager.use(async ({ format }) => {
          const formatted = format(text)
          if (random.chance(0.5)) await null
          return formatted === format(text) ? formatted : 'two texts'
        }),
      (formatted) => formatted === expected,
    )
  }

  async #reload(): Promise<void> {
    const { generation } = this.#manager
    await this.book.follow(
      'reload',
      false,
      () => this.#manager.reload(),
      (report) => report.generation > generation,
    )
  }

  protected async close(): Promise<void> {
    // How many calls of the guest one format makes is the glue's own affair, so those are not compared.
    const { completed, ...others } = this.#manager.stats().calls
    if (completed < this.book.answered || Object.values(others).some((count) => count > 0)) {
      this.book.problem(`the realm counted ${JSON.stringify(this.#manager.stats().calls)}`)
    }
    await this.#manager.close()
  }
}
