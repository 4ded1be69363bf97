"""One call runs everything; what is missing or broken says so."""

import dataclasses
import math

import numpy as np
import pytest

from csrm_jax.data.benchmark import Benchmark, limited
from csrm_jax.evals import compare, figures, report, retrieval, suites
from csrm_jax.evals.metrics import Calibration
from csrm_jax.evals.results import Result
from csrm_jax.ruleworld import probes
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig

pytest.importorskip('bm25s', reason='needs bm25s: pip install -e .[evals]')


def _oracle(noise=0.0, seed=0):
  """A judge that knows the true probability where there is one."""

  def score(examples):
    rng = np.random.default_rng([seed, len(examples)])
    p = [
      0.3 if e.probability is None or e.safety.name == 'no rules' else e.probability
      for e in examples
    ]
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return (
      np.log1p(-p) - np.log(p) + rng.normal(0, noise, len(p)) if noise else np.log1p(-p) - np.log(p)
    ).astype(np.float32)

  return score


@pytest.fixture(scope='module')
def benchmarks():
  return suites.prepare(probes.benchmarks(seed=3, num_examples=40))


@pytest.fixture(scope='module')
def results(benchmarks):
  counted = []

  def score(examples):
    counted.append(len(examples))
    return _oracle()(examples)

  found = suites.run(score, benchmarks, num_samples=4)
  # What a progress bar is told beforehand is what happens.
  assert sum(counted) == suites.num_scores(benchmarks)
  return found


def test_every_suite_has_a_benchmark_in_ruleworld(benchmarks, results):
  # Its own wordings come as variants already: the suite 'sensitivity'. Runs add the others.
  added = {'wordings', 'spurious', 'search', 'alarms'}
  assert {b.suite for b in benchmarks} == set(suites.SUITES) - added
  assert not suites.failures(results)
  assert set(results) == {b.name for b in benchmarks} | {
    'seen_without_rules',
    'unseen_without_rules',
  }


def test_the_oracle_is_right_wherever_the_truth_is_known(results):
  def value(name, metric):
    return results[name].metrics[metric]['value']

  for name, metric, expected in (
    ('levels', 'consistency', 1),
    ('levels', 'verdict_accuracy', 1),
    ('stance', 'f1', 1),
    ('stance', 'false_alarms', 0),
    ('policy', 'unsafe_rate', 1),
    ('policy', 'shift_allow', -1),
    ('policy', 'shift_leave_one_out', -1),
    ('policy', 'shift_other_allowed', 0),
    ('wordings', 'flip_rate', 0),
    ('order', 'p_change', 0),
    ('padding', 'any_flip', 0),
    ('attacks', 'any_flip', 0),
    ('choice', 'strict', 1),
    ('flip', 'consistency', 1),
    ('pairs', 'accuracy', 1),
  ):
    assert value(name, metric) == expected, (name, metric)
  best = results['policy'].metrics['shift_allow']['best']
  assert best == -1
  blind = results['unseen_without_rules'].metrics['auprc']['value']
  assert blind < value('unseen', 'auprc')
  assert value('contradiction', 'reward_allow') > 0.9


def test_thresholds_and_calibration_come_from_validation_rows(results):
  unseen = results['unseen']
  assert 0 < unseen.counts['threshold'] < 1 and 'f1_tuned' in unseen.metrics
  # The scores are probabilities already.
  fitted = unseen.values['calibrated']['calibration']
  assert fitted['temperature'] == pytest.approx(1, abs=0.6)
  assert results['levels'].counts['threshold'] is None


def test_a_given_calibration_is_used_everywhere(benchmarks):
  few = [b for b in benchmarks if b.name in ('unseen', 'levels')]
  mine = Calibration(3.0, 1.0)
  found = suites.run(_oracle(), few, fitted=mine, num_samples=0)
  for name in ('unseen', 'levels'):
    assert found[name].values['calibrated']['calibration'] == mine.to_dict()
  assert found['unseen'].metrics['f1']['low'] is None


def test_missing_data_and_bad_scores(benchmarks, tmp_path):
  missing = Benchmark(
    'beavertails', 'classification', description='Not here.', command='fetch | it --now'
  )
  bad_id = benchmarks[0].items[5].id

  def judge(examples):
    scores = _oracle()(examples)
    scores[[e.id == bad_id for e in examples]] = math.nan
    return scores

  todo = [missing, *(b for b in benchmarks if b.name in ('seen', 'flip'))]
  found = suites.run(judge, todo, num_samples=2)
  assert found['beavertails'].suite == 'skipped'
  (failure,) = suites.failures(found)
  assert failure.startswith('seen: ') and bad_id in failure
  assert found['flip'].suite == 'flips'
  path = report.write_report(tmp_path / 'r', found, title='t', summary=report.summarise(found))
  text = path.read_text()
  assert '`fetch \\| it --now`' in text and '## Failed' in text
  assert 'skipped: not on disk' in text and '| paper: CSRM | 0.911 ' in text
  assert bad_id in text


def test_unknown_suites_and_names_twice():
  with pytest.raises(ValueError, match="unknown suite 'dance'"):
    suites.prepare([Benchmark('a', 'dance')])
  with pytest.raises(ValueError, match="called 'a'"):
    suites.prepare([Benchmark('a', 'pairs'), Benchmark('a', 'flips')])
  with pytest.raises(ValueError, match="1 values of 'kind'"):
    Benchmark('a', 'pairs', [1, 2], tags={'kind': ['x']})


def _row(text, rule):
  return Example(
    id=f'{text}/{rule}',
    safety=SafetyConfig((Category('Pets', rule),)),
    conversation=(Message('agent', text),),
    label='safe',
  )


def test_a_limit_keeps_texts_whole():
  rows = [_row(f't{i}', r) for r in ('x', 'y', 'z') for i in range(10)]
  few = limited(
    Benchmark(
      'a',
      'configurability',
      rows,
      'Rows.',
      groups=[''] * 30,
      tags={'rule': list('xyz' * 10)},
      validation=rows,
    ),
    12,
  )
  texts = [e.id.split('/')[0] for e in few.items]
  assert len(few.items) == 12 and sorted(set(texts)) == sorted(
    {t for t in texts if texts.count(t) == 3}
  )
  assert len(few.tags['rule']) == len(few.groups) == 12
  assert len(few.validation) == 12 and '12 of 30' in few.description
  same = Benchmark('a', 'configurability', rows)
  assert limited(same, 0) == same == limited(same, 30)
  groups = ['one'] * 20 + ['two'] * 10
  few = limited(dataclasses.replace(same, groups=groups), 12)
  assert len(set(few.groups)) == 1


@pytest.fixture(scope='module')
def folder(results, tmp_path_factory):
  path = tmp_path_factory.mktemp('run') / 'report'
  report.write_report(path, results, title='Oracle', summary=report.summarise(results))
  return path


def test_the_report_shows_probes_and_no_text(folder, benchmarks):
  text = (folder / 'report.md').read_text()
  for part in (
    '## Verdicts',
    '## Suffixes that try to turn a verdict',
    '**Lean**',
    '## Thresholds, for deployment',
    'unseen, by category',
    '### After temperature and bias',
    '## Where it was most wrong',
  ):
    assert part in text, part
  assert '### Table 2' not in text  # This is not the paper's data.
  files = {p.name for p in folder.glob('*.png')}
  assert {
    'policy.png',
    'contradiction.png',
    'attacks.png',
    'long_rules_recall.png',
    'levels_shares.png',
  } <= files
  # The one conversation that is meant to be seen is the only one.
  words = [
    m.content
    for b in benchmarks
    if b.name in ('unseen', 'stance')
    for e in b.items
    for m in e.conversation
    if m.role == 'agent'
  ]
  assert not [w for w in words if len(w) > 60 and w in text]


def test_stored_results_compare_like_fresh_ones(folder, results, benchmarks):
  back = report.read_results(folder)
  assert set(back) == set(results)
  stored, fresh = (r['unseen'].arrays['p_unsafe'] for r in (back, results))
  np.testing.assert_array_equal(stored, fresh)
  noisy = suites.run(_oracle(2.0, 1), benchmarks, num_samples=2)
  path = folder.parent / 'compare'
  compare.write_comparison(
    path, {'oracle': back, 'noisy | judge': noisy}, title='Two', num_samples=50
  )
  text = (path / 'report.md').read_text()
  assert '## Differences to oracle' in text and 'noisy \\| judge' in text
  assert (path / 'compare_f1.png').exists()
  with pytest.raises(ValueError, match='holds no report'):
    report.read_results(folder.parent)


def test_a_metric_that_no_scorer_has_is_not_drawn(tmp_path):
  assert not figures.draw_comparison(tmp_path / 'x.png', {'a': {'b': Result('pairs')}}, 'f1')
  assert list(tmp_path.iterdir()) == []


def test_a_missing_package_fails_its_suite_only(benchmarks, monkeypatch):
  def missing():
    raise ImportError('run "pip install -e .[evals]"')

  monkeypatch.setattr(retrieval, '_import_bm25s', missing)
  todo = [b for b in benchmarks if b.name in ('long_rules', 'flip')]
  found = suites.run(_oracle(), todo, num_samples=2)
  assert found['flip'].suite == 'flips'
  (failure,) = suites.failures(found)
  assert failure == 'long_rules: run "pip install -e .[evals]"'
