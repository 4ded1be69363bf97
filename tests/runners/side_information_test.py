"""What a run says of weights, ratings, strengths and ties before it begins."""

import pytest

from csrm_jax import config as config_lib
from csrm_jax.runners import train_rm
from tests.data.side_information_test import example, pair
from tests.small import error_of


def _config(**changes):
  config = config_lib.load_module('rm').get_config()
  config_lib.set_overrides(config, changes)
  return config


@pytest.mark.parametrize(
  'items, changes, said',
  [
    ([pair(strength=0), pair(strength=2)], {}, ['1 pairs of', 'tie and is left out', 'margin and']),
    ([pair(soft=0.8)], {'loss.pair': 'margin'}, ['soft that is not read', 'takes 1 for all']),
    ([pair(strength=0, soft=0.8)], {'loss.pair': 'soft:tie=0.5'}, []),
    ([example(ratings={'a': 1})], {'model.head': 'ratings:names=a'}, []),
    ([example(), pair()], {}, []),
  ],
)
def test_a_run_says_what_it_does_not_read(capsys, items, changes, said):
  train_rm.checks.note.cache_clear()
  train_rm._check_side_information(_config(**changes), {'own': items})
  found = capsys.readouterr().err
  assert all(part in found for part in said) and bool(found) == bool(said)


def test_a_head_that_nothing_teaches_is_refused():
  rows, head = {'own': [example(ratings={'a': 1})]}, {'model.head': 'ratings:names=a+b'}
  message = error_of(train_rm._check_side_information, _config(**head), rows)
  assert "learns the rating 'b', which no row has; there are a" in message
  rows = {'own': [example(label=None, ratings={'a': 1})]}
  message = error_of(train_rm._check_side_information, _config(), rows)
  assert 'no label, and model.head=verbalizer' in message
  # RuleWorld is graded by a defect.
  parts = train_rm._read_data(_config())[0]
  graded = {'model.head': 'ordinal:rating=-severity'}
  assert 'severity' in error_of(train_rm._check_side_information, _config(**graded), parts)
  graded['data.defect'] = 'scale:sd=0'
  train_rm._check_side_information(_config(**graded), parts)
