"""What a model was trained on, and whether a text is anything like it.

A model gives a number for any text, whether it can read it or not. So a checkpoint stores the words
that its data has and how many others a text of that data has; where a text has many more, nobody
should believe the verdict.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.core import checks, files
from csrm_jax.data import draws, sources
from csrm_jax.safety import augment, schema

FILE = 'domain.json'  # beside weights in Hugging Face's form
# What a mark says, see Domain.marks.
WORDS, LENGTH, RULES = 'unknown words', 'longer prompt', 'more rules'
# A word is known that so many different texts have: names and typing errors are not.
_MIN_TEXTS = 2
# The most words that are kept, the most frequent ones.
_MAX_WORDS = 20_000
# A text is foreign with so much more unknown than nearly all texts (this quantile) of the data.
_MARGIN, _QUANTILE, _MOST = 0.15, 0.99, 0.95
# Known words that every text gets on top: one strange word alone makes no text foreign.
_GIVEN = 2
# Of texts of a public backbone, which has read far more than its fine-tuning: it is only at a loss
# where hardly a word is known, as in another script.
BACKBONE_LEAST = 0.9

# Scripts without spaces between words: each of their characters counts as one.
_UNSPACED = '\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
_WORD = re.compile(f'[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\\W\\d_])+')


class OutOfDomainError(ValueError):
  """Rules or text are in words that a model does not know."""


@dataclasses.dataclass(frozen=True)
class Domain:
  """What a model was trained on.

  Attributes:
    name: For people, such as 'RuleWorld' or the name of a file.
    words: The words that it knows, in lower case, sorted.
    most_unknown: The share of unknown words above which a text is foreign, see `unknown`.
    num_rules: The most rules that stood before a conversation.
    max_length: The most tokens that a prompt had.
  """

  name: str
  words: tuple[str, ...]
  most_unknown: float
  num_rules: int
  max_length: int

  @classmethod
  def from_dict(cls, obj: Mapping[str, Any]) -> Domain:
    """Returns the domain that dataclasses.asdict gave; other fields are a ValueError."""
    say = 'not the description of what a model was trained on: {name} is {what}; train it anew'
    checks.check_fields(cls, obj, say)
    return cls(**{**obj, 'words': tuple(obj['words'])})

  @functools.cached_property
  def known(self) -> frozenset[str]:
    return frozenset(self.words)

  def foreign(self, safety: schema.SafetyConfig, conversation: Sequence[schema.Message]) -> str:
    """Returns what is in words that the model does not know, and how much of it; or ''."""
    shares = {name: _share(text, self.known) for name, text in _texts(safety, conversation).items()}
    worst = max(shares, key=shares.get)
    return f'{shares[worst]:.0%} of the words of {worst}' * (shares[worst] > self.most_unknown)

  def marks(
    self, safety: schema.SafetyConfig, conversation: Sequence[schema.Message], num_tokens: int
  ) -> str:
    """Returns what is outside of the domain, such as 'unknown words, more rules'; or ''."""
    found = {
      WORDS: self.foreign(safety, conversation),
      LENGTH: num_tokens > self.max_length,
      RULES: len(safety.categories) > self.num_rules,
    }
    return ', '.join(name for name, is_so in found.items() if is_so)

  def require(
    self, where: str, safety: schema.SafetyConfig, conversation: Sequence[schema.Message]
  ) -> None:
    """Raises OutOfDomainError, which begins with `where`, if something is in foreign words."""
    if found := self.foreign(safety, conversation):
      raise OutOfDomainError(
        f'{where}: {found} are unknown to this model, which was trained on {self.name}, so '
        'that its verdict would mean nothing; train or load a model that knows them, or take '
        'allow_out_of_domain=True to get verdicts that are marked'
      )


def measure(
  name: str,
  examples: Iterable[schema.Example],
  max_length: int,
  known: Iterable[str] = (),
  least: float = 0.0,
) -> Domain:
  """Returns the domain of a sample of what a model is trained on.

  Args:
    known: Words that the weights knew before.
    least: The smallest value of most_unknown.
  """
  examples = list(examples)
  sizes = [
    len(example.safety.categories) + bool(example.plus) + bool(example.minus)
    for example in examples
  ]
  added = (c for e in examples for c in (e.plus, e.minus) if c is not None)
  texts = [text for e in examples for text in _texts(e.safety, e.conversation).values()]
  texts += map(_rule_text, added)
  return of_texts(name, texts, max_length, known, least, max(sizes, default=0))


def of_texts(
  name: str,
  texts: Iterable[str],
  max_length: int,
  known: Iterable[str] = (),
  least: float = 0.0,
  num_rules: int = 0,
) -> Domain:
  """Returns the domain of a sample of texts; see `measure`."""
  known = frozenset(known)
  texts = list(dict.fromkeys(texts))
  counts = collections.Counter(word for text in texts for word in set(words(text)))
  common = [word for word, num in counts.most_common(_MAX_WORDS) if num >= _MIN_TEXTS]
  # A text must be in words of the other texts, as one that is yet to come.
  others = known.union(word for word in common if counts[word] > _MIN_TEXTS)
  shares = [_share(text, others) for text in texts]
  most = np.quantile(shares, _QUANTILE) if shares else 0.0
  return Domain(
    name,
    tuple(sorted(known.union(common))),
    round(max(min(float(most) + _MARGIN, _MOST), least), 3),
    num_rules,
    max_length,
  )


def sample(items: Sequence[Any], num: int) -> list[schema.Example]:
  """Returns examples of `num` evenly spread items of training data, all of pairs and groups."""
  found = []
  for item in sources.spread(items, num):
    if isinstance(item, schema.Pair):
      found += [item.safer, item.other]
    else:
      found += item.examples if isinstance(item, draws.Group) else [item]
  return found


def read(folder: pathlib.Path) -> Domain | None:
  """Returns the domain that is stored beside weights, or None."""
  path = folder / FILE
  return Domain.from_dict(files.read_json(path)) if path.is_file() else None


def write(folder: pathlib.Path, domain: Domain | None) -> None:
  """Stores the domain beside weights, if there is one."""
  if domain is not None:
    files.write_json(folder / FILE, dataclasses.asdict(domain), indent=None, ensure_ascii=False)


def words(text: str) -> list[str]:
  """Returns the words of a text in lower case; of a text without any, its other characters."""
  return _WORD.findall(text.casefold()) or re.findall(r'\S', text)


# The rules of many conversations are one text, and a text that is let through is marked next.
@functools.lru_cache(maxsize=1024)
def _share(text: str, known: frozenset[str]) -> float:
  found = words(text)
  return sum(word not in known for word in found) / (len(found) + _GIVEN)


def _texts(safety: schema.SafetyConfig, conversation: Sequence[schema.Message]) -> dict[str, str]:
  contents = [message.content for message in conversation]
  # What stands where rules are hidden is nobody's text.
  rules = () if safety == augment.NO_RULES else safety.categories
  return {
    'the rules': '\n'.join(map(_rule_text, rules)),
    'the conversation': '\n'.join(contents),
    # Apart: a long history must not hide that it is foreign.
    'the last message': contents[-1],
  }


def _rule_text(category: schema.Category) -> str:
  return f'{category.name}. {category.guideline}'
