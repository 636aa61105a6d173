import { type Guest, type RealModule, resolve, sample, take, write } from './module.ts'

// In the manner of a TextMate grammar: the earliest match of any wins, then the search goes on behind it.
const patterns = [
  '//.*$',
  String.raw`"(?:\\.|[^"\\])*"`,
  String.raw`'(?:\\.|[^'\\])*'`,
  '`(?:\\\\.|[^`\\\\])*`',
  String.raw`\b(?:async|await|break|case|catch|class|const|constructor|continue|default|delete|else|export|extends|finally|for|from|function|get|if|import|in|instanceof|let|new|of|return|set|static|super|switch|this|throw|try|typeof|var|void|while|yield)\b`,
  String.raw`\b(?:true|false|null|undefined|NaN|Infinity)\b`,
  String.raw`\b(?:0[xX][0-9a-fA-F]+|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`,
  String.raw`([A-Za-z_$][\w$]*)\s*(?=\()`,
  String.raw`(?<=\.)[A-Za-z_$][\w$]*`,
  String.raw`[A-Za-z_$][\w$]*`,
  String.raw`=>|\+\+|--|&&|\|\||\?\?|[=!]==?|[<>]=?|[-+*/%&|^~?:]`,
]
const captureGroups = 256
/** Where OnigSyntaxDefault lies in this build: what the module registers as ONIG_SYNTAX_DEFAULT. */
const defaultSyntax = 284_768
const encoder = new TextEncoder()
const lines = new TextDecoder()
  .decode(sample)
  .split('\n')
  .map((line) => encoder.encode(line))
const longest = Math.max(...lines.map((line) => line.length))

/** The regular expressions behind VS Code's colours. One unit of work: all tokens of a source file. */
export const oniguruma: RealModule = {
  name: 'vscode-oniguruma',
  origin: 'C, 0.5 MB',
  path: resolve('vscode-oniguruma/release/onig.wasm'),
  calls: 8,
  imports(memory) {
    const nothing = () => 0
    return {
      env: {
        emscripten_memcpy_big: (to = 0, from = 0, size = 0) => {
          new Uint8Array(memory()).copyWithin(to, from, from + size)
          return to
        },
        emscripten_get_now: () => performance.now(),
        // The 16 MB it begins with are enough here.
        emscripten_resize_heap: nothing,
        _embind_register_constant: nothing,
        _embind_register_void: nothing,
        _embind_register_bool: nothing,
        _embind_register_integer: nothing,
        _embind_register_bigint: nothing,
        _embind_register_float: nothing,
        _embind_register_std_string: nothing,
        _embind_register_std_wstring: nothing,
        _embind_register_emval: nothing,
        _embind_register_memory_view: nothing,
      },
      wasi_snapshot_preview1: { fd_write: nothing },
    }
  },
  open(guest) {
    take(guest, '__wasm_call_ctors')()
    const find = take(guest, 'findNextOnigScannerMatch')
    const scanner = createScanner(guest)
    const text = take(guest, 'omalloc')(longest)
    let cacheId = 0
    return () => {
      let tokens = 0
      let checksum = 0
      for (const line of lines) {
        write(guest, text, line)
        cacheId++
        for (let position = 0; position < line.length; ) {
          const found = find(scanner, cacheId, text, line.length, position, captureGroups)
          if (found === 0) break
          const [pattern = 0, , start = 0, end = 0] = new Uint32Array(guest.memory.buffer, found, 4)
          tokens++
          checksum = (Math.imul(checksum, 31) + pattern * 65_537 + start * 257 + end) | 0
          position = Math.max(end, position + 1)
        }
      }
      if (tokens === 0) throw new Error('oniguruma found nothing')
      return `${tokens} tokens, ${checksum}`
    }
  },
}

function createScanner(guest: Guest): number {
  const allocate = take(guest, 'omalloc')
  const texts = patterns.map((pattern) => encoder.encode(pattern))
  const pointers = texts.map((text) => {
    const at = allocate(text.length)
    write(guest, at, text)
    return at
  })
  const words = (values: number[]) => {
    const at = allocate(values.length * 4)
    write(guest, at, new Uint8Array(Uint32Array.from(values).buffer))
    return at
  }
  const lengths = texts.map((text) => text.length)
  const scanner = take(guest, 'createOnigScanner')(
    words(pointers),
    words(lengths),
    texts.length,
    captureGroups,
    defaultSyntax,
  )
  if (scanner === 0) throw new Error('oniguruma refused a pattern')
  return scanner
}
