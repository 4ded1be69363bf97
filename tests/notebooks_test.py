"""The notebook runs from top to bottom, on a model trained for a moment."""

import json
import pathlib
import re
import subprocess
import sys

import matplotlib
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PATH = ROOT / 'notebooks' / 'quickstart.ipynb'


def code_cells():
  cells = json.loads(PATH.read_text())['cells']
  return [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']


def test_is_stored_without_outputs():
  cells = json.loads(PATH.read_text())['cells']
  assert not any(cell.get('outputs') for cell in cells)


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
  matplotlib.use('agg')
  monkeypatch.chdir(ROOT)
  names = {}
  for source in code_cells():
    # What IPython adds: shell lines, which here run as a process.
    shell = re.findall(r'^!(.*)$', source, re.MULTILINE)
    source = re.sub(
      r'^\s*[!%].*$', '  pass' if 'REPOSITORY' in source else '', source, flags=re.MULTILINE
    )
    if 'WORKDIR =' in source:
      source = source.replace('configs/rm.py', 'configs/rm.py:smoke')
      source = source.replace('/tmp/rm', str(tmp_path / 'rm'))
    exec(compile(source, str(PATH), 'exec'), names)
    for line in shell:
      command = line.format(**names).replace('python', sys.executable, 1)
      subprocess.run(command.split(), check=True, capture_output=True)
  verdicts = re.findall(r'^(?:un)?safe +P\(unsafe\) = ', capsys.readouterr().out, re.MULTILINE)
  assert len(verdicts) == 2
  assert names['table'].shape == (4, 5)
  assert ((names['table'] >= 0) & (names['table'] <= 1)).all()
