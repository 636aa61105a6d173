// Native threads of a guest: they count together, wait for each other, are ended, and die.
import { setTimeout } from 'node:timers/promises'
import { type GlueManager, type GuestThread, loadGlue } from '../../index.js'
import type { Excuse } from './book.ts'
import { Crew } from './crew.ts'
import type { Random } from './random.ts'

interface Guest {
  notes: number[]
  wasm: {
    add(at: number, times: number): void
    get(at: number): number
    set(at: number, value: number): void
    tell(value: number): void
    wait(at: number): number
    wake(at: number): number
    grow(pages: number): number
    spin(): void
    die(): void
  }
}

/** Words that threads use: all add to one, and one is waited at. */
const [counter, door] = [64, 128]

export class ThreadsCrew extends Crew {
  #manager!: GlueManager<Guest>

  async open(): Promise<void> {
    this.#manager = await loadGlue<Guest>(this.setting.guests.threads, {
      name: this.managerName,
      cache: this.setting.cache,
      engine: { threads: true },
      recycle: { memory: 4 << 20 },
    })
    this.watch(this.#manager)
  }

  /** One actor: whoever else used the realm when a thread dies would have to be excused for everything. */
  protected actors() {
    return [{ name: 'round', act: (random: Random) => this.#round(random), restMs: 40 }]
  }

  async #round(random: Random): Promise<void> {
    await random.weighted<() => Promise<unknown>>([
      [10, () => this.#use('counting', random, (guest) => this.#count(guest, random))],
      [4, () => this.#use('waiting', random, (guest) => this.#wait(guest))],
      [4, () => this.#use('terminating', random, (guest) => this.#terminate(guest, random))],
      [2, () => this.#die(random)],
      [2, () => this.#reload(random)],
    ])()
  }

  async #use(what: string, random: Random, act: (guest: Guest) => Promise<boolean>): Promise<void> {
    const { error } = await this.book.follow(
      what,
      false,
      () =>
        this.#manager.use(async (guest) => {
          if (random.chance(0.3)) guest.wasm.grow(1)
          const isRight = await act(guest)
          return isRight && this.#manager.guestThreads.total === 0
        }),
      (isRight) => isRight,
    )
    // Whatever it was, a thread that has failed leaves nothing that could be used.
    if (error !== undefined) await this.#revive()
  }

  #revive(): Promise<unknown> {
    return this.book.follow(
      'reload, to revive',
      false,
      () => this.#manager.reload(),
      () => true,
    )
  }

  async #count({ wasm, notes }: Guest, random: Random): Promise<boolean> {
    const times = Array.from({ length: random.between(1, 3) }, () => random.between(1, 20_000))
    wasm.set(counter, 0)
    notes.length = 0
    const threads = times.map((count, at) =>
      this.#manager.spawn([
        [wasm.add, counter, count],
        [wasm.tell, at],
      ]),
    )
    await Promise.all(threads.map(({ finished }) => finished))
    const all = times.reduce((total, count) => total + count, 0)
    return wasm.get(counter) === all && [...notes].sort().join() === times.map((_, at) => at).join()
  }

  async #wait({ wasm }: Guest): Promise<boolean> {
    wasm.set(door, 0)
    const threads = [this.#manager.spawn([[wasm.wait, door]]), this.#manager.spawn([[wasm.wait, door]])]
    await setTimeout(1)
    wasm.wake(door)
    await Promise.all(threads.map(({ finished }) => finished))
    return true
  }

  async #terminate({ wasm }: Guest, random: Random): Promise<boolean> {
    wasm.set(door, 0)
    const threads: GuestThread[] = [this.#manager.spawn([[wasm.spin]]), this.#manager.spawn([[wasm.wait, door]])]
    if (random.chance(0.5)) await setTimeout(random.below(4))
    await Promise.all(threads.map((thread) => thread.terminate()))
    await Promise.all(threads.map(({ finished }) => finished))
    return true
  }

  /** Everything stops, and says why, until somebody brings it back. */
  async #die(random: Random): Promise<void> {
    const { book } = this
    const manager = this.#manager
    const dead: Excuse = (error) => (error as { code?: string }).code === 'ERR_WASM_TRAP'
    const hasSnapshot = random.chance(0.5)
    const { value: snapshot } = hasSnapshot
      ? await book.follow(
          'snapshot',
          false,
          () => manager.snapshot(),
          ({ memoryBytes }) => memoryBytes > 0,
        )
      : { value: undefined }
    await book.follow(
      'dying',
      false,
      () =>
        manager.use(async (guest) => {
          const thread = manager.spawn([[guest.wasm.die]])
          await thread.finished
        }),
      () => false,
      dead,
    )
    book.sync(
      'a call among the dead',
      false,
      () => manager.module.wasm.get(counter),
      () => false,
      dead,
    )
    await book.follow<unknown>(
      snapshot ? 'reset' : 'reload',
      false,
      // The newest: a recycle in between has taken one of its own.
      () => (snapshot ? manager.reset() : manager.reload()),
      () => true,
    )
    snapshot?.release()
  }

  async #reload(random: Random): Promise<void> {
    const { wasm } = this.#manager.module
    const left = random.chance(0.5) ? this.#manager.spawn([[wasm.spin]]) : undefined
    const ended = left?.finished.catch(() => {})
    await this.book.follow(
      'reload',
      false,
      () => this.#manager.reload({ strategy: random.pick(['exclusive', 'rolling']) }),
      () => true,
    )
    await ended
  }

  protected async close(): Promise<void> {
    await this.#manager.close()
    this.managers.delete(this.#manager)
  }
}
