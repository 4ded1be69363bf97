"""What a compiled program costs: products, memory, bytes between devices.

The compiler's own count of FLOPs takes the body of a loop once, so products
are counted in the traced program, and collectives in the compiled one, each
times the turns of the loops around it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

COLLECTIVES = (
  'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all',
  'collective-permute',
)  # fmt: skip
ITEM_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
  'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8,
}  # fmt: skip


def count_flops(fn: Any, *args: Any, turns: int = 0) -> float:
  """Returns the FLOPs of the products in fn(*args), over all devices.

  A multiplication and an addition count as two; what is recomputed counts
  again; everything but products is left out. Of a branch the dearest counts.

  Args:
    fn: to be traced.
    *args: arrays or their shapes.
    turns: of loops with products that are no scans; 0 if there are none.
  """
  return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr, turns)


def _jaxpr_flops(jaxpr: Any, turns: int) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = [_jaxpr_flops(sub, turns) for sub in _inner_jaxprs(eqn.params)]
    if eqn.primitive.name == 'dot_general':
      total += _product_flops(eqn)
    elif eqn.primitive.name == 'scan':
      total += eqn.params['length'] * sum(inner)
    elif eqn.primitive.name == 'cond':
      total += max(inner)
    elif eqn.primitive.name == 'while' and sum(inner):
      if not turns:
        raise ValueError(
          'products in a while loop cannot be counted: use a scan, or say how many turns it has'
        )
      total += turns * sum(inner)
    else:
      total += sum(inner)
  return total


def _product_flops(eqn: Any) -> float:
  (contracted, _), _ = eqn.params['dimension_numbers']
  shape = eqn.invars[0].aval.shape
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, jax_core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, jax_core.Jaxpr):
        yield item


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of COLLECTIVES.
    num_bytes: of the whole array that a group gathers, reduces or exchanges,
      as one of its devices sees it.
    group: devices that take part together: those of the first group, by
      their place in the mesh.
    turns: how often it runs in a step.
    source: the operation of the program that it belongs to.
  """

  kind: str
  num_bytes: int
  group: tuple[int, ...]
  turns: int
  source: str


def collectives(text: str, turns: int = 1) -> list[Collective]:
  """Returns the collectives of a compiled program's text (HLO), scans included.

  One that the compiler has spread over several fusions counts once.

  Args:
    text: of the program.
    turns: of loops whose end is not in the text.
  """
  bodies = _split(text)
  found = {}
  for name, times in _turns(bodies, turns).items():
    for line in bodies.get(name, ()):
      match = _COLLECTIVE.search(line)
      if match:
        number = re.search(r'channel_id=(\d+)', line)
        key = number[1] if number else line
        found[key] = _describe(match, line, times)
  return list(found.values())


_COLLECTIVE = re.compile(rf'= (?P<out>.*?) (?P<kind>{"|".join(COLLECTIVES)})(?P<start>-start)?\(')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|called_computations|branch_computations)='
  r'\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)'
)


def _split(text: str) -> dict[str, list[str]]:
  """Returns the lines of each computation; that of ENTRY is named ENTRY."""
  bodies, lines = {}, []
  for line in text.splitlines():
    if line.startswith(('%', 'ENTRY')):
      lines = bodies.setdefault(line.split(' ')[0], [])
    elif line.startswith(' '):
      lines.append(line)
  return bodies


def _turns(bodies: dict[str, list[str]], unknown: int) -> dict[str, int]:
  """Returns how often each computation runs, from the call that is in most.

  Calls are not added up: a collective that was cut into several fusions is in
  each of them.
  """
  turns: dict[str, int] = {}
  pending = [('ENTRY', 1)]
  while pending:
    name, times = pending.pop()
    if turns.get(name, 0) >= times:
      continue
    turns[name] = times
    for line in bodies.get(name, ()):
      body = re.search(r'body=(%[\w.\-]+)', line)
      for group in _CALLED.findall(line):
        for called in group.replace(' ', '').split(','):
          is_body = body and called == body[1]
          inner = _trip_count(line, bodies, unknown) if is_body else 1
          pending.append((called, times * inner))
  return turns


def _trip_count(line: str, bodies: dict[str, list[str]], unknown: int) -> int:
  """Returns the turns of a while loop that a scan became: i < constant."""
  known = re.search(r'known_trip_count[^\d]*(\d+)', line)
  if known:
    return int(known[1])
  condition = re.search(r'condition=(%[\w.\-]+)', line)[1]
  limits = re.findall(r' constant\((\d+)\)', '\n'.join(bodies[condition]))
  return max((int(limit) for limit in limits), default=unknown)


def _describe(match: re.Match, line: str, turns: int) -> Collective:
  kind = match['kind']
  parts = _array_bytes(match['out'])
  # What starts a collective returns operands and results together.
  num_bytes = max(parts) if match['start'] else sum(parts)
  group = _group(line)
  if kind == 'reduce-scatter':
    num_bytes *= 1 if match['start'] else len(group)  # the operand's
  source = re.search(r'op_name="([^"]*)"', line)
  return Collective(kind, num_bytes, group, turns, source[1] if source else '')


def _array_bytes(text: str) -> list[int]:
  sizes = []
  for kind, shape in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', text):
    if kind in ITEM_BYTES:
      dims = [int(d) for d in shape.split(',') if d]
      sizes.append(ITEM_BYTES[kind] * math.prod(dims))
  return sizes or [0]


def _group(line: str) -> tuple[int, ...]:
  """Returns the devices of the first group, in each way that HLO writes it."""
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line)
  if mesh:
    sizes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
    places = np.arange(math.prod(int(size) for _, size in sizes))
    places = places.reshape([int(size) for _, size in sizes])
    names = re.findall(r"'(\w+)'", mesh[2])
    # The first of all axes that take no part.
    return tuple(
      places[tuple(slice(None) if name in names else 0 for name, _ in sizes)].flatten().tolist()
    )
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line)
  if iota:
    dims = [int(d) for d in iota[3].split(',')]
    order = [int(d) for d in iota[4].split(',')] if iota[4] else None
    places = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return tuple(places.flatten()[: int(iota[2])].tolist())
  listed = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', line)
  return tuple(int(d) for d in listed[1].split(',')) if listed else (0, 1)


def local_bytes(shapes: Any) -> int:
  """Returns the bytes of a tree's leaves on one device, by their shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(shapes)
  )


def replicated_fraction(shapes: Any) -> float:
  """Returns the share of a tree's bytes that every device holds whole."""
  whole = total = 0
  for leaf in jax.tree.leaves(shapes):
    num_bytes = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    total += num_bytes
    whole += num_bytes * leaf.sharding.is_fully_replicated
  return whole / total if total else 0.0
