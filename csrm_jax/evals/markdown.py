"""The text of a report, in Markdown.

Everything that comes from data, configs or users is escaped: it can neither
make markup nor break a table.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# name -> (title, what it is). Titles say which direction is better.
METRICS = {
    'f1': (
        'F1 ↑',
        'harmonic mean of precision and recall of "unsafe"; a response is '
        'called unsafe where P(unsafe) is 0.5 or more. Best reachable: a judge '
        'that knows the true probabilities, at the threshold with the highest '
        'expected F1.',
    ),
    'f1_tuned': (
        'F1, tuned threshold ↑',
        'F1 at the threshold that was best on other, validation, rows.',
    ),
    'auprc': (
        'AUPRC ↑',
        'average precision: area under precision over recall of "unsafe", all '
        'thresholds together.',
    ),
    'smece': (
        'smECE ↓',
        'smooth calibration error: how far P(unsafe) is from the share of '
        'unsafe labels among similar predictions. On few rows even true '
        'probabilities do not reach 0: compare with the best reachable.',
    ),
    'ece': ('ECE ↓', 'the same with 15 bins of equal width.'),
    'brier': (
        'Brier ↓', 'mean squared distance of P(unsafe) to the label, 0 or 1.'
    ),
    'nll': ('NLL ↓', 'mean of -log P(label), in nats.'),
    'fpr_at_recall': (
        'FPR at 95% recall ↓',
        'share of safe responses flagged at the threshold that catches 95% of '
        'the unsafe ones.',
    ),
    'prob_error': (
        'Probability error ↓',
        'mean distance of P(unsafe) to the true probability, which is known '
        'for generated data only.',
    ),
    'accuracy': (
        'Pair accuracy ↑',
        'share of pairs whose safer side has the higher score; a tie is not a '
        'win. Best reachable: the share that the true probabilities order as '
        'labelled. Where those are equal the label is a coin\'s, so accuracy '
        'can exceed it by half of the best tie rate.',
    ),
    'tie_rate': ('Tie rate ↓', 'share of pairs whose two scores are equal.'),
    'score_gap': (
        'Mean score gap ↑',
        'score of the safer side minus the other, in nats. Best reachable: the '
        'gap of the true log odds, clipped to probabilities of 1e-6.',
    ),
    'consistency': (
        'Flip consistency ↑',
        'one conversation under two rule sets that give it different labels: '
        'share of such cases with both labels right. A judge that does not '
        'read the rules gets 0.',
    ),
    'direction': (
        'Flip direction ↑',
        'share of the same cases whose score is higher under the rules that '
        'make the response safe. A judge that does not read them gets 0.',
    ),
}
NONE = '–'
_INTRO = """\
A safety reward model reads written rules and a conversation, and gives the
probability that the last response breaks the rules: P(unsafe). Its *score* is
log P(safe) - log P(unsafe), in nats; its *reward* is P(safe). "Unsafe" is the
positive class of every metric. Arrows say which way is better."""
_READING = f"""\
Values are followed by their 95% bootstrap interval, over rows drawn with
replacement; those of calibration errors show the spread only. *Best* is what a
judge reaches that knows the true probability of each label, on the same rows,
where that is known; labels are drawn with that probability, so on few rows a
model can be lucky and lie above it. {NONE} means not known, or not defined on
these rows (none of them, or one class only). Definitions are at the end."""
_WITHOUT = """\
A suite named "without rules" has the same conversations and labels, with the
rules replaced by one that says nothing: the difference is what reading the
rules is worth."""


def render(
    results: Mapping[str, Mapping[str, Any]],
    drawn: Mapping[str, Sequence[tuple[str, str]]],
    title: str,
    manifest: Mapping[str, Any],
) -> str:
  """Returns report.md.

  Args:
    results: {suite name: result}, as `report.write_report` takes them.
    drawn: {suite name: [(file name, caption)]}; '' holds the training curves.
    title: one line.
    manifest: nested dicts are shown with dotted keys.
  """
  def of(kind):
    return {k: v for k, v in results.items() if v['suite'] == kind}

  judged, paired, flipped = of('classification'), of('pairs'), of('flips')
  parts = [f'# {escape(title)}', _INTRO]
  parts += _measured(judged, paired, flipped)
  parts += _classification(judged, drawn)
  for name, result in paired.items():
    columns = {'all': result, **result['kinds']}
    parts += [f'## Pairs: {escape(name)}', _metric_table({
        f'{kind} ({group["num_pairs"]:,})': group.get('metrics', group)
        for kind, group in columns.items()
    }), *_images(drawn.get(name, ()))]
  if flipped:
    parts += ['## When only the rules change', _metric_table(
        {name: result['metrics'] for name, result in flipped.items()}
    )]
  for name, result in of('rule_sets').items():
    parts += _one_conversation(result, drawn.get(name, ()))
  if drawn.get(''):
    parts += ['## Training', *_images(drawn[''])]
  for name, result in judged.items():
    parts += _groups(name, result)
  parts += _worst(judged)
  parts += _definitions(results)
  if manifest:
    rows = [(escape(k), escape(v)) for k, v in _flat(manifest)]
    parts += ['## What the run was made of', _table(('', ''), rows)]
  return '\n\n'.join(parts) + '\n'


def _measured(judged, paired, flipped) -> list[str]:
  rows = []
  for name, result in judged.items():
    num, unsafe = result['num_examples'], result['num_unsafe']
    share = f'{unsafe / num:.1%} unsafe' if num else NONE
    if result['num_unlabelled']:
      share += f', {result["num_unlabelled"]:,} without a label left out'
    rows.append((name, result['description'], f'{num:,} examples', share))
  for name, result in paired.items():
    kinds = ', '.join(f'{v["num_pairs"]:,} {k}'
                      for k, v in result['kinds'].items())
    rows.append(
        (name, result['description'], f'{result["num_pairs"]:,} pairs', kinds)
    )
  for name, result in flipped.items():
    num = f'{result["num_flips"]:,} conversations'
    rows.append((name, result['description'], num, 'two rule sets each'))
  header = 'suite', 'what it is', 'size', 'made of'
  cells = [tuple(escape(cell) for cell in row) for row in rows]
  return ['## What was measured', _table(header, cells), _READING]


def _classification(judged, drawn) -> list[str]:
  if not judged:
    return []
  parts = ['## Verdicts and probabilities', _metric_table(
      {name: result['metrics'] for name, result in judged.items()}
  )]
  if any('without' in name for name in judged):
    parts.append(_WITHOUT)
  for name in judged:
    parts += [f'### {escape(name)}', *_images(drawn.get(name, ()))]
  return parts


def _one_conversation(result, images) -> list[str]:
  parts = [f'## One conversation under {len(result["rows"])} rule sets']
  parts += [
      f'> **{m["role"].capitalize()}:** {escape(m["content"])}'
      for m in result['conversation']
  ]
  rows = []
  for row in result['rows']:
    rules = ' '.join(f'**{escape(rule["name"])}.** {escape(rule["guideline"])}'
                     for rule in row['rules'])
    true = None if row['probability'] is None else 1 - row['probability']
    rows.append((
        escape(row['rule_set']), rules, format_number(1 - row['p_unsafe']),
        format_number(true), f'{row["score"]:+.2f}', verdict(row),
        row['label'] or NONE,
    ))
  header = (
      'rule set', 'rules', 'reward', 'true P(safe)', 'score', 'verdict', 'label'
  )
  return [*parts, _table(header, rows), *_images(images)]


def _groups(name: str, result) -> list[str]:
  parts = []
  for key, what in (('rule_sets', 'rule set'), ('sources', 'source')):
    groups = result[key]
    if len(groups) < 2:
      continue
    rows = []
    for group, values in groups.items():
      measured = values['metrics']
      cells = [format_metric(measured['f1']), _best(measured['f1'])]
      cells += [format_metric(measured[m]) for m in ('auprc', 'smece', 'brier')]
      num = f'{values["num_examples"]:,}'
      rows.append((escape(group), num, f'{values["num_unsafe"]:,}', *cells))
    header = (
        what, 'examples', 'unsafe', 'F1 ↑', 'best F1', 'AUPRC ↑', 'smECE ↓',
        'Brier ↓',
    )
    parts += [f'## {escape(name)}, by {what}', _table(header, rows)]
  return parts


def _worst(judged) -> list[str]:
  rows = []
  for name, result in judged.items():
    for row in result['worst'][:5]:
      rows.append((
          escape(name), escape(row['id']), row['label'],
          format_number(row['p_unsafe']), format_number(row['probability']),
          format_number(row['nll']),
      ))
  if not rows:
    return []
  header = (
      'suite', 'example', 'label', 'P(unsafe)', 'true P(unsafe)', 'NLL, nats'
  )
  return ['## Where it was most wrong', _table(header, rows)]


def _definitions(results) -> list[str]:
  used = {
      name for result in results.values() for name in result.get('metrics', {})
  }
  lines = [
      f'- **{title}**: {text}' for name, (title, text) in METRICS.items()
      if name in used
  ]
  return ['## Definitions', '\n'.join(lines)] if lines else []


def _metric_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a table of metrics by column, each with its best beside it."""
  header = ['']
  for name in columns:
    header += [escape(name), 'best']
  rows = []
  for metric, (title, _) in METRICS.items():
    if not any(metric in column for column in columns.values()):
      continue
    row = [title]
    for column in columns.values():
      value = column.get(metric)
      row += [format_metric(value), _best(value)] if value else [NONE, NONE]
    rows.append(row)
  return _table(header, rows)


def _images(drawn: Iterable[tuple[str, str]]) -> list[str]:
  """Returns tables of two figures a row, each above its caption."""
  drawn, parts = list(drawn), []
  for i in range(0, len(drawn), 2):
    files, captions = zip(*drawn[i : i + 2], strict=True)
    pictures = [f'![{os.path.splitext(file)[0]}]({file})' for file in files]
    parts.append(_table(pictures, [captions]))
  return parts


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _flat(tree: Mapping[str, Any], prefix: str = '') -> list[tuple[str, str]]:
  rows = []
  for key, value in tree.items():
    if isinstance(value, Mapping):
      rows += _flat(value, f'{prefix}{key}.')
    elif isinstance(value, (list, tuple)):
      rows.append((f'{prefix}{key}', ', '.join(map(str, value))))
    else:
      rows.append((f'{prefix}{key}', str(value)))
  return rows


def _best(metric: Mapping[str, Any]) -> str:
  return format_number(metric['best'])


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


def escape(text: Any) -> str:
  """Returns the text on one line, with nothing left that Markdown acts on."""
  return re.sub(r'([\\`*_\[\]<>|#~&$!])', r'\\\1', ' '.join(str(text).split()))
