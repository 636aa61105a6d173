// biome-ignore-all lint/complexity/noArguments: WebIDL tells a missing argument from undefined, and counts them.
'use strict'

// The WebAssembly JavaScript API (https://webassembly.github.io/spec/js-api/) over one of the binding's realms.
// State is private to each object, and prototypes belong to the process: `instanceof` holds between namespaces.

const { isAnyArrayBuffer, isSharedArrayBuffer } = require('node:util').types

// Node's own, so that `instanceof` holds for whoever has these from there. Taken now: glue may replace the global.
const { CompileError, LinkError, RuntimeError } = globalThis.WebAssembly

const errorClasses = new Map([
  ['ERR_WASM_COMPILE', CompileError],
  ['ERR_WASM_LINK', LinkError],
  ['ERR_WASM_TRAP', RuntimeError],
  ['ERR_WASM_TIMEOUT', RuntimeError],
  ['ERR_WASM_INTERRUPTED', RuntimeError],
  ['ERR_WASM_OUT_OF_FUEL', RuntimeError],
])

// What the guest must not catch, however it is handed back: a trap, or what ends a call from outside.
const uncatchable = new WeakSet()

const MAX_PAGES_32 = 2 ** 16
const MAX_PAGES_64 = 2 ** 48
// As all engines have it, by the specification's limits.
const MAX_TABLE_LENGTH = 10_000_000
const MAX_MODULE_BYTES = 2 ** 30

// Whether a buffer is detached, a view's length tells in less than half the time of the buffer's own.
const NO_VIEW = new Uint8Array(0)

const isObject = (value) => (typeof value === 'object' && value !== null) || typeof value === 'function'

function need(given, wanted, what) {
  if (given >= wanted) return
  throw new TypeError(`${what} needs ${wanted} argument${wanted === 1 ? '' : 's'}, and has ${given}`)
}

function needNew(target, name) {
  if (target === undefined) throw new TypeError(`WebAssembly.${name} must be called with 'new'`)
}

/** A WebIDL `[EnforceRange] unsigned long`. */
function toU32(value, what) {
  if (typeof value === 'number' && value >>> 0 === value) return value + 0
  const number = Math.trunc(+value)
  if (number >= 0 && number <= 0xffff_ffff) return number + 0
  throw new TypeError(`${what} must be an integer from 0 to 2^32 - 1`)
}

/** `AddressValueToU64` for 'i64'. A number all the same: what is too large for one is too large for anything. */
function toU64(value, what) {
  // Of so many bits that it is ToBigInt and no more.
  const bigint = BigInt.asIntN(Number.MAX_SAFE_INTEGER, value)
  if (bigint < 0n || bigint > 0xffff_ffff_ffff_ffffn)
    throw new TypeError(`${what} must be a bigint from 0n to 2^64 - 1`)
  return Math.min(Number(bigint), Number.MAX_SAFE_INTEGER)
}

const toAddress = (value, is64, what) => (is64 ? toU64(value, what) : toU32(value, what))

/** A WebIDL dictionary: what is missing has no members. */
function toDictionary(value, what) {
  if (value === undefined || value === null) return {}
  if (isObject(value)) return value
  throw new TypeError(`${what} must be an object`)
}

function toEnum(value, known, what) {
  const name = `${value}`
  if (known.includes(name)) return name
  throw new TypeError(`${what} must be one of ${known.join(', ')}`)
}

/** A WebIDL `sequence<any>`. */
function toSequence(value, what) {
  if (isObject(value) && typeof value[Symbol.iterator] === 'function') return [...value]
  throw new TypeError(`${what} must be iterable`)
}

function toImportObject(value) {
  if (value === undefined || isObject(value)) return value
  throw new TypeError('the import object must be an object')
}

const valueTypes = ['i32', 'i64', 'f32', 'f64', 'v128', 'externref', 'anyfunc']
const toValueType = (value, what) => {
  const name = toEnum(value, valueTypes, what)
  return name === 'anyfunc' ? 'funcref' : name
}

/** The limits of a descriptor, each converted as it is read. */
function toLimits(descriptor, is64, what) {
  const { initial } = descriptor
  if (initial === undefined) throw new TypeError(`${what} needs the property 'initial'`)
  const least = toAddress(initial, is64, `${what}'s property 'initial'`)
  const { maximum } = descriptor
  const most = maximum === undefined ? undefined : toAddress(maximum, is64, `${what}'s property 'maximum'`)
  return [least, most]
}

function toIs64(descriptor, what) {
  const { address } = descriptor
  return address !== undefined && toEnum(address, ['i32', 'i64'], `${what}'s property 'address'`) === 'i64'
}

function checkLimits(least, most, bound, what) {
  if (least > bound || most > bound) throw new RangeError(`${what} may have at most ${bound} as its limits`)
  if (most < least) throw new RangeError(`${what}'s 'initial' is more than its 'maximum'`)
}

/** What native code can read during the call, which is when the bytes are taken. */
function toBytes(value) {
  const isView = ArrayBuffer.isView(value)
  if (!isView && !isAnyArrayBuffer(value)) throw new TypeError('the bytes must be an ArrayBuffer or a view of one')
  // Node-API has no shared buffers.
  if (!isSharedArrayBuffer(isView ? value.buffer : value)) return value
  return (isView ? new Uint8Array(value.buffer, value.byteOffset, value.byteLength) : new Uint8Array(value)).slice()
}

const defaults = { i32: 0, i64: 0n, f32: 0, f64: 0, v128: undefined, externref: undefined }
/** Any other type is a reference. */
const defaultOf = (type) => (type in defaults ? defaults[type] : null)

/** One object for each entity as long as it is alive, as glue compares them. */
function find(known, id) {
  return known.get(id)?.deref()
}

const departed = new FinalizationRegistry(({ known, id, ref }) => {
  // Meanwhile another object may stand for the same entity.
  if (known.get(id) === ref) known.delete(id)
})

function keep(known, id, object) {
  const ref = new WeakRef(object)
  known.set(id, ref)
  departed.register(object, { known, id, ref })
}

// By kind: the id of what a user passed, undefined if it is no such object, or FOREIGN. Only here are private fields
// of another class read.
const idOf = {}
const FOREIGN = -1

// By kind: the object of an entity that a module exports, with its type.
const wrap = {
  function: (_space, value) => value,
  memory: (space, id, [, , isShared, is64]) =>
    find(space.memories, id) ?? new Interfaces.Memory(space, id, is64, isShared),
  table: (space, id, [element, , , is64]) => find(space.tables, id) ?? new Interfaces.Table(space, id, is64, element),
  global: (space, id, [type, isMutable]) =>
    find(space.globals, id) ?? new Interfaces.Global(space, id, type, isMutable),
  tag: (space, id, [types]) => find(space.tags, id) ?? new Interfaces.Tag(space, id, types),
}

let isModule
let moduleOf
let tagOf
let exceptionParts

// Not the public constructors, which belong to a namespace: these make the objects of all of them.
const Interfaces = {
  Module: class {
    #binding
    #handle
    #imports
    #exports

    constructor(binding, handle) {
      this.#binding = binding
      this.#handle = handle
    }

    static {
      isModule = (value) => isObject(value) && #handle in value
      moduleOf = (value) => {
        if (!isModule(value)) throw new TypeError('the module must be a WebAssembly.Module')
        value.#imports ??= value.#binding.moduleImports(value.#handle)
        value.#exports ??= value.#binding.moduleExports(value.#handle)
        return { handle: value.#handle, imports: value.#imports, exports: value.#exports, binding: value.#binding }
      }
    }

    static exports(moduleObject) {
      need(arguments.length, 1, 'WebAssembly.Module.exports()')
      return moduleOf(moduleObject).exports.map(([name, kind]) => ({ name, kind }))
    }

    static imports(moduleObject) {
      need(arguments.length, 1, 'WebAssembly.Module.imports()')
      return moduleOf(moduleObject).imports.map(([module, name, kind]) => ({ module, name, kind }))
    }

    static customSections(moduleObject, sectionName) {
      need(arguments.length, 2, 'WebAssembly.Module.customSections()')
      const { binding, handle } = moduleOf(moduleObject)
      const wanted = `${sectionName}`
      // The names of sections are Unicode; what is none would be found as something else.
      return wanted.isWellFormed() ? binding.moduleCustomSections(handle, wanted) : []
    }
  },

  Instance: class {
    #exports

    constructor(exports) {
      this.#exports = exports
    }

    get exports() {
      return this.#exports
    }
  },

  Memory: class {
    #space
    #id
    #is64
    #isShared
    #buffer
    #view = NO_VIEW

    constructor(space, id, is64, isShared) {
      this.#space = space
      this.#id = id
      this.#is64 = is64
      this.#isShared = isShared
      if (isShared) space.shared?.()
      keep(space.memories, id, this)
    }

    static {
      idOf.memory = (value, space) => (#id in value ? (value.#space === space ? value.#id : FOREIGN) : undefined)
    }

    grow(delta) {
      const space = this.#space
      need(arguments.length, 1, 'WebAssembly.Memory.grow()')
      const pages = toAddress(delta, this.#is64, 'the number of pages')
      const before = space.memoryGrow(space.realm, this.#id, pages)
      if (before === -1) throw new RangeError(`the memory cannot grow by ${pages} pages`)
      return this.#is64 ? BigInt(before) : before
    }

    get buffer() {
      if (this.#view.length !== 0) return this.#buffer
      const made = this.#space.memoryBuffer(this.#space.realm, this.#id)
      // A shared one is not detached when it grows, so its length tells nothing.
      if (this.#isShared) return made
      this.#view = new Uint8Array(made)
      this.#buffer = made
      return made
    }
  },

  Table: class {
    #space
    #id
    #is64
    #element

    constructor(space, id, is64, element) {
      this.#space = space
      this.#id = id
      this.#is64 = is64
      this.#element = element
      keep(space.tables, id, this)
    }

    static {
      idOf.table = (value, space) => (#id in value ? (value.#space === space ? value.#id : FOREIGN) : undefined)
    }

    grow(delta, value = undefined) {
      const space = this.#space
      need(arguments.length, 1, 'WebAssembly.Table.grow()')
      const more = toAddress(delta, this.#is64, 'the number of elements')
      if (value === undefined) value = defaultOf(this.#element)
      const mayGrow = more <= MAX_TABLE_LENGTH - space.tableLength(space.realm, this.#id)
      const before = mayGrow ? space.tableGrow(space.realm, this.#id, more, value) : -1
      if (before === -1) throw new RangeError(`the table cannot grow by ${more} elements`)
      return this.#is64 ? BigInt(before) : before
    }

    get(index) {
      const space = this.#space
      need(arguments.length, 1, 'WebAssembly.Table.get()')
      if (this.#element === 'exnref') throw new TypeError('an exnref has no value in JavaScript')
      const at = this.#is64 ? toU64(index, 'the index') : toU32(index, 'the index')
      return space.tableGet(space.realm, this.#id, at)
    }

    set(index) {
      const space = this.#space
      need(arguments.length, 1, 'WebAssembly.Table.set()')
      if (this.#element === 'exnref') throw new TypeError('an exnref has no value in JavaScript')
      const at = this.#is64 ? toU64(index, 'the index') : toU32(index, 'the index')
      space.tableSet(space.realm, this.#id, at, arguments.length > 1 ? arguments[1] : defaultOf(this.#element))
    }

    get length() {
      const length = this.#space.tableLength(this.#space.realm, this.#id)
      return this.#is64 ? BigInt(length) : length
    }
  },

  Global: class {
    #space
    #id
    #type
    #isMutable

    constructor(space, id, type, isMutable) {
      this.#space = space
      this.#id = id
      this.#type = type
      this.#isMutable = isMutable
      keep(space.globals, id, this)
    }

    static {
      idOf.global = (value, space) => (#id in value ? (value.#space === space ? value.#id : FOREIGN) : undefined)
    }

    valueOf() {
      return this.#space.globalGet(this.#space.realm, this.#id)
    }

    get value() {
      return this.#space.globalGet(this.#space.realm, this.#id)
    }

    set value(value) {
      if (!this.#isMutable) throw new TypeError(`a constant global (of type ${this.#type}) cannot be set`)
      this.#space.globalSet(this.#space.realm, this.#id, value)
    }
  },

  Tag: class {
    #space
    #id
    #types

    constructor(space, id, types) {
      this.#space = space
      this.#id = id
      this.#types = types
      keep(space.tags, id, this)
    }

    static {
      idOf.tag = (value, space) => (#id in value ? (value.#space === space ? value.#id : FOREIGN) : undefined)
      tagOf = (value) => {
        if (!isObject(value) || !(#id in value)) throw new TypeError('the tag must be a WebAssembly.Tag')
        return { space: value.#space, id: value.#id, types: value.#types }
      }
    }
  },

  Exception: class {
    #tag
    #payload
    #stack

    constructor(tag, payload, stack) {
      this.#tag = tag
      this.#payload = payload
      this.#stack = stack
    }

    static {
      exceptionParts = (value, space) => {
        if (!isObject(value) || !(#tag in value)) return undefined
        const id = idOf.tag(value.#tag, space)
        return id === FOREIGN ? undefined : [id, value.#payload]
      }
    }

    getArg(exceptionTag, index) {
      const payload = this.#payload
      need(arguments.length, 2, 'WebAssembly.Exception.getArg()')
      const { types } = tagOf(exceptionTag)
      const at = toU32(index, 'the index')
      if (exceptionTag !== this.#tag) throw new TypeError('the exception has another tag')
      if (at >= payload.length) throw new RangeError(`the exception has ${payload.length} values, and none at ${at}`)
      if (types[at] === 'v128' || types[at] === 'exnref')
        throw new TypeError(`a ${types[at]} has no value in JavaScript`)
      return payload[at]
    }

    is(exceptionTag) {
      const tag = this.#tag
      need(arguments.length, 1, 'WebAssembly.Exception.is()')
      tagOf(exceptionTag)
      return exceptionTag === tag
    }

    get stack() {
      return this.#stack
    }
  },
}

for (const [name, { prototype }] of Object.entries(Interfaces)) {
  for (const key of Object.getOwnPropertyNames(prototype)) {
    if (key !== 'constructor') Object.defineProperty(prototype, key, { enumerable: true })
  }
  Object.defineProperty(prototype, Symbol.toStringTag, { value: `WebAssembly.${name}`, configurable: true })
}

/** `ToWebAssemblyValue`, for what JavaScript itself keeps. */
function coerce(space, type, value) {
  switch (type) {
    case 'i32':
      return value | 0
    case 'i64':
      return BigInt.asIntN(64, value)
    case 'f32':
      return Math.fround(value)
    case 'f64':
      return +value
    case 'v128':
    case 'exnref':
      throw new TypeError(`a value of JavaScript cannot be a ${type}`)
    case 'funcref':
      if (value === null || isGuestFunction(space, value)) return value
      throw new TypeError('a funcref must be null or a function that a module has exported')
    default:
      return value
  }
}

const isGuestFunction = (space, value) => typeof value === 'function' && space.binding.functionType(value) !== undefined

/** Imports that are there without being given: they give memory back. */
const isDiscard = ([, name, kind, type]) =>
  kind === 'function' &&
  /^(?:__wbindgen_|__)?memory_discard$/.test(name) &&
  /^(?:i32,i32|i64,i64)$/.test(`${type[0]}`) &&
  type[1].length === 0

/** The values to link a module with, read as the specification orders. */
function readImports(space, { imports }, importObject) {
  if (importObject === undefined && imports.length > 0) {
    throw new TypeError('the module has imports, so it needs an import object')
  }
  return imports.map((wanted, index) => {
    const [from, name] = wanted
    const source = importObject[from]
    if (isDiscard(wanted) && source?.[name] === undefined) return undefined
    if (!isObject(source)) throw new TypeError(`import ${index} "${from}": the module is no object or function`)
    return toImport(space, wanted, index, source[name])
  })
}

function toImport(space, wanted, index, value) {
  const [from, name, kind, type] = wanted
  const refuse = (why) => space.error('ERR_WASM_LINK', `import ${index} "${from}" "${name}": ${why}`)
  if (kind === 'function') {
    if (typeof value === 'function') return value
    throw refuse('it must be a function')
  }
  const id = isObject(value) ? idOf[kind](value, space) : undefined
  if (id === FOREIGN) throw refuse(`the ${kind} belongs to another realm`)
  if (id !== undefined) return id
  if (kind !== 'global') throw refuse(`it must be a WebAssembly.${kind[0].toUpperCase()}${kind.slice(1)}`)
  const [valueType, isMutable] = type
  if (isMutable) throw refuse('a mutable global must be a WebAssembly.Global')
  if (!isConstant(space, valueType, value)) throw refuse(`a global of type ${valueType} cannot have this value`)
  return space.binding.globalNew(space.realm, valueType, false, value)
}

function isConstant(space, type, value) {
  switch (type) {
    case 'i32':
    case 'f32':
    case 'f64':
      return typeof value === 'number'
    case 'i64':
      return typeof value === 'bigint'
    case 'externref':
      return true
    case 'funcref':
      return value === null || isGuestFunction(space, value)
    default:
      return false
  }
}

/** The exports of a new instance. */
function link(space, module, imports) {
  const values = space.binding.realmInstantiate(space.realm, module.handle, imports)
  const exports = Object.create(null)
  module.exports.forEach(([name, kind, type], index) => {
    exports[name] = wrap[kind](space, values[index], type)
  })
  space.instantiated?.(exports)
  return Object.freeze(exports)
}

/** The bytes of a response, or of a promise of one, refused as Node refuses. */
async function bytesOf(source) {
  const response = await source
  if (!(response instanceof Response)) {
    throw Object.assign(new TypeError('the source must be a Response, or a promise of one'), {
      code: 'ERR_INVALID_ARG_TYPE',
    })
  }
  const type = response.headers.get('Content-Type')
  if (type !== 'application/wasm') throw badResponse(`has unsupported MIME type '${type}'`)
  if (!response.ok) throw badResponse(`has status code ${response.status}`)
  if (response.bodyUsed) throw badResponse('body has already been used')
  return response.arrayBuffer()
}

const badResponse = (why) =>
  Object.assign(new TypeError(`WebAssembly response ${why}`), { code: 'ERR_WEBASSEMBLY_RESPONSE' })

/**
 * A namespace over a realm.
 *
 * `observer` may have `captured(snapshot)` and `rewound(snapshot)`, called when the realm is captured or reset,
 * `exitThreads()`, called before it is captured while it has threads and true if these will end now,
 * `shared()`, called when it has a shared memory, `expired()`, called when it is gone, `instantiated(exports)`, called with the exports of each new instance, and
 * `began(promise)`, called when something is compiled or instantiated asynchronously.
 */
exports.makeNamespace = (binding, realm, makeError, observer = {}) => {
  const error = (code, message, fields, cause) => {
    const Class = errorClasses.get(code)
    const made =
      Class === undefined
        ? makeError(code, message, fields, cause)
        : Object.assign(new Class(message, cause === undefined ? undefined : { cause }), { code }, fields)
    if (Class !== CompileError && Class !== LinkError) uncatchable.add(made)
    return made
  }

  // With what hot paths call: `binding` has too many properties to be quick.
  const space = {
    realm,
    memories: new Map(),
    tables: new Map(),
    globals: new Map(),
    tags: new Map(),
    memoryBuffer: binding.realmMemoryBuffer,
    memoryGrow: binding.realmMemoryGrow,
    tableLength: binding.tableLength,
    tableGet: binding.tableGet,
    tableSet: binding.tableSet,
    tableGrow: binding.tableGrow,
    globalGet: binding.globalGet,
    globalSet: binding.globalSet,
    binding,
    error,
    instantiated: observer.instantiated,
    shared: observer.shared,
    isGone: false,
  }

  const elsewhere = observer.elsewhere ?? (() => undefined)

  // What imports throw that is no Exception is one of this tag, so that the guest's `catch_all` sees it.
  let jsTag
  const getJsTag = () => {
    jsTag ??= new Interfaces.Tag(space, binding.tagNew(realm, ['externref']), ['externref'])
    return jsTag
  }

  binding.realmOpen(realm, {
    error,
    captured: observer.captured,
    rewound: observer.rewound,
    exitThreads: observer.exitThreads,
    expired() {
      space.isGone = true
      observer.expired?.()
    },
    makeException(tagId, payload) {
      if (jsTag !== undefined && tagId === idOf.tag(jsTag, space)) return payload[0]
      const tag = find(space.tags, tagId) ?? new Interfaces.Tag(space, tagId, binding.tagType(realm, tagId))
      return new Interfaces.Exception(tag, payload)
    },
    exceptionParts(value) {
      if (isObject(value) && uncatchable.has(value)) return undefined
      return exceptionParts(value, space) ?? [idOf.tag(getJsTag(), space), [value]]
    },
  })

  const observed = (work) => (first, second) => {
    const wasGone = space.isGone
    // If the realm goes meanwhile, what glue waits for just does not come: glue that nobody waits for must not end the
    // process with a rejection that nobody hears of either.
    const never = () => space.isGone && !wasGone && new Promise(() => {})
    const promise = work(first, second).then(
      (made) => never() || made,
      (error) => never() || Promise.reject(error),
    )
    observer.began?.(promise)
    return promise
  }

  const small = (bytes) => {
    if (bytes.byteLength <= MAX_MODULE_BYTES) return bytes
    const message = `a module of ${bytes.byteLength} bytes is larger than the ${MAX_MODULE_BYTES} that the JS API allows`
    throw error('ERR_WASM_COMPILE', message)
  }

  function Module(bytes) {
    needNew(new.target, 'Module')
    const other = elsewhere()
    if (other !== undefined) return Reflect.construct(other.Module, arguments, new.target)
    need(arguments.length, 1, 'WebAssembly.Module()')
    return Reflect.construct(
      Interfaces.Module,
      [binding, binding.moduleCompile(realm, small(toBytes(bytes)))],
      new.target,
    )
  }

  function Instance(module, importObject = undefined) {
    needNew(new.target, 'Instance')
    const other = elsewhere()
    if (other !== undefined) return Reflect.construct(other.Instance, arguments, new.target)
    need(arguments.length, 1, 'WebAssembly.Instance()')
    const from = moduleOf(module)
    const imports = readImports(space, from, toImportObject(importObject))
    return Reflect.construct(Interfaces.Instance, [link(space, from, imports)], new.target)
  }

  function Memory(descriptor) {
    needNew(new.target, 'Memory')
    const other = elsewhere()
    if (other !== undefined) return Reflect.construct(other.Memory, arguments, new.target)
    need(arguments.length, 1, 'WebAssembly.Memory()')
    const given = toDictionary(descriptor, "the memory's descriptor")
    const is64 = toIs64(given, "the memory's descriptor")
    const [initial, maximum] = toLimits(given, is64, "the memory's descriptor")
    const isShared = Boolean(given.shared)
    if (isShared && maximum === undefined) throw new TypeError("a shared memory needs the property 'maximum'")
    checkLimits(initial, maximum, is64 ? MAX_PAGES_64 : MAX_PAGES_32, 'the memory')
    const id = binding.memoryNew(realm, initial, maximum, isShared, is64)
    return Reflect.construct(Interfaces.Memory, [space, id, is64, isShared], new.target)
  }

  function Table(descriptor, value = undefined) {
    needNew(new.target, 'Table')
    const other = elsewhere()
    if (other !== undefined) return Reflect.construct(other.Table, arguments, new.target)
    need(arguments.length, 1, 'WebAssembly.Table()')
    const given = toDictionary(descriptor, "the table's descriptor")
    const named = toEnum(given.element, ['externref', 'anyfunc'], "the table's element type")
    const element = named === 'anyfunc' ? 'funcref' : named
    const is64 = toIs64(given, "the table's descriptor")
    const [initial, maximum] = toLimits(given, is64, "the table's descriptor")
    checkLimits(initial, maximum, Number.POSITIVE_INFINITY, 'the table')
    if (initial > MAX_TABLE_LENGTH) throw new RangeError(`a table can have ${MAX_TABLE_LENGTH} elements at most`)
    const fill = value === undefined ? defaultOf(element) : value
    const id = binding.tableNew(realm, element, initial, maximum, fill, is64)
    return Reflect.construct(Interfaces.Table, [space, id, is64, element], new.target)
  }

  function Global(descriptor, v = undefined) {
    needNew(new.target, 'Global')
    const other = elsewhere()
    if (other !== undefined) return Reflect.construct(other.Global, arguments, new.target)
    need(arguments.length, 1, 'WebAssembly.Global()')
    const given = toDictionary(descriptor, "the global's descriptor")
    const isMutable = Boolean(given.mutable)
    const type = toValueType(given.value, "the global's value type")
    if (type === 'v128') throw new TypeError('a v128 has no value in JavaScript')
    const id = binding.globalNew(realm, type, isMutable, v === undefined ? defaultOf(type) : v)
    return Reflect.construct(Interfaces.Global, [space, id, type, isMutable], new.target)
  }

  function Tag(type) {
    needNew(new.target, 'Tag')
    const other = elsewhere()
    if (other !== undefined) return Reflect.construct(other.Tag, arguments, new.target)
    need(arguments.length, 1, 'WebAssembly.Tag()')
    const { parameters } = toDictionary(type, "the tag's type")
    const types = toSequence(parameters, "the tag's parameters").map((one) => toValueType(one, "a tag's parameter"))
    return Reflect.construct(Interfaces.Tag, [space, binding.tagNew(realm, types), types], new.target)
  }

  function Exception(exceptionTag, payload, options = undefined) {
    needNew(new.target, 'Exception')
    need(arguments.length, 2, 'WebAssembly.Exception()')
    const tag = tagOf(exceptionTag)
    const values = toSequence(payload, "the exception's payload")
    const isTraced = Boolean(toDictionary(options, "the exception's options").traceStack)
    if (exceptionTag === jsTag) throw new TypeError('an exception cannot have the tag of values of JavaScript')
    if (values.length !== tag.types.length) {
      throw new TypeError(`the tag wants ${tag.types.length} values, and the payload has ${values.length}`)
    }
    const coerced = tag.types.map((type, index) => coerce(space, type, values[index]))
    const trace = {}
    if (isTraced) Error.captureStackTrace(trace, Exception)
    return Reflect.construct(Interfaces.Exception, [exceptionTag, coerced, trace.stack], new.target)
  }

  const compile = observed(
    async (bytes) => new Interfaces.Module(binding, await binding.moduleCompileAsync(realm, small(bytes))),
  )

  const instantiate = observed(async (module, importObject) => {
    const from = moduleOf(module)
    const imports = readImports(space, from, importObject)
    // The imports are read now, and the module starts later.
    await undefined
    return new Interfaces.Instance(link(space, from, imports))
  })

  const instantiateBytes = observed(async (bytes, importObject) => {
    const module = await compile(bytes)
    return { module, instance: await instantiate(module, importObject) }
  })

  const namespace = {
    validate(bytes) {
      need(arguments.length, 1, 'WebAssembly.validate()')
      const given = toBytes(bytes)
      return given.byteLength <= MAX_MODULE_BYTES && binding.moduleValidate(realm, given)
    },

    async compile(bytes) {
      need(arguments.length, 1, 'WebAssembly.compile()')
      const other = elsewhere()
      if (other !== undefined) return other.compile(bytes)
      return compile(toBytes(bytes))
    },

    async instantiate(bytes, importObject = undefined) {
      need(arguments.length, 1, 'WebAssembly.instantiate()')
      const other = elsewhere()
      if (other !== undefined) return other.instantiate(bytes, importObject)
      if (isModule(bytes)) return instantiate(bytes, toImportObject(importObject))
      return instantiateBytes(toBytes(bytes), toImportObject(importObject))
    },

    async compileStreaming(source) {
      need(arguments.length, 1, 'WebAssembly.compileStreaming()')
      const other = elsewhere()
      if (other !== undefined) return other.compileStreaming(source)
      return compile(await bytesOf(source))
    },

    async instantiateStreaming(source, importObject = undefined) {
      need(arguments.length, 1, 'WebAssembly.instantiateStreaming()')
      const other = elsewhere()
      if (other !== undefined) return other.instantiateStreaming(source, importObject)
      const imports = toImportObject(importObject)
      return instantiateBytes(await bytesOf(source), imports)
    },

    get JSTag() {
      return getJsTag()
    },
  }

  const hide = (name, value) =>
    Object.defineProperty(namespace, name, { value, writable: true, enumerable: false, configurable: true })
  const constructors = { Module, Instance, Memory, Table, Global, Tag, Exception }
  for (const [name, made] of Object.entries(constructors)) {
    const { prototype } = Interfaces[name]
    Object.defineProperty(made, 'prototype', { value: prototype, writable: false })
    // As there is one prototype, it names the first namespace's.
    if (prototype.constructor === Interfaces[name]) {
      Object.defineProperty(prototype, 'constructor', { value: made })
    }
    hide(name, made)
  }
  for (const name of ['exports', 'imports', 'customSections']) {
    Object.defineProperty(Module, name, {
      value: Interfaces.Module[name],
      writable: true,
      enumerable: true,
      configurable: true,
    })
  }
  hide('CompileError', CompileError)
  hide('LinkError', LinkError)
  hide('RuntimeError', RuntimeError)
  Object.defineProperty(namespace, Symbol.toStringTag, { value: 'WebAssembly', configurable: true })
  return namespace
}
