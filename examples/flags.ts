// The flags of a scene: read, or refused with the usage.
import { type ParseArgsConfig, parseArgs } from 'node:util'

export interface Flags<Name extends string> {
  values: Record<Name, string>
  /** A flag as a number of things. */
  positive(name: Name): number
}

/**
 * * `defaults`: every flag there is.
 */
export function readFlags<Name extends string>(usage: string, defaults: Record<Name, string>): Flags<Name> {
  const refuse = (why: string): never => {
    process.stderr.write(`${why}\n${usage}\n`)
    process.exit(2)
  }
  const options = Object.fromEntries(
    Object.entries(defaults).map(([name, value]) => [name, { type: 'string', default: value }]),
  ) as ParseArgsConfig['options']
  const read = () => {
    try {
      return parseArgs({ options }).values as Record<Name, string>
    } catch (error) {
      return refuse((error as Error).message)
    }
  }
  const values = read()
  return {
    values,
    positive: (name) => {
      const value = Number(values[name])
      if (Number.isInteger(value) && value > 0) return value
      return refuse(`--${name} must be a positive whole number, not "${values[name]}"`)
    },
  }
}
