// npm run soak: builds the addon, puts everything under load at once for a while, and keeps the seed. Flags: benchmark/soak.ts, and
//   --kept  first the seeds that have failed once (benchmark/soak/kept.json); with no other flag, nothing but these

import { spawnSync } from 'node:child_process'
import { appendFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buildAddon, ensureDependencies, root, step } from './tools.mjs'

/** A line for each run that there was. */
const seeds = join(root, 'benchmark', 'soak', 'seeds.jsonl')
const kept = join(root, 'benchmark', 'soak', 'kept.json')
/** Node 20 has `ArrayBuffer.prototype.transfer` behind a flag of V8. */
const transfer = 'transfer' in ArrayBuffer.prototype ? [] : ['--harmony-rab-gsab-transfer']

const flags = process.argv.slice(2)
const rest = flags.filter((flag) => flag !== '--kept')
buildAddon()
// Its real modules are those of the benchmarks.
ensureDependencies(join(root, 'benchmark'))
let isGood = true
if (rest.length < flags.length) {
  for (const { name, seed, minutes } of JSON.parse(readFileSync(kept, 'utf8'))) {
    step(`soak, kept: ${name}`)
    isGood = soak(['--seed', `${seed}`, '--minutes', `${minutes}`]) && isGood
  }
}
if (rest.length > 0 || rest.length === flags.length) {
  step('soak')
  isGood = soak(rest) && isGood
}
process.exit(isGood ? 0 : 1)

/** One run, in a process of its own, whose end is written down whatever it was. */
function soak(flags) {
  const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-soak-'))
  const record = join(folder, 'record.json')
  const node = ['--expose-gc', ...transfer, '--import', 'tsx', 'benchmark/soak.ts']
  const { status, signal } = spawnSync(process.execPath, [...node, ...flags, '--record', record], {
    cwd: root,
    stdio: 'inherit',
  })
  // Flags that cannot be used are no run.
  if (status !== 2) keep(JSON.parse(readFileSync(record, 'utf8')), signal ?? status)
  rmSync(folder, { recursive: true, force: true })
  return status === 0
}

function keep({ problems, ...run }, end) {
  const result = end === 0 ? 'passed' : typeof end === 'string' ? `died of ${end}` : 'failed'
  appendFileSync(seeds, `${JSON.stringify({ ...run, result, ...(end === 0 ? {} : { problems }) })}\n`)
  if (end === 0) return
  const all = existsSync(kept) ? JSON.parse(readFileSync(kept, 'utf8')) : []
  const { seed, minutes } = run
  if (all.some((one) => one.seed === seed)) return
  const [why = result] = problems
  all.push({ name: `seed ${seed}, to be named`, seed, minutes, why, test: '' })
  writeFileSync(kept, `${JSON.stringify(all, undefined, 2)}\n`)
}
