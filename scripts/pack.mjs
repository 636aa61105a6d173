// Packs the package and this platform's binary as npm would publish them, installs both into an empty folder,
// and loads them there both ways. Catches a file that `files` forgot and a name that ES modules cannot see.
import { copyFileSync, cpSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fail, node, npm, root } from './tools.mjs'

const binary = readdirSync(root).find((name) => /^wasm-molt\.[\w-]+\.node$/.test(name))
if (!binary) fail('no addon in place. Run: npm run build')
const platform = binary.split('.').at(-2)

const folder = mkdtempSync(join(tmpdir(), 'wasm-molt-pack-'))
try {
  cpSync(join(root, 'npm', platform), join(folder, platform), { recursive: true })
  copyFileSync(join(root, binary), join(folder, platform, binary))
  writeFileSync(join(folder, 'package.json'), '{ "private": true }')
  for (const source of [root, join(folder, platform)]) {
    npm(['pack', source, '--silent', '--ignore-scripts', '--pack-destination', folder], { cwd: folder })
  }
  const tarballs = readdirSync(folder).filter((name) => name.endsWith('.tgz'))
  npm(['install', '--silent', '--no-audit', '--no-fund', ...tarballs.map((name) => `./${name}`)], { cwd: folder })
  writeFileSync(
    join(folder, 'load.cjs'),
    `const { WasmModuleManager, WasmError } = require('wasm-molt')
     if (typeof WasmModuleManager?.create !== 'function' || typeof WasmError !== 'function') throw new Error('require misses a name')`,
  )
  writeFileSync(
    join(folder, 'load.mjs'),
    `import { WasmError, WasmModuleManager } from 'wasm-molt'
     import { createRequire } from 'node:module'
     const required = createRequire(import.meta.url)('wasm-molt')
     if (required.WasmModuleManager !== WasmModuleManager || required.WasmError !== WasmError) throw new Error('import and require disagree')
     const add = '(module (func (export "add") (param i32 i32) (result i32) local.get 0 local.get 1 i32.add))'
     const { writeFileSync } = await import('node:fs')
     writeFileSync('add.wat', add)
     const manager = await WasmModuleManager.create('add.wat', { cache: false })
     const sum = await manager.call('add', [40, 2])
     await manager.close()
     if (sum !== 42) throw new Error('40 + 2 came out as ' + sum)
     const { loadGlue } = await import('wasm-molt')
     const { default: WebAssembly, Memory } = await import('wasm-molt/webassembly')
     if (WebAssembly.Memory !== Memory || new Memory({ initial: 1 }).buffer.byteLength !== 65536) throw new Error('wasm-molt/webassembly is another')
     writeFileSync('glue.cjs', 'exports.page = () => new WebAssembly.Memory({ initial: 1 }).buffer.byteLength')
     const glue = await loadGlue('./glue.cjs')
     if (glue.module.page() !== 65536) throw new Error('glue does not run')
     await glue.close()`,
  )
  node(['load.cjs'], { cwd: folder })
  node(['load.mjs'], { cwd: folder })
  node(['node_modules/wasm-molt/bin/wasm-molt.js', 'check', './glue.cjs', '--json'], { cwd: folder })
} finally {
  rmSync(folder, { recursive: true })
}
process.stdout.write('package: packs, installs, loads by require and import\n')
