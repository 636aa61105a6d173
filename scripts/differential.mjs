// npm run differential [-- --modules 3000 --seed N]: the same modules on V8's engine and on ours (__test__/differential.ts).
import { parseArgs } from 'node:util'
import { buildAddon, node, step } from './tools.mjs'

const { values } = parseArgs({
  options: {
    modules: { type: 'string', default: '3000' },
    seed: { type: 'string', default: String(Math.floor(Math.random() * 2 ** 31)) },
  },
})
buildAddon()
step(`${values.modules} modules on two engines, seed ${values.seed}`)
const program = `
  import { differential, validity } from './__test__/differential.ts'
  const [seed, modules] = [${Number(values.seed)}, ${Number(values.modules)}]
  for (const compare of [differential, validity]) {
    const started = performance.now()
    const tally = await compare(seed, modules)
    console.log(compare.name, JSON.stringify(tally), \`\${((performance.now() - started) / 1000).toFixed(1)} s\`)
  }`
node(['--expose-gc', '--import', 'tsx', '--input-type=module', '--eval', program])
