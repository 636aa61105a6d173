// A worker thread of the soak. Node 20 hands no loader to workers, so this one brings its own.
import { register } from 'tsx/esm/api'

register()
await import('../soak/beside.ts')
