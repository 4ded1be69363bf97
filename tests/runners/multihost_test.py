"""Two real processes on this machine train as one does."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from tests import small

ROOT = pathlib.Path(__file__).parents[2]
KEYS = ('train/loss', 'loss/cls', 'loss/pairs', 'train/grad_norm')


def _start(workdir, *flags, seed=0):
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'csrm_jax.main',
      f'--workdir={workdir}',
      '--config=configs/rm.py:smoke,num_steps=10',
      f'--config.seed={seed}',
      '--config.data.batch_size=4',
      '--config.eval.ruleworld_examples=20',
      *flags,
    ],
    cwd=ROOT,
    env=small.env(),
    text=True,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )


def _pair(workdir, seeds=(0, 0)):
  flags = f'--coordinator=localhost:{small.free_port()}', '--num_processes=2'
  return [_start(workdir, *flags, f'--process_id={i}', seed=seed) for i, seed in enumerate(seeds)]


def _metrics(workdir):
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_train_the_curve_of_one(tmp_path):
  for name, start in (('one', lambda path: [_start(path)]), ('two', _pair)):
    runs = start(tmp_path / name)
    while not any(line['step'] == 10 for line in _metrics(tmp_path / name)):
      time.sleep(0.2)
      assert not any(run.poll() for run in runs), runs[0].stderr.read()
    for run in runs:  # What follows, the evaluation, takes longer.
      run.kill()
      run.communicate()
  one, two = _metrics(tmp_path / 'one'), _metrics(tmp_path / 'two')
  assert [line['step'] for line in one] == [5, 10]  # process 0 writes, once
  for line, other in zip(one, two, strict=True):
    for key in KEYS:
      assert other[key] == pytest.approx(line[key], rel=1e-5), key


@pytest.mark.slow
def test_hosts_with_different_configs_end_with_one_line(tmp_path):
  for process in _pair(tmp_path, seeds=(0, 1)):
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2, errors
    assert 'error: the config differs between hosts' in errors
