"""Runs a config file's sweep() and prints a comparison.

python launch/sweep.py --config=configs/rm.py --workdir=DIR --parallel=2 \\
  --seeds=0,1,2 --only=full,no_cca
python launch/sweep.py --config=configs/rm.py:mesh=v5e-16,model=llama3_8b \\
  --workdir=gs://BUCKET/sweep --launcher=sky --launcher_flags="--env BUCKET=b"

On this machine each run is a process of its own in DIR/<name>, with its output
in DIR/logs/<name>.log. A run whose report/summary.json is there is done, and
one that was interrupted resumes, so the same command continues a sweep. The
table also lands in DIR/table.md and DIR/table.json. Where there are rules or
verdicts of a development side runs measure these; --split=test is for the last
look. What else is said as --config.KEY=VALUE holds for every run.

--launcher=slurm, xpk or sky submits one job a run, through that script of
launch/ and with --launcher_flags, but for the runs that are done. It does not
know what is queued: look at them with --table, which starts nothing.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import dataclasses
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm
from etils import epath

from csrm_jax import config as config_lib
from csrm_jax.core import markdown
from csrm_jax.evals import bootstrap

KEYS = (
  'unseen/f1',
  'unseen/auprc',
  'unseen/smece',
  'seen/f1',
  'pairs/accuracy',
  'pairs/score_gap',
  'flip/consistency',
  'aligned/compliance',
  'aligned/true_helpfulness',
  'aligned/true_cosa',
  'time_s',
)
# The key that says which side of a split a run measures, and what is there where it measures one.
_SIDES = {'eval.real.side': 'eval.real.data_dir', 'eval.ruleworld_side': 'eval.ruleworld_examples'}
# The scripts of this folder that run a job elsewhere.
LAUNCHERS = ('local', 'slurm', 'xpk', 'sky')


@dataclasses.dataclass(frozen=True)
class Job:
  """One process of the sweep: its command, and the config it resolves to."""

  name: str
  group: str
  workdir: pathlib.Path | epath.Path
  command: tuple[str, ...]
  config: config_lib.ConfigDict

  @property
  def summary_path(self) -> pathlib.Path:
    return self.workdir / 'report' / 'summary.json'

  @property
  def log_path(self) -> pathlib.Path:
    return self.workdir.parent / 'logs' / f'{self.name}.log'


def make_jobs(
  config: str,
  workdir: pathlib.Path | epath.Path,
  seeds: Sequence[int] = (),
  only: Sequence[str] = (),
  split: str = 'dev',
  common: Mapping[str, Any] = types.MappingProxyType({}),
) -> list[Job]:
  """Returns the jobs of `config`, a path or path:argument, with the seeds innermost.

  Runs that measure one side of a split measure `split`, dev or test. `common` are overrides of
  every run.

  A file without sweep() and an unknown name or config key are a ValueError, a missing file is a
  FileNotFoundError.
  """
  path, _, base_arg = config.partition(':')
  module = config_lib.load_module(path)
  if not hasattr(module, 'sweep'):
    raise ValueError(f'{path} defines no sweep(): add one, or run it directly')
  runs = config_lib.expand_sweep(module.sweep)
  names = [run.name for run in runs]
  for name in only:
    if name not in names:
      raise ValueError(f'--only={name}: {path} has no such run; it has {", ".join(names)}')
  jobs = []
  for run in runs:
    if only and run.name not in only:
      continue
    arg = ','.join(part for part in (base_arg, run.arg) if part)
    for seed in seeds or (None,):
      overrides, name = dict(run.overrides) | dict(common), run.name
      if seed is not None:
        overrides['seed'] = seed
        name = f'{run.name}-seed{seed}'
      resolved = module.get_config(arg or None)
      config_lib.set_overrides(resolved, overrides)
      for key, side in _sides(resolved).items():
        if side != split:
          overrides[key] = split
          config_lib.set_overrides(resolved, {key: split})
      jobs.append(
        Job(
          name=name,
          group=run.name,
          workdir=workdir / name,
          command=(
            *(sys.executable, '-m', 'csrm_jax.main'),
            f'--config={path}:{arg}' if arg else f'--config={path}',
            *(f'--config.{key}={value}' for key, value in overrides.items()),
            f'--workdir={workdir / name}',
          ),
          config=resolved,
        )
      )
  return jobs


def _sides(config: config_lib.ConfigDict) -> dict[str, str]:
  """Returns {key: side} of the splits that a run measures a side of."""
  flat = config_lib.flatten(config)
  return {key: flat[key] for key, measured in _SIDES.items() if flat.get(measured)}


def run_job(job: Job) -> str | None:
  """Returns None once the job is done, or one line on why it failed.

  A finished run under another config is a failure too: its numbers would not be what the table says
  they are.
  """
  if job.summary_path.exists():
    old = config_lib.from_json((job.workdir / 'config.json').read_text())
    lines = '; '.join(config_lib.diff_config(old, job.config))
    return f'{job.workdir} is done with another config: {lines}' if lines else None
  job.log_path.parent.mkdir(parents=True, exist_ok=True)
  with open(job.log_path, 'ab') as log:
    code = subprocess.run(job.command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
  if code:
    return f'exit code {code}, see {job.log_path}'
  if not job.summary_path.exists():
    return f'it wrote no {job.summary_path}'
  return None


def run_jobs(jobs: Sequence[Job], parallel: int) -> dict[str, str]:
  """Returns {job name: reason} of the failed ones; runs `parallel` at once."""
  failures = {}
  with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
    futures = {pool.submit(run_job, job): job for job in jobs}
    done = concurrent.futures.as_completed(futures)
    for future in tqdm.tqdm(done, total=len(jobs), unit='run', smoothing=0):
      job = futures[future]
      reason = future.result()
      if reason is not None:
        failures[job.name] = reason
        tqdm.tqdm.write(f'{job.name} failed: {reason}', file=sys.stderr)
  return failures


def submission(job: Job, launcher: str, flags: Sequence[str] = ()) -> tuple[str, ...]:
  """Returns the command that submits a job through a script of launch/."""
  folder = pathlib.Path(__file__).parent
  args = job.command[3:]  # What follows python -m csrm_jax.main.
  name = re.sub(r'[^a-z0-9]+', '-', job.name.lower()).strip('-')
  if launcher == 'slurm':
    script = str(folder / 'slurm.sbatch')
    return 'sbatch', f'--job-name={name}', *flags, script, *args
  if launcher == 'xpk':
    return str(folder / 'xpk.sh'), *flags, f'--name={name}', '--', *args
  return (
    *('sky', 'jobs', 'launch', '--yes', '--detach-run', f'--name={name}'),
    *(*flags, str(folder / 'sky.yaml'), '--env', f'ARGS={shlex.join(args)}'),
  )


def submit_jobs(jobs: Sequence[Job], launcher: str, flags: Sequence[str]) -> dict[str, str]:
  """Returns {job name: reason} of those that could not be submitted."""
  failures = {}
  for job in jobs:
    command = submission(job, launcher, flags)
    try:
      code = subprocess.run(command, check=False).returncode
    except OSError as error:
      failures[job.name] = f'cannot run {command[0]}: {error.strerror}'
    else:
      if code:
        failures[job.name] = f'{command[0]} ended with exit code {code}'
  return failures


def make_table(
  summaries: Sequence[tuple[str, Mapping[str, Any]]], keys: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
  """Returns {group: {key: {mean, half_width, values}}} of finished runs' (group, summary).

  A run whose summary lacks a key adds nothing to it.
  """
  table: dict[str, dict[str, dict[str, Any]]] = {}
  for group in dict.fromkeys(group for group, _ in summaries):
    row = table[group] = {}
    for key in keys:
      values = [
        float(summary[key])
        for name, summary in summaries
        if name == group and summary.get(key) is not None
      ]
      if values:
        mean, half = bootstrap.mean_and_interval(values)
        half = None if math.isnan(half) else half
        row[key] = {'mean': mean, 'half_width': half, 'values': values}
  return table


def format_table(table: Mapping[str, Mapping[str, Mapping[str, Any]]], keys: Sequence[str]) -> str:
  """Returns a Markdown table: mean ± half width of the 95 % interval."""
  keys = [key for key in keys if any(key in row for row in table.values())]
  rows = []
  for group, row in table.items():
    count = max((len(cell['values']) for cell in row.values()), default=0)
    rows.append((group, count, *(_format_cell(row.get(key)) for key in keys)))
  return markdown.table(['run', 'n', *keys], rows) + '\n'


def _format_cell(cell: Mapping[str, Any] | None) -> str:
  if cell is None:
    return markdown.NONE
  digits = 3 if abs(cell['mean']) < 100 else 0
  numbers = (x for x in (cell['mean'], cell['half_width']) if x is not None)
  return ' ± '.join(f'{x:.{digits}f}' for x in numbers)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  def strings(text: str) -> list[str]:
    return [part.strip() for part in text.split(',') if part.strip()]

  def integers(text: str) -> list[int]:
    return [int(part) for part in strings(text)]

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--config', required=True, help='config file, or file:argument')
  add('--workdir', required=True, help='one folder per run is made in it')
  add('--parallel', type=int, default=1, help='runs at a time')
  add('--seeds', type=integers, default=[], help='as in 0,1,2')
  add('--only', type=strings, default=[], help='names of runs, as in full')
  add('--split', choices=('dev', 'test'), default='dev', help='what runs measure; choose by dev')
  add('--keys', type=strings, default=list(KEYS), help='columns of the table')
  add('--launcher', choices=LAUNCHERS, default='local', help='where it runs')
  add('--launcher_flags', type=shlex.split, default=[], help='of that script')
  add('--table', action='store_true', help='of what is done; starts nothing')
  add('--dry_run', action='store_true', help='print the commands')
  args, others = parser.parse_known_args(argv)
  args.overrides = dict(_override(parser, flag) for flag in others)
  if args.parallel < 1:
    parser.error(f'--parallel={args.parallel}: must be at least 1')
  if args.launcher_flags and args.launcher == 'local':
    parser.error('--launcher_flags need a --launcher other than local')
  if '://' in args.workdir and args.launcher == 'local' and not args.table:
    parser.error(f'--workdir={args.workdir}: runs on this machine log to a folder of it')
  return args


def _override(parser: argparse.ArgumentParser, flag: str) -> tuple[str, Any]:
  key, equals, value = flag.removeprefix('--config.').partition('=')
  if not flag.startswith('--config.') or not equals:
    parser.error(f'unrecognized argument: {flag}; of a config it is --config.KEY=VALUE')
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return key, value


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 1 if a run failed, 2 for bad input."""
  args = _parse_args(argv)
  workdir = epath.Path(args.workdir).expanduser()
  if '://' not in args.workdir:
    workdir = pathlib.Path(workdir).absolute()
  try:
    jobs = make_jobs(args.config, workdir, args.seeds, args.only, args.split, args.overrides)
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  if args.table:
    jobs = [job for job in jobs if job.summary_path.exists()]
    if not jobs:
      print('no run is done')
      return 0
  elif args.launcher != 'local':
    todo = [job for job in jobs if not job.summary_path.exists()]
    if todo:
      return _submit(todo, args)
  if args.dry_run:
    for job in jobs:
      print(shlex.join(job.command))
    return 0
  return _report(jobs, run_jobs(jobs, args.parallel), workdir, args.keys)


def _submit(jobs: Sequence[Job], args: argparse.Namespace) -> int:
  if args.dry_run:
    for job in jobs:
      print(shlex.join(submission(job, args.launcher, args.launcher_flags)))
    return 0
  failures = submit_jobs(jobs, args.launcher, args.launcher_flags)
  for name, reason in failures.items():
    print(f'{name} was not submitted: {reason}', file=sys.stderr)
  print(f'{len(jobs) - len(failures)} runs submitted; --table compares those that are done')
  return 1 if failures else 0


def _report(
  jobs: Sequence[Job],
  failures: Mapping[str, str],
  workdir: pathlib.Path | epath.Path,
  keys: Sequence[str],
) -> int:
  """Prints and writes the table of runs; returns the exit code."""
  summaries = [
    (job.group, json.loads(job.summary_path.read_text()))
    for job in jobs
    if job.name not in failures
  ]
  table = make_table(summaries, keys)
  text = format_table(table, keys)
  sides = sorted({side for job in jobs for side in _sides(job.config).values()})
  content = {'table': table, 'failures': dict(failures), 'splits': sides}
  (workdir / 'table.md').write_text(text)
  (workdir / 'table.json').write_text(json.dumps(content, indent=2) + '\n')
  print(text)
  if not sides:
    print('these runs have test rows only: choose nothing by this table', file=sys.stderr)
  for job in jobs:
    if job.name in failures:
      print(f'{job.name} failed: {failures[job.name]}', file=sys.stderr)
      print(_tail(job.log_path), file=sys.stderr)
  return 1 if failures else 0


def _tail(path: pathlib.Path, num_lines: int = 20) -> str:
  if not path.exists():
    return ''
  lines = path.read_text(errors='replace').splitlines()[-num_lines:]
  return '\n'.join(f'  | {line}' for line in lines)


if __name__ == '__main__':
  sys.exit(main())
