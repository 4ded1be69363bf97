"""Damaged checkpoints: scoring reads the newest one as it was saved or not at all, and training the
newest one that is whole.

$CSRM_CHAOS_FILES is how many damages there are (12; slow: 200).
"""

import dataclasses
import itertools
import os
import random
import shutil
import time

import jax
import numpy as np
import optax
import pytest

from csrm_jax.core import checkpoint
from csrm_jax.models import transformer
from csrm_jax.reward import backbone, model as reward_model
from csrm_jax.train import step as training
from tests import small

NUM = os.environ.get('CSRM_CHAOS_FILES')
SECONDS = 5.0


def _cut(data, rng):
  return data[: rng.randrange(len(data) + 1)]


def _flip(data, rng):
  data = bytearray(data)
  if data:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return bytes(data)


DAMAGES = {
  'cut': _cut,
  'flip': _flip,
  'empty': lambda data, rng: b'',
  'append': lambda data, rng: data + b'x' * rng.randrange(1, 99),
  'zeros': lambda data, rng: bytes(len(data)),
  'deep': lambda data, rng: b'[' * 100_000,
  'gone': lambda data, rng: None,
}
# What no reader can do without, and the damages that leave nothing of it.
NEEDED = ('info/metadata', 'state/manifest.ocdbt')
RUINS = ('deep', 'empty', 'gone', 'zeros')


def _state(seed):
  return training.init_state(transformer.init_params(small.SPEC.model, seed), optax.adam(1e-3))


def _run(folder):
  """Writes a work directory with checkpoints of steps 3 and 6."""
  folder.mkdir()
  backbone.save_tokenizer(str(small.TOKENIZER_FILE), folder)
  with checkpoint.Checkpoints(folder / 'checkpoints') as saved:
    for step in (3, 6):
      saved.save(step, _state(step), {'next': step}, dataclasses.asdict(small.SPEC))
  return folder


def _bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _check(whole, folder, num):
  wanted = {step: _bits(_state(step)) for step in (3, 6)}
  params = _bits(_state(6).params)
  paths = sorted(p.relative_to(whole) for p in (whole / 'checkpoints/6').rglob('*') if p.is_file())
  needed = [path for path in paths if str(path).endswith(NEEDED)]
  assert len(needed) == len(NEEDED)
  rng = random.Random(0)
  # The other files are many and mostly leftovers of writing, which no reader opens.
  ruins = [(path, name) for path in needed for name in RUINS]
  others = ((rng.choice(paths), rng.choice(sorted(DAMAGES))) for _ in range(num))
  for i, (path, name) in enumerate(itertools.chain(ruins, others)):
    damage, ruined = DAMAGES[name], (path, name) in ruins
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    data = damage((folder / path).read_bytes(), rng)
    (folder / path).unlink() if data is None else (folder / path).write_bytes(data)
    what, began = f'{i}: {name} {path}', time.process_time()
    try:
      _, loaded, _ = reward_model.load_parts(folder)
    except (ValueError, OSError) as error:
      said = str(error)
      assert '\n' not in said and str(folder) in said, (what, said)
    else:
      assert _bits(loaded) == params and not ruined, what
    with checkpoint.Checkpoints(folder / 'checkpoints') as saved:
      step, state, carried = saved.restore_latest(_state(0))
    assert _bits(state) == wanted[step] and carried == {'next': step}, what
    assert time.process_time() - began < SECONDS, what


def test_a_damaged_checkpoint_is_read_as_it_was_or_not_at_all(tmp_path):
  _check(_run(tmp_path / 'whole'), tmp_path / 'run', int(NUM or 12))


@pytest.mark.slow
def test_many_damaged_checkpoints_are_read_as_they_were_or_not_at_all(tmp_path):
  _check(_run(tmp_path / 'whole'), tmp_path / 'run', int(NUM or 200))
