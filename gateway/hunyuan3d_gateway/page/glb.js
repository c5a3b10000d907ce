// For the viewer alone: the mesh of a GLB file with smooth normals and a matt material. Downloads are the file as it is.

const COLORS = { light: [0.56, 0.21, 0.11, 1], dark: [0.60, 0.27, 0.16, 1] };

export function dressed(buffer, { dark = false, upright = false } = {}) {
  const view = new DataView(buffer);
  const jsonLength = view.getUint32(12, true);
  const scene = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, jsonLength)));
  const start = 20 + jsonLength + 8, length = view.getUint32(20 + jsonLength, true);
  const binary = buffer.slice(start, start + length);
  const added = [];
  let size = binary.byteLength;
  scene.materials = [{ pbrMetallicRoughness: { baseColorFactor: dark ? COLORS.dark : COLORS.light, metallicFactor: 0, roughnessFactor: 0.62 }, doubleSided: true }];
  for (const mesh of scene.meshes || []) {
    for (const primitive of mesh.primitives) {
      primitive.material = 0;
      if ((primitive.mode ?? 4) !== 4 || primitive.attributes.NORMAL !== undefined) continue;
      const positions = read(scene, binary, primitive.attributes.POSITION);
      const normals = normalsOf(positions, primitive.indices === undefined ? null : read(scene, binary, primitive.indices));
      const offset = Math.ceil(size / 4) * 4;
      added.push([offset, normals]);
      size = offset + normals.byteLength;
      scene.bufferViews.push({ buffer: 0, byteOffset: offset, byteLength: normals.byteLength });
      scene.accessors.push({ bufferView: scene.bufferViews.length - 1, componentType: 5126, count: normals.length / 3, type: "VEC3" });
      primitive.attributes.NORMAL = scene.accessors.length - 1;
    }
  }
  if (upright) turn(scene);
  scene.buffers[0].byteLength = size;
  return packed(scene, binary, added, size);
}

// Rotates the whole scene, so that z points up on the screen.
function turn(scene) {
  const roots = scene.scenes[scene.scene || 0];
  scene.nodes.push({ children: roots.nodes, rotation: [-Math.SQRT1_2, 0, 0, Math.SQRT1_2] });
  roots.nodes = [scene.nodes.length - 1];
}

function read(scene, binary, index) {
  const accessor = scene.accessors[index], bufferView = scene.bufferViews[accessor.bufferView];
  const offset = (bufferView.byteOffset || 0) + (accessor.byteOffset || 0);
  const kind = { 5121: Uint8Array, 5123: Uint16Array, 5125: Uint32Array, 5126: Float32Array }[accessor.componentType];
  const count = accessor.count * { SCALAR: 1, VEC3: 3 }[accessor.type];
  return new kind(binary.slice(offset, offset + count * kind.BYTES_PER_ELEMENT));
}

function normalsOf(p, indices) {
  const normals = new Float32Array(p.length), count = indices ? indices.length : p.length / 3;
  for (let i = 0; i < count; i += 3) {
    const [a, b, c] = [0, 1, 2].map((k) => 3 * (indices ? indices[i + k] : i + k));
    const ux = p[b] - p[a], uy = p[b + 1] - p[a + 1], uz = p[b + 2] - p[a + 2];
    const vx = p[c] - p[a], vy = p[c + 1] - p[a + 1], vz = p[c + 2] - p[a + 2];
    const nx = uy * vz - uz * vy, ny = uz * vx - ux * vz, nz = ux * vy - uy * vx;
    for (const at of [a, b, c]) {
      normals[at] += nx;
      normals[at + 1] += ny;
      normals[at + 2] += nz;
    }
  }
  for (let i = 0; i < normals.length; i += 3) {
    const size = Math.hypot(normals[i], normals[i + 1], normals[i + 2]);
    if (size > 0) for (let k = 0; k < 3; k++) normals[i + k] /= size;
    else normals[i + 2] = 1;
  }
  return normals;
}

function packed(scene, binary, added, size) {
  let json = new TextEncoder().encode(JSON.stringify(scene));
  const padded = new Uint8Array(Math.ceil(json.length / 4) * 4).fill(0x20);
  padded.set(json);
  const whole = Math.ceil(size / 4) * 4, out = new ArrayBuffer(28 + padded.length + whole), view = new DataView(out), bytes = new Uint8Array(out);
  [0x46546c67, 2, out.byteLength, padded.length, 0x4e4f534a].forEach((word, i) => view.setUint32(4 * i, word, true));
  bytes.set(padded, 20);
  view.setUint32(20 + padded.length, whole, true);
  view.setUint32(24 + padded.length, 0x004e4942, true);
  bytes.set(new Uint8Array(binary), 28 + padded.length);
  for (const [offset, normals] of added) bytes.set(new Uint8Array(normals.buffer), 28 + padded.length + offset);
  return out;
}
