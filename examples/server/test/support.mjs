// What the tests share: the server as a process, requests by hand, and metrics as numbers.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import http from 'node:http'
import { createInterface } from 'node:readline'
import { setImmediate } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

export const TOKEN = 'for the tests'

/** A server in a process of its own, which does not outlive its test. */
export async function startServer(t, env = {}) {
  const main = fileURLToPath(new URL('../main.mjs', import.meta.url))
  const child = spawn(process.execPath, [main], {
    env: {
      ...process.env,
      NODE_OPTIONS: '',
      NODE_TEST_CONTEXT: '',
      HOST: '127.0.0.1',
      PORT: '0',
      ADMIN_TOKEN: TOKEN,
      ...env,
    },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = once(child, 'exit').then(([code, signal]) => ({ code, signal }))
  t.after(async () => {
    child.kill('SIGKILL')
    await ended
  })
  const lines = []
  const output = createInterface({ input: child.stdout })
  const closed = once(output, 'close')
  const listening = new Promise((resolve) => {
    output.on('line', (line) => {
      const told = JSON.parse(line)
      lines.push(told)
      const [address] = told.msg.match(/http:\S+/) ?? []
      if (address !== undefined) resolve(new URL(address))
    })
  })
  const base = await Promise.race([
    listening,
    ended.then(({ code, signal }) => {
      throw new Error(`the server ended with ${signal ?? code}\n${lines.map(({ msg }) => msg).join('\n')}`)
    }),
  ])
  return { base, child, ended, lines, closed }
}

/** One request, answered whole. Errors are those of the connection. */
export function ask(base, method, path, { agent = false, headers = {}, body = '' } = {}) {
  return new Promise((resolve, reject) => {
    const request = http.request(new URL(path, base), { method, agent, headers })
    request.on('error', reject)
    request.on('response', (response) => wholeOf(response).then(resolve, reject))
    request.end(body)
  })
}

export async function wholeOf(response) {
  const chunks = []
  for await (const chunk of response) chunks.push(chunk)
  return { status: response.statusCode, headers: response.headers, body: Buffer.concat(chunks).toString() }
}

export const TEXT = { 'content-type': 'text/plain; charset=utf-8' }

export function convert(base, text, options = {}) {
  return ask(base, 'POST', '/convert', { headers: TEXT, body: text, ...options })
}

export function swap(base, build, token = TOKEN) {
  const headers = { authorization: `Bearer ${token}`, 'content-type': 'application/json' }
  return ask(base, 'POST', '/admin/build', { headers, body: JSON.stringify({ build }) })
}

/** What the two builds make of a text. */
export const upper = {
  ascii: (text) => text.replace(/[a-z]/g, (letter) => letter.toUpperCase()),
  latin: (text) => text.replace(/[a-zà-öø-þ]/g, (letter) => letter.toUpperCase()),
}

/** Texts of many lengths, each with letters that tell the builds apart. */
export const texts = Array.from(
  { length: 25 },
  (_, i) => `${i}: crème brûlée, smörgåsbord — and plain words. `.repeat(1 + ((i * 7) % 40)) + i,
)

export async function scrape(base) {
  const { status, body } = await ask(base, 'GET', '/metrics')
  if (status !== 200) throw new Error(`/metrics answered ${status}: ${body}`)
  return metricsOf(body)
}

/** Prometheus' text format: types by name, and values by name and sorted labels, as in `name{a="1",b="2"}`. */
export function metricsOf(text, ignored = []) {
  const types = new Map()
  const values = new Map()
  for (const line of text.split('\n')) {
    if (line === '') continue
    const [, type, kind] = line.match(/^# TYPE (\w+) (\w+)$/) ?? []
    if (type !== undefined) {
      if (types.has(type)) throw new Error(`${type} is there twice`)
      types.set(type, kind)
    } else if (!line.startsWith('#')) {
      const [, name, labels = '', value] = line.match(/^(\w+)(?:\{(.*)\})? (\S+)$/) ?? []
      if (name === undefined) throw new Error(`this is no sample: ${line}`)
      const pairs = [...labels.matchAll(/(\w+)="((?:\\.|[^"\\])*)"/g)].filter(([, label]) => !ignored.includes(label))
      const key = pairs.map(([, label, value]) => `${label}="${value}"`).sort()
      values.set(key.length === 0 ? name : `${name}{${key.join(',')}}`, Number(value.replace('Nan', 'NaN')))
    }
  }
  return { types, values }
}

/** Repeats `look` until it answers something; fails once that has taken too long, be it one look that never ends. */
export async function until(look, what, deadlineMs = 30_000) {
  const late = new AbortController()
  const timer = setTimeout(() => late.abort(), deadlineMs)
  const tooLate = once(late.signal, 'abort').then(() => {
    throw new Error(`it took too long until ${what}`)
  })
  // Whoever is in time leaves it to nobody.
  tooLate.catch(() => {})
  try {
    for (;;) {
      const found = await Promise.race([look(), tooLate])
      if (found) return found
      await setImmediate()
    }
  } finally {
    clearTimeout(timer)
  }
}
