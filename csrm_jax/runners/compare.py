"""Puts the reports of several models side by side, or of several alignments."""

from __future__ import annotations

import glob
import pathlib
import re
from typing import Any

import ml_collections

from csrm_jax import config as config_lib
from csrm_jax.evals import comparison, policy, report


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/report from the reports of config.compare.

  Nothing is scored again: the models must have been tested on the same rows,
  the policies asked the same prompts.
  """
  # Patterns may overlap.
  folders = list(
    dict.fromkeys(
      folder for pattern in config.compare for folder in _find(pathlib.Path(pattern).expanduser())
    )
  )
  if len(folders) < 2:
    raise ValueError(
      f'config.compare names {len(folders)} work directories: give two or '
      "more, as --config.compare=\"('/tmp/a', '/tmp/b')\""
    )
  names = [folder.name for folder in folders]
  if len(set(names)) < len(names):
    raise ValueError(
      f'config.compare: the folders are called {", ".join(names)}; a name '
      'tells the models apart, so rename one'
    )
  results = {folder.name: report.read_results(folder / 'report') for folder in folders}
  aligned = [folder for folder in folders if 'alignment' in results[folder.name]]
  if aligned:
    other = next((f for f in folders if f not in aligned), None)
    if other is not None:
      raise ValueError(
        f'config.compare: {aligned[0]} is an alignment and {other} is not; '
        'compare either policies or reward models'
      )
    path = _write_alignments(config, workdir, folders, results)
  else:
    path = comparison.write_comparison(
      workdir / 'report',
      results,
      title=config.title or 'Comparison',
      reference=config.reference,
      num_samples=config.num_samples,
    )
  print(f'report: {path}')


def _find(pattern: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folder; for a pattern, those that match and have a report."""
  if '*' not in str(pattern):
    return [pattern]
  return sorted(
    pathlib.Path(path)
    for path in glob.glob(str(pattern))
    if (pathlib.Path(path) / 'report' / 'metrics.json').is_file()
  )


def _write_alignments(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  folders: list[pathlib.Path],
  results: dict[str, dict[str, Any]],
) -> pathlib.Path:
  found = policy.compare_runs(
    [_read_run(folder, results[folder.name]) for folder in folders], config.reference
  )
  return report.write_report(
    workdir / 'report',
    found,
    title=config.title or 'Aligned policies',
    summary={'num_runs': len(folders)},
  )


def _read_run(folder: pathlib.Path, results: dict[str, Any]) -> policy.Run:
  made = config_lib.from_json((folder / 'config.json').read_text('utf-8'))
  reward = made.reward
  name = reward.name
  if name == 'csrm':  # one a seed is the same reward
    name = re.sub(r'-seed\d+$', '', pathlib.Path(reward.checkpoint).name)
  elif name == 'alphaalign':
    name = f'{name}: {reward.variant}, {pathlib.Path(reward.refusal).name}'
  return policy.Run(
    made.algorithm,
    name,
    made.data.rules,
    made.seed,
    reward.get('a', 1.0),
    reward.get('b', 0.0),
    {which: sets[policy.ALL] for which, sets in results['alignment']['policies'].items()},
  )
