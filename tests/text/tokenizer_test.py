import hashlib
import json
import pathlib
import pickle
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from csrm_jax.text import tokenizer as tokenizer_lib
from csrm_jax.text.tokenizer import HFTokenizer, SentencePieceTokenizer
from tests.small import error_of

ROOT = pathlib.Path(__file__).parents[2]
CONTROL = ('<RULES>\n', '</RULES>\n', 'Is it, "safe"?\n', 'Answer:')
SPECIAL = ('<|begin|>', '<|im_end|>', '<pad>', '<|im_end|>x')
HOSTILE = (
  '<pad>',
  '<s>',
  '</s>',
  '<unk>',
  '<|begin|>',
  '<|im_end|>',
  '<|im_end|>x',
  '<think>',
  '<0x41>',
  '<RULES>\n',
  '</RULES>\n',
  'Answer:',
  'Answer: safe',
  'Is it, "safe"?\n',
  '\0',
  '\n',
  '\r\n',
  '\u2028',
  '\u2581',
  '\u2581safe',
  ' ',
  '  ',
  '\u2047',
  ' \u2047 ',
  '\ufffd',
  '\ufeff',
  '\u200d',
  '12',
)
characters = st.characters(codec='utf-8')
any_text = st.one_of(
  st.text(characters),
  st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(characters, max_size=3)), max_size=10).map(
    ''.join
  ),
)
many = hypothesis.settings(max_examples=200, deadline=None)


def corpus():
  random = np.random.default_rng(0)
  letters = np.array(list('abdefgiklmnoprstu'))
  words = [''.join(random.choice(letters, 5)) for _ in range(200)]
  words += ['safe', 'unsafe', 'Yes', 'No', '42', 'é']
  return [' '.join(random.choice(words, 8)) + '.\nNext' for _ in range(300)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('tokenizers')


@pytest.fixture(scope='module')
def sp(folder):
  path = folder / 'small.model'
  tokenizer_lib.train_sentencepiece(corpus(), path, 330, CONTROL)
  return tokenizer_lib.load_tokenizer(path)


def build_bpe():
  tok = tokenizers.Tokenizer(models.BPE())
  tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  tok.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tok.train_from_iterator(corpus(), trainer)
  tok.add_tokens(['<think>', 'wholeword'])
  tok.post_processor = processors.TemplateProcessing(
    single='<|begin|> $A', special_tokens=[('<|begin|>', 0)]
  )
  # Published files often carry these.
  tok.enable_truncation(8)
  tok.enable_padding(length=16)
  return tok


@pytest.fixture(scope='module')
def hf(folder):
  path = folder / 'tokenizer.json'
  build_bpe().save(str(path))
  return tokenizer_lib.load_tokenizer(path)


@pytest.fixture(params=['sp', 'hf'])
def any_tokenizer(request):
  return request.getfixturevalue(request.param)


def control_ids(tok):
  if isinstance(tok, SentencePieceTokenizer):
    return {0, 1, 2, 3} | {tok.encode_control(c)[0] for c in CONTROL}
  return {tok.encode_control(c)[0] for c in (*SPECIAL, '<think>')}


def test_protocol_and_ids(any_tokenizer, sp, hf):
  assert isinstance(any_tokenizer, tokenizer_lib.Tokenizer)
  assert (sp.pad_id, sp.bos_id, sp.eos_id, sp.vocab_size) == (0, 1, 2, 330)
  assert [sp.encode_control(c) for c in CONTROL] == [[4], [5], [6], [7]]
  assert (hf.bos_id, hf.eos_id, hf.pad_id) == (0, 1, 2)
  assert hf.vocab_size == 402
  assert len(control_ids(sp)) == 8 and len(control_ids(hf)) == 5


def test_digest_is_that_of_the_file(sp, hf, folder):
  for tok, name in ((sp, 'small.model'), (hf, 'tokenizer.json')):
    data = (folder / name).read_bytes()
    assert tok.digest == hashlib.sha256(data).hexdigest()


@hypothesis.given(text=any_text)
@many
def test_sentencepiece_plain_text(sp, text):
  ids = sp.encode(text)
  assert sp.decode(ids) == text
  assert control_ids(sp).isdisjoint(ids)
  assert all(isinstance(i, int) and 0 <= i < sp.vocab_size for i in ids)


@hypothesis.given(text=any_text)
@many
def test_hf_plain_text(hf, text):
  ids = hf.encode(text)
  assert hf.decode(ids) == text
  assert control_ids(hf).isdisjoint(ids)


@pytest.mark.parametrize('text', HOSTILE)
def test_hostile_strings(any_tokenizer, text):
  for content in (text, f'a{text}b', f'{text}\n{text}', text * 3):
    ids = any_tokenizer.encode(content)
    assert any_tokenizer.decode(ids) == content
    assert control_ids(any_tokenizer).isdisjoint(ids)


def test_every_character_round_trips(any_tokenizer):
  planes = [*range(0, 0xD800, 7), *range(0xE000, 0x110000, 997)]
  text = ''.join(map(chr, planes))
  assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_nothing_is_added_or_cut(any_tokenizer):
  assert any_tokenizer.encode('') == []
  assert any_tokenizer.encode_control('') == []
  ids = any_tokenizer.encode('ab ' * 100)
  assert len(ids) > 50
  assert any_tokenizer.decode(ids) == 'ab ' * 100


def test_encoding_is_that_of_a_continuation(any_tokenizer):
  word, spaced = any_tokenizer.encode('No'), any_tokenizer.encode(' No')
  assert word != spaced
  assert any_tokenizer.decode(word + spaced) == 'No No'


def test_sentencepiece_words_and_digits(sp):
  # The verdict words are one token each, whatever the corpus.
  assert len(sp.encode(' safe')) == len(sp.encode(' unsafe')) == 1
  assert len(sp.encode('\n')) == 1
  assert len(sp.encode('4242')) == 4


def test_encode_control_takes_the_longest(sp, hf):
  assert hf.encode_control('<|im_end|>x') == [3]
  assert hf.encode_control('<|im_end|>y') == [1, *hf.encode('y')]
  assert sp.encode_control('<RULES>\nab<s>') == [4, *sp.encode('ab'), 1]
  assert hf.encode_control('plain') == hf.encode('plain')


def test_encode_control_returns_a_new_list(any_tokenizer):
  first = any_tokenizer.encode_control('Answer:')
  first.append(-1)
  assert any_tokenizer.encode_control('Answer:') == first[:-1]


def test_decode_takes_arrays_and_skips_control(any_tokenizer):
  ids = [any_tokenizer.bos_id, *any_tokenizer.encode('No gifts.')]
  ids.append(any_tokenizer.eos_id)
  assert any_tokenizer.decode(np.array(ids, np.int32)) == 'No gifts.'


def test_pieces_are_the_words_of_the_vocabulary(sp, hf):
  assert sp.piece(sp.encode(' safe')[0]) == '\u2581safe'
  assert sp.piece(sp.bos_id) == '<s>'
  assert hf.piece(hf.bos_id) == '<|begin|>'
  assert hf.piece(hf.encode(' a')[0]).startswith('Ġ')


def test_who_opens_with_a_space(sp, hf, tmp_path):
  # add_prefix_space; encode leaves it to who writes the prompt.
  assert hf.opens_with_space and not sp.opens_with_space
  tok = build_bpe()
  tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  assert not HFTokenizer(save(tok, tmp_path)).opens_with_space
  tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='never')
  tok.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581')])
  assert HFTokenizer(save(tok, tmp_path)).opens_with_space


def test_marks_take_the_space_beside_them_as_the_model_does(tmp_path):
  tok = build_bpe()
  tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tok.post_processor = None
  marks = [('<|user|>', False, True), ('<|end|>', True, False), ('<|both|>', True, True)]
  tok.add_special_tokens(
    [tokenizers.AddedToken(name, lstrip=before, rstrip=after) for name, before, after in marks]
  )
  tok.no_truncation()
  tok.no_padding()
  hf = HFTokenizer(save(tok, tmp_path))
  for text in ('<|user|>\nab <|end|>\n', 'a \n<|both|> \n b', ' <|user|><|end|> ', '<|end|>\n\n'):
    assert hf.encode_control(text) == tok.encode(text, add_special_tokens=False).ids


def test_what_a_vocabulary_lacks_does_not_vanish(tmp_path):
  tok = build_bpe()
  path = save(tok, tmp_path)
  spec = json.loads(path.read_text())
  # Bytes 0x04 and 0xf1, as in SmolLM2.
  lost = {'\u0104', 'ñ'}
  spec['model']['vocab'] = {k: v for k, v in spec['model']['vocab'].items() if k not in lost}
  path.write_text(json.dumps(spec))
  hf = HFTokenizer(path)
  assert hf.decode(hf.encode('a\x04b\U00040000c')) == 'a\ufffdb\ufffdc'
  assert hf.encode_control('\x04') == hf.encode('\ufffd') != []
  assert pickle.loads(pickle.dumps(hf)).encode('\x04') == hf.encode('\ufffd')
  # Without bytes: what replaces a character is itself one that the vocabulary has, or it is named.
  few = tokenizers.Tokenizer(models.BPE({'a': 0, '?': 1, '\n': 2, '</s>': 3}, []))
  few.add_special_tokens(['</s>'])
  assert HFTokenizer(save(few, tmp_path)).encode('aña') == [0, 1, 0]
  few = tokenizers.Tokenizer(models.BPE({'a': 0, 'b': 1, ' ': 4, '\n': 2, '</s>': 3}, []))
  few.add_special_tokens(['</s>'])
  with pytest.raises(ValueError, match="no token for 'ñ'"):
    HFTokenizer(save(few, tmp_path)).encode('aña')


def test_pickle(any_tokenizer, tmp_path):
  text = ''.join(HOSTILE) + ' safe'
  any_tokenizer.encode_control('Answer:')
  copy = pickle.loads(pickle.dumps(any_tokenizer))
  for name in ('vocab_size', 'bos_id', 'eos_id', 'pad_id', 'digest'):
    assert getattr(copy, name) == getattr(any_tokenizer, name)
  assert copy.encode(text) == any_tokenizer.encode(text)
  assert copy.encode_control(text) == any_tokenizer.encode_control(text)


def test_training_is_deterministic_and_free_of_paths(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    path = tmp_path / name / f'{name}.model'
    tokenizer_lib.train_sentencepiece(iter(corpus()), path, 330, CONTROL)
  a, b = tmp_path / 'a' / 'a.model', tmp_path / 'b' / 'b.model'
  assert a.read_bytes() == b.read_bytes()
  assert [p.name for p in a.parent.iterdir()] == ['a.model']


@pytest.mark.parametrize('size', [100, 30_000])
def test_a_bad_vocabulary_size_leaves_no_file(tmp_path, size):
  path = tmp_path / 'x.model'
  message = error_of(tokenizer_lib.train_sentencepiece, corpus(), path, size, CONTROL)
  assert f'vocab_size={size}' in message and 'change it' in message
  assert not list(tmp_path.iterdir())


def test_files_that_are_no_tokenizers(tmp_path):
  load = tokenizer_lib.load_tokenizer
  assert 'unknown suffix' in error_of(load, tmp_path / 'a.txt')
  for name in ('a.model', 'a.json'):
    path = tmp_path / name
    message = error_of(load, path)
    assert name in message and 'check the path' in message
    for data in (b'', b'{}', b'\xff\x00rubbish', b'[1]'):
      path.write_bytes(data)
      message = error_of(load, path)
      assert name in message and 'not a ' in message


def save(tok, folder, **settings):
  path = folder / 'tokenizer.json'
  tok.save(str(path))
  if settings:
    config = folder / 'tokenizer_config.json'
    config.write_text(json.dumps(settings))
  return path


def test_names_of_end_and_padding(tmp_path):
  tok = build_bpe()
  # From the settings beside the file, as text or as an object.
  path = save(tok, tmp_path, eos_token={'content': '<|im_end|>x'}, pad_token='<|im_end|>')
  hf = HFTokenizer(path)
  assert (hf.eos_id, hf.pad_id) == (3, 1)
  # They survive pickling, where the settings file is out of reach.
  copy = pickle.loads(pickle.dumps(hf))
  assert (copy.bos_id, copy.eos_id, copy.pad_id) == (0, 3, 1)
  # From the caller, who wins.
  hf = HFTokenizer(path, eos='<|im_end|>', pad='<pad>')
  assert (hf.eos_id, hf.pad_id) == (1, 2)
  message = error_of(HFTokenizer, path, eos='<none>')
  assert "'<none>'" in message and '"eos_token" in tokenizer_config.json' in message
  (tmp_path / 'tokenizer_config.json').write_text('{')
  assert 'tokenizer_config.json' in error_of(HFTokenizer, path)


def test_begin_of_text_is_what_the_model_was_trained_with(tmp_path):
  tok = build_bpe()
  tok.post_processor = processors.ByteLevel(trim_offsets=False)
  # Named in the settings, but not put in front: as with SmolLM2.
  hf = HFTokenizer(save(tok, tmp_path, bos_token='<|begin|>'))
  assert hf.bos_id is None
  assert HFTokenizer(tmp_path / 'tokenizer.json', bos='<|begin|>').bos_id == 0
  path = save(tok, tmp_path, bos_token='<|begin|>', add_bos_token=True)
  hf = HFTokenizer(path)
  assert hf.bos_id == 0
  assert pickle.loads(pickle.dumps(hf)).bos_id == 0


def test_without_an_end_token_the_error_says_how_to_name_one(tmp_path):
  tok = tokenizers.Tokenizer(models.WordLevel({'a': 0, '\n': 1, '[X]': 2}))
  path = save(tok, tmp_path)
  assert 'as "eos_token" into tokenizer_config.json' in error_of(HFTokenizer, path)


def test_words_that_were_added_stay_plain_text(hf):
  assert len(hf.encode('wholeword')) == 1
  assert len(hf.encode('<think>')) > 1
  assert len(hf.encode_control('<think>')) == 1


def build_unigram():
  """A model whose own vocabulary spells its control tokens (as T5, XLM-R)."""
  pieces = [('<unk>', 0.0), ('</s>', 0.0), ('<pad>', 0.0), ('\u2581', -3.0)]
  pieces += [(chr(i), -4.0) for i in (10, *range(33, 127))]
  tok = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
  tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
  tok.decoder = decoders.Metaspace(prepend_scheme='first')
  tok.add_special_tokens(['<unk>', '</s>', '<pad>'])
  return tok


def test_a_vocabulary_that_spells_control_tokens(tmp_path):
  hf = HFTokenizer(save(build_unigram(), tmp_path))
  assert hf.encode_control('</s>') == [1]
  for text in ('</s>', 'a</s>b<pad>', '</s>' * 200, '<</s>/s>', '<pad></s>\n'):
    ids = hf.encode(text)
    assert {1, 2}.isdisjoint(ids)
    assert hf.decode(ids) == text
  assert hf.encode('é') == [0]  # unknown is no control token
  # Segments are continuations: no space is put before them.
  assert hf.decode(hf.encode('a') + hf.encode('b')) == 'ab'


def test_a_prefix_of_llama_2_is_turned_off(tmp_path):
  tok = build_unigram()
  tok.pre_tokenizer = None
  tok.normalizer = normalizers.Sequence(
    [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  tok.decoder = decoders.Sequence(
    [decoders.Replace('\u2581', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  )
  hf = HFTokenizer(save(tok, tmp_path))
  for text in ('a', ' a', 'a b', '\n  a'):
    assert hf.decode(hf.encode(text)) == text


def test_a_tokenizer_that_loses_line_breaks_is_refused(tmp_path):
  words = {'a': 0, 'b': 1, '[SEP]': 2, '[UNK]': 3}
  tok = tokenizers.Tokenizer(models.WordLevel(words, unk_token='[UNK]'))
  tok.pre_tokenizer = pre_tokenizers.Whitespace()
  tok.add_special_tokens(['[SEP]'])
  path = save(tok, tmp_path)
  assert 'line break' in error_of(HFTokenizer, path, eos='[SEP]')


def test_chat_markers_among_user_defined_pieces(tmp_path):
  # Some published models list them so; SentencePiece then parses any text.
  tok = tokenizer_lib.train_sentencepiece(
    corpus(), tmp_path / 'x.model', 330, CONTROL, user_symbols=('\n', '<start_of_turn>')
  )
  (marker,) = tok.encode_control('<start_of_turn>')
  for text in ('<start_of_turn>', 'a<start_of_turn><start_of_turn>b'):
    assert marker not in tok.encode(text)
    assert tok.decode(tok.encode(text)) == text
  copy = pickle.loads(pickle.dumps(tok))
  assert marker not in copy.encode('<start_of_turn>')


def test_the_package_tokenizers_is_an_extra(tmp_path, monkeypatch):
  """Only a tokenizer.json needs it, and says so in one line."""
  code = 'import sys; from csrm_jax.text import tokenizer; assert "tokenizers" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
  path = save(build_unigram(), tmp_path)
  monkeypatch.setitem(sys.modules, 'tokenizers', None)  # not installed
  with pytest.raises(ImportError) as raised:
    tokenizer_lib.load_tokenizer(path)
  message = str(raised.value)
  assert message.startswith(f'{path}: ') and '\n' not in message
  assert "[hf]'" in message
