"""Scores a file of conversations with a trained reward model."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import ml_collections

from csrm_jax import reward_model, scoring
from csrm_jax.core import writer as writer_lib
from csrm_jax.data import sources
from csrm_jax.evals import report, suites
from csrm_jax.runners import evaluation
from csrm_jax.safety import schema


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/scored.jsonl, and a report where the rows have labels."""
  for key in ('checkpoint', 'conversations'):
    if not config[key]:
      raise ValueError(f'config.{key} is empty: give --config.{key}=PATH')
  safety = schema.load_safety(config.safety) if config.safety else None
  examples = sources.read_jsonl(config.conversations, safety)
  if not examples:
    raise ValueError(f'{config.conversations} has no rows')
  if any(isinstance(example, schema.Pair) for example in examples):
    raise ValueError(
        f'{config.conversations} holds pairs; give one conversation a row')
  if safety is not None:
    # The rules asked for, also where a row brings its own; the labels of such
    # a row were given under other rules.
    examples = [
        example if example.safety == safety else dataclasses.replace(
            example, safety=safety, label=None, violated=(), probability=None)
        for example in examples]
  scores = evaluation.score_with_progress(
      reward_model.load(config.checkpoint, config.max_length).score_fn,
      examples)
  path = workdir / 'scored.jsonl'
  lines = [
      json.dumps({'id': example.id, **dataclasses.asdict(verdict)})
      for example, verdict in zip(examples, scoring.verdicts(scores),
                                  strict=True)]
  writer_lib.write_atomic(path, '\n'.join(lines) + '\n')
  print(f'{len(lines)} verdicts: {path}')
  if any(example.label is not None for example in examples):
    results = {'file': suites.classification(
        examples, scores, description=f'The rows of {config.conversations}.')}
    summary = report.summarise(results) | {'num_examples': len(examples)}
    print('report:', report.write_report(
        workdir / 'report', results, title='Scores of a file',
        summary=summary))
