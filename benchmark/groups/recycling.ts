// Ten thousand conversions that leak 62 KB each, and fifty thousand of gofmt's: what recycling costs and what it gives back,
// against pools of workers that are recycled by hand or by a memory limit, and against doing nothing.
import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import type { RecyclePolicy } from '../../index.js'
import { type Effort, median, ratios, type Standing, takeTurns } from '../contest.ts'
import { convert } from '../converter.ts'
import { converter } from '../guests.ts'
import { expected, gofmt, input } from '../modules/gofmt.ts'
import { sample } from '../modules/module.ts'
import type { Figure, Group, Measure } from '../report.ts'

const program = fileURLToPath(new URL('../workers/recycling.mjs', import.meta.url))
const run = promisify(execFile)
const mib = 2 ** 20

/** Characters of text in one conversion. */
const textSize = 15_000
const callers = 4

interface Job {
  contestant: 'plain' | 'manager' | 'piscina' | 'tinypool' | 'gofmt'
  /** A path. */
  guest: string
  pieces: { input: string; expected: string }[]
  calls: number
  callers: number
  sampleCalls: number
  replicas: number
  recycle?: RecyclePolicy
  /** piscina: after so many calls of the pool. tinypool: beyond so much of what it takes for a worker's memory. */
  recycleCalls?: number
  recycleBytes?: number
}

/** Times in milliseconds, sizes in bytes. */
interface Told {
  lastedMs: number
  p50: number
  p99: number
  longest: number
  /** The resident set, every so many calls. */
  resident: number[]
  peak: number
  recycles?: Record<string, number>
  failed?: number
  completed?: number
  longestPause?: number
}

export default async function recycling(effort: Effort): Promise<Group> {
  const group: Group = {
    name: 'recycling: a converter that leaks 62 KB with each of 10,000 calls, and gofmt 50,000 times',
    standings: {},
    measures: {},
    figures: [],
  }
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-bench-'))
  try {
    const path = join(folder, 'converter.wasm')
    writeFileSync(path, converter)
    await conversions(effort, folder, path, group)
    await formatting(effort, folder, group)
    return group
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

async function conversions(effort: Effort, folder: string, guest: string, group: Group): Promise<void> {
  const isSmoke = effort.share < 1
  const calls = Math.ceil(10_000 * effort.share)
  const bound = (isSmoke ? 2 : 32) * mib
  const pieces = texts()
  const perCall = leakPerCall(pieces)
  const base = { guest, pieces, calls, callers, sampleCalls: isSmoke ? 10 : 100 }
  const recycle = { memory: bound }
  /** Each worker has leaked about as much as a replica may hold when its pool is replaced. */
  const recycleCalls = (replicas: number) => Math.max(1, Math.round((bound / perCall) * replicas))
  const jobs: Record<string, Job> = {
    'plain WebAssembly': { ...base, contestant: 'plain', replicas: 1, callers: 1 },
    'tinypool, 2 workers, memory limit': { ...base, contestant: 'tinypool', replicas: 2, recycleBytes: 32 * mib },
    'piscina, 2 workers, by hand': { ...base, contestant: 'piscina', replicas: 2, recycleCalls: recycleCalls(2) },
    'manager, 2 replicas': { ...base, contestant: 'manager', replicas: 2 },
    'manager, 2 replicas, recycle': { ...base, contestant: 'manager', replicas: 2, recycle },
    'manager, 4 replicas': { ...base, contestant: 'manager', replicas: 4 },
    'manager, 4 replicas, recycle': { ...base, contestant: 'manager', replicas: 4, recycle },
  }
  const told = await contest(folder, effort.rounds, jobs)
  for (const name of Object.keys(jobs)) note(group, name, calls, told(name))

  const ours = 'manager, 2 replicas, recycle'
  const [p99, peak, cost] = [
    (name: string) => standing(told(name).map((one) => one.p99 * 1e6)),
    (name: string) => standing(told(name).map((one) => one.peak)),
    (name: string) => standing(told(name).map((one) => one.lastedMs)),
  ]
  const piscina = 'piscina, 2 workers, by hand'
  const figures: Figure[] = [
    ...[2, 4].map((replicas) => ({
      what: `the p99 latency without recycling, ${replicas} replicas`,
      ...ratios(p99(`manager, ${replicas} replicas, recycle`), p99(`manager, ${replicas} replicas`)),
      goal: { atMost: 1.3 },
    })),
    {
      what: 'the throughput of piscina with workers recycled by hand, 2 replicas',
      ...ratios(cost(piscina), cost(ours)),
      goal: { atLeast: 2 },
    },
    {
      what: 'the throughput of the same manager without recycling, 2 replicas',
      ...ratios(cost('manager, 2 replicas'), cost(ours)),
    },
    ...['plain WebAssembly', 'tinypool, 2 workers, memory limit'].map((name) => ({
      what: `the peak resident set of ${name}, 2 replicas`,
      ...ratios(peak(ours), peak(name)),
      goal: { atMost: 0.5 },
    })),
    {
      what: `the peak resident set of ${piscina}, 2 replicas`,
      ...ratios(peak(ours), peak(piscina)),
    },
    {
      what: 'the peak resident set of plain WebAssembly, 4 replicas',
      ...ratios(peak('manager, 4 replicas, recycle'), peak('plain WebAssembly')),
      goal: { atMost: 0.5 },
    },
  ]
  group.figures.push(...figures)
  for (const name of [ours, 'manager, 4 replicas, recycle']) {
    group.figures.push(band(name, `${calls.toLocaleString('en')} conversions`, told(name)))
  }
}

/** Unmanaged there would be nothing to compare with: it runs out of its 4 GiB after 16,000 calls (`npm run demo`). */
async function formatting(effort: Effort, folder: string, group: Group): Promise<void> {
  const isSmoke = effort.share < 1
  const calls = isSmoke ? 400 : 50_000
  const job: Job = {
    contestant: 'gofmt',
    guest: gofmt.path,
    pieces: [{ input: String(input), expected }],
    calls,
    callers,
    sampleCalls: isSmoke ? 10 : 100,
    replicas: 4,
    recycle: { memory: (isSmoke ? 8 : 32) * mib },
  }
  const name = 'gofmt, 4 replicas, recycle'
  const told = await contest(folder, 1, { [name]: job })
  note(group, name, calls, told(name))
  group.figures.push(band(name, `${calls.toLocaleString('en')} calls of gofmt`, told(name)))
}

/** Replicas begin in step and do not stay so, which is over after the first third; from then on a leak is what would be left to rise. */
function band(name: string, work: string, rounds: Told[]): Figure {
  const turns = rounds.map(({ resident }) => {
    const third = (from: number) =>
      median(resident.slice(Math.floor((resident.length * from) / 3), Math.floor((resident.length * (from + 1)) / 3)))
    return third(2) / third(1)
  })
  return {
    what: `the resident set of the second third of ${work}, in the last: ${name}`,
    ratio: median(turns),
    ...(turns.length > 1 ? { spread: [Math.min(...turns), Math.max(...turns)] as [number, number] } : {}),
    goal: { atMost: 1.1 },
  }
}

async function contest(folder: string, rounds: number, jobs: Record<string, Job>): Promise<(name: string) => Told[]> {
  const taken = new Map<string, Told[]>(Object.keys(jobs).map((name) => [name, []]))
  await takeTurns(rounds, Object.entries(jobs), async ([name, job]) => {
    // As a file: it is too long for an argument.
    const path = join(folder, 'job.json')
    writeFileSync(path, JSON.stringify(job))
    const { stdout } = await run(process.execPath, [program, path], { maxBuffer: 64 * mib })
    const told = JSON.parse(stdout) as Told
    if (told.failed) throw new Error(`${name}: ${told.failed} recycles failed`)
    taken.get(name)?.push(told)
  })
  return (name) => taken.get(name) ?? []
}

function note(group: Group, name: string, calls: number, rounds: Told[]): void {
  const measures = group.measures ?? {}
  const measure = (what: string, unit: string, value: (told: Told) => number) => {
    const turns = rounds.map(value)
    measures[`${name}: ${what}`] = { unit, value: median(turns), turns } satisfies Measure
  }
  for (const [what, key] of [
    ['p50', 'p50'],
    ['p99', 'p99'],
    ['longest', 'longest'],
  ] as const) {
    group.standings[`${name}: latency, ${what}`] = standing(rounds.map((told) => told[key] * 1e6))
  }
  measure('throughput', 'a second', (told) => (calls / told.lastedMs) * 1e3)
  measure('peak resident set', 'MB', (told) => told.peak / 1e6)
  // Where it settles: the first quarter belongs to filling up.
  const settled = (told: Told) => told.resident.slice(Math.ceil(told.resident.length / 4))
  measure('resident set from the first quarter on, lowest', 'MB', (told) => Math.min(...settled(told)) / 1e6)
  measure('resident set from the first quarter on, highest', 'MB', (told) => Math.max(...settled(told)) / 1e6)
  measure('growth', 'MB', ({ resident }) => ((resident.at(-1) ?? 0) - (resident[0] ?? 0)) / 1e6)
  const reasons = new Set(rounds.flatMap((told) => Object.keys(told.recycles ?? {})))
  for (const reason of reasons) measure(`recycled, ${reason}`, '×', (told) => told.recycles?.[reason] ?? 0)
}

function standing(turns: number[]): Standing {
  return { ns: median(turns), turns }
}

/** Different ones, of a real file. */
function texts(): Job['pieces'] {
  const text = sample.toString()
  const count = 8
  const step = Math.floor((text.length - textSize) / (count - 1))
  return Array.from({ length: count }, (_, at) => {
    const input = text.slice(at * step, at * step + textSize)
    return { input, expected: convert(input) }
  })
}

/** What a conversion leaves behind, on V8. The converter is held to its contract here as well, in every length of UTF-8. */
function leakPerCall(pieces: Job['pieces']): number {
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(converter))
  const {
    memory,
    allocate,
    convert: converted,
  } = exports as {
    memory: WebAssembly.Memory
    allocate(size: number): number
    convert(at: number, size: number, cell: number): number
  }
  const strange = 'a<b> & "c"\nÄ € 😀 \u{10ffff}\n'
  const check = ({ input, expected }: Job['pieces'][number]) => {
    const bytes = new TextEncoder().encode(input)
    const at = allocate(bytes.length)
    new Uint8Array(memory.buffer, at, bytes.length).set(bytes)
    const cell = allocate(4)
    const out = converted(at, bytes.length, cell)
    const answer = Buffer.from(memory.buffer, out, new Uint32Array(memory.buffer, cell, 1)[0]).toString()
    if (answer !== expected) throw new Error('the converter and its contract differ')
  }
  check({ input: strange, expected: convert(strange) })
  const before = allocate(0)
  for (const piece of pieces) check(piece)
  return (allocate(0) - before) / pieces.length
}
