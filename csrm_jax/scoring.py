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

from csrm_jax import losses
from csrm_jax.data import features
from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.safety import schema
from csrm_jax.safety.layout import DEFAULT, Layout
from csrm_jax.safety.templates import Verbalizers
from csrm_jax.text.tokenizer import Tokenizer

ScoreFn = Callable[..., np.ndarray]  # (examples[, progress]), see make_score_fn

# Row lengths that are compiled; from 128 on about a third is padding at most.
BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
           6144, 8192)
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
        f'score {i} of {len(scores)} is {scores[i]}, not a finite number; '
        'there is no verdict for it.')
  rewards, p_unsafe = _sigmoid(scores), _sigmoid(-scores)
  return [
      Verdict(float(p), float(reward), float(score),
              'safe' if score > 0 else 'unsafe')
      for p, reward, score in zip(p_unsafe, rewards, scores, strict=True)
  ]


def verdict_logprobs(
    cfg: ModelConfig, params: Any, batch: Mapping[str, jax.Array],
    verbalizers: Verbalizers
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
  """
  hidden = transformer.hidden(
      cfg, params, batch['tokens'], batch['positions'], batch['segment_ids'])
  at_verdict = jnp.take_along_axis(
      hidden, batch['verdict_index'][..., None], axis=1)  # [B,S,D]
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
    cfg: ModelConfig, params: Any, tokenizer: Tokenizer,
    verbalizers: Verbalizers, *, layout: Layout = DEFAULT,
    max_length: int = 2048, buckets: Sequence[int] = BUCKETS,
    batch_tokens: int = 8192
) -> ScoreFn:
  """Returns a function: examples -> scores, float32 [N] nats, in their order.

  Prompts are sorted by length and padded to the smallest bucket that holds
  them, so few shapes are ever compiled; padding and neighbours do not change a
  score. A prompt longer than max_length is shortened as in training.

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
    batch_tokens: about how many tokens go through the model at once.

  Raises:
    ValueError: the tokenizer does not belong to the model.
  """
  if tokenizer.vocab_size > cfg.vocab_size:
    raise ValueError(
        f'the tokenizer has {tokenizer.vocab_size} ids, the model '
        f'{cfg.vocab_size}; give the tokenizer of the model.')
  lengths = _usable_buckets(buckets, max_length)
  encoder = features.Encoder(tokenizer, max_length, layout)
  compute = _compile(cfg, verbalizers)

  def score(examples: Sequence[schema.Example],
            progress: Callable[[int], Any] = lambda num: None) -> np.ndarray:
    prompts = [_encode(example, encoder) for example in examples]
    scores = np.zeros(len(prompts), np.float32)
    pending = collections.deque()

    def settle():
      chosen, result = pending.popleft()
      scores[chosen] = np.asarray(result)[:len(chosen)]
      progress(len(chosen))

    for chosen, shape in _plan(prompts, lengths, batch_tokens):
      batch = _pad([prompts[i] for i in chosen], shape)
      pending.append((chosen, compute(params, batch)))
      if len(pending) > _MAX_PENDING:
        settle()
    while pending:
      settle()
    for i in np.flatnonzero(~np.isfinite(scores))[:1]:
      raise ValueError(
          f'{examples[i].id}: its score is {scores[i]}, not a finite number; '
          'look for weights of the model that are not finite.')
    return scores

  return score


def per_category(score_fn: ScoreFn) -> ScoreFn:
  """Returns a score function that asks about one category at a time.

  An example is as unsafe as its worst category: its score is the lowest of
  its categories' scores, and its P(unsafe) the highest of theirs.

  Args:
    score_fn: gets each example as often as it has categories, with one each.
  """

  def score(examples: Sequence[schema.Example],
            progress: Callable[[int], Any] = lambda num: None) -> np.ndarray:
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
  """Returns the example once for each category, without what is known of it.
  """
  return [
      schema.Example(
          f'{example.id} ({category.name})', schema.SafetyConfig((category,)),
          example.conversation)
      for category in example.safety.categories]


@functools.lru_cache(maxsize=16)
def _compile(cfg: ModelConfig, verbalizers: Verbalizers):
  """Returns a jitted (params, batch) -> scores [B]; one per model config."""

  def compute(params, batch):
    safe, unsafe = verdict_logprobs(cfg, params, batch, verbalizers)
    return (safe - unsafe)[:, 0]

  return jax.jit(compute)


def _encode(
    example: schema.Example, encoder: features.Encoder
) -> np.ndarray:
  atom = features.require(features.encode_example(example, encoder))
  return atom.prompts[0].tokens


def _usable_buckets(buckets: Sequence[int], max_length: int) -> list[int]:
  """Returns the buckets up to max_length, ascending, the last one of it."""
  return sorted({b for b in buckets if b < max_length} | {max_length})


def _plan(
    prompts: Sequence[np.ndarray], lengths: Sequence[int], batch_tokens: int
) -> list[tuple[list[int], tuple[int, int]]]:
  """Returns [(indices of prompts, (rows, row length))], shapes repeating.

  Within a bucket chunks are full but for the last, whose rows are the next
  power of two: at most log2(rows) shapes a bucket.
  """
  plan = []
  sizes = np.array([len(prompt) for prompt in prompts], np.int64)
  bucket_of = np.searchsorted(lengths, sizes)
  for bucket in np.unique(bucket_of):
    length = lengths[bucket]
    most = 1 << max(batch_tokens // length, 1).bit_length() - 1
    chosen = np.flatnonzero(bucket_of == bucket).tolist()
    for start in range(0, len(chosen), most):
      part = chosen[start:start + most]
      rows = 1 << (len(part) - 1).bit_length()
      plan.append((part, (rows, length)))
  return plan


def _pad(
    prompts: Sequence[np.ndarray], shape: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Returns a batch with one prompt a row; rows left over are all padding."""
  batch = {name: np.zeros(shape, np.int32)
           for name in ('tokens', 'positions', 'segment_ids')}
  batch['verdict_index'] = np.zeros((shape[0], 1), np.int32)
  for row, tokens in enumerate(prompts):
    size = len(tokens)
    batch['tokens'][row, :size] = tokens
    batch['positions'][row, :size] = np.arange(size)
    batch['segment_ids'][row, :size] = 1
    batch['verdict_index'][row, 0] = size - 1
  return batch


def _sigmoid(x: np.ndarray) -> np.ndarray:
  # Without overflow in either direction.
  small = np.exp(-np.abs(x))
  return np.where(x >= 0, 1, small) / (1 + small)
