"""Runs that are killed, that find no space, or that meet another one in their work directory.

$CSRM_CHAOS_KILLS is how often each job is killed (6; slow: 8); $CSRM_CHAOS_SEED decides when.
"""

import os
import random
import shutil
import signal

import pytest

from tests.chaos import jobs

NUM, SEED = os.environ.get('CSRM_CHAOS_KILLS'), int(os.environ.get('CSRM_CHAOS_SEED', 0))


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """Returns the folder of the undisturbed runs, which are each other's inputs."""
  jobs.warm_up()
  return tmp_path_factory.mktemp('chaos')


def _check_kills(name, inputs, folder, num):
  whole, took = jobs.undisturbed(name, inputs)
  assert whole
  rng = random.Random(f'{SEED} {name}')
  assert jobs.with_kills(name, inputs, folder / name, num, took, rng) == whole


def test_a_killed_augmentation_ends_as_if_it_had_not_been(inputs, tmp_path):
  _check_kills('augment', inputs, tmp_path, int(NUM or 6))


@pytest.mark.slow
@pytest.mark.parametrize('name', jobs.JOBS)
def test_a_killed_run_ends_as_if_it_had_not_been(name, inputs, tmp_path):
  jobs.undisturbed('train', inputs)  # others read it
  _check_kills(name, inputs, tmp_path, int(NUM or 8))


# The disk has no room for a file of more than so many bytes.
@pytest.mark.parametrize(
  ('name', 'room'), [('augment', 40_000), pytest.param('train', 20_000, marks=pytest.mark.slow)]
)
def test_a_disk_that_fills_is_one_line_and_loses_nothing(name, room, inputs, tmp_path):
  whole, _ = jobs.undisturbed(name, inputs)
  run = jobs.Run(name, inputs, tmp_path / 'run', {'RLIMIT_FSIZE': room})
  assert run.wait() == 2, run.said()
  assert 'Traceback' not in run.said() and 'File too large' in run.said().splitlines()[-1]
  run = jobs.Run(name, inputs, tmp_path / 'run')
  assert run.wait() == 0, run.said()
  assert jobs.outcome(tmp_path / 'run') == whole


@pytest.mark.parametrize('name', ['augment', pytest.param('train', marks=pytest.mark.slow)])
def test_of_two_runs_in_one_work_directory_one_works(name, inputs, tmp_path):
  whole, _ = jobs.undisturbed(name, inputs)
  runs = [jobs.Run(name, inputs, tmp_path / 'run') for _ in range(2)]
  codes = [run.wait() for run in runs]
  assert sorted(codes) == [0, 2], [run.said() for run in runs]
  assert 'another process' in runs[codes.index(2)].said().splitlines()[-1]
  assert jobs.outcome(tmp_path / 'run') == whole


@pytest.mark.parametrize('clock', ['back', 'jumps'])
def test_a_clock_that_jumps_changes_nothing(clock, inputs, tmp_path):
  whole, _ = jobs.undisturbed('augment', inputs)
  run = jobs.Run('augment', inputs, tmp_path / 'run', dies_at=70, clock='jumps')
  assert run.wait() == -signal.SIGKILL, run.said()
  run = jobs.Run('augment', inputs, tmp_path / 'run', clock=clock)
  assert run.wait() == 0, run.said()
  assert jobs.outcome(tmp_path / 'run') == whole


@pytest.mark.slow
def test_checkpoints_that_vanish_and_return(inputs, tmp_path):
  whole, _ = jobs.undisturbed('train', inputs)
  shutil.copytree(inputs / 'train', tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'report')
  (tmp_path / 'run' / 'checkpoints').rename(tmp_path / 'elsewhere')
  run = jobs.Run('train', inputs, tmp_path / 'run')
  assert run.wait() == 2 and 'there is no checkpoint' in run.said().splitlines()[-1]
  (tmp_path / 'elsewhere').rename(tmp_path / 'run' / 'checkpoints')
  run = jobs.Run('train', inputs, tmp_path / 'run')
  assert run.wait() == 0, run.said()
  assert jobs.outcome(tmp_path / 'run') == whole
