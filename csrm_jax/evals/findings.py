"""What a report says first, in five sentences: the figures of a run, in words.

Verdict, biggest weakness, threshold, calibration, next step. Each follows from metrics alone; what
was not measured is said to be so.
"""

from __future__ import annotations

from collections.abc import Mapping

from csrm_jax.core.markdown import is_number
from csrm_jax.evals.metrics import Calibration
from csrm_jax.evals.results import Metric, Result, title_of

Results = Mapping[str, Result]

_WITHOUT_RULES, _ZERO_SHOT = '_without_rules', '_zero_shot'
# What can be a weakness: the share of the best, or of 1, that is reached.
_COMPARED = ('f1', 'auprc', 'accuracy', 'consistency')
# A model that loses so much of its F1 on rules that it has not seen knows its rules by heart.
_GENERALISES = 0.05


def sentences(results: Results, calibration: Calibration | None = None) -> list[str]:
  """Returns the five sentences; [] for results without labelled examples."""
  tests = {
    name: result
    for name, result in results.items()
    if result.suite == 'classification'
    and not name.endswith((_WITHOUT_RULES, _ZERO_SHOT))
    and _number(result, 'f1') is not None
  }
  if not tests:
    return []
  name = 'unseen' if 'unseen' in tests else next(iter(tests))
  blind = _number(results.get(f'{name}{_WITHOUT_RULES}'), 'f1')
  weakest = _weakest(results)
  reads = blind is None or _reads_rules(tests[name].metrics['f1'], blind)
  return [
    _verdict(name, tests[name], blind, reads),
    _weakness(*weakest),
    _threshold(tests[name]),
    _calibration(calibration),
    _next_step(tests, reads, calibration, weakest[1]),
  ]


def _number(result: Result | None, metric: str) -> float | None:
  found = result.metrics.get(metric) if result is not None and result.metrics else None
  return found['value'] if found and is_number(found['value']) else None


def _shown(metric: Metric) -> str:
  text = f'{metric["value"]:.3f}'
  if is_number(metric['low']) and metric['low'] != metric['high']:
    text += f' [{metric["low"]:.3f}, {metric["high"]:.3f}]'
  return text


def _reads_rules(f1: Metric, blind: float) -> bool:
  return (f1['low'] if is_number(f1['low']) else f1['value']) > blind


def _verdict(name: str, result: Result, blind: float | None, reads: bool) -> str:
  f1, auprc = result.metrics['f1'], result.metrics.get('auprc')
  said = f'On "{name}" ({result.size}) its F1 is {_shown(f1)} at P(unsafe) = 0.5'
  if is_number(f1['best']):
    said += f', of {f1["best"]:.3f} that can be reached'
  if auprc and is_number(auprc['value']):
    said += f', and its AUPRC {_shown(auprc)}'
  if blind is None:
    return f'{said}.'
  if reads:
    return f'{said}; with the rules hidden F1 is {blind:.3f}, so that it does read them.'
  return f'{said}; with the rules hidden F1 is {blind:.3f}: nothing shows that it reads them.'


def _weakest(results: Results) -> tuple[str, str, Metric]:
  """Returns the benchmark, metric and value that fall furthest behind what can be reached."""
  found = []
  for name, result in results.items():
    for metric in _COMPARED:
      value = _number(result, metric)
      if value is not None and not name.endswith((_WITHOUT_RULES, _ZERO_SHOT)):
        best = result.metrics[metric]['best']
        found.append((value / (best if is_number(best) and best else 1.0), name, metric))
  _, name, metric = min(found)
  return name, metric, results[name].metrics[metric]


def _weakness(name: str, metric: str, value: Metric) -> str:
  title = title_of(metric).rstrip(' ↑↓')
  best = f', of {value["best"]:.3f} that can be reached' if is_number(value['best']) else ''
  return f'Its weakest point is {title} on "{name}": {_shown(value)}{best}.'


def _threshold(result: Result) -> str:
  tuned, f1 = result.metrics.get('f1_tuned'), result.metrics['f1']
  if not tuned or not is_number(tuned['value']) or not tuned.get('note'):
    return 'Keep the threshold of 0.5: no rows were held out on which to choose another.'
  at = tuned['note'].removeprefix('threshold ')
  if tuned['value'] > f1['value']:
    return (
      f'Flag from P(unsafe) = {at} on, chosen on held-out rows: F1 is then {_shown(tuned)}, '
      f'against {f1["value"]:.3f} at 0.5.'
    )
  return f'Keep the threshold of 0.5: {at}, chosen on held-out rows, is no better here.'


def _calibration(calibration: Calibration | None) -> str:
  if calibration is None:
    return 'No calibration was fitted: no rows of both labels were held out for it.'
  how = f'score / {calibration.temperature:.3g} {calibration.bias:+.3g}'
  if calibration.applied:
    return f'Scores are calibrated when the model is loaded ({how}): {calibration.reason}.'
  return f'Scores are not calibrated when the model is loaded (it would be {how}).'


def _next_step(tests: Results, reads: bool, calibration: Calibration | None, weakest: str) -> str:
  seen, unseen = (_number(tests.get(name), 'f1') for name in ('seen', 'unseen'))
  if not reads:
    return (
      'Next: train longer, or on more varied rules (data.drop_prob, data.plus_prob), until rules '
      'make a difference.'
    )
  if seen is not None and unseen is not None and seen - unseen > _GENERALISES:
    return 'Next: train on more varied rules; it does better under those that it has seen.'
  if weakest in ('accuracy', 'consistency'):
    return 'Next: give pairs more weight (loss.gamma), or more of them: it orders them badly.'
  if calibration is None:
    return 'Next: hold labelled rows out (eval.path or eval.fraction), to calibrate it.'
  return 'Next: run all suites on it (configs/eval.py:benchmarks), and your own labelled rows.'
