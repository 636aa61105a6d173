// The server as a process, set up by its environment.
import { createService } from './server.mjs'

const { env } = process
const number = (name, fallback) => (env[name] === undefined ? fallback : Number(env[name]))

const { app, shutdown } = await createService({
  build: env.BUILD,
  instances: number('INSTANCES'),
  recycleBytes: number('RECYCLE_BYTES'),
  limitBytes: number('LIMIT_BYTES'),
  adminToken: env.ADMIN_TOKEN,
  logger: { level: env.LOG_LEVEL ?? 'info' },
})
await app.listen({ host: env.HOST ?? '127.0.0.1', port: number('PORT', 3000) })

for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => end(signal))

/** Nothing is left that would keep the process alive, so it ends by itself, with 0. */
async function end(signal) {
  app.log.info({ signal }, 'closing')
  const deadline = setTimeout(
    () => {
      app.log.fatal('it took too long')
      process.exit(1)
    },
    number('SHUTDOWN_TIMEOUT_MS', 25_000),
  )
  // As long as it takes until nobody sends requests here any more: in Kubernetes, a few seconds.
  await shutdown(number('SHUTDOWN_DELAY_MS', 3000))
  clearTimeout(deadline)
}
