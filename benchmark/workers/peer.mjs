// What piscina and tinypool run: the same guests, on V8, in a worker that keeps its instance.
import { workerData } from 'node:worker_threads'
import Piscina from 'piscina'

// tinypool wraps the data into a pair.
const { add, echo } = Array.isArray(workerData) ? workerData.at(-1) : workerData
const adder = instantiate(add)
const buffers = instantiate(echo)

function instantiate(bytes) {
  return new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports
}

export function sum([a, b]) {
  return adder.add(a, b)
}

/** Answers in the buffer that came in and sends it back by transfer: no allocation, the peer's best case. */
export function process(bytes) {
  const { memory, allocate, deallocate, process } = buffers
  const at = allocate(bytes.length)
  const outSize = allocate(4)
  new Uint8Array(memory.buffer, at, bytes.length).set(bytes)
  const out = process(at, bytes.length, outSize)
  const [size] = new Uint32Array(memory.buffer, outSize, 1)
  bytes.set(new Uint8Array(memory.buffer, out, size))
  deallocate(at, bytes.length)
  deallocate(outSize, 4)
  deallocate(out, size)
  return Piscina.move(bytes)
}

export default sum
