"""What a run of RL writes down: metrics of its steps, a table of samples."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.core import files
from csrm_jax.safety.schema import Sample

# The train step's names of what users of RL look for elsewhere.
_NAMES = {'train/lr': 'optim/lr', 'train/grad_norm': 'optim/grad_norm', 'train/loss': 'loss'}


def reward_metrics(
  totals: np.ndarray, parts: Mapping[str, np.ndarray], num_generations: int
) -> dict[str, float]:
  """Returns reward/{mean,std}, the same of each part, reward/zero_std_frac.

  The last is the fraction of prompts whose samples are all worth the same,
  and is left out where each has one sample.

  Args:
    totals: [N], a prompt's samples side by side.
    parts: name -> [N].
    num_generations: samples of a prompt.
  """
  metrics = {}
  if num_generations > 1:
    groups = totals.reshape(-1, num_generations)
    dead = groups.max(1) == groups.min(1)
    metrics['reward/zero_std_frac'] = dead.mean()
  named = {f'reward/{name}': values for name, values in parts.items()}
  for name, values in ({'reward': totals} | named).items():
    metrics |= {f'{name}/mean': values.mean(), f'{name}/std': values.std()}
  return {name: float(value) for name, value in metrics.items()}


def completion_metrics(samples: Sequence[Sample]) -> dict[str, float]:
  """Returns completion/{mean,min,max}_length in tokens and truncated_frac."""
  lengths = np.array([sample.num_tokens for sample in samples])
  cut_off = np.array([not sample.stopped for sample in samples])
  return {
    'completion/mean_length': float(lengths.mean()),
    'completion/min_length': float(lengths.min()),
    'completion/max_length': float(lengths.max()),
    'completion/truncated_frac': float(cut_off.mean()),
  }


def gap_metrics(
  logprobs: np.ndarray, rollout_logprobs: np.ndarray, mask: np.ndarray
) -> dict[str, float]:
  """Returns sampler/logprob_gap_{mean,max}: nats between two computations.

  Args:
    logprobs: [N,C] of the policy, as in training.
    rollout_logprobs: [N,C], what the sampler said.
    mask: [N,C], 1 on the completions.
  """
  gap = np.abs(logprobs - rollout_logprobs)[mask > 0]
  return {
    'sampler/logprob_gap_mean': float(gap.mean()),
    'sampler/logprob_gap_max': float(gap.max()),
  }


def table_rows(
  step: int,
  samples: Sequence[Sample],
  totals: np.ndarray,
  parts: Mapping[str, np.ndarray],
  num: int,
) -> list[dict[str, Any]]:
  """Returns `num` lines of samples.jsonl, spread evenly over the step's."""
  chosen = np.unique(np.linspace(0, len(samples) - 1, num).astype(int))
  return [
    {
      'step': step,
      'id': samples[i].id,
      'rules': samples[i].prompt.safety.name,
      'prompt': [m.to_dict() for m in samples[i].prompt.messages],
      'completion': samples[i].text,
      'num_tokens': samples[i].num_tokens,
      'stopped': samples[i].stopped,
      'reward': float(totals[i]),
      'parts': {name: float(values[i]) for name, values in parts.items()},
    }
    for i in chosen.tolist()
  ]


class Table:
  """Appends to a file of JSON lines, each of a step."""

  def __init__(self, path: pathlib.Path, resume_step: int):
    """Drops the lines of later steps, which will be written again."""
    self._path = path
    files.cut_log(path, resume_step)

  def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds the lines."""
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    with self._path.open('a', encoding='utf-8') as file:
      file.write(text)


def read_looks(path: pathlib.Path) -> dict[int, dict[str, Any]]:
  """Returns {step: metrics} of looks.jsonl; {} where there is none."""
  return {row['step']: row['metrics'] for row in files.read_log(path)}


def renamed(values: Mapping[str, float]) -> dict[str, float]:
  """Returns a log line under the names that users of RL know."""
  return {_NAMES.get(name, name): value for name, value in values.items() if name != 'train/finite'}
