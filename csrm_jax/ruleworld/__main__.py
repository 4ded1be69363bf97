"""Looks at RuleWorld: python -m csrm_jax.ruleworld --print=3 --kind=unseen."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from csrm_jax.ruleworld import corpus, examples, lexicon
from csrm_jax.safety import schema, templates
from csrm_jax.text import train

VOCAB_SIZE = 2304
_NUM_SENTENCE_DOCUMENTS = 20_000


def sentences() -> Iterator[str]:
  """Yields what the shipped tokenizer is trained on: corpus and verdicts."""
  for index in range(_NUM_SENTENCE_DOCUMENTS):
    progress = index / _NUM_SENTENCE_DOCUMENTS
    for span in corpus.document(seed=7, index=index, progress=progress):
      if not span.control:
        yield span.text.strip('\n')
  words = [phrase for topic in lexicon.TOPICS for phrases in topic.phrases for phrase in phrases]
  words += ['safe', 'unsafe', 'Yes', 'No']
  # So often that each word becomes one token.
  for word in words * 200:
    yield f' {word}'


def _print_example(example: schema.Example) -> None:
  segments = templates.render(example.safety, example.conversation)
  print(templates.render_text(segments), end='')
  print(
    f' {example.label}   [true P(unsafe) = {example.probability:.4f}, '
    f'violated: {", ".join(example.violated) or "none"}]'
  )
  for sign, category in (('+', example.plus), ('-', example.minus)):
    if category:
      print(f'p{sign}: {category.name}. {category.guideline}')


def _print(kind: str, seed: int, index: int) -> None:
  if kind == 'text':
    print(''.join(span.text for span in corpus.document(seed, index)))
  elif kind == 'train':
    _print_example(examples.training_example(seed, index))
  elif kind in ('strictness', 'preference'):
    make = examples.strictness_pair if kind == 'strictness' else examples.preference_pair
    pair = make(seed, index)
    for name, side in (('safer', pair.safer), ('other', pair.other)):
      print(f'--- {name}')
      _print_example(side)
  elif kind == 'flip':
    for side in examples.flip_pair(seed, index, 'unseen'):
      _print_example(side)
  else:
    _print_example(examples.test_example(seed, index, kind))


def main() -> None:
  """Prints examples, or trains the tokenizer that the package ships."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--print', type=int, default=3, metavar='N', help='how many to show')
  parser.add_argument(
    '--kind',
    default='unseen',
    choices=('train', 'seen', 'unseen', 'strictness', 'preference', 'flip', 'text'),
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--train_tokenizer', metavar='PATH', help='write the SentencePiece model there instead'
  )
  args = parser.parse_args()
  if args.train_tokenizer:
    train.train_sentencepiece(
      sentences(), args.train_tokenizer, VOCAB_SIZE, templates.CONTROL_LINES
    )
    return
  for index in range(args.print):
    print(f'=== {args.kind} {index}')
    _print(args.kind, args.seed, index)


if __name__ == '__main__':
  main()
