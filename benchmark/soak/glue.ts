// Glue of our own in the manner of wasm-bindgen's, leaking: with state that is carried over, and with snapshots that it goes back to.
import { setTimeout } from 'node:timers/promises'
import { type GlueManager, loadGlue, type Snapshot, WasmError } from '../../index.js'
import { codes, Deliberate, type Excuse } from './book.ts'
import { Crew } from './crew.ts'
import type { Random } from './random.ts'

interface Cell {
  readonly value: number
  free(): void
}

interface Cells {
  Cell: new (value: number) => Cell
  next(token: number, size: number): number
  count(): number
  sum(): number
  set(count: number, sum: number): void
  alive(): number
  boom(): void
  sumOf(text: string): number
}

const isStale = hasCode('ERR_WASM_STALE_HANDLE')

/** What glue throws is a RuntimeError with a code, so the code alone says what it is. */
function hasCode(...expected: string[]): Excuse {
  return (error) => error instanceof Error && expected.includes((error as WasmError).code)
}

/** State is saved and restored by hooks that fail at times; in the end the guest must have counted what was answered. */
export class CellsCrew extends Crew {
  #manager!: GlueManager<Cells>
  #next = 1
  #answered = { count: 0, sum: 0 }
  readonly #hooks = this.random('hooks')

  async open(): Promise<void> {
    const { name, managerName, setting } = this
    this.#manager = await loadGlue<Cells>(setting.guests.cells, {
      name: managerName,
      cache: setting.cache,
      recycle: { memory: 2 << 20, calls: 5000, backoff: { initialMs: 20, maxMs: 500 } },
      saveState: async ({ count, sum }: Cells) => {
        this.#fail(`${name}: saveState`)
        if (this.#hooks.chance(0.5)) await setTimeout(1)
        // Last: whoever calls while this waits is still served.
        return [count(), sum()]
      },
      restoreState: async ({ set }: Cells, [count, sum]: [number, number]) => {
        if (this.#hooks.chance(0.5)) await setTimeout(1)
        set(count, sum)
        this.#fail(`${name}: restoreState`)
      },
    })
    this.watch(this.#manager)
  }

  #fail(where: string): void {
    if (!this.isOver && this.#hooks.chance(0.05)) throw new Deliberate(where)
  }

  protected actors() {
    return [
      { name: 'next', act: async (random: Random) => this.#once(random), restMs: 4 },
      { name: 'scope', act: (random: Random) => this.#scope(random), restMs: 10 },
      { name: 'scope', act: (random: Random) => this.#scope(random), restMs: 10 },
      { name: 'reload', act: (random: Random) => this.#reload(random), restMs: 500 },
    ]
  }

  #token(): number {
    this.#next = (Math.imul(this.#next, 1664525) + 1013904223) | 0
    return this.#next
  }

  #verified(token: number): (answer: number) => boolean {
    return (answer) => {
      this.#answered.count += 1
      this.#answered.sum = (this.#answered.sum + token) | 0
      return answer === (token ^ 0x55555555)
    }
  }

  #once(random: Random): void {
    const { book } = this
    const { module } = this.#manager
    const token = this.#token()
    const reloading = hasCode('ERR_WASM_RELOADING')
    book.sync('next', false, () => module.next(token, random.below(8 << 10)), this.#verified(token), reloading)
    if (random.chance(0.05)) {
      book.sync(
        'boom',
        false,
        () => module.boom(),
        () => false,
        (error) => reloading(error) || hasCode('ERR_WASM_TRAP')(error),
      )
    }
  }

  async #scope(random: Random): Promise<void> {
    const { book } = this
    let kept: Cell | undefined
    let generation = 0
    await book.follow(
      'use',
      false,
      () =>
        this.#manager.use(async (module) => {
          generation = this.#manager.generation
          const values = Array.from({ length: random.between(1, 5) }, () => random.below(1 << 30))
          const cells = values.map((value) => new module.Cell(value))
          const token = this.#token()
          const isRight = this.#verified(token)(module.next(token, random.below(4 << 10)))
          if (random.chance(0.3)) await setTimeout(random.below(4))
          const text = 'x'.repeat(random.below(2000))
          const isWhole = module.sumOf(text) === text.length * 120
          const same = cells.every(({ value }, at) => value === values[at])
          // The others are left to the finalizers.
          cells.slice(random.below(cells.length + 1)).forEach((cell) => {
            cell.free()
          })
          kept = random.chance(0.2) ? new module.Cell(values[0] as number) : undefined
          return isRight && isWhole && same
        }),
      (isRight) => isRight,
    )
    if (!kept) return
    const cell = kept
    await setTimeout(random.below(50))
    const isGone = generation !== this.#manager.generation
    const { error } = book.sync(
      'a cell that was kept',
      false,
      () => cell.value,
      () => !isGone,
      (error) => isStale(error) || hasCode('ERR_WASM_RELOADING')(error),
    )
    if (isStale(error) && !isGone) book.problem('a cell of the generation that serves is stale')
  }

  async #reload(random: Random): Promise<void> {
    await this.book.follow(
      'reload',
      false,
      () => this.#manager.reload(random.chance(0.2) ? { drainTimeoutMs: random.below(3) } : {}),
      () => true,
      (error) =>
        codes('ERR_WASM_DRAIN_TIMEOUT')(error) ||
        (codes('ERR_WASM_RELOAD_FAILED')(error) && (error as WasmError).cause instanceof Deliberate),
    )
  }

  protected async close(): Promise<void> {
    const { count, sum } = this.#answered
    const [counted, added] = await this.#manager.use((module) => [module.count(), module.sum()] as const)
    if (count !== counted || sum !== added) {
      this.book.problem(`the guest has counted ${counted} calls (sum ${added}), and ${count} were answered (${sum})`)
    }
    await this.#manager.close()
    this.managers.delete(this.#manager)
  }
}

/** Goes back to a snapshot, by hand and by policy: what is older stays valid, and what is newer is stale. */
export class RewoundCrew extends Crew {
  #manager!: GlueManager<Cells>
  #snapshot: Snapshot | undefined
  #old: { cell: Cell; generation: number } | undefined

  async open(): Promise<void> {
    this.#manager = await loadGlue<Cells>(this.setting.guests.cells, {
      name: this.managerName,
      cache: this.setting.cache,
      recycle: { memory: 1 << 20, strategy: 'reset' },
    })
    this.watch(this.#manager)
  }

  protected actors() {
    return [
      { name: 'scope', act: (random: Random) => this.#scope(random), restMs: 8 },
      { name: 'hand', act: (random: Random) => this.#hand(random), restMs: 200 },
    ]
  }

  async #scope(random: Random): Promise<void> {
    const { book } = this
    const before = this.#manager.stats().resets
    let cell: Cell | undefined
    await book.follow(
      'use',
      false,
      () =>
        this.#manager.use(async (module) => {
          const token = random.below(1 << 30)
          cell = new module.Cell(token)
          const isRight = module.next(token, random.below(20_000)) === (token ^ 0x55555555)
          if (random.chance(0.3)) await setTimeout(random.below(4))
          const old = this.#old
          const isOldThere = !old || old.generation !== this.#manager.generation || old.cell.value === 7
          return isRight && isOldThere && cell.value === token
        }),
      (isRight) => isRight,
    )
    if (!cell || !random.chance(0.2)) return
    const kept: Cell = cell
    await setTimeout(random.below(30))
    const isRewound = this.#manager.stats().resets !== before
    book.sync(
      'a cell that may be newer than the snapshot',
      false,
      () => kept.value,
      () => true,
      (error) => isStale(error) && (isRewound || this.#old?.generation !== this.#manager.generation),
    )
  }

  async #hand(random: Random): Promise<void> {
    const { book } = this
    const manager = this.#manager
    await random.weighted<() => Promise<unknown>>([
      [3, () => this.#rewind()],
      [
        1,
        () =>
          book.follow(
            'reload',
            false,
            () => manager.reload({ strategy: random.pick(['exclusive', 'rolling']) }),
            () => true,
          ),
      ],
      [2, () => this.#capture()],
    ])()
  }

  /** The newest goes, and an old one with it. */
  async #capture(): Promise<void> {
    const { book } = this
    const manager = this.#manager
    this.#old = undefined
    let kept: { cell: Cell; generation: number } | undefined
    // A reset on the way would be one to the snapshot before.
    const resets = manager.stats().resets
    await book.follow(
      'a cell before a snapshot',
      false,
      () =>
        manager.use((module) => {
          kept = { cell: new module.Cell(7), generation: manager.generation }
          return true
        }),
      (isDone) => isDone,
    )
    const { value } = await book.follow(
      'snapshot',
      false,
      () => manager.snapshot(),
      ({ memoryBytes }) => memoryBytes > 0,
    )
    this.#snapshot?.release()
    this.#snapshot = value
    const generation = (kept as { generation: number } | undefined)?.generation
    if (resets === manager.stats().resets && value?.generation === generation) this.#old = kept
  }

  async #rewind(): Promise<void> {
    const { book } = this
    const to = this.#snapshot
    if (!to || to.residentBytes === 0) return
    await book.follow(
      'reset',
      false,
      () => this.#manager.reset({ to }),
      ({ generation }) => generation <= this.#manager.generation,
      // A reload leaves the snapshots before it behind.
      (error) =>
        error instanceof WasmError && codes('ERR_WASM_STALE_HANDLE')(error) && to.generation < this.#manager.generation,
    )
  }

  protected async close(): Promise<void> {
    this.#snapshot?.release()
    await this.#manager.close()
    this.managers.delete(this.#manager)
  }
}
