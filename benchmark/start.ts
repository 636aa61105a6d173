// A process of the create group: loads one module on one engine and tells how long the first answers took.
// Loading Node and the package itself comes before the clock starts; so does the rest of what TypeScript's loader does on threads of its own.
import { readFileSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import { WasmModuleManager } from '../index.js'
import { dprint } from './modules/dprint.ts'
import type { Guest } from './modules/module.ts'

const [engine, path = '', cache = ''] = process.argv.slice(2)

await setTimeout(300)
const begun = process.hrtime.bigint()
const { guest, close } = engine === 'v8' ? onV8() : await onMolt()
const first = guest.exports.add ? guest.exports.add(40, 2) : guest.exports.get_plugin_info?.()
const firstNs = Number(process.hrtime.bigint() - begun)
if (!first) throw new Error('no answer')
if (guest.exports.format) dprint.open(guest)()
const workNs = Number(process.hrtime.bigint() - begun)
await close()
process.stdout.write(JSON.stringify({ firstNs, workNs }))

function onV8(): { guest: Guest; close(): Promise<void> } {
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(readFileSync(path)))
  const guest = { exports: exports as unknown as Guest['exports'], memory: exports.memory as Guest['memory'] }
  return { guest, close: async () => {} }
}

async function onMolt(): Promise<{ guest: Guest; close(): Promise<void> }> {
  const manager = await WasmModuleManager.create(path, { cache })
  const guest = { exports: manager.exports as Guest['exports'], memory: manager.memory }
  return { guest, close: () => manager.close() }
}
