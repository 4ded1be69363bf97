"""The layers of the decoder that see one token at a time.

Axes as in transformer.py; x is [R,D], one token a row.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models.config import ModelConfig

ACTIVATIONS = {'silu': jax.nn.silu, 'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}


class Dense(nnx.Module):
  """A product with one kernel, without bias, and perhaps a LoRA adapter.

  y = x·kernel + (alpha / rank)·(x·a)·b, with b = 0 at first. The adapter is
  float32 whatever the kernel is: its updates are too small for bfloat16.

  Source: Hu et al. 2021, LoRA, eq. 3.
  """

  def __init__(self, cfg: ModelConfig, name, inputs, outputs, *, std, rngs):
    """Takes the kernel's name and its axes, inputs [D] and outputs [N,H], say.

    The name is looked for in cfg.lora_targets.
    """
    self.num_inputs = len(inputs)
    self.dtype = cfg.dtype
    self.kernel = nnx.Param(
      std * jax.random.normal(rngs.params(), inputs + outputs, cfg.param_dtype)
    )
    self.lora_scale = 0.0
    if cfg.lora_rank and name in cfg.lora_targets:
      self.lora_scale = cfg.lora_alpha / cfg.lora_rank
      # A stream of its own: the kernels do not depend on there being adapters.
      self.lora_a = nnx.Param(
        math.prod(inputs) ** -0.5 * jax.random.normal(rngs.lora(), (*inputs, cfg.lora_rank))
      )
      self.lora_b = nnx.Param(jnp.zeros((cfg.lora_rank, *outputs)))

  def __call__(self, x):
    y = self._product(x, self.kernel, self.num_inputs)
    if self.lora_scale:
      low = self._product(x, self.lora_a, self.num_inputs)  # [R,r]
      y += self._product(self.lora_scale * low, self.lora_b, 1)
    return y

  def _product(self, x, kernel, num_axes):
    return jnp.tensordot(x, kernel[...].astype(self.dtype), num_axes)


class RMSNorm(nnx.Module):
  """x over its root mean square, times a learned scale; float32 statistics.

  Source: Zhang & Sennrich 2019, eq. 4.
  """

  def __init__(self, cfg: ModelConfig, size: int):
    self.eps, self.offset = cfg.norm_eps, cfg.norm_offset
    self.scale = nnx.Param(jnp.full(size, 1 - self.offset, cfg.param_dtype))

  def __call__(self, x):
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(square + self.eps)
    scale = self.scale[...].astype(jnp.float32) + self.offset
    return (normed * scale).astype(x.dtype)


class MLP(nnx.Module):
  """SwiGLU, or GeGLU. Source: Shazeer 2020, eq. 6."""

  def __init__(self, cfg: ModelConfig, rngs):
    D, F = cfg.embed_dim, cfg.mlp_dim
    self.activation = cfg.activation
    make = functools.partial(Dense, cfg, rngs=rngs)
    self.gate = make('gate', (D,), (F,), std=D**-0.5)
    self.up = make('up', (D,), (F,), std=D**-0.5)
    std = (F * 2 * cfg.num_layers) ** -0.5
    self.down = make('down', (F,), (D,), std=std)

  def __call__(self, x):
    gate, up = (mesh_lib.constrain(y, mesh_lib.ROWS, 'tensor') for y in (self.gate(x), self.up(x)))
    return self.down(ACTIVATIONS[self.activation](gate) * up)


class Embed(nnx.Module):
  """The token embedding [V,D]."""

  def __init__(self, cfg: ModelConfig, rngs):
    self.cfg = cfg
    shape = (cfg.vocab_size, cfg.embed_dim)
    self.embedding = nnx.Param(
      cfg.embed_dim**-0.5 * jax.random.normal(rngs.params(), shape, cfg.param_dtype)
    )

  def __call__(self, tokens):
    # Each device looks up its columns for the tokens of all, then rows and
    # columns change places: the table is never gathered.
    tokens = mesh_lib.constrain(tokens.reshape(-1), 'data')
    x = self.embedding[...][tokens].astype(self.cfg.dtype)  # [R,D]
    x = mesh_lib.constrain(x, 'data', 'fsdp')
    x = mesh_lib.constrain(x, mesh_lib.ROWS)
    if self.cfg.scale_embeddings:
      x *= jnp.asarray(self.cfg.embed_dim**0.5, x.dtype)
    return x
