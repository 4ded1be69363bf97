"""Scores a file of conversations with a reward model or a public model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import ml_collections

from csrm_jax.core import files
from csrm_jax.data import features, sources
from csrm_jax.evals import report, suites
from csrm_jax.reward import model as reward_model, scoring
from csrm_jax.runners import evaluation, show_tokens as show_tokens_lib
from csrm_jax.safety import schema, templates


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/scored.jsonl, and a report where the rows have labels."""
  examples = _read_examples(config)
  rm = evaluation.load_model(config)
  scores = evaluation.score_with_progress(rm.score_fn, examples)
  path = workdir / 'scored.jsonl'
  lines = [
    json.dumps({'id': example.id, **dataclasses.asdict(verdict)})
    for example, verdict in zip(examples, scoring.verdicts(scores), strict=True)
  ]
  files.write(path, '\n'.join(lines) + '\n')
  print(f'{len(lines)} verdicts: {path}')
  if any(example.label is not None for example in examples):
    name = rm.spec.layout.format
    results = {
      'file': suites.classification(
        examples,
        scores,
        description=f'The rows of {config.conversations}, '
        f'judged by {config.checkpoint} in the format {name}.',
      )
    }
    summary = report.summarise(results) | {'num_examples': len(examples), 'format': name}
    print(
      'report:',
      report.write_report(
        workdir / 'report', results, title=f'Scores of a file, format {name}', summary=summary
      ),
    )


def show_tokens(config: ml_collections.ConfigDict) -> None:
  """Prints the prompt of the first row; of its first category, if the guard
  reads one at a time."""
  example = _read_examples(config)[0]
  spec, tokenizer = reward_model.describe(config.checkpoint, **evaluation.model_options(config))
  guard = templates.GUARDS.get(spec.layout.format)
  if guard and guard.per_category:
    example = scoring.split_categories(example)[0]
  show_tokens_lib.show(example, features.Encoder(tokenizer, config.max_length, spec.layout))


def _read_examples(config: ml_collections.ConfigDict) -> Sequence[schema.Example]:
  """Returns the rows, under the rules that are asked for."""
  if not config.conversations:
    raise ValueError('config.conversations is empty: give --config.conversations=PATH')
  safety = schema.load_safety(config.safety) if config.safety else None
  examples = sources.read_jsonl(config.conversations, safety)
  if not examples:
    raise ValueError(f'{config.conversations} has no rows')
  if any(isinstance(example, schema.Pair) for example in examples):
    raise ValueError(f'{config.conversations} holds pairs; give one conversation a row')
  if safety is None:
    return examples
  # The rules asked for, also where a row brings its own; the labels of such
  # a row were given under other rules.
  return [
    example
    if example.safety == safety
    else dataclasses.replace(example, safety=safety, label=None, violated=(), probability=None)
    for example in examples
  ]
