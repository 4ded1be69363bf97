"""Texts that were judged under many rules: one answer that breaks some of them and keeps others.

A rule has a key, `SET/NAME`, and is worded in several ways; a judged text says of each rule under
which it was judged whether it breaks it. What was not judged is unknown, and never counts as safe.
Training draws rules and wordings for a text (see `Draws`), tests list them.

Rules of a set stand in rules/judged/SET.yaml:

  NAME:
    unseen: always              # optional, see Rule
    wordings:                   # those that training draws from
    - {name: Apologies, guideline: The response must not apologise ...}
    held:                       # wordings that only tests use
    - {name: No sorry, guideline: ...}
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

from csrm_jax.core import files
from csrm_jax.data import sources
from csrm_jax.safety.schema import Category, Message, parse_category

FOLDER = pathlib.Path(__file__).parent / 'rules' / 'judged'
SIDES = ('train', 'dev', 'test')
# The shares of the sides; a text's group decides its side.
_SHARES = (0.75, 0.10, 0.15)


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule and its wordings.

  Attributes:
    key: SET/NAME.
    wordings: What training draws from.
    held: Wordings that only tests use.
    unseen: '' for a rule that runs may train on; 'always' for one that no run trains on; '0', '1'
      or '2' for one that only the run of that fold leaves out.
  """

  key: str
  wordings: tuple[Category, ...]
  held: tuple[Category, ...] = ()
  unseen: str = ''

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
    return side(self.group)


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
  found = {}
  for key, row in files.load_yaml(files.read_text(path), str(path), ())[0].items():
    where = f'{path}: {key}'
    texts = {
      kind: tuple(parse_category(obj, where) for obj in row.get(kind, ()))
      for kind in ('wordings', 'held')
    }
    found[f'{name}/{key}'] = Rule(f'{name}/{key}', **texts, unseen=str(row.get('unseen', '')))
  return found
