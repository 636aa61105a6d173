'use strict'

// What the sources of glue were turned into, kept between processes beside the compiled modules: to read and rewrite
// them takes longer than everything else that a small package does at its first answer.
//
// A file of the folder is code that will run, so it must be the user's own and nobody else's to write; and whole.

const fs = require('node:fs')
const { homedir } = require('node:os')
const { join } = require('node:path')
const { deserialize, serialize } = require('node:v8')

/** Goes up with whatever changes what comes out. */
const FORMAT = 1
const DIGEST_BYTES = 32
const MOST_KEPT = 1024
/** One write in so many looks whether there are too many. */
const PRUNE_EVERY = 32

const digest = (...parts) => {
  // Loaded late: most packages of CommonJS never ask.
  const hash = require('node:crypto').createHash('sha256')
  for (const part of parts) hash.update(part)
  return hash.digest()
}

/** The user's cache folder; undefined where there is none. */
function userFolder() {
  const { env, platform } = process
  if (platform === 'win32') return env.LOCALAPPDATA && join(env.LOCALAPPDATA, 'wasm-molt', 'glue')
  if (env.XDG_CACHE_HOME) return join(env.XDG_CACHE_HOME, 'wasm-molt', 'glue')
  const home = homedir()
  if (!home) return undefined
  return join(home, platform === 'darwin' ? 'Library/Caches' : '.cache', 'wasm-molt', 'glue')
}

/** Whether nobody but this user can have written it. */
function isOwn(stat) {
  if (process.platform === 'win32') return true
  return stat.uid === process.getuid() && (stat.mode & 0o022) === 0
}

/** `cache`: as the option of `loadGlue`. */
function openConversions(cache = true) {
  const folder = cache === true ? userFolder() : cache === false ? undefined : join(cache, 'glue')
  if (folder === undefined) return { find: () => undefined, keep() {} }
  const pathOf = (kind, source) => {
    const name = digest(`${FORMAT} ${process.versions.node} ${kind}\n`, source).toString('hex')
    return join(folder, name)
  }
  return {
    /** What was kept of that source; undefined if nothing was, or it cannot be trusted. */
    find(kind, source) {
      try {
        const path = pathOf(kind, source)
        if (!isOwn(fs.statSync(folder)) || !isOwn(fs.lstatSync(path))) return undefined
        const bytes = fs.readFileSync(path)
        const content = bytes.subarray(DIGEST_BYTES)
        if (!digest(content).equals(bytes.subarray(0, DIGEST_BYTES))) return undefined
        const record = deserialize(content)
        return Array.isArray(record.text) ? record : undefined
      } catch {
        return undefined
      }
    },

    /** Where that is not possible, it is made again each time. */
    keep(kind, source, record) {
      try {
        const path = pathOf(kind, source)
        fs.mkdirSync(folder, { recursive: true, mode: 0o700 })
        const content = serialize(record)
        const mark = require('node:crypto').randomBytes(6)
        const early = `${path}.${mark.toString('hex')}`
        fs.writeFileSync(early, Buffer.concat([digest(content), content]), { mode: 0o600, flag: 'wx' })
        fs.renameSync(early, path)
        if (mark[0] % PRUNE_EVERY === 0) prune(folder)
      } catch {
        // Read-only, full, or somebody else's.
      }
    },
  }
}

function prune(folder) {
  const names = fs.readdirSync(folder)
  if (names.length <= MOST_KEPT) return
  const aged = names.map((name) => ({ path: join(folder, name), age: fs.statSync(join(folder, name)).mtimeMs }))
  aged.sort((a, b) => a.age - b.age)
  for (const { path } of aged.slice(0, names.length - MOST_KEPT / 2)) fs.rmSync(path, { force: true })
}

module.exports = { openConversions }
