"""How long a step takes at least, from what it computes and what it moves.

Assumptions, which the compile report repeats: products reach a given share of
the chip's peak; a collective over a whole slice uses the rings along all its
sides at once, a smaller group those along one side; between slices each chip
sends its own part; latency is not counted. Links and products may work at the
same time: the step lies between the longer of the two and their sum.

Source: "How to Scale Your Model" (jax-ml.github.io/scaling-book), part 3, the
time of collectives.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from csrm_jax.core.program import Collective
from csrm_jax.core.topology import Slice


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The times of a step, in seconds.

  Attributes:
    compute_s: of the products.
    collectives_s: of each kind of collective.
    overlapped_s: where links and products work at the same time.
    serial_s: where they wait for each other.
    limit: what takes longest: 'products' or a kind of collective.
  """

  compute_s: float
  collectives_s: dict[str, float]
  overlapped_s: float
  serial_s: float
  limit: str


def estimate(
  flops: float,
  found: Sequence[Collective],
  target: Slice,
  efficiency: float,
) -> Roofline:
  """Returns the times of one step.

  Args:
    flops: of all devices together.
    found: the collectives of the program.
    target: what it runs on.
    efficiency: share of the peak that products reach, in (0, 1].
  """
  compute_s = flops / (target.num_chips * target.chip.flops * efficiency)
  times: dict[str, float] = collections.defaultdict(float)
  for item in found:
    times[item.kind] += item.turns * collective_s(item, target)
  parts = {'products': compute_s, **times}
  links_s = sum(times.values())
  return Roofline(
    compute_s=compute_s,
    collectives_s=dict(times),
    overlapped_s=max(compute_s, links_s),
    serial_s=compute_s + links_s,
    limit=max(parts, key=parts.__getitem__),
  )


def collective_s(item: Collective, target: Slice) -> float:
  """Returns the seconds of one turn of a collective."""
  in_slice = target.num_chips // target.num_slices
  if in_slice == 1 and target.num_slices == 1:
    return 0.0
  share = (item.group - 1) / item.group
  if target.num_slices > 1 and item.group in (
    target.num_slices, target.num_chips
  ):  # fmt: skip
    rate, longest = target.chip.dcn_bytes_per_s, target.num_slices
    share /= 1 if item.group == target.num_slices else in_slice
  elif item.group >= in_slice:
    rate, longest = sum(target.ring_bytes_per_s), max(target.shape)
  else:
    rate, longest = min(target.ring_bytes_per_s), item.group
  if item.kind == 'all-reduce':
    return 2 * share * item.num_bytes / rate
  if item.kind == 'all-to-all':
    # Half of a ring's data crosses its middle, over two places, both ways.
    return share * item.num_bytes * longest / 4 / min(target.ring_bytes_per_s)
  if item.kind == 'collective-permute':
    return item.num_bytes / max(target.ring_bytes_per_s)
  return share * item.num_bytes / rate
