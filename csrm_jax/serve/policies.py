"""Rule sets by name, from the files of a folder; edited files take effect while the server runs."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
from collections.abc import Callable
from typing import Any

from csrm_jax.core import checks, files
from csrm_jax.safety import schema

_SUFFIXES = ('.yaml', '.yml', '.json')
_NAME = re.compile(r'[A-Za-z0-9][\w.-]*')
# What clients of OpenAI's send as `model`: the default policy.
DEFAULT_NAMES = ('', 'default', 'csrm', 'omni-moderation-latest', 'text-moderation-latest')


class UnknownPolicyError(ValueError):
  """No policy has this name or digest."""


@dataclasses.dataclass(frozen=True)
class Policy:
  """Rules with a name; those that a request brings along have the name ''."""

  name: str
  safety: schema.SafetyConfig
  digest: str
  error: str = ''  # why the file as it is now cannot be used; the last good one still is

  def describe(self) -> dict[str, Any]:
    return {
      'name': self.name,
      'digest': self.digest,
      'num_rules': len(self.safety.categories),
      'rules': [category.to_dict() for category in self.safety.categories],
      'error': self.error or None,
    }


def inline(safety: schema.SafetyConfig) -> Policy:
  """Returns rules that came with a request."""
  return Policy('', safety, safety.digest())


class Policies:
  """The policies of a folder. `refresh` is called by one thread; a request sees one state."""

  def __init__(
    self,
    folder: str,
    default: str = '',
    check: Callable[[schema.SafetyConfig], Any] = lambda safety: None,
  ):
    """Reads the folder ('' for none); a file that cannot be used is an error.

    Args:
      default: The policy of requests that name none; '' takes the only one, if there is only one.
      check: Raises ValueError for rules that the model cannot read.
    """
    self._folder = files.locate(folder) if folder else None
    self._check = check
    self._stamps: dict[pathlib.Path, Any] = {}
    self._by_name: dict[str, Policy] = {}
    if self._folder and not self._folder.is_dir():
      raise ValueError(f'the policies {folder}: no such folder; name one with .yaml files of rules')
    self.refresh()
    for policy in self._by_name.values():
      if policy.error:
        raise ValueError(policy.error)
    names = list(self._by_name)
    self._default = default or (names[0] if len(names) == 1 else '')
    if default and default not in names:
      raise ValueError(
        f'the default policy {default!r} is not in {folder}{checks.hint(default, names)}; '
        f'choose one of {", ".join(names) or "none"}'
      )

  def list(self) -> list[Policy]:
    return list(self._by_name.values())

  @property
  def default(self) -> str:
    return self._default

  def get(self, name: str = '') -> Policy:
    """Returns the policy of a name or a digest; '' is the default."""
    # A name is only looked up: no part of it ever reaches the file system.
    known = {policy.name: policy for policy in self._by_name.values() if policy.digest}
    found = known.get(name) or next((p for p in known.values() if p.digest == name), None)
    if found is None and name in DEFAULT_NAMES:
      found = known.get(self._default)
    if found is not None:
      return found
    names = ', '.join(known) or 'none'
    if name in DEFAULT_NAMES:
      raise UnknownPolicyError(
        'the request names no policy and the server has no default; give "policy", one of '
        f'{names}, or bring rules as "safety"'
      )
    raise UnknownPolicyError(
      f'unknown policy {checks.show(name)}{checks.hint(name, list(known))}; this server has {names}'
    )

  def refresh(self) -> bool:
    """Reads files that are new or changed; returns whether anything changed.

    Where a file has become unusable, its last good rules stay, with the error beside them.
    """
    if self._folder is None:
      return False
    stamps = {}
    for path in sorted(self._folder.iterdir()):
      # Dot files too: Kubernetes mounts hold folders of that kind.
      if path.suffix.lower() in _SUFFIXES and not path.name.startswith('.') and path.is_file():
        info = path.stat()
        stamps[path] = info.st_mtime_ns, info.st_size, info.st_ino
    if stamps == self._stamps:
      return False
    found = {}
    for path, stamp in stamps.items():
      old = self._by_name.get(path.stem)
      if old is not None and self._stamps.get(path) == stamp and path.stem not in found:
        found[path.stem] = old
      else:
        found[path.stem] = self._read(path, old, path.stem in found)
    for name in self._by_name.keys() | found.keys():
      before, now = self._by_name.get(name), found.get(name)
      if before != now and self._stamps:
        logging.getLogger(__name__).warning(
          'policy %s: %s', name, (now.error or now.digest[:12]) if now else 'removed'
        )
    self._by_name, self._stamps = found, stamps
    return True

  def _read(self, path: pathlib.Path, old: Policy | None, is_twice: bool) -> Policy:
    try:
      if is_twice:
        raise ValueError(f'{path}: another file has the name {path.stem!r}; rename one')
      if not _NAME.fullmatch(path.stem) or path.stem in DEFAULT_NAMES:
        raise ValueError(
          f'{path}: {path.stem!r} cannot be the name of a policy; use letters, digits and _ . -, '
          f'and none of {", ".join(filter(None, DEFAULT_NAMES))}'
        )
      safety = schema.load_safety(path)
      try:
        self._check(safety)
      except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
      return Policy(path.stem, safety, safety.digest())
    except (ValueError, OSError) as error:
      if old is None and self._stamps:
        # A new file that is bad is no policy yet: nothing could be judged by it.
        logging.getLogger(__name__).warning('%s', error)
      return _broken(path.stem, old, str(error))


# Rules that no file gave; a policy with them is never used.
_NONE = schema.SafetyConfig((schema.Category('unreadable', 'unreadable'),))


def _broken(name: str, old: Policy | None, error: str) -> Policy:
  if old is not None:
    return dataclasses.replace(old, error=error)
  return Policy(name, _NONE, '', error)
