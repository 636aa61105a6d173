// npm run lint: biome, clippy and the layer law. Warnings are failures here, so that they never pile up.
import { ensureDependencies, node, run, step, tool } from './tools.mjs'

ensureDependencies()
step('layers')
node(['scripts/layers.mjs'])
step('biome')
tool('@biomejs/biome', 'biome', ['lint', '--error-on-warnings'])
step('clippy')
run('cargo', ['clippy', '--release', '--workspace', '--all-targets', '--', '-D', 'warnings'])
// What only embedders in Rust switch on.
run('cargo', ['clippy', '--release', '-p', 'wasm-molt-engine', '--features', 'tracing', '--', '-D', 'warnings'])
