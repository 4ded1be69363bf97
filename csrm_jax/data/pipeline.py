"""The training stream: read, mix, augment, encode, pack, batch, prefetch.

Everything up to the packed batch is random access: element i of a dataset of atoms is a pure
function of i and the seed. So the only state of the stream is which index comes next and which
atoms wait for a place, and an iterator resumes exactly, in a new process and at once.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from csrm_jax.core import checks
from csrm_jax.data import catalogue, draws, features, forms, judged, sources
from csrm_jax.data.features import Atom, Batch, BatchShape, Dropped, does_not_fit, pack_rows
from csrm_jax.safety import augment as augment_lib, schema

# Atoms dropped in a row, with none kept, before the stream is given up.
MAX_DROPPED_IN_A_ROW = 10_000
# Fields of a batch's shape that say what it has beside the usual.
_OPTIONAL = ('has_offset', 'has_order', 'num_targets')
# Items looked at for each place in a group, of which those under the same rules are taken.
GROUP_TRIES = 8


# --- Sources -----------------------------------------------------------------------------


# Files of one's own; the name does not matter: their form and format are recognised.
_OWN = ('auto', 'jsonl', 'parquet')
SOURCES = (*_OWN, 'array_record', *catalogue.SETS)


def read_source(
  source: str, path: str, require_label: bool = True, **options: Any
) -> Sequence[Any]:
  """Returns the examples and pairs of a source of files; of a public set, its first split.

  Args:
    source: One of SOURCES.
    path: A file or folder; '' fetches a set from the hub.
    require_label: Refuse examples without a label in files of one's own; all other sources have
      labels.
    **options: See `forms.options`; of no use for other sources.
  """
  public_set = catalogue.SETS.get(source)
  if not path and not (public_set and public_set.is_on_hub):
    raise ValueError(
      f'data source {source!r} has no path; give path=FILE after the colon '
      'of --config, or data_dir=FOLDER for the public sets'
    )
  if public_set:
    return catalogue.read(source, next(iter(public_set.files)), path)
  if source == 'array_record':
    # This import takes a while, and needs an extra.
    from csrm_jax.data import public_sets

    return public_sets.read_prepared(path)
  return forms.read(path, require_label=require_label, **options)


def read_part(
  source: str,
  path: str,
  seed: int,
  eval_fraction: float,
  generators: Mapping[str, Callable[[int, int], Any]],
  drawn: draws.Options | None = None,
  allow_tests: bool = False,
  **options: Any,
) -> tuple[Sequence[Any], Sequence[Any]]:
  """Returns (training items, held-out items) of one part of the training data.

  The source is one of SOURCES, or a key of `generators`, which maps it to make(seed, index). Of
  judged texts the training items are what is drawn of them; `drawn` says how, and if it names
  sides, they decide what is held out of every file.
  """
  if source in generators:
    # Nothing is held out: test sets of generated data are drawn apart.
    return sources.Generated(generators[source], seed), ()
  checks.lookup(source, [*generators, *SOURCES], 'data source')
  if not allow_tests and source in catalogue.SETS and catalogue.SETS[source].is_for_tests:
    raise ValueError(
      f'data source {source!r} is for tests only; --config.data.allow_tests=True trains on it all'
      ' the same'
    )
  items = read_source(source, path, **options)
  if drawn and drawn.sides:
    kept, held_out = draws.split(items, drawn.sides)
  else:
    kept, held_out = sources.split(items, eval_fraction, seed)
  if any(isinstance(item, judged.Judged) for item in kept):
    kept = sources.Generated(draws.Draw(kept, drawn or draws.Options()), seed)
  return kept, held_out


# --- Examples to atoms -------------------------------------------------------------------

# (item, rng) -> item, or None to leave it out
Augment = Callable[[Any, np.random.Generator], Any]


def make_augment(
  drop_prob: float, plus_prob: float, minus_prob: float, rules_blind: bool = False
) -> Augment:
  """Returns (item, rng) -> item, which applies CCA to examples; pairs and groups keep their rules.

  With `rules_blind` all rules are hidden after the label is made: an ablation that shows what
  can be known without reading them.
  """

  def apply(item: Any, rng: np.random.Generator) -> Any:
    if isinstance(item, draws.Group):
      if not rules_blind:
        return item
      return item._replace(examples=tuple(map(augment_lib.hide_rules, item.examples)))
    if isinstance(item, schema.Example):
      item = augment_lib.cca(item, rng, drop_prob, plus_prob, minus_prob, shuffle=drop_prob > 0)
    return augment_lib.hide_rules(item) if rules_blind else item

  return apply


def make_training_atoms(
  parts: Mapping[str, Sequence[Any]],
  weights: Mapping[str, float],
  encoder: features.Encoder,
  seed: int,
  augment: Augment,
  group_size: int = 1,
) -> grain.MapDataset:
  """Returns the endless mixture of the parts, augmented and encoded; see make_atoms."""
  # Each part has a seed of its own, so that its elements do not depend on the weights: a part of
  # weight 0 leaves the others as they were. Generated items are in random order as they come.
  atoms = {
    name: make_atoms(
      items,
      encoder,
      seed + number,
      augment,
      shuffle=not isinstance(items, sources.Generated),
      group_size=group_size,
    )
    for number, (name, items) in enumerate(sorted(parts.items()))
    if weights[name] > 0
  }
  return mix(atoms, {name: weights[name] for name in atoms})


def make_atoms(
  items: Sequence[Any],
  encoder: features.Encoder,
  seed: int,
  augment: Augment | None = None,
  shuffle: bool = True,
  group_size: int = 1,
) -> grain.MapDataset:
  """Returns an endless random-access dataset of atoms, or of `Dropped` in their place.

  The seed decides the order, which is another one in each epoch, and the rng that `augment` gets
  for each index. An example becomes an atom of up to group_size prompts that share what the layout
  puts first: with conversation_first the example as it is augmented several times, with rules_first
  the augmented one and others of the items, drawn at random, under its new rules.
  """
  if not len(items):
    raise ValueError('the data set has no items; see what its source dropped')
  dataset = grain.MapDataset.source(items).seed(seed)
  if shuffle:
    dataset = dataset.shuffle()
  dataset = dataset.repeat()
  if augment is None:
    return dataset.map(_Encode(encoder))
  return dataset.random_map(_Encode(encoder, augment, group_size, items))


def mix(datasets: Mapping[str, grain.MapDataset], weights: Mapping[str, float]) -> grain.MapDataset:
  """Returns one dataset that takes atoms in proportion to the weights, at every prefix."""
  if set(datasets) != set(weights):
    raise ValueError(
      f'mix: datasets {sorted(datasets)} and weights {sorted(weights)} must have the same names'
    )
  # `not w >= 0` catches NaN too.
  bad = {k: w for k, w in weights.items() if not w >= 0 or w == float('inf')}
  if bad:
    raise ValueError(f'mix: weights {bad} must be finite and not negative')
  names = [name for name in datasets if weights[name] > 0]
  if not names:
    raise ValueError('mix: every weight is 0; give at least one data set')
  if len(names) == 1:
    return datasets[names[0]]
  return grain.MapDataset.mix(
    [datasets[name] for name in names], weights=[float(weights[name]) for name in names]
  )


def batches(
  atoms: grain.MapDataset,
  shape: BatchShape,
  look_ahead: float = 1.0,
  prefetch: int = 4,
  fingerprint: str = '',
) -> BatchIterator:
  """Returns the iterator of packed batches.

  Args:
    atoms: A random-access dataset of atoms or `Dropped`.
    look_ahead: How many batches of tokens more than one are held while a batch is packed. More
      of them fill rows better.
    prefetch: How many batches are made ahead in a thread; 0 for none.
    fingerprint: Names the data, the tokenizer, the seed, ...; a state with another is refused.
  """
  if look_ahead < 0:
    raise ValueError(f'look_ahead is {look_ahead}; it must not be negative')
  packed = _PackDataset(atoms, shape, look_ahead, fingerprint)
  return BatchIterator(
    grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=prefetch).__iter__()
  )


class BatchIterator(grain.DatasetIterator):
  """An iterator of batches whose state is that of the last one handed out."""

  def __init__(self, prefetched: grain.DatasetIterator):
    super().__init__()
    # Stops the thread when this iterator is closed or collected, or before the interpreter
    # takes down the modules that stopping it needs. The list is the only reference, so that
    # nothing is left for a later __del__.
    self._held = [prefetched]
    self._close = weakref.finalize(self, lambda held: held.pop().close(), self._held)

  def __next__(self) -> Batch:
    return next(self._prefetched)

  def close(self) -> None:
    """Stops the prefetching thread; the iterator cannot be used any more."""
    self._closed = True
    self._close()

  @property
  def _prefetched(self) -> grain.DatasetIterator:
    self._assert_not_closed()
    return self._held[0]

  def get_state(self) -> dict[str, Any]:
    """Returns a small JSON-able dict; see `_PackIterator`."""
    # The prefetching iterator hands out the state stored beside each batch.
    return self._prefetched.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues after the batch that `state` was taken after; refuses that of another stream."""
    self._prefetched.set_state(state)

  @property
  def drops(self) -> dict[str, int]:
    """How many atoms were dropped so far, by reason."""
    return dict(self.get_state()['drops'])

  @property
  def num_atoms(self) -> int:
    """How many atoms were handed out so far."""
    state = self.get_state()
    return state['next'] - len(state['pending']) - sum(state['drops'].values())

  @property
  def num_shortened(self) -> int:
    """How many of the atoms read so far were cut to fit."""
    return self.get_state()['shortened']


@dataclasses.dataclass(frozen=True)
class _Encode:
  """Maps an item to an atom; a class, so that it can be pickled."""

  encoder: features.Encoder
  augment: Augment | None = None
  group_size: int = 1
  items: Sequence[Any] = ()  # of which the others of a group are taken

  def __call__(self, item: Any, rng: np.random.Generator | None = None) -> Atom | Dropped:
    if not self.augment:
      return features.encode(item, self.encoder)
    first = self.augment(item, rng)
    if first is None:
      return Dropped('left_out')
    if isinstance(first, draws.Group):
      return features.encode_group(first.examples, self.encoder, first.offsets)
    if self.group_size == 1 or isinstance(first, schema.Pair):
      return features.encode(first, self.encoder)
    if self.encoder.layout.order == 'conversation_first':
      others = [self.augment(item, rng) for _ in range(self.group_size - 1)]
      others = [other for other in others if isinstance(other, schema.Example)]
    else:
      others = list(self._draw_under(first.safety, item, rng))
    return features.encode_group([first, *others], self.encoder)

  def _draw_under(self, new_safety, item, rng):
    """Yields other examples of the item's rules, under new ones that are made of these."""
    seen = {item.id}
    for i in rng.integers(len(self.items), size=GROUP_TRIES * (self.group_size - 1)):
      other = self.items[int(i)]
      if len(seen) == self.group_size:
        return
      if not isinstance(other, schema.Example) or other.safety != item.safety:
        continue
      other = augment_lib.relabel(other, new_safety)
      # None: the new rules have a category under which this one was never judged.
      if other.label is not None and other.id not in seen:
        seen.add(other.id)
        yield other


class _PackDataset(grain.IterDataset):
  """Packed batches of a random-access dataset of atoms."""

  def __init__(
    self, parent: grain.MapDataset, shape: BatchShape, look_ahead: float, fingerprint: str
  ):
    super().__init__(parent)
    self.shape = shape
    self.pool_length = int((1 + look_ahead) * shape.batch_size * shape.row_length)
    self.fingerprint = fingerprint

  def __iter__(self) -> Iterator[Batch]:
    return _PackIterator(self, self._parent)


class _PackIterator(grain.DatasetIterator):
  """Packs batches; its state is the indices of the atoms that wait, and counters."""

  def __init__(self, dataset: _PackDataset, atoms: grain.MapDataset):
    super().__init__()
    self._dataset = dataset
    self._atoms = atoms
    self._identity = {
      # States of streams without these do not name them.
      **{k: v for k, v in dataclasses.asdict(dataset.shape).items() if v or k not in _OPTIONAL},
      'pool_length': dataset.pool_length,
      'num_items': len(atoms),
      'fingerprint': dataset.fingerprint,
    }
    self._next = 0
    self._pending: list[tuple[int, Atom]] = []
    self._drops: dict[str, int] = {}
    self._shortened = 0

  def __next__(self) -> Batch:
    self._assert_not_closed()
    self._read_ahead()
    if not self._pending:
      raise StopIteration
    batch, left = pack_rows([atom for _, atom in self._pending], self._dataset.shape)
    self._pending = [self._pending[i] for i in left]
    return batch

  def get_state(self) -> dict[str, Any]:
    return {
      'next': self._next,
      # Read but not handed out, oldest first.
      'pending': [index for index, _ in self._pending],
      'drops': dict(self._drops),
      'shortened': self._shortened,
      # What the state is good for.
      'identity': dict(self._identity),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    other = state.get('identity', {})
    for key, value in self._identity.items():
      if other.get(key) != value:
        raise ValueError(
          f'the data state was saved with {key} {other.get(key)!r}, this run'
          f' has {value!r}; resume with the old value or start a new run'
        )
    self._next = state['next']
    self._drops = dict(state['drops'])
    self._shortened = state['shortened']
    # The state holds no tokens: atoms that waited are made anew from their indices.
    self._pending = []
    for index in state['pending']:
      atom = self._atoms[index]
      if isinstance(atom, Dropped) or does_not_fit(atom, self._dataset.shape):
        raise ValueError(
          f'item {index} waited in the saved data state and is dropped now;'
          ' the data or the code has changed, start a new run'
        )
      self._pending.append((index, atom))

  def _read_ahead(self) -> None:
    """Reads atoms until the pool is full or the dataset ends."""
    shape = self._dataset.shape
    pool = sum(features.row_size([atom], shape) for _, atom in self._pending)
    in_a_row = 0
    while pool < self._dataset.pool_length and self._next < len(self._atoms):
      index, self._next = self._next, self._next + 1
      atom = self._atoms[index]
      dropped = atom if isinstance(atom, Dropped) else does_not_fit(atom, shape)
      if dropped is None:
        self._pending.append((index, atom))
        self._shortened += atom.num_shortened > 0
        pool += features.row_size([atom], shape)
        in_a_row = 0
        continue
      self._drops[dropped.reason] = self._drops.get(dropped.reason, 0) + 1
      in_a_row += 1
      if in_a_row >= MAX_DROPPED_IN_A_ROW:
        self._raise_all_dropped(in_a_row, dropped)
    # A data set that ends may have held nothing of use at all.
    if not self._pending and in_a_row and in_a_row == self._next:
      self._raise_all_dropped(in_a_row, dropped)

  def _raise_all_dropped(self, count: int, last: Dropped) -> None:
    raise ValueError(
      f'the last {count} items were all dropped ({self._drops} in all);'
      f' the last one: {last.reason}: {last.detail}'
    )
