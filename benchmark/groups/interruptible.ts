// What it costs that running code can be stopped. Small differences need many short turns.
import { contest, type Effort, ratio, slow } from '../contest.ts'
import { onMolt } from '../engines.ts'
import { gofmt } from '../modules/gofmt.ts'
import type { Group } from '../report.ts'

export default async function interruptible(effort: Effort): Promise<Group> {
  const on = await onMolt(gofmt, { interruptible: true })
  const off = await onMolt(gofmt, { interruptible: false })
  const calls = Math.ceil((gofmt.calls / 2) * effort.share)
  const standings = await contest(effort.rounds * 3, {
    'gofmt, interruptible (the default)': slow(calls, () => on.fresh()),
    'gofmt, not interruptible': slow(calls, () => off.fresh()),
  })
  await Promise.all([on.close(), off.close()])
  return {
    name: 'interruptible: its price',
    standings,
    figures: [
      {
        what: 'the time of gofmt that cannot be interrupted',
        ratio: ratio(standings['gofmt, interruptible (the default)'], standings['gofmt, not interruptible']),
        goal: { atMost: 1.03 },
      },
    ],
  }
}
