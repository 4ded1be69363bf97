"""The shape and numerics of a decoder, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

DTYPES = ('float32', 'bfloat16')
REMAT = ('none', 'full', 'dots')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-style decoder; hashable, so it can be a static jit argument.

  Attributes:
    vocab_size: V, rows of the embedding; 0 in a preset means "set at run time".
    num_layers: L, number of blocks.
    embed_dim: D, width of the residual stream.
    num_heads: N, query heads.
    num_kv_heads: K, key and value heads; divides num_heads.
    head_dim: H, width of a head; even, because RoPE rotates halves.
    mlp_dim: F, inner width of the SwiGLU layer.
    rope_theta: base of the RoPE wavelengths.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: the output layer is the transposed embedding.
    dtype: what activations and products are computed in.
    param_dtype: what parameters are created in.
    remat: what the backward pass recomputes in each block: 'none' keeps all
      activations, 'dots' keeps the results of the dense products only, 'full'
      keeps the block's input only.
    match_init: the first query head of each kv head starts equal to the key
      head, so that a token attends to its like from the start. A small model
      learns to look things up in a list much sooner so (after the mimetic
      initialisation of Trockman & Kolter 2023).
    unroll: layers per step of the scan over depth. More is faster to run on
      CPU, slower to compile.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: str = 'none'
  match_init: bool = False
  unroll: int = 1

  def __post_init__(self):
    for name in ('num_layers', 'embed_dim', 'num_heads', 'num_kv_heads',
                 'head_dim', 'mlp_dim', 'unroll', 'rope_theta', 'norm_eps'):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name}={getattr(self, name)!r} must be positive.')
    if self.vocab_size < 0:
      raise ValueError(f'vocab_size={self.vocab_size} must not be negative.')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          f'num_heads={self.num_heads} must be a multiple of '
          f'num_kv_heads={self.num_kv_heads}.')
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even (RoPE).')
    _check_choice('dtype', self.dtype, DTYPES)
    _check_choice('param_dtype', self.param_dtype, DTYPES)
    _check_choice('remat', self.remat, REMAT)

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as a JSON-able dict."""
    return dataclasses.asdict(self)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(choices)}.')


PRESETS = {
    # The CPU default: 0.8M parameters beside the embedding.
    'tiny': ModelConfig(
        vocab_size=0, num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=2,
        head_dim=32, mlp_dim=384, match_init=True, unroll=4),
}


def preset(name: str, vocab_size: int, **overrides) -> ModelConfig:
  """Returns PRESETS[name] with its vocabulary size and overrides filled in.

  Raises:
    ValueError: for an unknown preset or an unknown field.
  """
  if name not in PRESETS:
    raise ValueError(
        f'unknown model preset {name!r}; choose from {", ".join(PRESETS)}.')
  known = {field.name for field in dataclasses.fields(ModelConfig)}
  unknown = sorted(set(overrides) - known)
  if unknown:
    raise ValueError(
        f'unknown model field {unknown[0]!r}; choose from '
        f'{", ".join(sorted(known))}.')
  return dataclasses.replace(
      PRESETS[name], vocab_size=vocab_size, **overrides)
