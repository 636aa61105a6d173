// npm run ready: everything that must hold before a change is offered; .ci/run runs it too. Quick checks first.
import { buildAddon, ensureDependencies, hostTarget, node, run, step } from './tools.mjs'

ensureDependencies()
node(['scripts/fmt.mjs', '--check'])
node(['scripts/lint.mjs'])
buildAddon()
node(['scripts/test.mjs'])
step('tracing')
const tracing = ['--features', 'wasm-molt-engine/tracing', '--test', 'trace']
run('cargo', ['test', '--release', '--workspace', ...tracing, ...hostTarget])
node(['scripts/loom.mjs'])
step('generated files')
node(['scripts/generated.mjs'])
step('package')
node(['scripts/pack.mjs'])
step('real packages')
node(['scripts/compat.mjs'])
step('o1js, its smallest rung')
node(['scripts/o1js.mjs', 'smoke'])
step('demo, short')
node(['scripts/demo.mjs', '--calls', '3000'])
step('benchmarks, one round each to see that they run')
node(['scripts/bench.mjs', '--smoke'])
