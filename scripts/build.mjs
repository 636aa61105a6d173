// npm run build, npm run build:debug: the addon, its loader (binding.js) and its types (binding.d.ts).
import { buildAddon } from './tools.mjs'

buildAddon({ debug: process.argv.includes('--debug') })
