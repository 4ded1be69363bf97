"""Heads: how a verdict is read off the last hidden state of a prompt.

A row of `HEADS` makes a `Head` of its knobs. Its name and knobs, 'NAME:KNOB=VALUE,…', are stored
with the model, so that training, scoring and export read the same head. Its parameters, if it has
any, lie in the model's under 'head'.

Axes: B rows, S verdict slots, D the hidden state, K ratings or levels, M members.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from csrm_jax import config as config_lib
from csrm_jax.models.config import ModelConfig
from csrm_jax.reward import combiners

DEFAULT = 'verbalizer'
LogP = tuple[jax.Array, jax.Array]  # (log P(safe), log P(unsafe)) in nats, float32 [B,S]


class Output(NamedTuple):
  """What a head says of each slot; all float32."""

  log_p: LogP
  predicted: jax.Array | None = None  # [B,S,K], what `Head.cost` compares with the ratings
  # [B,S]: the log odds that slot s is safer than s + 1, where that is not the scores' difference.
  gap: jax.Array | None = None
  penalty: jax.Array | None = None  # [B,S], what a pair costs beside its loss
  members: LogP | None = None  # [M,B,S] each: what is trained, where log_p combines them


def _squared(predicted: jax.Array, ratings: jax.Array) -> jax.Array:
  return jnp.square(predicted - ratings)


class Head(NamedTuple):
  """One way to read a verdict."""

  # (D, key) -> its parameters, a nested dict of float32 arrays; {} for none
  init: Callable[[int, jax.Array], dict[str, Any]]
  # (parameters, hidden [B,S,D], a function that returns the verbalizers' log_p) -> Output
  apply: Callable[[Any, jax.Array, Callable[[], LogP]], Output]
  ratings: tuple[str, ...] = ()  # the names of the ratings that it learns
  # (predicted, ratings [B,S,K]) -> what each rating costs, [B,S,K]
  cost: Callable[[jax.Array, jax.Array], jax.Array] = _squared


def of_score(score: jax.Array) -> LogP:
  """Returns (log P(safe), log P(unsafe)) of a score in nats, where there is no other word."""
  return jax.nn.log_sigmoid(score), jax.nn.log_sigmoid(-score)


def _dense(*shape: int, key: jax.Array) -> jax.Array:
  return shape[0] ** -0.5 * jax.random.normal(key, shape)


def verbalizer() -> Head:
  """Returns the head without parameters: the vocabulary's verdict words.

  Source: CSRM (arXiv 2605.30487), the verdict probability π.
  """
  return Head(lambda size, key: {}, lambda params, hidden, log_p: Output(log_p()))


def linear() -> Head:
  """Returns score = w·h, a sequence classifier's head.

  Source: Stiennon et al. 2020 (arXiv 2009.01325), §3.4.
  """

  def apply(params, hidden, log_p):
    return Output(of_score((hidden.astype(jnp.float32) @ params['kernel'])[..., 0]))

  return Head(lambda size, key: {'kernel': _dense(size, 1, key=key)}, apply)


def mlp() -> Head:
  """Returns score = w₂·SiLU(W₁h), W₁ [D,D].

  Source: BaseReward (arXiv 2509.16127), a two-layer head; its activation there was not checked.
  """

  def init(size, key):
    one, two = jax.random.split(key)
    return {'up': {'kernel': _dense(size, size, key=one)}, 'kernel': _dense(size, 1, key=two)}

  def apply(params, hidden, log_p):
    inner = jax.nn.silu(hidden.astype(jnp.float32) @ params['up']['kernel'])
    return Output(of_score((inner @ params['kernel'])[..., 0]))

  return Head(init, apply)


def ordinal(*, levels: int = 4, rating: str = '', spread: float = 1.0) -> Head:
  """Returns P(level), a softmax over levels; the upper half of them is "safe".

  A pair is ordered by P(the safer's level is higher), a tie counting half. `rating` names the
  rating from 0 to levels − 1 that is the level; with '-' in front a higher one is less safe, as a
  severity. A level costs −log Σ_k w(k) P(k), w falling to 0 at `spread` levels beside it.

  Source: OPRM with region-flooding tuning (arXiv 2602.12660), from its abstract and notes: the
  half for ties and the triangular w are our reading. There levels are digits of the vocabulary.
  """
  if levels < 2 or levels % 2:
    raise ValueError(f'levels={levels} must be even: the upper half is "safe"')
  if not spread > 0:
    raise ValueError(f'spread={spread} must be above 0')
  sign, name = (-1 if rating.startswith('-') else 1), rating.removeprefix('-')

  def init(size, key):
    return {'kernel': _dense(size, levels, key=key), 'bias': jnp.zeros(levels)}

  def apply(params, hidden, log_p):
    logits = hidden.astype(jnp.float32) @ params['kernel'] + params['bias']
    log_p = jax.nn.log_softmax(logits)
    half = levels // 2
    sides = jax.nn.logsumexp(log_p[..., half:], -1), jax.nn.logsumexp(log_p[..., :half], -1)
    here, other = jnp.exp(log_p), jnp.exp(jnp.roll(log_p, -1, axis=1))
    # Each level against those below it, and half of itself.
    win = (here * (jnp.cumsum(other, -1) - other / 2)).sum(-1)
    lose = (other * (jnp.cumsum(here, -1) - here / 2)).sum(-1)
    tiny = jnp.finfo(jnp.float32).tiny
    gap = jnp.log(jnp.maximum(win, tiny)) - jnp.log(jnp.maximum(lose, tiny))
    return Output(sides, log_p, gap)

  def cost(log_p, ratings):
    level = ratings if sign > 0 else levels - 1 - ratings  # [B,S,1]
    weight = jnp.maximum(1 - jnp.abs(jnp.arange(levels) - level) / spread, 0.0)
    inside = jax.nn.logsumexp(log_p, axis=-1, b=weight, keepdims=True)
    # A rating beyond the levels has no weight anywhere, and so no cost.
    return jnp.where(weight.sum(-1, keepdims=True) > 0, -inside, 0.0)

  return Head(init, apply, (name,) if name else (), cost)


def ratings(*, names: str = '') -> Head:
  """Returns the verbalizers' verdict, beside a regression on each of the ratings A+B+….

  Source: HelpSteer2-Preference (arXiv 2410.01257), regression; MO-GRPO (arXiv 2503.21819),
  multi-label reward models. UniRM (arXiv 2602.02536) has a sigmoid on each, which ratings of other
  scales than 0 to 1 do not allow.
  """
  known = _names(names)

  def init(size, key):
    return {'kernel': _dense(size, len(known), key=key), 'bias': jnp.zeros(len(known))}

  def apply(params, hidden, log_p):
    predicted = hidden.astype(jnp.float32) @ params['kernel'] + params['bias']
    return Output(log_p(), predicted)

  return Head(init, apply, known)


def weighted(*, names: str = '') -> Head:
  """Returns score = Σ_k w_k(h)·r_k + b: ratings r of a regression, weighed by w = softmax(Vh).

  Source: Pragma-VL (arXiv 2603.13292), attribute heads weighed by the query, from its abstract;
  that the weights are read off the same state as the ratings is our reading.
  """
  known = _names(names)

  def init(size, key):
    one, two = jax.random.split(key)
    return {
      'kernel': _dense(size, len(known), key=one),
      'bias': jnp.zeros(len(known)),
      'up': {'kernel': _dense(size, len(known), key=two), 'bias': jnp.zeros(1)},
    }

  def apply(params, hidden, log_p):
    hidden = hidden.astype(jnp.float32)
    predicted = hidden @ params['kernel'] + params['bias']
    share = jax.nn.softmax(hidden @ params['up']['kernel'])
    return Output(of_score((share * predicted).sum(-1) + params['up']['bias'][0]), predicted)

  return Head(init, apply, known)


def mixture(*, raters: int = 4, entropy: float = 0.5) -> Head:
  """Returns score = Σ_k π_k(h)·r_k(h) of K raters, of whom π says who judges.

  A pair is ordered with P = Σ_k π_k σ(Δ_k), π of its safer side, and costs entropy·Σ_k π_k log π_k
  more, which keeps raters from vanishing. With one rater it is the linear head.

  Source: MiCRo (arXiv 2505.24846), stage 1. There the trunk is frozen, and π reads the prompt
  alone.
  """
  if raters < 1:
    raise ValueError(f'raters={raters} must be at least 1')

  def init(size, key):
    one, two = jax.random.split(key)
    router = {'up': {'kernel': _dense(size, raters, key=two)}} if raters > 1 else {}
    # The first rater is the linear head's.
    return {'kernel': jnp.concatenate([
      _dense(size, 1, key=k) for k in [key, *jax.random.split(one, raters - 1)]
    ], 1)} | router  # fmt: skip

  def apply(params, hidden, log_p):
    hidden = hidden.astype(jnp.float32)
    each = hidden @ params['kernel']
    if raters == 1:
      return Output(of_score(each[..., 0]))
    log_share = jax.nn.log_softmax(hidden @ params['up']['kernel'])
    gaps = each - jnp.roll(each, -1, axis=1)
    right, wrong = (
      jax.nn.logsumexp(log_share + jax.nn.log_sigmoid(sign * gaps), -1) for sign in (1, -1)
    )
    share = jnp.exp(log_share)
    penalty = entropy * (share * log_share).sum(-1)
    return Output(of_score((share * each).sum(-1)), None, right - wrong, penalty)

  return Head(init, apply)


def members(*, num: int = 5, combine: str = 'uwo', weight: float = -1.0) -> Head:
  """Returns what `combine`, one of COMBINERS, makes of `num` linear heads, each trained for itself.

  `weight` is the combiner's knob, where it has one; -1 is its default. With one member it is the
  linear head.

  Source: Reward-robust RLHF (arXiv 2409.15360), several heads on one trunk; there each has a mean
  and a spread, fitted to a trained model's scores.
  """
  if num < 1:
    raise ValueError(f'num={num} must be at least 1')
  knobs = list(config_lib.knobs(combiners.choose(combine).func))
  if weight >= 0 and not knobs:
    raise ValueError(f'weight={weight}: {combine} has none')
  text = f'{combine}:{knobs[0]}={weight}' if weight >= 0 else combine
  join = combiners.choose(text)

  def init(size, key):
    keys = [key, *jax.random.split(key, num - 1)]
    return {'kernel': jnp.concatenate([_dense(size, 1, key=k) for k in keys], 1)}

  def apply(params, hidden, log_p):
    scores = jnp.moveaxis(hidden.astype(jnp.float32) @ params['kernel'], -1, 0)
    return Output(of_score(join(scores)), members=of_score(scores))

  return Head(init, apply)


# name -> the function of its knobs that makes it.
HEADS: Mapping[str, Callable[..., Head]] = {
  'verbalizer': verbalizer,
  'linear': linear,
  'mlp': mlp,
  'ordinal': ordinal,
  'ratings': ratings,
  'weighted': weighted,
  'mixture': mixture,
  'members': members,
}


@functools.lru_cache(maxsize=64)
def get(text: str) -> Head:
  """Returns the head that 'NAME' or 'NAME:KNOB=VALUE,…' names; ValueError where none is so."""
  make = config_lib.choose('head', HEADS, text)
  try:
    return make()
  except ValueError as error:
    raise ValueError(f'head={text!r}: {error}') from None


def init(text: str, cfg: ModelConfig, seed: int) -> dict[str, Any]:
  """Returns {'head': new parameters}, or {} for a head without any."""
  params = get(text).init(cfg.embed_dim, jax.random.key(seed))
  return {'head': params} if params else {}


def shapes(text: str, cfg: ModelConfig) -> dict[str, Any]:
  """Returns what `init` returns, as ShapeDtypeStructs."""
  return jax.eval_shape(lambda: init(text, cfg, 0))


def body(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters without those of a head."""
  return {name: part for name, part in params.items() if name != 'head'}


def _names(text: str) -> tuple[str, ...]:
  names = tuple(name for name in text.split('+') if name)
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f'names={text!r}: name the ratings, each once, as in names=helpfulness+severity'
    )
  return names
