import { type RealModule, read, resolve, sample, take, write } from './module.ts'

const encoder = new TextEncoder()
const config = encoder.encode(JSON.stringify({ global: {}, plugin: {} }))
const file = encoder.encode('sample.js')

/** dprint's plugin protocol, version 4: everything passes through one shared buffer. */
export const dprint: RealModule = {
  name: 'dprint-typescript',
  origin: 'Rust, 4.2 MB',
  path: resolve('@dprint/typescript/plugin.wasm'),
  calls: 8,
  open(guest) {
    const share = take(guest, 'clear_shared_bytes')
    const shared = take(guest, 'get_shared_bytes_ptr')
    const format = take(guest, 'format')
    const formatted = take(guest, 'get_formatted_text')
    const send = (bytes: Uint8Array) => write(guest, share(bytes.length), bytes)
    send(config)
    take(guest, 'register_config')(1)
    return () => {
      send(file)
      take(guest, 'set_file_path')()
      send(sample)
      if (format(1) !== 1) throw new Error('dprint found nothing to format')
      const byteLength = formatted()
      return read(guest, shared(), byteLength)
    }
  },
}
