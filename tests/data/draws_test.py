"""Examples drawn from judged texts: labels are what people said, shares as asked, offsets exact."""

import collections
import math

import numpy as np
import pytest
import yaml

from csrm_jax.data import draws, judged
from csrm_jax.safety.schema import Message, Pair

NUM = 200


@pytest.fixture
def items(tmp_path, monkeypatch):
  """Texts of which a tenth break the rule `rare`, a half `common`, and the nested two by level."""

  def rule(name, **more):
    texts = [{'name': f'{name} {i}', 'guideline': f'No {name}, please: {i}.'} for i in range(5)]
    return {'wordings': texts, 'held': [{'name': name, 'guideline': f'Never any {name}.'}]} | more

  rules = {
    'rare': rule('rare'),
    'common': rule('common'),
    'any': rule('any'),
    'strong': rule('strong', within='any'),
    'hidden': rule('hidden', unseen='0'),
    'never': rule('never', unseen='always'),
  }
  # A name of its own: rules are read once in a process.
  name = tmp_path.name
  (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(rules))
  monkeypatch.setattr(judged, 'FOLDER', tmp_path)
  found = []
  for i in range(NUM):
    level = i % 4
    shares = {'rare': i % 10 == 0, 'common': i % 2, 'any': level > 0, 'strong': level > 2}
    shares |= {'hidden': i % 3 == 0, 'never': i % 3 == 0}
    if i % 5 == 0:
      del shares['common']  # nobody judged it
    talk = Message('user', f'Question {i}?'), Message('agent', f'Answer {i}.')
    verdicts = {f'{name}/{key}': float(share) for key, share in shares.items()}
    found.append(judged.Judged(f'{i}', talk, verdicts, f'question {i}', name))
  return found


def _draw(items, num=400, **options):
  draw = draws.Draw(items, draws.Options(**options))
  return [draw(0, i) for i in range(num)]


def _key(category):
  return category.name.split(' ')[0]


def _check(example, items):
  """Checks the label against what was judged of the text."""
  number = int(example.conversation[0].content.removeprefix('Question ').removesuffix('?'))
  known = {key.partition('/')[2]: share for key, share in items[number].verdicts.items()}
  keys = [_key(c) for c in example.safety.categories]
  assert example.label == ('unsafe' if any(known.get(key) for key in keys) else 'safe')
  # Under a rule that nobody judged a text is never called safe.
  assert example.label == 'unsafe' or all(key in known for key in keys)


@pytest.mark.parametrize('order', ['rules_first', 'conversation_first'])
def test_labels_are_what_people_said(items, order):
  keys = collections.Counter()
  for group in _draw(items, order=order, group_size=4):
    for example in group.examples:
      _check(example, items)
      keys.update(_key(c) for c in example.safety.categories)
    shared = 'safety' if order == 'rules_first' else 'conversation'
    assert len({getattr(example, shared) for example in group.examples}) == 1
  assert set(keys) == {'rare', 'common', 'any', 'strong', 'hidden'}
  assert 'hidden' not in {
    _key(c) for g in _draw(items, fold='0') for c in g.examples[0].safety.categories
  }


def test_each_rule_has_the_share_of_unsafe_examples(items):
  labels = collections.defaultdict(list)
  for group in _draw(items, num=2000, unsafe=0.4):
    (example,) = group.examples
    if len(example.safety.categories) == 1:
      labels[_key(example.safety.categories[0])].append(example.label == 'unsafe')
  for share in labels.values():
    assert np.mean(share) == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / len(share)))


def test_the_offset_takes_the_draw_out_of_the_odds(items):
  for group in _draw(items, unsafe=0.4):
    (example,), (offset,) = group
    if [_key(c) for c in example.safety.categories] == ['rare']:
      rate = (NUM / 10 + 1) / (NUM + 2)
      natural = math.log((1 - rate) / rate)
      assert offset == pytest.approx(math.log(0.6 / 0.4) - natural)
      break
  else:
    pytest.fail('the rule was never drawn alone')


def test_pairs_are_of_nested_rules_and_one_text(items):
  pairs = [item for item in _draw(items, pairs=0.5) if isinstance(item, Pair)]
  assert 150 < len(pairs) < 250
  for pair in pairs:
    assert pair.safer.conversation == pair.other.conversation
    assert _key(pair.safer.safety.categories[0]) == 'strong'
    assert _key(pair.other.safety.categories[0]) == 'any'


def test_an_element_follows_from_its_index(items):
  draw = draws.Draw(items, draws.Options(group_size=3, pairs=0.2, noise=0.5))
  assert [draw(1, i) for i in (5, 2)] == [draw(1, i) for i in (5, 2)]
  assert draw(1, 5) != draw(2, 5)


def test_noise_keeps_the_text(items):
  changed = 0
  for group in _draw(items, noise=0.5):
    (example,) = group.examples
    number = example.conversation[0].content.removeprefix('Question ').removesuffix('?')
    assert f'Answer {number}.' in example.conversation[-1].content
    changed += example.conversation[-1].content != f'Answer {number}.'
  assert 150 < changed < 250


def test_a_rule_that_tells_nothing_apart_is_refused(items):
  same = [judged.Judged(i.id, i.conversation, dict.fromkeys(i.verdicts, 1.0), i.group, i.source)
          for i in items]  # fmt: skip
  with pytest.raises(ValueError, match='no rule has texts that break it and texts that keep it'):
    draws.Draw(same, draws.Options())


def test_sides_split_by_the_last_request(items):
  kept, rest = draws.split(items, ('train', 'dev'))
  assert {item.side for item in kept} == {'train', 'dev'}
  assert {item.side for item in rest} == {'test'}


def test_an_unknown_fold_is_refused():
  with pytest.raises(ValueError, match=r'judged\.fold'):
    draws.Options(fold="'0'")
