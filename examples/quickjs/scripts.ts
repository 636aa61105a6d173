// What users send: templates for Handlebars, from scripts of which some keep things, some spoil what they find, and some never end.

export interface UserScript {
  text: string
  /** Each number of a user has an answer of its own, so a stale one cannot pass for a fresh one. */
  expected: { html: string } | { exception: string } | 'endless'
}

/** How a script leaves its traces, besides its name in `visitors`; one after another. */
const mischief = [
  '',
  // 1.6 MB that stay.
  'visitors[visitors.length] = new Array(200000).fill(0)',
  'Handlebars.registerHelper("price", () => "free")',
  // Some 5 MB that could be given back.
  'for (let at = 0; at < 3; at += 1) new Array(200000).fill(at)',
  'EXCEPTION',
  'JSON.stringify = () => "stolen"; Array.prototype.map = function () { return this }',
  '',
  'visitors[visitors.length] = new Array(200000).fill(1)',
  'Handlebars.registerPartial("article", "<li>an advertisement</li>"); Object.prototype.lookup = "taken"',
]

/** Says first what it finds of others, in a line of its own. */
const look = `
  let found = ''
  if ('visitors' in globalThis) found += 'visitors '
  if ('lookup' in {}) found += 'Object.prototype '
  if (JSON.stringify(1) !== '1') found += 'JSON.stringify '
  if ([1].map((one) => one + 1)[0] !== 2) found += 'Array.prototype.map '
  if (Handlebars.helpers.price(100) !== '1.00 €') found += 'helpers.price '
  if (!('visitors' in globalThis)) globalThis.visitors = []
  visitors[visitors.length] = 'user '`

/** The script of user `user`, from 1. */
export function userScript(user: number): UserScript {
  if (user % 100 === 10) return { text: 'for (;;) {}', expected: 'endless' }
  const first = (user * 7) % 990
  const deed = mischief[user % mischief.length] ?? ''
  const template = '<h1>{{title}}</h1>{{#each some}}{{> article}}{{/each}}'
  const answer = `render('${template}', { title: 'User ${user}', some: goods.slice(${first}, ${first + 5}) })`
  const end =
    deed === 'EXCEPTION' ? `throw new RangeError(found + 'not for user ${user}')` : `return found + '\\n' + html`
  const articles = Array.from({ length: 5 }, (_, at) => article(first + at + 1)).join('')
  return {
    text: `(() => {${look}
  let html
  try { html = ${answer} } catch (error) { html = error }
  ${deed === 'EXCEPTION' ? '' : deed}
  ${end}
})()`,
    expected:
      deed === 'EXCEPTION'
        ? { exception: `RangeError: not for user ${user}` }
        : { html: `<h1>User ${user}</h1>${articles}` },
  }
}

/** What came of a script. */
export type Outcome = { text: string } | { exception: string } | 'stopped'

/** Whether that is right, and what the script said it had found of others. */
export function judge({ expected }: UserScript, outcome: Outcome): { isRight: boolean; found: string } {
  if (outcome === 'stopped' || expected === 'endless')
    return { isRight: outcome === 'stopped' && expected === 'endless', found: '' }
  if ('exception' in outcome) {
    const found = /^RangeError: (.+) not for user/.exec(outcome.exception)?.[1] ?? ''
    const isRight = 'exception' in expected && outcome.exception === expected.exception
    return { isRight, found }
  }
  const [found = '', ...html] = outcome.text.split('\n')
  return { isRight: 'html' in expected && html.join('\n') === expected.html, found: found.trim() }
}

function article(id: number): string {
  return `<li>Article ${id}: ${((199 + (id - 1) * 50) / 100).toFixed(2)} €</li>`
}
