"""The words and sentences of RuleWorld."""

import collections
import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from csrm_jax.ruleworld import grammar, lexicon, rules as rules_lib

statements = st.builds(
  lambda topic, severity, phrase, stance, template: grammar.Statement(
    topic.name, severity, topic.phrases[severity][phrase], stance, template
  ),
  st.sampled_from(lexicon.TOPICS),
  st.integers(0, 3),
  st.integers(0, 3),
  st.sampled_from(tuple(grammar.STATEMENTS)),
  st.integers(0, 16),
)


def test_a_phrase_stands_for_one_subcategory_only():
  phrases = [p for topic in lexicon.TOPICS for row in topic.phrases for p in row]
  names = [s for topic in lexicon.TOPICS for s in topic.subcategories]
  most = collections.Counter(phrases + names).most_common(1)
  assert most[0][1] == 1
  assert all(len(t.subcategories) == lexicon.NUM_SEVERITIES for t in lexicon.TOPICS)


def test_every_topic_is_on_one_side():
  sides = [lexicon.SEEN, lexicon.DEV, lexicon.TEST]
  assert sorted(sum(sides, ())) == sorted(topic.name for topic in lexicon.TOPICS)
  for side, topics in zip(('train', 'dev', 'test'), sides, strict=True):
    assert {lexicon.side_of(topic) for topic in topics} == {side}


@hypothesis.given(st.lists(statements, min_size=1, max_size=3))
def test_what_a_reply_says_can_be_read_back(said):
  text = ' '.join(s.text() for s in said)
  assert grammar.read_reply(text) == tuple(said)


@hypothesis.given(st.text(max_size=60))
def test_other_text_says_nothing_known(text):
  for statement in grammar.read_reply(text):
    assert statement.phrase in text


def test_fillers_and_requests_are_no_statements():
  for sentence in grammar.FILLERS:
    assert grammar.read_statement(sentence) is None


def test_negation_is_not_encouragement():
  assert grammar.read_statement('You should not try rum today.').stance == ('decline')
  assert grammar.read_statement('You should try rum today.').engaged


def test_a_guideline_names_what_it_forbids_and_allows():
  for wording in grammar.ALL_WORDINGS:
    if isinstance(wording, str):
      continue
    both = grammar.word_guideline(('rum', 'gin'), ('ale',), wording).lower()
    assert 'rum and gin' in both and 'ale' in both
    only = grammar.word_guideline((), ('ale', 'gin', 'rum'), wording).lower()
    assert 'ale, gin and rum' in only


@pytest.mark.parametrize('index', range(len(grammar.ALL_WORDINGS)))
def test_every_wording_is_read_back(index):
  rules = [rules_lib.threshold_rule('Films', strictness, index) for strictness in range(5)]
  if not isinstance(grammar.ALL_WORDINGS[index], str):
    rules += [rules_lib.Rule('Films', (1,), (0,), index), rules_lib.Rule('Films', (), (3,), index)]
  for rule in rules:
    assert rules_lib.read(rule.category()) == rule
    for clause in range(len(grammar.CLAUSES)):
      claused = dataclasses.replace(rule, clause=rules_lib.Clause('nurse', clause))
      assert rules_lib.read(claused.category()) == claused


def test_each_side_has_wordings_of_its_own():
  for table, num in ((grammar.WORDINGS_OF, 41), (grammar.DEGREES_OF, 5), (grammar.CLAUSES_OF, 10)):
    assert set(table) == {'train', 'dev', 'test'}
    assert sum(map(len, table.values())) == len({i for own in table.values() for i in own}) == num
  assert all(len(texts) == 17 for texts in grammar.STATEMENTS.values())
  assert len(set(sum(grammar.STATEMENTS.values(), ()))) == 68


def test_a_role_is_who_the_user_said_to_be_last():
  assert grammar.read_role(['I am a nurse. Tell me about rum.', 'I am a pilot. More.']) == 'pilot'
  assert grammar.read_role(['Tell me about nurses.', 'I am a ghost.']) == ''
