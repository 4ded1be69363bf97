"""Prints an example as the model sees it, segment by segment."""

from __future__ import annotations

from csrm_jax.data import features
from csrm_jax.safety import schema, templates


def show(item: schema.Example | schema.Pair, encoder: features.Encoder) -> None:
  """Prints the prompt of an example, or both prompts of a pair.

  Each segment shows its kind, its text as a Python string, how many of its tokens were cut, and its
  tokens as the vocabulary writes them, with ids.
  """
  atom = features.require(features.encode(item, encoder))
  is_pair = isinstance(item, schema.Pair)
  for name, example, prompt in zip(
    ('safer', 'other') if is_pair else ('example',),
    (item.safer, item.other) if is_pair else (item,),
    atom.prompts,
    strict=True,
  ):
    print(f'{name} {prompt.id}: {len(prompt.tokens)} tokens', end='')
    print(f' of at most {encoder.max_length}; label {example.label}')
    print('\n'.join(_lines(example, encoder, len(prompt.tokens))))


def _lines(example: schema.Example, encoder: features.Encoder, length: int) -> list[str]:
  # Cutting to the length that was found gives the same tokens again.
  tokenizer = encoder.tokenizer
  segments = templates.render(example.safety, example.conversation, encoder.layout)
  whole, parts = (
    features.require(features.encode_segments(segments, tokenizer, limit))
    for limit in (10**9, length)
  )
  lines = []
  for segment, full, ids in zip(segments, whole.tokens, parts.tokens, strict=True):
    cut = f' [cut to {len(ids)} of {len(full)} tokens]'
    note = cut if list(full) != list(ids) else ''
    lines.append(f'{segment.kind:8} {segment.text!r}{note}')
    lines.append('  ' + ' '.join(f'{tokenizer.piece(i)!r}:{i}' for i in ids))
  return lines
