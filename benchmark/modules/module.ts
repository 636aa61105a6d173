import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

/** What a driver needs of an instance, on either engine. */
export interface Guest {
  exports: Record<string, (...args: number[]) => number>
  memory: { readonly buffer: ArrayBuffer }
}

/** A published module and how to put it to work without its glue. */
export interface RealModule {
  name: string
  /** What it was compiled from, and its size. */
  origin: string
  path: string
  /** Calls timed in one turn; a turn begins with a fresh instance. */
  calls: number
  imports?(memory: () => ArrayBuffer): Record<string, Record<string, (...args: number[]) => number>>
  /** Brings an instance to the point where it can work; the answer does one unit of work and gives its result. */
  open(guest: Guest): () => string | number
}

export function resolve(specifier: string): string {
  return fileURLToPath(import.meta.resolve(specifier))
}

/** A file of real code to work on, of an exactly pinned package. */
export const sample = readFileSync(new URL('../node_modules/piscina/dist/index.js', import.meta.url))

const decoder = new TextDecoder()

export function write(guest: Guest, at: number, bytes: Uint8Array): void {
  new Uint8Array(guest.memory.buffer, at, bytes.length).set(bytes)
}

export function read(guest: Guest, at: number, byteLength: number): string {
  return decoder.decode(new Uint8Array(guest.memory.buffer, at, byteLength))
}

/** The function of that name; a module that lacks it is not the one the driver was written for. */
export function take(guest: Guest, name: string): (...args: number[]) => number {
  const found = guest.exports[name]
  if (!found) throw new Error(`the module exports no ${name}`)
  return found
}
