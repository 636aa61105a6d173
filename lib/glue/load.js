'use strict'

// Unmodified JS glue, evaluated afresh for every generation with other meanings of WebAssembly and a few more names.
//
// Node never lets go of a module that its own loaders have evaluated. So the files of the glue become functions:
// compiled once, called once per generation, and whatever a call made is garbage when the generation is.

const { readFileSync, realpathSync, statSync } = require('node:fs')
const { createRequire, isBuiltin } = require('node:module')
const { basename, dirname, extname, join, sep } = require('node:path')
const { fileURLToPath, pathToFileURL } = require('node:url')
const { isModuleNamespaceObject } = require('node:util').types
const vm = require('node:vm')
const { openConversions } = require('./conversions.js')

/** Node's own: what runners give in its place is not all there. */
const Module = process.getBuiltinModule?.('node:module') ?? require('node:module')

/** Loaded where a file needs to be understood: most CommonJS does not. */
let parser
function parse(text, sourceType) {
  // Guests that are written as numbers are most of their file, say nothing, and take long to read. Places stay.
  const source = text.replace(/\[[\d,\s]{100,}\]/g, (list) => `[${' '.repeat(list.length - 2)}]`)
  parser ??= require('acorn').Parser.extend(require('acorn-import-phases')())
  return parser.parse(source, { ecmaVersion: 'latest', sourceType })
}

// ---------------------------------------------------------------- sources to functions

const SHADOWS = [
  ...['WebAssembly', 'FinalizationRegistry'],
  ...['setTimeout', 'setInterval', 'setImmediate', 'clearTimeout', 'clearInterval', 'clearImmediate'],
  // Undefined where the platform has none and the guest no threads.
  'Worker',
]
// By another way than the plain name: a property of some object, or destructured from one.
const BY_PROPERTY = new RegExp(`(?:\\.|\\[\\s*['"\`])\\s*(?:${SHADOWS.join('|')})\\b`)
const BY_PATTERN = new RegExp(`\\b(?:${SHADOWS.join('|')})\\b[^{}]*\\}\\s*=\\s*(?:globalThis|global|self|window)\\b`)
const GLOBAL = /\b(?:globalThis|global|self|window)\b/
const GLOBALS = ['globalThis', 'global', 'self', 'window']

/** The names that a file must see as parameters. Only where it needs them: a Proxy costs at every use. */
function shadowed(source) {
  if (!GLOBAL.test(source) || !(BY_PROPERTY.test(source) || BY_PATTERN.test(source))) return SHADOWS
  // `self` and `window` tell a browser from Node: they stay undefined where they are.
  return [...SHADOWS, ...GLOBALS.filter((name) => globalThis[name] === globalThis)]
}

/** A name that the source does not use. */
function unusedName(source) {
  let name = '$molt'
  while (source.includes(name)) name += '_'
  return name
}

/** Edits never overlap. At the same place the earlier one comes first. */
function edited(source, edits) {
  let text = ''
  let end = 0
  for (const edit of edits.sort((a, b) => a.start - b.start)) {
    text += source.slice(end, edit.start) + edit.text
    end = edit.end
  }
  return text + source.slice(end)
}

/** What is left of a statement that goes: its line breaks, and an end for the one before it. */
function blank(source, start, end) {
  return `;${source.slice(start, end).replace(/[^\n\r\u2028\u2029]+/g, '')}`
}

/** What a source is turned into, by itself: everything that `compile` needs, and all that is known of the file. */
const CONVERTED = [
  'kind',
  'asks',
  'parameters',
  'requests',
  'locals',
  'indirect',
  'stars',
  'named',
  'asynchronous',
  'text',
]

function convert(file, source, type, conversions) {
  const kind = type ?? 'either'
  // What is only put into a function is put there faster than found.
  const isPlain = type === 'commonjs' && !IMPORT_CALL.test(source)
  const kept = isPlain ? undefined : conversions.find(kind, source)
  if (kept !== undefined) {
    Object.assign(file, kept)
    file.script = compile(file)
    return
  }
  if (type === 'module') compileModule(file, source)
  else if (type === 'commonjs') compileCommonJS(file, source)
  else compileEither(file, source)
  if (!isPlain) conversions.keep(kind, source, Object.fromEntries(CONVERTED.map((key) => [key, file[key]])))
}

// Test runners evaluate packages in a realm of their own. What glue throws and makes is of that one, too: a script has
// no way to say so, and eval knows no other.
const isRealmOfNode = vm.runInThisContext('Object') === Object

function compile(file) {
  const [prefix, body, suffix] = file.text
  const filename = file.kind === 'esm' ? file.url : file.path
  const source = `${prefix}${body}\n${suffix}`
  // biome-ignore lint/security/noGlobalEval: the text is the glue's own, as in a script.
  if (!isRealmOfNode) return { runInThisContext: () => globalThis.eval(`${source}\n//# sourceURL=${filename}`) }
  return new vm.Script(source, {
    filename,
    columnOffset: -prefix.length,
    // For import() in code that the glue makes from strings. (Node 20.0 to 20.9 do not have it.)
    importModuleDynamically: vm.constants?.USE_MAIN_CONTEXT_DEFAULT_LOADER,
  })
}

/** `import(` or `import.source(`, perhaps with comments in between. */
const IMPORT_CALL = /\bimport(?:\s|\/\*[\s\S]*?\*\/|\/\/.*)*[(.]/

/** The parameters are those of an outer function: the source may declare the same names itself. */
function compileCommonJS(file, source) {
  const mark = unusedName(source)
  const edits = hashbang(source)
  file.asks = IMPORT_CALL.test(source)
  if (file.asks) {
    let ast
    try {
      ast = parse(source, 'commonjs')
    } catch {
      // Whether it is an error is for V8 to say.
    }
    if (ast !== undefined) rewrite(source, ast, mark, new Map(), edits)
  }
  file.parameters = shadowed(source)
  const prefix = `(function(${file.parameters},${mark}){return function(exports,require,module,__filename,__dirname){`
  file.text = [prefix, edited(source, edits), '}})']
  file.script = compile(file)
}

function hashbang(source) {
  return source.startsWith('#!') ? [{ start: 0, end: 2, text: '//' }] : []
}

/**
 * An ES module becomes a generator function. Up to its `yield` it stands as a linked module does: functions are
 * hoisted, exports can be read (or are in their dead zone). After it, it runs.
 */
function compileModule(file, source) {
  file.kind = 'esm'
  file.asks = /\bimport\b[^;'"]*\(|\bmeta\b[^;]*\bresolve\b/.test(source)
  let ast
  try {
    ast = parse(source, 'module')
  } catch (error) {
    if (error.loc !== undefined) error.message = `${file.path}:${error.loc.line}: ${error.message}`
    throw error
  }
  const mark = unusedName(source)
  const edits = hashbang(source)
  const prologue = []
  const requests = []
  const imported = new Map()
  const texts = new Map()
  file.locals = new Map()
  file.indirect = new Map()
  file.stars = []
  file.named = []

  const request = (node) => {
    const type = node.attributes?.find(({ key }) => nameOf(key) === 'type')?.value.value
    const specifier = node.source.value
    const phase = node.phase === 'source' ? 'source' : undefined
    const same = (one) => one.specifier === specifier && one.type === type && one.phase === phase
    const index = requests.findIndex(same)
    return index >= 0 ? index : requests.push({ specifier, type, phase }) - 1
  }
  const remove = (node) => edits.push({ start: node.start, end: node.end, text: blank(source, node.start, node.end) })

  // In the order of the source: that is the order in which they run.
  for (const node of ast.body) if (node.source) request(node)

  for (const node of ast.body) {
    if (node.type !== 'ImportDeclaration') continue
    const index = request(node)
    for (const specifier of node.specifiers) {
      const local = specifier.local.name
      if (specifier.type === 'ImportNamespaceSpecifier' || requests[index].phase === 'source') {
        imported.set(local, { index, name: null })
        prologue.push(`const ${local}=${mark}${index};`)
      } else {
        const name = specifier.type === 'ImportDefaultSpecifier' ? 'default' : nameOf(specifier.imported)
        imported.set(local, { index, name })
        texts.set(local, `${mark}${index}[${JSON.stringify(name)}]`)
        file.named.push({ index, name })
      }
    }
    remove(node)
  }

  for (const node of ast.body) {
    switch (node.type) {
      case 'ExportAllDeclaration':
        if (node.exported === null) file.stars.push(request(node))
        else file.indirect.set(nameOf(node.exported), { index: request(node), name: null })
        remove(node)
        break
      case 'ExportNamedDeclaration':
        if (node.declaration) {
          for (const local of declaredNames(node.declaration)) file.locals.set(local, local)
          const end = node.declaration.start
          edits.push({ start: node.start, end, text: blank(source, node.start, end) })
          break
        }
        for (const { local, exported } of node.specifiers) {
          const from = node.source ? { index: request(node), name: nameOf(local) } : imported.get(local.name)
          if (from === undefined) file.locals.set(nameOf(exported), local.name)
          else file.indirect.set(nameOf(exported), from)
        }
        remove(node)
        break
      case 'ExportDefaultDeclaration':
        file.locals.set('default', exportDefault(node))
        break
    }
  }

  function exportDefault(node) {
    const { declaration } = node
    // Only the words: a parenthesis may follow them.
    const words = /^export(?:\s|\/\*[\s\S]*?\*\/|\/\/.*)*default/.exec(source.slice(node.start, node.end))[0]
    const head = { start: node.start, end: node.start + words.length, text: blank(words, 0, words.length) }
    edits.push(head)
    if (declaration.type === 'FunctionDeclaration' || declaration.type === 'ClassDeclaration') {
      if (declaration.id) return declaration.id.name
    }
    const local = `${mark}Default`
    if (declaration.type === 'FunctionDeclaration') {
      // It must be hoisted, and its name is 'default'.
      const its = /^(?:async|function|\*|\s|\/\*[\s\S]*?\*\/|\/\/.*)*/.exec(
        source.slice(declaration.start, node.end),
      )[0]
      const at = declaration.start + its.length
      edits.push({ start: at, end: at, text: ` ${local}` })
      prologue.push(`${mark}.named(${local});`)
    } else {
      // A property gives its name to what has none, just as `export default` does.
      head.text += `const ${local}={default:`
      const at = source[node.end - 1] === ';' && declaration.type !== 'ClassDeclaration' ? node.end - 1 : node.end
      edits.push({ start: at, end: at, text: '}.default;' })
    }
    return local
  }

  file.asynchronous = rewrite(source, ast, mark, texts, edits)
  file.requests = requests
  file.parameters = shadowed(source)
  const getters = [...file.locals].map(([name, local]) => `get [${JSON.stringify(name)}](){return ${local}}`)
  const parameters = [...file.parameters, mark, ...requests.map((_, index) => `${mark}${index}`)]
  const prefix =
    `(function(${parameters}){return ${file.asynchronous ? 'async ' : ''}function*(){'use strict';` +
    `${prologue.join('')}${mark}.exports({${getters}});yield;`
  file.text = [prefix, edited(source, edits), '}})']
  file.script = compile(file)
}

function nameOf(node) {
  return node.type === 'Literal' ? node.value : node.name
}

function patternNames(node, names = []) {
  switch (node?.type) {
    case 'Identifier':
      names.push(node.name)
      break
    case 'ObjectPattern':
      for (const property of node.properties) patternNames(property.value ?? property, names)
      break
    case 'ArrayPattern':
      for (const element of node.elements) patternNames(element, names)
      break
    case 'AssignmentPattern':
      patternNames(node.left, names)
      break
    case 'RestElement':
      patternNames(node.argument, names)
      break
  }
  return names
}

function declaredNames(node) {
  if (node.type === 'VariableDeclaration') return node.declarations.flatMap(({ id }) => patternNames(id))
  return node.type === 'FunctionDeclaration' || node.type === 'ClassDeclaration' ? patternNames(node.id) : []
}

/** What the statements of a block declare for it. */
function lexicalNames(statements) {
  return statements.flatMap((node) =>
    node.type === 'VariableDeclaration' && node.kind === 'var' ? [] : declaredNames(node),
  )
}

/** What a function's body declares with var, wherever that stands. */
function varNames(node, names = []) {
  if (node.type === 'VariableDeclaration' && node.kind === 'var') names.push(...declaredNames(node))
  for (const child of children(node)) if (!OWN_VARS.test(child.type)) varNames(child, names)
  return names
}

const OWN_VARS = /Function|^Class/

function* children(node) {
  for (const key in node) {
    const value = node[key]
    if (Array.isArray(value)) {
      for (const one of value) if (typeof one?.type === 'string') yield one
    } else if (typeof value?.type === 'string') {
      yield value
    }
  }
}

/**
 * Replaces import(), import.meta and, everywhere in their scope, the names in `texts` (local name => what reads it).
 * Tells whether there is an await outside all functions.
 */
function rewrite(source, ast, mark, texts, edits) {
  const starts = new Set()
  let functions = 0
  let asynchronous = false

  // Only names that matter are kept; most scopes are their parents.
  const within = (scope, names) => {
    const hidden = names.filter((name) => texts.has(name))
    return hidden.length === 0 ? scope : { hidden, outer: scope }
  }
  const replacement = (name, scope) => {
    for (let one = scope; one !== null; one = one.outer) if (one.hidden.includes(name)) return undefined
    return texts.get(name)
  }
  const each = (nodes, scope) => {
    for (const node of nodes) if (node) visit(node, scope)
  }
  const statements = (nodes, scope) => {
    for (const node of nodes) if (node.type === 'ExpressionStatement') starts.add(node.start)
    each(nodes, scope)
  }
  const call = (callee, scope) => {
    const text = callee.type === 'Identifier' ? replacement(callee.name, scope) : undefined
    if (text === undefined) return visit(callee, scope)
    // The namespace must not become `this`; and the parenthesis must not become a call of the line before.
    const { start, end } = callee
    edits.push({ start, end, text: `${starts.has(start) ? ';' : ''}(0,${text})` })
  }
  const functionBody = (node, scope) => {
    functions += 1
    const outside = node.type === 'FunctionExpression' ? within(scope, patternNames(node.id)) : scope
    const parameters = within(
      outside,
      node.params.flatMap((one) => patternNames(one)),
    )
    each(node.params, parameters)
    if (node.body.type === 'BlockStatement') {
      const names = texts.size === 0 ? [] : [...varNames(node.body), ...lexicalNames(node.body.body)]
      statements(node.body.body, within(parameters, names))
    } else {
      visit(node.body, parameters)
    }
    functions -= 1
  }

  // A name where it is declared needs no care: there it is always hidden by its own declaration.
  function visit(node, scope) {
    switch (node.type) {
      case 'Identifier': {
        const text = replacement(node.name, scope)
        if (text !== undefined) edits.push({ start: node.start, end: node.end, text })
        return
      }
      case 'ImportDeclaration':
      case 'ExportAllDeclaration':
      case 'BreakStatement':
      case 'ContinueStatement':
        return
      case 'ExportNamedDeclaration':
        if (node.declaration) visit(node.declaration, scope)
        return
      case 'MetaProperty':
        if (node.meta.name === 'import') edits.push({ start: node.start, end: node.end, text: `${mark}.meta` })
        return
      case 'ImportExpression': {
        const { start } = node
        const words = node.phase ? /^import\s*\.\s*\w+/.exec(source.slice(start, node.end))[0] : 'import'
        const name = node.phase === 'source' ? 'importSource' : 'import'
        edits.push({ start, end: start + words.length, text: `${mark}.${name}` })
        return each([node.source, node.options], scope)
      }
      case 'Program':
        return statements(node.body, scope)
      case 'BlockStatement':
        return statements(node.body, within(scope, lexicalNames(node.body)))
      case 'StaticBlock':
        return statements(node.body, within(scope, [...varNames(node), ...lexicalNames(node.body)]))
      case 'SwitchStatement': {
        visit(node.discriminant, scope)
        const inner = within(
          scope,
          node.cases.flatMap((one) => lexicalNames(one.consequent)),
        )
        for (const { test, consequent } of node.cases) {
          each([test], inner)
          statements(consequent, inner)
        }
        return
      }
      case 'ForStatement':
        return each([node.init, node.test, node.update, node.body], within(scope, lexicalNames([node.init ?? node])))
      case 'ForInStatement':
      case 'ForOfStatement':
        if (node.await && functions === 0) asynchronous = true
        return each([node.left, node.right, node.body], within(scope, lexicalNames([node.left])))
      case 'CatchClause':
        return each([node.param, node.body], within(scope, patternNames(node.param)))
      case 'FunctionDeclaration':
      case 'FunctionExpression':
      case 'ArrowFunctionExpression':
        return functionBody(node, scope)
      case 'ClassDeclaration':
        return each([node.superClass, node.body], scope)
      case 'ClassExpression':
        return each([node.superClass, node.body], within(scope, patternNames(node.id)))
      case 'LabeledStatement':
        return visit(node.body, scope)
      case 'MemberExpression':
        return each([node.object, node.computed && node.property], scope)
      case 'MethodDefinition':
      case 'PropertyDefinition':
        return each([node.computed && node.key, node.value], scope)
      case 'Property':
        if (node.shorthand && replacement(node.key.name, scope) !== undefined) {
          edits.push({ start: node.start, end: node.start, text: `${node.key.name}:` })
        }
        return each([node.computed && node.key, node.value], scope)
      case 'CallExpression':
        call(node.callee, scope)
        return each(node.arguments, scope)
      case 'TaggedTemplateExpression':
        call(node.tag, scope)
        return visit(node.quasi, scope)
      case 'AwaitExpression':
        if (functions === 0) asynchronous = true
        return visit(node.argument, scope)
      case 'VariableDeclaration':
        if (node.kind === 'await using' && functions === 0) asynchronous = true
        return each(node.declarations, scope)
      default:
        return each(children(node), scope)
    }
  }

  visit(ast, null)
  return asynchronous
}

// ---------------------------------------------------------------- the files, for all generations

/** Node's algorithm for `import`, as a library: Node's own cannot be asked with a parent. An ES module, and loaded late. */
let moduleResolve
const NO_RESOLVER = new Error('no resolver yet')
const BESIDE = /^\.{0,2}\//
// Node has nothing for the others; packages that are made for bundlers only leave them out.
const ENDINGS = ['', '.js', '/index.js']

function resolveImport(specifier, parent) {
  // Most of what glue imports is beside it, and needs no algorithm.
  if (BESIDE.test(specifier)) {
    const url = new URL(specifier, parent)
    const path = fileURLToPath(url)
    for (const end of ENDINGS) {
      if (!statSync(path + end, { throwIfNoEntry: false })?.isFile()) continue
      const real = pathToFileURL(realpathSync(path + end))
      real.search = url.search
      real.hash = url.hash
      return real
    }
  }
  if (moduleResolve !== undefined) return moduleResolve(specifier, parent, CONDITIONS)
  if (isPreparing) throw NO_RESOLVER
  // Nothing in the files has said that they would ask: what require() finds is the best there is without waiting.
  return pathToFileURL(createRequire(parent).resolve(specifier))
}

/** While nobody waits for an answer at once. */
let isPreparing = false

const CONDITIONS = new Set(['node', 'import', 'node-addons'])
if (process.features.require_module) CONDITIONS.add('module-sync')

/**
 * Options: parentURL (what a specifier is relative to; process.cwd()), include (names of packages that belong to
 * the glue), conditions ('require', as it stands in for require(), or 'import': which of them a package answers first),
 * cache (where conversions are kept between processes: true, a folder, or false).
 */
async function prepare(specifier, { parentURL, include = [], conditions = 'require', cache = false } = {}) {
  const conversions = openConversions(cache)
  const parent = asURL(parentURL ?? join(process.cwd(), '/'))
  const make = () => {
    isPreparing = true
    try {
      const program = new Program(locate(specifier, parent, conditions), fileURLToPath(parent), include, conversions)
      const outside = program.walk(program.entry, (file) => file.requests)
      if (program.asks && moduleResolve === undefined) throw NO_RESOLVER
      return [program, outside]
    } finally {
      isPreparing = false
    }
  }
  let made
  try {
    made = make()
  } catch (error) {
    if (error !== NO_RESOLVER) throw error
    moduleResolve = (await importHolder('import-meta-resolve')).held.moduleResolve
    made = make()
  }
  const [program, outside] = made
  // The first generation must not be the one to find what is wrong with the files.
  await Promise.all(outside.map((target) => program.load(target)))
  return program
}

function asURL(place) {
  return place instanceof URL || /^[a-z][a-z\d+.-]+:/i.test(place) ? new URL(place) : pathToFileURL(place)
}

function locate(specifier, parent, conditions) {
  const ways = [asRequire, asImport]
  if (conditions === 'import') ways.reverse()
  let first
  for (const way of [...ways, asModuleField]) {
    try {
      const path = way(specifier, parent)
      if (path !== undefined) return path
    } catch (error) {
      if (error === NO_RESOLVER) throw error
      // A package that answers neither way is best explained by the other errors than 'not found'.
      if (!isNotFound(error)) first ??= error
    }
  }
  if (first !== undefined) throw first
  const error = new Error(`Cannot find module '${specifier}' imported from ${fileURLToPath(parent)}`)
  error.code = 'ERR_MODULE_NOT_FOUND'
  throw error
}

const NOT_FOUND = ['MODULE_NOT_FOUND', 'ERR_MODULE_NOT_FOUND', 'ERR_UNSUPPORTED_DIR_IMPORT', 'ENOENT']

function isNotFound(error) {
  return NOT_FOUND.includes(error.code)
}

function isFileURL(specifier) {
  return specifier instanceof URL || specifier.startsWith('file:')
}

function asRequire(specifier, parent) {
  if (isFileURL(specifier)) return realpathSync(fileURLToPath(specifier))
  if (!isBuiltin(specifier)) return createRequire(parent).resolve(specifier)
}

function asImport(specifier, parent) {
  if (isFileURL(specifier)) return realpathSync(fileURLToPath(specifier))
  const url = isBuiltin(specifier) ? undefined : resolveImport(specifier, parent)
  if (url?.protocol === 'file:') return fileURLToPath(url)
}

/** Packages made for bundlers only, as wasm-pack's were for long. */
function asModuleField(specifier, parent) {
  if (isFileURL(specifier)) return
  for (const folder of createRequire(parent).resolve.paths(specifier) ?? []) {
    const module = readJSON(join(folder, specifier, 'package.json'))?.module
    if (typeof module === 'string') return realpathSync(join(folder, specifier, module))
  }
}

function readJSON(path) {
  try {
    return JSON.parse(readFileSync(path, 'utf8'))
  } catch {
    return undefined
  }
}

class Program {
  #files = new Map()
  #packages = new Map()
  #externals = new Map()
  #conversions
  #belongs

  constructor(path, parent, include, conversions) {
    this.parent = parent
    this.#conversions = conversions
    const folder = dirname(path)
    const own = this.#packageOf(folder)
    this.#belongs = (file) => {
      const its = this.#packageOf(dirname(file))
      if (its !== undefined) return its.root === own?.root || include.includes(its.name)
      return own === undefined && file.startsWith(folder.endsWith(sep) ? folder : folder + sep)
    }
    this.entry = this.fileAt(pathToFileURL(path))
  }

  /** A file may look for others while it runs. */
  get asks() {
    return [...this.#files.values()].some((file) => file.asks)
  }

  async evaluate(shadows) {
    const generation = new Generation(this, shadows)
    if (this.entry.kind === 'cjs') return generation.main()
    return generation.import(this.entry)
  }

  evaluateSync(shadows) {
    const generation = new Generation(this, shadows)
    return this.entry.kind === 'cjs' ? generation.main() : generation.importSync(this.entry)
  }

  /** The nearest folder that is a package with a name, or at least one that was installed as one. */
  #packageOf(folder) {
    if (this.#packages.has(folder)) return this.#packages.get(folder)
    const find = () => {
      const name = readJSON(join(folder, 'package.json'))?.name
      if (typeof name === 'string') return { root: folder, name }
      const parent = dirname(folder)
      if (parent === folder || basename(folder) === 'node_modules') return undefined
      const above = basename(parent).startsWith('@') ? dirname(parent) : parent
      return basename(above) === 'node_modules' ? { root: folder, name: undefined } : this.#packageOf(parent)
    }
    const found = find()
    this.#packages.set(folder, found)
    return found
  }

  /** Addons are what they are: no generation has its own. */
  belongs(path) {
    return extname(path) !== '.node' && this.#belongs(path)
  }

  fileAt(url) {
    let file = this.#files.get(url.href)
    if (file === undefined) {
      file = readFile(url, this.#conversions)
      this.#files.set(url.href, file)
    }
    return file
  }

  /** Where an import leads: to a file of the glue, or to what Node shall load. */
  resolve(file, { specifier, type }) {
    const key = `${type} ${specifier}`
    let target = file.targets.get(key)
    if (target === undefined) {
      if (isBuiltin(specifier)) {
        target = { url: specifier.startsWith('node:') ? specifier : `node:${specifier}` }
      } else {
        const url = resolveImport(specifier, new URL(file.url))
        const path = url.protocol === 'file:' ? fileURLToPath(url) : undefined
        // No Node loads WebAssembly into the meaning that the glue has of it.
        const ours = path !== undefined && (this.belongs(path) || extname(path) === '.wasm')
        target = ours ? { file: this.fileAt(url) } : { url: url.href, path, type }
      }
      file.targets.set(key, target)
    }
    return target
  }

  /** All files that an ES module imports, each once; returns what Node has yet to load. */
  walk(entry, requestsOf) {
    const seen = new Set([entry])
    const missing = []
    for (const file of seen) {
      for (const request of requestsOf(file) ?? []) {
        const target = this.resolve(file, request)
        // The source phase compiles a file; what that one imports does not matter.
        if (request.phase === 'source') continue
        if (target.file !== undefined) seen.add(target.file)
        else if (!this.#externals.has(target.url)) missing.push(target)
      }
    }
    return missing
  }

  external({ url }) {
    return this.#externals.get(url)
  }

  async load({ url, type }) {
    const namespace = await importHolder(url, type)
    this.#externals.set(url, namespace.held)
    return namespace.held
  }

  loadSync({ url, path }) {
    let value
    try {
      value = createRequire(this.parent)(path ?? url)
    } catch (error) {
      if (error.code !== 'ERR_REQUIRE_ESM' && error.code !== 'ERR_REQUIRE_ASYNC_MODULE') throw error
      throw asyncImport(`${url} is an ES module`, error)
    }
    this.#externals.set(url, isModuleNamespaceObject(value) ? value : fill(emptyNamespace(), value))
  }
}

/** Held in an object, because a namespace that exports `then` must not be taken for a promise again. */
async function importHolder(url, type) {
  const options = type === undefined ? undefined : { with: { type } }
  try {
    return { held: await import(url, options) }
  } catch (error) {
    // Whoever has evaluated this file, such as a test runner, offers none: then it is Node's own.
    if (!error?.code?.startsWith?.('ERR_VM_DYNAMIC_IMPORT_CALLBACK_MISSING')) throw error
    return { held: await importByNode(url, options) }
  }
}

function importByNode(url, options) {
  const script = new vm.Script('(url, options) => import(url, options)', {
    filename: __filename,
    importModuleDynamically: vm.constants?.USE_MAIN_CONTEXT_DEFAULT_LOADER,
  })
  return script.runInThisContext()(url, options)
}

function asyncImport(reason, cause) {
  const error = new Error(`The glue cannot be evaluated synchronously: ${reason}`, { cause })
  error.code = 'ERR_WASM_ASYNC_IMPORT'
  return error
}

function readFile(url, conversions) {
  const path = fileURLToPath(url)
  const file = { url: url.href, path, kind: 'cjs', targets: new Map(), requests: undefined, asynchronous: false }
  const extension = extname(path)
  if (extension === '.wasm') {
    // Which modules it imports is for the WebAssembly of a generation to say.
    return Object.assign(file, { kind: 'wasm', bytes: readFileSync(path) })
  }
  const source = readFileSync(path, 'utf8').replace(/^\uFEFF/, '')
  if (extension === '.json') return Object.assign(file, { kind: 'json', source })
  const type = extension === '.mjs' ? 'module' : extension === '.cjs' ? 'commonjs' : packageType(dirname(path))
  convert(file, source, type === 'module' || type === 'commonjs' ? type : undefined, conversions)
  // The script is all that is needed from here on.
  file.text = undefined
  file.native = createRequire(path)
  return file
}

function packageType(folder) {
  const json = readJSON(join(folder, 'package.json'))
  if (json !== undefined) return json.type
  const parent = dirname(folder)
  return parent === folder || basename(parent) === 'node_modules' ? undefined : packageType(parent)
}

/** Node's rule for files that nothing is said of: an ES module is what is one, and nothing else. */
function compileEither(file, source) {
  try {
    compileCommonJS(file, source)
  } catch (error) {
    try {
      compileModule(file, source)
    } catch {
      file.kind = 'cjs'
      throw error
    }
  }
}

// ---------------------------------------------------------------- namespaces

/** An ordinary object, as the face and its owner need one. (An object literal without prototype would be a slow one.) */
function emptyNamespace() {
  const namespace = Object.setPrototypeOf({}, null)
  return Object.defineProperty(namespace, Symbol.toStringTag, { value: 'Module', configurable: true })
}

function getter(namespace, name, get) {
  Object.defineProperty(namespace, name, { get, enumerable: true, configurable: true })
}

/** What a CommonJS module is to `import`. Its own getters stay unasked until someone asks. */
function fill(namespace, value) {
  if (value !== null && (typeof value === 'object' || typeof value === 'function')) {
    for (const name of Object.keys(value)) if (name !== 'default') getter(namespace, name, () => value[name])
  }
  getter(namespace, 'default', () => value)
  return namespace
}

// ---------------------------------------------------------------- one generation

class Generation {
  #program
  #shadows
  #records = new Map()
  #cache = Object.create(null)
  #global
  #nodeModule
  #builtins

  constructor(program, { builtins, ...shadows }) {
    this.#program = program
    this.#builtins = builtins
    this.#shadows = { __proto__: null }
    for (const name of SHADOWS) this.#shadows[name] = name in shadows ? shadows[name] : globalThis[name]
  }

  // ------------------------------ what the files see

  #arguments(file) {
    return file.parameters.map((name) => (name in this.#shadows ? this.#shadows[name] : this.#globalProxy()))
  }

  #globalProxy() {
    const shadows = this.#shadows
    this.#global ??= new Proxy(globalThis, {
      has: (real, key) => (key in shadows && shadows[key] !== undefined) || key in real,
      get: (real, key) => {
        const value = key in shadows ? shadows[key] : real[key]
        return value === real ? this.#global : value
      },
      set: (real, key, value) => {
        if (!(key in shadows)) return Reflect.set(real, key, value)
        shadows[key] = value
        return true
      },
    })
    return this.#global
  }

  #imports(file) {
    return {
      import: (specifier, options) => this.#dynamic(file, specifier, options),
      importSource: (specifier) => this.#dynamic(file, specifier, undefined, 'source'),
    }
  }

  #meta(file) {
    return {
      __proto__: null,
      dirname: dirname(file.path),
      filename: file.path,
      main: false,
      resolve: (specifier, parent) => {
        if (isBuiltin(specifier)) return specifier.startsWith('node:') ? specifier : `node:${specifier}`
        const base = new URL(parent ?? file.url)
        try {
          return resolveImport(`${specifier}`, base).href
        } catch (error) {
          // Node does not look whether there is such a file.
          if (isNotFound(error) && (BESIDE.test(specifier) || isFileURL(specifier)))
            return new URL(specifier, base).href
          throw error
        }
      },
      url: file.url,
    }
  }

  /** What the glue gets in place of a module of Node's, if anything. */
  #builtin(specifier) {
    const name = specifier.replace(/^node:/, '')
    return name === 'module' ? this.#moduleBuiltin() : this.#builtins?.[name]
  }

  #isReplaced({ url }) {
    return url?.startsWith('node:') === true && this.#builtin(url) !== undefined
  }

  /** createRequire() is one more way to the files of the glue. */
  #moduleBuiltin() {
    const make = (place) => {
      const native = createRequire(place)
      return this.#program.belongs(fileURLToPath(asURL(place))) ? this.#require(native, undefined) : native
    }
    const get = (real, key) => (key === 'createRequire' ? make : real[key])
    this.#nodeModule ??= new Proxy(Module, { get })
    return this.#nodeModule
  }

  // ------------------------------ CommonJS

  main() {
    // A module that is required has a parent: without one it would take itself for the program.
    const parent = new Module(this.#program.parent)
    parent.filename = this.#program.parent
    return this.#load(this.#program.entry, parent)
  }

  #require(native, parent) {
    const require = (specifier) => {
      if (typeof specifier === 'string' && isBuiltin(specifier)) {
        return this.#builtin(specifier) ?? native(specifier)
      }
      const path = native.resolve(specifier)
      return this.#program.belongs(path) ? this.#load(this.#program.fileAt(pathToFileURL(path)), parent) : native(path)
    }
    return Object.assign(require, {
      resolve: native.resolve,
      main: native.main,
      extensions: native.extensions,
      cache: this.#cache,
    })
  }

  #load(file, parent) {
    const known = this.#cache[file.path]
    // Not every runtime's constructor makes it a child.
    const module = known ?? new Module(file.path, parent)
    if (parent !== undefined && !parent.children.includes(module)) parent.children.push(module)
    if (known !== undefined) return known.exports
    this.#cache[file.path] = module
    let loaded = false
    try {
      this.#evaluate(file, module)
      loaded = true
    } finally {
      if (!loaded) {
        delete this.#cache[file.path]
        const index = parent?.children.indexOf(module) ?? -1
        if (index >= 0) parent.children.splice(index, 1)
      }
    }
    module.loaded = true
    return module.exports
  }

  #evaluate(file, module) {
    const folder = dirname(file.path)
    module.filename = file.path
    module.paths = Module._nodeModulePaths(folder)
    if (file.kind === 'json') {
      module.exports = parseJSON(file)
    } else if (file.kind === 'cjs') {
      const require = this.#require(file.native, module)
      module.require = require
      const body = file.script.runInThisContext()(...this.#arguments(file), this.#imports(file))
      body.call(module.exports, module.exports, require, module, file.path, folder)
    } else {
      const namespace = this.importSync(file)
      module.exports = 'module.exports' in namespace ? namespace['module.exports'] : namespace
    }
  }

  // ------------------------------ ES modules

  async #dynamic(file, specifier, options, phase) {
    // An import that is under way synchronously is at its end then.
    await undefined
    const target = this.#program.resolve(file, { specifier: `${specifier}`, type: options?.with?.type })
    if (target.file === undefined) {
      if (this.#isReplaced(target)) return this.#namespace(target)
      return this.#program.external(target) ?? this.#program.load(target)
    }
    if (phase === 'source') return this.#record(target.file).module
    return this.import(target.file)
  }

  async import(file) {
    let missing = this.#gather(file)
    // While Node loaded some, another import may have brought more files.
    while (missing.length > 0) {
      await Promise.all(missing.map((target) => this.#program.load(target)))
      missing = this.#gather(file)
    }
    const record = this.#link(file)
    // An asynchronous generator takes a moment to come to its `yield`, and only from there it starts at once.
    await Promise.all(Array.from(this.#records.values(), ({ ready }) => ready))
    await this.#run(record)
    return record.namespace
  }

  importSync(file) {
    for (const target of this.#gather(file)) this.#program.loadSync(target)
    this.#program.walk(file, (one) => {
      if (one.asynchronous && !this.#record(one).finished) throw asyncImport(`${one.path} has a top-level await`)
      return this.#record(one).finished ? [] : one.requests
    })
    const record = this.#link(file)
    if (this.#run(record) !== undefined) throw asyncImport(`${file.path} waits for a top-level await`)
    return record.namespace
  }

  #record(file) {
    let record = this.#records.get(file.url)
    if (record === undefined) {
      record = { file, namespace: emptyNamespace(), targets: [], linked: false, started: false, finished: false }
      this.#records.set(file.url, record)
      if (file.kind === 'wasm') this.#compile(record)
    }
    return record
  }

  /** Makes the records of all files that it takes; returns what Node has yet to load. */
  #gather(entry) {
    return this.#program
      .walk(entry, (file) => (this.#record(file).linked ? [] : file.requests))
      .filter((target) => !this.#isReplaced(target))
  }

  #link(entry) {
    const records = []
    this.#program.walk(entry, (file) => {
      const record = this.#record(file)
      if (record.linked) return []
      records.push(record)
      return file.requests
    })
    for (const record of records) this.#instantiate(record)
    for (const record of records) this.#bind(record)
    for (const record of records) record.linked = true
    return this.#record(entry)
  }

  #instantiate(record) {
    const { file } = record
    record.targets = (file.requests ?? []).map((request) => {
      const target = this.#program.resolve(file, request)
      if (target.file === undefined) return { namespace: this.#namespace(target), external: true }
      const its = this.#record(target.file)
      // Only compiled, and no part of the graph.
      return request.phase === 'source' ? { namespace: its.module, source: true } : its
    })
    if (file.kind !== 'esm') return
    const internals = {
      ...this.#imports(file),
      meta: this.#meta(file),
      exports: (getters) => {
        record.getters = Object.getOwnPropertyDescriptors(getters)
      },
      named: (fn) => Object.defineProperty(fn, 'name', { value: 'default', configurable: true }),
    }
    const namespaces = record.targets.map(({ namespace }) => namespace)
    record.body = file.script.runInThisContext()(...this.#arguments(file), internals, ...namespaces)()
    record.ready = record.body.next()
  }

  #namespace(target) {
    if (!this.#isReplaced(target)) return this.#program.external(target)
    return fill(emptyNamespace(), this.#builtin(target.url))
  }

  /** Finds the getter behind every name, and complains of names that are not there. */
  #bind(record) {
    const { file, namespace, targets } = record
    if (file.kind !== 'esm') return
    for (const name of [...exportNames(record)].sort()) {
      if (name in namespace) continue
      const found = find(record, name)
      if (found !== undefined) {
        getter(namespace, name, found.get)
      } else if (file.indirect.has(name)) {
        const { index, name: wanted } = file.indirect.get(name)
        throw noExport(file.requests[index].specifier, wanted)
      }
      // Otherwise two others export it differently, and there is nothing to see of it.
    }
    for (const { index, name } of file.named) {
      if (find(targets[index], name) === undefined) throw noExport(file.requests[index].specifier, name)
    }
  }

  /** Runs what has not run yet. Returns a promise where that takes one. */
  #run(record) {
    if (record.failed) throw record.error
    if (record.started) return record.pending
    record.started = true
    try {
      const waits = []
      for (const target of record.targets) {
        const pending = target.file === undefined ? undefined : this.#run(target)
        if (pending !== undefined) waits.push(pending)
      }
      if (waits.length > 0) record.pending = Promise.all(waits).then(() => this.#execute(record))
      else record.pending = this.#execute(record)
    } catch (error) {
      fail(record, error)
      throw error
    }
    if (record.pending === undefined) {
      record.finished = true
      return undefined
    }
    record.pending = record.pending.then(
      () => {
        record.finished = true
        record.pending = undefined
      },
      (error) => {
        fail(record, error)
        throw error
      },
    )
    // It is an error of those who import it.
    record.pending.catch(() => {})
    return record.pending
  }

  #execute(record) {
    const { file, namespace } = record
    switch (file.kind) {
      case 'esm': {
        // Only now the names of CommonJS modules are known.
        this.#bind(record)
        const { body } = record
        record.body = undefined
        const step = body.next()
        return file.asynchronous ? step : undefined
      }
      case 'wasm':
        return this.#instantiateWasm(record)
      case 'json':
        namespace.default = parseJSON(file)
        return undefined
      default:
        fill(namespace, this.#load(file, undefined))
    }
  }

  // ------------------------------ WebAssembly as a module

  #compile(record) {
    const { Module: WasmModule } = this.#shadows.WebAssembly
    record.module = new WasmModule(record.file.bytes)
    record.imports = WasmModule.imports(record.module)
    record.file.requests ??= [...new Set(record.imports.map(({ module }) => module))].map((specifier) => ({
      specifier,
    }))
    for (const { name, kind } of WasmModule.exports(record.module)) {
      // A global is the value that it has; all else is there from the start, so that the object stays a fast one.
      if (kind === 'global') getter(record.namespace, name, () => record.exports?.[name].value)
      else record.namespace[name] = undefined
    }
  }

  #instantiateWasm(record) {
    const imports = {}
    for (const { module, name } of record.imports) {
      const index = record.file.requests.findIndex(({ specifier }) => specifier === module)
      const target = record.targets[index]
      if (find(target, name) === undefined) throw noExport(module, name)
      imports[module] ??= {}
      imports[module][name] = (target.exports ?? target.namespace)[name]
    }
    const { exports } = new this.#shadows.WebAssembly.Instance(record.module, imports)
    record.exports = exports
    for (const name of Object.keys(exports)) {
      if (Object.getOwnPropertyDescriptor(record.namespace, name).get === undefined) {
        record.namespace[name] = exports[name]
      }
    }
  }
}

function fail(record, error) {
  record.failed = true
  record.error = error
}

function parseJSON(file) {
  try {
    return JSON.parse(file.source)
  } catch (error) {
    error.message = `${file.path}: ${error.message}`
    throw error
  }
}

function noExport(specifier, name) {
  return new SyntaxError(`The requested module '${specifier}' does not provide an export named '${name}'`)
}

/** The names of CommonJS modules are known when they have run. */
function isOpen({ file, finished }) {
  return file?.kind === 'cjs' && !finished
}

function exportNames(record, seen = new Set()) {
  const { file, namespace } = record
  if (file?.kind !== 'esm') return Object.keys(namespace)
  const names = new Set([...file.locals.keys(), ...file.indirect.keys()])
  if (seen.has(record)) return names
  seen.add(record)
  for (const index of file.stars) {
    for (const name of exportNames(record.targets[index], seen)) if (name !== 'default') names.add(name)
  }
  return names
}

/** The getter of an export, and whose it is; undefined if there is none, or more than one. */
function find(record, name, seen = new Set()) {
  const { file, namespace } = record
  if (file?.kind !== 'esm') {
    const there = name in namespace || isOpen(record) || (file?.kind === 'json' && name === 'default')
    return there ? { owner: namespace, name, get: () => namespace[name], open: isOpen(record) } : undefined
  }
  if (file.locals.has(name)) return { owner: namespace, name, get: record.getters[name].get }
  const from = file.indirect.get(name)
  if (from !== undefined) {
    const target = record.targets[from.index]
    if (from.name === null) return { owner: target.namespace, name: null, get: () => target.namespace }
    const key = `${file.url} ${name}`
    if (seen.has(key)) return undefined
    seen.add(key)
    return find(target, from.name, seen)
  }
  if (name === 'default' || seen.has(record)) return undefined
  seen.add(record)
  let found
  let open
  for (const index of file.stars) {
    const one = find(record.targets[index], name, seen)
    if (one === undefined) continue
    if (one.open) open ??= one
    else if (found === undefined) found = one
    else if (found.owner !== one.owner || found.name !== one.name) return undefined
  }
  return found ?? open
}

module.exports = { prepare }
