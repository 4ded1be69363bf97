"""Every reader against damaged and hostile files: a value or one line, soon, and in little memory.

$CSRM_CHAOS_FILES is how many files each reader gets (15; slow: 500).
"""

import json
import os
import pathlib
import resource
import struct
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy

from csrm_jax import config as config_lib
from csrm_jax.core import checkpoint, client, files, journal, writer
from csrm_jax.data import forms, tables
from csrm_jax.evals import report
from csrm_jax.models import config as model_config, gguf, hf, lora, transformer
from csrm_jax.safety import schema
from csrm_jax.text import chat, tokenizer
from csrm_jax.train import loop
from tests import small

NUM = os.environ.get('CSRM_CHAOS_FILES')
SECONDS, BYTES = 5.0, 1 << 29
ROW = {
  'id': '1',
  'safety': {'categories': [{'name': 'Cats', 'guideline': 'No cats.'}]},
  'conversation': [{'role': 'user', 'content': 'Hi.'}, {'role': 'agent', 'content': 'Cats!'}],
  'label': 'unsafe',
  'violated': ['Cats'],
}
LINES = ''.join(json.dumps(ROW | {'id': str(i)}) + '\n' for i in range(4))
CONFIG = model_config.ModelConfig(
  *(64, 1, 16, 2, 1, 8, 16), context_length=64, rope_scaling=model_config.RopeScaling(8, 1, 4, 64)
)
# What breaks readers: numbers, names and brackets of other kinds, more of the same, endless things.
TOKENS = [
  *(b'null', b'NaN', b'Infinity', b'-1', b'1e999', b'true', b'"x"', b'[]', b'{}', b'{', b'[', b']'),
  *(
    b'"',
    b"'",
    b':',
    b',',
    b'\n',
    b'\r',
    b'\t',
    b'\0',
    b'\xff\xfe',
    b'\xef\xbb\xbf',
    b'\xe2\x80\xa8',
  ),
  *(b'*a', b'&a ', b'!!python/object:os.system ', b'<<: ', b'---\n', b'# ', b'- '),
  *(b'9' * 5000, b'[' * 5000, b'{"a":' * 2000, b'../' * 9, b'/dev/zero', b'\\ud800'),
  *(struct.pack('<Q', n) for n in (0, 1, 2**31, 2**40, 2**62, 2**64 - 1)),
]


def _hf_folder(folder: pathlib.Path) -> None:
  hf.save(folder, CONFIG, transformer.init_params(CONFIG, 0))


def _tokenizer_json() -> bytes:
  vocab = {name: i for i, name in enumerate(sorted(tokenizer._BYTE_LEVEL.values()))}
  added = {'id': 256, 'content': '</s>', 'special': True, 'single_word': False}
  added |= {'lstrip': False, 'rstrip': False, 'normalized': False}
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
  spec = {'version': '1.0', 'added_tokens': [added], 'pre_tokenizer': level, 'decoder': level}
  spec |= {'model': {'type': 'BPE', 'vocab': vocab, 'merges': []}}
  return json.dumps(spec, ensure_ascii=False).encode()


def _gguf(folder: pathlib.Path) -> bytes:
  package = pytest.importorskip('gguf')
  out = package.GGUFWriter(folder / 'seed.gguf', 'llama')
  for name in ('block_count', 'context_length', 'embedding_length', 'feed_forward_length'):
    getattr(out, f'add_{name}')(8)
  out.add_head_count(2)
  out.add_layer_norm_rms_eps(1e-5)
  out.add_token_list(['a', 'b'])
  out.add_tensor('token_embd.weight', np.zeros((16, 8), np.float32))
  out.write_header_to_file()
  out.write_kv_data_to_file()
  out.write_tensors_to_file()
  out.close()
  return (folder / 'seed.gguf').read_bytes()


def _weights(folder: pathlib.Path) -> bytes:
  arrays = {'a.b': np.ones((3, 4), np.float32), 'c': np.ones(5, np.float16)}
  return safetensors.numpy.save(arrays)


def _read_metrics(path):
  files.cut_log(path, 3)
  return report.read_history(path), loop.elapsed_s(path.parent)


def _read_journal(path):
  with journal.Journal(path) as found:
    return len(found)


def _read_model_config(path):
  return hf.load_config(path.parent)


def _read_run(path):
  (path.parent / 'metrics.jsonl').write_text('')
  return config_lib.prepare_workdir(path.parent, config_lib.ConfigDict({'a': 1}))


def _read_reply(path):
  return client.Client('http://localhost').parse(path.read_bytes(), 'row 1')


def _read_checkpoint(path):
  folder = path.parent / 'checkpoints' / '1'
  (folder / 'info').mkdir(parents=True, exist_ok=True)
  (folder / '_CHECKPOINT_METADATA').write_text('{}')
  (folder / 'info' / 'metadata').write_bytes(path.read_bytes())
  return checkpoint.describe(path.parent / 'checkpoints')


def _journal_lines() -> bytes:
  content = json.dumps({'key': 'k', 'value': '0110'})[:-1].encode()
  return content + journal._BEFORE_CHECKSUM + journal._checksum(content).encode() + b'"}\n'


RULES = {'name': 'n', 'categories': ROW['safety']['categories']}
PEFT = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'target_modules': ['q_proj'], 'bias': 'none'}
INFO = {'content': {'data_state': {}, 'meta': {}, 'leaves': {}}, 'digest': ''}
# file name -> (reader, a good file)
READERS = {
  'rules.yaml': (
    schema.load_safety,
    b'name: n\ncategories:\n- name: Cats\n  guideline: No cats.\n',
  ),
  'rules.json': (schema.load_safety, json.dumps(RULES).encode()),
  'rules.md': (schema.load_safety, b'# Rules\n\n## Cats\n\nNo cats.\n\n## Dogs\n\n- No dogs.\n'),
  'rows.jsonl': (forms.read, LINES.encode()),
  'rows.json': (forms.read, json.dumps([ROW]).encode()),
  'rows.csv': (
    lambda path: forms.read(path, schema.parse_safety(RULES, 'rules')),
    b'id,prompt,response,label\n1,Hi,"No, not",safe\n2,Ho,"a\nb",unsafe\n',
  ),
  'table.csv': (lambda path: list(tables.read_table(path)), b'a;b\n1;"x"\n2;y\n'),
  'config.json': (_read_model_config, _hf_folder),
  'adapter_config.json': (lambda path: lora.read_peft(path.parent), json.dumps(PEFT).encode()),
  'model.gguf': (gguf.read_config, _gguf),
  'model.safetensors': (lambda path: hf.Source(path.parent).tensors, _weights),
  'model.safetensors.index.json': (
    lambda path: hf.Source(path.parent).tensors,
    b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
  ),
  'tokenizer.json': (tokenizer.load_tokenizer, lambda folder: _tokenizer_json()),
  'tokenizer.model': (tokenizer.load_tokenizer, lambda folder: small.TOKENIZER_FILE.read_bytes()),
  'tokenizer_config.json': (
    lambda path: chat.read(path.parent),
    b'{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "x"}',
  ),
  'metrics.jsonl': (_read_metrics, b'{"step": 1, "time/elapsed_s": 2.5}\n{"step": 2, "a": 1}\n'),
  'journal.jsonl': (_read_journal, lambda folder: _journal_lines() * 3),
  'manifest.json': (
    lambda path: writer.add_start(path.parent, {}),
    b'{"packages": {}, "starts": [{"packages": {}}]}',
  ),
  'run/config.json': (_read_run, b'{"a": 1}'),
  'calibration.json': (lambda path: files.read_json(path, dict), b'{"temperature": 1.0}'),
  'reply': (_read_reply, b'{"rewards": [0.5, 1.0]}'),
  'info': (_read_checkpoint, json.dumps(INFO).encode()),
}


@st.composite
def damage(draw, good: bytes) -> bytes:
  """Draws what becomes of a file: cuts, changed bytes, and parts in other places."""
  data = bytearray(good)
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, len(data)))
    end = draw(st.integers(at, min(len(data), at + 40)))
    kind = draw(st.sampled_from(('put', 'replace', 'flip', 'cut', 'double')))
    if kind == 'cut':
      del data[at:]
    elif kind == 'double':
      data[at:at] = data[at:end] * draw(st.integers(1, 50))
    elif kind == 'flip' and at < len(data):
      data[at] ^= 1 << draw(st.integers(0, 7))
    else:
      put = draw(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8)))
      data[at : end if kind == 'replace' else at] = put
  return bytes(data)


def _check(name, folder, num):
  read, good = READERS[name]
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  if callable(good):
    made = good(path.parent)
    good = path.read_bytes() if made is None else made

  @hypothesis.given(damage(good))
  @hypothesis.settings(
    max_examples=num,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  def check(data):
    path.write_bytes(data)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
      read(path)
    except (ValueError, OSError, ImportError) as error:
      said = str(error)
      assert '\n' not in said and len(said) < 2000, said
      assert name in ('reply', 'info') or str(path.parent) in said or path.name in said, said
    assert time.process_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BYTES >> 10

  check()


@pytest.mark.parametrize('name', READERS)
def test_damaged_files_are_read_or_one_line(name, tmp_path):
  _check(name, tmp_path, int(NUM or 15))


@pytest.mark.slow
@pytest.mark.parametrize('name', READERS)
def test_many_damaged_files_are_read_or_one_line(name, tmp_path):
  _check(name, tmp_path, int(NUM or 500))
