// The loop that both sides run, and the news of it that they send to main.ts.
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { send } from '../side.ts'

export const gofmtWasm = fileURLToPath(import.meta.resolve('@wasm-fmt/gofmt/wasm'))

/** What a side tells since its last news. */
export interface News {
  calls: number
  correct: number
  /** Answered with another text than expected. */
  wrong: number
  failed: number
  memoryBytes: number
  rssBytes: number
  reloads: number
  /** [call, bytes of linear memory] whenever that changed. */
  samples: [number, number][]
  /** Seconds since the start. */
  firstFailure?: { call: number; text: string; seconds: number }
}
export interface Ending {
  seconds: number
  rssBytesPeak: number
  pausesMs: number[]
}

export interface Side {
  format(source: string): string | Promise<string>
  memoryBytes(): number
  /** How long each reload kept calls waiting. */
  pausesMs?: number[]
}

export async function run(side: Side): Promise<void> {
  const total = Number(process.argv[2])
  const input = read('input.go')
  const expected = read('expected.go')
  const news: News = { calls: 0, correct: 0, wrong: 0, failed: 0, memoryBytes: 0, rssBytes: 0, reloads: 0, samples: [] }
  const started = performance.now()
  let told = started

  for (let call = 1; call <= total; call++) {
    // No two calls have the same answer, so a stale one cannot pass for a fresh one.
    const mark = `\n// call ${call}\n`
    try {
      if ((await side.format(input + mark)) === expected + mark) news.correct++
      else news.wrong++
    } catch (error) {
      news.failed++
      news.firstFailure ??= { call, text: String(error), seconds: (performance.now() - started) / 1000 }
    }
    news.calls = call
    const memoryBytes = side.memoryBytes()
    if (memoryBytes !== news.memoryBytes) news.samples.push([call, memoryBytes])
    news.memoryBytes = memoryBytes
    news.reloads = side.pausesMs?.length ?? 0
    if (performance.now() - told > 100 || call === total) {
      news.rssBytes = process.memoryUsage.rss()
      await send(news)
      news.samples = []
      told = performance.now()
    }
  }
  await send({
    seconds: (performance.now() - started) / 1000,
    rssBytesPeak: process.resourceUsage().maxRSS * 1024,
    pausesMs: side.pausesMs ?? [],
  })
}

function read(name: string): string {
  return readFileSync(new URL(name, import.meta.url), 'utf8')
}
