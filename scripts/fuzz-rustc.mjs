#!/usr/bin/env node
// The compiler as scripts/fuzz.mjs has cargo call it for the crates of this workspace, and for no other: what they do
// is counted for the fuzzer, and their assertions hold. So everything below them comes out of the one release build.
import { spawnSync } from 'node:child_process'

const [rustc, ...args] = process.argv.slice(2)
const name = args[args.indexOf('--crate-name') + 1]
const counted = [
  '-Cpasses=sancov-module',
  ...[
    'sanitizer-coverage-level=4',
    'sanitizer-coverage-inline-8bit-counters',
    'sanitizer-coverage-pc-table',
    'sanitizer-coverage-trace-compares',
  ].map((argument) => `-Cllvm-args=-${argument}`),
]
const asserted = ['-Cdebug-assertions=on', '-Coverflow-checks=on']
// Cargo also asks the compiler what it can do; and what runs while something is built is not fuzzed.
const isOurs = args.includes('--crate-name') && name !== '___' && name !== 'build_script_build'
// Cargo's job server speaks through descriptors that Node does not hand on.
const { CARGO_MAKEFLAGS, MAKEFLAGS, MFLAGS, ...env } = process.env
const done = spawnSync(rustc, isOurs ? [...args, ...counted, ...asserted] : args, { stdio: 'inherit', env })
if (done.error) throw done.error
process.exit(done.status ?? 1)
