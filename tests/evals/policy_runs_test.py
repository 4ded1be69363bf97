import pytest

from csrm_jax.evals import policy, report
from csrm_jax.evals.policy import ALL


def _run(reward, rules, seed, cosa, a=1.0, b=0.0, algorithm='grpo'):
  def measured(value):
    values = {
      'true_cosa': value,
      'cosa': value,
      'compliance': value / 5,
      'safety': value / 5,
      'true_helpfulness': 4.0,
      'helpfulness': 4.0,
      'refusal_benign': 0.1,
      'completion_length': 9.0,
      'truncated': 0.0,
    }
    return {
      n: {'value': v, 'low': v - 0.1, 'high': v + 0.1, 'best': None} for n, v in values.items()
    }

  return policy.Run(
    algorithm,
    reward,
    rules,
    seed,
    a,
    b,
    {'unaligned': measured(1.0), 'best of 4': measured(1.5), 'aligned': measured(cosa)},
  )


def _grid():
  return [
    _run(reward, rules, seed, cosa + 0.1 * seed + extra)
    for reward, cosa in (('full', 3.0), ('blind', 2.0))
    for rules, extra in (('club', 0.0), ('bank', 0.5))
    for seed in range(3)
  ]


def test_a_row_a_method_a_column_a_rule_set():
  found = policy.compare_runs(_grid())
  assert list(found) == ['alignment']
  policies = found['alignment'].values['policies']
  assert list(policies) == [
    'unaligned',
    'best of 4, full',
    'best of 4, blind',
    'grpo, full',
    'grpo, blind',
  ]
  full = policies['grpo, full']
  assert list(full) == ['club', 'bank', ALL]
  assert full['club']['true_cosa']['value'] == pytest.approx(3.1)
  assert full[ALL]['true_cosa']['value'] == pytest.approx(3.35)
  # Over seeds, of which each has both rule sets: 3.25, 3.35 and 3.45.
  half = 4.302653 * 0.1 / 3**0.5
  assert full[ALL]['true_cosa']['low'] == pytest.approx(3.35 - half, abs=1e-5)


def test_differences_are_of_runs_with_the_same_rules_and_seed():
  runs = _grid()
  lone = [r for r in runs if r.reward == 'full' or r.seed == 1]
  *_, table = policy.compare_runs(lone)['alignment'].tables
  assert table.title.endswith('grpo, full minus …')
  name, num, higher, gap, _ = table.rows[-1]
  assert (name, num, higher) == ('grpo, blind', 1, '2 of 2')
  assert gap['value'] == pytest.approx(1.0)
  *_, table = policy.compare_runs(runs, 'grpo, blind')['alignment'].tables
  by_name = {row[0]: row[1:] for row in table.rows}
  # Three seeds under two rule sets are three units.
  assert by_name['grpo, full'][:2] == [3, '0 of 6']
  assert by_name['unaligned'][2]['value'] == pytest.approx(1.35)
  assert by_name['unaligned'][3] < 0.01
  with pytest.raises(ValueError, match=r"method 'x'.*grpo, full"):
    policy.compare_runs(runs, 'x')


def test_a_mean_over_all_rules_needs_all_rules(tmp_path):
  runs = [r for r in _grid() if (r.reward, r.rules) != ('blind', 'bank')]
  found = policy.compare_runs(runs)
  assert found['alignment'].values['policies']['grpo, blind'][ALL] == {}
  text = report.write_report(tmp_path / 'report', found, title='T', summary={}).read_text()
  assert 'grpo, blind' in text
  assert (tmp_path / 'report' / 'alignment.png').exists()


def test_sweeps_are_points_and_not_rows():
  runs = [*_grid()[:3], _run('full', 'club', 0, 4.0, a=2.0), _run('full', 'club', 1, 4.2, a=2.0)]
  found = policy.compare_runs(runs)
  assert found['alignment'].counts['num_examples'] == 3
  points = {(p['method'], p['a']): p for p in found['pareto'].values['points']}
  assert set(points) == {('unaligned', None), ('grpo, full', 1.0), ('grpo, full', 2.0)}
  assert points['grpo, full', 2.0]['safety']['value'] == pytest.approx(0.82)
  assert list(policy.compare_runs(runs[3:])) == ['alignment']


def test_the_same_run_twice_is_an_error():
  with pytest.raises(ValueError, match=r"two runs.*'grpo, full'.*seed 0"):
    policy.compare_runs([*_grid(), _grid()[0]])
