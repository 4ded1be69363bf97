import dataclasses
import json

import pytest

from csrm_jax.models import config


def test_preset_fills_in_vocabulary_and_overrides():
  cfg = config.preset('tiny', vocab_size=100, num_kv_heads=4, dtype='bfloat16')
  assert (cfg.vocab_size, cfg.num_kv_heads, cfg.dtype) == (100, 4, 'bfloat16')
  assert cfg.embed_dim == config.PRESETS['tiny'].embed_dim
  stored = json.loads(json.dumps(dataclasses.asdict(cfg)))
  assert config.ModelConfig.from_dict(stored) == cfg
  assert hash(cfg) == hash(dataclasses.replace(cfg))


@pytest.mark.parametrize(
  'overrides,message',
  [
    ({'num_kv_heads': 3}, 'num_heads=4 must be a multiple of num_kv_heads=3'),
    ({'head_dim': 31}, 'head_dim=31 must be even'),
    ({'dtype': 'float16'}, "dtype='float16' must be one of float32, bfloat16"),
    ({'remat': 'some'}, "remat='some' must be one of none, full, dots"),
    ({'num_layers': 0}, 'num_layers=0 must be positive'),
    ({'rope_theta': 0.0}, 'rope_theta=0.0 must be positive'),
    ({'dropout': 0.1}, "unknown model field 'dropout'"),
  ],
)
def test_bad_values_are_named(overrides, message):
  with pytest.raises(ValueError, match=message):
    config.preset('tiny', 100, **overrides)


def test_unknown_preset_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"'huge'; choose from .*tiny"):
    config.preset('huge', 100)
