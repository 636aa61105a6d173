// Guests under reload, behind managers and behind the peers: the same work on as many instances everywhere.
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type LeasedInstance, type ManagerOptions, type ReloadOptions, WasmModuleManager } from '../index.js'
import { ledger, ledgerBytes } from './guests.ts'
import { expected as formatted, gofmt, input } from './modules/gofmt.ts'
import { inChild, inWorker, Peers } from './peers.ts'

const instances = 2
const seed = 12345

export interface Job {
  name: 'ledger' | 'gofmt'
  path: string
  /** From address 0 on, to be carried over; 0: none. */
  stateBytes: number
  expected: unknown
  onManager(manager: WasmModuleManager): Promise<unknown>
  onPeers(peers: Peers): Promise<unknown>
}

export interface Side {
  /** One unit of work; the answer is checked. */
  work(): Promise<void>
  /** Gives the pause as it is told from within, in milliseconds. */
  reload(): Promise<number>
  /** Ends it. Where state is carried over, `answers` must be what it counted. */
  end(answers: number): Promise<void>
}

export function jobs(folder: string): Job[] {
  const path = join(folder, 'ledger.wasm')
  writeFileSync(path, ledger)
  const v8 = new WebAssembly.Instance(new WebAssembly.Module(ledger)).exports as { work(seed: number): number }
  return [
    {
      name: 'ledger',
      path,
      stateBytes: ledgerBytes,
      expected: v8.work(seed),
      onManager: (manager) => manager.call('work', [seed]),
      onPeers: (peers) => peers.ask('work', seed),
    },
    {
      name: 'gofmt',
      path: gofmt.path,
      stateBytes: 0,
      expected: formatted,
      onManager: (manager) => manager.use(format),
      onPeers: (peers) => peers.ask('format', input),
    },
  ]
}

/** Only the formatting itself goes to the pool; the rest is too short for the way there. */
async function format(instance: LeasedInstance): Promise<string> {
  const guest = instance.exports as Record<'alloc' | 'output_ptr' | 'output_len' | 'dispose', (size?: number) => number>
  instance.memory.write(guest.alloc(input.length), input)
  await instance.call('format')
  const text = instance.memory.readString(guest.output_ptr(), guest.output_len())
  guest.dispose()
  return text
}

export const hooks = {
  none: {},
  'state carried over': {
    saveState: (instance) => instance.memory.read(0, ledgerBytes),
    restoreState: (instance, state: Uint8Array) => {
      instance.memory.write(0, state)
    },
  },
  initialize: {
    initialize: (instance) => {
      instance.exports.count?.()
    },
  },
} satisfies Record<string, ManagerOptions>

export async function managed(job: Job, hook: keyof typeof hooks, reload: ReloadOptions): Promise<Side> {
  const manager = await WasmModuleManager.create(job.path, { instances, ...hooks[hook] })
  return {
    async work() {
      check(job, await job.onManager(manager))
    },
    reload: async () => (await manager.reload(reload)).pauseMs,
    async end(answers) {
      if (hook === 'state carried over') {
        const held = await Promise.all(Array.from({ length: instances }, () => manager.acquire()))
        const counts = held.map((instance) => instance.exports.count?.() as number)
        for (const instance of held) instance.release()
        compare(job, counts, answers)
      }
      await manager.close()
    },
  }
}

export async function respawned(job: Job, where: 'worker' | 'child', isAhead: boolean): Promise<Side> {
  const spawn = where === 'worker' ? inWorker(new WebAssembly.Module(readFileSync(job.path))) : inChild(job.path)
  const peers = await Peers.start(spawn, instances, job.stateBytes)
  return {
    async work() {
      check(job, await job.onPeers(peers))
    },
    reload: () => peers.reload(isAhead),
    async end(answers) {
      if (job.stateBytes > 0) {
        const states = await Promise.all(Array.from({ length: instances }, () => peers.ask('save', 4)))
        compare(
          job,
          (states as Uint8Array[]).map((state) => new DataView(state.buffer, state.byteOffset).getUint32(0, true)),
          answers,
        )
      }
      await peers.close()
    },
  }
}

function check(job: Job, answer: unknown): void {
  if (answer !== job.expected) throw new Error(`${job.name}: a wrong answer under reload`)
}

function compare(job: Job, counts: number[], answers: number): void {
  const counted = counts.reduce((sum, count) => sum + count, 0)
  if (counted !== answers) throw new Error(`${job.name}: ${answers} answers, and the state counted ${counted}`)
}
