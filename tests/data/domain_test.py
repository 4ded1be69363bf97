"""A model of RuleWorld is told from one of English by its words, without an error either way."""

import pathlib

import pytest

import csrm_jax
from csrm_jax.data import domain, sources
from csrm_jax.ruleworld import examples, phrases, probes
from csrm_jax.safety import augment, schema
from tests import small

# Ten made-up policies, each with twenty made-up replies.
EVERYDAY = (pathlib.Path(__file__).parent / 'everyday.txt').read_text()
BASE = domain.read(pathlib.Path(csrm_jax.__file__).parent / 'ruleworld' / 'base')


def everyday():
  """Returns 200 English examples."""
  found = []
  for block in EVERYDAY.split('# ')[1:]:
    policy, *replies = block.splitlines()
    name, guideline = policy.split(': ', 1)
    safety = schema.SafetyConfig((schema.Category(name, guideline),), name)
    for reply in replies:
      talk = schema.Message('user', 'What can you tell me?'), schema.Message('agent', reply)
      found.append(schema.Example(f'{name} {len(found)}', safety, talk, 'safe'))
  return found


@pytest.fixture(scope='module')
def world():
  """What the default run of configs/rm.py stores."""
  parts = [sources.Generated(make, 0) for make in examples.TRAINING.values()]
  sample = [example for part in parts for example in domain.sample(part, 200)]
  return domain.measure('RuleWorld', sample, 256, BASE.words)


def _foreign(known, rows):
  return [row.id for row in rows if known.foreign(row.safety, row.conversation)]


def test_everyday_english_is_foreign_to_ruleworld(world):
  rows = everyday()
  assert len(rows) == 200 and len(_foreign(world, rows)) == 200
  # Rules that it knows do not help, nor does a long history that it knows.
  known = examples.test_example(0, 0, 'unseen')
  talk = (*known.conversation, *rows[20].conversation)
  assert world.foreign(known.safety, talk).endswith('the last message')
  message = small.error_of(world.require, 'row 7', rows[0].safety, rows[0].conversation)
  assert message.startswith('row 7: ') and 'RuleWorld' in message
  assert 'allow_out_of_domain=True' in message


def test_no_test_row_of_ruleworld_is_foreign_to_it(world):
  rows = {
    row.name: [item for item in row.items if isinstance(item, schema.Example)]
    for row in probes.benchmarks(2000, 100)
  }
  assert all(rows[name] for name in ('seen', 'unseen', 'long_rules', 'attacks', 'padding'))
  assert not [name for items in rows.values() for name in _foreign(world, items)]
  long, short = rows['long_rules'][0], rows['unseen'][0]
  assert world.marks(long.safety, long.conversation, 900) == 'longer prompt, more rules'
  assert world.marks(short.safety, short.conversation, 256) == ''
  assert world.marks(augment.NO_RULES, short.conversation, 256) == ''  # as suites ask, too


def test_a_model_of_own_rows_knows_text_like_them():
  rows = everyday()
  # A tiny model learns from half of the replies; a public backbone has read far more.
  own = domain.measure('own.csv', rows[::2], 256, BASE.words)
  assert len(_foreign(own, rows[1::2])) <= 1
  tuned = domain.measure('own.csv', rows[:20], 256, least=domain.BACKBONE_LEAST)
  assert not _foreign(tuned, rows)
  other = 'Верните мне деньги за прошлый месяц, пожалуйста, и сообщите, когда они придут. ' * 3
  talk = (schema.Message('agent', other),)
  assert all(known.foreign(rows[0].safety, talk) for known in (own, tuned))


def test_words_of_scripts_without_spaces_are_characters():
  assert domain.words('Don’t GO，お茶 x2') == ['don', 't', 'go', 'お', '茶', 'x']
  assert domain.words('42 :)') == ['4', '2', ':', ')']


def test_it_is_stored_beside_weights(world, tmp_path):
  domain.write(tmp_path, world)
  assert domain.read(tmp_path) == world
  assert domain.read(tmp_path / 'elsewhere') is None
  assert 'ruleworld' not in world.words and len(set(world.words) - set(phrases.THINGS)) < 1500
