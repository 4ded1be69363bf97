"""Examples and pairs of RuleWorld."""

import functools
import itertools
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from csrm_jax.data import sources
from csrm_jax.ruleworld import examples, grammar, lexicon, oracle, rules as rules_lib
from csrm_jax.safety import augment

indices = st.integers(0, 100_000)


@hypothesis.given(indices)
def test_examples_depend_on_seed_and_index_only(index):
  assert examples.training_example(3, index) == examples.training_example(3, index)
  assert examples.training_example(3, index) != examples.training_example(4, index)


@hypothesis.given(indices)
def test_proposals_do_what_they_say(index):
  example = examples.training_example(0, index)
  said = grammar.read_reply(example.conversation[-1].content)
  for category, fires in ((example.plus, True), (example.minus, False)):
    if category is None:
      continue
    assert oracle.violates(rules_lib.read(category), said) == fires
    assert category.name not in example.safety.names


def own_words(topics):
  return {
    word
    for topic in map(lexicon.topic_named, topics)
    for word in (topic.name.lower(), *topic.subcategories, *sum(topic.phrases, ()))
  }


def pattern(template):
  """Returns the template as a regular expression; case does not matter."""
  text = re.sub(r'\\{[xmw]\\}', r'\\w+', re.escape(template)).replace(r'\{r\}', r'\w+s')
  return re.compile(re.sub(r'\\{[fa]\\}', r'[\\w, ]+', text), re.IGNORECASE)


# What only tests of a side may say, as regular expressions of whole sentences.
@functools.cache
def held_out_texts(side):
  wordings = [grammar.ALL_WORDINGS[i] for i in grammar.WORDINGS_OF[side]]
  return [
    pattern(text)
    for text in (
      *(text for wording in wordings for text in wording),
      *(grammar.ALL_WORDINGS[i] for i in grammar.DEGREES_OF[side]),
      *(grammar.CLAUSES[i][1] for i in grammar.CLAUSES_OF[side]),
      *(texts[i] for texts in grammar.STATEMENTS.values() for i in grammar.TEMPLATES_OF[side]),
    )
  ]


def texts_of(item):
  """Returns the guidelines and turns of an example or a pair."""
  for example in (item,) if hasattr(item, 'safety') else (item.safer, item.other):
    yield from (f'{c.name}. {c.guideline}' for c in example.safety.categories)
    yield from (c.guideline for c in (example.plus, example.minus) if c)
    yield from (m.content for m in example.conversation)


def sentences_of(text):
  sentences = [s.strip() for s in re.findall(r'[^.?!]+[.?!]', text)]
  return [*sentences, *map(' '.join, itertools.pairwise(sentences))]


@hypothesis.given(indices, st.sampled_from(tuple(examples.TRAINING)))
def test_training_knows_nothing_that_tests_keep(index, source):
  kept = own_words(lexicon.DEV + lexicon.TEST)
  held_out = held_out_texts('dev') + held_out_texts('test')
  for text in texts_of(examples.TRAINING[source](0, index)):
    assert not kept & set(re.findall(r'\w+', text.lower()))
    for sentence in sentences_of(text):
      assert not any(pattern.fullmatch(sentence) for pattern in held_out), sentence


@hypothesis.given(indices)
def test_the_development_side_knows_nothing_of_the_tests(index):
  kept, held_out = own_words(lexicon.TEST), held_out_texts('test')
  splits = [split for split in examples.SPLITS if not split.startswith('test/')]
  for split in splits:
    items = [
      examples.test_example(0, index, split),
      examples.strictness_pair(0, index, split),
      *examples.flip_pair(0, index, split),
    ]
    for text in (text for item in items for text in texts_of(item)):
      assert not kept & set(re.findall(r'\w+', text.lower()))
      for sentence in sentences_of(text):
        assert not any(pattern.fullmatch(sentence) for pattern in held_out), sentence


@hypothesis.given(indices, st.sampled_from(('seen', 'unseen')))
def test_strictness_pairs_are_ordered(index, split):
  pair = examples.strictness_pair(0, index, split)
  assert pair.safer.conversation == pair.other.conversation
  assert pair.safer.probability < pair.other.probability
  changed = sum(
    a != b for a, b in zip(pair.safer.safety.categories, pair.other.safety.categories, strict=True)
  )
  assert changed == 1


@hypothesis.given(indices)
def test_flips_keep_the_conversation_and_change_the_label(index):
  a, b = examples.flip_pair(0, index, 'unseen')
  assert a.conversation == b.conversation
  assert {a.label, b.label} == {'safe', 'unsafe'}


def test_without_the_rules_flips_are_a_coin_toss():
  """Whatever is known of the conversation, half of the verdicts are wrong."""
  flips = [examples.flip_pair(0, i, 'unseen') for i in range(200)]

  def best_blind(conversation):
    # The label that the conversation's own text makes likelier, memorised
    # from the very rows it is tested on.
    labels = [e.label for pair in flips for e in pair if e.conversation == conversation]
    return max(('safe', 'unsafe'), key=labels.count)

  correct = [best_blind(e.conversation) == e.label for pair in flips for e in pair]
  assert sum(correct) == len(correct) // 2
  # And hiding the rules makes the two sides one and the same input.
  assert all(augment.hide_rules(a).safety == augment.hide_rules(b).safety for a, b in flips)


@pytest.mark.parametrize('split', examples.SPLITS)
def test_labels_are_mixed_and_graded(split):
  rows = [examples.test_example(0, i, split) for i in range(600)]
  share = sum(e.label == 'unsafe' for e in rows) / len(rows)
  assert 0.2 < share < 0.45
  assert {len(e.safety.categories) for e in rows} == {1, 2, 3, 4, 6, 8}
  assert sum(0.1 < e.probability < 0.9 for e in rows) / len(rows) > 0.3


@hypothesis.given(indices, st.sampled_from(tuple(examples.SPLITS)))
def test_the_best_probability_is_the_oracles(index, split):
  example = examples.test_example(0, index, split)
  said = grammar.read_reply(example.conversation[-1].content)
  role = grammar.read_role(m.content for m in example.conversation if m.role == 'user')
  rules = tuple(map(rules_lib.read, example.safety.categories))
  assert rules_lib.make_safety(rules) == example.safety
  assert example.probability == pytest.approx(oracle.unsafe_probability(rules, said, role))


def test_rules_by_degree_name_one_subcategory_each():
  for i in range(50):
    example = examples.degree_example(0, i, 'new_topics')
    for category in example.safety.categories:
      named = [w for w in re.findall(r'\w+', category.guideline) if w in lexicon.SUBCATEGORIES]
      assert len(named) == 1 and rules_lib.read(category).topic in lexicon.DEV


def test_who_asks_is_said_before_the_last_turn():
  rows = [examples.test_example(0, i, 'unseen') for i in range(600)]
  roles = [grammar.read_role(m.content for m in e.conversation[:-2]) for e in rows]
  assert all(not grammar.read_role([e.conversation[-2].content]) for e in rows)
  assert 0.1 < sum(map(bool, roles)) / len(rows) < 0.5


@pytest.mark.parametrize('side', examples.SIDES)
def test_four_rule_sets_go_from_forbidden_to_allowed(side):
  rows = examples.one_conversation_four_rule_sets(side)
  assert [e.label for e in rows] == ['unsafe', 'unsafe', 'safe', 'safe']
  assert len({e.conversation for e in rows}) == 1


def test_generated_sequences():
  rows = sources.Generated(examples.training_example, seed=0, length=3)
  assert len(rows) == 3 and rows[2].id == 'train-0-2'
  with pytest.raises(IndexError):
    rows[3]
  sets = examples.test_sets(seed=0, num_examples=4)
  assert [len(v) for v in sets.values()] == [4, 4, 4, 4, 2, 2, 2, 2, 4]
