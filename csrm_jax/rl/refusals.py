"""How often V_r is right: against people who labelled XSTest's completions.

python -m csrm_jax.main --config=configs/eval.py:refusals --workdir=DIR --config.data_dir=XSTEST

XSTEST holds xstest_v2_completions_*.csv with the labels of two annotators. The patterns were
written while looking at one half of the prompts; what is reported is of the other half. With a
reward model and rules that forbid to refuse (configs/safety/refusal.yaml) it is measured beside
them.
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
# name -> the labels that count as a refusal
POSITIVE = {'full': (_FULL,), 'full or partial': (_FULL, _PARTIAL)}


@dataclasses.dataclass(frozen=True)
class Judged:
  """One completion and what people called it; labels: public.XSTEST_LABELS.

  Attributes:
    sample: prompt and completion.
    first: the first annotator's label.
    second: the second annotator's.
    final: what was agreed on.
  """

  sample: Sample
  first: str
  second: str
  final: str


def read(folder: str | os.PathLike) -> list[Judged]:
  """Returns the completions of all models, with their labels.

  Raises:
    FileNotFoundError: no completions there.
    ValueError: a missing column, or an unknown label.
  """
  files = sorted(pathlib.Path(folder).glob('*completions*.csv'))
  if not files:
    raise FileNotFoundError(f'{folder}: no *completions*.csv there; give the folder of XSTest')
  safety = schema.SafetyConfig((public.XSTEST_RULES['refusal'],))
  labels = ('annotation_1', 'annotation_2', 'final_label')
  judged = []
  for path in files:
    for row in public.xstest_completions(path, ('id', 'prompt', 'completion', *labels)):
      prompt = Prompt(f'{path.stem}/{row["id"]}', (schema.Message('user', row['prompt']),), safety)
      judged.append(
        Judged(Sample(prompt, 0, row['completion'], 0, True), *(row[column] for column in labels))
      )
  return judged


def halves(judged: Sequence[Judged]) -> tuple[list[Judged], list[Judged]]:
  """Returns (what patterns may be tuned on, what is reported).

  By a hash of the prompt's text: no prompt is in both, under any model.
  """
  result = ([], [])
  for item in judged:
    # The parity of the hash's first byte.
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


# Of bool arrays [N], what is a refusal and what is called one. The bootstrap asks them thousands of
# times, for which scikit-learn's checks are too slow.
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

  Args:
    labels: bool [N], what is a refusal.
    refuses: bool [N], what is called one.
    units: int [N]; rows of one number are drawn together.
    num_samples: draws.
  """
  return {
    name: (
      fn(labels, refuses),
      *bootstrap.interval(fn, (labels, refuses), units, num_samples=num_samples),
    )
    for name, fn in METRICS.items()
  }


def compare(
  judged: Sequence[Judged], verdicts: dict[str, np.ndarray], kind: str
) -> dict[str, dict[str, tuple[float, float, float]]]:
  """Returns {V_r's name: its metrics}, and those of the annotators.

  V_r is held against the final label, the second annotator against the first:
  as well as people agree with each other is as well as a verifier can do.

  Args:
    judged: N completions.
    verdicts: name -> bool [N].
    kind: of POSITIVE.
  """
  positive = POSITIVE[kind]
  first, second, final = (
    np.array([getattr(item, name) in positive for item in judged])
    for name in ('first', 'second', 'final')
  )
  # Completions of several models to one prompt depend on each other.
  units = np.unique([_prompt_text(item) for item in judged], return_inverse=True)[1]
  return {
    **{name: measure(final, refuses, units) for name, refuses in verdicts.items()},
    'second annotator': measure(first, second, units),
  }


def tables(
  folder: str | os.PathLike, checkpoint: str = '', safety: str = '', words: Sequence[str] = ()
) -> list[str]:
  """Returns what is known of V_r, in Markdown: of the patterns, and of a reward model if given.

  Args:
    folder: of XSTest.
    checkpoint: a reward model, or a public model.
    safety: rules that forbid to refuse, for the checkpoint.
    words: for "safe" and "unsafe", to a public model.

  Raises:
    ValueError: a checkpoint without rules, or rules without one.
  """
  if bool(checkpoint) != bool(safety):
    raise ValueError('config.checkpoint and config.safety belong together; give both')
  tuned, judged = halves(read(folder))
  samples = [item.sample for item in judged]
  found = {'V_r, patterns': verifiers.REFUSALS['patterns'](samples)}
  if checkpoint:
    model = reward_model.load(checkpoint, words=tuple(words))
    found['V_r, reward model'] = verifiers.by_score(model.score_fn, schema.load_safety(safety))(
      samples
    )
  parts = [
    f'{len(judged)} completions; {len(tuned)} others were looked at while '
    'the patterns were written.'
  ]
  for kind in POSITIVE:
    rows = [
      (name, *(f'{value:.3f} [{low:.3f}, {high:.3f}]' for value, low, high in measured.values()))
      for name, measured in compare(judged, found, kind).items()
    ]
    parts += [f'A refusal is a {kind} refusal:', markdown.table(('', *METRICS), rows)]
  return parts


def _prompt_text(item: Judged) -> str:
  return ' '.join(item.sample.prompt.messages[-1].content.casefold().split())
