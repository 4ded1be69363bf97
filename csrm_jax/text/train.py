"""Training of a SentencePiece tokenizer."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence

import sentencepiece

from csrm_jax.core import files
from csrm_jax.text import tokenizer


def train_sentencepiece(
  sentences: Iterable[str],
  path: str | os.PathLike,
  vocab_size: int,
  control_symbols: Sequence[str] = (),
  user_symbols: Sequence[str] = ('\n', '\u2581safe', '\u2581unsafe'),
) -> tokenizer.SentencePieceTokenizer:
  """Returns a BPE tokenizer trained on `sentences`, written to `path`.

  Any Unicode text can be encoded (bytes as the last resort) and comes back unchanged. The same
  input gives the same bytes. The ids are: 0 padding, 1 begin, 2 end, 3 unknown (never used), and
  from 4 on the `control_symbols`.

  Args:
    vocab_size: The number of ids, control and 256 byte pieces included.
    control_symbols: One id each; plain text never gives them.
    user_symbols: Plain text always gives these pieces, whatever the corpus: the line break, and
      the verdict words with their space.
  """
  # SentencePiece takes one line at a time; the line break is a piece of its own.
  lines = (line for text in sentences for line in text.split('\n') if line)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines,
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      control_symbols=list(control_symbols),
      user_defined_symbols=list(user_symbols),
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      byte_fallback=True,
      character_coverage=1.0,
      split_digits=True,
      # The next three keep a text as it is, so that segments can be encoded alone.
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      normalization_rule_name='identity',
      # Longer sentences would be left out, silently.
      max_sentence_length=1 << 24,
      # No shuffling and one thread, for the same bytes each time.
      shuffle_input_sentence=False,
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = str(error).rpartition('] ')[2].rstrip('. ')
    raise ValueError(
      f'vocab_size={vocab_size} does not suit the sentences ({reason}); change it or give more text'
    ) from None
  files.write(path, model.getvalue())
  return tokenizer.SentencePieceTokenizer(path)
