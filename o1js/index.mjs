// `node --import wasm-molt/o1js app.mjs`, or `import 'wasm-molt/o1js'` before o1js: unmodified o1js from npm then runs its
// WebAssembly on this engine, and its memory comes back after each proof.
//
// - glue.mjs finds the glue that o1js ships and evaluates it, once; facade.mjs is what it sees of the engine
// - inner.cjs is what the engine manages and reloads
// - pool.mjs starts native threads where o1js would start Workers
// - handles.mjs knows which objects of o1js still mean something; state.mjs carries them over
// - keeper.mjs decides when to take a snapshot and when to reset

import { EventEmitter } from 'node:events'
import { isMainThread } from 'node:worker_threads'
import { loadGlue } from '../index.js'
import { Facade } from './facade.mjs'
import { findGlue, installGlue } from './glue.mjs'
import { Handles } from './handles.mjs'
import { Keeper } from './keeper.mjs'
import { Pool } from './pool.mjs'
import { checkSettings, fromEnvironment } from './settings.mjs'
import { State } from './state.mjs'

/** 'snapshot', 'reset', 'reload', and 'step' and 'wrap' after each half of a proof. */
export const events = new EventEmitter()

const settings = { reset: 'always', ...fromEnvironment(process.env.WASM_MOLT_O1JS) }

let manager
/** What there is to do for a reload, while there is one. */
let moving
let keeper
let version

const load = () => {
  const { memoryBytes, stackBytes, proofTimeoutMs: timeoutMs } = settings
  const limits = Object.fromEntries(
    Object.entries({ memoryBytes, stackBytes, timeoutMs }).filter(([, value]) => value !== undefined),
  )
  return loadGlue(new URL('./inner.cjs', import.meta.url), {
    name: 'o1js',
    // The new generation is there before the state of the old one is saved.
    saveState: () => moving.save(),
    restoreState: (inner, saved) => moving.restore(inner, saved),
    limits,
    engine: { threads: true },
    threadPool: {
      exit: () => {
        pool.stop()
      },
      // The keeper starts it, when everything else is in its place.
      start() {},
    },
  })
}

const facade = new Facade(() => keeper.trapped())
const handles = new Handles()
const pool = new Pool(facade, () => manager)

/** o1js does nothing in Workers but serve its own thread pool, which is not used here. */
if (isMainThread) {
  const found = findGlue()
  version = found.version
  let state
  manager = await load()
  facade.enter(manager.module)
  const shadows = {
    WebAssembly: facade.WebAssembly,
    FinalizationRegistry: handles.FinalizationRegistry,
    ...pool.shadows,
  }
  installGlue(found, shadows, (glue, heap) => {
    handles.adopt(glue)
    state = new State(glue, handles, () => facade.memory)
    keeper = new Keeper({ ...found, facade, handles, pool, state, settings, events, manager: () => manager })
    keeper.adopt(glue, heap)
  })
}

/** Who runs the module of o1js; another one after `configure` has changed a limit. */
export const getManager = () => manager

function reloadNow(options) {
  keeper.move((steps) => {
    moving = steps
    try {
      manager.reloadSync(options)
    } finally {
      moving = undefined
    }
  })
}

/** Changes what is named, and keeps the rest. Resolves when it is in effect. */
export async function configure(options) {
  checkSettings(options)
  const { reset, ...limits } = options
  if (reset !== undefined) settings.reset = reset
  if (Object.keys(limits).every((name) => settings[name] === limits[name])) return
  if (!isMainThread) return
  const earlier = { ...settings }
  Object.assign(settings, limits)
  // Limits belong to a manager, so there is to be another one.
  const next = await load()
  const before = manager
  const change = (enter) => {
    manager = next
    enter(next.module)
  }
  try {
    // Before o1js has loaded its module there is nothing to take along.
    if (keeper === undefined) change((inner) => facade.enter(inner))
    else keeper.transplant(change)
  } catch (error) {
    manager = before
    Object.assign(settings, Object.fromEntries(Object.keys(limits).map((name) => [name, earlier[name]])))
    await next.destroy()
    throw error
  }
  await before.destroy()
}

/** The next job: with nothing of the caller's, and nothing of o1js's, on the stack. */
async function atBoundary(act) {
  await undefined
  if (keeper !== undefined) act()
}

/** What o1js has in the guest now is what resets go back to, garbage included. */
export const snapshot = () => atBoundary(() => keeper.snapshot())

/** Gives back what proofs have left, whatever the policy says. */
export const reset = () => atBoundary(() => keeper.reset())

/** A new memory, and all that o1js keeps carried over to it. */
export const reload = ({ reason = 'manual' } = {}) => atBoundary(() => reloadNow({ reason }))

export function stats() {
  const { memoryBytes = 0, generation } = manager?.stats() ?? {}
  const counts = keeper?.counts ?? { snapshots: 0, resets: 0, carried: 0, traps: 0 }
  return {
    ...{ version, generation, memoryBytes, snapshotBytes: keeper?.snapshotBytes ?? 0 },
    ...{ ...counts, threads: pool.isUp ? pool.size : 0, isLoaded: facade.isLoaded },
  }
}
