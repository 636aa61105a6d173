// npm run fmt: formats Rust, TypeScript and JSON. With --check it only says what it would change.
import { ensureDependencies, run, step, tool } from './tools.mjs'

const check = process.argv.includes('--check')
ensureDependencies()
step('format')
run('cargo', ['fmt', '--all', ...(check ? ['--check'] : [])])
tool('@biomejs/biome', 'biome', ['format', ...(check ? [] : ['--write'])])
