"""The shape and numerics of a decoder, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from csrm_jax.core import checks

DTYPES = ('float32', 'bfloat16')
REMAT = ('none', 'full', 'dots')
ATTENTION = ('auto', 'kernel', 'xla')
FAMILIES = ('llama', 'mistral', 'qwen3', 'gemma2')
ACTIVATIONS = ('silu', 'gelu_tanh')
# The dense products of a block, each of which may have a LoRA adapter.
LORA_TARGETS = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
_CHOICES = {
  'family': FAMILIES,
  'activation': ACTIVATIONS,
  'dtype': DTYPES,
  'param_dtype': DTYPES,
  'remat': REMAT,
  'attention': ATTENTION,
}
_MAY_BE_ZERO = ('vocab_size', 'query_scale', 'attention_softcap', 'final_softcap')
_MAY_BE_ZERO += ('sliding_window', 'lora_rank')
# Fields that say how a model is computed, not which weights it has.
RUN_TIME_FIELDS = (
  *('dtype', 'param_dtype', 'remat', 'attention', 'match_init', 'unroll'),
  *('lora_rank', 'lora_alpha', 'lora_targets'),
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretching of RoPE wavelengths for longer contexts."""

  factor: float  # the longest wavelengths grow by it
  low_freq_factor: float  # wavelengths above original_length over this grow by all of it
  high_freq_factor: float  # those below original_length over this stay
  original_length: int  # context length of pretraining, tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder; hashable, so it can be a static jit argument.

  The defaults are a Llama; other families differ in data only.
  """

  vocab_size: int  # V, rows of the embedding; 0 in a preset means "set at run time"
  num_layers: int  # L
  embed_dim: int  # D, width of the residual stream
  num_heads: int  # N, query heads
  num_kv_heads: int  # K, key and value heads; divides num_heads
  head_dim: int  # H, width of a head; even, because RoPE rotates halves
  mlp_dim: int  # F, inner width of the gated MLP
  # The Hugging Face architecture that the weights are read and written as. Nothing that is
  # computed depends on it.
  family: str = 'llama'
  context_length: int = 2048  # tokens the model was made for
  rope_theta: float = 10_000.0  # base of the RoPE wavelengths
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5  # added to the mean square in RMSNorm
  norm_offset: float = 0.0  # added to RMSNorm's learned scale; Gemma stores it minus 1
  tie_embeddings: bool = True  # the output layer is the transposed embedding
  activation: str = 'silu'  # gates the MLP: 'silu' or 'gelu_tanh'
  scale_embeddings: bool = False  # by sqrt(D), rounded to dtype (Gemma)
  query_scale: float = 0.0  # queries are divided by its square root; 0 means head_dim
  attention_softcap: float = 0.0  # c of c·tanh(x/c) on attention scores; 0 means none
  final_softcap: float = 0.0  # the same on logits
  qk_norm: bool = False  # RMSNorm of each query and key head before RoPE (Qwen3)
  post_norms: bool = False  # RMSNorm also of what a layer adds to the stream (Gemma 2)
  # A token attends to itself and window - 1 before it; 0 means to all. Layer i has
  # the window iff i % window_period == 0: 1 for all layers (Mistral), 2 for every
  # other one (Gemma 2).
  sliding_window: int = 0
  window_period: int = 1
  dtype: str = 'float32'  # of activations and products
  param_dtype: str = 'float32'  # of parameters but LoRA adapters, which are float32
  # What the backward pass recomputes in each block: 'none' keeps all activations,
  # 'dots' the results of the dense products only, 'full' the block's input only.
  remat: str = 'none'
  # What attends: 'kernel' the platform's flash attention, 'xla' plain products, 'auto' the kernel
  # where there is one for this model.
  attention: str = 'auto'
  # The first query head of each kv head starts equal to the key head, so that a token attends to
  # its like from the start: a small model then learns much sooner to look things up in a list
  # (after the mimetic initialisation of Trockman & Kolter 2023).
  match_init: bool = False
  # Layers per step of the scan over depth. More are faster to run on CPU and slower to compile.
  unroll: int = 1
  lora_rank: int = 0  # r of the adapters; 0 means none
  lora_alpha: float = 16.0  # the adapters' product is scaled by lora_alpha / lora_rank
  lora_targets: tuple[str, ...] = LORA_TARGETS

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      if name in _MAY_BE_ZERO and not value >= 0:
        raise ValueError(f'{name}={value!r} must not be negative.')
      # field.type is a string, because annotations are not evaluated in this file.
      is_number = field.type in ('int', 'float') and name != 'norm_offset'
      if is_number and name not in _MAY_BE_ZERO and not value > 0:
        raise ValueError(f'{name}={value!r} must be positive.')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even (RoPE).')
    for name, choices in _CHOICES.items():
      checks.one_of(name, getattr(self, name), choices)
    if self.lora_rank and not self.lora_targets:
      raise ValueError(
        f'lora_targets is empty: no layer matches; choose from {", ".join(LORA_TARGETS)}.'
      )
    for target in self.lora_targets:
      checks.lookup(target, LORA_TARGETS, 'LoRA target')

  @classmethod
  def from_dict(cls, obj: Mapping[str, Any]) -> ModelConfig:
    """Returns the config that dataclasses.asdict gave, also after a trip through JSON.

    Fields that are missing or unknown raise ValueError.
    """
    obj = {'attention': 'auto', **obj}  # models saved before there was the field
    checks.check_fields(cls, obj, 'model config: the field {name} is {what}.')
    scaling = obj['rope_scaling'] and RopeScaling(**obj['rope_scaling'])
    return cls(**{**obj, 'rope_scaling': scaling, 'lora_targets': tuple(obj['lora_targets'])})


# *(...) gives vocab_size, num_layers, embed_dim, num_heads, num_kv_heads, head_dim and mlp_dim.
_LLAMA3_8B = ModelConfig(
  *(128_256, 32, 4096, 32, 8, 128, 14_336),
  context_length=131_072,
  rope_theta=500_000.0,
  tie_embeddings=False,
  rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)
PRESETS = {
  # The default on CPU: 0.8M parameters besides the embedding.
  'tiny': ModelConfig(*(0, 4, 128, 4, 2, 32, 384), match_init=True, unroll=4),
  # Shapes of public models; their weights come from model.init.
  'smollm2_135m': ModelConfig(
    *(49_152, 30, 576, 9, 3, 64, 1536), context_length=8192, rope_theta=100_000.0
  ),
  'llama3_8b': _LLAMA3_8B,
  'llama3_70b': dataclasses.replace(
    _LLAMA3_8B, num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28_672
  ),
  'mistral_7b': ModelConfig(  # Instruct v0.1
    *(32_000, 32, 4096, 32, 8, 128, 14_336),
    family='mistral',
    context_length=32_768,
    sliding_window=4096,
    tie_embeddings=False,
  ),
  'qwen3_1b7': ModelConfig(
    *(151_936, 28, 2048, 16, 8, 128, 6144),
    family='qwen3',
    context_length=40_960,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qk_norm=True,
  ),
  'gemma2_9b': ModelConfig(  # also ShieldGemma 9B
    *(256_000, 42, 3584, 16, 8, 256, 14_336),
    family='gemma2',
    context_length=8192,
    norm_eps=1e-6,
    norm_offset=1.0,
    activation='gelu_tanh',
    scale_embeddings=True,
    query_scale=256.0,
    attention_softcap=50.0,
    final_softcap=30.0,
    post_norms=True,
    sliding_window=4096,
    window_period=2,
  ),
}


def preset(name: str, vocab_size: int, **overrides) -> ModelConfig:
  """Returns PRESETS[name] with overrides; vocab_size is for presets that have none."""
  if name not in PRESETS:
    raise ValueError(f'unknown model preset {name!r}; choose from {", ".join(PRESETS)}.')
  known = sorted(field.name for field in dataclasses.fields(ModelConfig))
  for field in sorted(overrides):
    checks.lookup(field, known, 'model field')
  vocab_size = PRESETS[name].vocab_size or vocab_size
  return dataclasses.replace(PRESETS[name], **{'vocab_size': vocab_size, **resolve(overrides)})


def resolve(overrides: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields, with the dtype that is faster here in place of 'auto'."""
  if overrides.get('dtype') != 'auto':
    return dict(overrides)
  # Only now: a config is made without JAX.
  from csrm_jax.models import products

  return {**overrides, 'dtype': products.auto_dtype()}
