"""Looks at RuleWorld, or at what reading no rules is worth in it.

python -m csrm_jax.ruleworld --print=3 --kind=unseen
python -m csrm_jax.ruleworld --shortcuts=shortcuts.json
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator

from csrm_jax.core import files
from csrm_jax.ruleworld import corpus, examples, grammar, lexicon, shortcuts
from csrm_jax.safety import schema, templates
from csrm_jax.text import tokenizer as tokenizer_lib

VOCAB_SIZE = 3584
_NUM_SENTENCE_DOCUMENTS = 20_000


def sentences() -> Iterator[str]:
  """Yields what the shipped tokenizer is trained on: corpus and verdicts."""
  for index in range(_NUM_SENTENCE_DOCUMENTS):
    progress = index / _NUM_SENTENCE_DOCUMENTS
    for span in corpus.document(seed=7, index=index, progress=progress):
      if not span.control:
        yield span.text.strip('\n')
  # That a word is one token says nothing about what it means.
  for _ in range(100):
    yield from (text for part in grammar.STATEMENTS.values() for text in part)
    yield from (' '.join(wording) for wording in grammar.ALL_WORDINGS if len(wording) == 3)
  words = [*lexicon.PHRASES, *lexicon.SUBCATEGORIES, *(topic.name for topic in lexicon.TOPICS)]
  words += ['safe', 'unsafe', 'Yes', 'No', *grammar.ROLES]
  # So often that each word becomes one token.
  for word in words * 300:
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


# kind -> make(seed, index)
_MAKE = {
  'train': examples.training_example,
  'seen': functools.partial(examples.test_example, split='seen'),
  'unseen': functools.partial(examples.test_example, split='unseen'),
  'strictness': examples.strictness_pair,
  'preference': examples.preference_pair,
  'flip': functools.partial(examples.flip_pair, split='unseen'),
  'text': corpus.document,
}


def _print(kind: str, seed: int, index: int) -> None:
  made = _MAKE[kind](seed, index)
  if kind == 'text':
    print(''.join(span.text for span in made))
  elif isinstance(made, schema.Pair):
    for name, side in (('safer', made.safer), ('other', made.other)):
      print(f'--- {name}')
      _print_example(side)
  else:
    for example in made if isinstance(made, tuple) else (made,):
      _print_example(example)


def main() -> None:
  """Prints examples or what shortcuts reach, or trains the tokenizer that the package ships."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--print', type=int, default=3, metavar='N', help='how many to show')
  parser.add_argument('--kind', default='unseen', choices=tuple(_MAKE))
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--shortcuts',
    nargs='?',
    const='',
    metavar='PATH',
    help='print what judges reach that do not read the rules, as Markdown, and as JSON to the file'
    ' or below',
  )
  parser.add_argument('--num_rows', type=int, default=2000, help='of each tier of --shortcuts')
  parser.add_argument(
    '--side', default='dev', choices=examples.SIDES, help='whose unseen rules --shortcuts tests'
  )
  parser.add_argument(
    '--train_tokenizer', metavar='PATH', help='write the SentencePiece model there instead'
  )
  args = parser.parse_args()
  if args.train_tokenizer:
    tokenizer_lib.train_sentencepiece(
      sentences(), args.train_tokenizer, VOCAB_SIZE, templates.CONTROL_LINES
    )
    return
  if args.shortcuts is not None:
    found = shortcuts.measure(num_rows=args.num_rows, side=args.side)
    print(shortcuts.to_markdown(found))
    if args.shortcuts:
      files.write_json(args.shortcuts, found)
    else:
      print('\n' + json.dumps(found, indent=2))
    return
  for index in range(args.print):
    print(f'=== {args.kind} {index}')
    _print(args.kind, args.seed, index)


if __name__ == '__main__':
  main()
