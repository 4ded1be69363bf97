import math

import pytest

from csrm_jax.core import topology


def test_names_count_what_the_cloud_counts():
  # v5p and v4 count cores, two of them a chip; v5e and v6e chips.
  assert topology.parse('v5p-16').num_chips == 8
  assert topology.parse('v5p-128').shape == (4, 4, 4)
  assert topology.parse('v5e-64').shape == (8, 8)
  assert topology.parse('v6e-256').num_chips == 256
  two = topology.parse('2xv5e-256')
  assert (two.num_chips, two.num_slices, two.shape) == (512, 2, (16, 16))
  assert topology.layout('2xv5e-256') == {'data': 2, 'fsdp': -1, 'tensor': 1, 'num_slices': 2}
  assert topology.num_devices('2xv5e-256') == 512


def test_nodes_of_gpus_have_a_layout_but_are_not_compiled_for():
  one = {'data': 1, 'fsdp': -1, 'tensor': 1, 'num_slices': 1}
  assert topology.layout('h100-4') == topology.layout('h200-8') == one
  assert topology.layout('a100-32') == one | {'data': 4, 'num_slices': 4}
  assert topology.num_devices('a100-32') == 32
  with pytest.raises(ValueError, match="'h100-8' is one of GPUs"):
    topology.parse('h100-8')


def test_shapes_hold_their_chips():
  for name in topology.names():
    target = topology.parse(name)
    per_chip = target.chip.cores_named
    assert int(name.partition('-')[2]) == per_chip * math.prod(target.shape)


@pytest.mark.parametrize('name', [
  'v5e-63', 'v5p-8192', 'v5e', 'h100-12', 'gtx-8', '',
  '0xv5e-64', '1xv5e-64', 'v5e-64 ',
])  # fmt: skip
def test_unknown_slices_are_one_clear_line(name):
  with pytest.raises(ValueError, match='does not exist; ') as info:
    topology.parse(name)
  assert '\n' not in str(info.value)
  assert 'v5e-' in str(info.value)


def test_a_side_that_is_no_ring_carries_half():
  # 16 chips close a ring on v5e, 8 do not; on v5p multiples of 4 do.
  assert topology.parse('v5e-256').ring_bytes_per_s == (90e9, 90e9)
  assert topology.parse('v5e-64').ring_bytes_per_s == (45e9, 45e9)
  assert topology.parse('v5p-16').ring_bytes_per_s == (90e9, 90e9, 90e9)
  assert topology.parse('v5p-32').ring_bytes_per_s == (90e9, 90e9, 180e9)
  assert topology.parse('v5e-1').ring_bytes_per_s == ()


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r'libtpu.*\[tpu\]'):
    topology.devices(topology.parse('v5e-16'))
