"""The costs of a compiled program, and the least time it takes on a slice of TPUs.

Products are counted in the traced program, and collectives in the compiled one. Each counts as
often as the loops around it run.
"""

from __future__ import annotations

import collections as collections_lib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

from csrm_jax.core.topology import Slice

COLLECTIVES = (
  'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all',
  'collective-permute',
)  # fmt: skip
# The name, beside these kinds, of what crosses from slice to slice.
BETWEEN_SLICES = 'between slices'
ITEM_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
  'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8,
}  # fmt: skip


# --- Products --------------------------------------------------------------------------


def count_flops(fn: Any, *args: Any, turns: int = 0) -> float:
  """Returns the FLOPs of the products in fn(*args), over all devices.

  A multiplication and an addition count as two. Recomputed products count again; other
  operations do not count. Of the branches of a `cond` the most expensive one counts. `turns` is
  how often a while loop with products runs; 0 means that there is none.
  """
  # The compiler's own count takes the body of a loop once, so the traced program is counted.
  return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr, turns)


def _jaxpr_flops(jaxpr: Any, turns: int) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = [_jaxpr_flops(sub, turns) for sub in _inner_jaxprs(eqn.params)]
    match eqn.primitive.name:
      case 'dot_general':
        (contracted, _), _ = eqn.params['dimension_numbers']
        shape = eqn.invars[0].aval.shape
        length = math.prod(shape[axis] for axis in contracted)
        total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * length
      case 'scan':
        total += eqn.params['length'] * sum(inner)
      case 'cond':
        total += max(inner)
      case 'while' if sum(inner):
        if not turns:
          raise ValueError(
            'products in a while loop cannot be counted: use a scan, or say how many turns it has'
          )
        total += turns * sum(inner)
      case _:
        total += sum(inner)
  return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, jax_core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, jax_core.Jaxpr):
        yield item


# --- Collectives -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program."""

  kind: str  # one of COLLECTIVES
  # The size of the whole array that a group gathers, reduces or exchanges, as one of its devices
  # sees it.
  num_bytes: int
  group: tuple[int, ...]  # the devices of the first group, by their place in the mesh
  turns: int  # how often it runs in a step
  source: str  # the operation of the program that it belongs to


_COLLECTIVE = re.compile(rf'= (?P<out>.*?) (?P<kind>{"|".join(COLLECTIVES)})(?P<start>-start)?\(')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|called_computations|branch_computations)='
  r'\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)'
)


def collectives(text: str, turns: int = 1) -> list[Collective]:
  """Returns the collectives of a compiled program's text (HLO), scans included.

  `turns` is how often those loops run whose end is not in the text.
  """
  bodies, lines = {}, []
  # Computations begin at the start of a line; their instructions are indented.
  for line in text.splitlines():
    if line.startswith(('%', 'ENTRY')):
      lines = bodies.setdefault(line.split(' ')[0], [])
    elif line.startswith(' '):
      lines.append(line)
  found = {}
  for name, times in _turns(bodies, turns).items():
    for line in bodies.get(name, ()):
      if match := _COLLECTIVE.search(line):
        # The compiler may spread one collective over several fusions; they share its channel.
        number = re.search(r'channel_id=(\d+)', line)
        found[number[1] if number else line] = _describe(match, line, times)
  return list(found.values())


def _turns(bodies: dict[str, list[str]], unknown: int) -> dict[str, int]:
  """Returns how often each computation runs: the largest count of its calls."""
  turns: dict[str, int] = {}
  pending = [('ENTRY', 1)]
  # Counts of calls are not added up: a collective that was cut into several fusions is in each
  # of them.
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
  if known := re.search(r'known_trip_count[^\d]*(\d+)', line):
    return int(known[1])
  condition = re.search(r'condition=(%[\w.\-]+)', line)[1]
  limits = re.findall(r' constant\((\d+)\)', '\n'.join(bodies[condition]))
  return max((int(limit) for limit in limits), default=unknown)


def _describe(match: re.Match, line: str, turns: int) -> Collective:
  kind, group = match['kind'], _group(line)
  sizes = [
    ITEM_BYTES[item] * math.prod(int(d) for d in shape.split(',') if d)
    for item, shape in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', match['out'])
    if item in ITEM_BYTES
  ] or [0]
  # The start of an asynchronous collective returns operands and results together.
  num_bytes = max(sizes) if match['start'] else sum(sizes)
  if kind == 'reduce-scatter' and not match['start']:
    num_bytes *= len(group)  # the size of the operand
  source = re.search(r'op_name="([^"]*)"', line)
  return Collective(kind, num_bytes, group, turns, source[1] if source else '')


def _group(line: str) -> tuple[int, ...]:
  """Returns the devices of the first group, in any of the notations of HLO."""
  if mesh := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    places = np.arange(math.prod(sizes.values())).reshape([*sizes.values()])
    names = re.findall(r"'(\w+)'", mesh[2])
    # The first group: place 0 on the axes that take no part.
    return tuple(
      places[tuple(slice(None) if name in names else 0 for name in sizes)].flatten().tolist()
    )
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    dims = [int(d) for d in iota[3].split(',')]
    order = [int(d) for d in iota[4].split(',')] if iota[4] else None
    places = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return tuple(places.flatten()[: int(iota[2])].tolist())
  listed = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', line)
  return tuple(int(d) for d in listed[1].split(',')) if listed else (0, 1)


# --- Memory ----------------------------------------------------------------------------


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


# --- Time: the roofline ----------------------------------------------------------------
# Assumptions, which the compile report repeats:
# - Products reach a given share of the chip's peak; memory is read at its full rate.
# - A collective over a whole slice uses the rings along all its sides at once; a smaller group uses
#   those along one side.
# - The chips of a slice share what goes between slices, each at its share of the data-centre
#   network, before and after the rings.
# - Latency is not counted.
# Links, memory and products may work at the same time: the step lies between the longest of them
# and their sum.


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The times of a step, in seconds."""

  compute_s: float
  memory_s: float  # to read what the products need
  collectives_s: dict[str, float]  # by kind; the network between slices is one of them
  overlapped_s: float  # the step, if links, memory and products work at the same time
  serial_s: float  # the step, if links wait for memory and products
  limit: str  # what takes longest: 'products', 'memory' or a kind of collective


def estimate(
  flops: float, read_bytes: float, found: Sequence[Collective], target: Slice, efficiency: float
) -> Roofline:
  """Returns the times of one step.

  `flops` counts all devices together, `read_bytes` what each device reads from its memory.
  `efficiency` is the share of the peak that products reach, in (0, 1].

  Source: "How to Scale Your Model" (jax-ml.github.io/scaling-book), part 3, the time of
    collectives.
  """
  compute_s = flops / (target.num_chips * target.chip.flops * efficiency)
  memory_s = read_bytes / target.chip.hbm_bytes_per_s
  times: dict[str, float] = collections_lib.defaultdict(float)
  for item in found:
    times[item.kind] += item.turns * collective_s(item, target)
    times[BETWEEN_SLICES] += item.turns * network_s(item, target)
  if not times[BETWEEN_SLICES]:
    del times[BETWEEN_SLICES]
  parts = {'products': compute_s, 'memory': memory_s, **times}
  links_s, busy_s = sum(times.values()), max(compute_s, memory_s)
  return Roofline(
    compute_s=compute_s,
    memory_s=memory_s,
    collectives_s=dict(times),
    overlapped_s=max(busy_s, links_s),
    serial_s=busy_s + links_s,
    limit=max(parts, key=parts.__getitem__),
  )


def _spread(item: Collective, target: Slice) -> tuple[int, int]:
  """Returns (slices, members in each of them) of a collective's group."""
  in_slice = target.num_chips // target.num_slices
  slices = len({place // in_slice for place in item.group})
  return slices, len(item.group) // slices


def network_s(item: Collective, target: Slice) -> float:
  """Returns the seconds of one turn on the network between slices."""
  slices, members = _spread(item, target)
  num_bytes = (slices - 1) / slices * item.num_bytes / members
  # An all-reduce is a reduce-scatter and an all-gather.
  times = 2 if item.kind == 'all-reduce' else 1
  return times * num_bytes / target.chip.dcn_bytes_per_s


def collective_s(item: Collective, target: Slice) -> float:
  """Returns the seconds of one turn on the links within slices."""
  in_slice = target.num_chips // target.num_slices
  members = _spread(item, target)[1]
  if in_slice == 1 or members == 1:
    return 0.0
  share = (members - 1) / members
  # A group that is the whole slice uses the rings along all sides; a smaller one is taken to use
  # the slowest ring.
  if members >= in_slice:
    rate, longest = sum(target.ring_bytes_per_s), max(target.shape)
  else:
    rate, longest = min(target.ring_bytes_per_s), members
  match item.kind:
    case 'all-reduce':
      return 2 * share * item.num_bytes / rate
    case 'all-to-all':
      # Half of a ring's data crosses its middle, at two places, in both directions.
      return share * item.num_bytes * longest / 4 / min(target.ring_bytes_per_s)
    case 'collective-permute':
      return item.num_bytes / max(target.ring_bytes_per_s)
  return share * item.num_bytes / rate
