// npm run test:nodes [22 24 …]: the JS tests on other lines of Node, which come from the npm package `node`.
import { nodeOfLine, run, step } from './tools.mjs'

const named = process.argv.slice(2)
for (const line of named.length > 0 ? named : ['22', '24', '26']) {
  step(`Node ${line}`)
  run(nodeOfLine(line), ['scripts/test.mjs', 'js'])
}
