// What a reload does to the calls around it, against ending a worker or a child process and starting another.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { type Effort, percentile, ratios, type Standing, takeTurns } from '../contest.ts'
import { Load } from '../load.ts'
import type { Figure, Group } from '../report.ts'
import { jobs, managed, respawned, type Side } from '../sides.ts'

const callers = 2

interface Contestant {
  open(): Promise<Side>
  /** Reloads in one turn: few where each takes long. */
  reloads: number
  answers: number
  rounds: Round[]
}

/** Milliseconds, one value per reload. */
interface Round {
  /** The longest call that a reload touched. */
  around: number[]
  /** The longest call in as much time without one. */
  without: number[]
  /** The pause as it is told from within. */
  told: number[]
}

export default async function pause(effort: Effort): Promise<Group> {
  const group: Group = {
    name: 'pause: longest call around one reload of two instances under load',
    standings: {},
    figures: [],
  }
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-bench-'))
  try {
    for (const job of jobs(folder)) {
      const often = Math.max(2, Math.ceil(100 * effort.share))
      const seldom = Math.max(1, Math.ceil(12 * effort.share))
      const contestants: Record<string, Contestant> = {}
      const enter = (name: string, reloads: number, open: () => Promise<Side>) => {
        contestants[name] = { open, reloads, answers: 0, rounds: [] }
      }
      enter('exclusive', often, () => managed(job, 'none', {}))
      enter('rolling', often, () => managed(job, 'none', { strategy: 'rolling' }))
      if (job.stateBytes > 0) {
        enter('exclusive, saveState and restoreState', often, () => managed(job, 'state carried over', {}))
        enter('rolling, initialize', often, () => managed(job, 'initialize', { strategy: 'rolling' }))
      }
      enter('worker threads respawned', seldom, () => respawned(job, 'worker', false))
      enter('worker threads respawned ahead', seldom, () => respawned(job, 'worker', true))
      enter('child processes respawned', seldom, () => respawned(job, 'child', false))
      await takeTurns(effort.rounds, Object.values(contestants), async (contestant) => {
        contestant.rounds.push(await turn(contestant))
      })
      for (const [name, contestant] of Object.entries(contestants)) {
        Object.assign(group.standings, standings(`${job.name}, ${name}`, contestant.rounds))
      }
      group.figures.push(...figures(job.name, contestants))
    }
    return group
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

async function turn({ open, reloads }: Contestant): Promise<Round> {
  const round: Round = { around: [], without: [], told: [] }
  const side = await open()
  const load = new Load(callers, () => side.work())
  await load.more(20)
  for (let count = 0; count < reloads; count++) {
    const reload = await load.watch(async () => void round.told.push(await side.reload()))
    const quiet = await load.watch(() => setTimeout(reload.lastedMs))
    round.around.push(reload.longestMs)
    round.without.push(quiet.longestMs)
  }
  await load.end()
  await side.end(load.answers)
  return round
}

const kinds = { around: 'longest call', without: 'longest call without', told: 'pause as told' } as const

function standings(name: string, rounds: Round[]): Record<string, Standing> {
  const all: Record<string, Standing> = {}
  for (const kind of ['around', 'without', 'told'] as const) {
    for (const p of [0.5, 0.99]) all[`${name}: ${kinds[kind]}, p${p * 100}`] = standing(rounds, kind, p)
  }
  return all
}

function standing(rounds: Round[], kind: keyof Round, p: number): Standing {
  return percentile(
    rounds.map((round) => round[kind]),
    p,
  )
}

function figures(job: string, contestants: Record<string, Contestant>): Figure[] {
  const taken = (name: string) => contestants[name]?.rounds ?? []
  const p99 = (name: string, kind: keyof Round) => standing(taken(name), kind, 0.99).ns / 1e6
  const goal = { atMost: 1 }
  const figures: Figure[] = []
  for (const name of Object.keys(contestants)) {
    const isRolling = name.startsWith('rolling')
    if (!isRolling && !name.startsWith('exclusive')) continue
    figures.push(
      {
        what: `more for the longest call, p99 of ${job}, ${name}`,
        ms: p99(name, 'around') - p99(name, 'without'),
        ...(isRolling ? { goal } : {}),
      },
      { what: `pauseMs, p99 of ${job}, ${name}`, ms: p99(name, 'told'), ...(isRolling ? { goal } : {}) },
    )
  }
  const around = (name: string) => standing(taken(name), 'around', 0.5)
  const times = (ours: string, peer: string) => ratios(around(peer), around(ours))
  // A peer carries its state over: so must we, where there is any.
  const carried = 'exclusive, saveState and restoreState'
  const exclusive = carried in contestants ? carried : 'exclusive'
  for (const peer of ['worker threads respawned', 'child processes respawned']) {
    figures.push({ what: `the longest call of ${job}, ${exclusive}, with ${peer}`, ...times(exclusive, peer) })
  }
  const ahead = 'worker threads respawned ahead'
  figures.push(
    { what: `the longest call of ${job}, ${exclusive}, with ${ahead}`, ...times(exclusive, ahead) },
    { what: `the longest call of ${job}, rolling, with ${ahead}`, ...times('rolling', ahead) },
  )
  return figures
}
