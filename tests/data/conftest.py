"""A tokenizer with nothing to train: bytes, words, and control tokens."""

import re

import pytest

from csrm_jax.safety import templates


class WordTokenizer:
  """Words, single other characters, and one id for each control line.

  Ids are handed out as words come; 0 pads, 1 opens and 2 closes a text.
  """

  vocab_size = 1 << 16
  pad_id, bos_id, eos_id = 0, 1, 2
  digest = 'words'

  def __init__(self):
    self.words = ['<pad>', '<bos>', '<eos>', *templates.CONTROL_LINES]
    self.control = {w: i for i, w in enumerate(self.words) if i > 2}
    self.ids = {}

  def encode(self, text):
    ids = []
    for word in re.findall(r' ?\w+|.', text, re.DOTALL):
      if word not in self.ids:
        self.ids[word] = len(self.words)
        self.words.append(word)
      ids.append(self.ids[word])
    return ids

  def encode_control(self, text):
    return [self.control[text]]

  def decode(self, ids):
    return ''.join(self.words[i] for i in ids)


@pytest.fixture
def tokenizer():
  return WordTokenizer()
