import { onMolt, onV8 } from '/work/main/benchmark/engines.ts'
import { oniguruma } from '/work/main/benchmark/modules/oniguruma.ts'
let n = 0, bytes = 0
const orig = oniguruma.imports!
if (process.argv[2] === 'count') oniguruma.imports = (memory) => { const i = orig(memory); const f = i.env!.emscripten_memcpy_big!; i.env!.emscripten_memcpy_big = (a, b, c) => { n++; bytes += c!; return f(a!, b!, c!) }; const g = i.env!.emscripten_get_now!; i.env!.emscripten_get_now = () => { n++; return g() }; return i }
const host = process.argv[2] === 'v8' || process.argv[2] === 'count' ? onV8(oniguruma) : await onMolt(oniguruma, process.argv[3] ? JSON.parse(process.argv[3]) : undefined)
const f = await host.fresh()
f(); n = 0; f(); console.log('imports per unit', n, bytes)
const us: number[] = []
for (let i = 0; i < 300; i++) { const s = process.hrtime.bigint(); f(); us.push(Number(process.hrtime.bigint() - s) / 1000) }
us.sort((a, b) => a - b)
console.log(process.argv.slice(2).join(' '), 'p50', us[150].toFixed(0), 'p10', us[30].toFixed(0))
await host.close()
