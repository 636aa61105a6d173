// When to take a snapshot, and when to reset to it.
//
// Between two JavaScript jobs o1js has nothing in the guest but what `compile` has made (handles.mjs, KEPT). So at the
// boundary of a job, with no export on the stack, everything else is garbage and a reset takes it back. What is newer than
// the snapshot and kept is carried over, or a snapshot is taken in place of the reset: nothing is lost either way.

import { newBases } from './state.mjs'

/** Calls after which there is garbage in the guest. */
const WORK = /^caml_(?:pasta_f[pq]_plonk_proof_(?:create|verify|batch_verify)|f[pq]_srs_batch_accumulator_check)$/
const PROOF = /^caml_pasta_(f[pq])_plonk_proof_create$/
const MAKES_INDEX = /^caml_pasta_f[pq]_plonk_index_(?:create|decode|read)$/
const MAKES_SRS = /^caml_f[pq]_srs_(?:create|create_parallel|set|read)$/

export class Keeper {
  counts = { snapshots: 0, resets: 0, carried: 0, traps: 0 }
  snapshotBytes = 0
  #parts
  /** What the glue keeps in JavaScript for its guest, if it does, and how that was at the snapshot. */
  #heap
  #heapAtSnapshot
  #emptyHeap
  #snapshot
  #bases = new Map()
  #isScheduled = false
  /** A proof was made or verified since the last snapshot or reset. */
  #hasWorked = false
  #isTrapped = false

  /** `parts`: facade, handles, pool, state, manager(), settings, events, keepsPool. */
  constructor(parts) {
    this.#parts = parts
  }

  /** Takes its place in front of the functions of the glue. */
  adopt(glue, heap) {
    this.#heap = heap
    this.#emptyHeap = heap?.save()
    this.#parts.pool.adopt(glue)
    for (const name of Object.keys(glue)) {
      if (WORK.test(name)) glue[name] = this.#working(name, glue[name])
      else if (MAKES_INDEX.test(name)) glue[name] = this.#makingIndex(glue[name])
      else if (MAKES_SRS.test(name)) glue[name] = this.#makingSrs(glue[name])
    }
    glue.initThreadPool = (size) => this.#begin(size)
    glue.exitThreadPool = () => this.#end()
    // There is something to go back to from the first moment on.
    this.snapshot()
  }

  #working(name, call) {
    const proof = PROOF.exec(name)?.[1]
    return (...args) => {
      this.#hasWorked = true
      this.#soon()
      const result = call(...args)
      if (proof !== undefined) queueMicrotask(() => this.#parts.events.emit(proof === 'fp' ? 'step' : 'wrap'))
      return result
    }
  }

  #makingIndex(call) {
    const { handles } = this.#parts
    return (...args) => {
      const index = call(...args)
      const cell = handles.cellOf(index)
      cell.srs = handles.cellOf(args.find((arg) => arg?.constructor?.name.endsWith('Srs')))
      // o1js decodes what it has in its cache in the middle of the first proof, where there may be no room to encode it.
      if (args[0] instanceof Uint8Array) cell.encoded = args[0]
      this.#soon()
      return index
    }
  }

  #makingSrs(call) {
    return (...args) => {
      const srs = call(...args)
      // o1js keeps it for ever, also if the compilation that it was made for fails.
      queueMicrotask(() => this.settle())
      return srs
    }
  }

  // The beginning and, in 2.14, the end of the outermost operation that needs threads. o1js awaits both.

  async #begin(size) {
    const { pool } = this.#parts
    this.settle()
    if (pool.isUp && pool.size !== size) await pool.stop()
    if (!pool.isUp) pool.start(size)
    // Nothing to start, but a promise of its own to resolve.
    return globalThis.startWorkers('', undefined, { numThreads: () => 0, receiver: () => 0, build() {} })
  }

  async #end() {
    if (this.#isTrapped) this.settle()
    const began = performance.now()
    await this.#parts.pool.stop()
    this.settle(began)
  }

  /** At the next turn of the event loop, or when the next operation begins: proofs may follow each other without a turn. */
  #soon() {
    // 2.15 says that one begins only if it believes that there is no pool.
    if (this.#parts.keepsPool) globalThis.terminateWorkers()
    if (this.#isScheduled) return
    this.#isScheduled = true
    setImmediate(() => {
      this.#isScheduled = false
      this.settle()
    })
  }

  /** The guest was stopped in the middle: locks may be held. It is put back before any other job can call it. */
  trapped() {
    this.#isTrapped = true
    this.counts.traps += 1
    this.#parts.handles.isBroken = true
    queueMicrotask(() => this.settle())
  }

  /** Does what there is to do. At the boundary of a job only. `began`: when the end of the pool did, which is part of it. */
  settle(began) {
    const { facade, handles, state, manager, settings } = this.#parts
    if (facade.depth > 0) return this.#soon()
    if (this.#isTrapped) return this.#recover()
    const isNew =
      handles.kept({ onlyNew: true }).length > 0 || !newBases(state.bases(handles.kept()), this.#bases).next().done
    if (!this.#hasWorked || settings.reset === 'never') {
      if (isNew) this.snapshot()
    } else if (isNew || settings.reset === 'always' || manager().stats().memoryBytes > settings.reset) {
      this.reset(began)
    }
  }

  /** Of all that there is now, garbage too. */
  snapshot() {
    const { handles, state, manager, pool, events } = this.#parts
    const before = this.#snapshot
    // No cell in it: what o1js has let go of must be able to go.
    this.#bases = new Map(Array.from(state.bases(handles.kept()), ([key, { sizes }]) => [key, sizes]))
    pool.around(() => {
      this.#snapshot = manager().snapshotSync()
      handles.captured()
      this.#heapAtSnapshot = this.#heap?.save()
    })
    before?.release()
    this.#hasWorked = false
    this.snapshotBytes = manager().stats().memoryBytes
    this.counts.snapshots += 1
    events.emit('snapshot')
  }

  /** Back to the snapshot, with what is kept and newer. */
  reset(began = performance.now()) {
    const { handles, state, pool, events } = this.#parts
    const fresh = handles.kept({ onlyNew: true })
    // Garbage and all, but nothing is lost.
    if (!state.canSave(fresh)) return this.snapshot()
    const staying = handles.kept().filter((cell) => cell.era.isCaptured)
    const saved = state.save(fresh, staying)
    const bases = state.saveBases(state.bases(staying), this.#bases)
    pool.around(() => {
      const released = this.#rewind()
      state.restore(saved)
      state.restoreBases(bases)
      for (const [Class, ptr] of released) free(Class, ptr)
      if (fresh.length + bases.length + released.length === 0) return
      this.counts.carried += 1
      this.snapshot()
    })
    events.emit('reset', { ms: performance.now() - began })
  }

  /**
   * Back to the snapshot after a trap. The guest cannot be asked for what is newer, so that is lost, but for indexes of
   * which there still is what they were decoded from: o1js has them out of its cache, and does not decode them again.
   */
  #recover() {
    const { facade, handles, state, pool, events } = this.#parts
    const fresh = handles.kept({ onlyNew: true }).filter((cell) => cell.encoded !== undefined)
    const saved = state.save(fresh)
    pool.around(() => {
      const released = this.#rewind()
      this.#isTrapped = false
      handles.isBroken = false
      facade.recovered()
      state.restore(saved)
      for (const [Class, ptr] of released) free(Class, ptr)
      if (fresh.length + released.length > 0) this.snapshot()
    })
    events.emit('reset')
  }

  /** Puts the memory back. Returns what was freed since, and is to be freed again. */
  #rewind() {
    const { handles, manager } = this.#parts
    manager().resetSync()
    this.#heap?.restore(this.#heapAtSnapshot)
    this.#hasWorked = false
    this.counts.resets += 1
    return handles.rewound()
  }

  /**
   * Goes over to another memory with all that is kept. `change` makes one and runs the steps: `save()`, while the old one is
   * there, and `restore(inner, saved)`. Synchronously, because o1js goes on in any job.
   */
  move(change) {
    const { facade, handles, state, pool, events } = this.#parts
    if (this.#isTrapped) this.#recover()
    const undo = []
    const heap = this.#heap?.save()
    const save = () => state.save(handles.kept())
    const restore = (inner, saved) => {
      undo.push(() => this.#heap?.restore(heap))
      this.#heap?.restore(this.#emptyHeap)
      undo.push(facade.enter(inner))
      undo.push(handles.moved())
      state.restore(saved)
    }
    pool.around(() => {
      try {
        change({ save, restore })
      } catch (error) {
        for (const step of undo) step()
        throw error
      }
      this.#snapshotOfNew()
    })
    events.emit('reload')
  }

  /** Goes over to another manager with everything as it is: `change(act)` makes that one serve, and calls `act(inner)`. */
  transplant(change) {
    const { facade, pool, events } = this.#parts
    if (this.#isTrapped) this.#recover()
    pool.around(() => {
      if (this.#hasWorked) this.reset()
      // Threads are on the stack of nobody, but in the memory.
      if (pool.isUp) this.snapshot()
      change((inner) => facade.transplant(inner))
      this.#snapshotOfNew()
    })
    events.emit('reload')
  }

  /** Those there are belong to the memory before. */
  #snapshotOfNew() {
    this.#snapshot = undefined
    this.#bases = new Map()
    this.snapshot()
  }
}

function free(Class, ptr) {
  const object = Object.create(Class.prototype)
  object.__wbg_ptr = ptr
  object.free()
}
