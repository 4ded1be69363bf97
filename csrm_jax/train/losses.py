"""Losses; each returns (total, weight, metrics), and none of them divides.

`total` is a weighted sum, `weight` the sum of its weights, and metrics are {name: (sum,
weight)}. The train step adds them over microbatches and devices and divides once, so packing,
accumulation and sharding are exact.

Axes: B rows, S verdict slots of a row, T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def verdict_logprobs(logits: jax.Array, verbalizers: Any) -> tuple[jax.Array, jax.Array]:
  """Returns (log P(safe), log P(unsafe)) of logits [...,V], in nats, float32 [...].

  Each probability is the sum over the label's verbalizer tokens, out of the full vocabulary. So
  the two do not add up to one; the score is the difference of the logs.

  Source: CSRM (arXiv 2605.30487), the verdict probability π.
  """
  logits = logits.astype(jnp.float32)
  norm = jax.nn.logsumexp(logits, axis=-1)

  # float32, because the score is a small difference of large logits.
  def log_prob(ids):
    return jax.nn.logsumexp(logits[..., jnp.asarray(ids)], axis=-1) - norm

  return log_prob(verbalizers.safe), log_prob(verbalizers.unsafe)


# --- What a pair and a label cost ---------------------------------------------------------


def bt(gap: jax.Array, strength: jax.Array, target: jax.Array) -> jax.Array:
  """Returns −log σ(gap).

  Source: Bradley & Terry 1952; CSRM (arXiv 2605.30487), L_rm.
  """
  return -jax.nn.log_sigmoid(gap)


def margin(gap: jax.Array, strength: jax.Array, target: jax.Array, *, step: float = 1.0):
  """Returns −log σ(gap − step·strength): a stronger preference wants a larger gap.

  Source: Llama 2 (arXiv 2307.09288), eq. 2; HelpSteer2-Preference (arXiv 2410.01257), eq. 2.
  """
  return -jax.nn.log_sigmoid(gap - step * strength)


def scaled(gap: jax.Array, strength: jax.Array, target: jax.Array):
  """Returns −strength·log σ(gap): a stronger preference counts more.

  Source: HelpSteer2-Preference (arXiv 2410.01257), eq. 3.
  """
  return -strength * jax.nn.log_sigmoid(gap)


def soft(
  gap: jax.Array,
  strength: jax.Array,
  target: jax.Array,
  *,
  smoothing: float = 0.0,
  tie: float = 1.0,
):
  """Returns −q log σ(gap) − (1−q) log σ(−gap), with q the target drawn towards ½ by `smoothing`.

  A pair with q = ½ is a tie, and counts `tie`. With a share ε of orders that were swapped,
  smoothing = 2ε gives q = 1 − ε.

  Source: Secrets of RLHF II (arXiv 2401.06080), §3.3, soft labels; Crome (arXiv 2506.16507), ties.
  """
  weight = jnp.where(target == 0.5, tie, 1.0)
  target = target + smoothing * (0.5 - target)
  lost = -target * jax.nn.log_sigmoid(gap) - (1 - target) * jax.nn.log_sigmoid(-gap)
  return weight * lost


def dynamic(
  gap: jax.Array, strength: jax.Array, target: jax.Array, *, weight: float = 0.5, slope: float = 0.5
):
  """Returns −log σ(β·gap), β = 1 + weight·(1 − exp(−slope·strength)), at least 0.001.

  The strength is the gap in nats that another reward model gives the pair.

  Source: MM-RLHF (arXiv 2502.10391), dynamic reward scaling. There it is DPO's β; that it scales
  the gap of a reward model is our reading.
  """
  scale = 1 + weight * (1 - jnp.exp(-slope * strength))
  return -jax.nn.log_sigmoid(jnp.maximum(scale, 1e-3) * gap)


# name -> (gap, strength, target, float32 [B,S]; knobs) -> what each pair costs. gap is s_safer −
# s_other − m in nats, strength how much safer, target the probability that the order is right.
PAIR_LOSSES: dict[str, Callable[..., jax.Array]] = {
  'bt': bt,
  'margin': margin,
  'scaled': scaled,
  'soft': soft,
  'dynamic': dynamic,
}
# What each reads of a pair beside its order.
PAIR_READS = {
  'bt': (),
  'margin': ('strength',),
  'scaled': ('strength',),
  'soft': ('soft', 'tie'),
  'dynamic': ('strength',),
}


def nll(log_p: jax.Array, log_other: jax.Array) -> jax.Array:
  """Returns −log P(label).

  Source: CSRM (arXiv 2605.30487), L_cls.
  """
  return -log_p


def smooth(log_p: jax.Array, log_other: jax.Array, *, smoothing: float = 0.1) -> jax.Array:
  """Returns −(1−ε) log P(label) − ε log P(the other), ε = smoothing / 2.

  Source: Szegedy et al. 2015 (arXiv 1512.00567), §7, with two classes.
  """
  return -(1 - smoothing / 2) * log_p - smoothing / 2 * log_other


def brier(log_p: jax.Array, log_other: jax.Array) -> jax.Array:
  """Returns (1 − P)², where P is that of the label, of the two verdicts' alone.

  It is the regression of the reward on the label, 1 for safe: bounded, so that wrong labels pull
  less.

  Source: Brier 1950; as a robust loss, Ghosh et al. 2017 (arXiv 1712.09482).
  """
  return jnp.square(jax.nn.sigmoid(log_other - log_p))


# name -> (log P(label), log P(the other), float32 [B,S]; knobs) -> what each label costs.
LABEL_LOSSES: dict[str, Callable[..., jax.Array]] = {'nll': nll, 'smooth': smooth, 'brier': brier}


# --- The joint objective ------------------------------------------------------------------


def reward_model_loss(
  log_p_safe: jax.Array,
  log_p_unsafe: jax.Array,
  batch: Mapping[str, jax.Array],
  gamma: float,
  margin: float,
  pair_loss: Callable[..., jax.Array] = bt,
  label_loss: Callable[..., jax.Array] = nll,
  gap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Returns (total, weight, metrics) of the joint objective L_cls + γ·L_rm.

  L_cls = −log P(label) for a slot with a label. L_rm = −log σ(s_safer − s_other − m) for a pair,
  where s is log P(safe) − log P(unsafe) and m the margin, both in nats. The safer side of a
  strictness pair is the one under the *lenient* rules: the paper's printed formula has the
  opposite sign from its text and figures.

  total = Σ label_weight·L_cls + γ Σ pair_weight·L_rm. weight counts atoms: a labelled slot
  outside a pair counts label_weight, and a pair counts pair_weight once, even if its slots have
  labels. So total / weight is a mean over atoms. pair_loss and label_loss may cost other than
  these, see PAIR_LOSSES and LABEL_LOSSES; gap, float32 [B,S] in nats, stands for s_safer − s_other
  where a head orders pairs otherwise.

  The batch has label int32 [B,S] (0 safe, 1 unsafe, -1 none), label_weight float32 [B,S], and
  pair_weight float32 [B,S], which stands on slot s if s and s + 1 are the safer and the other
  side of a pair. It may have pair_target and pair_strength, float32 [B,S], else 1 for every pair;
  and offset, float32 [B,S]: the log odds, in nats, that the draw of a labelled slot added to
  "safe". Then L_cls takes the odds of the two verdicts with it, so that the score stays that of
  what was not drawn.

  Source: CSRM (arXiv 2605.30487), §3 (L_cls, L_rm), with the sign corrected.
  """
  label, label_weight = batch['label'], batch['label_weight']
  pair_weight = jnp.asarray(batch['pair_weight'])
  # Pairs never wrap around the row: the last slot has no right neighbour.
  in_pair = pair_weight.at[:, 1:].add(pair_weight[:, :-1]) > 0
  # An unused slot may hold anything. It is cleared first: a weight of 0 keeps a NaN out of the
  # loss, but not out of the gradient.
  used = in_pair | (label_weight > 0)
  log_p_safe = jnp.where(used, log_p_safe, 0.0)
  log_p_unsafe = jnp.where(used, log_p_unsafe, 0.0)
  score = log_p_safe - log_p_unsafe  # [B,S]
  if 'offset' in batch:
    drawn = score + jnp.where(label_weight > 0, batch['offset'], 0.0)
    # P(label) = P(a verdict) · P(label | a verdict): only the second depends on the draw.
    either = jnp.logaddexp(log_p_safe, log_p_unsafe)
    sides = either - jax.nn.softplus(-drawn), either - jax.nn.softplus(drawn)
  else:
    sides = log_p_safe, log_p_unsafe
  is_unsafe = label == 1
  cls = label_loss(jnp.where(is_unsafe, *sides[::-1]), jnp.where(is_unsafe, *sides))
  cls = _weighted(cls, label_weight)
  if gap is None:
    gap = score - jnp.roll(score, -1, axis=-1)  # safer minus other
  ones = jnp.ones_like(gap)
  strength, target = (batch.get(f'pair_{name}', ones) for name in ('strength', 'target'))
  pairs = _weighted(pair_loss(gap - margin, strength, target), pair_weight)
  num_pairs = pair_weight.sum()
  num_labels = label_weight.sum()
  weight = jnp.where(in_pair, 0.0, label_weight).sum() + num_pairs
  # A tie is no evidence of safety: it counts as "unsafe", and as half a pair.
  correct = (score > 0) == (label == 0)
  ordered = 0.5 * ((gap > 0) + (gap >= 0).astype(jnp.float32))
  metrics = {
    'loss/cls': (cls.sum(), num_labels),
    'loss/pairs': (pairs.sum(), num_pairs),
    'train/accuracy': (_weighted(correct, label_weight).sum(), num_labels),
    'pairs/accuracy': (_weighted(ordered, pair_weight).sum(), num_pairs),
    'pairs/score_gap': (_weighted(gap, pair_weight).sum(), num_pairs),
  }
  return cls.sum() + gamma * pairs.sum(), weight, metrics


def rating_loss(
  cost: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Returns (total, weight, metrics) of what ratings cost, float32 [B,S,K].

  weight counts the slots that only ratings are known of: those that reward_model_loss does not
  count. The batch has target_weight, float32 [B,S,K], beside what that takes.
  """
  lost = _weighted(cost, batch['target_weight'])
  pair_weight = jnp.asarray(batch['pair_weight'])
  is_counted = pair_weight.at[:, 1:].add(pair_weight[:, :-1]) + batch['label_weight'] > 0
  alone = jnp.where(is_counted, 0.0, batch['target_weight'].max(-1))
  num = batch['target_weight'].sum()
  return lost.sum(), alone.sum(), {'loss/ratings': (lost.sum(), num)}


def lm_loss(
  logits: jax.Array, tokens: jax.Array, segment_ids: jax.Array, loss_weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Returns (total, weight, metrics) of next-token prediction, in nats.

  Each token is predicted from the ones before it in its segment. The first token of a segment
  and padding (segment 0) are never targets. loss_weight float32 [B,T] is the weight of each
  token as a *target*; all 1 by default.
  """
  # Targets are shifted; cutting the logits instead would copy [B,T,V].
  target = jnp.roll(tokens, -1, axis=1)
  follows = jnp.roll(segment_ids, -1, axis=1) == segment_ids
  weight = (follows & (segment_ids > 0)).astype(jnp.float32)
  if loss_weight is not None:
    weight = weight * jnp.roll(loss_weight, -1, axis=1)
  # The shift brought the row's first token behind its last one.
  weight = weight.at[:, -1].set(0.0)
  logits = logits.astype(jnp.float32)
  norm = jax.nn.logsumexp(logits, axis=-1)
  target_logit = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
  total = _weighted(norm - target_logit, weight).sum()
  # Compared with the maximum, because argmax is slow on CPU. A tie counts as correct.
  correct = target_logit >= jax.lax.stop_gradient(logits).max(-1)
  num_tokens = weight.sum()
  return (
    total,
    num_tokens,
    {'loss/lm': (total, num_tokens), 'lm/accuracy': (_weighted(correct, weight).sum(), num_tokens)},
  )


def _weighted(x: jax.Array, weight: jax.Array) -> jax.Array:
  # Not x * weight: where the weight is 0, x may be NaN or infinite.
  return jnp.where(weight > 0, x, 0.0) * weight
