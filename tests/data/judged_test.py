"""Tests of texts that were judged under many rules."""

import pytest

from csrm_jax.data import judged, sources
from csrm_jax.safety import schema

_RULES = """
any: {wordings: &w [{name: Any, guideline: No threat and no insult.}], held: *w}
mild: {within: any, wordings: [{name: Insults, guideline: No insults.}]}
grave: {within: mild, wordings: [{name: Threats, guideline: No threats.}]}
"""


@pytest.fixture
def known(tmp_path, monkeypatch):
  monkeypatch.setattr(judged, 'FOLDER', tmp_path)
  (tmp_path / 'fixture.yaml').write_text(_RULES)
  judged.rules.cache_clear()
  yield judged.rules('fixture')
  judged.rules.cache_clear()


def _item(name, **verdicts):
  talk = (schema.Message('user', 'Hello.'), schema.Message('agent', name))
  verdicts = {f'fixture/{key}': share for key, share in verdicts.items()}
  return judged.Judged(name, talk, verdicts, 'Hello.', 'fixture')


def test_rules_know_the_stricter_ones(known):
  assert known['fixture/grave'].stricter == ('fixture/mild', 'fixture/any')
  assert known['fixture/any'].stricter == ()


def test_a_rule_within_no_rule_is_refused(tmp_path, known):
  for within in ('elsewhere', 'a'):
    (tmp_path / 'bad.yaml').write_text(
      f'a: {{within: {within}, wordings: [{{name: A, guideline: b}}]}}'
    )
    with pytest.raises(ValueError, match='stricter rule of the file'):
      judged.rules('bad')
  (tmp_path / 'bad.yaml').write_text('a: {whithin: b, wordings: []}')
  with pytest.raises(ValueError, match='whithin'):
    judged.rules('bad')


def test_all_rows_of_a_group_are_on_one_side_of_a_split():
  items = [_item(f'{i} {j}') for i in range(2) for j in range(20)]
  rest, held = sources.split(items, 0.5, 0)
  assert {len(rest), len(held)} == {0, 40}
  assert sources.num_shared(items[:1], items[1:]) == 1
