import dataclasses
import json

import numpy as np
import pytest

from csrm_jax.core import tree
from csrm_jax.models import transformer
from csrm_jax.models.sampling import Sampling
from csrm_jax.rl import online
from csrm_jax.safety import schema
from csrm_jax.train import loop


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _train(work, state):
  """Returns (state, what the run carried) at its end."""
  state = loop.train(
    work, state, work.config, mesh=work.mesh, workdir=work.workdir, meta={'kind': 'policy'}
  )
  return state, work.get_state()


def _curve(folder):
  """Returns metrics.jsonl without what a clock says."""
  return [
    {name: value for name, value in line.items() if not name.startswith('time/')}
    for line in _lines(folder / 'metrics.jsonl')
  ]


def _leaves(state):
  return {name: np.asarray(x) for name, x in tree.named_leaves(state.params).items()}


def test_metrics_have_the_names_that_users_look_for(make_work):
  job, state = make_work()
  _train(job, state)
  lines = _lines(job.workdir / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [1, 2, 3, 4]
  for name in (
    'reward/mean',
    'reward/std',
    'reward/length/mean',
    'reward/stop/std',
    'reward/zero_std_frac',
    'completion/mean_length',
    'completion/truncated_frac',
    'kl/ref',
    'kl/old',
    'kl/coef',
    'policy/loss',
    'policy/entropy',
    'policy/clip_frac_low',
    'policy/ratio_max',
    'time/rollout_s',
    'time/reward_s',
    'time/update_s',
    'time/num_compilations',
    'optim/lr',
    'optim/grad_norm',
    'violations/per_1000',
  ):
    assert name in lines[0], name
  # Over the whole run; that a killed one goes on counting is a part of its curve, below.
  broken, seen = job.violations
  assert 0 < broken < seen == 4 * online.num_rows(job.config)
  assert lines[-1]['violations/per_1000'] == 1000 * broken / seen
  assert lines[0]['kl/ref'] == 0  # the reference is where the policy starts
  assert lines[-1]['kl/ref'] > 0
  assert lines[0]['kl/old'] < 1e-9
  assert lines[0]['policy/ratio_mean'] == pytest.approx(1, abs=1e-5)


def test_a_rougher_copy_of_the_weights_is_sampled_from_and_compared(make_work):
  job, state = make_work(rollout__dtype='bfloat16', num_steps=1, checkpoint_every=1)
  _train(job, state)
  (line,) = _lines(job.workdir / 'metrics.jsonl')
  assert 1e-6 < line['sampler/logprob_gap_mean'] < 0.1
  assert line['kl/old'] < 1e-9  # the update starts from the policy itself


def test_it_learns_what_is_rewarded(make_work):
  def reward(samples):
    return np.array([-0.1 * s.num_tokens for s in samples], np.float32), {}

  job, state = make_work(
    num_steps=12,
    rollout__num_prompts=3,
    rollout__num_generations=8,
    checkpoint_every=12,
    optim__lr=0.1,
    reward_fn=reward,
  )
  _train(job, state)
  rewards = [line['reward/mean'] for line in _curve(job.workdir)]
  assert rewards[0] < -0.4
  assert rewards[-1] > -0.2


class Killed(Exception):
  """As if the process had been."""


def _killing(reward_fn, at):
  """Returns the reward, of which call number `at` never returns."""
  calls = []

  def score(samples):
    calls.append(1)
    if len(calls) == at:
      raise Killed
    return reward_fn(samples)

  return score


@pytest.mark.parametrize(
  'options',
  [
    {
      'algorithm': 'reinforce_pp',
      'loss__kl_target': 0.01,
      'loss__kl_horizon': 20,
      'loss__normalise_rewards': True,
      'loss__num_iterations': 2,
      'loss__num_mini_batches': 2,
    },
    {'algorithm': 'ppo'},
  ],
)
def test_a_killed_run_goes_on_bit_for_bit(make_work, length_reward, options):
  whole, state = make_work('whole', **options)
  want, progress = _train(whole, state)
  job, state = make_work('cut', reward_fn=_killing(length_reward, 4), **options)
  with pytest.raises(Killed):
    _train(job, state)
  job, state = make_work('cut', **options)
  found, again = _train(job, state)
  assert _curve(job.workdir) == _curve(whole.workdir)
  assert _lines(job.workdir / 'samples.jsonl') == _lines(whole.workdir / 'samples.jsonl')
  assert again == progress
  for name, x in _leaves(want).items():
    np.testing.assert_array_equal(x, _leaves(found)[name], err_msg=name)


def test_a_reward_that_is_not_finite_stops_with_its_sample(make_work, length_reward):
  def reward(samples):
    totals, parts = length_reward(samples)
    totals[5] = np.nan
    return totals, parts

  job, state = make_work(reward_fn=reward)
  with pytest.raises(ValueError, match=r'p\d#1'):
    _train(job, state)
  assert not (job.workdir / 'checkpoints').exists()


def test_every_prompt_comes_once_an_epoch(prompts):
  asked = [p.id for step in (1, 2, 3) for p in online.choose_prompts(prompts, 2, 0, step)]
  assert sorted(asked[:3]) == sorted(asked[3:]) == ['p0', 'p1', 'p2']


def test_it_stops_on_kl_and_stays_stopped(make_work, length_reward):
  job, state = make_work(stop__kl=1e-9)
  _, progress = _train(job, state)
  lines = _lines(job.workdir / 'metrics.jsonl')
  assert lines[-1]['step'] == 2  # at step 1 the KL is exactly 0
  assert 'stop.kl' in progress['stopped']
  job, state = make_work(stop__kl=1e-9, reward_fn=_killing(length_reward, 1))
  _, again = _train(job, state)
  assert again == progress


def test_it_stops_on_reward_collapse(make_work):
  falling = iter((3.0, 3.0, 1.0, 1.0))

  def reward(samples):
    totals = np.full(len(samples), next(falling), np.float32)
    return totals, {}

  job, state = make_work(reward_fn=reward, stop__reward_drop=1.5)
  _, progress = _train(job, state)
  assert 'reward_drop' in progress['stopped']
  assert _curve(job.workdir)[-1]['step'] == 3


def test_cut_off_completions_can_be_left_out(make_work):
  for masked in (True, False):
    job, state = make_work(f'{masked}', loss__mask_truncated=masked, stop_ids=(), num_steps=2)
    before = _leaves(state)
    after = _leaves(_train(job, state)[0])
    same = [np.array_equal(before[name], after[name]) for name in before]
    assert all(same) == masked


def test_the_critic_learns(make_work):
  job, state = make_work(algorithm='ppo', num_steps=2)
  state, _ = _train(job, state)
  assert float(state.params[online.VALUE_HEAD]['bias']) > 0
  assert 'value/loss' in _curve(job.workdir)[0]


def test_the_sampler_and_the_learner_agree(policy, prompts):
  """On log-probabilities; and rows have room for what was drawn, not for all that is allowed."""
  params = transformer.init_params(policy.model, 0)
  lengths, ids = set(), range(policy.model.vocab_size)
  for stops in ((), tuple(ids[::2]), tuple(ids)):
    options = Sampling(16, stop_ids=stops)
    samples, rows = online.rollout(policy, params, prompts, options, num_generations=4)
    C = rows['completion_mask'].shape[1]
    assert C / 2 < max(sample.num_tokens for sample in samples) <= C or C == 4
    lengths.add(C)
    found = online.logprobs(policy.model, params, {name: rows[name] for name in online.READ}, 1.0)
    np.testing.assert_allclose(found['logprobs'], rows['rollout_logprobs'], atol=1e-5)
  assert lengths >= {4, 16}


def test_without_a_kl_there_is_no_reference(make_work):
  job, state = make_work(loss__kl_coef=0.0, num_steps=2)
  job.reference = None  # it would fail
  _train(job, state)
  assert not any('kl/ref' in line for line in _curve(job.workdir))
  job, state = make_work('measured', loss__kl_coef=0.0, stop__kl=9.0, num_steps=2)
  _train(job, state)
  assert all('kl/ref' in line for line in _curve(job.workdir))


def test_the_number_of_programs_is_bounded(make_work, prompts):
  """A step with longer prompts than any before compiles a program of each kind anew."""
  long = dataclasses.replace(prompts[0], messages=(schema.Message('user', 'tea ' * 25),))
  job, state = make_work(num_steps=4, checkpoint_every=4, stop_ids=())
  job.prompts = [*prompts[:2], long, prompts[0]]
  _train(job, state)
  lines = _lines(job.workdir / 'metrics.jsonl')
  counts = np.diff([line['time/num_compilations'] for line in lines])
  assert counts.max() < 9, counts


def test_nothing_is_compiled_after_the_first_steps(make_work):
  job, state = make_work(num_steps=6, checkpoint_every=6, loss__num_mini_batches=2)
  _train(job, state)
  lines = _lines(job.workdir / 'metrics.jsonl')
  counts = [line['time/num_compilations'] for line in lines]
  assert counts[0] > 0
  assert len(set(counts[2:])) == 1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'loss__num_mini_batches': 3}, 'num_mini_batches=3'),
    ({'checkpoint_every': 3, 'log_every': 2}, 'checkpoint_every=3'),
    ({'rollout__num_prompts': 0}, 'num_prompts=0'),
  ],
)
def test_settings_that_do_not_fit_are_refused(make_run_config, changes, message):
  config = make_run_config('reinforce_pp', **changes)
  with pytest.raises(ValueError, match=message):
    online.check(config)
    loop.check_lengths(config)
