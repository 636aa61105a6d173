// Workers that run all crews as the main thread does, one after the other: some are ended in good order, some are cut off in the
// middle of everything.
import { once } from 'node:events'
import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import type { Told } from './beside.ts'
import type { Account } from './book.ts'
import type { Setting } from './crew.ts'
import { mergeAll } from './environment.ts'
import { Random } from './random.ts'

const filename = fileURLToPath(new URL('../workers/soak.mjs', import.meta.url))

/** How long a worker may take to begin, to end everything that it has, to exit, and its threads to go: on any machine. */
const [beginMs, endMs, exitMs, goneMs] = [600_000, 600_000, 120_000, 60_000]

export class Workers {
  readonly problems: string[] = []
  readonly count = { ended: 0, cut: 0 }
  /** Of the one that there is now. */
  now: Told | undefined
  /** It has begun, and is not about to end. */
  isAtWork = false
  #past: Account[] = []
  readonly #setting: Setting
  readonly #random: Random
  readonly #over = new AbortController()
  #lives: Promise<void> | undefined

  constructor(setting: Setting) {
    this.#setting = setting
    this.#random = new Random(setting.seed, 'workers')
  }

  get accounts(): Account[] {
    return mergeAll(this.#past, this.now?.accounts ?? [])
  }

  start(): void {
    this.#lives = this.#live().catch((error: Error) => {
      this.problems.push(`the workers: ${error.stack ?? error}`)
    })
  }

  async end(): Promise<void> {
    this.#over.abort()
    await this.#lives
  }

  async #live(): Promise<void> {
    for (let number = 1; !this.#over.signal.aborted; number++) await this.#one(number)
  }

  async #one(number: number): Promise<void> {
    const where = `worker ${number}`
    const worker = new Worker(filename, { workerData: { ...this.#setting, where } satisfies Setting, execArgv: [] })
    const exited = once(worker, 'exit').catch((error) => {
      this.problems.push(`${where} failed: ${error instanceof Error ? error.stack : error}`)
      return [1]
    })
    const [begun, done] = [new AbortController(), new AbortController()]
    let isCutOff = false
    worker.on('message', (told: Told) => {
      // Once Node has begun to end it, what its JavaScript still does fails, and says nothing.
      if (isCutOff) return
      this.now = told
      begun.abort()
      if (told.isDone) done.abort()
    })
    const isCut = (this.#setting.seed + number) % 2 === 0
    const life = this.#random.between(6000, 30_000)
    if (await this.#within(beginMs, begun.signal, exited, `${where} to begin`)) {
      this.isAtWork = true
      await nap(life, this.#over.signal)
      this.isAtWork = false
      if (isCut && !this.#over.signal.aborted) {
        this.count.cut += 1
        isCutOff = true
        await this.#gone(where, worker.terminate())
      } else {
        worker.postMessage('over')
        await this.#within(endMs, done.signal, exited, `${where} to end what it has`)
        this.count.ended += 1
        const code = await this.#gone(where, exited)
        if (code !== undefined && code !== 0) this.problems.push(`${where} exited with ${code}`)
      }
    }
    await worker.terminate()
    this.#past = this.accounts
    this.now = undefined
    await this.#threadsGone(where)
  }

  /** False, and a problem, if it does not come. */
  async #within(ms: number, signal: AbortSignal, exited: Promise<unknown>, what: string): Promise<boolean> {
    const stop = new AbortController()
    await Promise.race([nap(ms, AbortSignal.any([signal, stop.signal])), exited])
    stop.abort()
    if (!signal.aborted)
      this.problems.push(`waited in vain for ${what}; ${this.now?.busy.join(', ') || 'nobody'} was still there`)
    return signal.aborted
  }

  async #gone(where: string, exit: Promise<unknown>): Promise<number | undefined> {
    const stop = new AbortController()
    const code = await Promise.race([exit, nap(exitMs, stop.signal).then(() => undefined)])
    stop.abort()
    if (code === undefined) this.problems.push(`${where} did not exit within ${exitMs / 1e3} s`)
    return Array.isArray(code) ? code[0] : (code as number | undefined)
  }

  async #threadsGone(where: string): Promise<void> {
    const until = performance.now() + goneMs
    let left = threads('molt-w-')
    while (left.length > 0 && performance.now() < until) {
      await setTimeout(50)
      left = threads('molt-w-')
    }
    if (left.length > 0) this.problems.push(`${where} has left threads behind: ${left.join(', ')}`)
  }
}

/** The names of native threads that begin like this; none where the system does not tell. */
export function threads(prefix = ''): string[] {
  try {
    return readdirSync('/proc/self/task')
      .map((id) => {
        try {
          return readFileSync(`/proc/self/task/${id}/comm`, 'utf8').trim()
        } catch {
          return undefined
        }
      })
      .filter((name) => name?.startsWith(prefix)) as string[]
  } catch {
    return []
  }
}

async function nap(ms: number, signal: AbortSignal): Promise<void> {
  await setTimeout(ms, undefined, { signal }).catch(() => {})
}
