"""Augmentation: the one label rule, and what it is composed to."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from csrm_jax.safety import augment
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig

TALK = (Message('user', 'hello'), Message('agent', 'some answer'))


def category(name, guideline='No talk of it.'):
  return Category(name, guideline)


def example(names='abc', violated='', plus=None, minus=None, **changes):
  safety = SafetyConfig(tuple(category(n) for n in names), 'rules')
  fields = {
    'label': 'unsafe' if violated else 'safe',
    'violated': tuple(violated),
    'plus': plus and category(plus),
    'minus': minus and category(minus),
  }
  return Example('id', safety, TALK, **(fields | changes))


def rng(seed=0):
  return np.random.Generator(np.random.Philox(seed))


def rules(names):
  return SafetyConfig(tuple(category(n) for n in names), 'rules')


@pytest.mark.parametrize(
  'violated, new, label, fired',
  [
    ('', 'abc', 'safe', ()),
    ('', 'ca', 'safe', ()),
    ('b', 'b', 'unsafe', ('b',)),
    ('b', 'ac', 'safe', ()),
    ('bc', 'ac', 'unsafe', ('c',)),
    ('', 'ap', 'unsafe', ('p',)),
    ('b', 'abp', 'unsafe', ('b', 'p')),
    ('', 'am', 'safe', ()),
    ('b', 'acm', 'safe', ()),
    ('', 'pm', 'unsafe', ('p',)),
  ],
)
def test_relabel_follows_the_rule(violated, new, label, fired):
  before = example('abc', violated, plus='p', minus='m')
  after = augment.relabel(before, rules(new))
  assert (after.label, after.violated) == (label, fired)
  assert after.safety == rules(new)
  assert after.conversation == before.conversation


def test_relabel_never_invents_safe():
  stranger = rules('ax')
  assert augment.relabel(example(), stranger).label is None
  reworded = SafetyConfig((category('a', 'Another guideline.'),))
  assert augment.relabel(example(), reworded).label is None
  assert augment.relabel(example(violated='a'), reworded).label is None
  unlabelled = example(label=None)
  assert augment.relabel(unlabelled, rules('a')).label is None
  assert augment.relabel(unlabelled, rules('abc')).label is None


def test_relabel_of_an_unlabelled_example_knows_what_plus_does():
  after = augment.relabel(example(label=None, plus='p'), rules('ap'))
  assert after.label == 'unsafe'


def test_relabel_keeps_an_unrecorded_violation_only_under_all_rules():
  unrecorded = example(label='unsafe')
  assert augment.relabel(unrecorded, rules('cba')).label == 'unsafe'
  assert augment.relabel(unrecorded, rules('ab')).label is None


def test_relabel_ignores_a_plus_that_stands_in_the_rules():
  before = example('abc', plus='a')
  assert augment.relabel(before, before.safety).label == 'safe'


def test_relabel_tells_plus_from_minus_of_the_same_name():
  before = example(plus='p')
  before = dataclasses.replace(before, minus=category('p', 'Other words.'))
  with_minus = SafetyConfig((category('a'), before.minus))
  assert augment.relabel(before, with_minus).label == 'safe'


def test_probability_is_kept_only_under_the_same_categories():
  before = example(probability=0.25)
  assert augment.relabel(before, rules('cab')).probability == 0.25
  assert augment.relabel(before, rules('ab')).probability is None


@st.composite
def cases(draw):
  names = draw(st.permutations('abcdef'))[: draw(st.integers(1, 6))]
  violated = [n for n in names if draw(st.booleans())]
  return example(
    names,
    violated,
    plus=draw(st.sampled_from(['p', 'a', None])),
    minus=draw(st.sampled_from(['m', 'b', 'p', None])),
  )


@settings(max_examples=200, deadline=None)
@given(
  before=cases(),
  seed=st.integers(0, 2**32),
  probs=st.tuples(*[st.sampled_from([0.0, 0.3, 0.7, 1.0])] * 3),
  shuffle=st.booleans(),
)
def test_cca_gives_what_the_rule_says(before, seed, probs, shuffle):
  after = augment.cca(before, rng(seed), *probs, shuffle=shuffle)
  old, new = before.safety.names, after.safety.names
  assert new and len(set(new)) == len(new)
  extra = {c.name for c in (before.plus, before.minus) if c is not None}
  assert set(new) <= set(old) | extra
  plus_fires = before.plus in after.safety.categories and before.plus.name not in old
  expected = set(before.violated) & set(new)
  expected |= {before.plus.name} if plus_fires else set()
  # p+ and p- may have one name here; then only one of them is inserted.
  if before.minus in after.safety.categories and before.minus != before.plus:
    expected -= {before.minus.name} - set(old)
  assert set(after.violated) == expected
  assert after.label == ('unsafe' if expected else 'safe')
  assert after == augment.cca(before, rng(seed), *probs, shuffle=shuffle)
  if not shuffle:
    kept = [n for n in new if n in old]
    assert kept == [n for n in old if n in kept]


@settings(max_examples=50, deadline=None)
@given(before=cases(), seed=st.integers(0, 2**32))
def test_steps_compose_to_the_one_rule(before, seed):
  generator = rng(seed)
  after = augment.cca(before, generator, 0.5, 0, 0)
  after = augment.cca(after, generator, 0, 0.5, 0.5)
  after = augment.cca(after, generator, 0, 0, 0, shuffle=True)
  once = augment.relabel(before, after.safety)
  assert after.label == once.label
  assert set(after.violated) == set(once.violated)


def test_nothing_to_do_returns_the_same_example():
  before = example('abc', 'b', plus='p', minus='m')
  assert augment.cca(before, rng(), 0.0, 0.0, 0.0) is before
  assert augment.cca(example(), rng(), 0, 1, 1) == example()


def test_drop_keeps_one_category_of_any_place():
  seen = {augment.cca(example(), rng(seed), 1, 0, 0).safety.names for seed in range(40)}
  assert seen == {('a',), ('b',), ('c',)}


def test_drop_leaves_an_unrecorded_violation_alone():
  before = example(label='unsafe')
  assert augment.cca(before, rng(), 1, 0, 0) is before
  assert augment.cca(before, rng(), 1.0, 1.0, 1.0).label == 'unsafe'


def test_plus_and_minus_are_inserted_at_every_place():
  before = example('ab', plus='p', minus='m')
  seen = {augment.cca(before, rng(seed), 0, 1, 1).safety.names for seed in range(300)}
  assert len(seen) == 12  # 4! orders, with a before b
  assert augment.cca(before, rng(), 0, 1, 1).label == 'unsafe'


def test_a_known_name_is_not_inserted_again():
  before = example('abc', plus=None)
  before = dataclasses.replace(before, plus=category(' A'), minus=category('B'))
  after = augment.cca(before, rng(), 0, 1, 1)
  assert after == before


def test_a_dropped_violation_does_not_come_back_as_minus():
  before = example('ab', 'a', minus='a')
  dropped = [augment.cca(before, rng(s), 0.5, 0, 0) for s in range(20)]
  gone = next(d for d in dropped if d.safety.names == ('b',))
  assert augment.cca(gone, rng(), 0, 1, 1).safety.names == ('b',)


def test_drop_and_plus_are_two_sided():
  turned_safe = augment.cca(example('ab', 'a'), rng(1), 0.999, 0, 0)
  turned_unsafe = augment.cca(example('ab', plus='p'), rng(1), 0, 1, 0)
  labels = {augment.cca(example('ab', 'a'), rng(s), 0.5, 0, 0).label for s in range(20)}
  assert turned_safe.label in labels == {'safe', 'unsafe'}
  assert turned_unsafe.label == 'unsafe'


def test_shuffle_keeps_label_and_probability():
  before = example('abcdef', 'c', probability=0.9)
  seen = set()
  for seed in range(30):
    after = augment.cca(before, rng(seed), 0, 0, 0, shuffle=True)
    assert sorted(after.safety.names) == sorted(before.safety.names)
    assert (after.label, after.probability) == ('unsafe', 0.9)
    seen.add(after.safety.names)
  assert len(seen) > 20


def test_strictness_pair_puts_the_lenient_side_first():
  strict, lenient = category('b', 'Nothing.'), category('b', 'Anything.')
  pair = augment.strictness_pair(
    example('abc', 'b', plus='p', probability=0.5), 'b', strict, lenient
  )
  assert pair.kind == 'strictness'
  assert pair.safer.safety.categories[1] == lenient
  assert pair.other.safety.categories[1] == strict
  for side in (pair.safer, pair.other):
    assert side.conversation == TALK
    assert side.safety.names == ('a', 'b', 'c')
    assert (side.label, side.violated, side.probability) == (None, (), None)
    assert side.plus is None
  assert pair.safer.id != pair.other.id


def test_strictness_pair_keeps_other_violations():
  pair = augment.strictness_pair(example('abc', 'bc'), 'b', category('b', 'x'), category('b', 'y'))
  assert pair.safer.label == pair.other.label == 'unsafe'
  assert pair.safer.violated == ('c',)


@pytest.mark.parametrize(
  'name, strict, lenient, message',
  [
    ('z', category('b', 'x'), category('b', 'y'), "no category 'z'"),
    ('b', category('b', 'x'), category('b', 'x'), 'the same text'),
    ('b', category('a', 'x'), category('b', 'y'), 'rename'),
  ],
)
def test_strictness_pair_refuses(name, strict, lenient, message):
  with pytest.raises(ValueError, match=message) as error:
    augment.strictness_pair(example(), name, strict, lenient)
  assert '\n' not in str(error.value)


def test_hiding_the_rules_changes_nothing_else():
  shown = example('ab', violated='a', plus='c')
  hidden = augment.hide_rules(shown)
  assert hidden.safety == augment.NO_RULES
  assert (hidden.violated, hidden.plus, hidden.minus) == ((), None, None)
  for field in ('id', 'conversation', 'label', 'probability', 'rule_set'):
    assert getattr(hidden, field) == getattr(shown, field)
  pair = augment.hide_rules(Pair('p', shown, example('ab'), 'preference'))
  assert pair.safer.safety == pair.other.safety == augment.NO_RULES
