"""Small runs of every job, each in a process that can be killed, and what must come out of them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from csrm_jax import config as config_lib, main
from csrm_jax.core import files
from csrm_jax.evals import bootstrap
from csrm_jax.ruleworld import examples
from csrm_jax.runners import evaluate

ROOT = pathlib.Path(__file__).parents[2]
TINY = {'num_layers': 1, 'embed_dim': 16, 'num_heads': 2, 'num_kv_heads': 1}
TINY |= {'head_dim': 8, 'mlp_dim': 16, 'unroll': 1}
_IS_LOG = re.compile(r'journal|completions|log\.jsonl|paid\.jsonl|rollouts|metrics\.jsonl\.\d')
# What a clock or a machine decides.
_MEASURED = ('time', 'peak_memory', 'usage_of_last_run')

# A server that has imported everything forks the runs: they begin at once.
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(
  [f'csrm_jax.runners.{name}' for name in ('train_rm', 'evaluate', 'augment', 'export', 'align')]
  + ['tests.chaos.jobs', 'orbax.checkpoint', 'tensorboardX']
)


def _config(file: str, arg: str | None = None, **changes: Any) -> Any:
  config = config_lib.load_module(ROOT / 'configs' / f'{file}.py').get_config(arg)
  for key, value in changes.items():
    section, last = config_lib.find(config, key.replace('__', '.'))
    section[last] = value
  return config


def train(inputs: pathlib.Path) -> Any:
  config = _config(
    *('rm', 'smoke'),
    num_steps=8,
    log_every=1,
    checkpoint_every=2,
    optim__warmup_steps=2,
    data__batch_size=2,
    eval__ruleworld_examples=4,
    model__init='',
  )
  with config.model.unlocked():
    config.model.overrides.update(TINY)
  return config


def augment(inputs: pathlib.Path) -> Any:
  return _config('augment', 'smoke', strictness__threshold=0.5, strictness__max_pairs=50)


def score(inputs: pathlib.Path) -> Any:
  evaluate._ROWS_AT_ONCE = 8  # so that a stop cuts the file in many
  path = inputs / 'rows.jsonl'
  if not path.exists():
    rows = [{**examples.training_example(0, i).to_dict(), 'label': None} for i in range(48)]
    files.write(path, ''.join(json.dumps(row | {'violated': []}) + '\n' for row in rows))
  return _config('eval', checkpoint=str(inputs / 'train'), conversations=str(path))


def export(inputs: pathlib.Path) -> Any:
  return _config('export', f'checkpoint={inputs / "train"}')


def align(inputs: pathlib.Path) -> Any:
  # The reward model of a few steps has seen few words.
  arg = f'checkpoint={inputs / "train"},smoke'
  return _config('rl', arg, reward__allow_out_of_domain=True, num_steps=4, checkpoint_every=1)


JOBS: dict[str, Callable[[pathlib.Path], Any]] = {
  'train': train,
  'augment': augment,
  'score': score,
  'export': export,
  'align': align,
}


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a finished run has made, without what a clock says."""
  found: dict[str, Any] = {}
  for path in sorted(workdir.rglob('*')):
    name = str(path.relative_to(workdir))
    assert not name.endswith('.tmp'), name
    if path.is_dir() or name.startswith(('checkpoints', 'events', 'cache', 'zero_shot', 'scores')):
      continue
    if path.name in ('metrics.jsonl', 'looks.jsonl', 'card.json', 'summary.json'):
      found[name] = [_timeless(json.loads(line)) for line in _objects(path)]
    # Logs and journals tell of starts, too.
    elif path.suffix in ('.jsonl', '.safetensors', '.model') and not _IS_LOG.search(name):
      found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
  for info in sorted(workdir.glob('checkpoints/*/info/metadata')):
    content = json.loads(info.read_text())['content']
    content['data_state'].pop('window')
    found[str(info)[len(str(workdir)) :]] = content
  return found


def _objects(path: pathlib.Path) -> list[str]:
  text = path.read_text()
  return text.splitlines() if path.suffix == '.jsonl' else [text]


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in row.items() if not k.startswith(_MEASURED)}


@dataclasses.dataclass
class Run:
  """A run in a process of its own, whose output goes to a file."""

  name: str
  inputs: pathlib.Path
  workdir: pathlib.Path
  limits: dict[str, int] = dataclasses.field(default_factory=dict)
  dies_at: int = 0  # SIGKILL comes just before the so manyth change of a file; 0: never
  clock: str = ''  # 'back' or 'jumps': what the wall clock does

  def __post_init__(self):
    self.out = self.workdir.with_name(f'{self.workdir.name}-{time.monotonic_ns()}.out')
    args = self.name, str(self.inputs), str(self.workdir), str(self.out)
    options = {'limits': self.limits, 'dies_at': self.dies_at, 'clock': self.clock}
    self.process = _CONTEXT.Process(target=_work, args=args, kwargs=options, daemon=True)
    self.process.start()

  def wait(self, seconds: float = 300) -> int | None:
    """Returns the exit code, or None if it still runs."""
    self.process.join(seconds)
    return self.process.exitcode

  def said(self) -> str:
    return self.out.read_text() if self.out.exists() else ''


def warm_up() -> None:
  """Waits until the server of runs has imported everything."""
  process = _CONTEXT.Process(target=os.getpid)
  process.start()
  process.join()


_CHANGES = ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.link', 'os.truncate', 'shutil.')


def _die_at(last: int, below: str) -> None:
  """Counts what changes a file below a folder, and kills this process at the last one."""
  count = itertools.count(1)

  def hook(event: str, args: tuple[Any, ...]) -> None:
    if event == 'open':
      changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    else:
      changes = event.startswith(_CHANGES)
    if changes and str(args[0]).startswith(below) and next(count) == last:
      print(f'\nkilled at change {last}: {event} {args[0]}', flush=True)
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)


def _set_clock(clock: str) -> None:
  now, start, reads = time.time, time.time(), itertools.count()
  if clock == 'back':  # months behind, and running backwards
    time.time = lambda: start - 10**7 - (now() - start)
  elif clock == 'jumps':  # a day forth and back, between any two reads
    time.time = lambda: now() + 86_400 * (next(reads) % 3 - 1)


def _work(
  name: str,
  inputs: str,
  workdir: str,
  out: str,
  *,
  limits: dict[str, int],
  dies_at: int,
  clock: str,
) -> None:
  file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  interval, code = bootstrap.interval, 1
  bootstrap.interval = lambda *args, **options: interval(*args, **options | {'num_samples': 3})
  _set_clock(clock)
  if dies_at:
    _die_at(dies_at, workdir)
  try:
    if limits:
      import resource

      # Python ignores the signal, and writing fails as on a full disk.
      for limit, value in limits.items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    main.use_compilation_cache()
    main.run(JOBS[name](pathlib.Path(inputs)), workdir)
    code = 0
  except (ValueError, OSError, ImportError) as error:
    print('\nerror:', ' '.join(str(error).split()))
    code = 2
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def undisturbed(name: str, inputs: pathlib.Path) -> tuple[dict[str, Any], float]:
  """Returns the outcome of a run in inputs/NAME, and the seconds that it takes."""
  workdir = inputs / name
  began = time.monotonic()
  if not workdir.exists():
    run = Run(name, inputs, workdir)
    assert run.wait() == 0, run.said()
  return outcome(workdir), time.monotonic() - began


def with_kills(
  name: str, inputs: pathlib.Path, workdir: pathlib.Path, num: int, took: float, rng: random.Random
) -> dict[str, Any]:
  """Returns the outcome of a run that is killed `num` times: anywhere, and where it writes."""
  while num:
    run = Run(name, inputs, workdir, dies_at=rng.choice((0, rng.randint(1, 80))))
    if run.wait(300 if run.dies_at else rng.uniform(0.05, 1.1) * took) is None:
      run.process.kill()
    if run.wait() == -signal.SIGKILL:
      num -= 1
    else:
      # It was finished first, even between the two lines above: another one.
      assert run.wait() == 0, run.said()
      shutil.rmtree(workdir)
  run = Run(name, inputs, workdir)
  assert run.wait() == 0, run.said()
  return outcome(workdir)
