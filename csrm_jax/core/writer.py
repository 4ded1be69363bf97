"""The metrics of a run and its manifest."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from csrm_jax.core import files, trackers
from csrm_jax.core.checks import show

# The packages whose versions can change a number or a file format.
PACKAGES = (
  *('csrm_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy'),
  *('sentencepiece', 'tokenizers', 'scikit-learn', 'relplot'),
)


def make_manifest() -> dict[str, Any]:
  """Returns what must be known to repeat a run: versions and devices."""
  packages = {}
  for name in PACKAGES:
    try:
      packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      packages[name] = None
  devices = jax.devices()
  return {
    'packages': packages,
    'python': platform.python_version(),
    'platform': platform.platform(),
    'num_cpus': os.cpu_count(),
    'num_processes': jax.process_count(),
    'num_devices': len(devices),
    'device_kind': devices[0].device_kind,
    'backend': jax.default_backend(),
    'command': shlex.join([*_program(), *sys.argv[1:]]),
    'commit': _commit(),
  }


def _program() -> list[str]:
  name = pathlib.Path(sys.argv[0]).name
  modules = {'main.py': ['python', '-m', 'csrm_jax.main'], '__main__.py': ['csrm_jax']}
  return modules.get(name, [name])


def _commit() -> str | None:
  """Returns the commit of the checkout that this runs from, with a + where files have changed."""
  root = pathlib.Path(__file__).parents[2]
  if not (root / '.git').exists():
    return None
  found = []
  for command in ('rev-parse HEAD', 'status --porcelain --untracked-files=no'):
    try:
      done = subprocess.run(
        ['git', '-C', root, *command.split()], capture_output=True, text=True, timeout=10
      )
    except (OSError, subprocess.TimeoutExpired):
      return None
    found.append(done.stdout.strip())
  return found[0][:12] + '+' * bool(found[1]) if found[0] else None


def read_manifest(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the work directory's manifest: of the newest start, and `starts`, the list of all."""
  path = pathlib.Path(workdir) / 'manifest.json'
  manifest = files.read_json(path) if path.exists() else {}
  starts = manifest.get('starts', []) if isinstance(manifest, dict) else None
  if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
    raise ValueError(
      f'{path}: it holds {show(manifest)}, which is no manifest; move it away, and the same '
      'command goes on without it'
    )
  return manifest


def add_start(workdir: str | os.PathLike, extra: Mapping[str, Any]) -> None:
  """Adds a start of the run to its manifest: its time, `make_manifest()` and `extra`."""
  if jax.process_index() != 0:
    return
  manifest = read_manifest(workdir)
  now = {'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), **make_manifest(), **extra}
  starts = [*manifest.get('starts', []), now]
  path = pathlib.Path(workdir) / 'manifest.json'
  files.write_json(path, manifest | now | {'starts': starts}, sort_keys=True)


def update_manifest(workdir: str | os.PathLike, extra: Mapping[str, Any]) -> None:
  """Adds `extra` (JSON values) to what the manifest says about the newest start."""
  if jax.process_index() != 0:
    return
  manifest = read_manifest(workdir) | dict(extra)
  for start in manifest.get('starts', [])[-1:]:
    start |= extra
  files.write_json(pathlib.Path(workdir) / 'manifest.json', manifest, sort_keys=True)


class MetricsWriter:
  """Appends {'step': ..., 'area/name': ...} lines to workdir/metrics.jsonl.

  Every line reaches the operating system at once, so a killed process loses none. Write the
  metrics of a step before its checkpoint. Only the first process of several writes.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    resume_step: int | None = None,
    loggers: Sequence[str] = ('jsonl', 'tensorboard'),
  ):
    """Opens the file and the other loggers, names of trackers.LOGGERS.

    Lines after the restored `resume_step` are dropped, because they will be written again: with
    -1 (a fresh run) all lines, with None no line.
    """
    self._file = None
    if jax.process_index() != 0:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'metrics.jsonl'
    if resume_step is not None:
      # Else a resumed run would have two lines for one step.
      files.cut_log(path, resume_step)
    self._file = open(path, 'a', encoding='utf-8', buffering=1)  # noqa: SIM115
    self._trackers = trackers.start(loggers, workdir, resume_step)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes scalars (Python, NumPy or JAX) of one step; NaN and infinity become null."""
    if self._file is None:
      return
    values = {name: float(value) for name, value in metrics.items()}
    line = {'step': int(step)}
    # JSON has no word for NaN and infinity.
    line |= {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(json.dumps(line) + '\n')
    for tracker in self._trackers:
      tracker.log(int(step), values)

  def flush(self) -> None:
    """Brings everything written so far to the disk."""
    if self._file is not None:
      self._file.flush()
      os.fsync(self._file.fileno())
      for tracker in self._trackers:
        tracker.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._file is not None:
      self.flush()
      self._file.close()
      for tracker in self._trackers:
        tracker.close()
      self._file = None

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *unused) -> None:
    self.close()
