// npm run lint: biome, clippy and the layer law. Warnings are failures here, so that they never pile up.
import { ensureDependencies, hostTarget, node, run, step, tool, workspace } from './tools.mjs'

ensureDependencies()
step('layers')
node(['scripts/layers.mjs'])
step('biome')
tool('@biomejs/biome', 'biome', ['lint', '--error-on-warnings'])
step('clippy')
run('cargo', ['clippy', '--release', ...workspace, '--all-targets', ...hostTarget, '--', '-D', 'warnings'])
// What only embedders in Rust switch on.
const tracing = ['--features', 'wasm-molt-engine/tracing']
run('cargo', ['clippy', '--release', ...workspace, ...tracing, ...hostTarget, '--', '-D', 'warnings'])
