import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from csrm_jax.core import mesh as mesh_lib, tree
from csrm_jax.models import config as model_config, transformer
from tests import small

ONE = jax.devices()[:1]


class _FakeMesh:
  """param_spec looks at axis sizes alone; no devices are needed for that."""

  def __init__(self, **sizes):
    self.shape = sizes


POD = _FakeMesh(data=2, fsdp=4, tensor=2)


def test_one_device_is_a_mesh():
  mesh = mesh_lib.make_mesh(devices=ONE)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 1, 'tensor': 1}


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'data': 3}, 'does not fit 1 devices'),
    ({'data': -1, 'tensor': 2}, 'does not fit 1 devices'),
    ({'data': -1, 'fsdp': -1}, 'at most one may be -1'),
    ({'data': 0}, 'sizes are at least 1'),
    ({'num_slices': 2}, 'does not divide over num_slices=2'),
    ({'num_slices': 0}, 'num_slices=0'),
  ],
)
def test_make_mesh_refuses(sizes, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.make_mesh(**sizes, devices=ONE)


@pytest.mark.parametrize(
  ('name', 'shape', 'spec'),
  [
    ('embed/embedding', (256, 64), P('tensor', 'fsdp')),
    ('layers/attention/query/kernel', (2, 64, 8, 16), P(None, 'fsdp', 'tensor', None)),
    # One kv head cannot be cut in two: that axis alone is replicated.
    ('layers/attention/key/kernel', (2, 64, 1, 16), P(None, 'fsdp', None, None)),
    ('layers/attention/out/kernel', (2, 8, 16, 64), P(None, 'tensor', None, 'fsdp')),
    ('layers/mlp/gate', (2, 64, 128), P(None, 'fsdp', 'tensor')),
    ('layers/mlp/up/kernel', (2, 64, 128), P(None, 'fsdp', 'tensor')),
    ('layers/mlp/down', (2, 128, 64), P(None, 'tensor', 'fsdp')),
    ('layers/attention_norm/scale', (2, 64), P()),
    ('final_norm/scale', (64,), P()),
    ('layers/attention/query_norm/scale', (2, 16), P()),
    ('layers/attention/key/lora_a', (2, 64, 8), P(None, 'fsdp', None)),
    ('layers/attention/key/lora_b', (2, 8, 2, 16), P(None, None, 'tensor')),
    ('layers/attention/out/lora_a', (2, 8, 16, 4), P(None, 'tensor')),
    ('layers/attention/out/lora_b', (2, 4, 64), P(None, None, 'fsdp')),
    ('layers/mlp/up/lora_b', (2, 4, 128), P(None, None, 'tensor')),
    ('layers/mlp/down/lora_a', (2, 128, 4), P(None, 'tensor')),
    ('lm_head/kernel', (64, 256), P(None, ('fsdp', 'tensor'))),
    # 4 divides, 8 does not: the first of two axes is kept.
    ('lm_head/kernel', (64, 252), P(None, 'fsdp')),
    ('lm_head/kernel', (63, 255), P(None, None)),
    # The optimizer's copies fall under the same rules.
    ('opt_state/0/mu/layers/mlp/up', (2, 8, 8), P(None, 'fsdp', 'tensor')),
    ('opt_state/0/count', (), P()),
  ],
)
def test_param_spec(name, shape, spec):
  assert mesh_lib.param_spec(name, shape, POD) == spec


def test_rules_cover_everything_or_say_what_is_missing():
  with pytest.raises(ValueError, match=r"no sharding rule for 'lora/a'"):
    mesh_lib.param_spec('lora/a', (3, 3), POD)
  with pytest.raises(ValueError, match='has 3 axes'):
    mesh_lib.param_spec('mlp/up', (8, 8), POD)
  # A name that merely ends in the same letters is another parameter.
  with pytest.raises(ValueError, match='no sharding rule'):
    mesh_lib.param_spec('my_lm_head/kernel', (8, 8), POD)


@pytest.mark.parametrize(
  'fields',
  [
    {'tie_embeddings': True},
    {'tie_embeddings': False, 'qk_norm': True, 'post_norms': True},
    {'lora_rank': 8},
  ],
)
def test_rules_cover_the_decoder(fields):
  cfg = model_config.preset('tiny', 512, **fields)
  shapes = transformer.shapes(cfg)
  for name, leaf in tree.named_leaves(shapes).items():
    spec = mesh_lib.param_spec(name, leaf.shape, POD)
    # Whatever is large lies on both axes that parameters are cut over.
    axes = {'fsdp', 'tensor'} & set(jax.tree.leaves(tuple(spec)))
    assert name.endswith('scale') or len(axes) == 1 + ('lora' not in name), name


def test_shardings_keep_the_tree():
  mesh = mesh_lib.make_mesh(devices=ONE)
  shapes = {
    'embed': {'embedding': jax.ShapeDtypeStruct((8, 4), jnp.float32)},
    'final_norm': {'scale': jax.ShapeDtypeStruct((4,), jnp.float32)},
  }
  result = mesh_lib.shardings(shapes, mesh)
  assert jax.tree.structure(result) == jax.tree.structure(shapes)
  abstract = mesh_lib.abstract(shapes, mesh)
  leaf = abstract['embed']['embedding']
  assert leaf.sharding == result['embed']['embedding']
  assert leaf.shape == (8, 4)


class _Device:
  """One of the devices of two slices."""

  platform = device_kind = 'some'
  process_index = 0

  def __init__(self, id, slice_index):
    self.id, self.slice_index = id, slice_index

  def __repr__(self):
    return str(self.id)


def test_only_data_goes_across_slices():
  devices = [_Device(i, i % 2) for i in range(8)]
  mesh = mesh_lib.make_mesh(4, 2, num_slices=2, devices=devices)
  slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
  assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(ValueError, match='lie in 2 slices'):
    mesh_lib.make_mesh(4, 2, devices=devices)
  with pytest.raises(ValueError, match='data=1 does not divide over num_sl'):
    mesh_lib.make_mesh(1, 8, num_slices=2, devices=devices)


def test_arrays_say_what_mesh_they_are_on():
  mesh = mesh_lib.make_mesh(devices=ONE)
  plain = jnp.ones(2)
  x = jax.device_put(plain, mesh_lib.replicated(mesh))
  with mesh_lib.of({'x': x}):
    assert jax.sharding.get_mesh() == mesh
    with mesh_lib.of(plain):
      assert jax.sharding.get_mesh().empty
  assert mesh_lib.num_row_parts(x) == 1


def test_eight_devices():
  script = textwrap.dedent("""
    import jax, numpy as np
    from csrm_jax.core import mesh as m
    mesh = m.make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}, mesh
    two = m.make_mesh(4, 2, num_slices=2)  # as two nodes of four
    assert [d.id for d in two.devices[:2].flat] == [0, 1, 2, 3]
    assert m.num_row_parts(jax.device_put(1.0, m.replicated(two))) == 8
    x = np.arange(24, dtype=np.int32).reshape(8, 3)
    y = m.to_global({'x': x}, mesh)['x']
    assert y.sharding == m.NamedSharding(mesh, m.P(m.ROWS))
    assert {s.data.shape for s in y.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(np.asarray(y), x)
    z = jax.device_put(1.0, m.replicated(mesh))
    assert z.sharding.is_fully_replicated
    try:
      m.to_global({'x': x[:3]}, mesh)
    except ValueError as error:
      assert 'do not divide over' in str(error), error
    else:
      raise AssertionError
  """)
  small.run_on_devices(8, script)
