"""Scores the test sets of a run and writes its report."""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm

from csrm_jax.core import files
from csrm_jax.data import benchmark, features, sources
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import battery, report
from csrm_jax.evals.calibration import Calibration
from csrm_jax.reward import model as reward_model, scoring
from csrm_jax.ruleworld import probes
from csrm_jax.safety import schema
from csrm_jax.train import loop

# Of held-out rows, the share that thresholds and calibration are fitted on.
_VALIDATION_FRACTION = 0.25
_HELD_OUT = '{} of the data trained on that training did not see.'


def load_model(config: ml_collections.ConfigDict) -> reward_model.RewardModel:
  """Returns the model that configs/eval.py names."""
  return reward_model.load(config.checkpoint, config.max_length, **model_options(config))


def model_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the options of reward_model.load for the model that is named.

  Raises:
    ValueError: none is.
  """
  if not config.checkpoint:
    raise ValueError('config.checkpoint is empty: give --config.checkpoint=PATH')
  options = {'format': config.format, 'words': tuple(config.words)}
  overrides = {name: value for name, value in config.numerics.items() if value}
  return options | overrides


def benchmarks(
  config: ml_collections.ConfigDict, held_out: Mapping[str, Sequence[Any]]
) -> list[Benchmark]:
  """Returns what a run is tested on: RuleWorld's sets if asked for, and
  held-out parts of the training data, of each a sample."""
  todo = []
  if config.ruleworld_examples:
    # A seed of its own: runs with other seeds are tested on the same sets.
    todo = probes.basic_benchmarks(config.ruleworld_seed, config.ruleworld_examples)
  for name, items in held_out.items():
    pairs = [item for item in items if isinstance(item, schema.Pair)]
    examples = [item for item in items if isinstance(item, schema.Example)]
    made = []
    if examples:
      test, validation = sources.split(examples, _VALIDATION_FRACTION, seed=1)
      made.append(
        Benchmark(name, 'classification', test, _HELD_OUT.format('Rows'), validation=validation)
      )
    if pairs:  # A file of both kinds, as augmentation writes, has two sets.
      made.append(
        Benchmark(f'{name}_pairs' if examples else name, 'pairs', pairs, _HELD_OUT.format('Pairs'))
      )
    todo += [benchmark.limited(b, config.max_examples) for b in made]
  return battery.prepare(todo)


def keep_scores(score_fn: scoring.ScoreFn, folder: pathlib.Path) -> scoring.ScoreFn:
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
    files.write(path, json.dumps(scores.tolist()))
    return scores

  return score


def check_lengths(sets: Mapping[str, Sequence[Any]], encoder: features.Encoder) -> None:
  """Checks that all rules fit into a prompt: before training, not after it.

  Raises:
    ValueError: names the example whose rules do not.
  """
  for item in itertools.chain.from_iterable(sets.values()):
    is_pair = isinstance(item, schema.Pair)
    for example in (item.safer, item.other) if is_pair else (item,):
      features.require(features.encode_example(example, encoder))


def run(
  score_fn: scoring.ScoreFn,
  todo: Sequence[Benchmark],
  calibration: Calibration | None = None,
  rules_blind: bool = False,
) -> dict[str, dict[str, Any]]:
  """Returns {benchmark: result} of prepared benchmarks, behind a progress bar.

  Args:
    score_fn: examples -> scores in nats.
    todo: as from battery.prepare.
    calibration: of the scorer; its figures stand apart from the raw ones.
    rules_blind: the scorer was trained without rules and is given none.
  """
  with _progress_bar('evaluate', battery.num_scores(todo)) as bar:
    score = _score_once(score_fn, bar.update)
    results = battery.run(
      battery.blind(score) if rules_blind else score,
      todo,
      fitted=calibration,
      on_start=bar.set_postfix_str,
    )
    bar.set_postfix_str('')
  return results


def _score_once(
  score_fn: scoring.ScoreFn, progress: Callable[[int], Any]
) -> Callable[..., np.ndarray]:
  """Returns a score function that computes each example once: test sets share
  validation rows."""
  known: dict[schema.Example, float] = {}

  def score(examples):
    new = [e for e in dict.fromkeys(examples) if e not in known]
    progress(len(examples) - len(new))
    known.update(zip(new, score_fn(new, progress).tolist(), strict=True))
    return np.array([known[example] for example in examples], np.float32)

  return score


def fit_calibration(
  score_fn: scoring.ScoreFn,
  todo: Sequence[Benchmark],
  workdir: pathlib.Path,
  rules_blind: bool = False,
) -> Calibration | None:
  """Returns temperature and bias, fitted on validation rows, and writes them
  to workdir/calibration.json; None without rows of both labels."""
  rows = dict.fromkeys(row for b in todo for row in b.validation)
  if {row.label for row in rows} < set(schema.LABELS):
    return None
  with _progress_bar('calibrate', len(rows)) as bar:
    score = _score_once(score_fn, bar.update)
    fitted = battery.fit_calibration(battery.blind(score) if rules_blind else score, list(rows))
  files.write(workdir / 'calibration.json', json.dumps(fitted.to_dict()))
  return fitted


def score_with_progress(score_fn: scoring.ScoreFn, examples: Sequence[Any]) -> np.ndarray:
  """Returns the scores (nats) of the examples, behind a progress bar."""
  with _progress_bar('score', len(examples)) as bar:
    return score_fn(examples, bar.update)


def _progress_bar(name: str, total: int) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=total, desc=name, unit='example', dynamic_ncols=True, mininterval=loop.BAR_INTERVAL_S
  )


def show_finished(workdir: pathlib.Path) -> bool:
  """Returns whether the report is there; if so prints its table."""
  folder = workdir / 'report'
  if not (folder / 'summary.json').is_file():
    return False
  summary, metrics = (
    json.loads((folder / name).read_text()) for name in ('summary.json', 'metrics.json')
  )
  print(report.terminal_table(summary, metrics['suites'].get('one_conversation')))
  print(f'{workdir} is finished; remove its report/ to evaluate again')
  print(f'report: {folder / "report.md"}')
  return True


def check(results: Mapping[str, Any]) -> None:
  """Raises ValueError if a suite failed; after the report is written."""
  for failure in battery.failures(results):
    raise ValueError(f'{failure}; the report has what could be evaluated')


def write(
  workdir: pathlib.Path, results: Mapping[str, Any], summary: Mapping[str, Any], title: str
) -> None:
  """Writes workdir/report and prints the table a run ends with."""
  manifest = json.loads((workdir / 'manifest.json').read_text())
  print('writing the report', file=sys.stderr)
  path = report.write_report(
    workdir / 'report',
    results,
    title=title,
    summary=summary,
    manifest=manifest,
    history=workdir / 'metrics.jsonl',
  )
  print(report.terminal_table(summary, results.get('one_conversation')))
  print(f'report: {path}')
