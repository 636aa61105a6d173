// One script in a thread of its own: warms an interpreter up, says so, and runs it.
import { parentPort, workerData } from 'node:worker_threads'
import { evaluate, ScriptError, type Source } from './guest.ts'
import { instantiateWarm } from './plain.ts'
import type { Outcome } from './scripts.ts'

export interface Task {
  module: WebAssembly.Module
  sources: readonly Source[]
  script: string
}

const { module, sources, script } = workerData as Task
const [instance, interpreter] = instantiateWarm(module, sources)
parentPort?.postMessage('warm')
parentPort?.postMessage(outcome())

function outcome(): Outcome {
  try {
    return { text: evaluate(instance, interpreter, script) }
  } catch (error) {
    if (error instanceof ScriptError) return { exception: error.message }
    throw error
  }
}
