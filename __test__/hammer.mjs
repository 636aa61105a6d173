// Views in wrong hands, in random order: nothing that JavaScript does with them may end the process, show another
// life's bytes, or change them. A program of its own: it dies of what it looks for.
//
//   node --expose-gc __test__/hammer.mjs [--seed N] [--rounds N] [--workers N]
//
// The last line that it writes is a report; a failure names the seed and the last steps.
import assert from 'node:assert/strict'
import { createHash, randomFill } from 'node:crypto'
import { closeSync, openSync, read, readdirSync, readFileSync, unlinkSync, write, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs, promisify } from 'node:util'
import { isMainThread, MessageChannel, parentPort, receiveMessageOnPort, Worker, workerData } from 'node:worker_threads'
import { deflate } from 'node:zlib'
import { loadGlue, WasmModuleManager } from '../index.js'

const binding = createRequire(import.meta.url)('../binding.js')

const { values } = parseArgs({
  args: isMainThread ? process.argv.slice(2) : [],
  options: { seed: { type: 'string' }, rounds: { type: 'string' }, workers: { type: 'string' } },
})
const seed = workerData?.seed ?? Number(values.seed ?? Date.now() % 1_000_000_007)
const ROUNDS = Number(values.rounds ?? 3000)
const WORKERS = Number(values.workers ?? 20)

// Bun's workers do not have it.
const gc = globalThis.gc ?? (() => Bun.gc(true))

// ---------------------------------------------------------------- chance

let chance = seed >>> 0
/** mulberry32: the same numbers for the same seed. */
function random() {
  chance = (chance + 0x6d2b79f5) >>> 0
  let t = chance
  t = Math.imul(t ^ (t >>> 15), t | 1)
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
}
const below = (n) => Math.floor(random() * n)
const pick = (list) => list[below(list.length)]

const steps = []
function note(text) {
  steps.push(text)
  if (steps.length > 40) steps.shift()
}

// ---------------------------------------------------------------- guests

/** Fills its memory with a number, and counts the words that are another. */
const body = `
  (global $calls (mut i32) (i32.const 0))
  (func (export "fill") (param $tag i32) (local $at i32) (local $end i32)
    (local.set $end (i32.mul (memory.size) (i32.const 65536)))
    (loop $next
      (i32.store (local.get $at) (local.get $tag))
      (local.set $at (i32.add (local.get $at) (i32.const 4)))
      (br_if $next (i32.lt_u (local.get $at) (local.get $end)))))
  (func (export "others") (param $tag i32) (result i32) (local $at i32) (local $end i32) (local $n i32)
    (local.set $end (i32.mul (memory.size) (i32.const 65536)))
    (loop $next
      (if (i32.ne (i32.load (local.get $at)) (local.get $tag))
        (then (local.set $n (i32.add (local.get $n) (i32.const 1)))))
      (local.set $at (i32.add (local.get $at) (i32.const 4)))
      (br_if $next (i32.lt_u (local.get $at) (local.get $end))))
    (local.get $n))
  (func (export "grow") (result i32) (memory.grow (i32.const 1)))
  (func (export "boom") unreachable)
  (func (export "tick") (call $tick))`
const PAGES = 2
const MOST_PAGES = 24
const own = `(module (import "env" "tick" (func $tick)) (memory (export "memory") ${PAGES} ${MOST_PAGES})${body})`
const imported = (kind) =>
  `(module (import "env" "tick" (func $tick)) (import "env" "memory" (memory ${PAGES} ${MOST_PAGES} ${kind}))${body})`

const base64 = (text) => Buffer.from(binding.__assemble(text)).toString('base64')
const glue = (kind) => `
  exports.memory = new WebAssembly.Memory({ initial: ${PAGES}, maximum: ${MOST_PAGES}, shared: ${kind === 'shared'} })
  exports.empty = new WebAssembly.Memory({ initial: 0 })
  exports.tick = () => {}
  const bytes = Buffer.from('${base64(imported(kind))}', 'base64')
  const env = { memory: exports.memory, tick: () => exports.tick() }
  exports.guest = new WebAssembly.Instance(new WebAssembly.Module(bytes), { env }).exports`

const folder = isMainThread ? join(tmpdir(), `wasm-molt-hammer-${process.pid}`) : workerData.folder
const file = (name) => `${folder}-${name}`
if (isMainThread) {
  writeFileSync(file('plain.cjs'), glue(''))
  writeFileSync(file('shared.cjs'), glue('shared'))
  writeFileSync(file('written'), Buffer.alloc(1 << 21, 0xee))
  process.on('exit', () => {
    for (const name of ['plain.cjs', 'shared.cjs', 'written']) unlinkSync(file(name))
  })
}

// ---------------------------------------------------------------- what may be read

/** What we write through views ourselves. */
const WRITTEN = 0xeeeeeeee

/** From one replacement of a memory's contents to the next: what a view of that time may ever read. */
class Life {
  tags
  /** Somebody writes bytes that cannot be told from any others. */
  isNoise = false
  isWritten = false
  /** Where its memory is: how much native code is at work there, and in which round it was last. */
  place = { atWork: 0, round: -1 }
  constructor(...tags) {
    this.tags = new Set([0, WRITTEN, ...tags])
  }
  /** The life that a reset begins: the memory stays where it is, and Node's own threads go on writing there. */
  next(tag) {
    const next = new Life(tag)
    const { place } = this
    next.place = place
    if (place.atWork > 0 || place.round === roundsDone)
      Object.assign(next, { isNoise: this.isNoise, isWritten: this.isWritten })
    return next
  }
}

let lastTag = below(1 << 20)
function newTag() {
  lastTag += 1
  return lastTag | 0x1000000
}

const views = []
let roundsDone = 0

function check({ words, life, from }) {
  if (life.isNoise) return
  for (let at = 0; at < words.length; at += 1) {
    const word = words[at]
    assert.ok(life.tags.has(word), `${from}: ${word.toString(16)} at ${at * 4} is of another life`)
  }
}

function keep(buffer, life, from) {
  if (views.length >= 60) views.splice(below(views.length), 1)
  if (buffer.byteLength > 0) views.push({ words: new Uint32Array(buffer), life, from, isMoved: false })
}

// ---------------------------------------------------------------- scenes

const tick = () => {
  if (random() < 0.3) gc()
}

/** Something with a memory that is replaced, in all ways in which it can be. */
class Scene {
  life = new Life()
  /** What its memory is filled with. */
  tag = 0
  snapshotTag
  /** What calls have filled the other replica with, where there are two. */
  called = new Set()
  /** Generation and resets when this life began; where they are others, a policy has begun another one. */
  since = [0, 0]
  constructor(name) {
    this.name = name
  }
  get isRealm() {
    return this.manager.module !== undefined
  }
  get guest() {
    return this.isRealm ? this.manager.module.guest : this.manager.exports
  }
  get buffer() {
    return (this.isRealm ? this.manager.module.memory : this.manager.memory).buffer
  }
  get isIsolated() {
    return this.name === 'isolated'
  }
  /** A policy recycles it after any call; what calls on this thread bring about is done when they return. */
  follow() {
    if (this.name !== 'counted') return
    const [generation, resets] = this.now()
    if (generation !== this.since[0] || resets !== this.since[1]) anew(this, { isReset: generation === this.since[0] })
  }
  async settle() {
    while (this.manager.stats().recyclesDue > 0) await new Promise((resolve) => setImmediate(resolve))
    this.follow()
  }
  now() {
    const { generation, resets } = this.manager.stats()
    return [generation, resets]
  }
  take() {
    const { buffer } = this
    keep(buffer, this.life, `${this.name}, life of ${this.tag.toString(16)}`)
    if (this.isRealm) assert.equal(this.manager.module.empty.buffer.byteLength, 0)
  }
  fill() {
    this.tag = newTag()
    this.life.tags.add(this.tag)
    this.guest.fill(this.tag)
  }
  grow() {
    if (this.guest.grow() === -1) return
    this.follow()
    // Fresh pages are zeros until the next fill.
    this.fill()
  }
  /** Its contents are now what they were when that tag was written; nothing of the last life is in it. */
  begin(tag, { isReset = false } = {}) {
    const before = this.life
    // A realm's views stay attached over a reset: they show what it shows.
    const isInPlace = isReset && this.isRealm
    if (!isInPlace) this.life = isReset ? before.next(tag) : new Life(tag)
    this.called = new Set()
    this.life.tags.add(tag)
    this.tag = tag
    // Whoever enters first has what has trapped replaced, if nobody has yet.
    const others = this.guest.others(tag)
    this.since = this.now()
    for (const view of views) {
      if (view.life !== before || view.isMoved || isInPlace) continue
      if (isAtWork(view.words.buffer)) continue
      assert.equal(view.words.length, 0, `${view.from} is still attached`)
    }
    // What was moved out of a realm's memory is still its memory.
    if (!(this.life.isWritten || this.life.isNoise))
      assert.equal(others, 0, `${this.name} begins with ${others} words of others`)
  }
}

async function core(name, options = {}) {
  const scene = new Scene(name)
  scene.manager = await WasmModuleManager.create(binding.__assemble(own), {
    name,
    cache: false,
    imports: { env: { tick } },
    ...options,
  })
  return scene
}

async function realm(name, path, options = {}) {
  const scene = new Scene(name)
  scene.manager = await loadGlue(path, { name, ...options })
  return scene
}

const anew = (scene, how) => scene.begin(scene.snapshotTag ?? 0, how)

/** What ends a life. */
const ends = {
  reload: async (scene) => {
    await scene.manager.reload()
    if (scene.isRealm) scene.snapshotTag = undefined
    anew(scene)
  },
  rolling: async (scene) => {
    if (scene.isRealm) return
    await scene.manager.reload({ strategy: 'rolling' })
    anew(scene)
  },
  reloadSync: (scene) => {
    scene.manager.reloadSync()
    if (scene.isRealm) scene.snapshotTag = undefined
    anew(scene)
  },
  snapshot: async (scene) => {
    const snapshot = random() < 0.5 ? await scene.manager.snapshot() : scene.manager.snapshotSync?.()
    if (snapshot === undefined) return
    // Whoever writes through a view meanwhile is in it.
    scene.snapshotTag = scene.life.isWritten || scene.life.isNoise ? undefined : scene.tag
    if (scene.snapshotTag === undefined) {
      scene.manager.reloadSync({ skipSave: true })
      scene.snapshotTag = undefined
      await scene.remake()
    }
  },
  reset: async (scene) => {
    if (scene.snapshotTag === undefined) return
    await scene.manager.reset()
    scene.begin(scene.snapshotTag, { isReset: true })
  },
  resetSync: (scene) => {
    if (scene.snapshotTag === undefined) return
    scene.manager.resetSync()
    scene.begin(scene.snapshotTag, { isReset: true })
  },
  trap: async (scene) => {
    assert.throws(() => scene.guest.boom(), { code: 'ERR_WASM_TRAP' })
    // A realm goes on; and of two the other one, with what calls have left there.
    const { called } = scene
    if (!scene.isRealm) anew(scene)
    for (const tag of called) {
      scene.called.add(tag)
      scene.life.tags.add(tag)
    }
  },
  fork: async (scene) => {
    if (scene.isRealm) return
    const parent = scene.manager
    scene.manager = await parent.fork()
    await parent.destroy()
    scene.snapshotTag = scene.life.isWritten || scene.life.isNoise ? undefined : scene.tag
    if (scene.snapshotTag === undefined) await scene.remake()
    else anew(scene)
  },
  close: async (scene) => {
    await scene.remake(random() < 0.5 ? 'close' : 'destroy')
  },
}

// ---------------------------------------------------------------- wrong hands

/** A thread that reads and writes whatever it is handed, without end. */
const HANDS = `
  const { parentPort, receiveMessageOnPort } = require('node:worker_threads')
  const held = []
  let sum = 0
  const work = () => {
    for (let received; (received = receiveMessageOnPort(parentPort)); ) {
      held.push(new Int32Array(received.message))
      if (held.length > 12) held.shift()
    }
    for (const words of held)
      for (let at = 0; at < words.length; at += 97) {
        sum ^= Atomics.load(words, at)
        Atomics.store(words, at, ${WRITTEN | 0})
        sum ^= Atomics.compareExchange(words, at, ${WRITTEN | 0}, ${WRITTEN | 0})
      }
    setImmediate(work)
  }
  work()`
let hands

function handOver(buffer) {
  hands ??= new Worker(HANDS, { eval: true })
  hands.postMessage(buffer, [buffer])
}

const throughPort = (buffer) => {
  const { port1, port2 } = new MessageChannel()
  try {
    port1.postMessage(buffer, [buffer])
    return receiveMessageOnPort(port2).message
  } finally {
    port1.close()
  }
}

/** Node refuses to hand over a buffer of native code, but not what has been moved out of one. */
const movers = {
  clone: (buffer) => structuredClone(buffer, { transfer: [buffer] }),
  port: throughPort,
  transfer: (buffer) => buffer.transfer(),
  toFixedLength: (buffer) => buffer.transferToFixedLength(),
  twice: (buffer) => throughPort(buffer.transfer()),
  // The rest is given back to the old range.
  shorter: (buffer) => buffer.transfer(buffer.byteLength >> 1),
  away: (buffer) => {
    const moved = buffer.transfer()
    if (isMainThread) handOver(moved)
    else parentPort.postMessage(moved, [moved])
  },
}

function move(view) {
  const how = pick(Object.keys(movers))
  const { buffer } = view.words
  note(`move ${how} of ${view.from}`)
  let moved
  try {
    moved = movers[how](buffer)
  } catch (error) {
    assert.ok(['DataCloneError', 'TypeError'].includes(error.name), error)
    return
  }
  if (how === 'away') view.life.isWritten = true
  if (moved?.byteLength > 0) {
    view.words = new Uint32Array(moved)
    view.isMoved = true
  }
}

const errors = []
const under = new Set()
function later(promise) {
  const known = promise
    .catch((error) => {
      // Detached under way: an error, and no more.
      if (!/detach|EFAULT|EBADF|ERR_|invalid/i.test(`${error.code} ${error.message}`)) errors.push(error)
    })
    .finally(() => under.delete(known))
  under.add(known)
}

const source = openSync(file('written'), 'r')
const sink = openSync('/dev/null', 'w')
/** Node's own native code, on threads of its own, at work on what is detached meanwhile. */
const natives = {
  read: (view) => {
    view.life.isWritten = true
    return promisify(read)(source, new Uint8Array(view.words.buffer), 0, view.words.byteLength, 0)
  },
  write: (view) => promisify(write)(sink, new Uint8Array(view.words.buffer), 0, view.words.byteLength, null),
  random: (view) => {
    view.life.isNoise = true
    return promisify(randomFill)(new Uint8Array(view.words.buffer))
  },
  // In one piece: Node itself aborts if zlib comes back to a buffer that is detached (docs/api.md).
  deflate: (view) => promisify(deflate)(new Uint8Array(view.words.buffer), { chunkSize: 64 << 20 }),
  digest: (view) => crypto.subtle.digest('SHA-256', new Uint8Array(view.words.buffer)),
  hash: async (view) => createHash('sha256').update(new Uint8Array(view.words.buffer)).digest(),
}

/** Buffers that native code has had. Bun does not detach what such code works on: it shows pages of nobody. */
const atWork = new WeakSet()
const isAtWork = (buffer) => process.versions.bun !== undefined && atWork.has(buffer)

/** Those that it works on now, and how often. */
const worked = new Map()

const registry = new FinalizationRegistry(() => {})

const acts = {
  take: (scene) => scene.take(),
  fill: (scene) => scene.fill(),
  grow: (scene) => scene.grow(),
  tick: (scene) => scene.guest.tick(),
  call: async (scene) => {
    if (scene.isRealm) return
    const tag = newTag()
    scene.life.tags.add(tag)
    if (scene.name === 'two') scene.called.add(tag)
    await scene.manager.call('fill', [tag])
    // Nothing of it is left, nor of what was there before.
    if (scene.isIsolated) anew(scene, { isReset: true })
    // Of two the other one was free.
    else if (scene.name !== 'two') scene.tag = tag
  },
  lease: async (scene) => {
    if (scene.isRealm) return
    const lease = await scene.manager.acquire()
    const words = new Uint32Array(lease.memory.buffer)
    check({ words, life: scene.life, from: 'a lease' })
    registry.register(words, 0)
    if (random() < 0.3) {
      keep(lease.memory.buffer, scene.life, `a lease of ${scene.name}`)
    }
    lease.release()
    if (!isAtWork(words.buffer)) assert.equal(words.length, 0, 'the end of a lease detaches its views')
  },
  move: () => {
    // Node itself writes through the bare address of what it works on, wherever the bytes have been moved to since,
    // and freed: also with buffers that are nobody's but V8's.
    const idle = views.filter((view) => view.words.length > 0 && !worked.has(view.words.buffer))
    if (idle.length > 0) move(pick(idle))
  },
  put: () => {
    const attached = views.filter((view) => view.words.length > 0)
    if (attached.length === 0) return
    const view = pick(attached)
    view.life.isWritten = true
    note(`put through ${view.from}`)
    if (random() < 0.5) view.words.fill(WRITTEN)
    else for (let at = 0; at < view.words.length; at += 61) Atomics.store(view.words, at, WRITTEN)
  },
  native: () => {
    const attached = views.filter((view) => view.words.length > 0)
    if (attached.length === 0 || under.size > 8) return
    const how = pick(Object.keys(natives))
    note(`native ${how}`)
    const view = pick(attached)
    const { buffer } = view.words
    const { place } = view.life
    place.atWork += 1
    atWork.add(buffer)
    worked.set(buffer, (worked.get(buffer) ?? 0) + 1)
    later(
      natives[how](view).finally(() => {
        place.atWork -= 1
        place.round = roundsDone
        const left = worked.get(buffer) - 1
        if (left === 0) worked.delete(buffer)
        else worked.set(buffer, left)
      }),
    )
  },
  check: () => views.forEach(check),
  drop: () => views.splice(below(views.length + 1), 3),
  turn: () => new Promise((resolve) => setImmediate(resolve)),
  collect: () => gc(),
  hands: async () => {
    if (random() > 0.05 || hands === undefined) return
    const before = hands
    hands = undefined
    await before.terminate()
  },
}

const makers = {
  plain: (name) => core(name),
  two: (name) => core(name, { instances: 2, threads: 2 }),
  counted: (name) => {
    const strategy = pick(['exclusive', 'rolling', 'reset'])
    note(`recycled by ${strategy}`)
    return core(name, { recycle: { calls: 3, jitter: 0, strategy } })
  },
  small: (name) => core(name, { engine: { memoryReservationBytes: 1 << 20 } }),
  copied: (name) => core(name, { snapshots: { images: 'copy' } }),
  isolated: (name) => core(name, { isolation: 'per-call' }),
  checked: (name) => core(name, { engine: { signalsBasedTraps: false } }),
  glue: (name) => realm(name, file('plain.cjs')),
  'copied glue': (name) => realm(name, file('plain.cjs'), { snapshots: { images: 'copy' } }),
  shared: (name) => realm(name, file('shared.cjs'), { engine: { threads: true } }),
}

async function make() {
  const scenes = []
  for (const [name, maker] of Object.entries(makers)) {
    const scene = await maker(name)
    scene.since = scene.now()
    scene.remake = async (how = 'destroy') => {
      await scene.manager[how]()
      scene.manager = (await maker(name)).manager
      scene.snapshotTag = undefined
      anew(scene)
    }
    scenes.push(scene)
  }
  return scenes
}

const often = ['take', 'take', 'fill', 'move', 'move', 'put', 'native', 'check', 'tick', 'turn']

async function round(scenes) {
  roundsDone += 1
  const scene = pick(scenes)
  const isEnd = random() < 0.15
  const what = isEnd ? pick(Object.keys(ends)) : random() < 0.6 ? pick(often) : pick(Object.keys(acts))
  note(`${what} of ${scene.name}`)
  await (isEnd ? ends : acts)[what](scene)
  await scene.settle()
}

async function settle() {
  await Promise.all(under)
  for (let i = 0; i < 6; i += 1) {
    gc()
    await new Promise((resolve) => setImmediate(resolve))
  }
  assert.deepEqual(errors, [])
}

function held() {
  if (process.platform !== 'linux') return {}
  const status = readFileSync('/proc/self/status', 'utf8')
  const bytes = (key) => Number(new RegExp(`${key}:\\s+(\\d+)`).exec(status)[1]) * 1024
  return {
    resident: bytes('VmRSS'),
    space: bytes('VmSize'),
    mappings: readFileSync('/proc/self/maps', 'utf8').split('\n').length,
    threads: readdirSync('/proc/self/task').length,
  }
}

async function hammer(rounds, mark) {
  const scenes = await make()
  for (let at = 1; at <= rounds; at += 1) {
    await round(scenes)
    await mark?.(at)
  }
  for (const view of views) check(view)
  views.length = 0
  for (const scene of scenes) await scene.manager.destroy()
  await hands?.terminate()
  hands = undefined
  await settle()
}

// ---------------------------------------------------------------- environments that go in the middle

/** Workers that hammer, and end in the middle of it, each in another way; what they have handed over stays in use. */
async function workers(count) {
  const inherited = []
  const codes = []
  for (let index = 0; index < count; index += 1) {
    const how = ['terminate', 'exit', 'throw', 'fall'][index % 4]
    const data = { seed: below(1 << 30), folder, how, rounds: 5 + below(120) }
    note(`a worker: ${JSON.stringify(data)}`)
    const worker = new Worker(fileURLToPath(import.meta.url), { workerData: data })
    const ended = new Promise((resolve) => worker.once('exit', resolve))
    worker.on('error', (error) => assert.equal(error.message, 'on purpose', error))
    worker.on('message', (message) => {
      if (message === 'now') void worker.terminate()
      else inherited.push(new Uint32Array(message))
      if (inherited.length > 24) inherited.splice(below(inherited.length), 1)
    })
    codes.push(await ended)
    for (const words of inherited) {
      words.fill(WRITTEN)
      assert.ok(words.every((word) => word === WRITTEN))
    }
    gc()
  }
  inherited.length = 0
  await settle()
  return codes
}

async function worker({ how, rounds }) {
  process.on('exit', () => {
    for (const { words } of views) if (words.length > 0) words.fill(WRITTEN)
    gc()
  })
  if (how === 'terminate') setTimeout(() => parentPort.postMessage('now'), rounds)
  await hammer(how === 'terminate' ? Number.POSITIVE_INFINITY : rounds * 3, (at) => {
    if (at < rounds) return
    if (how === 'exit') process.exit(0)
    if (how === 'throw') throw new Error('on purpose')
  })
}

// ---------------------------------------------------------------- the program

async function program() {
  const readings = []
  // The same each time, so that what is left behind shows.
  const parts = 5
  for (let part = 0; part < parts; part += 1) {
    await hammer(Math.ceil(ROUNDS / parts))
    readings.push(held())
  }
  const codes = await workers(WORKERS)
  readings.push(held())
  closeSync(source)
  closeSync(sink)
  console.log(`REPORT ${JSON.stringify({ seed, rounds: ROUNDS, readings, codes })}`)
}

try {
  await (isMainThread ? program() : worker(workerData))
} catch (error) {
  if (error.message !== 'on purpose') console.error(`seed ${seed}, last steps:\n  ${steps.join('\n  ')}`)
  throw error
}
