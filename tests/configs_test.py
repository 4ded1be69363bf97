"""What the files of configs/ resolve to."""

import pathlib
import re

import pytest

from csrm_jax import config as config_lib
from csrm_jax.data import mixture

ROOT = pathlib.Path(__file__).resolve().parent.parent
RM = config_lib.load_module(ROOT / 'configs' / 'rm.py')
COMMON = config_lib.load_module(ROOT / 'configs' / 'common.py')


def _documented_slices():
  """Returns the (model, mesh) of each rm.py command in the README and in launch/."""
  files = [ROOT / 'README.md', *(ROOT / 'launch').iterdir(), ROOT / 'configs' / 'rm.py']
  text = '\n'.join(path.read_text() for path in files if path.is_file())
  text = text.replace('\\\n', '')
  found = set()
  for arg in re.findall(r'configs/rm\.py:(\S*mesh=\S+)', text):
    values = dict(part.partition('=')[::2] for part in re.split(r'[,`"]', arg) if '=' in part)
    found.add((values.get('model', 'tiny'), values['mesh']))
  return sorted(found)


def test_the_readme_has_slices():
  assert {('llama3_8b', 'v5e-64'), ('llama3_8b', '2xv5e-256')} <= set(_documented_slices())


@pytest.mark.parametrize(
  ('model', 'mesh'),
  [
    *((model, mesh) for model, mesh in _documented_slices() if model != 'tiny'),
    *((model, mesh) for model in RM.BACKBONES for mesh in ('v5p-16', 'h100-16')),
  ],
)
def test_a_public_model_on_a_slice_has_the_recipe_of_the_paper(model, mesh):
  c = RM.get_config(f'model={model},mesh={mesh}')
  assert c.optim.lr == 5e-7 and (c.optim.b1, c.optim.b2) == (0.9, 0.95)
  assert (c.loss.gamma, c.loss.margin) == (0.1, 0.0)
  assert c.data.batch_size == 128 and c.data.row_length == c.data.max_length == 2048
  assert c.model.overrides.dtype == 'bfloat16' and c.model.overrides.lora_rank == 0
  # One epoch of what is not held out, at some five examples and pairs a row.
  assert 4.5 < 924_000 / (c.num_steps * c.data.batch_size) < 5.5
  assert c.checkpoint_every < c.num_steps and c.eval.max_examples > 0
  sources = {part.source for part in c.data.parts.values()}
  assert sources == {'beavertails', 'wildguardmix', 'aegis', 'pku_safe_rlhf_pairs'}
  assert sources <= set(mixture.READERS)
  assert c.mesh.fsdp == -1 or c.mesh.fsdp > 1 or c.mesh.data == -1


def test_what_is_asked_for_is_kept_on_a_slice():
  c = RM.get_config('model=llama3_8b,mesh=v5e-64,path=AUG')
  assert c.data.parts.augmented.to_dict() == {'source': 'augmented', 'path': 'AUG', 'weight': 458.0}
  c = RM.get_config('model=llama3_8b,mesh=v5e-64,data=jsonl,path=FILE')
  assert [part.path for part in c.data.parts.values()] == ['FILE'] and c.optim.lr == 5e-7
  assert RM.get_config('model=llama3_8b,mesh=v5e-64,lora=8').optim.lr == 5e-4
  assert RM.get_config('model=llama3_8b,mesh=v5e-64,num_steps=9').num_steps == 9
  assert 'taxonomies' in RM.get_config('mesh=v5e-64').data.parts


def test_parts_are_merged_in_order_and_set_known_keys_only():
  base = {'a': 1, 'b': {'c': 2, 'd': {'e': 3}}}
  merged = COMMON.merge(base, {'b.c': 5}, {'b.c': lambda c: c + 1, 'b.d': {'f': 4}})
  assert merged.to_dict() == {'a': 1, 'b': {'c': 6, 'd': {'f': 4}}}
  assert base == {'a': 1, 'b': {'c': 2, 'd': {'e': 3}}}
  with pytest.raises(KeyError, match=r'b\.x'):
    COMMON.merge(base, {'b.x': 1})
