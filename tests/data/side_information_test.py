"""Weights, ratings, strengths and ties, from a file's columns to the batch."""

import json

import numpy as np
import pytest

from csrm_jax.data import features, forms
from csrm_jax.safety import augment
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig

RULES = SafetyConfig((Category('Funds', 'No funds.'), Category('Pets', 'No pets.')))


def example(text='fine', label='safe', **fields):
  return Example(text, RULES, (Message('agent', text),), label, **fields)


def pair(**fields):
  return Pair('p', example('good', None), example('bad one', None), 'preference', **fields)


def read(tmp_path, *rows, name='rows.jsonl', **options):
  path = tmp_path / name
  if name.endswith('csv'):
    path.write_text('\n'.join(rows))
  else:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return forms.read(path, RULES, **options)


def pack(tokenizer, items, encoder=None, **shape):
  encoder = encoder or features.Encoder(tokenizer, 200)
  atoms = [features.encode(item, encoder) for item in items]
  shape = features.BatchShape(1, 600, 8, **shape)
  return features.pack_rows(atoms, shape)[0]


def test_rows_come_back_as_they_were_written_and_old_ones_stay_as_they_were():
  plain = example(), pair()
  rich = (
    example(weight=2.0, ratings={'b': 1, 'a': 0.5}),
    pair(weight=0.5, strength=2, soft=0.9),
    pair(strength=0),
  )
  for item in (*plain, *rich):
    assert type(item).from_dict(json.loads(json.dumps(item.to_dict())), 'x') == item
  for item in plain:
    assert not set(item.to_dict()) & {'weight', 'ratings', 'strength', 'soft'}
  assert len({*rich, *plain}) == 5 and rich[0].ratings == (('a', 0.5), ('b', 1.0))
  assert rich[2].is_tie and not rich[1].is_tie and not plain[1].is_tie


@pytest.mark.parametrize(
  'make, said',
  [
    (lambda: example(weight=-1), 'weight is -1; give a number from 0'),
    (lambda: example(weight=float('nan')), 'weight is nan'),
    (lambda: example(ratings={'a': 'high'}), "rating 'a' is 'high'; give a finite number"),
    (lambda: example(ratings=[1]), '"ratings" is a list of 1; write an object'),
    (lambda: pair(strength=-1), 'strength is -1'),
    (lambda: pair(soft=1.1), 'soft is 1.1; give a number from 0 up to 1'),
  ],
)
def test_bad_numbers_are_one_line(make, said):
  with pytest.raises(ValueError, match=said):
    make()


def test_columns_of_ones_own_and_of_others(tmp_path):
  talk = [{'role': 'user', 'content': 'Which?'}, {'role': 'assistant', 'content': 'The red one.'}]
  own = {'conversation': talk, 'label': 'safe', 'weight': 3, 'ratings': {'help': 4}}
  (item,) = read(tmp_path, own)
  assert (item.weight, item.ratings) == (3, (('help', 4.0),))
  # In data of others a weight may be a person's: it counts if it is named.
  other = {'messages': talk, 'label': 'safe', 'weight': 82, 'help': 2, 'severity': 1}
  (item,) = read(tmp_path, other)
  assert (item.weight, item.ratings) == (1, ())
  columns = {'weight': 'weight', 'ratings': 'help+severity'}
  (item,) = read(tmp_path, other, columns=columns)
  assert (item.weight, item.ratings) == (82, (('help', 2.0), ('severity', 1.0)))
  chosen = {'prompt': 'Which?', 'chosen': 'Ask.', 'rejected': 'Red.', 'gap': 0, 'soft': 0.7}
  (item,) = read(tmp_path, chosen, columns={'strength': 'gap'})
  assert item.is_tie and item.soft == 1
  with pytest.raises(ValueError, match=r'columns.ratings=help\+size: no such column'):
    read(tmp_path, other, columns={'ratings': 'help+size'})
  rows = 'prompt,response,label,stars,w', 'Which?,Red.,safe,4,0.5', 'Which?,Blue.,safe,,2'
  found = read(tmp_path, *rows, name='r.csv', columns={'ratings': 'stars+w', 'weight': 'w'})
  assert [e.ratings for e in found] == [(('stars', 4.0), ('w', 0.5)), (('w', 2.0),)]
  assert [e.weight for e in found] == [0.5, 2]


def test_a_row_that_is_rated_needs_no_label(tmp_path):
  row = {'conversation': [{'role': 'agent', 'content': 'Hi.'}], 'ratings': {'help': 4}}
  assert read(tmp_path, row, require_label=True)[0].label is None
  with pytest.raises(ValueError, match='no label'):
    read(tmp_path, row | {'ratings': {}}, require_label=True)


def test_without_side_information_the_batch_is_as_it_was(tokenizer):
  batch = pack(tokenizer, [example(), pair()])
  assert set(batch) == {
    *('tokens', 'segment_ids', 'positions', 'verdict_index', 'label', 'label_weight'),
    'pair_weight',
  }
  assert set(np.unique(batch['label_weight'])) == set(np.unique(batch['pair_weight'])) == {0, 1}
  # With it all that was there is the same, bit for bit.
  more = pack(tokenizer, [example(), pair()], has_order=True, num_targets=2)
  for name, array in batch.items():
    np.testing.assert_array_equal(more[name], array)
  for name in ('pair_target', 'pair_strength'):
    np.testing.assert_array_equal(more[name], batch['pair_weight'])
  assert not more['target_weight'].any()


def test_side_information_stands_at_its_slots(tokenizer):
  items = [
    example(weight=2.0, ratings={'help': 3}),
    pair(weight=0.5, strength=2, soft=0.9),
    pair(strength=0),
  ]
  encoder = features.Encoder(tokenizer, 200, targets=('severity', 'help'))
  batch = pack(tokenizer, items, encoder, has_order=True, num_targets=2)
  want = {
    'label_weight': [2, 0, 0, 0, 0, 0, 0, 0],
    'pair_weight': [0, 0.5, 0, 1, 0, 0, 0, 0],
    'pair_target': [0, 0.9, 0, 0.5, 0, 0, 0, 0],
    'pair_strength': [0, 2, 0, 0, 0, 0, 0, 0],
  }
  for name, row in want.items():
    np.testing.assert_allclose(batch[name][0], row)
  np.testing.assert_array_equal(batch['targets'][0, 0], [0, 3])
  np.testing.assert_array_equal(batch['target_weight'][0, 0], [0, 2])
  assert not batch['target_weight'][0, 1:].any()


def test_ties_are_kept_where_the_loss_knows_them_even_of_one_text(tokenizer):
  same = Pair('p', example('one', None), example('one', None), 'preference', strength=0)
  kept = features.encode(same, features.Encoder(tokenizer, 200))
  assert kept.kind == 'pair' and kept.target == 0.5
  dropped = features.encode(same, features.Encoder(tokenizer, 200, keep_ties=False))
  assert dropped.reason == 'tie'
  order = Pair('p', example('one', None), example('one', None), 'preference')
  assert features.encode(order, features.Encoder(tokenizer, 200)).reason == 'identical_pair'


def test_ratings_do_not_outlive_their_rules():
  rated = example(ratings={'severity': 2}, weight=2.0)
  fewer = SafetyConfig(RULES.categories[:1])
  assert augment.relabel(rated, fewer).ratings == () and augment.relabel(rated, fewer).weight == 2
  shuffled = SafetyConfig(RULES.categories[::-1])
  assert augment.relabel(rated, shuffled).ratings == rated.ratings
