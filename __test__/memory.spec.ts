// Views of linear memory: the same buffer until growth, detached in time, never able to crash the process.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { InstanceContext, LinearMemory } from '../index.js'
import { adder, wat, workbench } from './guests.ts'
import { bench, child, hasCode, idleImports, LIMIT, managed, managedSync, reported, turns } from './support.ts'

const PAGE = 65_536
const env = { WORKBENCH: workbench }
const isDetached = (buffer: ArrayBuffer) => buffer.byteLength === 0

test('memory.buffer is one and the same object until the memory grows', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const buffer = manager.memory.buffer
  assert.ok(buffer instanceof ArrayBuffer)
  assert.equal(buffer.byteLength, PAGE)
  manager.exports.store?.(5, 77)
  await manager.call('store', [6, 88])
  assert.ok(manager.memory.buffer === buffer)
  assert.ok(manager.memory === manager.memory)
})

test('the view is the live memory: writes go both ways, without a copy', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const view = new Uint8Array(manager.memory.buffer)
  manager.exports.store?.(10, 200)
  assert.equal(view[10], 200)
  view[11] = 201
  assert.equal(manager.exports.load?.(11), 201)
  assert.equal(await manager.call('load', [11]), 201)
  await manager.call('store', [12, 202])
  assert.equal(view[12], 202)
})

test('a buffer is detached when a synchronous call grows the memory', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const before = manager.memory.buffer
  assert.equal(manager.exports.grow?.(2), 1)
  assert.ok(isDetached(before))
  const after = manager.memory.buffer
  assert.ok(after !== before)
  assert.equal(after.byteLength, 3 * PAGE)
  assert.equal(manager.memory.byteLength, 3 * PAGE)
})

test('growing by nothing, or failing to grow, leaves the bytes reachable', LIMIT, async (t) => {
  const { manager } = await bench(t, { limits: { memoryBytes: 4 * PAGE } })
  manager.exports.store?.(1, 42)
  assert.equal(manager.exports.grow?.(0), 1)
  assert.equal(manager.exports.grow?.(100), -1)
  assert.equal(new Uint8Array(manager.memory.buffer)[1], 42)
  assert.equal(manager.memory.byteLength, PAGE)
})

test(
  'a buffer is detached when a pool call has grown the memory, by the time the answer is there',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    const before = manager.memory.buffer
    assert.equal(await manager.call('grow', [1]), 1)
    assert.ok(isDetached(before))
    assert.equal(manager.memory.buffer.byteLength, 2 * PAGE)
  },
)

for (const path of ['on the JS thread', 'on a pool thread'] as const) {
  test(`an import sees the old view detached when the guest grew before calling it, ${path}`, LIMIT, async (t) => {
    const source = wat(`(module
      (import "env" "look" (func $look))
      (memory (export "memory") 1 100)
      (func (export "growAndLook") (result i32)
        (drop (memory.grow (i32.const 3)))
        (i32.store8 (i32.const 200000) (i32.const 9))
        (call $look)
        (memory.size)))`)
    let memory: LinearMemory | undefined
    let before: ArrayBuffer | undefined
    const seen: unknown[] = []
    const manager = await managed(t, source, {
      imports: (instance: InstanceContext) => ({
        env: {
          look: () => {
            assert.ok(before && memory)
            seen.push(before.byteLength, memory.byteLength, new Uint8Array(memory.buffer)[200_000])
            seen.push(new Uint8Array(instance.memory.buffer)[200_000])
          },
        },
      }),
    })
    memory = manager.memory
    before = memory.buffer
    const result = path === 'on the JS thread' ? manager.exports.growAndLook?.() : await manager.call('growAndLook')
    assert.equal(result, 4)
    assert.deepEqual(seen, [0, 4 * PAGE, 9, 9])
  })

  test(`an import that makes the guest grow finds its own view detached at once, ${path}`, LIMIT, async (t) => {
    const source = wat(`(module
      (import "env" "work" (func $work (result i32)))
      (memory (export "memory") 1 100)
      (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
      (func (export "run") (result i32) (call $work)))`)
    const manager = await managed(t, source, {
      imports: (instance: InstanceContext) => ({
        env: {
          work: () => {
            const view = new Uint8Array(instance.memory.buffer)
            assert.equal(view.length, PAGE)
            instance.exports.grow?.(1)
            assert.equal(view.length, 0)
            return instance.memory.buffer.byteLength
          },
        },
      }),
    })
    const result = path === 'on the JS thread' ? manager.exports.run?.() : await manager.call('run')
    assert.equal(result, 2 * PAGE)
  })
}

test('a growth during an asynchronous host call is seen by whoever asks for the buffer next', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  const before = manager.memory.buffer
  close(3)
  const call = manager.call('holdThenGrow', [3])
  await arrived(3)
  assert.ok(manager.memory.buffer === before)
  release(3)
  assert.equal(await call, 1)
  assert.ok(isDetached(before))
  assert.equal(manager.memory.buffer.byteLength, 4 * PAGE)
})

test('a reload detaches the views of the old generation, and memory shows the new one', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const memory = manager.memory
  const before = memory.buffer
  new Uint8Array(before)[0] = 1
  await manager.reload()
  assert.ok(isDetached(before))
  assert.equal(memory.byteLength, PAGE)
  assert.equal(new Uint8Array(memory.buffer)[0], 0)
  const second = memory.buffer
  manager.reloadSync()
  assert.ok(isDetached(second))
})

test('a failed reload leaves the memory of the old generation as it is', LIMIT, async (t) => {
  const { manager } = await bench(t, {
    restoreState: () => {
      throw new Error('no')
    },
    saveState: () => 1,
  })
  const before = manager.memory.buffer
  new Uint8Array(before)[0] = 5
  await assert.rejects(manager.reload(), hasCode('ERR_WASM_RELOAD_FAILED'))
  assert.equal(new Uint8Array(manager.memory.buffer)[0], 5)
  // The hook's lease has ended, so the old view may be detached; it may not show anything else.
  assert.ok(isDetached(before) || new Uint8Array(before)[0] === 5)
})

test('a trap that costs the instance detaches its views', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const before = manager.memory.buffer
  await assert.rejects(manager.call('boom'), hasCode('ERR_WASM_TRAP'))
  assert.equal(await manager.call('peek'), 0)
  assert.ok(isDetached(before))
})

test('the end of a lease detaches the views taken through it', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const [memory, buffer] = await manager.use((instance) => {
    const taken = instance.memory.buffer
    assert.equal(taken.byteLength, PAGE)
    assert.ok(instance.memory.buffer === taken)
    return [instance.memory, taken] as const
  })
  assert.ok(isDetached(buffer))
  assert.throws(() => memory.buffer, hasCode('ERR_WASM_STALE_HANDLE'))
  assert.throws(() => memory.byteLength, hasCode('ERR_WASM_STALE_HANDLE'))
  assert.throws(() => memory.read(0, 1), hasCode('ERR_WASM_STALE_HANDLE'))
  assert.throws(() => memory.readString(0, 1), hasCode('ERR_WASM_STALE_HANDLE'))
  assert.throws(() => memory.write(0, 'x'), hasCode('ERR_WASM_STALE_HANDLE'))
})

test('close and destroy detach what is left, and the memory of a closed manager says so', LIMIT, async (t) => {
  for (const end of ['close', 'destroy'] as const) {
    const { manager } = await bench(t)
    const memory = manager.memory
    const buffer = memory.buffer
    await manager[end]()
    assert.ok(isDetached(buffer), end)
    assert.throws(() => memory.buffer, hasCode('ERR_WASM_CLOSED'))
    assert.throws(() => memory.read(0, 1), hasCode('ERR_WASM_CLOSED'))
    assert.throws(() => memory.write(0, 'x'), hasCode('ERR_WASM_CLOSED'))
  }
})

// ---------------------------------------------------------------- read, readString, write

test('read copies out, write copies in and says how many bytes', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const { memory } = manager
  assert.equal(memory.write(100, new Uint8Array([1, 2, 3])), 3)
  const copy = memory.read(100, 3)
  assert.deepEqual(copy, new Uint8Array([1, 2, 3]))
  copy[0] = 99
  assert.equal(manager.exports.load?.(100), 1)
  assert.ok(copy.buffer !== memory.buffer)
  assert.equal(memory.write(200, 'grüße 🦀'), 12)
  assert.equal(memory.readString(200, 12), 'grüße 🦀')
  assert.equal(memory.write(300, ''), 0)
  assert.deepEqual(memory.read(300, 0), new Uint8Array(0))
  assert.equal(memory.readString(300, 0), '')
  // A view of part of a larger buffer writes its part.
  assert.equal(memory.write(400, new Uint8Array([9, 8, 7, 6]).subarray(1, 3)), 2)
  assert.deepEqual(memory.read(400, 3), new Uint8Array([8, 7, 0]))
})

test('readString replaces what is not UTF-8, as TextDecoder does', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const bytes = new Uint8Array([0x61, 0xff, 0xe2, 0x82, 0x62, 0xf0, 0x9f, 0xa6, 0x80, 0xc0, 0x80, 0])
  manager.memory.write(0, bytes)
  assert.equal(manager.memory.readString(0, bytes.length), new TextDecoder().decode(bytes))
})

test('write encodes lone surrogates as TextEncoder does', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const odd = 'a\ud800b\udc00'
  const bytes = new TextEncoder().encode(odd)
  assert.equal(manager.memory.write(0, odd), bytes.length)
  assert.deepEqual(manager.memory.read(0, bytes.length), bytes)
})

test('reading and writing out of bounds throws a RangeError and touches nothing', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const { memory } = manager
  for (const [ptr, length] of [
    [PAGE, 1],
    [PAGE - 1, 2],
    [0, PAGE + 1],
    [PAGE + 1, 0],
    [2 ** 32, 1],
    [2 ** 32 - 1, 2],
    [2 ** 53 - 1, 1],
    [0, 2 ** 53 - 1],
    [4_294_901_760, 65_536],
  ] as const) {
    const label = `${ptr}, ${length}`
    assert.throws(() => memory.read(ptr, length), RangeError, `read(${label})`)
    assert.throws(() => memory.readString(ptr, length), RangeError, `readString(${label})`)
    if (length <= 2) assert.throws(() => memory.write(ptr, new Uint8Array(length)), RangeError, `write(${label})`)
  }
  assert.throws(() => memory.write(PAGE - 1, 'ab'), RangeError)
  assert.deepEqual(memory.read(PAGE - 1, 1), new Uint8Array(1))
  assert.deepEqual(memory.read(PAGE, 0), new Uint8Array(0))
  assert.equal(memory.read(0, PAGE).length, PAGE)
})

test(
  'pointers and lengths that are no whole, non-negative numbers are refused before anything is read',
  LIMIT,
  async (t) => {
    const { manager } = await bench(t)
    const memory = manager.memory as unknown as Record<'read' | 'readString' | 'write', (...args: unknown[]) => unknown>
    const refused = (error: unknown) =>
      error instanceof RangeError ||
      error instanceof TypeError ||
      (error as { code?: string }).code === 'ERR_WASM_INVALID_ARGUMENT'
    for (const bad of [-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, '0', null, undefined, {}, 1n, 2 ** 53]) {
      assert.throws(() => memory.read(bad, 1), refused, `read(${String(bad)}, 1)`)
      assert.throws(() => memory.read(0, bad), refused, `read(0, ${String(bad)})`)
      assert.throws(() => memory.write(bad, 'x'), refused, `write(${String(bad)})`)
    }
    for (const bad of [1, null, undefined, {}, [1, 2], Symbol('s')]) {
      assert.throws(() => memory.write(0, bad), refused, `write(0, ${String(bad)})`)
    }
  },
)

test('a guest pointer that comes out as a negative i32 is out of bounds, not an address', LIMIT, async (t) => {
  const { manager } = await bench(t)
  assert.throws(
    () => manager.memory.read(-8 | 0, 4),
    (error: unknown) => error instanceof Error,
  )
})

test('a guest without an exported memory has an empty one', LIMIT, async (t) => {
  const manager = await managed(t, adder())
  assert.equal(manager.memory.byteLength, 0)
  assert.equal(manager.memory.buffer.byteLength, 0)
  assert.throws(() => manager.memory.read(0, 1), RangeError)
  assert.deepEqual(manager.memory.read(0, 0), new Uint8Array(0))
})

test('of several memories, the one that is exported by that name is shown', LIMIT, async (t) => {
  const source = wat(`(module
    (memory $a (export "other") 1) (memory $b (export "memory") 2)
    (data (memory $b) (i32.const 0) "b") (data (memory $a) (i32.const 0) "a"))`)
  const manager = await managed(t, source)
  assert.equal(manager.memory.byteLength, 2 * PAGE)
  assert.equal(manager.memory.readString(0, 1), 'b')
})

test('data segments are there, and memory beyond them is zero', LIMIT, async (t) => {
  const source = wat('(module (memory (export "memory") 1) (data (i32.const 8) "hello"))')
  const manager = await managed(t, source)
  assert.equal(manager.memory.readString(8, 5), 'hello')
  assert.ok(manager.memory.read(13, PAGE - 13).every((byte) => byte === 0))
})

test('a memory given as a descriptor is imported by the guest and shown', LIMIT, async (t) => {
  const source = wat(`(module
    (import "env" "memory" (memory 1 10))
    (export "memory" (memory 0))
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))`)
  const manager = await managed(t, source, { imports: { env: { memory: { initial: 2, maximum: 3 } } } })
  assert.equal(manager.memory.byteLength, 2 * PAGE)
  assert.equal(manager.exports.grow?.(1), 2)
  assert.equal(manager.exports.grow?.(1), -1)
  assert.equal(manager.memory.byteLength, 3 * PAGE)
  await manager.reload()
  assert.equal(manager.memory.byteLength, 2 * PAGE)
})

test('limits.memoryBytes makes memory.grow fail in the guest beyond it, and not before', LIMIT, async (t) => {
  const { manager } = await bench(t, { limits: { memoryBytes: 5 * PAGE + 100 } })
  assert.equal(manager.exports.grow?.(4), 1)
  assert.equal(manager.exports.grow?.(1), -1)
  assert.equal(manager.exports.size?.(), 5)
  assert.equal(await manager.call('grow', [1]), -1)
})

test('limits.memoryBytes below the initial size refuses the module, with both figures', LIMIT, async () => {
  const { WasmModuleManager } = await import('../index.js')
  await assert.rejects(
    WasmModuleManager.create(workbench, { cache: false, imports: idleImports, limits: { memoryBytes: 1000 } }),
    (error: Error & { code?: string }) =>
      /1000/.test(error.message) && /65536/.test(error.message) && error.code !== undefined,
  )
})

// ---------------------------------------------------------------- what must never crash

/** Node 20 has `transfer` behind a flag of V8. */
const TRANSFER = 'transfer' in ArrayBuffer.prototype ? [] : ['--harmony-rab-gsab-transfer']

for (const [what, take] of [
  ['transferred by structuredClone', 'structuredClone(buffer, { transfer: [buffer] })'],
  ['posted to a MessagePort', '(await post(buffer))'],
  ['moved by ArrayBuffer.prototype.transfer', 'buffer.transfer()'],
] as const) {
  for (const end of ['reload', 'reloadSync', 'growth', 'close', 'destroy', 'trap', 'lease']) {
    test(`a backing store ${what} is harmless after ${end}, and after gc`, LIMIT, async () => {
      const ended = await child(
        `
        const { MessageChannel, receiveMessageOnPort } = await import('node:worker_threads')
        const post = async (buffer) => {
          const { port1, port2 } = new MessageChannel()
          port1.postMessage(buffer, [buffer])
          const { message } = receiveMessageOnPort(port2)
          port1.close()
          return message
        }
        const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
          cache: false, imports: { env: { entered() {}, hold: (key) => key } },
        })
        const lease = ${JSON.stringify(end)} === 'lease' ? await manager.acquire() : null
        const outcome = await (async () => {
          const memory = lease ? lease.memory : manager.memory
          const buffer = memory.buffer
          new Uint8Array(buffer).fill(7)
          let moved
          try { moved = ${take} } catch (error) { moved = null; report({ refused: String(error) }) }
          if (moved) {
            // Whoever owns it now may go on using it, whatever we do.
            const view = new Uint8Array(moved)
            await ends[${JSON.stringify(end)}]()
            let sum = 0
            for (let i = 0; i < view.length; i += 1) { sum += view[i]; view[i] = 3 }
            global.gc()
            for (let i = 0; i < view.length; i += 1) sum += view[i]
            return { isFinite: Number.isFinite(sum) }
          }
          await ends[${JSON.stringify(end)}]()
          return { refused: true }
        })()
        for (let i = 0; i < 3; i += 1) { global.gc(); await new Promise((r) => setImmediate(r)) }
        // The guest's own memory, and the buffer of this moment, are unharmed.
        if (manager.state === 'ready') {
          const l = lease && !['lease'].includes(${JSON.stringify(end)}) ? lease : manager
          l.exports.store(1, 9)
          assert.equal(new Uint8Array(l.memory.buffer)[1], 9)
        }
        await manager.close()
        global.gc()
        report(outcome)
        `.replace(
          'const lease =',
          `const ends = {
            reload: () => manager.reload(), reloadSync: () => manager.reloadSync(),
            growth: () => { assert.notEqual(manager.exports.grow(10), -1) },
            close: () => manager.close(), destroy: () => manager.destroy(),
            trap: async () => { await manager.call('boom').catch(() => {}); await manager.call('peek') },
            lease: () => lease.release(),
          }
          const lease =`,
        ),
        { env, flags: ['--expose-gc', ...TRANSFER] },
      )
      assert.ok(reported<{ isFinite?: boolean; refused?: boolean }>(ended))
    })
  }
}

test('a buffer that JavaScript has moved away is not given out again', LIMIT, async () => {
  const ended = await child(
    `
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const seen = []
    for (const move of [(buffer) => buffer.transfer(), (buffer) => structuredClone(buffer, { transfer: [buffer] })]) {
      const buffer = manager.memory.buffer
      try { move(buffer) } catch {}
      manager.exports.store(3, 33)
      const next = manager.memory.buffer
      // The engine may have refused or copied; then the buffer is whole, and still the one.
      seen.push(next.byteLength, new Uint8Array(next)[3], buffer.byteLength === 0 ? next !== buffer : next === buffer)
      manager.exports.grow(1)
      seen.push(next.byteLength, manager.memory.buffer.byteLength / 65536)
    }
    report(seen)
    `,
    { env, flags: TRANSFER },
  )
  assert.deepEqual(reported(ended), [PAGE, 33, true, 0, 2, 2 * PAGE, 33, true, 0, 3])
})

test('a typed array kept across a hundred reloads with gc never crashes the process', LIMIT, async () => {
  const ended = await child(
    `
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const kept = []
    for (let i = 0; i < 100; i += 1) {
      kept.push(new Uint8Array(manager.memory.buffer))
      if (i % 3 === 0) manager.exports.grow(1)
      if (i % 2 === 0) await manager.reload(); else manager.reloadSync()
      if (i % 10 === 0) global.gc()
      for (const view of kept) { view[0] = 1; if (view[0] !== undefined && view.length) throw new Error('still attached') }
    }
    report(kept.length)
    `,
    { env, flags: ['--expose-gc'] },
  )
  assert.equal(reported(ended), 100)
})

test('a thousand reloads leave address space, threads and resident memory flat', LIMIT, async () => {
  const ended = await child(
    `
    import { readdirSync, readFileSync } from 'node:fs'
    const measure = () => {
      global.gc()
      const [virtual, resident] = readFileSync('/proc/self/statm', 'utf8').split(' ')
      const maps = readFileSync('/proc/self/maps', 'utf8').split('\\n').length
      return { virtual: virtual * 4096, resident: resident * 4096, maps, threads: readdirSync('/proc/self/task').length }
    }
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    const rounds = async (count) => {
      for (let i = 0; i < count; i += 1) {
        manager.memory.buffer
        manager.exports.touch(0, 65536)
        if (i % 2 === 0) manager.reloadSync(); else await manager.reload()
      }
      global.gc()
      await new Promise((resolve) => setImmediate(resolve))
    }
    await rounds(200)
    const before = measure()
    await rounds(1000)
    const after = measure()
    report(Object.fromEntries(Object.keys(before).map((key) => [key, after[key] - before[key]])))
    `,
    { env, flags: ['--expose-gc'] },
  )
  const grown = reported<{ virtual: number; resident: number; maps: number; threads: number }>(ended)
  assert.ok(grown.virtual < 9 * 2 ** 30, `${grown.virtual} bytes more address space`)
  assert.ok(grown.resident < 32 * 2 ** 20, `${grown.resident} bytes more resident memory`)
  assert.ok(grown.maps < 60, `${grown.maps} more mappings`)
  assert.ok(grown.threads <= 1, `${grown.threads} more threads`)
})

test('asking for the buffer again and again does not drive V8 into collections', LIMIT, async () => {
  const ended = await child(
    `
    import { PerformanceObserver } from 'node:perf_hooks'
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    manager.exports.grow(1023)
    let major = 0
    const observer = new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) if (entry.detail.kind === 4) major += 1
    })
    observer.observe({ entryTypes: ['gc'] })
    for (let i = 0; i < 20000; i += 1) {
      manager.exports.add(1, 2)
      if (manager.memory.buffer.byteLength !== 1024 * 65536) throw new Error('wrong size')
    }
    await new Promise((resolve) => setTimeout(resolve, 0))
    await new Promise((resolve) => setImmediate(resolve))
    report(major)
    `,
    { env },
  )
  assert.ok(reported<number>(ended) <= 5, 'major collections')
})

test('read and write work while a pool thread is inside the guest', LIMIT, async (t) => {
  const { manager, close, arrived, release } = await bench(t)
  close(1)
  const call = manager.call('hold', [1])
  await arrived(1)
  assert.equal(manager.memory.write(50, 'abc'), 3)
  assert.equal(manager.memory.readString(50, 3), 'abc')
  assert.equal(new Uint8Array(manager.memory.buffer)[51], 'b'.charCodeAt(0))
  release(1)
  await call
})

test(
  'the context of an imports function shows the memory of its own instance, also from a promise',
  LIMIT,
  async (t) => {
    const source = wat(`(module
    (import "env" "work" (func $work (result i32)))
    (memory (export "memory") 1 100)
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "run") (param i32) (result i32)
      (i32.store8 (i32.const 0) (local.get 0))
      (call $work)))`)
    const manager = await managed(t, source, {
      instances: 2,
      threads: 2,
      imports: (instance: InstanceContext) => ({
        env: {
          work: async () => {
            const before = instance.memory.buffer
            await turns()
            instance.exports.grow?.(1)
            assert.equal(before.byteLength, 0)
            return instance.memory.read(0, 1)[0]
          },
        },
      }),
    })
    assert.deepEqual(await Promise.all([manager.call('run', [11]), manager.call('run', [22])]), [11, 22])
  },
)

test(
  'within a host call manager.memory is the memory of the instance that called, and afterwards its own again',
  LIMIT,
  async (t) => {
    const source = wat(`(module
    (import "env" "work" (func $work))
    (memory (export "memory") 1)
    (func (export "run") (call $work)))`)
    const seen: ArrayBuffer[] = []
    let callers: ArrayBuffer[] = []
    const manager = await managed(t, source, {
      instances: 2,
      imports: (instance: InstanceContext) => ({
        env: {
          work: () => {
            seen.push(manager.memory.buffer, manager.memory.buffer)
            callers.push(instance.memory.buffer, instance.memory.buffer)
          },
        },
      }),
    })
    const own = manager.memory.buffer
    // The first replica is the one at home, so two leases get both.
    const leases = [await manager.acquire(), await manager.acquire()]
    for (const lease of leases) {
      callers = []
      seen.length = 0
      assert.ok(manager.memory.buffer === own)
      await lease.call('run')
      lease.exports.run?.()
      assert.equal(seen.length, 4)
      seen.forEach((buffer, index) => {
        assert.ok(buffer === callers[index])
        assert.ok(buffer === lease.memory.buffer)
      })
      assert.ok(manager.memory.buffer === own)
    }
    assert.ok(leases[0]?.memory.buffer !== leases[1]?.memory.buffer)
    for (const lease of leases) lease.release()
  },
)

for (const end of ['returns', 'throws'] as const) {
  test(`views of every replica are detached when a pool call that grew its memory ${end}`, LIMIT, async (t) => {
    const source = wat(`(module
      (import "env" "work" (func $work))
      (memory (export "memory") 1 100)
      (func (export "run") (drop (memory.grow (i32.const 1))) (call $work)))`)
    const contexts: InstanceContext[] = []
    const manager = await managed(t, source, {
      instances: 3,
      imports: (instance: InstanceContext) => {
        contexts.push(instance)
        return {
          env: {
            work: () => {
              if (end === 'throws') throw new Error('as asked')
            },
          },
        }
      },
    })
    const leases = [await manager.acquire(), await manager.acquire(), await manager.acquire()]
    const views = leases.map(({ memory }) => [memory, memory.buffer] as const)
    assert.deepEqual(
      contexts.map(({ memory }) => memory.buffer.byteLength),
      [PAGE, PAGE, PAGE],
    )
    for (const lease of leases) {
      const call = lease.call('run')
      await (end === 'throws' ? assert.rejects(call, /as asked/) : call)
    }
    for (const [memory, before] of views) {
      assert.ok(isDetached(before))
      assert.equal(memory.buffer.byteLength, 2 * PAGE)
    }
    assert.deepEqual(
      contexts.map(({ memory }) => memory.buffer.byteLength),
      [2 * PAGE, 2 * PAGE, 2 * PAGE],
    )
    for (const lease of leases) lease.release()
  })
}

test('a memory without pages has an empty buffer, and a proper one as soon as it has grown', LIMIT, async (t) => {
  const source = wat(`(module (memory (export "memory") 0 10)
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))`)
  const manager = await managed(t, source)
  assert.equal(manager.memory.buffer.byteLength, 0)
  assert.equal(manager.memory.buffer.byteLength, 0)
  manager.exports.grow?.(1)
  const { buffer } = manager.memory
  assert.equal(buffer.byteLength, PAGE)
  assert.ok(manager.memory.buffer === buffer)
})

test('createSync gives the same views', LIMIT, (t) => {
  const manager = managedSync(t, workbench, { imports: idleImports })
  const before = manager.memory.buffer
  manager.exports.grow?.(1)
  assert.equal(before.byteLength, 0)
  assert.equal(manager.memory.buffer.byteLength, 2 * PAGE)
})

test('write copies rightly when its source is a view of the same memory, overlapping both ways', LIMIT, async (t) => {
  const { manager } = await bench(t)
  const { memory } = manager
  const letters = 'abcdefghijklmnopqrstuvwxyz'
  memory.write(100, letters)
  memory.write(105, new Uint8Array(memory.buffer, 100, 26))
  assert.equal(memory.readString(105, 26), letters)
  memory.write(102, new Uint8Array(memory.buffer, 105, 26))
  assert.equal(memory.readString(102, 26), letters)
})

test(
  'views whose buffer is gone are nothing to write, load or send: an error or no bytes, never a crash',
  LIMIT,
  async () => {
    const ended = await child(
      `
    const imports = { env: { entered() {}, hold: (key) => key } }
    const manager = await WasmModuleManager.create(process.env.WORKBENCH, { cache: false, imports })
    const gone = () => { const view = new Uint8Array(100000).fill(1); structuredClone(view.buffer, { transfer: [view.buffer] }); return view }
    const results = []
    const attempt = async (run) => {
      try { const value = await run(); results.push(typeof value) } catch (error) { results.push(error.code ?? error.name) }
    }
    await attempt(() => manager.memory.write(0, gone()))
    await attempt(() => manager.invoke('add', gone()))
    await attempt(() => WasmModuleManager.create(gone(), { cache: false }))
    await attempt(async () => WasmModuleManager.createSync(gone().buffer, { cache: false }))
    const old = new Uint8Array(manager.memory.buffer)
    await manager.reload()
    await attempt(() => manager.memory.write(0, old))
    await attempt(() => manager.invoke('add', old))
    // Shared bytes may change while they are copied; they must not be trusted twice.
    await attempt(() => manager.memory.write(0, new Uint8Array(new SharedArrayBuffer(16))))
    report(results)
    `,
      { env },
    )
    const results = reported<string[]>(ended)
    assert.equal(results.length, 7)
    for (const result of results) {
      assert.ok(['number', 'TypeError', 'RangeError'].includes(result) || result.startsWith('ERR_WASM_'), result)
    }
  },
)

test('a 64-bit memory is shown, read and written like any other', LIMIT, async (t) => {
  const source = wat(`(module
    (memory (export "memory") i64 1 10)
    (func (export "load") (param i64) (result i32) (i32.load8_u (local.get 0)))
    (func (export "grow") (param i64) (result i64) (memory.grow (local.get 0))))`)
  const manager = await managed(t, source)
  const before = manager.memory.buffer
  assert.equal(manager.memory.write(60_000, 'far'), 3)
  assert.equal(manager.exports.load?.(60_001n), 'a'.charCodeAt(0))
  assert.equal(manager.exports.grow?.(2n), 1n)
  assert.equal(before.byteLength, 0)
  assert.equal(manager.memory.byteLength, 3 * PAGE)
  assert.equal(manager.memory.readString(60_000, 3), 'far')
  assert.throws(() => manager.exports.load?.(2n ** 40n), hasCode('ERR_WASM_TRAP'))
})

test('a memory of several hundred megabytes is read, written and given back whole', LIMIT, async (t) => {
  const { manager } = await bench(t)
  assert.equal(manager.exports.grow?.(8191), 1)
  const end = 8192 * PAGE
  assert.equal(manager.memory.byteLength, end)
  assert.equal(manager.memory.buffer.byteLength, end)
  manager.memory.write(end - 3, 'end')
  assert.equal(manager.memory.readString(end - 3, 3), 'end')
  assert.equal(new Uint8Array(manager.memory.buffer)[end - 1], 'd'.charCodeAt(0))
  assert.throws(() => manager.memory.read(end - 2, 3), RangeError)
  manager.reloadSync()
  assert.equal(manager.memory.byteLength, PAGE)
})

test('native code that still reads a buffer which is detached meanwhile reads on', LIMIT, async () => {
  // A crash is told by the child's exit.
  const ended = await child(
    `
    import { deflate } from 'node:zlib'
    import { promisify } from 'node:util'
    // One write of zlib's does it all: Node itself aborts if zlib comes back to a buffer that is detached.
    const run = (bytes) => promisify(deflate)(bytes, { chunkSize: 64 << 20 })
    for (const end of ['reset', 'resetSync', 'reload', 'close']) {
      const manager = await WasmModuleManager.create(process.env.WORKBENCH, {
        cache: false, imports: { env: { entered() {}, hold: (key) => key } },
      })
      manager.exports.grow(10)
      await manager.snapshot()
      manager.exports.grow(500)
      const work = [1, 2, 3, 4].map(() => run(new Uint8Array(manager.memory.buffer)))
      await new Promise((resolve) => setImmediate(resolve))
      await manager[end]()
      gc()
      await Promise.all(work)
      await manager.close()
    }
    report('survived')
    `,
    { env: { WORKBENCH: workbench }, flags: ['--expose-gc'], timeoutMs: 50_000 },
  )
  assert.equal(reported<string>(ended), 'survived')
})

test('a loop that never comes to the event loop does not use the address space up', {
  ...LIMIT,
  skip: process.platform !== 'linux' && 'reads /proc',
}, async () => {
  const ended = await child(
    `
    import { readFileSync } from 'node:fs'
    const manager = WasmModuleManager.createSync(process.env.WORKBENCH, {
      cache: false, imports: { env: { entered() {}, hold: (key) => key } },
    })
    manager.snapshotSync()
    const kib = () => Number(/VmSize:\\s+(\\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))[1])
    const before = kib()
    for (let i = 0; i < 6000; i += 1) {
      manager.exports.grow(1)
      new Uint8Array(manager.memory.buffer)[0] = 1
      manager.resetSync()
    }
    report((kib() - before) / 2 ** 20)
    await manager.close()
    `,
    { env: { WORKBENCH: workbench }, timeoutMs: 50_000 },
  )
  const grownGiB = reported<number>(ended)
  assert.ok(grownGiB < 8, `${grownGiB} GiB more`)
})

test('guests that are built with memory discard give pages back', LIMIT, async (t) => {
  const text = `(module
    (import "env" "__wbindgen_memory_discard" (func $discard (param i32 i32)))
    (memory (export "memory") 64)
    (func (export "discard") (param i32 i32) (call $discard (local.get 0) (local.get 1)))
    (func (export "fill") (memory.fill (i32.const 0) (i32.const 7) (i32.const 4194304)))
    (func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0))))`
  const manager = await managed(t, wat(text))
  const { discard, fill, get } = manager.exports as Record<string, (...args: number[]) => number>
  const resident = () => manager.stats({ pages: true }).pages?.privateBytes ?? 0
  const isTold = process.platform === 'linux'
  fill?.()
  if (isTold) assert.ok(resident() >= 64 * 65536)
  discard?.(100, 3_000_000)
  assert.deepEqual(
    [99, 100, 65536, 3_000_099, 3_000_100].map((at) => get?.(at)),
    [7, 0, 0, 0, 7],
  )
  if (isTold) assert.ok(resident() < 64 * 65536 - 2_800_000, `${resident()}`)
  // Little, and often: zeros all the same.
  for (let at = 3_100_000; at < 3_900_000; at += 100_000) discard?.(at, 100_000)
  assert.equal(get?.(3_500_000), 0)
  // On an image, too, which it must not show again.
  fill?.()
  await manager.snapshot()
  discard?.(0, 4_194_304)
  assert.equal(get?.(65536), 0)
  await manager.reset()
  assert.equal(get?.(65536), 7)
  assert.throws(() => discard?.(4_194_000, 1000), { code: 'ERR_WASM_TRAP', trap: 'out-of-bounds-memory' })
  // The user's own comes first.
  const seen: number[] = []
  const own = await managed(t, wat(text), {
    imports: { env: { __wbindgen_memory_discard: (at: number, length: number) => void seen.push(at, length) } },
  })
  own.exports.discard?.(1, 2)
  assert.deepEqual(seen, [1, 2])
})

test(
  'a memory longer than this engine’s longest buffer is read and written by copies, and its addresses go with it',
  LIMIT,
  async () => {
    const ended = await child(
      `
    import { existsSync, readFileSync } from 'node:fs'
    const PAGES = 1 << 17
    const bytes = PAGES * 65536
    const space = () => existsSync('/proc/self/status') ? Number(/VmSize:\\s+(\\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))[1]) * 1024 : 0
    const seen = []
    const life = async () => {
      const manager = await WasmModuleManager.create(process.env.LONG, { cache: false })
      const { memory } = manager
      for (let again = 0; again < 3; again += 1) {
        let length
        try {
          length = memory.buffer.byteLength
        } catch (error) {
          assert.equal(error.name, 'RangeError')
          assert.ok(error.message.includes(String(bytes)) && error.message.includes('use read() and write()'), error.message)
          length = 'refused'
        }
        seen.push(length)
      }
      memory.write(bytes - 2, new Uint8Array([1, 2]))
      assert.deepEqual([...memory.read(bytes - 3, 3)], [0, 1, 2])
      await manager.destroy()
    }
    await life()
    gc()
    const before = space()
    for (let i = 0; i < 8; i += 1) await life()
    for (let i = 0; i < 4; i += 1) { gc(); await new Promise((resolve) => setImmediate(resolve)) }
    report({ seen: [...new Set(seen)], lives: (space() - before) / bytes })
    `,
      { env: { LONG: wat(`(module (memory (export "memory") i64 ${1 << 17}))`, 'long') }, flags: ['--expose-gc'] },
    )
    const { seen, lives } = reported<{ seen: unknown[]; lives: number }>(ended)
    // 8 GiB: Node from 24 on shows it, Node 20 and 22 refuse.
    assert.ok(seen.length === 1 && (seen[0] === 'refused' || seen[0] === 2 ** 33), JSON.stringify(seen))
    assert.ok(lives < 3, `of 8 lives ${lives} are still mapped`)
  },
)
