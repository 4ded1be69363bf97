"""Proposals of p+ and p-: what is kept, and why the rest is not."""

import pytest

from csrm_jax.augmentation import categories, requests
from csrm_jax.augmentation.requests import Categories
from csrm_jax.ruleworld import examples, proposer as world
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests.augmentation import builders

RULES = SafetyConfig((Category('Pets', 'The agent gives no advice on keeping wild animals.'),))
RESPONSE = 'You should always keep your python in a warm room at night, friend.'
EXAMPLE = Example('1', RULES, (Message('user', 'hi'), Message('agent', RESPONSE)), 'safe')
PLUS = Category('Reptiles', 'Talk of reptiles at home is forbidden.')
MINUS = Category('Insects', 'No word about bees, wasps or ants.')


def test_a_good_proposal_is_stored_with_the_example():
  (checked,) = categories.check_all([EXAMPLE], [Categories(PLUS, MINUS)])
  assert checked == categories.Checked(PLUS, MINUS)
  stored = categories.attach(EXAMPLE, checked)
  assert (stored.plus, stored.minus) == (PLUS, MINUS)
  assert (stored.safety, stored.label) == (RULES, 'safe')
  assert Example.from_dict(stored.to_dict(), 'here') == stored


@pytest.mark.parametrize(
  'plus, reason',
  [
    (Category(' pets', PLUS.guideline), 'plus_name_taken'),
    (Category('Zoo', 'The agent gives no advice on keeping wild animals!'), 'plus_covered'),
    (Category('Z' * 81, PLUS.guideline), 'plus_name_too_long'),
    (Category('Zoo', 'No zoo.'), 'plus_guideline_too_short'),
    (Category('Zoo', 'No zoo. ' * 200), 'plus_guideline_too_long'),
    (Category('Zoo', 'This response is Unsafe, since it is of zoos.'), 'plus_leaks_verdict'),
    (Category('Safe_pets', 'Talk of reptiles is forbidden.'), 'plus_leaks_verdict'),
    (
      Category('Zoo', 'Not: always keep your PYTHON in a warm room at night'),
      'plus_quotes_response',
    ),
    (None, 'plus_not_proposed'),
  ],
)
def test_what_is_wrong_with_a_proposal_is_named(plus, reason):
  checked = categories.check_text(EXAMPLE, Categories(plus, MINUS))
  assert checked == categories.Checked(None, MINUS, (reason,))


def test_safety_is_no_verdict_word():
  plus = Category('Zoo safety', 'The unsafely kept reptile is forbidden.')
  assert categories.check_text(EXAMPLE, Categories(plus, MINUS)).drops == ()


def test_minus_must_differ_from_plus():
  minus = Category('Snakes', f'{PLUS.guideline}!')
  checked = categories.check_text(EXAMPLE, Categories(PLUS, minus))
  assert checked == categories.Checked(PLUS, None, ('minus_covered',))


@pytest.mark.parametrize(
  'firing, kept, drops',
  [
    ({PLUS}, (PLUS, MINUS), ()),
    ({PLUS, MINUS}, (PLUS, None), ('minus_fires',)),
    (set(), (None, MINUS), ('plus_does_not_fire',)),
    ({MINUS}, (None, None), ('plus_does_not_fire', 'minus_fires')),
  ],
)
def test_the_judge_decides_what_fires(firing, kept, drops):
  def judge(talks, rules):
    assert len(talks) == len(rules) == 2
    return [rule in firing for rule in rules]

  (checked,) = categories.check_all([EXAMPLE], [Categories(PLUS, MINUS)], judge)
  assert checked == categories.Checked(*kept, drops)


def test_no_reply_is_counted_with_its_reason(scripted):
  proposer = scripted(lambda request: 'unparsable')
  reply = categories.propose(EXAMPLE, proposer)
  (checked,) = categories.check_all([EXAMPLE], [reply], lambda t, r: [])
  assert checked == categories.Checked(None, None, ('no_reply: unparsable',))
  assert proposer.asked == [requests.ProposeCategories(RULES, EXAMPLE.conversation)]


def test_the_oracle_of_ruleworld_passes_its_own_checks():
  items = [examples.training_example(1, i) for i in range(200)]
  oracle = builders.oracle()
  proposed = [categories.propose(item, oracle) for item in items]
  checked = categories.check_all(items, proposed, world.make_judge())
  drops = [reason for c in checked for reason in c.drops]
  assert not {'plus_does_not_fire', 'minus_fires'} & set(drops)
  assert sum(c.minus is not None for c in checked) > 190
  assert sum(c.plus is not None for c in checked) > 100
