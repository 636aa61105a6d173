import { bytesOf, digest, text } from '../inputs.mjs'

export const specifier = 'vscode-oniguruma'
export const toolchain = 'Emscripten'
export const notes =
  'Imports env and wasi; hook: instantiator. The glue keeps a pointer to a shared buffer of 10,000 bytes.'
export const grows = true
export const smallCalls = 1_000

const wasm = bytesOf('vscode-oniguruma/release/onig.wasm')
const lines = text('app.ts.txt').split('\n')

// As in TextMate grammars: the scanner says which one matches first, and where.
const patterns = [
  '(//).*$',
  String.raw`/\*\*?`,
  String.raw`(?<![_$[:alnum:]])(?:(?<=\.\.\.)|(?<!\.))(import|export|from|as|type|interface|class|extends|static|private|readonly|const|let|if|else|for|of|switch|case|default|break|continue|return|yield|throw|try|catch|finally|new|async|await|typeof|instanceof|void|get)(?![_$[:alnum:]])`,
  String.raw`\b(?<!\$)0(?:x|X)[0-9a-fA-F][0-9a-fA-F_]*(n)?\b(?!\$)|\b0(?:b|B)[01][01_]*(n)?\b`,
  String.raw`(?<!\$)(?:\b[0-9][0-9_]*(\.)?[0-9_]*(?:[eE][+-]?[0-9]+)?(n)?\b)(?!\$)`,
  String.raw`(['"])((?:\\.|(?!\1)[^\\])*)(\1)`,
  String.raw`(${'`'})((?:[^${'`'}\\$]|\\.|\$(?!\{))*)`,
  String.raw`(?<!\+\+|--|})(?<=[=(:,\[?+!]|^return|[^\._$[:alnum:]]return|^)\s*(\/)(?![\/*])(?=(?:[^\/\\\[]|\\.|\[([^\]\\]|\\.)+\])+\/([dgimsuvy]+|(?![\/\*])|(?=\/\*))(?!\s*[a-zA-Z0-9_$]))`,
  String.raw`(#?[_$[:alpha:]][_$[:alnum:]]*)(?=\s*(?:<[^()<>]*>)?\()`,
  String.raw`(?:(\?\.)|(\.))\s*(?=[_$[:alpha:]])`,
  String.raw`=>|\?\?=?|[-+*/%&|^]=|===?|!==?|<=|>=|&&|\|\||[-+*/%<>=!?:]`,
  '#?[_$[:alpha:]][_$[:alnum:]]*',
  String.raw`[\p{Lu}\p{So}—“”█]+`,
]

export async function expose(glue, { WebAssembly }) {
  await glue.loadWASM({ instantiator: (imports) => WebAssembly.instantiate(wasm, imports) })
  return glue
}

export function work(module, i) {
  const scanner = new module.OnigScanner(i % 2 === 0 ? patterns : patterns.toReversed())
  let tokens = 0
  const seen = []
  for (const line of lines) {
    const string = new module.OnigString(line)
    for (let at = 0; at <= line.length; ) {
      const match = scanner.findNextMatchSync(string, at)
      if (match === null) break
      tokens++
      const [{ start, end }] = match.captureIndices
      seen.push(`${match.index}:${match.captureIndices.map((c) => `${c.start}-${c.end}`)}`)
      at = Math.max(end, start + 1)
    }
    string.dispose()
  }
  scanner.dispose()
  return { tokens, digest: digest(seen.join('\n')) }
}

export function workSmall(module, i) {
  const scanner = new module.OnigScanner(['[0-9]+', 'x'])
  const string = new module.OnigString(`a${i} bx cc 12`)
  let sum = 0
  for (let n = 0; n < smallCalls; n++) sum += scanner.findNextMatchSync(string, n % 6).captureIndices[0].end
  string.dispose()
  scanner.dispose()
  return sum
}

// A scanner that nobody disposes of: the patterns and what they were compiled to. Node: 500 calls, 16 to 48 MiB.
export function leak(module, i) {
  const scanner = new module.OnigScanner(patterns.map((pattern) => `${pattern}|\\b${'~'.repeat(1 + (i % 9))}`))
  const string = new module.OnigString(lines[i % lines.length])
  const match = scanner.findNextMatchSync(string, 0)
  string.dispose()
  return match?.index ?? -1
}
