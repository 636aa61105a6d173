import { digest, random } from '../inputs.mjs'

export const specifier = 'sql.js'
export const toolchain = 'Emscripten'
export const notes =
  'Short import names; reads its file by itself and instantiates asynchronously; memory and table exported; grows.'
export const grows = true
export const smallCalls = 1_000

export const expose = (initSqlJs) => initSqlJs()

function filled(module, rows, i) {
  const db = new module.Database()
  const next = random(i)
  db.run(
    'CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT, price REAL, tag TEXT); CREATE INDEX tags ON items (tag)',
  )
  db.run('BEGIN')
  const insert = db.prepare('INSERT INTO items (name, price, tag) VALUES (?, ?, ?)')
  for (let n = 0; n < rows; n++) insert.run([`item ${n}`, Math.round(next() * 1e4) / 100, `tag${(next() * 17) | 0}`])
  insert.free()
  db.run('COMMIT')
  return db
}

export function work(module, i) {
  const db = filled(module, 3_000, i)
  db.create_function('half', (x) => x / 2)
  const [byTag] = db.exec('SELECT tag, count(*), round(sum(half(price)), 2) FROM items GROUP BY tag ORDER BY 3 DESC')
  const each = db.prepare("SELECT id, name FROM items WHERE tag = $tag AND name LIKE '%7%' ORDER BY price")
  each.bind({ $tag: `tag${i % 17}` })
  const rows = []
  while (each.step()) rows.push(each.get())
  each.free()
  let refused
  try {
    db.run('INSERT INTO items (id) VALUES (1)')
  } catch (error) {
    refused = error.message
  }
  const file = db.export()
  db.close()
  const again = new module.Database(file)
  const [{ values }] = again.exec('SELECT count(*), min(name), max(price) FROM items')
  again.close()
  return {
    values,
    refused,
    rows: rows.length,
    bytes: file.length,
    digest: digest(JSON.stringify(byTag), JSON.stringify(rows), file),
  }
}

export function workSmall(module, i) {
  const db = new module.Database()
  const add = db.prepare('SELECT ?1 + ?2')
  let sum = 0
  for (let n = 0; n < smallCalls; n++) sum += add.get([n, i])[0]
  db.close()
  return sum
}

// A database that nobody closes. Node: 500 calls, 21 to 91 MiB.
// (After 4096 of them the glue's own table of open files is full, whatever the memory does.)
export function leak(module, i) {
  return filled(module, 500, i).exec('SELECT count(*) FROM items')[0].values[0][0]
}
