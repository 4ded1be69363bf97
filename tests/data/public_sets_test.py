"""Public data sets as ArrayRecord files, through TFDS without TensorFlow."""

import json
import sys

import pytest

pytest.importorskip('tensorflow_datasets')
pytest.importorskip('array_record')

from csrm_jax.data import catalogue, public_sets

ROWS = [
  {
    'policy': '1. No cats.\n2. No dogs.',
    'label': label,
    'transcript': f'User: hi\nAgent: reply {number}',
  }
  for number, label in enumerate(['PASS', 'FAIL', 'PASS'])
]


def test_what_is_prepared_is_read_back(tmp_path):
  folder = tmp_path / 'files' / 'DynaBench'
  folder.mkdir(parents=True)
  text = '\n'.join(map(json.dumps, [*ROWS, ROWS[0] | {'policy': None}]))
  (folder / 'test.jsonl').write_text(text + '\n')
  builder = public_sets.make_builder('dynabench', tmp_path / 'tfds', tmp_path / 'files')
  builder.download_and_prepare()
  items = sorted(
    public_sets.Prepared('dynabench', 'test', tmp_path / 'tfds'), key=lambda item: item.id
  )
  assert items == catalogue.read('dynabench', 'test', tmp_path / 'files')
  again = public_sets.make_builder('dynabench', tmp_path / 'tfds')
  assert again.info.metadata['drops'] == {'test': {'no_policy': 1}}
  assert 'tensorflow' not in sys.modules


@pytest.fixture
def two_files(tmp_path):
  """Returns a folder of a set in two files, each with a row of no use."""
  folder = tmp_path / 'files' / 'DynaBench'
  folder.mkdir(parents=True)
  useless = ROWS[0] | {'policy': None}
  for name, rows in ('a', ROWS), ('b', ROWS[1:]):
    text = '\n'.join(map(json.dumps, [*rows, useless]))
    (folder / f'test_{name}.jsonl').write_text(text + '\n')
  return tmp_path / 'files'


def test_beam_writes_the_same(two_files, tmp_path):
  pytest.importorskip('apache_beam')
  here, there = tmp_path / 'here', tmp_path / 'beam'
  public_sets.make_builder('dynabench', here, two_files).download_and_prepare()
  public_sets.prepare_on_beam('dynabench', there, two_files)
  rows = [public_sets.Prepared('dynabench', 'test', d) for d in (here, there)]
  assert list(rows[0]) == list(rows[1]) and len(rows[0]) == 5
  for folder in here, there:
    info = public_sets.make_builder('dynabench', folder).info
    assert info.metadata['drops'] == {'test': {'no_policy': 2}}
  assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize('on_beam', [False, True])
def test_a_damaged_file_is_named(two_files, tmp_path, on_beam):
  (two_files / 'DynaBench' / 'test_b.jsonl').write_text('{"policy": "No')
  prepare = public_sets.prepare_on_beam
  if on_beam:
    pytest.importorskip('apache_beam')
  else:

    def prepare(*args):
      public_sets.make_builder(*args).download_and_prepare()

  with pytest.raises(ValueError, match=r'test_b.jsonl:1: .*cut short'):
    prepare('dynabench', tmp_path / 'tfds', two_files)
  with pytest.raises(ValueError, match='is not prepared there'):
    public_sets.Prepared('dynabench', 'test', tmp_path / 'tfds')


def test_without_beam_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  monkeypatch.setitem(sys.modules, 'apache_beam.options', None)
  with pytest.raises(ImportError, match=r'install.*\[beam\]') as error:
    public_sets.prepare_on_beam('aegis', tmp_path, tmp_path)
  assert '\n' not in str(error.value)


def test_a_folder_without_files_is_one_line(tmp_path):
  builder = public_sets.make_builder('aegis', tmp_path / 'tfds', tmp_path)
  with pytest.raises(ValueError, match='no file of aegis/train there'):
    builder.download_and_prepare()


def test_what_is_not_prepared_is_one_line(tmp_path):
  with pytest.raises(ValueError, match='aegis/train is not prepared') as error:
    public_sets.Prepared('aegis', 'train', tmp_path)
  assert '\n' not in str(error.value)
