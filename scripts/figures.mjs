// node scripts/figures.mjs: copies the reference figures (npm run bench -- --save) into the README's table.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fill, root } from './tools.mjs'

const result = JSON.parse(readFileSync(join(root, 'benchmark/results/reference.json'), 'utf8'))
const rows = result.groups.flatMap((group) => group.figures.map((figure) => [group.name.split(':')[0], figure]))
const table = [
  '| what | figure | goal |',
  '| --- | --- | --- |',
  ...rows.map(
    ([group, figure]) =>
      `| ${group}: ${figure.what} | ${number(figure.ms ?? figure.ratio)} ${unit(figure)} | ${goal(figure)} |`,
  ),
].join('\n')
const where = `Measured ${result.date.slice(0, 10)} on ${result.cores} cores (${result.cpu}), Node ${result.node}, ${result.system}, load ${Number(result.load ?? 0).toFixed(1)} when it began.`

const apart = result.groups.filter((group) => group.date !== undefined)
const others = apart.map((group) => `${group.name.split(':')[0]} on ${group.date.slice(0, 10)}`).join(', ')
const when = apart.length === 0 ? where : `${where}\nOn the same machine at another time: ${others}.`

fill('README.md', 'figures', `${when}\n\n${table}`)

function number(ratio) {
  return ratio >= 100 ? ratio.toFixed(0) : ratio.toPrecision(3)
}

function unit({ ms }) {
  return ms === undefined ? '×' : 'ms'
}

function goal({ goal, pass, ms }) {
  if (!goal) return ''
  const bound = `${goal.atMost === undefined ? `at least ${goal.atLeast}` : `at most ${goal.atMost}`} ${unit({ ms })}`
  return `${bound}: ${pass ? 'met' : 'missed'}`
}
