"""Measures how often V_r is right, against people who labelled XSTest's completions.

The folder of XSTest holds xstest_v2_completions_*.csv with the labels of two annotators. The
patterns were written while looking at one half of the prompts; the report is about the other half.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from csrm_jax.core import markdown
from csrm_jax.data import public, sources
from csrm_jax.evals import bootstrap, metrics
from csrm_jax.reward import model as reward_model
from csrm_jax.rl import verifiers
from csrm_jax.safety import schema
from csrm_jax.safety.schema import Prompt, Sample

_FULL, _PARTIAL = public.XSTEST_LABELS[1:]
# A name -> the labels that count as a refusal.
POSITIVE = {'full': (_FULL,), 'full or partial': (_FULL, _PARTIAL)}


@dataclasses.dataclass(frozen=True)
class Judged:
  """One completion and what people called it, in labels of public.XSTEST_LABELS."""

  sample: Sample
  first: str  # the first annotator's label
  second: str  # the second annotator's label
  final: str  # the label that was agreed on


def read(folder: str | os.PathLike) -> list[Judged]:
  """Returns the completions of all models, with their labels."""
  files = sorted(pathlib.Path(folder).glob('*completions*.csv'))
  if not files:
    raise FileNotFoundError(f'{folder}: no *completions*.csv there; give the folder of XSTest')
  safety = schema.SafetyConfig((public.XSTEST_RULES['refusal'],))
  labels = ('annotation_1', 'annotation_2', 'final_label')
  judged = []
  for path in files:
    for row in public.xstest_completions(path, ('id', 'prompt', 'completion', *labels)):
      name, talk = f'{path.stem}/{row.name("id")}', (schema.Message('user', row.text('prompt')),)
      prompt = Prompt(name, talk, safety)
      judged.append(
        Judged(
          Sample(prompt, 0, row.text('completion'), 0, True), *(row[column] for column in labels)
        )
      )
  return judged


def halves(judged: Sequence[Judged]) -> tuple[list[Judged], list[Judged]]:
  """Returns (the half that patterns may be tuned on, the half that is reported).

  A hash of the prompt's text decides: no prompt is in both halves, whichever model answered it.
  """
  result = ([], [])
  for item in judged:
    # The parity of the hash's first byte: the patterns have been tuned on one half, so that this
    # must not change.
    result[int(256 * sources.hash_unit(_prompt_text(item))) % 2].append(item)
  return result


def _kappa(labels: np.ndarray, refuses: np.ndarray) -> float:
  """Returns Cohen's kappa; nan where both are all one class.

  Source: Cohen (1960), A coefficient of agreement for nominal scales.
  """
  by_chance = labels.mean() * refuses.mean() + (1 - labels.mean()) * (1 - refuses.mean())
  if by_chance == 1:
    return math.nan
  return float((np.mean(labels == refuses) - by_chance) / (1 - by_chance))


# Functions of two bool arrays [N]: what is a refusal, and what is called one. The bootstrap calls
# them thousands of times, for which scikit-learn's input checks are too slow.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
  'accuracy': lambda labels, refuses: metrics.mean(labels == refuses),
  'precision': lambda labels, refuses: metrics.mean(labels[refuses]),
  'recall': lambda labels, refuses: metrics.mean(refuses[labels]),
  'f1': metrics.f1,
  'kappa': _kappa,
}


def measure(
  labels: np.ndarray, refuses: np.ndarray, units: np.ndarray, num_samples: int = 1000
) -> dict[str, tuple[float, float, float]]:
  """Returns {metric: (value, low, high)}, with 95% bootstrap intervals.

  labels (what is a refusal) and refuses (what is called one) are bool [N]; rows with the same
  number in units, int [N], are drawn together.
  """
  m = bootstrap.Measure(units, num_samples)
  found = {name: m(fn, labels, refuses) for name, fn in METRICS.items()}
  return {name: (one['value'], one['low'], one['high']) for name, one in found.items()}


def compare(
  judged: Sequence[Judged], verdicts: dict[str, np.ndarray], kind: str
) -> dict[str, dict[str, tuple[float, float, float]]]:
  """Returns {name: its metrics} for each V_r's verdicts, bool [N], and for the second annotator.

  V_r is compared with the final label, the second annotator with the first: a verifier cannot be
  expected to do better than people agree with each other. kind is a key of POSITIVE.
  """
  positive = POSITIVE[kind]
  first, second, final = (
    np.array([getattr(item, name) in positive for item in judged])
    for name in ('first', 'second', 'final')
  )
  # Completions of several models to one prompt are not independent.
  units = np.unique([_prompt_text(item) for item in judged], return_inverse=True)[1]
  return {
    **{name: measure(final, refuses, units) for name, refuses in verdicts.items()},
    'second annotator': measure(first, second, units),
  }


def tables(
  folder: str | os.PathLike, checkpoint: str = '', safety: str = '', words: Sequence[str] = ()
) -> list[str]:
  """Returns the report in Markdown: of the patterns, and of a model if a checkpoint is given.

  A checkpoint, of a reward model or a public model, goes with `safety`, a file of rules that forbid
  to refuse. `words` are what a public model says for "safe" and "unsafe".
  """
  if bool(checkpoint) != bool(safety):
    raise ValueError('config.checkpoint and config.safety belong together; give both')
  tuned, judged = halves(read(folder))
  samples = [item.sample for item in judged]
  found = {'V_r, patterns': verifiers.REFUSALS['patterns'](samples)}
  if checkpoint:
    # This is measured, whatever the model knows.
    rm = reward_model.load(checkpoint, words=tuple(words), allow_out_of_domain=True)
    refuses = verifiers.by_score(rm.score_fn, schema.load_safety(safety))
    found['V_r, reward model'] = refuses(samples)
  others = f'{len(tuned)} others were looked at while the patterns were written.'
  parts = [f'{len(judged)} completions; {others}']
  for kind in POSITIVE:
    rows = [
      (name, *(f'{value:.3f} [{low:.3f}, {high:.3f}]' for value, low, high in measured.values()))
      for name, measured in compare(judged, found, kind).items()
    ]
    parts += [f'A refusal is a {kind} refusal:', markdown.table(('', *METRICS), rows)]
  return parts


def _prompt_text(item: Judged) -> str:
  return ' '.join(item.sample.prompt.messages[-1].content.casefold().split())
