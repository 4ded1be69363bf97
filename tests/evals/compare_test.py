"""Differences have the scorer's sign, and need the same rows."""

import dataclasses

import numpy as np
import pytest

from csrm_jax.evals import compare, report
from csrm_jax.evals.results import SKIPPED, Result
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig
from tests.evals.helpers import run, sides

SAFETY = SafetyConfig((Category('Pets', 'No dogs.'),))


def _example(name, label='safe'):
  return Example(
    id=name, safety=SAFETY, label=label, conversation=(Message('agent', f'Text {name}'),)
  )


def _results(scores):
  rows = [_example(f'r{i}', ('safe', 'unsafe')[i % 2]) for i in range(40)]
  pairs = [Pair(f'p{i}', rows[i], rows[i + 1], 'strictness') for i in range(0, 40, 2)]
  return {
    'rows': run('classification', rows, scores, num_samples=2),
    'pairs': run('pairs', pairs, sides(scores[::2], scores[1::2]), num_samples=2),
    'gone': Result(SKIPPED),
  }


def test_differences_are_scorer_minus_reference():
  rng = np.random.default_rng(0)
  truth = np.where(np.arange(40) % 2, -1.0, 1.0)
  good = _results(truth + rng.normal(0, 0.5, 40))
  bad = _results(truth + rng.normal(0, 4, 40))
  rows = compare.differences({'bad': bad, 'good': good}, num_samples=200)
  assert {r['reference'] for r in rows} == {'bad'}
  assert {r['benchmark'] for r in rows} == {'rows', 'pairs'}
  found = {(r['benchmark'], r['metric']): r for r in rows}
  for key, sign in (
    (('rows', 'f1'), 1),
    (('rows', 'nll'), -1),
    (('rows', 'smece'), -1),
    (('pairs', 'accuracy'), 1),
  ):
    benchmark, metric = key
    expected = good[benchmark].metrics[metric]['value'] - bad[benchmark].metrics[metric]['value']
    assert found[key]['value'] == pytest.approx(expected), key
    assert sign * found[key]['value'] > 0, key
  assert found['rows', 'f1']['p_value'] < 0.05
  turned = compare.differences({'bad': bad, 'good': good}, 'good', num_samples=20)
  assert turned[0]['value'] == pytest.approx(-rows[0]['value'])


def test_where_there_are_seeds_the_seed_is_the_unit(tmp_path):
  truth = np.where(np.arange(40) % 2, -1.0, 1.0)
  noise = np.random.default_rng(1).normal(0, 1, (2, 4, 40))
  runs = {
    f'{name}-seed{seed}': _results(truth * scale + noise[i, seed])
    for i, (name, scale) in enumerate([('full', 1.5), ('no_cca', 0.5)])
    for seed in range(4 - i)  # One has a seed more.
  }
  rows = compare.differences(runs, 'full')
  assert {(r['scorer'], r['reference'], r['num_seeds']) for r in rows} == {('no_cca', 'full', 3)}
  (nll,) = [r for r in rows if r['metric'] == 'nll']
  values = {name: results['rows'].metrics['nll']['value'] for name, results in runs.items()}
  gaps = [values[f'no_cca-seed{seed}'] - values[f'full-seed{seed}'] for seed in range(3)]
  assert nll['value'] == pytest.approx(np.mean(gaps))
  half = 4.302653 * np.std(gaps, ddof=1) / 3**0.5  # Student's t with 2 degrees of freedom
  assert (nll['low'], nll['high']) == pytest.approx((nll['value'] - half, nll['value'] + half))
  assert compare.differences(runs, 'full-seed1') == rows
  for results in runs.values():
    del results['gone']
  text = compare.write_comparison(tmp_path / 'report', runs, title='T').read_text()
  assert 'paired t-test, the seed is the unit' in text


def test_one_seed_of_each_is_compared_over_conversations():
  one, other = _results(np.linspace(-1, 1, 40)), _results(np.linspace(1, -1, 40))
  found = compare.differences({'a-seed0': one, 'b-seed1': other}, num_samples=5)
  assert {(r['scorer'], r['num_seeds']) for r in found} == {('b-seed1', 1)}
  assert all(r['low'] <= r['value'] <= r['high'] for r in found if r['metric'] == 'f1')


def test_other_rows_are_refused():
  one = _results(np.linspace(-1, 1, 40))
  other = _results(np.linspace(-1, 1, 40))
  arrays = other['rows'].arrays
  turned = arrays | {'ids': arrays['ids'][::-1]}
  other['rows'] = dataclasses.replace(other['rows'], arrays=turned)
  with pytest.raises(ValueError, match="rows: 'b' and 'a' were scored on diff"):
    compare.differences({'a': one, 'b': other})
  with pytest.raises(ValueError, match="no scorer is called 'c'"):
    compare.differences({'a': one}, 'c')
  assert compare.differences({'a': one}) == []


def test_the_papers_figures_stand_where_it_has_them():
  of = report.PAPER['published']
  # Row by row against the table in the paper's section 6 of the protocols.
  assert of['beavertails']['CSRM'] == {'f1': 0.911, 'auprc': 0.965, 'smece': 0.017}
  assert of['cosapien']['ShieldGemma-9B'] == {'f1': 0.869, 'auprc': 0.925, 'smece': 0.156}
  assert of['wildguardmix']['DynaGuard-8B-CoT'] == {'f1': 0.793}
  assert of['dynabench'] | {} == {
    'LlamaGuard-3-8B': {'f1': 0.131},
    'Llama-3.1-8B-Inst': {'f1': 0.734},
    'ShieldGemma-9B': {'f1': 0.382},
    'DynaGuard-8B-CoT': {'f1': 0.731},
    'OSS-Safeguard-20B': {'f1': 0.664},
    'CSRM −SA': {'f1': 0.668},
    'CSRM −CCA': {'f1': 0.692},
    'CSRM': {'f1': 0.758},
  }
  assert of['safe_rlhf']['CSRM'] == {'accuracy': 0.763, 'score_gap': 1.705}
  assert of['beavertails_policy']['CSRM']['shift_allow'] == -0.708
  # Ours is not the paper's data: nothing of the paper stands beside it.
  tables = report.paper_tables({'me': _results(np.zeros(40))})
  assert [t.title for t in tables] == ['Table 2: Verdicts', 'Table 3: Pairs']
  assert [row[:2] for row in tables[0].rows] == [['rows', 'me']]


def test_metrics_are_ranked_beside_what_search_finds():
  rng = np.random.default_rng(0)
  truth, scorers = rng.permutation(8), {}
  for i, t in enumerate(truth):
    found = {'truth_best': {'value': float(t)}, 'hacking_loss': {'value': 1.0}}
    good = {'starc': {'value': -(float(t) ** 3)}, 'f1': {'value': float(i)}}
    scorers[f's{i}'] = {
      'club': Result('search', metrics=found),
      'rows': Result('classification', metrics=good),
    }
  table = compare.predictors(scorers)
  assert table.header == ('metric', 'club truth_best', 'club hacking_loss')
  rows = {row[0]: row[1:] for row in table.rows}
  assert rows['rows starc'][0]['value'] == pytest.approx(-1) and rows['rows starc'][1] is None
  # By a loop: 1 − 6 Σd² / n(n² − 1).
  rho = 1 - 6 * sum((i - int(t)) ** 2 for i, t in enumerate(truth)) / (8 * 63)
  assert rows['rows f1'][0]['value'] == pytest.approx(rho)
  assert rows['rows f1'][0]['low'] < rho < rows['rows f1'][0]['high']
  few = dict(list(scorers.items())[: compare.MIN_SCORERS - 1])
  assert compare.predictors(few) is None
