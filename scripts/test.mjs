// npm test [rust|js|types …]: sets itself up, then runs the named suites, or all of them.
// npm run test:js -- __test__/reload.spec.ts runs one file; words with a dash go to the runner (node --test, cargo test).
import { existsSync } from 'node:fs'
import {
  buildAddon,
  ensureDependencies,
  fail,
  files,
  hostTarget,
  jobs,
  node,
  run,
  step,
  tool,
  workspace,
} from './tools.mjs'

const suites = { rust, types, js }
const words = process.argv.slice(2)
const named = words.filter((word) => word in suites)
const picked = words.filter((word) => !(word in suites))

ensureDependencies()
for (const [name, suite] of Object.entries(suites)) {
  if (named.length === 0 || named.includes(name)) suite()
}

/** In the release profile, because the addon has compiled the engine there already. */
function rust() {
  step('rust tests')
  run('cargo', ['test', '--release', ...workspace, ...hostTarget, ...(named.length === 1 ? picked : [])])
}

function types() {
  step('types')
  tool('typescript', 'tsc', ['-p', '.'])
}

function js() {
  buildAddon()
  const flags = picked.filter((word) => word.startsWith('-'))
  const chosen = picked.filter((word) => !word.startsWith('-'))
  const specs = chosen.length > 0 ? chosen : files('__test__', (path) => path.endsWith('.spec.ts'))
  const missing = specs.filter((path) => !existsSync(path))
  if (missing.length > 0) fail(`no such test file: ${missing.join(', ')}`)
  if (specs.length === 0) fail('no test files in __test__')
  step('js tests')
  // The leak tests need gc(); a test that hangs must fail, not wait.
  node([
    ...['--expose-gc', '--import', 'tsx', '--test'],
    ...['--test-reporter=spec', '--test-timeout=120000', `--test-concurrency=${jobs}`],
    ...flags,
    ...specs,
  ])
}
