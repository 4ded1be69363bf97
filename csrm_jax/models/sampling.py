"""Completions from a decoder, and the log-probabilities of tokens.

`generate` fills a key-value cache with the prompts of a batch at once, padded on the left, and then
adds one token to each row in a step, on the device, until some rows are done. Then others take
their places: prompts that wait are read into the cache, or the rows that are left go on as a
smaller batch. What prompts share is computed once: a prompt that is given several times, and the
tokens that all prompts begin with. Shapes come from a few sizes, so that nothing is compiled after
the first calls.

Axes: B rows, U distinct prompts of a batch, P tokens that all prompts begin with, T tokens of the
longest prompt, C tokens of a completion, D embed, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig

# Prompts are padded to one of these lengths; each is compiled once.
PROMPT_BUCKETS = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
PROMPT_BUCKETS += (1024, 1536, 2048, 3072, 4096, 6144, 8192)
# A shared prefix is cut to a multiple of this many tokens, so that few lengths are compiled.
PREFIX_STEP = 32
# The least slots of a cache that grows; it doubles where rows need more.
CACHE_LENGTH = 256
# Prompts are drawn from together where the slots that they need differ by no more than this factor.
CACHE_SPREAD = 1.5
# This share of a batch's rows must be done before prompts that wait take their places.
REFILL = 8
# Where no prompt waits, a batch whose rows are done but for one in so many goes on with these, at
# least so many, below which fewer rows are not faster.
SHRINK, MIN_ROWS = 4, 16
# How many tokens' logits hidden_logprobs holds at once.
LOGPROB_CHUNK = 2048
# A cache of its full size never is full: it is a ring.
NEVER = 2**31 - 1
# A row's probabilities are summed in blocks of this many, see _invert.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen; hashable, because each value is compiled once."""

  max_completion_length: int = 512  # tokens at most
  temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
  # Only the k likeliest tokens can be drawn, and ties with the last of them; 0 means all.
  top_k: int = 0
  # Of these, only the likeliest that together reach this probability, and ties with the last.
  top_p: float = 1.0
  stop_ids: tuple[int, ...] = ()  # the first of these ends a completion, and belongs to it

  def __post_init__(self):
    if self.max_completion_length < 1:
      raise ValueError(f'max_completion_length={self.max_completion_length} must be at least 1.')
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature={self.temperature} must be at least 0 and finite.')
    if self.top_k < 0:
      raise ValueError(f'top_k={self.top_k} must be at least 0 (0 is all).')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must lie in (0, 1].')
    if not self.temperature and (self.top_k or self.top_p < 1):
      raise ValueError(
        f'top_k={self.top_k} and top_p={self.top_p} do nothing at '
        'temperature=0; leave them out or raise the temperature.'
      )


@dataclasses.dataclass(frozen=True)
class Completions:
  """The completions of N prompts; C = max_completion_length."""

  tokens: np.ndarray  # int32 [N,C]; 0 past a completion's length
  lengths: np.ndarray  # int32 [N], in tokens, the stop token included
  logprobs: np.ndarray  # float32 [N,C], see token_logprobs; 0 past a completion's length
  stopped: np.ndarray  # bool [N]; False where max_completion_length cut it off


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
  """Returns a completion of each prompt (token ids), in their order.

  What is drawn for prompt i depends only on the prompt, the seed and i, not on its batch (up to
  rounding). To get several completions, give a prompt several times: each batch reads it once.

  It runs on the mesh that params lie on, with rows cut over data and fsdp and heads over tensor.
  Weights that are cut over fsdp are gathered for each token; a copy that is cut over tensor only
  is faster to sample from.

  Args:
    draws: Numbers in [0, 2**32), one a prompt, that take the place of i where a draw must not
      depend on the prompt's place in the list.
    batch_size: The rows of a batch; fewer prompts take the next power of two of rows.
    progress: It is called with the number of prompts in each batch that is done.

  Raises:
    ValueError: A prompt is empty, leaves no room for the completion within the model's context, or
      has an id outside the vocabulary; or a log-probability is not finite.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int64)
  _check_prompts(cfg, prompts, lengths, sampling)
  prompts = [tuple(prompt) for prompt in prompts]
  # By length, for little padding; equal prompts side by side, so that a batch reads them once.
  number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
  order = np.lexsort(([number[prompt] for prompt in prompts], lengths))
  num_shared = _num_shared(cfg, list(number), sampling)
  shape = (len(prompts), sampling.max_completion_length)
  result = Completions(
    tokens=np.zeros(shape, np.int32),
    logprobs=np.zeros(shape, np.float32),
    lengths=np.zeros(len(prompts), np.int32),
    stopped=np.zeros(len(prompts), bool),
  )
  with mesh_lib.of(params):
    prefix = None
    if num_shared:
      shared = np.array(prompts[0][:num_shared], np.int32)[None]
      prefix = transformer.make_prefix_reader(cfg)(params, shared, np.ones_like(shared))
    start, go_on = compiled(cfg, sampling)
    apart = transformer.unstack(params)
    seed = jnp.uint32(seed)

    def read(some, num):
      batch = pad_prompts([prompts[i] for i in some], num, num_shared, cfg)
      batch['draw'] = np.zeros(num, np.uint32)
      batch['draw'][: len(some)] = some if draws is None else [draws[i] for i in some]
      return start(params, batch, prefix, seed)

    def run(cache, state, *limits):
      return go_on(apart, cache, state, seed, *map(np.int32, limits))

    rows = num_rows(len(prompts), batch_size)
    for group in _groups(cfg, lengths, order, rows, sampling):
      most = _num_slots(cfg, lengths[group[-1]], sampling)
      for places, drawn in _draw(run, read, group, rows, most):
        for name, values in drawn.items():
          getattr(result, name)[places] = values
        progress(len(places))
  for i in np.flatnonzero(~np.isfinite(result.logprobs).all(axis=1))[:1]:
    raise ValueError(
      f'prompt {i}: a token of its completion has a log-probability that is '
      'not finite; look for weights of the model that are not finite.'
    )
  return result


def _groups(
  cfg: ModelConfig, lengths: np.ndarray, order: np.ndarray, rows: int, sampling: Sampling
) -> Iterator[list[int]]:
  """Yields runs of prompts, by length, that go through one cache; all but the last fill a batch."""
  group: list[int] = []
  for i in order.tolist():
    slots = _num_slots(cfg, lengths[i], sampling)
    is_full = len(group) >= rows
    if is_full and slots > CACHE_SPREAD * _num_slots(cfg, lengths[group[0]], sampling):
      yield group
      group = []
    group.append(i)
  if group:
    yield group


def _num_slots(cfg: ModelConfig, length: int, sampling: Sampling) -> int:
  """Returns the slots of a cache for a prompt of that length and its completion."""
  # One less: nothing ever attends to the last token.
  return prompt_bucket(cfg, length) + sampling.max_completion_length - 1


def _first_slots(length: int, most: int) -> int:
  """Returns the slots that a cache of prompts of that length begins with; it grows to `most`."""
  slots = CACHE_LENGTH
  while slots < length + CACHE_LENGTH // 4:
    slots *= 2
  return most if 4 * most <= 5 * slots else slots


def _draw(run, read, waiting, rows, most):
  """Yields (prompts, the fields of their Completions) as prompts are done.

  `run` continues the rows of (cache, state); read(prompts, rows) begins them. There are `rows`
  rows at most, and `most` slots. Only here does the host wait for the device.
  """
  num_new = max(rows // REFILL, 1)
  while waiting:
    some, waiting = waiting[:rows], waiting[rows:]
    cache, state = read(some, rows)
    # Where rows come in, the cache is a ring from the start.
    slots = most if waiting else _first_slots(cache['positions'].shape[1], most)
    cache = _grow(cache, slots)
    owner = np.full(rows, -1)
    owner[: len(some)] = some
    while len(owner):
      num = len(owner)
      small = num // SHRINK if num // SHRINK >= MIN_ROWS else 0
      cache, state, drawn = run(
        cache, state, num - num_new if waiting else small, slots if slots < most else NEVER
      )
      drawn = jax.device_get(drawn)
      active = drawn.pop('active')
      done = np.flatnonzero(~active & (owner >= 0))
      yield owner[done], {name: x[done] for name, x in drawn.items()}
      owner[done] = -1
      free = np.flatnonzero(owner < 0)
      if len(free) == num:
        break
      if len(free) >= num_new and waiting:
        free, some, waiting = free[:num_new], waiting[:num_new], waiting[num_new:]
        cache, state = _put(cache, state, *read(some, num_new), free)
        owner[free[: len(some)]] = some
      elif num - len(free) <= small:
        kept = np.argsort(owner < 0, kind='stable')[:small]
        cache, state = _take(cache, state, kept)
        owner = owner[kept]
      else:
        slots = min(2 * slots, most)
        cache = _grow(cache, slots)


def num_rows(num_prompts: int, batch_size: int) -> int:
  """Returns the rows of a batch: batch_size, or for fewer prompts the next power of two."""
  return min(batch_size, 1 << max(num_prompts - 1, 0).bit_length())


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
  """Returns the length that prompts are padded to, given that of the longest one."""
  return min(b for b in (*PROMPT_BUCKETS, cfg.context_length) if b >= longest)


def _num_shared(cfg: ModelConfig, distinct: Sequence[tuple[int, ...]], sampling: Sampling) -> int:
  """Returns how many first tokens are to be read once for all prompts, or 0."""
  if len(distinct) < 2:
    return 0
  num = transformer.num_common(distinct) // PREFIX_STEP * PREFIX_STEP
  length = prompt_bucket(cfg, max(map(len, distinct)))
  # Padding comes between the prefix and the rest, and a window would count it as tokens.
  fits = length + sampling.max_completion_length <= cfg.sliding_window
  if cfg.sliding_window and not fits:
    return 0
  # It pays from a quarter of the longest row on.
  return num if 4 * num >= length else 0


def pad_prompts(
  prompts: Sequence[tuple[int, ...]], rows: int, num_shared: int, cfg: ModelConfig
) -> dict[str, np.ndarray]:
  """Returns tokens, segment_ids int32 [U,T-P], source int32 [rows], active bool [rows].

  Row b continues the prompt source[b], if the row is active. Prompts end where the row ends, so
  that all continue in the same slot of the cache. U is a power of two. Where that would save
  nothing U is rows, and there is no source.
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


@functools.lru_cache(maxsize=32)
def compiled(cfg: ModelConfig, sampling: Sampling):
  """Returns _start and _go_on, jitted; the second reuses the cache's memory."""

  def start(*args):
    return _start(cfg, sampling, *args)

  def go_on(*args):
    return _go_on(cfg, sampling, *args)

  return jax.jit(start), jax.jit(go_on, donate_argnums=(1, 2))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _put(cache, state, new_cache, new_state, rows):
  """Returns (cache, state) with new rows in place of the given ones."""
  state = {name: x.at[rows].set(new_state[name]) for name, x in state.items()}
  return transformer.put_rows(cache, new_cache, rows), _by_rows(state)


@jax.jit
def _take(cache, state, rows):
  return transformer.take_rows(cache, rows), _by_rows({name: x[rows] for name, x in state.items()})


@functools.partial(jax.jit, static_argnums=1)
def _grow(cache, slots):
  return transformer.resize(cache, slots)


def _by_rows(state):
  return {name: mesh_lib.constrain(x, mesh_lib.ROWS) for name, x in state.items()}


def _start(cfg, sampling, params, batch, prefix, seed):
  """Reads the prompts and returns (cache, state) of rows with their first token.

  A state holds the fields of Completions; active bool [B]; draw uint32 [B]; token and position
  int32 [B], those of the last token.
  """
  last, position, cache = read_prompts(cfg, params, batch, prefix)
  B, C = batch['draw'].shape[0], sampling.max_completion_length
  state = {
    'tokens': jnp.zeros((B, C), jnp.int32),
    'logprobs': jnp.zeros((B, C), jnp.float32),
    'lengths': jnp.zeros(B, jnp.int32),
    'stopped': jnp.zeros(B, bool),
    'active': batch['active'],
    'draw': batch['draw'],
    'token': jnp.zeros(B, jnp.int32),
    'position': position,
  }
  return cache, _choose(cfg, sampling, params, state, last, seed)


def read_prompts(
  cfg: ModelConfig, params: Any, batch: dict[str, jax.Array], prefix: dict | None = None
) -> tuple[jax.Array, jax.Array, dict]:
  """Returns the last hidden state [B,D] and position [B] of each row, and the rows' cache.

  The batch is that of pad_prompts.
  """
  num_shared = 0 if prefix is None else prefix['segment_ids'].shape[1]
  segment_ids = batch['segment_ids']
  positions = num_shared + jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  hidden, cache = transformer.prefill(cfg, params, batch['tokens'], positions, segment_ids, prefix)
  last, position = hidden[:, -1], positions[:, -1]
  if 'source' in batch:
    cache = transformer.take_rows(cache, batch['source'])
    last, position = last[batch['source']], position[batch['source']]
  return last, position, cache


def _go_on(cfg, sampling, params, cache, state, seed, num_left, most):
  """Adds tokens until at most num_left rows are active or the cache has `most` tokens.

  Returns (cache, state, drawn), where drawn has the fields of Completions, and active.
  """

  def body(carry):
    cache, state = carry
    position = state['position'] + 1
    hidden, cache = transformer.extend(
      cfg, params, state['token'][:, None], position[:, None], cache
    )
    state = state | {'position': position}
    return cache, _choose(cfg, sampling, params, state, hidden[:, -1], seed)

  cache, state = jax.lax.while_loop(
    lambda carry: (carry[1]['active'].sum() > num_left) & (carry[0]['length'] < most),
    body,
    (cache, state),
  )
  # Every device gets all of them, so that every process can read them.
  names = *(field.name for field in dataclasses.fields(Completions)), 'active'
  return cache, state, {name: mesh_lib.constrain(state[name]) for name in names}


def _choose(cfg, sampling, params, state, last, seed):
  """Returns the state with a token more in each row, given the hidden state [B,D] of the last."""
  active, step = state['active'], state['lengths']
  logits = mesh_lib.constrain(transformer.logits(cfg, params, last), mesh_lib.ROWS)

  def draw(index, step):
    # A key for each row, from its index alone: batches and their order change no draw.
    key = jax.random.fold_in(jax.random.key(seed), index)
    return jax.random.uniform(jax.random.fold_in(key, step))

  uniform = jax.vmap(draw)(state['draw'], step)
  token = jnp.where(active, choose_tokens(logits, uniform, sampling), 0)
  logprob = token_logprobs(logits, token, sampling.temperature)
  stops = active & jnp.isin(token, jnp.asarray(sampling.stop_ids, jnp.int32))
  here = active[:, None] & (jnp.arange(sampling.max_completion_length) == step[:, None])
  return _by_rows(
    state
    | {
      'tokens': jnp.where(here, token[:, None], state['tokens']),
      'logprobs': jnp.where(here, logprob[:, None], state['logprobs']),
      'lengths': step + active,
      'stopped': state['stopped'] | stops,
      'active': active & ~stops & (step + 1 < sampling.max_completion_length),
      'token': token,
    }
  )


def choose_tokens(logits: jax.Array, uniform: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns a token id for each row, int32 [B].

  logits are float32 [B,V]; uniform has one random number in [0, 1) for each row, float32 [B].
  """
  if not sampling.temperature:
    return _first(logits == logits.max(-1, keepdims=True))
  # The cumulative distribution is inverted: this takes one random number for a row instead of one
  # for each logit, and no sorting.
  return _invert(candidates(logits, sampling), uniform)


def candidates(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns probabilities that are not normalised, [B,V]; 0 for what top_k and top_p leave out."""
  probs = jnp.exp((logits - logits.max(-1, keepdims=True)) / sampling.temperature)
  if 0 < sampling.top_k < logits.shape[-1]:
    ones = jnp.ones_like(probs)
    probs = _keep_highest(probs, ones, jnp.float32(sampling.top_k))
  if sampling.top_p < 1:
    total = probs.sum(-1, keepdims=True)
    probs = _keep_highest(probs, probs, sampling.top_p * total)
  return probs


def _first(hits: jax.Array) -> jax.Array:
  """Returns the place of the first True of each row of [B,V]."""
  # Not argmax, which is slow on CPU.
  ids = jnp.arange(hits.shape[-1], dtype=jnp.int32)
  # A row without True has a NaN among its logits. Any id will do: its log-probability is NaN, too.
  return jnp.where(hits, ids, hits.shape[-1] - 1).min(-1)


def _keep_highest(probs: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
  """Returns probs, set to 0 except for the highest whose weights reach the target."""
  # Bisection for the largest threshold for which Σ weights[probs >= threshold] is at least the
  # target. It runs over the bits of a float, which are ordered as positive numbers are: 31 passes
  # over [B,V] in place of a sort.

  def as_float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    mass = jnp.where(probs >= as_float(middle), weights, 0.0)
    enough = mass.sum(-1, keepdims=True) >= target
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low = jnp.zeros((probs.shape[0], 1), jnp.int32)
  # The highest of probs is exp(0) = 1.
  one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
  low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, one + 1)))
  return jnp.where(probs >= as_float(low), probs, 0.0)


def _invert(probs: jax.Array, uniform: jax.Array) -> jax.Array:
  """Returns ids drawn with probabilities proportional to probs [B,V]."""
  # First a block is found and then a place in it, because a cumulative sum over a whole vocabulary
  # is slow and less exact.
  B, V = probs.shape
  blocks = jnp.pad(probs, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)

  def find(weights, goal):
    """Returns (where the cumulative weights [B,n] exceed goal, goal less the weights before)."""
    ends = jnp.cumsum(weights, axis=-1)
    # Rounding may put the goal at the very end, which no cumulative weight exceeds.
    goal = jnp.minimum(goal, ends[:, -1] * (1 - 2.0**-23))
    place = _first(ends > goal[:, None])
    start = jnp.take_along_axis(jnp.pad(ends, ((0, 0), (1, 0))), place[:, None], axis=1)[:, 0]
    return place, goal - start

  sums = blocks.sum(-1)
  block, rest = find(sums, uniform * sums.sum(-1))
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return jnp.minimum(block * _BLOCK + find(inside, rest)[0], V - 1)


def token_logprobs(logits: jax.Array, tokens: jax.Array, temperature: float) -> jax.Array:
  """Returns log softmax(logits / temperature) at tokens, float32 [...] in nats.

  The softmax is over the whole vocabulary of logits [...,V], whatever top_k and top_p left out
  when the token was drawn. Temperature 0, which has no distribution, counts as 1.
  """
  logits = logits.astype(jnp.float32) / (temperature or 1.0)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def hidden_logprobs(
  cfg: ModelConfig, params: Any, hidden: jax.Array, tokens: jax.Array, temperature: float
) -> jax.Array:
  """Returns token_logprobs of tokens [B,C], given the hidden state [B,C,D] before each.

  cfg and temperature are static.
  """
  # Logits exist for LOGPROB_CHUNK tokens (or one column) at a time, in the backward pass too, never
  # for all, [B,C,V].
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
