"""Verdict scores: the one place where hidden states become safe or unsafe.

Training, evaluation, RL and serving all read a verdict through `verdict_logprobs`: at an explicit
index, over the full vocabulary, in float32. `make_score_fn` puts a tokenizer in front and packs
prompts of many lengths into batches of few shapes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.data import features
from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.safety import schema
from csrm_jax.safety.templates import DEFAULT, Layout, Verbalizers
from csrm_jax.text.tokenizer import Tokenizer
from csrm_jax.train import losses

ScoreFn = Callable[..., np.ndarray]  # (examples[, progress]), see make_score_fn

# Row lengths that are compiled. From 128 on, none is more than 1.5 times the one before, so that at
# most about a third of a row is padding.
BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# A group saves at least so many tokens: fewer are not worth the compilation of new shapes.
MIN_SAVED = 2048
# About how many tokens a device takes at once.
BATCH_TOKENS = 8192
# Batches in flight: enough to keep a device busy, and little memory.
_MAX_PENDING = 8

# [(indices of prompts, (rows, row length))]
Plan = list[tuple[list[int], tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the reward model says about one response."""

  p_unsafe: float  # probability that the response violates the rules, in [0, 1]
  reward: float  # 1 - p_unsafe = sigmoid(score)
  score: float  # log P(safe) - log P(unsafe), in nats
  label: str  # 'unsafe' if p_unsafe is at least one half, else 'safe'


def verdicts(scores: np.ndarray) -> list[Verdict]:
  """Returns the verdict of each score (nats); raises ValueError unless all are finite."""
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


def _sigmoid(x: np.ndarray) -> np.ndarray:
  # 1 / (1 + exp(-x)) would overflow at very negative x.
  small = np.exp(-np.abs(x))
  return np.where(x >= 0, 1, small) / (1 + small)


def verdict_logprobs(
  cfg: ModelConfig,
  params: Any,
  batch: Mapping[str, jax.Array],
  verbalizers: Verbalizers,
  prefix: dict | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (log P(safe), log P(unsafe)) in nats, float32 [B,S], of a packed batch.

  The batch has tokens, positions, segment_ids int32 [B,T] and verdict_index int32 [B,S], the place
  of the last token of each prompt. Slots that hold no prompt get the verdict of position 0; give
  them no weight. With ends, int32 [B,T], prompts share tokens; all rows continue the prefix, if
  there is one, as in transformer.hidden. cfg is
  static.
  """
  rows = batch['tokens'], batch['positions'], batch['segment_ids']
  hidden = transformer.hidden(cfg, params, *rows, prefix, batch.get('ends'))
  # Selected before the product with the vocabulary: logits [B,T,V] would be far larger.
  at_verdict = jnp.take_along_axis(hidden, batch['verdict_index'][..., None], axis=1)  # [B,S,D]
  logits = transformer.logits(cfg, params, at_verdict)  # [B,S,V]
  return losses.verdict_logprobs(logits, verbalizers)


def make_loss_fn(
  cfg: ModelConfig, verbalizers: Verbalizers, gamma: float, margin: float
) -> Callable[..., Any]:
  """Returns (params, batch) -> (total, weight, metrics); gamma weighs pairs, margin is in nats."""

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
  buckets: Sequence[int] = BUCKETS,
  batch_tokens: int = BATCH_TOKENS,
) -> ScoreFn:
  """Returns a function: examples -> scores, float32 [N] in nats, in their order.

  The function computes on the mesh that params lie on. Its second argument, if given, is called
  with the number of examples in each batch that is done. It raises ValueError, with the example's
  id, if rules do not fit into max_length or a score is not finite. A longer prompt is shortened as
  in training. Neither padding nor neighbours change a score (up to rounding).

  `buckets` are the row lengths that are compiled. About batch_tokens tokens go through the model at
  once, for each part that the mesh cuts rows into.
  """
  if tokenizer.vocab_size > cfg.vocab_size:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocab_size} ids, the model '
      f'{cfg.vocab_size}; give the tokenizer of the model.'
    )
  lengths = sorted({b for b in buckets if b < max_length} | {max_length})
  batch_tokens *= mesh_lib.num_row_parts(params)
  encoder = features.Encoder(tokenizer, max_length, layout)
  compute = make_score_step(cfg, verbalizers)

  def score(
    examples: Sequence[schema.Example], progress: Callable[[int], Any] = lambda num: None
  ) -> np.ndarray:
    atoms = [features.require(features.encode(e, encoder)) for e in examples]
    prompts = [atom.prompts[0].tokens for atom in atoms]
    scores = np.zeros(len(prompts), np.float32)
    pending = collections.deque()

    # Batches are dispatched before earlier results are fetched, so that the device need not wait
    # for the host.
    def settle():
      chosen, result = pending.popleft()
      scores[chosen] = np.asarray(result)[: len(chosen)]
      progress(len(chosen))

    with mesh_lib.of(params):
      for group in make_groups(
        prompts, [example.safety for example in examples], lengths, batch_tokens, cfg.sliding_window
      ):
        prefix = None
        if group.num_shared:
          shared = prompts[group.batches[0][0][0]][: group.num_shared]
          batch = pad([shared], (1, group.prefix_length))
          read = transformer.make_prefix_reader(cfg)
          prefix = read(params, batch['tokens'], batch['segment_ids'])
        for chosen, shape in group.batches:
          batch = pad([prompts[i] for i in chosen], shape, group.num_shared)
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
  """Returns a score function that asks score_fn about one category at a time."""

  def score(
    examples: Sequence[schema.Example], progress: Callable[[int], Any] = lambda num: None
  ) -> np.ndarray:
    parts = [part for example in examples for part in split_categories(example)]
    if not parts:
      return score_fn([])
    num_done = 0

    def advance(num):
      # The caller counts examples, score_fn counts parts: it is told the same share of examples.
      nonlocal num_done
      before = num_done * len(examples) // len(parts)
      num_done += num
      progress(num_done * len(examples) // len(parts) - before)

    scores = score_fn(parts, advance)
    sizes = [len(example.safety.categories) for example in examples]
    starts = np.cumsum([0, *sizes[:-1]])
    # An example is as unsafe as its worst category.
    return np.minimum.reduceat(scores, starts)

  return score


def split_categories(example: schema.Example) -> list[schema.Example]:
  """Returns the example once for each category, without its label."""
  return [
    schema.Example(
      f'{example.id} ({category.name})', schema.SafetyConfig((category,)), example.conversation
    )
    for category in example.safety.categories
  ]


@functools.lru_cache(maxsize=16)
def make_score_step(cfg: ModelConfig, verbalizers: Verbalizers) -> Callable[..., jax.Array]:
  """Returns a jitted (params, batch[, prefix]) -> scores [B] of each row's first prompt."""

  def compute(params, batch, prefix=None):
    safe, unsafe = verdict_logprobs(cfg, params, batch, verbalizers, prefix)
    # Every device gets all scores, so that every process can read them.
    return mesh_lib.constrain((safe - unsafe)[:, 0])

  return jax.jit(compute)


# --- Batches of few shapes -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
  """Prompts that are read behind one copy of the first tokens that they share."""

  batches: Plan  # what the rows hold behind the shared tokens
  num_shared: int = 0  # in tokens; 0 where each row holds a whole prompt
  prefix_length: int = 0  # num_shared, padded

  @property
  def num_tokens(self) -> int:
    """How many tokens the model reads, padding included."""
    return self.prefix_length + sum(rows * length for _, (rows, length) in self.batches)


def make_groups(
  prompts: Sequence[np.ndarray],
  keys: Sequence[Hashable],
  lengths: Sequence[int],
  batch_tokens: int,
  window: int = 0,
) -> list[Group]:
  """Returns groups that hold each prompt once.

  Prompts with the same key stand under the same rules. They form a group of their own, which reads
  what they share once, if that saves enough tokens. All other prompts go into one group.
  """
  by_key = {}
  for i, key in enumerate(keys):
    by_key.setdefault(key, []).append(i)
  groups, others = [], []
  for indices in by_key.values():
    if len(indices) < 2:
      others += indices
      continue
    whole = Group(_plan(prompts, indices, lengths, batch_tokens))
    num_shared = transformer.num_common([prompts[i] for i in indices])
    prefix_length = lengths[np.searchsorted(lengths, num_shared)]
    batches = _plan(prompts, indices, lengths, batch_tokens, num_shared)
    group = Group(batches, num_shared, prefix_length)
    length = group.prefix_length + max(length for _, (_, length) in group.batches)
    # A group must save MIN_SAVED tokens and a quarter of all, padding included. The model's window
    # counts the padding behind a prefix as tokens, so that it must hold the whole row.
    saved = whole.num_tokens - group.num_tokens
    if saved >= MIN_SAVED and 4 * saved >= whole.num_tokens and (not window or length <= window):
      groups.append(group)
    else:
      others += indices
  if others:
    groups.append(Group(_plan(prompts, sorted(others), lengths, batch_tokens)))
  return groups


def _plan(
  prompts: Sequence[np.ndarray],
  indices: Sequence[int],
  lengths: Sequence[int],
  batch_tokens: int,
  num_shared: int = 0,
) -> Plan:
  """Returns the prompts of the indices in batches, bucket by bucket."""
  plan = []
  sizes = np.array([len(prompts[i]) for i in indices], np.int64) - num_shared
  bucket_of = np.searchsorted(lengths, sizes)
  for bucket in np.unique(bucket_of):
    length = lengths[bucket]
    most = most_rows(batch_tokens, length)
    chosen = [indices[i] for i in np.flatnonzero(bucket_of == bucket)]
    for start in range(0, len(chosen), most):
      part = chosen[start : start + most]
      # Only the last batch of a bucket has fewer rows than most: a power of two of them, so that
      # a bucket has at most log2(most) + 1 shapes.
      rows = 1 << (len(part) - 1).bit_length()
      plan.append((part, (rows, length)))
  return plan


def most_rows(batch_tokens: int, length: int) -> int:
  """Returns the rows of a full batch: the largest power of two that batch_tokens allow."""
  return 1 << max(batch_tokens // length, 1).bit_length() - 1


def pad(
  prompts: Sequence[np.ndarray], shape: tuple[int, int], num_shared: int = 0
) -> dict[str, np.ndarray]:
  """Returns a batch for verdict_logprobs: one prompt a row, without its first num_shared tokens."""
  batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'positions', 'segment_ids')}
  batch['verdict_index'] = np.zeros((shape[0], 1), np.int32)
  for row, tokens in enumerate(prompts):
    size = len(tokens) - num_shared
    batch['tokens'][row, :size] = tokens[num_shared:]
    batch['positions'][row, :size] = num_shared + np.arange(size)
    batch['segment_ids'][row, :size] = 1
    batch['verdict_index'][row, 0] = size - 1
  return batch
