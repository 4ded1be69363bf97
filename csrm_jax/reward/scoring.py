"""Verdict scores: the one place where hidden states become safe or unsafe.

Training, evaluation, RL and serving all read a verdict through `verdict_logprobs`: at an explicit
index, over the full vocabulary, in float32. `make_score_fn` puts a tokenizer in front and lays
prompts out as `plans` says.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from csrm_jax.core import checks, mesh as mesh_lib
from csrm_jax.data import domain as domain_lib, features
from csrm_jax.evals.metrics import Calibration
from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.reward import combiners, heads, plans
from csrm_jax.safety import schema
from csrm_jax.safety.templates import DEFAULT, Layout, Verbalizers
from csrm_jax.text.tokenizer import Tokenizer
from csrm_jax.train import losses

# Examples that are encoded and planned together. Larger pools find more to share, and wait longer.
POOL = 512
# Batches in flight: enough to keep a device busy, and little memory.
_MAX_PENDING = 8
# Shared beginnings that are kept for the pools to come.
_MAX_PREFIXES = 4


class Judged(NamedTuple):
  """What a model says about N examples, and how much of each it has read."""

  score: np.ndarray  # float32 [N], log P(safe) - log P(unsafe) in nats
  num_tokens: np.ndarray  # int64 [N], of the prompt with all its text
  num_unread: np.ndarray  # int64 [N], those of them that no pass of the model read
  cut: np.ndarray  # bool [N], whether the prompt did not fit into one pass
  outside: np.ndarray  # str [N], what is unlike the training data, see domain.Domain.marks


@dataclasses.dataclass(frozen=True)
class ScoreFn:
  """A function: examples[, progress] -> scores, float32 [N] in nats; see make_score_fn.

  `judge` takes the same arguments, and also says what was read.
  """

  judge: Callable[..., Judged]

  def __call__(self, examples: Sequence[schema.Example], *args: Any, **kwargs: Any) -> np.ndarray:
    return self.judge(examples, *args, **kwargs).score


def calibrated(score_fn: ScoreFn, calibration: Calibration) -> ScoreFn:
  """Returns the score function with its scores changed by the calibration; their order stays."""

  def judge(*args: Any, **kwargs: Any) -> Judged:
    judged = score_fn.judge(*args, **kwargs)
    return judged._replace(score=calibration.apply(judged.score))

  return ScoreFn(judge)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the reward model says about one response."""

  p_unsafe: float  # probability that the response violates the rules, in [0, 1]
  reward: float  # 1 - p_unsafe = sigmoid(score)
  score: float  # log P(safe) - log P(unsafe), in nats
  label: str  # 'unsafe' if p_unsafe is at least one half, else 'safe'
  unread: float  # share of the prompt's tokens that the model has not read, in [0, 1]
  num_unread: int  # the same in tokens
  # Whether the prompt was too long for one pass: then its response was read in parts, and the
  # verdict is that of the worst, or num_unread tokens were left out.
  cut: bool
  # What is unlike the data that the model was trained on, see domain.Domain.marks; '' if nothing
  # is, or if that data is not known.
  out_of_domain: str


def verdicts(judged: Judged) -> list[Verdict]:
  """Returns the verdict on each example; raises ValueError unless all scores are finite."""
  scores = np.asarray(judged.score, np.float64)
  p_unsafe, rewards = probabilities(scores)
  labels = np.where(scores > 0, 'safe', 'unsafe')
  columns = p_unsafe, rewards, scores, labels, unread(judged), *judged[2:]
  return [Verdict(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def probabilities(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns P(unsafe) and P(safe), float64 [N]; ValueError unless all scores (nats) are finite."""
  scores = np.asarray(scores, np.float64)
  for i in np.flatnonzero(~np.isfinite(scores))[:1]:
    raise ValueError(
      f'score {i} of {len(scores)} is {scores[i]}, not a finite number; there is no verdict for it.'
    )
  return expit(-scores), expit(scores)


def unread(judged: Judged) -> np.ndarray:
  """Returns the share of each prompt's tokens that were not read, float64 [N]."""
  return judged.num_unread / np.maximum(judged.num_tokens, 1)


def outputs(
  cfg: ModelConfig,
  params: Any,
  batch: Mapping[str, jax.Array],
  verbalizers: Verbalizers,
  prefix: dict | None = None,
  head: str = heads.DEFAULT,
) -> heads.Output:
  """Returns what the head says of each slot, [B,S], of a packed batch.

  The batch has tokens, positions, segment_ids int32 [B,T] and verdict_index int32 [B,S], the place
  of the last token of each prompt. Slots that hold no prompt get the verdict of position 0; give
  them no weight. With ends, int32 [B,T], prompts share tokens; all rows continue the prefix, if
  there is one, as in transformer.hidden. cfg and head are static.
  """
  params, own = heads.body(params), params.get('head')
  rows = batch['tokens'], batch['positions'], batch['segment_ids']
  hidden = transformer.hidden(cfg, params, *rows, prefix, batch.get('ends'))
  # Selected before the product with the vocabulary: logits [B,T,V] would be far larger.
  at_verdict = jnp.take_along_axis(hidden, batch['verdict_index'][..., None], axis=1)  # [B,S,D]

  def log_p():
    logits = transformer.logits(cfg, params, at_verdict)  # [B,S,V]
    return losses.verdict_logprobs(logits, verbalizers)

  return heads.get(head).apply(own, at_verdict, log_p)


def verdict_logprobs(*args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
  """Returns (log P(safe), log P(unsafe)) in nats, float32 [B,S]; the arguments are `outputs`'."""
  return outputs(*args, **kwargs).log_p


def make_loss_fn(
  cfg: ModelConfig,
  verbalizers: Verbalizers,
  gamma: float,
  margin: float,
  *,
  head: str = heads.DEFAULT,
  pair_loss: Callable[..., jax.Array] = losses.bt,
  label_loss: Callable[..., jax.Array] = losses.nll,
  rating_weight: float = 1.0,
) -> Callable[..., Any]:
  """Returns (params, batch) -> (total, weight, metrics); see losses.reward_model_loss.

  Members of a head are trained each for itself: their mean is taken. rating_weight is what a rating
  costs beside a label.
  """
  cost = heads.get(head).cost

  def loss_fn(params, batch):
    out = outputs(cfg, params, batch, verbalizers, head=head)

    def cost_of(gap, strength, target):
      lost = pair_loss(gap, strength, target)
      return lost if out.penalty is None else lost + out.penalty

    def loss(log_p):
      return losses.reward_model_loss(
        *log_p, batch, gamma, margin, cost_of, label_loss, gap=out.gap
      )

    if out.members is None:
      total, weight, metrics = loss(out.log_p)
    else:
      found = jax.vmap(loss)(out.members)
      total, weight, metrics = jax.tree.map(lambda x: x.mean(0), found)
    if out.predicted is None or 'targets' not in batch:
      return total, weight, metrics
    more = losses.rating_loss(cost(out.predicted, batch['targets']), batch)
    return total + rating_weight * more[0], weight + more[1], metrics | more[2]

  return loss_fn


def make_score_fn(
  cfg: ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  verbalizers: Verbalizers,
  *,
  layout: Layout = DEFAULT,
  max_length: int = 2048,
  on_cut: str = 'window',
  costs: plans.Costs | None = None,
  domain: domain_lib.Domain | None = None,
  allow_out_of_domain: bool = True,
  head: str = heads.DEFAULT,
) -> ScoreFn:
  """Returns a function: examples -> scores, float32 [N] in nats, in their order.

  The function computes on the mesh that params lie on. Its second argument, if given, is called
  with the number of examples that are done with each batch. It raises ValueError, with the
  example's id, if rules do not fit into max_length or a score is not finite. What becomes of a
  longer prompt says on_cut, as in features.read; words that are foreign to the domain are an
  OutOfDomainError unless allow_out_of_domain. The function's arguments of these names come before
  both. Neither padding nor neighbours change a score (up to rounding), nor does what they share;
  costs, by default those of the device, decide how prompts are laid out. The same call gives the
  same bits, whatever was asked before.
  """
  if tokenizer.vocab_size > cfg.vocab_size:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocab_size} ids, the model '
      f'{cfg.vocab_size}; give the tokenizer of the model.'
    )
  checks.one_of('on_cut', on_cut, features.ON_CUT)
  encoder, default = features.Encoder(tokenizer, max_length, layout), on_cut
  allow_by_default = allow_out_of_domain
  score_prompts = make_prompt_scorer(cfg, params, verbalizers, costs, head)

  def judge(
    examples: Sequence[schema.Example],
    progress: Callable[[int], Any] = lambda num: None,
    on_cut: str | None = None,
    allow_out_of_domain: bool | None = None,
  ) -> Judged:
    if domain and not (allow_by_default if allow_out_of_domain is None else allow_out_of_domain):
      for example in examples:
        domain.require(example.id, example.safety, example.conversation)
    found: list[features.Reading] = []
    ends = []  # how many prompts the examples have, up to each
    num_done = 0

    def pools():
      for start in range(0, len(examples), POOL):
        pool = [
          features.require(features.read(e, encoder, on_cut or default))
          for e in examples[start : start + POOL]
        ]
        found.extend(pool)
        for reading in pool:
          ends.append(len(reading.prompts) + (ends[-1] if ends else 0))
        yield [prompt for reading in pool for prompt in reading.prompts]

    def advance(num):
      # The caller counts examples, whose prompts may be done in any order.
      nonlocal num_done
      before = bisect.bisect_right(ends, num_done)
      num_done += num
      progress(bisect.bisect_right(ends, num_done) - before)

    scores = score_prompts(pools(), advance)
    for i in np.flatnonzero(~np.isfinite(scores))[:1]:
      raise ValueError(
        f'{examples[bisect.bisect_right(ends, i)].id}: its score is {scores[i]}, not a finite '
        'number; look for weights of the model that are not finite.'
      )
    return Judged(
      worst(scores, [len(reading.prompts) for reading in found]),
      np.array([reading.num_tokens for reading in found], np.int64),
      np.array([reading.num_unread for reading in found], np.int64),
      np.array([reading.num_tokens > max_length for reading in found], bool),
      np.array(
        [
          domain.marks(e.safety, e.conversation, reading.num_tokens) if domain else ''
          for e, reading in zip(examples, found, strict=True)
        ],
        str,
      ),
    )

  return ScoreFn(judge)


def worst(scores: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Returns the lowest score of each run of `sizes` scores: of an example's parts."""
  # Nothing has no lowest value, and reduceat does not take it.
  return np.minimum.reduceat(scores, np.cumsum([0, *sizes[:-1]])) if len(sizes) else scores


def make_prompt_scorer(
  cfg: ModelConfig,
  params: Any,
  verbalizers: Verbalizers,
  costs: plans.Costs | None = None,
  head: str = heads.DEFAULT,
) -> Callable[..., np.ndarray]:
  """Returns a function: pools of prompts (int32 tokens) -> scores of all, float32 [N] in nats.

  Its second argument, if given, is called with the number of prompts in each batch that is done.
  What follows a pool is drawn from the iterable while the device computes.
  """
  with mesh_lib.of(params):
    platform = mesh_lib.platform()
  costs = costs or plans.costs_of(cfg, platform, mesh_lib.num_row_parts(params))
  compute, read = make_score_step(cfg, verbalizers, head), transformer.make_prefix_reader(cfg)
  prefixes, body = collections.OrderedDict(), heads.body(params)

  def prefix_of(tokens, length):
    """Returns the keys and values of tokens, padded; those used last are kept."""
    key = length, tokens.tobytes()
    if key not in prefixes:
      padding = 0, length - len(tokens)
      used = np.pad(np.ones(len(tokens), np.int32), padding)
      prefixes[key] = read(body, np.pad(tokens, padding)[None], used[None])
    prefixes.move_to_end(key)
    if len(prefixes) > _MAX_PREFIXES:
      prefixes.popitem(last=False)
    return prefixes[key]

  def score(
    pools: Iterable[Sequence[np.ndarray]], progress: Callable[[int], Any] = lambda num: None
  ) -> np.ndarray:
    done, pending = [np.zeros(0, np.float32)], collections.deque()
    # Of this call alone: what stands beside a prompt decides the last bits of its score, which must
    # not depend on what this process has been asked before.
    known = set()

    # Batches are dispatched before earlier results are fetched, so that the device need not wait
    # for the host.
    def settle():
      scores, rows, result = pending.popleft()
      result = np.asarray(result)
      for row, found in zip(rows, result, strict=False):
        scores[row] = found[: len(row)]
      progress(sum(map(len, rows)))

    with mesh_lib.of(params):
      for number, prompts in enumerate(pools, start=1):
        done.append(np.zeros(len(prompts), np.float32))
        # What has been asked n times will be asked some n times more: programs pay in the end.
        program = costs.program / number
        for part in plans.make_plan(prompts, costs._replace(program=program), known):
          prefix = None
          if part.num_shared:
            prefix = prefix_of(prompts[part.rows[0][0]][: part.num_shared], part.shape[2])
          for rows, shape in part.calls():
            known.add(shape)
            # Only a TPU's kernel is faster without them; elsewhere one program does for all.
            batch = plans.make_batch(
              prompts, rows, shape, part.num_shared, always_ends=platform != 'tpu'
            )
            pending.append((done[-1], rows, compute(params, batch, prefix)))
            if len(pending) > _MAX_PENDING:
              settle()
      while pending:
        settle()
    return np.concatenate(done)

  return score


def combined(score_fns: Sequence[ScoreFn], combine: str = 'mean') -> ScoreFn:
  """Returns a score function of what `combine`, see combiners, makes of several functions' scores.

  Of what was read it says the worst of all.
  """
  join = combiners.choose(combine)

  def judge(
    examples: Sequence[schema.Example],
    progress: Callable[[int], Any] = lambda num: None,
    **options: Any,
  ) -> Judged:
    num_done = 0

    def advance(num):
      # The caller counts each example once.
      nonlocal num_done
      before = num_done // len(score_fns)
      num_done += num
      progress(num_done // len(score_fns) - before)

    parts = [score_fn.judge(examples, advance, **options) for score_fn in score_fns]
    score = join(np.stack([part.score for part in parts]).astype(np.float64)).astype(np.float32)
    most = (np.max([part[i] for part in parts], axis=0) for i in range(1, 4))
    outside = [
      next(filter(None, marks), '') for marks in zip(*(p.outside for p in parts), strict=True)
    ]
    return Judged(score, *most, np.array(outside, str))

  return ScoreFn(judge)


def per_category(score_fn: ScoreFn) -> ScoreFn:
  """Returns a score function that asks score_fn about one category at a time."""

  def judge(
    examples: Sequence[schema.Example],
    progress: Callable[[int], Any] = lambda num: None,
    on_cut: str | None = None,
    **options: Any,
  ) -> Judged:
    parts = [part for example in examples for part in split_categories(example)]
    num_done = 0

    def advance(num):
      # The caller counts examples, score_fn counts parts: it is told the same share of examples.
      nonlocal num_done
      before = num_done * len(examples) // len(parts)
      num_done += num
      progress(num_done * len(examples) // len(parts) - before)

    judged = score_fn.judge(parts, advance, on_cut, **options)
    sizes = [len(example.safety.categories) for example in examples]
    if not sizes:
      return judged
    starts = np.cumsum([0, *sizes[:-1]])
    # An example is as unsafe as its worst category, and is read as far as in the worst of passes.
    most = (np.maximum.reduceat(column, starts) for column in judged[1:-1])
    # Only models of our own have a domain, and none of them reads one category at a time.
    return Judged(worst(judged.score, sizes), *most, judged.outside[starts])

  return ScoreFn(judge)


def split_categories(example: schema.Example) -> list[schema.Example]:
  """Returns the example once for each category, without its label."""
  return [
    schema.Example(
      f'{example.id} ({category.name})', schema.SafetyConfig((category,)), example.conversation
    )
    for category in example.safety.categories
  ]


def by_category(
  score: Callable[[Sequence[schema.Example]], np.ndarray], examples: Sequence[schema.Example]
) -> list[dict[str, float]]:
  """Returns {category: P(unsafe) under it alone} of each example; `score` is called once."""
  parts = [part for example in examples for part in split_categories(example)]
  found = iter(probabilities(score(parts))[0].tolist())
  return [{name: next(found) for name in example.safety.names} for example in examples]


@functools.lru_cache(maxsize=16)
def make_score_step(
  cfg: ModelConfig, verbalizers: Verbalizers, head: str = heads.DEFAULT
) -> Callable[..., jax.Array]:
  """Returns a jitted (params, batch[, prefix]) -> scores [B,S] of the prompts of each row."""

  def compute(params, batch, prefix=None):
    safe, unsafe = verdict_logprobs(cfg, params, batch, verbalizers, prefix, head)
    # Every device gets all scores, so that every process can read them.
    return mesh_lib.constrain(safe - unsafe)

  return jax.jit(compute)
