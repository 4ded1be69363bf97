"""The command line: one config, one work directory, one runner.

python -m csrm_jax.main --config=configs/rm.py:model=tiny --workdir=DIR \\
  --config.optim.lr=1e-3
csrm_jax rm:model=tiny --workdir=DIR --config.optim.lr=1e-3
csrm_jax rm --help; csrm_jax doctor

A config that is not a file here is one of the package's: rm, or configs/rm.py.

Flags --config.KEY=VALUE override what the config file sets. The same command again resumes the
run in its work directory.

SIGTERM ends training after the current step, with a checkpoint and exit code 75.

Several hosts: give the same command on each, with --multihost on a cluster or with
--coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import sys
import types
from collections.abc import Sequence

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

# JAX and all that needs it is imported in the functions below: help and errors in the flags must
# not wait for it.
from csrm_jax import config as config_lib, usage
from csrm_jax.core import checks

# config.runner -> the module whose run(config, workdir) does the work. Modules are named and not
# imported, so that a run loads only what it needs.
RUNNERS = {
  'train_rm': 'csrm_jax.runners.train_rm',
  'pretrain': 'csrm_jax.runners.pretrain',
  'evaluate': 'csrm_jax.runners.evaluate',
  'benchmark': 'csrm_jax.runners.evaluate',
  'compare': 'csrm_jax.runners.evaluate',
  'refusals': 'csrm_jax.runners.evaluate',
  'real': 'csrm_jax.runners.real',
  'search': 'csrm_jax.runners.search',
  'calibrate': 'csrm_jax.runners.calibrate',
  'augment': 'csrm_jax.runners.augment',
  'export': 'csrm_jax.runners.export',
  'align': 'csrm_jax.runners.align',
  'compile': 'csrm_jax.runners.compile',
  'serve': 'csrm_jax.runners.serve',
}
# These write nothing into a work directory, and need none.
_WITHOUT_WORKDIR = ('serve',)
# What other programs call the work directory.
_WORKDIR_NAMES = ('output_dir', 'out_dir', 'out', 'output', 'save_dir', 'log_dir', 'dir')
# These have no prompts to show, though another runner of their module has.
_WITHOUT_PROMPTS = ('benchmark', 'compare', 'refusals', 'real', 'search')

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, with its argument after a colon.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of checkpoints, metrics and the report; or gs://BUCKET/DIR.'
)
_DEBUG = flags.DEFINE_bool(
  'debug', False, 'Show the traceback of an error in the input, and more logs.'
)
_SHOW_TOKENS = flags.DEFINE_bool(
  'show_tokens', False,
  'Print what the model sees of the first example, segment by segment, and exit; needs no'
  ' --workdir.',
)  # fmt: skip
_PRINT_CONFIG = flags.DEFINE_bool(
  'print_config', False, 'Print the config that the run would have, and exit; needs no --workdir.'
)
_MULTIHOST = flags.DEFINE_bool(
  'multihost', False,
  'This is one of several processes; the cluster (TPU slice, Slurm, MPI, Kubernetes) says which.',
)  # fmt: skip
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'host:port of process 0, where no cluster says it.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Processes in all, with --coordinator.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0, with --coordinator.'
)
_START_TIMEOUT_S = flags.DEFINE_integer(
  'start_timeout_s', 300, 'Seconds to wait for the other processes.'
)

# Bad input raises one of these; anything else is a bug and keeps its traceback. An ImportError
# means that the input needs an extra that is not installed.
_INPUT_ERRORS = (ValueError, OSError, ImportError)
# absl and config_flags raise these for bad flags, too.
_FLAG_ERRORS = (flags.Error, LookupError, AttributeError, TypeError, *_INPUT_ERRORS)


def run(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike | None, source: str = ''
) -> None:
  """Prepares the work directory, or gs://BUCKET/FOLDER, and runs config.runner in it.

  `source` is the config file, PATH or PATH:ARGUMENT: its defaults are those of knobs that the
  config of an older version there lacks.
  """
  runner = _find_runner(config)
  config_lib.check_no_secrets(config)
  if config.runner in _WITHOUT_WORKDIR:
    runner.run(config)
    return
  from csrm_jax.core import lease, remote

  with remote.local(workdir) as path:
    path = path.expanduser()
    # Asked before the directory is prepared: only one that was missing or empty may be removed.
    is_new = not path.is_dir() or not any(path.iterdir())
    config_lib.make_workdir(path)
    with lease.held(remote.home(path)):
      _run(runner, config, path, is_new, source)


def _run(
  runner: types.ModuleType,
  config: ml_collections.ConfigDict,
  path: pathlib.Path,
  is_new: bool,
  source: str,
) -> None:
  import jax

  from csrm_jax.core import profiling, writer

  path = config_lib.prepare_workdir(path, config, jax.process_index() == 0, source)
  try:
    made_of = {'config_digest': config_lib.digest(config), 'runner': config.runner}
    writer.add_start(path, made_of)
    runner.run(config, path)
  except jax.errors.JaxRuntimeError as error:
    if not profiling.is_out_of_memory(error):
      raise
    raise ValueError(profiling.explain(error, config_lib.flatten(config), path)) from error
  except _INPUT_ERRORS:
    if is_new and jax.process_index() == 0:
      config_lib.discard_workdir(path)
    raise


def show_tokens(config: ml_collections.ConfigDict) -> None:
  """Prints what the model sees of the first example; writes nothing."""
  runner = _find_runner(config)
  if not hasattr(runner, 'show_tokens') or config.runner in _WITHOUT_PROMPTS:
    raise ValueError(
      f'config.runner {config.runner!r} has no prompts to show; --show_tokens'
      ' works with configs/rm.py and configs/eval.py'
    )
  runner.show_tokens(config)


def _check_runner(name: str | None) -> None:
  if name not in RUNNERS:
    raise ValueError(f'config.runner is {name!r}: choose one of {", ".join(RUNNERS)}')


def _find_runner(config: ml_collections.ConfigDict) -> types.ModuleType:
  name = config.get('runner')
  _check_runner(name)
  return importlib.import_module(RUNNERS[name])


def use_compilation_cache() -> None:
  """Keeps compiled programs in ~/.cache/csrm_jax, for the next process.

  $JAX_COMPILATION_CACHE_DIR names another folder; if it is empty, there is no cache.
  """
  import jax

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    folder = pathlib.Path('~/.cache/csrm_jax').expanduser()
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError:
      return  # The home may be read-only; then every process compiles.
    jax.config.update('jax_compilation_cache_dir', str(folder))
  # JAX's defaults do not keep programs that compile in less than a second.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Returns the arguments that are not flags; exits with one line if a flag is bad."""
  try:
    rest = FLAGS(list(argv))
    if len(rest) > 1:
      raise ValueError(f'{rest[1]!r} is not a flag: write --name=value')
    if FLAGS['config'].value is None:
      raise ValueError('--config is required, as in --config=...')
    runner = FLAGS.config.get('runner')  # It raises if the file is missing.
    needs_none = _SHOW_TOKENS.value or _PRINT_CONFIG.value or runner in _WITHOUT_WORKDIR
    if FLAGS['workdir'].value is None and not needs_none:
      raise ValueError('--workdir is required, as in --workdir=...')
    _check_runner(runner)
    return rest
  except _FLAG_ERRORS as error:
    if '--debug' in argv:
      raise
    try:
      _diagnose(argv)
    except _INPUT_ERRORS as clear:
      _exit(clear)
    if not isinstance(error, (flags.Error, *_INPUT_ERRORS)):
      raise
    _exit(error)


def _diagnose(argv: Sequence[str]) -> None:
  """Raises the clear form of what is wrong with the config flags, if it can."""
  # config_flags wraps the errors of config files in tracebacks, and reports an unknown key as an
  # AttributeError. So the file is loaded again, and its own errors are shown.
  text = '\n'.join(argv)
  match = re.search(r'^--?config[=\n](.+)$', text, re.MULTILINE)
  if not match:
    return
  path, colon, arg = match[1].partition(':')
  get_config = config_lib.load_module(path).get_config
  try:
    config = get_config(*([arg] if colon else []))
  except ValueError as error:
    # What is no argument may be a knob.
    unknown = re.match(r"config argument '([\w.]+)' is unknown", str(error))
    if unknown and (meant := config_lib.find_key(get_config(), unknown[1])):
      raise ValueError(
        f'config argument {unknown[1]!r} is unknown (did you mean the flag '
        f'{" or ".join(f"--config.{key}=..." for key in meant)}?)'
      ) from None
    raise
  for key in re.findall(r'^--?(?:no)?config\.([^=\n]+)', text, re.MULTILINE):
    config_lib.check_key(config, key)
  for name in re.findall(r'^--?(?!config\b)([\w.]+)', text, re.MULTILINE):
    if name in FLAGS or name.removeprefix('no') in FLAGS:
      continue
    meant = [f'--config.{key}=...' for key in config_lib.find_key(config, name)]
    meant += ['--workdir=...'] * (name in _WORKDIR_NAMES)
    if meant:
      raise ValueError(f'--{name} is not a flag (did you mean {" or ".join(meant)}?)')


def _exit(error: BaseException) -> None:
  text = ' '.join(str(error).split())
  # Only a run that has begun has copies of buckets.
  if remote := sys.modules.get('csrm_jax.core.remote'):
    text = remote.named(text)
  print('error:', checks.redact(text), file=sys.stderr)
  sys.exit(2)


def _join() -> None:
  """Joins the other processes, if there are any."""
  alone = _PROCESS_ID.value is None and _NUM_PROCESSES.value is None
  if not _MULTIHOST.value and not _COORDINATOR.value and alone:
    return
  from csrm_jax.core import distributed

  distributed.start(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _START_TIMEOUT_S.value
  )
  distributed.check_same(
    {'the config': config_lib.to_json(_CONFIG.value), '--workdir': str(_WORKDIR.value)}
  )


def _main(argv: Sequence[str]) -> None:
  del argv
  if _PRINT_CONFIG.value:
    print(config_lib.to_json(_CONFIG.value), end='')
    return
  import jax

  from csrm_jax.core import distributed, preemption
  from csrm_jax.train import step as training

  # Warnings only: at INFO, libraries report every file that they write.
  if not FLAGS['verbosity'].present and not _DEBUG.value:
    logging.set_verbosity(logging.WARNING)
  # Before anything is allocated.
  training.keep_freed_memory()
  try:
    _join()
    if _SHOW_TOKENS.value:
      show_tokens(_CONFIG.value)
      return
    use_compilation_cache()
    run(_CONFIG.value, _WORKDIR.value, FLAGS['config'].config_filename)
  except preemption.Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(preemption.EXIT_CODE)
  except (jax.errors.JaxRuntimeError, *_INPUT_ERRORS) as error:
    # First: if another process is gone, the usual way out would wait for it.
    distributed.leave_if_alone(error)
    if _DEBUG.value or not isinstance(error, _INPUT_ERRORS):
      raise
    _exit(error)


def main() -> None:
  """Runs the command line of `csrm_jax` and `python -m csrm_jax.main`."""
  try:
    argv = _with_config(sys.argv)
    if argv is None:
      return
  except _INPUT_ERRORS as error:
    _exit(error)
  app.run(_main, argv=argv, flags_parser=_parse_flags)


def _with_config(argv: Sequence[str]) -> list[str] | None:
  """Returns the arguments with the path of their config file, or None where help was printed."""
  program, *rest = argv
  first = rest[0] if rest else '--help'
  if first == usage.DOCTOR:
    from csrm_jax import doctor

    print(doctor.report(rest[1:]))
    return None
  if not first.startswith('-') and first != 'help':
    name = first.partition(':')[0]
    if not config_lib.find_file(name).is_file():
      raise ValueError(
        f'{name!r} is no job{checks.hint(name, [*usage.jobs(), usage.DOCTOR])}; choose one of '
        f'{", ".join([*usage.jobs(), usage.DOCTOR])}, or give a config file'
      )
    rest[0] = f'--config={first}'
  config = None
  for i, text in enumerate(rest):
    match = re.fullmatch(r'--?config(?:=(.+))?', text, re.DOTALL)
    if match is None:
      continue
    place = i if match[1] else i + 1
    given = match[1] or (rest[place] if place < len(rest) else '')
    path, colon, arg = given.partition(':')
    config = config_lib.find_file(path), arg if colon else None
    rest[place] = f'{"--config=" if match[1] else ""}{config[0]}{colon}{arg}'
    break
  if {'help', '-h', '-help', '--help'} & {first, *rest}:
    print(usage.job(*config) if config else usage.overview())
    return None
  return [program, *rest]


if __name__ == '__main__':
  main()
