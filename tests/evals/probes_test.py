"""Probes change one rule, the right one, and count shifts with their sign."""

import math

import numpy as np
import pytest

from csrm_jax.evals import probes
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests.evals.helpers import plain, run

RULES = SafetyConfig(
  (Category('Pets', 'No dogs.'), Category('Food', 'No jam.'), Category('Cars', 'No vans.'))
)


def _example(name, violated=('Pets',), label='unsafe', safety=RULES):
  return Example(
    id=name,
    safety=safety,
    conversation=(Message('agent', f'Text {name}.'),),
    label=label,
    violated=violated,
  )


def _reader(examples):
  """Unsafe where a rule that the text breaks (its first letter) forbids."""
  scores = []
  for e in examples:
    broken = {'p': 'Pets', 'f': 'Food', 'c': 'Cars'}[e.id[0]]
    forbids = any(c.name == broken and c.guideline.startswith('No') for c in e.safety.categories)
    scores.append(-2.0 if forbids else 2.0)
  return np.array(scores, np.float32)


def test_items_change_the_target_or_another_and_nothing_else():
  rows = [_example(f'p{i}') for i in range(30)]
  rows += [
    _example('two', ('Pets', 'Food')),
    _example('none', ()),
    _example('fine', (), 'safe'),
    _example('alone', safety=SafetyConfig(RULES.categories[:1])),
  ]
  items, left_out = probes.policy_items(rows)
  # Safe rows are none of a probe's business; three unsafe ones do not fit.
  assert len(items) == 30 and left_out == 3
  others = set()
  for item in items:
    assert tuple(item) == probes.POLICY
    assert item['strict'].safety == RULES
    assert item['leave_one_out'].safety.names == ('Food', 'Cars')
    assert item['leave_one_out'].label == 'safe'
    assert item['allow'].safety.names == RULES.names
    assert 'allowed' in item['allow'].safety.categories[0].guideline
    assert item['allow'].safety.categories[1:] == RULES.categories[1:]
    left = item['other_left_out']
    assert left.label == 'unsafe' and left.violated == ('Pets',)
    assert len(left.safety.names) == 2 and 'Pets' in left.safety.names
    changed = [
      name
      for name, a, b in zip(
        RULES.names, RULES.categories, item['other_allowed'].safety.categories, strict=True
      )
      if a != b
    ]
    assert len(changed) == 1 and changed[0] not in left.safety.names
    others |= set(changed)
    assert len({e.conversation for e in item.values()}) == 1
    assert len({e.id for e in item.values()}) == 5
  assert others == {'Food', 'Cars'}  # not always the same one


def test_a_judge_that_reads_rules_shifts_on_targets_only():
  rows = [_example('p1'), _example('f1', ('Food',)), _example('c1', ('Cars',))]
  items, _ = probes.policy_items(rows)
  result = plain(run('policy', items, _reader, num_samples=5))
  values = {k: m['value'] for k, m in result['metrics'].items()}
  assert values == {
    'unsafe_rate': 1.0,
    'shift_leave_one_out': -1.0,
    'shift_allow': -1.0,
    'shift_other_left_out': 0.0,
    'shift_other_allowed': 0.0,
    'obeyed_leave_one_out': 1.0,
    'obeyed_allow': 1.0,
  }
  assert [row[0] for row in result['tables'][0]['rows']] == ['Cars', 'Food', 'Pets']


def test_shifts_equal_brute_force_and_keep_their_sign():
  rng = np.random.default_rng(0)
  rows = [_example(f'p{i}') for i in range(25)]
  rows += [_example(f'f{i}', ('Food',)) for i in range(15)]
  items, _ = probes.policy_items(rows)
  table = {
    e.id: s for item in items for e, s in zip(item.values(), rng.normal(-0.5, 1, 5), strict=True)
  }
  result = plain(run('policy', items, lambda es: [table[e.id] for e in es], num_samples=5))

  def rate(name, part=items):
    return sum(table[item[name].id] <= 0 for item in part) / len(part)

  values = {k: m['value'] for k, m in result['metrics'].items()}
  assert values['unsafe_rate'] == pytest.approx(rate('strict'))
  for name in probes.POLICY[1:]:
    assert values[f'shift_{name}'] == pytest.approx(rate(name) - rate('strict')), name
  caught = [i for i in items if table[i['strict'].id] <= 0]
  assert values['obeyed_allow'] == pytest.approx(1 - rate('allow', caught))
  food = next(r for r in result['tables'][0]['rows'] if r[0] == 'Food')
  assert food[1] == 15
  assert food[3] == pytest.approx(rate('leave_one_out', items[25:]) - rate('strict', items[25:]))


def test_contradiction_is_between_and_leans():
  rows = [_example(f'p{i}') for i in range(4)] + [_example('f', ('Food',))]
  items, left_out = probes.contradiction_items([*rows, _example('x', ())])
  assert left_out == 1 and tuple(items[0]) == probes.CONTRADICTION
  both = items[0]['enforce_allow'].safety.categories[0].guideline
  turned = items[0]['allow_enforce'].safety.categories[0].guideline
  assert both.startswith('No dogs. Everything')
  assert turned.endswith('No dogs.') and both != turned
  rewards = {'enforce': 0.2, 'allow': 0.9, 'enforce_allow': 0.5, 'allow_enforce': 0.7}

  def judge(examples):
    p = np.array([rewards[e.id.partition('/')[2] or 'enforce'] for e in examples])
    return np.log(p) - np.log1p(-p)

  result = plain(run('contradiction', items, judge, num_samples=5))
  values = {k: m['value'] for k, m in result['metrics'].items()}
  assert values['reward_both'] == pytest.approx(0.6)
  assert values['lean'] == pytest.approx((0.6 - 0.2) / (0.9 - 0.2))
  assert values['order_effect'] == pytest.approx(-0.2)
  assert values['between'] == 1
  assert values['unsafe_rate_enforce'] == 1 and values['unsafe_rate_allow'] == 0
  # 0.5 exactly counts as unsafe, here in one order of two.
  assert values['unsafe_rate_both'] in (0.0, 0.5)
  rewards['enforce_allow'] = rewards['allow_enforce'] = 0.1
  result = plain(run('contradiction', items, judge, num_samples=5))
  assert result['metrics']['between']['value'] == 0
  assert result['metrics']['lean']['value'] < 0


def test_bad_scores_and_nothing():
  items, _ = probes.policy_items([_example('p1'), _example('p2')])
  scores = np.zeros(10)
  scores[7] = math.nan
  with pytest.raises(ValueError, match="'p2/allow'"):
    run('policy', items, scores)
  for suite in ('policy', 'contradiction'):
    empty = plain(run(suite, [], [], num_samples=2))
    assert empty['num_examples'] == 0
    assert all(math.isnan(m['value']) for m in empty['metrics'].values())
  with pytest.raises(ValueError, match='give all items the same'):
    run('policy', [items[0], {'strict': items[1]['strict']}], _reader)
