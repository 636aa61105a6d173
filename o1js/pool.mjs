// The guest's thread pool: rayon's own, on native threads in place of o1js's Workers.

export class Pool {
  /** How many threads there are to be. */
  size = 0
  #facade
  #manager
  #glue
  #threads = []
  #isAround = false

  /** `manager()`: who runs the generation that serves. */
  constructor(facade, manager) {
    this.#facade = facade
    this.#manager = manager
  }

  /** Names that the glue calls as globals, out of the guest. */
  get shadows() {
    return {
      startWorkers: (_source, _memory, builder) => this.#spawn(builder),
      // The guest has them end by themselves as soon as it has let go of the pool.
      terminateWorkers: () => this.#ended(),
    }
  }

  /** `initThreadPool` and `exitThreadPool` as the glue has them. */
  adopt({ initThreadPool, exitThreadPool }) {
    this.#glue = { initThreadPool, exitThreadPool }
  }

  get isUp() {
    return this.#threads.length > 0
  }

  start(size = this.size) {
    this.size = size
    this.#glue.initThreadPool(size, '')
  }

  /** Lets the threads end. Resolves when they have. */
  async stop() {
    if (!this.isUp) return
    const ended = this.#glue.exitThreadPool()
    this.#threads = []
    await ended
  }

  /**
   * Does something to the memory that its threads do not outlive, and starts others: those that are in the middle of an
   * operation count on them. Not before all else is in its place, and once, however deep this is nested.
   */
  around(act) {
    if (this.#isAround) return act()
    const { isUp } = this
    this.#isAround = true
    try {
      act()
      this.#threads = []
    } finally {
      this.#isAround = false
      // After an error those before may still be there.
      if (isUp && !this.isUp) this.start()
    }
  }

  #spawn(builder) {
    const { __wbindgen_start, wbg_rayon_start_worker, __wbindgen_thread_destroy } = this.#facade.exports
    const receiver = builder.receiver()
    const threads = Array.from({ length: builder.numThreads() }, () =>
      this.#manager().spawn([
        [__wbindgen_start, ...this.#facade.startArgs],
        [wbg_rayon_start_worker, receiver],
        // Its stack and thread-locals; without that each leaves a megabyte.
        [__wbindgen_thread_destroy, ...Array(__wbindgen_thread_destroy.length).fill(0)],
      ]),
    )
    this.#threads = threads
    builder.build()
    return Promise.resolve()
  }

  /** Whoever asks for `finished` keeps the process alive until then, so not before it is time. */
  async #ended() {
    await Promise.allSettled(this.#threads.map(({ finished }) => finished))
  }
}
