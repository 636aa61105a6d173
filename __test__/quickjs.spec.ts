// A guest that nobody here wrote: QuickJS, driven through its own exports, cold and warm.
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, type TestContext, test } from 'node:test'
import {
  callFunction,
  createFunction,
  createImports,
  evaluate,
  evaluateToValue,
  type HostFunction,
  heapBytes,
  nativeStackBytes,
  quickjsWasm,
  ScriptError,
  start,
} from '../examples/quickjs/guest.ts'
import { judge, type Outcome, userScript } from '../examples/quickjs/scripts.ts'
import { createWarm, type Warm, type WarmOptions } from '../examples/quickjs/warm.ts'
import { failure, LIMIT, managed, outcome, until } from './support.ts'

// Half a megabyte to compile, once for all tests.
const cache = mkdtempSync(join(tmpdir(), 'wasm-molt-quickjs-'))
after(() => rmSync(cache, { recursive: true, force: true }))

const article = (id: number) => `<li>Article ${id}: ${(1.99 + (id - 1) / 2).toFixed(2)} €</li>`
const renderArticle = (id: number) => `render('{{#each some}}{{> article}}{{/each}}', { some: [goods[${id - 1}]] })`

async function warm(t: TestContext, options: WarmOptions = {}): Promise<Warm> {
  const made = await createWarm({ cache, ...options })
  t.after(() => made.manager.destroy())
  return made
}

async function cold(t: TestContext, functions: HostFunction[] = []) {
  const manager = await managed(t, quickjsWasm, {
    cache,
    imports: createImports({ functions }),
    limits: { stackBytes: nativeStackBytes },
  })
  return { manager, interpreter: start(manager) }
}

function thrown(text: string | RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof ScriptError, String(error))
    if (typeof text === 'string') assert.equal(error.message, text)
    else assert.match(error.message, text)
    return true
  }
}

// ---------------------------------------------------------------- guest.ts

test('evaluate answers with the text of a value, and throws the text of an exception', LIMIT, async (t) => {
  const { manager, interpreter } = await cold(t)
  const run = (source: string) => evaluate(manager, interpreter, source)
  assert.equal(run('6 * 7'), '42')
  assert.equal(run('[1, "zwei", null, 4n]'), '1,zwei,,4')
  assert.equal(run('"grüße, 日本, 🎉"'), 'grüße, 日本, 🎉')
  assert.equal(run('undefined'), 'undefined')
  assert.equal(run('new Date(2024, 1, 29, 12).toISOString()'), '2024-02-29T12:00:00.000Z')
  assert.throws(() => run('null.x'), thrown(/^TypeError: /))
  assert.throws(() => run('throw "ärger"'), thrown('ärger'))
  assert.throws(() => run('no script'), thrown(/^SyntaxError: /))
  assert.equal(run('globalThis.kept = 1; kept + 1'), '2')
  assert.equal(run('kept + 2'), '3')
})

test('evaluate leaves nothing in the heap, whether it answers or throws', LIMIT, async (t) => {
  const { manager, interpreter } = await cold(t)
  const round = () => {
    evaluate(manager, interpreter, '"a text ".repeat(100)')
    assert.throws(() => evaluate(manager, interpreter, 'throw new Error("a text ".repeat(100))'), ScriptError)
    return heapBytes(manager, interpreter)
  }
  round()
  const before = round()
  for (let i = 0; i < 100; i += 1) round()
  assert.equal(round(), before)
})

test('guest code calls host functions, and can catch what they throw', LIMIT, async (t) => {
  const { manager, interpreter } = await cold(t, [
    (_, ...args) => args.join('+'),
    () => undefined,
    () => {
      throw new RangeError('not that one')
    },
  ])
  const functions = ['join', 'ignore', 'refuse'].map((name, at) => createFunction(manager, interpreter, at, name))
  const keep = '(...all) => { [globalThis.join, globalThis.ignore, globalThis.refuse] = all }'
  callFunction(manager, interpreter, evaluateToValue(manager, interpreter, keep, 'keep.js'), functions)
  const run = (source: string) => evaluate(manager, interpreter, source)
  assert.equal(run('join("ä", 2, null, [3, 4])'), 'ä+2+null+3,4')
  assert.equal(run('join()'), '')
  assert.equal(run('typeof ignore(1)'), 'undefined')
  assert.equal(run('try { refuse() } catch (error) { "caught " + error }'), 'caught RangeError: not that one')
  assert.throws(() => run('refuse()'), thrown('RangeError: not that one'))
  assert.equal(run('join({ toString() { throw "no text" } })'), '{}')
  assert.equal(run('join(1, 1)'), '1+1')
})

test('memory that is full is told by the guest: it cannot grow', LIMIT, async (t) => {
  const { manager, interpreter } = await cold(t)
  const before = manager.memory.byteLength
  const fill = 'for (const all = []; ; ) all.push(new Array(1000).fill(1))'
  assert.throws(() => evaluate(manager, interpreter, fill), thrown(/out of memory/))
  assert.equal(manager.memory.byteLength, before)
  assert.equal(evaluate(manager, interpreter, '1 + 1'), '2')
})

test('a copy of the memory is the whole interpreter, at the same addresses', LIMIT, async (t) => {
  const { manager, interpreter } = await cold(t)
  evaluate(manager, interpreter, 'globalThis.count = 41; globalThis.next = () => ++count')
  const image = manager.memory.read(0, manager.memory.byteLength)
  const copy = await managed(t, quickjsWasm, { cache, imports: createImports() })
  copy.memory.write(0, image)
  assert.equal(evaluate(copy, interpreter, 'next()'), '42')
  assert.equal(evaluate(copy, interpreter, '[3, 1, 2].sort((a, b) => a - b).map(String).join()'), '1,2,3')
  assert.equal(evaluate(manager, interpreter, 'count'), '41')
})

// ---------------------------------------------------------------- warm.ts

test('a script finds the library and the state that were loaded before it', LIMIT, async (t) => {
  const { run } = await warm(t)
  assert.equal(await run('Handlebars.VERSION'), '4.7.10')
  assert.equal(await run('goods.length'), '1000')
  assert.equal(await run(renderArticle(3)), article(3))
  assert.equal(await run('render("<b>{{name}}</b>", { name: "<ärger> 🎉" })'), '<b>&lt;ärger&gt; 🎉</b>')
  await assert.rejects(run('render("{{#if}")'), thrown(/^Error: Parse error on line 1/))
})

test('any text travels as it is, in both directions', LIMIT, async (t) => {
  const { run } = await warm(t, { sources: [] })
  const all = 'zero \0, quotes "\' \\, lines \r\n\u2028, ünï, 日本, 🎉, half \ud83c'
  assert.equal(await run(JSON.stringify(all)), all)
  assert.equal(await run(`${JSON.stringify(all)}.length`), String(all.length))
  assert.equal(await run(''), 'undefined')
  // Scripts travel in pieces: lengths around a whole number of them.
  for (const length of [8189, 8190, 8191, 16_382, 1_000_000]) {
    const long = 'ä'.repeat(length)
    assert.equal(await run(`'${long}'`), long)
  }
})

test('whatever a script throws comes back as text', LIMIT, async (t) => {
  const { run } = await warm(t, { sources: [] })
  await assert.rejects(run('null.x'), thrown(/^TypeError: /))
  await assert.rejects(run('throw "a \\0 text"'), thrown('a \0 text'))
  await assert.rejects(run('throw undefined'), thrown('undefined'))
  await assert.rejects(run('throw Symbol("s")'), thrown('Symbol(s)'))
  await assert.rejects(run('throw { toString() { throw 1 } }'), thrown('an exception without text'))
  await assert.rejects(run('({ toString() { throw new Error("mine") } })'), thrown('Error: mine'))
  assert.equal(await run('1 + 1'), '2')
})

test(
  'too deep a recursion and a full heap are exceptions of the script, and the instance serves on',
  LIMIT,
  async (t) => {
    const { manager, run } = await warm(t, { sources: [] })
    await assert.rejects(run('(function deeper() { return 1 + deeper() })()'), thrown('InternalError: stack overflow'))
    await assert.rejects(run('"[".repeat(1e5) + "1"; JSON.parse("[".repeat(1e5))'), thrown(/stack overflow/))
    await assert.rejects(run('for (const all = []; ; ) all.push(new Array(1000).fill(1))'), thrown(/out of memory/))
    assert.equal(await run('1 + 1'), '2')
    assert.equal(manager.generation, 1)
  },
)

test('a script cannot reach how it travels', LIMIT, async (t) => {
  const { run } = await warm(t, { sources: [] })
  await run(`
    Object.prototype.get = Object.prototype.toJSON = String.prototype.toJSON = String.prototype.toString = () => 'taken'
    JSON.stringify = Reflect.apply = String.fromCharCode = String = Function = eval = ArrayBuffer = undefined
  `)
  assert.equal(await run('"still mine"'), 'still mine')
  await assert.rejects(run('throw "still mine"'), thrown('still mine'))
  assert.equal(
    await run('[typeof next, typeof done, typeof mailbox, typeof head].join()'),
    Array(4).fill('undefined').join(),
  )
})

test('1,000 scripts at once each get their own answer', LIMIT, async (t) => {
  const { manager, run } = await warm(t)
  const ids = Array.from({ length: 1000 }, (_, at) => at + 1)
  const before = manager.stats().runTime.count
  assert.deepEqual(await Promise.all(ids.map((id) => run(renderArticle(id)))), ids.map(article))
  assert.equal(manager.stats().runTime.count - before, 1000)
})

test('a script leaves 16 bytes in an instance that is used again, and no more', LIMIT, async (t) => {
  const { manager, interpreter, run } = await warm(t, { sources: [] })
  const heap = () => manager.use((instance) => heapBytes(instance, interpreter))
  for (let i = 0; i < 10; i += 1) await run('"a text ".repeat(100)')
  const before = await heap()
  for (let i = 0; i < 100; i += 1) await run('"a text ".repeat(100)')
  assert.ok((await heap()) - before <= 1600, `${(await heap()) - before} bytes for 100 scripts`)
})

test(
  'an endless script is stopped by its timeout, and the next one finds a warm interpreter again',
  LIMIT,
  async (t) => {
    const { manager, run } = await warm(t)
    await run('goods.length = 1')
    await failure(run('for (;;) {}', { timeoutMs: 200 }), 'ERR_WASM_TIMEOUT')
    assert.equal(await run('goods.length'), '1000')
    assert.equal(await run(renderArticle(7)), article(7))
    assert.equal(manager.stats().reloads.trap, 1)
  },
)

test('an expression that never ends to match is stopped as well', LIMIT, async (t) => {
  const { run } = await warm(t, { sources: [] })
  await failure(run('/^(a+)+$/.test("a".repeat(40) + "b")', { timeoutMs: 200 }), 'ERR_WASM_TIMEOUT')
  assert.equal(await run('/^(a+)+$/.test("aaa")'), 'true')
})

test('two instances run two scripts at the same time, at the same addresses', LIMIT, async (t) => {
  const { manager, run } = await warm(t, { instances: 2, threads: 2 })
  const [one, two] = [new AbortController(), new AbortController()]
  const endless = [one, two].map(({ signal }) => outcome(run('for (;;) {}', { signal })))
  await until(() => manager.stats().instances.busy === 2)
  // One place is free again as soon as one of them is stopped: the other one still holds its own.
  one.abort(new Error('first'))
  assert.equal(await run(renderArticle(1)), article(1))
  assert.equal(manager.stats().instances.busy, 1)
  two.abort(new Error('second'))
  assert.deepEqual(
    (await Promise.all(endless)).map((end) => ('error' in end ? (end.error as Error).message : 'ended')),
    ['first', 'second'],
  )
  const ids = Array.from({ length: 200 }, (_, at) => at + 1)
  assert.deepEqual(await Promise.all(ids.map((id) => run(renderArticle(id)))), ids.map(article))
})

test('a reload makes a warm generation at the same addresses', LIMIT, async (t) => {
  const { manager, run } = await warm(t)
  await run('globalThis.kept = 1')
  await manager.reload()
  assert.equal(await run('typeof kept'), 'undefined')
  assert.equal(await run(renderArticle(2)), article(2))
})

// ---------------------------------------------------------------- warm.ts, isolated

const isolated: WarmOptions = { isolation: 'per-call' }

/** Runs the demo's scripts, which poison and leak, and answers with what each came to, and what it found of others. */
async function judged(run: Warm['run'], users: number[]) {
  return await Promise.all(
    users.map(async (user) => {
      const script = userScript(user)
      const outcome: Outcome = await run(script.text).then(
        (text) => ({ text }),
        (error: unknown) => {
          if (error instanceof ScriptError) return { exception: error.message }
          throw error
        },
      )
      return { user, ...judge(script, outcome) }
    }),
  )
}

function users(count: number): number[] {
  const all = Array.from({ length: count * 2 }, (_, at) => at + 1)
  return all.filter((user) => userScript(user).expected !== 'endless').slice(0, count)
}

test('1,000 scripts that poison and leak never see each other', LIMIT, async (t) => {
  const { manager, run } = await warm(t, { ...isolated, instances: 2 })
  const memoryBytes = manager.stats().memoryBytes
  const used = () => {
    const { pages } = manager.stats({ pages: true })
    return pages ? pages.privateBytes + pages.sharedBytes : 0
  }
  const all = users(1000)
  const bad = (results: Awaited<ReturnType<typeof judged>>) => results.filter((it) => !it.isRight || it.found)
  // Each instance has run each kind of script before memory is looked at.
  assert.deepEqual(bad(await judged(run, all.slice(0, 200))), [])
  const before = used()
  assert.deepEqual(bad(await judged(run, all.slice(200))), [])
  assert.equal(manager.stats().memoryBytes, memoryBytes)
  // The largest script needs 1.6 MB more than the others; 800 scripts that kept theirs would need 280.
  assert.ok(used() - before < 2 * 2 ** 20, `${used() - before} bytes more after 800 scripts`)
  assert.equal(manager.generation, 1)
})

test('the same scripts do see each other in a shared interpreter', LIMIT, async (t) => {
  const { run } = await warm(t)
  const found = (await judged(run, users(20))).map((it) => it.found).join(' ')
  for (const thing of ['visitors', 'Object.prototype', 'JSON.stringify', 'Array.prototype.map', 'price']) {
    assert.ok(found.includes(thing), `${thing} in ${found}`)
  }
})

test('an isolated script leaves nothing in the heap, whether it answers or throws', LIMIT, async (t) => {
  const { manager, interpreter, run } = await warm(t, isolated)
  const heap = () => manager.use((instance) => heapBytes(instance, interpreter))
  const before = await heap()
  for (let i = 0; i < 20; i += 1) {
    await run('globalThis.kept = "a text ".repeat(100)')
    await assert.rejects(run('globalThis.kept = new Array(1000).fill(1); null.x'), ScriptError)
    assert.equal(await run('typeof kept'), 'undefined')
  }
  assert.equal(await heap(), before)
})

test('an endless script is stopped and leaves nothing, in the same generation', LIMIT, async (t) => {
  const { manager, run } = await warm(t, isolated)
  const endless = 'globalThis.kept = 1; goods.length = 0; Array.prototype.map = undefined; for (;;) {}'
  for (let i = 0; i < 3; i += 1) {
    await failure(run(endless, { timeoutMs: 100 }), 'ERR_WASM_TIMEOUT')
    assert.equal(await run('typeof kept'), 'undefined')
    assert.equal(await run(renderArticle(7 + i)), article(7 + i))
  }
  assert.equal(manager.generation, 1)
  assert.deepEqual(manager.stats().reloads, {})
})

test('a full heap is the end of one isolated script only', LIMIT, async (t) => {
  const { run } = await warm(t, isolated)
  const fill = 'globalThis.all = []; for (;;) all.push(new Array(1000).fill(1))'
  for (let i = 0; i < 3; i += 1) {
    await assert.rejects(run(fill), thrown(/out of memory/))
    assert.equal(await run(renderArticle(3)), article(3))
  }
})

for (const isolation of ['shared', 'per-call'] as const) {
  test(`Math.random differs from script to script, from copy to copy (${isolation})`, LIMIT, async (t) => {
    const { manager, run, fork } = await warm(t, { sources: [], isolation, instances: 2 })
    if (isolation === 'shared') await manager.snapshot()
    const child = await fork()
    t.after(() => child.manager.destroy())
    const drawn: string[] = []
    for (let i = 0; i < 20; i += 1) {
      drawn.push(await run('Math.random()'), await child.run('Math.random()'))
      if (isolation === 'shared') await manager.reset()
    }
    drawn.push(...(await run('Array.from({ length: 1000 }, Math.random).join()')).split(','))
    assert.equal(new Set(drawn).size, drawn.length)
    const numbers = drawn.map(Number)
    assert.ok(numbers.every((number) => number >= 0 && number < 1))
    const mean = numbers.reduce((sum, number) => sum + number) / numbers.length
    // 0.009 is one standard deviation.
    assert.ok(Math.abs(mean - 0.5) < 0.1, `a mean of ${mean}`)
  })
}

// ---------------------------------------------------------------- warm.ts, copies

for (const isolation of ['shared', 'per-call'] as const) {
  test(`a fork is a warm interpreter of its own (${isolation})`, LIMIT, async (t) => {
    const parent = await warm(t, { isolation })
    await parent.run('globalThis.kept = 1')
    const child = await parent.fork({ name: 'child' })
    t.after(() => child.manager.destroy())
    assert.equal(child.manager.name, 'child')
    // A fork is a copy of what is there; isolated scripts leave nothing to copy.
    assert.equal(await child.run('typeof kept'), isolation === 'shared' ? 'number' : 'undefined')
    await child.run('goods.length = 1; globalThis.mine = "of the child"')
    await parent.run('globalThis.mine = "of the parent"')
    const mine = ['of the child', 'of the parent']
    const seen = await Promise.all([child, parent].map(({ run }) => run('String(globalThis.mine)')))
    assert.deepEqual(seen, isolation === 'shared' ? mine : ['undefined', 'undefined'])
    assert.equal(await parent.run('goods.length'), '1000')
    const ids = Array.from({ length: 50 }, (_, at) => at + 1)
    const both = isolation === 'shared' ? [parent] : [parent, child]
    for (const { run } of both) {
      assert.deepEqual(await Promise.all(ids.map((id) => run(renderArticle(id)))), ids.map(article))
    }
    await parent.manager.close()
    assert.equal(await child.run(renderArticle(1)), article(1))
  })
}

test('a fork with imports of its own calls those', LIMIT, async (t) => {
  const { manager, interpreter } = await cold(t, [() => 'the parent'])
  const who = createFunction(manager, interpreter, 0, 'who')
  const keep = evaluateToValue(manager, interpreter, '(who) => { globalThis.who = who }', 'keep.js')
  callFunction(manager, interpreter, keep, [who])
  const inherits = await manager.fork()
  t.after(() => inherits.destroy())
  const own = await manager.fork({ imports: createImports({ functions: [() => 'the child'] }) })
  t.after(() => own.destroy())
  const asked = [manager, inherits, own].map((one) => evaluate(one, interpreter, 'who()'))
  assert.deepEqual(asked, ['the parent', 'the parent', 'the child'])
})

test('reset puts poisoned globals of a shared interpreter back to the snapshot', LIMIT, async (t) => {
  const { manager, run } = await warm(t, { instances: 2 })
  using snapshot = await manager.snapshot()
  const poison = 'JSON.stringify = Array.prototype.map = undefined; goods.length = 0; globalThis.kept = 1'
  await Promise.all([run(poison), run(poison)])
  await assert.rejects(run('[1].map(String)'), ScriptError)
  await manager.reset({ to: snapshot })
  const ids = Array.from({ length: 20 }, (_, at) => at + 1)
  assert.deepEqual(await Promise.all(ids.map((id) => run(renderArticle(id)))), ids.map(article))
  assert.deepEqual(await Promise.all(ids.map(() => run('typeof kept'))), Array(20).fill('undefined'))
  assert.equal(manager.generation, 1)
})

test('a reload begins with the snapshot: the library is not loaded again', LIMIT, async (t) => {
  const { manager, run } = await warm(t)
  await run('globalThis.kept = 1')
  await manager.snapshot()
  await run('goods.length = 0')
  await manager.reload()
  assert.equal(await run('kept'), '1')
  assert.equal(await run(renderArticle(5)), article(5))
  await failure(run('goods.length = 0; for (;;) {}', { timeoutMs: 200 }), 'ERR_WASM_TIMEOUT')
  assert.equal(await run('kept'), '1')
  assert.equal(await run(renderArticle(6)), article(6))
})
