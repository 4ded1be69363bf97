"""The data card: what a user of augmented data must know of it."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from csrm_jax.augmentation import requests
from csrm_jax.core import files
from csrm_jax.data import catalogue


def make(
  config: ml_collections.ConfigDict, name: str, drops: Mapping[str, int], usage: Mapping[str, float]
) -> dict[str, Any]:
  """Returns what a user of the data must know of it."""
  source = config.source
  asked = {kind.__name__: task.instructions for kind, task in requests.TASKS.items()}
  is_worded = config.proposer != 'oracle'
  return {
    'source': source.name,
    'path': source.path,
    'source_digest': _digest(source.path) if source.path else '',
    'licence': source.licence or _licence(source.name),
    'proposer': config.proposer,
    'model': name,
    'judge': config.judge,
    'seed': config.seed,
    'prompts_digest': requests.prompts_digest() if is_worded else '',
    'prompts': asked if is_worded else {},
    'drops': dict(sorted(drops.items())),
    'usage_of_last_run': dict(usage),
  }


def write(workdir: pathlib.Path, card: Mapping[str, Any]) -> None:
  """Writes card.json and card.md."""
  files.write_json(workdir / 'card.json', card, indent=1)
  sections = {k: v for k, v in card.items() if isinstance(v, Mapping)}
  lines = ['# Data card', '']
  lines += [
    f'- {_words(key)}: {value if value != "" else "(not given)"}'
    for key, value in card.items()
    if key not in sections
  ]
  # What is long comes last.
  for key in sorted(sections, key=lambda key: key == 'prompts'):
    title = _words(key)
    lines += ['', f'## {title[0].upper()}{title[1:]}', '']
    lines += [f'- {k}: {v}' for k, v in sections[key].items()] or ['(none)']
  files.write(workdir / 'card.md', '\n'.join(lines) + '\n')


def _words(key: str) -> str:
  return key.replace('_', ' ')


def _licence(name: str) -> str:
  return catalogue.SETS[name].licence if name in catalogue.SETS else ''


def _digest(path: str) -> str:
  """Returns the sha256 of a file, or of all files in a folder."""
  root = pathlib.Path(path)
  files = sorted(root.rglob('*')) if root.is_dir() else [root]
  digest = hashlib.sha256()
  for file in files:
    if file.is_file():
      digest.update(hashlib.sha256(file.read_bytes()).digest())
  return digest.hexdigest()
