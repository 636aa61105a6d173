'use strict'

// Hands the native side, once, what must be JavaScript.

const { AsyncResource } = require('node:async_hooks')
// Taken now, and not from the global object: a test's fake timers must not get between a call and its answer.
const { setImmediate } = require('node:timers')
const { runInThisContext } = require('node:vm')
const { isMainThread } = require('node:worker_threads')
const binding = require('./binding.js')
const { WasmError } = require('./errors.js')
const { InstanceContext, LeasedInstance, Snapshot } = require('./instances.js')
const { f64, i32, IS_ANSWERED, scratch } = require('./scratch.js')

// One at a time: where waking the loop means looking (Bun, Deno), each import would else add a look to every turn.
let isComing = false
const look = () => {
  isComing = false
  if (binding.look()) lookNext()
}
const lookNext = () => {
  if (isComing) return
  isComing = true
  setImmediate(look)
}
class Outside extends AsyncResource {
  /** How tools that look for what keeps a process alive ask. */
  hasRef() {
    return false
  }
}
// Whatever a look brings (imports, events) belongs to nobody's asynchronous context, least of all to that of a hook
// which happened to hand a call over.
const outside = new Outside('wasm-molt')

const result = (kind) => {
  if (f64[IS_ANSWERED] !== 1) throw unanswered()
  return kind === 1 ? i32[2] : kind === 0 ? undefined : f64[1]
}
// Between being told to end and being ended, a thread runs on for some instructions, in which Node throws nothing of
// ours; what is thrown here counts.
const unanswered = () => new WasmError('ERR_WASM_INTERRUPTED', 'the call was stopped: its thread is ending')

// By the number of parameters. All arguments are numbers before the first is stored: coercion may run JavaScript,
// which may call an export. The function passes itself on, so that it outlives the call.
const exportMakers = [
  (at, kind) => {
    const f = () => {
      f64[0] = at
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a) => {
      a = +a
      f64[0] = at
      f64[1] = a
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b) => {
      a = +a
      b = +b
      f64[0] = at
      f64[1] = a
      f64[2] = b
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b, c) => {
      a = +a
      b = +b
      c = +c
      f64[0] = at
      f64[1] = a
      f64[2] = b
      f64[3] = c
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b, c, d) => {
      a = +a
      b = +b
      c = +c
      d = +d
      f64[0] = at
      f64[1] = a
      f64[2] = b
      f64[3] = c
      f64[4] = d
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b, c, d, e) => {
      a = +a
      b = +b
      c = +c
      d = +d
      e = +e
      f64[0] = at
      f64[1] = a
      f64[2] = b
      f64[3] = c
      f64[4] = d
      f64[5] = e
      callExport(f)
      return result(kind)
    }
    return f
  },
  (at, kind) => {
    const f = (a, b, c, d, e, g) => {
      a = +a
      b = +b
      c = +c
      d = +d
      e = +e
      g = +g
      f64[0] = at
      f64[1] = a
      f64[2] = b
      f64[3] = c
      f64[4] = d
      f64[5] = e
      f64[6] = g
      callExport(f)
      return result(kind)
    }
    return f
  },
]

// A test runner's realm is another; what users get is of the one in which they have loaded the package.
const isRealmOfNode = runInThisContext('Object') === Object

// The native side holds them weakly.
binding.helpers = {
  scratch,
  makeExport: (name, params, kind, at) =>
    Object.defineProperty(exportMakers[params](at, kind), 'name', { value: name, configurable: true }),
  isMainThread,
  // Of Node's realm, and with nothing of this copy: Node 26 holds it as long as the environment.
  resource: runInThisContext('(hasRef) => ({ hasRef })')(binding.isBusy),
  lookSoon: () => {
    outside.runInAsyncScope(lookNext)
  },
  error: (code, message, fields, cause) => new WasmError(code, message, fields, cause),
  ...(isRealmOfNode ? {} : { object: () => ({}), array: (length) => new Array(length) }),
  typeError: (message) => new TypeError(message),
  rangeError: (message) => new RangeError(message),
  toNumber: (value) => +value,
  toBigInt64: (value) => BigInt.asIntN(64, value),
  toArray: (iterable) => [...iterable],
  follow: (thenable, id) => {
    Promise.resolve(thenable).then(
      (value) => binding.settleHost(id, true, value),
      (reason) => binding.settleHost(id, false, reason),
    )
  },
  makeLease: (lease) => new LeasedInstance(lease),
  makeContext: (context) => new InstanceContext(context),
  makeSnapshot: (snapshot) => new Snapshot(snapshot),
}
const callExport = binding.setup(binding.helpers)
