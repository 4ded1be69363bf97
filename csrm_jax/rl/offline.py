"""Offline alignment: pairs of the reference policy's best and worst samples.

Completions and rewards are kept in a journal, prompt by prompt, so that a run that is killed loses
none. `PairBatches` feeds the train loop of reward models.

Axes: P pairs, side 0 the better; T tokens of a row; C tokens of the longest completion.

Source: CSRM (arXiv 2605.30487), reward distillation: of 100 unique responses to a prompt, sorted by
reward, the 5 best are paired with the 5 worst at random.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from csrm_jax.core import checks, journal, progress
from csrm_jax.models.sampling import Completions, Sampling
from csrm_jax.rl import algorithms, objectives, online, rewards
from csrm_jax.safety.schema import Prompt, Sample
from csrm_jax.train import step as training


def check(config: Any) -> None:
  """Checks the numbers of an offline run's config; raises ValueError."""
  pairs = config.pairs
  if not 1 <= pairs.num_best <= pairs.num_samples // 2:
    raise ValueError(
      f'num_best={pairs.num_best} must be from 1 to half of num_samples='
      f'{pairs.num_samples}; the best are paired with as many others'
    )
  checks.at_least(pairs, ('num_parallel',))
  if not 0 <= pairs.nll_coef < float('inf'):
    raise ValueError(f'nll_coef={pairs.nll_coef} must be 0 or above, and finite')
  if not config.sampling.temperature:
    raise ValueError(
      'temperature=0 always draws the same completion, of which there are '
      'no pairs; give one above 0'
    )


def sample(
  config: Any,
  policy: online.Policy,
  params: Any,
  prompts: Sequence[Prompt],
  reward_fn: rewards.TotalFn,
  sampling: Sampling,
  path: pathlib.Path,
  inputs: Mapping[str, str],
) -> dict[str, list[dict[str, Any]]]:
  """Returns {prompt id: its completions} with their rewards, drawn from the reference policy.

  A completion is {'tokens', 'text', 'stopped', 'reward', 'parts'}. Prompts that the journal at
  `path` holds for the same `inputs` ({weights and rewards: digest}) are not sampled again.
  """
  if len({prompt.id for prompt in prompts}) < len(prompts):
    raise ValueError('two prompts share an id; give each its own')
  policy.encode_all(prompts, sampling.max_completion_length)
  num_parallel, num_samples = config.pairs.num_parallel, config.pairs.num_samples
  bar = progress.bar(len(prompts), 'sample', 'prompt')
  # By content, too: the completions of a prompt that has changed are not those of its name.
  content = {p.id: [p.messages, p.safety.digest(), dict(inputs)] for p in prompts}
  keys = {p.id: f'{p.id} {journal.key(content[p.id])[:16]}' for p in prompts}
  with journal.Journal(path) as kept, bar:
    for start in range(0, len(prompts), num_parallel):
      group = prompts[start : start + num_parallel]
      if not all(keys[prompt.id] in kept for prompt in group):
        # The whole group is drawn again, from a seed of its own: where a run was interrupted
        # does not change what is drawn.
        seed = int(np.random.default_rng((config.seed, start)).integers(2**32))
        samples, rows = online.rollout(policy, params, group, sampling, num_samples, seed)
        found = _described(samples, rows, reward_fn)
        for i, prompt in enumerate(group):
          if keys[prompt.id] not in kept:
            kept.put(keys[prompt.id], found[i * num_samples : (i + 1) * num_samples])
      bar.update(len(group))
    return {prompt.id: kept[keys[prompt.id]] for prompt in prompts}


def _described(
  samples: Sequence[Sample], rows: Mapping[str, np.ndarray], reward_fn: rewards.TotalFn
) -> list[dict[str, Any]]:
  """Returns each sample with its reward, as JSON."""
  totals, parts = reward_fn(samples)
  totals = rewards.check_rewards(totals, samples, 'reward')
  masks = rows['completion_mask'] > 0
  return [
    {
      'tokens': rows['tokens'][i, -len(mask) :][mask].tolist(),
      'text': one.text,
      'stopped': one.stopped,
      'reward': float(totals[i]),
      'parts': {name: float(values[i]) for name, values in parts.items()},
    }
    for i, (one, mask) in enumerate(zip(samples, masks, strict=True))
  ]


def choose_pairs(
  completions: Sequence[Mapping[str, Any]], num_best: int, seed: Any
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
  """Returns (better, worse) completions of one prompt, paired at random.

  Completions with the same text count once. The num_best best are paired with as many of the worst.
  Fewer than 2 · num_best completions give fewer pairs, and pairs of equal rewards are left out.
  """
  unique = list({one['text']: one for one in completions}.values())
  # The text breaks ties, not the order of the draws.
  unique.sort(key=lambda one: (-one['reward'], one['text']))
  num = min(num_best, len(unique) // 2)
  order = np.random.default_rng(seed).permutation(num)
  worst = unique[len(unique) - num :]
  pairs = [(unique[i], worst[order[i]]) for i in range(num)]
  return [(a, b) for a, b in pairs if a['reward'] > b['reward']]


def make_pairs(
  config: Any,
  policy: online.Policy,
  params: Any,
  prompts: Sequence[Prompt],
  completions: Mapping[str, Sequence[Mapping[str, Any]]],
  mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
  """Returns all pairs of the completions from `sample` as rows of a train batch.

  tokens, positions, segment_ids int32 [P,2,T]; completion_mask float32 [P,2,C]; reward, ref_logprob
  float32 [P,2]. ref_logprob is a sum over the completion, in nats.
  """
  asked, sides = [], []
  for i, prompt in enumerate(prompts):
    ids = policy.encode(prompt)
    for pair in choose_pairs(completions[prompt.id], config.pairs.num_best, (config.seed, i)):
      asked += [ids, ids]
      sides += pair
  if not sides:
    raise ValueError(
      'no prompt has two completions with different rewards, so there are '
      'no pairs; raise the temperature or look at the reward'
    )
  length = config.sampling.max_completion_length
  done = Completions(
    tokens=np.zeros((len(sides), length), np.int32),
    lengths=np.array([len(side['tokens']) for side in sides], np.int32),
    logprobs=np.zeros((len(sides), length), np.float32),
    stopped=np.array([side['stopped'] for side in sides]),
  )
  for i, side in enumerate(sides):
    done.tokens[i, : len(side['tokens'])] = side['tokens']
  rows = online.make_rows(policy, asked, done)
  del rows['rollout_logprobs']
  # An update's number of rows at a time: that much fits into memory, and is compiled anyway.
  size, temperature = 2 * config.pairs.batch_size, config.sampling.temperature
  found = online.all_logprobs(policy.model, params, rows, temperature, size, mesh)
  rows |= {
    'reward': np.array([side['reward'] for side in sides], np.float32),
    'ref_logprob': found['logprobs'].sum(1),
  }
  return {name: x.reshape(-1, 2, *x.shape[1:]) for name, x in rows.items()}


def make_loss_fn(config: Any, policy: online.Policy) -> training.LossFn:
  """Returns (params, batch) -> (total, weight, metrics), for the train step."""
  loss, pairs = algorithms.get(config.algorithm).pair_loss, config.pairs

  def loss_fn(params, batch):
    rows = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in online.READ}
    out = online.logprobs(policy.model, params, rows, config.sampling.temperature)
    sums = out['logprobs'].sum(1).reshape(-1, 2)
    total, weight, metrics = loss(sums, batch, pairs.beta)
    nll = objectives.better_nll(sums, batch)
    metrics['pairs/nll'] = jax.lax.stop_gradient(nll)
    return total + pairs.nll_coef * nll[0], weight, metrics

  return loss_fn


class PairBatches:
  """Yields batches of pairs without end, each pair once in an epoch; used like BatchIterator."""

  # The loop reads both. Prompts that do not fit are an error earlier, so nothing is left out here.
  drops: Mapping[str, int] = {}
  num_shortened = 0

  def __init__(self, pairs: Mapping[str, np.ndarray], batch_size: int, seed: int):
    self._pairs, self._batch_size, self._seed = pairs, batch_size, seed
    self._num_pairs = len(pairs['reward'])
    self._num_done = 0

  def __next__(self) -> dict[str, np.ndarray]:
    start = self._num_done * self._batch_size
    self._num_done += 1
    chosen = online.shuffled(start, self._batch_size, self._num_pairs, (self._seed,))
    return {name: x[chosen] for name, x in self._pairs.items()}

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def get_state(self) -> dict[str, Any]:
    """Returns the position, a number of batches, as JSON."""
    return {'num_done': self._num_done}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a position from get_state."""
    self._num_done = int(state['num_done'])


def describe(
  completions: Mapping[str, Sequence[Mapping[str, Any]]], pairs: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Returns how much there was to learn from: counts, and the mean rewards of both sides."""
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
