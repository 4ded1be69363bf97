"""Rewards of completions: what they are made of, combined, checked.

A reward function takes samples and returns float32 [N]. A missing value, one
that is not finite, or a wrong number of them stops with the sample's id: what
cannot be scored is never worth 0. Lengths and penalties are in tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.core import checks
from csrm_jax.reward import scoring
from csrm_jax.rl import http_scorer, verifiers
from csrm_jax.safety import schema
from csrm_jax.safety.schema import RewardFn, Sample

MODES = ('product', 'sum')
# samples -> (total float32 [N], {name of a part: float32 [N]})
TotalFn = Callable[[Sequence[Sample]], tuple[np.ndarray, dict[str, np.ndarray]]]

# The least that a sigmoid gives: reward distillation takes its log.
_TINY = float(np.finfo(np.float32).tiny)
# The largest reward, beyond which float32 is infinite.
_HUGE = float(np.finfo(np.float32).max)


def safety_reward(
  score_fn: scoring.ScoreFn,
  a: float = 1.0,
  b: float = 0.0,
  safety: schema.SafetyConfig | None = None,
) -> RewardFn:
  """Returns R = sigmoid(a * score + b), in (0, 1].

  Args:
    score_fn: examples -> scores, nats.
    a: slope; below 0 the reward would prefer violations.
    b: offset, nats.
    safety: rules to judge all samples by; None: each by its prompt's.

  Source: CSRM (arXiv 2605.30487), the reward and its Pareto sweep.
  """
  _check_slope(a, b)

  def reward(samples: Sequence[Sample]) -> np.ndarray:
    return _sigmoid(a * _scores(score_fn, samples, safety) + b)

  return reward


def helpfulness_reward(
  score_fn: scoring.ScoreFn,
  a: float = 1.0,
  b: float = 0.0,
  safety: schema.SafetyConfig | None = None,
) -> RewardFn:
  """Returns H = 1 + 4 * sigmoid(a * score + b), in (1, 5].

  Args:
    score_fn: of a reward model that was trained on preference pairs.
    a: slope.
    b: offset, nats.
    safety: the rules that model was trained under (with rules_blind
      safety.augment.NO_RULES); None: each sample's prompt's.

  Source: CSRM (arXiv 2605.30487), which has helpfulness from 1 to 5.
  """
  inner = safety_reward(score_fn, a, b, safety)
  return lambda samples: np.float32(1) + np.float32(4) * inner(samples)


def format_reward(samples: Sequence[Sample]) -> np.ndarray:
  """Returns 1 where the output is well formed (AlphaAlign's V_f), else 0."""
  return np.array([verifiers.is_well_formed(s.text) for s in samples], np.float32)


def overlong_penalty(buffer: int, penalty: float, max_length: int) -> RewardFn:
  """Returns 0 down to -penalty, as a completion nears the length limit.

  0 up to max_length - buffer tokens, then linear, -penalty at max_length and
  where the limit cut the completion off.

  Args:
    buffer: tokens.
    penalty: at least 0.
    max_length: tokens a completion may have.

  Source: DAPO (arXiv 2503.14476), eq. 13.
  """
  if not 0 < buffer <= max_length:
    raise ValueError(
      f'the over-long buffer is {buffer} tokens; it must be from 1 to the '
      f'{max_length} that a completion may have, or leave the penalty out'
    )
  if not (math.isfinite(penalty) and penalty > 0):
    raise ValueError(f'the over-long penalty is {penalty}; it must be a number above 0')

  def reward(samples: Sequence[Sample]) -> np.ndarray:
    over = np.array(
      [buffer if not s.stopped else s.num_tokens - (max_length - buffer) for s in samples],
      np.float32,
    )
    return np.float32(-penalty) * np.clip(over / buffer, 0, 1)

  return reward


def from_callable(
  fn: Callable[[Sequence[Sample]], Sequence[float]], name: str = 'callable'
) -> RewardFn:
  """Returns a reward from a function of samples to as many finite numbers.

  Args:
    fn: samples -> one number each, in their order.
    name: for messages.
  """
  return lambda samples: check_rewards(fn(samples), samples, name)


def from_each(fn: Callable[[Sample], float], name: str) -> RewardFn:
  """Returns a reward from a function of one sample, such as an oracle."""
  return from_callable(lambda samples: [fn(s) for s in samples], name)


def from_http(settings: http_scorer.Settings) -> RewardFn:
  """Returns a reward from a scorer behind HTTP; see `http_scorer`.

  Raises:
    ValueError: nobody answers there now.
  """
  http_scorer.check_reachable(settings)
  return from_callable(lambda samples: http_scorer.ask(settings, samples), settings.url)


def combine(
  parts: Mapping[str, tuple[RewardFn, float]],
  mode: str = 'product',
  added: Mapping[str, tuple[RewardFn, float]] | None = None,
  clip: tuple[float, float] | None = None,
) -> TotalFn:
  """Returns a function: samples -> (total, {part: its own reward}).

  Args:
    parts: name -> (reward, weight).
    mode: 'product' multiplies the parts, each to the power of its weight, as
      in R * H; 'sum' adds weight times part. Weight 0: only logged.
    added: further parts, added with their weights to the product (a format
      reward, an over-long penalty); with 'sum' put them among the parts.
    clip: (low, high) of the total.

  Raises:
    ValueError: nothing to combine, an unknown mode, or numbers that mean
      nothing; from the function: a part or the total is not finite.
  """
  added = added or {}
  _check_parts(parts, mode, added, clip)

  def score(samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    values = {name: _part(fn, samples, name) for name, (fn, _) in {**parts, **added}.items()}
    wide = {name: value.astype(np.float64) for name, value in values.items()}
    if mode == 'product':
      with np.errstate(all='ignore'):
        total = math.prod(wide[name] ** weight for name, (_, weight) in parts.items())
      total = total + sum(weight * wide[name] for name, (_, weight) in added.items())
    else:
      total = sum(weight * wide[name] for name, (_, weight) in parts.items())
    total = check_rewards(total, samples, 'total')
    return (np.clip(total, *map(np.float32, clip)) if clip else total), values

  return score


def check_rewards(values: Any, samples: Sequence[Sample], name: str) -> np.ndarray:
  """Returns rewards as float32 [N].

  Args:
    values: a list or array of numbers; None is a missing one.
    samples: what they belong to.
    name: of the reward.

  Raises:
    ValueError: not as many as samples, or one is missing or not finite.
  """
  if hasattr(values, '__array__'):
    values = np.asarray(values).tolist()
  if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
    raise ValueError(
      f'reward {name} gives {checks.show(values)}; return a list of one number a sample'
    )
  if len(values) != len(samples):
    raise ValueError(
      f'reward {name} gives {len(values)} numbers for {len(samples)} samples '
      f'(the first is {samples[0].id if samples else "none"}); return one '
      'for each, in their order'
    )
  for value, sample in zip(values, samples, strict=True):
    if not _is_finite(value):
      raise ValueError(
        f'{sample.id}: reward {name} is {checks.show(value)}, not a finite '
        'number; what cannot be scored has no reward'
      )
  return np.array(values, np.float32)


@dataclasses.dataclass(frozen=True)
class Normaliser:
  """Mean and spread of all rewards so far; stored with the run.

  Attributes:
    count: rewards seen.
    mean: of them.
    m2: sum of their squared distances from the mean.
  """

  count: int = 0
  mean: float = 0.0
  m2: float = 0.0

  @property
  def std(self) -> float:
    """Of all rewards seen (not of a sample of them)."""
    return math.sqrt(self.m2 / self.count) if self.count else 0.0

  def update(self, rewards: np.ndarray) -> Normaliser:
    """Returns the normaliser that has also seen these [N].

    With several processes: those of all, so that each has the same.

    Source: Chan et al. (1983), the pairwise update of mean and m2.
    """
    rewards = np.asarray(rewards, np.float64)
    if not rewards.size:
      return self
    count = self.count + rewards.size
    delta = rewards.mean() - self.mean
    m2 = np.sum((rewards - rewards.mean()) ** 2)
    return Normaliser(
      count,
      float(self.mean + delta * rewards.size / count),
      float(self.m2 + m2 + delta**2 * self.count * rewards.size / count),
    )

  def apply(self, rewards: np.ndarray) -> np.ndarray:
    """Returns (rewards - mean) / std, float32; 0 where all were equal."""
    distance = np.asarray(rewards, np.float64) - self.mean
    # A spread that only rounding made is none.
    if self.std <= 1e-7 * max(abs(self.mean), 1e-30):
      return np.zeros(distance.shape, np.float32)
    return (distance / self.std).astype(np.float32)

  def to_dict(self) -> dict[str, float]:
    """Returns what `from_dict` reads."""
    return dataclasses.asdict(self)

  @staticmethod
  def from_dict(obj: Mapping[str, Any]) -> Normaliser:
    """Returns the normaliser of `to_dict`."""
    return Normaliser(int(obj['count']), float(obj['mean']), float(obj['m2']))


def _scores(score_fn, samples, safety) -> np.ndarray:
  examples = [s.example() for s in samples]
  if safety is not None:
    examples = [dataclasses.replace(e, safety=safety) for e in examples]
  return check_rewards(score_fn(examples), samples, 'score').astype(np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  with np.errstate(over='ignore'):
    value = 1 / (1 + np.exp(-x))
  return np.maximum(value, _TINY).astype(np.float32)


def _is_finite(value: Any) -> bool:
  is_number = isinstance(value, (int, float, np.number))
  return is_number and abs(value) <= _HUGE


def _part(fn: RewardFn, samples: Sequence[Sample], name: str) -> np.ndarray:
  value = fn(samples)
  if getattr(value, 'dtype', None) != np.float32:
    raise ValueError(
      f'reward {name} gives {getattr(value, "dtype", type(value).__name__)}, '
      'not float32, which may have lost fractions; make the reward with '
      'rewards.from_callable'
    )
  return check_rewards(value, samples, name)


def _check_parts(parts, mode, added, clip) -> None:
  if mode not in MODES:
    raise ValueError(f'unknown reward mode {mode!r}; use one of {", ".join(MODES)}')
  if not parts:
    raise ValueError('no reward is given; name at least one part')
  if mode == 'sum' and added:
    raise ValueError(f'reward {next(iter(added))} is added to a sum; put it among the parts')
  for name, (_, weight) in [*parts.items(), *added.items()]:
    if not math.isfinite(weight):
      raise ValueError(f'reward {name} has weight {weight}; give a number')
    if name in parts and name in added:
      raise ValueError(f'reward {name} is given twice; rename one')
  if clip is not None and not clip[0] < clip[1]:
    raise ValueError(
      f'the reward clip is from {clip[0]} to {clip[1]}; the first must be less than the second'
    )


def _check_slope(a: float, b: float) -> None:
  if not (math.isfinite(a) and math.isfinite(b) and a > 0):
    raise ValueError(
      f'the transform sigmoid({a} * score + {b}) must have finite numbers and a slope above 0'
    )
