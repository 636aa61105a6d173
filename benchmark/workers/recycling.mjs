// One contestant of the recycling group, in a process of its own: its resident set is nobody else's.
// node recycling.mjs JOB, a file of JSON; prints one line of JSON. Plain JavaScript, so that no compiler of TypeScript is in the figures.
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const job = JSON.parse(readFileSync(process.argv[2], 'utf8'))
const encoder = new TextEncoder()
const pieces = job.pieces.map(({ input, expected }) => ({
  input: encoder.encode(input),
  expected: encoder.encode(expected),
}))

let workers = 0
process.on('worker', () => {
  workers += 1
})

const contestants = {
  async plain() {
    const { open } = await import('./converter.mjs')
    const convert = open(readFileSync(job.guest))
    return { work: async (piece) => same(convert(piece.input), piece), end: async () => ({}) }
  },

  async manager() {
    const manager = await create()
    return { work: async (piece) => same(await manager.invoke('convert', piece.input), piece), end: () => end(manager) }
  },

  async gofmt() {
    const manager = await create()
    return {
      work: (piece) =>
        manager.use(async (instance) => {
          const { alloc, output_ptr, output_len, dispose } = instance.exports
          instance.memory.write(alloc(piece.input.length), piece.input)
          // Only the formatting itself goes to the pool; the rest is too short for the way there.
          await instance.call('format')
          same(instance.memory.read(output_ptr(), output_len()), piece)
          dispose()
        }),
      end: () => end(manager),
    }
  },

  /** The pool is replaced every N calls. The next one is started while the old one serves: the best that can be done by hand. */
  async piscina() {
    const { Piscina } = await import('piscina')
    // What runs is counted here: `close()` may end a pool while it does.
    const start = () => ({ pool: new Piscina(settings('piscina')), running: 0, drained: undefined })
    let serving = start()
    let calls = 0
    let isStarting = false
    let recycles = 0
    const ending = []
    const recycle = async () => {
      isStarting = true
      const next = start()
      await Promise.all(Array.from({ length: job.replicas }, () => next.pool.run(new Uint8Array(0))))
      const old = serving
      serving = next
      calls = 0
      isStarting = false
      recycles += 1
      if (old.running > 0) {
        await new Promise((resolve) => {
          old.drained = resolve
        })
      }
      await old.pool.destroy()
    }
    return {
      async work(piece) {
        calls += 1
        if (calls >= job.recycleCalls && !isStarting) ending.push(recycle())
        const mine = serving
        mine.running += 1
        try {
          same(await mine.pool.run(piece.input), piece)
        } finally {
          mine.running -= 1
          if (mine.running === 0) mine.drained?.()
        }
      },
      async end() {
        await Promise.all(ending)
        await serving.pool.destroy()
        return { recycles: { 'by hand': recycles }, workers }
      },
    }
  },

  async tinypool() {
    const { Tinypool } = await import('tinypool')
    const pool = new Tinypool({ ...settings('tinypool'), maxMemoryLimitBeforeRecycle: job.recycleBytes })
    return {
      work: async (piece) => same(await pool.run(piece.input), piece),
      async end() {
        const recycles = workers - job.replicas
        await pool.destroy()
        return { recycles: { 'by its limit': recycles }, workers }
      },
    }
  },
}

const { work, end: finish } = await contestants[job.contestant]()
// Everything is loaded, and has answered once for each caller, before anything is timed.
await Promise.all(Array.from({ length: job.callers }, (_, at) => work(pieces[at % pieces.length])))

const latencies = new Float64Array(job.calls)
const resident = [process.memoryUsage.rss()]
let asked = 0
let answered = 0
const begun = performance.now()
await Promise.all(Array.from({ length: job.callers }, call))
const lastedMs = performance.now() - begun
const told = await finish()
latencies.sort()
const at = (p) => latencies[Math.max(0, Math.ceil(p * latencies.length) - 1)]
process.stdout.write(
  JSON.stringify({ lastedMs, p50: at(0.5), p99: at(0.99), longest: at(1), resident, peak: peak(), ...told }),
)

async function call() {
  while (asked < job.calls) {
    const piece = pieces[asked++ % pieces.length]
    const start = performance.now()
    await work(piece)
    latencies[answered++] = performance.now() - start
    if (answered % job.sampleCalls === 0) resident.push(process.memoryUsage.rss())
  }
}

async function create() {
  const { WasmModuleManager } = await import('../../index.js')
  const { replicas: instances, recycle } = job
  return WasmModuleManager.create(job.guest, { instances, ...(recycle ? { recycle } : {}) })
}

async function end(manager) {
  // Recycles that are due go on for a moment after the last call.
  const { reloads, reloadsFailed, calls, pauseTime } = manager.stats()
  await manager.close()
  return { recycles: reloads, failed: reloadsFailed, completed: calls.completed, longestPause: pauseTime.max }
}

function settings(pool) {
  const filename = fileURLToPath(new URL('converter.mjs', import.meta.url))
  const workerData = { guest: readFileSync(job.guest), pool }
  return { filename, minThreads: job.replicas, maxThreads: job.replicas, workerData }
}

function same(answer, { expected }) {
  if (Buffer.compare(answer, expected) !== 0) throw new Error(`${job.contestant}: a wrong answer`)
}

/** maxRSS would be that of the process which started this one, if that was larger. */
function peak() {
  try {
    return Number(/^VmHWM:\s+(\d+)/m.exec(readFileSync('/proc/self/status', 'utf8'))[1]) * 1024
  } catch {
    return process.resourceUsage().maxRSS * 1024
  }
}
