"""What a run is trained and evaluated on: named parts from named sources.

`READERS` is the one table of sources: training and augmentation read from it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from csrm_jax.data import catalogue, features, pipeline, public, sources
from csrm_jax.safety import augment, schema

# The subsets of moderation categories that each text is judged under.
MODERATION_SUBSETS = (
  ('H', 'V', 'HR', 'SH'),
  ('H2', 'V2', 'HR', 'SH'),
  ('H',),
  ('H2',),
  ('V',),
  ('V2',),
  ('HR', 'SH'),
)


def _read_xstest_completions(folder: str) -> sources.Rows:
  folder = pathlib.Path(folder)
  files = sorted(folder.glob('*completions*.csv'))
  if not files:
    raise FileNotFoundError(
      f'{folder}: no *completions*.csv there; give the folder that holds '
      'xstest_prompts.csv and the completions'
    )
  parts = [
    public.read_xstest(folder / 'xstest_prompts.csv', path, rule)
    for path in files
    for rule in ('harmful', 'refusal', 'both')
  ]
  return _join(parts)


def _read_moderation(path: str) -> sources.Rows:
  parts = [public.read_moderation(path, subset) for subset in MODERATION_SUBSETS]
  return _join(parts)


def _read_array_record(folder: str) -> Sequence[Any]:
  # Imported here: it takes a while, and needs an extra.
  from csrm_jax.data import public_sets

  return public_sets.read_prepared(folder)


def _join(parts: Sequence[sources.Rows]) -> sources.Rows:
  drops = collections.Counter()
  for part in parts:
    drops.update(part.drops)
  return sources.Rows(itertools.chain.from_iterable(parts), drops)


TRAINING_LENGTH = 1_000_000  # examples of one epoch; far more than a run sees


@dataclasses.dataclass(frozen=True)
class Generated:
  """A sequence whose element i is make(seed, i); nothing is stored."""

  make: Callable[[int, int], Any]
  seed: int
  length: int = TRAINING_LENGTH

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> Any:
    if not 0 <= index < self.length:
      raise IndexError(f'index {index} is not in [0, {self.length})')
    return self.make(self.seed, int(index))


# Files in the project's own form.
_OWN = {'jsonl': sources.read_jsonl, 'parquet': sources.read_parquet}
# source -> (path) -> examples or pairs. Those of the catalogue are fetched from
# the hub where there is no path; its 'xstest' is of prompts.
READERS: dict[str, Callable[[str], Sequence[Any]]] = {
  **_OWN,
  'array_record': _read_array_record,
  'xstest_completions': _read_xstest_completions,
  'moderation': _read_moderation,
  'moderation_pairs': public.read_moderation_pairs,
  **catalogue.READERS,
}


def read(source: str, path: str, require_label: bool = True) -> Sequence[Any]:
  """Returns the examples and pairs of a source of files.

  Args:
    source: a key of READERS.
    path: file or folder; '' fetches a set of the catalogue from the hub.
    require_label: refuse examples without one in files of our own form; all
      other sources have labels.

  Raises:
    ImportError: an extra is needed that is not installed.
    ValueError: no path, or bad rows.
  """
  on_hub = source in catalogue.SETS and catalogue.SETS[source].repo
  if not path and not on_hub:
    raise ValueError(
      f'data source {source!r} has no path; give path=FILE after the colon '
      'of --config, or data_dir=FOLDER for the public sets'
    )
  if source in _OWN:
    return _OWN[source](path, require_label=require_label)
  return READERS[source](path)


def read_part(
  source: str,
  path: str,
  seed: int,
  eval_fraction: float,
  generators: Mapping[str, Callable[[int, int], Any]],
) -> tuple[Sequence[Any], Sequence[Any]]:
  """Returns (training items, held-out items) of one part.

  What is generated has no path and nothing held out: its test sets are drawn
  apart.

  Args:
    source: a key of READERS or of `generators`.
    generators: source -> make(seed, index).

  Raises:
    ValueError: an unknown source, or bad rows.
  """
  if source in generators:
    return Generated(generators[source], seed), ()
  if source not in READERS:
    raise ValueError(
      f'unknown data source {source!r}; use one of {", ".join([*generators, *READERS])}'
    )
  return sources.split(read(source, path), eval_fraction, seed)


def make_augment(
  drop_prob: float, plus_prob: float, minus_prob: float, rules_blind: bool = False
) -> Callable[[Any, np.random.Generator], Any]:
  """Returns (item, rng) -> item: CCA on examples; pairs keep their rules.

  With `rules_blind` all rules are hidden after the label is made: the ablation
  that shows what can be known without reading them.
  """

  def apply(item: Any, rng: np.random.Generator) -> Any:
    if isinstance(item, schema.Example):
      item = augment.cca(item, rng, drop_prob, plus_prob, minus_prob, shuffle=drop_prob > 0)
    return augment.hide_rules(item) if rules_blind else item

  return apply


def make_training_atoms(
  parts: Mapping[str, Sequence[Any]],
  weights: Mapping[str, float],
  encoder: features.Encoder,
  seed: int,
  augment_fn: Callable[[Any, np.random.Generator], Any],
) -> grain.MapDataset:
  """Returns the endless mixture of the parts, augmented and encoded.

  Each part gets a seed of its own, so that its elements do not depend on the
  weights: a part of weight 0 leaves the others as they were.
  """
  atoms = {
    name: pipeline.make_atoms(
      items, encoder, seed + number, augment_fn, shuffle=not isinstance(items, Generated)
    )
    for number, (name, items) in enumerate(sorted(parts.items()))
    if weights[name] > 0
  }
  return pipeline.mix(atoms, {name: weights[name] for name in atoms})
