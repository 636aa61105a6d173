import { readFileSync } from 'node:fs'
import { type RealModule, read, resolve, take, write } from './module.ts'

export const input = readFileSync(new URL('../../examples/gofmt/input.go', import.meta.url))
export const expected = readFileSync(new URL('../../examples/gofmt/expected.go', import.meta.url), 'utf8')

export const gofmt: RealModule = {
  name: 'gofmt',
  origin: 'TinyGo, 0.3 MB',
  path: resolve('@wasm-fmt/gofmt/wasm'),
  calls: 200,
  open(guest) {
    const [alloc, format, outputPtr, outputLen, dispose] = [
      'alloc',
      'format',
      'output_ptr',
      'output_len',
      'dispose',
    ].map((name) => take(guest, name)) as [
      (...args: number[]) => number,
      () => number,
      () => number,
      () => number,
      () => number,
    ]
    return () => {
      write(guest, alloc(input.length), input)
      format()
      const text = read(guest, outputPtr(), outputLen())
      dispose()
      if (text !== expected) throw new Error('gofmt gave another text')
      return text
    }
  },
}
