"""Several models as one: loaded, asked, rewarding and served."""

import dataclasses

import numpy as np
import pytest

import csrm_jax
from csrm_jax import config as config_lib
from csrm_jax.reward import combiners, model as reward_model, scoring
from csrm_jax.rl import rewards
from csrm_jax.ruleworld import examples
from csrm_jax.runners import serve
from tests import small
from tests.reward import model_test

ASKED = [examples.test_example(0, i, 'seen') for i in range(4)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two work directories, and the scores of each."""
  folder = tmp_path_factory.mktemp('runs')
  names = [str(model_test._save(folder / f'rm{seed}', seed=seed)) for seed in (0, 1)]
  each = np.stack([csrm_jax.load(name).score_fn(ASKED) for name in names])
  assert np.abs(each[0] - each[1]).max() > 1e-3
  return names, each


@pytest.mark.parametrize('text', ['mean', 'worst', 'uwo:weight=0.1', 'robust'])
def test_several_models_are_one_score_function(runs, text):
  names, each = runs
  rm = csrm_jax.load('+'.join(names), combine=text)
  want = combiners.choose(text)(each.astype(np.float64))
  np.testing.assert_allclose(rm.score_fn(ASKED), want, rtol=1e-6)
  verdicts = rm.score(ASKED[0].safety, [ASKED[0].conversation])
  assert verdicts[0].score == pytest.approx(want[0], rel=1e-5)
  assert (rm.spec, rm.step, rm.calibration) == (csrm_jax.load(names[0]).spec, None, None)


def test_with_no_weight_on_the_spread_an_ensemble_is_the_mean_and_one_member_is_itself(runs):
  names, each = runs
  rm = csrm_jax.load('+'.join(names), combine='uwo:weight=0')
  np.testing.assert_array_equal(rm.score_fn(ASKED), csrm_jax.load('+'.join(names)).score_fn(ASKED))
  one = csrm_jax.load(names[0], combine='uwo')
  np.testing.assert_array_equal(one.score_fn(ASKED), each[0])


def test_kept_scores_of_another_combination_are_never_taken(runs):
  both = '+'.join(runs[0])
  digests = {csrm_jax.load(both, combine=c).digest for c in ('mean', 'worst', 'uwo:weight=0.1')}
  digests |= {reward_model.digest(name) for name in (*runs[0], '+'.join(runs[0][::-1]))}
  assert len(digests) == 6
  assert reward_model.digest(both, 'worst') == csrm_jax.load(both, combine='worst').digest


def test_what_cannot_be_combined_is_one_line(runs, tmp_path):
  both = '+'.join(runs[0])
  assert 'step=3: several models' in small.error_of(csrm_jax.load, both, step=3)
  assert 'a name is empty' in small.error_of(csrm_jax.load, both + '+')
  assert 'must be one of mean, worst' in small.error_of(csrm_jax.load, both, combine='best')
  folder = tmp_path / 'a+b'
  model_test._save(folder)
  assert reward_model.members(folder) == [folder]
  assert csrm_jax.load(folder).step == 3


def test_progress_counts_each_example_once(runs):
  counted = []
  csrm_jax.load('+'.join(runs[0])).score_fn(ASKED, counted.append)
  assert sum(counted) == len(ASKED)


def test_what_one_member_has_not_read_was_not_read():
  def judge(score, cut, mark):
    values = [np.full(2, score, np.float32), *np.full((2, 2), int(cut)), np.full(2, cut)]
    return scoring.ScoreFn(lambda examples, *args, **kw: scoring.Judged(*values, np.array(mark)))

  found = scoring.combined([judge(1, False, ['', 'b']), judge(3, True, ['a', 'c'])]).judge([0, 0])
  assert found.score.tolist() == [2, 2] and found.score.dtype == np.float32
  assert found.cut.all() and found.num_unread.tolist() == [1, 1]
  assert found.outside.tolist() == ['a', 'b']


def test_a_reward_of_alignment_is_that_of_the_ensemble(runs):
  names, each = runs
  load = config_lib.load_module(config_lib.CONFIGS / 'rl.py').get_config
  config = load(f'checkpoint={"+".join(names)}')
  config.reward.combine = 'worst'
  score_fn = rewards._load_safety(config.reward)[0]
  np.testing.assert_allclose(score_fn(ASKED), each.min(0), rtol=1e-6)


def test_a_server_combines_models_of_one_recipe(runs, tmp_path):
  names, each = runs
  config = config_lib.load_module(config_lib.CONFIGS / 'serve.py').get_config()
  config.checkpoint, config.combine, config.policies = '+'.join(names), 'worst', ''
  config.max_length = 192
  config.allow_out_of_domain = True
  batching = config.batching
  batching.rules_lengths, batching.row_lengths, batching.call_tokens = (128,), (128,), 128
  engine, _ = serve._load(config)
  try:
    engine.start()
    engine.wait_until_ready(120)
    rows = [engine.encode(e.safety, e.conversation) for e in ASKED]
    np.testing.assert_allclose(engine.submit(rows).result(60), each.min(0), atol=1e-5)
  finally:
    engine.close()
  other = dataclasses.replace(small.SPEC, safe_words=('safe',))
  config.checkpoint = f'{names[0]}+{model_test._save(tmp_path / "other", spec=other)}'
  assert 'another shape, template or tokenizer' in small.error_of(serve._load, config)
