// Programs that run JavaScript, as npm packages, in the versions that docs/runtimes.md speaks of.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fail, npm, root } from './tools.mjs'

const { arch, platform } = process
const exe = platform === 'win32' ? '.exe' : ''

const bunOn = `${platform === 'win32' ? 'windows' : platform}-${arch === 'arm64' ? 'aarch64' : arch}`
const denoOn = `${platform}-${arch}${platform === 'linux' ? '-glibc' : ''}`
const node = (version) => ({ title: 'Node', version, package: 'node', bin: `bin/node${exe}` })

export const programs = {
  node20: node('20.20.2'),
  node22: node('22.23.3'),
  node24: node('24.21.0'),
  node26: node('26.10.0'),
  bun: { title: 'Bun', version: '1.4.5', package: `@oven/bun-${bunOn}`, bin: `bin/bun${exe}` },
  deno: { title: 'Deno', version: '2.9.6', package: `@deno/${denoOn}`, bin: `deno${exe}` },
}

/** The newest line of Node, which CI runs besides the oldest. */
export const newestNode = Object.keys(programs).findLast((name) => programs[name].title === 'Node')

/** Where such a program is: this very one, or one that is fetched at first. */
export function programOf(name) {
  const program = programs[name]
  if (program === undefined) fail(`there is no runtime ${name}; there are ${Object.keys(programs).join(', ')}`)
  if (program.package === 'node' && program.version === process.versions.node) return process.execPath
  const folder = join(root, 'target', 'runtimes', `${name}-${program.version}`)
  const home = join(folder, 'node_modules', program.package)
  if (!isThere(home, program.version)) {
    mkdirSync(folder, { recursive: true })
    writeFileSync(join(folder, 'package.json'), '{ "private": true }')
    const wanted = `${program.package}@${program.version}`
    npm(['install', wanted, '--no-save', '--no-package-lock', '--loglevel=error'], { cwd: folder })
  }
  return join(home, program.bin)
}

function isThere(home, version) {
  const manifest = join(home, 'package.json')
  return existsSync(manifest) && JSON.parse(readFileSync(manifest, 'utf8')).version === version
}
