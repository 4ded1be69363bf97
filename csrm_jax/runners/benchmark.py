"""Runs every benchmark that is at hand on one model, and reports."""

from __future__ import annotations

import json
import pathlib
import time

import ml_collections

from csrm_jax.data import benchmark, benchmarks as data_benchmarks
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import battery, report
from csrm_jax.evals.calibration import Calibration
from csrm_jax.ruleworld import probes
from csrm_jax.runners import evaluation


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/report: tables, probes and figures of all suites."""
  if evaluation.show_finished(workdir):
    return
  start = time.monotonic()
  todo = _benchmarks(config.benchmarks)
  rm = evaluation.load_model(config)
  score_fn = evaluation.keep_scores(rm.score_fn, workdir / 'scores')
  results = evaluation.run(score_fn, todo, _calibration(config.checkpoint))
  name = rm.spec.layout.format
  summary = report.summarise(results) | {
    'format': name,
    'checkpoint': str(config.checkpoint),
    'time_s': time.monotonic() - start,
  }
  evaluation.write(
    workdir, results, summary, title=config.title or f'Evaluation of {config.checkpoint}'
  )
  evaluation.check(results)


def _benchmarks(config: ml_collections.ConfigDict) -> list[Benchmark]:
  todo = []
  if config.ruleworld_examples:
    todo += probes.benchmarks(config.ruleworld_seed, config.ruleworld_examples)
  if config.data_dir:
    todo += data_benchmarks.load(config.data_dir, tuple(config.names))
  if not todo:
    raise ValueError(
      'nothing to evaluate: give --config.benchmarks.data_dir=FOLDER, or ruleworld_examples above 0'
    )
  return battery.prepare(benchmark.limited(item, config.max_items) for item in todo)


def _calibration(checkpoint: str) -> Calibration | None:
  """Returns what training fitted, if it did."""
  path = pathlib.Path(checkpoint).expanduser() / 'calibration.json'
  if not path.is_file():
    return None
  return Calibration.from_dict(json.loads(path.read_text()))
