// npm run fuzz [target …] [-- --seconds 60 --jobs 2 --seed N]: builds the targets of fuzz/ and runs each for so long.
//   --input <file>: runs one input again, such as a crash that was found
//   --merge: takes what earlier runs have found into fuzz/corpus, where it is kept, as few files as say the same
// Linux and macOS: the fuzzer is LLVM's libFuzzer (the crate libfuzzer-sys), and needs a C++ compiler.
import { spawn, spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, readdirSync, renameSync, rmSync, statSync } from 'node:fs'
import { cpus } from 'node:os'
import { basename, join, relative } from 'node:path'
import { parseArgs } from 'node:util'
import { fail, files, hostTarget, root, run, step } from './tools.mjs'

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    seconds: { type: 'string', default: '60' },
    jobs: { type: 'string', default: String(Math.min(2, cpus().length)) },
    seed: { type: 'string', default: String(1 + Math.floor(Math.random() * 0x7fff_fffe)) },
    input: { type: 'string' },
    merge: { type: 'boolean', default: false },
  },
})
const known = files('fuzz/fuzz_targets', (path) => path.endsWith('.rs')).map((path) => basename(path, '.rs'))
const unknown = positionals.filter((name) => !known.includes(name))
if (unknown.length > 0) fail(`no such fuzz target: ${unknown.join(', ')}; there are: ${known.join(', ')}`)
const targets = positionals.length > 0 ? positionals : known
/** Larger inputs take longer and say no more: a few hundred decisions, or a small module. */
const LIMITS = ['-max_len=4096', '-timeout=60', '-rss_limit_mb=4096']
/** Inputs of one target in the repository: `npm test` runs all of them again, and a history takes a while. */
const MOST_KEPT = { modules: 250, values: 200, histories: 100, cache: 100 }

build()
if (options.input !== undefined) {
  if (targets.length !== 1) fail('--input needs the one target that it is for: npm run fuzz -- modules --input <file>')
  run(programOf(targets[0]), [options.input, ...LIMITS])
} else if (options.merge) {
  for (const target of targets) merge(target)
} else {
  await fuzz()
}

function build() {
  step('fuzz targets (with the release build of everything below them)')
  // All members are resolved together, as for the tests: a crate by itself could have the engine built anew.
  run('cargo', ['build', '--release', '--workspace', '--bins', ...hostTarget], {
    env: { RUSTC_WORKSPACE_WRAPPER: join(root, 'scripts/fuzz-rustc.mjs') },
  })
}

function programOf(target) {
  const said = spawnSync('rustc', ['-vV'], { encoding: 'utf8' }).stdout
  return join(root, 'target', /^host: (.+)$/m.exec(said)[1], 'release', target)
}

/** What was found on this machine, and what came with the repository. */
function foldersOf(target) {
  const found = join(root, 'target/fuzz/corpus', target)
  const kept = join(root, 'fuzz/corpus', target)
  const crashes = join(root, 'target/fuzz/crashes', target)
  for (const folder of [found, kept, crashes]) mkdirSync(folder, { recursive: true })
  return { found, kept, crashes }
}

async function fuzz() {
  step(`${targets.join(', ')}: ${options.seconds} s each, ${options.jobs} at a time, seed ${options.seed}`)
  const waiting = [...targets]
  const reports = []
  const work = async () => {
    for (let target = waiting.shift(); target !== undefined; target = waiting.shift()) {
      const report = await runOne(target)
      reports.push(report)
      const { executions, seconds, cpuSeconds, corpus, covered, rss, crashes } = report
      console.log(
        `${target}: ${executions} executions in ${seconds} s (${cpuSeconds} s of CPU), ${corpus} in the corpus, ` +
          `${covered} edges, ${rss} MB at most, ${crashes.length} crashes`,
      )
    }
  }
  await Promise.all(Array.from({ length: Number(options.jobs) }, work))
  const failed = reports.filter((report) => report.status !== 0)
  for (const { target, crashes, status, log } of failed) {
    console.log(`\n${target} failed (${status}):\n${log}`)
    for (const path of crashes) console.log(`again: npm run fuzz -- ${target} --input ${relative(root, path)}`)
  }
  if (failed.length > 0) fail(`fuzzing has found something: ${failed.map(({ target }) => target).join(', ')}`)
  console.log(`fuzz: ${reports.length} targets, no crash, seed ${options.seed}`)
}

function runOne(target) {
  const { found, kept, crashes } = foldersOf(target)
  const before = new Set(readdirSync(crashes))
  const args = [found, kept, ...LIMITS, `-max_total_time=${options.seconds}`, `-seed=${options.seed}`]
  const child = spawn(programOf(target), [...args, '-print_final_stats=1', `-artifact_prefix=${crashes}/`], {
    cwd: root,
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  let log = ''
  let covered = 0
  let cpuSeconds = 0
  child.stderr.setEncoding('utf8').on('data', (chunk) => {
    for (const [, edges] of chunk.matchAll(/cov: (\d+)/g)) covered = Number(edges)
    log = (log + chunk).slice(-20_000)
  })
  const timer = setInterval(() => (cpuSeconds = cpuOf(child.pid) ?? cpuSeconds), 1000)
  const started = performance.now()
  return new Promise((settle, refuse) => {
    child.on('error', refuse)
    child.on('close', (code, signal) => {
      clearInterval(timer)
      const stat = (name) => Number(new RegExp(`stat::${name}:\\s+(\\d+)`).exec(log)?.[1] ?? 0)
      settle({
        target,
        log: log.slice(-6000),
        status: code ?? signal,
        executions: stat('number_of_executed_units'),
        seconds: Math.round((performance.now() - started) / 1000),
        cpuSeconds,
        covered,
        rss: stat('peak_rss_mb'),
        corpus: readdirSync(found).length + readdirSync(kept).length,
        crashes: readdirSync(crashes)
          .filter((name) => !before.has(name))
          .map((name) => join(crashes, name)),
      })
    })
  })
}

/** Seconds of CPU that a process has had; undefined where the system does not tell. */
function cpuOf(pid) {
  const said = spawnSync('ps', ['-o', 'cputimes=', '-p', String(pid)], { encoding: 'utf8' }).stdout?.trim()
  return said ? Number(said) : undefined
}

function merge(target) {
  const { found, kept } = foldersOf(target)
  const fresh = join(root, 'target/fuzz/merged', target)
  rmSync(fresh, { recursive: true, force: true })
  mkdirSync(fresh, { recursive: true })
  step(`${target}: what says the same goes`)
  // The kept ones first: they stay where they are as good.
  run(programOf(target), ['-merge=1', ...LIMITS, fresh, kept, found])
  const sizeOf = (name) => statSync(join(fresh, name)).size
  const all = readdirSync(fresh).sort((a, b) => sizeOf(a) - sizeOf(b))
  // Beyond that some of every size: the smallest say little of what runs.
  const most = Math.min(all.length, MOST_KEPT[target])
  const chosen = new Set(Array.from({ length: most }, (_, index) => all[Math.floor((index * all.length) / most)]))
  for (const name of all) if (!chosen.has(name)) rmSync(join(fresh, name))
  // What a crash has left behind stays, whatever it covers.
  for (const name of readdirSync(kept)) {
    if (name.startsWith('regression-') && !existsSync(join(fresh, name))) cpSync(join(kept, name), join(fresh, name))
  }
  rmSync(kept, { recursive: true })
  renameSync(fresh, kept)
  const bytes = readdirSync(kept).reduce((sum, name) => sum + statSync(join(kept, name)).size, 0)
  console.log(`${target}: ${readdirSync(kept).length} files, ${bytes} bytes`)
}
