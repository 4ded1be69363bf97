"""Texts that try to forge the marks of a prompt, for tokenizers of every family.

$CSRM_CHAOS_TEXTS is how many each family gets (10,000).
"""

import json
import os
import random
import time
import unicodedata

import pytest

from csrm_jax.text import tokenizer as tokenizer_lib
from tests import small

tokenizers = pytest.importorskip('tokenizers')
from tokenizers import (  # noqa: E402
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)  # fmt: skip

NUM = int(os.environ.get('CSRM_CHAOS_TEXTS', 10_000))
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# family -> (special tokens, the first of which begins a text; added ones that are not special)
MARKS = {
  'llama3': (
    ('<|begin_of_text|>', '<|eot_id|>', '<|start_header_id|>', '<|end_header_id|>'),
    ('<|reserved_special_token_0|>',),
  ),
  'qwen3': (
    ('<|endoftext|>', '<|im_end|>', '<|im_start|>'),
    ('<think>', '</think>', '<tool_call>'),
  ),
  'gemma2': (('<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'), ('<unused0>', '[toxicity=0]')),
  'mistral': (('<s>', '</s>', '[INST]', '[/INST]'), ('[AVAILABLE_TOOLS]',)),
}
PIECES = [
  *(mark for special, added in MARKS.values() for mark in (*special, *added)),
  *(
    '<RULES>\n',
    '</RULES>\n',
    'Answer:',
    ' safe',
    ' unsafe',
    'Is it, "safe"?\n',
    '<0x41>',
    '<unk>',
  ),
  *('<|', '|>', '<', '>', '[', ']', '/', '|im_start|', 'im_end', '<|im_<|im_end|>end|>'),
  *('\n', '\r\n', '\t', ' ', '  ', '\0', '\x04', '\x1b', '\x85', '\u2028', '\u2029', '\u2581', 'Ġ'),
  *('\u200b', '\u200d', '\u2060', '\ufeff', '\u202e', '\u00ad', '\u0301', '\ufe0f', '\u115f'),
  *(
    'é',
    'e\u0301',
    'ﬁ',
    'Ａ',
    '中',
    '文',
    '🙂',
    '👩‍👧',
    '\U000e0041',
    '\U00040000',
    '\U0010ffff',
    '\ufffd',
  ),
  *('a', 'ab', 'the', 'Cats', '12', '4242', "'s", '…', '𝐬𝐚𝐟𝐞'),
]


def _byte_level(name):
  tok = tokenizers.Tokenizer(models.BPE())
  level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), 'isolated')
  tok.pre_tokenizer = pre_tokenizers.Sequence([split, level])
  tok.decoder = decoders.ByteLevel()
  if name == 'qwen3':
    tok.normalizer = normalizers.NFC()
  tok.train_from_iterator(
    PIECES * 4,
    trainers.BpeTrainer(
      vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    ),
  )
  return tok


def _byte_fallback(name):
  vocab = {f'<0x{byte:02X}>': byte for byte in range(256)}
  for piece in ('\u2581', *'abcdefghijklmnoprstuw<>|[]/"?:,', 'th', 'the'):
    vocab[piece] = len(vocab)
  model = models.BPE(vocab, [('t', 'h'), ('th', 'e')], byte_fallback=True, fuse_unk=True)
  tok = tokenizers.Tokenizer(model)
  steps = [normalizers.Replace(' ', '\u2581')]
  if name == 'mistral':
    steps.insert(0, normalizers.Prepend('\u2581'))
  tok.normalizer = normalizers.Sequence(steps)
  tok.decoder = decoders.Sequence(
    [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  return tok


def _load(name, folder):
  """Returns the tokenizer of a family, and the ids of its marks."""
  if name == 'sentencepiece':
    tok = small.TOKENIZER
    return tok, {i for i in range(tok.vocab_size) if tok._sp.is_control(i)}
  tok = (_byte_level if name in ('llama3', 'qwen3') else _byte_fallback)(name)
  special, added = MARKS[name]
  tok.add_special_tokens(list(special))
  tok.add_tokens(list(added))
  begin = (special[0], tok.token_to_id(special[0]))
  tok.post_processor = processors.TemplateProcessing(
    single=f'{special[0]} $A', special_tokens=[begin]
  )
  path = folder / 'tokenizer.json'
  tok.save(str(path))
  (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': special[1]}))
  marks = {tok.token_to_id(mark) for mark in (*special, *added) if mark != '[toxicity=0]'}
  return tokenizer_lib.load_tokenizer(path), marks


def _check(name, folder, num):
  tok, marks = _load(name, folder)
  rng = random.Random(name)
  assert all(tok.encode_control(tok.piece(mark)) == [mark] for mark in marks)
  for _ in range(num):
    text = ''.join(rng.choices(PIECES, k=rng.randint(1, 12)))
    ids = tok.encode(text)
    assert marks.isdisjoint(ids), repr(text)
    same = {'qwen3': lambda t: unicodedata.normalize('NFC', t)}.get(name, str)
    if name in ('gemma2', 'mistral'):  # these write a space and this mark in one way
      same = lambda t: t.replace('\u2581', ' ')  # noqa: E731
    assert same(tok.decode(ids)) == same(text), repr(text)


FAMILIES = (*MARKS, 'sentencepiece')


@pytest.mark.parametrize('name', FAMILIES)
def test_no_text_forges_a_mark_or_vanishes(name, tmp_path):
  _check(name, tmp_path, NUM)


# A hundred thousand characters of one kind.
LONG = [mark * (100_000 // len(mark)) for mark in (' ', '\n', 'a', '7', '\u200b', '<|im_end|>')]


@pytest.mark.parametrize('name', FAMILIES)
def test_a_long_text_of_one_kind_takes_seconds_at_most(name, tmp_path):
  tok, marks = _load(name, tmp_path)
  for text in LONG:
    began = time.process_time()
    ids = tok.encode(text)
    assert time.process_time() - began < 5, repr(text[:10])
    assert marks.isdisjoint(ids)
    assert tok.decode(ids) == text or name in ('gemma2', 'mistral')


@pytest.mark.parametrize('name', [*MARKS])
def test_blocks_of_a_long_text_give_its_tokens(name, tmp_path):
  tok, _ = _load(name, tmp_path)
  text = ' '.join(random.Random(0).choices(('the', 'Cats', "it's", '4242', 'é', 'a\nb'), k=40_000))
  assert len(text) > 2 * tokenizer_lib._BLOCK
  assert tok.encode(text) == tok._tok.encode(text, add_special_tokens=False).ids
