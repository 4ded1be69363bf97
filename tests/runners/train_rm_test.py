"""What a reward-model run asks of its base weights before the first step."""

import json
import pathlib

import pytest
import tokenizers
from tokenizers import models as bpe, pre_tokenizers, trainers

import csrm_jax
from csrm_jax import config as config_lib
from csrm_jax.models import config as model_config, hf, hf_config, shards, transformer
from csrm_jax.runners import train_rm

ROOT = pathlib.Path(__file__).parents[2]
MARKS = ('<bos>', '<eos>', '<turn>', '<end>')
TEMPLATE = (
  '{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}'
  '{% if add_generation_prompt %}<turn>model\n{% endif %}'
)


class Stop(Exception):
  """The first step would come next."""


@pytest.fixture
def folder(tmp_path):
  """Returns a small random Llama with a chat template."""
  cfg = model_config.ModelConfig(
    vocab_size=320,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    context_length=8192,
  )
  hf.save(tmp_path / 'base', cfg, transformer.init_params(cfg, 0))
  tokenizer = tokenizers.Tokenizer(bpe.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.train_from_iterator(
    ['Yes', 'No'] * 9,
    trainers.BpeTrainer(
      vocab_size=300,
      show_progress=False,
      special_tokens=list(MARKS),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  tokenizer.save(str(tmp_path / 'base' / 'tokenizer.json'))
  settings = {'bos_token': '<bos>', 'eos_token': '<eos>', 'chat_template': TEMPLATE}
  (tmp_path / 'base' / 'tokenizer_config.json').write_text(json.dumps(settings))
  return tmp_path / 'base'


@pytest.fixture
def calls(folder, monkeypatch):
  """Returns the names of what is asked, in order; the hub has folder as org/name."""
  hub = pytest.importorskip('huggingface_hub')
  calls = []

  def count(module, name):
    function = getattr(module, name)
    monkeypatch.setattr(
      module, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)
    )

  monkeypatch.setattr(hub, 'snapshot_download', lambda name, **kwargs: str(folder))
  count(hub, 'snapshot_download')
  count(hf_config, 'read')
  count(shards, 'open_folder')
  count(shards, 'digest')
  return calls


def _start(lora, tmp_path, monkeypatch):
  """Runs configs/rm.py until the first step."""
  config = config_lib.load_module(ROOT / 'configs' / 'rm.py').get_config(
    f'model=smollm2_135m,init=org/name,lora={lora},smoke=True'
  )
  config.data.max_length = config.data.row_length = 4096  # a token a byte
  config.data.batch_size = 1
  config.eval.zero_shot, config.eval.ruleworld_examples = False, 2
  seen = []

  def make_step(config, model, verbalizers, params, mesh):
    seen.append((model, params))
    raise Stop

  monkeypatch.setattr(train_rm, 'make_step', make_step)
  (tmp_path / 'run').mkdir()
  with pytest.raises(Stop):
    train_rm.run(config, tmp_path / 'run')
  return seen[0]


def test_a_lora_run_looks_for_its_base_once_and_hashes_it_once(
  folder, calls, tmp_path, monkeypatch
):
  model, params = _start(2, tmp_path, monkeypatch)
  assert model.lora_rank == 2 and 'embed' not in params
  assert sorted(calls) == ['digest', 'open_folder', 'read', 'snapshot_download']
  assert (tmp_path / 'run' / 'tokenizer.json').read_bytes() == (
    folder / 'tokenizer.json'
  ).read_bytes()


def test_a_run_of_all_weights_hashes_them_once(calls, tmp_path, monkeypatch):
  _, params = _start(0, tmp_path, monkeypatch)
  assert 'embed' in params
  assert sorted(calls) == ['digest', 'open_folder', 'read', 'snapshot_download']


def test_labels_that_change_are_an_input_that_changes(tmp_path, monkeypatch):
  path = tmp_path / 'rows.jsonl'
  row = {
    'safety': {'categories': [{'name': 'Gifts', 'guideline': 'Nobody gives anything.'}]},
    'conversation': [{'role': 'agent', 'content': 'Take this.'}],
  }
  config = config_lib.load_module(ROOT / 'configs' / 'rm.py').get_config(
    f'data=jsonl,path={path},smoke'
  )

  def train(*args, inputs: dict, **unused):
    seen.append(inputs)
    raise Stop

  seen = []
  monkeypatch.setattr(train_rm.loop_lib, 'train', train)
  for label in ('safe', 'safe', 'unsafe'):
    rows = [{'id': str(i), 'label': label} | row for i in range(8)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    with pytest.raises(Stop):
      train_rm.run(config, tmp_path)
  same, again, changed = seen
  assert same == again
  assert {name for name in same if same[name] != changed[name]} == {f'data {path}'}
  assert any(name.startswith('weights ') for name in same)


def test_a_public_model_is_looked_for_once(calls):
  rm = csrm_jax.load('org/name', words=('Yes', 'No'))
  assert rm.spec.layout.chat_prefix.endswith('<turn>user\n')
  assert sorted(calls) == ['open_folder', 'read', 'snapshot_download']
