"""How long a step takes at least, from what it computes and what it moves.

Assumptions, which the compile report repeats: products reach a given share of
the chip's peak; what is read of memory is at its full rate; a collective over a
whole slice uses the rings along all its sides at once, a smaller group those
along one side; what goes between slices is shared by the chips of a slice, each
at its share of the data-centre network, after and before the rings; latency is
not counted. Links, memory and products may work at the same time: the step lies
between the longest of them and their sum.

Source: "How to Scale Your Model" (jax-ml.github.io/scaling-book), part 3, the
time of collectives.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from csrm_jax.core.program import Collective
from csrm_jax.core.topology import Slice

# Beside the kinds of collectives, those that cross from slice to slice.
BETWEEN_SLICES = 'between slices'


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The times of a step, in seconds.

  Attributes:
    compute_s: of the products.
    memory_s: of reading what the products need again and again.
    collectives_s: of each kind of collective, and of the network.
    overlapped_s: where links, memory and products work at the same time.
    serial_s: where links wait for the others.
    limit: what takes longest: 'products', 'memory' or a kind of collective.
  """

  compute_s: float
  memory_s: float
  collectives_s: dict[str, float]
  overlapped_s: float
  serial_s: float
  limit: str


def estimate(
  flops: float, read_bytes: float, found: Sequence[Collective], target: Slice, efficiency: float
) -> Roofline:
  """Returns the times of one step.

  Args:
    flops: of all devices together.
    read_bytes: that each device reads of its memory.
    found: the collectives of the program.
    target: what it runs on.
    efficiency: share of the peak that products reach, in (0, 1].
  """
  compute_s = flops / (target.num_chips * target.chip.flops * efficiency)
  memory_s = read_bytes / target.chip.hbm_bytes_per_s
  times: dict[str, float] = collections.defaultdict(float)
  for item in found:
    times[item.kind] += item.turns * collective_s(item, target)
    times[BETWEEN_SLICES] += item.turns * network_s(item, target)
  if not times[BETWEEN_SLICES]:
    del times[BETWEEN_SLICES]
  parts = {'products': compute_s, 'memory': memory_s, **times}
  links_s = sum(times.values())
  busy_s = max(compute_s, memory_s)
  return Roofline(
    compute_s=compute_s,
    memory_s=memory_s,
    collectives_s=dict(times),
    overlapped_s=max(busy_s, links_s),
    serial_s=busy_s + links_s,
    limit=max(parts, key=parts.__getitem__),
  )


def _spread(item: Collective, target: Slice) -> tuple[int, int]:
  """Returns (slices, members within each of them) of a collective's group."""
  in_slice = target.num_chips // target.num_slices
  slices = len({place // in_slice for place in item.group})
  return slices, len(item.group) // slices


def network_s(item: Collective, target: Slice) -> float:
  """Returns the seconds of one turn on the network between slices."""
  slices, members = _spread(item, target)
  num_bytes = (slices - 1) / slices * item.num_bytes / members
  times = 2 if item.kind == 'all-reduce' else 1
  return times * num_bytes / target.chip.dcn_bytes_per_s


def collective_s(item: Collective, target: Slice) -> float:
  """Returns the seconds of one turn on the links within slices."""
  in_slice = target.num_chips // target.num_slices
  members = _spread(item, target)[1]
  if in_slice == 1 or members == 1:
    return 0.0
  share = (members - 1) / members
  if members >= in_slice:
    rate, longest = sum(target.ring_bytes_per_s), max(target.shape)
  else:
    rate, longest = min(target.ring_bytes_per_s), members
  if item.kind == 'all-reduce':
    return 2 * share * item.num_bytes / rate
  if item.kind == 'all-to-all':
    # Half of a ring's data crosses its middle, over two places, both ways.
    return share * item.num_bytes * longest / 4 / min(target.ring_bytes_per_s)
  if item.kind == 'collective-permute':
    return item.num_bytes / max(target.ring_bytes_per_s)
  return share * item.num_bytes / rate
