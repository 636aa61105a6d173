import { digest, text } from '../inputs.mjs'

export const specifier = '@wasm-fmt/gofmt'
export const toolchain = 'TinyGo'
export const notes = 'Imports nothing; instantiated while the glue is evaluated (ESM, synchronous constructors).'
export const grows = true
export const smallCalls = 300

// A file of some 20 KB, as one finds them, and as nobody would leave them.
const [server, parser] = ['server.go.txt', 'parser.go.txt'].map(text)
const body = (source) => source.slice(source.indexOf('\n// '))
const large = `${server}${body(parser)}${body(server)}${body(parser)}`
const spoilt = (source) => source.replaceAll(/^\t+/gm, ' ').replaceAll(' := ', ':=').replaceAll(' == ', '==')
const sources = [large, spoilt(large), server, spoilt(server), parser, spoilt(parser)]

export function work(module, i) {
  const formatted = module.format(`${sources[i % 2]}\n// ${i}\n`)
  return { length: formatted.length, digest: digest(formatted), refused: refusal(module, i) }
}

function refusal(module, i) {
  try {
    return module.format(`package p\n\nfunc f${i}( {\n`)
  } catch (error) {
    return error.message
  }
}

export function workSmall(module, i) {
  let length = 0
  for (let n = 0; n < smallCalls; n++) length += module.format(`package p${i}\nvar x=${n % 10}\n`).length
  return length
}

// Everything that is formatted leaves something behind. On Node's engine 500 calls take memory from 8 to 128 MiB, by doubling.
export const leak = (module, i) => module.format(sources[2 + (i % 4)]).length
