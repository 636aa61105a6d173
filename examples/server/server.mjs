// A server whose route runs a module that leaks, and which stays within its bounds and answers every request all the same.
import { createHash, timingSafeEqual } from 'node:crypto'
import { existsSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import fastify, { LogController } from 'fastify'
import client from 'prom-client'
import { readiness, WasmModuleManager } from '../../index.js'
import { collectManagers, observeCalls } from '../telemetry/prom-client.mjs'

const MIB = 2 ** 20

/** What went wrong is for whoever asked, or for a later try; everything else is a 500. */
const STATUS = {
  ERR_WASM_QUEUE_FULL: 503,
  ERR_WASM_CLOSED: 503,
  ERR_WASM_RELOAD_FAILED: 503,
  ERR_WASM_TIMEOUT: 504,
}

/**
 * * `builds`: a folder URL with a .wat or .wasm file for each build of the module.
 * * `adminToken`: without one there is no way to swap builds.
 */
export async function createService({
  build = 'ascii',
  builds = new URL('builds/', import.meta.url),
  instances = 2,
  recycleBytes = 64 * MIB,
  limitBytes = 2 * recycleBytes,
  adminToken,
  logger = true,
} = {}) {
  const sourceOf = (name) =>
    ['wasm', 'wat'].map((type) => new URL(`${name}.${type}`, builds)).find((url) => existsSync(url))

  const manager = await WasmModuleManager.create(sourceOf(build), {
    name: 'converter',
    instances,
    // Instances go one at a time, in the middle of load, long before the limit would make a conversion fail.
    recycle: { memory: recycleBytes },
    limits: { memoryBytes: limitBytes, timeoutMs: 5000 },
  })

  const app = fastify({
    logger,
    logController: new LogController({ disableRequestLogging: true }),
    bodyLimit: MIB,
    // Whoever was accepted is answered, also while the server closes; the connection ends with the answer.
    return503OnClosing: false,
  })
  const { log } = app
  manager.on('recycle', ({ reason, instance, calls, pauseMs, memoryBytesBefore }) => {
    log.debug({ reason, instance, calls, pauseMs, memoryBytesBefore }, 'recycled')
  })
  manager.on('reload', ({ reason, generation }) => log.debug({ reason, generation }, 'reloaded'))
  manager.on('reload:failed', (error) => log.error({ error: error.message }, 'not reloaded'))
  manager.on('trap', (error) => log.error({ trap: error.trap, stack: error.wasmStack }, 'trapped'))

  const registry = new client.Registry()
  client.collectDefaultMetrics({ register: registry })
  collectManagers(client, [manager], registry)
  const stopObserving = observeCalls(client, registry)

  let isDraining = false
  const requests = { accepted: 0, answered: 0 }
  app.addHook('onRequest', async (_request, reply) => {
    requests.accepted += 1
    // Clients come back by another connection, and so to another server.
    if (isDraining) reply.header('connection', 'close')
  })
  app.addHook('onResponse', async () => {
    requests.answered += 1
  })

  app.setErrorHandler((error, _request, reply) => {
    const { code, message } = error
    if (!code?.startsWith('ERR_WASM_')) return reply.send(error)
    const status = STATUS[code] ?? 500
    log.warn({ code, message }, 'not converted')
    if (status === 503) reply.header('retry-after', '1')
    return reply.code(status).send({ error: code })
  })

  // Bytes in, bytes out.
  const asBytes = (_request, body, done) => done(null, body)
  app.addContentTypeParser(['text/plain', 'application/octet-stream'], { parseAs: 'buffer' }, asBytes)

  app.post('/convert', async (request, reply) => {
    if (!Buffer.isBuffer(request.body)) return reply.code(415).send({ error: 'text/plain or application/octet-stream' })
    // Waiting for an instance included: nobody is left hanging.
    const options = { timeoutMs: 10_000 }
    const { buffer, byteOffset, byteLength } = await manager.invoke('convert', request.body, options)
    return reply.type('text/plain; charset=utf-8').send(Buffer.from(buffer, byteOffset, byteLength))
  })

  /** Liveness: would a restart help? */
  app.get('/healthz', async (_request, reply) => {
    const { status } = readiness(manager)
    return reply.code(status === 'failed' ? 503 : 200).send({ status })
  })

  /** Readiness: should requests come here? */
  app.get('/readyz', async (_request, reply) => {
    const ready = readiness(manager)
    const isReady = ready.isReady && !isDraining
    const status = isDraining && ready.isReady ? 'draining' : ready.status
    return reply.code(isReady ? 200 : 503).send({ ...ready, isReady, status })
  })

  app.get('/metrics', async (_request, reply) => reply.type(registry.contentType).send(await registry.metrics()))

  if (adminToken !== undefined) {
    const digest = (text) => createHash('sha256').update(text).digest()
    const expected = digest(`Bearer ${adminToken}`)
    app.post('/admin/build', {
      onRequest: async (request, reply) => {
        if (!timingSafeEqual(digest(request.headers.authorization ?? ''), expected)) return reply.code(401).send()
      },
      schema: {
        body: {
          type: 'object',
          required: ['build'],
          properties: { build: { type: 'string', pattern: '^[a-z0-9-]+$' } },
        },
      },
      handler: async (request, reply) => {
        const { build } = request.body
        const source = sourceOf(build)
        if (source === undefined) return reply.code(404).send({ error: `there is no build ${build}` })
        try {
          // Rolling: nobody waits, and what is in flight ends on the build that it began on.
          return await manager.reload({ source, strategy: 'rolling', reason: 'deploy' })
        } catch ({ code, message }) {
          log.error({ build, code, message }, 'not swapped')
          return reply.code(409).send({ error: code, message })
        }
      },
    })
  }

  /**
   * Not ready from now on; then, once balancers have had the time to notice, accepts nothing more, answers what it has
   * accepted, and releases the module.
   */
  async function shutdown(delayMs = 0) {
    isDraining = true
    await setTimeout(delayMs)
    await app.close()
    await manager.close()
    stopObserving()
    log.info(requests, 'closed')
  }

  return { app, manager, shutdown }
}
