// npm run soak: builds the addon and puts everything under load at once for a while. Flags: benchmark/soak.ts.
import { buildAddon, node, step } from './tools.mjs'

buildAddon()
step('soak')
node(['--expose-gc', '--import', 'tsx', 'benchmark/soak.ts', ...process.argv.slice(2)])
