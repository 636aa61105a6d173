// A worker as glue starts them: an instance of its own over the shared memory, on V8.
import { parentPort, workerData } from 'node:worker_threads'

const { module, memory, calls } = workerData
const { exports } = new WebAssembly.Instance(module, { env: { memory, ask: () => 0 } })
parentPort?.postMessage('ready')
for (const [name, ...args] of calls) exports[name](...args)
