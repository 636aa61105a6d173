// What sources of glue were turned into, kept between processes: found again, and refused where it cannot be trusted.
import assert from 'node:assert/strict'
import { chmodSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { test } from 'node:test'
import { loadGlue } from '../index.js'
import { temporaryFolder } from './guests.ts'
import { LIMIT } from './support.ts'

const require = createRequire(import.meta.url)
const { prepare } = require('../lib/glue/load.js')
const { openConversions } = require('../lib/glue/conversions.js')
const shadows = { WebAssembly, FinalizationRegistry }

function moduleFile(text: string): string {
  const path = join(temporaryFolder('converted'), 'glue.mjs')
  writeFileSync(path, text)
  return path
}

const source = `
  import { join } from 'node:path'
  export let count = 0
  export const add = () => (count += 1)
  export default class Thing { where() { return join('a', 'b') } }
  export * from 'node:url'
  export { sep as separator } from 'node:path'`

test('what was kept means the same as what was made', LIMIT, async () => {
  const file = moduleFile(source)
  const cache = temporaryFolder('cache')
  const views = []
  for (let round = 0; round < 2; round += 1) {
    const program = await prepare(file, { cache })
    const made = await program.evaluate(shadows)
    made.add()
    views.push([
      Object.keys(made).sort(),
      made.count,
      new made.default().where(),
      typeof made.fileURLToPath,
      made.separator,
    ])
    assert.equal(readdirSync(join(cache, 'glue')).length, 1)
  }
  assert.deepEqual(views[0], views[1])
  assert.equal(views[1]?.[1], 1)
})

test('it is found by its source, and is the user’s own', LIMIT, async () => {
  const cache = temporaryFolder('cache')
  await prepare(moduleFile('export const a = 1'), { cache })
  await prepare(moduleFile('export const a = 1'), { cache })
  assert.equal(readdirSync(join(cache, 'glue')).length, 1)
  await prepare(moduleFile('export const a = 2'), { cache })
  const names = readdirSync(join(cache, 'glue'))
  assert.equal(names.length, 2)
  if (process.platform !== 'win32') {
    for (const name of names) assert.equal(statSync(join(cache, 'glue', name)).mode & 0o077, 0)
  }
})

test('what is damaged, cut off, foreign or writable by others is made again and never run', LIMIT, async () => {
  const file = moduleFile('export const safe = true')
  const cache = temporaryFolder('cache')
  await prepare(file, { cache })
  const [name] = readdirSync(join(cache, 'glue'))
  const path = join(cache, 'glue', name as string)
  const good = readFileSync(path)
  const evil = Buffer.from(good)
  evil.writeUInt8(evil.readUInt8(evil.length - 8) ^ 1, evil.length - 8)
  for (const bytes of [evil, good.subarray(0, 40), Buffer.alloc(0), Buffer.from('text')]) {
    writeFileSync(path, bytes)
    const made = await (await prepare(file, { cache })).evaluate(shadows)
    assert.equal(made.safe, true)
    assert.deepEqual(readFileSync(path), good)
  }
  if (process.platform === 'win32') return
  const conversions = openConversions(cache)
  assert.ok(conversions.find('module', 'export const safe = true'))
  chmodSync(path, 0o666)
  assert.equal(conversions.find('module', 'export const safe = true'), undefined)
  chmodSync(path, 0o600)
  chmodSync(join(cache, 'glue'), 0o777)
  assert.equal(conversions.find('module', 'export const safe = true'), undefined)
})

test('a folder that cannot be used costs time and nothing else', LIMIT, async () => {
  const file = moduleFile('export const a = 1')
  const folder = temporaryFolder('cache')
  writeFileSync(join(folder, 'glue'), 'a file, not a folder')
  for (const cache of [folder, join(folder, 'glue', 'deeper'), false]) {
    assert.equal((await (await prepare(file, { cache })).evaluate(shadows)).a, 1)
  }
})

test('cache: false keeps nothing, and a folder keeps it there', LIMIT, async (t) => {
  const file = moduleFile('export const page = () => new WebAssembly.Memory({ initial: 1 }).buffer.byteLength')
  const cache = join(temporaryFolder('cache'), 'mine')
  mkdirSync(cache)
  for (const choice of [false, cache] as const) {
    const manager = await loadGlue<{ page(): number }>(file, { cache: choice })
    t.after(() => manager.destroy())
    assert.equal(manager.module.page(), 65536)
    assert.equal(readdirSync(cache).includes('glue'), choice !== false)
  }
})
