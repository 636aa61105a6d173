// What Bun loads before a spec: its test runner takes --expose-gc and exposes nothing.
const { Bun } = globalThis as { Bun?: { gc(force: boolean): void } }
if (Bun !== undefined) Object.assign(globalThis, { gc: () => Bun.gc(true) })
