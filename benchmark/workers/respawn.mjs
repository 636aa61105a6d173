// A peer of the pause group: one instance on V8, in a worker thread or in a child process. To reload it is to end it and to start another.
import { readFileSync } from 'node:fs'
import { parentPort, workerData } from 'node:worker_threads'

const answer = parentPort ? (message) => parentPort.postMessage(message) : (message) => process.send(message)
if (parentPort) parentPort.on('message', receive)
else process.on('message', receive)
let exports

function receive({ op, value }) {
  answer({ value: ops[op](value) })
}

const ops = {
  /** A worker is given compiled code; a process must compile. */
  open({ path }) {
    const module = workerData?.module ?? new WebAssembly.Module(readFileSync(path))
    exports = new WebAssembly.Instance(module).exports
    exports._initialize?.()
  },
  format(input) {
    const at = exports.alloc(input.length)
    bytes(at, input.length).set(input)
    exports.format()
    const text = new TextDecoder().decode(bytes(exports.output_ptr(), exports.output_len()))
    exports.dispose()
    return text
  },
  work: (seed) => exports.work(seed),
  save: (byteLength) => bytes(0, byteLength).slice(),
  restore(state) {
    bytes(0, state.length).set(state)
  },
}

function bytes(at, byteLength) {
  return new Uint8Array(exports.memory.buffer, at, byteLength)
}
