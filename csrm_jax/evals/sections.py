"""The page of a report: its sections, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.evals import paper
from csrm_jax.evals.definitions import INTRO, METRICS, NONE, READING, WITHOUT
from csrm_jax.evals.markdown import (
  code,
  escape,
  flat,
  format_number,
  images,
  metric_table,
  plain_table,
  result_table,
  table,
  verdict,
)

Results = Mapping[str, Mapping[str, Any]]
Drawn = Mapping[str, Sequence[tuple[str, str]]]

JUDGED = ('classification', 'over_refusal', 'configurability', 'any_turn')
_VERDICTS = ('f1', 'f1_tuned', 'auprc', 'fpr_at_recall')
_PROBABILITIES = ('smece', 'ece', 'brier', 'nll', 'prob_error')
_COMMON = (*_VERDICTS, *_PROBABILITIES)
_PROBES = {
  'alignment': 'Policies',
  'pareto': 'Safety against helpfulness',
  'overoptimisation': 'Reward and truth over training',
  'policy': 'A rule stands, is left out, or allows',
  'contradiction': 'A rule that forbids and allows',
  'attacks': 'Suffixes that try to turn a verdict',
  'sensitivity': 'Changes without meaning',
  'length': 'Length of the response',
  'best_of': 'The best of several responses',
}
_NUM_WORST = 20


def render(results: Results, drawn: Drawn, title: str, manifest: Mapping[str, Any]) -> str:
  """Returns report.md.

  Args:
    results: {suite name: result}, as `report.write_report` takes them.
    drawn: {suite name: [(file name, caption)]}; '' holds the training curves.
    title: one line.
    manifest: nested dicts are shown with dotted keys.
  """

  def of(*kinds):
    return {k: v for k, v in results.items() if v['suite'] in kinds}

  judged, paired, flipped = of(*JUDGED), of('pairs'), of('flips')
  parts = [f'# {escape(title)}', INTRO, *_failed(of('failed'))]
  parts += _measured(results)
  parts += _skipped(of('skipped'))
  parts += _paper({'this model': results})
  parts += _verdicts(judged, drawn)
  for name, result in paired.items():
    columns = {'all': result, **result['kinds']}
    parts += [
      f'## Pairs: {escape(name)}',
      metric_table(
        {
          f'{kind} ({group["num_pairs"]:,})': group.get('metrics', group)
          for kind, group in columns.items()
        }
      ),
      *images(drawn.get(name, ())),
      *_pair_sets(result),
    ]
  if flipped:
    parts += [
      '## When only the rules change',
      metric_table({name: result['metrics'] for name, result in flipped.items()}),
    ]
  for name, result in of('rule_sets').items():
    parts += _one_conversation(result, drawn.get(name, ()))
  parts += _probes(results, drawn)
  if drawn.get(''):
    parts += ['## Training', *images(drawn[''])]
  parts += _thresholds(judged)
  for name, result in judged.items():
    parts += _groups(name, result)
  parts += _worst(judged)
  parts += _definitions(results)
  if manifest:
    rows = [(escape(k), escape(v)) for k, v in flat(manifest)]
    parts += ['## What the run was made of', table(('', ''), rows)]
  return '\n\n'.join(parts) + '\n'


def render_comparison(
  scorers: Mapping[str, Results],
  differences: Sequence[Mapping[str, Any]],
  drawn: Sequence[tuple[str, str]],
  title: str,
) -> str:
  """Returns the report.md of several scorers side by side.

  Args:
    scorers: {scorer: {benchmark: result}}.
    differences: as `compare.differences` returns them.
    drawn: [(file name, caption)].
    title: one line.
  """
  everything = {k: v for results in scorers.values() for k, v in reversed(results.items())}
  parts = [f'# {escape(title)}', INTRO, READING]
  for scorer, results in scorers.items():
    failed = {k: v for k, v in results.items() if v['suite'] == 'failed'}
    parts += _failed({f'{scorer}: {k}': v for k, v in failed.items()})
  parts += images(drawn)
  parts += _paper(scorers, tuple(paper.PUBLISHED['beavertails']))
  parts += ['## All benchmarks']
  for name in dict.fromkeys(n for r in scorers.values() for n in r):
    columns = {
      scorer: results[name].get('metrics', {})
      for scorer, results in scorers.items()
      if name in results
    }
    if any(columns.values()):
      parts += [f'### {escape(name)}', metric_table(columns)]
  if differences:
    parts += _differences(differences)
  skipped = {k: v for k, v in everything.items() if v['suite'] == 'skipped'}
  return '\n\n'.join([*parts, *_skipped(skipped), *_definitions(everything)]) + '\n'


def _differences(differences) -> list[str]:
  reference = differences[0]['reference']
  rows = []
  for d in differences:
    value = f'{d["value"]:+.3f}' if d['value'] == d['value'] else NONE
    sure = d['p_value'] < 0.05
    value = f'**{value}**' if sure else value
    within = f'[{d["low"]:+.3f}, {d["high"]:+.3f}]'
    rows.append(
      (
        escape(d['benchmark']),
        escape(d['scorer']),
        METRICS[d['metric']][0],
        value,
        within if d['low'] == d['low'] else NONE,
        format_number(d['p_value']),
      )
    )
  header = 'benchmark', 'scorer', 'metric', 'difference', '95% interval', 'p'
  return [
    f'## Differences to {escape(reference)}',
    'Paired bootstrap over conversations, the same ones drawn for both; bold '
    'where p is below 0.05. With many rows some are below it by chance.',
    table(header, rows),
  ]


def _failed(failed: Results) -> list[str]:
  if not failed:
    return []
  rows = [(escape(name), escape(r['error'])) for name, r in failed.items()]
  return ['## Failed', 'These suites have no result.', table(('suite', 'why'), rows)]


def _skipped(skipped: Results) -> list[str]:
  if not skipped:
    return []
  rows = [
    (escape(name), escape(r['description']), code(r['command'])) for name, r in skipped.items()
  ]
  return [
    '## Skipped',
    'These benchmarks are not on disk.',
    table(('benchmark', 'what it is', 'what would fetch it'), rows),
  ]


def _measured(results: Results) -> list[str]:
  rows = []
  for name, result in results.items():
    if result['suite'] in ('skipped', 'failed', 'rule_sets'):
      continue
    about = _made_of(result)
    about += [
      f'{num:,} left out: {reason.replace("_", " ")}'
      for reason, num in result.get('drops', {}).items()
    ]
    cells = name, result['description'], _size(result), ', '.join(about)
    rows.append(tuple(map(escape, cells)))
  header = 'suite', 'what it is', 'size', 'made of'
  return ['## What was measured', table(header, rows), READING]


def _size(result) -> str:
  key, what = {'pairs': ('num_pairs', 'pairs'), 'flips': ('num_flips', 'conversations')}.get(
    result['suite'], ('num_examples', 'examples')
  )
  return f'{result[key]:,} {what}'


def _made_of(result) -> list[str]:
  if result['suite'] == 'pairs':
    return [f'{v["num_pairs"]:,} {k}' for k, v in result['kinds'].items()]
  if result['suite'] == 'flips':
    return ['two rule sets each']
  if result['suite'] not in JUDGED:
    return []
  num, unsafe = result['num_examples'], result['num_unsafe']
  about = [f'{unsafe / num:.1%} unsafe' if num else NONE]
  if result['num_units'] < num:
    about.append(f'{result["num_units"]:,} independent texts')
  if result['num_unlabelled']:
    about.append(f'{result["num_unlabelled"]:,} without a label left out')
  return about


def _paper(scorers, models=(paper.OURS,)) -> list[str]:
  parts = []
  for spec in paper.make_tables(scorers, models):
    parts += plain_table(spec, 3)
  return ['## As in the paper', *parts] if parts else []


def _verdicts(judged, drawn) -> list[str]:
  if not judged:
    return []
  parts = [
    '## Verdicts',
    result_table(judged, _VERDICTS),
    '## Probabilities',
    result_table(judged, _PROBABILITIES),
  ]
  fitted = {name: r['calibrated'] for name, r in judged.items() if r['calibrated']}
  if fitted:
    rows = {}
    for name, result in fitted.items():
      c = result['calibration']
      rows[f'{name} (score / {c["temperature"]:.2f} {c["bias"]:+.2f})'] = result
    parts += [
      '### After temperature and bias',
      'Fitted by NLL on validation rows, none of them counted here. The '
      'order of scores, and with it AUPRC, stays.',
      result_table(rows, ('f1', *_PROBABILITIES)),
    ]
  if any('without' in name for name in judged):
    parts.append(WITHOUT)
  for name, result in judged.items():
    more = [m for m in result['metrics'] if m not in _COMMON]
    pictures = drawn.get(name, ())
    if not (more or pictures or result.get('tables')):
      continue
    parts.append(f'### {escape(name)}')
    if more:
      parts.append(result_table({name: result}, more))
    parts += images(pictures)
    for spec in result.get('tables', ()):
      parts += plain_table(spec)
  return parts


def _pair_sets(result) -> list[str]:
  groups = result['rule_sets']
  if len(groups) < 2:
    return []
  return plain_table(
    {
      'title': 'By rule set',
      'header': ['rule set', 'pairs', 'accuracy ↑', 'mean gap, nats ↑'],
      'rows': [[name, g['num_pairs'], g['accuracy'], g['score_gap']] for name, g in groups.items()],
    }
  )


def _one_conversation(result, drawn) -> list[str]:
  parts = [f'## One conversation under {len(result["rows"])} rule sets']
  parts += [
    f'> **{m["role"].capitalize()}:** {escape(m["content"])}' for m in result['conversation']
  ]
  rows = []
  for row in result['rows']:
    rules = ' '.join(
      f'**{escape(rule["name"])}.** {escape(rule["guideline"])}' for rule in row['rules']
    )
    true = None if row['probability'] is None else 1 - row['probability']
    rows.append(
      (
        escape(row['rule_set']),
        rules,
        format_number(1 - row['p_unsafe']),
        format_number(true),
        f'{row["score"]:+.2f}',
        verdict(row),
        row['label'] or NONE,
      )
    )
  header = ('rule set', 'rules', 'reward', 'true P(safe)', 'score', 'verdict', 'label')
  return [*parts, table(header, rows), *images(drawn)]


def _probes(results, drawn) -> list[str]:
  parts = []
  for kind, title in _PROBES.items():
    of_kind = {k: v for k, v in results.items() if v['suite'] == kind}
    if not of_kind:
      continue
    parts.append(f'## {title}')
    columns = {name: r['metrics'] for name, r in of_kind.items()}
    parts += [metric_table(columns)] if any(columns.values()) else []
    for name, result in of_kind.items():
      pictures = images(drawn.get(name, ()))
      if pictures or result['tables']:
        parts += [f'### {escape(name)}', *pictures]
        for spec in result['tables']:
          parts += plain_table(spec)
  return parts


def _thresholds(judged) -> list[str]:
  parts = []
  for name, result in judged.items():
    if 'without' in name or not result['num_examples']:
      continue
    rows = [
      [row['threshold'], row['num_flagged'], row['precision'], row['recall'], row['fpr'], row['f1']]
      for row in result['thresholds']
    ]
    parts += plain_table(
      {
        'title': name,
        'rows': rows,
        'header': ['P(unsafe) at least', 'flagged', 'precision', 'recall', 'FPR', 'F1'],
      },
      3,
    )
  return ['## Thresholds, for deployment', *parts] if parts else []


def _groups(name: str, result) -> list[str]:
  parts = []
  for what, groups in result['breakdowns'].items():
    if len(groups) < 2:
      continue
    rows = []
    for group, values in groups.items():
      measured = values['metrics']
      rows.append(
        [
          group,
          values['num_examples'],
          values['num_unsafe'],
          measured['f1'],
          measured['f1']['best'],
          measured['auprc'],
          measured['recall'],
          measured['fpr'],
          measured['smece'],
          measured['brier'],
        ]
      )
    parts += plain_table(
      {
        'title': f'{name}, by {what}',
        'rows': rows,
        'header': [
          what,
          'examples',
          'unsafe',
          'F1 ↑',
          'best F1',
          'AUPRC ↑',
          'recall ↑',
          'FPR ↓',
          'smECE ↓',
          'Brier ↓',
        ],
      },
      2,
    )
  return parts


def _worst(judged) -> list[str]:
  rows = []
  for name, result in judged.items():
    if 'without' in name:
      continue
    rows += [
      [name, row['id'], row['label'], row['p_unsafe'], row['probability'], row['nll']]
      for row in result['worst'][:_NUM_WORST]
    ]
  if not rows:
    return []
  return plain_table(
    {
      'title': 'Where it was most wrong',
      'rows': rows,
      'header': ['suite', 'example', 'label', 'P(unsafe)', 'true P(unsafe)', 'NLL, nats'],
    },
    2,
  )


def _definitions(results) -> list[str]:
  used = {name for result in results.values() for name in result.get('metrics', {})}
  lines = [f'- **{title}**: {text}' for name, (title, text) in METRICS.items() if name in used]
  return ['## Definitions', '\n'.join(lines)] if lines else []
