// npm run bench:since -- COMMIT [GROUP…] [--rounds N] [--built]: the benchmarks of an earlier commit on its build, and ours on ours, by
// turns, so that whatever the machine does meanwhile meets both. Each turn is a process with one round of the groups, and the
// quickest of them counts: a shared machine runs at half its speed for seconds, and never at twice.
// --built: both are, and nothing is built. Writes benchmark/results/since.json and the table in docs/perf.md; the build of that commit is kept in target/since.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { fail, fill, node, root, run, step } from './tools.mjs'

/** Of what both have: ourselves, and V8 as a measure of the machine. */
const SHOWN = /manager|exclusive|rolling|no reload|interruptible|^V8/
const PEERS = /respawned|longest call|processor time/

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { rounds: { type: 'string', default: '5' }, built: { type: 'boolean', default: false } },
})
const [commit, ...groups] = positionals
if (commit === undefined) fail('usage: npm run bench:since -- COMMIT [GROUP…] [--rounds N] [--built]')
const rounds = Number(values.rounds)
if (!(Number.isInteger(rounds) && rounds > 0)) fail(`--rounds must be a positive whole number, not "${values.rounds}"`)

const then = join(root, 'target', 'since', git('rev-parse', '--short', commit))
if (!values.built) {
  prepare()
  node(['scripts/bench.mjs', '--smoke', ...groups])
}
/** By tree and row, what each round came to. */
const taken = new Map([then, root].map((tree) => [tree, new Map()]))
for (let round = 1; round <= rounds; round += 1) {
  step(`round ${round} of ${rounds}`)
  for (const [tree, rows] of taken) {
    for (const group of measure(tree).groups) {
      for (const [name, { ns }] of Object.entries(group.standings)) {
        const row = `${group.name.split(':')[0]}: ${name}`
        rows.set(row, [...(rows.get(row) ?? []), ns])
      }
    }
  }
}
publish()

function git(...args) {
  const { status, stdout, stderr } = spawnSync('git', args, { cwd: root, encoding: 'utf8' })
  if (status !== 0) fail(`git ${args.join(' ')}: ${stderr}`)
  return stdout.trim()
}

function prepare() {
  if (!existsSync(then)) {
    run('git', ['clone', '--quiet', '--no-checkout', root, then])
    run('git', ['checkout', '--quiet', commit], { cwd: then })
  }
  step(`the build of ${commit}`)
  node(['scripts/bench.mjs', '--smoke', ...groups], { cwd: then })
}

function measure(tree) {
  const results = join(tree, 'benchmark', 'results')
  const before = new Set(readdirSync(results))
  const flags = ['--expose-gc', '--import', 'tsx', 'benchmark/main.ts', ...groups, '--rounds', '1']
  run(process.execPath, flags, { cwd: tree, quiet: true })
  const [fresh] = readdirSync(results).filter((name) => !before.has(name))
  const path = join(results, fresh)
  const result = JSON.parse(readFileSync(path, 'utf8'))
  rmSync(path)
  return result
}

function publish() {
  const rows = [...taken.get(then)]
    .filter(([row]) => SHOWN.test(row.slice(row.indexOf(': ') + 2)) && !PEERS.test(row))
    .filter(([row]) => taken.get(root).has(row))
    .map(([row, before]) => [row, Math.min(...before), Math.min(...taken.get(root).get(row))])
  const facts = {
    commit: git('rev-parse', '--short', commit),
    head: git('rev-parse', '--short', 'HEAD'),
    date: new Date().toISOString().slice(0, 10),
    rounds,
  }
  const result = { ...facts, node: process.version, rows: rows.map(([what, a, b]) => ({ what, before: a, now: b })) }
  writeFileSync(join(root, 'benchmark/results/since.json'), `${JSON.stringify(result, null, 1)}\n`)
  const table = [
    `Measured ${facts.date}, ${facts.commit} (${git('show', '-s', '--format=%as', commit)}) and ${facts.head} by turns, the quickest of ${rounds} rounds each.`,
    '',
    '| what | then | now | now / then |',
    '| --- | --- | --- | --- |',
    ...rows.map(([what, a, b]) => `| ${what} | ${time(a)} | ${time(b)} | ${(b / a).toFixed(2)} |`),
  ].join('\n')
  fill('docs/perf.md', 'since', table)
  console.log(table)
}

function time(ns) {
  const [value, unit] = ns < 1e3 ? [ns, 'ns'] : ns < 1e6 ? [ns / 1e3, 'µs'] : [ns / 1e6, 'ms']
  return `${value.toPrecision(3)} ${unit}`
}
