"""What tests of suites share."""

import numpy as np

from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import suites
from csrm_jax.evals.bootstrap import Measure


def plain(result):
  """Returns what metrics.json would hold, and the arrays."""
  return result.to_json() | {'arrays': result.arrays}


def run(suite, items, scores, *, num_samples=300, fitted=None, **fields):
  """Returns the result of a suite.

  Args:
    suite: its name.
    items: of the suite.
    scores: of what it asks, in that order, or a score function.
    num_samples: of the bootstrap.
    fitted: a calibration.
    fields: of the benchmark.
  """
  score_fn = scores if callable(scores) else lambda _: np.asarray(scores)
  benchmark = Benchmark('test', suite, items, **fields)
  return suites.evaluate(score_fn, benchmark, Measure(num_samples=num_samples), fitted)


def sides(first, second):
  """Returns the scores of both sides of items, for `run`: all first ones, then the second ones."""
  answers = iter((first, second))
  return lambda _: np.asarray(next(answers))
