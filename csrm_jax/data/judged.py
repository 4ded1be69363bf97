"""Texts that were judged under many rules: one answer that breaks some of them and keeps others.

A rule has a key, `SET/NAME`, and is worded in several ways; a judged text says of each rule under
which it was judged whether it breaks it. What was not judged is unknown, and never counts as safe.
Training draws rules and wordings for a text (see `Draws`), tests list them.

Rules of a set stand in rules/judged/SET.yaml:

  NAME:
    unseen: always              # optional, see Rule
    within: OTHER               # optional: a rule of the set that forbids all that this one does
    wordings:                   # those that training draws from
    - {name: Apologies, guideline: The response must not apologise ...}
    held:                       # wordings that only tests use
    - {name: No sorry, guideline: ...}

Rules that differ in one thing alone are written once, as a pattern over what they are about:

  hate_{key}:
    each:                       # or a list of keys of groups.yaml, which several sets share
      women: {names: [women, female people], held: [members of the female sex], unseen: always}
    wordings:                   # each of them is filled with each of the names
    - {name: 'Hate: {name}', guideline: 'No hate against {what}. ...'}
    held: [...]                 # these are filled with what stands under `held`

A name is a text, or [a short one for {name}, a long one for {what}]; a capital letter in the
pattern makes one. Whoever is left out of runs is so in every set that lists it from groups.yaml.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.core import checks, files
from csrm_jax.data import sources
from csrm_jax.safety.schema import (
  Category,
  Example,
  Message,
  Pair,
  parse_category,
  parse_conversation,
)

FOLDER = pathlib.Path(__file__).parent / 'rules' / 'judged'
SIDES = ('train', 'dev', 'test')
FOLDS = ('0', '1', '2')
# The shares of the sides; a text's group decides its side.
_SHARES = (0.75, 0.10, 0.15)
_KEYS = ('unseen', 'within', 'each', 'wordings', 'held')
_PART_KEYS = ('unseen', 'within', 'names', 'held')


def _load(path: pathlib.Path) -> dict[str, Any]:
  return files.load_yaml(files.read_text(path), str(path), ())[0]


# What the labels of public sets mean.
LABELS = _load(FOLDER / 'labels.yaml')


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule and its wordings.

  Attributes:
    key: SET/NAME.
    wordings: What training draws from.
    held: Wordings that only tests use.
    unseen: '' for a rule that runs may train on; 'always' for one that no run trains on; '0', '1'
      or '2' for one that only the run of that fold leaves out.
    stricter: The keys of the rules that forbid all that this one forbids, such as "no violence"
      for "nothing graphic"; the nearest first.
  """

  key: str
  wordings: tuple[Category, ...]
  held: tuple[Category, ...] = ()
  unseen: str = ''
  stricter: tuple[str, ...] = ()

  def is_seen(self, fold: str) -> bool:
    """Whether a run of this fold trains on it; '' is a run that leaves out no fold."""
    return not self.unseen or (self.unseen != 'always' and self.unseen != fold)


@dataclasses.dataclass(frozen=True)
class Judged:
  """A conversation, and what people said of it.

  Attributes:
    id: Unique within its source.
    conversation: It ends with what is judged.
    verdicts: {key of a rule: the share of people, or the degree of belief, that say that it is
      broken, from 0 to 1}; .5 and above counts as unsafe.
    group: What rows are not independent within, such as their prompt: all of a group are on one
      side of a split, and are drawn together by a bootstrap.
    source: The name of the set.
  """

  id: str
  conversation: tuple[Message, ...]
  verdicts: Mapping[str, float]
  group: str
  source: str

  @property
  def side(self) -> str:
    """One of SIDES."""
    return side(self.group)

  @staticmethod
  def from_dict(obj: Any, where: str) -> Judged:
    """Returns the text that `to_dict` wrote; errors start with `where`."""
    columns = [field.name for field in dataclasses.fields(Judged)]
    checks.check_columns(obj, where, columns, columns)
    try:
      conversation = parse_conversation(obj['conversation'])
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None
    return Judged(**{column: obj[column] for column in columns} | {'conversation': conversation})

  def to_dict(self) -> dict[str, Any]:
    """Returns a row of JSON."""
    talk = [message.to_dict() for message in self.conversation]
    return vars(self) | {'conversation': talk, 'verdicts': dict(self.verdicts)}


def group_of(item: Judged | Pair | Example) -> str:
  """Returns what an item's rows are not independent within; of pairs and examples the request."""
  if isinstance(item, Judged):
    return item.group
  talk = item.safer.conversation if isinstance(item, Pair) else item.conversation
  return talk[-2].content if len(talk) > 1 else talk[-1].content


def side(group: str) -> str:
  """Returns the side of a group: one of SIDES."""
  place = sources.hash_unit(f'judged\n{" ".join(group.casefold().split())}')
  for name, share in zip(SIDES[:-1], _SHARES[:-1], strict=True):
    if place < share:
      return name
    place -= share
  return SIDES[-1]


@functools.cache
def rules(name: str) -> dict[str, Rule]:
  """Returns {key: rule} of the set of that name."""
  path = FOLDER / f'{name}.yaml'
  rows = {}
  for key, row in _load(path).items():
    for column in row:
      checks.one_of(f'{path}: {key}: a key', column, _KEYS)
    rows |= _expand(key, row) if 'each' in row else {key: row}
  found = {}
  for key, row in rows.items():
    where = f'{path}: {key}'
    texts = {
      kind: tuple(parse_category(obj, where) for obj in row.get(kind, ()))
      for kind in ('wordings', 'held')
    }
    stricter, at = [], row
    while 'within' in at:
      stricter.append(f'{name}/{at["within"]}')
      if at['within'] not in rows or len(stricter) > len(rows):
        raise ValueError(f'{where}: it is within {stricter[-1]}; name a stricter rule of the file')
      at = rows[at['within']]
    unseen = str(row.get('unseen', ''))
    found[f'{name}/{key}'] = Rule(f'{name}/{key}', **texts, unseen=unseen, stricter=tuple(stricter))
  return found


def _expand(key: str, row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the rules that a pattern stands for."""
  each = row['each']
  if isinstance(each, list):
    groups = _load(FOLDER / 'groups.yaml')
    each = {part: checks.lookup(part, groups, f'group in {key}') for part in each}
  found = {}
  for part, about in each.items():
    for column in about:
      checks.one_of(f'{key}: {part}: a key', column, _PART_KEYS)
    shared = {k: value for k, value in {**row, **about}.items() if k in ('unseen', 'within')}
    texts = {
      kind: [_fill(text, name) for name in about[names] for text in row[kind]]
      for kind, names in (('wordings', 'names'), ('held', 'held'))
    }
    found[key.replace('{key}', part)] = shared | texts
  return found


def _fill(text: Mapping[str, str], name: str | Sequence[str]) -> dict[str, str]:
  short, what = (name, name) if isinstance(name, str) else name
  words = {'name': short, 'what': what}
  words |= {key.capitalize(): word[:1].upper() + word[1:] for key, word in words.items()}
  return {key: pattern.format_map(words) for key, pattern in text.items()}
