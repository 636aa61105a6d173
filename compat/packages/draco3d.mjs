import { bytesOf, digest } from '../inputs.mjs'

export const specifier = 'draco3d'
export const toolchain = 'Emscripten'
export const notes = 'Two modules, a decoder and an encoder; short import names; hook: instantiateWasm.'
export const grows = true
export const smallCalls = 1_000

const decoderWasm = bytesOf('draco3d/draco_decoder.wasm')
const encoderWasm = bytesOf('draco3d/draco_encoder.wasm')

// A torus of 71 by 71 quads: 10,082 triangles.
const SIDE = 71
const POINTS = SIDE * SIDE
const faces = new Uint32Array(POINTS * 6)
for (let v = 0, n = 0; v < SIDE; v++) {
  for (let u = 0; u < SIDE; u++) {
    const [a, b] = [v * SIDE + u, v * SIDE + ((u + 1) % SIDE)]
    const [c, d] = [((v + 1) % SIDE) * SIDE + u, ((v + 1) % SIDE) * SIDE + ((u + 1) % SIDE)]
    for (const point of [a, b, c, b, d, c]) faces[n++] = point
  }
}

/** Positions on a torus that is dented differently for each i, rounded so that both engines' sines do. */
function positions(i) {
  const at = new Float32Array(POINTS * 3)
  for (let p = 0; p < POINTS; p++) {
    const [u, v] = [((p % SIDE) / SIDE) * 2 * Math.PI, (Math.floor(p / SIDE) / SIDE) * 2 * Math.PI]
    const radius = 3 + Math.cos(v) * (1 + 0.1 * Math.sin(u * (3 + (i % 5))))
    at.set([radius * Math.cos(u), radius * Math.sin(u), Math.sin(v)], p * 3)
  }
  return at
}
const meshes = Array.from({ length: 5 }, (_, i) => positions(i))

export async function expose(glue, { WebAssembly }) {
  const { createDecoderModule, createEncoderModule } = glue
  const hook = (bytes) => ({
    instantiateWasm(imports, receive) {
      WebAssembly.instantiate(bytes, imports).then(({ instance, module }) => receive(instance, module))
      return {}
    },
  })
  return {
    decoder: await createDecoderModule(hook(decoderWasm)),
    encoder: await createEncoderModule(hook(encoderWasm)),
  }
}

function encode(draco, i, keep = false) {
  const builder = new draco.MeshBuilder()
  const mesh = new draco.Mesh()
  const encoder = new draco.Encoder()
  const out = new draco.DracoInt8Array()
  builder.AddFacesToMesh(mesh, faces.length / 3, faces)
  builder.AddFloatAttributeToMesh(mesh, draco.POSITION, POINTS, 3, meshes[i % 5])
  encoder.SetSpeedOptions(5, 5)
  encoder.SetAttributeQuantization(draco.POSITION, 8 + (i % 6))
  encoder.SetEncodingMethod(draco.MESH_EDGEBREAKER_ENCODING)
  const length = encoder.EncodeMeshToDracoBuffer(mesh, out)
  const bytes = new Int8Array(length)
  for (let n = 0; n < length; n++) bytes[n] = out.GetValue(n)
  if (!keep) for (const object of [out, encoder, mesh, builder]) draco.destroy(object)
  return bytes
}

function decode(draco, bytes) {
  const decoder = new draco.Decoder()
  const mesh = new draco.Mesh()
  const status = decoder.DecodeArrayToMesh(bytes, bytes.length, mesh)
  if (!status.ok()) throw new Error(status.error_msg())
  const values = new draco.DracoFloat32Array()
  decoder.GetAttributeFloatForAllPoints(
    mesh,
    decoder.GetAttribute(mesh, decoder.GetAttributeId(mesh, draco.POSITION)),
    values,
  )
  const points = new Float32Array(values.size())
  for (let n = 0; n < points.length; n++) points[n] = values.GetValue(n)
  const size = mesh.num_faces() * 12
  const at = draco._malloc(size)
  decoder.GetTrianglesUInt32Array(mesh, size, at)
  const triangles = draco.HEAPU8.slice(at, at + size)
  draco._free(at)
  for (const object of [values, mesh, decoder]) draco.destroy(object)
  return { points, triangles }
}

export function work(module, i) {
  const bytes = encode(module.encoder, i)
  const { points, triangles } = decode(module.decoder, bytes)
  return {
    bytes: bytes.length,
    points: points.length,
    digest: digest(new Uint8Array(bytes.buffer), new Uint8Array(points.buffer), triangles),
  }
}

export function workSmall({ decoder }, i) {
  const values = new decoder.DracoFloat32Array()
  let sum = i
  for (let n = 0; n < smallCalls; n++) sum += values.size() + 1
  decoder.destroy(values)
  return sum
}

// Nothing is destroyed: the mesh, the encoder with its tables, the output. Node: 500 calls, 32 to 117 MiB.
export const leak = (module, i) => encode(module.encoder, i, true).length
