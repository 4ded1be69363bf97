"""What the files of configs/ resolve to."""

import pathlib
import re

import pytest

from csrm_jax import config as config_lib
from csrm_jax.core import topology
from csrm_jax.data import pipeline
from csrm_jax.rl import algorithms

ROOT = pathlib.Path(__file__).resolve().parent.parent
RM = config_lib.load_module(ROOT / 'configs' / 'rm.py')
RL = config_lib.load_module(ROOT / 'configs' / 'rl.py')
COMMON = config_lib.load_module(ROOT / 'configs' / 'common.py')


def _documented_slices():
  """Returns the (model, mesh) of each rm.py command in docs/ and in launch/."""
  pages = [*(ROOT / 'docs').rglob('*.md'), *(ROOT / 'launch').iterdir()]
  files = [*pages, ROOT / 'configs' / 'rm.py']
  text = '\n'.join(path.read_text() for path in files if path.is_file())
  text = text.replace('\\\n', '')
  found = set()
  for arg in re.findall(r'configs/rm\.py:(\S*mesh=\S+)', text):
    values = dict(part.partition('=')[::2] for part in re.split(r'[,`"]', arg) if '=' in part)
    found.add((values.get('model', 'tiny'), values['mesh']))
  return sorted(found)


def test_the_pages_have_slices():
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
  assert sources <= set(pipeline.SOURCES)
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


def test_the_papers_rows_are_ablations():
  for row, name in RM.ROWS.items():
    assert RM.get_config(f'ablation={row}') == RM.get_config(f'ablation={name}')

  def has(row):
    data = RM.get_config(f'ablation={row}').data
    return data.plus_prob > 0, 'strictness' not in data.muted_pairs

  assert {row: has(row) for row in ('full', *RM.ROWS)} == {
    'full': (True, True),  # has CCA, has SA
    'minus_cca': (False, True),
    'minus_sa': (False, False),
    'sa_alone': (False, True),
    'cca_alone': (True, False),
  }
  # A sweep runs each once.
  assert [run['name'] for run in RM.sweep()] == list(RM.ABLATIONS)


def test_runs_without_sa_read_what_the_full_one_reads():
  for row, base in (('cca_alone', 'full'), ('minus_sa', 'no_cca')):
    one, other = (config_lib.flatten(RM.get_config(f'ablation={name}')) for name in (row, base))
    differing = {key for key in one if one[key] != other[key]}
    assert differing == {'data.muted_pairs'} and one['data.muted_pairs'] == ('strictness',)


_SLICES = ('v5e-64', 'v5e-256', '2xv5e-256', 'v5p-16', 'h100-8', 'h100-16')


def test_the_documented_alignment_of_a_public_model_is_tested_here():
  text = (ROOT / 'configs' / 'rl.py').read_text().replace('\\\n', '')
  found = re.findall(r'configs/rl\.py:\S*policy=(\w+),mesh=([\w-]+)', text)
  assert found and all(policy in RL.POLICIES and mesh in _SLICES for policy, mesh in found)


@pytest.mark.parametrize('mesh', _SLICES)
@pytest.mark.parametrize('policy', RL.POLICIES)
def test_a_public_policy_on_a_slice_has_the_recipe_of_the_paper(policy, mesh):
  num = topology.num_devices(mesh)
  for arg in ('', ',algorithm=ppo', ',reward=alphaalign'):
    c = RL.get_config(f'policy={policy},mesh={mesh}{arg}')
    samples = c.rollout.num_prompts * c.rollout.num_generations
    assert c.num_steps * c.rollout.num_prompts == 5 * 1024 and c.data.num_prompts == 1024
    assert c.rollout.num_generations == (16 if 'alphaalign' in arg else 8)
    assert samples // c.loss.num_mini_batches == max(128, num)
    # What goes through the model at once lies on all devices.
    assert samples // (c.loss.num_mini_batches * c.optim.num_microbatches) % num == 0
    assert c.eval.num_prompts >= 128 and c.checkpoint_every < c.num_steps
    assert c.optim.warmup_steps > 1 and c.eval.every < c.num_steps
    assert c.optim.lr == 1e-6 and c.policy.overrides.dtype == 'bfloat16'
    assert c.pairs.num_best is None
  c = RL.get_config(f'policy={policy},mesh={mesh},algorithm=distillation')
  pairs = c.pairs
  assert (pairs.num_prompts, pairs.num_samples, pairs.num_best) == (1024, 100, 5)
  assert pairs.batch_size == max(128, num)
  assert c.num_steps * pairs.batch_size == 5 * 5 * 1024
  assert pairs.batch_size % (num * c.optim.num_microbatches) == 0
  assert c.checkpoint_every <= c.num_steps and c.eval.num_prompts == 128


def test_a_laptop_and_a_smoke_run_of_a_public_policy_are_short():
  for arg in ('', ',mesh=v5e-64,smoke', ',smoke'):
    c = RL.get_config(f'policy=llama3_8b{arg}')
    assert c.num_steps == 4 and c.eval.num_prompts == 16 and c.optim.warmup_steps == 1
  assert RL.get_config('policy=llama3_8b,mesh=v5e-64,num_steps=9').num_steps == 9


def test_every_run_of_alignment_has_all_keys():
  keys = set(config_lib.flatten(RL.get_config()))
  for algorithm in algorithms.ALGORITHMS:
    for reward in RL.REWARDS:
      c = RL.get_config(f'algorithm={algorithm},reward={reward}')
      assert set(config_lib.flatten(c)) == keys
      algorithms.check_idle(c)
      if algorithms.get(algorithm).online:
        algorithms.make_objective(c)
  # A run does not change the next one's.
  RL.get_config().loss.kl_target = 0.1
  assert RL.get_config().loss.kl_target is None
