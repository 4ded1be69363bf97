"""TPU slices by the names they are rented under, and the rates of a chip.

No slice has to be there: `devices` describes its devices, and programs are compiled for them on
any machine with the package libtpu. Nodes of GPUs have names (h100-16) and a layout too, but
nothing is compiled for them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from csrm_jax.core import checks

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """The memory and the rates of one chip.

  Source: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e: peak compute, HBM, DCN; slice names;
    wrap-around links); links: "How to Scale Your Model" (jax-ml.github.io/scaling-book), TPU
    networking, one-way bandwidth.
  """

  hbm_bytes: float  # without what the compiler reserves
  flops: float  # peak FLOP/s of bfloat16 products
  hbm_bytes_per_s: float
  link_bytes_per_s: float  # one link to a neighbour, in each of its directions
  dcn_bytes_per_s: float  # between slices, over the data-centre network
  cores_named: int  # the name of a slice counts so many per chip: v5p-16 is 8 chips
  torus: int  # a side of the slice is a ring where it is a multiple of this


CHIPS = {
  'v4': Chip(30.75 * GIB, 275e12, 1.228e12, 45e9, 6.25e9, 2, 4),
  'v5e': Chip(15.75 * GIB, 197e12, 0.819e12, 45e9, 6.25e9, 1, 16),
  'v5p': Chip(95.0 * GIB, 459e12, 2.765e12, 90e9, 6.25e9, 2, 4),
  'v6e': Chip(31.25 * GIB, 918e12, 1.64e12, 90e9, 12.5e9, 1, 16),
}

# Number of chips -> sides of the slice.
SHAPES_2D = {
  1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8),
  128: (8, 16), 256: (16, 16),
}  # fmt: skip
SHAPES_3D = {
  4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4),
  128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16),
}  # fmt: skip
SHAPES = {'v4': SHAPES_3D, 'v5e': SHAPES_2D, 'v5p': SHAPES_3D, 'v6e': SHAPES_2D}

# GPUs per node; NVLink connects them.
NODES = {'a100': 8, 'h100': 8, 'h200': 8, 'b200': 8}


@dataclasses.dataclass(frozen=True)
class Slice:
  """One or several TPU slices, which the data-centre network connects."""

  name: str  # as rented, 'v5p-16'; with '2x' before it two of them
  kind: str  # a name of CHIPS
  shape: tuple[int, ...]  # chips along each side of one slice
  num_slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def num_chips(self) -> int:
    """The number of chips in all slices together."""
    return math.prod(self.shape) * self.num_slices

  @property
  def ring_bytes_per_s(self) -> tuple[float, ...]:
    """The rate of the ring along each side longer than 1, both directions together."""
    # A side that is not closed to a ring carries half.
    link = self.chip.link_bytes_per_s
    return tuple(
      link * (2 if side % self.chip.torus == 0 else 1) for side in self.shape if side > 1
    )


def names() -> list[str]:
  """Returns the names of all single slices."""
  return [
    f'{kind}-{num * CHIPS[kind].cores_named}' for kind, shapes in SHAPES.items() for num in shapes
  ]


def parse(name: str) -> Slice:
  """Returns the slice of a name: 'v5e-64', 'v5p-16', '2xv5e-256'."""
  if _num_gpus(name):
    raise ValueError(
      f'topology {name!r} is one of GPUs: what is compiled without devices is for TPUs (v5e-64)'
    )
  match = re.fullmatch(r'(?:(\d+)x)?(v\w+)-(\d+)', name)
  known = names()
  single = match and f'{match[2]}-{match[3]}'
  if not match or single not in known or match[1] in ('0', '1'):
    close = difflib.get_close_matches(str(single or name), known, 4, 0.5)
    raise ValueError(
      f'topology {name!r} does not exist; '
      f'{"did you mean " if close else "there are "}'
      f'{", ".join(close or known)} (2xv5e-256: two slices)'
    )
  kind, size = match[2], int(match[3])
  shape = SHAPES[kind][size // CHIPS[kind].cores_named]
  return Slice(name, kind, shape, int(match[1] or 1))


def _num_gpus(name: str) -> int:
  """Returns the GPUs of a name such as 'h100-16' (whole nodes or a part of one), else 0."""
  match = re.fullmatch(r'(\w+)-([1-9]\d*)', name)
  if not match or match[1] not in NODES:
    return 0
  num, node = int(match[2]), NODES[match[1]]
  return num if num % node == 0 or node % num == 0 else 0


def num_devices(name: str) -> int:
  """Returns how many TPUs or GPUs a slice or nodes of this name have."""
  return _num_gpus(name) or parse(name).num_chips


def layout(name: str) -> dict[str, int]:
  """Returns config.mesh for a slice or for GPU nodes, with a copy of the model in each.

  Set `tensor` to a part of fsdp where one row does not fit into a device.
  """
  if num := _num_gpus(name):
    slices = max(num // NODES[name.partition('-')[0]], 1)
  else:
    slices = parse(name).num_slices
  # Parameters are gathered over the fast links of a slice or node; only gradients travel
  # between.
  return {'data': slices, 'fsdp': -1, 'tensor': 1, 'num_slices': slices}


def devices(target: Slice) -> list[Any]:
  """Returns descriptions of the slice's devices, to compile for; needs the package libtpu."""
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
      f'compiling for TPUs needs the package libtpu (no TPU); {checks.install("tpu")}'
    )
  # Else libtpu asks the cloud's metadata server what machine this is, and there may be none.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  from jax.experimental import topologies

  extra = {}
  # The usual host has four chips or more; v4 and v5p tell libtpu their sides as well.
  if math.prod(target.shape) < 4:
    extra['chips_per_host_bounds'] = (*target.shape, 1)
  if target.num_slices > 1:
    extra['num_slices'] = target.num_slices
  shape = 'x'.join(map(str, target.shape))
  return topologies.get_topology_desc(
    platform='tpu', topology_name=f'{target.kind}:{shape}', **extra
  ).devices
