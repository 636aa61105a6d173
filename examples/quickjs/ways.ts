// The ways in which the demo runs users' scripts, each in a process of its own: ways.ts WAY SCRIPTS TIMEOUT-MS FOLDER.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { Worker } from 'node:worker_threads'
import { WasmError } from '../../index.js'
import { send } from '../side.ts'
import { evaluate, quickjsWasm, ScriptError } from './guest.ts'
import { type Ending, noNews } from './news.ts'
import { instantiateWarm } from './plain.ts'
import { judge, type Outcome, userScript } from './scripts.ts'
import { createWarm, shop, type WarmOptions } from './warm.ts'
import type { Task } from './worker.ts'

interface Way {
  run(script: string): Promise<Outcome>
  /** Linear memory that has pages behind it. */
  memoryBytes?(): number
  generation?(): number
  /** Without it, endless scripts are left out. */
  canStop: boolean
  close(): Promise<void>
}

const [wayName = '', scripts = '', timeout = '', folder = ''] = process.argv.slice(2)
const total = Number(scripts)
const timeoutMs = Number(timeout)

const ways: Record<string, () => Promise<Way>> = {
  isolated: () => managed({ isolation: 'per-call' }),
  shared: () => managed({ isolation: 'shared' }),
  fresh,
  worker,
}

async function managed(options: WarmOptions): Promise<Way> {
  const { manager, run } = await createWarm(options)
  return {
    run: (script) => run(script, { timeoutMs }).then((text) => ({ text }), failed),
    memoryBytes: () => {
      const { pages } = manager.stats({ pages: true })
      return pages ? pages.privateBytes + pages.sharedBytes : 0
    },
    generation: () => manager.generation,
    canStop: true,
    close: () => manager.close(),
  }
}

/** Compiled once; each script gets an instance of its own, which is warmed up for it alone. On this thread, as Node's engine runs it. */
async function fresh(): Promise<Way> {
  const module = new WebAssembly.Module(readFileSync(quickjsWasm))
  const sources = shop()
  return {
    run: async (script) => {
      try {
        const [instance, interpreter] = instantiateWarm(module, sources)
        return { text: evaluate(instance, interpreter, script) }
      } catch (error) {
        return failed(error)
      }
    },
    canStop: false,
    close: async () => {},
  }
}

/** The same on a thread for each script, which can be stopped. */
async function worker(): Promise<Way> {
  const module = new WebAssembly.Module(readFileSync(quickjsWasm))
  const sources = shop()
  const program = await transpiled(['worker', 'plain', 'guest'])
  return {
    run: async (script) => {
      const thread = new Worker(program, { workerData: { module, sources, script } satisfies Task, execArgv: [] })
      try {
        return await new Promise<Outcome>((done, fail) => {
          thread.on('error', fail)
          thread.on('message', (message: 'warm' | Outcome) => {
            // A manager's timeout does not count the warm-up either.
            if (message === 'warm') setTimeout(() => done('stopped'), timeoutMs).unref()
            else done(message)
          })
        })
      } finally {
        await thread.terminate()
      }
    },
    canStop: true,
    close: async () => {},
  }
}

/** As JavaScript, so that no worker spends its time on a loader for TypeScript. Answers with the first one's URL. */
async function transpiled(names: string[]): Promise<URL> {
  const { default: ts } = await import('typescript')
  const compilerOptions = {
    target: ts.ScriptTarget.ES2023,
    module: ts.ModuleKind.ESNext,
    verbatimModuleSyntax: true,
    rewriteRelativeImportExtensions: true,
  }
  mkdirSync(folder, { recursive: true })
  const files = names.map((name) => {
    const source = readFileSync(new URL(`${name}.ts`, import.meta.url), 'utf8')
    const file = join(folder, `${name}.js`)
    writeFileSync(file, ts.transpileModule(source, { compilerOptions }).outputText)
    return file
  })
  return pathToFileURL(files[0] ?? '')
}

function failed(error: unknown): Outcome {
  if (error instanceof ScriptError) return { exception: error.message }
  if (error instanceof WasmError && error.code === 'ERR_WASM_TIMEOUT') return 'stopped'
  throw error
}

const began = performance.now()
const way = await (ways[wayName] as () => Promise<Way>)()
const startMs = performance.now() - began

const news = noNews()
const found = new Set<string>()
const timesMs: number[] = []
let memoryBytes = 0
let told = performance.now()

function look(script: number): void {
  const bytes = way.memoryBytes?.() ?? 0
  if (bytes !== memoryBytes) news.samples.push([script, bytes])
  memoryBytes = bytes
}

look(0)
for (let user = 1; user <= total; user += 1) {
  const script = userScript(user)
  const isEndless = script.expected === 'endless'
  if (isEndless && !way.canStop) {
    news.leftOut += 1
  } else {
    const started = performance.now()
    const outcome = await way.run(script.text)
    if (!isEndless) timesMs.push(performance.now() - started)
    if (outcome !== 'stopped' && 'exception' in outcome && /out of memory/.test(outcome.exception))
      news.firstFull ??= user
    const verdict = judge(script, outcome)
    if (verdict.isRight) news[isEndless ? 'stopped' : 'right'] += 1
    else if (outcome !== 'stopped' && 'text' in outcome) news.wrong += 1
    else news.failed += 1
    if (verdict.found) {
      news.leftovers += 1
      for (const thing of verdict.found.split(' ')) found.add(thing)
    }
  }
  look(user)
  news.scripts = user
  if (performance.now() - told > 100 || user === total) {
    await send({ ...news, found: [...found] })
    news.samples = []
    told = performance.now()
  }
}
const generation = way.generation?.()
const rssBytes = process.memoryUsage.rss()
await send({
  timesMs,
  startMs,
  rssBytes,
  rssBytesPeak: process.resourceUsage().maxRSS * 1024,
  generation,
} satisfies Ending)
await way.close()
