"""What a wheel holds, and that it works in an empty folder."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

from tests import small

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = (
  *('configs/rm.py', 'configs/common.py', 'configs/safety/film_club.yaml', 'launch/sweep.py'),
  *('launch/tpu_vm.sh', 'py.typed', 'data/rules/xstest.yaml', 'evals/metrics.yaml'),
  *('serve/page/index.html', 'ruleworld/base/domain.json'),
)


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_folder(tmp_path):
  made = subprocess.run(
    [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, '.'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert made.returncode == 0, made.stderr
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as found:
    names = found.namelist()
    assert not [name for name in FILES if f'csrm_jax/{name}' not in names]
    assert not [name for name in names if name.startswith(('tests/', 'configs/'))]
    (about,) = (name for name in names if name.endswith('METADATA'))
    assert '# csrm_jax' in found.read(about).decode()
    found.extractall(tmp_path / 'site')
  (tmp_path / 'empty').mkdir()
  for args in (['rm', '--help'], ['--config=configs/rm.py:smoke', '--print_config']):
    done = subprocess.run(
      [sys.executable, '-m', 'csrm_jax', *args],
      cwd=tmp_path / 'empty',
      env=small.env(PYTHONPATH=str(tmp_path / 'site')),
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0 and 'builtin:ruleworld/base' in done.stdout, done.stderr
  assert not any((tmp_path / 'empty').iterdir())
