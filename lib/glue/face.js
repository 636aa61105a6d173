'use strict'

// What users hold in place of a module: it never changes, and it always means the module of the current generation.
//
// The face of an object is a Proxy. The face of a function is a function, which is quicker to call than a Proxy, with a
// Proxy as its prototype; only functions with properties of their own (statics) get a Proxy around it, which can list
// them. Nothing here holds a generation: all that is kept of one is kept weakly.

const { inspect } = require('node:util')

const BUILTIN_INSTANCE_OF = Function.prototype[Symbol.hasInstance]
const FUNCTION_KEYS = new Set(['length', 'name', 'prototype', 'arguments', 'caller'])

// All faces, so that one which is given back to its module becomes what it stands for.
const faces = new WeakMap()
// The prototypes of subclass instances => whose they are.
const pinned = new WeakMap()

/** `current` returns the module of the current generation. Called at once: what it is to be typeof never changes. */
function makeFace(current) {
  const known = new WeakSet()
  const root = {
    face: undefined,
    functions: new Map(),
    objects: new Map(),
    prototypes: new Map(),
    raw() {
      const module = current()
      if (!known.has(module)) {
        known.add(module)
        if (typeof module === 'function') notePrototype(seenOf(root, undefined), module)
        meet(root, module)
      }
      return module
    },
  }
  const module = root.raw()
  if (typeof module === 'function') faceOfFunction(root, module, seenOf(root, undefined))
  else faceOfObject(root)
  return root.face
}

/** A part of `parent`: whatever stands there in the current generation. */
function makeNode(parent, key) {
  return {
    face: undefined,
    functions: new Map(),
    objects: new Map(),
    prototypes: new Map(),
    parent,
    key,
    raw: () => parent.raw()[key],
  }
}

/** A generation is seen for the first time. Its classes must be known, as long as their instances may live. */
function meet(node, raw) {
  for (const key of Reflect.ownKeys(raw)) {
    if (typeof raw === 'function' && FUNCTION_KEYS.has(key)) continue
    const value = glance(raw, key)
    if (typeof value === 'function') {
      notePrototype(seenOf(node, key), value)
      const its = node.functions.get(key)
      if (its === undefined) continue
      its.describe?.(value)
      meet(its, value)
    } else if (node.objects.has(key) && isPlain(value)) {
      meet(node.objects.get(key), value)
    }
  }
}

/** Getters are asked only where they are exports: others may do anything (Emscripten's abort the program). */
function glance(raw, key) {
  const { value, get, enumerable } = Reflect.getOwnPropertyDescriptor(raw, key)
  if (get === undefined) return value
  if (!enumerable || !(raw.__esModule || raw[Symbol.toStringTag] === 'Module')) return undefined
  try {
    return raw[key]
  } catch {
    // Not initialized yet.
    return undefined
  }
}

function seenOf(node, key) {
  let seen = node.prototypes.get(key)
  if (seen === undefined) {
    seen = new WeakSet()
    node.prototypes.set(key, seen)
  }
  return seen
}

function notePrototype(seen, fn) {
  const prototype = Object.hasOwn(fn, 'prototype') ? fn.prototype : undefined
  if (typeof prototype === 'object' && prototype !== null) seen.add(prototype)
}

function isPlain(value) {
  if (typeof value !== 'object' || value === null) return false
  const prototype = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null
}

function isObject(value) {
  return (typeof value === 'object' && value !== null) || typeof value === 'function'
}

function unwrapped(value) {
  const node = isObject(value) ? faces.get(value) : undefined
  return node === undefined ? value : node.raw()
}

// ---------------------------------------------------------------- properties

function read(node, key, raw, receiver) {
  const value = receiver === node.face ? raw[key] : Reflect.get(raw, key, receiver)
  if (typeof value === 'function') {
    const its = node.functions.get(key)
    return its === undefined ? functionOf(node, key, value) : its.face
  }
  return isPlain(value) ? objectOf(node, key) : value
}

function functionOf(node, key, value) {
  // What all objects have is no part of the module.
  if (value === Object.prototype[key] || value === Function.prototype[key]) return value
  // A face that was put there: it already follows.
  if (faces.has(value)) return value
  const its = makeNode(node, key)
  const seen = seenOf(node, key)
  notePrototype(seen, value)
  faceOfFunction(its, value, seen)
  meet(its, value)
  node.functions.set(key, its)
  return its.face
}

function objectOf(node, key) {
  let its = node.objects.get(key)
  if (its === undefined) {
    its = makeNode(node, key)
    faceOfObject(its)
    meet(its, its.raw())
    node.objects.set(key, its)
  }
  return its.face
}

function handlerOf(node) {
  return {
    get: (_, key, receiver) => read(node, key, node.raw(), receiver),
    has: (_, key) => key in node.raw(),
    // A subclass that gets a static of its own sets it on itself.
    set: (_, key, value, receiver) => {
      const raw = node.raw()
      return receiver === node.face ? Reflect.set(raw, key, unwrapped(value)) : Reflect.set(raw, key, value, receiver)
    },
    deleteProperty: (_, key) => Reflect.deleteProperty(node.raw(), key),
    defineProperty: (_, key, descriptor) => {
      if ('value' in descriptor) descriptor.value = unwrapped(descriptor.value)
      return Reflect.defineProperty(node.raw(), key, descriptor)
    },
    getOwnPropertyDescriptor: (_, key) => {
      const raw = node.raw()
      const found = Reflect.getOwnPropertyDescriptor(raw, key)
      if (found === undefined) return undefined
      const { enumerable, writable } = found
      // Whoever only looks does not call the getters.
      if (writable === undefined) {
        const get = () => node.face[key]
        const set = (value) => Reflect.set(node.face, key, value)
        return { get: found.get && get, set: found.set && set, enumerable, configurable: true }
      }
      return { value: read(node, key, raw, node.face), enumerable, writable, configurable: true }
    },
    ownKeys: () => Reflect.ownKeys(node.raw()),
    getPrototypeOf: () => Object.getPrototypeOf(node.raw()),
    setPrototypeOf: (_, prototype) => Reflect.setPrototypeOf(node.raw(), prototype),
    preventExtensions: () => false,
  }
}

/** util.inspect looks behind a Proxy, at its target. */
function inspectable(target, show) {
  return Object.defineProperty(target, inspect.custom, { value: show, configurable: true })
}

function faceOfObject(node) {
  const target = inspectable({}, () => {
    const raw = node.raw()
    return Object.assign(Object.create(Object.getPrototypeOf(raw)), raw)
  })
  node.face = new Proxy(target, handlerOf(node))
  faces.set(node.face, node)
}

// ---------------------------------------------------------------- functions

function faceOfFunction(node, raw, seen) {
  const { parent, key } = node
  const call =
    parent === undefined
      ? function (...args) {
          const fn = node.raw()
          if (new.target !== undefined) return construct(fn, args, new.target)
          return Reflect.apply(fn, this, args)
        }
      : function (...args) {
          const owner = parent.raw()
          const fn = owner[key]
          if (typeof fn !== 'function') throw new TypeError(`${String(key)} is not a function any more`)
          if (new.target !== undefined) return construct(fn, args, new.target)
          return Reflect.apply(fn, this === parent.face ? owner : this, args)
        }
  const prototypeFace = Object.hasOwn(raw, 'prototype') ? faceOfPrototype(node) : undefined
  call.prototype = prototypeFace

  const handler = handlerOf(node)
  const { get, has, getOwnPropertyDescriptor, ownKeys } = handler
  handler.get = (target, key, receiver) => {
    if (key === 'prototype') return prototypeFace
    if (key === Symbol.hasInstance && node.raw()[key] === BUILTIN_INSTANCE_OF) return hasInstance
    return get(target, key, receiver)
  }

  // Where subclasses look for it, too.
  function hasInstance(value) {
    if (!isObject(value)) return false
    if (this !== node.face) return isInstanceOfSubclass(value, this)
    notePrototype(seen, node.raw())
    for (let one = Object.getPrototypeOf(value); one !== null; one = Object.getPrototypeOf(one)) {
      if (seen.has(one)) return true
    }
    return false
  }

  function construct(fn, args, newTarget) {
    notePrototype(seen, fn)
    // A class of the glue makes its objects itself: no Proxy comes between them and their private fields.
    const maker = unwrapped(newTarget)
    return Reflect.construct(fn, args, maker === newTarget ? standIn(newTarget, fn.prototype, prototypeFace) : maker)
  }

  if (Reflect.ownKeys(raw).every((key) => FUNCTION_KEYS.has(key))) {
    node.describe = (fn) => {
      Object.defineProperty(call, 'name', { value: fn.name, configurable: true })
      Object.defineProperty(call, 'length', { value: fn.length, configurable: true })
    }
    node.describe(raw)
    Object.setPrototypeOf(call, new Proxy({}, handler))
    node.face = call
  } else {
    // No Proxy may hide that its target has a prototype.
    handler.has = (target, key) => key === 'prototype' || has(target, key)
    handler.ownKeys = (target) => [...new Set([...ownKeys(target), 'prototype'])]
    handler.getOwnPropertyDescriptor = (target, key) =>
      (key === 'prototype' ? Reflect.getOwnPropertyDescriptor : getOwnPropertyDescriptor)(target, key)
    inspectable(call, (depth, options) => inspect(node.raw(), { ...options, depth }))
    node.face = new Proxy(call, handler)
  }
  faces.set(node.face, node)
}

// ---------------------------------------------------------------- subclasses
//
// `class Bar extends face.Foo` is defined once, and makes instances in many generations. Each of them must keep to the
// Foo of its own generation: methods of another would use its pointers in the wrong memory. So an instance does not
// inherit from Bar.prototype itself, but from an object that reads as Bar.prototype and ends in the right Foo.prototype.

/** What Bar.prototype inherits from. */
function faceOfPrototype(node) {
  const raw = () => node.raw().prototype
  const rawOf = (receiver) => pinned.get(Object.getPrototypeOf(receiver))?.base ?? raw()
  const face = new Proxy(inspectable({}, raw), {
    // Reached by `super`, whose receiver is pinned.
    get: (_, key, receiver) => Reflect.get(isObject(receiver) ? rawOf(receiver) : raw(), key, receiver),
    has: (_, key) => key in raw(),
    set: (_, key, value, receiver) =>
      receiver === face ? Reflect.set(raw(), key, value) : Reflect.set(rawOf(receiver), key, value, receiver),
    deleteProperty: (_, key) => Reflect.deleteProperty(raw(), key),
    defineProperty: (_, key, descriptor) => Reflect.defineProperty(raw(), key, descriptor),
    getOwnPropertyDescriptor: (_, key) => configurable(Reflect.getOwnPropertyDescriptor(raw(), key)),
    ownKeys: () => Reflect.ownKeys(raw()),
    getPrototypeOf: raw,
    preventExtensions: () => false,
  })
  return face
}

/** No target of ours has the property, so no Proxy may call it fixed. */
function configurable(descriptor) {
  return descriptor === undefined ? undefined : { ...descriptor, configurable: true }
}

// subclass => Foo.prototype of a generation => what makes its instances
const standIns = new WeakMap()

// A Proxy only constructs what its target could. (A class would insist on its own prototype.)
function Target() {}

/** The new.target of Foo. (With Bar itself there, V8 would have Bar hold the Foo that was constructed last.) */
function standIn(subclass, base, end) {
  let its = standIns.get(subclass)
  if (its === undefined) {
    its = new WeakMap()
    standIns.set(subclass, its)
  }
  let made = its.get(base)
  if (made === undefined) {
    const prototype = pinnedPrototype(subclass, base, end)
    pinned.set(prototype, { subclass, base })
    const get = (_, key) => (key === 'prototype' ? prototype : subclass[key])
    made = new Proxy(Target, { get })
    its.set(base, made)
  }
  return made
}

function pinnedPrototype(subclass, base, end) {
  const own = (key) => {
    for (let one = subclass.prototype; isObject(one) && one !== end; one = Object.getPrototypeOf(one)) {
      if (Object.hasOwn(one, key)) return one
    }
    return undefined
  }
  return new Proxy(Object.create(base), {
    get: (_, key, receiver) => Reflect.get(own(key) ?? base, key, receiver),
    has: (_, key) => key in (own(key) ?? base),
    set: (_, key, value, receiver) => Reflect.set(own(key) ?? base, key, value, receiver),
    getOwnPropertyDescriptor: (_, key) => {
      const owner = own(key)
      return owner && configurable(Reflect.getOwnPropertyDescriptor(owner, key))
    },
  })
}

function isInstanceOfSubclass(value, subclass) {
  const wanted = subclass.prototype
  for (let one = Object.getPrototypeOf(value); one !== null; one = Object.getPrototypeOf(one)) {
    if (one === wanted) return true
    const pinnedTo = pinned.get(one)
    if (pinnedTo === undefined) continue
    const { prototype } = pinnedTo.subclass
    return prototype === wanted || Object.prototype.isPrototypeOf.call(wanted, prototype)
  }
  return false
}

module.exports = { makeFace, unwrapped }
