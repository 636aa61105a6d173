// Objects of the glue are addresses in the guest's memory. This is who knows of each address whether it still means what it
// meant: not if it is newer than the snapshot that the memory was set back to, nor if the memory is another one.

import { WasmError } from '../index.js'

const CELL = Symbol('wasm-molt')
const Real = FinalizationRegistry

/** The only classes whose objects o1js keeps from one JavaScript job to the next; all others are temporaries of one job. */
const KEPT = /^Wasm(?:F[pq]Srs|PastaF[pq]PlonkIndex|F[pq]GateVector)$/

/**
 * What stands for an address: in the object of the glue, in what o1js keeps beside that to free it, in finalizers.
 * So whoever holds one sees it change.
 */
class Cell {
  /** Of a prover index: the cell of its SRS. */
  srs = undefined
  /** And what it was decoded from, until there is a snapshot with it. */
  encoded = undefined
  /** Other cells have this address now, so none of them may free it. */
  isShared = false

  constructor(ptr, era, Class) {
    this.ptr = ptr
    this.era = era
    this.Class = Class
  }
}

/** A time between two snapshots, resets or reloads. All objects that were made in it share its fate. */
const era = () => ({ isCaptured: false, over: undefined })

export class Handles {
  /** While the guest cannot be entered, what is to be freed waits for the reset. */
  isBroken = false
  #era = era()
  /** Eras that the snapshot has in it, and those since then. */
  #captured = []
  #since = [this.#era]
  /** What was freed since the snapshot and is older: a reset brings it back, with nobody left to free it. */
  #released = []
  #kept = new Set()

  /** For the glue: held values are bare addresses there, and the cell knows more. */
  get FinalizationRegistry() {
    const handles = this
    return class {
      #real
      constructor(cleanup) {
        this.#real = new Real((cell) => {
          if (!handles.#canFree(cell)) return
          handles.#remember(cell)
          if (!handles.isBroken) cleanup(cell.ptr)
        })
      }
      register(target, _, token) {
        this.#real.register(target, target[CELL], token)
      }
      unregister(token) {
        return this.#real.unregister(token)
      }
    }
  }

  /** Takes over the classes of the glue, before there is an object of them. */
  adopt(glue) {
    for (const Class of Object.values(glue)) {
      if (typeof Class === 'function' && typeof Class.prototype?.__destroy_into_raw === 'function') this.#adopt(Class)
    }
  }

  #adopt(Class) {
    const handles = this
    const isKept = KEPT.test(Class.name)
    const { free, __destroy_into_raw: destroy } = Class.prototype
    Object.defineProperty(Class.prototype, '__wbg_ptr', {
      get() {
        const cell = this[CELL]
        if (cell === undefined) return undefined
        if (cell.era.over !== undefined) throw stale(Class.name, cell.era.over)
        return cell.ptr
      },
      set(ptr) {
        const cell = this[CELL]
        if (cell !== undefined) {
          cell.ptr = ptr
          return
        }
        const made = new Cell(ptr, handles.#era, Class)
        this[CELL] = made
        if (isKept) handles.#kept.add(new WeakRef(made))
      },
      configurable: true,
    })
    // o1js calls it out of finalizers, on objects that it keeps for that alone: nobody would catch what it throws.
    Class.prototype.free = function () {
      const cell = this[CELL]
      if (!handles.#canFree(cell)) return
      // The one that is collected has a cell of its own, and others may hold it.
      const { ptr } = cell
      if (handles.isBroken) handles.#remember(cell)
      else free.call(this)
      if (isKept) for (const each of handles.kept()) if (each.Class === Class && each.ptr === ptr) each.ptr = 0
    }
    // Consumed by the guest: to a reset that is as good as freed.
    Class.prototype.__destroy_into_raw = function () {
      const cell = this[CELL]
      if (handles.#canFree(cell)) handles.#remember(cell)
      return destroy.call(this)
    }
  }

  #canFree(cell) {
    return cell !== undefined && cell.ptr !== 0 && cell.era.over === undefined && !cell.isShared
  }

  #remember({ era, Class, ptr }) {
    if (era.isCaptured) this.#released.push([Class, ptr])
  }

  /** An object to hand to the glue. */
  objectOf(cell) {
    const object = Object.create(cell.Class.prototype)
    object[CELL] = cell
    return object
  }

  cellOf(object) {
    return object[CELL]
  }

  /** What o1js keeps, and what of it is newer than the snapshot. */
  kept({ onlyNew = false } = {}) {
    const cells = []
    for (const reference of this.#kept) {
      const cell = reference.deref()
      if (cell === undefined || cell.ptr === 0 || cell.era.over !== undefined) this.#kept.delete(reference)
      else if (!onlyNew || !cell.era.isCaptured) cells.push(cell)
    }
    return cells
  }

  /** A snapshot was taken. */
  captured() {
    for (const each of this.#since) each.isCaptured = true
    this.#captured.push(...this.#since)
    this.#released = []
    for (const cell of this.kept()) cell.encoded = undefined
    this.#begin()
  }

  /** The memory is again what it was at the snapshot. Returns what to free once more, as pairs of class and address. */
  rewound() {
    this.#end(this.#since, 'it is newer than the snapshot that the memory was reset to')
    const released = this.#released
    this.#released = []
    return released
  }

  /** The memory is another one, with nothing in it. Returns the way back. */
  moved() {
    const cells = this.kept().map((cell) => [cell, { ...cell }])
    const eras = [...this.#captured, ...this.#since]
    const [captured, since, released] = [this.#captured, this.#since, this.#released]
    this.#end(eras, 'it belongs to a memory that is gone, and could not be carried over')
    this.#captured = []
    this.#released = []
    return () => {
      for (const each of eras) each.over = undefined
      for (const [cell, before] of cells) Object.assign(cell, before)
      this.#captured = captured
      this.#since = since
      this.#era = since.at(-1)
      this.#released = released
    }
  }

  /** From now on the cell means this address. */
  rebind(cell, ptr, isShared = false) {
    Object.assign(cell, { ptr, isShared, era: this.#era })
  }

  /** Another one for the object of the glue, which is forgotten without being freed. */
  take(object) {
    const { ptr } = object[CELL]
    object.__destroy_into_raw()
    return ptr
  }

  #end(eras, why) {
    for (const each of eras) each.over = why
    this.#begin()
  }

  #begin() {
    this.#era = era()
    this.#since = [this.#era]
  }
}

const stale = (name, why) =>
  new WasmError(
    'ERR_WASM_STALE_HANDLE',
    `this ${name} of o1js means nothing any more: ${why}; compile the program again`,
  )
