// A worker of the isolation group: one call in an instance of its own.
import { parentPort, workerData } from 'node:worker_threads'

const { exports } = new WebAssembly.Instance(workerData.module)
for (const args of workerData.fills) exports.fill(...args)
parentPort.postMessage(null)
