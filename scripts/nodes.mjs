// npm run test:nodes [22 24 …]: the JS tests on other lines of Node, which come from the npm package `node`.
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { npm, root, run, step } from './tools.mjs'

const named = process.argv.slice(2)
for (const line of named.length > 0 ? named : ['22', '24', '26']) {
  step(`Node ${line}`)
  const folder = join(root, 'target', 'nodes', line)
  mkdirSync(folder, { recursive: true })
  writeFileSync(join(folder, 'package.json'), '{ "private": true }')
  npm(['install', `node@${line}`, '--no-save', '--no-package-lock', '--loglevel=error'], { cwd: folder })
  const bin = join(folder, 'node_modules', 'node', 'bin', process.platform === 'win32' ? 'node.exe' : 'node')
  run(bin, ['scripts/test.mjs', 'js'])
}
