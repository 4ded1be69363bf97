"""Proposals on Apache Beam are those of one machine."""

import json
import pathlib
import sys

import pytest

from csrm_jax import config as config_lib
from csrm_jax.augmentation import beam
from csrm_jax.data import forms, pipeline
from csrm_jax.runners import augment

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = config_lib.load_module(ROOT / 'configs' / 'augment.py')


def config(**changes):
  c = CONFIG.get_config()
  c.source.num_examples, c.strictness.enabled = 60, False
  c.update_from_flattened_dict(changes)
  return c


def twice(item):
  return [item, item]


def run(c, workdir):
  workdir.mkdir()
  augment.run(c, workdir)
  card = json.loads((workdir / 'card.json').read_text())
  return (workdir / 'data.jsonl').read_bytes(), card


def test_results_come_in_order(tmp_path):
  pytest.importorskip('apache_beam')
  assert beam.run(twice, ['a', 'b', 'c'] * 7, (), tmp_path / 'out') == [
    [x, x] for x in ['a', 'b', 'c'] * 7
  ]


def test_data_is_the_same_with_and_without_beam(tmp_path):
  pytest.importorskip('apache_beam')
  data, card = run(config(), tmp_path / 'here')
  on_beam = config(**{'beam.enabled': True})
  again, other = run(on_beam, tmp_path / 'beam')
  assert again == data
  assert other['usage_of_last_run'] == card['usage_of_last_run'] == {'requests': 60}
  # What is in the journal is not done anew.
  augment.run(on_beam, tmp_path / 'beam')
  last = json.loads((tmp_path / 'beam' / 'card.json').read_text())
  assert last['usage_of_last_run'] == {'requests': 0}
  assert last['digest'] == card['digest']


def test_array_record_files_come_from_beam_too(tmp_path):
  pytest.importorskip('apache_beam')
  pytest.importorskip('tensorflow_datasets')
  c = config(**{'beam.enabled': True, 'array_record': True, 'source.num_examples': 8})
  run(c, tmp_path / 'work')
  found = pipeline.read_source('array_record', str(tmp_path / 'work'))
  rows = forms.read(tmp_path / 'work' / 'data.jsonl')
  assert sorted(found, key=lambda item: item.id) == sorted(rows, key=lambda item: item.id)


def test_without_beam_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  with pytest.raises(ImportError, match=r'install.*\[beam\]') as error:
    run(config(**{'beam.enabled': True}), tmp_path / 'work')
  assert '\n' not in str(error.value)
