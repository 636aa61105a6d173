// The soak's own judgement: what it must not overlook.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Book } from '../benchmark/soak/book.ts'
import { Ledger } from '../benchmark/soak/ledger.ts'
import { type Held, judge, type Sample, tolerances } from '../benchmark/soak/samples.ts'
import { bench, failure, LIMIT } from './support.ts'

const instance = { generation: 1 } as never

function ledger(): { book: Book; ledger: Ledger } {
  const book = new Book('soak')
  return { book, ledger: new Ledger(book) }
}

test('a call that is answered must have run once', () => {
  for (const runs of [0, 1, 2]) {
    const { book, ledger: one } = ledger()
    const token = one.begin()
    for (let run = 1; run <= runs; run++) one.note(token, run, instance)
    one.end(token, 'tally', { value: 1 })
    assert.equal(book.problemCount, runs === 1 ? 0 : 1, `${runs} runs: ${book.problems}`)
  }
})

test('a call that was refused must not have run, and one that was stopped at most once, however late', async (t) => {
  const { manager } = await bench(t)
  const traps = await failure(manager.call('boom'), 'ERR_WASM_TRAP')
  await manager.close()
  const closed = await failure(manager.call('count'), 'ERR_WASM_CLOSED')
  for (const [error, early, late, problems] of [
    [closed, 0, 0, 0],
    [closed, 1, 0, 1],
    [closed, 0, 1, 1],
    [traps, 0, 0, 0],
    [traps, 1, 0, 0],
    [traps, 0, 1, 0],
    [traps, 1, 1, 1],
    [traps, 0, 2, 1],
  ] as const) {
    const { book, ledger: one } = ledger()
    const token = one.begin()
    for (let run = 1; run <= early; run++) one.note(token, run, instance)
    one.end(token, 'tally', { error })
    for (let run = 1; run <= late; run++) one.note(token, early + run, instance)
    assert.equal(book.problemCount, problems, `${error.code}, ${early} and ${late}: ${book.problems}`)
  }
})

test('an instance that forgets a run, or counts one twice, is noticed', () => {
  for (const counts of [
    [1, 2, 3],
    [1, 3],
    [1, 2, 2],
    [1, 2, 1],
  ]) {
    const { book, ledger: one } = ledger()
    for (const count of counts) {
      const token = one.begin()
      one.note(token, count, instance)
      one.end(token, 'tally', { value: 1 })
    }
    assert.equal(book.problemCount, counts.length === 3 && counts[2] === 3 ? 0 : 1, counts.join())
  }
})

/** Ten minutes in which one kind of thing goes from one value to another in the middle of the last two thirds. */
function samples(held: Held, from: number, to: number): Sample[] {
  const still = { resident: 1, heap: 1, external: 1, workerHeap: 1, descriptors: 1, threads: 1, mappings: 1 }
  return Array.from({ length: 600 }, (_, second) => ({
    ...still,
    seconds: second,
    answers: 0,
    recycles: 0,
    // Every fourth has nothing of the worker.
    isWhole: second % 4 !== 0,
    [held]: second % 4 === 0 ? 0 : second < 400 ? from : to,
  }))
}

test('whatever rises by more than its tolerance is not flat, and nothing else is', () => {
  for (const held of Object.keys(tolerances) as Held[]) {
    const { share, more } = tolerances[held]
    const from = 1e9
    const most = from * (1 + share) + more
    for (const [to, isFlat] of [
      [from, true],
      [most, true],
      [most + 1, false],
    ] as const) {
      const verdicts = judge(samples(held, from, to))
      assert.equal(verdicts.length, Object.keys(tolerances).length)
      for (const verdict of verdicts) {
        assert.equal(verdict.isFlat, isFlat || verdict.held !== held, `${held} to ${to}: ${verdict.held}`)
      }
    }
  }
})

/** What the book of the soak relies on: seed 21 once ended with one call more than it had expected. */
test('of calls in a lease those count that were handed over, whatever became of the lease', LIMIT, async (t) => {
  const { manager, close, arrived } = await bench(t)
  const trapped = await manager.acquire()
  const boom = failure(trapped.call('boom'), 'ERR_WASM_TRAP')
  const behind = failure(trapped.call('count'), 'ERR_WASM_STALE_HANDLE', /^the leased instance .* has trapped/)
  await Promise.all([boom, behind])
  trapped.release()
  await failure(trapped.call('count'), 'ERR_WASM_STALE_HANDLE', /^this lease .* has ended/)
  const counted = { completed: 0, failed: 0, trapped: 1, interrupted: 0, rejected: 1 }
  assert.deepEqual(manager.stats().calls, counted)

  const taken = await manager.acquire()
  close(1)
  const calls = [taken.call('hold', [1]), taken.call('count')].map((call) => failure(call, 'ERR_WASM_INTERRUPTED'))
  await arrived(1)
  await manager.reload({ drainTimeoutMs: 0, onDrainTimeout: 'interrupt' })
  await Promise.all(calls)
  await failure(taken.call('count'), 'ERR_WASM_STALE_HANDLE', /^this lease .* has ended/)
  assert.deepEqual(manager.stats().calls, { ...counted, interrupted: 1, rejected: 2 })
})
