// npm run runners [jest|vitest …]: projects of users, with their test runners, against the package as it is installed.
import { spawnSync } from 'node:child_process'
import { copyFileSync, cpSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { buildAddon, ensureDependencies, fail, root, step } from './tools.mjs'

const folder = join(root, 'runners')
const installed = join(folder, 'node_modules')

const JEST = join(installed, 'jest', 'bin', 'jest.js')
const VITEST = join(installed, 'vitest', 'vitest.mjs')
/** Each way in which a runner spreads tests over processes, threads and realms. */
const runs = {
  jest: [
    [JEST, '--ci', '--runInBand', '--coverage', '--detectOpenHandles'],
    [JEST, '--ci', '--maxWorkers=2'],
    [JEST, '--ci', '--maxWorkers=2', '--workerThreads'],
  ],
  vitest: ['forks', 'threads', 'vmForks', 'vmThreads'].map((pool) => [
    ...[VITEST, 'run', `--pool=${pool}`, '--maxWorkers=2'],
    ...(pool === 'forks' ? ['--coverage'] : []),
  ]),
}

/** A run that ends well says none of these. */
const COMPLAINTS =
  /did not exit|open handle|failed to exit|force exited|close timed out|Unhandled|Segmentation|Assertion failed/i

const words = process.argv.slice(2)
const unknown = words.filter((word) => !(word in runs))
if (unknown.length > 0) fail(`no such test runner: ${unknown.join(', ')}; there are ${Object.keys(runs).join(' and ')}`)

install()
for (const name of words.length > 0 ? words : Object.keys(runs)) {
  for (const args of runs[name]) run(name, args)
}

/** As files under node_modules, which is where runners expect what is not the user's own. */
function install() {
  const binary = () => readdirSync(root).find((name) => /^wasm-molt\.[\w-]+\.node$/.test(name))
  if (binary() === undefined) buildAddon()
  ensureDependencies()
  ensureDependencies(folder)
  const place = join(installed, 'wasm-molt')
  rmSync(place, { recursive: true, force: true })
  mkdirSync(place)
  const { files } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
  for (const name of ['package.json', ...files]) cpSync(join(root, name), join(place, name), { recursive: true })
  copyFileSync(join(root, binary()), join(place, binary()))
}

function run(name, args) {
  step(`${name} ${args.slice(1).join(' ')}`)
  // A runner that hangs must fail, not wait.
  const options = { cwd: join(folder, name), encoding: 'utf8', timeout: 300_000, killSignal: 'SIGKILL' }
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, args, options)
  process.stderr.write(`${stdout}${stderr}`)
  if (status !== 0) fail(`${name} ended with ${signal ?? status}`)
  const complaint = COMPLAINTS.exec(`${stdout}${stderr}`)
  if (complaint) fail(`${name} complains: ${complaint[0]}`)
}
