'use strict'

// Instances and snapshots as users hold them.

const binding = require('./binding.js')
const { WasmError } = require('./errors.js')
const { LinearMemory } = require('./memory.js')
const { checkKeys, withSignal } = require('./options.js')
const { calls, isTraced } = require('./tracing.js')

const CALL_OPTIONS = ['signal', 'timeoutMs']

async function call(instance, name, args, options) {
  checkKeys(options, CALL_OPTIONS)
  return withSignal(
    options?.signal,
    (canAbort) => binding.leaseCall(leaseOf(instance), name, args, options?.timeoutMs, canAbort),
    binding.abort,
  )
}

class LeasedInstance {
  #lease
  #manager
  #exports
  #memory

  constructor(lease) {
    this.#lease = lease
  }

  /** The handle of a lease, for the package's own use. */
  static leaseOf(instance) {
    return instance.#lease
  }

  /** Says whose it is, by the manager's name: for what is told of its calls. */
  static adopt(instance, manager) {
    instance.#manager = manager
    return instance
  }

  get generation() {
    return binding.leaseGeneration(this.#lease)
  }

  get exports() {
    this.#exports ??= Object.freeze(binding.leaseExports(this.#lease))
    return this.#exports
  }

  get memory() {
    this.#memory ??= new LinearMemory(binding.leaseMemory(this.#lease))
    return this.#memory
  }

  call(name, args, options) {
    if (!isTraced(calls)) return call(this, name, args, options)
    const { generation } = this
    const context = { manager: this.#manager, generation, name, kind: 'leased' }
    return calls.tracePromise(() => call(this, name, args, options), context)
  }

  release() {
    binding.leaseRelease(this.#lease)
  }

  [Symbol.dispose]() {
    this.release()
  }
}

const { adopt, leaseOf } = LeasedInstance
delete LeasedInstance.adopt
delete LeasedInstance.leaseOf

class Snapshot {
  #handle
  #facts

  constructor(handle) {
    this.#handle = handle
    this.#facts = binding.snapshotFacts(handle)
  }

  get id() {
    return this.#facts[0]
  }

  get generation() {
    return this.#facts[1]
  }

  get memoryBytes() {
    return this.#facts[2]
  }

  get residentBytes() {
    return binding.snapshotResidentBytes(this.#handle)
  }

  release() {
    binding.snapshotRelease(this.#handle)
  }

  [Symbol.dispose]() {
    this.release()
  }

  /** The handle of what a user passed as a snapshot. */
  static handleOf(snapshot) {
    if (snapshot === undefined) return undefined
    if (typeof snapshot === 'object' && snapshot !== null && #handle in snapshot) return snapshot.#handle
    throw new WasmError('ERR_WASM_INVALID_ARGUMENT', 'options.to must be a snapshot that snapshot() has returned')
  }
}
const { handleOf } = Snapshot
delete Snapshot.handleOf

class InstanceContext {
  #context
  #exports
  #memory

  constructor(context) {
    this.#context = context
  }

  get generation() {
    return binding.contextGeneration(this.#context)
  }

  get exports() {
    this.#exports ??= Object.freeze(binding.contextExports(this.#context))
    return this.#exports
  }

  get memory() {
    this.#memory ??= new LinearMemory(binding.contextMemory(this.#context))
    return this.#memory
  }
}

module.exports = { CALL_OPTIONS, InstanceContext, LeasedInstance, Snapshot, adopt, leaseOf, snapshotOf: handleOf }
