"""Scores the test sets of a run and writes its report."""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm

from csrm_jax import scoring
from csrm_jax.core import writer
from csrm_jax.data import features
from csrm_jax.evals import report, suites
from csrm_jax.ruleworld import datasets
from csrm_jax.runners import loop
from csrm_jax.safety import augment, schema

# What the report says of each RuleWorld test set.
DESCRIPTIONS = {
    'seen': 'Topics and wordings that training has seen; new conversations '
            'and new combinations of rules, at any strictness.',
    'unseen': 'Topics and wordings that no reward-model training has seen.',
    'pairs': 'One conversation under a lenient and a strict guideline of an '
             'unseen topic; the lenient one must score higher.',
    'seen_pairs': 'The same for seen topics and wordings.',
    'flip': 'One conversation under two unseen rule sets with opposite labels.',
    'one_conversation': 'One conversation under four rule sets.',
}
_ALSO_WITHOUT_RULES = ('seen', 'unseen')


def test_sets(config: ml_collections.ConfigDict,
              held_out: Mapping[str, Sequence[Any]]
              ) -> dict[str, Sequence[Any]]:
  """Returns the test sets by name: RuleWorld's if asked for, and held-out
  parts of the training data, of each a sample of config.max_examples."""
  sets = {}
  if config.max_examples:
    held_out = {name: _sample(items, config.max_examples)
                for name, items in held_out.items()}
  if config.ruleworld_examples:
    # A seed of its own: runs with other seeds are tested on the same sets.
    sets |= datasets.test_sets(config.ruleworld_seed,
                               config.ruleworld_examples)
  return sets | dict(held_out)


def _sample(items: Sequence[Any], num: int) -> Sequence[Any]:
  # One seed for all runs, so that they are tested on the same rows.
  chosen = np.random.default_rng(0).permutation(len(items))[:num]
  return [items[i] for i in sorted(chosen)]


def keep_scores(score_fn: scoring.ScoreFn, folder: pathlib.Path
                ) -> scoring.ScoreFn:
  """Returns a score function that keeps its answers in files of `folder`.

  A resumed run has no untrained model to ask again.
  """

  def score(examples, progress=lambda num: None):
    content = json.dumps([example.to_dict() for example in examples])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    path = folder / f'{digest}.json'
    if path.is_file():
      progress(len(examples))
      return np.array(json.loads(path.read_text()), np.float32)
    scores = score_fn(examples, progress)
    folder.mkdir(exist_ok=True)
    writer.write_atomic(path, json.dumps(scores.tolist()))
    return scores

  return score


def check_lengths(sets: Mapping[str, Sequence[Any]],
                  encoder: features.Encoder) -> None:
  """Checks that all rules fit into a prompt: before training, not after it.

  Raises:
    ValueError: names the example whose rules do not.
  """
  for item in itertools.chain.from_iterable(sets.values()):
    is_pair = isinstance(item, schema.Pair)
    for example in (item.safer, item.other) if is_pair else (item,):
      features.require(features.encode_example(example, encoder))


def evaluate(score_fn: scoring.ScoreFn, sets: Mapping[str, Sequence[Any]],
             rules_blind: bool = False) -> dict[str, dict[str, Any]]:
  """Returns {set: result}; what a set holds decides its suite.

  Examples are classified, with and without their rules; pairs ranked; tuples
  of two examples are flips; the set 'one_conversation' is shown in full.

  Args:
    score_fn: examples -> scores in nats.
    sets: test sets by name.
    rules_blind: the scorer was trained without rules and is given none.
  """
  results = {}
  with _progress_bar('evaluate', _num_scores(sets)) as bar:

    def score(examples, hide=rules_blind):
      if hide:
        examples = [augment.hide_rules(example) for example in examples]
      return score_fn(examples, bar.update)

    for name, items in sets.items():
      bar.set_postfix_str(name)
      text = {'description': DESCRIPTIONS.get(name, '')}
      if name == 'one_conversation':
        results[name] = suites.rule_sets(items, score(items))
      elif isinstance(items[0], schema.Pair):
        safer, other = ([getattr(pair, side) for pair in items]
                        for side in ('safer', 'other'))
        results[name] = suites.pairs(
            items, score(safer), score(other), **text)
      elif isinstance(items[0], tuple):
        first, second = zip(*items, strict=True)
        results[name] = suites.flips(
            items, score(first), score(second), **text)
      else:
        results[name] = suites.classification(items, score(items), **text)
        if name in _ALSO_WITHOUT_RULES:
          results[f'{name}_without_rules'] = suites.classification(
              items, score(items, hide=True),
              description='The same examples with their rules hidden.')
    bar.set_postfix_str('')
  return results


def score_with_progress(score_fn: scoring.ScoreFn, examples: Sequence[Any]
                        ) -> np.ndarray:
  """Returns the scores (nats) of the examples, behind a progress bar."""
  with _progress_bar('score', len(examples)) as bar:
    return score_fn(examples, bar.update)


def _progress_bar(name: str, total: int) -> tqdm.tqdm:
  return tqdm.tqdm(total=total, desc=name, unit='example', dynamic_ncols=True,
                   mininterval=loop.BAR_INTERVAL_S)


def _num_scores(sets: Mapping[str, Sequence[Any]]) -> int:
  num = 0
  for name, items in sets.items():
    twice = (name in _ALSO_WITHOUT_RULES
             or isinstance(items[0], (schema.Pair, tuple)))
    num += len(items) * (1 + twice)
  return num


def show_finished(workdir: pathlib.Path) -> bool:
  """Returns whether the report is there; if so prints its table."""
  folder = workdir / 'report'
  if not (folder / 'summary.json').is_file():
    return False
  summary, metrics = (json.loads((folder / name).read_text())
                      for name in ('summary.json', 'metrics.json'))
  print(report.terminal_table(
      summary, metrics['suites'].get('one_conversation')))
  print(f'{workdir} is finished; remove its report/ to evaluate again')
  print(f'report: {folder / "report.md"}')
  return True


def write(workdir: pathlib.Path, results: Mapping[str, Any],
          summary: Mapping[str, Any], title: str) -> None:
  """Writes workdir/report and prints the table a run ends with."""
  manifest = json.loads((workdir / 'manifest.json').read_text())
  print('writing the report', file=sys.stderr)
  path = report.write_report(
      workdir / 'report', results, title=title, summary=summary,
      manifest=manifest, history=workdir / 'metrics.jsonl')
  print(report.terminal_table(summary, results.get('one_conversation')))
  print(f'report: {path}')
