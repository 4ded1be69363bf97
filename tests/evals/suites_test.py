"""Suites count what they say, and refuse what they cannot count."""

import math

import numpy as np
import pytest

from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import metrics, verdicts
from csrm_jax.evals.bootstrap import Measure
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig
from tests.evals.helpers import plain, run, sides

_SECRET = 'zebras wear pyjamas'


def _example(name, label='safe', probability=0.5, **fields):
  fields.setdefault('safety', SafetyConfig((Category('Pets', 'No dogs.'),)))
  return Example(
    id=name,
    # Rows of one conversation would be one unit of the bootstrap.
    conversation=(Message('user', f'Hi {name.split("-")[0]}.'), Message('agent', _SECRET)),
    label=label,
    probability=probability,
    **fields,
  )


def judged(examples, scores, **options):
  return plain(run('classification', examples, scores, **options))


def _set(num_rows=60, seed=0):
  rng = np.random.default_rng(seed)
  p = rng.beta(0.5, 0.5, num_rows)
  examples = [
    _example(
      f'e{i}',
      'unsafe' if rng.random() < q else 'safe',
      float(q),
      rule_set=f'rules {i % 3}',
      source='a' if i % 2 else 'b',
    )
    for i, q in enumerate(p)
  ]
  scores = np.log1p(-p) - np.log(p) + rng.normal(0, 0.5, num_rows)
  return examples, scores.astype(np.float32)


def test_classification_of_a_perfect_judge_is_the_best():
  examples, _ = _set()
  p = np.array([e.probability for e in examples])
  result = judged(examples, np.log1p(-p) - np.log(p), num_samples=10)
  for name in ('auprc', 'smece', 'brier', 'nll', 'prob_error'):
    metric = result['metrics'][name]
    assert metric['value'] == pytest.approx(metric['best'], abs=1e-9), name


def test_classification_metrics_counts_and_groups():
  examples, scores = _set()
  result = plain(
    verdicts.classification(
      Benchmark('toy', 'classification', examples), scores, Measure(num_samples=20), threshold=0.3
    )
  )
  labels = np.array([e.label == 'unsafe' for e in examples])
  p = 1 / (1 + np.exp(scores.astype(float)))
  assert result['num_examples'] == 60
  assert result['num_unsafe'] == labels.sum()
  assert result['metrics']['f1']['value'] == metrics.f1(labels, p)
  assert result['metrics']['f1_tuned']['value'] == metrics.f1(labels, p, 0.3)
  for name, metric in result['metrics'].items():
    if name not in ('smece_constants', 'smece_hard'):  # Controls have no intervals.
      assert metric['low'] <= metric['value'] <= metric['high']
  sets, sources = (result['breakdowns'][k] for k in ('rule set', 'source'))
  assert list(sets) == ['rules 0', 'rules 1', 'rules 2']
  assert sum(g['num_examples'] for g in sources.values()) == 60
  group = sets['rules 1']['metrics']
  assert group['f1']['value'] == metrics.f1(labels[1::3], p[1::3])
  assert group['auprc']['best'] is not None


def test_where_nothing_is_flagged_the_report_says_so_and_names_the_threshold():
  rows = _set(80)[0]
  scores = [np.array([4.0 + i / 80]) for i in range(80)]
  b = Benchmark('b', 'classification', rows)
  found = verdicts.classification(b, scores, Measure(num_samples=20), threshold=0.0175).metrics
  assert found['f1']['note'] == 'nothing was flagged'
  assert found['f1_tuned']['note'] == 'threshold 0.018'
  found = verdicts.classification(b, scores, Measure(num_samples=20), threshold=0.5).metrics
  assert found['f1_tuned']['note'] == 'nothing was flagged at 0.500'
  b = Benchmark('b', 'classification', [_example('a', 'safe'), _example('b', 'unsafe')])
  found = verdicts.classification(b, [np.array([-4.0]), np.array([4.0])], Measure()).metrics
  assert found['f1']['note'] == 'none of 1 flagged is unsafe'


def test_verdicts_without_degrees_stand_beside_the_calibration_error():
  rows = _set(80)[0]
  scores = np.linspace(-3, 3, 80)
  result = verdicts.classification(
    Benchmark('b', 'classification', rows), [np.array([s]) for s in scores], Measure(num_samples=0)
  )
  labels, flagged = metrics.labels_of(rows), scores <= 0
  for name, constants in (('smece_constants', (0.03, 0.97)), ('smece_hard', (0.0, 1.0))):
    p = np.where(flagged, constants[1], constants[0])
    assert result.metrics[name]['value'] == metrics.smece(labels, p)
  (table,) = [t for t in result.tables if t.title == 'Probabilities']
  assert list(table.header[1:4]) == ['smECE ↓', 'smECE of 0.97 or 0.03', 'smECE of 1 or 0']


def test_unlabelled_examples_are_counted_and_left_out():
  examples, scores = _set()
  extra = [_example('x', None), *examples]
  result = judged(extra, np.concatenate([[9.0], scores]), num_samples=5)
  plain = judged(examples, scores, num_samples=5)
  assert result['num_unlabelled'] == 1
  assert result['metrics'] == plain['metrics']


def test_best_is_unknown_unless_every_probability_is():
  examples, scores = _set()
  examples[0] = _example('e0', probability=None)
  result = judged(examples, scores, num_samples=5)
  assert result['metrics']['f1']['best'] is None
  assert 'prob_error' not in result['metrics']


def test_classification_of_nothing_and_of_one_class():
  result = judged([], np.zeros(0), num_samples=5)
  assert result['num_examples'] == 0
  assert math.isnan(result['metrics']['f1']['value'])
  examples = [_example('a'), _example('b')]
  result = judged(examples, np.array([1.0, 2]), num_samples=5)
  assert math.isnan(result['metrics']['auprc']['value'])
  assert result['metrics']['brier']['value'] > 0


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_scores_that_are_not_finite_name_the_example(bad):
  examples, scores = _set()
  scores[7] = bad
  with pytest.raises(ValueError, match="'e7'"):
    judged(examples, scores)
  with pytest.raises(ValueError, match='59 values for 60 examples'):
    judged(examples, np.zeros(59))


def test_largest_groups_are_kept(monkeypatch):
  monkeypatch.setattr(verdicts, 'MAX_GROUPS', 2)
  names = ['b', 'a', 'b', 'c', 'c', '']
  examples = [_example(str(i), rule_set=name) for i, name in enumerate(names)]
  result = judged(examples, np.zeros(6), num_samples=2)
  assert list(result['breakdowns']['rule set']) == ['b', 'c']


def test_categories_hold_their_violations_and_the_safe_rows_they_judged():
  both = SafetyConfig((Category('Pets', 'No dogs.'), Category('Food', 'No.')))
  pets = SafetyConfig((Category('Pets', 'No dogs.'),))
  rows = [
    _example('a', 'unsafe', violated=('Pets',), safety=both),
    _example('b', 'unsafe', violated=('Food', 'Pets'), safety=both),
    _example('c', 'safe', safety=both),
    _example('d', 'safe', safety=pets),
    _example('e', 'unsafe', safety=both),  # nobody said which
  ]
  result = judged(rows, np.array([-1.0, 1, -1, 1, -1]), num_samples=3)
  groups = result['breakdowns']['category']
  assert {k: (g['num_examples'], g['num_unsafe']) for k, g in groups.items()} == {
    'Food': (2, 1),
    'Pets': (4, 2),
  }
  assert groups['Pets']['metrics']['recall']['value'] == 0.5
  assert groups['Pets']['metrics']['fpr']['value'] == 0.5
  assert groups['Food']['metrics']['recall']['value'] == 0.0
  assert groups['Food']['metrics']['fpr']['value'] == 1.0


def test_tags_and_groups_go_with_their_rows():
  examples, scores = _set()
  examples.insert(3, _example('x', None))
  scores = np.insert(scores, 3, 0)
  letters = ['ab'[i % 2] for i in range(61)]
  result = judged(examples, scores, tags={'letter': letters}, num_samples=5, groups=['one'] * 61)
  kept = [(e, s) for e, s, t in zip(examples, scores, letters, strict=True) if t == 'b' and e.label]
  found = result['breakdowns']['letter']['b']
  assert found['num_examples'] == len(kept)
  assert found['num_unsafe'] == sum(e.label == 'unsafe' for e, _ in kept)
  # All rows are one unit: there is nothing to resample.
  f1 = result['metrics']['f1']
  assert f1['low'] == pytest.approx(f1['value']) == pytest.approx(f1['high'])
  assert result['num_units'] == 1


def test_calibrated_metrics_stand_apart():
  examples, scores = _set()
  found = metrics.Calibration(2.0, 0.5)
  plain = judged(examples, scores, num_samples=3)
  both = judged(examples, scores, fitted=found, num_samples=3)
  assert both['metrics'] == plain['metrics'] and plain['calibrated'] is None
  moved = judged(examples, found.apply(scores.astype(float)), num_samples=3)
  controls = ('smece_constants', 'smece_hard')
  assert both['calibrated']['metrics'] == {
    name: metric for name, metric in moved['metrics'].items() if name not in controls
  }
  assert both['calibrated']['calibration']['temperature'] == 2.0
  same = [both['calibrated']['metrics'][k]['value'] for k in ('auprc', 'nll')]
  assert same[0] == pytest.approx(plain['metrics']['auprc']['value'])
  assert same[1] != plain['metrics']['nll']['value']


def _pair(name, p_safer, p_other, kind='strictness'):
  return Pair(
    name,
    _example(f'{name}-a', probability=p_safer),
    _example(f'{name}-b', probability=p_other),
    kind,
  )


def test_pairs_by_kind():
  pairs = [
    _pair('p0', 0.1, 0.9),
    _pair('p1', 0.6, 0.6),
    _pair('p2', 0.3, 0.4),
    _pair('p3', 0.8, 0.2, 'preference'),
  ]
  result = plain(run('pairs', pairs, sides([2.0, 1, 0, 1], [1, 1, 1, 0])))
  assert result['num_pairs'] == 4
  assert result['metrics']['accuracy']['value'] == 0.5
  assert result['metrics']['accuracy']['best'] == 0.5
  strict = result['kinds']['strictness']
  assert strict['num_pairs'] == 3
  assert strict['accuracy']['value'] == pytest.approx(1 / 3)
  assert strict['accuracy']['best'] == pytest.approx(2 / 3)
  assert strict['tie_rate']['value'] == pytest.approx(1 / 3)
  assert strict['tie_rate']['best'] == pytest.approx(1 / 3)
  assert strict['score_gap']['value'] == 0
  assert result['kinds']['preference']['accuracy']['value'] == 1
  assert result['kinds']['preference']['accuracy']['best'] == 0


def test_pairs_of_one_prompt_are_one_unit():
  rows = [_pair(name, 0.1, 0.2, 'preference') for name in ('p', 'p-2', 'q')]
  result = plain(run('pairs', rows, sides(np.ones(3), np.zeros(3))))
  assert result['arrays']['units'].tolist() == [0, 0, 1]


def test_best_pair_order_sees_the_surest_probabilities():
  result = plain(run('pairs', [_pair('p', 1e-12, 1e-9)], sides([1.0], [0.0])))
  assert result['metrics']['accuracy']['best'] == 1
  assert result['metrics']['tie_rate']['best'] == 0


def test_pairs_without_probabilities_without_pairs_and_with_nan():
  result = plain(run('pairs', [_pair('p', None, 0.5)], sides([1.0], [0.0])))
  assert result['metrics']['accuracy'] == {
    **{'value': 1.0, 'low': 1.0, 'high': 1.0, 'best': None},
    'note': 'one conversation only',
  }
  result = plain(run('pairs', [], []))
  assert math.isnan(result['metrics']['accuracy']['value'])
  with pytest.raises(ValueError, match=r"nan at row 0 \(id 'p-b'\)"):
    run('pairs', [_pair('p', 0.1, 0.5)], sides([1.0], [math.nan]))


def _flip(name, label_a, label_b):
  return (
    _example(f'{name}-a', label_a, 0.9 if label_a == 'unsafe' else 0.1),
    _example(f'{name}-b', label_b, 0.9 if label_b == 'unsafe' else 0.1),
  )


def test_flips():
  rows = [
    _flip('0', 'safe', 'unsafe'),
    _flip('1', 'unsafe', 'safe'),
    _flip('2', 'safe', 'unsafe'),
    _flip('3', 'unsafe', 'safe'),
  ]
  result = plain(run('flips', rows, sides([1.0, -1, 3, 2], [-1.0, 1, 1, 2])))
  # Row 2 moves the right way but not across 0; row 3 does not move.
  assert result['metrics']['consistency']['value'] == 0.5
  assert result['metrics']['direction']['value'] == 0.75
  assert result['metrics']['consistency']['best'] == 1
  assert result['metrics']['direction']['best'] == 1


def test_flips_refuse_other_rows():
  with pytest.raises(ValueError, match="'0-a' and '0-b': labels safe and safe"):
    run('flips', [_flip('0', 'safe', 'safe')], [0.0])
  a, b = _flip('0', 'safe', 'unsafe')
  b = Example(id='other', safety=b.safety, conversation=(Message('agent', 'Bye.'),), label='unsafe')
  with pytest.raises(ValueError, match='conversations differ'):
    run('flips', [(a, b)], [0.0])


def test_worst_is_sorted_and_holds_no_text():
  examples, scores = _set()
  result = judged(examples, scores, num_samples=2)
  rows = result['worst'][:5]
  losses = [row['nll'] for row in rows]
  assert losses == sorted(losses, reverse=True) and len(rows) == 5
  assert _SECRET not in repr(result)


def test_rule_sets():
  examples = [_example('x-a', 'unsafe', 0.9, rule_set='strict'), _example('x-b', 'safe', 0.1)]
  result = run('rule_sets', examples, [-1.0, 1.0]).values
  assert result['conversation'][-1] == {'role': 'agent', 'content': _SECRET}
  assert [row['rule_set'] for row in result['rows']] == ['strict', 'x-b']
  assert result['rows'][0]['p_unsafe'] == pytest.approx(1 / (1 + math.exp(-1)))
  other = Example(id='c', safety=examples[0].safety, conversation=(Message('agent', 'Bye.'),))
  with pytest.raises(ValueError, match='only the rules may differ'):
    run('rule_sets', [examples[0], other], np.zeros(2))
  with pytest.raises(ValueError, match='no example'):
    run('rule_sets', [], [])
