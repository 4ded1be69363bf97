"""The device mesh, and the one table that says how parameters lie on it.

The mesh has three axes: `data` (batch only), `fsdp` (batch, and parameters cut along one axis)
and `tensor` (heads, mlp width and vocabulary). One device is a 1x1x1 mesh, so every program is
written for a mesh.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from csrm_jax.core import tree

AXES = ('data', 'fsdp', 'tensor')
# Rows of a batch are cut over these axes.
ROWS = ('data', 'fsdp')
# The vocabulary is cut over these.
VOCAB = ('fsdp', 'tensor')
# The layout of a layer's cache: keys [B,K,H,S] and values [B,K,S,H].
CACHE = (ROWS, 'tensor')

# The first match wins. A pattern is matched at the end of the leaf's name, so that 'params/...' and
# the optimizer's 'opt_state/0/mu/...' fall under one rule. Every leaf must match a rule: a silently
# replicated matrix is how memory runs out.
PARAM_RULES: tuple[tuple[str, P], ...] = (
  # [V, D]
  (r'embed/embedding', P('tensor', 'fsdp')),
  # [L, D, N, H] and, for keys and values, [L, D, K, H]
  (r'attention/(query|key|value)/kernel', P(None, 'fsdp', 'tensor', None)),
  # [L, N, H] and [L, K, H]
  (r'attention/(query|key|value)/bias', P(None, 'tensor', None)),
  # [L, N, H, D]
  (r'attention/out/kernel', P(None, 'tensor', None, 'fsdp')),
  # [L, D, F]
  (r'mlp/(gate|up)(/kernel)?', P(None, 'fsdp', 'tensor')),
  # [L, F, D]
  (r'mlp/down(/kernel)?', P(None, 'tensor', 'fsdp')),
  # LoRA adapters are cut as their kernels are, and never along the rank:
  # [L, D, r], [L, N, H, r], [L, F, r]
  (r'(query|key|value|gate|up)/lora_a', P(None, 'fsdp', None)),
  (r'(out|down)/lora_a', P(None, 'tensor')),
  # [L, r, N, H], [L, r, K, H], [L, r, F], [L, r, D]
  (r'(query|key|value|gate|up)/lora_b', P(None, None, 'tensor')),
  (r'(out|down)/lora_b', P(None, None, 'fsdp')),
  # A reward model's own head: [D, K], [K], [D, D]
  (r'head/kernel', P()),
  (r'head/(up/)?bias', P()),
  (r'head/up/kernel', P('fsdp', None)),
  # PPO's critic, a product with the final hidden state: [D]
  (r'value_head/kernel', P()),
  # Norms: [D], [L, D], [L, H]
  (r'scale', P()),
  # What the optimizer Muon iterates with: [3]
  (r'ns_coeffs', P()),
  # [D, V]: never gathered; see transformer.logits
  (r'lm_head/kernel', P(None, VOCAB)),
)


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  num_slices: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns a mesh with axes (data, fsdp, tensor) over all devices.

  One size may be -1: it takes the devices that the others leave. `num_slices` is the number of
  TPU slices, or of GPU nodes, that a slow network connects. Only `data` crosses that network:
  each slice holds whole copies of fsdp x tensor.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
  free = [name for name, size in sizes.items() if size == -1]
  bad = [name for name, size in sizes.items() if size < 1 and size != -1]
  if bad or len(free) > 1:
    raise ValueError(f'mesh {sizes}: sizes are at least 1, and at most one may be -1')
  known = math.prod(size for size in sizes.values() if size != -1)
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f'mesh {sizes} does not fit {len(devices)} devices: the sizes must '
      'multiply to that number (set one of them to -1)'
    )
  # The compiler lays arrays out; `constrain` says where it must not guess.
  types = (AxisType.Auto,) * len(AXES)
  shape = tuple(sizes.values())
  if num_slices == 1 and _num_slices(devices) == 1:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  return Mesh(_across_slices(shape, devices, num_slices), AXES, types)


def _num_slices(devices: Sequence[jax.Device]) -> int:
  """Returns the number of TPU slices; 1 for other devices."""
  return len({getattr(device, 'slice_index', 0) for device in devices})


def _across_slices(
  shape: tuple[int, ...], devices: Sequence[jax.Device], num_slices: int
) -> np.ndarray:
  """Returns the devices of a mesh whose first axis goes over the slices first."""
  found = _num_slices(devices)
  if num_slices < 1 or found not in (1, num_slices):
    raise ValueError(
      f'mesh num_slices={num_slices}, but the devices lie in {found} slices: set it to that number'
    )
  if shape[0] % num_slices:
    raise ValueError(
      f'mesh data={shape[0]} does not divide over num_slices={num_slices}: '
      'only data goes across slices; set it to a multiple'
    )
  within = (shape[0] // num_slices, *shape[1:])
  if found == num_slices:
    return mesh_utils.create_hybrid_device_mesh(
      within, (num_slices, 1, 1), devices, allow_split_physical_axes=True
    )
  # Other devices come in the order of their processes, and so of their nodes: equal blocks of them
  # are nodes, and each block becomes a part of the data axis.
  blocks = np.array(devices).reshape(num_slices, -1)
  return np.concatenate([mesh_utils.create_device_mesh(within, list(block)) for block in blocks])


def param_spec(name: str, shape: Sequence[int], mesh: Mesh) -> P:
  """Returns the PartitionSpec of the leaf `name`.

  Scalars (a step, the count of an optimizer) are replicated. A mesh axis that does not divide
  the array axis is left out, so tiny models run on any mesh.
  """
  if not shape:
    return P()
  matches = [r for r in PARAM_RULES if re.search(rf'(^|/){r[0]}$', name)]
  if not matches:
    raise ValueError(
      f'no sharding rule for {name!r} with shape {tuple(shape)}: add one to '
      'PARAM_RULES in csrm_jax/core/mesh.py'
    )
  pattern, spec = matches[0]
  if len(spec) > len(shape):
    raise ValueError(
      f'the sharding rule {pattern!r} has {len(spec)} axes but {name!r} has '
      f'shape {tuple(shape)}: correct PARAM_RULES or the parameter'
    )
  return fit(spec, shape, mesh)


def fit(spec: P, shape: Sequence[int], mesh: Any) -> P:
  """Returns the spec without mesh axes that do not divide their array axis.

  If several mesh axes lie on one array axis, the first ones that divide it stay.
  """
  axes = []
  # A spec may be shorter than the shape: the other axes are not cut.
  for axis, size in zip(spec, shape, strict=False):
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    while names and size % math.prod(mesh.shape[name] for name in names):
      names = names[:-1]
    axes.append(names[0] if len(names) == 1 else names or None)
  return P(*axes)


def platform() -> str:
  """Returns the platform that programs are traced for: 'cpu', 'gpu' or 'tpu'."""
  # The mesh may be of TPUs that are not there: programs are compiled for them on any machine.
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def current() -> Any:
  """Returns the mesh that jax.set_mesh has set, or None on a single device."""
  mesh = jax.sharding.get_abstract_mesh()
  # Within shard_map (manual axes) each device computes alone, as on a mesh of one.
  alone = mesh.empty or mesh.size == 1 or mesh.manual_axes
  return None if alone else mesh


def of(params: Any) -> contextlib.AbstractContextManager:
  """Returns a context in which the mesh of a tree of arrays is set.

  If the arrays lie on no mesh, no mesh is set within, whatever is set outside.
  """
  for leaf in jax.tree.leaves(params):
    mesh = getattr(getattr(leaf, 'sharding', None), 'mesh', None)
    return jax.set_mesh(mesh if isinstance(mesh, Mesh) else None)
  return contextlib.nullcontext()


def num_row_parts(params: Any) -> int:
  """Returns how many parts rows are cut into on the mesh of `params`."""
  with of(params):
    mesh = current()
    return math.prod(mesh.shape[name] for name in ROWS) if mesh else 1


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
  """Returns x, laid out by the spec; x itself on one device or without a mesh."""
  mesh = current()
  if mesh is None:
    return x
  # Left to guess, the compiler may cut activations as it cuts parameters, and move far more.
  return jax.lax.with_sharding_constraint(x, fit(P(*spec), x.shape, mesh))


def shardings(shapes: Any, mesh: Mesh) -> Any:
  """Returns the tree of NamedShardings for parameters or a whole train state."""
  named = tree.named_leaves(shapes)
  found = [NamedSharding(mesh, param_spec(name, x.shape, mesh)) for name, x in named.items()]
  return jax.tree.unflatten(jax.tree.structure(shapes), found)


def abstract(shapes: Any, mesh: Mesh) -> Any:
  """Returns the ShapeDtypeStructs of a tree, with shardings, to restore onto."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    shardings(shapes, mesh),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def abstract_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of `to_global`'s arrays, with their shardings."""
  sharding = _rows_sharding(batch, mesh)
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in batch.items()
  }


def _rows_sharding(batch: Mapping[str, np.ndarray], mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batch arrays, whose rows are cut over data and fsdp."""
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  for name, x in batch.items():
    if x.shape[0] % parts:
      raise ValueError(
        f'batch array {name!r} has {x.shape[0]} rows, which do not divide over '
        f'data x fsdp = {parts} devices: use a batch size that does'
      )
  return NamedSharding(mesh, P(ROWS))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Returns the global arrays of a batch that every process holds whole."""
  sharding = _rows_sharding(batch, mesh)
  # All processes make the same batch. This costs little compared with the step, and keeps
  # packing, the curve and the position in the data the same on any number of hosts.
  if jax.process_count() == 1:
    return {name: jax.device_put(x, sharding) for name, x in batch.items()}
  return {
    name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    for name, x in batch.items()
  }
