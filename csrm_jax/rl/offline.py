"""Offline alignment: pairs of the reference policy's best and worst samples.

Completions and rewards are kept in a journal, prompt by prompt, so that a run
that is killed loses none. `PairBatches` feeds the train loop of reward models.

Axes: P pairs, side 0 the better; T tokens of a row.

Source: CSRM (arXiv 2605.30487), reward distillation: of 100 unique responses a
prompt, sorted by reward, the 5 best are paired with the 5 worst at random.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from csrm_jax.core import journal
from csrm_jax.models.sampling import Completions, Sampling
from csrm_jax.rl import objectives, rewards, rollout
from csrm_jax.safety.schema import Prompt, Sample
from csrm_jax.train import step as training


@dataclasses.dataclass(frozen=True)
class Settings:
  """How pairs are made.

  Attributes:
    num_samples: completions of each prompt.
    num_best: of them, paired with as many of the worst.
    num_prompts: of which completions are drawn at once.
    sampling: of completions.
    seed: of draws and pairs.
  """

  num_samples: int
  num_best: int
  num_prompts: int
  sampling: Sampling
  seed: int

  def __post_init__(self):
    if not 1 <= self.num_best <= self.num_samples // 2:
      raise ValueError(
        f'num_best={self.num_best} must be from 1 to half of num_samples='
        f'{self.num_samples}; the best are paired with as many others'
      )
    if self.num_prompts < 1:
      raise ValueError(f'num_prompts={self.num_prompts} must be at least 1')
    if not self.sampling.temperature:
      raise ValueError(
        'temperature=0 always draws the same completion, of which there are '
        'no pairs; give one above 0'
      )


def sample(
  policy: rollout.Policy,
  params: Any,
  prompts: Sequence[Prompt],
  reward_fn: rewards.TotalFn,
  settings: Settings,
  path: pathlib.Path,
  progress: Callable[[int], Any] = lambda num: None,
) -> dict[str, list[dict[str, Any]]]:
  """Returns {prompt id: its completions} with their rewards.

  A completion is {'tokens', 'text', 'stopped', 'reward', 'parts'}.

  Args:
    policy: the reference.
    params: its parameters.
    prompts: with ids of their own.
    reward_fn: samples -> (total, parts).
    settings: see there.
    path: of the journal. What it holds is not sampled again; what is drawn for
      a prompt does not depend on where a run was interrupted.
    progress: called with the number of prompts that are done.

  Raises:
    ValueError: two prompts share an id, or a reward is not finite.
  """
  if len({prompt.id for prompt in prompts}) < len(prompts):
    raise ValueError('two prompts share an id; give each its own')
  policy.encode_all(prompts, settings.sampling.max_completion_length)
  with journal.Journal(path) as kept:
    for start in range(0, len(prompts), settings.num_prompts):
      group = prompts[start : start + settings.num_prompts]
      if not all(prompt.id in kept for prompt in group):
        rng = np.random.default_rng((settings.seed, start))
        samples, rows = rollout.rollout(
          policy, params, group, settings.sampling, settings.num_samples, int(rng.integers(2**32))
        )
        for prompt, found in _by_prompt(samples, rows, reward_fn):
          if prompt.id not in kept:
            kept.put(prompt.id, found)
      progress(len(group))
    return {prompt.id: kept[prompt.id] for prompt in prompts}


def _by_prompt(
  samples: Sequence[Sample], rows: Mapping[str, np.ndarray], reward_fn: rewards.TotalFn
) -> Iterator[tuple[Prompt, list[dict[str, Any]]]]:
  """Yields each prompt with its completions as JSON."""
  totals, parts = reward_fn(samples)
  totals = rewards.check_rewards(totals, samples, 'reward')
  found: dict[str, tuple[Prompt, list[dict[str, Any]]]] = {}
  for i, one in enumerate(samples):
    mask = rows['completion_mask'][i] > 0
    tokens = rows['tokens'][i, -len(mask) :][mask]
    found.setdefault(one.prompt.id, (one.prompt, []))[1].append(
      {
        'tokens': tokens.tolist(),
        'text': one.text,
        'stopped': one.stopped,
        'reward': float(totals[i]),
        'parts': {name: float(values[i]) for name, values in parts.items()},
      }
    )
  yield from found.values()


def choose_pairs(
  completions: Sequence[Mapping[str, Any]], num_best: int, seed: Any
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
  """Returns (better, worse) completions of one prompt, paired at random.

  Completions with the same text count once. Of fewer than 2 · num_best there
  are fewer pairs; pairs of equal rewards are left out.

  Args:
    completions: as from `sample`.
    num_best: see Settings.
    seed: of the pairing.
  """
  unique = list({one['text']: one for one in completions}.values())
  # Ties are broken by the text, not by the order of the draws.
  unique.sort(key=lambda one: (-one['reward'], one['text']))
  num = min(num_best, len(unique) // 2)
  order = np.random.default_rng(seed).permutation(num)
  worst = unique[len(unique) - num :]
  pairs = [(unique[i], worst[order[i]]) for i in range(num)]
  return [(a, b) for a, b in pairs if a['reward'] > b['reward']]


def make_pairs(
  policy: rollout.Policy,
  params: Any,
  prompts: Sequence[Prompt],
  completions: Mapping[str, Sequence[Mapping[str, Any]]],
  settings: Settings,
  chunk: int,
) -> dict[str, np.ndarray]:
  """Returns all pairs as rows of a train batch.

  tokens, positions, segment_ids int32 [P,2,T]; completion_mask float32
  [P,2,C]; reward, ref_logprob float32 [P,2], the latter a sum over the
  completion in nats.

  Args:
    policy: the reference.
    params: its parameters.
    prompts: whose completions they are.
    completions: as from `sample`.
    settings: see there.
    chunk: rows that go through the model at once.

  Raises:
    ValueError: there are no pairs at all.
  """
  asked, sides = [], []
  for i, prompt in enumerate(prompts):
    ids = policy.encode(prompt)
    for pair in choose_pairs(completions[prompt.id], settings.num_best, (settings.seed, i)):
      asked += [ids, ids]
      sides += pair
  if not sides:
    raise ValueError(
      'no prompt has two completions with different rewards, so there are '
      'no pairs; raise the temperature or look at the reward'
    )
  length = settings.sampling.max_completion_length
  done = Completions(
    tokens=np.zeros((len(sides), length), np.int32),
    lengths=np.array([len(side['tokens']) for side in sides], np.int32),
    logprobs=np.zeros((len(sides), length), np.float32),
    stopped=np.array([side['stopped'] for side in sides]),
  )
  for i, side in enumerate(sides):
    done.tokens[i, : len(side['tokens'])] = side['tokens']
  rows = rollout.make_rows(policy, asked, done)
  del rows['rollout_logprobs']
  reference = _reference(policy, params, rows, settings, chunk)
  return {
    name: x.reshape(-1, 2, *x.shape[1:])
    for name, x in (
      rows
      | {
        'reward': np.array([side['reward'] for side in sides], np.float32),
        'ref_logprob': reference,
      }
    ).items()
  }


def _reference(policy, params, rows, settings, chunk) -> np.ndarray:
  """Returns the sums of the rows' log-probabilities, float32 [2P]."""
  num, sums = len(rows['tokens']), []
  for start in range(0, num, chunk):
    part = {name: x[start : start + chunk] for name, x in rows.items()}
    missing = chunk - len(part['tokens'])
    part = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in part.items()}
    out = rollout.logprobs(policy.model, params, part, settings.sampling.temperature)
    sums.append(np.asarray(out['logprobs']).sum(1))
  return np.concatenate(sums)[:num]


def make_loss_fn(
  policy: rollout.Policy,
  loss: Callable[..., Any],
  beta: float,
  temperature: float,
  nll_coef: float = 0.0,
) -> training.LossFn:
  """Returns (params, batch) -> (total, weight, metrics), for the train step.

  Args:
    policy: what is trained.
    loss: objectives.distillation_loss or dpo_loss.
    beta: β of it.
    temperature: of the log-probabilities, as in sampling.
    nll_coef: factor of objectives.better_nll, which is added.

  Raises:
    ValueError: nll_coef is below 0.
  """
  if not 0 <= nll_coef < float('inf'):
    raise ValueError(f'nll_coef={nll_coef} must be 0 or above, and finite')

  def loss_fn(params, batch):
    rows = {
      name: batch[name].reshape(-1, batch[name].shape[-1])
      for name in ('tokens', 'positions', 'segment_ids', 'completion_mask')
    }
    out = rollout.logprobs(policy.model, params, rows, temperature)
    sums = out['logprobs'].sum(1).reshape(-1, 2)
    total, weight, metrics = loss(sums, batch, beta)
    nll = objectives.better_nll(sums, batch)
    metrics['pairs/nll'] = jax.lax.stop_gradient(nll)
    return total + nll_coef * nll[0], weight, metrics

  return loss_fn


class PairBatches:
  """Batches of pairs without end, all pairs once an epoch; like BatchIterator.

  Its position is a number of batches, so that a resumed run sees the same.
  """

  drops: Mapping[str, int] = {}
  num_shortened = 0
  wait_s = 0.0

  def __init__(self, pairs: Mapping[str, np.ndarray], batch_size: int, seed: int):
    self._pairs, self._batch_size, self._seed = pairs, batch_size, seed
    self._num_pairs = len(pairs['reward'])
    self._num_done = 0

  def __next__(self) -> dict[str, np.ndarray]:
    start = self._num_done * self._batch_size
    self._num_done += 1
    places = np.arange(start, start + self._batch_size)
    epochs, indices = np.divmod(places, self._num_pairs)
    orders = {
      epoch: np.random.default_rng((self._seed, epoch)).permutation(self._num_pairs)
      for epoch in np.unique(epochs).tolist()
    }
    chosen = np.array(
      [orders[epoch][i] for epoch, i in zip(epochs.tolist(), indices.tolist(), strict=True)]
    )
    return {name: x[chosen] for name, x in self._pairs.items()}

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def get_state(self) -> dict[str, Any]:
    """Returns the position as JSON."""
    return {'num_done': self._num_done}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a position of get_state."""
    self._num_done = int(state['num_done'])


def describe(
  completions: Mapping[str, Sequence[Mapping[str, Any]]], pairs: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Returns what there was to learn from: counts, and the sides' rewards."""
  totals = np.array([one['reward'] for some in completions.values() for one in some])
  better, worse = jax.tree.map(float, pairs['reward'].mean(0).tolist())
  return {
    'num_prompts': len(completions),
    'num_samples': len(totals),
    'num_pairs': len(pairs['reward']),
    'reward_mean': float(totals.mean()),
    'reward_better': better,
    'reward_worse': worse,
  }
