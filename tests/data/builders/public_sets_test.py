"""Public data sets as ArrayRecord files, through TFDS without TensorFlow."""

import json
import sys

import pytest

pytest.importorskip('tensorflow_datasets')
pytest.importorskip('array_record')

from csrm_jax.data.builders import catalogue, public_sets

ROWS = [
    {'policy': '1. No cats.\n2. No dogs.', 'label': label,
     'transcript': f'User: hi\nAgent: reply {number}'}
    for number, label in enumerate(['PASS', 'FAIL', 'PASS'])
]


def test_what_is_prepared_is_read_back(tmp_path):
  folder = tmp_path / 'files' / 'DynaBench'
  folder.mkdir(parents=True)
  text = '\n'.join(map(json.dumps, [*ROWS, ROWS[0] | {'policy': None}]))
  (folder / 'test.jsonl').write_text(text + '\n')
  builder = public_sets.make_builder(
      'dynabench', tmp_path / 'tfds', tmp_path / 'files')
  builder.download_and_prepare()
  items = sorted(public_sets.Prepared('dynabench', 'test', tmp_path / 'tfds'),
                 key=lambda item: item.id)
  assert items == catalogue.read('dynabench', 'test', tmp_path / 'files')
  again = public_sets.make_builder('dynabench', tmp_path / 'tfds')
  assert again.info.metadata['drops'] == {'test': {'no_policy': 1}}
  assert 'tensorflow' not in sys.modules


def test_a_folder_without_files_is_one_line(tmp_path):
  builder = public_sets.make_builder('aegis', tmp_path / 'tfds', tmp_path)
  with pytest.raises(ValueError, match='no file of aegis/train there'):
    builder.download_and_prepare()


def test_what_is_not_prepared_is_one_line(tmp_path):
  with pytest.raises(ValueError, match='aegis/train is not prepared') as error:
    public_sets.Prepared('aegis', 'train', tmp_path)
  assert '\n' not in str(error.value)
