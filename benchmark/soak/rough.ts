// Everything that can go wrong in a call, and everything that can be done to a manager by hand, on top of recycles.
import { readFileSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import {
  type InstanceContext,
  type LeasedInstance,
  type RecyclePolicy,
  type ReloadOptions,
  type WasmError,
  WasmModuleManager,
} from '../../index.js'
import { codes, Deliberate, type Excuse, exactly, Stop } from './book.ts'
import { Crew, fn, type Setting } from './crew.ts'
import { Ledger } from './ledger.ts'
import type { Random } from './random.ts'

export interface Rough {
  instances: number
  recycle: RecyclePolicy
  /** One of these two bounds synchronous calls, which nothing else can stop. Time may be up for any call on a busy machine. */
  fuel?: number
  timeoutMs?: number
  /** Reloads that stop what is in flight, so that any call may end that way. */
  interrupts?: boolean
  swaps?: boolean
  /** How often `initialize` throws. */
  failing?: number
}

/** What an import does when it is asked with a key. */
type Behaviour = 'value' | 'promise' | 'throw' | 'reject' | 're-enter' | 're-enter later'

export class RoughCrew extends Crew {
  readonly #rough: Rough
  #manager!: WasmModuleManager
  readonly #ledger = new Ledger(this.book)
  readonly #asks = new Map<number, { behaviour: Behaviour; error: Deliberate }>()
  #nextKey = 1
  readonly #hooks = this.random('hooks')
  /** Builds that may answer: during a swap there are two. */
  #builds = new Set([1])
  #build = 1

  constructor(name: string, setting: Setting, rough: Rough) {
    super(name, setting)
    this.#rough = rough
  }

  async open(): Promise<void> {
    const { instances, recycle, fuel, timeoutMs, failing = 0 } = this.#rough
    let isOpen = false
    this.#manager = await WasmModuleManager.create(this.setting.guests.bench[0], {
      ...this.base(recycle),
      instances,
      maxQueue: 64,
      engine: { fuel: fuel !== undefined },
      limits: { ...(fuel === undefined ? {} : { fuel }), ...(timeoutMs === undefined ? {} : { timeoutMs }) },
      imports: (instance) => ({
        env: {
          ask: (key: number) => this.#answer(key, instance),
          note: (token: number, count: number) => this.#ledger.note(token, count, instance),
        },
      }),
      initialize: () => {
        if (isOpen && !this.isOver && this.#hooks.chance(failing)) throw new Deliberate('initialize')
      },
    })
    isOpen = true
    this.watch(this.#manager)
  }

  protected actors() {
    return [
      ...Array.from({ length: 3 }, () => ({ name: 'call', act: (random: Random) => this.#call(random), restMs: 1 })),
      { name: 'sync', act: async (random: Random) => this.#sync(random), restMs: 8 },
      { name: 'lease', act: (random: Random) => this.#lease(random), restMs: 8 },
      { name: 'acquire', act: (random: Random) => this.#acquire(random), restMs: 20 },
      { name: 'hand', act: (random: Random) => this.#hand(random), restMs: 300 },
    ]
  }

  /** What any call may end with because of what is done to the manager meanwhile. */
  #around(...more: Excuse[]): Excuse {
    const { interrupts, timeoutMs } = this.#rough
    const always = codes(
      'ERR_WASM_QUEUE_FULL',
      ...(interrupts ? (['ERR_WASM_INTERRUPTED'] as const) : []),
      ...(timeoutMs === undefined ? [] : (['ERR_WASM_TIMEOUT'] as const)),
    )
    return (error) => always(error) || this.#isFailedReload(error) || more.some((excuse) => excuse(error))
  }

  /** `initialize` threw, and nothing was left to serve. */
  #isFailedReload(error: unknown): boolean {
    if (!this.#rough.failing || !codes('ERR_WASM_RELOAD_FAILED')(error)) return false
    const { cause, phase } = error as WasmError
    return cause instanceof Deliberate && cause.message === 'initialize' && phase === 'initialize'
  }

  #call(random: Random): Promise<unknown> {
    const { book } = this
    const manager = this.#manager
    const value = random.below(1 << 30)
    const add = (options = {}, excuse = this.#around()) =>
      book.follow(
        'add',
        true,
        () => manager.call('add', [value, 1], options),
        (answer) => answer === value + 1,
        excuse,
      )
    const act = random.weighted<() => Promise<unknown>>([
      [30, () => add()],
      [
        20,
        () =>
          book.follow(
            'leak',
            true,
            () => manager.call('leak', [random.below(64 << 10)]),
            (pages) => Number(pages) > 0,
            this.#around(),
          ),
      ],
      [15, () => this.#tally((token) => manager.call('tally', [token]))],
      [15, () => this.#ask(random, random.pick(['value', 'promise', 'throw', 'reject', 're-enter', 're-enter later']))],
      [
        10,
        () => {
          const bytes = Buffer.alloc(random.between(1, 20_000), value.toString())
          const reversed = Buffer.from(bytes).reverse()
          return book.follow(
            'reverse',
            true,
            () => manager.invoke('reverse', bytes),
            (answer) => Buffer.compare(answer, reversed) === 0,
            this.#around(),
          )
        },
      ],
      [
        5,
        () => {
          const builds = this.#builds
          return book.follow(
            'version',
            true,
            () => manager.call('version'),
            (build) => builds.has(build as number) || this.#builds.has(build as number),
            this.#around(),
          )
        },
      ],
      [
        2,
        () => {
          const name = random.pick(['boom', 'beyond'])
          const kind = name === 'boom' ? 'unreachable' : 'out-of-bounds-memory'
          const excuse: Excuse = (error) => codes('ERR_WASM_TRAP')(error) && (error as WasmError).trap === kind
          return book.follow(
            name,
            true,
            () => manager.call(name),
            () => false,
            this.#around(excuse),
          )
        },
      ],
      [
        1,
        () =>
          book.follow(
            'spin with a timeout',
            true,
            () => manager.call('spin', [], { timeoutMs: random.between(1, 4) }),
            () => false,
            this.#around(codes('ERR_WASM_TIMEOUT', 'ERR_WASM_OUT_OF_FUEL')),
          ),
      ],
      [
        1,
        async () => {
          const [controller, stop] = [new AbortController(), new Stop('spin')]
          const spin = book.follow(
            'spin with a signal',
            true,
            () => manager.call('spin', [], { signal: controller.signal }),
            () => false,
            this.#around(exactly(stop), codes('ERR_WASM_OUT_OF_FUEL')),
          )
          await setTimeout(random.below(4))
          controller.abort(stop)
          await spin
        },
      ],
      [
        4,
        async () => {
          const [controller, stop] = [new AbortController(), new Stop('add')]
          const call = add({ signal: controller.signal }, this.#around(exactly(stop)))
          if (random.chance(0.5)) await setTimeout(random.below(2))
          controller.abort(stop)
          await call
        },
      ],
      [4, () => add({ timeoutMs: random.between(1, 3) }, this.#around(codes('ERR_WASM_TIMEOUT')))],
      [1, () => Promise.all(Array.from({ length: random.between(60, 100) }, () => add()))],
      [
        1,
        () =>
          book.follow(
            'no such export',
            true,
            () => manager.call('missing'),
            () => false,
            codes('ERR_WASM_EXPORT_NOT_FOUND'),
          ),
      ],
      [
        1,
        () =>
          book.follow(
            'arguments that cannot be used',
            true,
            () => manager.call('add', [Symbol('no number')]),
            () => false,
            (error) => error instanceof TypeError,
          ),
      ],
    ])
    return act()
  }

  /** What the guest has run it says itself. */
  async #tally(call: (token: number) => Promise<unknown>): Promise<void> {
    const token = this.#ledger.begin()
    const outcome = await this.book.follow(
      'tally',
      true,
      () => call(token),
      (answer) => answer === (token ^ 0x55555555),
      this.#around(),
    )
    this.#ledger.end(token, 'tally', outcome)
  }

  async #ask(random: Random, behaviour: Behaviour): Promise<void> {
    const key = this.#nextKey++ | 0
    const error = new Deliberate(`import ${key}`)
    this.#asks.set(key, { behaviour, error })
    const isThrown = behaviour === 'throw' || behaviour === 'reject'
    await this.book.follow(
      `ask: ${behaviour}`,
      true,
      () => this.#manager.call('ask', [key]),
      (answer) => answer === key + 1,
      // What re-enters later finds its instance gone where that was taken away meanwhile; the call has then been stopped.
      isThrown ? this.#around(exactly(error)) : this.#around(),
    )
    this.#asks.delete(key)
    if (random.chance(0.01)) this.#nextKey = 1
  }

  #answer(key: number, instance: InstanceContext): unknown {
    const { behaviour, error } = this.#asks.get(key) ?? { behaviour: 'value', error: undefined }
    const again = () => fn(instance.exports, 'add')(key, 1)
    switch (behaviour) {
      case 'value':
        return key + 1
      case 'promise':
        return setTimeout(key % 3, key + 1)
      case 'throw':
        throw error
      case 'reject':
        return Promise.reject(error)
      case 're-enter':
        return again()
      case 're-enter later':
        return (async () => {
          await null
          return again()
        })()
    }
  }

  #sync(random: Random): void {
    const { book } = this
    const value = random.below(1 << 30)
    const { fuel, timeoutMs } = this.#rough
    const isTimedOut: Excuse = (error) => timeoutMs !== undefined && codes('ERR_WASM_TIMEOUT')(error)
    const excuse: Excuse = (error) =>
      codes('ERR_WASM_BUSY', 'ERR_WASM_RELOADING')(error) || isTimedOut(error) || this.#isFailedReload(error)
    const how = random.weighted([
      [20, 'add'],
      [5, 'tally'],
      [2, 'boom'],
      [fuel ? 0.5 : timeoutMs ? 0.1 : 0, 'spin'],
      [1, 'missing'],
    ] as const)
    switch (how) {
      case 'add':
        book.sync(
          'add, synchronous',
          true,
          () => fn(this.#manager.exports, 'add')(value, 1),
          (answer) => answer === value + 1,
          excuse,
        )
        return
      case 'tally': {
        const token = this.#ledger.begin()
        const outcome = book.sync(
          'tally, synchronous',
          true,
          () => fn(this.#manager.exports, 'tally')(token),
          (answer) => answer === (token ^ 0x55555555),
          excuse,
        )
        this.#ledger.end(token, 'tally, synchronous', outcome)
        return
      }
      case 'boom':
        book.sync(
          'boom, synchronous',
          true,
          () => fn(this.#manager.exports, 'boom')(),
          () => false,
          (error) => excuse(error) || codes('ERR_WASM_TRAP')(error),
        )
        return
      case 'spin':
        book.sync(
          'spin, synchronous',
          true,
          () => this.#manager.callSync('spin'),
          () => false,
          (error) => excuse(error) || codes('ERR_WASM_OUT_OF_FUEL')(error),
        )
        return
      case 'missing':
        book.sync(
          'no such export, synchronous',
          true,
          () => this.#manager.callSync('missing'),
          () => false,
          (error) => excuse(error) || codes('ERR_WASM_EXPORT_NOT_FOUND')(error),
        )
    }
  }

  async #lease(random: Random): Promise<void> {
    const { book } = this
    const [controller, stop] = [new AbortController(), new Stop('lease')]
    const isAborted = random.chance(0.05)
    let kept: LeasedInstance | undefined
    const lease = book.follow(
      'use',
      false,
      () =>
        this.#manager.use(
          async (instance) => {
            kept = instance
            await this.#leased(random, instance)
            return true
          },
          { signal: controller.signal },
        ),
      (isDone) => isDone,
      this.#around(exactly(stop)),
    )
    if (isAborted) controller.abort(stop)
    await lease
    if (!kept || !random.chance(0.1)) return
    const stale = kept
    book.sync(
      'a lease that has ended',
      true,
      () => fn(stale.exports, 'add')(1, 2),
      () => false,
      codes('ERR_WASM_STALE_HANDLE'),
    )
  }

  /** A lease that is given back by hand, with a call still under way. */
  async #acquire(random: Random): Promise<void> {
    const { book } = this
    const acquired = await book.follow(
      'acquire',
      false,
      () => this.#manager.acquire(),
      (lease) => lease.generation <= this.#manager.generation,
      this.#around(),
    )
    const lease = acquired.value
    if (!lease) return
    const value = random.below(1 << 30)
    const left = book.follow(
      'add, left in a lease',
      true,
      () => lease.call('add', [value, 1]),
      (answer) => answer === value + 1,
      (error) =>
        (this.#rough.interrupts === true && codes('ERR_WASM_INTERRUPTED', 'ERR_WASM_STALE_HANDLE')(error)) ||
        (this.#rough.timeoutMs !== undefined && codes('ERR_WASM_TIMEOUT')(error)),
    )
    if (random.chance(0.5)) await setTimeout(random.below(3))
    lease.release()
    await left
  }

  async #leased(random: Random, instance: LeasedInstance): Promise<void> {
    const { book } = this
    // An interrupting reload takes leases away; what is called afterwards finds that.
    const { interrupts, timeoutMs } = this.#rough
    const taken = codes(
      ...(interrupts ? (['ERR_WASM_STALE_HANDLE', 'ERR_WASM_INTERRUPTED'] as const) : []),
      ...(timeoutMs === undefined ? [] : (['ERR_WASM_TIMEOUT'] as const)),
    )
    let trapped = false
    const excuse: Excuse = (error) => taken(error) || (trapped && codes('ERR_WASM_STALE_HANDLE')(error))
    for (let left = random.between(1, 4); left > 0; left--) {
      const value = random.below(1 << 30)
      const isRight = (answer: unknown) => answer === value + 1 && (!trapped || this.#isKept)
      if (random.chance(0.5)) {
        await book.follow('add in a lease', true, () => instance.call('add', [value, 1]), isRight, excuse)
      } else {
        book.sync('add in a lease, synchronous', true, () => fn(instance.exports, 'add')(value, 1), isRight, excuse)
      }
      if (random.chance(0.03)) {
        const trap: Excuse = (error) => excuse(error) || codes('ERR_WASM_TRAP')(error)
        const { error } = await book.follow(
          'boom in a lease',
          true,
          () => instance.call('boom'),
          () => false,
          trap,
        )
        trapped ||= codes('ERR_WASM_TRAP')(error)
      }
      if (random.chance(0.1)) await setTimeout(random.below(5))
    }
  }

  get #isKept(): boolean {
    return this.#rough.recycle.onTrap === 'keep'
  }

  async #hand(random: Random): Promise<void> {
    const manager = this.#manager
    // A crash loop of `initialize` has ended it: somebody has to say that it may try again.
    if (manager.state === 'failed') return this.#reload('revive', {})
    const strategy = random.pick(['exclusive', 'rolling'] as const)
    const drain = { drainTimeoutMs: random.below(5), onDrainTimeout: 'interrupt' } as const
    await random.weighted<() => Promise<void>>([
      [4, () => this.#reload('manual', { strategy })],
      [this.#rough.interrupts ? 3 : 0, () => this.#reload('interrupting', { strategy, ...drain })],
      [
        1,
        () => this.#reload('impatient', { strategy, drainTimeoutMs: random.below(3) }, codes('ERR_WASM_DRAIN_TIMEOUT')),
      ],
      [this.#rough.swaps ? 4 : 0, () => this.#swap(random, strategy)],
      [
        1,
        async () => {
          this.book.sync(
            'reloadSync',
            false,
            () => manager.reloadSync(),
            (report) => report.generation === manager.generation,
            (error) => codes('ERR_WASM_BUSY', 'ERR_WASM_RELOADING')(error) || this.#isFailedReload(error),
          )
        },
      ],
    ])()
  }

  async #reload(reason: string, options: ReloadOptions, excuse: Excuse = () => false): Promise<void> {
    const { generation } = this.#manager
    await this.book.follow(
      `reload, ${reason}`,
      false,
      () => this.#manager.reload({ reason, ...options }),
      (report) => report.generation > generation,
      (error) => excuse(error) || this.#isFailedReload(error),
    )
  }

  async #swap(random: Random, strategy: 'exclusive' | 'rolling'): Promise<void> {
    const { bench, poor } = this.setting.guests
    const kind = random.weighted([
      [4, 'other'],
      [1, 'poor'],
      [1, 'broken'],
    ] as const)
    if (kind === 'poor') {
      return this.#reload('incompatible', { source: poor, strategy }, codes('ERR_WASM_INCOMPATIBLE_MODULE'))
    }
    if (kind === 'broken') {
      const source = readFileSync(poor)
      return this.#reload(
        'broken',
        { source, strategy },
        (error) => codes('ERR_WASM_RELOAD_FAILED')(error) && codes('ERR_WASM_COMPILE')((error as WasmError).cause),
      )
    }
    const next = this.#build === 1 ? 2 : 1
    this.#builds = new Set([this.#build, next])
    const { error } = await this.book.follow(
      'swap',
      false,
      () => this.#manager.reload({ reason: 'swap', source: bench[next - 1] as string, strategy }),
      () => true,
      (error) => this.#isFailedReload(error),
    )
    if (error === undefined) this.#build = next
    // What a rolling swap has left behind may still answer for a moment; a call that begins now gets this build.
    this.#builds = new Set([this.#build])
  }

  protected async close(): Promise<void> {
    if (this.#manager.state === 'failed') await this.#reload('revive', {})
    await this.closeAndCompare(this.#manager)
  }
}
