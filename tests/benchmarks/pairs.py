"""Measures sides against each other in pairs: A B A B, each side in a process of its own.

A benchmark script names its sides, functions of the module that take the arguments and return a
function of a case:

  def make_ours(args):
    model = load(args.model, args.dtype)
    return lambda case: model.score(case)  # returns when the result is there

  def make_peer(args): ...

  if __name__ == '__main__':
    args = pairs.parser(__doc__, model=DEFAULT).parse_args()
    cases = {'one rule set': prompts, ...}
    results = pairs.compare('scoring', [make_ours, make_peer], cases, args)

`results[case][side]` is what the side returned last, for the script to compare. Of each run there
are CPU seconds of the process (all its threads, no children), wall seconds and the highest memory.
The first run of a side, which compiles, is kept apart. A ratio is the other side's time over the
first side's, pair by pair: above 1, the first side is faster.

Processes inherit the affinity and the environment (`taskset -c 0` for one core). Results are added
to tests/benchmarks/results/NAME.json, by dtype and case, so that a benchmark can be run in parts:
`--cases=a,b`. `--python=SIDE=PATH` runs a side under another interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / 'results'
_ROOT = pathlib.Path(__file__).parents[2]
# Whose versions are written down, where a side has imported them.
_PACKAGES = ('jax', 'jaxlib', 'flax', 'torch', 'transformers', 'peft', 'trl', 'llama_cpp', 'vllm')


def parser(doc: str, **defaults: Any) -> argparse.ArgumentParser:
  """Returns a parser of the options that all benchmarks have; `defaults` change theirs."""
  made = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument('--model', default='', help='a Hugging Face folder')
  made.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  made.add_argument('--pairs', type=int, default=5, help='timed runs of each side')
  made.add_argument('--cases', default='', help='the cases to run, all by default: a,b')
  made.add_argument('--sides', default='', help='the sides to run, all by default: ours,peer')
  made.add_argument('--python', action='append', default=[], help='SIDE=PATH of an interpreter')
  made.add_argument('--no_json', action='store_true', help='prints only')
  made.set_defaults(**defaults)
  return made


def num_threads() -> int:
  """Returns how many cores this process may use."""
  return len(os.sched_getaffinity(0))


def compare(
  name: str,
  sides: Sequence[Callable[..., Any]],
  cases: Mapping[str, Any],
  args: argparse.Namespace,
  work: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
  """Returns {case: {side: its last result}}; prints a table and writes the JSON of `name`.

  Args:
    name: Of the file of results.
    sides: Functions `make_SIDE` of the script's module, the one that others are compared to first.
    cases: {name: anything that pickle takes}.
    args: Of `parser`.
    work: {case: what there is to do in it, such as tokens}, written down beside the times.
  """
  pythons = dict(text.split('=', 1) for text in args.python)
  chosen = [c for c in args.cases.split(',') if c] or list(cases)
  wanted = [s for s in args.sides.split(',') if s] or [_side(make) for make in sides]
  results: dict[str, dict[str, Any]] = {}
  workers = {
    _side(make): _Worker(make, args, pythons.get(_side(make), sys.executable))
    for make in sides
    if _side(make) in wanted
  }
  try:
    for case in chosen:
      results[case], runs = {}, {side: [] for side in workers}
      for turn in range(1 + args.pairs):
        for side, worker in workers.items():
          results[case][side], run = worker.run(cases[case])
          runs[side].append(run)
          if not turn:
            print(f'{case}, {side}, first run: {run["wall_s"]:.1f} s', file=sys.stderr, flush=True)
      versions = {side: worker.versions() for side, worker in workers.items()}
      record = _record(runs) | {'versions': versions, 'work': (work or {}).get(case)}
      _print(f'{name} {args.dtype}, {case}', record)
      if not args.no_json:
        write(name, args, case, record)
  finally:
    for worker in workers.values():
      worker.stop()
  return results


def _side(make: Callable[..., Any]) -> str:
  return make.__name__.removeprefix('make_')


def _record(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
  """Returns the numbers of a case, given the runs of each side; the first is no measurement."""
  record: dict[str, Any] = {'sides': {}, 'ratios': {}}
  names = ('cpu_s', 'wall_s')
  for side, (first, *timed) in runs.items():
    record['sides'][side] = {
      name: spread([run[name] for run in timed]) for name in names if timed
    } | {
      'first_s': first['wall_s'],
      'peak_bytes': max(run['peak_bytes'] for run in (first, *timed)),
      'start_bytes': first['start_bytes'],
    }
  base, *others = runs
  for other in others:
    record['ratios'][other] = {
      name: spread([b[name] / a[name] for a, b in zip(runs[base], runs[other], strict=True)][1:])
      for name in names
      if len(runs[base]) > 1
    }
  return record


def spread(values: Sequence[float]) -> dict[str, Any]:
  """Returns the least, the middle and the greatest of values, and all of them."""
  values = [float(f'{value:.5g}') for value in values]
  middle = statistics.median(values)
  return {'min': min(values), 'median': middle, 'max': max(values), 'all': values}


def _print(title: str, record: Mapping[str, Any]) -> None:
  """Prints a case's table; a ratio says how many times as fast the first side is."""
  rows = [('side', 'CPU s', 'wall s', 'first s', 'peak GB', 'ratio CPU', 'ratio wall')]
  for side, numbers in record['sides'].items():
    ratios = record['ratios'].get(side, {})
    rows.append(
      (
        side,
        *(_text(numbers.get(name)) for name in ('cpu_s', 'wall_s')),
        f'{numbers["first_s"]:.1f}',
        f'{numbers["peak_bytes"] / 1e9:.2f}',
        *(_text(ratios.get(name)) for name in ('cpu_s', 'wall_s')),
      )
    )
  print(f'\n{title}; median (min–max)')
  for row in rows:
    print('| ' + ' | '.join(row) + ' |')
  for side, versions in record['versions'].items():
    print(f'{side}: ' + ', '.join(f'{k} {v}' for k, v in versions.items()))
  sys.stdout.flush()


def _text(spread: Mapping[str, Any] | None) -> str:
  if not spread:
    return ''
  return f'{spread["median"]:.3g} ({spread["min"]:.3g}–{spread["max"]:.3g})'


def write(name: str, args: argparse.Namespace, case: str, record: Mapping[str, Any]) -> None:
  """Adds the record of a case to the JSON of a benchmark, in place of an older one."""
  path = RESULTS / f'{name}.json'
  found = json.loads(path.read_text()) if path.is_file() else {}
  # Nothing of where things lie on this machine.
  options = {k: v for k, v in vars(args).items() if k not in ('python', 'no_json', 'cases')}
  about = {
    'date': datetime.date.today().isoformat(),
    'machine': _machine(),
    'cores': num_threads(),
    'options': options | {'model': pathlib.Path(args.model).name},
  }
  found.setdefault(args.dtype, {})[case] = about | record
  RESULTS.mkdir(exist_ok=True)
  path.write_text(json.dumps(found, indent=1) + '\n')


def _machine() -> str:
  """Returns the name of the processor."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


# --- A side's process ------------------------------------------------------------------


class _Worker:
  """A process that makes a side once and runs it when asked."""

  def __init__(self, make, args, python):
    path = [str(_ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    self.process = subprocess.Popen(
      [python, __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=os.environ | {'PYTHONPATH': os.pathsep.join(path)},
    )
    script = os.path.abspath(sys.modules[make.__module__].__file__)
    self._ask((script, make.__name__, vars(args)))

  def run(self, case):
    """Returns (result, {'cpu_s', 'wall_s', 'peak_bytes', 'start_bytes'})."""
    return self._ask(('run', case))

  def versions(self):
    return self._ask(('versions', None))

  def stop(self):
    self.process.stdin.close()
    self.process.wait()

  def _ask(self, question):
    pickle.dump(question, self.process.stdin, protocol=4)
    self.process.stdin.flush()
    try:
      return pickle.load(self.process.stdout)
    except EOFError:
      raise RuntimeError('a side has failed; its error is above') from None


def _serve() -> None:
  """Answers a _Worker until its end of the pipe is closed."""
  # What libraries print must not come between the answers.
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)
  questions = sys.stdin.buffer

  def answer(value):
    pickle.dump(value, answers, protocol=4)
    answers.flush()

  script, name, args = pickle.load(questions)
  sys.path.insert(0, os.path.dirname(script))
  # The pickled cases may hold what the script defines.
  spec = importlib.util.spec_from_file_location('__mp_main__', script)
  module = importlib.util.module_from_spec(spec)
  sys.modules['__mp_main__'] = sys.modules['__main__'] = module
  spec.loader.exec_module(module)
  run = getattr(module, name)(argparse.Namespace(**args))
  answer(None)
  while True:
    try:
      what, case = pickle.load(questions)
    except EOFError:
      return
    answer(_timed(run, case) if what == 'run' else _versions())


def _timed(run, case):
  start_bytes = _reset_peak()
  wall, cpu = time.perf_counter(), time.process_time()
  result = run(case)
  spent = {'cpu_s': time.process_time() - cpu, 'wall_s': time.perf_counter() - wall}
  return result, spent | {'peak_bytes': _status('VmHWM'), 'start_bytes': start_bytes}


def _reset_peak() -> int:
  """Returns the bytes in use, from which the peak counts anew (Linux only)."""
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  return _status('VmRSS')


def _status(name: str) -> int:
  try:
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
  except (OSError, StopIteration):
    return 0


def _versions() -> dict[str, str]:
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    if name in sys.modules:
      found[name] = importlib.metadata.version(name)
  return found


if __name__ == '__main__':
  _serve()
