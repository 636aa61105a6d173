// The layer law: index.js → src → crates/engine → crates/lifecycle, and `unsafe` only where it is listed.
// A name that stands in a comment or a string is no dependency; both are taken out first.
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { files, root } from './tools.mjs'

/** What a room may not know: crates, in its code and in its manifest; inside a crate, rooms above it. */
const laws = [
  { room: 'src', manifest: 'Cargo.toml', bans: ['wasmtime', 'rayon'] },
  { room: 'crates/engine', bans: ['napi', 'napi_derive'] },
  // An instance knows no manager, and the manager has wasmtime and rayon only by way of its instances and its pool.
  { room: 'crates/engine/src/instance', manifest: null, bans: ['crate::manager'] },
  { room: 'crates/engine/src/manager', manifest: null, bans: ['wasmtime', 'rayon', 'rustix'] },
  { room: 'crates/testkit', bans: ['napi', 'napi_derive'] },
  {
    room: 'crates/lifecycle',
    bans: ['wasmtime', 'rayon', 'napi', 'napi_derive', 'crossbeam', 'crossbeam_channel', 'wasm_molt_engine'],
  },
]

/** Grouped by the contract that the unsafe code relies on. A file that needs it no longer leaves the list. */
const mayBeUnsafe = [
  // Linear memories that we own: reserve, commit, protect, hand out views (design: memory).
  ...['guest', 'home', 'host', 'poll', 'record', 'region', 'reservation', 'sys_portable', 'sys_unix'].map(
    (name) => `crates/engine/src/instance/memory/${name}.rs`,
  ),
  ...['dirty', 'linux', 'portable'].map((name) => `crates/engine/src/instance/memory/image/${name}.rs`),
  ...['image', 'lifetime', 'size'].map((name) => `crates/engine/src/instance/memory/tests/${name}.rs`),
  // The handlers of signals, which belong to the process (sigaction).
  'crates/engine/src/instance/signals.rs',
  // One store, one thread at a time: replica.rs holds the store, the others hold the ticket that makes its use sound.
  ...[
    ...['replica', 'replica/blueprint', 'replica/state', 'realm', 'host', 'threads'].map((name) => `instance/${name}`),
    ...['exceptions', 'globals', 'memories', 'tables', 'twins'].map((name) => `instance/realm/${name}`),
    ...['call', 'invoke', 'isolation', 'pause', 'realm', 'recycle/ways', 'repair', 'start', 'swap'].map(
      (name) => `manager/${name}`,
    ),
  ].map((name) => `crates/engine/src/${name}.rs`),
  // Compiled code is run as it is: what another engine has just made, and what was kept, once it is known that this
  // user has written it.
  ...['cache', 'compile'].map((name) => `crates/engine/src/instance/${name}.rs`),
  // The allocator is asked for what is free.
  'crates/engine/src/instance/heap.rs',
  // The tests' way in: the right to enter an instance is a value there.
  'crates/testkit/src/inside.rs',
  // Node-API by hand: js.rs wraps it, the others keep native records behind JS values or call a replica by its ticket.
  ...[
    'js',
    'js_only',
    'env',
    'exports',
    'imports',
    'inbox',
    'binding',
    ...['calls', 'leases', 'memories', 'snapshots'].map((name) => `binding/${name}`),
    'namespace',
    'options',
    'realm',
    'side',
    'threads',
    'lib',
    'wake',
  ].map((name) => `src/${name}.rs`),
]

const problems = []

for (const { room, manifest = `${room}/Cargo.toml`, bans } of laws) {
  for (const path of [...rustFiles(room), ...faceOf(room)]) {
    for (const [line, code] of codeLines(path)) {
      for (const ban of bans) {
        if (new RegExp(`\\b${ban}\\b`).test(code)) problems.push(`${path}:${line}: ${room} must not name ${ban}`)
      }
    }
  }
  for (const [line, name] of manifest === null ? [] : dependencies(manifest)) {
    if (bans.includes(name)) problems.push(`${manifest}:${line}: ${room} must not depend on ${name}`)
  }
}

const isUnsafe = new Set()
for (const path of ['src', 'crates'].flatMap(rustFiles)) {
  for (const [line, code] of codeLines(path)) {
    if (!/\bunsafe\b/.test(code)) continue
    isUnsafe.add(path)
    if (!mayBeUnsafe.includes(path))
      problems.push(`${path}:${line}: unsafe in a file that scripts/layers.mjs does not list`)
  }
}
for (const path of mayBeUnsafe) {
  if (!isUnsafe.has(path)) problems.push(`scripts/layers.mjs: ${path} needs no place in the list of unsafe files`)
}

// o1js → index.js → lib → binding, and in lib/ and o1js/ nothing knows the face or a file above itself but by this table.
const mayLoad = {
  'index.js': [
    './lib/binding.js',
    './lib/setup.js',
    './lib/errors.js',
    './lib/manager.js',
    './lib/namespace.js',
    './lib/readiness.js',
    './lib/glue/manager.js',
  ],
  'webassembly.js': ['./index.js'],
  'bin/wasm-molt.js': ['./check.js'],
  'bin/check.js': ['../index.js', './check-wasm.js'],
  'bin/check-wasm.js': [],
  // The only one that knows how the native side is loaded.
  'lib/binding.js': ['../binding.js'],
  'lib/errors.js': [],
  'lib/scratch.js': ['./binding.js'],
  'lib/scopes.js': [],
  'lib/readiness.js': [],
  'lib/tracing.js': [],
  'lib/recycling.js': ['./tracing.js'],
  'lib/options.js': ['./errors.js'],
  'lib/memory.js': ['./binding.js', './scratch.js'],
  'lib/instances.js': ['./binding.js', './errors.js', './memory.js', './options.js', './tracing.js'],
  'lib/setup.js': ['./binding.js', './errors.js', './instances.js', './scratch.js'],
  'lib/manager.js': [
    ...['./binding.js', './errors.js', './instances.js', './memory.js', './options.js', './recycling.js'],
    ...['./scopes.js', './tracing.js'],
  ],
  // What glue gets as WebAssembly: is given the binding, so that it can be given another.
  'lib/webassembly.js': [],
  'lib/namespace.js': ['./binding.js', './errors.js', './manager.js', './scopes.js', './webassembly.js'],
  // Pure: they know neither the engine nor a manager.
  'lib/glue/load.js': ['acorn', 'acorn-import-phases', 'import-meta-resolve', './conversions.js'],
  'lib/glue/conversions.js': [],
  'lib/glue/face.js': [],
  'lib/glue/finalizers.js': [],
  'lib/glue/timers.js': [],
  'lib/glue/threads.js': ['../binding.js', '../errors.js', '../options.js'],
  'lib/glue/manager.js': [
    ...[
      '../binding.js',
      '../errors.js',
      '../instances.js',
      '../manager.js',
      '../namespace.js',
      '../options.js',
      '../scopes.js',
    ],
    ...['../webassembly.js', './face.js', './finalizers.js', './load.js', './threads.js', './timers.js'],
  ],
  // The adapter for one package: it stands on what any program can have of us, and on nothing below.
  'o1js/inner.cjs': [],
  'o1js/handles.mjs': ['../index.js'],
  'o1js/settings.mjs': [],
  'o1js/facade.mjs': [],
  'o1js/glue.mjs': [],
  'o1js/pool.mjs': [],
  'o1js/state.mjs': [],
  'o1js/keeper.mjs': ['./state.mjs'],
  'o1js/index.mjs': [
    '../index.js',
    ...['facade', 'glue', 'handles', 'keeper', 'pool', 'settings', 'state'].map((name) => `./${name}.mjs`),
  ],
}
const inJs = [
  'index.js',
  'webassembly.js',
  ...['lib', 'bin', 'o1js'].flatMap((folder) => files(folder, (path) => /\.[cm]?js$/.test(path))),
]
for (const path of inJs) {
  const allowed = mayLoad[path]
  if (allowed === undefined) {
    problems.push(`${path}: scripts/layers.mjs does not say what it may load`)
    continue
  }
  for (const [line, name] of requires(path)) {
    if (!name.startsWith('node:') && !allowed.includes(name)) problems.push(`${path}:${line}: must not load ${name}`)
  }
}

if (problems.length > 0) {
  process.stderr.write(`${problems.join('\n')}\n`)
  process.exit(1)
}
process.stdout.write('layers: in order\n')

function rustFiles(folder) {
  return files(folder, (path) => path.endsWith('.rs'))
}

/** A room of a crate has its face beside its folder. */
function faceOf(room) {
  return existsSync(join(root, `${room}.rs`)) ? [`${room}.rs`] : []
}

function* codeLines(path) {
  const text = readFileSync(join(root, path), 'utf8')
  // One pass, because a quote may stand in a comment and two slashes in a string; line breaks stay, for the numbers.
  const code = text.replace(
    /\/\/.*|\/\*[\s\S]*?\*\/|r(#*)"[\s\S]*?"\1|"(?:\\[\s\S]|[^"\\])*"|'(?:\\.|[^'\\\n])'/g,
    (match) => match.replace(/[^\n]/g, ' '),
  )
  yield* code.split('\n').map((line, index) => [index + 1, line])
}

function* dependencies(manifest) {
  let inside = false
  for (const [index, line] of readFileSync(join(root, manifest), 'utf8').split('\n').entries()) {
    const section = line.match(/^\[(.+)\]/)?.[1]
    // What the workspace offers is not yet what a crate takes.
    if (section) inside = section.endsWith('dependencies') && !section.startsWith('workspace')
    const name = inside && line.match(/^([\w-]+)[\s.=]/)?.[1]
    if (name) yield [index + 1, name.replaceAll('-', '_')]
  }
}

function* requires(path) {
  if (!existsSync(join(root, path))) return
  for (const [index, line] of readFileSync(join(root, path), 'utf8').split('\n').entries()) {
    for (const [, name] of line.matchAll(/(?:require\(|from |import\()\s*['"]([^'"]+)['"]/g)) yield [index + 1, name]
  }
}
