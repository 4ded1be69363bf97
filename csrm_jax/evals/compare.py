"""Several scorers on the same benchmarks: side by side, and their differences.

Differences are tested by a paired bootstrap over conversations. Every draw takes the same ones
from both scorers, so that what makes a conversation hard for both cancels.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.core import files
from csrm_jax.core.markdown import NONE, Markdown, escape, is_number
from csrm_jax.evals import bootstrap, figures, report
from csrm_jax.evals.report import Results
from csrm_jax.evals.results import Table, by_metric, title_of
from csrm_jax.evals.suites import SUITES

# Each of these metrics has a figure: {metric: its caption}.
_COMPARED = {
  'f1': 'F1 by benchmark, with 95% intervals.',
  'smece': 'Calibration error by benchmark; lower is better.',
  'accuracy': 'Pair accuracy by benchmark.',
  'consistency': 'Flip consistency: both verdicts right where only the rules change.',
}


def differences(
  scorers: Mapping[str, Results], reference: str = '', *, num_samples: int = 1000
) -> list[dict[str, Any]]:
  """Returns the difference of each scorer to the reference, metric by metric.

  Each is {benchmark, metric, scorer, reference, value, low, high, p_value}; `value` is the
  scorer's minus the reference's. Benchmarks that one of the two lacks, skipped or failed are
  left out.

  Raises:
    ValueError: No scorer has this name, or the two were scored on different rows.
  """
  reference = reference or next(iter(scorers))
  if reference not in scorers:
    raise ValueError(f'no scorer is called {reference!r}; use one of {", ".join(scorers)}')
  rows = []
  for benchmark, base in scorers[reference].items():
    suite = SUITES.get(base.suite)
    for scorer, results in scorers.items():
      result = results.get(benchmark)
      if scorer == reference or result is None or result.suite != base.suite:
        continue
      if not (suite and suite.paired):
        continue
      a, b = result.arrays, base.arrays
      # Paired draws of different rows would raise no error, and mean nothing.
      if not np.array_equal(a['ids'], b['ids']):
        raise ValueError(
          f'{benchmark}: {scorer!r} and {reference!r} were scored on different rows '
          f'({len(a["ids"])} and {len(b["ids"])}); evaluate both on the same test sets'
        )
      about = {'scorer': scorer, 'reference': reference}
      for metric, (fn, names) in suite.paired.items():
        # smECE is slow, and its interval is rough whatever the number of draws.
        num = min(num_samples, 200) if metric == 'smece' else num_samples
        arrays = ([of[name] for name in names] for of in (a, b))
        found = bootstrap.difference(fn, *arrays, b['units'], num_samples=num)
        rows.append({'benchmark': benchmark, 'metric': metric, **about, **found})
  return rows


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
    for metric, caption in _COMPARED.items():
      file = f'compare_{metric}.png'
      if figures.draw_comparison(folder / file, scorers, metric):
        drawn.append((file, caption))
    report.dump_text(folder / 'report.md', _page(scorers, found, drawn, title))
    stored = {
      scorer: {name: result.to_json() for name, result in results.items()}
      for scorer, results in scorers.items()
    }
    tables = [spec.to_json() for spec in report.paper_tables(scorers)]
    report.dump_json(
      folder / 'metrics.json',
      {'title': title, 'scorers': stored, 'differences': found, 'tables': tables},
    )
  return pathlib.Path(path) / 'report.md'


def _page(scorers: Mapping[str, Results], found, drawn: report.Pictures, title: str) -> str:
  everything = {k: v for results in scorers.values() for k, v in reversed(results.items())}
  parts = [f'# {escape(title)}', report.INTRO, report.READING]
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
  parts += [*report.skipped_part(everything), *report.definitions_part(everything)]
  return '\n\n'.join(parts) + '\n'


def _difference_table(found: Sequence[Mapping[str, Any]]) -> Table:
  rows = []
  for d in found:
    value = NONE if np.isnan(d['value']) else f'{d["value"]:+.3f}'
    value = Markdown(f'**{value}**' if d['p_value'] < 0.05 else value)
    within = f'[{d["low"]:+.3f}, {d["high"]:+.3f}]' if is_number(d['low']) else NONE
    name = title_of(d['metric'])
    rows.append([d['benchmark'], d['scorer'], name, value, Markdown(within), d['p_value']])
  return Table(
    f'Differences to {found[0]["reference"]}',
    ('benchmark', 'scorer', 'metric', 'difference', '95% interval', 'p'),
    rows,
    level=2,
    intro='Paired bootstrap over conversations, the same ones drawn for both; bold '
    'where p is below 0.05. With many rows some are below it by chance.',
  )
