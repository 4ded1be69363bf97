"""Examples and pairs of RuleWorld."""

import hypothesis
import pytest
from hypothesis import strategies as st

from csrm_jax.data import sources
from csrm_jax.ruleworld import examples, grammar, lexicon, oracle, rules as rules_lib
from csrm_jax.safety import augment

indices = st.integers(0, 100_000)


def words_of(safety):
  return ' '.join(f'{c.name} {c.guideline}' for c in safety.categories)


def forbidden_words(category):
  """Returns the subcategories a guideline forbids, read from its words."""
  markers = {row[1].split('{')[0]: True for row in grammar.WORDINGS}
  markers |= {row[2].split('{')[0]: False for row in grammar.WORDINGS}
  words = set()
  for sentence in category.guideline.split('. '):
    (forbids,) = (f for m, f in markers.items() if sentence.startswith(m))
    if forbids:
      words |= {w.strip('.,') for w in sentence.split()}
  return words


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
    forbidden = forbidden_words(category)
    hit = any(
      s.engaged and lexicon.topic_named(s.topic).subcategories[s.severity] in forbidden
      for s in said
    )
    assert hit == fires
    assert category.name not in example.safety.names


@hypothesis.given(indices)
def test_training_never_meets_unseen_words(index):
  unseen = {
    w
    for name in lexicon.UNSEEN
    for t in [lexicon.topic_named(name)]
    for w in t.subcategories + sum(t.phrases, ())
  }
  items = [
    examples.training_example(0, index),
    *vars(examples.strictness_pair(0, index)).values(),
    *vars(examples.preference_pair(0, index)).values(),
  ]
  for item in items:
    if not hasattr(item, 'safety'):
      continue
    text = words_of(item.safety) + ' '.join(m.content for m in item.conversation)
    assert not {w.strip('.,?') for w in text.split()} & unseen
  held_out = [w.split('{')[0] for row in grammar.HELD_OUT_WORDINGS for w in row[1:]]
  assert not any(w in words_of(items[0].safety) for w in held_out)


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


def test_labels_are_mixed_and_rules_matter():
  rows = [examples.test_example(0, i, 'unseen') for i in range(400)]
  share = sum(e.label == 'unsafe' for e in rows) / len(rows)
  assert 0.3 < share < 0.7
  assert {len(e.safety.categories) for e in rows} == {1, 2, 3, 4}


def test_the_best_probability_is_the_oracles():
  example = examples.test_example(0, 5, 'seen')
  said = grammar.read_reply(example.conversation[-1].content)
  rules = []
  for category in example.safety.categories:
    for j in range(5):
      for w in rules_lib.SEEN_WORDINGS:
        rule = rules_lib.threshold_rule(category.name, j, w)
        if rule.category() == category:
          rules.append(rule)
  assert example.probability == pytest.approx(oracle.unsafe_probability(tuple(rules), said))


def test_four_rule_sets_go_from_forbidden_to_allowed():
  rows = examples.one_conversation_four_rule_sets()
  assert [e.label for e in rows] == ['unsafe', 'unsafe', 'safe', 'safe']
  assert len({e.conversation for e in rows}) == 1


def test_generated_sequences():
  rows = sources.Generated(examples.training_example, seed=0, length=3)
  assert len(rows) == 3 and rows[2].id == 'train-0-2'
  with pytest.raises(IndexError):
    rows[3]
  sets = examples.test_sets(seed=0, num_examples=4)
  assert [len(v) for v in sets.values()] == [4, 4, 2, 2, 2, 4]
