"""Proposals on Apache Beam: the same work, on many machines.

Beam maps; what is mapped is what one machine does too, and so is the journal.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from csrm_jax.augmentation import categories
from csrm_jax.augmentation.proposers import Judge, Proposer
from csrm_jax.core import checks
from csrm_jax.safety.schema import Example

_lock = threading.Lock()
# A model takes long to load: a process does so once, for the only run that it works for.
_made: dict[str, tuple[Proposer, Judge | None]] = {}


def make_map(
  key: str,
  make_proposer: Callable[[], Proposer],
  make_judge: Callable[[], Judge | None],
  options: Sequence[str],
  folder: str | os.PathLike,
  count: Callable[[dict[str, float]], None],
) -> Callable[..., Iterator[list[categories.Checked]]]:
  """Returns what takes the place of `map` in `categories.propose_all`.

  Results come when all work is done; `count` is called with what each piece took. A run that was
  killed finds the replies of a language model in its cache, which the workers have to share.

  Args:
    key: Names the run; within a process, equal keys share a proposer and a judge.
    make_proposer: Called once a process, and picklable, as `make_judge` is.
  """
  _import_beam()
  work = functools.partial(_propose, key, make_proposer, make_judge)

  def mapped(fn: Any, pieces: Sequence[Sequence[Example]]) -> Iterator[list[categories.Checked]]:
    rows = [[example.to_dict() for example in piece] for piece in pieces]
    for result in run(work, rows, options, folder):
      count(result['usage'])
      yield [categories.Checked.from_dict(obj) for obj in result['checked']]

  return mapped


def _propose(
  key: str,
  make_proposer: Callable[[], Proposer],
  make_judge: Callable[[], Judge | None],
  rows: Sequence[Any],
) -> dict[str, Any]:
  """Returns the checked proposals of some examples, and what they took."""
  with _lock:  # Beam's threads share the process's proposer.
    if key not in _made:
      _made.clear()
      _made[key] = make_proposer(), make_judge()
    proposer, judge = _made[key]
    before = collections.Counter(proposer.usage())
    examples = [Example.from_dict(row, 'row') for row in rows]
    checked = categories.propose_some(examples, proposer, judge)
    used = collections.Counter(proposer.usage())
  used.subtract(before)
  return {'checked': list(map(dataclasses.asdict, checked)), 'usage': used}


def run(
  fn: Callable[[Any], Any], items: Sequence[Any], options: Sequence[str], folder: str | os.PathLike
) -> list[Any]:
  """Returns [fn(item) for item in items], made by a Beam pipeline.

  `fn` is picklable and maps JSON values. The folder is local or on any file system that Beam
  knows. Options are Beam's, such as '--runner=DataflowRunner'; by default all is done in this
  process.
  """
  beam = _import_beam()
  pipeline_options = beam.options.pipeline_options.PipelineOptions(list(options))
  filesystems = beam.io.filesystems.FileSystems
  prefix = f'{os.fspath(folder)}/part'
  with beam.Pipeline(options=pipeline_options) as pipeline:
    _ = (
      pipeline
      | 'Number' >> beam.Create([json.dumps(p) for p in enumerate(items)])
      | 'Spread' >> beam.Reshuffle()
      | 'Work' >> beam.Map(_apply, fn)
      | 'Write' >> beam.io.WriteToText(prefix)
    )
  found = {}
  for match in filesystems.match([f'{prefix}-*-of-*']):
    for file in match.metadata_list:
      with filesystems.open(file.path) as lines:
        found |= dict(json.loads(line) for line in lines)
  # Beam keeps no order: each result came with its number.
  return [found[number] for number in range(len(items))]


def _apply(line: str, fn: Callable[[Any], Any]) -> str:
  number, item = json.loads(line)
  return json.dumps([number, fn(item)])


def _import_beam() -> Any:
  try:
    import apache_beam
  except ImportError:
    raise ImportError(
      f'config.beam.enabled needs Apache Beam; {checks.install("beam")}, or set it to false'
    ) from None
  return apache_beam
