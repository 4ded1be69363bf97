"""Safety configurations: the rules, and the files that hold them.

A file (YAML, or JSON of the same form):

  name: bank_support            # optional
  categories:
  - name: Credentials
    guideline: The agent never asks for a password or a one-time code ...
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from csrm_jax.safety import checks
from csrm_jax.safety.checks import show


@dataclasses.dataclass(frozen=True, slots=True)
class Category:
  """One rule: a name and the text that says what it allows and forbids."""

  name: str
  guideline: str

  def __post_init__(self):
    checks.check_text(self.name, 'category name')
    checks.check_text(self.guideline, f'guideline of category {show(self.name)}')

  def to_dict(self) -> dict[str, str]:
    """Returns the plain form that `parse_category` reads."""
    return {'name': self.name, 'guideline': self.guideline}


@dataclasses.dataclass(frozen=True)
class SafetyConfig:
  """An ordered list of categories with distinct names.

  The order is part of the configuration, because it is part of the prompt.
  """

  categories: tuple[Category, ...]
  name: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'categories', tuple(self.categories))
    checks.check_text(self.name, 'configuration name', empty_ok=True)
    if not self.categories:
      raise ValueError(
        'the category list is empty; a safety configuration needs at least one category'
      )
    for category in self.categories:
      if not isinstance(category, Category):
        raise ValueError(f'{show(category)} stands among the categories; build a Category')
    second = _find_duplicate(self.categories)
    if second is not None:
      raise ValueError(_duplicate_message(self.categories[second]))

  @property
  def names(self) -> tuple[str, ...]:
    """The category names, in order."""
    return tuple(category.name for category in self.categories)

  def digest(self) -> str:
    """Returns the sha256 (hex) of the ordered categories, `name` left out."""
    pairs = [[c.name, c.guideline] for c in self.categories]
    text = json.dumps(pairs, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()

  def to_dict(self) -> dict[str, Any]:
    """Returns the plain form that `parse_safety` reads."""
    out: dict[str, Any] = {'name': self.name} if self.name else {}
    return out | {'categories': [c.to_dict() for c in self.categories]}

  def dump(self, path: str | os.PathLike) -> None:
    """Writes the file that `load_safety` reads, whole or not at all."""
    path = pathlib.Path(path)
    if _suffix(path) == '.json':
      text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + '\n'
    else:
      text = yaml.dump(
        self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=78
      )
    partial = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    partial.write_bytes(text.encode())
    os.replace(partial, path)


def parse_category(obj: Any, what: str) -> Category:
  """Returns the category in {"name": text, "guideline": text}.

  Raises:
    ValueError: one line that starts with `what`.
  """
  if not isinstance(obj, Mapping):
    raise ValueError(f'{what} is {show(obj)}; write an object with "name" and "guideline"')
  for key in ('name', 'guideline'):
    if key not in obj:
      raise ValueError(f'{what} has no "{key}"; add it')
  for key in obj:
    if key not in ('name', 'guideline'):
      raise ValueError(
        f'{what} has the unknown key {show(key)}; only "name" and "guideline" are read'
      )
  try:
    return Category(obj['name'], obj['guideline'])
  except ValueError as error:
    raise ValueError(f'{what}: {error}') from None


def parse_safety(obj: Any, where: str, lines: Sequence[int] = ()) -> SafetyConfig:
  """Returns the safety configuration in the plain form of a file.

  Args:
    obj: {"name": text (optional), "categories": [{"name", "guideline"}]}.
    where: the file (and line), for errors.
    lines: the line of each category, where known.

  Raises:
    ValueError: one line with the place, the value and the fix.
  """
  if not isinstance(obj, Mapping) or 'categories' not in obj:
    found = 'nothing' if not obj else show(obj)
    if obj and isinstance(obj, Mapping):
      found = ', '.join(map(str, obj))[:200]
    raise ValueError(
      f'{where}: no key "categories" (found: {found}); list'
      ' the rules under "categories", each with "name" and "guideline"'
    )
  for key in obj:
    if key not in ('name', 'categories'):
      raise ValueError(
        f'{where}: unknown key {show(key)}; a safety configuration has'
        ' "categories" and, if you like, "name"'
      )
  items = obj['categories'] or []
  if not isinstance(items, (list, tuple)):
    raise ValueError(
      f'{where}: "categories" is {show(items)}; write a list of entries with "name" and "guideline"'
    )
  places = [f'{where}:{line}' for line in lines] or [where] * len(items)
  try:
    place = where
    categories = []
    for i, item in enumerate(items):
      place = places[i]
      categories.append(parse_category(item, f'category {i + 1}'))
    second = _find_duplicate(categories)
    place = where if second is None else places[second]
    return SafetyConfig(tuple(categories), obj.get('name', ''))
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from None


def load_safety(path: str | os.PathLike) -> SafetyConfig:
  """Returns the safety configuration in a .yaml, .yml or .json file.

  Raises:
    ValueError: one line with file, line where known, value and fix.
  """
  where = os.fspath(path)
  if _suffix(path) == '.json':
    text = checks.read_text(path)
    return parse_safety(checks.load_json(text, where), where)
  text = checks.read_text(path)
  obj, lines = checks.load_yaml(text, where, 'categories')
  return parse_safety(obj, where, lines)


class _Dumper(yaml.SafeDumper):
  """Escapes whatever the other YAML styles would fold or lose."""

  def represent_text(self, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return self.represent_scalar('tag:yaml.org,2002:str', text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _suffix(path: str | os.PathLike) -> str:
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in ('.yaml', '.yml', '.json'):
    raise ValueError(
      f'{os.fspath(path)}: a safety configuration is a .yaml, .yml or .json file; rename it'
    )
  return suffix


def _find_duplicate(categories: Sequence[Category]) -> int | None:
  """Returns the index of the first category whose name was taken before."""
  seen = set()
  for i, category in enumerate(categories):
    # The rendered prompt collapses white space, so it does not tell names
    # apart; nor should case.
    key = ' '.join(category.name.split()).casefold()
    if key in seen:
      return i
    seen.add(key)
  return None


def _duplicate_message(category: Category) -> str:
  return (
    f'the category name {show(category.name)} is used twice (case and spaces'
    ' do not count); rename one or merge their guidelines'
  )
