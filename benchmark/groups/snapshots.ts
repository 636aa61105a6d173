// Going back to a snapshot, against copying as many bytes; and taking one, prepared for it or not.
import { type ManagerOptions, WasmModuleManager } from '../../index.js'
import {
  contest,
  type Effort,
  median,
  ratio,
  ratios,
  repeated,
  type Standing,
  since,
  type Turn,
  takeTurns,
} from '../contest.ts'
import { type Pages, pageBytes, pages } from '../guests.ts'
import { type Figure, type Group, size } from '../report.ts'

const few = 16

export default async function snapshots(effort: Effort): Promise<Group> {
  const group: Group = {
    name: 'snapshots: going back, and taking one of memory whose every page is written',
    standings: {},
    figures: [],
  }
  await goBack(group, effort)
  await take(group, effort)
  return group
}

async function goBack({ standings, figures }: Group, effort: Effort): Promise<void> {
  const middle = await Resettable.of(64)
  const large = await Resettable.of(effort.largeMib)
  // What it has read may stay in its page tables.
  const reader = await Resettable.of(effort.largeMib)
  const most = (effort.largeMib << 20) / pageBytes / 4
  const counts = [few, 256, 4096, 65536].filter((count) => count <= most)
  const source = Buffer.alloc((counts.at(-1) ?? few) * pageBytes, 1)
  const target = Buffer.alloc(source.length, 2)
  const copy = (count: number): Turn =>
    repeated(often(effort, count), () => {
      const from = source.subarray(0, count * pageBytes)
      const start = process.hrtime.bigint()
      target.set(from)
      return since(start)
    })

  const big = size(effort.largeMib)
  const turns: Record<string, Turn> = {}
  if (effort.largeMib !== 64) turns[at(64, few)] = middle.reset(effort, few)
  for (const count of counts) {
    turns[at(effort.largeMib, count)] = large.reset(effort, count)
    turns[`copying ${bytes(count)}`] = copy(count)
  }
  turns[`${big}, reset with ${few} pages far apart`] = large.resetFarApart(effort, few)
  turns[`${big}, reset with ${few} pages, every page read`] = reader.resetAllRead(effort, few)
  const taken = await contest(effort.rounds, turns)
  await Promise.all([middle.close(), large.close(), reader.close()])

  Object.assign(standings, taken)
  const standing = (name: string) => taken[name] as Standing
  for (const mib of new Set([64, effort.largeMib])) {
    const ms = standing(at(mib, few)).ns / 1e6
    figures.push({ what: `for a reset with ${few} dirty pages, ${size(mib)}`, ms, goal: { atMost: 0.02 } })
  }
  for (const count of counts) {
    const what = `the time of copying ${bytes(count)}, for a reset with ${count} dirty pages, ${big}`
    figures.push({ what, ...ratios(standing(at(effort.largeMib, count)), standing(`copying ${bytes(count)}`)) })
  }
}

function at(mib: number, count: number): string {
  return `${size(mib)}, reset with ${count} pages`
}

function bytes(count: number): string {
  const kib = (count * pageBytes) / 1024
  return kib < 1024 ? `${kib} KiB` : size(kib / 1024)
}

/** Dirtying pages takes longer than the reset: fewer times where they are many. */
function often({ share }: Effort, count: number): number {
  return Math.max(3, Math.ceil(share * Math.min(200, 50_000 / count)))
}

/** An instance with a snapshot. */
class Resettable {
  #manager: WasmModuleManager
  #guest: Pages
  #bytes: number

  private constructor(manager: WasmModuleManager, mib: number) {
    this.#manager = manager
    this.#guest = manager.exports as unknown as Pages
    this.#bytes = mib << 20
  }

  static async of(mib: number): Promise<Resettable> {
    const manager = await WasmModuleManager.create(pages(mib), { snapshots: { prepare: true } })
    const resettable = new Resettable(manager, mib)
    resettable.#guest.fill(0, resettable.#bytes, 1)
    manager.snapshotSync()
    return resettable
  }

  reset(effort: Effort, count: number): Turn {
    return this.#resets(effort, count, () => this.#guest.fill(0, count * pageBytes, 2))
  }

  resetFarApart(effort: Effort, count: number): Turn {
    return this.#resets(effort, count, () => {
      for (let page = 0; page < count; page++) {
        const from = (this.#bytes / count) * page
        this.#guest.fill(from, from + pageBytes, 2)
      }
    })
  }

  /** So that what the reset has to look through is in the page tables. */
  resetAllRead(effort: Effort, count: number): Turn {
    const share = effort.share / 10
    return this.#resets({ ...effort, share }, count, () => {
      this.#guest.sum(0, this.#bytes)
      this.#guest.fill(0, count * pageBytes, 2)
    })
  }

  #resets(effort: Effort, count: number, dirty: () => unknown): Turn {
    return repeated(often(effort, count), () => {
      dirty()
      const start = process.hrtime.bigint()
      const { dirtyBytes } = this.#manager.resetSync()
      const taken = since(start)
      if (dirtyBytes !== count * pageBytes) throw new Error(`${dirtyBytes} dirty bytes, and not of ${count} pages`)
      return taken
    })
  }

  async close(): Promise<void> {
    if (this.#guest.sum(0, pageBytes) !== 1) throw new Error('a reset has left something behind')
    await this.#manager.close()
  }
}

/** Of a fresh memory, nanoseconds: only the first capture is one of everything. */
interface Taken {
  touch: number[]
  capture: number[]
}

async function take({ standings, figures }: Group, { rounds, largeMib }: Effort): Promise<void> {
  const bytecode = pages(largeMib)
  const bytes = largeMib << 20
  const kinds = { default: {}, prepared: { snapshots: { prepare: true } } } satisfies Record<string, ManagerOptions>
  const taken: Record<keyof typeof kinds, Taken> = {
    default: { touch: [], capture: [] },
    prepared: { touch: [], capture: [] },
  }
  // Each takes seconds.
  await takeTurns(Math.min(rounds, 5), ['default', 'prepared'] as const, async (kind) => {
    const manager = await WasmModuleManager.create(bytecode, kinds[kind])
    const guest = manager.exports as unknown as Pages
    let start = process.hrtime.bigint()
    guest.fill(0, bytes, 1)
    taken[kind].touch.push(since(start))
    start = process.hrtime.bigint()
    manager.snapshotSync()
    taken[kind].capture.push(since(start))
    await manager.close()
  })

  const standing = (turns: number[]): Standing => ({ ns: median(turns), turns })
  const both = ({ touch, capture }: Taken) => touch.map((ns, round) => ns + (capture[round] ?? 0))
  const parts = { 'first touch': (it: Taken) => it.touch, capture: (it: Taken) => it.capture, 'both together': both }
  const big = size(largeMib)
  for (const [part, of] of Object.entries(parts)) {
    const [plain, prepared] = [standing(of(taken.default)), standing(of(taken.prepared))]
    standings[`${big}, ${part}: default`] = plain
    standings[`${big}, ${part}: prepared`] = prepared
    figures.push({ what: `the time of the default for ${part}, prepared, ${big}`, ratio: ratio(prepared, plain) })
  }
  const ms = median(taken.prepared.capture) / 1e6
  const captures: Figure = { what: `for the first capture, prepared, ${big}`, ms, goal: { atMost: 60 } }
  figures.push(captures)
}
