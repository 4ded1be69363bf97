"""Scores the test sets of a run and writes its report."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from csrm_jax import scoring
from csrm_jax.evals import report, suites
from csrm_jax.ruleworld import datasets
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


def test_sets(config: ml_collections.ConfigDict,
              held_out: Mapping[str, Sequence[Any]],
              seed: int) -> dict[str, Sequence[Any]]:
  """Returns the test sets by name: RuleWorld's if asked for, and held-out
  parts of the training data."""
  sets = {}
  if config.ruleworld_examples:
    # A seed of its own: runs with other seeds are tested on the same sets.
    sets |= datasets.test_sets(config.ruleworld_seed,
                               config.ruleworld_examples)
  del seed
  return sets | dict(held_out)


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
  def score(examples):
    if rules_blind:
      examples = [augment.hide_rules(example) for example in examples]
    return score_fn(examples)

  results = {}
  for name, items in sets.items():
    text = {'description': DESCRIPTIONS.get(name, '')}
    if name == 'one_conversation':
      results[name] = suites.rule_sets(items, score(items))
    elif isinstance(items[0], schema.Pair):
      safer, other = ([getattr(pair, side) for pair in items]
                      for side in ('safer', 'other'))
      results[name] = suites.pairs(items, score(safer), score(other), **text)
    elif isinstance(items[0], tuple):
      first, second = zip(*items, strict=True)
      results[name] = suites.flips(items, score(first), score(second), **text)
    else:
      results[name] = suites.classification(items, score(items), **text)
      if name in ('seen', 'unseen'):
        results[f'{name}_without_rules'] = suites.classification(
            items, score_fn([augment.hide_rules(item) for item in items]),
            description='The same examples with their rules hidden.')
  return results


def write(workdir: pathlib.Path, results: Mapping[str, Any],
          summary: Mapping[str, Any], title: str) -> None:
  """Writes workdir/report and prints the table a run ends with."""
  manifest = json.loads((workdir / 'manifest.json').read_text())
  path = report.write_report(
      workdir / 'report', results, title=title, summary=summary,
      manifest=manifest, history=workdir / 'metrics.jsonl')
  print(report.terminal_table(summary, results.get('one_conversation')))
  print(f'report: {path}')
