"""Prompts that share their first tokens: each is found again, and nothing is read twice."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from csrm_jax.data import features, pipeline, sharing
from csrm_jax.data.features import Atom, BatchShape, Encoder, Prompt
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig

# Of two tokens, so that prompts share much by chance.
PROMPTS = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=8), min_size=1, max_size=8)


def arrays(prompts):
  return [np.array(prompt, np.int32) for prompt in prompts]


def path(ends, last):
  """Returns the places that the token at `last` may attend to, itself included."""
  return [s for s in range(last + 1) if last < ends[s]]


@settings(max_examples=200, deadline=None)
@given(PROMPTS)
def test_every_prompt_is_what_its_last_token_attends_to(prompts):
  prompts = arrays(prompts)
  read = sharing.walk(prompts)
  for prompt, last in zip(prompts, read.last, strict=True):
    seen = path(read.ends, last)
    np.testing.assert_array_equal(read.tokens[seen], prompt)
    np.testing.assert_array_equal(read.positions[seen], np.arange(len(prompt)))
  # Each prefix is read once.
  prefixes = {tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)}
  assert len(read.tokens) == len(prefixes) == sharing.num_read(prompts)
  for owner, token, position in zip(read.owners, read.tokens, read.positions, strict=True):
    assert prompts[owner][position] == token


@given(PROMPTS)
def test_without_sharing_prompts_stand_one_after_another(prompts):
  prompts = arrays(prompts)
  read = sharing.walk(prompts, share=False)
  np.testing.assert_array_equal(read.tokens, np.concatenate(prompts))
  np.testing.assert_array_equal(read.last, np.cumsum([len(p) for p in prompts]) - 1)
  np.testing.assert_array_equal(read.ends, 1 + read.last[read.owners])


def random_atoms(num, rng):
  """Atoms of one or two prompts, under one of a few rules, with a common opening."""
  opening = np.full(5, 7, np.int32)
  rules = [rng.integers(10, 99, 20, dtype=np.int32) for _ in range(3)]
  atoms = []
  for i in range(num):
    prefix = np.concatenate([opening, rules[rng.integers(3)], rng.integers(10, 99, 8)])
    sides = [np.concatenate([prefix, rng.integers(10, 99, rng.integers(4, 20))]) for _ in range(2)]
    sides = [side.astype(np.int32) for side in sides[: rng.integers(1, 3)]]
    kind = 'pair' if len(sides) == 2 else 'example'
    atoms.append(Atom(tuple(Prompt(side, i % 2, f'atom{i}') for side in sides), kind))
  return atoms


def unpack(batch):
  """Returns {(row, slot): tokens} of what verdicts attend to."""
  found = {}
  for row, slot in np.argwhere(batch['verdict_index'] > 0).tolist():
    seen = path(batch['ends'][row], batch['verdict_index'][row, slot])
    found[row, slot] = batch['tokens'][row, seen]
    assert np.array_equal(batch['positions'][row, seen], np.arange(len(seen)))
  return found


def test_packed_rows_hold_whole_atoms_and_are_full():
  atoms = random_atoms(400, np.random.default_rng(0))
  shape = BatchShape(4, 256, 24, share_prefix=True)
  left, judged, filled, places = list(range(len(atoms))), 0, 0, 0
  while len(left) > 80:
    batch, rest = features.pack_rows([atoms[i] for i in left], shape)
    rest = [left[i] for i in rest]
    taken = [atoms[i] for i in left if i not in set(rest)]
    found = unpack(batch)
    want = sorted(tuple(p.tokens) for atom in taken for p in atom.prompts)
    assert sorted(tuple(tokens.tolist()) for tokens in found.values()) == want
    assert batch['pair_weight'].sum() == sum(atom.kind == 'pair' for atom in taken)
    for row, slot in np.argwhere(batch['pair_weight'] > 0).tolist():
      sides = tuple(found[row, slot]), tuple(found[row, slot + 1])
      assert sides in {tuple(tuple(p.tokens) for p in atom.prompts) for atom in taken}
    assert ((batch['segment_ids'] > 0) == (batch['ends'] > 0)).all()
    judged += sum(map(len, found.values()))
    filled += (batch['segment_ids'] > 0).sum()
    places += batch['segment_ids'].size
    left = rest
  assert filled > 0.95 * places
  assert judged > 1.8 * filled


def test_the_oldest_atom_opens_each_row():
  atoms = random_atoms(40, np.random.default_rng(1))
  _, left = features.pack_rows(atoms, BatchShape(1, 128, 24, share_prefix=True))
  assert 0 not in left


def example(name, response='Sure .', label='safe', num_rules=4):
  rules = tuple(Category(f'Rule {i}', f'Never mention {i} .') for i in range(num_rules))
  talk = (Message('user', 'Tell me more about ' + 'it ' * 9), Message('agent', response))
  return Example(name, SafetyConfig(rules), talk, label)


def test_a_pair_counts_what_it_shares_once(tokenizer):
  pair = Pair('pair', example('a', 'Yes .'), example('b', 'No .'), 'preference')
  apart = features.encode(pair, Encoder(tokenizer, 512))
  assert apart.num_read < 0.6 * apart.length
  limit = apart.num_read
  short = features.encode(pair, Encoder(tokenizer, 512, pair_length=limit))
  whole = features.encode(pair, Encoder(tokenizer, 512, pair_length=limit, share_prefix=True))
  assert whole.length == apart.length and not whole.num_shortened
  assert isinstance(short, features.Dropped) or short.num_shortened


def test_variants_of_an_example_are_one_atom(tokenizer):
  layout = features.Layout(order='conversation_first')
  encoder = Encoder(tokenizer, 512, layout)
  augment = pipeline.make_augment(0.5, 0.0, 0.0)
  make = pipeline.make_atoms([example('a')], encoder, 0, augment, group_size=4)
  atom = make[0]
  assert (atom.kind, len(atom.prompts)) == ('example', 4)
  assert len({tuple(p.tokens) for p in atom.prompts}) > 1
  assert atom.num_read < 0.6 * atom.length
  # One variant is the example itself, drawn as ever; pairs have no variants.
  single = pipeline.make_atoms([example('a')], encoder, 0, augment)[0]
  np.testing.assert_array_equal(single.prompts[0].tokens, atom.prompts[0].tokens)
  pair = Pair('pair', example('a', 'Yes .'), example('b', 'No .'), 'preference')
  assert len(pipeline.make_atoms([pair], encoder, 0, augment, group_size=4)[0].prompts) == 2


def test_a_group_under_the_same_rules(tokenizer):
  items = [example(f'e{i}', f'Word{i} .') for i in range(6)]
  items.append(example('other rules', num_rules=3))
  items.append(Pair('pair', example('a', 'Yes .'), example('b', 'No .'), 'preference'))
  augment = pipeline.make_augment(0.5, 0.0, 0.0)
  make = pipeline.make_atoms(items, Encoder(tokenizer, 512), 0, augment, group_size=4)
  atoms = [make[i] for i in range(24)]
  sizes = [len(atom.prompts) for atom in atoms if atom.kind == 'example']
  assert max(sizes) == 4
  for atom in atoms:
    if len(atom.prompts) == 4:
      assert 'other rules' not in [prompt.id for prompt in atom.prompts]
      assert atom.num_read < 0.8 * atom.length
  # The first of a group is drawn as without one.
  single = pipeline.make_atoms(items, Encoder(tokenizer, 512), 0, augment)
  for i in range(24):
    np.testing.assert_array_equal(single[i].prompts[0].tokens, atoms[i].prompts[0].tokens)


def test_members_that_were_not_judged_under_the_new_rules_stay_out(tokenizer):
  plus = Category('Plus', 'Never say plus .')
  items = [dataclasses.replace(example(f'e{i}'), plus=plus if i == 0 else None) for i in range(4)]
  augment = pipeline.make_augment(0.0, 1.0, 0.0)
  encode = pipeline._Encode(Encoder(tokenizer, 512), augment, 8, items)
  atom = encode(items[0], np.random.default_rng(0))
  assert {prompt.id for prompt in atom.prompts} == {'e0'}


def test_variants_that_do_not_fit_are_left_out(tokenizer):
  encoder = Encoder(tokenizer, 90)
  long, short = example('long', num_rules=40), example('short', num_rules=1)
  assert len(features.encode_group([long, short, short], encoder).prompts) == 2
  dropped = features.encode_group([long, long], encoder)
  assert dropped.reason == 'rules_too_long'


@pytest.mark.parametrize('share', [False, True])
def test_resume_is_exact_with_sharing(tokenizer, share):
  layout = features.Layout(order='conversation_first')
  atoms = pipeline.make_atoms(
    [example(f'e{i}', f'Word{i} .') for i in range(9)],
    Encoder(tokenizer, 256, layout),
    0,
    pipeline.make_augment(0.5, 0.0, 0.0),
    group_size=2,
  )
  shape = BatchShape(2, 256, 12, share_prefix=share)
  one, other = (pipeline.batches(atoms, shape, prefetch=0) for _ in range(2))
  for _ in range(3):
    next(one)
  other.set_state(one.get_state())
  for _ in range(2):
    want, got = next(one), next(other)
    assert ('ends' in want) == share
    for name, x in want.items():
      np.testing.assert_array_equal(x, got[name])
