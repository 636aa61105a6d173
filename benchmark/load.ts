// A steady load: a few callers, each with its next call ready when it has its answer, so that no instance is idle.
export interface Longest {
  /** Milliseconds of the longest call that touched the time asked about. */
  longestMs: number
  /** How long that time was. */
  lastedMs: number
}

export class Load {
  #work: () => Promise<unknown>
  #isOver = false
  #longestMs = 0
  /** Answers of each caller. */
  #answers: number[]
  #awaited: { answers: number[]; reached(): void; failed(error: unknown): void } | undefined
  #failure: { error: unknown } | undefined
  #callers: Promise<unknown>

  constructor(callers: number, work: () => Promise<unknown>) {
    this.#work = work
    this.#answers = new Array<number>(callers).fill(0)
    this.#callers = Promise.all(this.#answers.map((_, caller) => this.#call(caller)))
  }

  get answers(): number {
    return this.#answers.reduce((sum, answers) => sum + answers, 0)
  }

  /** Watches the calls while `act` runs, and then until those that it may have held up are answered. */
  async watch(act: () => Promise<unknown>): Promise<Longest> {
    this.#longestMs = 0
    const begun = performance.now()
    await act()
    const lastedMs = performance.now() - begun
    // The call that each caller has open, and a few that a fresh instance may be slow at.
    await this.more(4)
    return { longestMs: this.#longestMs, lastedMs }
  }

  /** Until each caller has had so many more answers. */
  more(count: number): Promise<void> {
    return new Promise((reached, failed) => {
      if (this.#failure) return failed(this.#failure.error)
      this.#awaited = { answers: this.#answers.map((answers) => answers + count), reached, failed }
    })
  }

  async end(): Promise<void> {
    this.#isOver = true
    await this.#callers
    if (this.#failure) throw this.#failure.error
  }

  async #call(caller: number): Promise<void> {
    while (!this.#isOver) {
      const begun = performance.now()
      try {
        await this.#work()
      } catch (error) {
        this.#isOver = true
        this.#failure = { error }
        this.#awaited?.failed(error)
        return
      }
      this.#longestMs = Math.max(this.#longestMs, performance.now() - begun)
      this.#answers[caller] = (this.#answers[caller] ?? 0) + 1
      this.#look()
    }
  }

  #look(): void {
    const awaited = this.#awaited
    if (!awaited || awaited.answers.some((answers, caller) => (this.#answers[caller] ?? 0) < answers)) return
    this.#awaited = undefined
    awaited.reached()
  }
}
