// The environment beside the main one, as it runs in a worker thread.
import { setTimeout } from 'node:timers/promises'
import { parentPort, workerData } from 'node:worker_threads'
import type { Account } from './book.ts'
import type { Setting } from './crew.ts'
import { Environment } from './environment.ts'

/** What it says once a second, and at its end. */
export interface Told {
  accounts: Account[]
  heap: number
  external: number
  /** Crews that are about to end. */
  busy: string[]
  isDone: boolean
}

if (!parentPort) throw new Error('this is for a worker thread')
const port = parentPort
const environment = new Environment(workerData as Setting)
const over = new Promise<false>((resolve) => port.once('message', () => resolve(false)))

await environment.open()
environment.start()
tell(false)
while (await Promise.race([setTimeout(1000, true), over])) tell(false)
const telling = setInterval(() => tell(false), 1000)
await environment.end()
clearInterval(telling)
tell(true)
port.close()

function tell(isDone: boolean): void {
  globalThis.gc?.()
  const { heapUsed: heap, external } = process.memoryUsage()
  port.postMessage({ accounts: environment.accounts, heap, external, busy: environment.busy, isDone } satisfies Told)
}
