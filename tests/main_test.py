import importlib
import json
import pathlib
import re
import subprocess
import sys
import textwrap
import types

import ml_collections
import pytest

from csrm_jax import config as config_lib, doctor, main, usage
from tests import small

_CONFIG = """
import ml_collections

from csrm_jax import config as config_lib


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, width=8)
  config = ml_collections.ConfigDict()
  config.runner = 'fake'
  config.seed = 0
  config.fail = ''
  config.model = {'width': arg.width, 'betas': (0.9, 0.95)}
  return config
"""

# The command line, with a runner that only writes down what it was given.
_PROGRAM = """
import json, sys, types
from csrm_jax import main

def run(config, workdir):
  if config.fail:
    raise ValueError(config.fail)
  (workdir / 'result.json').write_text(
    json.dumps([config.seed, config.model.width, config.model.betas])
  )

def show_tokens(config):
  print('tokens of', config.model.width)

fake = types.ModuleType('fake_runner')
fake.run = run
fake.show_tokens = show_tokens
sys.modules['fake_runner'] = fake
main.RUNNERS['fake'] = 'fake_runner'
main.main()
"""


@pytest.fixture
def command(tmp_path):
  """Runs the command line in tmp_path; returns (exit code, out, err)."""
  (tmp_path / 'c.py').write_text(_CONFIG)
  env = small.env(HOME=str(tmp_path / 'home'))
  env.pop('JAX_COMPILATION_CACHE_DIR', None)

  def run(*args):
    result = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(_PROGRAM), *args],
      cwd=tmp_path,
      env=env,
      capture_output=True,
      text=True,
    )
    return result.returncode, result.stdout, result.stderr

  return run


def test_a_run_and_its_second_start(command, tmp_path):
  args = (
    '--config=c.py:width=16',
    '--workdir=w',
    '--config.seed=3',
    '--config.model.betas=(0.5,0.6)',
  )
  code, _, err = command(*args)
  assert code == 0, err
  workdir = tmp_path / 'w'
  result = json.loads((workdir / 'result.json').read_text())
  assert result == [3, 16, [0.5, 0.6]]
  config = json.loads((workdir / 'config.json').read_text())
  assert config['model'] == {'width': 16, 'betas': [0.5, 0.6]}
  manifest = json.loads((workdir / 'manifest.json').read_text())
  assert manifest['runner'] == 'fake'
  assert len(manifest['config_digest']) == 64
  assert manifest['packages']['jax']
  assert (tmp_path / 'home' / '.cache' / 'csrm_jax').is_dir()

  del config['fail']  # An older version had no such knob.
  (workdir / 'config.json').write_text(json.dumps(config))
  assert command(*args)[0] == 0
  code, _, err = command(*args[:2])
  assert code == 2
  assert err.startswith('error: ') and err.count('\n') == 1
  assert 'seed: 3 -> 0' in err
  assert 'model.betas: [0.5, 0.6] -> [0.9, 0.95]' in err


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--config=c.py'], '--workdir is required'),
    (['--config=no.py', '--workdir=w'], 'config file no.py does not exist'),
    (
      ['--config=c.py', '--workdir=w', '--config.model.widht=3'],
      "config key 'model.widht' does not exist (did you mean model.width",
    ),
    (
      ['--config=c.py:wdith=3', '--workdir=w'],
      "config argument 'wdith' is unknown (did you mean width?)",
    ),
    (['--config=c.py', '--workdir=w', '--config.seed=x'], 'flag --config.seed=x'),
    (
      ['--config=c.py', '--workdir=w', '--config.runner=nope'],
      "config.runner is 'nope': choose one of train_rm",
    ),
    (['--config=c.py', '--workdir=w', '--config.fail=line 3: no'], 'line 3: no'),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, args, message):
  code, out, err = command(*args)
  assert code == 2
  assert out == ''
  assert err.startswith(f'error: {message}')
  assert err.count('\n') == 1
  assert not (tmp_path / 'w').exists()


def test_show_tokens_needs_no_workdir_and_leaves_nothing(command, tmp_path):
  code, out, err = command('--config=c.py:width=16', '--show_tokens')
  assert (code, out) == (0, 'tokens of 16\n'), err
  # Python itself may keep the compiled config file.
  left = {path.name for path in tmp_path.iterdir()} - {'__pycache__'}
  assert left == {'c.py'}


def test_a_runner_without_prompts_says_so(monkeypatch):
  module = types.ModuleType('fake_runner')
  monkeypatch.setitem(sys.modules, 'fake_runner', module)
  monkeypatch.setitem(main.RUNNERS, 'fake', 'fake_runner')
  with pytest.raises(ValueError, match="'fake' has no prompts to show"):
    main.show_tokens(ml_collections.ConfigDict({'runner': 'fake'}))


def test_debug_shows_the_traceback(command):
  code, _, err = command('--config=c.py', '--workdir=w', '--config.fail=no', '--debug')
  assert code not in (0, 2)
  assert 'Traceback' in err and 'ValueError: no' in err


def _run_with(monkeypatch, workdir, run):
  module = types.ModuleType('fake_runner')
  module.run = run
  monkeypatch.setitem(sys.modules, 'fake_runner', module)
  monkeypatch.setitem(main.RUNNERS, 'fake', 'fake_runner')
  main.run(ml_collections.ConfigDict({'runner': 'fake'}), workdir)


@pytest.mark.parametrize(
  ('name', 'reason'),
  [
    ('file', 'it is a file'),
    ('file/w', 'Not a directory'),
    ('nowhere', 'it is a link that leads nowhere'),
    ('itself', 'it is a link that leads nowhere'),
    ('/proc/w', 'No such file or directory'),
  ],
)
def test_a_workdir_that_cannot_be_made_is_one_line(monkeypatch, tmp_path, name, reason):
  (tmp_path / 'file').touch()
  (tmp_path / 'nowhere').symlink_to(tmp_path / 'missing')
  (tmp_path / 'itself').symlink_to('itself')
  with pytest.raises(ValueError, match=re.escape(f'{name} cannot be used ({reason}): give a dir')):
    _run_with(monkeypatch, tmp_path / name, None)


def test_a_workdir_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setattr(config_lib.os, 'access', lambda path, mode: False)
  with pytest.raises(ValueError, match=re.escape('cannot be used (it is read-only)')):
    _run_with(monkeypatch, tmp_path, None)


def test_a_workdir_may_be_a_link(monkeypatch, tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to('real')
  _run_with(monkeypatch, tmp_path / 'link', lambda config, path: (path / 'done').touch())
  assert (tmp_path / 'real' / 'done').exists()


def test_results_survive_an_error(monkeypatch, tmp_path):
  def fail(config, workdir):
    (workdir / 'metrics.jsonl').write_text('{}')
    raise ValueError('the loss is NaN')

  with pytest.raises(ValueError, match='NaN'):
    _run_with(monkeypatch, tmp_path / 'w', fail)
  assert (tmp_path / 'w' / 'config.json').exists()


def test_a_bug_is_no_input_error(monkeypatch, tmp_path):
  def fail(config, workdir):
    raise RuntimeError('bug')

  with pytest.raises(RuntimeError, match='bug'):
    _run_with(monkeypatch, tmp_path / 'w', fail)
  assert (tmp_path / 'w' / 'config.json').exists()


def _cli(*args, cwd=None):
  """Runs the command csrm_jax; returns (exit code, out, err, whether it has imported JAX)."""
  program = (
    'import atexit, sys; from csrm_jax import main; sys.argv[0] = "csrm_jax";'
    'atexit.register(lambda: print("jax" in sys.modules)); main.main()'
  )
  result = subprocess.run(
    [sys.executable, '-c', program, *args], cwd=cwd, env=small.env(), capture_output=True, text=True
  )
  *out, has_jax = result.stdout.splitlines()
  return result.returncode, '\n'.join(out), result.stderr, has_jax == 'True'


def test_help_names_jobs_arguments_and_every_knob(tmp_path):
  code, out, err, has_jax = _cli(cwd=tmp_path)
  assert (code, err, has_jax) == (0, '', False)
  assert all(f'\n  {name}' in out for name in ('rm', 'eval', 'rl', 'serve', 'doctor'))
  code, out, _, has_jax = _cli('rm:num_steps=7', '--help', cwd=tmp_path)
  assert code == 0 and not has_jax
  assert '  --config.num_steps=7 ' in out and 'ablation=full|no_cca' in out
  assert re.search(r'--config\.optim\.lr=0\.0003 +the peak, which a warm-up reaches', out)


@pytest.mark.parametrize('name', [name for name in usage.jobs() if name != 'rl_table'])
def test_every_knob_has_a_comment(name):
  path = config_lib.CONFIGS / f'{name}.py'
  known = usage.comments(path)
  keys = config_lib.flatten(config_lib.load_module(path).get_config())
  bare = [key for key in keys if not (known.get(key) or known.get(key.removeprefix('run.')))]
  # A part of the data is explained as a whole, and the runner belongs to the file.
  others = ('runner', 'parts.', 'branch_length', 'programs')
  assert not [key for key in bare if not any(word in key for word in others)]


@pytest.mark.parametrize(
  ('args', 'said'),
  [
    (['rm', '--workdir=w', '--config.learning_rate=1'], 'did you mean optim.lr?'),
    (['rm', '--workdir=w', '--config.epoch=1'], 'did you mean epochs'),
    (['rm:learning_rate=1', '--workdir=w'], 'did you mean the flag --config.optim.lr=...?'),
    (['rm', '--batch_size=8'], 'did you mean --config.data.batch_size=...?'),
    (['rm', '--output_dir=w'], 'did you mean --workdir=...?'),
    (['rmm'], "'rmm' is no job; did you mean 'rm'?"),
    (['--config=configs/rm.py'], '--workdir is required'),
  ],
)
def test_errors_of_the_command_line_name_the_fix_at_once(tmp_path, args, said):
  code, out, err, has_jax = _cli(*args, cwd=tmp_path)
  assert (code, out, has_jax) == (2, '', False)
  assert err.startswith('error: ') and err.count('\n') == 1 and said in err
  assert not any(tmp_path.iterdir())


def test_a_config_is_found_and_printed_without_paths_of_this_machine(tmp_path):
  for name in ('rm:num_steps=7', 'rl'):
    code, out, err, _ = _cli(name, '--print_config', '--config.seed=3', cwd=tmp_path)
    config = json.loads(out)
    assert code == 0 and config['seed'] == 3, err
    paths = [v for v in config_lib.flatten(config).values() if str(v).startswith('/')]
    assert not paths and 'builtin:ruleworld/tokenizer.model' in out
  assert importlib.import_module('csrm_jax.configs.rm').get_config('num_steps=7').num_steps == 7


def test_the_doctor_says_what_is_missing(monkeypatch):
  monkeypatch.setattr(doctor, '_requirements', lambda extra: ['no-such-package'])
  text = doctor.report()
  assert 'jax ' in text and 'device(s)' in text and 'GiB free' in text
  assert re.search(r"serve .*missing no-such-package: run: pip install .*\[serve\]'", text)


def test_the_doctor_asks_for_the_extras_that_are_named(monkeypatch):
  assert 'Extras' not in doctor.report(['hf'])
  monkeypatch.setattr(doctor, '_requirements', lambda extra: ['no-such-package'])
  with pytest.raises(ImportError, match=r'^no-such-package missing: run: pip install .*\[serve\]'):
    doctor.report(['serve'])
  with pytest.raises(ValueError, match="extra='sevre' must be one of hf, "):
    doctor.report(['sevre'])


def test_no_module_needs_posix_or_names_a_package_that_is_not_ours():
  package = pathlib.Path(main.__file__).parent
  for path in package.rglob('*.py'):
    text = path.read_text('utf-8')
    assert not re.search(r'^import (fcntl|resource|termios|pwd|grp)\b', text, re.MULTILINE), path
    assert not re.search(r'pip install "?csrm_jax', text), path
