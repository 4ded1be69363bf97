import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml
from etils import epath

from launch import sweep

_CONFIG = """
import ml_collections


def get_config(arg=None):
  config = ml_collections.ConfigDict()
  config.runner = 'train_rm'
  config.seed = 0
  config.lr = 0.5
  config.ablation = arg or 'none'
  return config


def sweep():
  return [
    {'name': 'full'},
    {'name': 'no_cca', 'arg': 'no_cca', 'overrides': {'lr': 1}},
  ]
"""

# Stands in for csrm_jax.main: f1 is 0.5 + seed, and no_cca has no pairs.
_RUN = """
import json, pathlib, sys
flags = dict(a.lstrip('-').split('=', 1) for a in sys.argv[1:])
name = flags['config'].partition(':')[2] or 'none'
w = pathlib.Path(flags['workdir'])
seed = int(flags.get('config.seed', 0))
lr = float(flags.get('config.lr', 0.5))
print('starting', w.name)
if (w.parent / ('fail-' + w.name)).exists():
  print('reason: out of disk')
  sys.exit(2)
(w / 'report').mkdir(parents=True)
c = {'runner': 'train_rm', 'seed': seed, 'lr': lr, 'ablation': name}
(w / 'config.json').write_text(json.dumps(c))
s = {'unseen/f1': 0.5 + seed, 'time_s': 250.0}
if name == 'none':
  s['pairs/accuracy'] = 0.25
(w / 'report' / 'summary.json').write_text(json.dumps(s))
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text(_CONFIG)
  return path


@pytest.fixture
def fake_runs(tmp_path, monkeypatch):
  """Makes the sweep start _RUN; returns the list of commands it started."""
  script = tmp_path / 'run.py'
  script.write_text(_RUN)
  started = []
  real = subprocess.run

  def run(command, **kwargs):
    assert command[:3] == (sys.executable, '-m', 'csrm_jax.main')
    started.append(command)
    return real([sys.executable, str(script), *command[3:]], **kwargs)

  monkeypatch.setattr(sweep.subprocess, 'run', run)
  return started


def test_jobs_and_their_commands(config, tmp_path):
  jobs = sweep.make_jobs(str(config), tmp_path / 'w', seeds=[0, 1])
  assert [job.name for job in jobs] == ['full-seed0', 'full-seed1', 'no_cca-seed0', 'no_cca-seed1']
  assert [job.group for job in jobs] == ['full', 'full', 'no_cca', 'no_cca']
  assert jobs[3].command[3:] == (
    f'--config={config}:no_cca',
    '--config.lr=1',
    '--config.seed=1',
    f'--workdir={tmp_path}/w/no_cca-seed1',
  )
  assert jobs[3].config.lr == 1.0
  assert jobs[3].config.ablation == 'no_cca'


def test_only_and_the_configs_own_argument(config, tmp_path):
  (job,) = sweep.make_jobs(f'{config}:x', tmp_path, only=['no_cca'])
  assert job.name == 'no_cca'
  assert job.command[3] == f'--config={config}:x,no_cca'


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--only=nope'], 'no such run; it has full, no_cca'),
    (['--config=absent.py'], 'config file absent.py does not exist'),
  ],
)
def test_bad_input_is_one_line(config, tmp_path, capsys, args, message):
  base = [f'--config={config}', f'--workdir={tmp_path}/w']
  assert sweep.main(base + args) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1
  assert message in err
  assert not (tmp_path / 'w').exists()


def test_a_config_without_a_sweep(tmp_path, config):
  config.write_text('def get_config(arg=None):\n  return None\n')
  with pytest.raises(ValueError, match=r'defines no sweep\(\)'):
    sweep.make_jobs(str(config), tmp_path)


def test_dry_run_prints_and_starts_nothing(config, tmp_path, capsys, fake_runs):
  code = sweep.main([f'--config={config}', f'--workdir={tmp_path}/w', '--dry_run'])
  assert code == 0
  assert len(capsys.readouterr().out.splitlines()) == 2
  assert not fake_runs
  assert not (tmp_path / 'w').exists()


def test_sweep_then_resume(config, tmp_path, capsys, fake_runs):
  workdir = tmp_path / 'w'
  args = [f'--config={config}', f'--workdir={workdir}', '--parallel=2', '--seeds=0,1']
  workdir.mkdir()
  (workdir / 'fail-full-seed1').touch()
  assert sweep.main(args) == 1
  err = capsys.readouterr().err
  assert 'full-seed1 failed: exit code 2' in err
  assert '| reason: out of disk' in err
  content = json.loads((workdir / 'table.json').read_text())
  assert list(content['failures']) == ['full-seed1']
  assert content['table']['full']['unseen/f1']['half_width'] is None

  (workdir / 'fail-full-seed1').unlink()
  del fake_runs[:]
  assert sweep.main(args) == 0
  assert len(fake_runs) == 1
  out = capsys.readouterr().out
  assert out.strip() == (workdir / 'table.md').read_text().strip()
  cell = json.loads((workdir / 'table.json').read_text())
  cell = cell['table']['full']['unseen/f1']
  assert cell['values'] == [0.5, 1.5]
  header, _, full, no_cca = out.strip().splitlines()
  assert header == '| run | n | unseen/f1 | pairs/accuracy | time_s |'
  # t(0.975, 1) = 12.706 times a standard error of 0.5.
  assert full == '| full | 2 | 1.000 ± 6.353 | 0.250 ± 0.000 | 250 ± 0 |'
  assert '| – |' in no_cca


def test_sweeps_measure_the_development_side_unless_test_is_asked_for(tmp_path):
  arg = f'configs/rm.py:recipe=real,data_dir={tmp_path}'
  (dev,) = sweep.make_jobs(arg, tmp_path, only=['full'])
  (test,) = sweep.make_jobs(arg, tmp_path, only=['full'], split='test')
  assert [job.config.eval.real.side for job in (dev, test)] == ['dev', 'test']
  assert '--config.eval.real.side=test' in test.command
  (dev,) = sweep.make_jobs('configs/rm.py', tmp_path, only=['full'])
  (test,) = sweep.make_jobs('configs/rm.py', tmp_path, only=['full'], split='test')
  assert [job.config.eval.ruleworld_side for job in (dev, test)] == ['dev', 'test']
  assert '--config.eval.ruleworld_side=test' in test.command


def test_overrides_are_of_every_run(config, tmp_path, capsys, fake_runs):
  args = [f'--config={config}', f'--workdir={tmp_path}/w', '--config.lr=0.125']
  assert sweep.main(args) == 0
  for name in ('full', 'no_cca'):
    assert json.loads((tmp_path / 'w' / name / 'config.json').read_text())['lr'] == 0.125
  with pytest.raises(SystemExit):
    sweep.main([*args, '--parrallel=2'])
  assert 'unrecognized argument: --parrallel=2' in capsys.readouterr().err


def test_a_sweep_without_a_development_side_says_so(config, tmp_path, capsys, fake_runs):
  assert sweep.main([f'--config={config}', f'--workdir={tmp_path}/w', '--only=full']) == 0
  assert 'test rows only: choose nothing by this table' in capsys.readouterr().err
  assert json.loads((tmp_path / 'w' / 'table.json').read_text())['splits'] == []


def test_a_run_done_with_another_config_is_a_failure(config, tmp_path, capsys, fake_runs):
  args = [f'--config={config}', f'--workdir={tmp_path}/w', '--only=full']
  assert sweep.main(args) == 0
  config.write_text(_CONFIG.replace('config.lr = 0.5', 'config.lr = 0.25'))
  assert sweep.main(args) == 1
  assert 'done with another config: lr: 0.5 -> 0.25' in capsys.readouterr().err


def test_the_table_of_rewards_pairs_their_seeds_with_those_of_the_runs(tmp_path):
  jobs = sweep.make_jobs('configs/rl_table.py:rewards=/x', tmp_path)
  assert len(jobs) == 48
  job = next(j for j in jobs if j.name == 'music_school-no_sa-seed2')
  assert job.config.reward.checkpoint == '/x/no_sa-seed2'
  assert job.config.data.rules == 'music school'
  assert job.config.seed == 2
  (offline,) = sweep.make_jobs(
    'configs/rl_table.py:rewards=/x,algorithm=distillation', tmp_path, only=['pet_forum-full-seed1']
  )
  assert offline.config.algorithm == 'distillation'


def _submitted(config, tmp_path, capsys, launcher, *flags):
  """Returns the words of the commands that a dry run prints."""
  code = sweep.main(
    [
      f'--config={config}',
      f'--workdir={tmp_path}/a b',
      '--seeds=0',
      f'--launcher={launcher}',
      '--dry_run',
      *flags,
    ]
  )
  assert code == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2
  return [shlex.split(line) for line in lines]


def _args(config, tmp_path):
  return [
    f'--config={config}:no_cca',
    '--config.lr=1',
    '--config.seed=0',
    f'--workdir={tmp_path}/a b/no_cca-seed0',
  ]


def test_slurm_gets_each_run_whole(config, tmp_path, capsys):
  _, words = _submitted(config, tmp_path, capsys, 'slurm', '--launcher_flags=--nodes=4 --qos="a b"')
  assert words[:4] == ['sbatch', '--job-name=no-cca-seed0', '--nodes=4', '--qos=a b']
  # The script itself says what it would run.
  result = subprocess.run(
    ['bash', words[4], '--dry_run', *words[5:]], capture_output=True, text=True
  )
  assert shlex.split(result.stdout)[-4:] == _args(config, tmp_path)


def test_xpk_gets_each_run_whole(config, tmp_path, capsys):
  _, words = _submitted(
    config,
    tmp_path,
    capsys,
    'xpk',
    '--launcher_flags=--cluster=c --zone=z --topology=v5e-16 --image=i',
  )
  result = subprocess.run([words[0], '--dry_run', *words[1:]], capture_output=True, text=True)
  said = shlex.split(result.stdout)
  assert '--workload=no-cca-seed0' in said
  inner = shlex.split(said[-1].partition('=')[2])
  assert inner[-4:] == _args(config, tmp_path)


def test_sky_gets_each_run_whole(config, tmp_path, capsys):
  _, words = _submitted(config, tmp_path, capsys, 'sky', '--launcher_flags=--env BUCKET=b')
  assert words[:3] == ['sky', 'jobs', 'launch']
  assert {'--name=no-cca-seed0', 'BUCKET=b'} <= set(words)
  task = yaml.safe_load(pathlib.Path(words[-3]).read_text())
  (tmp_path / 'venv' / 'bin').mkdir(parents=True)
  python = tmp_path / 'venv' / 'bin' / 'python'
  python.write_text('#!/bin/sh\nfor x; do echo "$x"; done\n')
  python.chmod(0o755)
  name, _, value = words[-1].partition('=')
  result = subprocess.run(
    ['bash', '-c', task['run']],
    capture_output=True,
    text=True,
    env={'HOME': str(tmp_path), name: value, 'PATH': os.environ['PATH']},
  )
  assert result.stdout.splitlines()[-4:] == _args(config, tmp_path), result


def test_only_what_is_not_done_is_submitted(config, tmp_path, capsys, monkeypatch, fake_runs):
  args = [f'--config={config}', f'--workdir={tmp_path}/w']
  assert sweep.main([*args, '--table']) == 0
  assert capsys.readouterr().out == 'no run is done\n'
  assert sweep.main([*args, '--only=full']) == 0
  capsys.readouterr()
  started = []

  def run(command, **kwargs):
    started.append(command)
    if command[1] == '--job-name=no-cca':
      raise FileNotFoundError(2, 'No such file or directory')

  monkeypatch.setattr(sweep.subprocess, 'run', run)
  assert sweep.main([*args, '--launcher=slurm']) == 1
  assert [command[1] for command in started] == ['--job-name=no-cca']
  out, err = capsys.readouterr()
  assert err.startswith('no_cca was not submitted: cannot run sbatch: No such')
  assert out.startswith('0 runs submitted')
  assert sweep.main([*args, '--table']) == 0
  assert '| full | 1 |' in capsys.readouterr().out
  assert len(started) == 1


@pytest.mark.parametrize(('flags', 'message'), [
  (['--workdir=gs://b/w'], 'log to a folder of it'),
  (['--workdir=w', '--launcher_flags=--nodes=2'], 'need a --launcher'),
  (['--workdir=w', '--launcher=pbs'], 'invalid choice'),
])  # fmt: skip
def test_launchers_and_where_they_write(config, capsys, flags, message):
  with pytest.raises(SystemExit):
    sweep.main([f'--config={config}', *flags])
  assert message in capsys.readouterr().err


def test_a_sweep_may_lie_in_a_bucket(config):
  (job, _) = sweep.make_jobs(str(config), epath.Path('gs://bucket/w'))
  assert job.command[-1] == '--workdir=gs://bucket/w/full'
