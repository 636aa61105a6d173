// Runs in the guest, once per instance: what users' templates find there.
globalThis.goods = Array.from({ length: 1000 }, (_, at) => ({
  id: at + 1,
  name: `Article ${at + 1}`,
  cents: 199 + at * 50,
}))

Handlebars.registerHelper('price', (cents) => `${(cents / 100).toFixed(2)} €`)
Handlebars.registerPartial('article', '<li>{{name}}: {{price cents}}</li>')

globalThis.render = (template, data) => Handlebars.compile(template)({ goods, ...data })

// Compiles the partial as well, so that it is there when the first script comes.
render('{{#each goods}}{{> article}}{{/each}}')
