// npm run loom: every interleaving of what threads share (crates/lifecycle/tests/*_loom.rs), up to a number of preemptions (LOOM_MAX_PREEMPTIONS, default 3).
import { basename } from 'node:path'
import { files, run, step } from './tools.mjs'

step('loom')
const models = files('crates/lifecycle/tests', (path) => path.endsWith('_loom.rs'))
const tests = models.flatMap((path) => ['--test', basename(path, '.rs')])
run('cargo', ['test', '--release', '-p', 'wasm-molt-lifecycle', ...tests], {
  env: {
    RUSTFLAGS: `${process.env.RUSTFLAGS ?? ''} --cfg loom`.trim(),
    LOOM_MAX_PREEMPTIONS: process.env.LOOM_MAX_PREEMPTIONS ?? '3',
  },
})
