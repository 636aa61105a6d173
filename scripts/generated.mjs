// Checks that what tools generate is as they would generate it now: the loader and its types, the platform packages.
// binding.* must equal what git has staged or committed; run after a build.
import { spawnSync } from 'node:child_process'
import { readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { fail, files, root, tool } from './tools.mjs'

const generated = ['binding.js', 'binding.d.ts']
const git = (...args) => spawnSync('git', args, { cwd: root, encoding: 'utf8' })

const known = git('ls-files', '--', ...generated)
  .stdout.split('\n')
  .filter(Boolean)
const unknown = generated.filter((path) => !known.includes(path))
if (unknown.length > 0) fail(`not in git: ${unknown.join(', ')}. Run: npm run build && git add ${unknown.join(' ')}`)
if (git('diff', '--quiet', '--', ...generated).status !== 0) {
  fail(
    `${git('diff', '--stat', '--', ...generated).stdout}The loader is not what this source builds. Run: npm run build && git add ${generated.join(' ')}`,
  )
}

// The tool writes below this folder only.
const fresh = 'target/npm'
rmSync(join(root, fresh), { recursive: true, force: true })
tool('@napi-rs/cli', 'napi', ['create-npm-dirs', '--npm-dir', fresh], { quiet: true })
const stale = files('npm', () => true).filter((path) => read(path) !== read(path.replace('npm', fresh)))
if (stale.length > 0) fail(`npm/ is not what package.json asks for: ${stale.join(', ')}. Run: npx napi create-npm-dirs`)
process.stdout.write('generated files: up to date\n')

function read(path) {
  try {
    return readFileSync(join(root, path), 'utf8')
  } catch {
    return undefined
  }
}
