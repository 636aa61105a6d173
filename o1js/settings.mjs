// What can be set, and what by: `configure` and the environment variable WASM_MOLT_O1JS.

const RANGES = {
  memoryBytes: [2 ** 20, 2 ** 32],
  stackBytes: [2 ** 16, 2 ** 30],
  proofTimeoutMs: [1, 2 ** 31 - 1],
}

export function checkSettings(options) {
  for (const [name, value] of Object.entries(options)) {
    if (name === 'reset') {
      const isThreshold = Number.isSafeInteger(value) && value >= 0
      if (value === 'always' || value === 'never' || isThreshold) continue
      throw new RangeError(
        `wasm-molt/o1js: reset is ${JSON.stringify(value)}; it must be 'always', 'never', or the bytes of memory above which to reset`,
      )
    }
    const range = RANGES[name]
    if (range === undefined) {
      throw new TypeError(
        `wasm-molt/o1js: there is no setting ${name}; there are reset, ${Object.keys(RANGES).join(', ')}`,
      )
    }
    const [least, most] = range
    if (value === undefined || (Number.isSafeInteger(value) && value >= least && value <= most)) continue
    throw new RangeError(
      `wasm-molt/o1js: ${name} is ${JSON.stringify(value)}; it must be an integer from ${least} to ${most}`,
    )
  }
}

/** `reset=always,memoryBytes=2000000000` */
export function fromEnvironment(text = '') {
  const pairs = text.split(',').filter((pair) => pair.trim() !== '')
  const options = Object.fromEntries(
    pairs.map((pair) => {
      const [name, value = ''] = pair.split('=').map((part) => part.trim())
      return [name, /^\d+$/.test(value) ? Number(value) : value]
    }),
  )
  checkSettings(options)
  return options
}
