'use strict'

// What a server's readiness endpoint has to say, over all managers that it needs.

/** What a state means to those who send requests. A reload is over soon without being asked. */
const STATUS = {
  starting: 'starting',
  ready: 'serving',
  reloading: 'serving',
  draining: 'serving',
  closing: 'draining',
  closed: 'draining',
  failed: 'failed',
}

/** The worst comes last. */
const RANK = ['serving', 'starting', 'draining', 'failed']

function readiness(...managers) {
  let worst = 0
  const states = managers.map(({ name, state, generation }) => {
    const status = STATUS[state]
    worst = Math.max(worst, RANK.indexOf(status))
    return { name, state, status, generation }
  })
  const status = RANK[worst]
  return { isReady: status === 'serving', status, managers: states }
}

module.exports = { readiness }
