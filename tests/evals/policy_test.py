"""Evaluation of policies: values, intervals over prompts, tables, figures."""

import json

import numpy as np
import pytest
from matplotlib import image

from csrm_jax.evals import policy, report
from csrm_jax.ruleworld import policy as world
from csrm_jax.safety.schema import Prompt, Sample
from tests.evals.helpers import plain

ORACLE = policy.Oracle(world.oracle_compliance, world.oracle_safety, world.oracle_helpfulness)
JUDGES = policy.Judges(
  lambda samples: np.full(len(samples), 0.5, np.float32),
  lambda samples: np.array([1 + s.index for s in samples], np.float32),
  world.refuses,
  ORACLE,
)
SETS = ('film club', 'pet forum')


def _samples(name, write, num=12, each=2):
  """Returns samples of test prompts; write(phrase, i) -> text."""
  prompts = world.prompts(0, num, name, 'test')
  return [
    Sample(p, i, write(world.read_request(p.messages[-1].content).phrase, i), 10 + i, bool(i))
    for p in prompts
    for i in range(each)
  ]


def _decline(phrase, i):
  return f'I will not help with {phrase}.'


def _help(phrase, i):
  return f'You should try {phrase} today. Let me explain {phrase} in detail.'


def _policies(judges=JUDGES):
  return {
    title: {name: policy.judge(_samples(name, write), judges) for name in SETS}
    for title, write in (('before $x$ | y', _help), ('after', _decline))
  }


def test_values_are_products_and_fail_closed():
  samples = _samples('film club', _help)
  found = policy.judge(samples, JUDGES).values
  harmful = np.array([s.prompt.label == 'harmful' for s in samples])
  assert 0 < harmful.sum() < len(samples)
  np.testing.assert_array_equal(found['compliance'], ~harmful)
  np.testing.assert_array_equal(found['true_helpfulness'], 5)
  np.testing.assert_array_equal(found['true_cosa'], 5 * ~harmful)
  np.testing.assert_allclose(found['cosa'], [0.5 * (1 + s.index) for s in samples])
  np.testing.assert_array_equal(found['truncated'], [not s.stopped for s in samples])
  broken = policy.Judges(
    lambda samples: np.array([0.5] * (len(samples) - 1) + [np.nan]),
    JUDGES.helpfulness,
    world.refuses,
  )
  with pytest.raises(ValueError, match=r'safety: nan .*/test/0/11#1'):
    policy.judge(samples, broken)
  with pytest.raises(ValueError, match='no samples to evaluate'):
    policy.judge([], JUDGES)


def test_refusals_and_violations_are_counted_by_label():
  samples = _samples('film club', lambda phrase, i: (_decline, _help)[i](phrase, i))
  found = policy.average(policy.judge(samples, JUDGES), num_samples=20)
  assert found['refusal_benign']['value'] == 0.5
  assert found['refusal_harmful']['value'] == 0.5
  assert found['compliance_harmful']['value'] == 0.5  # of helping, none
  told_apart = [s for s in samples if s.text.startswith('I will') == (s.prompt.label == 'harmful')]
  found = policy.average(policy.judge(told_apart, JUDGES), num_samples=20)
  assert found['compliance_harmful']['value'] == 1
  assert found['helpfulness_benign']['value'] == 5
  assert found['true_helpfulness']['value'] < 5
  benign = [s for s in samples if s.prompt.label == 'benign']
  found = policy.average(policy.judge(benign, JUDGES), num_samples=20)
  assert 'refusal_harmful' not in found
  unknown = [
    Sample(Prompt(s.prompt.id, s.prompt.messages, s.prompt.safety), s.index, s.text, 1, True)
    for s in benign
  ]
  found = policy.average(policy.judge(unknown, JUDGES), num_samples=20)
  assert 'refusal_benign' not in found
  assert found['completion_length']['value'] == 1


def test_outcomes_sum_to_one_and_nonsense_is_not_safe():
  judges = policy.Judges(*(lambda samples: np.full(len(samples), 0.6),) * 2, world.refuses, ORACLE)

  def outcomes(write, stopped=True, judges=judges):
    prompts = world.prompts(0, 12, 'film club', 'test')
    asked = [world.read_request(p.messages[-1].content).phrase for p in prompts]
    rows = zip(prompts, asked, strict=True)
    samples = [Sample(p, 0, write(phrase), 3, stopped) for p, phrase in rows]
    found = policy.judge(samples, judges).values
    names = ('outcome_safe', 'outcome_unsafe', 'incapable')
    np.testing.assert_array_equal(sum(found[name] for name in names), 1)
    if 'compliance' in found:
      np.testing.assert_array_equal(found['outcome_unsafe'], 1 - found['compliance'])
    return [int(found[name].sum()) for name in names]

  broken = sum(p.label == 'harmful' for p in world.prompts(0, 12, 'film club', 'test'))
  assert 0 < broken < 12
  assert outcomes(lambda phrase: _decline(phrase, 0)) == [12, 0, 0]
  assert outcomes(lambda phrase: _help(phrase, 0)) == [12 - broken, broken, 0]
  # Compliance is 1 for all of these.
  assert outcomes(lambda phrase: '') == [0, 0, 12]
  assert outcomes(lambda phrase: 'Blah blah.') == [0, 0, 12]
  assert outcomes(lambda phrase: 'I will not help with tabby.') == [0, 0, 12]  # off topic
  # What is cut off is no excuse for what it says.
  assert outcomes(lambda phrase: _help(phrase, 0), False) == [0, broken, 12 - broken]
  blind = policy.Judges(*(lambda samples: np.full(len(samples), 0.6),) * 2, world.refuses)
  assert outcomes(lambda phrase: '', judges=blind) == [0, 0, 12]
  assert outcomes(lambda phrase: 'Blah blah.', judges=blind) == [12, 0, 0]  # nobody knows better


def test_samples_of_a_prompt_are_drawn_together():
  """Copies of the samples are no new evidence."""
  wide, narrow = (
    policy.average(policy.judge(_samples('film club', _help, num=20, each=each), JUDGES), 200)[
      'compliance'
    ]
    for each in (1, 30)
  )
  assert wide['value'] == narrow['value']
  assert (wide['low'], wide['high']) == pytest.approx((narrow['low'], narrow['high']))
  assert wide['high'] - wide['low'] > 0.3


def test_the_comparison_has_what_was_put_in():
  result = plain(policy.alignment(_policies(), num_samples=20))
  after, before = (result['policies'][name] for name in ('after', 'before $x$ | y'))
  assert list(after) == [*SETS, policy.ALL]
  assert after[policy.ALL]['compliance']['value'] == 1
  assert after[policy.ALL]['true_cosa']['value'] == 2
  assert before[policy.ALL]['true_cosa']['value'] == pytest.approx(
    np.mean([before[name]['true_cosa']['value'] for name in SETS])
  )
  assert result['metrics'] == after[policy.ALL]
  assert result['tables'][0]['header'] == ['policy', *SETS, policy.ALL]
  name = next(iter(SETS))
  one = plain(
    policy.alignment({'p': {name: policy.judge(_samples(name, _help), JUDGES)}}, num_samples=20)
  )
  assert one['tables'][0]['header'] == ['policy', name]  # `all` repeats it
  tables = {table['title']: table for table in result['tables']}
  cosa = tables['CoSA score ↑, by rule set']
  assert cosa['header'] == ['policy', *SETS, policy.ALL]
  assert [row[0] for row in cosa['rows']] == ['before $x$ | y', 'after']
  assert cosa['rows'][1][3]['value'] == 2
  difference = tables['Differences to before $x$ | y']['rows']
  by_metric = {row[1]: row for row in difference}
  assert by_metric['Helpfulness ↑'][2]['value'] == -3
  # No draw has the other sign.
  assert by_metric['Helpfulness ↑'][3] == pytest.approx(2 / 21)


def test_without_an_oracle_there_is_no_truth():
  judges = policy.Judges(JUDGES.safety, JUDGES.helpfulness, world.refuses)
  result = plain(policy.alignment(_policies(judges), num_samples=20))
  assert not any('true' in name or name == 'compliance' for name in result['metrics'])
  titles = [table['title'] for table in result['tables']]
  assert titles[0] == 'CoSA reward ↑, by rule set' and len(titles) == 7
  with pytest.raises(ValueError, match="step 0 has no metric 'compliance'"):
    policy.overoptimisation({0: result['metrics']})


def test_policies_must_be_asked_the_same():
  policies = _policies()
  policies['after'] = dict(reversed(policies['after'].items()))
  with pytest.raises(ValueError, match="'after' was asked under the rule set"):
    policy.alignment(policies)
  policies = _policies()
  policies['after']['film club'] = policy.judge(_samples('film club', _help, num=11), JUDGES)
  with pytest.raises(ValueError, match=r'film club: .* different prompts'):
    policy.alignment(policies)
  with pytest.raises(ValueError, match='no policy'):
    policy.alignment({})


def test_the_frontier_is_what_nothing_beats():
  points = [(1, 1), (2, 1), (0, 3), (1, 2), (2, 1), (1, 1.5)]
  assert policy.frontier(points) == [False, True, True, True, True, False]


def _curve(values, width=0.1):
  return [{'value': v, 'low': v - width, 'high': v + width, 'best': None} for v in values]


@pytest.mark.parametrize(
  'proxy, oracle, want',
  [
    ([1, 2, 3, 4], [1, 2, 3, 4], None),  # both rise
    ([1, 2, 3, 4], [1, 3, 2, 1], 10),  # the truth falls
    ([1, 2, 3, 4], [1, 3, 2.9, 2.85], None),  # within its interval
    ([1, 4, 3, 2], [1, 3, 2, 1], None),  # the reward falls too
    ([1, 2, 3, 4], [1, 3, 2.9, 3.5], None),  # and it comes back
    ([1, 2, 3, 4], [3, 2, 1, 4], 0),  # from the start, though it comes back
    ([2, 1, 3, 4], [1, 2, 1, 1], 10),
  ],
)
def test_where_reward_and_truth_part(proxy, oracle, want):
  assert policy.parting_step((0, 10, 20, 30), _curve(proxy), _curve(oracle)) == want


def test_without_intervals_they_do_not_part():
  falls = [metric | {'low': None, 'high': None} for metric in _curve([1, 3, 2, 1])]
  assert policy.parting_step((0, 10, 20, 30), _curve([1, 2, 3, 4]), falls) is None


def _measured(safety, helpfulness):
  return {
    name: _curve([value], 0.02)[0]
    for name, value in (
      ('safety', safety),
      ('compliance', safety),
      ('helpfulness', helpfulness),
      ('true_helpfulness', helpfulness),
      ('cosa', safety * helpfulness),
      ('true_cosa', safety * helpfulness),
    )
  }


def test_the_report_shows_all_of_it(tmp_path):
  points = [
    {'method': 'CSRM', 'a': a, 'b': b, 'metrics': _measured(0.6 + 0.1 * a, 4 - a - b)}
    for a, b in ((0.5, 0), (1, 0), (2, 0), (1, 1))
  ]
  points.append({'method': 'unaligned', 'a': None, 'b': None, 'metrics': _measured(0.5, 3.5)})
  history = {
    step: _measured(0.5 + step / 100, 4)
    | {'compliance': _curve([0.7 - abs(step - 20) / 100], 0.03)[0]}
    for step in range(0, 50, 10)
  }
  results = {
    'policy': policy.alignment(_policies(), num_samples=20, description='test prompts'),
    'sweep': policy.pareto(points),
    'training': policy.overoptimisation(history),
  }
  assert results['sweep'].values['true']
  assert [p['frontier'] for p in results['sweep'].values['points']] == [
    True,
    True,
    True,
    False,
    False,
  ]
  parted = {
    name: curve['parting_step'] for name, curve in results['training'].values['curves'].items()
  }
  assert parted == {'safety': 20, 'helpfulness': None, 'cosa': None}
  path = report.write_report(
    tmp_path / 'report', results, title='A policy', summary=report.summarise(results)
  )
  text = path.read_text()
  for part in (
    '## Policies',
    '## Safety against helpfulness',
    '## Reward and truth over training',
    'before \\$x\\$ \\| y',
    '| safety | 20 |',
    '| CSRM | 0.5 | 0 |',
  ):
    assert part in text
  for name in ('policy', 'sweep', 'training'):
    pixels = image.imread(path.parent / f'{name}.png')
    assert pixels.shape[0] > 300 and pixels[..., :3].std() > 0.05
  summary = json.loads((path.parent / 'summary.json').read_text())
  assert summary['policy/true_cosa'] == 2
