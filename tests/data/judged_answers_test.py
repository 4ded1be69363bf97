"""Answers that were judged, and the wordings of their rules."""

import os
import pathlib

import pytest

from csrm_jax.data import catalogue, judged, judged_answers as answers

DATA = os.environ.get('CSRM_DATA_DIR', '')
FILES = ('answering', 'diasafety', 'harmless', 'pyrit_graded', 'rbr_gold', 'teen_policies')
# set -> its folder
SETS = {
  name: public_set.folder or name
  for name, public_set in catalogue.SETS.items()
  if public_set.read.__module__ == answers.__name__
}
KEYS = {
  *(answers.HARMFUL, answers.NEEDLESS, answers.NO_REFUSAL, answers.MUST_REFUSE),
  *(answers.ANSWERS, answers.PROMPTS),
  *(f'rbr_gold/{must}{name}' for name in answers.PROPOSITIONS for must in ('', 'must_')),
  *(f'pyrit_graded/{name}_{k}' for name in answers.PYRIT_CATEGORIES for k in answers.PYRIT_LEVELS),
  *answers.DIASAFETY_RULES.values(),
  *(key for key, _ in answers.TEEN_POLICIES.values()),
}


def _rules():
  return {key: rule for name in FILES for key, rule in judged.rules(name).items()}


def test_each_rule_is_worded_in_several_ways():
  known = _rules()
  assert set(known) == KEYS
  for key, rule in known.items():
    # No run trains on a rule that is always unseen.
    assert len(rule.wordings) >= (2 if rule.unseen == 'always' else 5), key
    assert len(rule.held) >= 2, key
    names = [c.name.casefold() for c in (*rule.wordings, *rule.held)]
    assert len(set(names)) == len(names), key
  texts = [c.guideline for rule in known.values() for c in (*rule.wordings, *rule.held)]
  assert len(set(texts)) == len(texts)
  assert max(len(text.split()) for text in texts) <= 120


def test_folds_leave_out_seven_statements_with_their_opposites():
  known = judged.rules('rbr_gold')
  folds = [known[f'rbr_gold/{name}'].unseen for name in answers.PROPOSITIONS]
  assert sorted(folds) == ['0'] * 7 + ['1'] * 7 + ['2'] * 7
  for name, fold in zip(answers.PROPOSITIONS, folds, strict=True):
    assert known[f'rbr_gold/must_{name}'].unseen == fold
  always = {key.rpartition('_')[0] for key, r in _rules().items() if r.unseen == 'always'}
  assert {key for key in always if key.startswith('pyrit')} == {
    'pyrit_graded/exploits',
    'pyrit_graded/self_harm',
  }


def test_each_level_of_severity_is_within_the_milder_ones():
  known = judged.rules('pyrit_graded')
  for name in answers.PYRIT_CATEGORIES:
    for k in answers.PYRIT_LEVELS:
      milder = tuple(f'pyrit_graded/{name}_{j}' for j in range(k - 1, 1, -1))
      assert known[f'pyrit_graded/{name}_{k}'].stricter == milder


@pytest.mark.skipif(not DATA, reason='CSRM_DATA_DIR names no folder of the published files')
@pytest.mark.parametrize('name', SETS)
def test_the_published_files_are_read(name):
  rows = catalogue.read(name, 'test', pathlib.Path(DATA) / SETS[name])
  if name in ('model_spec', 'safe_rlhf_pairs'):
    assert {(p.safer.label, p.other.label) for p in rows} == {('safe', 'unsafe')}
    return
  sides = {}
  for row in rows:
    assert set(row.verdicts) <= KEYS and all(0 <= v <= 1 for v in row.verdicts.values())
    assert sides.setdefault(row.group, row.side) == row.side
    assert row.conversation[-1].content.strip()
  assert set(sides.values()) == set(judged.SIDES)
  # Nobody gave one of the twelve texts the last level.
  for key in {key for row in rows for key in row.verdicts} - {'pyrit_graded/representational_5'}:
    shares = [row.verdicts[key] for row in rows if key in row.verdicts]
    assert min(shares) < 0.5 < max(shares), key
