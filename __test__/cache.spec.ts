// What is kept between processes is run as it is: so only what this user has written runs, and all else is made again.
import assert from 'node:assert/strict'
import {
  chmodSync,
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryFolder, wat } from './guests.ts'
import { child, hasCode, LIMIT, reported, WasmModuleManager } from './support.ts'

const GOOD = 0x12345678
const EVIL = 0x06660666
const constant = (value: number) => wat(`(module (func (export "f") (result i32) (i32.const ${value})))`, `c${value}`)
const good = constant(GOOD)
const evil = constant(EVIL)

/** What a module says in a process of its own, which has nothing but the folder. */
async function said(source: string, cache: string): Promise<number> {
  return reported<number>(
    await child(
      `const manager = await WasmModuleManager.create(${JSON.stringify(source)}, { cache: ${JSON.stringify(cache)} })
      report(manager.callSync('f'))
      await manager.destroy()`,
    ),
  )
}

/** What is kept there, without the key. */
function entriesOf(cache: string): string[] {
  const folder = join(cache, 'modules')
  return readdirSync(folder)
    .filter((name) => name !== 'key')
    .map((name) => join(folder, name))
}

/** A folder with the entry of the good module, and another one's. */
async function filled(): Promise<{ cache: string; entry: string; other: string; bytes: Buffer }> {
  const cache = temporaryFolder('cache')
  assert.equal(await said(good, cache), GOOD)
  const [entry] = entriesOf(cache) as [string]
  assert.equal(await said(evil, cache), EVIL)
  const other = entriesOf(cache).find((path) => path !== entry) as string
  return { cache, entry, other, bytes: readFileSync(entry) }
}

function replaced(bytes: Buffer, from: number, to: number): Buffer {
  const changed = Buffer.from(bytes)
  let count = 0
  for (let at = 0; at + 4 <= changed.length; at += 1) {
    if (changed.readUInt32LE(at) !== from) continue
    changed.writeUInt32LE(to, at)
    count += 1
  }
  // Else this would show nothing.
  assert.ok(count > 0, 'the constant is nowhere in the entry')
  return changed
}

test('what was kept is read again by the next process, and not written anew', LIMIT, async () => {
  const { cache, entry } = await filled()
  const { ino, mtimeMs } = statSync(entry)
  assert.equal(await said(good, cache), GOOD)
  assert.deepEqual([statSync(entry).ino, statSync(entry).mtimeMs], [ino, mtimeMs])
  assert.equal(entriesOf(cache).length, 2)
})

test('an entry with other machine code, cut off, damaged or of something else is refused, made again and never run', {
  timeout: 110_000,
}, async () => {
  const { cache, entry, other, bytes } = await filled()
  const bit = Buffer.from(bytes)
  bit.writeUInt8(bit.readUInt8(bytes.length >> 1) ^ 4, bytes.length >> 1)
  const elsewhere = temporaryFolder('elsewhere')
  assert.equal(await said(good, elsewhere), GOOD)
  const foreign = readFileSync(entriesOf(elsewhere)[0] as string)
  const damages: [string, Buffer][] = [
    ['other machine code', replaced(bytes, GOOD, EVIL)],
    ['a bit', bit],
    ['cut off', bytes.subarray(0, bytes.length - 1)],
    ['cut off in the seal', bytes.subarray(0, 20)],
    ['empty', Buffer.alloc(0)],
    ['noise', Buffer.alloc(bytes.length, 0xcc)],
    ['more than there was', Buffer.concat([bytes, Buffer.from('more')])],
    // Whole, and of this very folder and user: but of another module.
    ['another module’s', readFileSync(other)],
    // Of this very module and user, but nobody knows who had that folder.
    ['of another folder', foreign],
  ]
  for (const [what, planted] of damages) {
    writeFileSync(entry, planted)
    assert.equal(await said(good, cache), GOOD, what)
    assert.ok(readFileSync(entry).equals(bytes), `${what}: not put right`)
  }
})

test(
  'what another version has kept is not even looked for, and planted under a name of this one it is refused',
  LIMIT,
  async () => {
    const { cache, entry, bytes } = await filled()
    // A name is a hash over versions, settings and module: another version's is another name.
    const old = join(cache, 'modules', 'f'.repeat(64))
    renameSync(entry, old)
    assert.equal(await said(good, cache), GOOD)
    assert.ok(readFileSync(entry).equals(bytes))
    copyFileSync(old, `${old.slice(0, -1)}e`)
    writeFileSync(entry, replaced(readFileSync(old), GOOD, EVIL))
    assert.equal(await said(good, cache), GOOD)
    assert.ok(readFileSync(entry).equals(bytes))
  },
)

test('without its key, or with another one, a folder is as good as empty', LIMIT, async () => {
  const { cache, entry, bytes } = await filled()
  const key = join(cache, 'modules', 'key')
  if (process.platform === 'win32') return
  for (const spoil of [() => rmSync(key), () => writeFileSync(key, Buffer.alloc(32, 1)), () => chmodSync(key, 0o644)]) {
    spoil()
    assert.equal(await said(good, cache), GOOD)
    assert.ok(!readFileSync(entry).equals(bytes), 'an entry under a key that is gone was kept')
  }
})

test(
  'what others could have written is refused: links, open files, and an open folder by its name',
  LIMIT,
  async () => {
    if (process.platform === 'win32') return
    const { cache, entry, other, bytes } = await filled()
    rmSync(entry)
    symlinkSync(other, entry)
    assert.equal(await said(good, cache), GOOD)
    assert.ok(readFileSync(entry).equals(bytes))
    writeFileSync(entry, bytes)
    chmodSync(entry, 0o666)
    assert.equal(await said(good, cache), GOOD)
    assert.equal(statSync(entry).mode & 0o077, 0)

    const open = temporaryFolder('open')
    mkdirSync(join(open, 'modules'))
    chmodSync(join(open, 'modules'), 0o777)
    const create = (folder: string) => () => WasmModuleManager.createSync(good, { cache: folder })
    assert.throws(create(open), hasCode('ERR_WASM_INVALID_ARGUMENT', /modules' is open to others \(mode 777\)/))
    const linked = temporaryFolder('linked')
    symlinkSync(join(cache, 'modules'), join(linked, 'modules'))
    assert.throws(create(linked), hasCode('ERR_WASM_INVALID_ARGUMENT', /modules' is a link/))
  },
)
