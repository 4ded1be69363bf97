"""The two programs of sampling: prompts are read, then tokens added.

Axes: B rows, C tokens of a completion, D embed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.models.token_choice import Sampling, choose_tokens, token_logprobs


@dataclasses.dataclass(frozen=True)
class Completions:
  """What generate returns for N prompts; C = max_completion_length.

  Attributes:
    tokens: int32 [N,C]; 0 from a completion's length on.
    lengths: int32 [N], in tokens, the stop token included.
    logprobs: float32 [N,C], token_logprobs of each token; 0 past the length.
    stopped: bool [N]; False where max_completion_length cut it off.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  logprobs: np.ndarray
  stopped: np.ndarray


@functools.lru_cache(maxsize=32)
def compiled(cfg: ModelConfig, sampling: Sampling):
  """Returns (_start, _go_on), jitted; the second reuses the cache's memory.

  There are two, so that few prompts and many share the longer one.
  """

  def start(*args):
    return _start(cfg, sampling, *args)

  def go_on(*args):
    return _go_on(cfg, sampling, *args)

  return jax.jit(start), jax.jit(go_on, donate_argnums=1)


def _start(cfg, sampling, params, batch, prefix):
  """Reads the prompts. Returns (cache, state) of the completions' rows."""
  num_shared = 0 if prefix is None else prefix['segment_ids'].shape[1]
  segment_ids = batch['segment_ids']
  positions = num_shared + jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  length = num_shared + segment_ids.shape[1] + sampling.max_completion_length
  hidden, cache = transformer.prefill(
    cfg,
    params,
    batch['tokens'],
    positions,
    segment_ids,
    length=length - 1,  # the last token's keys are never needed
    prefix=prefix,
  )
  state = {'hidden': hidden[:, -1], 'position': positions[:, -1]}
  if 'source' in batch:
    cache = transformer.take_rows(cache, batch['source'])
    state = {name: x[batch['source']] for name, x in state.items()}
  return cache, state | {'active': batch['active']}


def _go_on(cfg, sampling, params, cache, start, index, seed):
  """Runs the loop over tokens. Returns (the fields of Completions, cache)."""
  B, C = index.shape[0], sampling.max_completion_length
  keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(index)
  stop_ids = jnp.asarray(sampling.stop_ids, jnp.int32)

  def choose(state, last):
    """Adds a token a row, given the hidden state [B,D] of the one before."""
    step, active = state['step'], state['active']
    logits = mesh_lib.constrain(transformer.logits(cfg, params, last), mesh_lib.ROWS)
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys)
    token = jnp.where(active, choose_tokens(logits, uniform, sampling), 0)
    logprob = token_logprobs(logits, token, sampling.temperature)
    stops = active & jnp.isin(token, stop_ids)
    return state | {
      'step': step + 1,
      'tokens': state['tokens'].at[:, step].set(token),
      'logprobs': state['logprobs'].at[:, step].set(jnp.where(active, logprob, 0.0)),
      'lengths': state['lengths'] + active,
      'active': active & ~stops,
      'stopped': state['stopped'] | stops,
    }

  def body(state):
    token = jax.lax.dynamic_slice_in_dim(state['tokens'], state['step'] - 1, 1, axis=1)
    hidden, cache = transformer.extend(
      cfg,
      params,
      token,
      start['position'][:, None] + state['step'],
      state['active'].astype(jnp.int32)[:, None],
      state['cache'],
    )
    return choose(state | {'cache': cache}, hidden[:, -1])

  state = {
    'step': jnp.int32(0),
    'tokens': jnp.zeros((B, C), jnp.int32),
    'logprobs': jnp.zeros((B, C), jnp.float32),
    'lengths': jnp.zeros(B, jnp.int32),
    'active': start['active'],
    'stopped': jnp.zeros(B, bool),
    'cache': cache,
  }
  state = jax.lax.while_loop(
    lambda state: (state['step'] < C) & jnp.any(state['active']),
    body,
    choose(state, start['hidden']),
  )
  # Every device, and so every host, gets all of them.
  return {
    field.name: mesh_lib.constrain(state[field.name]) for field in dataclasses.fields(Completions)
  }, state['cache']
