// A process that the system refuses memory, files and threads: errors that say so, and what served serves on.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { workbench } from './guests.ts'
import { child, type Ended, LIMIT, littleSpace, reported } from './support.ts'

/** By step: how it ended, in a code of ours, 'ok', or whatever else was thrown. */
type Ends = [step: string, end: string, text: string][]

/** What the child does under its limits, and the way to set them: limits of its own process, only the soft ones. */
const STARVED = `
  import { execFileSync } from 'node:child_process'
  import { closeSync, openSync, readFileSync } from 'node:fs'
  const limit = (kind, soft) => {
    try {
      execFileSync('prlimit', ['--pid', String(process.pid), '--' + kind + '=' + soft + ':'])
    } catch (error) {
      // Bun opens one more descriptor for its child, which may have set the limit by then.
      if (process.versions.bun === undefined || error.code !== 'EMFILE') throw error
    }
  }
  const mapped = () => Number(/VmSize:\\s+(\\d+) kB/.exec(readFileSync('/proc/self/status', 'latin1'))[1]) * 1024
  const MiB = 1 << 20
  const GiB = 1 << 30
  const imports = { env: { entered: () => {}, hold: (key) => key } }
  const options = { cache: false, imports }
  const ends = []
  const step = async (name, run) => {
    try {
      const value = await run()
      ends.push([name, 'ok', ''])
      return value
    } catch (error) {
      const end = error instanceof WasmError ? error.code : 'not ours: ' + (error && error.stack)
      ends.push([name, end, String(error && error.message)])
    }
  }
  const change = async (manager, name) => {
    await step(name + ': call', () => manager.call('add', [1, 2]))
    await step(name + ': timeout', async () => {
      const error = await manager.call('spin', [], { timeoutMs: 1 }).then(() => null, (error) => error)
      if (error?.code !== 'ERR_WASM_TIMEOUT') throw error
    })
    await step(name + ': reload', () => manager.reload())
    await step(name + ': roll', () => manager.reload({ strategy: 'rolling' }))
    const snapshot = await step(name + ': snapshot', () => manager.snapshot())
    if (snapshot) await step(name + ': reset', () => manager.reset())
    const fork = await step(name + ': fork', () => manager.fork())
    if (fork) {
      await step(name + ': call of the fork', () => fork.call('add', [1, 2]))
      await step(name + ': close of the fork', () => fork.destroy())
    }
    await step(name + ': use', () => manager.use((instance) => instance.call('add', [1, 2])))
  }
  const story = async (old) => {
    await change(old, 'old')
    const young = await step('create', () => WasmModuleManager.create(process.env.WORKBENCH, options))
    if (young) {
      await change(young, 'young')
      await step('destroy', () => young.destroy())
    }
  }
  /** With all that it wants again. */
  const serves = async (manager, isSync = true) => {
    assert.equal(await manager.call('add', [40, 2]), 42)
    if (isSync) assert.equal(manager.callSync('add', [40, 2]), 42)
    await manager.reload()
    assert.equal(await manager.call('add', [40, 2]), 42)
    assert.equal(manager.state, 'ready')
  }
`

const env = { WORKBENCH: workbench }

/** Every step ended well or with an error of ours that says what to do; and some of each kind. */
function checkEnds(ended: Ended): Ends {
  const ends = reported<Ends>(ended)
  for (const [step, end, text] of ends) {
    assert.match(end, /^(ok|ERR_WASM_(LINK|INTERNAL|RELOAD_FAILED|SNAPSHOT_UNSUPPORTED|INTERRUPTED|TIMEOUT))$/, step)
    assert.doesNotMatch(text, /panic|should be impossible/, `${step}: ${text}`)
  }
  assert.ok(ends.some(([, end]) => end === 'ok'))
  assert.ok(
    ends.some(([, end]) => end !== 'ok'),
    'nothing was refused',
  )
  return ends
}

if (process.platform === 'linux') {
  test('address space that ends anywhere ends in errors, and the manager serves on', LIMIT, async () => {
    const ended = await child(
      `${STARVED}
      const old = await WasmModuleManager.create(process.env.WORKBENCH, options)
      for (const headroom of [0.3, 2, 4.6, 6.5, 8.8, 12.9, 17.3, 21.5, 26, 34, 43].map((size) => Math.round(size * GiB))) {
        limit('as', mapped() + headroom)
        await story(old)
        limit('as', 'unlimited')
        await serves(old)
      }
      await old.close()
      report(ends)
      `,
      { env, timeoutMs: 55_000 },
    )
    const ends = checkEnds(ended)
    const refused = ends.filter(([, end]) => end !== 'ok')
    assert.ok(refused.some(([step]) => step === 'create'))
    assert.ok(refused.some(([step]) => step === 'old: reload'))
    const create = refused.find(([step]) => step === 'create')
    assert.match(create?.[2] ?? '', /memoryReservationBytes/)
  })

  test('threads that cannot be had end in errors, and the manager serves on', LIMIT, async () => {
    const ended = await child(
      `${STARVED}
      // Their stacks are what there is no room for. This thread's own is smaller, so that nothing is called here.
      const large = { ...options, limits: { stackBytes: 256 * MiB }, engine: { memoryReservationBytes: 0 } }
      const old = WasmModuleManager.createSync(process.env.WORKBENCH, large)
      for (const threads of [0, 1, 2, 3, 4]) {
        limit('as', mapped() + 160 * MiB + threads * 258 * MiB)
        await change(old, threads + ' threads')
        limit('as', 'unlimited')
        await serves(old, false)
      }
      limit('as', mapped() + 160 * MiB)
      await step('close', () => old.close())
      await old.destroy()
      assert.equal(old.state, 'closed')
      limit('as', 'unlimited')
      report(ends)
      `,
      { env, timeoutMs: 55_000 },
    )
    const refused = checkEnds(ended).filter(([, end]) => end === 'ERR_WASM_INTERNAL')
    assert.ok(refused.length > 0)
    for (const [, , text] of refused) assert.match(text, /could not be started: .*raise the process limit/)
  })

  test('descriptors that are used up end in errors, and the manager serves on', LIMIT, async () => {
    const ended = await child(
      `${STARVED}
      const old = await WasmModuleManager.create(process.env.WORKBENCH, options)
      await serves(old)
      for (const more of [0, 1, 2, 3]) {
        // Kept for whoever sets the limit back. They are the lowest that were free, so that below the last none is.
        const spare = Array.from({ length: 32 }, () => openSync('/dev/null'))
        const used = spare[spare.length - 1] + 1
        limit('nofile', used + more)
        await change(old, more + ' more')
        for (const fd of spare) closeSync(fd)
        limit('nofile', 1024)
        await serves(old)
      }
      await old.close()
      report(ends)
      `,
      { env, timeoutMs: 55_000 },
    )
    checkEnds(ended)
  })

  test('files that may have no contents end in errors, and the manager serves on', LIMIT, async () => {
    const ended = await child(
      `${STARVED}
      const old = await WasmModuleManager.create(process.env.WORKBENCH, options)
      await serves(old)
      limit('fsize', 0)
      await change(old, 'no contents')
      limit('fsize', 'unlimited')
      await serves(old)
      await old.close()
      report(ends)
      `,
      { env, timeoutMs: 55_000 },
    )
    const ends = checkEnds(ended)
    assert.ok(ends.some(([step, end]) => step === 'no contents: snapshot' && end !== 'ok'))
  })

  test('a process that begins with too little says so, and serves with smaller reservations', LIMIT, async () => {
    const ended = await child(
      `${STARVED}
      await step('create', () => WasmModuleManager.create(process.env.WORKBENCH, options))
      const small = { ...options, engine: { memoryReservationBytes: 1 << 20 } }
      const manager = await WasmModuleManager.create(process.env.WORKBENCH, small)
      await serves(manager)
      await change(manager, 'small')
      await manager.close()
      report(ends)
      `,
      { env, ...(await littleSpace()), timeoutMs: 55_000 },
    )
    const [[step, end, text]] = checkEnds(ended) as [Ends[number]]
    assert.deepEqual([step, end], ['create', 'ERR_WASM_LINK'])
    assert.match(text, /memoryReservationBytes/)
  })
}
