"""The shape and numerics of a decoder, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

DTYPES = ('float32', 'bfloat16')
REMAT = ('none', 'full', 'dots')
FAMILIES = ('llama', 'mistral', 'qwen3', 'gemma2')
ACTIVATIONS = ('silu', 'gelu_tanh')
# The products of a block that may carry a LoRA adapter.
LORA_TARGETS = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
# Fields that say how a model is computed, not which weights it has.
RUN_TIME_FIELDS = (
  'dtype',
  'param_dtype',
  'remat',
  'match_init',
  'unroll',
  'lora_rank',
  'lora_alpha',
  'lora_targets',
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretching of RoPE wavelengths for longer contexts.

  Attributes:
    factor: the longest wavelengths grow by it.
    low_freq_factor: wavelengths above original_length / low_freq_factor grow
      by the whole factor.
    high_freq_factor: those below original_length / high_freq_factor stay.
    original_length: context length of pretraining, tokens.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder; hashable, so it can be a static jit argument.

  The defaults are a Llama; other families differ in data only.

  Attributes:
    vocab_size: V, rows of the embedding; 0 in a preset means "set at run time".
    num_layers: L, number of blocks.
    embed_dim: D, width of the residual stream.
    num_heads: N, query heads.
    num_kv_heads: K, key and value heads; divides num_heads.
    head_dim: H, width of a head; even, because RoPE rotates halves.
    mlp_dim: F, inner width of the gated MLP.
    family: which Hugging Face architecture the weights are read and written
      as. Decides nothing that is computed.
    context_length: tokens the model was made for.
    rope_theta: base of the RoPE wavelengths.
    rope_scaling: Llama 3's, or None.
    norm_eps: added to the mean square in RMSNorm.
    norm_offset: added to the learned scale of RMSNorm; Gemma stores it minus 1.
    tie_embeddings: the output layer is the transposed embedding.
    activation: of the gate: 'silu' or 'gelu_tanh'.
    scale_embeddings: multiply embeddings by sqrt(D), rounded to dtype (Gemma).
    query_scale: queries are divided by its square root; 0 means head_dim.
    attention_softcap: c of c·tanh(x/c) on attention scores; 0 means none.
    final_softcap: the same on logits.
    qk_norm: RMSNorm of each query and key head before RoPE (Qwen3).
    post_norms: RMSNorm also after attention and MLP, before the residual sum
      (Gemma 2).
    sliding_window: a token attends to itself and window - 1 before it; 0 means
      to all.
    window_period: layer i has the window iff i % window_period == 0: 1 for all
      layers (Mistral), 2 for every other one (Gemma 2).
    dtype: what activations and products are computed in.
    param_dtype: what parameters are created and loaded in. LoRA adapters are
      always float32.
    remat: what the backward pass recomputes in each block: 'none' keeps all
      activations, 'dots' keeps the results of the dense products only, 'full'
      keeps the block's input only.
    match_init: the first query head of each kv head starts equal to the key
      head, so that a token attends to its like from the start. A small model
      learns to look things up in a list much sooner so (after the mimetic
      initialisation of Trockman & Kolter 2023).
    unroll: layers per step of the scan over depth. More is faster to run on
      CPU, slower to compile.
    lora_rank: r of the adapters; 0 means none.
    lora_alpha: the adapters' product is scaled by lora_alpha / lora_rank.
    lora_targets: names out of LORA_TARGETS.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  family: str = 'llama'
  context_length: int = 2048
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  norm_offset: float = 0.0
  tie_embeddings: bool = True
  activation: str = 'silu'
  scale_embeddings: bool = False
  query_scale: float = 0.0
  attention_softcap: float = 0.0
  final_softcap: float = 0.0
  qk_norm: bool = False
  post_norms: bool = False
  sliding_window: int = 0
  window_period: int = 1
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: str = 'none'
  match_init: bool = False
  unroll: int = 1
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_targets: tuple[str, ...] = LORA_TARGETS

  def __post_init__(self):
    for name in (
      'num_layers',
      'embed_dim',
      'num_heads',
      'num_kv_heads',
      'head_dim',
      'mlp_dim',
      'unroll',
      'rope_theta',
      'norm_eps',
      'context_length',
      'window_period',
      'lora_alpha',
    ):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name}={getattr(self, name)!r} must be positive.')
    for name in (
      'vocab_size',
      'query_scale',
      'attention_softcap',
      'final_softcap',
      'sliding_window',
      'lora_rank',
    ):
      if not getattr(self, name) >= 0:
        raise ValueError(f'{name}={getattr(self, name)!r} must not be negative.')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even (RoPE).')
    _check_choice('family', self.family, FAMILIES)
    _check_choice('activation', self.activation, ACTIVATIONS)
    _check_choice('dtype', self.dtype, DTYPES)
    _check_choice('param_dtype', self.param_dtype, DTYPES)
    _check_choice('remat', self.remat, REMAT)
    if self.lora_rank and not self.lora_targets:
      raise ValueError(
        f'lora_targets is empty: no layer matches; choose from {", ".join(LORA_TARGETS)}.'
      )
    for target in self.lora_targets:
      if target not in LORA_TARGETS:
        raise ValueError(
          f'the LoRA target {target!r} matches no layer; choose from {", ".join(LORA_TARGETS)}.'
        )

  @classmethod
  def from_dict(cls, obj: Mapping[str, Any]) -> ModelConfig:
    """Returns the config that to_dict wrote, also after a trip through JSON.

    Raises:
      ValueError: an unknown field, or one that is missing.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    for name in sorted(fields ^ set(obj)):
      raise ValueError(
        f'model config: the field {name!r} is {"missing" if name in fields else "unknown"}.'
      )
    scaling = obj['rope_scaling']
    return cls(
      **{
        **obj,
        'rope_scaling': scaling and RopeScaling(**scaling),
        'lora_targets': tuple(obj['lora_targets']),
      }
    )

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as a JSON-able dict."""
    return dataclasses.asdict(self)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(choices)}.')


PRESETS = {
  # The CPU default: 0.8M parameters beside the embedding.
  'tiny': ModelConfig(
    vocab_size=0,
    num_layers=4,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    match_init=True,
    unroll=4,
  ),
  # Shapes of public models; their weights come from model.init.
  'smollm2_135m': ModelConfig(
    vocab_size=49_152,
    num_layers=30,
    embed_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    context_length=8192,
    rope_theta=100_000.0,
  ),
  'llama3_8b': ModelConfig(
    vocab_size=128_256,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    context_length=131_072,
    rope_theta=500_000.0,
    tie_embeddings=False,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
  ),
  'llama3_70b': ModelConfig(
    vocab_size=128_256,
    num_layers=80,
    embed_dim=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=28_672,
    context_length=131_072,
    rope_theta=500_000.0,
    tie_embeddings=False,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
  ),
  'mistral_7b': ModelConfig(  # Instruct v0.1
    vocab_size=32_000,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    family='mistral',
    context_length=32_768,
    sliding_window=4096,
    tie_embeddings=False,
  ),
  'qwen3_1b7': ModelConfig(
    vocab_size=151_936,
    num_layers=28,
    embed_dim=2048,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=6144,
    family='qwen3',
    context_length=40_960,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qk_norm=True,
  ),
  'gemma2_9b': ModelConfig(  # also ShieldGemma 9B
    vocab_size=256_000,
    num_layers=42,
    embed_dim=3584,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    mlp_dim=14_336,
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
  """Returns PRESETS[name] with overrides, and vocab_size where it has none.

  Raises:
    ValueError: for an unknown preset or an unknown field.
  """
  if name not in PRESETS:
    raise ValueError(f'unknown model preset {name!r}; choose from {", ".join(PRESETS)}.')
  known = {field.name for field in dataclasses.fields(ModelConfig)}
  unknown = sorted(set(overrides) - known)
  if unknown:
    raise ValueError(f'unknown model field {unknown[0]!r}; choose from {", ".join(sorted(known))}.')
  vocab_size = PRESETS[name].vocab_size or vocab_size
  return dataclasses.replace(PRESETS[name], **{'vocab_size': vocab_size, **overrides})
