// What sources of glue were turned into, kept between processes: found again, and refused where it cannot be trusted.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import {
  chmodSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
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

/** The names of what is kept there. */
function keptIn(cache: string): string[] {
  return readdirSync(join(cache, 'glue'))
    .filter((name) => name !== 'key')
    .sort()
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
    assert.equal(keptIn(cache).length, 1)
  }
  assert.deepEqual(views[0], views[1])
  assert.equal(views[1]?.[1], 1)
})

test('it is found by its source, and is the user’s own', LIMIT, async () => {
  const cache = temporaryFolder('cache')
  await prepare(moduleFile('export const a = 1'), { cache })
  await prepare(moduleFile('export const a = 1'), { cache })
  assert.equal(keptIn(cache).length, 1)
  await prepare(moduleFile('export const a = 2'), { cache })
  const names = keptIn(cache)
  assert.equal(names.length, 2)
  if (process.platform !== 'win32') {
    for (const name of [...names, 'key']) assert.equal(statSync(join(cache, 'glue', name)).mode & 0o077, 0)
  }
})

test('what is damaged, cut off, foreign or writable by others is made again and never run', LIMIT, async () => {
  const file = moduleFile('export const safe = true')
  const cache = temporaryFolder('cache')
  await prepare(file, { cache })
  const [name] = keptIn(cache)
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

test('what is another source’s, another user’s or under another key is made again and never run', LIMIT, async () => {
  const cache = temporaryFolder('cache')
  const own = moduleFile('export const safe = true')
  for (const file of [own, moduleFile('export const safe = false')]) await prepare(file, { cache })
  const before = keptIn(cache)
  assert.equal(before.length, 2)
  const conversions = openConversions(cache)
  const isFound = () => conversions.find('module', 'export const safe = true') !== undefined
  assert.ok(isFound())

  // Whole, well made and this user’s, under the name of another.
  const [first, second] = before.map((name) => join(cache, 'glue', name)) as [string, string]
  const good = [readFileSync(first), readFileSync(second)] as const
  for (const [path, bytes] of [
    [first, good[1]],
    [second, good[0]],
  ] as const) {
    writeFileSync(path, bytes)
  }
  assert.ok(!isFound())
  assert.equal((await (await prepare(own, { cache })).evaluate(shadows)).safe, true)
  assert.ok(isFound())

  // Made elsewhere, of the very same source, to do something else.
  const elsewhere = temporaryFolder('elsewhere')
  const { find } = openConversions(elsewhere)
  openConversions(elsewhere).keep('module', 'export const safe = true', { text: ['throw 1'] })
  assert.ok(find('module', 'export const safe = true'))
  const [planted] = keptIn(elsewhere)
  assert.ok(before.includes(planted as string))
  writeFileSync(join(cache, 'glue', planted as string), readFileSync(join(elsewhere, 'glue', planted as string)))
  assert.ok(!isFound())
  assert.equal((await (await prepare(own, { cache })).evaluate(shadows)).safe, true)

  // A key that is not what it was opens nothing, and is followed by a new one.
  for (const damage of [Buffer.alloc(32, 7), Buffer.alloc(31), Buffer.alloc(0)]) {
    assert.ok(isFound())
    writeFileSync(join(cache, 'glue', 'key'), damage)
    assert.ok(!isFound())
    assert.equal((await (await prepare(own, { cache })).evaluate(shadows)).safe, true)
  }
  assert.ok(isFound())
  if (process.platform === 'win32') return
  chmodSync(join(cache, 'glue', 'key'), 0o644)
  assert.ok(!isFound())
  await prepare(own, { cache })
  assert.ok(isFound())

  // Even to a good file, a link is none.
  const path = join(cache, 'glue', planted as string)
  renameSync(path, join(cache, 'behind'))
  symlinkSync(join(cache, 'behind'), path)
  assert.ok(!isFound())
  // Reading a pipe with nobody at the other end would wait for ever.
  rmSync(path)
  execFileSync('mkfifo', [path])
  assert.ok(!isFound())
  assert.equal((await (await prepare(own, { cache })).evaluate(shadows)).safe, true)
  assert.ok(isFound())
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
