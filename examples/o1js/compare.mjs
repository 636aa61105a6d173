// The same work on o1js as it is and on this engine, in processes that take turns, on one Node and with as many threads.
// ROUNDS: pairs of processes. PROOFS: in each of them. The best time of each operation counts, as in benchmark/: so what
// another process takes away falls out.

import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { check, compile, finish, peakRss, program, say, settled, start, turn } from './common.mjs'

const SELF = fileURLToPath(import.meta.url)
const rounds = Number(process.env.ROUNDS ?? 2)
const proofs = Number(process.env.PROOFS ?? 3)
const ANSWER = 'figures: '

if (process.argv[2] === undefined) compare()
else await measure(process.argv[2] === 'plain')

async function measure(isPlain) {
  const { molt, o1js } = await start({ isPlain })
  const { Field } = o1js
  const figures = { compile: [], prove: [], verify: [], reset: [], settled: [], versions: process.versions.node }
  molt?.events.on('reset', ({ ms }) => figures.reset.push(ms))
  const small = program(o1js)
  await clocked(figures.compile, () => compile(o1js, small))
  for (let i = 0; i < proofs; i++) {
    const { proof } = await clocked(figures.prove, () => small.run(Field(i), Field(7)))
    check(await clocked(figures.verify, () => small.verify(proof)), 'it verifies')
    figures.settled.push(await settled())
  }
  figures.peak = peakRss()
  if (!isPlain) {
    // One reset with its threads running, as between the two halves of a proof; one reload at rest.
    molt.events.once('step', () => {
      const began = performance.now()
      molt.reset().then(() => {
        figures.resetWithPool = performance.now() - began
      })
    })
    const { proof } = await small.run(Field(99), Field(7))
    check(await small.verify(proof), 'it verifies')
    await turn()
    const began = performance.now()
    await molt.reload()
    figures.reload = performance.now() - began
    check(await small.verify(proof), 'after a reload, too')
  }
  await finish(molt)
  console.log(ANSWER + JSON.stringify(figures))
  // Plain o1js of 2.15 leaves its Workers running.
  process.exit(0)
}

async function clocked(into, act) {
  const [wall, cpu] = [performance.now(), process.cpuUsage()]
  const value = await act()
  // The reset belongs to the operation.
  await turn()
  const { user, system } = process.cpuUsage(cpu)
  into.push({ wall: (performance.now() - wall) / 1000, cpu: (user + system) / 1e6 })
  say(JSON.stringify(into.at(-1)))
  return value
}

function compare() {
  const sides = { plain: [], molt: [] }
  for (let round = 0; round < rounds; round++) {
    const order = round % 2 === 0 ? ['plain', 'molt'] : ['molt', 'plain']
    for (const side of order) {
      say(`round ${round + 1} of ${rounds}, ${side}`)
      const { stdout, status } = spawnSync(process.execPath, ['--expose-gc', SELF, side], {
        stdio: ['ignore', 'pipe', 'inherit'],
        encoding: 'utf8',
      })
      process.stdout.write(stdout)
      if (status !== 0) throw new Error(`${side} ended with ${status}`)
      sides[side].push(JSON.parse(stdout.slice(stdout.lastIndexOf(ANSWER) + ANSWER.length)))
    }
  }
  tell(sides)
}

function tell({ plain, molt }) {
  const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]
  const all = (side, name, unit) => side.flatMap((each) => each[name].map((one) => one[unit]))
  const rows = []
  const ratios = {}
  const row = (what, a, b, digits) => {
    ratios[what] = b / a
    rows.push([what, a.toFixed(digits), b.toFixed(digits), (b / a).toFixed(2)])
  }
  for (const name of ['compile', 'prove', 'verify']) {
    for (const unit of ['wall', 'cpu']) {
      const [a, b] = [plain, molt].map((side) => Math.min(...all(side, name, unit)))
      row(`${name}, ${unit === 'cpu' ? 'CPU' : 'wall'} s`, a, b, 2)
    }
  }
  const peak = (side) => median(side.map((each) => each.peak))
  row('peak RSS, MiB', peak(plain), peak(molt), 0)
  const last = (side) => median(side.map((each) => each.settled.at(-1)))
  row(`RSS settled after ${proofs} proofs, MiB`, last(plain), last(molt), 0)
  const own = (name) => median(molt.map((each) => each[name]))
  const reset = median(molt.flatMap((each) => each.reset))
  const worst = Math.max(...molt.flatMap((each) => each.reset))
  rows.push(['reset after an operation, ms', '', `${reset.toFixed(0)}, at most ${worst.toFixed(0)}`, ''])
  rows.push(['reset with the pool running, ms', '', own('resetWithPool').toFixed(0), ''])
  rows.push(['reload, ms', '', own('reload').toFixed(0), ''])
  const table = [['', 'plain', 'molt', 'ratio'], ['---', '---', '---', '---'], ...rows]
  console.log(`\n${table.map((cells) => `| ${cells.join(' | ')} |`).join('\n')}\n`)

  const isOld = Number(process.versions.node.split('.')[0]) < 24
  const limit = isOld ? 1 : 1.15
  const goals = [
    ...['compile', 'prove', 'verify'].flatMap((name) =>
      ['wall', 'CPU'].map((unit) => [
        `${name}, ${unit}: at most ${limit} of plain`,
        ratios[`${name}, ${unit} s`] <= limit,
      ]),
    ),
    ['reset with the pool running: under 100 ms', own('resetWithPool') < 100],
    ['each reset after an operation: under 100 ms', worst < 100],
  ]
  // Two are one step.
  const resident = molt[0].settled
  if (resident.length > 2) {
    const growth = resident.at(-1) - resident[1]
    goals.push([
      `settled RSS from proof 2 to ${resident.length}: ${growth} MiB, at most 5 %`,
      growth <= resident[1] / 20,
    ])
  }
  for (const [goal, isMet] of goals) console.log(`${isMet ? 'PASS' : 'MISS'} ${goal}`)
  const [met, missed] = [goals.filter(([, isMet]) => isMet).length, goals.filter(([, isMet]) => !isMet).length]
  console.log(
    `node v${process.versions.node}, notes: ${met} goals met, ${missed} missed; prove takes ${ratios['prove, wall s'].toFixed(2)} of plain's wall, ${ratios['prove, CPU s'].toFixed(2)} of its CPU`,
  )
}
