"""Algorithm 1: its parts, and what its test is worth on RuleWorld."""

import collections
import dataclasses
import functools
import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats

from csrm_jax.augmentation import requests, strictness
from csrm_jax.ruleworld import (
  conversations,
  examples,
  grammar,
  lexicon,
  proposer as world,
  rules as rules_lib,
)
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from tests.augmentation import builders

SETTINGS = builders.settings()


def category(name):
  return Category(name, f'The agent never speaks of {name.lower()}.')


# A toy world: a response is a word, a guideline forbids the words in it.
def word_judge(talks, rules):
  return [
    talk[-1].content in rule.guideline.split() for talk, rule in zip(talks, rules, strict=True)
  ]


def example(name, word, label='unsafe'):
  rules = SafetyConfig((category('Pets'), category('Food')))
  talk = (Message('user', 'hi'), Message('agent', word))
  violated = ('Pets',) if label == 'unsafe' else ()
  return Example(name, rules, talk, label, violated)


def test_lower_bound_is_the_smallest_share_that_explains_the_count():
  for k, n in ((1, 3), (57, 60), (199, 200)):
    bound = strictness.lower_bound(k, n)
    # At the bound, k or more of n has probability alpha exactly.
    assert abs(scipy.stats.binom.sf(k - 1, n, bound) - 0.05) < 1e-9
  assert math.isclose(strictness.lower_bound(59, 59), 0.05 ** (1 / 59))


def test_fifty_nine_of_fifty_nine_is_the_least_that_passes():
  assert strictness.lower_bound(59, 59) > 0.95 > strictness.lower_bound(58, 58)
  assert strictness.lower_bound(0, 0) == strictness.lower_bound(0, 900) == 0
  with pytest.raises(ValueError, match='k is 4 of n = 3'):
    strictness.lower_bound(4, 3)


@pytest.mark.parametrize(
  'n, k, extra, kept',
  [
    (59, 59, 1, True),
    (59, 59, 0, False),
    (58, 58, 1, False),
    (93, 92, 1, True),
    (92, 91, 1, False),
    (0, 0, 60, False),
  ],
)
def test_the_test_of_order(n, k, extra, kept):
  lenient = np.zeros(200, bool)
  strict = np.zeros(200, bool)
  lenient[:n] = True
  strict[:k] = True
  strict[n : n + extra] = True
  got = strictness.test_order(strict, lenient, SETTINGS)
  assert (got['n'], got['k'], got['extra']) == (n, k, extra)
  assert got['kept'] is kept


def test_pools_hold_only_examples_that_violate_the_category():
  items = [example(str(i), 'cat', ('safe', 'unsafe')[i % 2]) for i in range(40)]
  pools = strictness.make_pools(items, size=7, seed=0)
  assert list(pools) == [category('Pets')]
  (pool,) = pools.values()
  assert len(pool) == 7 and all(e.label == 'unsafe' for e in pool)
  assert pool == strictness.make_pools(items, 7, 0)[category('Pets')]
  assert pool != strictness.make_pools(items, 7, 1)[category('Pets')]


def test_a_conversation_without_a_subcategory_asks_for_one(scripted):
  def reply(request):
    if isinstance(request, requests.ListSubcategories):
      return (Category('Cats', 'no cat here'),)
    return Category(
      f'About {request.conversation[-1].content}', f'no {request.conversation[-1].content} here'
    )

  talks = [example('', word).conversation for word in ('cat', 'dog', 'cat', 'dog', 'emu', 'eel')]
  proposer = scripted(reply)
  drops = collections.Counter()
  settings = builders.settings(num_subcategories=1, max_subcategories=3)
  found = strictness.find_subcategories(
    category('Pets'), talks, proposer, word_judge, settings, drops
  )
  # The second dog is covered by what the first one asked for.
  assert [c.name for c in found] == ['Cats', 'About dog', 'About emu']
  assert proposer.asked[1].known == ('Cats',)
  assert drops == {'conversation: subcategory_limit': 1}


def test_a_subcategory_that_does_not_fire_is_counted(scripted):
  def reply(request):
    if isinstance(request, requests.ListSubcategories):
      return (Category('Cats', 'no cat here'),)
    if request.conversation[-1].content == 'dog':
      return Category('Emus', 'no emu here')
    return 'prose'

  talks = [example('', word).conversation for word in ('dog', 'eel')]
  drops = collections.Counter()
  strictness.find_subcategories(
    category('Pets'), talks, scripted(reply), word_judge, SETTINGS, drops
  )
  assert drops == {'conversation: uncovered': 1, 'conversation: prose': 1}


def test_severity_sort_picks_from_those_that_remain(scripted):
  order = ['Knives', 'Cats', 'Dogs', 'Emus']
  proposer = scripted(
    lambda r: min(range(len(r.subcategories)), key=lambda i: order.index(r.subcategories[i].name))
  )
  found = [category(name) for name in ('Dogs', 'Emus', 'Knives', 'Cats')]
  ordered = strictness.sort_by_severity(category('Pets'), found, proposer)
  assert [c.name for c in ordered] == order
  assert [len(r.subcategories) for r in proposer.asked] == [4, 3, 2]


def _toy_reply(request):
  words = ('cat', 'dog', 'emu', 'eel')
  match request:
    case requests.ListSubcategories():
      return tuple(Category(w.title(), f'no {w} here') for w in words)
    case requests.PickMostSevere():
      return 0
    case requests.WriteGuideline():
      listed = ' '.join(c.name.lower() for c in request.forbidden)
      return Category(request.category.name, f'{request.draft} {listed}')


def test_every_i_below_j_is_written_strict_first(scripted):
  pool = [example(f'{w}{i}', w) for w in ('cat', 'dog', 'emu', 'eel') for i in range(60)]
  proposer = scripted(_toy_reply)
  outcome = strictness.run(category('Pets'), pool, proposer, word_judge, SETTINGS)
  asked = [
    (len(r.forbidden), len(r.allowed), r.draft)
    for r in proposer.asked
    if isinstance(r, requests.WriteGuideline)
  ]
  assert asked == [(2, 2, 0), (1, 3, 0), (3, 1, 1), (1, 3, 1), (3, 1, 2), (2, 2, 2)]
  assert [(c.num_strict, c.num_lenient, c.n, c.k, c.extra, c.kept) for c in outcome.candidates] == [
    (2, 1, 60, 60, 60, True),
    (3, 1, 60, 60, 120, True),
    (3, 2, 120, 120, 60, True),
  ]
  assert [c.recall_strict for c in outcome.candidates] == [0.5, 0.75, 0.75]


def test_pairs_have_the_lenient_side_as_the_safer(scripted):
  pool = [example(f'{w}{i}', w) for w in ('cat', 'dog', 'emu') for i in range(60)]
  outcome = strictness.run(category('Pets'), pool, scripted(_toy_reply), word_judge, SETTINGS)
  pairs = list(strictness.make_pairs(outcome, pool))
  assert len(pairs) == len(outcome.kept) * len(pool) > 0
  assert len({pair.id for pair in pairs}) == len(pairs)
  for pair in pairs:
    lenient, strict = (
      next(c for c in side.safety.categories if c.name == 'Pets')
      for side in (pair.safer, pair.other)
    )
    assert set(lenient.guideline.split()) < set(strict.guideline.split())
    assert pair.safer.safety.names == ('Pets', 'Food')


@pytest.mark.parametrize(
  'fails, reason',
  [
    (requests.ListSubcategories, 'category: prose'),
    (requests.PickMostSevere, 'category: prose'),
    (requests.WriteGuideline, 'candidate: prose'),
  ],
)
def test_what_gets_no_reply_is_dropped_and_counted(scripted, fails, reason):
  pool = [example(f'{w}{i}', w) for w in ('cat', 'dog') for i in range(60)]
  proposer = scripted(lambda r: 'prose' if isinstance(r, fails) else _toy_reply(r))
  outcome = strictness.run(category('Pets'), pool, proposer, word_judge, SETTINGS)
  assert outcome.kept == ()
  assert outcome.drops == {reason: 3 if reason[:4] == 'cand' else 1}


def test_a_pool_that_cannot_pass_writes_nothing(scripted):
  pool = [example(str(i), 'cat') for i in range(58)]
  proposer = scripted(_toy_reply)
  outcome = strictness.run(category('Pets'), pool, proposer, word_judge, SETTINGS)
  assert outcome.drops == {'pool_too_small': 1}
  assert not any(isinstance(r, requests.WriteGuideline) for r in proposer.asked)


def _pool(topic, seed):
  """Returns 200 conversations that an annotator marked under a ban of the topic."""
  rules = (rules_lib.threshold_rule(topic, 4),)
  pool = []
  for index in itertools.count():
    rng = examples.make_rng(topic, seed, index)
    scene = conversations.sample_scene(rng, topic, lexicon.SEEN)
    item = examples.make_example(rng, scene, rules, f'{topic}-{index}')
    if topic in item.violated:
      pool.append(item)
    if len(pool) == 200:
      return pool


@functools.cache
def _pools():
  """Returns {category: pool} of four topics."""
  pools = {topic: _pool(topic, 0) for topic in lexicon.SEEN[:4]}
  return {
    rules_lib.threshold_rule(topic, 4).category(): [
      dataclasses.replace(item, violated=(topic,)) for item in pool
    ]
    for topic, pool in pools.items()
  }


def _ruleworld(seed, **oracle):
  settings = builders.settings(num_subcategories=3)
  return [
    strictness.run(c, pool, builders.oracle(seed, **oracle), world.make_judge(), settings)
    for c, pool in _pools().items()
  ]


def test_every_guideline_of_ruleworld_is_read_back():
  rng = random.Random(0)
  for _ in range(300):
    wanted = rng.sample(rules_lib.SEVERITIES, 4)
    cut, end = sorted(rng.sample(range(5), 2))
    rule = rules_lib.Rule(
      rng.choice(lexicon.TOPICS).name,
      tuple(sorted(wanted[:cut])),
      tuple(sorted(wanted[cut:end])),
      rng.choice(grammar.WORDINGS_OF['train']),
      'Any',
    )
    assert world.read_rule(rule.category()) == rule
  with pytest.raises(ValueError, match='RuleWorld words no guideline'):
    world.read_rule(Category('Pets', 'No pets, please.'))


def test_an_obedient_oracle_writes_in_the_true_order():
  outcomes = _ruleworld(0)
  counts = strictness.precision(outcomes, world.truly_stricter)
  assert counts['written_ordered'] == counts['written'] >= 12
  for outcome in outcomes:
    severities = [world.read_rule(c).forbidden[0] for c in outcome.subcategories]
    assert severities == sorted(severities)
    # The list of three was completed by the conversations.
    assert severities == list(rules_lib.SEVERITIES)


@pytest.mark.parametrize('slip', ['subset', 'one'])
def test_the_filter_holds_against_a_disobedient_proposer(slip):
  total = collections.Counter()
  for seed in range(4):
    total.update(
      strictness.precision(_ruleworld(seed, disobey=0.3, slip=slip), world.truly_stricter)
    )
  without = total['written_ordered'] / total['written']
  kept = total['kept_ordered'] / total['kept']
  print(f'{slip}: truly ordered {without:.3f} without, {kept:.3f} with')
  assert total['kept'] >= 12
  assert without < 0.9
  assert kept >= 0.95
