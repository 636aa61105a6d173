// Real modules at real work, default options, against V8. Each turn begins with a fresh instance: one of them leaks.
import { contest, type Effort, ratio, slow, type Turn } from '../contest.ts'
import { onMolt, onV8 } from '../engines.ts'
import { dprint } from '../modules/dprint.ts'
import { gofmt } from '../modules/gofmt.ts'
import { oniguruma } from '../modules/oniguruma.ts'
import type { Group } from '../report.ts'

export default async function throughput(effort: Effort): Promise<Group> {
  const group: Group = { name: 'throughput: real modules, one unit of work', standings: {}, figures: [] }
  for (const module of [gofmt, dprint, oniguruma]) {
    const v8 = onV8(module)
    const molt = await onMolt(module)
    if ((await v8.fresh())() !== (await molt.fresh())())
      throw new Error(`${module.name}: the engines answer differently`)

    const calls = Math.ceil(module.calls * effort.share)
    const turn = { v8: slow(calls, () => v8.fresh()), molt: slow(calls, () => molt.fresh()) }
    await settle(turn.v8, effort)
    await settle(turn.molt, effort)
    const standings = await contest(effort.rounds, turn)
    group.standings[`${module.name}: V8`] = standings.v8
    group.standings[`${module.name}: manager`] = standings.molt
    group.figures.push({
      what: `V8's speed on ${module.name} (${module.origin})`,
      ratio: ratio(standings.v8, standings.molt),
      ...(module === gofmt ? { goal: { atLeast: 1 } } : {}),
    })
    await molt.close()
  }
  return group
}

/** V8 compiles hot functions again while they run: let it finish, which is when four turns have brought nothing better. */
async function settle(turn: Turn, { share }: Effort): Promise<void> {
  let best = Number.POSITIVE_INFINITY
  for (let idle = 0, turns = 0; idle < 4 && turns < 40 * share; turns++) {
    const ns = await turn()
    idle = ns < best * 0.98 ? 0 : idle + 1
    best = Math.min(best, ns)
  }
}
