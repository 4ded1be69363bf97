import copy

import jax
import numpy as np
import pytest

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import transformer
from csrm_jax.models.sampling import Sampling
from csrm_jax.rl import offline, online

MESH = mesh_lib.make_mesh(devices=jax.devices()[:1])
SAMPLING = Sampling(max_completion_length=5, stop_ids=(2,))


@pytest.fixture(scope='module')
def config(make_run_config):
  return make_run_config(
    'dpo',
    pairs__num_samples=6,
    pairs__num_best=2,
    pairs__num_parallel=2,
    pairs__batch_size=3,
    pairs__beta=0.5,
    pairs__nll_coef=0.0,
    sampling__max_completion_length=5,
  )


def _length_reward(samples):
  totals = np.array([0.5 + s.num_tokens + len(s.text) / 7 for s in samples], np.float32)
  return totals, {'length': totals}


def _sample(config, policy, params, prompts, reward_fn, path, weights=''):
  inputs = {'weights': weights}
  return offline.sample(config, policy, params, prompts, reward_fn, SAMPLING, path, inputs)


def _never(samples):
  raise AssertionError('sampled again')


@pytest.fixture(scope='module')
def params(policy):
  return jax.tree.map(lambda x: 3 * x, transformer.init_params(policy.model, 0))


@pytest.fixture(scope='module')
def completions(config, policy, params, prompts, tmp_path_factory):
  path = tmp_path_factory.mktemp('journal') / 'completions.jsonl'
  return path, _sample(config, policy, params, prompts, _length_reward, path)


def test_what_is_in_the_journal_is_not_sampled_again(config, policy, params, prompts, completions):
  path, found = completions
  assert [len(some) for some in found.values()] == [6, 6, 6]
  again = _sample(config, policy, params, prompts, _never, path)
  assert again == found
  # Another policy's completions are not those of its prompts.
  with pytest.raises(AssertionError, match='sampled again'):
    _sample(config, policy, params, prompts, _never, path, 'others')


def test_a_run_that_was_killed_loses_nothing(
  config, policy, params, prompts, completions, tmp_path
):
  path, found = completions
  # Killed within the first group of prompts, and while it wrote.
  first, second = path.read_bytes().splitlines(keepends=True)[:2]
  (tmp_path / 'completions.jsonl').write_bytes(first + second[:50])
  again = _sample(config, policy, params, prompts, _length_reward, tmp_path / 'completions.jsonl')
  assert again == found


def _made(*pairs):
  return [{'text': text, 'reward': reward} for text, reward in pairs]


def test_best_are_paired_with_worst():
  some = _made(*((f't{i}', float(i)) for i in range(12)))
  pairs = offline.choose_pairs(some, 3, 0)
  assert {a['text'] for a, _ in pairs} == {'t9', 't10', 't11'}
  assert {b['text'] for _, b in pairs} == {'t0', 't1', 't2'}
  assert offline.choose_pairs(some, 3, 0) == pairs
  assert any(offline.choose_pairs(some, 3, seed) != pairs for seed in range(9))


def test_responses_count_once_and_ties_make_no_pair():
  assert not offline.choose_pairs(_made(('a', 1.0), ('a', 0.0)), 1, 0)
  assert not offline.choose_pairs(_made(('a', 1.0), ('b', 1.0)), 1, 0)
  # Fewer than asked for: no completion is on both sides.
  pairs = offline.choose_pairs(_made(('a', 3.0), ('b', 2.0), ('c', 1.0)), 2, 0)
  assert [(a['text'], b['text']) for a, b in pairs] == [('a', 'c')]


@pytest.mark.tuned
def test_pairs_know_their_rewards_and_reference(config, policy, params, prompts, completions):
  pairs = offline.make_pairs(config, policy, params, prompts, completions[1], MESH)
  num = len(pairs['reward'])
  assert pairs['tokens'].shape[:2] == (num, 2)
  assert (pairs['reward'][:, 0] > pairs['reward'][:, 1]).all()
  rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in pairs.items()}
  out = online.logprobs(
    policy.model,
    params,
    {name: rows[name] for name in ('tokens', 'positions', 'segment_ids', 'completion_mask')},
    1.0,
  )
  np.testing.assert_allclose(rows['ref_logprob'], np.asarray(out['logprobs']).sum(1), rtol=1e-5)
  # At the reference the margin is 0, and so DPO's loss log 2.
  loss_fn = offline.make_loss_fn(config, policy)
  total, weight, metrics = loss_fn(params, pairs)
  assert float(total / weight) == pytest.approx(np.log(2), abs=1e-4)
  assert float(metrics['pairs/margin'][0]) == pytest.approx(0, abs=1e-3)
  lengths = pairs['completion_mask'].sum(-1)
  nll = -(pairs['ref_logprob'] / lengths)[:, 0].mean()
  assert float(metrics['pairs/nll'][0]) / num == pytest.approx(nll, rel=1e-4)
  changed = copy.deepcopy(config)
  changed.pairs.nll_coef = 2.0
  total = offline.make_loss_fn(changed, policy)(params, pairs)[0]
  assert float(total / weight) == pytest.approx(np.log(2) + 2 * nll, rel=1e-4)


def test_rewards_that_are_all_equal_give_no_pairs(config, policy, params, prompts):
  same = {
    p.id: [{'tokens': [5], 'text': t, 'stopped': False, 'reward': 1.0} for t in 'ab']
    for p in prompts
  }
  with pytest.raises(ValueError, match='no pairs'):
    offline.make_pairs(config, policy, params, prompts, same, MESH)


def test_batches_see_every_pair_once_an_epoch_and_resume():
  pairs = {'reward': np.arange(10, dtype=np.float32).reshape(5, 2)}
  batches = offline.PairBatches(pairs, 3, seed=1)
  seen = [next(batches)['reward'][:, 0] for _ in range(5)]
  for epoch in np.split(np.concatenate(seen), 3):
    assert sorted(epoch) == [0, 2, 4, 6, 8]
  other = offline.PairBatches(pairs, 3, seed=1)
  next(other)
  state = other.get_state()
  third = offline.PairBatches(pairs, 3, seed=1)
  third.set_state(state)
  np.testing.assert_array_equal(next(third)['reward'][:, 0], seen[1])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'pairs__num_samples': 6, 'pairs__num_best': 4}, 'num_best=4'),
    ({'pairs__num_parallel': 0}, 'num_parallel=0'),
    ({'pairs__nll_coef': -1.0}, 'nll_coef=-1'),
    ({'sampling__temperature': 0.0}, 'temperature=0'),
  ],
)
def test_settings_that_make_no_pairs_are_refused(make_run_config, changes, message):
  with pytest.raises(ValueError, match=message):
    offline.check(make_run_config('dpo', **changes))
