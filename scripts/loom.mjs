// npm run loom: every interleaving of the gate and of the thread pool, up to a number of preemptions (LOOM_MAX_PREEMPTIONS, default 3).
import { run, step } from './tools.mjs'

step('loom')
run('cargo', ['test', '--release', '-p', 'wasm-molt-lifecycle', '--test', 'gate_loom', '--test', 'threads_loom'], {
  env: {
    RUSTFLAGS: `${process.env.RUSTFLAGS ?? ''} --cfg loom`.trim(),
    LOOM_MAX_PREEMPTIONS: process.env.LOOM_MAX_PREEMPTIONS ?? '3',
  },
})
