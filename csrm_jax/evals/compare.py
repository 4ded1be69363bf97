"""Several scorers on the same benchmarks: side by side, and their differences.

Runs that differ in their seed alone, as launch/sweep.py names them (full-seed0, full-seed1), are
one scorer, and the seed is the unit: differences are tested by a paired t-test over seeds. Single
runs are tested by a paired bootstrap over conversations. Every draw takes the same ones from both
scorers, so that what makes a conversation hard for both cancels; how far another seed would have
come, it cannot say.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.core import files
from csrm_jax.core.markdown import NONE, Markdown, escape, is_number
from csrm_jax.evals import bootstrap, figures, metrics, report
from csrm_jax.evals.report import Results
from csrm_jax.evals.results import TEXTS, Metric, Result, Table, by_metric, title_of, value
from csrm_jax.evals.suites import SUITES

# What search with a scorer is worth, in truth.
_GOALS = ('truth_best', 'hacking_loss')
# Fewer rank alike by chance: of five, ρ is above 0.8 in one of fifteen.
MIN_SCORERS = 6


def differences(
  scorers: Mapping[str, Results], reference: str = '', *, num_samples: int = 1000
) -> list[dict[str, Any]]:
  """Returns the difference of each scorer to the reference, metric by metric.

  Each is {benchmark, metric, scorer, reference, value, low, high, p_value, num_seeds}; `value` is
  the scorer's minus the reference's. Runs of several seeds are compared seed by seed, where both
  have it. Benchmarks that one of the two lacks, skipped or failed are left out.

  Raises:
    ValueError: No scorer has this name, or the two were scored on different rows.
  """
  groups = _by_seed(scorers)
  reference = reference or next(iter(groups))
  if reference not in groups:
    # The name of one run stands for all of its seeds.
    reference = _run_of(reference) if reference in scorers else reference
  if reference not in groups:
    raise ValueError(f'no scorer is called {reference!r}; use one of {", ".join(groups)}')
  rows, base = [], groups[reference]
  for benchmark in dict.fromkeys(name for results in base.values() for name in results):
    for scorer, runs in groups.items():
      if scorer == reference:
        continue
      if len(base) == len(runs) == 1:
        cells = [(next(iter(runs.values())), next(iter(base.values())))]
      else:
        cells = [(runs[seed], base[seed]) for seed in base if seed in runs]
      pairs = [(a[benchmark], b[benchmark]) for a, b in cells if benchmark in a and benchmark in b]
      pairs = [(a, b) for a, b in pairs if a.suite == b.suite and _paired(a)]
      names = {'scorer': scorer, 'reference': reference}
      for a, b in pairs:
        _check_rows(benchmark, a.arrays['ids'], b.arrays['ids'], **names)
      for metric, found in _differences_of(pairs, num_samples):
        rows.append({'benchmark': benchmark, 'metric': metric, **names, **found})
  return rows


def _by_seed(scorers: Mapping[str, Results]) -> dict[str, dict[str, Results]]:
  """Returns {scorer: {seed: results}}; a run alone keeps its name."""
  groups: dict[str, dict[str, Results]] = {}
  for name, results in scorers.items():
    groups.setdefault(_run_of(name), {})[name.removeprefix(_run_of(name))] = results
  return {
    next(n for n in scorers if _run_of(n) == run) if len(seeds) == 1 else run: seeds
    for run, seeds in groups.items()
  }


def _run_of(name: str) -> str:
  return re.sub(r'-seed\d+$', '', name)


def _paired(result: Result) -> Mapping[str, Any]:
  return SUITES[result.suite].paired if result.suite in SUITES else {}


def _check_rows(benchmark: str, a: np.ndarray, b: np.ndarray, scorer: str, reference: str) -> None:
  # Paired draws of different rows would raise no error, and mean nothing.
  if not np.array_equal(a, b):
    raise ValueError(
      f'{benchmark}: {scorer!r} and {reference!r} were scored on different rows '
      f'({len(a)} and {len(b)}); evaluate both on the same test sets'
    )


def _differences_of(
  pairs: Sequence[tuple[Result, Result]], num_samples: int
) -> Iterator[tuple[str, dict[str, float]]]:
  """Yields (metric, its difference) of pairs of results, one for each seed."""
  for metric, (fn, names) in _paired(pairs[0][0]).items() if pairs else ():
    arrays = [[[of.arrays[name] for name in names] for of in pair] for pair in pairs]
    if len(pairs) > 1:
      found = bootstrap.mean_difference([fn(*a) - fn(*b) for a, b in arrays])
    else:
      # smECE is slow, and its interval is rough whatever the number of draws.
      num = min(num_samples, 200) if metric == 'smece' else num_samples
      units = pairs[0][1].arrays['units']
      found = bootstrap.difference(fn, *arrays[0], units, num_samples=num)
    yield metric, {**found, 'num_seeds': len(pairs)}


def write_comparison(
  path: str | os.PathLike,
  scorers: Mapping[str, Results],
  *,
  title: str,
  reference: str = '',
  num_samples: int = 1000,
) -> pathlib.Path:
  """Writes the report of several scorers side by side, and returns the path of its report.md.

  Args:
    path: A folder on a local disk.
    scorers: {name: results}, from `suites.run` or `report.read_results`, all on the same test
      sets.
    reference: The scorer that the others are compared with; '' takes the first.

  Raises:
    ValueError: The scorers were scored on different rows.
  """
  found = differences(scorers, reference, num_samples=num_samples)
  with files.whole_folder(path, last='metrics.json') as folder:
    drawn = []
    for metric, caption in TEXTS['compared'].items():
      file = f'compare_{metric}.png'
      if figures.draw_comparison(folder / file, scorers, metric):
        drawn.append((file, caption))
    report.dump_text(folder / 'report.md', _page(scorers, found, drawn, title))
    stored = {
      scorer: {name: result.to_json() for name, result in results.items()}
      for scorer, results in scorers.items()
    }
    tables = [spec.to_json() for spec in report.paper_tables(scorers)]
    if (predicts := predictors(scorers)) is not None:
      tables.append(predicts.to_json())
    report.dump_json(
      folder / 'metrics.json',
      {'title': title, 'scorers': stored, 'differences': found, 'tables': tables},
    )
  return pathlib.Path(path) / 'report.md'


def _page(scorers: Mapping[str, Results], found, drawn: report.Pictures, title: str) -> str:
  everything = {k: v for results in scorers.values() for k, v in reversed(results.items())}
  parts = [f'# {escape(title)}', TEXTS['intro'], TEXTS['reading']]
  for scorer, results in scorers.items():
    parts += report.failed_part({f'{scorer}: {name}': r for name, r in results.items()})
  models = tuple(report.PAPER['published']['beavertails'])
  parts += [*report.images(drawn), *report.paper_part(scorers, models), '## All benchmarks']
  for name in dict.fromkeys(n for results in scorers.values() for n in results):
    columns = {
      scorer: results[name].metrics or {} for scorer, results in scorers.items() if name in results
    }
    if any(columns.values()):
      parts += report.plain_table(by_metric(name, columns, level=3))
  parts += report.plain_table(_difference_table(found)) if found else []
  if (predicts := predictors(scorers)) is not None:
    parts += report.plain_table(predicts)
  parts += [*report.skipped_part(everything), *report.definitions_part(everything)]
  return '\n\n'.join(parts) + '\n'


def predictors(scorers: Mapping[str, Results]) -> Table | None:
  """Returns how every metric ranks the scorers, beside what search with each of them finds.

  A cell is Spearman's ρ over scorers that have both, with its interval over draws of scorers, and
  the sign that says whether more is better there. None with fewer than MIN_SCORERS, or without
  the suite `search`: few models rank alike by chance.

  Source: The Alignment Ceiling (arXiv 2311.00168) asks whether the links of RLHF correlate, by its
  abstract; the table is ours.
  """
  columns = {
    name: {
      f'{benchmark} {metric}': found['value']
      for benchmark, result in results.items()
      for metric, found in (result.metrics or {}).items()
      if is_number(found['value'])
    }
    for name, results in scorers.items()
  }
  searched = [
    f'{benchmark} {goal}'
    for benchmark, result in next(iter(scorers.values())).items()
    if result.suite == 'search'
    for goal in _GOALS
  ]
  names = [name for column in columns.values() for name in column]
  rows = []
  for metric in dict.fromkeys(names):
    cells = []
    for goal in searched:
      both = [(c[metric], c[goal]) for c in columns.values() if metric in c and goal in c]
      a, b = np.array(both, np.float64).reshape(-1, 2).T
      is_enough = len(both) >= MIN_SCORERS and np.ptp(a) > 0 and np.ptp(b) > 0
      cells.append(_rho(a, b) if is_enough and metric != goal else None)
    if any(cell is not None for cell in cells):
      rows.append([metric, *cells])
  if not rows:
    return None
  return Table(
    'Which metric predicts what search finds',
    ('metric', *searched),
    rows,
    level=2,
    intro=f'Spearman rank correlation over {len(scorers)} scorers, with its 95% interval.',
  )


def _rho(a: np.ndarray, b: np.ndarray) -> Metric:
  low, high = bootstrap.interval(metrics.spearman, (a, b))
  return value(metrics.spearman(a, b)) | {'low': low, 'high': high}


def _difference_table(found: Sequence[Mapping[str, Any]]) -> Table:
  rows = []
  for d in found:
    value = NONE if np.isnan(d['value']) else f'{d["value"]:+.3f}'
    value = Markdown(f'**{value}**' if d['p_value'] < 0.05 else value)
    within = f'[{d["low"]:+.3f}, {d["high"]:+.3f}]' if is_number(d['low']) else NONE
    name = title_of(d['metric'])
    cells = [value, Markdown(within), d['p_value'], d['num_seeds']]
    rows.append([d['benchmark'], d['scorer'], name, *cells])
  return Table(
    f'Differences to {found[0]["reference"]}',
    ('benchmark', 'scorer', 'metric', 'difference', '95% interval', 'p', 'seeds'),
    rows,
    level=2,
    intro=TEXTS['differences'],
  )
