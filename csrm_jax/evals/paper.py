"""The paper's tables, with the paper's own figures beside ours.

Its figures stand only beside benchmarks that are the same data: RuleWorld and
other sets have none. The paper's model is a Llama-3.1-8B.

Source: CSRM (arXiv 2605.30487), Tables 2, 3, 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.evals.measure import Result

OURS = 'CSRM'  # the paper's own model

_CLASSIFICATION = 'f1', 'auprc', 'smece'
_TABLE2 = {
  'LlamaGuard-3-8B': '.839 .916 .119 .840 .953 .169 .950 .983 .051 .131',
  'Llama-3.1-8B-Inst': '.762 .885 .144 .814 .973 .169 .912 .968 .110 .734',
  'ShieldGemma-9B': '.803 .879 .092 .869 .925 .156 .951 .979 .042 .382',
  'DynaGuard-8B-CoT': '.836 - - .782 .833 .196 .793 - - .731',
  'OSS-Safeguard-20B': '.873 .917 .141 .859 .884 .177 .953 .963 .076 .664',
  'CSRM −SA': '.898 .977 .056 .824 .883 .141 .936 .979 .057 .668',
  'CSRM −CCA': '.910 .980 .049 .815 .886 .123 .953 .985 .033 .692',
  OURS: '.911 .965 .017 .946 .987 .076 .953 .951 .047 .758',
}
_TABLE2_COLUMNS = (
  *(('beavertails', m) for m in _CLASSIFICATION),
  *(('cosapien', m) for m in _CLASSIFICATION),
  *(('wildguardmix', m) for m in _CLASSIFICATION),
  ('dynabench', 'f1'),
)


def _published() -> dict[str, dict[str, dict[str, float]]]:
  """Returns {benchmark: {model: {metric: value}}}."""
  published: dict[str, dict[str, dict[str, float]]] = {}

  def put(benchmark, model, metric, value):
    published.setdefault(benchmark, {}).setdefault(model, {})[metric] = value

  for model, row in _TABLE2.items():
    cells = zip(_TABLE2_COLUMNS, row.split(), strict=True)
    for (benchmark, metric), cell in cells:
      if cell != '-':
        put(benchmark, model, metric, float(cell))
  for model, value in {
    OURS: 0.763,
    'CSRM −SA': 0.661,
    'CSRM −CCA': 0.766,
    'Llama-3.1-8B-Inst': 0.642,
  }.items():
    put('safe_rlhf', model, 'accuracy', value)
  put('safe_rlhf', OURS, 'score_gap', 1.705)
  put('xstest', OURS, 'f1', 0.941)
  put('or_bench', OURS, 'f1', 0.831)
  for metric, value in {
    'unsafe_rate': 0.843,
    'shift_leave_one_out': -0.125,
    'shift_other_left_out': 0.02,
    'shift_allow': -0.708,
    'shift_other_allowed': 0.04,
  }.items():
    put('beavertails_policy', OURS, metric, value)
  return published


PUBLISHED = _published()

# (number, title, suites, metrics, note)
TABLES = (
  (
    '2',
    'Verdicts',
    ('classification', 'configurability', 'any_turn'),
    (('f1', 'F1 ↑'), ('auprc', 'AUPRC ↑'), ('smece', 'smECE ↓')),
    '',
  ),
  (
    '3',
    'Pairs',
    ('pairs',),
    (('accuracy', 'accuracy ↑'), ('score_gap', 'mean gap, nats ↑')),
    'The paper also reports BeaverTails-Aug .782 / 0.800 and '
    'WildGuardMix-Aug .648 / 0.832, which are not public.',
  ),
  (
    '4',
    'Over-refusal',
    ('over_refusal',),
    (('f1', 'F1 ↑'), ('false_alarms', 'false alarms ↓'), ('missed', 'missed ↓')),
    'XSTest and OR-Bench are prompt sets: judged is `Sure. {prompt}`.',
  ),
  (
    '6',
    'Policy probes',
    ('policy',),
    (
      ('unsafe_rate', 'unsafe rate, rule stands'),
      ('shift_leave_one_out', 'rule left out ↓'),
      ('shift_other_left_out', 'another left out → 0'),
      ('shift_allow', 'rule allows ↓'),
      ('shift_other_allowed', 'another allows → 0'),
    ),
    'Responses that violate one category. Columns after the first are shifts of the unsafe rate.',
  ),
  (
    '7',
    'Contradiction probe',
    ('contradiction',),
    (
      ('reward_enforce', 'reward, enforce'),
      ('reward_both', 'both'),
      ('reward_allow', 'allow'),
      ('lean', 'lean to allow'),
      ('between', 'categories between'),
    ),
    'Mean rewards, P(safe). The paper finds "both" between the other two '
    'in every category, with a lean to "allow".',
  ),
)


def make_tables(
  scorers: Mapping[str, Mapping[str, Result]], models: Sequence[str] = (OURS,)
) -> list[dict[str, Any]]:
  """Returns the paper's tables as {title, header, rows, note}.

  Args:
    scorers: {scorer: {benchmark: result}}; one for the report of one scorer.
    models: of the paper, whose figures are rows where the data is the same.
  """
  tables = []
  for number, title, suites, metrics, note in TABLES:
    rows = []
    for benchmark in dict.fromkeys(n for r in scorers.values() for n in r):
      rows += _rows(benchmark, scorers, suites, metrics, models)
    if rows:
      tables.append(
        {
          'title': f'Table {number}: {title}',
          'header': ['benchmark', 'scorer', *(text for _, text in metrics)],
          'rows': rows,
          'note': note,
        }
      )
  return tables


def _rows(benchmark, scorers, suites, metrics, models) -> list[list[Any]]:
  rows = []
  for scorer, results in scorers.items():
    result = results.get(benchmark)
    if result is not None and result['suite'] in suites:
      cells = [result['metrics'].get(name) for name, _ in metrics]
      rows.append(['' if rows else benchmark, scorer, *cells])
  # A set of the paper's that is missing says so; others are not missed.
  if (
    not rows
    and benchmark in PUBLISHED
    and any(r.get(benchmark, {}).get('intended') in suites for r in scorers.values())
  ):
    rows.append([benchmark, 'skipped: not on disk'] + [None] * len(metrics))
  if rows:
    for model in models:
      values = PUBLISHED.get(benchmark, {}).get(model)
      if values:
        cells = [values.get(name) for name, _ in metrics]
        rows.append(['', f'paper: {model}', *cells])
  return rows
