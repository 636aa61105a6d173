/** The package ships no types for its glue. */
declare module '@wasm-fmt/gofmt/gofmt_binding.js' {
  /** What the glue asks of an instance. */
  export interface Gofmt {
    readonly memory: { readonly buffer: ArrayBuffer }
    alloc(byteLength: number): number
    format(): number
    output_ptr(): number
    output_len(): number
    dispose(): void
  }
  export function format(wasm: Gofmt, source: string): string
}
