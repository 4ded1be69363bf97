"""The report of a run: report.md, metrics.json, summary.json and figures.

`results` is {suite name: result of a function of `suites`}, for example
{'seen': classification(...), 'unseen': ..., 'pairs': pairs(...), 'flip':
flips(...), 'one_conversation': rule_sets(...)}. The report is written for a
reader who has neither the code nor the run.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from csrm_jax.core import files
from csrm_jax.evals import figures, markdown, policy, sections
from csrm_jax.evals.markdown import format_number, is_number

_TERMINAL_ROWS = (
  ('F1, seen rules', 'seen/f1'),
  ('F1, unseen rules', 'unseen/f1'),
  ('AUPRC, seen rules', 'seen/auprc'),
  ('AUPRC, unseen rules', 'unseen/auprc'),
  ('smECE, seen rules', 'seen/smece'),
  ('smECE, unseen rules', 'unseen/smece'),
  ('pair accuracy', 'pairs/accuracy'),
  ('mean score gap, nats', 'pairs/score_gap'),
  ('flip consistency', 'flip/consistency'),
)
# Where "share of the best" means something.
_SHARES = ('f1', 'auprc', 'accuracy')


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
  """Returns the flat `suite/metric` dict of a run's results.

  For each metric the value, and `_best`, `_low`, `_high` where there is one.
  """
  flat = {}
  for suite, result in results.items():
    for name, metric in result.get('metrics', {}).items():
      flat[f'{suite}/{name}'] = metric['value']
      for part in ('best', 'low', 'high'):
        if metric[part] is not None:
          flat[f'{suite}/{name}_{part}'] = metric[part]
  return flat


def terminal_table(summary: Mapping[str, Any], rule_sets: Mapping[str, Any] | None = None) -> str:
  """Returns the short table that a run ends with, at most 80 columns wide.

  Args:
    summary: flat, as `summarise` returns it; rows it lacks are left out.
    rule_sets: a result of `suites.rule_sets`, shown below the table.
  """
  lines = [f'{"":22}{"value":>8}  {"95% interval":17}{"best":>7}{"of best":>9}']
  for title, key in _TERMINAL_ROWS:
    if key not in summary:
      continue
    value, best = summary[key], summary.get(f'{key}_best')
    low, high = (summary.get(f'{key}_{side}') for side in ('low', 'high'))
    within = '' if not is_number(low) else f'[{low:.3f}, {high:.3f}]'
    shared = key.rpartition('/')[2] in _SHARES and is_number(value)
    share = f'{value / best:.1%}' if shared and is_number(best) and best else ''
    line = f'{title:22}{format_number(value):>8}  {within:17}'
    lines.append(f'{line}{format_number(best):>7}{share:>9}'.rstrip())
  if rule_sets:
    lines += ['', *_conversation_block(rule_sets)]
  return '\n'.join(lines)


def _conversation_block(result: Mapping[str, Any]) -> list[str]:
  lines = [f'One conversation under {len(result["rows"])} rule sets']
  for message in result['conversation']:
    text = ' '.join(message['content'].split())
    text = f'  {message["role"].capitalize()}: {text}'
    lines.append(text if len(text) <= 80 else text[:79] + '…')
  lines.append(f'  {"reward":>6} {"true":>6} {"score":>7}  verdict  rules')
  for row in result['rows']:
    true = None if row['probability'] is None else 1 - row['probability']
    name = ' '.join(row['rule_set'].split())
    lines.append(
      f'  {1 - row["p_unsafe"]:6.3f} {format_number(true):>6}'
      f' {row["score"]:+7.2f}  {markdown.verdict(row):7}  {name[:46]}'
    )
  return lines


def write_report(
  path: str | os.PathLike,
  results: Mapping[str, Mapping[str, Any]],
  *,
  title: str,
  summary: Mapping[str, Any],
  manifest: Mapping[str, Any] | None = None,
  history: str | os.PathLike | None = None,
) -> pathlib.Path:
  """Returns the path of report.md, written with all that belongs to it.

  Everything is made in a temporary folder beside `path` and then moved, each
  file in one step and summary.json last: a report that cannot be written
  leaves the old one as it was. Other files in `path` are left alone.

  Args:
    path: the report's folder, on a local disk.
    results: {suite name: result}, see the top of this file.
    title: one line.
    summary: flat, goes to summary.json as it is.
    manifest: what the run was made of: versions, digests, devices, command.
    history: the run's metrics.jsonl, for the training curves.

  Raises:
    ValueError: a summary value is not a number, a text or None.
  """
  for key, value in summary.items():
    if isinstance(value, (Mapping, list, tuple)):
      raise ValueError(
        f'summary[{key!r}] is a {type(value).__name__}; a summary is flat, '
        'so give it one key for each number'
      )
  with files.whole_folder(path, last='summary.json') as temporary:
    curves = read_history(history) if history is not None else {}
    drawn = draw_figures(temporary, results, curves)
    text = sections.render(results, drawn, title, manifest or {})
    dump_text(temporary / 'report.md', text)
    dump_json(
      temporary / 'metrics.json', {'title': title, 'suites': results, 'manifest': manifest or {}}
    )
    dump_json(temporary / 'summary.json', summary)
    _dump_arrays(temporary / 'arrays.npz', results)
  return pathlib.Path(path) / 'report.md'


def read_results(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """Returns the results of a report's folder, arrays included.

  Raises:
    ValueError: the folder has no report that this version wrote.
  """
  path = pathlib.Path(path)
  try:
    results = json.loads((path / 'metrics.json').read_text())['suites']
    with np.load(path / 'arrays.npz') as stored:
      for key in stored.files:
        suite, _, name = key.rpartition('/')
        results[suite].setdefault('arrays', {})[name] = stored[key]
  except (OSError, KeyError, ValueError) as error:
    raise ValueError(
      f'{path} holds no report to compare ({error}); evaluate the scorer '
      'again and give the folder that its report.md is in'
    ) from None
  return results


def dump_text(path: pathlib.Path, text: str) -> None:
  """Writes the text; half a letter, as a path may hold, is no error."""
  path.write_bytes(text.encode('utf-8', 'backslashreplace'))


def _dump_arrays(path: pathlib.Path, results) -> None:
  """Writes what paired comparisons need; texts are ids, never content."""
  arrays = {
    f'{suite}/{name}': value
    for suite, result in results.items()
    for name, value in result.get('arrays', {}).items()
    if value is not None
  }
  np.savez_compressed(path, **arrays)


def read_history(path: str | os.PathLike) -> dict[str, dict[int, float]]:
  """Returns {name: {step: value}} of a metrics.jsonl, finite numbers only.

  Of two lines for one step the later counts. A line that is not whole, as a
  killed run leaves it, is skipped. Empty without a file.
  """
  series: dict[str, dict[int, float]] = {}
  for row in files.read_log(path):
    step = row.pop('step', None)
    if not is_number(step):
      continue
    for name, value in row.items():
      if is_number(value):
        series.setdefault(name, {})[step] = value
  return {name: points for name, points in series.items() if len(points) > 1}


def draw_figures(
  folder: pathlib.Path,
  results: Mapping[str, Mapping[str, Any]],
  curves: Mapping[str, Mapping[int, float]],
) -> dict[str, list[tuple[str, str]]]:
  """Returns {suite: [(file name, caption)]} of the figures it writes.

  The training curves are under the name ''. A figure that its data cannot
  make (too few rows, one class) is left out.
  """
  drawn: dict[str, list[tuple[str, str]]] = {}
  for suite, result in results.items():
    draw = _DRAW.get(result['suite'])
    stem = str(folder / re.sub(r'[^A-Za-z0-9_-]+', '_', suite))
    drawn[suite] = draw(stem, result) if draw else []
  if curves:
    figures.draw_training(folder / 'training.png', curves)
    drawn[''] = [('training.png', 'Training curves over optimizer steps.')]
  return drawn


def _draw_classification(stem: str, result) -> list[tuple[str, str]]:
  drawn = []
  arrays = result['arrays']
  labels, p_unsafe = arrays['labels'], arrays['p_unsafe']

  def add(name, caption, draw, *data):
    draw(f'{stem}_{name}.png', *data)
    drawn.append((os.path.basename(f'{stem}_{name}.png'), caption))

  if len(labels) >= figures.MIN_ROWS and 0 < labels.sum() < len(labels):
    add(
      'reliability',
      'Reliability: share of unsafe labels near each predicted P(unsafe), '
      'with its 95% band. On the diagonal a prediction is a probability; '
      'the line is thick where there are many.',
      figures.draw_reliability,
      labels,
      p_unsafe,
    )
    add(
      'precision_recall',
      'Precision over recall of "unsafe".',
      figures.draw_precision_recall,
      labels,
      p_unsafe,
      arrays['probability'],
    )
  if len(labels):
    add('scores', 'Scores by label.', figures.draw_scores, labels, arrays['scores'])
  sets = result['breakdowns']['rule set']
  if sum(is_number(g['metrics']['f1']['value']) for g in sets.values()) > 1:
    add('rule_sets', 'F1 by rule set (number of examples).', figures.draw_groups, sets)
  if result['suite'] == 'configurability' and len(sets) > 1:
    add(
      'shares',
      'Share labelled unsafe, and mean P(unsafe), by rule set: the same texts, other rules.',
      figures.draw_shares,
      sets,
    )
  if len(result.get('recall', ())) > 1:
    add(
      'recall',
      'Share of the violated rules among the k rules that BM25 '
      'finds most relevant to the conversation.',
      figures.draw_recall,
      result['recall'],
      result['recall_by_chance'],
      result['top_k'],
    )
  return drawn


def _draw_pairs(stem: str, result) -> list[tuple[str, str]]:
  if not result['num_pairs']:
    return []
  arrays = result['arrays']
  figures.draw_gaps(f'{stem}_gaps.png', arrays['gap'], arrays['kind'])
  caption = 'Score gaps of pairs: right of 0 the order is right.'
  return [(os.path.basename(f'{stem}_gaps.png'), caption)]


def _draw_one(draw, caption: str):
  """Returns the drawer of a suite with one figure."""

  def drawer(stem: str, result) -> list[tuple[str, str]]:
    if not result['num_examples']:
      return []
    draw(f'{stem}.png', result)
    return [(os.path.basename(f'{stem}.png'), caption)]

  return drawer


def _draw_rule_sets(stem: str, result) -> list[tuple[str, str]]:
  figures.draw_rule_sets(f'{stem}.png', result['conversation'], result['rows'])
  caption = 'The same conversation under each rule set: only the rules differ.'
  return [(os.path.basename(f'{stem}.png'), caption)]


_DRAW = {
  **dict.fromkeys(sections.JUDGED, _draw_classification),
  'pairs': _draw_pairs,
  'rule_sets': _draw_rule_sets,
  'policy': _draw_one(
    lambda path, result: figures.draw_policy(path, result['rates'], result['true_rates']),
    'Unsafe rate as one rule changes: on the left the rule that the '
    'response violates, on the right another one.',
  ),
  'contradiction': _draw_one(
    lambda path, result: figures.draw_contradiction(path, result['categories']),
    'Mean reward by category where the rule forbids, allows, or does both.',
  ),
  **{k: _draw_one(*v) for k, v in policy.FIGURES.items()},
  'attacks': _draw_one(
    lambda path, result: figures.draw_attacks(path, result['rates'], result['num_caught']),
    'Share of caught violations that a suffix turns into "safe".',
  ),
}


def dump_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON, without arrays, and null for what is not finite."""
  text = json.dumps(_plain(value), indent=2, allow_nan=False)
  path.write_text(text + '\n', encoding='utf-8')


def _plain(value: Any) -> Any:
  """Returns what JSON can hold: no arrays, and null for what is not finite."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items() if k != 'arrays'}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return str(value)
