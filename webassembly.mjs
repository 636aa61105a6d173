import molt from './webassembly.js'

export const {
  CompileError,
  Exception,
  Global,
  Instance,
  LinkError,
  Memory,
  Module,
  RuntimeError,
  Table,
  Tag,
  compile,
  compileStreaming,
  instantiate,
  instantiateStreaming,
  validate,
} = molt
export { molt as WebAssembly }
export default molt
