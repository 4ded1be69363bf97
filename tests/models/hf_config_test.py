import dataclasses
import json

import pytest

from csrm_jax.models import config, hf_config


@pytest.fixture
def spec(family_cfgs):
  """(name, **fields) -> config.json of that model with these fields."""

  def make(name='llama', **fields):
    return {**hf_config.to_hf(family_cfgs[name], 'float32'), **fields}

  return make


def test_round_trip(family_cfg):
  spec = json.loads(json.dumps(hf_config.to_hf(family_cfg, 'bfloat16')))
  cfg = hf_config.from_hf(spec, 'here', unroll=3)
  assert cfg == dataclasses.replace(family_cfg, param_dtype='bfloat16', unroll=3)
  assert hf_config.form(spec, 'here') == 'causal_lm'


def test_transformers_reads_and_writes_the_same_model(family_cfg, tmp_path):
  transformers = pytest.importorskip('transformers')
  spec = hf_config.to_hf(family_cfg, 'float32')
  (tmp_path / 'config.json').write_text(json.dumps(spec))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  theirs.save_pretrained(tmp_path / 'again')
  written = hf_config.read(tmp_path / 'again')
  written.pop('rope_theta', None)  # the older style
  assert 'rope_theta' in written['rope_parameters']
  assert hf_config.from_hf(written, 'again') == family_cfg


@pytest.mark.parametrize(
  'name,preset',
  [
    ('llama', 'llama3_8b'),
    ('mistral', 'mistral_7b'),
    ('qwen3', 'qwen3_1b7'),
    ('gemma2', 'gemma2_9b'),
  ],
)
def test_presets_can_be_written(name, preset):
  cfg = config.PRESETS[preset]
  assert cfg.family == name
  assert hf_config.from_hf(hf_config.to_hf(cfg, 'float32'), preset) == cfg


def test_what_a_silent_file_means(spec):
  silent = spec('gemma2')
  for name in (
    'head_dim',
    'query_pre_attn_scalar',
    'attn_logit_softcapping',
    'sliding_window',
    'layer_types',
    'tie_word_embeddings',
    'hidden_activation',
    'final_logit_softcapping',
  ):
    del silent[name]
  cfg = hf_config.from_hf(silent, 'here')
  assert (cfg.head_dim, cfg.query_scale) == (256, 256.0)
  assert (cfg.attention_softcap, cfg.final_softcap) == (50.0, 30.0)
  assert (cfg.sliding_window, cfg.window_period) == (4096, 2)
  assert cfg.tie_embeddings and cfg.activation == 'gelu_tanh'
  silent = spec('llama')
  for name in ('head_dim', 'num_key_value_heads', 'tie_word_embeddings'):
    del silent[name]
  cfg = hf_config.from_hf(silent, 'here')
  assert (cfg.head_dim, cfg.num_kv_heads, cfg.tie_embeddings) == (8, 4, False)


def test_null_switches_off_what_silence_means(spec):
  cfg = hf_config.from_hf(spec('gemma2', attn_logit_softcapping=None, sliding_window=None), 'here')
  assert (cfg.attention_softcap, cfg.sliding_window) == (0.0, 0)
  cfg = hf_config.from_hf(spec('mistral', sliding_window=None), 'here')
  assert cfg.sliding_window == 0


def test_qwen_has_its_window_only_when_switched_on(spec):
  qwen = spec('qwen3', sliding_window=7, max_window_layers=0)
  del qwen['layer_types']
  assert hf_config.from_hf(qwen, 'here').sliding_window == 0
  qwen['use_sliding_window'] = True
  assert hf_config.from_hf(qwen, 'here').sliding_window == 7
  qwen['max_window_layers'] = 2
  with pytest.raises(ValueError, match=r'max_window_layers .* layers \[2, 3'):
    hf_config.from_hf(qwen, 'here')


@pytest.mark.parametrize('stored,ours', [('float16', 'float32'), ('bfloat16', 'bfloat16')])
def test_dtype_of_the_weights(stored, ours, spec):
  assert hf_config.from_hf(spec(dtype=stored), 'here').param_dtype == ours


_LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0}


@pytest.mark.parametrize(
  'fields,message',
  [
    ({'model_type': 'gpt2'}, "model_type is 'gpt2', only 'llama', 'mistral'"),
    ({'architectures': ['LlamaModel']}, "architecture 'LlamaModel' is not"),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu', only 'silu', 'gelu_pyt"),
    ({'attention_bias': True}, 'attention_bias is True, only False'),
    ({'mlp_bias': True}, 'mlp_bias is True'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config is'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_type is 'yarn', only"),
    ({'rope_scaling': {'type': 'linear'}}, "rope_type is 'linear'"),
    ({'rope_scaling': _LLAMA3}, "rope scaling has no 'low_freq_factor'"),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'factor is 0.5'),
    ({'rope_parameters': {'full_attention': {}}}, 'differ between layers'),
    ({'vocab_size': None}, "has no 'vocab_size'"),
    ({'dtype': 'int8'}, "dtype is 'int8'"),
    ({'hidden_size': '576'}, "hidden_size is '576', it must be a whole number"),
    ({'num_hidden_layers': 2.5}, 'num_hidden_layers is 2.5, it must be a whole'),
    ({'num_hidden_layers': True}, 'num_hidden_layers is True, it must be a whole'),
    ({'num_hidden_layers': 10**9}, 'num_hidden_layers is 1000000000, no model has that'),
    ({'num_attention_heads': 0}, 'num_attention_heads is 0, no model has that'),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps is nan, it must be a finite number'),
    ({'rope_theta': 'abc'}, "rope_theta is 'abc', it must be a finite number"),
    ({'rope_parameters': {'rope_theta': -1.0}}, r'rope_theta=-1\.0 must be'),
    ({'rope_scaling': 'linear'}, "rope_scaling is 'linear', it must be an object"),
    ({'architectures': [1]}, 'architectures is a list of 1, it must be a list of texts'),
    ({'model_type': ['llama']}, 'model_type is a list of 1, it must be text'),
    ({'tie_word_embeddings': 'False'}, "tie_word_embeddings is 'False', it must be true"),
    ({'head_dim': 7}, 'head_dim=7 must be even'),
  ],
)
def test_models_that_are_not_computed(fields, message, spec):
  with pytest.raises(ValueError, match=rf'here.*{message}'):
    hf_config.from_hf(spec(**fields), 'here/config.json')


@pytest.mark.parametrize(
  'types,message',
  [
    (
      ['full_attention', 'sliding_attention'] * 2 + ['full_attention'],
      r'layer_types puts the sliding window on the layers \[1, 3\]',
    ),
    (['chunked_attention'] * 5, "layer_types is 'chunked_attention'"),
    (['full_attention'] * 4, '4 layer_types for 5 layers'),
  ],
)
def test_windows_that_are_not_computed(types, message, spec):
  with pytest.raises(ValueError, match=message):
    hf_config.from_hf(spec('gemma2', layer_types=types), 'here')


@pytest.mark.parametrize(
  'name,fields,message',
  [
    ('llama', {'qk_norm': True}, 'qk_norm=True cannot be written as .*llama'),
    ('llama', {'sliding_window': 8}, 'sliding_window=8 cannot be written'),
    ('mistral', {'window_period': 2}, 'window_period=2 cannot be written'),
    ('gemma2', {'norm_offset': 0.0}, 'norm_offset=0.0 cannot be written'),
  ],
)
def test_models_without_a_form(name, fields, message, family_cfgs):
  cfg = dataclasses.replace(family_cfgs[name], **fields)
  with pytest.raises(ValueError, match=message):
    hf_config.to_hf(cfg, 'float32')


def test_properties_of_the_weights_cannot_be_overridden(spec):
  with pytest.raises(ValueError, match="'num_layers' is a property of the wei"):
    hf_config.from_hf(spec(), 'here', num_layers=2)


@pytest.mark.parametrize('text', ['{', '[]', '[' * 9000, '{"a": 1, "a": 2}'])
def test_damaged_config(text, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=r'config\.json:.*; give a folder that'):
    hf_config.read(tmp_path)
