"""Parts of a report in Markdown.

Everything that comes from data, configs or users is escaped: it can neither
make markup nor break a table.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from csrm_jax.evals.definitions import METRICS, NONE


def metric_table(columns: Mapping[str, Mapping[str, Any]], title: str = '') -> str:
  """Returns a table of metrics by column, each with its best beside it.

  Columns of which no metric has a best get none beside them.
  """
  with_best = {
    name for name, column in columns.items() if any(m['best'] is not None for m in _metrics(column))
  }
  header = [title]
  for name in columns:
    header += [escape(name), 'best'] if name in with_best else [escape(name)]
  rows = []
  for metric, (text, _) in METRICS.items():
    if not any(metric in column for column in columns.values()):
      continue
    row = [text]
    for name, column in columns.items():
      value = column.get(metric)
      row.append(cell(value))
      if name in with_best:
        row.append(format_number(value and value['best']))
    rows.append(row)
  return table(header, rows)


def _metrics(column: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  return [column[name] for name in METRICS if name in column]


def result_table(results: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
  """Returns a table with a row for each result and a column for each metric.

  Below a result stands what is best reachable, where it is known.
  """
  names = [name for name in names if any(name in result['metrics'] for result in results.values())]
  rows = []
  for title, result in results.items():
    measured = [result['metrics'].get(name) for name in names]
    rows.append([escape(title), *map(cell, measured)])
    reachable = [m and m['best'] for m in measured]
    if any(map(is_number, reachable)):
      rows.append(
        ['*best*', *(f'*{format_number(b)}*' if is_number(b) else NONE for b in reachable)]
      )
  return table(['', *(METRICS[name][0] for name in names)], rows)


def plain_table(spec: Mapping[str, Any], level: int = 4) -> list[str]:
  """Returns the parts of a {title, header, rows[, note]} of plain values.

  The note is Markdown, and ours.
  """
  parts = [f'{"#" * level} {escape(spec["title"])}']
  parts.append(
    table(
      [escape(text) for text in spec['header']],
      [[cell(value) for value in row] for row in spec['rows']],
    )
  )
  return parts + ([spec['note']] if spec.get('note') else [])


def images(drawn: Iterable[tuple[str, str]]) -> list[str]:
  """Returns tables of two figures a row, each above its caption."""
  drawn, parts = list(drawn), []
  for i in range(0, len(drawn), 2):
    files, captions = zip(*drawn[i : i + 2], strict=True)
    pictures = [f'![{os.path.splitext(file)[0]}]({file})' for file in files]
    parts.append(table(pictures, [captions]))
  return parts


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a Markdown table of cells that are Markdown already."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def flat(tree: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
  """Returns (dotted key, text) of every leaf of nested dicts."""
  rows = []
  for key, value in tree.items():
    if isinstance(value, Mapping):
      rows += flat(value, f'{prefix}{key}.')
    elif isinstance(value, (list, tuple)):
      rows.append((f'{prefix}{key}', ', '.join(map(str, value))))
    else:
      rows.append((f'{prefix}{key}', str(value)))
  return rows


def cell(value: Any) -> str:
  """Returns a value as a table shows it: metric, count, number or text."""
  if isinstance(value, Mapping):
    return format_metric(value)
  if isinstance(value, str):
    return escape(value)
  if isinstance(value, int) and not isinstance(value, bool):
    return f'{value:,}'
  return format_number(value)


def format_metric(metric: Mapping[str, Any]) -> str:
  """Returns '0.912 [0.901, 0.925]', or the value alone."""
  text = format_number(metric['value'])
  if not is_number(metric['low']):
    return text
  return f'{text} [{metric["low"]:.3f}, {metric["high"]:.3f}]'


def format_number(value: Any) -> str:
  """Returns three decimals, or a dash for what is missing or not finite."""
  return f'{value:.3f}' if is_number(value) else NONE


def is_number(value: Any) -> bool:
  """Returns whether the value is a finite number."""
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return number and math.isfinite(value)


def verdict(row: Mapping[str, Any]) -> str:
  """Returns the predicted label of a row with `p_unsafe`."""
  return 'unsafe' if row['p_unsafe'] >= 0.5 else 'safe'


def code(text: Any) -> str:
  """Returns the text on one line as code, to be copied as it is."""
  return '`' + ' '.join(str(text).split()).replace('`', "'").replace('|', '\\|') + '`'


def escape(text: Any) -> str:
  """Returns the text on one line, with nothing left that Markdown acts on."""
  return re.sub(r'([\\`*_\[\]<>|#~&$!])', r'\\\1', ' '.join(str(text).split()))
