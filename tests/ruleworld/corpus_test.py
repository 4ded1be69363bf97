"""The pretraining corpus."""

import pathlib

import hypothesis
from hypothesis import strategies as st

import csrm_jax
from csrm_jax.ruleworld import corpus, lexicon
from csrm_jax.text import tokenizer as tokenizer_lib

PACKAGE = pathlib.Path(csrm_jax.__file__).parent
progresses = st.floats(0, 1)


def text_of(document):
  return ''.join(span.text for span in document)


@hypothesis.given(st.integers(0, 10_000), progresses)
def test_no_document_holds_a_verdict(index, progress):
  text = text_of(corpus.document(0, index, progress)).lower()
  assert 'safe' not in text and 'violat' not in text
  assert 'does the last agent response comply' not in text


@hypothesis.given(st.integers(0, 10_000), progresses)
def test_documents_are_deterministic_and_ask_something(index, progress):
  document = corpus.document(0, index, progress)
  assert document == corpus.document(0, index, progress)
  assert sum(span.weight == 1.0 for span in document) >= 1


def test_lists_grow_with_progress():
  def longest(progress):
    texts = [text_of(corpus.document(0, i, progress)) for i in range(200)]
    return max(n for n in range(5) for t in texts if n == 0 or f'S{n}: ' in t)

  assert longest(0.0) == 1
  assert longest(1.0) == 4


def test_the_shipped_tokenizer_knows_every_word_whole():
  tokenizer = tokenizer_lib.load_tokenizer(PACKAGE / 'ruleworld' / 'tokenizer.model')
  for topic in lexicon.TOPICS:
    for word in topic.subcategories + sum(topic.phrases, ()):
      assert len(tokenizer.encode(f' {word}')) == 1, word
