import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from csrm_jax.models import hf, hf_config, shards
from tests import small

CFG = small.model(rope_theta=5e5, norm_eps=1e-6)


@pytest.fixture
def folder(make_params, tmp_path):
  hf.save(tmp_path / 'm', CFG, make_params(CFG), {'seed': '0'})
  return tmp_path / 'm'


def _edit_weights(folder, edit):
  path = folder / shards.WEIGHTS_FILE
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def _edit_config(folder, **fields):
  path = folder / hf_config.CONFIG_FILE
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize('tie', [True, False])
@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_round_trip_is_exact(make_params, tie, param_dtype, tmp_path):
  cfg = dataclasses.replace(CFG, tie_embeddings=tie, param_dtype=param_dtype, unroll=2)
  params = make_params(cfg, 3)
  hf.save(tmp_path, cfg, params)
  got_cfg, got = hf.load(tmp_path, unroll=2)
  assert got_cfg == cfg
  assert jax.tree.structure(got) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, got, params)
  assert not list(tmp_path.glob('*.tmp'))


def test_every_family_comes_back(make_params, family_cfg, tmp_path):
  cfg = family_cfg
  params = make_params(cfg, 1)
  hf.save(tmp_path, cfg, params)
  got_cfg, got = hf.load(tmp_path)
  assert got_cfg == cfg
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_transformers_takes_every_tensor_and_returns_it(make_params, family_cfg, tmp_path):
  """Nothing is missing, left over or misshaped, in either direction."""
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  params = make_params(family_cfg, 2)
  hf.save(tmp_path / 'ours', family_cfg, params)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'ours', output_loading_info=True
  )
  assert not any(info.values()), info
  model.save_pretrained(tmp_path / 'theirs', max_shard_size='20KB')
  assert len(list((tmp_path / 'theirs').glob('*.safetensors'))) > 1
  got_cfg, got = hf.load(tmp_path / 'theirs')
  assert got_cfg == family_cfg
  jax.tree.map(np.testing.assert_array_equal, got, params)
  assert hf.digest(tmp_path / 'theirs') == hf.digest(tmp_path / 'ours')


def test_layout_is_that_of_llama(folder):
  params = hf.load(folder)[1]
  tensors = safetensors.numpy.load_file(folder / shards.WEIGHTS_FILE)
  assert len(tensors) == 2 + 9 * CFG.num_layers
  heads = params['layers']['attention']
  prefix = 'model.layers.1.self_attn.'
  np.testing.assert_array_equal(
    tensors[prefix + 'k_proj.weight'], np.asarray(heads['key']['kernel'][1]).reshape(32, 32).T
  )
  # [out, in]: the inputs of o_proj are heads, then their dims.
  np.testing.assert_array_equal(
    tensors[prefix + 'o_proj.weight'][:, 16:32], np.asarray(heads['out']['kernel'][1, 1]).T
  )
  spec = json.loads((folder / hf_config.CONFIG_FILE).read_text())
  assert spec['rope_theta'] == 5e5 and spec['head_dim'] == 16


def _metadata(path):
  with safetensors.safe_open(path, 'numpy') as file:
    return file.metadata()


def test_metadata(folder):
  assert _metadata(folder / shards.WEIGHTS_FILE)['seed'] == '0'


def test_missing_tensor(folder):
  name = 'model.layers.1.mlp.up_proj.weight'
  _edit_weights(folder, lambda tensors: tensors.pop(name))
  with pytest.raises(ValueError, match=rf'm: {name} is missing'):
    hf.load(folder)


def test_unused_tensor(folder):
  _edit_weights(folder, lambda t: t.update(extra=np.zeros(2, np.float32)))
  with pytest.raises(ValueError, match='extra is of no use'):
    hf.load(folder)


def test_misshaped_tensor(folder):
  name = 'model.norm.weight'
  _edit_weights(folder, lambda t: t.update({name: np.zeros(7, np.float32)}))
  with pytest.raises(ValueError, match=rf'{name} has shape \(7,\), .* \(32,\)'):
    hf.load(folder)


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_weights_that_are_not_finite(folder, value):
  _edit_weights(folder, lambda t: t['model.norm.weight'].__setitem__(1, value))
  said = small.error_of(hf.load, folder)
  assert 'model.safetensors: model.norm.weight holds 1 values that are NaN' in said


def test_other_backbone(folder):
  other = dataclasses.replace(CFG, rope_theta=1e4)
  with pytest.raises(ValueError, match=r'another backbone: rope_theta is 5000'):
    hf.load_params(folder, other)


def test_damaged_file(folder):
  path = folder / shards.WEIGHTS_FILE
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(ValueError, match='cannot be read'):
    hf.load(folder)


def test_models_that_are_not_computed(folder):
  _edit_config(folder, hidden_act='gelu')
  with pytest.raises(ValueError, match=r"config\.json: hidden_act is 'gelu'"):
    hf.load_config(folder)


def test_missing_config(tmp_path):
  with pytest.raises(ValueError, match=r'config\.json: cannot be read'):
    hf.load(tmp_path)


def test_save_refuses_params_of_another_model(make_params, tmp_path):
  other = dataclasses.replace(CFG, tie_embeddings=False)
  with pytest.raises(ValueError, match='lm_head/kernel is missing'):
    hf.save(tmp_path / 'm', other, make_params(CFG))
  assert not (tmp_path / 'm').exists()


def test_shards_are_read_as_one_model(make_params, tmp_path):
  params = make_params(CFG)
  hf.save(tmp_path / 'one', CFG, params, {'seed': '0'})
  hf.save(tmp_path / 'many', CFG, params, {'seed': '0'}, max_shard_bytes=9000)
  files = sorted(path.name for path in (tmp_path / 'many').iterdir())
  assert files[-1] == shards.INDEX_FILE and len(files) > 4
  assert files[1] == f'model-00001-of-{len(files) - 2:05}.safetensors'
  jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / 'many')[1], params)
  assert hf.digest(tmp_path / 'one') == hf.digest(tmp_path / 'many')
  assert {_metadata(path)['seed'] for path in (tmp_path / 'many').glob('*.safetensors')} == {'0'}


def test_digest_is_of_names_shapes_and_values(folder):
  before = hf.digest(folder)
  _edit_weights(folder, lambda t: t['model.norm.weight'].__setitem__(3, 2.0))
  assert hf.digest(folder) != before


def _shards(folder, params):
  hf.save(folder, CFG, params, max_shard_bytes=9000)
  return sorted(folder.glob('model-*.safetensors'))


def test_shard_that_is_missing_or_cut_short(make_params, tmp_path):
  second = _shards(tmp_path / 'm', make_params(CFG))[1]
  content = second.read_bytes()
  second.write_bytes(content[:-10])
  with pytest.raises(ValueError, match=rf'{second.name}: cannot be read'):
    hf.load(tmp_path / 'm')
  second.unlink()
  with pytest.raises(ValueError, match=rf'{second.name}: cannot be read'):
    hf.load(tmp_path / 'm')


def test_index_that_does_not_fit_its_shards(make_params, tmp_path):
  files = _shards(tmp_path / 'm', make_params(CFG))
  path = tmp_path / 'm' / shards.INDEX_FILE
  index = json.loads(path.read_text())
  name = 'model.norm.weight'
  held_by = index['weight_map'].pop(name)
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match=rf'{held_by}: {name} is not in the ind'):
    hf.load(tmp_path / 'm')
  other = next(file.name for file in files if file.name != held_by)
  index['weight_map'][name] = other
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match=rf'{name} is (missing|not in)'):
    hf.load(tmp_path / 'm')
  index['weight_map'][name] = '../elsewhere.safetensors'
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r'elsewhere.* in another folder'):
    hf.load(tmp_path / 'm')
  path.write_text('{}')
  with pytest.raises(ValueError, match=r'index\.json: cannot be read'):
    hf.load(tmp_path / 'm')


def test_weights_are_not_mixed_with_others(make_params, folder):
  with pytest.raises(ValueError, match='other weights are there already'):
    _shards(folder, make_params(CFG))
  hf.save(folder, CFG, make_params(CFG, 1))  # the same files


def test_pickled_weights_are_not_read(folder):
  (folder / shards.WEIGHTS_FILE).rename(folder / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='never pickled weights'):
    hf.load(folder)


def test_stored_output_layer_of_a_tied_model(folder):
  copy = 'lm_head.weight'
  _edit_weights(
    folder,
    lambda t: t.update(
      {
        copy: t['model.embed_tokens.weight'].copy(),
        'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(8).astype(np.float32),
      }
    ),
  )
  assert 'lm_head' not in hf.load(folder)[1]
  _edit_weights(folder, lambda t: t[copy].__setitem__((0, 0), 9.0))
  with pytest.raises(ValueError, match=r'lm_head\.weight differs from the emb'):
    hf.load(folder)


def test_quantised_weights_are_refused(folder):
  _edit_weights(folder, lambda t: t.update({'model.norm.weight': np.zeros(32, np.int8)}))
  with pytest.raises(ValueError, match=r'norm\.weight is stored as I8, only'):
    hf.load(folder)


def test_hub_ids_are_downloaded(folder, monkeypatch):
  hub = pytest.importorskip('huggingface_hub')
  calls = []

  def download(name, **kwargs):
    calls.append((name, kwargs['revision']))
    assert '*.bin' not in kwargs['allow_patterns']
    if name == 'org/gone':
      raise OSError('404 Client Error\nand more')
    return str(folder)

  monkeypatch.setattr(hub, 'snapshot_download', download)
  assert hf.Source('org/name@v1').path == folder
  assert hf.load_config('org/name').num_layers == 2
  assert calls == [('org/name', 'v1'), ('org/name', None)]
  assert hf.Source(str(folder)).path == folder and len(calls) == 2
  with pytest.raises(ValueError, match=r'cannot be downloaded \(404 Client'):
    hf.Source('org/gone').path  # noqa: B018
  for text in ('nowhere', '/no/where', './no/where', 'a/b/c'):
    with pytest.raises(ValueError, match='does not exist; give a folder'):
      hf.Source(text).path  # noqa: B018


def test_sequence_classifier_comes_back(make_params, tmp_path):
  cfg = dataclasses.replace(CFG, tie_embeddings=False)
  params = make_params(cfg, 0)
  del params['lm_head']
  params['score'] = {'kernel': np.arange(32, dtype=np.float32)[:, None]}
  hf.save(tmp_path, cfg, params, extra={'pad_token_id': 0})
  spec = json.loads((tmp_path / hf_config.CONFIG_FILE).read_text())
  assert spec['architectures'] == ['LlamaForSequenceClassification']
  assert spec['pad_token_id'] == 0
  got_cfg, got = hf.load(tmp_path)
  assert got_cfg == cfg
  assert jax.tree.structure(got) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_the_same_weights_are_the_same_file(tmp_path):
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  tensors = {'a': shards.Tensor(array.shape, array.dtype, '', lambda: array)}
  metadata = {f'key {i}': 'é"\\\n\x01/' for i in range(6)}
  for i in range(5):
    shards.write_file(tmp_path / f'{i}.safetensors', tensors, metadata)
  assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
  with safetensors.safe_open(tmp_path / '0.safetensors', framework='numpy') as file:
    assert file.metadata() == {'format': 'pt'} | metadata
    np.testing.assert_array_equal(file.get_tensor('a'), array)
