"""Alignment through its runner, in small runs of the shipped config."""

import collections
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from csrm_jax import config as config_lib, main
from csrm_jax.models import hf
from csrm_jax.rl import algorithms, rewards
from csrm_jax.runners import align

ROOT = pathlib.Path(__file__).parents[2]
RL = config_lib.load_module(ROOT / 'configs' / 'rl.py')
EVAL = config_lib.load_module(ROOT / 'configs' / 'eval.py')


def _config(arg, **overrides):
  config = RL.get_config(f'smoke,{arg}')
  config.policy.overrides.unroll = 1
  config_lib.set_overrides(
    config, {key.replace('__', '.'): value for key, value in overrides.items()}
  )
  return config


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def aligned(tmp_path_factory):
  """Returns the work directory of a run with the oracle as its reward."""
  workdir = tmp_path_factory.mktemp('aligned') / 'rl'
  config = _config(
    'reward=oracle', num_steps=2, eval__best_of=2, eval__every=1, eval__num_prompts=8
  )
  main.run(config, workdir)
  return workdir


def test_the_report_compares_with_the_unaligned_policy(aligned, capsys):
  summary = json.loads((aligned / 'report' / 'summary.json').read_text())
  for policy in ('unaligned', 'best_of_2', 'aligned'):
    for name in ('true_cosa', 'compliance', 'safety', 'helpfulness'):
      assert np.isfinite(summary[f'{policy}/{name}'])
  saved = config_lib.from_json((aligned / 'config.json').read_text())
  assert summary['num_updates'] == 2 * saved.loss.num_mini_batches
  # Better of two by the reward, which here is the truth.
  assert summary['best_of_2/cosa'] >= summary['unaligned/cosa'] - 0.5
  text = (aligned / 'report' / 'report.md').read_text()
  assert 'film club' in text
  main.run(
    _config('reward=oracle', num_steps=2, eval__best_of=2, eval__every=1, eval__num_prompts=8),
    aligned,
  )
  assert 'is finished' in capsys.readouterr().out


def test_a_policy_that_lost_its_language_is_marked():
  lost = align.diverged({'kl/ref': {1: 0.04, 2: 1.4e5, 3: 0.2}})
  assert lost.startswith('Diverged: at step 2 kl/ref was 1.4e+05 nats a token')
  assert align.diverged({'kl/ref': {1: 0.04, 2: 3.1}}) == align.diverged({}) == ''


def test_it_looks_at_held_out_prompts_from_the_start(aligned):
  looks = _lines(aligned / 'looks.jsonl')
  assert [look['step'] for look in looks] == [0, 1, 2]
  assert 'true_cosa' in looks[0]['metrics']
  table = _lines(aligned / 'samples.jsonl')
  assert {row['step'] for row in table} == {2}
  assert {'rules', 'prompt', 'completion', 'reward', 'parts'} <= set(table[0])
  assert set(table[0]['parts']) == {'safety', 'helpfulness'}
  assert all(0 <= row['violations/per_1000'] <= 1000 for row in _lines(aligned / 'metrics.jsonl'))


@pytest.mark.filterwarnings('error:constrained_layout')  # long names
def test_runs_are_compared_by_reward_rules_and_seed(aligned, tmp_path):
  for seed in (0, 1):
    folder = tmp_path / 'runs' / f'bank-seed{seed}'
    shutil.copytree(aligned / 'report', folder / 'report')
    made = config_lib.from_json((aligned / 'config.json').read_text())
    made.seed, made.data.rules = seed, 'savings bank'
    made.reward.name, made.reward.checkpoint = 'csrm', f'/x/no_sa-seed{seed}'
    made.reward.a, made.reward.b = 1.0, 0.0
    (folder / 'config.json').write_text(config_lib.to_json(made))
  for name in ('oracle', '/x/judge'):  # V_r, nothing else
    folder = tmp_path / 'runs' / f'alphaalign-{name.rpartition("/")[2]}'
    shutil.copytree(aligned / 'report', folder / 'report')
    made = RL.get_config('reward=alphaalign,rules=savings bank')
    made.reward.refusal = name
    (folder / 'config.json').write_text(config_lib.to_json(made))
  (tmp_path / 'runs' / 'logs').mkdir()
  config = EVAL.get_config('compare')
  config.compare = (str(aligned), str(tmp_path / 'runs' / '*'))
  main.run(config, tmp_path / 'both')
  text = (tmp_path / 'both' / 'report' / 'report.md').read_text()
  assert '| policy | film club | savings bank | all |' in text
  for name in (
    'unaligned',
    'best of 2, oracle',
    'reinforce\\_pp, no\\_sa',
    'grpo, alphaalign: standardised, judge',
  ):
    assert f'\n| {name} |' in text, name
  (tmp_path / 'rm' / 'report').mkdir(parents=True)
  (tmp_path / 'rm' / 'report' / 'metrics.json').write_text('{"suites": {}}')
  np.savez(tmp_path / 'rm' / 'report' / 'arrays.npz')
  config.compare = (str(aligned), str(tmp_path / 'rm'))
  with pytest.raises(ValueError, match='is an alignment and'):
    main.run(config, tmp_path / 'mixed')


def test_the_aligned_policy_can_be_aligned_further(aligned):
  _, params = hf.load(aligned / 'policy')
  _, before = hf.load(RL.get_config('reward=oracle').policy.init)
  assert (params['embed']['embedding'] != before['embed']['embedding']).any()
  config = _config(f'reward=oracle,policy_init={aligned / "policy"}')
  assert align.make_policy(config, hf.Source(config.policy.init)).model.num_layers


def test_distillation_ends_with_a_report(tmp_path):
  config = _config(
    'reward=oracle,algorithm=distillation',
    num_steps=2,
    eval__best_of=0,
    eval__num_prompts=8,
    pairs__num_prompts=4,
    pairs__num_samples=6,
  )
  main.run(config, tmp_path / 'rl')
  summary = json.loads((tmp_path / 'rl' / 'report' / 'summary.json').read_text())
  assert summary['pairs/reward_better'] > summary['pairs/reward_worse']
  assert summary['aligned/true_cosa'] >= 0
  assert len(_lines(tmp_path / 'rl' / 'completions.jsonl')) == 4


def test_alphaalign_learns_from_labels_alone(tmp_path):
  config = _config(
    'reward=alphaalign',
    num_steps=1,
    checkpoint_every=1,
    rollout__samples_every=1,
    eval__num_prompts=8,
    eval__best_of=0,
    eval__every=0,
  )
  main.run(config, tmp_path / 'rl')
  summary = json.loads((tmp_path / 'rl' / 'report' / 'summary.json').read_text())
  for name in ('refusal_benign', 'compliance_harmful', 'helpfulness_benign'):
    assert np.isfinite(summary[f'aligned/{name}'])
  rows = _lines(tmp_path / 'rl' / 'samples.jsonl')
  assert all(set(row['parts']) == {'format', 'refusal', 'safety', 'helpfulness'} for row in rows)
  # The shipped policy writes the structure, and flips a coin to refuse.
  assert np.mean([row['parts']['format'] for row in rows]) > 0.5
  assert {row['parts']['refusal'] for row in rows} == {0.0, 1.0}


def test_labels_are_balanced_where_nothing_else_is_learnt_from(tmp_path):
  config = RL.get_config('reward=alphaalign,rules=weather desk')
  train, test = align.make_prompts(config)
  assert collections.Counter(p.label for p in train) == {
    'harmful': len(train) // 2,
    'benign': len(train) // 2,
  }
  assert len({p.id for p in train}) == len(train) > 500
  assert len(test) == config.eval.num_prompts
  assert np.mean([p.label == 'harmful' for p in test]) < 0.4  # as they are
  unknown = dataclasses.replace(train[0], label='')
  assert unknown in align._balance([*train, unknown])  # refused later
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text(
    ''.join(
      json.dumps({'id': i, 'prompt': f'tea {i}', 'label': 'benign'}) + '\n' for i in range(20)
    )
  )
  rules = ROOT / 'configs' / 'safety' / 'hospital.yaml'
  config = _config(f'reward=alphaalign,data=jsonl,path={prompts},rules={rules}')
  _refused(config, tmp_path, '0 prompts to train on are labelled harmful')


def test_the_oracle_verifies_refusals_of_ruleworld_only():
  config = _config('reward=alphaalign')
  config.data.source = 'xstest'
  with pytest.raises(ValueError, match="refusal='oracle' knows RuleWorld only"):
    rewards.make_scorers(config)


def test_every_algorithm_has_a_config_with_its_own_knobs():
  for name, row in algorithms.ALGORITHMS.items():
    config = RL.get_config(f'algorithm={name}')
    algorithms.check_idle(config)
    assert (config.loss.epsilon is not None) == row.online
    assert (config.pairs.beta is None) == row.online
    if row.online:
      assert (config.loss.gamma is not None) == row.token_returns
      assert (config.loss.lam is not None) == row.needs_values
      algorithms.make_objective(config)
    assert set(config_lib.flatten(config)) == set(config_lib.flatten(RL.get_config()))
  assert RL.get_config().algorithm == 'reinforce_pp'
  assert RL.get_config('reward=alphaalign').algorithm == 'grpo'


def _refused(config, folder, message):
  with pytest.raises((ValueError, OSError), match=message) as error:
    main.run(config, folder / 'rl')
  assert '\n' not in str(error.value)
  assert not (folder / 'rl').exists()


@pytest.mark.parametrize(
  ('arg', 'overrides', 'message'),
  [
    ('', {}, 'checkpoint=DIR'),
    ('checkpoint=/no/such/run', {}, '/no/such/run'),
    ('reward=oracle,rules=chess club', {}, 'chess club'),
    ('reward=oracle,data=xstest', {}, 'data_dir=FOLDER'),
    ('reward=oracle,data=xstest,data_dir=/nowhere', {}, '/nowhere'),
    ('reward=http,url=http://127.0.0.1:9/', {}, '127.0.0.1:9'),
    ('reward=python,function=no:such', {}, 'no:such'),
    ('reward=oracle,algorithm=grpo', {'rollout__num_generations': 1}, 'num_generations=1'),
    ('reward=oracle', {'loss__kl_place': 'loss', 'loss__kl_estimator': 'k1'}, 'k1'),
    ('reward=oracle', {'sampling__temperature': 0.0}, 'temperature=0'),
    ('reward=oracle', {'policy__marks': 'round'}, 'round'),
    (
      'reward=oracle',
      {'reward__helpfulness': 'none', 'reward__helpfulness_weight': 2.0},
      'helpfulness_weight=2.0 does nothing',
    ),
    ('reward=oracle', {'loss__kl_horizon': 5}, 'kl_horizon=5 does nothing'),
  ],
)
def test_bad_input_is_one_line(tmp_path, arg, overrides, message):
  _refused(_config(arg, **overrides), tmp_path, message)


def test_a_prompt_longer_than_the_context_is_named(tmp_path):
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text(
    ''.join(
      json.dumps({'id': i, 'prompt': f'tea {i} ' * (3000 if i == 7 else 1)}) + '\n'
      for i in range(20)
    )
  )
  rules = ROOT / 'configs' / 'safety' / 'hospital.yaml'
  config = _config(f'reward=python,function=math:fsum,data=jsonl,path={prompts},rules={rules}')
  _refused(config, tmp_path, 'prompt 7 has .* context_length')
