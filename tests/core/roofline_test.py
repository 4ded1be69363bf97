import pytest

from csrm_jax.core import roofline, topology
from csrm_jax.core.program import Collective

V5P = topology.parse('v5p-128')  # 4x4x4, rings of 180 GB/s on three sides
GB = 10**9


def _time(kind, group, target=V5P, num_bytes=54 * GB):
  return roofline.collective_s(
    Collective(kind, num_bytes, group, 1, ''), target
  )


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
  # All 32 chips reduce 16 GB: over the network 1 GB a chip, there and back.
  time_s = _time('all-reduce', 32, two, 16 * GB)
  assert time_s == pytest.approx(2 * GB * (31 / 32) / 6.25e9)
  # Pairs across slices reduce what each chip already holds a part of.
  assert _time('all-reduce', 2, two, GB) == pytest.approx(GB / 6.25e9)


def test_one_chip_needs_no_links():
  assert _time('all-reduce', 2, topology.parse('v5e-1')) == 0


def test_a_step_lies_between_the_longest_part_and_the_sum():
  found = [Collective('all-gather', 54 * GB, 4, 10, '')]
  flops = 64 * 459e12
  times = roofline.estimate(flops, found, V5P, efficiency=0.5)
  assert times.compute_s == pytest.approx(2.0)
  assert times.collectives_s == {'all-gather': pytest.approx(2.25)}
  assert times.overlapped_s == pytest.approx(2.25)
  assert times.serial_s == pytest.approx(4.25)
  assert times.limit == 'all-gather'
