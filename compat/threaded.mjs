// node compat/threaded.mjs [--rounds 50]: a package with threads on native threads, against its build without on Node's engine.
// The parallel build of @jsquash/oxipng is wasm-bindgen-rayon, made for the web: Node's engine cannot run it unmodified.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { parseArgs } from 'node:util'
import { deflateSync } from 'node:zlib'
import { addon } from './engines.mjs'

const { values } = parseArgs({ options: { rounds: { type: 'string', default: '50' } } })
const rounds = Number(values.rounds)
const THREADS = 2
const resolve = createRequire(import.meta.url).resolve
const codec = (path) => resolve('@jsquash/oxipng/package.json').replace('package.json', `codec/${path}`)

const images = [picture(160, 120), picture(90, 200), picture(257, 64)]
const single = await import(codec('pkg/squoosh_oxipng.js'))
await single.default(readFileSync(codec('pkg/squoosh_oxipng_bg.wasm')))
const work = (glue, i) => Buffer.from(glue.optimise(images[i % images.length], 1 + (i % 2), false, false))
const expected = Array.from({ length: 6 }, (_, i) => work(single, i))

const wasm = readFileSync(codec('pkg-parallel/squoosh_oxipng_bg.wasm'))
const start = (glue) => glue.initThreadPool(THREADS)
const manager = await addon().loadGlue(codec('pkg-parallel/squoosh_oxipng.js'), {
  name: 'oxipng',
  engine: { threads: true },
  initialize: (glue) => glue.default(wasm),
  // rayon's global pool never exits: a snapshot is taken before there is one.
  threadPool: { start },
})
const glue = manager.module
let most = 0
function check(what, i) {
  const result = work(glue, i)
  most = Math.max(most, manager.stats().memoryBytes)
  if (Buffer.compare(result, expected[i % expected.length]) !== 0) throw new Error(`${what} ${i}: another result`)
  const { total } = manager.guestThreads
  if (total !== THREADS) throw new Error(`${what} ${i}: ${total} threads`)
}

await manager.snapshot()
await start(glue)
for (let i = 0; i < 12; i++) check('work', i)
for (let round = 0; round < rounds; round++) {
  const begun = performance.now()
  await manager.reset()
  if (performance.now() - begun > 1000) throw new Error(`a reset took ${performance.now() - begun} ms`)
  await poolOf(THREADS)
  check('reset', round)
}
for (let round = 0; round < rounds; round++) {
  await manager.reload()
  await poolOf(THREADS)
  check('reload', round)
}
const bound = 64 * 2 ** 20
if (most > bound) throw new Error(`memory reached ${most} bytes`)
await manager.close()
console.log(
  `oxipng, ${THREADS} native threads: the same ${expected.length} files over ${rounds} resets and ${rounds} reloads, ` +
    `${(most / 2 ** 20).toFixed(1)} MiB at most`,
)

/** The hook that starts the pool returns a promise, for which a reset does not wait. */
async function poolOf(count) {
  while (manager.guestThreads.total < count || manager.guestThreads.state !== 'running') {
    await new Promise(setImmediate)
  }
  // And what the glue does with them.
  await new Promise(setImmediate)
}

/** A PNG that is worth the trouble: gradients with some noise. */
function picture(width, height) {
  const table = Array.from({ length: 256 }, (_, n) => {
    let c = n
    for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1
    return c >>> 0
  })
  const crc = (bytes) => {
    let c = 0xffffffff
    for (const byte of bytes) c = table[(c ^ byte) & 255] ^ (c >>> 8)
    return (c ^ 0xffffffff) >>> 0
  }
  const chunk = (type, data) => {
    const out = Buffer.alloc(12 + data.length)
    out.writeUInt32BE(data.length, 0)
    out.write(type, 4, 'latin1')
    data.copy(out, 8)
    out.writeUInt32BE(crc(out.subarray(4, 8 + data.length)), 8 + data.length)
    return out
  }
  const header = Buffer.alloc(13)
  header.writeUInt32BE(width, 0)
  header.writeUInt32BE(height, 4)
  header.set([8, 6], 8)
  const rows = Buffer.alloc(height * (1 + width * 4))
  let state = 1
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      const pixel = [(x * 255) / width, (y * 255) / height, (state >>> 29) + ((x ^ y) & 31), 255]
      rows.set(pixel, y * (1 + width * 4) + 1 + x * 4)
    }
  }
  const signature = Buffer.from([137, 80, 78, 71, 13, 10, 26, 10])
  return Buffer.concat([
    signature,
    chunk('IHDR', header),
    chunk('IDAT', deflateSync(rows, { level: 1 })),
    chunk('IEND', Buffer.alloc(0)),
  ])
}
