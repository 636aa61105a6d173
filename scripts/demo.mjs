// npm run demo: sets itself up, then shows the leaking formatter on both engines. Flags: examples/gofmt/main.ts.
import { buildAddon, node } from './tools.mjs'

buildAddon()
node(['--import', 'tsx', 'examples/gofmt/main.ts', ...process.argv.slice(2)])
