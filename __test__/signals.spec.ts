// Native addons that have signal handlers of their own, before us and after us, in one process with guests that trap.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { before, describe, test } from 'node:test'
import { temporaryFolder, wat } from './guests.ts'
import { type ChildOptions, child, type Ended, INDEX_URL, LIMIT, reported } from './support.ts'

/** Installs a handler for the signals that guests trap with, and can crash. Needs no header of Node's. */
const ADDON = `
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>
typedef struct env_ *env; typedef struct value_ *value; typedef struct info_ *info;
typedef value (*callback)(env, info);
int napi_create_function(env, const char *, size_t, callback, void *, value *);
int napi_set_named_property(env, value, const char *, value);
int napi_get_cb_info(env, info, size_t *, value *, value *, void **);
int napi_get_value_int32(env, value, int *);
int napi_create_int32(env, int, value *);

enum { CHAIN = 1, PLAIN = 2, SAME_STACK = 4, ONCE = 8 };
static const int signals[] = { SIGSEGV, SIGILL, SIGFPE };
static struct sigaction old[3];
static int options;
static volatile int seen;

static void handled(int signal, siginfo_t *info, void *context) {
  seen += 1;
  if (options & CHAIN) {
    for (int i = 0; i < 3; i += 1) if (signals[i] == signal) { old[i].sa_sigaction(signal, info, context); return; }
  }
  static const char text[] = "the addon's handler\\n";
  if (write(2, text, sizeof text - 1) < 0) _exit(78);
  if (!(options & ONCE)) _exit(77);
}
static void plain(int signal) { handled(signal, NULL, NULL); }

static value install(env e, info i) {
  value argument; size_t count = 1;
  napi_get_cb_info(e, i, &count, &argument, NULL, NULL);
  napi_get_value_int32(e, argument, &options);
  struct sigaction action;
  memset(&action, 0, sizeof action);
  if (options & PLAIN) action.sa_handler = plain;
  else { action.sa_sigaction = handled; action.sa_flags = SA_SIGINFO; }
  if (!(options & SAME_STACK)) action.sa_flags |= SA_ONSTACK;
  if (options & ONCE) action.sa_flags |= SA_RESETHAND;
  for (int n = 0; n < 3; n += 1) sigaction(signals[n], &action, &old[n]);
  return NULL;
}
static value crash(env e, info i) { *(volatile int *)16 = 1; return NULL; }
static value count(env e, info i) { value result; napi_create_int32(e, seen, &result); return result; }

value napi_register_module_v1(env e, value exports) {
  value f;
  napi_create_function(e, "install", 7, install, NULL, &f); napi_set_named_property(e, exports, "install", f);
  napi_create_function(e, "crash", 5, crash, NULL, &f); napi_set_named_property(e, exports, "crash", f);
  napi_create_function(e, "count", 5, count, NULL, &f); napi_set_named_property(e, exports, "count", f);
  return exports;
}
`

const text = (memory: string) => `(module
    (memory (export "memory") ${memory})
    (func (export "oob") (result i32) (i32.load (i32.const 0x7ffffff0)))
    (func (export "unreachable") unreachable)
    (func (export "divide") (param i32) (result i32) (i32.div_s (i32.const 1) (local.get 0)))
    (func $deep (export "deep") (result i32) (i32.add (call $deep) (i32.const 1)))
    (func (export "spin") (loop (br 0)))
    (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1))))`
const TRAPS = wat(text('1 1'), 'traps')

/** The same guest in glue, over a memory that its threads share. */
const GLUE = join(temporaryFolder('glue'), 'glue.cjs')
const bytes: Uint8Array = createRequire(import.meta.url)('../binding.js').__assemble(
  text('(import "env" "memory") 1 1 shared'),
)
writeFileSync(
  GLUE,
  `exports.memory = new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true })
  const bytes = Buffer.from('${Buffer.from(bytes).toString('base64')}', 'base64')
  exports.guest = new WebAssembly.Instance(new WebAssembly.Module(bytes), { env: { memory: exports.memory } }).exports`,
)

const CHAIN = 1
const PLAIN = 2
const SAME_STACK = 4
const ONCE = 8

const env: Record<string, string> = { TRAPS, GLUE }
/** With the crash that some of these end with, and no file of it. */
const CRASH: ChildOptions = { env, mayCrash: true, under: ['sh', '-c', 'ulimit -c 0; exec "$0" "$@"'] }
before(() => {
  const folder = temporaryFolder('addon')
  writeFileSync(join(folder, 'addon.c'), ADDON)
  // Twice, so that a process may have two of them: each is a library of its own.
  for (const name of ['ADDON', 'OTHER']) {
    const path = join(folder, `${name}.node`)
    const undefined_ = process.platform === 'darwin' ? ['-undefined', 'dynamic_lookup'] : []
    execFileSync('cc', ['-shared', '-fPIC', '-O1', ...undefined_, '-o', path, join(folder, 'addon.c')])
    env[name] = path
  }
})

/** `work(manager)`: every trap that is a signal, on both threads, interrupts, reloads and resets; what was seen of it. */
const WORK = `
  import { createRequire } from 'node:module'
  const require = createRequire(process.env.TRAPS)
  const create = () => WasmModuleManager.create(process.env.TRAPS, { cache: false, instances: 2 })
  const work = async (manager) => {
    const seen = new Set()
    for (let round = 0; round < 3; round += 1) {
      for (const name of ['oob', 'unreachable', 'divide', 'deep']) {
        try { manager.exports[name](0) } catch (error) { seen.add(error.trap) }
        await manager.call(name, [0]).catch((error) => seen.add(error.trap))
      }
      await manager.call('spin', [], { timeoutMs: 10 }).catch((error) => seen.add(error.code))
      await manager.reload()
      if (manager.exports.add(round, 1) !== round + 1) seen.add('a wrong sum')
    }
    return [...seen].sort()
  }
  const nodeToo = () => {
    // V8's own: a load out of bounds, as bytes.
    const bytes = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 127, 3, 2, 1, 0, 5, 3, 1, 0, 1, 7, 5, 1, 1, 102, 0, 0, 10, 13, 1, 11, 0, 65, 240, 255, 255, 255, 7, 40, 2, 0, 11)
    try { new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports.f() } catch (error) { return error instanceof WebAssembly.RuntimeError }
  }
`

/** `workInGlue(manager)`: the same of glue, on the JS thread and on threads of the guest. */
const WORK_IN_GLUE = `
  import { loadGlue } from ${JSON.stringify(INDEX_URL)}
  const loadIt = () => loadGlue(process.env.GLUE, { cache: false, engine: { threads: true }, limits: { timeoutMs: 30 } })
  const workInGlue = async (manager) => {
    const seen = new Set()
    const { guest } = manager.module
    for (const name of ['oob', 'unreachable', 'divide', 'deep']) {
      let count = 0
      try { guest[name](0) } catch (error) { seen.add(error.trap); count += 1 }
      await manager.spawn([[guest[name], 0]]).finished.catch((error) => { seen.add(error.trap); count += 1 })
      if (count !== 2) seen.add('no trap')
      await manager.reload()
    }
    try { guest.spin() } catch (error) { seen.add(error.code) }
    if (guest.add(2, 1) !== 3) seen.add('a wrong sum')
    return [...seen].sort()
  }
`
const ALL = ['ERR_WASM_TIMEOUT', 'integer-divide-by-zero', 'out-of-bounds-memory', 'stack-overflow', 'unreachable']

const diedOf = (ended: Ended) => [ended.code ?? ended.signal, /the addon's handler/.test(ended.stderr)]

describe('an addon with a signal handler of its own', { concurrency: 2 }, () => {
  for (const [what, options] of [
    ['that hands on', CHAIN],
    ['that hands nothing on', 0],
    ['that hands nothing on, without SA_SIGINFO', PLAIN],
    ['that hands nothing on, on the stack that runs', SAME_STACK],
  ] as const) {
    const crashes = options === CHAIN ? ['SIGSEGV', false] : [77, true]

    test(`${what}, loaded before us: traps are ours, its crash is its own`, LIMIT, async () => {
      const program = (end: string) => `${WORK}
        const addon = require(process.env.ADDON)
        addon.install(${options})
        const manager = await create()
        report([await work(manager), addon.count()])
        ${end}`
      const ended = await child(program('await manager.close()'), { env })
      assert.deepEqual(reported(ended), [ALL, 0])
      // A real crash in the addon, while guests run, is as it would be without us.
      const crashed = await child(program(`manager.call('spin').catch(() => {}); addon.crash()`), CRASH)
      assert.deepEqual(diedOf(crashed), crashes, crashed.stderr)
    })

    test(`${what}, loaded after us: traps of what is made or reloaded from then on are ours`, LIMIT, async () => {
      const program = (end: string) => `${WORK}
        const early = await create()
        const before = await work(early)
        const addon = require(process.env.ADDON)
        addon.install(${options})
        ${options === CHAIN ? '' : 'await early.reload()'}
        const traps = [before, await work(early), await work(await create())]
        report(traps)
        ${end}`
      const ended = await child(program('process.exit()'), { env })
      assert.deepEqual(reported(ended), [ALL, ALL, ALL])
      const crashed = await child(program(`early.call('spin').catch(() => {}); addon.crash()`), CRASH)
      assert.deepEqual(diedOf(crashed), crashes, crashed.stderr)
    })
  }

  for (const [what, options, crashes] of [
    ['that hands on', CHAIN, ['SIGSEGV', false]],
    ['that hands nothing on', 0, [77, true]],
  ] as const) {
    test(`${what}, before and after glue: traps of its guest, on threads as well, are ours`, LIMIT, async () => {
      for (const when of ['before', 'after']) {
        const program = `${WORK}${WORK_IN_GLUE}
          const addon = require(process.env.ADDON)
          ${when === 'before' ? `addon.install(${options})` : ''}
          const manager = await loadIt()
          ${when === 'before' ? '' : `await workInGlue(manager); addon.install(${options}); await manager.reload()`}
          report([await workInGlue(manager), addon.count()])
          manager.spawn([[manager.module.guest.spin]])
          addon.crash()`
        const ended = await child(program, CRASH)
        assert.ok(
          ended.stdout.includes(`REPORT ${JSON.stringify([ALL, 0])}`),
          `${when}: ${ended.stdout}${ended.stderr}`,
        )
        // Its own crash, while threads of the guest run, is as it would be without us.
        assert.deepEqual(diedOf(ended), crashes, ended.stderr)
      }
    })

    test(`${what}, in a program and its worker, which trap at the same time`, LIMIT, async () => {
      for (const where of ['the program', 'the worker']) {
        const install = (here: string) =>
          where === here ? `const addon = require(process.env.ADDON); addon.install(${options})` : ''
        const worker = `
          import { parentPort } from 'node:worker_threads'
          import { WasmModuleManager } from ${JSON.stringify(INDEX_URL)}
          ${WORK}${WORK_IN_GLUE}
          ${install('the worker')}
          parentPort.postMessage('there')
          parentPort.once('message', async () => {
            parentPort.postMessage([await work(await create()), await workInGlue(await loadIt())])
            ${where === 'the worker' ? `parentPort.once('message', () => addon.crash())` : ''}
          })`
        const program = `${WORK}${WORK_IN_GLUE}
          import { Worker } from 'node:worker_threads'
          ${install('the program')}
          const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(${JSON.stringify(worker)})))
          const said = () => new Promise((resolve) => worker.once('message', resolve))
          await said()
          worker.postMessage('work')
          report(await Promise.all([work(await create()), workInGlue(await loadIt()), said()]))
          ${where === 'the program' ? 'addon.crash()' : `worker.postMessage('crash')`}`
        const ended = await child(program, CRASH)
        const seen = JSON.stringify([ALL, ALL, [ALL, ALL]])
        assert.ok(ended.stdout.includes(`REPORT ${seen}`), `${where}: ${ended.stdout}${ended.stderr}`)
        assert.deepEqual(diedOf(ended), crashes, ended.stderr)
      }
    })
  }

  test('for one signal only: it gets that one, and the next is the end', LIMIT, async () => {
    const ended = await child(
      `${WORK}
      const manager = await create()
      const addon = require(process.env.ADDON)
      addon.install(${ONCE})
      await manager.reload()
      report(await work(manager))
      addon.crash()`,
      CRASH,
    )
    assert.deepEqual(diedOf(ended), ['SIGSEGV', true], ended.stderr)
    assert.match(ended.stdout, /REPORT \["ERR_WASM_TIMEOUT"/)
  })

  test('two of them after us, one after the other: each hands on to the one before it', LIMIT, async () => {
    const program = (first: number, second: number) => `${WORK}
      const manager = await create()
      const [one, two] = [require(process.env.ADDON), require(process.env.OTHER)]
      one.install(${first})
      await manager.reload()
      two.install(${second})
      await manager.reload()
      report(await work(manager))
      two.crash()`
    for (const [first, second, end] of [
      [CHAIN, CHAIN, ['SIGSEGV', false]],
      [0, CHAIN, [77, true]],
      [CHAIN, 0, [77, true]],
    ] as const) {
      const ended = await child(program(first, second), CRASH)
      assert.match(ended.stdout, /REPORT \["ERR_WASM_TIMEOUT"/, ended.stderr)
      assert.deepEqual(diedOf(ended), end, ended.stderr)
    }
  })

  test('again and again: an error says what to do, and nothing dies', LIMIT, async () => {
    const ended = await child(
      `${WORK}
      const manager = await create()
      const addons = [require(process.env.ADDON), require(process.env.OTHER)]
      const codes = []
      for (let i = 0; i < 6; i += 1) {
        addons[i % 2].install(0)
        await manager.reload().catch((error) => codes.push([error.code, error.cause.code, error.cause.message]))
      }
      const { length } = codes
      const safe = await WasmModuleManager.create(process.env.TRAPS, { cache: false, engine: { signalsBasedTraps: false } })
      report([length, codes[0], await work(safe)])`,
      { env },
    )
    const [length, [code, cause, message], traps] = reported<[number, string[], string[]]>(ended)
    assert.deepEqual([length, code, cause, traps], [2, 'ERR_WASM_RELOAD_FAILED', 'ERR_WASM_INVALID_ARGUMENT', ALL])
    assert.match(message as string, /SIGSEGV.*before wasm-molt.*signalsBasedTraps/)
  })

  test('a process that owns its signals has them to itself with signalsBasedTraps: false', LIMIT, async () => {
    const program = (end: string) => `${WORK}
      const addon = require(process.env.ADDON)
      const manager = await WasmModuleManager.create(process.env.TRAPS, { cache: false, engine: { signalsBasedTraps: false } })
      addon.install(0)
      report([await work(manager), addon.count()])
      ${end}`
    assert.deepEqual(reported(await child(program('process.exit()'), { env })), [ALL, 0])
    assert.deepEqual(diedOf(await child(program('addon.crash()'), CRASH)), [77, true])
  })

  test("V8's own traps go the way they went", LIMIT, async () => {
    const ended = await child(
      `${WORK}
      const manager = await create()
      const addon = require(process.env.ADDON)
      const seen = [nodeToo()]
      addon.install(${CHAIN})
      seen.push(nodeToo())
      await manager.reload()
      seen.push(nodeToo(), await work(manager), nodeToo())
      report(seen)`,
      { env },
    )
    assert.deepEqual(reported(ended), [true, true, true, ALL, true])
  })
})
