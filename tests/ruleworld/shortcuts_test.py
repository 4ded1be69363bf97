"""What judges reach that do not read the rules, and that it is not too much."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from csrm_jax.ruleworld import __main__ as main, examples, shortcuts

NUM_ROWS = 1000


@pytest.fixture(scope='module')
def found():
  return shortcuts.measure(num_rows=NUM_ROWS, num_samples=0)


def value(found, tier, judge, metric):
  return found['tiers'][tier]['judges'][judge][metric]['value']


CHECKS = [*(f'F1 of {judge}' for judge in shortcuts.GATED), f'AUPRC of {shortcuts.BLIND}']


@pytest.mark.parametrize('check', CHECKS)
def test_no_shortcut_comes_far_on_unseen_topics_and_wordings(found, check):
  assert check not in found['gate'], found['gate'][check]


def test_the_gate_holds_where_shortcuts_fail(found):
  def tiers(f1, auprc):
    judges = {judge: {'f1': {'value': f1}, 'auprc': {'value': auprc}} for judge in shortcuts.GATED}
    judges[shortcuts.ORACLE] = {'f1': {'value': 1.0}, 'auprc': {'value': 1.0}}
    return {'both': {'base_rate': 0.4, 'judges': judges}}

  assert not shortcuts.gate(tiers(0.7, 0.45))
  assert set(shortcuts.gate(tiers(0.71, 0.46))) == set(CHECKS)


@pytest.mark.parametrize('tier', shortcuts.TIERS)
def test_who_knows_more_judges_better(found, tier):
  def f1(judge):
    return value(found, tier, judge, 'f1')

  base = found['tiers'][tier]['base_rate']
  assert f1('all unsafe') == pytest.approx(2 * base / (1 + base))
  assert f1(shortcuts.BLIND) < f1('topic name, usual severity') < f1('lookup, letter')
  assert f1('lookup of the last turn, letter') < f1('lookup, letter')
  assert f1('lookup, letter') <= f1(shortcuts.ORACLE) + 0.03
  # Verdicts without degrees are not calibrated.
  calibrated = value(found, tier, shortcuts.ORACLE, 'smece')
  assert value(found, tier, 'two constants, letter', 'smece') > calibrated + 0.01
  assert calibrated < 0.04


def test_judges_see_what_they_are_said_to_see():
  rows = [examples.test_example(5, index, 'unseen') for index in range(40)]
  others = [examples.test_example(6, index, 'unseen').safety for index in range(40)]
  swapped = [
    dataclasses.replace(row, safety=safety, violated=())
    for row, safety in zip(rows, others, strict=True)
  ]
  train = [examples.test_example(7, index, 'seen') for index in range(200)]
  for name, fit in shortcuts.JUDGES.items():
    judge = fit(train)
    same = np.array_equal(judge(rows), judge(swapped))
    # The oracle's answer stands in the row.
    assert same == (name in ('all unsafe', shortcuts.BLIND, shortcuts.ORACLE)), name


def test_the_lookup_knows_the_letter():
  for index in range(60):
    first, second = examples.flip_pair(0, index, 'unseen')
    judged = shortcuts.JUDGES['lookup, letter']([])([first, second])
    assert list(judged) == [first.label == 'unsafe', second.label == 'unsafe']


def test_the_command_prints_tables_and_writes_json(capsys, monkeypatch, tmp_path):
  small = {'seed': 1, 'num_rows': 30, 'num_samples': 2}
  measure = shortcuts.measure
  monkeypatch.setattr(shortcuts, 'measure', lambda num_rows, side: measure(**small, side=side))
  monkeypatch.setattr(sys, 'argv', ['ruleworld', f'--shortcuts={tmp_path / "s.json"}'])
  main.main()
  out = capsys.readouterr().out
  assert '| F1 ↑ | seen | new conversations | new topics | new wordings | both |' in out
  stored = json.loads((tmp_path / 's.json').read_text())
  assert set(stored['tiers']['both']['judges']) == set(shortcuts.JUDGES)
  monkeypatch.setattr(sys, 'argv', ['ruleworld', '--shortcuts'])
  main.main()
  out = capsys.readouterr().out
  assert json.loads(out[out.index('{\n') :]) == stored
