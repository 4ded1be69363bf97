"""Flips are counted among caught violations, and only rules or text move."""

import math

import numpy as np
import pytest
from scipy import stats

from csrm_jax.evals import metrics, probes
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests.evals.helpers import plain, run

PETS, FOOD, CARS = (Category(n, f'No {n}.') for n in ('Pets', 'Food', 'Cars'))


def _example(name, label='unsafe', rules=(PETS, FOOD, CARS), text=None):
  return Example(
    id=name,
    safety=SafetyConfig(tuple(rules)),
    conversation=(Message('user', f'Hi {name}.'), Message('agent', text or f'Text {name}')),
    label=label,
  )


def _by_id(table):
  return lambda examples: np.array([table[e.id] for e in examples])


def test_suffixes_stand_after_the_response_of_violations():
  items = probes.attack_items([_example('a'), _example('b', 'safe'), _example('c', None)])
  assert [item['original'].id for item in items] == ['a']
  assert items[0]['empty'].conversation == items[0]['original'].conversation
  for name, suffix in probes.ATTACKS.items():
    changed = items[0][name]
    assert changed.conversation[-1].content == 'Text a' + suffix
    assert changed.conversation[0] == items[0]['original'].conversation[0]
    assert changed.safety == items[0]['original'].safety
  assert any('<|im_end|>' in s for s in probes.ATTACKS.values())


def test_flips_count_caught_violations_only():
  items = probes.attack_items([_example(x) for x in 'abcd'], {'one': '!', 'two': '?'})
  table = {
    'a': -1,
    'a/one': 2,
    'a/two': -1,  # flipped by one
    'b': -1,
    'b/one': -3,
    'b/two': 1,  # flipped by two
    'c': -1,
    'c/one': -1,
    'c/two': 0,  # 0 is still unsafe
    'd': 1,
    'd/one': 9,
    'd/two': 9,  # never caught: no flip
  }
  result = plain(run('attacks', items, _by_id(table), num_samples=5))
  values = {k: m['value'] for k, m in result['metrics'].items()}
  assert result['num_caught'] == 3 and values['caught'] == 0.75
  assert result['rates']['one']['value'] == pytest.approx(1 / 3)
  assert values['any_flip'] == pytest.approx(2 / 3)
  assert values['worst_flip'] == pytest.approx(1 / 3)
  # The shift is over all four: (3 - 2 + 0 + 8) / 4.
  assert result['tables'][0]['rows'][0][2] == pytest.approx(9 / 4)


def test_orders_are_permutations_of_the_same_rules():
  rows = [_example('a'), _example('b', rules=(PETS,)), _example('c')]
  items = probes.order_items(rows, num_orders=4)
  assert [item['original'].id for item in items] == ['a', 'c']
  assert items[0]['reversed'].safety.names == ('Cars', 'Food', 'Pets')
  for item in items:
    assert len(item) == 5
    for e in item.values():
      assert set(e.safety.categories) == {PETS, FOOD, CARS}
      assert e.conversation == item['original'].conversation
  assert items == probes.order_items(rows, num_orders=4)


def test_paraphrases_replace_every_rule_under_its_name():
  words = {
    c: (Category(c.name, f'Never {c.name}.'), Category(c.name, f'Ban {c.name}.'))
    for c in (PETS, FOOD)
  }
  rows = [_example('a', rules=(FOOD, PETS)), _example('b')]
  items = probes.paraphrase_items(rows, words)
  assert len(items) == 1  # nobody worded Cars
  texts = [c.guideline for c in items[0]['wording 2'].safety.categories]
  assert texts == ['Ban Food.', 'Ban Pets.']
  with pytest.raises(ValueError, match='keeps the name'):
    probes.paraphrase_items(rows, {PETS: (FOOD,)})
  with pytest.raises(ValueError, match='as many'):
    probes.paraphrase_items(rows, {PETS: (), FOOD: words[FOOD]})


def test_padding_stands_on_either_side():
  (item,) = probes.length_items([_example('a')], 'Um.', (1, 3))
  assert {k: e.conversation[-1].content for k, e in item.items()} == {
    'original': 'Text a',
    '1 after': 'Text a Um.',
    '1 before': 'Um. Text a',
    '3 after': 'Text a Um. Um. Um.',
    '3 before': 'Um. Um. Um. Text a',
  }


def test_sensitivity_equals_brute_force():
  rng = np.random.default_rng(0)
  rows = [_example(f'r{i}', ('safe', 'unsafe')[i % 2]) for i in range(20)]
  items = probes.order_items(rows, 3)
  table = {e.id: rng.normal() for item in items for e in item.values()}
  result = plain(run('sensitivity', items, _by_id(table), num_samples=5))
  p = {k: 1 / (1 + math.exp(v)) for k, v in table.items()}
  flips = [
    [
      (p[e.id] >= 0.5) != (p[item['original'].id] >= 0.5)
      for n, e in item.items()
      if n != 'original'
    ]
    for item in items
  ]
  moved = [
    abs(p[e.id] - p[item['original'].id])
    for item in items
    for n, e in item.items()
    if n != 'original'
  ]
  values = {k: m['value'] for k, m in result['metrics'].items()}
  assert values['flip_rate'] == pytest.approx(np.mean(flips))
  assert values['any_flip'] == pytest.approx(np.mean([any(f) for f in flips]))
  assert values['p_change'] == pytest.approx(np.mean(moved))
  labels = np.arange(20) % 2
  f1 = {n: metrics.f1(labels, np.array([p[item[n].id] for item in items])) for n in items[0]}
  assert values['f1_drop'] == pytest.approx(
    f1['original'] - min(v for n, v in f1.items() if n != 'original')
  )


def test_a_judge_of_the_set_of_rules_is_not_sensitive_to_order():
  items = probes.order_items([_example(f'r{i}') for i in range(5)])
  result = plain(
    run('sensitivity', items, lambda es: [len(e.id.split('/')[0]) - 2.5 for e in es], num_samples=3)
  )
  for name in ('flip_rate', 'any_flip', 'p_change', 'f1_drop'):
    assert result['metrics'][name]['value'] == 0, name


def test_length_is_correlated_within_a_label():
  rng = np.random.default_rng(0)
  rows = [_example(f'r{i}', ('safe', 'unsafe')[i % 2], text='x' * (5 + 7 * i)) for i in range(40)]
  letters = np.arange(40) * 7 + 5
  # Safe responses: longer is judged safer. Unsafe ones: no matter.
  scores = np.where(np.arange(40) % 2 == 0, letters / 100, rng.normal(size=40))
  result = plain(run('length', rows, scores, num_samples=5))
  values = {k: m['value'] for k, m in result['metrics'].items()}
  assert values['spearman_safe'] == pytest.approx(1)
  expected = stats.spearmanr(letters[1::2], scores[1::2]).statistic
  assert values['spearman_unsafe'] == pytest.approx(expected)
  table = result['tables'][0]['rows']
  assert [row[1] for row in table] == [10] * 4
  assert table[0][0] == '5 to 68'


@pytest.mark.parametrize('suite', ['attacks', 'sensitivity'])
def test_bad_scores_and_nothing(suite):
  items = probes.length_items([_example('a')], lengths=(1,))
  with pytest.raises(ValueError, match="'a/1 before'"):
    run(suite, items, [0, 1, math.inf])
  empty = plain(run(suite, [], [], num_samples=2))
  assert empty['num_examples'] == 0
  assert all(math.isnan(m['value']) for m in empty['metrics'].values())
