"""Verdict scores: the one place where hidden states become safe or unsafe.

Training, evaluation, RL and serving all read a verdict through
`verdict_logprobs`: at an explicit index, over the full vocabulary, in float32.
`make_score_fn` puts a tokenizer in front and fixed buckets around it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.data import features
from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.reward import prompt_batches
from csrm_jax.safety import schema
from csrm_jax.safety.templates import DEFAULT, Layout, Verbalizers
from csrm_jax.text.tokenizer import Tokenizer
from csrm_jax.train import losses

ScoreFn = Callable[..., np.ndarray]  # (examples[, progress]), see make_score_fn

# About how many tokens a device takes at once.
BATCH_TOKENS = 8192
# Batches in flight: enough to keep a device busy, and little memory.
_MAX_PENDING = 8


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the reward model says about one response.

  Attributes:
    p_unsafe: probability that the response violates the rules, in [0, 1].
    reward: 1 - p_unsafe = sigmoid(score).
    score: log P(safe) - log P(unsafe), in nats.
    label: 'unsafe' if p_unsafe is at least one half, else 'safe'.
  """

  p_unsafe: float
  reward: float
  score: float
  label: str


def verdicts(scores: np.ndarray) -> list[Verdict]:
  """Returns the verdict of each score (nats).

  Raises:
    ValueError: a score is not finite: no verdict, and never "safe".
  """
  scores = np.asarray(scores, np.float64)
  for i in np.flatnonzero(~np.isfinite(scores))[:1]:
    raise ValueError(
      f'score {i} of {len(scores)} is {scores[i]}, not a finite number; there is no verdict for it.'
    )
  rewards, p_unsafe = _sigmoid(scores), _sigmoid(-scores)
  return [
    Verdict(float(p), float(reward), float(score), 'safe' if score > 0 else 'unsafe')
    for p, reward, score in zip(p_unsafe, rewards, scores, strict=True)
  ]


def verdict_logprobs(
  cfg: ModelConfig,
  params: Any,
  batch: Mapping[str, jax.Array],
  verbalizers: Verbalizers,
  prefix: dict | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (log P(safe), log P(unsafe)), float32 [B,S], of a packed batch.

  Only the S verdict positions of a row meet the vocabulary. Slots that hold no
  prompt get the verdict of position 0; give them no weight.

  Args:
    cfg: static.
    params: as from transformer.init_params.
    batch: tokens, positions, segment_ids int32 [B,T]; verdict_index int32
      [B,S], the place of the last token of each prompt.
    verbalizers: token ids of both labels.
    prefix: of all rows, as in transformer.hidden.
  """
  hidden = transformer.hidden(
    cfg, params, batch['tokens'], batch['positions'], batch['segment_ids'], prefix
  )
  at_verdict = jnp.take_along_axis(hidden, batch['verdict_index'][..., None], axis=1)  # [B,S,D]
  logits = transformer.logits(cfg, params, at_verdict)  # [B,S,V]
  return losses.verdict_logprobs(logits, verbalizers)


def make_loss_fn(
  cfg: ModelConfig, verbalizers: Verbalizers, gamma: float, margin: float
) -> Callable[..., Any]:
  """Returns (params, batch) -> (total, weight, metrics), for the train step.

  Args:
    cfg: the model.
    verbalizers: token ids of both labels.
    gamma: weight of the pair loss.
    margin: of the pair loss, in nats.
  """

  def loss_fn(params, batch):
    log_p = verdict_logprobs(cfg, params, batch, verbalizers)
    return losses.reward_model_loss(*log_p, batch, gamma, margin)

  return loss_fn


def make_score_fn(
  cfg: ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  verbalizers: Verbalizers,
  *,
  layout: Layout = DEFAULT,
  max_length: int = 2048,
  buckets: Sequence[int] = prompt_batches.BUCKETS,
  batch_tokens: int = BATCH_TOKENS,
) -> ScoreFn:
  """Returns a function: examples -> scores, float32 [N] nats, in their order.

  Prompts are sorted by length and padded to the smallest bucket that holds
  them, so few shapes are ever compiled; rules that many examples share are read
  once. Neither padding nor neighbours change a score (up to rounding). A prompt
  longer than max_length is shortened as in training.

  It computes on the mesh that params lie on.

  The function may be given a second argument, which is called with the number
  of examples in each batch that is done. It raises ValueError, with the
  example's id, if rules do not fit into max_length or a score is not finite.

  Args:
    cfg: the model.
    params: its parameters.
    tokenizer: of the model.
    verbalizers: token ids of both labels.
    layout: of the prompts, as in training.
    max_length: the most tokens a prompt may have.
    buckets: row lengths; those above max_length are not used.
    batch_tokens: about how many tokens go through the model at once, for each
      part that the params' mesh cuts rows into.

  Raises:
    ValueError: the tokenizer does not belong to the model.
  """
  if tokenizer.vocab_size > cfg.vocab_size:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocab_size} ids, the model '
      f'{cfg.vocab_size}; give the tokenizer of the model.'
    )
  lengths = prompt_batches.usable_buckets(buckets, max_length)
  batch_tokens *= mesh_lib.num_row_parts(params)
  encoder = features.Encoder(tokenizer, max_length, layout)
  compute = make_score_step(cfg, verbalizers)

  def score(
    examples: Sequence[schema.Example], progress: Callable[[int], Any] = lambda num: None
  ) -> np.ndarray:
    prompts = [_encode(example, encoder) for example in examples]
    scores = np.zeros(len(prompts), np.float32)
    pending = collections.deque()

    def settle():
      chosen, result = pending.popleft()
      scores[chosen] = np.asarray(result)[: len(chosen)]
      progress(len(chosen))

    with mesh_lib.of(params):
      for group in prompt_batches.make_groups(
        prompts, [example.safety for example in examples], lengths, batch_tokens, cfg.sliding_window
      ):
        prefix = _read_prefix(cfg, params, prompts, group)
        for chosen, shape in group.batches:
          batch = prompt_batches.pad([prompts[i] for i in chosen], shape, group.num_shared)
          pending.append((chosen, compute(params, batch, prefix)))
          if len(pending) > _MAX_PENDING:
            settle()
      while pending:
        settle()
    for i in np.flatnonzero(~np.isfinite(scores))[:1]:
      raise ValueError(
        f'{examples[i].id}: its score is {scores[i]}, not a finite number; '
        'look for weights of the model that are not finite.'
      )
    return scores

  return score


def per_category(score_fn: ScoreFn) -> ScoreFn:
  """Returns a score function that asks about one category at a time.

  An example is as unsafe as its worst category: its score is the lowest of
  its categories' scores, and its P(unsafe) the highest of theirs.

  Args:
    score_fn: gets each example as often as it has categories, with one each.
  """

  def score(
    examples: Sequence[schema.Example], progress: Callable[[int], Any] = lambda num: None
  ) -> np.ndarray:
    parts = [part for example in examples for part in split_categories(example)]
    if not parts:
      return score_fn([])
    num_done = 0

    def advance(num):
      # Of examples, as they would be if all had as many categories.
      nonlocal num_done
      before = num_done * len(examples) // len(parts)
      num_done += num
      progress(num_done * len(examples) // len(parts) - before)

    scores = score_fn(parts, advance)
    sizes = [len(example.safety.categories) for example in examples]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.minimum.reduceat(scores, starts)

  return score


def split_categories(example: schema.Example) -> list[schema.Example]:
  """Returns the example once for each category, without what is known of it."""
  return [
    schema.Example(
      f'{example.id} ({category.name})', schema.SafetyConfig((category,)), example.conversation
    )
    for category in example.safety.categories
  ]


@functools.lru_cache(maxsize=16)
def make_score_step(cfg: ModelConfig, verbalizers: Verbalizers) -> Callable[..., jax.Array]:
  """Returns a jitted (params, batch[, prefix]) -> scores [B]; cached.

  The score is that of the first prompt of each row; every device gets all.
  """

  def compute(params, batch, prefix=None):
    safe, unsafe = verdict_logprobs(cfg, params, batch, verbalizers, prefix)
    return mesh_lib.constrain((safe - unsafe)[:, 0])

  return jax.jit(compute)


def _encode(example: schema.Example, encoder: features.Encoder) -> np.ndarray:
  atom = features.require(features.encode_example(example, encoder))
  return atom.prompts[0].tokens


def _read_prefix(
  cfg: ModelConfig, params: Any, prompts: Sequence[np.ndarray], group: prompt_batches.Group
) -> dict | None:
  """Returns what the group's prompts share, as transformer.hidden takes it."""
  if not group.num_shared:
    return None
  first = prompts[group.batches[0][0][0]][: group.num_shared]
  batch = prompt_batches.pad([first], (1, group.prefix_length))
  return transformer.make_prefix_reader(cfg)(params, batch['tokens'], batch['segment_ids'])


def _sigmoid(x: np.ndarray) -> np.ndarray:
  # Without overflow in either direction.
  small = np.exp(-np.abs(x))
  return np.where(x >= 0, 1, small) / (1 + small)
