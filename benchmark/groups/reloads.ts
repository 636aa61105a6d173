// What one reload per second takes from the throughput of two instances that are never idle.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import type { ReloadOptions } from '../../index.js'
import { contest, type Effort, median, ratios, type Standing, type Turn } from '../contest.ts'
import { Load } from '../load.ts'
import type { Group } from '../report.ts'
import { type hooks, type Job, jobs, managed } from '../sides.ts'

const callers = 4
const seconds = 4

export default async function reloads(effort: Effort): Promise<Group> {
  const group: Group = {
    name: 'reloads: one unit of work, with and without one reload per second',
    standings: {},
    figures: [],
  }
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-bench-'))
  try {
    for (const job of jobs(folder)) {
      const { none, ...reloaded } = await contestTwice(effort, {
        none: (cpu) => turn(effort, cpu, job, 'none'),
        rolling: (cpu) => turn(effort, cpu, job, 'none', { strategy: 'rolling' }),
        exclusive: (cpu) => turn(effort, cpu, job, job.stateBytes > 0 ? 'state carried over' : 'none', {}),
      })
      note(group, `${job.name}, no reload`, none)
      for (const [strategy, taken] of Object.entries(reloaded)) {
        note(group, `${job.name}, ${strategy}`, taken)
        group.figures.push(
          {
            what: `the throughput of ${job.name} without reloads, at one ${strategy} reload per second`,
            ...ratios(none.wall, taken.wall),
            goal: { atLeast: 0.99 },
          },
          {
            what: `the processor time of ${job.name} without reloads, at one ${strategy} reload per second`,
            ...ratios(taken.cpu, none.cpu),
          },
        )
      }
    }
    return group
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

/** For one unit of work. Processor time tells the cost where other programs keep the machine busy, and does not see a pause. */
interface Taken {
  wall: Standing
  cpu: Standing
}

async function contestTwice<Name extends string>(
  { rounds }: Effort,
  turns: Record<Name, (cpu: number[]) => Turn>,
): Promise<Record<Name, Taken>> {
  const names = Object.keys(turns) as Name[]
  const cpu = new Map(names.map((name) => [name, [] as number[]]))
  const wall = await contest(
    rounds,
    Object.fromEntries(names.map((name) => [name, turns[name](cpu.get(name) ?? [])])) as Record<Name, Turn>,
  )
  const taken = (name: Name): Taken => {
    const own = cpu.get(name) ?? []
    return { wall: wall[name], cpu: { ns: median(own), turns: own } }
  }
  return Object.fromEntries(names.map((name) => [name, taken(name)])) as Record<Name, Taken>
}

function note(group: Group, name: string, { wall, cpu }: Taken): void {
  group.standings[`${name}: time`] = wall
  group.standings[`${name}: processor time`] = cpu
}

/** Each turn begins with fresh instances, because gofmt leaks. */
function turn({ share }: Effort, cpu: number[], job: Job, hook: keyof typeof hooks, reload?: ReloadOptions): Turn {
  return async () => {
    const side = await managed(job, hook, reload ?? {})
    const load = new Load(callers, () => side.work())
    await load.more(20)
    const before = load.answers
    const usage = process.cpuUsage()
    const begun = performance.now()
    const periods = Math.max(1, Math.round(seconds * share))
    const periodMs = 1000 * Math.min(1, seconds * share)
    for (let period = 0; period < periods; period++) {
      // In the middle, so that what a reload leaves to be done falls into the turn.
      await setTimeout(periodMs / 2)
      if (reload) await side.reload()
      await setTimeout(begun + (period + 1) * periodMs - performance.now())
    }
    const answers = load.answers - before
    const lasted = performance.now() - begun
    const { user, system } = process.cpuUsage(usage)
    await load.end()
    await side.end(load.answers)
    cpu.push(((user + system) * 1e3) / answers)
    return (lasted * 1e6) / answers
  }
}
