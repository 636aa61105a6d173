import { contest, ratio, slow } from './contest.ts'
import { onMolt, onV8 } from './engines.ts'
import { dprint } from './modules/dprint.ts'
import { gofmt } from './modules/gofmt.ts'
import { oniguruma } from './modules/oniguruma.ts'
const which = process.argv[2]
const module: any = { gofmt, dprint, onig: oniguruma }[which as 'gofmt']
const v8 = onV8(module)
const molt = await onMolt(module)
const turn = { v8: slow(module.calls, () => v8.fresh()), molt: slow(module.calls, () => molt.fresh()) }
for (let i = 0; i < 8; i++) {
  await turn.v8()
  await turn.molt()
}
const s = await contest(Number(process.argv[3] ?? 9), turn)
console.log(which, process.env.LABEL, 'ratio', JSON.stringify(ratio(s.v8, s.molt)), JSON.stringify(s).slice(0, 300))
await molt.close()
process.exit(0)
