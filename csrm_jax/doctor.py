"""What is installed on this machine, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence

from csrm_jax import config as config_lib
from csrm_jax.core import checks, writer

# Extras that people need on top, and what each is for.
EXTRAS = {
  'hf': 'public models: tokenizers, chat templates, weights',
  'evals': 'rule retrieval in benchmarks',
  'serve': 'the server',
  'http': 'rewards and verdicts from a server',
  'notebooks': 'the notebooks, and all that they use',
  'parquet': 'Parquet and Arrow files',
  'tfds': 'ArrayRecord data sets',
  'gcs': 'work directories in buckets',
  'openai': 'proposals from an endpoint',
  'loggers': 'wandb, trackio and mlflow',
  'beam': 'augmentation on many machines',
}


def report(needed: Sequence[str] = ()) -> str:
  """Returns the report, one fact a line; what is missing comes with the way to get it.

  Args:
    needed: The extras that must be there: then these are all that is said of extras and disks.

  Raises:
    ImportError: One of them is not.
    ValueError: There is no such extra.
  """
  lines = [f'Python {platform.python_version()} on {platform.platform()}: {sys.executable}']
  lines += _packages()
  if needed:
    for extra in needed:
      checks.one_of('extra', extra, EXTRAS)
      if missing := _missing(extra):
        raise ImportError(f'{", ".join(missing)} missing: {checks.install(extra)}')
    return '\n'.join([*lines, *_devices()])
  lines += _devices()
  lines += ['', 'Extras', *_extras()]
  lines += ['', 'Disk', *_disk()]
  lines += ['', f'configs: {config_lib.CONFIGS}', f'package: {pathlib.Path(__file__).parent}']
  return '\n'.join(lines)


def _packages() -> list[str]:
  found = {name: _version(name) for name in writer.PACKAGES}
  return [', '.join(f'{name} {version}' for name, version in found.items() if version)]


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return ''


def _devices() -> list[str]:
  try:
    import jax

    devices = jax.devices()
  except Exception as error:  # Whatever a broken driver says.
    return [f'JAX finds no device: {checks.reason(error)}; reinstall jax for this machine']
  said = [f'{len(devices)} device(s): {devices[0].device_kind} ({jax.default_backend()})']
  if jax.default_backend() == 'cpu':
    for extra, sign in {'cuda12': '/dev/nvidia0', 'tpu': '/dev/accel0'}.items():
      if pathlib.Path(sign).exists():
        said.append(f'  {sign} is here, but JAX does not use it: {checks.install(extra)}')
  return said


def _extras() -> list[str]:
  lines = []
  for extra, purpose in EXTRAS.items():
    missing = _missing(extra)
    state = f'missing {", ".join(missing)}: {checks.install(extra)}' if missing else 'ok'
    lines.append(f'  {extra:9} {purpose}: {state}')
  return lines


def _missing(extra: str) -> list[str]:
  return [name for name in _requirements(extra) if not _version(name)]


def _requirements(extra: str) -> list[str]:
  """Returns the names of the packages of an extra, as they were when this was installed."""
  try:
    wanted = importlib.metadata.requires('csrm_jax') or []
  except importlib.metadata.PackageNotFoundError:
    return ['csrm_jax']
  of_extra = re.compile(rf'extra\s*==\s*[\'"]{extra}[\'"]')
  return [
    re.split(r'[\s<>=!~;\[]', text, maxsplit=1)[0] for text in wanted if of_extra.search(text)
  ]


def _disk() -> list[str]:
  lines = []
  cache = os.environ.get('JAX_COMPILATION_CACHE_DIR', '~/.cache/csrm_jax')
  places = {'working directory': '.', 'temporary files': tempfile.gettempdir()}
  places |= {'compiled programs': cache} if cache else {}
  for name, place in places.items():
    path = pathlib.Path(place).expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free / 2**30
    can = 'writable' if os.access(there, os.W_OK) else 'NOT writable: choose another folder'
    lines.append(f'  {name}: {path}, {free:.1f} GiB free, {can}')
  return lines
