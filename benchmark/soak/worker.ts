// The environment beside the main one: a worker thread with a manager of its own.
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import type { ManagerStats } from '../../index.js'
import { Book } from './book.ts'
import type { Setting } from './crew.ts'

const filename = fileURLToPath(new URL('../workers/soak.mjs', import.meta.url))

interface Told {
  asked: number
  answered: number
  trapped: number
  problems: string[]
  recycles: Record<string, number>
  calls: ManagerStats['calls']
  reloads: ManagerStats['reloads']
}

export class WorkerCrew {
  readonly name = 'worker'
  readonly book = new Book('worker')
  readonly forks = new Book('worker, a fork')
  readonly forkCount = 0
  #worker!: Worker
  readonly #setting: Setting

  constructor(setting: Setting) {
    this.#setting = setting
  }

  async open(): Promise<void> {
    const { guests, cache } = this.#setting
    this.#worker = new Worker(filename, { workerData: { guest: guests.counter, cache }, execArgv: [] })
    await once(this.#worker, 'message')
  }

  start(): void {}

  stop(): void {}

  async end(): Promise<void> {
    const { book } = this
    this.#worker.postMessage('over')
    const [told] = (await once(this.#worker, 'message')) as [Told]
    await once(this.#worker, 'exit')
    book.asked = told.asked
    book.answered = told.answered
    book.endings.set('ok', told.answered - told.trapped)
    book.endings.set('ERR_WASM_TRAP', told.trapped)
    for (const [reason, count] of Object.entries(told.recycles)) book.recycledElsewhere(reason, count)
    for (const text of told.problems) book.problem(text)
    if (told.asked !== told.answered) book.problem(`${told.asked} calls, and ${told.answered} answers`)
    const { completed, trapped, failed, interrupted, rejected } = told.calls
    const counted = [completed, trapped, failed + interrupted + rejected]
    const expected = [told.answered - told.trapped, told.trapped, 0]
    if (counted.join() !== expected.join()) book.problem(`the manager counted ${counted}, the worker ${expected}`)
    for (const [reason, count] of Object.entries(told.reloads)) {
      if (reason !== 'trap' && count !== told.recycles[reason]) {
        book.problem(`recycles for ${reason}: the manager counted ${count}, the events ${told.recycles[reason]}`)
      }
    }
  }
}
