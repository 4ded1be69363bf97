import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.core import tree
from csrm_jax.models import config, hf, lora
from tests import small

CFG = small.model(lora_rank=3, lora_alpha=7.0)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)


def _logits(cfg, params):
  positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
  return np.asarray(small.logits(cfg, params, TOKENS, positions, np.ones_like(TOKENS)))


@pytest.fixture
def params(make_params):
  """Base and adapters whose product is not zero, in one tree."""
  return make_params(CFG)


def test_split(params, make_params):
  adapters, base = lora.split(params)
  plain = dataclasses.replace(CFG, lora_rank=0)
  assert jax.tree.structure(base) == jax.tree.structure(make_params(plain))
  assert tree.num_params(adapters) > 0
  merged = tree.merge(base, adapters)
  assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_merged_model_computes_the_same(params):
  plain = dataclasses.replace(CFG, lora_rank=0)
  want, base = _logits(CFG, params), _logits(plain, lora.split(params)[1])
  got = _logits(plain, lora.merge(CFG, params))
  difference = np.abs(got - want).max()
  print(f'merged: {difference:.2e}, adapters do {np.abs(base - want).max():.2}')
  assert difference < 1e-5 < 0.1 < np.abs(base - want).max()


def test_merged_kernels_keep_their_dtype(params):
  half = jax.tree_util.tree_map_with_path(
    lambda path, x: x if path[-1].key.startswith('lora') else x.astype(jnp.bfloat16), params
  )
  got = lora.merge(CFG, half)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


def test_merge_wants_the_adapters_of_the_config(params):
  other = dataclasses.replace(CFG, lora_targets=('query',))
  with pytest.raises(ValueError, match=r'adapters: .*lora_. is of no use'):
    lora.merge(other, params)
  with pytest.raises(ValueError, match=r'lora_a is missing'):
    lora.merge(CFG, lora.split(params)[1])
  with pytest.raises(ValueError, match='lora_rank=0'):
    lora.merge(dataclasses.replace(CFG, lora_rank=0), params)


def test_whole_models_are_written_without_adapters(params, tmp_path):
  with pytest.raises(ValueError, match=r'hold LoRA adapters.* merge them'):
    hf.save(tmp_path / 'm', CFG, params)


@pytest.mark.parametrize('targets', [config.LORA_TARGETS, ('value', 'query')])
def test_peft_round_trip_is_exact(targets, make_params, tmp_path):
  cfg = dataclasses.replace(CFG, lora_targets=targets)
  adapters = lora.split(make_params(cfg))[0]
  lora.save_peft(tmp_path, cfg, adapters, 'org/base', {'seed': '3'})
  assert set(lora.read_peft(tmp_path)['lora_targets']) == set(targets)
  got = lora.load_peft(tmp_path, cfg)
  assert jax.tree.structure(got) == jax.tree.structure(adapters)
  jax.tree.map(np.testing.assert_array_equal, got, adapters)


def _peft_logits(base, adapter):
  import peft
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(base)
  model = peft.PeftModel.from_pretrained(model, adapter)
  with torch.no_grad():
    return model(torch.tensor(TOKENS).long()).logits.numpy(), model


def test_peft_computes_the_same_and_writes_the_same(params, tmp_path):
  for name in ('torch', 'transformers', 'peft'):
    pytest.importorskip(name)
  adapters, base = lora.split(params)
  plain = dataclasses.replace(CFG, lora_rank=0)
  hf.save(tmp_path / 'base', plain, base)
  lora.save_peft(tmp_path / 'adapter', CFG, adapters, str(tmp_path / 'base'))
  theirs, model = _peft_logits(tmp_path / 'base', tmp_path / 'adapter')
  difference = np.abs(theirs - _logits(CFG, params)).max()
  print(f'PEFT: {difference:.2e}')
  assert difference < 1e-4
  model.save_pretrained(tmp_path / 'again')
  assert lora.read_peft(tmp_path / 'again') == lora.read_peft(tmp_path / 'adapter')
  got = lora.load_peft(tmp_path / 'again', CFG)
  jax.tree.map(np.testing.assert_array_equal, got, adapters)


@pytest.mark.parametrize(
  'fields,message',
  [
    ({'target_modules': ['q_proj', 'fc1']}, "target 'fc1' matches no layer"),
    ({'target_modules': 'all-linear'}, "target 'all-linear' matches no layer"),
    ({'peft_type': 'LOHA'}, "peft_type is 'LOHA', only 'LORA'"),
    ({'bias': 'all'}, "bias is 'all', only 'none'"),
    ({'use_rslora': True}, 'use_rslora is True, which is not supported'),
    ({'rank_pattern': {'q_proj': 2}}, 'rank_pattern is'),
    ({'r': 4}, 'lora_rank is 4 there and 3'),
    ({'lora_alpha': 8}, 'lora_alpha is 8.0 there and 7.0'),
    ({'target_modules': ['q_proj']}, 'lora_targets is'),
    ({'r': None}, 'cannot be read as the config of a LoRA adapter'),
  ],
)
def test_adapters_that_are_not_supported(fields, message, params, tmp_path):
  lora.save_peft(tmp_path, CFG, lora.split(params)[0], 'base')
  path = tmp_path / lora.CONFIG_FILE
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  with pytest.raises(ValueError, match=message):
    lora.load_peft(tmp_path, CFG)


def test_damaged_adapter(params, tmp_path):
  lora.save_peft(tmp_path, CFG, lora.split(params)[0], 'base')
  path = tmp_path / lora.WEIGHTS_FILE
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(ValueError, match=r'adapter_model.*cannot be read'):
    lora.load_peft(tmp_path, CFG)
  with pytest.raises(ValueError, match='cannot be read as the config'):
    lora.load_peft(tmp_path / 'nowhere', CFG)
