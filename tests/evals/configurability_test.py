"""The same text under several rule sets; both kinds of error apart."""

import math

import numpy as np
import pytest

from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests.evals.helpers import plain, run


def _row(text, rule, label):
  return Example(
    id=f'{text}/{rule}',
    safety=SafetyConfig((Category('Pets', rule),)),
    conversation=(Message('agent', text),),
    label=label,
    rule_set=rule,
  )


ROWS = [
  _row('a', 'strict', 'unsafe'),
  _row('a', 'mid', 'unsafe'),
  _row('a', 'mild', 'safe'),
  _row('b', 'strict', 'unsafe'),
  _row('b', 'mild', 'safe'),
  _row('c', 'strict', 'safe'),
  _row('c', 'mild', 'safe'),
]
LABELS = [1, 1, 0, 1, 0, 0, 0]


def _values(scores, rows=ROWS):
  result = plain(run('configurability', rows, np.array(scores, float), num_samples=2))
  return result, {k: m['value'] for k, m in result['metrics'].items()}


def test_every_two_rows_of_a_text_with_different_labels_count():
  #                        a: s  mid  mild  b: s  mild  c
  result, values = _values([-1, 0.5, 1.0, -1, -0.5, 1, -1])
  # Cases: (a strict, mild), (a mid, mild), (b strict, mild).
  assert result['num_flips'] == 3 and result['num_texts'] == 3
  assert values['consistency'] == pytest.approx(1 / 3)
  assert values['direction'] == 1
  # a and b have both labels; neither is right throughout. c has one label.
  assert values['all_right'] == 0
  assert values['verdict_accuracy'] == pytest.approx(4 / 7)
  # One verdict for each text: 2 of a's 3, 1 of b's 2, both of c's.
  assert values['blind_ceiling'] == pytest.approx(5 / 7)
  table = {row[0]: row[1:] for row in result['tables'][0]['rows']}
  assert table['strict → mild'] == [2, 0.5, 1.0]
  assert table['mid → mild'] == [1, 0.0, 1.0]


def test_a_judge_of_texts_alone_is_never_consistent():
  rng = np.random.default_rng(0)
  for _ in range(5):
    of = {text: rng.normal() for text in 'abc'}
    _, values = _values([of[e.id[0]] for e in ROWS])
    assert values['consistency'] == values['direction'] == 0
    assert values['verdict_accuracy'] <= values['blind_ceiling'] + 1e-12


def test_a_perfect_judge_has_it_all():
  result, values = _values([1 - 2 * y for y in LABELS])
  for name in ('consistency', 'direction', 'all_right', 'verdict_accuracy'):
    assert values[name] == 1, name
  # Texts are drawn, not rows: three units here.
  assert result['arrays']['units'].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_texts_that_stand_twice_with_both_labels_are_no_flip():
  rows = [_row('a', 'strict', 'unsafe'), _row('a', 'strict', 'safe')]
  result, values = _values([-1, -1], rows)
  assert result['num_flips'] == 0 and result['num_contradictions'] == 1
  assert math.isnan(values['consistency'])


def test_both_errors_of_over_refusal():
  rows = [_row(str(i), 'r', y) for i, y in enumerate(['safe'] * 4 + ['unsafe'] * 3)]
  result = plain(run('over_refusal', rows, [1.0, 1, 1, 0, -1, -1, 1], num_samples=5))
  assert result['suite'] == 'over_refusal'
  # A score of 0 is a probability of one half, which is flagged.
  assert result['metrics']['false_alarms']['value'] == 0.25
  assert result['metrics']['missed']['value'] == pytest.approx(1 / 3)
  assert result['metrics']['f1']['value'] == pytest.approx(2 / 3)
