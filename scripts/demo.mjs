// npm run demo: sets itself up, then shows a leaking formatter, and then a warm interpreter that nothing sticks to.
// -- --scene gofmt or --scene quickjs shows one of them; other flags: examples/gofmt/main.ts, examples/quickjs/demo.ts.
import { parseArgs } from 'node:util'
import { buildAddon, fail, node } from './tools.mjs'

const text = { type: 'string' }
const flagsOf = {
  gofmt: { calls: text, bound: text, out: text },
  quickjs: { scripts: text, timeout: text, out: text },
}
const programs = { gofmt: 'examples/gofmt/main.ts', quickjs: 'examples/quickjs/demo.ts' }

const { scene, ...flags } = read()
if (scene !== undefined && !(scene in programs)) fail(`--scene must be gofmt or quickjs, not "${scene}"`)

buildAddon()
if (scene !== 'quickjs') show('gofmt', flags)
if (scene === undefined) process.stdout.write('\n\n')
if (scene !== 'gofmt') {
  // Both scenes are short if the first one is; a chart that was asked for is the first one's.
  const { calls, out, ...rest } = flags
  const scripts = Number(calls) < 50_000 ? String(Math.max(60, Math.round(Number(calls) / 50))) : undefined
  show('quickjs', scene ? flags : { ...(scripts && { scripts }), ...rest })
}

/** Starts a scene with what is meant for it; alone, it is told everything, and refuses what it does not know. */
function show(name, values) {
  const known = Object.entries(values).filter(([flag]) => scene || flag in flagsOf[name])
  node(['--import', 'tsx', programs[name], ...known.flatMap(([flag, value]) => [`--${flag}`, value])])
}

function read() {
  try {
    return parseArgs({ options: { scene: text, ...flagsOf.gofmt, ...flagsOf.quickjs } }).values
  } catch (error) {
    return fail(
      `${error.message}\nnpm run demo [-- --scene gofmt|quickjs --calls N --bound MB --scripts N --timeout MS --out FILE]`,
    )
  }
}
