"""A work directory that an earlier version has written still loads and gives the same scores.

tests/frozen_workdir/rm.tar.xz is the work directory of a reward model of one layer: its checkpoint,
tokenizer and config, without the report. expected.json holds the scores that the version which
trained it gave to three conversations under two rule sets. Neither may be made again: a change that
breaks this test breaks the work directories of users.
"""

import json
import pathlib
import shutil

import pytest

import csrm_jax
from csrm_jax import config as config_lib, main
from csrm_jax.safety.schema import Message, load_safety

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'tests' / 'frozen_workdir'
EXPECTED = json.loads((FOLDER / 'expected.json').read_text())
TALKS = config_lib.load_module(ROOT / 'tests' / 'freeze.py').TALKS


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('frozen')
  shutil.unpack_archive(FOLDER / 'rm.tar.xz', folder, filter='data')
  return folder / 'rm'


def test_scores_are_what_they_were(workdir):
  rm = csrm_jax.load(workdir)
  talks = [[Message('user', a), Message('agent', b)] for a, b in TALKS]
  for name, want in EXPECTED.items():
    safety = load_safety(ROOT / 'configs' / 'safety' / f'{name}.yaml')
    found = [verdict.score for verdict in rm.score(safety, talks)]
    assert found == pytest.approx(want, abs=1e-5)  # Other processors round otherwise.


def test_the_command_scores_a_file_with_it(workdir, tmp_path):
  lines = [
    {
      'id': str(i),
      'conversation': [{'role': 'user', 'content': a}, {'role': 'agent', 'content': b}],
    }
    for i, (a, b) in enumerate(TALKS)
  ]
  path = tmp_path / 'talks.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  config = config_lib.load_module(ROOT / 'configs' / 'eval.py').get_config()
  config.checkpoint, config.conversations = str(workdir), str(path)
  config.safety = str(ROOT / 'configs' / 'safety' / 'hospital.yaml')
  main.run(config, tmp_path / 'scored')
  rows = (tmp_path / 'scored' / 'scored.jsonl').read_text().splitlines()
  found = [json.loads(row)['score'] for row in rows]
  assert found == pytest.approx(EXPECTED['hospital'], abs=1e-5)
