"""What a suite returns: metrics, tables, figures, arrays; report and comparison know only these."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from csrm_jax.core.markdown import NONE, Markdown, is_number, number

# {value, low, high, best}: low and high are the 95% bootstrap interval (None where there is none),
# best is what a judge that knows the true P(unsafe) reaches on the same rows (None if unknown).
# Some have a note too, words that belong to the number.
Metric = dict[str, Any]
# P(unsafe) of what is judged for each item of a benchmark: one row, or the sides of a comparison.
Scores = Sequence[np.ndarray]


def load(name: str) -> Any:
  """Returns the YAML file of that name beside this one."""
  return yaml.safe_load(pathlib.Path(__file__).with_name(f'{name}.yaml').read_text('utf-8'))


# name -> {title, text}, in the order of a report. Titles say which direction is better.
METRICS = load('metrics')
TEXTS = load('texts')
# Where titles and cells of tables have this, the report puts the benchmark's name.
NAME = '{name}'
# Names in place of a suite's: the benchmark is not on disk, or the suite could not be evaluated.
SKIPPED, FAILED = 'skipped', 'failed'
# The section of tables that show texts of the data; a report on private data leaves it out.
MISTAKES = 'Mistakes, with rules and text'


def title_of(metric: str) -> str:
  """Returns the metric's title."""
  return METRICS[metric]['title']


def value(number: float, best: float | None = None) -> Metric:
  """Returns a metric without an interval."""
  return {'value': number, 'low': None, 'high': None, 'best': best}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table, as report.md shows it and metrics.json holds it."""

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[Any]]  # numbers, texts, Markdown, metrics and None
  note: str | None = None  # Markdown below it, which is not escaped
  intro: str = ''  # Markdown above it
  level: int = 4  # of the heading
  # The section at the end of the report in which the table stands; tables of one title are joined
  # there. '' is a section without a heading; None keeps the table with its result.
  section: str | None = None
  # Stands at the head of the chapter: tables of one title are joined, and columns in which no row
  # has a value are left out.
  shared: bool = False
  stored: bool = True  # False where metrics.json holds the same values elsewhere

  def to_json(self) -> dict[str, Any]:
    """Returns what metrics.json holds."""
    obj = {'title': self.title, 'header': self.header, 'rows': self.rows}
    return obj if self.note is None else obj | {'note': self.note}


def by_metric(title: str, columns: Mapping[str, Mapping[str, Metric]], level: int) -> Table:
  """Returns a table with a row for each metric that a column has, at the head of a chapter.

  A column that knows the best of any metric gets a second one for it.
  """
  names = [metric for metric in METRICS if any(metric in column for column in columns.values())]
  made = [('', *map(title_of, names))]
  for name, column in columns.items():
    # A column without values stays, as one of dashes.
    made.append((name, *(column.get(metric, NONE) for metric in names)))
    best = [column[metric]['best'] if metric in column else None for metric in names]
    if any(cell is not None for cell in best):
      made.append(('best', *best))
  header, *rows = zip(*made, strict=True)
  return Table(title, header, rows, level=level, shared=True, stored=False)


def in_row(
  title: str, name: str, metrics: Mapping[str, Metric], names: Sequence[str], **fields: Any
) -> Table:
  """Returns a table with a column for each of the named metrics, at the head of a chapter."""
  cells = [metrics.get(metric) for metric in names]
  rows = [[name, *cells]]
  best = [cell and cell['best'] for cell in cells]
  # What is best reachable stands in a row of its own below, where it is known.
  if any(map(is_number, best)):
    rows.append(
      [Markdown('*best*'), *(Markdown(f'*{number(b)}*') if is_number(b) else None for b in best)]
    )
  return Table(title, ['', *map(title_of, names)], rows, shared=True, stored=False, **fields)


@dataclasses.dataclass(frozen=True)
class Figure:
  """A PNG file that `draw(path, *args)` writes; its name is the benchmark's and `suffix`."""

  draw: Callable[..., Any]
  args: Sequence[Any]
  suffix: str = ''

  @property
  def caption(self) -> str:
    """The text below it."""
    return TEXTS['captions'][self.draw.__name__.removeprefix('draw_')]


@dataclasses.dataclass(frozen=True)
class Result:
  """What one suite found on one benchmark."""

  suite: str  # a key of suites.SUITES, SKIPPED, FAILED, or what a function of `policy` is called
  chapter: str = ''  # the heading under which it stands, beside other results of this chapter
  # None for a suite that measures nothing and only shows something.
  metrics: Mapping[str, Metric] | None = dataclasses.field(default_factory=dict)
  tables: Sequence[Table] = ()
  figures: Sequence[Figure] = ()
  # What paired comparisons are made from, 'ids' and 'units' among them; all are [N].
  arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  description: str = ''
  size: str = ''  # such as '80 examples'; '' where nothing was measured
  made_of: Sequence[str] = ()  # more facts like the size
  # metrics.json holds the counts before the metrics, the values after them.
  counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  alone: bool = False  # whether it shares its chapter with no other result
  remark: str = ''  # stands below the tables that the chapter shares
  drops: Mapping[str, int] | None = None  # reason -> how many rows of the data were left out

  def to_json(self) -> dict[str, Any]:
    """Returns what metrics.json holds: everything but arrays and figures."""
    obj = {'suite': self.suite}
    if self.metrics is not None:
      obj |= {'description': self.description, **self.counts, 'metrics': self.metrics}
    obj |= self.values
    if tables := [table.to_json() for table in self.tables if table.stored]:
      obj['tables'] = tables
    return obj if self.drops is None else obj | {'drops': self.drops}

  @classmethod
  def from_json(cls, obj: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Result:
    """Returns what `to_json` gave, with its arrays; it can be compared, but not shown."""
    own = ('suite', 'description', 'metrics', 'tables', 'drops')
    # Only the order of the keys tells counts from values.
    keys = list(obj)
    middle = keys.index('metrics') if 'metrics' in obj else 0
    return cls(
      obj['suite'],
      metrics=obj.get('metrics'),
      tables=[Table(**table) for table in obj.get('tables', ())],
      arrays=arrays,
      description=obj.get('description', ''),
      counts={key: obj[key] for key in keys[:middle] if key not in own},
      values={key: obj[key] for key in keys[middle:] if key not in own},
      drops=obj.get('drops'),
    )


def of_examples(
  suite: str,
  chapter: str,
  num: int,
  figure: Figure | None = None,
  *,
  counts: Mapping[str, Any] | None = None,
  **fields: Any,
) -> Result:
  """Returns the result of `num` examples, with its figure if there are any."""
  drawn, counts = [figure] if figure and num else [], {'num_examples': num, **(counts or {})}
  return Result(suite, chapter, figures=drawn, size=f'{num:,} examples', counts=counts, **fields)


def ids_of(items: Iterable[Any]) -> np.ndarray:
  """Returns the ids of examples, pairs, choices or samples, str [N]."""
  return np.array([item.id for item in items], np.str_)
