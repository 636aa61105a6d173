// The timers of one generation: those of the platform, until there is nothing left for them to call.
import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { adder, temporaryFolder } from './guests.ts'
import { child, INDEX_URL, LIMIT, reported } from './support.ts'

type Shadows = Pick<
  typeof globalThis,
  'setTimeout' | 'setInterval' | 'setImmediate' | 'clearTimeout' | 'clearInterval' | 'clearImmediate'
>
interface Timers {
  shadows: Shadows
  expire(): void
}
const PATH = fileURLToPath(new URL('../lib/glue/timers.js', import.meta.url))
const { makeTimers } = createRequire(import.meta.url)(PATH) as { makeTimers(isOpen?: () => boolean): Timers }

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms))

/** The test's own timeout is the bound. */
async function until(look: () => boolean): Promise<void> {
  while (!look()) await pause(1)
}

test('they have the interface of the platform', LIMIT, async () => {
  const { shadows } = makeTimers()
  for (const [name, shadow] of Object.entries(shadows)) assert.equal(shadow.name, name)
  assert.throws(() => shadows.setTimeout(1 as never), { code: 'ERR_INVALID_ARG_TYPE' })
  const got = await new Promise<unknown[]>((resolve) => {
    const timer: NodeJS.Timeout = shadows.setTimeout(
      function (this: unknown, ...args: unknown[]) {
        resolve([this === timer, ...args])
      },
      1,
      'a',
      2,
    )
    assert.equal(timer.hasRef(), true)
    assert.equal(typeof timer[Symbol.toPrimitive](), 'number')
  })
  assert.deepEqual(got, [true, 'a', 2])
  assert.equal(await new Promise((resolve) => shadows.setImmediate(resolve, 3)), 3)
  let ticks = 0
  await new Promise<void>((resolve) => {
    const timer = shadows.setInterval(() => {
      ticks += 1
      if (ticks < 3) return
      shadows.clearInterval(timer)
      resolve()
    }, 1)
  })
  assert.equal(ticks, 3)
  assert.equal(await promisify(shadows.setTimeout)(1, 'x'), 'x')
  assert.equal(await promisify(shadows.setImmediate)('y'), 'y')
})

test('what is cleared does not run, by its object or its number', LIMIT, async () => {
  const { shadows } = makeTimers()
  const never = () => assert.fail('it was cleared')
  shadows.clearTimeout(shadows.setTimeout(never, 1))
  shadows.clearTimeout(shadows.setTimeout(never, 1)[Symbol.toPrimitive]())
  shadows.clearImmediate(shadows.setImmediate(never))
  shadows.clearTimeout(undefined)
  clearTimeout(shadows.setTimeout(never, 1))
  await pause(10)
})

test('what comes while the guest cannot be called comes as soon as it can, once', LIMIT, async () => {
  let open = false
  const { shadows } = makeTimers(() => open)
  const seen: string[] = []
  shadows.setTimeout(() => seen.push('timeout'), 1)
  shadows.setImmediate(() => seen.push('immediate'))
  const interval = shadows.setInterval(() => {
    seen.push('interval')
    shadows.clearInterval(interval)
  }, 1)
  const cleared = shadows.setTimeout(() => seen.push('cleared'), 1)
  await pause(30)
  assert.deepEqual(seen, [])
  shadows.clearTimeout(cleared)
  open = true
  await until(() => seen.length >= 3)
  await pause(10)
  assert.deepEqual(seen.sort(), ['immediate', 'interval', 'timeout'])
})

// In programs of their own: a test runner listens to what nobody catches as well.
const UNCAUGHT = `
  const seen = []
  process.on('uncaughtException', (error) => seen.push(error.message))
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
  const until = async (look) => { while (!look()) await pause(1) }
`

test('errors are the program’s while the generation lives, and nobody’s when it is gone', LIMIT, async () => {
  const ended = await child(`${UNCAUGHT}
    import { createRequire } from 'node:module'
    const { makeTimers } = createRequire(import.meta.url)(${JSON.stringify(PATH)})
    const timers = makeTimers()
    const { shadows } = timers
    const fail = () => {
      process.exitCode = 7
      throw new Error('gone')
    }
    let ticks = 0
    shadows.setTimeout(() => { throw new Error('alive') }, 1)
    await until(() => seen.length > 0)
    shadows.setTimeout(fail, 1)
    shadows.setImmediate(fail)
    shadows.setImmediate(async () => fail())
    shadows.setInterval(() => {
      ticks += 1
      fail()
    }, 1)
    let went = false
    shadows.setTimeout(() => { went = true }, 1)
    timers.expire()
    await until(() => went && ticks > 0)
    await pause(30)
    report({ seen, ticks })`)
  // The exit code is nobody's, too.
  assert.deepEqual(reported(ended), { seen: ['alive'], ticks: 1 })
})

test('timers that a reload leaves behind do not end the process', LIMIT, async () => {
  const folder = temporaryFolder('timers')
  writeFileSync(join(folder, 'package.json'), JSON.stringify({ name: 'timers', main: 'index.js' }))
  const bytes = `Buffer.from('${Buffer.from(adder()).toString('base64')}', 'base64')`
  writeFileSync(
    join(folder, 'index.js'),
    `const { add } = new WebAssembly.Instance(new WebAssembly.Module(${bytes})).exports
     exports.log = []
     const each = () => exports.log.push(add(1, 2))
     exports.start = () => { setTimeout(each, 20); setInterval(each, 20); globalThis.setTimeout(each, 20) }`,
  )
  const ended = await child(`${UNCAUGHT}
    import { loadGlue } from ${JSON.stringify(INDEX_URL)}
    const manager = await loadGlue(${JSON.stringify(folder)}, { cache: false })
    manager.module.start()
    const { log } = await manager.use((glue) => glue)
    await manager.reload()
    // On a slow machine they have run before that.
    const before = log.length
    await pause(80)
    const left = log.slice(before)
    manager.module.start()
    await until(() => manager.module.log.length >= 3)
    await manager.close()
    await pause(50)
    report({ seen, left })`)
  assert.deepEqual(reported(ended), { seen: [], left: [] })
})
