"""Progress: a bar on a terminal, in a log file one plain line a minute."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

import tqdm

# Seconds between updates of a bar, and between lines of a log file.
_BAR_S, _LINE_S = 1.0, 60.0


def bar(total: int, name: str, unit: str, initial: int = 0) -> tqdm.tqdm | Lines:
  """Returns a progress bar on stderr, a context manager with `update` and `set_postfix_str`."""
  if not sys.stderr.isatty():
    return Lines(total, name, unit, initial)
  return tqdm.tqdm(
    total=total, initial=initial, desc=name, unit=unit, dynamic_ncols=True, mininterval=_BAR_S
  )


class Lines:
  """What `bar` shows in a file: where it goes on, one line a minute, and one at the end."""

  def __init__(
    self, total: int, name: str, unit: str, initial: int = 0, file: TextIO | None = None
  ):
    self.n, self._total, self._name, self._unit = initial, total, name, unit
    self._initial, self._file, self._postfix = initial, file, ''
    self._began = self._said = time.monotonic()
    if initial:
      print(f'{name}: goes on at {initial}/{total} {unit}s', file=file or sys.stderr, flush=True)

  def update(self, num: int = 1) -> None:
    """Counts what is done."""
    self.n += num
    if time.monotonic() - self._said >= _LINE_S:
      self._say()

  def set_postfix_str(self, text: str, refresh: bool = True) -> None:
    """Sets what stands at the end of a line."""
    self._postfix = text

  def _say(self) -> None:
    self._said = time.monotonic()
    meter = tqdm.tqdm.format_meter(
      self.n,
      self._total,
      self._said - self._began,
      unit=self._unit,
      initial=self._initial,
      bar_format='{n_fmt}/{total_fmt} {unit}s, {rate_fmt}, {elapsed} so far, {remaining} left',
    )
    text = ' '.join(f'{self._name}: {meter}, {self._postfix}'.removesuffix(', ').split())
    print(text, file=self._file or sys.stderr, flush=True)

  def close(self) -> None:
    """Writes the last line."""
    self._say()

  def __enter__(self) -> Lines:
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()
