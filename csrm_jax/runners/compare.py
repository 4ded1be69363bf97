"""Puts the reports of several models side by side."""

from __future__ import annotations

import pathlib

import ml_collections

from csrm_jax.evals import comparison, report


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/report from the reports of config.compare.

  Nothing is scored again: the models must have been tested on the same rows.
  """
  folders = [pathlib.Path(folder).expanduser() for folder in config.compare]
  if len(folders) < 2:
    raise ValueError(
        f'config.compare names {len(folders)} work directories: give two or '
        'more, as --config.compare="(\'/tmp/a\', \'/tmp/b\')"')
  names = [folder.name for folder in folders]
  if len(set(names)) < len(names):
    raise ValueError(
        f'config.compare: the folders are called {", ".join(names)}; a name '
        'tells the models apart, so rename one')
  path = comparison.write_comparison(
      workdir / 'report',
      {folder.name: report.read_results(folder / 'report')
       for folder in folders},
      title=config.title or 'Comparison', reference=config.reference,
      num_samples=config.num_samples)
  print(f'report: {path}')
