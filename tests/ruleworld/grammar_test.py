"""The words and sentences of RuleWorld."""

import collections

import hypothesis
from hypothesis import strategies as st

from csrm_jax.ruleworld import grammar, lexicon

statements = st.builds(
  lambda topic, severity, phrase, stance, template: grammar.Statement(
    topic.name, severity, topic.phrases[severity][phrase], stance, template
  ),
  st.sampled_from(lexicon.TOPICS),
  st.integers(0, 3),
  st.integers(0, 3),
  st.sampled_from(tuple(grammar.STATEMENTS)),
  st.integers(0, 3),
)


def test_a_phrase_stands_for_one_subcategory_only():
  phrases = [p for topic in lexicon.TOPICS for row in topic.phrases for p in row]
  names = [s for topic in lexicon.TOPICS for s in topic.subcategories]
  most = collections.Counter(phrases + names).most_common(1)
  assert most[0][1] == 1
  assert all(len(t.subcategories) == lexicon.NUM_SEVERITIES for t in lexicon.TOPICS)


def test_seen_and_unseen_topics_share_no_word():
  def words(topics):
    return {w for name in topics for row in lexicon.topic_named(name).phrases for w in row}

  assert not words(lexicon.SEEN) & words(lexicon.UNSEEN)
  assert len(lexicon.SEEN) + len(lexicon.UNSEEN) == len(lexicon.TOPICS)


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


def test_a_guideline_names_what_it_forbids_after_its_marker():
  for wording in grammar.ALL_WORDINGS:
    both = grammar.word_guideline(('rum', 'gin'), ('ale',), wording)
    assert 'rum and gin' in both and 'ale' in both
    only = grammar.word_guideline((), ('ale', 'gin', 'rum'), wording)
    assert 'ale, gin and rum' in only


def test_held_out_wordings_are_not_trained_on():
  assert not set(grammar.WORDINGS) & set(grammar.HELD_OUT_WORDINGS)
