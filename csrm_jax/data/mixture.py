"""What a run is trained and evaluated on: named parts from named sources."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from csrm_jax.data import features, pipeline, public, sources
from csrm_jax.ruleworld import datasets
from csrm_jax.safety import augment, schema

# The subsets of moderation categories that each text is judged under.
MODERATION_SUBSETS = (
    ('H', 'V', 'HR', 'SH'), ('H2', 'V2', 'HR', 'SH'), ('H',), ('H2',), ('V',),
    ('V2',), ('HR', 'SH'),
)


def _read_xstest(folder: str) -> list[schema.Example]:
  folder = pathlib.Path(folder)
  files = sorted(folder.glob('*completions*.csv'))
  if not files:
    raise FileNotFoundError(
        f'{folder}: no *completions*.csv there; give the folder that holds '
        'xstest_prompts.csv and the completions')
  parts = [public.read_xstest(folder / 'xstest_prompts.csv', path, rule)
           for path in files for rule in ('harmful', 'refusal', 'both')]
  return list(itertools.chain.from_iterable(parts))


def _read_moderation(path: str) -> list[schema.Example]:
  parts = [public.read_moderation(path, subset)
           for subset in MODERATION_SUBSETS]
  return list(itertools.chain.from_iterable(parts))


# source -> (path) -> examples or pairs
READERS: dict[str, Callable[[str], Sequence[Any]]] = {
    'jsonl': functools.partial(sources.read_jsonl, require_label=True),
    'parquet': functools.partial(sources.read_parquet, require_label=True),
    'hh': public.read_hh_pairs,
    'xstest': _read_xstest,
    'moderation': _read_moderation,
    'moderation_pairs': public.read_moderation_pairs,
}


def read_part(source: str, path: str, seed: int, eval_fraction: float
              ) -> tuple[Sequence[Any], Sequence[Any]]:
  """Returns (training items, held-out items) of one part.

  A source 'ruleworld/NAME' is generated, has no path and nothing held out: its
  test sets are drawn apart (`datasets.test_sets`).

  Raises:
    ValueError: an unknown source, or bad rows.
  """
  world, _, kind = source.partition('/')
  if world == 'ruleworld' and kind in datasets.TRAINING:
    return datasets.Generated(datasets.TRAINING[kind], seed), ()
  if source not in READERS:
    known = [f'ruleworld/{name}' for name in datasets.TRAINING] + list(READERS)
    raise ValueError(
        f'unknown data source {source!r}; use one of {", ".join(known)}')
  if not path:
    raise ValueError(
        f'data source {source!r} has no path; give path=FILE after the colon '
        'of --config, or data_dir=FOLDER for the public sets')
  return sources.split(READERS[source](path), eval_fraction, seed)


def make_augment(drop_prob: float, plus_prob: float, minus_prob: float,
                 rules_blind: bool = False
                 ) -> Callable[[Any, np.random.Generator], Any]:
  """Returns (item, rng) -> item: CCA on examples; pairs keep their rules.

  With `rules_blind` all rules are hidden after the label is made: the ablation
  that shows what can be known without reading them.
  """

  def apply(item: Any, rng: np.random.Generator) -> Any:
    if isinstance(item, schema.Example):
      item = augment.cca(item, rng, drop_prob, plus_prob, minus_prob,
                         shuffle=drop_prob > 0)
    return augment.hide_rules(item) if rules_blind else item

  return apply


def make_training_atoms(
    parts: Mapping[str, Sequence[Any]], weights: Mapping[str, float],
    encoder: features.Encoder, seed: int,
    augment_fn: Callable[[Any, np.random.Generator], Any]) -> grain.MapDataset:
  """Returns the endless mixture of the parts, augmented and encoded.

  Each part gets a seed of its own, so that its elements do not depend on the
  weights: a part of weight 0 leaves the others as they were.
  """
  atoms = {
      name: pipeline.make_atoms(
          items, encoder, seed + number, augment_fn,
          shuffle=not isinstance(items, datasets.Generated))
      for number, (name, items) in enumerate(sorted(parts.items()))
      if weights[name] > 0}
  return pipeline.mix(atoms, {name: weights[name] for name in atoms})
