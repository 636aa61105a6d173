// What o1js keeps in the guest, read out into JavaScript and made anew in another memory: structured reference strings with
// their Lagrange bases, prover indexes and, where the glue can serialize them, gate vectors.

/** A point as o1js sees it: x, y, and whether it is the one at infinity. */
const POINT = 65
/** Domains are powers of two; the largest that o1js has is 2^16, and its SRS reaches as far. */
const LOG_SIZES = Array.from({ length: 20 }, (_, log) => log)

const FIELDS = {
  Fp: { name: 'fp', Point: 'WasmGVesta', one: 'caml_vesta_affine_one', PolyComm: 'WasmFpPolyComm' },
  Fq: { name: 'fq', Point: 'WasmGPallas', one: 'caml_pallas_affine_one', PolyComm: 'WasmFqPolyComm' },
}

const fieldOf = (cell) => FIELDS[cell.Class.name.includes('Fp') ? 'Fp' : 'Fq']
const isSrs = (cell) => cell.Class.name.endsWith('Srs')
const isIndex = (cell) => cell.Class.name.endsWith('PlonkIndex')

/** Pairs of cell and size: bases that are `found` and not among the `known` sizes. */
export function* newBases(found, known) {
  for (const [key, { cell, sizes }] of found) {
    for (const size of sizes) if (!known.get(key)?.includes(size)) yield [cell, size]
  }
}

export class State {
  #glue
  #handles
  #memory

  /** `memory()`: that of the generation that serves. */
  constructor(glue, handles, memory) {
    this.#glue = glue
    this.#handles = handles
    this.#memory = memory
  }

  /** Whether nothing of it would be lost. */
  canSave(cells) {
    return cells.every((cell) => isSrs(cell) || isIndex(cell) || this.#isSerializable(cell))
  }

  #isSerializable(cell) {
    return typeof cell.Class.deserialize === 'function' && typeof cell.Class.prototype.serialize === 'function'
  }

  /** For each SRS among the cells, by what it is known by: a cell of it, and for which sizes it has a basis. */
  bases(cells) {
    const bases = new Map()
    for (const cell of cells.filter(isSrs)) {
      const key = this.#identity(cell)
      if (!bases.has(key)) bases.set(key, { cell, sizes: this.#sizes(cell) })
    }
    return bases
  }

  /** `staying`: what is still there when this is restored; clones of it are no more than another name. */
  save(cells, staying = []) {
    const saved = { clones: [], srs: new Map(), indexes: new Map(), gates: new Map() }
    const originals = new Map(staying.filter(isSrs).map((cell) => [this.#identity(cell), cell]))
    for (const cell of cells) {
      if (isSrs(cell)) {
        const key = this.#identity(cell)
        if (originals.has(key)) saved.clones.push([cell, originals.get(key)])
        else this.#once(saved.srs, key, cell, () => this.#saveSrs(cell))
      } else if (isIndex(cell)) {
        this.#once(saved.indexes, cell.ptr, cell, () => this.#saveIndex(cell))
      } else if (this.#isSerializable(cell)) {
        this.#once(saved.gates, cell.ptr, cell, () => this.#handles.objectOf(cell).serialize())
      }
    }
    return saved
  }

  #once(map, key, cell, read) {
    const found = map.get(key)
    if (found === undefined) map.set(key, { cells: [cell], content: read() })
    else found.cells.push(cell)
  }

  restore({ clones, srs, indexes, gates }) {
    for (const [cell, original] of clones) this.#handles.rebind(cell, original.ptr, true)
    for (const { cells, content } of srs.values()) {
      const [first] = cells
      // Clones of one SRS share it, and o1js never frees the first: so nobody does.
      const ptr = this.#restoreSrs(first, content)
      for (const cell of cells) this.#handles.rebind(cell, ptr, true)
      for (const [size, basis] of content.bases) this.#restoreBasis(first, size, basis)
    }
    for (const { cells, content } of indexes.values()) {
      // Without one there is nothing left but what o1js keeps to free it.
      const srs = cells.find((cell) => cell.srs !== undefined)?.srs
      if (srs === undefined) continue
      const decode = this.#glue[`caml_pasta_${fieldOf(cells[0]).name}_plonk_index_decode`]
      const ptr = this.#handles.take(decode(content, this.#handles.objectOf(srs)))
      for (const cell of cells) this.#handles.rebind(cell, ptr)
    }
    for (const { cells, content } of gates.values()) {
      const ptr = this.#handles.take(cells[0].Class.deserialize(content))
      for (const cell of cells) this.#handles.rebind(cell, ptr)
    }
  }

  /** Those that are `found` and not `known`. */
  saveBases(found, known) {
    return [...newBases(found, known)].map(([cell, size]) => [cell, size, this.#saveBasis(cell, size)])
  }

  restoreBases(bases) {
    for (const [cell, size, basis] of bases) this.#restoreBasis(cell, size, basis)
  }

  /** Clones are counted references to one SRS, each in a box of its own: what is in the box, beside a flag that is 0. */
  #identity(cell) {
    const [flag, address] = new Uint32Array(this.#memory().buffer, cell.ptr, 2)
    return flag === 0 ? address : flag
  }

  #sizes(cell) {
    const { name } = fieldOf(cell)
    const srs = this.#handles.objectOf(cell)
    const commitment = this.#glue[`caml_${name}_srs_maybe_lagrange_commitment`]
    return LOG_SIZES.map((log) => 2 ** log).filter((size) => {
      const found = commitment(srs, size, 0)
      found?.free()
      return found !== undefined
    })
  }

  #saveSrs(cell) {
    const { name } = fieldOf(cell)
    const srs = this.#handles.objectOf(cell)
    // By points in 2.15 too: its serialized form is compressed, and takes seconds to read.
    const points = this.#readPoints(cell, this.#glue[`caml_${name}_srs_get`](srs))
    return { points, bases: this.#sizes(cell).map((size) => [size, this.#saveBasis(cell, size)]) }
  }

  #restoreSrs(cell, { points }) {
    const { name } = fieldOf(cell)
    return this.#handles.take(this.#glue[`caml_${name}_srs_set`](this.#writePoints(cell, points)))
  }

  #saveIndex(cell) {
    const encode = this.#glue[`caml_pasta_${fieldOf(cell).name}_plonk_index_encode`]
    return cell.encoded ?? encode(this.#handles.objectOf(cell))
  }

  #saveBasis(cell, size) {
    const { name, PolyComm } = fieldOf(cell)
    const prefix = `caml_${name}_srs_lagrange_commitments_whole_domain`
    const whole = this.#glue[`${prefix}_ptr`](this.#handles.objectOf(cell), size)
    const commitments = this.#glue[`${prefix}_read_from_ptr`](whole)
    return Array.from(commitments, (ptr) => {
      const commitment = this.#wrap(PolyComm, ptr)
      const points = this.#readPoints(cell, commitment.unshifted)
      commitment.free()
      return points
    })
  }

  #restoreBasis(cell, size, basis) {
    const { name, PolyComm } = fieldOf(cell)
    const commitments = Uint32Array.from(basis, (points) =>
      this.#handles.take(new this.#glue[PolyComm](this.#writePoints(cell, points), undefined)),
    )
    this.#glue[`caml_${name}_srs_set_lagrange_basis`](this.#handles.objectOf(cell), size, commitments)
  }

  #readPoints(cell, pointers) {
    const { Point } = fieldOf(cell)
    const points = new Uint8Array(pointers.length * POINT)
    pointers.forEach((ptr, i) => {
      const point = this.#wrap(Point, ptr)
      points.set(point.x, i * POINT)
      points.set(point.y, i * POINT + 32)
      points[i * POINT + 64] = point.infinity ? 1 : 0
      point.free()
    })
    return points
  }

  #writePoints(cell, points) {
    const makePoint = this.#glue[fieldOf(cell).one]
    return Uint32Array.from({ length: points.length / POINT }, (_, i) => {
      const point = makePoint()
      const at = i * POINT
      point.x = points.subarray(at, at + 32)
      point.y = points.subarray(at + 32, at + 64)
      if (points[at + 64] === 1) point.infinity = true
      return this.#handles.take(point)
    })
  }

  #wrap(name, ptr) {
    const object = Object.create(this.#glue[name].prototype)
    object.__wbg_ptr = ptr
    return object
  }
}
