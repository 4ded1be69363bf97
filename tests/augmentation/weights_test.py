"""Votes on labels, and what is done by them: identities, loops, and the stage of the job."""

import dataclasses
import json
import math

import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.augmentation import weights
from csrm_jax.core import journal as journal_lib
from csrm_jax.data import forms
from csrm_jax.ruleworld import defects, examples
from csrm_jax.runners import augment
from tests import small
from tests.reward import model_test

RNG = np.random.default_rng(0)
EXAMPLES = [examples.training_example(0, i) for i in range(30)]
PAIRS = [examples.preference_pair(0, i) for i in range(10)]
ITEMS = [*EXAMPLES, *PAIRS]
MEAN = RNG.normal(size=40) + 0.5
VOTES = weights.Votes(MEAN, np.ones(40), RNG.normal(size=40), list(map(weights.category, ITEMS)))


@pytest.mark.parametrize(
  'rule', ['flip:share=0', 'drop:share=0', 'smooth:share=0', 'smooth:smoothing=0', 'margin:scale=0',
           'balance:power=0'],
)  # fmt: skip
def test_a_rule_whose_knob_is_0_leaves_the_data_as_they_are(rule):
  decided = config_lib.choose('rule', weights.WEIGHTS, rule)(VOTES)
  made = weights.apply(ITEMS, decided)
  assert [m.to_dict() for m in made] == [i.to_dict() for i in ITEMS]


def test_the_lowest_are_turned_or_left_out_and_never_those_above_0():
  doubted = sorted(range(40), key=lambda i: MEAN[i])[:8]
  doubted = [i for i in doubted if MEAN[i] < 0]
  assert len(doubted) > 2
  turned = weights.apply(ITEMS, weights.flip(VOTES, share=0.2))
  left = weights.apply(ITEMS, weights.drop(VOTES, share=0.2))
  assert [i for i in range(40) if turned[i] is not ITEMS[i]] == sorted(doubted)
  assert left == [item for i, item in enumerate(ITEMS) if i not in doubted]
  for i in doubted:
    if i < 30:
      assert turned[i].label != ITEMS[i].label and turned[i].conversation == ITEMS[i].conversation
    else:
      assert (turned[i].safer, turned[i].other) == (ITEMS[i].other, ITEMS[i].safer)
  assert weights.flip(VOTES, share=1.0).flip.sum() == (MEAN < 0).sum()


def test_what_is_near_0_is_softened_and_margins_are_strengths():
  near = set(sorted(range(40), key=lambda i: abs(MEAN[i]))[:12])
  made = weights.apply(ITEMS, weights.smooth(VOTES, share=0.3, smoothing=0.2))
  for i, item in enumerate(made):
    assert item.weight == (pytest.approx(0.6) if i in near else 1)
    assert i < 30 or item.soft == (pytest.approx(0.8) if i in near else 1)
  graded = weights.apply(ITEMS, weights.margin(VOTES, scale=2))
  assert graded[:30] == EXAMPLES
  assert [p.strength for p in graded[30:]] == pytest.approx([max(2 * m, 0.01) for m in MEAN[30:]])


def test_agreement_keeps_turns_or_leaves_out():
  decided = weights.agree(VOTES)
  for i, (a, b) in enumerate(zip(MEAN, VOTES.own, strict=True)):
    assert decided.flip[i] == (a < 0 and b < 0)
    assert decided.keep[i] == (a * b > 0)


def test_rare_categories_have_weight():
  votes = dataclasses.replace(VOTES, groups=['a'] * 32 + ['b'] * 7 + ['c'])
  weight = weights.balance(votes, most=3).weight
  want = [min((32 / n) ** 0.5, 3) for n in [32] * 32 + [7] * 7 + [1]]
  np.testing.assert_allclose(weight, np.array(want) / np.mean(want))


def test_margins_are_those_of_a_loop_in_float64_and_out_of_fold():
  x, groups = RNG.normal(size=(24, 3)) + 0.3, [f'{i // 2}' for i in range(24)]
  found = weights.margins(x, groups, num_folds=3, num_members=1, decay=0.1)[0]
  folds = [int(weights.sources.hash_unit(f'0\n{g}') * 3) for g in groups]
  for k in set(folds):
    rest = [i for i in range(24) if folds[i] != k]
    w = np.zeros(3)
    for _ in range(4000):  # Gradient descent, row by row.
      slope = 0.1 * w
      for i in rest:
        slope = slope - x[i] / (1 + math.exp(x[i] @ w)) / len(rest)
      w -= 0.5 * slope
    own = [i for i in range(24) if folds[i] == k]
    np.testing.assert_allclose(found[own], x[own] @ w, atol=1e-4)
  # A label that is turned changes nothing of its own fold but its own sign.
  turned = x.copy()
  turned[5] *= -1
  again = weights.margins(turned, groups, num_folds=3, num_members=1, decay=0.1)[0]
  same = [i for i in range(24) if folds[i] == folds[5] and i != 5]
  np.testing.assert_array_equal(again[same], found[same])
  assert again[5] == -found[5]
  assert 'of one conversation' in small.error_of(weights.margins, x, ['a'] * 24)


def test_wrong_labels_are_found():
  centre = RNG.normal(size=(400, 8))
  centre[:, 0] += 2 * np.sign(centre[:, 0])
  right = np.where(centre[:, :1] > 0, 1, -1) * np.pad(centre, ((0, 0), (0, 1)), constant_values=1)
  rng = np.random.default_rng(0)
  wrong = rng.random(400) < 0.25
  found = weights.margins(np.where(wrong[:, None], -right, right), list(map(str, range(400))))
  flagged = found.mean(0) < 0
  assert wrong[flagged].mean() > 0.85 and flagged[wrong].mean() > 0.85
  assert found.shape == (3, 400) and found.std(0).min() > 0


@pytest.fixture(scope='module')
def trunk(tmp_path_factory):
  return str(model_test._save(tmp_path_factory.mktemp('trunk') / 'rm', seed=0))


def test_states_and_scores_are_those_of_the_model(trunk):
  import csrm_jax

  # Those that are read in one piece.
  rows = sorted(EXAMPLES, key=lambda e: len(repr(e.conversation)) + len(repr(e.safety)))[:5]
  states, scores = weights.make_reader(trunk)(rows)
  want = csrm_jax.load(trunk).score_fn(rows)
  np.testing.assert_allclose(scores, want, atol=1e-5)
  assert states.shape == (5, small.SPEC.model.embed_dim)


def test_the_stage_writes_data_with_its_votes_and_goes_on_where_it_was(
  trunk, tmp_path, monkeypatch
):
  lines = [json.dumps(item.to_dict()) for item in ITEMS]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(lines))
  module = config_lib.load_module('augment')

  def run(rule, workdir):
    c = module.get_config(f'weigh={rule},model={trunk},data=auto,path={tmp_path / "rows.jsonl"}')
    workdir.mkdir(exist_ok=True)
    augment.run(c, workdir)
    return forms.read(workdir / 'data.jsonl', require_label=True)

  put, count = journal_lib.Journal.put, iter(range(20))

  def dying(self, key, value):
    if next(count, None) is None:
      raise KeyboardInterrupt
    put(self, key, value)

  with monkeypatch.context() as patch:
    patch.setattr(journal_lib.Journal, 'put', dying)
    with pytest.raises(KeyboardInterrupt):
      run('flip:share=0', tmp_path / 'a')
  assert not (tmp_path / 'a' / 'data.jsonl').exists()
  same = run('flip:share=0', tmp_path / 'a')
  assert [item.to_dict() for item in same] == [item.to_dict() for item in ITEMS]
  votes = [json.loads(line) for line in (tmp_path / 'a' / 'votes.jsonl').open()]
  assert [vote['id'] for vote in votes] == [item.id for item in ITEMS]
  assert {'margin', 'spread', 'own_margin', 'flip'} <= set(votes[0])
  made = run('drop:share=0.5', tmp_path / 'b')
  whole = [json.loads(line) for line in (tmp_path / 'b' / 'votes.jsonl').open()]
  assert [v['margin'] for v in whole] == [v['margin'] for v in votes]
  kept = [item.id for item, vote in zip(ITEMS, whole, strict=True) if vote['keep']]
  assert [item.id for item in made] == kept and len(kept) < len(ITEMS)
  card = json.loads((tmp_path / 'b' / 'card.json').read_text())
  assert card['drops']['distrusted'] == len(ITEMS) - len(kept)
  assert card['weights']['rule'] == 'drop:share=0.5'


def test_what_cannot_be_weighed_is_one_line(tmp_path):
  module = config_lib.load_module('augment')
  assert 'needs a model to stand on' in small.error_of(
    augment.run, module.get_config('weigh=flip'), tmp_path
  )
  assert "config.weights.rule='flop' must be one of flip, drop" in small.error_of(
    augment.run, module.get_config('weigh=flop:share=1,model=x'), tmp_path
  )
  c = module.get_config(f'weigh=flip,model=x,data=auto,path={tmp_path}')
  c.source.defect = 'flip'
  assert "is for RuleWorld's data only" in small.error_of(augment.run, c, tmp_path)
  made, _ = augment._read(module.get_config('smoke').source, 0)
  c = module.get_config('smoke')
  c.source.defect = 'flip'
  noisy, _ = augment._read(c.source, 0)
  rng = np.random.default_rng(0)
  assert noisy == [defects.flip(item, rng) for item in made]
