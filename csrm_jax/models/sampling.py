"""Completions from a decoder, and the log-probabilities of tokens.

`generate` fills a key-value cache with the prompts of a batch at once, padded
on the left, and then adds one token a row and step. What prompts share is
computed once: a prompt that is given several times, and tokens that all begin
with. Shapes come from a few buckets, so that nothing is compiled after the
first calls.

Axes: B rows, U distinct prompts of a batch, P tokens that all prompts begin
with, T tokens of the longest prompt, C tokens of a completion, D embed,
V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import decoding, prefix as prefix_lib, transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.models.decoding import Completions
from csrm_jax.models.token_choice import Sampling, token_logprobs

# Lengths that prompts are padded to; each is compiled once.
PROMPT_BUCKETS = (
  24,
  32,
  48,
  64,
  96,
  128,
  192,
  256,
  384,
  512,
  768,
  1024,
  1536,
  2048,
  3072,
  4096,
  6144,
  8192,
)
# A prefix that prompts share counts in whole steps of this many tokens.
PREFIX_STEP = 32
# Tokens whose logits hidden_logprobs holds at once.
LOGPROB_CHUNK = 2048


def hidden_logprobs(
  cfg: ModelConfig, params: Any, hidden: jax.Array, tokens: jax.Array, temperature: float
) -> jax.Array:
  """Returns token_logprobs of given tokens, float32 [B,C].

  Logits exist for LOGPROB_CHUNK tokens or one column at a time, in the backward
  pass too, never for [B,C,V].

  Args:
    cfg: static.
    params: as from transformer.init_params.
    hidden: [B,C,D], of the token before each.
    tokens: int32 [B,C].
    temperature: static.
  """
  B, C = tokens.shape
  width = max(1, min(C, LOGPROB_CHUNK // B))
  num = -(-C // width)

  def chunks(x):  # [B,C,...] -> [num,B,width,...]
    pad = [(0, 0), (0, num * width - C)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(B, num, width, *x.shape[2:])
    return x.swapaxes(0, 1)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def score(params, chunk):
    logits = transformer.logits(cfg, params, chunk[0])
    return token_logprobs(logits, chunk[1], temperature)

  _, scores = jax.lax.scan(
    lambda _, chunk: (None, score(params, chunk)), None, (chunks(hidden), chunks(tokens))
  )
  return scores.swapaxes(0, 1).reshape(B, num * width)[:, :C]


def generate(
  cfg: ModelConfig,
  params: Any,
  prompts: Sequence[Sequence[int]],
  sampling: Sampling,
  *,
  seed: int = 0,
  draws: Sequence[int] | None = None,
  batch_size: int = 64,
  progress: Callable[[int], Any] = lambda num: None,
) -> Completions:
  """Returns a completion of each prompt, in their order.

  Prompts of similar length go together, batch_size at a time. What is drawn
  for prompt i depends on the prompt, seed and i only, not on its batch (up to
  rounding). To get several completions, give a prompt several times: it is
  read once in each batch.

  On the mesh that params lie on: rows over data and fsdp, heads over tensor.
  Weights that are cut over fsdp come together for each token; a copy that is
  cut over tensor only is faster to sample from.

  Args:
    cfg: the model.
    params: its parameters.
    prompts: token ids; at least one each.
    sampling: how tokens are chosen.
    seed: of the draws.
    draws: numbers in [0, 2**32) that take the place of i, for what must not
      depend on a prompt's place in the list.
    batch_size: rows of a batch; fewer prompts make a power of two of rows.
    progress: called with the number of prompts in each batch that is done.

  Raises:
    ValueError: a prompt is empty, does not leave room for the completion
      within the model's context, or has an id outside the vocabulary; or a
      log-probability is not finite.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int64)
  _check_prompts(cfg, prompts, lengths, sampling)
  shape = (len(prompts), sampling.max_completion_length)
  result = Completions(
    tokens=np.zeros(shape, np.int32),
    logprobs=np.zeros(shape, np.float32),
    lengths=np.zeros(len(prompts), np.int32),
    stopped=np.zeros(len(prompts), bool),
  )
  rows = num_rows(len(prompts), batch_size)
  prompts = [tuple(prompt) for prompt in prompts]
  number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
  order = np.lexsort(([number[prompt] for prompt in prompts], lengths))
  num_shared = _num_shared(cfg, list(number), sampling)
  with mesh_lib.of(params):
    shared = prompts[0][:num_shared] if num_shared else ()
    draw = _make_draw(cfg, params, sampling, shared, seed)
    for first in range(0, len(prompts), rows):
      chosen = order[first : first + rows]
      batch = pad_prompts([prompts[i] for i in chosen], rows, num_shared, cfg)
      index = np.zeros(rows, np.uint32)
      index[: len(chosen)] = chosen if draws is None else [draws[i] for i in chosen]
      for name, values in draw(batch, index).items():
        getattr(result, name)[chosen] = values[: len(chosen)]
      progress(len(chosen))
  for i in np.flatnonzero(~np.isfinite(result.logprobs).all(axis=1))[:1]:
    raise ValueError(
      f'prompt {i}: a token of its completion has a log-probability that is '
      'not finite; look for weights of the model that are not finite.'
    )
  return result


def num_rows(num_prompts: int, batch_size: int) -> int:
  """Returns how many rows are drawn at once: few prompts, the next power of 2."""
  return min(batch_size, 1 << max(num_prompts - 1, 0).bit_length())


def _make_draw(
  cfg: ModelConfig, params: Any, sampling: Sampling, shared: Sequence[int], seed: int
) -> Callable[..., dict[str, np.ndarray]]:
  """Returns (batch, index of draws) -> the fields of Completions.

  `shared` are the tokens that all prompts begin with, read at once.
  """
  start, go_on = decoding.compiled(cfg, sampling)
  prefix = None
  if shared:
    tokens = np.array(shared, np.int32)[None]
    prefix = prefix_lib.make_reader(cfg)(params, tokens, np.ones_like(tokens))

  def draw(batch, index):
    cache, state = start(params, batch, prefix)
    return jax.device_get(go_on(params, cache, state, index, jnp.uint32(seed))[0])

  return draw


def _check_prompts(cfg, prompts, lengths, sampling) -> None:
  most = cfg.context_length - sampling.max_completion_length
  for i in np.flatnonzero((lengths < 1) | (lengths > most))[:1]:
    if not lengths[i]:
      raise ValueError(f'prompt {i} is empty; begin it with a BOS token.')
    raise ValueError(
      f'prompt {i} has {lengths[i]} tokens, which with '
      f'max_completion_length={sampling.max_completion_length} are more than '
      f'context_length={cfg.context_length}; shorten either.'
    )
  for i, prompt in enumerate(prompts):
    if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
      raise ValueError(
        f'prompt {i} has an id outside of vocab_size={cfg.vocab_size}; '
        "encode it with the model's own tokenizer."
      )


def prompt_bucket(cfg: ModelConfig, longest: int) -> int:
  """Returns the length that prompts are padded to, given the longest one's."""
  return min(b for b in (*PROMPT_BUCKETS, cfg.context_length) if b >= longest)


def _num_shared(cfg: ModelConfig, distinct: Sequence[tuple[int, ...]], sampling: Sampling) -> int:
  """Returns how many first tokens of all prompts are to be read once, or 0.

  They pay when they are a quarter of the longest row or more.
  """
  if len(distinct) < 2:
    return 0
  num = prefix_lib.num_common(distinct) // PREFIX_STEP * PREFIX_STEP
  length = prompt_bucket(cfg, max(map(len, distinct)))
  # Padding comes between the prefix and the rest, and a window counts it.
  fits = length + sampling.max_completion_length <= cfg.sliding_window
  if cfg.sliding_window and not fits:
    return 0
  return num if 4 * num >= length else 0


def pad_prompts(
  prompts: Sequence[tuple[int, ...]], rows: int, num_shared: int, cfg: ModelConfig
) -> dict[str, np.ndarray]:
  """Returns tokens, segment_ids int32 [U,T-P], source [rows], active [rows].

  Row b goes on from the prompt source[b], if it is active. Prompts end where
  the row ends, so that all go on in the same slot of the cache. U is a power of
  two; without equal prompts it is rows, and there is no source.
  """
  distinct = list(dict.fromkeys(prompts))
  num = 1 << (len(distinct) - 1).bit_length()
  batch = {'active': np.arange(rows) < len(prompts)}
  if num < rows and len(distinct) < len(prompts):
    place = {prompt: i for i, prompt in enumerate(distinct)}
    batch['source'] = np.zeros(rows, np.int32)
    batch['source'][: len(prompts)] = [place[prompt] for prompt in prompts]
  else:
    distinct, num = prompts, rows
  length = prompt_bucket(cfg, max(map(len, prompts))) - num_shared
  for name in ('tokens', 'segment_ids'):
    batch[name] = np.zeros((num, length), np.int32)
  for row, prompt in enumerate(distinct):
    begin = length - (len(prompt) - num_shared)
    batch['tokens'][row, begin:] = prompt[num_shared:]
    batch['segment_ids'][row, begin:] = 1
  return batch
