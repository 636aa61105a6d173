// npm run asan [rust|js …] [-- words]: the Rust tests and a part of the JS tests under AddressSanitizer, our own code
// with debug assertions on, so that who enters a store beside somebody is told (crates/engine/src/instance/occupant.rs).
// npm run asan miri: the pure crate under miri, where a nightly toolchain has it.
//
// What is instrumented is ours: every load and store of these crates, generic code of others that they bring along
// included. Whatever else is in the process (std, wasmtime, Node) has its allocations watched, and not its accesses.
import { spawnSync } from 'node:child_process'
import { chmodSync, copyFileSync, existsSync, mkdirSync, realpathSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { ensureDependencies, fail, node, root, run, step } from './tools.mjs'

const TARGET = 'x86_64-unknown-linux-gnu'
const suites = { rust, js, miri }
const words = process.argv.slice(2)
const named = words.filter((word) => word in suites)
const picked = words.filter((word) => !(word in suites))

/** Reaches every file in src/, in ways that can go wrong with memory; docs/memory-safety.md says which reaches what. */
const SMOKE = [
  ...['call', 'exports', 'imports', 'load', 'reentrancy', 'errors', 'hooks', 'lease', 'memory', 'interrupt'],
  ...['reload', 'rolling', 'snapshot', 'fork', 'isolation', 'recycle', 'realms', 'glue', 'glue-finalizers'],
  ...['threads', 'workers', 'hammer'],
]
/** They measure resident memory, mappings, stack or time, all of which are others here. */
const MEASURES =
  /flat|leave nothing behind|gives? .*back|given back|resident|address space|depth|deep|stack|less than|within|quick|collections|fits? where|figures|milliseconds/

/** The same of the Rust tests, by parts of their names. */
const MEASURING = [
  'what_is_freed',
  'everything_back',
  'memory_of_the_realm_back',
  'the_memory_back',
  'nothing_behind',
  'keep_nothing',
]

const folder = join(root, 'target', 'asan')
const libs = { gcc: '', rust: '' }

if (process.platform !== 'linux' || process.arch !== 'x64') {
  fail('npm run asan needs Linux on x64: the sanitizer that comes with stable Rust is for that')
}
const ran = []
const wanted = named.length > 0 ? named : ['rust', 'js', 'miri']
if (wanted.some((name) => name !== 'miri')) prepare()
for (const name of wanted) ran.push(suites[name]())
step(`nothing found by: ${ran.filter(Boolean).join('; ')}`)

function prepare() {
  const out = (command, args) => spawnSync(command, args, { cwd: root, encoding: 'utf8' }).stdout?.trim() ?? ''
  libs.rust = join(out('rustc', ['--print', 'target-libdir', '--target', TARGET]), 'librustc-stable_rt.asan.a')
  if (!existsSync(libs.rust))
    fail(`${libs.rust} is missing: npm run asan needs rustup's stable toolchain for ${TARGET}`)
  // Node is not built with it, so it is loaded before Node; GCC's library and LLVM's have the same interface.
  libs.gcc = out('gcc', ['-print-file-name=libasan.so'])
  if (!existsSync(libs.gcc)) fail('npm run asan needs the library libasan of GCC (Debian: gcc; Fedora: libasan)')
  libs.gcc = realpathSync(libs.gcc)
  mkdirSync(folder, { recursive: true })
  // For our own crates alone. Everything else is compiled as ever, by the stable compiler as it is.
  const wrapper = join(folder, 'rustc')
  const flags = [
    ...['-Zsanitizer=address', '-Cforce-frame-pointers=yes', '-Cdebug-assertions=on'],
    ...['-Cdebuginfo=line-tables-only', '-Cstrip=none', '-Ccodegen-units=16', '-Copt-level=1'],
  ]
  const script = [
    '#!/bin/sh',
    'case " $* " in',
    '*" build_script_build "*) exec "$@" ;;',
    'esac',
    // The sanitizer is behind a flag that only unstable compilers take.
    `RUSTC_BOOTSTRAP=1 exec "$@" ${flags.join(' ')}`,
    '',
  ]
  writeFileSync(wrapper, script.join('\n'))
  chmodSync(wrapper, 0o755)
}

function cargo(command, own = []) {
  const target = ['--release', '--workspace', '--target', TARGET, '--target-dir', folder]
  run('cargo', [command, ...target, ...own], { env: environment() })
}

function environment() {
  const suppressions = join(root, 'scripts', 'memcheck', 'leaks.txt')
  return {
    RUSTC_WORKSPACE_WRAPPER: join(folder, 'rustc'),
    ASAN_OPTIONS: [
      'detect_leaks=1',
      // wasmtime and V8 have handlers of their own, and hand on what is none of theirs.
      'allow_user_segv_handler=1',
      // Frames elsewhere than on the stack would mislead whoever measures what is left of it.
      'detect_stack_use_after_return=0',
      'strict_string_checks=1',
      // Another code than that of any test.
      'exitcode=99',
    ].join(':'),
    LSAN_OPTIONS: `suppressions=${suppressions}:print_suppressions=0`,
  }
}

function rust() {
  step('rust tests under AddressSanitizer')
  const measuring = MEASURING.flatMap((name) => ['--skip', name])
  // Not the examples in docs: rustdoc links them by itself, without the sanitizer.
  const kinds = ['--lib', '--bins', '--tests', '--examples']
  cargo('test', [...kinds, ...(named.length === 1 && picked.length > 0 ? picked : ['--', ...measuring])])
  return 'the Rust tests'
}

function js() {
  ensureDependencies()
  step('addon with AddressSanitizer')
  cargo('build')
  const addon = join(folder, 'wasm-molt.node')
  copyFileSync(join(folder, TARGET, 'release', 'libwasm_molt.so'), addon)
  const specs = picked.filter((word) => !word.startsWith('-'))
  const flags = picked.filter((word) => word.startsWith('-'))
  const chosen = specs.length > 0 ? specs : SMOKE.map((name) => `__test__/${name}.spec.ts`)
  // Node asks of what is around a test as well, up to one of this name; what is in a `describe` is not left out.
  if (flags.length === 0) flags.push(`--test-name-pattern=/^(?!<root>)(?!.*(${MEASURES.source}))/`)
  step('js tests under AddressSanitizer')
  const env = {
    ...environment(),
    LD_PRELOAD: libs.gcc,
    NAPI_RS_NATIVE_LIBRARY_PATH: addon,
    WASM_MOLT_ASAN: '1',
    WASM_MOLT_ROUNDS: '500',
  }
  node(
    [
      ...['--expose-gc', '--import', 'tsx', '--test', '--test-reporter=spec', '--test-timeout=600000'],
      ...['--test-concurrency=1', ...flags, ...chosen],
    ],
    { env },
  )
  return `${chosen.length} files of JS tests`
}

/** There is no `unsafe` in the pure crate, and the compiler forbids it; miri would find what std is given wrongly. */
function miri() {
  if (!hasMiri()) {
    step('miri')
    const more = ['--component', 'miri', '--component', 'rust-src']
    spawnSync('rustup', ['toolchain', 'install', 'nightly', '--profile', 'minimal', ...more], { stdio: 'inherit' })
  }
  if (!hasMiri()) {
    const why = 'there is no miri here, and it could not be had: rustup toolchain install nightly --component miri'
    if (named.includes('miri')) fail(why)
    step(`NOT RUN: ${why}`)
    return undefined
  }
  step('the pure crate under miri')
  const tests = ['test', '-p', 'wasm-molt-lifecycle', '--lib', '--target-dir', join(root, 'target', 'miri')]
  // It has a hundred thousand waiters, which takes an interpreter hours.
  run('cargo', ['+nightly', 'miri', ...tests, '--', '--skip', 'a_queue_of_any_length_starts_on_a_small_stack'])
  return 'miri'
}

function hasMiri() {
  return spawnSync('cargo', ['+nightly', 'miri', '--version'], { stdio: 'ignore' }).status === 0
}
