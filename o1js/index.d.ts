import type { EventEmitter } from 'node:events'
import type { GlueManager } from '../index.js'

/** What the environment variable WASM_MOLT_O1JS sets as well: `WASM_MOLT_O1JS=reset=300000000,proofTimeoutMs=60000`. */
export interface O1jsSettings {
  /**
   * When what a proof has left in the linear memory is given back: after each proof, after one that has left the memory larger
   * than so many bytes, or not at all. Default 'always'. Snapshots are taken in any case: a trap has to be recovered from.
   */
  reset?: 'always' | 'never' | number
  /** `limits.memoryBytes` of the manager: a proof that needs more is rejected with a `WebAssembly.RuntimeError`. Default: the manager's. */
  memoryBytes?: number | undefined
  /** `limits.stackBytes` of the manager. */
  stackBytes?: number | undefined
  /**
   * `limits.timeoutMs` of the manager: how long each single call into the guest may take, those of `compile` too.
   * A proof is two long calls; the one that takes longer is stopped and rejects with a `WebAssembly.RuntimeError` whose `code` is
   * ERR_WASM_TIMEOUT. undefined: no limit, which is the default.
   */
  proofTimeoutMs?: number | undefined
}

export interface O1jsStats {
  /** Of o1js. */
  version: string | undefined
  generation: number | undefined
  /** Of the linear memory: now, and at the snapshot that resets go back to. */
  memoryBytes: number
  snapshotBytes: number
  snapshots: number
  resets: number
  /** Resets after which something newer than the snapshot was made anew: an index, an SRS, a Lagrange basis. */
  carried: number
  /** Calls that were stopped in the guest: traps, timeouts, memory that could not be had. */
  traps: number
  /** Threads of the guest's pool, while there is one. */
  threads: number
  /** Whether o1js has loaded its module. */
  isLoaded: boolean
}

/** 'snapshot', 'reset' (with `{ ms }`, what it has taken) and 'reload', after each; 'step' and 'wrap', in the job after each half of a proof. */
export const events: EventEmitter

/**
 * Changes what is named, and keeps the rest. Resolves when that is in effect.
 *
 * Limits belong to a manager: another limit means another manager, to which everything is carried over as by `reload`.
 */
export function configure(settings: O1jsSettings): Promise<void>

/** Who runs the module of o1js; another one after `configure` has changed a limit. undefined in Workers. */
export function getManager(): GlueManager | undefined

/** What o1js has in the guest now is what resets go back to, garbage included. */
export function snapshot(): Promise<void>

/** Gives back what proofs have left, whatever the policy says. What o1js keeps and is newer than the snapshot is carried over. */
export function reset(): Promise<void>

/**
 * A new instance in a new memory, with all that o1js keeps: objects of o1js stay valid. May come between two proofs and between
 * the two halves of one, but not while a program is compiled: o1js 2.14 has gate vectors then, which cannot be read out.
 */
export function reload(options?: { reason?: string }): Promise<void>

export function stats(): O1jsStats
