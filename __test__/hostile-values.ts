// Values that nobody would pass on purpose, and dice to pick them with.
import { inspect } from 'node:util'

/** What getters and hooks of hostile objects throw: it must come out as it is, or not at all. */
export class Mischief extends Error {}

/** Numbers of a seed that is printed; `WASM_MOLT_SEED=<number>` repeats it. */
export class Dice {
  readonly seed: number
  #state: number

  constructor(seed = Number(process.env.WASM_MOLT_SEED ?? Math.floor(Math.random() * 2 ** 32))) {
    this.seed = seed
    this.#state = seed >>> 0
  }

  /** A whole number below `sides`: mulberry32. */
  roll(sides: number): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0
    let t = this.#state
    t = Math.imul(t ^ (t >>> 15), t | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * sides)
  }

  pick<T>(from: readonly T[]): T {
    return from[this.roll(from.length)] as T
  }
}

/** A getter, a trap or a conversion has thrown. */
const throws = (): never => {
  throw new Mischief('thrown by a hostile value')
}

/** Every operation on it throws. */
function thrower(): object {
  const traps = [
    ...['get', 'has', 'ownKeys', 'getOwnPropertyDescriptor', 'getPrototypeOf', 'set', 'defineProperty'],
    ...['isExtensible', 'preventExtensions', 'deleteProperty', 'setPrototypeOf'],
  ]
  return new Proxy({}, Object.fromEntries(traps.map((trap) => [trap, throws])))
}

function revoked(target: object): object {
  const { proxy, revoke } = Proxy.revocable(target, {})
  revoke()
  return proxy
}

function detached(): ArrayBuffer {
  const buffer = new ArrayBuffer(16)
  structuredClone(buffer, { transfer: [buffer] })
  return buffer
}

/** Has every key, and answers itself to each. */
function endless(): object {
  const self: object = new Proxy(() => self, {
    get: (_, key) => (key === 'then' || typeof key === 'symbol' ? undefined : self),
    apply: () => self,
  })
  return self
}

function cyclic(): object {
  const self: Record<string, unknown> = {}
  self.self = self
  return self
}

/**
 * Makers, because most of these are spoiled by one use.
 *
 * * `reenter`: what a value does that runs code where a number or a text was wanted.
 */
export function hostileValues(reenter: () => unknown): [string, () => unknown][] {
  const answering = (answer: () => unknown) => ({ valueOf: answer, toString: answer })
  const makers: Record<string, () => unknown> = {
    undefined: () => undefined,
    null: () => null,
    true: () => true,
    false: () => false,
    '-0': () => -0,
    '1': () => 1,
    '-1': () => -1,
    '0.5': () => 0.5,
    NaN: () => Number.NaN,
    Infinity: () => Number.POSITIVE_INFINITY,
    '-Infinity': () => Number.NEGATIVE_INFINITY,
    '2^31': () => 2 ** 31,
    '2^32': () => 2 ** 32,
    '2^53 - 1': () => Number.MAX_SAFE_INTEGER,
    '2^53': () => 2 ** 53,
    '2^64': () => 2 ** 64,
    'the largest number': () => Number.MAX_VALUE,
    'the smallest number': () => Number.MIN_VALUE,
    '0n': () => 0n,
    '2n ** 64n': () => 2n ** 64n,
    'a bigint of 4096 bits': () => -(2n ** 4096n),
    'an empty text': () => '',
    'a text': () => 'text',
    'a NUL in a text': () => 'a\0b',
    'half a surrogate pair': () => '\ud800',
    'a number in a text': () => '1',
    'a long text': () => 'x'.repeat(100_000),
    __proto__: () => '__proto__',
    'a symbol': () => Symbol('hostile'),
    'a well-known symbol': () => Symbol.iterator,
    'an object': () => ({}),
    'an object without a prototype': () => Object.create(null),
    'a list': () => [],
    'a list of lists': () => [[[1]]],
    'a list with a hole': () => new Array(3),
    // JavaScriptCore takes minutes to make a text or a number of so many holes.
    'a list of 2^32 - 1': () => new Array(process.versions.bun === undefined ? 2 ** 32 - 1 : 2 ** 16),
    'a function': () => () => 1,
    'a function that throws': () => throws,
    'a class': () => class {},
    'an async function': () => async () => 1,
    'a generator function': () => function* () {},
    'a proxy of nothing': () => new Proxy({}, {}),
    'a proxy that throws': thrower,
    'a proxy of a list': () => new Proxy([1, 2], {}),
    'a proxy that is no longer': () => revoked({}),
    'a proxy of a list that is no longer': () => revoked([]),
    'a proxy of a function that is no longer': () => revoked(() => {}),
    'an object that has everything': endless,
    'an object with itself in it': cyclic,
    'an object that cannot be converted': () => answering(throws),
    'an object that converts to objects': () => answering(() => ({})),
    'an object that converts to a symbol': () => ({ [Symbol.toPrimitive]: () => Symbol('hostile') }),
    'an object that converts by going back in': () => answering(reenter),
    'a boxed number': () => Object(1),
    'a boxed bigint': () => Object(1n),
    'a boxed text': () => Object('text'),
    'a date': () => new Date(Number.NaN),
    'a pattern': () => /x/,
    'a map': () => new Map([[1, 2]]),
    'a promise': () => Promise.resolve(1),
    'a buffer': () => new ArrayBuffer(8),
    'an empty buffer': () => new ArrayBuffer(0),
    'a detached buffer': detached,
    'a shared buffer': () => new SharedArrayBuffer(8),
    // @ts-expect-error Node 20 knows the second argument, the types of ES2023 do not.
    'a buffer that can be resized': () => new ArrayBuffer(8, { maxByteLength: 16 }),
    'bytes of a detached buffer': () => {
      const bytes = new Uint8Array(16)
      structuredClone(bytes.buffer, { transfer: [bytes.buffer] })
      return bytes
    },
    bytes: () => new Uint8Array([0, 97, 115, 109]),
    'bytes of a shared buffer': () => new Uint8Array(new SharedArrayBuffer(8)),
    'wide numbers': () => new Float64Array([1, 2]),
    'a view': () => new DataView(new ArrayBuffer(8)),
    'a URL': () => new URL('https://example.org/x.wasm'),
    'a file URL of nothing': () => new URL('file:///nowhere/at%2Fall.wasm'),
    'an error': () => new Error('hostile'),
    'a memory of the other engine': () => new WebAssembly.Memory({ initial: 1 }),
    'a function of the other engine': () =>
      new WebAssembly.Instance(
        new WebAssembly.Module(
          Uint8Array.from([
            0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0, 10, 4, 1, 2, 0, 11,
          ]),
        ),
      ).exports.f,
    'a signal that is over': () => AbortSignal.abort(new Mischief('aborted')),
    'a signal of one’s own': () => new AbortController().signal,
    'half a signal': () => ({ aborted: false, addEventListener() {} }),
    'a signal that throws': () => ({ aborted: false, addEventListener: throws, removeEventListener: throws }),
    'a signal that lets nobody go': () => ({ aborted: false, addEventListener() {}, removeEventListener: throws }),
    'a signal that is over at once': () => ({
      aborted: false,
      reason: new Mischief('aborted at once'),
      addEventListener: (_: string, listener: () => void) => listener(),
      removeEventListener() {},
    }),
  }
  return Object.entries(makers)
}

/** What a failure is called, whatever the value is: some cannot even be looked at. */
export function shown(value: unknown): string {
  try {
    return inspect(value, { depth: 0, breakLength: Number.POSITIVE_INFINITY }).slice(0, 200)
  } catch {
    return 'something that cannot be looked at'
  }
}
