// A guest in Node's house: every way in which a program may end, at every point of a manager's life.
import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { assertEnded, deferred, env, POINTS, REJECT, SCENE, THROW, UNCAUGHT } from './points.ts'
import { child, LIMIT, reported } from './support.ts'

describe('the program ends', { concurrency: 2 }, () => {
  for (const [name, point] of Object.entries(POINTS)) {
    test(`with the code of process.exit(), while ${name}`, LIMIT, async () => {
      assertEnded(await child(`${SCENE}${deferred('process.exit(7)', point)}\n${point.program}`, { env }), 7)
    })

    test(`with an uncaught exception as it would without us, while ${name}`, LIMIT, async () => {
      const program = `${SCENE}${deferred(THROW, point)}\n${point.program}`
      assertEnded(await child(program, { env }), 1, UNCAUGHT)
    })

    if (point.isBlocking) continue

    test(`with an unhandled rejection as it would without us, while ${name}`, LIMIT, async () => {
      const program = `${SCENE}${deferred(REJECT, point)}\n${point.program}`
      assertEnded(await child(program, { env }), 1, UNCAUGHT)
    })

    test(
      `by itself, although nobody closes anything, ${point.finish === undefined ? 'while' : 'but not while'} ${name}`,
      LIMIT,
      async () => {
        // The timer does not keep the process alive: what runs has to.
        const act =
          point.finish === undefined
            ? 'report("there")'
            : `report("there"); setTimeout(() => { ${point.finish} }, 30).unref()`
        const ended = await child(
          `${SCENE}${deferred(act, point)}\npassed = () => report('passed')\n${point.program}`,
          { env },
        )
        assertEnded(ended, 0)
        assert.equal(reported(ended), point.finish === undefined ? 'there' : 'passed')
      },
    )
  }
})
