import { bytesOf, digest, text } from '../inputs.mjs'

export const specifier = 'tiktoken/init'
export const toolchain = 'wasm-bindgen'
export const notes =
  'The imports are the glue module itself; hook: init(callback), with an instanceof check; finalizers free objects.'
export const grows = true
export const smallCalls = 1_000

const wasm = bytesOf('tiktoken/tiktoken_bg.wasm')
const texts = ['prose.txt', 'server.go.txt', 'app.ts.txt'].map(text)

// A vocabulary of one's own: all bytes, and some pairs.
const ranks = Array.from({ length: 1_500 }, (_, n) => {
  const bytes = n < 256 ? [n] : [97 + (n % 26), 97 + (Math.floor(n / 26) % 26), ...(n > 932 ? [97 + (n % 7)] : [])]
  return Buffer.from(bytes).toString('base64')
})
const vocabulary = `! 0 ${[...new Set(ranks)].join(' ')}`

export async function expose(glue, { WebAssembly }) {
  await glue.init((imports) => WebAssembly.instantiate(wasm, imports))
  const { Tiktoken } = glue
  return {
    Tiktoken,
    encoder: glue.get_encoding('cl100k_base', { '<|note|>': 100_300 }),
    decoder: new TextDecoder(),
  }
}

export function work({ encoder, decoder }, i) {
  const input = `${texts[i % texts.length]}\n<|note|> ${i}`
  const tokens = encoder.encode(input, ['<|note|>'])
  const back = decoder.decode(encoder.decode(tokens))
  let refused
  try {
    encoder.encode('<|note|>', [], 'all')
  } catch (error) {
    refused = error.message
  }
  return { tokens: tokens.length, same: back === input, digest: digest(new Uint8Array(tokens.buffer)), refused }
}

export function workSmall({ encoder }, i) {
  let sum = i
  for (let n = 0; n < smallCalls; n++) sum += encoder.decode_single_token_bytes(1_000 + n).length
  return sum
}

// An encoder that nobody frees. The glue's finalizer would, once the collector comes by, on the event loop's next turn.
// Node: 500 calls take memory from 17 to 220 MiB without a turn of the event loop, to 88 MiB with one now and then.
export function leak({ Tiktoken }, i) {
  const encoder = new Tiktoken(vocabulary, { '<|end|>': 2_000 + i }, String.raw`\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+`)
  return encoder.encode_ordinary('some words to encode').length
}
