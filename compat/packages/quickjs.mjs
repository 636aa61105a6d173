import { newQuickJSWASMModuleFromVariant } from 'quickjs-emscripten-core'
import { digest, text } from '../inputs.mjs'

export const specifier = '@jitl/quickjs-wasmfile-release-sync'
export const toolchain = 'Emscripten'
export const notes =
  'Memory made by the glue and imported; the glue imports its own parts dynamically; host functions call back into the guest.'
export const grows = true
export const smallCalls = 1_000

const prose = text('prose.txt')
const script = `
  const words = new Map()
  for (const word of source.toLowerCase().match(/[a-z]+/g)) words.set(word, (words.get(word) ?? 0) + 1)
  const sorted = [...words].sort(([a, m], [b, n]) => n - m || (a < b ? -1 : 1)).slice(0, 20)
  const tree = { depth: 0 }
  for (let i = 0, at = tree; i < 60; i++) at = at.child = { depth: i + 1, list: Array.from({ length: 8 }, (_, n) => n * i) }
  let sum = 0
  // The host calls the second argument, from inside the call.
  for (let i = 0; i < 40; i++) sum += twice(i, (x) => sum % 7 + twice(x, (y) => y + round))
  let caught
  try { refuse('no ' + round) } catch (error) { caught = error.message }
  const primes = []
  for (let n = 2; primes.length < 150; n++) if (primes.every((p) => n % p)) primes.push(n)
  JSON.stringify({ sorted, sum, caught, last: primes.at(-1), tree: JSON.stringify(tree).length, re: source.replace(/(\\w+) (\\w+)/g, '$2 $1').length })
`

export const expose = (glue) => newQuickJSWASMModuleFromVariant(glue.default)

/** An interpreter with two host functions. */
function interpreter(module) {
  const vm = module.newContext()
  const set = (name, fn) => vm.newFunction(name, fn).consume((made) => vm.setProp(vm.global, name, made))
  set('twice', (value, fn) => {
    let last = value.dup()
    for (let n = 0; n < 2; n++) {
      const next = vm.unwrapResult(vm.callFunction(fn, vm.undefined, last))
      last.dispose()
      last = next
    }
    return last
  })
  set('refuse', (why) => {
    throw new Error(`refused: ${vm.getString(why)}`)
  })
  return vm
}

export function work(module, i) {
  const vm = interpreter(module)
  try {
    vm.newString(prose).consume((source) => vm.setProp(vm.global, 'source', source))
    vm.newNumber(i).consume((round) => vm.setProp(vm.global, 'round', round))
    const result = vm.unwrapResult(vm.evalCode(script, 'work.js')).consume(vm.dump)
    const { sum, caught, last } = JSON.parse(result)
    return { sum, caught, last, digest: digest(result) }
  } finally {
    vm.dispose()
  }
}

export function workSmall(module, i) {
  const vm = module.newContext()
  let sum = i
  for (let n = 0; n < smallCalls; n += 2) sum += vm.newNumber(n).consume((made) => vm.getNumber(made))
  vm.dispose()
  return sum
}

// An interpreter that nobody disposes of. Node: 500 calls, 16 to 48 MiB.
export function leak(module, i) {
  const vm = interpreter(module)
  return vm
    .unwrapResult(vm.evalCode(`const list = Array.from({ length: 2000 }, (_, n) => n + ${i}); list.length`))
    .consume(vm.dump)
}
