"""RuleWorld's probes are what they say, by the oracle's own reading."""

import pytest

from csrm_jax.evals import metrics, probes as suites, report
from csrm_jax.evals.suites import run
from csrm_jax.ruleworld import grammar, lexicon, probes

NUM = 30


def test_one_rule_is_broken_and_only_that_one_changes():
  for index in range(NUM):
    item = probes.policy(0, index)
    assert tuple(item) == suites.POLICY
    strict = item['strict']
    (target,) = strict.violated
    names = strict.safety.names
    assert strict.label == 'unsafe' and strict.probability >= 0.5
    assert len({e.conversation for e in item.values()}) == 1
    assert item['leave_one_out'].safety.names == tuple(n for n in names if n != target)
    assert item['allow'].safety.names == names
    for name in ('leave_one_out', 'allow'):
      assert item[name].label == 'safe' and item[name].probability < 0.5
    for name in ('other_left_out', 'other_allowed'):
      assert item[name].violated == (target,)
    changed = [
      n
      for n, a, b in zip(
        names, strict.safety.categories, item['allow'].safety.categories, strict=True
      )
      if a != b
    ]
    assert changed == [target]


def test_contradictions_hold_both_clauses_in_either_order():
  for index in range(NUM):
    item = probes.contradiction(0, index)
    assert tuple(item) == suites.CONTRADICTION
    (target,) = item['enforce'].violated
    place = item['enforce'].safety.names.index(target)
    clauses = {n: e.safety.categories[place].guideline for n, e in item.items()}
    assert clauses['enforce_allow'] == (f'{clauses["enforce"]} {clauses["allow"]}')
    assert clauses['allow_enforce'] == (f'{clauses["allow"]} {clauses["enforce"]}')
    assert item['allow'].label == 'safe'
    assert item['enforce_allow'].label is None


def test_wordings_and_levels_keep_what_is_true():
  labels = set()
  for index in range(NUM):
    item = probes.wordings(0, index)
    assert len({e.probability for e in item.values()}) == 1
    assert len({e.label for e in item.values()}) == 1
    texts = [e.safety.digest() for n, e in item.items() if n != 'original']
    assert len(set(texts)) == len(grammar.WORDINGS_OF['dev'])
    levels = probes.strictness_levels(0, index)
    assert len(levels) == lexicon.NUM_SEVERITIES + 1
    assert len({e.conversation for e in levels}) == 1
    truth = [e.label == 'unsafe' for e in levels]
    # Stricter rules never make an unsafe reply safe.
    assert truth == sorted(truth)
    labels.add(tuple(truth))
  assert len(labels) > 2


def test_stances_and_choices():
  for index in range(NUM):
    example = probes.stance(0, index)
    (statement,) = grammar.read_reply(example.conversation[-1].content)
    assert statement.engaged == (example.label == 'unsafe')
    assert example.label == ('safe' if index % 2 else 'unsafe')
    choice = probes.choice(0, index)
    assert choice.num_correct == 1 and len(choice.responses) == 4
    assert [e.label for e in choice.responses] == ['safe', 'unsafe', 'unsafe', 'unsafe']
    assert len({e.conversation[:-1] for e in choice.responses}) == 1
    assert len({e.safety for e in choice.responses}) == 1


def test_only_who_asks_makes_the_difference():
  for index in range(NUM):
    pair = probes.history(0, index)
    sides = pair.safer, pair.other
    assert [e.label for e in sides] == ['safe', 'unsafe']
    assert len({e.safety for e in sides}) == len({e.conversation[1:] for e in sides}) == 1
    roles = [grammar.read_role([e.conversation[0].content]) for e in sides]
    assert all(roles) and roles[0] != roles[1]


def test_long_rules_name_what_they_forbid():
  labels = []
  for index in range(NUM):
    example = probes.long_rules(0, index)
    assert len(example.safety.categories) > 5
    roles = [m.role for m in example.conversation]
    assert roles == ['user', 'agent'] * (len(roles) // 2)
    for category in example.safety.categories:
      topic, severity = next(
        (t, i)
        for t in lexicon.TOPICS
        for i, s in enumerate(t.subcategories)
        if s.capitalize() == category.name and t.name in lexicon.DEV
      )
      said = category.guideline.replace(',', '').rstrip('.').split()
      named = [p for p in topic.phrases[severity] if p in said]
      assert len(named) == 3
    labels.append(example.label)
    assert (example.label == 'unsafe') == bool(example.violated)
  assert {'safe', 'unsafe'} == set(labels)


def test_everything_is_a_function_of_seed_and_index():
  for make in (
    probes.policy,
    probes.contradiction,
    probes.wordings,
    probes.history,
    probes.strictness_levels,
    probes.stance,
    probes.choice,
    probes.long_rules,
    probes.drift,
    probes.trajectory,
  ):
    assert make(1, 2) == make(1, 2)
    assert make(1, 2) != make(1, 3) and make(1, 2) != make(2, 2)


def test_validation_rows_are_in_no_test_set():
  sets = {b.name: b for b in probes.benchmarks(0, 20)}
  tested = {e.id for e in (*sets['seen'].items, *sets['unseen'].items)}
  assert not tested & {e.id for e in sets['seen'].validation}
  assert sets['unseen'].without_rules
  with pytest.raises(ValueError):
    type(sets['seen'])('a', 'pairs', [1], groups=['x', 'y'])


def test_levels_of_severity_are_measured(tmp_path):
  todo = probes.basic_benchmarks(0, 120)
  unseen = next(b for b in todo if b.name == 'unseen')
  assert set(unseen.tags['severity']) == {
    'nothing engaged',
    *(f'severity {i}' for i in range(lexicon.NUM_SEVERITIES)),
  }
  assert not next(b for b in todo if b.name == 'flip').tags
  knows = run(
    lambda rows: metrics.log_odds_safe(metrics.probability_of(rows)), [unseen], num_samples=5
  )
  found = knows['unseen']
  assert found.metrics['level_error']['value'] < 1e-5
  assert found.metrics['level_correlation']['value'] == pytest.approx(1)
  text = report.write_report(tmp_path / 'r', knows, title='T', summary={}).read_text()
  assert 'Probabilities within levels of severity' in text
