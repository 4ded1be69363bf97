"""The notebooks run from top to bottom as they are opened, on models trained for a moment."""

import json
import pathlib
import re

import pytest

from csrm_jax import config as config_lib
from tests import run_notebook
from tests.reward import backbone_test

FOLDER = pathlib.Path(__file__).parents[1] / 'notebooks'
NAMES = sorted(path.name for path in FOLDER.glob('*.ipynb'))
make = config_lib.load_module(FOLDER / 'make.py')


@pytest.mark.parametrize('name', NAMES)
def test_shared_cells_are_those_of_make_and_nothing_has_outputs(name):
  text = (FOLDER / name).read_text('utf-8')
  notebook = json.loads(text)
  assert text == make.text_of(make.stamp(notebook, name, ''))
  tags = [cell['metadata'].get('tags', []) for cell in notebook['cells']]
  assert tags.count([make.PARAMETERS]) == 1


def test_an_address_is_put_into_badge_and_first_cell():
  name = NAMES[0]
  notebook = json.loads((FOLDER / name).read_text('utf-8'))
  stamped = make.stamp(notebook, name, 'https://github.com/org/copy.git')
  text = make.text_of(stamped)
  assert f'colab.research.google.com/github/org/copy/blob/main/notebooks/{name}' in text
  assert "REPOSITORY = 'https://github.com/org/copy.git'" in text
  assert make.address_of(stamped) == 'https://github.com/org/copy.git'
  assert make.stamp(stamped, name, '') == notebook


def _run(name, **values):
  pytest.importorskip('nbclient', reason='needs pip install -e ".[notebooks]"')
  return run_notebook.run(FOLDER / name, values)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('notebooks')


@pytest.fixture(scope='module')
def reward_model(folder):
  """Returns what the notebooks that share a reward model are given."""
  return {'JOB': 'rm:smoke', 'RM': str(folder / 'rm')}


@pytest.mark.slow
def test_rules_live(reward_model):
  notebook = _run('1_rules_live.ipynb', **reward_model)
  assert len(run_notebook.pictures(notebook)) == 3
  said = run_notebook.printed(notebook)
  assert 'device(s)' in said and 'F1, unseen rules' in said and 'VBox' in said


@pytest.mark.slow
def test_own_data(folder):
  notebook = _run('2_own_data.ipynb', WORKDIR=str(folder / 'own'), EPOCHS=1, ROWS=120)
  assert len(run_notebook.pictures(notebook)) == 1
  said = run_notebook.printed(notebook)
  assert re.search(r'\d+ of 40 verdicts are not as labelled', said)
  assert (folder / 'own_scored' / 'scored.csv').is_file()


@pytest.mark.slow
def test_policy_guard(folder):
  guard = folder / 'guard_model'
  guard.mkdir()
  backbone_test.write_model(guard)
  notebook = _run('3_policy_guard.ipynb', GUARD=str(guard), WORKDIR=str(folder / 'guard'), ROWS=6)
  assert len(run_notebook.pictures(notebook)) == 1
  said = run_notebook.printed(notebook)
  assert re.search(r'\d of 6 verdicts are as labelled', said) and 'AUROC' in said


@pytest.mark.slow
def test_align(folder, reward_model):
  notebook = _run('4_align.ipynb', **reward_model, RL=str(folder / 'rl'), MORE=',smoke')
  assert len(run_notebook.pictures(notebook)) == 1
  said = run_notebook.printed(notebook)
  assert 'share that breaks no rule' in said and '<th>best of 8</th>' in said


@pytest.mark.slow
def test_ablations(folder):
  config, workdir = 'configs/rm.py:smoke', str(folder / 'sweep')
  notebook = _run('5_ablations.ipynb', CONFIG=config, ONLY='full', SEEDS='0', WORKDIR=workdir)
  assert len(run_notebook.pictures(notebook)) == 2
  assert re.search(r'unseen/f1 +\d\.\d{3} \[', run_notebook.printed(notebook))


@pytest.mark.slow
def test_serve_and_export(folder, reward_model):
  notebook = _run('6_serve_and_export.ipynb', **reward_model, WORKDIR=str(folder / 'exported'))
  said = run_notebook.printed(notebook)
  assert len(set(re.findall(r'P\(unsafe\) = (\d\.\d{4})', said))) == 1  # of the run, and exported
  assert 'is ready' in said and 'flagged: ' in said
  assert 'exit code 0' in said
