"""Completions of prompts: samples for the rewards, rows for the train step.

A row is a prompt, padded on the left, and its completion, padded on the right, so that all
completions begin in one column.

Axes: N samples (prompts x num_generations, a prompt's samples side by side), C tokens of the
longest completion, T = prompt + C tokens of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import lora, sampling as sampling_lib, transformer
from csrm_jax.models.config import DTYPES, ModelConfig
from csrm_jax.models.sampling import Completions, Sampling
from csrm_jax.safety.schema import Prompt, Sample
from csrm_jax.text.tokenizer import Tokenizer

# The most completions that are drawn at once, which bounds the memory of the key-value cache.
MAX_ROWS = 256
# The critic's parameters beside the decoder's: they read a value off the final hidden state.
VALUE_HEAD = 'value_head'


@dataclasses.dataclass(frozen=True)
class Policy:
  """What completions are drawn from, without the parameters."""

  model: ModelConfig
  tokenizer: Tokenizer
  # The template text that opens a user's turn, and the text that closes it and opens the answer.
  # Control tokens in it count as such, unlike those in a message.
  marks: tuple[str, str]
  # Whether turns follow each other with nothing but these marks between them. A chat template may
  # want more, and then only single turns are taken.
  joins_turns: bool = False

  def encode(self, prompt: Prompt) -> list[int]:
    """Returns the ids that a completion of the prompt continues.

    Turns that this policy cannot be asked with are a ValueError.
    """
    roles = [message.role for message in prompt.messages]
    num = len(roles) // 2 if self.joins_turns else 0
    if roles != ['user', 'agent'] * num + ['user']:
      raise ValueError(
        f'prompt {prompt.id}: its turns are {", ".join(roles) or "none"}; '
        'this policy is asked with one turn of the user'
        + (', or with turns that alternate' if self.joins_turns else '')
      )
    tokenizer, (prefix, suffix) = self.tokenizer, self.marks
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for message in prompt.messages:
      is_user = message.role == 'user'
      # What a user writes never becomes a control token; the marks around it may.
      ids += tokenizer.encode_control(prefix) if is_user else []
      ids += tokenizer.encode(message.content)
      ids += tokenizer.encode_control(suffix) if is_user else []
    return ids

  def encode_all(self, prompts: Sequence[Prompt], max_completion_length: int) -> list[list[int]]:
    """Returns the ids of each prompt; a ValueError names one that leaves no room for an answer."""
    encoded = [self.encode(prompt) for prompt in prompts]
    most = self.model.context_length - max_completion_length
    for prompt, ids in zip(prompts, encoded, strict=True):
      if len(ids) > most:
        raise ValueError(
          f'prompt {prompt.id} has {len(ids)} tokens, which with '
          f'max_completion_length={max_completion_length} are more than '
          f'context_length={self.model.context_length}; shorten either'
        )
    return encoded


def rollout(
  policy: Policy,
  params: Any,
  prompts: Sequence[Prompt],
  sampling: Sampling,
  num_generations: int = 1,
  seed: int = 0,
) -> tuple[list[Sample], dict[str, np.ndarray]]:
  """Returns (samples, rows) of num_generations completions of each prompt.

  Rows are tokens, positions, segment_ids int32 [N,T]; completion_mask float32 [N,C], 1 on the
  completion, its stop token included; rollout_logprobs float32 [N,C], the sampler's own, equal to
  sampling.token_logprobs. All are 0 elsewhere. C = max_completion_length.

  The parameters may hold a value head. The seed lies in [0, 2**32).
  """
  encoded = policy.encode_all(prompts, sampling.max_completion_length)
  asked = [ids for ids in encoded for _ in range(num_generations)]
  done = sampling_lib.generate(
    policy.model, decoder_params(params), asked, sampling, seed=seed, batch_size=MAX_ROWS
  )
  samples = [
    Sample(
      prompts[i // num_generations],
      i % num_generations,
      _decode(policy, done, i),
      int(done.lengths[i]),
      bool(done.stopped[i]),
    )
    for i in range(len(asked))
  ]
  return samples, make_rows(policy, asked, done)


def make_rows(
  policy: Policy, asked: Sequence[Sequence[int]], done: Completions
) -> dict[str, np.ndarray]:
  """Returns the rows that `rollout` describes, for the ids of prompts and their completions."""
  num, C = done.tokens.shape
  starts = np.array([len(ids) for ids in asked], np.int64)
  # A bucket rather than the longest prompt: few shapes, so few programs to compile.
  width = sampling_lib.prompt_bucket(policy.model, starts.max())
  tokens = np.zeros((num, width + C), np.int32)
  for i, ids in enumerate(asked):
    tokens[i, width - starts[i] : width] = ids
  tokens[:, width:] = done.tokens
  # The mask comes from lengths, not from ids: a completion may hold the padding or stop id.
  place = np.arange(width + C) - (width - starts)[:, None]
  inside = (place >= 0) & (place < (starts + done.lengths)[:, None])
  return {
    'tokens': np.where(inside, tokens, 0),
    'positions': np.where(inside, place, 0).astype(np.int32),
    'segment_ids': inside.astype(np.int32),
    'completion_mask': inside[:, width:].astype(np.float32),
    'rollout_logprobs': np.where(inside[:, width:], done.logprobs, 0),
  }


def _decode(policy: Policy, done: Completions, i: int) -> str:
  length = done.lengths[i] - done.stopped[i]  # without the stop token
  return policy.tokenizer.decode(done.tokens[i, :length].tolist()).strip()


def decoder_params(params: Any) -> Any:
  """Returns the parameters without the value head."""
  return {name: leaf for name, leaf in params.items() if name != VALUE_HEAD}


def init_value_head(cfg: ModelConfig) -> dict[str, Any]:
  """Returns a float32 value head, whose value is 0 until it is trained."""
  return {
    VALUE_HEAD: {
      'kernel': jnp.zeros((cfg.embed_dim,), jnp.float32),
      'bias': jnp.zeros((), jnp.float32),
    }
  }


@functools.partial(jax.jit, static_argnums=(0, 3))
def logprobs(
  cfg: ModelConfig, params: Any, rows: dict[str, jax.Array], temperature: float
) -> dict[str, jax.Array]:
  """Returns logprobs and, with a value head, values, float32 [N,C], for the rows of `rollout`.

  Both are 0 off the completion. Like a log-probability, a value belongs to the token that follows
  the state it is read off.
  """
  decoder, mask = decoder_params(params), rows['completion_mask']
  hidden = transformer.hidden(cfg, decoder, rows['tokens'], rows['positions'], rows['segment_ids'])
  start = rows['tokens'].shape[1] - mask.shape[1]
  # The states that predict the completion's tokens: no logits are computed for the prompt's.
  before = hidden[:, start - 1 : -1]
  scores = sampling_lib.hidden_logprobs(
    cfg, decoder, before, rows['tokens'][:, start:], temperature
  )
  result = {'logprobs': scores * mask}
  if VALUE_HEAD in params:
    head = params[VALUE_HEAD]
    values = before.astype(jnp.float32) @ head['kernel'] + head['bias']
    result['values'] = values * mask
  return result


def sampling_copy(
  cfg: ModelConfig, params: Any, dtype: str, mesh: jax.sharding.Mesh
) -> tuple[ModelConfig, Any]:
  """Returns the model and parameters to sample from: adapters merged, in `dtype`, on `mesh`.

  An empty dtype leaves weights and activations as they are. Weights that are so already are not
  copied.
  """
  plain, params = sampling_model(cfg, dtype), decoder_params(params)
  if cfg.lora_rank:
    params = lora.merge(cfg, params)
  if dtype:
    params = _cast(params, dtype)
  return plain, jax.device_put(params, mesh_lib.shardings(params, mesh))


def sampling_model(cfg: ModelConfig, dtype: str) -> ModelConfig:
  """Returns the model of sampling_copy."""
  fields = {}
  if dtype:
    if dtype not in DTYPES:
      raise ValueError(f'rollout dtype {dtype!r} must be empty or one of {", ".join(DTYPES)}')
    fields = {'dtype': dtype, 'param_dtype': dtype}
  return dataclasses.replace(cfg, lora_rank=0, **fields)


@functools.partial(jax.jit, static_argnums=1)
def _cast(params, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), params)
