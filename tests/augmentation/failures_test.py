"""Failures of a reward model: what is contradicted, and the stage that looks for it."""

import json

import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.augmentation import failures
from csrm_jax.data import forms
from csrm_jax.runners import augment
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig
from tests import small
from tests.reward import model_test

RULES = SafetyConfig((Category('Pets', 'No dogs.'),))
SAMPLES = [
  Example(f'{i}', RULES, (Message('user', 'a'), Message('agent', f'{i}'))) for i in range(10)
]
SCORES = np.array([0.5, 3, -2, 1, -4, 2, -1, -3, 0.1, -0.2])


def find(unsafe, scores=SCORES):
  return failures.find(SAMPLES, scores, lambda asked: [int(e.id) in unsafe for e in asked])


def test_a_judge_that_agrees_finds_nothing():
  agreed = find({i for i in range(10) if SCORES[i] < 0})
  assert agreed == failures.Failures() and agreed.to_dict()['rows'] == []
  # Nor is a model wrong that calls the best of bad samples bad.
  assert not find(set(range(10)), SCORES - 9).fooled and not find(set(), SCORES + 9).refused


def test_extremes_are_contradicted_and_stand_beside_what_is_confirmed():
  # By score: 1 5 3 0 8 9 6 2 7 4; the second judge reads 1 5 3 0, and 4 7 2 6.
  found = find({1, 5, 7, 2, 6})
  assert found.fooled and found.refused
  assert [(e.id, e.label) for e in found.examples] == [('1', 'unsafe'), ('4', 'safe')]
  assert [(p.safer.id, p.other.id) for p in found.pairs] == [('3', '1'), ('4', '7')]
  assert [(p.safer.label, p.other.label) for p in found.pairs] == [('safe', 'unsafe')] * 2
  assert all(SCORES[int(p.safer.id)] < SCORES[int(p.other.id)] for p in found.pairs)
  # Where nothing is confirmed there is no pair.
  alone = find({1, 5, 3, 0})
  assert len(alone.examples) == 2 and not alone.pairs


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return str(model_test._save(tmp_path_factory.mktemp('attacked') / 'rm', seed=0))


def test_the_stage_writes_training_data_and_goes_on_where_it_was(model, tmp_path, monkeypatch):
  c = config_lib.load_module('augment').get_config(f'attack={model}')
  assert (c.judge, c.failures.num_samples) == ('ruleworld', 32)
  c.failures.num_prompts, c.failures.num_samples = 20, 6
  augment.run(c, tmp_path)
  card = json.loads((tmp_path / 'card.json').read_text())
  assert (
    card['counts']['prompts'] == 20 and card['counts']['fooled'] + card['counts']['refused'] > 0
  )
  rows = forms.read(tmp_path / 'data.jsonl', require_label=True)
  assert len(rows) == card['counts']['rows'] > 0 and {type(row) for row in rows} <= {Example, Pair}
  before = (tmp_path / 'data.jsonl').read_bytes()
  # A killed run has its first group of prompts in the journal, and asks about the second alone.
  journal = tmp_path / 'journal_failures.jsonl'
  journal.write_text(journal.read_text().splitlines(keepends=True)[0])
  asked = []
  find = failures.find
  monkeypatch.setattr(failures, 'find', lambda *args: asked.append(args) or find(*args))
  augment.run(c, tmp_path)
  assert (tmp_path / 'data.jsonl').read_bytes() == before and len(asked) == 4


def test_what_cannot_be_attacked_is_one_line(tmp_path):
  module = config_lib.load_module('augment')
  c = module.get_config('attack=x,proposer=endpoint')
  assert 'failures need a second judge' in small.error_of(augment.run, c, tmp_path)
  c.failures.num_samples = 1
  assert 'must be at least 2' in small.error_of(augment.run, c, tmp_path)
