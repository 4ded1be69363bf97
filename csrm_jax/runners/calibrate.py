"""Fits a threshold for each policy on labelled conversations."""

from __future__ import annotations

import dataclasses
import pathlib

import ml_collections

from csrm_jax.core import markdown
from csrm_jax.evals import bootstrap, metrics, thresholds
from csrm_jax.reward import monitor
from csrm_jax.runners import evaluate

FILE = 'thresholds.json'


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/thresholds.json, and prints a table."""
  examples = [row for row in evaluate.read_examples(config) if row.label is not None]
  if not examples:
    raise ValueError(f'{config.conversations}: no row has a label; thresholds are fitted on labels')
  cuts = monitor.Cuts(config.stream, config.every) if config.stream else None
  if cuts and config.bound != 'flagged':
    raise ValueError(
      f'config.bound={config.bound!r} with config.stream={config.stream!r}: a monitor bounds false '
      'alarms; use bound=flagged'
    )
  rm = evaluate.load_model(config, config.allow_out_of_domain)
  with evaluate.progress_bar('score', len(examples)) as bar:
    if cuts:
      talks = [example.conversation for example in examples]
      scores = monitor.lowest(rm.score_fn, [e.safety for e in examples], talks, cuts)
      bar.update(len(examples))
    else:
      scores = rm.score_fn(examples, bar.update)
  labels = metrics.labels_of(examples)
  digests = [example.safety.digest() for example in examples]
  found, names = {}, {}
  for digest, rows in bootstrap.rows_by(digests).items():
    safety = examples[rows[0]].safety
    names[digest] = safety.name or ', '.join(safety.names)[:60]
    options = config.level, config.method, config.bound, config.confidence
    try:
      found[digest] = thresholds.fit(labels[rows], scores[rows], *options)
    except ValueError as error:
      raise ValueError(f'the rules {names[digest]!r}: {error}') from None
  fitted = rm.calibration
  thresholds.Thresholds(
    model=rm.digest,
    calibration=fitted and (fitted.temperature, fitted.bias),
    by_rules=found,
    names=names,
    stream=cuts and dataclasses.asdict(cuts),
  ).save(workdir / FILE)
  number = markdown.number
  print(
    markdown.table(
      ('policy', 'P(unsafe) from', 'safe rows', 'flagged', 'unsafe rows', 'flagged'),
      [
        (names[key], number(t.p_unsafe), t.num_safe, number(t.flagged_safe), t.num_unsafe,
         number(t.flagged_unsafe))
        for key, t in found.items()
      ],
    )
  )  # fmt: skip
  print(f'thresholds: {workdir / FILE}')
