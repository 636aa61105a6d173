'use strict'

// What the sources of glue were turned into, kept between processes beside the compiled modules: to read and rewrite
// them takes longer than everything else that a small package does at its first answer.
//
// A file of the folder is code that will run. So it is taken only if this user has written it: with a keyed hash over
// its name and content, whose key only this user can read, in a folder and a file that nobody else can write to.

const fs = require('node:fs')
const { homedir } = require('node:os')
const { join } = require('node:path')
const { deserialize, serialize } = require('node:v8')

/** Goes up with whatever changes what comes out. */
const FORMAT = 2
const DIGEST_BYTES = 32
const KEY_BYTES = 32
const KEY = 'key'
const MOST_KEPT = 1024
/** One write in so many looks whether there are too many. */
const PRUNE_EVERY = 32

// Loaded late: most packages of CommonJS never ask.
const crypto = () => require('node:crypto')

/** The user's cache folder; undefined where there is none. */
function userFolder() {
  const { env, platform } = process
  if (platform === 'win32') return env.LOCALAPPDATA && join(env.LOCALAPPDATA, 'wasm-molt', 'glue')
  if (env.XDG_CACHE_HOME) return join(env.XDG_CACHE_HOME, 'wasm-molt', 'glue')
  const home = homedir()
  if (!home) return undefined
  return join(home, platform === 'darwin' ? 'Library/Caches' : '.cache', 'wasm-molt', 'glue')
}

/**
 * Whether nobody but this user has had a hand in it.
 *
 * * `forbidden`: what others must not be allowed.
 */
function isOwn(stat, forbidden) {
  // The user's own folder keeps others out there.
  if (process.platform === 'win32') return true
  return stat.uid === process.geteuid() && (stat.mode & forbidden) === 0
}

/** A file that only this user can have written; undefined if it is none. */
function readOwn(path, forbidden) {
  const { O_RDONLY, O_NOFOLLOW = 0, O_NONBLOCK = 0 } = fs.constants
  // No link is followed, and nothing waits for the other end of a pipe.
  const file = fs.openSync(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
  try {
    // Of what was opened, not of what has that name by now.
    const stat = fs.fstatSync(file)
    return stat.isFile() && isOwn(stat, forbidden) ? fs.readFileSync(file) : undefined
  } finally {
    fs.closeSync(file)
  }
}

/** Puts a file in its place at once and whole. */
function writeOwn(path, bytes) {
  const early = `${path}.${crypto().randomBytes(6).toString('hex')}`
  try {
    fs.writeFileSync(early, bytes, { mode: 0o600, flag: 'wx' })
    fs.renameSync(early, path)
  } catch (error) {
    fs.rmSync(early, { force: true })
    throw error
  }
}

/** How the key of a folder is found, and made; undefined is one that is not there, or that others can read. */
function keyOf(folder) {
  const path = join(process.platform === 'win32' ? (userFolder() ?? folder) : folder, KEY)
  const find = () => {
    try {
      const key = readOwn(path, 0o077)
      return key?.length === KEY_BYTES ? key : undefined
    } catch {
      return undefined
    }
  }
  const make = () => {
    fs.mkdirSync(join(path, '..'), { recursive: true, mode: 0o700 })
    writeOwn(path, crypto().randomBytes(KEY_BYTES))
    // Another process may have been later: what it has put there is what counts.
    return find()
  }
  return { find, make }
}

/** `cache`: as the option of `loadGlue`. */
function openConversions(cache = true) {
  const folder = cache === true ? userFolder() : cache === false ? undefined : join(cache, 'glue')
  if (folder === undefined) return { find: () => undefined, keep() {} }
  const { find: findKey, make: makeKey } = keyOf(folder)
  const isTrusted = () => {
    const stat = fs.lstatSync(folder)
    return stat.isDirectory() && isOwn(stat, 0o022)
  }
  const nameOf = (kind, source) => {
    const hash = crypto().createHash('sha256').update(`${FORMAT} ${process.versions.node} ${kind}\n`)
    return hash.update(source).digest('hex')
  }
  // Over the name, too: a good file under another name is none.
  const seal = (key, name, content) => crypto().createHmac('sha256', key).update(`${name}\n`).update(content).digest()
  return {
    /** What was kept of that source; undefined if nothing was, or it cannot be trusted. */
    find(kind, source) {
      try {
        const name = nameOf(kind, source)
        const key = isTrusted() ? findKey() : undefined
        const bytes = key && readOwn(join(folder, name), 0o022)
        if (bytes === undefined) return undefined
        const content = bytes.subarray(DIGEST_BYTES)
        if (!crypto().timingSafeEqual(seal(key, name, content), bytes.subarray(0, DIGEST_BYTES))) return undefined
        const record = deserialize(content)
        return Array.isArray(record.text) ? record : undefined
      } catch {
        return undefined
      }
    },

    /** Where that is not possible, it is made again each time. */
    keep(kind, source, record) {
      try {
        const name = nameOf(kind, source)
        fs.mkdirSync(folder, { recursive: true, mode: 0o700 })
        const key = isTrusted() ? (findKey() ?? makeKey()) : undefined
        if (key === undefined) return
        const content = serialize(record)
        writeOwn(join(folder, name), Buffer.concat([seal(key, name, content), content]))
        if (Number.parseInt(name.slice(0, 2), 16) % PRUNE_EVERY === 0) prune(folder)
      } catch {
        // Read-only, full, or somebody else's.
      }
    },
  }
}

function prune(folder) {
  const names = fs.readdirSync(folder).filter((name) => name !== KEY)
  if (names.length <= MOST_KEPT) return
  const aged = names.map((name) => ({ path: join(folder, name), age: fs.statSync(join(folder, name)).mtimeMs }))
  aged.sort((a, b) => a.age - b.age)
  for (const { path } of aged.slice(0, names.length - MOST_KEPT / 2)) fs.rmSync(path, { force: true })
}

module.exports = { openConversions }
