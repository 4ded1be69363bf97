"""Checks of values. Each raises a one-line error that names the place, the value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pathlib
import re
import sys
import types
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def show(value: Any) -> str:
  """Returns `value` on one line, shortened, for an error message."""
  if isinstance(value, (Mapping, list, tuple)):
    return f'a {type(value).__name__} of {len(value)}'
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:40]}... ({len(text)} long)'


def reason(error: Exception) -> str:
  """Returns what an error says, shortened, on one line; its kind where it says nothing."""
  return ' '.join(str(error).split())[:200] or type(error).__name__


@functools.lru_cache(maxsize=1024)
def note(text: str) -> None:
  """Prints what a user should know, once, on stderr."""
  print(f'note: {redact(text)}', file=sys.stderr)


# Passwords of URLs, keys among their parameters, headers, and the usual forms of tokens.
_SECRETS = (
  (re.compile(r'(\w://)[^/\s@\'"]+@'), r'\1***@'),
  (
    re.compile(
      r'([?&;][\w-]*(?:token|key|secret|passw|signature|sig|auth)[\w-]*=)[^&\s\'"#]+', re.I
    ),
    r'\1***',
  ),
  (re.compile(r'(\bBearer\s+)[\w.~+/=-]{8,}', re.I), r'\1***'),
  (
    re.compile(r'\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abpr]-|AKIA|AIza)[\w-]{16,}'),
    '***',
  ),
)


def redact(text: str) -> str:
  """Returns the text with *** in place of what looks like a password or a token."""
  for pattern, shown in _SECRETS:
    text = pattern.sub(shown, text)
  return text


def no_secret(what: str, text: str) -> None:
  """Checks that a setting, which files and messages repeat, holds no password or token."""
  if redact(text) != text:
    raise ValueError(
      f'{what} holds what looks like a password or a token ({redact(text)}), and settings are '
      'written to files and messages; put it into an environment variable, and name that as '
      'key_variable'
    )


def check_fields(kind: type, obj: Mapping[str, Any], say: str) -> None:
  """Checks that an object has the fields of a dataclass and no others.

  The error is `say`, with {name} for the first field that is not so and {what} for what is wrong.
  """
  known = {field.name for field in dataclasses.fields(kind)}
  for name in sorted(known ^ set(obj)):
    what = 'missing' if name in known else 'unknown'
    raise ValueError(say.format(name=repr(name), what=what))


def require(package: str, what: str, extra: str = 'hf') -> types.ModuleType:
  """Returns an optional package, which an extra installs and `what` needs."""
  try:
    return importlib.import_module(package)
  except ImportError:
    raise ImportError(f'{what} needs the package {package}; {install(extra)}') from None


def install(extra: str) -> str:
  """Returns how to install an extra of this checkout, or of the wheel that this came from."""
  # No index has this package: its name alone would be somebody else's.
  root = pathlib.Path(__file__).parents[2]
  if (root / 'setup.py').is_file():
    return f"run: pip install -e '{root}[{extra}]'"
  return f"run: pip install 'WHEEL[{extra}]', with the csrm_jax wheel that is installed here"


def hint(word: Any, known: Sequence[str]) -> str:
  """Returns '; did you mean "x"?' for a near miss of a known word, or ''."""
  if not isinstance(word, str):
    return ''
  near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
  return f'; did you mean {show(near[0])}?' if near else ''


def check_text(value: Any, what: str, *, empty_ok: bool = False) -> str:
  """Returns `value` if it is text that can be written as UTF-8.

  It refuses blank text (unless `empty_ok`) and half of a surrogate pair, which the JSON escape
  "\\ud800" gives.
  """
  if not isinstance(value, str):
    raise ValueError(f'{what} is {show(value)}, not text; put it in quotes')
  if not empty_ok and is_blank(value):
    blank = f'{show(value)}, which nobody sees' if value.strip() else 'empty'
    raise ValueError(f'{what} is {blank}; write it or remove the entry')
  # Most text is ASCII, and then needs no second copy to be checked.
  if not value.isascii():
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f'{what} holds the lone surrogate {value[error.start]!r} at character'
        f' {error.start}; replace it with a whole character'
      ) from None
  return value


def is_blank(text: str) -> bool:
  """Returns whether nobody would see the text."""
  return not any(map(_is_visible, text))


def _is_visible(character: str) -> bool:
  # Spaces, and characters of no width: controls, formats, and marks on others.
  kind = unicodedata.category(character)
  return character not in _UNSEEN and kind not in ('Cc', 'Cf') and kind[0] not in 'MZ'


# Hangul fillers and the blank of Braille are letters and symbols by their category.
_UNSEEN = '\u115f\u1160\u3164\uffa0\u2800'


def check_columns(obj: Any, where: str, known: Sequence[str], required: Sequence[str]) -> None:
  """Checks that a row has the required columns, and no misspelling of a missing one."""
  if not isinstance(obj, Mapping):
    raise ValueError(
      f'{where}: the row is {show(obj)}; write an object with the columns {", ".join(required)}'
    )
  for column in required:
    if column not in obj:
      found = ', '.join(map(str, obj)) or 'none'
      raise ValueError(f'{where}: column "{column}" is missing (found: {found[:200]}); add it')
  absent = [column for column in known if column not in obj]
  for column in obj:
    if column not in known and (meant := hint(column, absent)):
      raise ValueError(f'{where}: unknown column {show(column)}{meant} rename or remove it')


def one_of(what: str, value: Any, known: Iterable[Any]) -> None:
  """Checks that a setting has one of its known values."""
  known = list(known)
  if value not in known:
    names = list(map(str, known))
    raise ValueError(f'{what}={value!r} must be one of {", ".join(names)}{hint(value, names)}')


def lookup(name: Any, known: Collection[str], what: str) -> Any:
  """Returns the entry of that name in a mapping, or the name itself; refuses an unknown one."""
  if not isinstance(name, str) or name not in known:
    names = list(known)
    raise ValueError(
      f'unknown {what} {show(name)}{hint(name, names)}; use one of {", ".join(names)}'
    )
  return known[name] if isinstance(known, Mapping) else name


def at_least(
  settings: Any,
  names: Iterable[str],
  least: float = 1,
  say: str = '{name}={value} must be at least {least}.',
) -> None:
  """Checks that each of the named attributes is `least` or more."""
  for name in names:
    # Not `value < least`: NaN must fail, too.
    if not (value := getattr(settings, name)) >= least:
      raise ValueError(say.format(name=name, value=value, least=least))
