// Reloads whose instances begin with a snapshot, under load, against ones that initialize them again.
import { setTimeout } from 'node:timers/promises'
import { type ManagerOptions, type ReloadOptions, type ReloadReport, WasmModuleManager } from '../../index.js'
import { type Effort, percentile, ratios, type Standing, takeTurns } from '../contest.ts'
import { pageBytes, pages } from '../guests.ts'
import { Load } from '../load.ts'
import { type Figure, type Group, size } from '../report.ts'

const instances = 2
const callers = 2
const work = [0, 16 * pageBytes, 2] as const

interface Contestant {
  isWarm: boolean
  reload: ReloadOptions
  /** In one turn. */
  reloads: number
  rounds: Round[]
}

/** Milliseconds, one value per reload. */
interface Round {
  /** The pause as it is told from within, without waiting for what was in flight. */
  pause: number[]
  /** The longest call that a reload touched. */
  around: number[]
  /** The longest call in as much time without one. */
  without: number[]
  /** From asking until the new generation serves. */
  whole: number[]
}

export default async function warm(effort: Effort): Promise<Group> {
  const often = Math.max(2, Math.ceil(50 * effort.share))
  const enter = (isWarm: boolean, reload: ReloadOptions, reloads: number): Contestant => ({
    isWarm,
    reload,
    reloads,
    rounds: [],
  })
  const contestants = {
    'warm, exclusive': enter(true, {}, often),
    'warm, rolling': enter(true, { strategy: 'rolling' }, often),
    'initialized again': enter(false, {}, 1),
  }
  const all = Object.values(contestants)
  // Writing everything again takes long, and its median does not need many.
  await takeTurns(Math.min(effort.rounds, 3), all, async (contestant) => {
    contestant.rounds.push(await turn(effort.largeMib, contestant))
  })

  const standings: Record<string, Standing> = {}
  const figures: Figure[] = []
  const big = size(effort.largeMib)
  for (const [name, { rounds }] of Object.entries(contestants)) {
    for (const kind of ['pause', 'around', 'without', 'whole'] as const) {
      for (const p of [0.5, 0.99]) standings[`${name}: ${kinds[kind]}, p${p * 100}`] = standing(rounds, kind, p)
    }
  }
  for (const name of ['warm, exclusive', 'warm, rolling'] as const) {
    const { rounds } = contestants[name]
    const p99 = (kind: keyof Round) => standing(rounds, kind, 0.99).ns / 1e6
    figures.push(
      {
        what: `pause without the drain, p99, ${name}, ${big} in each of ${instances}`,
        ms: p99('pause'),
        goal: { atMost: 2 },
      },
      { what: `more for the longest call, p99, ${name}`, ms: p99('around') - p99('without') },
    )
  }
  const whole = ({ rounds }: Contestant) => standing(rounds, 'whole', 0.5)
  figures.push({
    what: `as quick, from asking to serving, as one that initializes again, exclusive, ${big}`,
    ...ratios(whole(contestants['initialized again']), whole(contestants['warm, exclusive'])),
  })
  return { name: `warm: reloads of two instances under load, ${big} live in each`, standings, figures }
}

async function turn(mib: number, { isWarm, reload, reloads }: Contestant): Promise<Round> {
  const bytes = mib << 20
  // On the pool: the event loop stays free for the callers.
  const initialize: ManagerOptions['initialize'] = async (instance) => {
    await instance.call('fill', [0, bytes, 1])
  }
  const manager = await WasmModuleManager.create(pages(mib), { instances, initialize })
  if (isWarm) {
    await manager.snapshot()
    // From here on they all stand on it.
    await manager.reload()
  }
  const round: Round = { pause: [], around: [], without: [], whole: [] }
  const load = new Load(callers, () => manager.call('fill', work))
  await load.more(20)
  for (let count = 0; count < reloads; count++) {
    let report: ReloadReport | undefined
    const around = await load.watch(async () => {
      report = await manager.reload(reload)
    })
    const quiet = await load.watch(() => setTimeout(around.lastedMs))
    round.pause.push(withoutDrain(report))
    round.around.push(around.longestMs)
    round.without.push(quiet.longestMs)
    round.whole.push(around.lastedMs)
  }
  await load.end()
  if ((await manager.call('sum', [bytes / 2, bytes])) !== bytes / 2 / pageBytes) throw new Error('the state is lost')
  await manager.close()
  return round
}

/** A rolling reload drains before its pause, not in it. */
function withoutDrain(report: ReloadReport | undefined): number {
  if (!report) return Number.NaN
  return report.pauseMs - (report.strategy === 'exclusive' ? report.drainMs : 0)
}

const kinds = {
  pause: 'pause without the drain',
  around: 'longest call',
  without: 'longest call without',
  whole: 'from asking to serving',
} as const

function standing(rounds: Round[], kind: keyof Round, p: number): Standing {
  return percentile(
    rounds.map((round) => round[kind]),
    p,
  )
}
