"""The pretraining corpus."""

import pathlib
import random
import re

import hypothesis
from hypothesis import strategies as st

import csrm_jax
from csrm_jax.ruleworld import corpus, lexicon, phrases
from csrm_jax.text import tokenizer as tokenizer_lib
from tests.ruleworld import examples_test

PACKAGE = pathlib.Path(csrm_jax.__file__).parent
progresses = st.floats(0, 1)


def text_of(document):
  return ''.join(span.text for span in document)


@hypothesis.given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_no_document_of_the_curriculum_holds_a_verdict(index, progress):
  text = text_of(corpus.document(0, index, progress)).lower()
  assert 'safe' not in text
  assert 'does the last agent response comply' not in text


@hypothesis.given(st.integers(0, 10_000), progresses)
def test_documents_are_deterministic_and_ask_something(index, progress):
  document = corpus.document(0, index, progress)
  assert document == corpus.document(0, index, progress)
  assert sum(span.weight >= 1.0 for span in document) >= 1


@hypothesis.given(st.integers(0, 10_000), progresses)
def test_the_corpus_has_no_rule_or_sentence_that_tests_keep(index, progress):
  kept = examples_test.own_words(lexicon.DEV + lexicon.TEST)
  held_out = examples_test.held_out_texts('dev') + examples_test.held_out_texts('test')
  for line in text_of(corpus.document(0, index, progress)).splitlines():
    who, text = re.fullmatch(r'(?:(S\d+|Agent): )?(.*)', line).groups()
    if who and who != 'Agent':
      assert not kept & set(re.findall(r'\w+', line.lower()))
    for sentence in examples_test.sentences_of(text):
      assert not any(pattern.fullmatch(sentence) for pattern in held_out), sentence


@hypothesis.given(st.integers(0, 10_000))
def test_ordinary_sentences_are_in_no_wording_that_tests_keep(seed):
  rng = random.Random(seed)
  text = phrases.ordinary(rng, rng.sample(phrases.THINGS, 2), rng.sample(phrases.THINGS, 2))
  held_out = examples_test.held_out_texts('dev') + examples_test.held_out_texts('test')
  for sentence in examples_test.sentences_of(text):
    assert not any(pattern.fullmatch(sentence) for pattern in held_out), sentence


def test_no_rule_is_about_an_ordinary_thing():
  assert not set(phrases.THINGS) & set(lexicon.WORDS)


def test_lists_grow_with_progress():
  def longest(progress):
    texts = [text_of(corpus.document(0, i, progress)) for i in range(200)]
    return max(n for n in range(10) for t in texts if n == 0 or f'S{n}: ' in t)

  assert longest(0.0) == 1
  assert longest(1.0) == corpus.MAX_RULES == 8


def test_the_shipped_tokenizer_knows_every_word_whole():
  tokenizer = tokenizer_lib.load_tokenizer(PACKAGE / 'ruleworld' / 'tokenizer.model')
  for topic in lexicon.TOPICS:
    for word in topic.subcategories + sum(topic.phrases, ()):
      assert len(tokenizer.encode(f' {word}')) == 1, word
