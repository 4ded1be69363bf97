"""A model that computes in milliseconds."""

from csrm_jax.models import config

SHAPE = {'vocab_size': 40, 'num_layers': 2, 'embed_dim': 32, 'num_heads': 4, 'num_kv_heads': 2}
SHAPE |= {'head_dim': 16, 'mlp_dim': 48}


def model(**fields) -> config.ModelConfig:
  """Returns a Llama of SHAPE with these fields."""
  return config.ModelConfig(**{**SHAPE, **fields})
