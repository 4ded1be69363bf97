"""Packing, mixing and exact resume of the training stream."""

import dataclasses
import functools
import gc
import json
import pickle
import threading

import grain
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from csrm_jax.data import features, pipeline
from csrm_jax.data.features import Atom, BatchShape, Dropped, Encoder, Prompt
from csrm_jax.safety import augment
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig


def make_atom(lengths, label=-1, name='atom', first=1):
  prompts = []
  for length in lengths:
    tokens = np.arange(first, first + length, dtype=np.int32)
    prompts.append(Prompt(tokens, label, name))
    first += length
  return Atom(tuple(prompts), 'pair' if len(prompts) == 2 else 'example')


def some_atoms(count, low, high, pairs=0.3, seed=0):
  rng = np.random.default_rng(seed)
  atoms = []
  for i in range(count):
    length = int(rng.integers(low, high + 1))
    lengths = [length]
    if rng.random() < pairs:
      lengths.append(max(low, min(high, length + int(rng.integers(-9, 10)))))
    atoms.append(make_atom(lengths, int(rng.integers(-1, 2)), f'atom{i}'))
  return atoms


def fill_rate(batch):
  return np.mean(batch['segment_ids'] > 0)


def unpack(batch):
  """Returns [(row, slot, tokens, label, label_weight, pair_weight)]."""
  found = []
  for row, slot in np.argwhere(batch['verdict_index'] > 0).tolist():
    own = batch['segment_ids'][row] == slot + 1
    tokens = batch['tokens'][row, own]
    positions = batch['positions'][row, own]
    end = batch['verdict_index'][row, slot]
    assert np.array_equal(positions, np.arange(len(tokens)))
    assert own[end] and not own[end + 1 :].any()
    assert own.sum() == own[end + 1 - len(tokens) : end + 1].sum()
    found.append(
      (
        row,
        slot,
        tokens,
        batch['label'][row, slot],
        batch['label_weight'][row, slot],
        batch['pair_weight'][row, slot],
      )
    )
  return found


@settings(max_examples=100, deadline=None)
@given(
  lengths=st.lists(st.lists(st.integers(2, 20), min_size=1, max_size=2), max_size=25),
  batch_size=st.integers(1, 5),
  row_length=st.integers(40, 60),
  max_segments=st.integers(2, 5),
  label=st.integers(-1, 1),
)
def test_every_atom_is_whole_in_one_row_or_left(
  lengths, batch_size, row_length, max_segments, label
):
  atoms = [make_atom(item, label, first=100 * i) for i, item in enumerate(lengths)]
  batch, left = features.pack_rows(atoms, BatchShape(batch_size, row_length, max_segments))
  assert left == sorted(left)
  for name, array in batch.items():
    by_token = name in ('tokens', 'segment_ids', 'positions')
    width = row_length if by_token else max_segments
    assert array.shape == (batch_size, width)
    assert array.dtype == (np.float32 if name.endswith('weight') else np.int32)
  slots = unpack(batch)
  place = {tokens[0]: k for k, (_, _, tokens, *_) in enumerate(slots)}
  for i, atom in enumerate(atoms):
    starts = [prompt.tokens[0] for prompt in atom.prompts]
    assert all((start in place) == (i not in left) for start in starts)
    if i in left:
      continue
    where = [slots[place[start]] for start in starts]
    for prompt, slot in zip(atom.prompts, where, strict=True):
      assert np.array_equal(slot[2], prompt.tokens)
      assert slot[3] == label
      assert slot[4] == (label >= 0)
    if len(starts) == 2:
      assert where[0][:2] == (where[1][0], where[1][1] - 1)
      assert (where[0][5], where[1][5]) == (1, 0)
    else:
      assert where[0][5] == 0
  assert len(slots) == sum(len(a.prompts) for i, a in enumerate(atoms) if i not in left)
  unused = batch['verdict_index'] == 0
  assert (batch['label'][unused] == -1).all()
  assert batch['label_weight'][unused].sum() == 0
  assert left == [] or batch['verdict_index'][:, 0].all()


def test_oldest_atoms_go_first():
  atoms = [make_atom([n]) for n in (9, 9, 9, 1, 1, 1)]
  batch, left = features.pack_rows(atoms, BatchShape(2, 10, 4))
  assert left == [2, 5]
  assert fill_rate(batch) == 1.0


def test_best_subset_fills_the_row():
  atoms = [make_atom([n]) for n in (10, 30, 25, 7, 18)]
  batch, left = features.pack_rows(atoms, BatchShape(1, 60, 8))
  assert fill_rate(batch) == 1.0
  assert left == [1]  # 10 + 25 + 7 + 18


def test_max_segments_holds_where_the_best_subset_breaks_it():
  atoms = [make_atom([2]) for _ in range(10)] + [make_atom([7])]
  batch, left = features.pack_rows(atoms, BatchShape(1, 20, 3))
  assert (batch['verdict_index'] > 0).sum() == 3
  assert 10 not in left


@pytest.mark.parametrize(
  'lengths, message', [([61], 'a row of 60'), ([9, 9], 'raise max_segments')]
)
def test_atom_that_fits_no_row_is_an_error(lengths, message):
  with pytest.raises(ValueError, match=message):
    features.pack_rows([make_atom(lengths)], BatchShape(1, 60, 1))


def test_padding_token_is_as_asked():
  batch, _ = features.pack_rows([make_atom([3])], BatchShape(2, 5, 1, pad_id=7))
  assert (batch['tokens'][batch['segment_ids'] == 0] == 7).all()


def stream(atoms, shape, **options):
  source = grain.MapDataset.source(atoms)
  return pipeline.batches(source, shape, **options)


# Where prompts are about half a row long, some rows cannot be filled.
@pytest.mark.parametrize(
  'row_length, low, high, fill',
  [(256, 60, 125, 0.9), (320, 70, 150, 0.9), (384, 100, 180, 0.9), (512, 100, 180, 0.97)],
)
def test_rows_are_full(row_length, low, high, fill):
  atoms = some_atoms(2000, low, high)
  iterator = stream(atoms, BatchShape(16, row_length, 8), prefetch=0)
  rates = [fill_rate(next(iterator)) for _ in range(20)]
  assert np.mean(rates) >= fill


def test_no_atom_waits_long():
  atoms = some_atoms(1500, 100, 180)
  iterator = stream(atoms, BatchShape(8, 512, 8), prefetch=0)
  for _ in range(25):
    read = iterator.get_state()['next']
    next(iterator)
    state = iterator.get_state()
    # An atom is handed out in at most a few batches' time.
    assert min(state['pending'], default=read) >= read - 8 * 5 * 2


def test_finite_data_end_with_every_atom_handed_out():
  atoms = some_atoms(50, 10, 30)
  iterator = stream(atoms, BatchShape(4, 64, 8))
  count = sum(len(unpack(batch)) for batch in iterator)
  assert count == sum(len(atom.prompts) for atom in atoms)
  assert iterator.num_atoms == 50


WORDS = [f'word{i}' for i in range(50)]


def some_items(count, seed=0):
  rng = np.random.default_rng(seed)

  def text(low, high):
    return ' '.join(rng.choice(WORDS, int(rng.integers(low, high))))

  examples = []
  for i in range(count):
    names = [f'{name}{i}' for name in 'abcpm']
    *rules, plus, minus = (Category(name, text(4, 9)) for name in names)
    violated = ('a' + str(i),) if i % 2 else ()
    talk = (Message('user', text(3, 9)), Message('agent', text(5, 30)))
    examples.append(
      Example(
        f'id{i}',
        SafetyConfig(tuple(rules)),
        talk,
        'unsafe' if violated else 'safe',
        violated,
        plus,
        minus,
      )
    )
  return examples


def to_pair(example, rng):
  first, *_ = example.safety.categories
  strict, lenient = (
    dataclasses.replace(first, guideline=f'{word} {rng.choice(WORDS)}')
    for word in ('nothing', 'anything')
  )
  return augment.strictness_pair(example, first.name, strict, lenient)


def full_stream(tokenizer, seed=0, prefetch=4, **options):
  encoder = Encoder(tokenizer, 90, pair_length=170)
  items = some_items(40)
  cca = functools.partial(augment.cca, drop_prob=0.3, plus_prob=0.5, minus_prob=0.5)
  atoms = pipeline.mix(
    {
      'class': pipeline.make_atoms(items, encoder, seed, cca),
      'pairs': pipeline.make_atoms(items, encoder, seed + 1, to_pair),
    },
    {'class': 0.7, 'pairs': 0.3},
  )
  shape = BatchShape(4, 180, 6)
  return pipeline.batches(atoms, shape, prefetch=prefetch, **options)


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    assert np.array_equal(one[name], other[name]), name
    assert one[name].dtype == other[name].dtype


@pytest.mark.parametrize('prefetch', [0, 1, 4])
@pytest.mark.parametrize('resumed_prefetch', [0, 3])
def test_resume_is_exact(tokenizer, prefetch, resumed_prefetch):
  whole = full_stream(tokenizer, prefetch=2)
  expected = [next(whole) for _ in range(20)]
  first = full_stream(tokenizer, prefetch=prefetch)
  for batch in expected[:10]:
    assert_same(next(first), batch)
  text = json.dumps(first.get_state())
  first.close()
  second = full_stream(tokenizer, prefetch=resumed_prefetch)
  next(second)
  second.set_state(json.loads(text))
  assert second.get_state() == json.loads(text)
  for batch in expected[10:]:
    assert_same(next(second), batch)
  assert second.get_state() == whole.get_state()


def test_state_is_that_of_the_last_batch_handed_out(tokenizer):
  slow = full_stream(tokenizer, prefetch=0)
  fast = full_stream(tokenizer, prefetch=8)
  assert fast.get_state() == slow.get_state()
  for _ in range(5):
    next(fast)
    next(slow)
    assert fast.get_state() == slow.get_state()


def test_seed_decides_the_stream(tokenizer):
  first, again, other = (next(full_stream(tokenizer, seed)) for seed in (1, 1, 2))
  assert_same(first, again)
  assert not np.array_equal(first['tokens'], other['tokens'])


def test_augmentation_differs_from_epoch_to_epoch(tokenizer):
  encoder = Encoder(tokenizer, 500)
  cca = functools.partial(augment.cca, drop_prob=0.5, plus_prob=0.5, minus_prob=0.5)
  [item] = some_items(1)
  atoms = pipeline.make_atoms([item], encoder, 0, cca)
  assert len({atoms[i].prompts[0].tokens.tobytes() for i in range(30)}) > 10
  assert np.array_equal(atoms[3].prompts[0].tokens, atoms[3].prompts[0].tokens)


def test_order_is_a_permutation_in_each_epoch(tokenizer):
  items = some_items(10)
  atoms = pipeline.make_atoms(items, Encoder(tokenizer, 500), seed=3)
  epochs = [[atoms[i].prompts[0].id for i in range(e * 10, e * 10 + 10)] for e in range(3)]
  assert all(sorted(e) == sorted(x.id for x in items) for e in epochs)
  assert epochs[0] != epochs[1]
  plain = pipeline.make_atoms(items, Encoder(tokenizer, 500), seed=3, shuffle=False)
  assert plain[12].prompts[0].id == 'id2'


def test_state_of_another_stream_is_refused(tokenizer):
  state = full_stream(tokenizer, fingerprint='data A').get_state()
  with pytest.raises(ValueError, match="fingerprint 'data A', this run has"):
    full_stream(tokenizer, fingerprint='data B').set_state(state)
  with pytest.raises(ValueError, match='pool_length'):
    full_stream(tokenizer, fingerprint='data A', look_ahead=2).set_state(state)


def test_changed_data_are_noticed():
  atoms = some_atoms(60, 10, 30)
  shape = BatchShape(2, 64, 8)
  iterator = stream(atoms, shape)
  next(iterator)
  state = iterator.get_state()
  atoms[state['pending'][0]] = Dropped('identical_pair')
  with pytest.raises(ValueError, match='the data or the code has changed'):
    stream(atoms, shape).set_state(state)


def test_drops_are_counted_by_reason():
  atoms = some_atoms(300, 10, 30, pairs=0)
  atoms[3] = atoms[8] = Dropped('identical_pair')
  atoms[5] = make_atom([65])
  atoms[6] = dataclasses.replace(atoms[6], num_shortened=4)
  iterator = stream(atoms, BatchShape(2, 64, 8))
  next(iterator)
  assert iterator.drops == {'identical_pair': 2, 'longer_than_row': 1}
  assert iterator.num_shortened == 1
  state = iterator.get_state()
  resumed = stream(atoms, BatchShape(2, 64, 8))
  resumed.set_state(state)
  next(resumed)
  assert resumed.drops == iterator.drops
  assert resumed.num_shortened == 1
  for _ in resumed:
    pass
  assert resumed.num_atoms == 297


@pytest.mark.parametrize('endless', [True, False])
def test_all_dropped_is_an_error(monkeypatch, endless):
  monkeypatch.setattr(pipeline, 'MAX_DROPPED_IN_A_ROW', 100)
  source = grain.MapDataset.source([Dropped('rules_too_long', 'id7: why')] * 9)
  atoms = source.repeat() if endless else source
  with pytest.raises(ValueError, match=r'all dropped .*rules_too_long.*id7'):
    next(pipeline.batches(atoms, BatchShape(2, 64, 8)))


def test_errors_in_the_thread_reach_the_caller(tokenizer):
  def broken(item, rng):
    raise ValueError('broken augmentation')

  atoms = pipeline.make_atoms(some_items(3), Encoder(tokenizer, 99), 0, broken)
  with pytest.raises(ValueError, match='broken augmentation'):
    next(pipeline.batches(atoms, BatchShape(2, 99, 8)))


def test_mix_keeps_the_proportions():
  parts = {name: grain.MapDataset.source([name]).repeat() for name in ('a', 'b', 'c')}
  mixed = pipeline.mix(parts, {'a': 3, 'b': 1.0, 'c': 0})
  for count in (8, 100):
    names = [mixed[i] for i in range(count)]
    assert names.count('a') == 0.75 * count
    assert 'c' not in names


@pytest.mark.parametrize(
  'weights, message',
  [
    ({'a': 1}, 'same names'),
    ({'a': 1, 'b': -1}, 'not negative'),
    ({'a': 1, 'b': float('nan')}, 'finite'),
    ({'a': 0, 'b': 0}, 'every weight is 0'),
  ],
)
def test_mix_refuses(weights, message):
  parts = {name: grain.MapDataset.source([1]).repeat() for name in 'ab'}
  with pytest.raises(ValueError, match=message):
    pipeline.mix(parts, weights)


def test_make_atoms_refuses_no_items(tokenizer):
  with pytest.raises(ValueError, match='no items'):
    pipeline.make_atoms([], Encoder(tokenizer, 9), 0)


def test_map_functions_can_be_pickled():
  encoder = Encoder(None, 9)
  for function in (pipeline._Encode(encoder), pipeline._Encode(encoder, augment.cca)):
    assert pickle.loads(pickle.dumps(function)) == function


def test_encode_takes_examples_and_pairs(tokenizer):
  [item] = some_items(1)
  encoder = Encoder(tokenizer, 500)
  pair = to_pair(item, np.random.default_rng(0))
  assert isinstance(pair, Pair)
  assert features.encode(item, encoder).kind == 'example'
  assert features.encode(pair, encoder).kind == 'pair'


def test_closing_stops_the_thread(tokenizer):
  before = set(threading.enumerate())
  iterator = full_stream(tokenizer)
  next(iterator)
  assert set(threading.enumerate()) - before
  iterator.close()
  iterator.close()
  assert not set(threading.enumerate()) - before
  with pytest.raises(ValueError, match='closed'):
    next(iterator)
  unclosed = full_stream(tokenizer)
  next(unclosed)
  del unclosed
  gc.collect()
  assert not set(threading.enumerate()) - before


def test_sets_for_tests_are_no_training_data(tmp_path):
  with pytest.raises(ValueError, match="'teen_policies' is for tests only; --config"):
    pipeline.read_part('teen_policies', str(tmp_path), 0, 0.0, {})
  # On request it is read, and only then the folder matters.
  with pytest.raises(ValueError, match='no file of teen_policies'):
    pipeline.read_part('teen_policies', str(tmp_path), 0, 0.0, {}, allow_tests=True)
