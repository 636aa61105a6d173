// The namespace as a module: every member of the object `WebAssembly` that the package itself exports.
import { WebAssembly as molt } from './index.js'

export declare const WebAssembly: typeof globalThis.WebAssembly
export default molt
export import CompileError = globalThis.WebAssembly.CompileError
export import Global = globalThis.WebAssembly.Global
export import Instance = globalThis.WebAssembly.Instance
export import LinkError = globalThis.WebAssembly.LinkError
export import Memory = globalThis.WebAssembly.Memory
export import Module = globalThis.WebAssembly.Module
export import RuntimeError = globalThis.WebAssembly.RuntimeError
export import Table = globalThis.WebAssembly.Table
export import compile = globalThis.WebAssembly.compile
export import instantiate = globalThis.WebAssembly.instantiate
export import validate = globalThis.WebAssembly.validate
