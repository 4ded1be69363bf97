"""The report of several scorers side by side: report.md, metrics.json, PNGs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from csrm_jax.core import files
from csrm_jax.evals import compare, figures, paper, report, sections

# Figures of a comparison: (file, metric, caption).
_COMPARED = (
  ('f1', 'f1', 'F1 by benchmark, with 95% intervals.'),
  ('smece', 'smece', 'Calibration error by benchmark; lower is better.'),
  ('accuracy', 'accuracy', 'Pair accuracy by benchmark.'),
  (
    'consistency',
    'consistency',
    'Flip consistency: both verdicts right where only the rules change.',
  ),
)


def write_comparison(
  path: str | os.PathLike,
  scorers: Mapping[str, Mapping[str, Mapping[str, Any]]],
  *,
  title: str,
  reference: str = '',
  num_samples: int = 1000,
) -> pathlib.Path:
  """Returns the path of the report.md of several scorers side by side.

  Args:
    path: the report's folder, on a local disk.
    scorers: {name: results}, of `battery.run` or `report.read_results`; all
      of them on the same test sets.
    title: one line.
    reference: the scorer that the others are compared with; empty: the first.
    num_samples: of the paired bootstrap.

  Raises:
    ValueError: the scorers were scored on different rows.
  """
  found = compare.differences(scorers, reference, num_samples=num_samples)
  with files.whole_folder(path, last='summary.json') as temporary:
    drawn = []
    for key, metric, caption in _COMPARED:
      file = f'compare_{key}.png'
      if figures.draw_comparison(temporary / file, scorers, metric):
        drawn.append((file, caption))
    text = sections.render_comparison(scorers, found, drawn, title)
    report.dump_text(temporary / 'report.md', text)
    report.dump_json(
      temporary / 'metrics.json',
      {
        'title': title,
        'scorers': scorers,
        'differences': found,
        'tables': paper.make_tables(scorers),
      },
    )
  return pathlib.Path(path) / 'report.md'
