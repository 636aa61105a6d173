'use strict'

// Reads a binary module as far as `check` needs it: counts, memories, which proposals it uses, who made it.
// Code is walked instruction by instruction, because that alone says which proposals the engine really meets.

/**
 * @typedef {{ imported: boolean, initial: number, maximum?: number, shared: boolean, is64: boolean }} MemoryType
 * @typedef {object} Description
 * @property {number} bytes
 * @property {Record<string, number>} imports How many of each module.
 * @property {number} exports
 * @property {MemoryType[]} memories
 * @property {string[]} features
 * @property {Record<string, string>} producers
 * @property {string} toolchain A guess.
 * @property {string} [error] Where reading ended, if it did not get through.
 */

class Reader {
  constructor(bytes, at = 0, end = bytes.length) {
    this.bytes = bytes
    this.at = at
    this.end = end
  }

  get more() {
    return this.at < this.end
  }

  byte() {
    if (this.at >= this.end) throw new Error(`ends too early, at byte ${this.at}`)
    return this.bytes[this.at++]
  }

  /** Unsigned LEB128; beyond 2^53 it is rounded, which does for sizes. */
  uint() {
    let value = 0
    for (let scale = 1; ; scale *= 128) {
      const byte = this.byte()
      value += (byte & 0x7f) * scale
      if (byte < 0x80) return value
    }
  }

  /** Any LEB128 whose value does not matter. */
  skipLeb() {
    while (this.byte() >= 0x80);
  }

  skip(count) {
    this.at += count
    if (this.at > this.end) throw new Error(`ends too early, at byte ${this.end}`)
  }

  name() {
    const length = this.uint()
    const start = this.at
    this.skip(length)
    return Buffer.from(this.bytes.buffer, this.bytes.byteOffset + start, length).toString('utf8')
  }

  times(run) {
    for (let left = this.uint(); left > 0; left--) run()
  }
}

/** @param {Uint8Array} bytes @returns {Description} */
function describe(bytes) {
  const module = {
    bytes: bytes.length,
    imports: {},
    exports: 0,
    memories: [],
    features: [],
    producers: {},
    toolchain: '',
  }
  const seen = new Set()
  const names = { imports: [], exports: [] }
  try {
    const reader = new Reader(bytes, 8)
    if (bytes[4] !== 1 || bytes[6] !== 0) throw new Error('is a component, not a module')
    while (reader.more) {
      const id = reader.byte()
      const size = reader.uint()
      const section = new Reader(bytes, reader.at, reader.at + size)
      reader.skip(size)
      SECTIONS[id]?.(section, { module, seen, names })
    }
  } catch (error) {
    module.error = error.message
  }
  if (module.memories.length > 1) seen.add('multi-memory')
  for (const { shared, is64 } of module.memories) {
    if (shared) seen.add('threads')
    if (is64) seen.add('memory64')
  }
  module.features = [...seen].sort()
  module.toolchain = toolchainOf(module, names)
  return module
}

const SECTIONS = {
  0(section, { module }) {
    const name = section.name()
    if (name !== 'producers') return
    section.times(() => {
      const field = section.name()
      const values = []
      section.times(() => values.push(`${section.name()} ${section.name()}`.trim()))
      module.producers[field] = values.join(', ')
    })
  },
  1(section, { seen }) {
    section.times(() => {
      const form = section.byte()
      if (form !== 0x4e) return subtype(section, form, seen)
      seen.add('gc')
      section.times(() => subtype(section, section.byte(), seen))
    })
  },
  2(section, { module, seen, names }) {
    section.times(() => {
      const from = section.name()
      const name = section.name()
      names.imports.push({ from, name })
      module.imports[from] = (module.imports[from] ?? 0) + 1
      const kind = section.byte()
      if (kind === 0) section.skipLeb()
      else if (kind === 1) table(section, seen)
      else if (kind === 2) module.memories.push(memory(section, true))
      else if (kind === 3) global(section, seen, true)
      else if (kind === 4) tag(section, seen)
      else throw new Error(`an import of kind ${kind}`)
    })
  },
  4(section, { seen }) {
    let count = 0
    section.times(() => {
      count++
      if (section.bytes[section.at] === 0x40) {
        section.skip(2)
        table(section, seen)
        seen.add('function references')
        expression(section, seen)
      } else {
        table(section, seen)
      }
    })
    if (count > 1) seen.add('reference types')
  },
  5(section, { module }) {
    section.times(() => module.memories.push(memory(section, false)))
  },
  6(section, { seen }) {
    section.times(() => {
      global(section, seen, false)
      expression(section, seen)
    })
  },
  7(section, { module, seen, names }) {
    section.times(() => {
      module.exports++
      names.exports.push(section.name())
      if (section.byte() === 4) seen.add('exceptions')
      section.skipLeb()
    })
  },
  // Segments hold all kinds of expressions; the first one's flags can be read without taking them apart, and say enough.
  9(section, { seen }) {
    if (section.uint() > 0 && section.uint() & 1) seen.add('bulk memory')
  },
  10(section, { seen }) {
    section.times(() => {
      const size = section.uint()
      const body = new Reader(section.bytes, section.at, section.at + size)
      section.skip(size)
      body.times(() => {
        body.skipLeb()
        valueType(body, seen)
      })
      while (body.more) instruction(body, seen)
    })
  },
  12(_, { seen }) {
    seen.add('bulk memory')
  },
  13(_, { seen }) {
    seen.add('exceptions')
  },
}
function subtype(section, form, seen) {
  if (form === 0x50 || form === 0x4f) {
    seen.add('gc')
    section.times(() => section.skipLeb())
    form = section.byte()
  }
  if (form === 0x60) {
    section.times(() => valueType(section, seen))
    let results = 0
    section.times(() => {
      results++
      valueType(section, seen)
    })
    if (results > 1) seen.add('multi-value')
  } else if (form === 0x5f || form === 0x5e) {
    seen.add('gc')
    const field = () => {
      const type = section.bytes[section.at]
      if (type === 0x78 || type === 0x77) section.skip(1)
      else valueType(section, seen)
      section.skip(1)
    }
    if (form === 0x5f) section.times(field)
    else field()
  } else {
    throw new Error(`a type of form 0x${form.toString(16)}`)
  }
}

function valueType(section, seen) {
  const type = section.byte()
  if (type === 0x7b) seen.add('simd')
  else if (type === 0x6f) seen.add('reference types')
  else if (type === 0x69 || type === 0x74) seen.add('exceptions')
  else if (type >= 0x6a && type <= 0x73 && type !== 0x70) seen.add('gc')
  else if (type === 0x63 || type === 0x64) heapType(section, seen)
}

function heapType(section, seen) {
  const type = section.bytes[section.at]
  section.skipLeb()
  if (type === 0x6f || type === 0x70) seen.add('reference types')
  else if (type === 0x69 || type === 0x74) seen.add('exceptions')
  else if (type >= 0x6a && type <= 0x73) seen.add('gc')
  else seen.add('function references')
}

function table(section, seen) {
  valueType(section, seen)
  limits(section)
}

function limits(section) {
  const flags = section.uint()
  const initial = section.uint()
  const maximum = flags & 1 ? section.uint() : undefined
  if (flags & 8) section.skipLeb()
  return { initial, ...(maximum !== undefined && { maximum }), shared: (flags & 2) !== 0, is64: (flags & 4) !== 0 }
}

function memory(section, imported) {
  return { imported, ...limits(section) }
}

function global(section, seen, imported) {
  valueType(section, seen)
  if (section.byte() === 1 && imported) seen.add('mutable globals')
}

function tag(section, seen) {
  section.skip(1)
  section.skipLeb()
  seen.add('exceptions')
}

function expression(reader, seen) {
  while (instruction(reader, seen) !== 0x0b);
}

/** One instruction with its immediates. @returns {number} its first byte */
function instruction(reader, seen) {
  const op = reader.byte()
  if (op >= 0x28 && op <= 0x3e) memoryArgument(reader, seen)
  else if (op >= 0x45 && op <= 0xbf) return op
  else if (op >= 0xc0 && op <= 0xc4) seen.add('sign extension')
  else SPECIAL[op]?.(reader, seen)
  return op
}

function memoryArgument(reader, seen) {
  const flags = reader.uint()
  if (flags & 0x40) {
    seen.add('multi-memory')
    reader.skipLeb()
  }
  reader.skipLeb()
}

function blockType(reader, seen) {
  const type = reader.bytes[reader.at]
  if (type === 0x40) reader.skip(1)
  else if (type < 0x40 || type >= 0x80) {
    // An index of a type: more than one result, or parameters.
    seen.add('multi-value')
    reader.skipLeb()
  } else valueType(reader, seen)
}

const leb = (reader) => reader.skipLeb()
const lebs = (reader) => {
  reader.skipLeb()
  reader.skipLeb()
}
const uses = (feature, then) => (reader, seen) => {
  seen.add(feature)
  then?.(reader, seen)
}

const SPECIAL = {
  2: blockType,
  3: blockType,
  4: blockType,
  6: uses('exceptions (legacy)', blockType),
  7: uses('exceptions (legacy)', leb),
  8: uses('exceptions', leb),
  9: uses('exceptions (legacy)', leb),
  10: uses('exceptions (final)'),
  12: leb,
  13: leb,
  14(reader) {
    reader.times(() => reader.skipLeb())
    reader.skipLeb()
  },
  16: leb,
  17: lebs,
  18: uses('tail calls', leb),
  19: uses('tail calls', lebs),
  20: uses('function references', leb),
  21: uses('tail calls', leb),
  24: uses('exceptions (legacy)', leb),
  25: uses('exceptions (legacy)'),
  28(reader, seen) {
    seen.add('reference types')
    reader.times(() => valueType(reader, seen))
  },
  31(reader, seen) {
    seen.add('exceptions (final)')
    blockType(reader, seen)
    reader.times(() => (reader.byte() < 2 ? lebs(reader) : reader.skipLeb()))
  },
  32: leb,
  33: leb,
  34: leb,
  35: leb,
  36: leb,
  37: uses('reference types', leb),
  38: uses('reference types', leb),
  63: leb,
  64: leb,
  65: leb,
  66: leb,
  67: (reader) => reader.skip(4),
  68: (reader) => reader.skip(8),
  208: uses('reference types', heapType),
  209: uses('reference types'),
  210: uses('reference types', leb),
  211: uses('gc'),
  212: uses('function references'),
  213: uses('function references', leb),
  214: uses('function references', leb),
  251: garbageCollection,
  252(reader, seen) {
    const op = reader.uint()
    if (op < 8) seen.add('saturating conversions')
    else if (op < 15) seen.add('bulk memory')
    else if (op < 18) seen.add('reference types')
    else if (op < 23) seen.add('wide arithmetic')
    const immediates = [2, 1, 2, 1, 2, 1, 2, 1, 1, 1][op - 8] ?? 0
    for (let left = immediates; left > 0; left--) reader.skipLeb()
  },
  253(reader, seen) {
    const op = reader.uint()
    seen.add(op >= 0x100 ? 'relaxed simd' : 'simd')
    if (op <= 11 || op === 92 || op === 93) memoryArgument(reader, seen)
    else if (op === 12 || op === 13) reader.skip(16)
    else if (op >= 21 && op <= 34) reader.skip(1)
    else if (op >= 84 && op <= 91) {
      memoryArgument(reader, seen)
      reader.skip(1)
    }
  },
  254(reader, seen) {
    seen.add('threads')
    if (reader.uint() === 3) reader.skip(1)
    else memoryArgument(reader, seen)
  },
}

function garbageCollection(reader, seen) {
  seen.add('gc')
  const op = reader.uint()
  if ([2, 3, 4, 5, 8, 9, 10, 17, 18, 19].includes(op)) lebs(reader)
  else if ([0, 1, 6, 7, 11, 12, 13, 14, 16].includes(op)) reader.skipLeb()
  else if (op >= 20 && op <= 23) heapType(reader, seen)
  else if (op === 24 || op === 25) {
    reader.skip(1)
    reader.skipLeb()
    heapType(reader, seen)
    heapType(reader, seen)
  }
}

/** From the producers section where there is one, else from what only one toolchain asks for. */
function toolchainOf({ producers, imports, memories }, { imports: imported, exports: exported }) {
  const made = Object.values(producers).join(', ')
  const asks = (pattern) => imported.some(({ name }) => pattern.test(name))
  const offers = (pattern) => exported.some((name) => pattern.test(name))
  if (/TinyGo/i.test(made) || asks(/^runtime\.ticks$/) || offers(/^tinygo_/)) return 'TinyGo'
  if (/\bGo cmd/.test(made) || imports.gojs || (imports.go && asks(/^(?:runtime|syscall)/))) return 'Go'
  if (/wasm-bindgen/.test(made) || imports.wbg || asks(/^__wb(?:g|indgen)_/) || offers(/^__wbindgen_/))
    return 'Rust, wasm-bindgen'
  if (asks(/^(?:emscripten_|_emscripten_|_embind_|__syscall_|invoke_)/) || offers(/^emscripten_stack_/))
    return 'Emscripten'
  // Emscripten with its names shortened: one module, names of a letter or two.
  const [one, ...others] = Object.keys(imports)
  if (one?.length === 1 && others.length === 0 && imported.every(({ name }) => name.length <= 2))
    return 'Emscripten (names shortened)'
  const abort = imported.some(({ from, name }) => from === 'env' && name === 'abort')
  if (abort || offers(/^__(?:new|pin|collect|alloc|retain)$/)) return 'AssemblyScript'
  if (/rustc/.test(made)) return 'Rust'
  if (/clang/.test(made)) return asks(/^(?:fd_|proc_exit)/) ? 'clang, WASI' : 'clang'
  if (/\b(?:Kotlin|Dart|dart2wasm)/i.test(made)) return made
  if (Object.keys(imports).some((name) => name.startsWith('wasi_'))) return 'WASI'
  return made || (memories.some(({ imported }) => imported) ? 'unknown, memory imported' : 'unknown')
}

module.exports = { describe }
