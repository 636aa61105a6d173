// npm run bench: sets itself up (the peers live in benchmark/package.json), then measures. Flags: benchmark/main.ts.
import { join } from 'node:path'
import { buildAddon, ensureDependencies, node, root, step, tool } from './tools.mjs'

buildAddon()
ensureDependencies(join(root, 'benchmark'))
ensureDependencies(join(root, 'compat'))
step('types of the benchmarks')
tool('typescript', 'tsc', ['-p', 'benchmark'])
step('benchmarks')
node(['--expose-gc', '--import', 'tsx', 'benchmark/main.ts', ...process.argv.slice(2)])
