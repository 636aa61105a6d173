// The adapter for o1js, without o1js: what it decides, on a stand-in for the glue and the guest. The rest is npm run o1js.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { EventEmitter } from 'node:events'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, test } from 'node:test'
import { setImmediate as turn } from 'node:timers/promises'
import { temporaryFolder } from './guests.ts'

// No types: the room has a face, and these are not on it.
const room = (name: string) => import(new URL(`../o1js/${name}.mjs`, import.meta.url).href)
const { Handles } = await room('handles')
const { Keeper } = await room('keeper')
const { checkSettings, fromEnvironment } = await room('settings')

interface Handle {
  __wbg_ptr: number
  free(): void
  __destroy_into_raw(): number
}
type Class = { make(ptr: number): Handle; prototype: Handle }

/** Classes as wasm-bindgen writes them; `freed` is what reached the guest. */
function makeGlue() {
  const freed: number[] = []
  const makeClass = (name: string): Class => {
    class Base {
      declare __wbg_ptr: number
      static make(ptr: number): Handle {
        const object = Object.create(Base.prototype)
        object.__wbg_ptr = ptr
        return object
      }
      __destroy_into_raw() {
        const ptr = this.__wbg_ptr
        this.__wbg_ptr = 0
        return ptr
      }
      free() {
        freed.push(this.__destroy_into_raw())
      }
    }
    Object.defineProperty(Base, 'name', { value: name })
    return Base
  }
  const [WasmFpSrs, WasmGVesta] = [makeClass('WasmFpSrs'), makeClass('WasmGVesta')]
  return { freed, WasmFpSrs, WasmGVesta }
}

describe('handles', () => {
  const make = () => {
    const { freed, ...glue } = makeGlue()
    const handles = new Handles()
    handles.adopt(glue)
    return { freed, handles, ...glue }
  }

  test('what is older than the snapshot stays valid, what is newer says that it is not', () => {
    const { freed, handles, WasmFpSrs, WasmGVesta } = make()
    const old = WasmFpSrs.make(8)
    handles.captured()
    const young = WasmGVesta.make(16)
    assert.equal(young.__wbg_ptr, 16)
    assert.deepEqual(handles.rewound(), [])
    assert.equal(old.__wbg_ptr, 8)
    assert.throws(() => young.__wbg_ptr, {
      code: 'ERR_WASM_STALE_HANDLE',
      message: /WasmGVesta.*newer than the snapshot/,
    })
    // o1js frees out of finalizers.
    young.free()
    assert.deepEqual(freed, [])
  })

  test('what was freed since the snapshot comes back with a reset, and is to be freed again', () => {
    const { freed, handles, WasmFpSrs } = make()
    const old = WasmFpSrs.make(8)
    handles.captured()
    old.free()
    WasmFpSrs.make(24).free()
    assert.deepEqual(freed, [8, 24])
    assert.deepEqual(handles.rewound(), [[WasmFpSrs, 8]])
    assert.deepEqual(handles.rewound(), [])
  })

  test('only what o1js keeps is kept, and only while it is there', () => {
    const { handles, WasmFpSrs, WasmGVesta } = make()
    const [srs, point] = [WasmFpSrs.make(8), WasmGVesta.make(16)]
    assert.deepEqual(handles.kept(), [handles.cellOf(srs)])
    assert.equal(handles.kept({ onlyNew: true }).length, 1)
    handles.captured()
    assert.equal(handles.kept({ onlyNew: true }).length, 0)
    srs.free()
    point.free()
    assert.deepEqual(handles.kept(), [])
  })

  test('two objects of one address are freed once', () => {
    const { freed, handles, WasmFpSrs } = make()
    const [object, representative] = [WasmFpSrs.make(8), WasmFpSrs.make(8)]
    object.free()
    representative.free()
    assert.deepEqual(freed, [8])
    assert.deepEqual(handles.kept(), [])
  })

  test('in another memory a handle means its new address, and the way back is whole', () => {
    const { freed, handles, WasmFpSrs } = make()
    const [carried, lost] = [WasmFpSrs.make(8), WasmFpSrs.make(16)]
    handles.captured()
    const goBack = handles.moved()
    handles.rebind(handles.cellOf(carried), 800, true)
    assert.equal(carried.__wbg_ptr, 800)
    assert.throws(() => lost.__wbg_ptr, { code: 'ERR_WASM_STALE_HANDLE', message: /could not be carried over/ })
    // Shared by others.
    carried.free()
    goBack()
    assert.deepEqual([carried.__wbg_ptr, lost.__wbg_ptr], [8, 16])
    carried.free()
    assert.deepEqual(freed, [8])
    assert.deepEqual(handles.rewound(), [[WasmFpSrs, 8]])
  })

  test('while the guest cannot be entered, nothing is freed in it', () => {
    const { freed, handles, WasmFpSrs } = make()
    const old = WasmFpSrs.make(8)
    handles.captured()
    handles.isBroken = true
    old.free()
    assert.deepEqual(freed, [])
    assert.deepEqual(handles.rewound(), [[WasmFpSrs, 8]])
  })
})

describe('settings', () => {
  test('the environment says the same as configure', () => {
    assert.deepEqual(fromEnvironment(undefined), {})
    assert.deepEqual(fromEnvironment(' reset = always, memoryBytes=2000000000,'), {
      reset: 'always',
      memoryBytes: 2_000_000_000,
    })
    assert.deepEqual(fromEnvironment('reset=300000000'), { reset: 300_000_000 })
  })

  test('what makes no sense is refused, with what would', () => {
    assert.throws(() => fromEnvironment('reset=sometimes'), { name: 'RangeError', message: /"sometimes".*'always'/ })
    assert.throws(() => fromEnvironment('resets=always'), {
      name: 'TypeError',
      message: /no setting resets.*memoryBytes/,
    })
    assert.throws(() => checkSettings({ reset: -1 }), RangeError)
    assert.throws(() => checkSettings({ memoryBytes: 10 }), {
      name: 'RangeError',
      message: /from 1048576 to 4294967296/,
    })
    assert.throws(() => checkSettings({ proofTimeoutMs: 0 }), RangeError)
    checkSettings({ memoryBytes: undefined, proofTimeoutMs: 1000 })
  })
})

describe('when to reset', () => {
  /** A keeper on a guest that is a number of bytes, and a pool that only counts. */
  function make({ settings = { reset: 'always' as unknown }, canSave = true, keepsPool = false } = {}) {
    const did: string[] = []
    const { freed, ...classes } = makeGlue()
    const glue = {
      ...classes,
      initThreadPool() {},
      exitThreadPool() {},
      caml_pasta_fp_plonk_proof_create: () => 'step',
      caml_pasta_fq_plonk_proof_create: () => 'wrap',
      caml_pasta_fp_plonk_proof_verify: () => true,
      caml_fp_srs_create: (): Handle => classes.WasmFpSrs.make(8),
    }
    const handles = new Handles()
    const facade = { depth: 0, recovered: () => did.push('recovered') }
    const memory = { bytes: 1000 }
    const state = {
      bases: () => new Map(),
      canSave: () => canSave,
      save: (cells: unknown[]) => ({ cells }),
      saveBases: () => [],
      restore({ cells }: { cells: unknown[] }) {
        for (const [i, cell] of cells.entries()) handles.rebind(cell, 1000 + i)
      },
      restoreBases() {},
    }
    const manager = {
      snapshotSync: () => ({ release: () => did.push('release') }),
      resetSync: () => did.push('reset'),
      stats: () => ({ memoryBytes: memory.bytes }),
    }
    const pool = { adopt() {}, isUp: false, size: 0, around: (act: () => void) => act(), stop: async () => {} }
    const events = new EventEmitter()
    const parts = { facade, handles, pool, state, manager: () => manager, settings, events, keepsPool }
    const keeper = new Keeper(parts)
    handles.adopt(glue)
    keeper.adopt(glue)
    return { did, keeper, glue, handles, facade, memory, events, freed }
  }

  test('always: at the next turn after a proof or a verification, once for many', async () => {
    const { keeper, glue } = make()
    assert.deepEqual(keeper.counts, { snapshots: 1, resets: 0, carried: 0, traps: 0 })
    glue.caml_pasta_fp_plonk_proof_create()
    glue.caml_pasta_fp_plonk_proof_verify()
    assert.equal(keeper.counts.resets, 0)
    await turn()
    await turn()
    assert.deepEqual(keeper.counts, { snapshots: 1, resets: 1, carried: 0, traps: 0 })
  })

  test('never, and below a threshold: not at all', async () => {
    for (const reset of ['never', 1000]) {
      const { keeper, glue, memory } = make({ settings: { reset } })
      glue.caml_pasta_fp_plonk_proof_create()
      await turn()
      assert.equal(keeper.counts.resets, 0)
      memory.bytes = 1001
      glue.caml_pasta_fp_plonk_proof_create()
      await turn()
      assert.equal(keeper.counts.resets, reset === 'never' ? 0 : 1)
    }
  })

  test('what compile makes is in a snapshot of its own', async () => {
    const { keeper, glue, did } = make()
    const srs = glue.caml_fp_srs_create()
    await turn()
    assert.deepEqual([keeper.counts.snapshots, did], [2, ['release']])
    glue.caml_pasta_fp_plonk_proof_create()
    await turn()
    assert.deepEqual([keeper.counts.resets, srs.__wbg_ptr], [1, 8])
  })

  test('what is newer than the snapshot is carried over a reset', async () => {
    const { keeper, glue } = make()
    const srs = glue.WasmFpSrs.make(8)
    glue.caml_pasta_fp_plonk_proof_create()
    await turn()
    assert.equal(srs.__wbg_ptr, 1000)
    assert.deepEqual(keeper.counts, { snapshots: 2, resets: 1, carried: 1, traps: 0 })
  })

  test('and where it cannot be, a snapshot takes the place of the reset', async () => {
    const { keeper, glue } = make({ canSave: false })
    const srs = glue.WasmFpSrs.make(8)
    glue.caml_pasta_fp_plonk_proof_create()
    await turn()
    assert.equal(srs.__wbg_ptr, 8)
    assert.deepEqual(keeper.counts, { snapshots: 2, resets: 0, carried: 0, traps: 0 })
  })

  test('what was freed since the snapshot is freed again after it', async () => {
    const { glue, freed } = make()
    const srs = glue.caml_fp_srs_create()
    await turn()
    srs.free()
    glue.caml_pasta_fp_plonk_proof_create()
    await turn()
    assert.deepEqual(freed, [8, 8])
  })

  test('never while an export is on the stack', async () => {
    const { keeper, glue, facade } = make()
    facade.depth = 1
    glue.caml_pasta_fp_plonk_proof_create()
    await turn()
    assert.equal(keeper.counts.resets, 0)
    facade.depth = 0
    await turn()
    assert.equal(keeper.counts.resets, 1)
  })

  test('after a trap before any other job, whatever the policy', async () => {
    const { keeper, did, handles } = make({ settings: { reset: 'never' } })
    keeper.trapped()
    assert.equal(handles.isBroken, true)
    await Promise.resolve()
    assert.deepEqual(did, ['reset', 'recovered'])
    assert.equal(handles.isBroken, false)
    assert.deepEqual(keeper.counts, { snapshots: 1, resets: 1, carried: 0, traps: 1 })
  })

  test('each half of a proof is told of, in the job after it', async () => {
    const { glue, events } = make()
    const seen: string[] = []
    for (const event of ['step', 'wrap', 'reset']) events.on(event, () => seen.push(event))
    glue.caml_pasta_fp_plonk_proof_create()
    assert.deepEqual(seen, [])
    await Promise.resolve()
    glue.caml_pasta_fq_plonk_proof_create()
    await turn()
    assert.deepEqual(seen, ['step', 'wrap', 'reset'])
  })
})

describe('where o1js is not as expected', () => {
  const preload = new URL('../o1js/index.mjs', import.meta.url).href
  /** What a program says that starts with the preload line, in a folder with such a package. */
  const start = (version?: string, hasGlue = false) => {
    const folder = temporaryFolder()
    if (version !== undefined) {
      const bindings = join(folder, 'node_modules/o1js/dist/node/bindings/compiled/node_bindings')
      mkdirSync(bindings, { recursive: true })
      const main = 'dist/node/index.cjs'
      writeFileSync(join(folder, 'node_modules/o1js/package.json'), JSON.stringify({ name: 'o1js', version, main }))
      writeFileSync(join(folder, 'node_modules/o1js', main), '')
      if (hasGlue) writeFileSync(join(bindings, 'plonk_wasm.cjs'), 'exports.isGlue = true')
    }
    const script = `
      const { stats } = await import(${JSON.stringify(preload)})
      console.log(JSON.stringify(stats()))`
    writeFileSync(join(folder, 'main.mjs'), script)
    // Bun would fetch it.
    const args = [...(process.versions.bun === undefined ? [] : ['--no-install']), 'main.mjs']
    return spawnSync(process.execPath, args, { cwd: folder, encoding: 'utf8' })
  }

  test('it is missing', () => {
    const { status, stderr } = start()
    assert.equal(status, 1)
    assert.match(stderr, /wasm-molt\/o1js: o1js was not found from .*; npm install o1js/)
  })

  test('it is of a version whose glue nobody has read', () => {
    const { status, stderr } = start('9.9.9')
    assert.equal(status, 1)
    assert.match(stderr, /is o1js 9\.9\.9, whose glue is not known; use one of .*2\.14\.0.*2\.15\.0/)
  })

  test('it has lost its glue', () => {
    const { status, stderr } = start('2.14.0')
    assert.equal(status, 1)
    assert.match(stderr, /o1js 2\.14\.0 has no .*plonk_wasm\.cjs; install it again/)
  })

  test('a program that never uses it pays for nothing', () => {
    const { status, stdout, stderr } = start('2.14.0', true)
    assert.equal(status, 0, stderr)
    const { version, isLoaded, memoryBytes } = JSON.parse(stdout)
    assert.deepEqual({ version, isLoaded, memoryBytes }, { version: '2.14.0', isLoaded: false, memoryBytes: 0 })
  })
})
