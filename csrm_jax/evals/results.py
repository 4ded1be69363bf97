"""What a suite returns: metrics, tables, figures, arrays; report and comparison know only these."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

# {value, low, high, best}: low and high are the 95% bootstrap interval (None where there is none),
# best is what a judge that knows the true P(unsafe) reaches on the same rows (None if unknown).
Metric = dict[str, float | None]

# name -> {title, text}, in the order of a report. Titles say which direction is better.
METRICS = yaml.safe_load(pathlib.Path(__file__).with_name('metrics.yaml').read_text('utf-8'))
# In titles and cells of tables: the report puts the benchmark's name there.
NAME = '{name}'
# What is no suite: benchmarks that are not on disk, and suites that could not be evaluated.
SKIPPED, FAILED = 'skipped', 'failed'


def title_of(metric: str) -> str:
  """Returns the metric's title."""
  return METRICS[metric]['title']


def value(number: float, best: float | None = None) -> Metric:
  """Returns a metric without an interval."""
  return {'value': number, 'low': None, 'high': None, 'best': best}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of plain values and metrics.

  Attributes:
    title: '' for none.
    header: a text for each column.
    rows: of numbers, texts, metrics and None.
    note: Markdown, and ours; stands below.
    level: of its heading.
    section: at the end of the report, where it stands with those of other results; tables of one
      title are one there. None: with its result. '' for a section without a heading.
    stored: whether metrics.json holds it too; if not, its values stand there otherwise.
  """

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[Any]]
  note: str | None = None
  level: int = 4
  section: str | None = None
  stored: bool = True

  def to_json(self) -> dict[str, Any]:
    """Returns what metrics.json holds."""
    obj = {'title': self.title, 'header': self.header, 'rows': self.rows}
    return obj if self.note is None else obj | {'note': self.note}


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table of metrics that the results of one chapter share.

  Attributes:
    heading: of the table, Markdown; rows of one heading are one table.
    names: of its columns.
    metrics: of this row.
    note: below the heading.
    suffix: what follows the benchmark's name.
  """

  heading: str
  names: Sequence[str]
  metrics: Mapping[str, Metric]
  note: str = ''
  suffix: str = ''


@dataclasses.dataclass(frozen=True)
class Figure:
  """What `draw(path, *args)` writes as a PNG file.

  Attributes:
    suffix: of the file's name, behind the benchmark's.
  """

  draw: Callable[..., Any]
  args: Sequence[Any]
  caption: str
  suffix: str = ''


@dataclasses.dataclass(frozen=True)
class Result:
  """What one suite found on one benchmark.

  Attributes:
    suite: a key of suites.SUITES, or SKIPPED or FAILED.
    chapter: heading of the report under which it stands, beside others of this chapter.
    metrics: None for a suite that measures nothing, and only shows something.
    tables, figures: what the report shows of it.
    arrays: what paired comparisons are made from, 'ids' and 'units' among them; all [N].
    description: one line.
    size: as '80 examples'; '' where nothing was measured.
    made_of: further facts of that kind.
    counts, values: what metrics.json holds before and after the metrics.
    rows: in tables that its chapter shares. Metrics of a chapter without such rows are columns.
    columns: what stands in place of its metrics in such columns.
    alone: whether it shares its chapter with no other result.
    text: Markdown above its figures.
    remark: below the tables that its chapter shares.
    drops: how many rows of the data were left out, by reason.
  """

  suite: str
  chapter: str = ''
  metrics: Mapping[str, Metric] | None = dataclasses.field(default_factory=dict)
  tables: Sequence[Table] = ()
  figures: Sequence[Figure] = ()
  arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  description: str = ''
  size: str = ''
  made_of: Sequence[str] = ()
  counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rows: Sequence[Row] = ()
  columns: Mapping[str, Mapping[str, Metric]] | None = None
  alone: bool = False
  text: Sequence[str] = ()
  remark: str = ''
  drops: Mapping[str, int] | None = None

  def to_json(self) -> dict[str, Any]:
    """Returns what metrics.json holds: all but arrays and figures."""
    obj = {'suite': self.suite}
    if self.metrics is not None:
      obj |= {'description': self.description, **self.counts, 'metrics': self.metrics}
    obj |= self.values
    if tables := [table.to_json() for table in self.tables if table.stored]:
      obj['tables'] = tables
    return obj if self.drops is None else obj | {'drops': self.drops}

  @classmethod
  def from_json(cls, obj: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Result:
    """Returns what `to_json` gave, with its arrays; it can be compared, not shown."""
    own = ('suite', 'description', 'metrics', 'tables', 'drops')
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
