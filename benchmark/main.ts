// npm run bench [-- GROUP… --smoke --rounds N --strict --save]
//   GROUP     exports, calls, imports, create, throughput, interruptible, pause, reloads,
//             forks, snapshots, isolation, warm, glue, threads, recycling; default all
//   --smoke   one short round, to see that everything runs
//   --rounds  how often each contestant has its turn (default 9)
//   --strict  exit 1 when a goal is missed
//   --save    keep the result as results/reference.json, the one that is committed; of some groups, in the place of theirs
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { type Effort, full, smoke } from './contest.ts'
import calls from './groups/calls.ts'
import create from './groups/create.ts'
import exportCalls from './groups/exports.ts'
import forks from './groups/forks.ts'
import glue from './groups/glue.ts'
import importCalls from './groups/imports.ts'
import interruptible from './groups/interruptible.ts'
import isolation from './groups/isolation.ts'
import pause from './groups/pause.ts'
import recycling from './groups/recycling.ts'
import reloads from './groups/reloads.ts'
import snapshots from './groups/snapshots.ts'
import threads from './groups/threads.ts'
import throughput from './groups/throughput.ts'
import warm from './groups/warm.ts'
import { circumstances, type Group, passes, show, verdict } from './report.ts'

const groups: Record<string, (effort: Effort) => Promise<Group>> = {
  exports: exportCalls,
  calls,
  imports: importCalls,
  create,
  throughput,
  interruptible,
  pause,
  reloads,
  forks,
  snapshots,
  isolation,
  warm,
  glue,
  threads,
  recycling,
}

const { values: flags, positionals } = readFlags()
const unknown = positionals.filter((name) => !(name in groups))
if (unknown.length > 0) refuse(`no such group: ${unknown.join(', ')}; there are ${Object.keys(groups).join(', ')}`)
const rounds = Number(flags.rounds ?? full.rounds)
if (!(Number.isInteger(rounds) && rounds > 0)) refuse(`--rounds must be a positive whole number, not "${flags.rounds}"`)
const effort = flags.smoke ? smoke : { ...full, rounds }

const context = circumstances()
process.stdout.write(
  `${context.cpu}, ${context.cores} cores, Node ${context.node} (V8 ${context.v8}), ${context.commit}\n` +
    'Each line: the median of the rounds, and the fastest and slowest round.\n',
)
if (context.load > context.cores) {
  process.stdout.write(
    `The machine is busy (load ${context.load.toFixed(1)}): what hands over between threads will look slow.\n`,
  )
}
const done: Group[] = []
for (const name of positionals.length > 0 ? positionals : Object.keys(groups)) {
  const group = await (groups[name] as (effort: Effort) => Promise<Group>)(effort)
  process.stdout.write(`${show(group)}\n`)
  done.push(group)
}

if (flags.smoke) {
  process.stdout.write('\nEverything runs. The figures of one short round mean nothing and are not kept.\n')
} else {
  const figures = done.flatMap((group) => group.figures)
  const missed = figures.filter((figure) => passes(figure) === false)
  const met = figures.filter((figure) => passes(figure)).length
  process.stdout.write(`\n${met} goals met, ${missed.length} missed${missed.length > 0 ? ':' : ''}\n`)
  for (const figure of missed) process.stdout.write(`${verdict(figure)}\n`)
  if (flags.strict && missed.length > 0) process.exitCode = 1
  const results = new URL('results/', import.meta.url)
  mkdirSync(results, { recursive: true })
  const name = flags.save ? 'reference' : context.date.replaceAll(':', '-').slice(0, 19)
  const path = fileURLToPath(new URL(`${name}.json`, results))
  const kept = done.map((group) => ({
    ...group,
    figures: group.figures.map((figure) => ({ ...figure, pass: passes(figure) ?? null })),
  }))
  const result = { ...context, effort, groups: kept }
  writeFileSync(
    path,
    `${JSON.stringify(flags.save && positionals.length > 0 ? merged(path, result) : result, null, 1)}\n`,
  )
  process.stdout.write(`Result: ${relative(process.cwd(), path)}\n`)
}

/** The reference with these groups in the place of its own; they say themselves when they were measured. */
function merged(path: string, result: { date: string; commit: string; groups: object[] }): object {
  const before = JSON.parse(readFileSync(path, 'utf8')) as { groups: { name: string }[] }
  const wordOf = (group: object) => (group as { name: string }).name.split(':')[0]
  const { date, commit, groups } = result
  const fresh = groups.map((group) => ({ ...group, date, commit }))
  const words = fresh.map(wordOf)
  return { ...before, groups: [...before.groups.filter((group) => !words.includes(wordOf(group))), ...fresh] }
}

function readFlags() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        smoke: { type: 'boolean', default: false },
        rounds: { type: 'string' },
        strict: { type: 'boolean', default: false },
        save: { type: 'boolean', default: false },
      },
    })
  } catch (error) {
    return refuse((error as Error).message)
  }
}

function refuse(why: string): never {
  process.stderr.write(`${why}\nnpm run bench [-- GROUP… --smoke --rounds N --strict --save]\n`)
  process.exit(2)
}
