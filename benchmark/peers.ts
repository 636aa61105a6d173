// What people do without a manager: instances in workers or child processes behind a queue, ended and started again.
import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'

const filename = fileURLToPath(new URL('workers/respawn.mjs', import.meta.url))

/** One worker or child; it has one question at a time. */
interface Peer {
  ask(op: string, value?: unknown): Promise<unknown>
  end(): Promise<unknown>
}

export type Spawn = () => Promise<Peer>

export function inWorker(module: WebAssembly.Module): Spawn {
  return () => {
    // Not our own loader for TypeScript: the peer starts as fast as it can.
    const worker = new Worker(filename, { workerData: { module }, execArgv: [] })
    return open(
      worker,
      (message) => worker.postMessage(message),
      () => worker.terminate(),
    )
  }
}

export function inChild(path: string): Spawn {
  return () => {
    const child = fork(filename, { execArgv: [], serialization: 'advanced' })
    const end = () => {
      child.kill('SIGKILL')
      return once(child, 'exit')
    }
    return open(child, (message) => child.send(message), end, path)
  }
}

async function open(
  far: Worker | ChildProcess,
  send: (message: { op: string; value: unknown }) => void,
  end: Peer['end'],
  path?: string,
): Promise<Peer> {
  let answered: ((answer: unknown) => void) | undefined
  let failed: ((error: unknown) => void) | undefined
  far.on('message', ({ value }) => answered?.(value))
  far.on('error', (error) => failed?.(error))
  far.on('exit', () => failed?.(new Error('the peer ended with a question open')))
  const ask = (op: string, value?: unknown) =>
    new Promise<unknown>((resolve, reject) => {
      answered = resolve
      failed = reject
      send({ op, value })
    })
  await ask('open', { path })
  return { ask, end }
}

/** As many peers as there would be replicas. */
export class Peers {
  #spawn: Spawn
  #stateBytes: number
  #peers: Peer[] = []
  #free: Peer[] = []
  #waiting: ((peer: Peer) => void)[] = []
  #isClosed = false
  #drained: (() => void) | undefined

  private constructor(spawn: Spawn, stateBytes: number) {
    this.#spawn = spawn
    this.#stateBytes = stateBytes
  }

  /** `stateBytes` from address 0 are carried over; 0: nothing. */
  static async start(spawn: Spawn, count: number, stateBytes: number): Promise<Peers> {
    const peers = new Peers(spawn, stateBytes)
    peers.#peers = await Promise.all(Array.from({ length: count }, spawn))
    peers.#free = [...peers.#peers]
    return peers
  }

  async ask(op: string, value: unknown): Promise<unknown> {
    const free = this.#isClosed ? undefined : this.#free.pop()
    const peer = free ?? (await new Promise<Peer>((resolve) => this.#waiting.push(resolve)))
    try {
      return await peer.ask(op, value)
    } finally {
      this.#giveBack(peer)
    }
  }

  /** The same gate as a manager's. `isAhead`: the next peers are started before it closes. Returns for how long it was closed, in milliseconds. */
  async reload(isAhead: boolean): Promise<number> {
    const old = this.#peers
    const spawn = () => Promise.all(old.map(this.#spawn))
    const ready = isAhead ? await spawn() : undefined
    const closed = performance.now()
    this.#isClosed = true
    if (this.#free.length < old.length) {
      await new Promise<void>((resolve) => {
        this.#drained = resolve
      })
    }
    const states =
      this.#stateBytes === 0 ? [] : await Promise.all(old.map((peer) => peer.ask('save', this.#stateBytes)))
    const end = () => Promise.all(old.map((peer) => peer.end()))
    if (!ready) await end()
    this.#peers = ready ?? (await spawn())
    await Promise.all(states.map((state, at) => this.#peers[at]?.ask('restore', state)))
    this.#free = []
    this.#isClosed = false
    for (const peer of this.#peers) this.#giveBack(peer)
    const pauseMs = performance.now() - closed
    if (ready) await end()
    return pauseMs
  }

  async close(): Promise<void> {
    await Promise.all(this.#peers.map((peer) => peer.end()))
  }

  #giveBack(peer: Peer): void {
    const next = this.#isClosed ? undefined : this.#waiting.shift()
    if (next) {
      next(peer)
      return
    }
    this.#free.push(peer)
    if (this.#isClosed && this.#free.length === this.#peers.length) this.#drained?.()
  }
}
