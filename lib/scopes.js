'use strict'

const { AsyncLocalStorage } = require('node:async_hooks')
const { isAsyncFunction, isPromise } = require('node:util').types

const HOOKS = ['initialize', 'saveState', 'restoreState', 'reseed']

// What runs inside a hook, so that it is not made to wait for the very swap that waits for the hook. Only
// in use while there is a hook: following asynchronous contexts makes every promise of the process dearer.
const hookScope = new AsyncLocalStorage()
let hooksRunning = 0

/** * `token`: stands for the manager, which the hook must not keep alive; takes the instance that the hook is given. */
function scoped(token, hook) {
  return (...args) => {
    token.adopt(args[0])
    const scope = { token, outer: hookScope.getStore(), isOver: true }
    const begin = () => {
      scope.isOver = false
      hooksRunning += 1
    }
    const end = () => {
      scope.isOver = true
      hooksRunning -= 1
      if (hooksRunning === 0) hookScope.disable()
    }
    begin()
    let isPending = false
    try {
      const outcome = hookScope.run(scope, () => hook(...args))
      isPending = isPromise(outcome)
      if (isPending) outcome.then(end, end)
      else if (typeof outcome?.then === 'function') return inScope(outcome, scope, begin, end)
      return outcome
    } finally {
      if (!isPending) end()
    }
  }
}

/** A thenable that goes on with the hook once somebody asks it, which starts some of them: so not before, and not twice. */
function inScope(thenable, scope, begin, end) {
  return {
    // biome-ignore lint/suspicious/noThenProperty: it stands for one that has it.
    then: (onValue, onReason) => {
      begin()
      const followed = new Promise((resolve, reject) => {
        hookScope.run(scope, () => thenable.then(resolve, reject))
      })
      followed.then(end, end)
      followed.then(onValue, onReason)
    },
  }
}

function isInHook(token) {
  if (hooksRunning === 0) return false
  for (let scope = hookScope.getStore(); scope !== undefined; scope = scope.outer) {
    // What a hook has left behind, such as a timer, outlives it and is inside no hook.
    if (scope.token === token && !scope.isOver) return true
  }
  return false
}

/** From here on, and as long as the hook runs, that is what WebAssembly means in it. */
function giveNamespace(namespace) {
  const scope = hookScope.getStore()
  if (scope !== undefined) scope.namespace = namespace
}

/** What the hook that runs was given as WebAssembly, if it is one of glue's. */
function namespaceHere() {
  if (hooksRunning === 0) return undefined
  for (let scope = hookScope.getStore(); scope !== undefined; scope = scope.outer) {
    if (!scope.isOver && scope.namespace !== undefined) return scope.namespace
  }
  return undefined
}

/** The same options, with each hook in its scope; what is no function is for the native side to refuse. */
function withScopes(token, options) {
  if (typeof options !== 'object' || options === null) return options
  const hooks = {}
  for (const name of HOOKS) {
    const hook = options[name]
    if (typeof hook === 'function') hooks[name] = { value: scoped(token, hook), enumerable: true }
  }
  return Object.create(options, hooks)
}

/** Some hook is sure to return a promise; others may. */
function hasAsyncHooks(options) {
  return HOOKS.some((name) => isAsyncFunction(options?.[name]))
}

module.exports = { giveNamespace, hasAsyncHooks, isInHook, namespaceHere, withScopes }
