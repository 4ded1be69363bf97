import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from csrm_jax.core import checkpoint, remote
from tests import small


def _tree(folder):
  return {
    str(p.relative_to(folder)): p.read_text()
    for p in sorted(pathlib.Path(folder).rglob('*'))
    if p.is_file()
  }


def test_a_folder_of_this_machine_is_itself(tmp_path):
  with remote.local(tmp_path / 'run') as path:
    assert path == tmp_path / 'run'
    remote.push(path)
  assert remote.home(path / 'checkpoints') == tmp_path / 'run' / 'checkpoints'
  assert not path.exists()
  assert remote.readable('org/name') == 'org/name'


def test_what_changes_is_brought_back(tmp_path):
  """A folder of this machine stands for that in the bucket."""
  home = tmp_path / 'bucket' / 'run'
  (home / 'report').mkdir(parents=True)
  (home / 'checkpoints' / '4').mkdir(parents=True)
  for name in ('config.json', 'report/report.md', 'checkpoints/4/big', 'old'):
    (home / name).write_text(name)
  with remote.mirror(epath.Path(home)) as path:
    assert path.name == 'run' and path != home
    assert _tree(path) == {n: n for n in ('config.json', 'old', 'report/report.md')}
    (path / 'policy').mkdir()
    (path / 'policy' / 'weights').write_text('w')
    (path / 'config.json').write_text('changed')
    (path / 'old').unlink()
    os.utime(home / 'report' / 'report.md', (0, 0))
    remote.push(path)
    assert (home / 'policy' / 'weights').read_text() == 'w'
    # What did not change is not written again.
    assert (home / 'report' / 'report.md').stat().st_mtime == 0
    (path / 'last').write_text('at the end')
  assert not path.exists()
  assert _tree(home) == {
    'config.json': 'changed',
    'report/report.md': 'report/report.md',
    'checkpoints/4/big': 'checkpoints/4/big',
    'policy/weights': 'w',
    'last': 'at the end',
  }
  assert remote.named(f'see {path}/last') == f'see {home}/last'


def test_an_error_brings_back_what_there_is(tmp_path):
  with pytest.raises(KeyError), remote.mirror(epath.Path(tmp_path / 'run')) as path:
    (path / 'nonfinite_step_3.npz').write_text('x')
    raise KeyError
  assert (tmp_path / 'run' / 'nonfinite_step_3.npz').exists()
  assert not any(t.name.startswith('push') for t in threading.enumerate())


def test_it_is_brought_back_now_and_then(tmp_path, monkeypatch):
  monkeypatch.setattr(remote, '_EVERY_S', 0.02)
  with remote.mirror(epath.Path(tmp_path / 'run')) as path:
    (path / 'journal.jsonl').write_text('x')
    deadline = time.monotonic() + 10
    while not (tmp_path / 'run' / 'journal.jsonl').exists():
      assert time.monotonic() < deadline
      time.sleep(0.01)


def test_checkpoints_of_a_copy_lie_in_the_bucket(tmp_path):
  state = {'w': jnp.arange(6.0)}
  for step in (1, 2):
    with remote.mirror(epath.Path(tmp_path / 'run')) as path:
      with checkpoint.Checkpoints(path / 'checkpoints') as saved:
        found = saved.restore_latest(state)
        assert (found.step if found else 0) == step - 1
        saved.save(step, state, {'next': step}, {'kind': 'test'})
      assert checkpoint.describe(path / 'checkpoints').meta == {'kind': 'test'}
      assert not (path / 'checkpoints').exists()
  with checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints') as saved:
    assert saved.steps() == [1, 2]
    found = saved.restore_latest(jax.eval_shape(lambda: state))
  np.testing.assert_array_equal(found.state['w'], state['w'])


@pytest.mark.parametrize(
  ('address', 'message'),
  [
    ('s3://bucket/run', 'a path of this machine or gs://BUCKET/FOLDER'),
    ('gs://bucket/run', r'cannot write to --workdir=gs://bucket/run .*; '),
  ],
)
def test_an_address_that_cannot_be_written_is_one_line(monkeypatch, address, message):
  def refuse(self, *args, **kwargs):
    raise PermissionError('403\nForbidden')

  monkeypatch.setattr(epath.Path(address).__class__, 'write_text', refuse)
  monkeypatch.setattr(epath.Path(address).__class__, 'mkdir', refuse)
  with pytest.raises(ValueError, match=message) as error, remote.local(address):
    pass
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('fault', ['slow', 'refuses', 'loses bytes'])
def test_what_a_bucket_did_not_take_is_written_again(tmp_path, monkeypatch, fault):
  home, kind, num = epath.Path(tmp_path / 'run'), type(epath.Path(tmp_path)), 0
  write = kind.write_bytes

  def write_badly(self, data):
    nonlocal num
    num += 1
    if fault == 'slow':
      time.sleep(0.02)
    elif num in (2, 3):
      if fault == 'refuses':
        raise OSError('503\ntry later')
      data = data[:-1]
    write(self, data)

  monkeypatch.setattr(kind, 'write_bytes', write_badly)
  said, files = [], {name: name * 9 for name in 'abcd'}
  with remote.mirror(home) as path:
    for name, text in files.items():
      (path / name).write_text(text)
    for _ in range(3):
      try:
        remote.push(path)
      except OSError as error:
        said.append(str(error))
    assert _tree(home) == files
  assert len(said) == (0 if fault == 'slow' else 2)
  assert all('the same command goes on' in text and '\n' not in text for text in said)


@pytest.mark.parametrize('fault', ['lists what is gone', 'hides what is there'])
def test_a_listing_is_no_proof(tmp_path, monkeypatch, fault):
  home, kind = epath.Path(tmp_path / 'run'), type(epath.Path(tmp_path))
  home.mkdir()
  files = {name: name for name in ('config.json', 'manifest.json', 'metrics.jsonl', 'tokenizer')}
  for name, text in files.items():
    (home / name).write_text(text)
  iterdir = kind.iterdir

  def lie(self):
    found = list(iterdir(self))
    if self == home:
      gone = fault == 'lists what is gone'
      found = [*found, self / 'gone'] if gone else [p for p in found if p.name == 'tokenizer']
    return iter(found)

  monkeypatch.setattr(kind, 'iterdir', lie)
  with remote.mirror(home) as path:
    monkeypatch.undo()
    assert _tree(path) == files


@pytest.mark.parametrize('fault', ['refuses', 'loses bytes'])
def test_what_a_bucket_does_not_give_whole_is_one_line(tmp_path, monkeypatch, fault):
  home, kind = epath.Path(tmp_path / 'run'), type(epath.Path(tmp_path))
  home.mkdir()
  (home / 'metrics.jsonl').write_text('{}')
  read = kind.read_bytes

  def read_badly(self):
    if fault == 'refuses':
      raise RuntimeError('503\ntry later')
    return read(self)[:-1]

  monkeypatch.setattr(kind, 'read_bytes', read_badly)
  with pytest.raises(ValueError, match=r'cannot read .*run \(') as error, remote.mirror(home):
    pass
  assert '\n' not in str(error.value)
  assert (home / 'metrics.jsonl').read_text() == '{}'


def test_a_bucket_that_is_gone_is_one_line(tmp_path):
  (tmp_path / 'run').mkdir()
  with (
    pytest.raises(OSError, match=r'cannot write to .*run \(') as error,
    remote.mirror(epath.Path(tmp_path / 'run')) as path,
  ):
    (tmp_path / 'run').rmdir()
    (tmp_path / 'run').write_text('in the way')
    (path / 'metrics.jsonl').write_text('x')
  assert '\n' not in str(error.value)


# Checkpoints are left out: the emulator answers the many requests at once that
# tensorstore makes with a generation that is none, now and then.
_IN_A_BUCKET = """
from csrm_jax.core import remote

for start in (1, 2):
  with remote.local('gs://bucket/a/run') as path:
    assert (path / 'metrics.jsonl').exists() == (start > 1)
    (path / 'report').mkdir(exist_ok=True)
    (path / 'report' / 'report.md').write_text(f'of {start}')
    (path / 'metrics.jsonl').write_text('{}')
    (path / f'only-{start}').write_text('')
    (path / 'only-1').unlink(missing_ok=True)
path = remote.readable('gs://bucket/a/run')
assert str(remote.home(path / 'x')) == 'gs://bucket/a/run/x'
assert sorted(p.name for p in path.iterdir()) == [
  'metrics.jsonl', 'only-2', 'report']
assert (path / 'report' / 'report.md').read_text() == 'of 2'
try:
  with remote.local('gs://no-such-bucket/run'):
    pass
except ValueError as error:
  assert 'cannot write to --workdir=gs://no-such-bucket/run (' in str(error)
else:
  raise AssertionError
"""


def test_a_bucket_of_a_cloud_emulator(tmp_path):
  pytest.importorskip('gcsfs')
  emulator = pytest.importorskip('gcp_storage_emulator.server')
  port = small.free_port()
  server = emulator.create_server('localhost', port, in_memory=True, default_bucket='bucket')
  server.start()
  try:
    result = subprocess.run(
      [sys.executable, '-c', _IN_A_BUCKET],
      capture_output=True,
      text=True,
      env=small.env(
        STORAGE_EMULATOR_HOST=f'http://localhost:{port}',
        TENSORSTORE_GCS_HTTP_URL=f'http://localhost:{port}',
      ),
    )
  finally:
    server.stop()
  assert result.returncode == 0, result.stderr
