"""What --show_tokens prints."""

import json
import pathlib
import re

import csrm_jax
from csrm_jax import config as config_lib, main
from csrm_jax.data import features
from csrm_jax.ruleworld import examples
from csrm_jax.runners import show_tokens
from csrm_jax.safety import templates
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig
from csrm_jax.text import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[2]
PATH = pathlib.Path(csrm_jax.__file__).parent / 'ruleworld' / 'tokenizer.model'
TOKENIZER = tokenizer_lib.load_tokenizer(PATH)
EXAMPLE = Example(
  'row 7',
  SafetyConfig((Category('Pets', 'No talk of pets.'),)),
  (Message('user', 'Hello. ' * 60), Message('agent', 'Good\nday.')),
  'safe',
)


def _ids(out):
  return [int(i) for i in re.findall(r"['\"]:(\d+)", out)]


def test_segments_and_their_tokens(capsys):
  encoder = features.Encoder(TOKENIZER, 1000)
  show_tokens.show(EXAMPLE, encoder)
  out = capsys.readouterr().out
  tokens = features.encode(EXAMPLE, encoder).prompts[0].tokens
  assert out.startswith(f'example row 7: {len(tokens)} tokens of at most 1000;')
  assert _ids(out) == tokens.tolist()
  lines = out.splitlines()
  assert "rules    'S1: Pets. No talk of pets.\\n'" in lines
  assert "response 'Agent: Good\\n  day.\\n'" in lines
  assert f'control  {templates.ANSWER!r}' in lines
  assert lines[2].startswith("  '<s>':1 ")  # the one begin of text
  assert 'cut to' not in out


def test_what_was_cut_is_said(capsys):
  encoder = features.Encoder(TOKENIZER, 120)
  show_tokens.show(EXAMPLE, encoder)
  out = capsys.readouterr().out
  tokens = features.encode(EXAMPLE, encoder).prompts[0].tokens
  assert _ids(out) == tokens.tolist() and len(tokens) == 120
  (line,) = [line for line in out.splitlines() if 'cut to' in line]
  assert line.startswith("history  'User: Hello")
  assert re.search(r' \[cut to \d+ of \d+ tokens\]$', line)


def test_the_first_item_of_training(capsys):
  config = config_lib.load_module(ROOT / 'configs' / 'rm.py').get_config()
  main.show_tokens(config)
  first = capsys.readouterr().out
  assert first.count('control  ') % len(templates.CONTROL_LINES) == 0
  main.show_tokens(config)
  assert capsys.readouterr().out == first


def test_the_first_row_of_a_file(capsys, tmp_path):
  """With a public model, no weight is read."""
  import tokenizers
  from tokenizers import models, pre_tokenizers, trainers

  tok = tokenizers.Tokenizer(models.BPE())
  tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tok.train_from_iterator(
    ['Yes', 'No'] * 9,
    trainers.BpeTrainer(
      vocab_size=300,
      show_progress=False,
      special_tokens=['<eos>', '<start_of_turn>', '<end_of_turn>'],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  folder = tmp_path / 'guard'
  folder.mkdir()
  tok.save(str(folder / 'tokenizer.json'))
  base = PATH.parent / 'base' / 'config.json'
  (folder / 'config.json').write_text(base.read_text())
  row = examples.test_example(0, 0, 'seen').to_dict()
  (tmp_path / 'rows.jsonl').write_text(json.dumps(row) + '\n')
  config = config_lib.load_module(ROOT / 'configs' / 'eval.py').get_config()
  config.checkpoint, config.format = str(folder), 'shield_gemma'
  config.conversations = str(tmp_path / 'rows.jsonl')
  main.show_tokens(config)
  out = capsys.readouterr().out
  name = row['safety']['categories'][0]['name']
  assert out.startswith(f'example {row["id"]} ({name}): ')
  assert out.count("'<start_of_turn>':1 ") == len(row['conversation'])
  assert len(re.findall(r'^rules ', out, re.MULTILINE)) == 1
