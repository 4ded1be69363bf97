"""The report of a run: report.md and .html, metrics.json, summary.json, arrays.npz, figures, card.

It is written for a reader who has neither the code nor the run. It is made of `results.Result`s
alone: a suite brings what it wants to be shown.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax import config as config_lib
from csrm_jax.core import files
from csrm_jax.core.markdown import Markdown, code, escape, is_number, number, short, table
from csrm_jax.evals import card, figures, findings, html, verdicts
from csrm_jax.evals.metrics import Calibration
from csrm_jax.evals.results import (
  FAILED,
  METRICS,
  MISTAKES,
  NAME,
  SKIPPED,
  TEXTS,
  Result,
  Table,
  by_metric,
  in_row,
  load,
  title_of,
)
from csrm_jax.evals.suites import SUITES

Results = Mapping[str, Result]
# [(file name, caption)]
Pictures = Sequence[tuple[str, str]]

OURS = 'CSRM'  # the paper's own model
PAPER = load('paper')

_TERMINAL_ROWS = (
  ('F1, seen rules', 'seen/f1'),
  ('F1, unseen rules', 'unseen/f1'),
  ('F1, unseen, tuned', 'unseen/f1_tuned'),
  ('AUPRC, seen rules', 'seen/auprc'),
  ('AUPRC, unseen rules', 'unseen/auprc'),
  ('smECE, seen rules', 'seen/smece'),
  ('smECE, unseen rules', 'unseen/smece'),
  ('  of 0.97/0.03, seen', 'seen/smece_constants'),
  ('  of 0.97/0.03, unseen', 'unseen/smece_constants'),
  ('pair accuracy', 'pairs/accuracy'),
  ('mean score gap, nats', 'pairs/score_gap'),
  ('flip consistency', 'flip/consistency'),
)
# What stands for each other benchmark of a run without RuleWorld's.
_OTHER_ROWS = (
  ('F1', 'f1'),
  ('F1, tuned', 'f1_tuned'),
  ('AUPRC', 'auprc'),
  ('smECE', 'smece'),
  ('  of 0.97/0.03', 'smece_constants'),
  ('pair accuracy', 'accuracy'),
)
# For these metrics a share of the best means something.
_SHARES = ('f1', 'auprc', 'accuracy')

# --- Files -----------------------------------------------------------------------------


def write_report(
  path: str | os.PathLike,
  results: Results,
  *,
  title: str,
  summary: Mapping[str, Any],
  manifest: Mapping[str, Any] | None = None,
  history: str | os.PathLike | None = None,
  about: Mapping[str, Any] | None = None,
  calibration: Calibration | None = None,
  texts: bool = True,
) -> pathlib.Path:
  """Writes the report with all its files, and returns the path of report.md.

  If it cannot be written, the old report stays as it was. Other files in `path`, which is a
  folder on a local disk, are left alone.

  Args:
    summary: A flat dict, which goes to summary.json as it is.
    manifest: What the run was made of: versions, digests, devices, command.
    history: The metrics.jsonl of the run, for the training curves.
    about: {what: value} of the model and the run, which stand first.
    calibration: What was fitted on rows of its own.
    texts: Whether rules and texts of the data are shown, beside the ids of their rows.

  Raises:
    ValueError: A value of the summary is a dict, a list or a tuple.
  """
  for key, value in summary.items():
    if isinstance(value, (Mapping, list, tuple)):
      raise ValueError(
        f'summary[{key!r}] is a {type(value).__name__}; a summary is flat, '
        'so give it one key for each number'
      )
  if not texts:
    results = {name: _without_texts(result) for name, result in results.items()}
  with files.whole_folder(path, last='summary.json') as folder:
    drawn = {name: _draw(folder, name, result) for name, result in results.items()}
    curves = []
    if series := read_history(history) if history is not None else {}:
      figures.draw_training(folder / 'training.png', series)
      curves = [('training.png', TEXTS['captions']['training'])]
    first = _first_page(results, drawn, about or {}, calibration)
    text = _page(results, drawn, curves, title, manifest or {}, first)
    dump_text(folder / 'report.md', text)
    dump_text(folder / 'report.html', html.page(text, title, folder))
    if about:
      said = findings.sentences(results, calibration)
      dump_text(folder / card.NAME, card.text(title, results, about, said))
    stored = {name: result.to_json() for name, result in results.items()}
    dump_json(
      folder / 'metrics.json', {'title': title, 'suites': stored, 'manifest': manifest or {}}
    )
    dump_json(folder / 'summary.json', summary)
    # What paired comparisons need. Its texts are ids, never content.
    arrays = {
      f'{name}/{key}': array
      for name, result in results.items()
      for key, array in result.arrays.items()
      if array is not None
    }
    np.savez_compressed(folder / 'arrays.npz', **arrays)
  return pathlib.Path(path) / 'report.md'


def _without_texts(result: Result) -> Result:
  tables = [spec for spec in result.tables if spec.section != MISTAKES]
  return dataclasses.replace(result, tables=tables)


def _draw(folder: pathlib.Path, name: str, result: Result) -> Pictures:
  # Names of benchmarks are free, those of files are not.
  stem = re.sub(r'[^A-Za-z0-9_-]+', '_', name)
  drawn = []
  for figure in result.figures:
    file = f'{stem}{figure.suffix}.png'
    figure.draw(folder / file, *figure.args)
    drawn.append((file, figure.caption))
  return drawn


def read_results(path: str | os.PathLike) -> dict[str, Result]:
  """Returns the results in a report's folder, with arrays; they can be compared, not shown.

  Raises:
    ValueError: The folder has no report that this version wrote.
  """
  path = pathlib.Path(path)
  try:
    stored = files.read_json(path / 'metrics.json', dict)['suites']
    arrays: dict[str, dict[str, np.ndarray]] = {name: {} for name in stored}
    with np.load(path / 'arrays.npz') as found:
      for key in found.files:
        # The name of a benchmark may hold a slash: the array's follows the last one.
        name, _, array = key.rpartition('/')
        arrays[name][array] = found[key]
    return {name: Result.from_json(obj, arrays[name]) for name, obj in stored.items()}
  except (OSError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} holds no report to compare ({error}); evaluate the scorer '
      'again and give the folder that its report.md is in'
    ) from None


def read_history(path: str | os.PathLike) -> dict[str, dict[int, float]]:
  """Returns {name: {step: value}} of a metrics.jsonl, finite numbers only; {} without a file.

  Of two lines for one step the later counts. A line that a killed run left incomplete is
  skipped, and so is a name with a single step.
  """
  series: dict[str, dict[int, float]] = {}
  for row in files.read_log(path):
    step = row.pop('step', None)
    if is_number(step):
      for name, value in row.items():
        if is_number(value):
          series.setdefault(name, {})[step] = value
  # One point makes no curve.
  return {name: points for name, points in series.items() if len(points) > 1}


def dump_text(path: pathlib.Path, text: str) -> None:
  """Writes the text; a lone surrogate, which a path may hold, is no error."""
  path.write_bytes(text.encode('utf-8', 'backslashreplace'))


def dump_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON; numbers that are not finite become null."""
  text = json.dumps(_plain(value), indent=2, allow_nan=False)
  path.write_text(text + '\n', encoding='utf-8')


def _plain(value: Any) -> Any:
  """Returns the value in types that JSON can hold."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  # NaN and infinity are no JSON: strict readers would refuse the whole file.
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return str(value)


# --- The end of a run --------------------------------------------------------------------


def summarise(results: Results) -> dict[str, float | None]:
  """Returns the flat {'benchmark/metric': value} of a run; see `flatten`."""
  return flatten({suite: result.metrics or {} for suite, result in results.items()})


def flatten(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
  """Returns {'group/metric': value}, with `_best`, `_low`, `_high` and `_note` where known."""
  flat = {}
  for group, found in groups.items():
    for name, metric in found.items():
      flat[f'{group}/{name}'] = metric['value']
      for part in ('best', 'low', 'high', 'note'):
        if metric.get(part) is not None:
          flat[f'{group}/{name}_{part}'] = metric[part]
  return flat


def terminal_table(summary: Mapping[str, Any], rule_sets: Mapping[str, Any] | None = None) -> str:
  """Returns the short table that a run ends with, at most 80 columns wide.

  `summary` is that of `summarise`; `rule_sets`, the `values` of `verdicts.rule_sets`, stand
  below. An alignment has a table of its policies instead.
  """
  if any(key.startswith('aligned/') for key in summary):
    return _policies_table(summary)
  shown = [(title, key) for title, key in _TERMINAL_ROWS if key in summary]
  if not shown:
    names = dict.fromkeys(
      name
      for name, _, metric in (key.rpartition('/') for key in summary)
      if metric in METRICS and not name.endswith('_without_rules')
    )
    for name in names:
      rows = [(title, metric) for title, metric in _OTHER_ROWS if f'{name}/{metric}' in summary]
      # Other suites, such as the best of several replies, have metrics of their own.
      own = [metric for metric in METRICS if f'{name}/{metric}' in summary]
      rows = rows or [(short(title_of(metric).rstrip(' ↑↓'), 16), metric) for metric in own[:2]]
      shown += [(f'{title}, {short(name, 20)}', f'{name}/{metric}') for title, metric in rows]
  if not shown and not rule_sets:
    return 'nothing was measured: no row with a label was held out (eval.path, eval.fraction)'
  width = max([22, *(len(title) for title, _ in shown)])
  lines = [f'{"":{width}}{"value":>8}  {"95% interval":19}{"best":>6}{"of best":>9}']
  for title, key in shown:
    value, best, note = summary[key], summary.get(f'{key}_best'), summary.get(f'{key}_note', '')
    low, high = (summary.get(f'{key}_{side}') for side in ('low', 'high'))
    within = f'[{low:.3f}, {high:.3f}]' if is_number(low) and low != high else ''
    if not within:  # The note says why.
      within, note = note, ''
    shared = key.rpartition('/')[2] in _SHARES and is_number(value)
    share = f'{value / best:.1%}' if shared and is_number(best) and best else note
    line = f'{title:{width}}{number(value):>8}  {within:19}{number(best):>6}  {share:>7}'
    lines.append(line.rstrip())
  if not rule_sets:
    return '\n'.join(lines)
  lines += ['', f'One conversation under {len(rule_sets["rows"])} rule sets']
  for message in rule_sets['conversation']:
    lines.append('  ' + short(f'{message["role"].capitalize()}: {message["content"]}', 78))
  lines.append(f'  {"reward":>6} {"true":>6} {"score":>7}  verdict  rules')
  for row in rule_sets['rows']:
    true = None if row['probability'] is None else 1 - row['probability']
    name = ' '.join(row['rule_set'].split())
    lines.append(
      f'  {1 - row["p_unsafe"]:6.3f} {number(true):>6} {row["score"]:+7.2f}'
      f'  {verdicts.verdict(row):7}  {name[:46]}'
    )
  return '\n'.join(lines)


def _policies_table(summary: Mapping[str, Any]) -> str:
  """Returns an alignment's table: metrics as rows, policies as columns."""
  bounds = ('_low', '_high', '_note')
  names = [
    key.removeprefix('aligned/')
    for key in summary
    if key.startswith('aligned/') and not key.endswith(bounds)
  ]
  policies = dict.fromkeys(
    policy for policy, _, name in (key.partition('/') for key in summary) if name in names
  )
  lines = [f'{"":20}' + ''.join(f'{policy:>14}' for policy in policies)]
  for name in names:
    values = (summary[f'{policy}/{name}'] for policy in policies)
    lines.append(f'{name:20}' + ''.join(f'{value:14.3f}' for value in values))
  return '\n'.join(lines)


# --- The page --------------------------------------------------------------------------


def _page(
  results: Results,
  drawn: Mapping[str, Pictures],
  curves: Pictures,
  title: str,
  manifest: Mapping[str, Any],
  first: Sequence[str] = (),
) -> str:
  parts = [f'# {escape(title)}', TEXTS['intro'], *first, *failed_part(results), *_measured(results)]
  parts += [*skipped_part(results), *paper_part({'this model': results}, (OURS,))]
  chapters: dict[tuple[str, str], dict[str, Result]] = {}
  for name, result in results.items():
    if result.chapter:
      key = result.chapter, name if result.alone else ''
      chapters.setdefault(key, {})[name] = result
  order = list(SUITES)
  # Results of policies are not in SUITES; they have reports of their own.
  for (chapter, _), of in sorted(
    chapters.items(),
    key=lambda item: min(
      order.index(r.suite) if r.suite in order else -1 for r in item[1].values()
    ),
  ):
    parts += _chapter(chapter, of, drawn)
  parts += ['## Training', *images(curves)] if curves else []
  parts += [*_sections(results), *definitions_part(results)]
  if manifest:
    rows = [
      (key, ', '.join(map(str, v)) if isinstance(v, (list, tuple)) else str(v))
      for key, v in config_lib.flatten(manifest).items()
      if v != {}
    ]
    parts += plain_table(Table('What the run was made of', ('', ''), rows, level=2))
  return '\n\n'.join(parts) + '\n'


def _first_page(
  results: Results,
  drawn: dict[str, Pictures],
  about: Mapping[str, Any],
  calibration: Calibration | None,
) -> list[str]:
  """Returns what the model is, what was found, and one figure, which is taken out of `drawn`."""
  rows = [(key, str(value)) for key, value in about.items()]
  parts = plain_table(Table('What it is', ('', ''), rows, level=2)) if rows else []
  if said := findings.sentences(results, calibration):
    parts += ['## In short', '\n'.join(f'{i}. {escape(text)}' for i, text in enumerate(said, 1))]
  for name, result in results.items():
    if result.suite == 'rule_sets' and drawn[name]:
      parts += images(drawn[name][:1])
      drawn[name] = drawn[name][1:]
      break
  return parts


def failed_part(results: Results) -> list[str]:
  """Returns the chapter of the suites that failed, if any did."""
  rows = [(name, r.counts['error']) for name, r in results.items() if r.suite == FAILED]
  intro = 'These suites have no result.'
  return plain_table(Table('Failed', ('suite', 'why'), rows, intro=intro, level=2)) if rows else []


def skipped_part(results: Results) -> list[str]:
  """Returns the chapter of the benchmarks that are not on disk, if any are not."""
  rows = [
    (name, r.description, Markdown(code(r.counts['command'])))
    for name, r in results.items()
    if r.suite == SKIPPED
  ]
  header = ('benchmark', 'what it is', 'what would fetch it')
  intro = 'These benchmarks are not on disk.'
  return plain_table(Table('Skipped', header, rows, intro=intro, level=2)) if rows else []


def _measured(results: Results) -> list[str]:
  rows = []
  for name, result in results.items():
    if result.size:
      dropped = (result.drops or {}).items()
      about = [*result.made_of, *(f'{n:,} left out: {why.replace("_", " ")}' for why, n in dropped)]
      rows.append((name, result.description, result.size, ', '.join(about)))
  header = ('suite', 'what it is', 'size', 'made of')
  return plain_table(Table('What was measured', header, rows, TEXTS['reading'], level=2))


def _chapter(chapter: str, results: Results, drawn: Mapping[str, Pictures]) -> list[str]:
  shared = _joined(results, lambda spec: spec.shared)
  # Without shared tables the results are the columns of one.
  if not shared:
    columns = {name: result.metrics or {} for name, result in results.items()}
    shared = [by_metric(chapter, columns, level=2)]
  parts = [part for spec in shared for part in plain_table(spec)]
  # A remark that several results bring stands once.
  parts += dict.fromkeys(result.remark for result in results.values() if result.remark)
  shown = {title for spec in shared for title in (*spec.header, *(row[0] for row in spec.rows))}
  for name, result in results.items():
    # Metrics that no shared table shows stand in a table of the result's own.
    more = [metric for metric in result.metrics or {} if title_of(metric) not in shown]
    own = plain_table(in_row('', name, result.metrics, more)) if more else []
    own += images(drawn[name])
    for spec in result.tables:
      own += plain_table(spec) if spec.section is None and not spec.shared else []
    parts += ([] if result.alone else [f'### {escape(name)}']) + own if own else []
  return parts


def _sections(results: Results) -> list[str]:
  """Returns the tables that stand in sections at the end, those of one title joined."""
  parts = []
  headings = dict.fromkeys(spec.section for r in results.values() for spec in r.tables)
  for heading in (heading for heading in headings if heading is not None):
    tables = _joined(results, lambda spec, heading=heading: spec.section == heading)
    shown = [part for spec in tables if spec.rows for part in plain_table(spec)]
    # Tables of level 2 are headings themselves.
    parts += ([f'## {heading}'] if shown and tables[0].level > 2 else []) + shown
  return parts


def _joined(results: Results, wanted: Callable[[Table], bool]) -> list[Table]:
  """Returns the wanted tables under the names of their benchmarks, those of one title joined."""
  tables: dict[str, Table] = {}
  for name, result in results.items():
    for spec in filter(wanted, result.tables):
      title = spec.title.replace(NAME, name)
      # A cell that begins with NAME is the label of its row.
      rows = [
        [name + c.removeprefix(NAME) if str(c).startswith(NAME) else c for c in row]
        for row in spec.rows
      ]
      rows = [*(tables[title].rows if title in tables else ()), *rows]
      tables[title] = dataclasses.replace(spec, title=title, rows=rows)
  return list(tables.values())


def definitions_part(results: Results) -> list[str]:
  """Returns the chapter that defines the metrics of the results."""
  used = {name for result in results.values() for name in result.metrics or {}}
  lines = [f'- **{m["title"]}**: {m["text"]}' for name, m in METRICS.items() if name in used]
  return ['## Definitions', '\n'.join(lines)] if lines else []


def paper_part(scorers: Mapping[str, Results], models: Sequence[str]) -> list[str]:
  """Returns the chapter of the paper's tables, on the paper's data."""
  # Other data has its tables elsewhere: none of them is the paper's.
  scorers = {
    scorer: {name: r for name, r in results.items() if name in PAPER['published']}
    for scorer, results in scorers.items()
  }
  parts = [part for spec in paper_tables(scorers, models) for part in plain_table(spec)]
  return ['## As in the paper', *parts] if parts else []


def paper_tables(scorers: Mapping[str, Results], models: Sequence[str] = (OURS,)) -> list[Table]:
  """Returns the paper's tables, with rows for the paper's `models` where the data is the same."""
  tables = []
  for spec in PAPER['tables']:
    rows = []
    for benchmark in dict.fromkeys(n for r in scorers.values() for n in r):
      rows += _paper_rows(benchmark, scorers, spec['suites'], spec['metrics'], models)
    if rows:
      header = ['benchmark', 'scorer', *spec['metrics'].values()]
      tables.append(Table(spec['title'], header, rows, spec['note'], level=3))
  return tables


def _paper_rows(benchmark, scorers, suites, metrics, models) -> list[list[Any]]:
  published, rows = PAPER['published'].get(benchmark, {}), []
  found = {
    scorer: results[benchmark] for scorer, results in scorers.items() if benchmark in results
  }
  for scorer, result in found.items():
    if result.suite in suites:
      cells = [result.metrics.get(name) for name in metrics]
      rows.append(['' if rows else benchmark, scorer, *cells])
  # That a benchmark is missing is said only where the paper has numbers for it.
  missing = any(result.counts.get('intended') in suites for result in found.values())
  if not rows and published and missing:
    rows.append([benchmark, 'skipped: not on disk'] + [None] * len(metrics))
  if rows:
    for model in models:
      if values := published.get(model):
        rows.append(['', f'paper: {model}', *(values.get(name) for name in metrics)])
  return rows


# --- Tables ----------------------------------------------------------------------------


def plain_table(spec: Table) -> list[str]:
  """Returns the table in Markdown, under its heading if it has a title."""
  rows = [spec.header, *spec.rows]
  if spec.shared:
    kept = [any(row[i] is not None for row in spec.rows) for i in range(len(spec.header))]
    rows = [list(itertools.compress(row, kept)) for row in rows]
  heading = f'{"#" * spec.level} {escape(spec.title)}' if spec.title else ''
  header, *cells = [list(map(_cell, row)) for row in rows]
  body = table(header, cells) if spec.rows or not spec.shared else ''
  return list(filter(None, (heading, spec.intro, body, spec.note)))


def images(drawn: Pictures) -> list[str]:
  """Returns tables with two figures in a row, each above its caption."""
  parts = []
  for i in range(0, len(drawn), 2):
    names, captions = zip(*drawn[i : i + 2], strict=True)
    parts.append(table([f'![{os.path.splitext(file)[0]}]({file})' for file in names], [captions]))
  return parts


def _cell(value: Any) -> str:
  """Returns a metric, count, number or text as a table shows it."""
  if isinstance(value, Mapping):  # '0.912 [0.901, 0.925]', or the value alone; with its note
    text = number(value['value'])
    if is_number(value['low']) and value['low'] != value['high']:
      text = f'{text} [{value["low"]:.3f}, {value["high"]:.3f}]'
    return f'{text} ({value["note"]})' if value.get('note') else text
  if isinstance(value, str):
    return value if isinstance(value, Markdown) else escape(value)
  if isinstance(value, int) and not isinstance(value, bool):
    return f'{value:,}'
  return number(value)
