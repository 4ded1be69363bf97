"""What loading costs the host beside the parameters themselves.

On CPU parameters lie in the host's memory too; what is measured is the peak of
resident memory during a load, less what is resident before and less the
parameters.
"""

import dataclasses
import json
import os

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from csrm_jax.models import config, hf
from tests import small

# 136 MB in shards of at most 32 MB: small beside the whole, and large beside
# what threads and allocators add at random (up to about 20 MB were seen).
CFG = config.ModelConfig(
  vocab_size=512,
  num_layers=32,
  embed_dim=256,
  num_heads=4,
  num_kv_heads=4,
  head_dim=64,
  mlp_dim=1024,
)
SHARD_BYTES = 32 * 2**20

_PROGRAM = """
import ctypes, gc, json, pathlib, sys
import jax
import numpy as np
from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import hf

def status(key):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))

def load(shardings):
  return jax.block_until_ready(hf.load_params(folder, cfg, shardings))

def extra(shardings):
  load(shardings)  # compiles
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets the peak
  before = status('VmRSS')
  params = load(shardings)
  return status('VmHWM') - before - sum(x.nbytes for x in jax.tree.leaves(params)), params

folder = sys.argv[1]
cfg = hf.load_config(folder)
one, plain = extra(None)
plain = jax.device_get(plain)
mesh = mesh_lib.make_mesh(data=1, fsdp=2, tensor=2)
shardings = mesh_lib.shardings(plain, mesh)
four, params = extra(shardings)
jax.tree.map(np.testing.assert_array_equal, params, plain)
placed = jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, shardings)
assert all(jax.tree.leaves(placed)), placed
kernel = params['layers']['mlp']['up']['kernel']
assert kernel.addressable_shards[0].data.shape == (32, 128, 512)
print(json.dumps([one, four]))
"""


@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='needs Linux')
def test_host_holds_less_than_a_shard_beside_the_parameters(tmp_path):
  slots = hf.slots(CFG)
  shapes = {slot.entry.ours: slot.whole for slot in slots.values()}
  rng = np.random.default_rng(0)
  hf.save(
    tmp_path,
    CFG,
    unflatten_dict(
      {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, sep='/'
    ),
    max_shard_bytes=SHARD_BYTES,
  )
  sizes = [path.stat().st_size for path in tmp_path.glob('*.safetensors')]
  assert len(sizes) > 3 and max(sizes) <= 1.01 * SHARD_BYTES
  printed = small.run_on_devices(4, _PROGRAM, tmp_path)
  for place, extra in zip(('one device', '2x2 mesh'), json.loads(printed), strict=True):
    print(
      f'{place}: {extra / 2**20:.1f} MiB beside {sum(sizes) / 2**20:.0f} '
      f'MiB of parameters, largest shard {max(sizes) / 2**20:.0f} MiB'
    )
    assert extra < 1.2 * max(sizes)


def test_stacks_of_any_layout_are_filled(tmp_path):
  """bfloat16 in the file, float32 in memory."""
  cfg = dataclasses.replace(CFG, num_layers=2, embed_dim=32, mlp_dim=48)
  shapes = {slot.entry.ours: slot.whole for slot in hf.slots(cfg).values()}
  params = {name: np.full(shape, 1.5, np.float32) for name, shape in shapes.items()}
  half = {name: x.astype('bfloat16') for name, x in params.items()}
  hf.save(tmp_path, cfg, unflatten_dict(half, sep='/'))
  assert hf.load_config(tmp_path).param_dtype == 'bfloat16'
  got = flatten_dict(hf.load_params(tmp_path, cfg), sep='/')
  assert {str(x.dtype) for x in got.values()} == {'float32'}
  assert all((x == 1.5).all() for x in got.values())
