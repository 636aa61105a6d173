import { digest, text } from '../inputs.mjs'

export const specifier = '@cedar-policy/cedar-wasm/nodejs'
export const toolchain = 'wasm-bindgen'
export const notes =
  'An externref table that the glue grows and sets; multi-value results; instantiated while it is evaluated (CommonJS).'
export const grows = true
export const smallCalls = 1_000

const policies = text('policies.cedar.txt')
const schema = text('schema.cedar.txt')
const uid = (type, id) => ({ type, id })
const entities = [
  { uid: uid('Group', 'staff'), attrs: {}, parents: [] },
  { uid: uid('Group', 'editors'), attrs: {}, parents: [uid('Group', 'staff')] },
  ...Array.from({ length: 12 }, (_, n) => ({
    uid: uid('User', `user${n}`),
    attrs: { name: `User № ${n}`, clearance: n % 5 },
    parents: n % 3 === 0 ? [] : [uid('Group', n % 2 ? 'staff' : 'editors')],
  })),
  ...Array.from({ length: 20 }, (_, n) => ({
    uid: uid('Document', `doc${n}`),
    attrs: {
      owner: { __entity: uid('User', `user${n % 12}`) },
      title: n % 4 ? `Report ${n}` : `The secret of ${n}`,
      state: ['draft', 'published', 'archived'][n % 3],
      level: n % 6,
      tags: n % 5 ? ['a', 'b'] : ['confidential'],
    },
    parents: [],
  })),
]

const request = (i) => ({
  principal: uid('User', `user${i % 12}`),
  action: uid('Action', ['view', 'edit', 'delete'][i % 3]),
  resource: uid('Document', `doc${(i * 5) % 20}`),
  context: {
    authenticated: i % 4 !== 0,
    hour: 5 + (i % 14),
    source: { __extn: { fn: 'ip', arg: i % 7 ? '10.1.2.3' : '192.0.2.1' } },
  },
  schema,
  validateRequest: true,
  policies: { staticPolicies: policies },
  entities,
})

export function work(module, i) {
  const answers = [i, i + 3, i + 8].map((n) => module.isAuthorized(request(n)))
  const validated = module.validate({
    schema,
    policies: { staticPolicies: `${policies}\npermit (principal, action, resource) when { resource.size > ${i} };` },
  })
  const formatted = module.formatPolicies({ policyText: policies.replaceAll(/\s+/g, ' '), lineWidth: 60 + (i % 30) })
  const broken = module.checkParsePolicySet({ staticPolicies: `permit (principal, action resource${i});` })
  return {
    decisions: answers.map((answer) => answer.response?.decision ?? answer.type),
    reasons: answers.map((answer) => answer.response?.diagnostics.reason.toSorted()),
    invalid: validated.validationErrors?.length,
    broken: broken.errors?.[0].message,
    digest: digest(formatted.formatted_policy ?? JSON.stringify(formatted)),
  }
}

export function workSmall(module, i) {
  let sum = i
  for (let n = 0; n < smallCalls; n++) sum += module.getCedarVersion().length
  return sum
}

// Policy sets are kept under their names, for ever. Node: 500 calls, 2.4 to 13 MiB.
export function leak(module, i) {
  return module.preparsePolicySet(`set ${i}`, { staticPolicies: policies }).type
}
