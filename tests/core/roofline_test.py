import pytest

from csrm_jax.core import roofline, topology
from csrm_jax.core.program import Collective

V5P = topology.parse('v5p-128')  # 4x4x4, rings of 180 GB/s on three sides
GB = 10**9


def _item(kind, group, num_bytes=54 * GB, turns=1):
  group = group if isinstance(group, tuple) else tuple(range(group))
  return Collective(kind, num_bytes, group, turns, '')


def _time(kind, group, target=V5P, num_bytes=54 * GB):
  return roofline.collective_s(_item(kind, group, num_bytes), target)


def test_collectives_by_hand():
  share = 63 / 64
  assert _time('all-gather', 64) == pytest.approx(0.1 * share)
  assert _time('reduce-scatter', 64) == pytest.approx(0.1 * share)
  assert _time('all-reduce', 64) == pytest.approx(0.2 * share)
  # A group of 4 has the ring of one side alone.
  assert _time('all-gather', 4) == pytest.approx(0.3 * 3 / 4)
  assert _time('all-to-all', 4) == pytest.approx(0.3 * 3 / 4)
  assert _time('collective-permute', 2) == pytest.approx(0.3)
  assert _time('all-gather', 1) == 0


def test_between_slices_each_chip_sends_its_part():
  two = topology.parse('2xv5e-16')
  # All 32 chips reduce 16 GB: over the network 1 GB a chip, there and back,
  # and in each slice as if there were one.
  everyone = _item('all-reduce', 32, 16 * GB)
  assert roofline.network_s(everyone, two) == pytest.approx(GB / 6.25e9)
  alone = _time('all-reduce', 16, topology.parse('v5e-16'), 16 * GB)
  assert roofline.collective_s(everyone, two) == pytest.approx(alone)
  # Pairs across slices reduce what each chip already holds a part of.
  pair = _item('all-reduce', (3, 19), GB)
  assert roofline.network_s(pair, two) == pytest.approx(GB / 6.25e9)
  assert roofline.collective_s(pair, two) == 0
  # Two neighbours do not go over the network, as many slices as there are.
  assert roofline.network_s(_item('all-reduce', 2, GB), two) == 0
  times = roofline.estimate(1.0, 0.0, [pair], two, efficiency=0.5)
  assert times.collectives_s == {'all-reduce': 0, 'between slices': pytest.approx(GB / 6.25e9)}
  assert times.limit == 'between slices'


def test_one_chip_needs_no_links():
  assert _time('all-reduce', 2, topology.parse('v5e-1')) == 0


def test_a_step_lies_between_the_longest_part_and_the_sum():
  found = [_item('all-gather', 4, turns=10)]
  flops = 64 * 459e12
  times = roofline.estimate(flops, 0.0, found, V5P, efficiency=0.5)
  assert times.compute_s == pytest.approx(2.0)
  assert times.collectives_s == {'all-gather': pytest.approx(2.25)}
  assert times.overlapped_s == pytest.approx(2.25)
  assert times.serial_s == pytest.approx(4.25)
  assert times.limit == 'all-gather'
  times = roofline.estimate(flops, 3 * 2.765e12, found, V5P, efficiency=0.5)
  assert (times.limit, times.memory_s) == ('memory', pytest.approx(3.0))
  assert times.serial_s == pytest.approx(5.25)
