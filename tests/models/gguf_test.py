import dataclasses
import json
import os
import pathlib
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.models import attention, config, gguf, hf, shards
from csrm_jax.text import tokenizer as tokenizer_lib
from tests import fetch_smollm2, small

package = pytest.importorskip('gguf')

CFG = small.model(
  vocab_size=64,
  embed_dim=64,
  head_dim=32,
  mlp_dim=96,
  rope_theta=5e5,
  norm_eps=3e-6,
  context_length=99,
)
TOKENS = ['<|end|>', '<|im_start|>', *map(chr, range(33, 127)), 'Ġ', 'Ċ', 'ab', 'Ġab', '12', 'Ġ1']
MERGES = ['a b', 'Ġ ab', '1 2', 'Ġ 1']
SMOLLM2 = os.environ.get('CSRM_SMOLLM2_DIR', '')
_NAMES = {entry.theirs: entry.gguf for entry in hf.TABLE if entry.gguf}


def _permuted(weight, num_heads):
  """As llama.cpp stores the rows of query and key."""
  halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
  return halves.swapaxes(1, 2).reshape(weight.shape)


def _their_tensors(folder, cfg):
  """Returns {name in GGUF: float32 array} of a Hugging Face folder."""
  tensors = {}
  for name, tensor in hf.Source(folder).tensors.items():
    array, parts = tensor.read(), name.split('.')
    heads = {'q_proj': cfg.num_heads, 'k_proj': cfg.num_kv_heads}
    if cfg.family == 'llama' and parts[-2] in heads:
      array = _permuted(array, heads[parts[-2]])
    layer = f'blk.{parts[2]}.' if parts[1] == 'layers' else ''
    tensors[f'{layer}{_NAMES[re.sub("[0-9]+", "{}", name)]}.weight'] = array
  return tensors


def _write(path, cfg, tensors, *, kind='F32', pre='smollm', **metadata):
  """Writes a .gguf file; matrices in the quantisation `kind`."""
  writer = package.GGUFWriter(path, cfg.family)
  writer.add_block_count(cfg.num_layers)
  writer.add_context_length(cfg.context_length)
  writer.add_embedding_length(cfg.embed_dim)
  writer.add_feed_forward_length(cfg.mlp_dim)
  writer.add_head_count(cfg.num_heads)
  writer.add_head_count_kv(cfg.num_kv_heads)
  writer.add_key_length(cfg.head_dim)
  writer.add_value_length(cfg.head_dim)
  writer.add_rope_freq_base(cfg.rope_theta)
  writer.add_layer_norm_rms_eps(cfg.norm_eps)
  writer.add_vocab_size(cfg.vocab_size)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 4] + [1] * (len(TOKENS) - 2))
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(0)
  writer.add_pad_token_id(0)
  writer.add_chat_template('{{ messages }}')
  for key, value in metadata.items():
    writer.add_key_value(key.replace('__', '.'), value, package.GGUFValueType.get_type(value))
  number = package.GGMLQuantizationType[kind]
  for name, array in tensors.items():
    if kind == 'F32' or array.ndim == 1:
      writer.add_tensor(name, array)
    else:
      writer.add_tensor(name, package.quants.quantize(array, number), raw_dtype=number)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture
def model(make_params, tmp_path):
  """(**fields of CFG) -> (cfg, params, tensors under GGUF names)."""

  def make(**fields):
    cfg = dataclasses.replace(CFG, **fields)
    params = make_params(cfg)
    hf.save(tmp_path / 'hf', cfg, params)
    return cfg, params, _their_tensors(tmp_path / 'hf', cfg)

  return make


@pytest.mark.parametrize(
  'fields', [{}, {'tie_embeddings': False}, {'family': 'qwen3', 'qk_norm': True, 'head_dim': 16}]
)
def test_weights_and_config(fields, model, tmp_path):
  cfg, params, tensors = model(**fields)
  _write(tmp_path / 'm.gguf', cfg, tensors)
  got_cfg, got = hf.load(tmp_path / 'm.gguf')
  assert got_cfg == cfg
  jax.tree.map(np.testing.assert_array_equal, got, params)
  fetch_smollm2.convert(tmp_path / 'm.gguf', tmp_path / 'converted')
  assert hf.load_config(tmp_path / 'converted') == cfg
  digests = {hf.digest(tmp_path / name) for name in ('m.gguf', 'converted', 'hf')}
  assert len(digests) == 1


@pytest.mark.parametrize(
  'kind,most',
  [
    ('F16', 1e-3),
    ('BF16', 1e-2),
    ('Q8_0', 1e-2),
    ('Q4_0', 0.1),
    ('Q4_1', 0.1),
    ('Q5_0', 0.05),
    ('Q5_1', 0.05),
  ],
)
def test_quantised_weights_are_near(kind, most, model, tmp_path):
  cfg, params, tensors = model()
  _write(tmp_path / 'm.gguf', cfg, tensors, kind=kind)
  got = hf.load_params(tmp_path / 'm.gguf', cfg)
  errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), got, params)
  print(kind, errors)
  largest = float(np.abs(params['layers']['mlp']['up']['kernel']).max())
  assert 0 < errors['layers']['mlp']['up']['kernel'] < most * largest
  assert errors['final_norm']['scale'] == 0


@pytest.mark.parametrize('kind', ['Q4_K', 'Q5_K', 'Q6_K'])
def test_types_that_only_llama_cpp_writes(kind, tmp_path):
  """Blocks of arbitrary bits come out finite and of the right shape."""
  number = package.GGMLQuantizationType[kind]
  block, size = package.GGML_QUANT_SIZES[number]
  rng = np.random.default_rng(0)
  # Half-precision scales must be finite: small exponents only.
  data = rng.integers(0, 60, (3, 2 * size), dtype=np.uint8)
  path = tmp_path / 'm.gguf'
  writer = package.GGUFWriter(path, 'llama')
  writer.add_tensor('output.weight', data, raw_dtype=number)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  (tensor,) = gguf._read(path).tensors
  got = gguf._dequantize(tensor, None)
  assert got.shape == (3, 2 * block) and np.isfinite(got).all() and got.any()
  assert kind in gguf.TYPES


def test_transformers_reads_the_same_model(model, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  cfg, _, tensors = model(head_dim=16)  # it takes embed_dim / num_heads
  _write(tmp_path / 'm.gguf', cfg, tensors, kind='Q8_0')
  fetch_smollm2.convert(tmp_path / 'm.gguf', tmp_path / 'converted')
  auto = transformers.AutoModelForCausalLM
  models = [
    auto.from_pretrained(tmp_path, gguf_file='m.gguf', dtype=torch.float32),
    auto.from_pretrained(tmp_path / 'converted'),
  ]
  tokens = torch.arange(24).reshape(2, 12)
  with torch.no_grad():
    first, second = (m(tokens).logits.numpy() for m in models)
  np.testing.assert_array_equal(first, second)


def test_tokenizer(model, tmp_path):
  cfg, _, tensors = model()
  _write(tmp_path / 'm.gguf', cfg, tensors)
  fetch_smollm2.convert(tmp_path / 'm.gguf', tmp_path / 'hf2')
  tok = tokenizer_lib.load_tokenizer(tmp_path / 'hf2' / 'tokenizer.json')
  assert (tok.bos_id, tok.eos_id, tok.pad_id) == (None, 0, 0)
  ids = {token: i for i, token in enumerate(TOKENS)}
  assert tok.encode('ab ab\n') == [ids['ab'], ids['Ġab'], ids['Ċ']]
  # Digits stand alone, whatever the merges.
  assert tok.encode('12 1') == [ids['1'], ids['2'], ids['Ġ'], ids['1']]
  assert tok.encode_control('<|im_start|>a') == [1, ids['a']]
  assert 1 not in tok.encode('<|im_start|>')
  settings = json.loads((tmp_path / 'hf2/tokenizer_config.json').read_text())
  assert settings['chat_template'] == '{{ messages }}'
  assert settings['bos_token'] == '<|im_start|>'


def test_tokenizer_that_opens_texts(model, tmp_path):
  cfg, _, tensors = model()
  _write(tmp_path / 'm.gguf', cfg, tensors, pre='llama-bpe', tokenizer__ggml__add_bos_token=True)
  for name, content in gguf.tokenizer_files(tmp_path / 'm.gguf').items():
    (tmp_path / name).write_bytes(content)
  tok = tokenizer_lib.load_tokenizer(tmp_path / 'tokenizer.json')
  assert tok.bos_id == 1
  assert tok.encode('12') == [TOKENS.index('12')]


_REAL = [
  'Hello world',
  'I have 1234 apples, 5.67 pears',
  '  leading  spaces ',
  'emoji 🎉👩‍👩‍👧 é e\u0301',
  'tabs\t\tand\nnewlines\r\n\r\n',
  '日本語',
  "isn't it I'LL we've",
  'x = 3*y+42;\n\tif (a[10]):',
  '\x00\x01',
  '',
]


@pytest.mark.real
@pytest.mark.skipif(
  not SMOLLM2, reason='CSRM_SMOLLM2_DIR is not set: run python tests/fetch_smollm2.py DIR'
)
def test_tokenizer_of_smollm2():
  """Against the tokenizer that transformers makes of the same parts."""
  tokenizers = pytest.importorskip('tokenizers')
  path = pathlib.Path(SMOLLM2) / 'tokenizer.json'
  spec = json.loads(path.read_bytes())
  theirs = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      spec['model']['vocab'], [tuple(merge.split(' ')) for merge in spec['model']['merges']]
    )
  )
  theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  ours = tokenizer_lib.load_tokenizer(path)
  for text in _REAL:
    assert ours.encode(text) == theirs.encode(text).ids, text
    assert ours.decode(ours.encode(text)) == text
  assert ours.encode_control('<|im_start|>user\n')[0] == 1


@pytest.mark.parametrize(
  'metadata,message',
  [
    ({'llama__expert_count': 8}, 'has llama.expert_count, which is not'),
    ({'llama__rope__scaling__factor': 2.0}, 'llama.rope.scaling.factor'),
    ({'llama__rope__dimension_count': 8}, 'dimension_count is 8, only the wh'),
  ],
)
def test_models_that_are_not_computed(metadata, message, model, tmp_path):
  cfg, _, tensors = model()
  _write(tmp_path / 'm.gguf', cfg, tensors, **metadata)
  with pytest.raises(ValueError, match=rf'm\.gguf: .*{message}'):
    hf.load_config(tmp_path / 'm.gguf')


def test_unknown_tensors(model, tmp_path):
  cfg, _, tensors = model()
  bias = np.zeros(4, np.float32)
  _write(tmp_path / 'a.gguf', cfg, tensors | {'blk.0.attn_q.bias': bias})
  with pytest.raises(ValueError, match=r'tensor blk\.0\.attn_q\.bias is of no'):
    hf.load(tmp_path / 'a.gguf')
  _write(tmp_path / 'b.gguf', cfg, tensors | {'rope_freqs.weight': bias})
  with pytest.raises(ValueError, match=r'has rope_freqs\.weight'):
    hf.load(tmp_path / 'b.gguf')
  tensors.pop('blk.1.ffn_up.weight')
  _write(tmp_path / 'c.gguf', cfg, tensors)
  with pytest.raises(ValueError, match=r'1\.mlp\.up_proj\.weight is mis'):
    hf.load(tmp_path / 'c.gguf')


def test_the_factors_of_llama_3_are_read(model, tmp_path):
  cfg, _, tensors = model()
  _write(tmp_path / 'a.gguf', cfg, tensors | {'rope_freqs.weight': np.ones(4, np.float32)})
  _write(tmp_path / 'b.gguf', cfg, tensors)
  assert hf.load_config(tmp_path / 'a.gguf') == hf.load_config(tmp_path / 'b.gguf')
  scaling = config.RopeScaling(32.0, 1.0, 4.0, 8192)
  exponent = np.arange(0, cfg.head_dim, 2) / cfg.head_dim
  frequency = cfg.rope_theta**-exponent
  factors = frequency / np.asarray(attention._scale_frequency(frequency, scaling))
  _write(tmp_path / 'c.gguf', cfg, tensors | {'rope_freqs.weight': np.float32(factors)})
  assert hf.load(tmp_path / 'c.gguf')[0].rope_scaling == scaling


def test_a_part_of_a_split_file_is_named(model, tmp_path):
  cfg, _, tensors = model()
  _write(tmp_path / 'm.gguf', cfg, tensors, **{'split__count': 2})
  with pytest.raises(ValueError, match=r'm\.gguf: is one of the 2 files of a split GGUF; merge'):
    hf.load(tmp_path / 'm.gguf')


def _header(num_tensors, num_values, values=b''):
  return b'GGUF' + struct.pack('<IQQ', 3, num_tensors, num_values) + values


_KEY = struct.pack('<Q', 1) + b'a'


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (_header(2**60, 0), 'too short for 1,152,921,504,606,846,976 tensors'),
    (_header(0, 2**40), 'too short'),
    (_header(0, 1, struct.pack('<Q', 2**62) + b'abc' * 9), 'ends within its metadata'),
    (_header(0, 1, _KEY + struct.pack('<IIQ', 9, 0, 2**40)), '1,099,511,627,776 items'),
    (_header(0, 1, _KEY + struct.pack('<IIQ', 9, 9, 1) * 9), 'holds lists'),
    (_header(0, 1, _KEY + struct.pack('<I', 99) + bytes(9)), 'the type 99'),
    (_header(0, 1, _KEY + struct.pack('<IIQ', 9, 8, 30) + bytes(99)), 'ends within'),
  ],
)
def test_what_a_header_counts_is_there(content, message, tmp_path):
  (tmp_path / 'm.gguf').write_bytes(content)
  with pytest.raises(ValueError, match=rf'm\.gguf: cannot be read as GGUF .*{message}'):
    hf.load(tmp_path / 'm.gguf')


def test_unsupported_type(model, tmp_path):
  cfg, _, tensors = model()
  _write(tmp_path / 'm.gguf', cfg, tensors, kind='MXFP4')
  with pytest.raises(ValueError, match=r'm\.gguf: .* as MXFP4, only F32'):
    hf.load(tmp_path / 'm.gguf')


def test_other_architecture(model, tmp_path):
  _, _, tensors = model()
  writer = package.GGUFWriter(tmp_path / 'm.gguf', 'mamba')
  writer.add_tensor('output_norm.weight', tensors['output_norm.weight'])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match="architecture is 'mamba', only llama"):
    hf.load_config(tmp_path / 'm.gguf')


def test_unknown_tokenizer(model, tmp_path):
  cfg, _, tensors = model()
  _write(tmp_path / 'm.gguf', cfg, tensors, pre='tekken')
  with pytest.raises(ValueError, match=r"ggml\.pre is 'tekken', only gpt-2"):
    gguf.tokenizer_files(tmp_path / 'm.gguf')


@pytest.mark.parametrize('keep', [0, 3, 500, -100])
def test_damaged_file(keep, model, tmp_path):
  cfg, _, tensors = model()
  path = tmp_path / 'm.gguf'
  _write(path, cfg, tensors)
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r'm\.gguf: cannot be read as GGUF'):
    hf.load(path)


def test_conversion_leaves_other_weights_alone(model, tmp_path):
  cfg, params, tensors = model()
  _write(tmp_path / 'm.gguf', cfg, tensors)
  hf.save(tmp_path / 'there', cfg, params, max_shard_bytes=20_000)
  with pytest.raises(ValueError, match='other weights are there already'):
    fetch_smollm2.convert(tmp_path / 'm.gguf', tmp_path / 'there')
  assert shards.INDEX_FILE in {p.name for p in (tmp_path / 'there').iterdir()}


@pytest.mark.parametrize('family', ['llama', 'llama3', 'mistral', 'qwen3'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_what_is_written_is_read(family, dtype, family_cfgs, make_params, tmp_path):
  cfg = dataclasses.replace(family_cfgs[family], vocab_size=64)
  params, path = make_params(cfg), tmp_path / 'model.gguf'
  (tmp_path / 'tokenizer.json').write_bytes(_tokenizer_json())
  fields = gguf.tokenizer_fields(
    tmp_path / 'tokenizer.json', {'bos': 1, 'eos': 0, 'pad': None}, cfg.vocab_size
  )
  hf.save_gguf(path, cfg, params, fields, dtype=dtype, description={'a': [1]})
  spec = hf.Source(path).spec
  assert spec['csrm_jax'] == {'a': [1]}
  loaded, again = hf.load(path)
  assert loaded.rope_scaling == cfg.rope_scaling
  # A window changes nothing up to its length, which is what the file promises.
  assert loaded.context_length == (7 if family == 'mistral' else cfg.context_length)
  kind = {'float16': np.float16}.get(dtype, jnp.dtype(dtype))

  def check(name, want, got):
    rounded = want if 'norm' in jax.tree_util.keystr(name) else np.asarray(want).astype(kind)
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), got)

  jax.tree_util.tree_map_with_path(check, params, again)


def test_tokenizers_come_back(tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_bytes(_tokenizer_json())
  fields = gguf.tokenizer_fields(path, {'bos': None, 'eos': 0, 'pad': None}, 110)
  assert fields['ggml.pre'] == 'smollm' and len(fields['ggml.tokens']) == 110
  assert fields['ggml.merges'] == MERGES and fields['ggml.token_type'][:3] == [3, 4, 1]
  spec = json.loads(_tokenizer_json())
  spec['pre_tokenizer'] = {'type': 'Whitespace'}
  path.write_text(json.dumps(spec))
  assert 'is not known here' in small.error_of(gguf.tokenizer_fields, path, {}, 110)


def test_gemma_is_not_written(family_cfgs, make_params, tmp_path):
  cfg = family_cfgs['gemma2']
  message = small.error_of(
    hf.save_gguf, tmp_path / 'a.gguf', cfg, make_params(cfg), {}, dtype='float32'
  )
  assert "'gemma2'" in message and not list(tmp_path.iterdir())


def _tokenizer_json():
  kinds = [3, 4] + [1] * (len(TOKENS) - 2)
  return json.dumps(gguf._tokenizer_json(TOKENS, MERGES, kinds, gguf._PRE['smollm'])).encode()
