'use strict'

const binding = require('./binding.js')
const { EPOCH, f64 } = require('./scratch.js')

class LinearMemory {
  #handle
  #buffer
  #epoch

  constructor(handle) {
    this.#handle = handle
  }

  get byteLength() {
    return binding.memoryByteLength(this.#handle)
  }

  // Nearly always the same object. It is another one when this one is detached, or in another epoch.
  get buffer() {
    const kept = this.#buffer
    if (this.#epoch === f64[EPOCH] && kept.byteLength !== 0) return kept
    const made = binding.memoryBuffer(this.#handle)
    if (made.buffer !== undefined) return made.buffer
    this.#epoch = f64[EPOCH]
    this.#buffer = made
    return made
  }

  read(ptr, byteLength) {
    return binding.memoryRead(this.#handle, ptr, byteLength)
  }

  readString(ptr, byteLength) {
    return binding.memoryReadString(this.#handle, ptr, byteLength)
  }

  write(ptr, bytes) {
    return binding.memoryWrite(this.#handle, ptr, bytes)
  }
}

exports.LinearMemory = LinearMemory
