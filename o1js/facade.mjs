// What the glue of o1js gets as `WebAssembly`: one instance for ever, whose exports lead to the generation that serves.

/** Calls that are let through to a guest that has trapped: they are in the glue's `finally`, and only move a number. */
const HARMLESS = '__wbindgen_add_to_stack_pointer'

const PAGE = 2 ** 16

export class Facade {
  /** The namespace. */
  WebAssembly
  /** The raw exports of the generation that serves; undefined before the glue has been evaluated. */
  exports
  /** How many exports are on the stack. */
  depth = 0
  /** What the guest was stopped by, as long as it was not put back: nothing may be called until then. */
  #trap
  #functions = []
  #names = []
  #bytes
  #descriptor
  #imports
  #memory
  /** The memory of whatever generation serves. */
  #view = this.#makeView()
  #startArgs = []
  #inner
  #onTrap

  /** `onTrap()`: the guest was stopped in the middle, and is in no state to go on. */
  constructor(onTrap) {
    const facade = this
    this.#onTrap = onTrap
    this.WebAssembly = {
      Module: class Module {
        constructor(bytes) {
          facade.#bytes = bytes
        }
      },
      Memory: class Memory {
        constructor(descriptor) {
          facade.#descriptor = descriptor
          facade.#memory = this
        }

        static [Symbol.hasInstance](value) {
          return value === facade.#view
        }
      },
      Instance: class Instance {
        constructor(_, imports) {
          facade.#imports = imports
          facade.#instantiate()
          this.exports = facade.#thunks()
        }
      },
      // The classes that the engine throws.
      ...{ RuntimeError: WebAssembly.RuntimeError, CompileError: WebAssembly.CompileError },
      LinkError: WebAssembly.LinkError,
    }
  }

  get isLoaded() {
    return this.exports !== undefined
  }

  get memory() {
    return this.#view
  }

  /** Further arguments of `__wbindgen_start`, which each thread's instance begins with. */
  get startArgs() {
    return this.#startArgs
  }

  /** Goes over to another generation, or to another manager: `inner` is what inner.cjs exports there. Returns the way back. */
  enter(inner) {
    const before = [this.#inner, this.exports, this.#functions, this.#trap]
    const goBack = () => {
      ;[this.#inner, this.exports, this.#functions, this.#trap] = before
    }
    this.#inner = inner
    if (!this.isLoaded) return goBack
    this.#trap = undefined
    try {
      this.#instantiate()
      this.exports.__wbindgen_start(...this.#startArgs)
    } catch (error) {
      goBack()
      throw error
    }
    return goBack
  }

  /** As `enter`, with everything as it is: the same bytes at the same addresses, so that nothing has to be read out. */
  transplant(inner) {
    const { exports: before } = this
    const bytes = new Uint8Array(this.memory.buffer)
    const goBack = this.enter(inner)
    try {
      this.exports.memory.grow((bytes.length - this.memory.buffer.byteLength) / PAGE)
      new Uint8Array(this.memory.buffer).set(bytes)
      // Of references to JavaScript's values. At rest, that and the memory is all there is to a guest.
      for (const [name, table] of Object.entries(before).filter(([, value]) => typeof value.grow === 'function')) {
        if (table === before.memory) continue
        const copy = this.exports[name]
        copy.grow(table.length - copy.length)
        for (let i = 0; i < table.length; i++) copy.set(i, table.get(i))
      }
    } catch (error) {
      goBack()
      throw error
    }
    return goBack
  }

  /** The guest is well again. */
  recovered() {
    this.#trap = undefined
  }

  #instantiate() {
    const withMemory = (memory) => {
      const inPlace = (values) =>
        Object.values(values).includes(this.#memory)
          ? Object.fromEntries(Object.entries(values).map(([k, v]) => [k, v === this.#memory ? memory : v]))
          : values
      return Object.fromEntries(Object.entries(this.#imports).map(([name, values]) => [name, inPlace(values)]))
    }
    this.exports = this.#inner.instantiate(this.#bytes, this.#descriptor, withMemory)
    if (this.#names.length === 0) {
      this.#names = Object.keys(this.exports).filter((name) => typeof this.exports[name] === 'function')
    }
    this.#functions = this.#names.map((name) => this.exports[name])
  }

  #makeView() {
    const facade = this
    return {
      get buffer() {
        return facade.exports.memory.buffer
      },
    }
  }

  #thunks() {
    const thunks = {}
    this.#names.forEach((name, index) => {
      thunks[name] = this.#thunk(name, index, this.#functions[index].length)
    })
    const start = thunks.__wbindgen_start
    thunks.__wbindgen_start = (...args) => {
      this.#startArgs = args
      return start(...args)
    }
    thunks.memory = this.#view
    // Tables and globals are others in each generation.
    for (const name of Object.keys(this.exports)) {
      if (name in thunks) continue
      Object.defineProperty(thunks, name, { get: () => this.exports[name], enumerable: true })
    }
    return thunks
  }

  /** One indirect call. Few kinds, with as many parameters as fit: arguments too many cost nothing, a rest parameter does. */
  #thunk(name, index, arity) {
    const isHarmless = name === HARMLESS
    const isRefused = () => this.#trap !== undefined && !isHarmless
    if (arity <= 4) {
      return (a, b, c, d) => {
        if (isRefused()) throw this.#trap
        this.depth += 1
        try {
          return this.#functions[index](a, b, c, d)
        } catch (error) {
          throw this.#failed(error)
        } finally {
          this.depth -= 1
        }
      }
    }
    return (...args) => {
      if (isRefused()) throw this.#trap
      this.depth += 1
      try {
        return this.#functions[index](...args)
      } catch (error) {
        throw this.#failed(error)
      } finally {
        this.depth -= 1
      }
    }
  }

  #failed(error) {
    // What an import has thrown the guest's own code was written for, or is as on Node's engine.
    if (error instanceof WebAssembly.RuntimeError && this.#trap === undefined) {
      this.#trap = error
      this.#onTrap()
    }
    return error
  }
}
