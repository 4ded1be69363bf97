"""Rules from one-bit alarms: the exact inducer, the loop with its journal, and the stage."""

import json

import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.augmentation import induction, proposers, requests
from csrm_jax.core import journal as journal_lib
from csrm_jax.ruleworld import alarms, policy, proposer as world, rules as rules_lib
from csrm_jax.runners import augment
from csrm_jax.safety import schema
from csrm_jax.safety.schema import Category, Example, Message
from tests import small

DOGS, CATS = Category('Dogs', 'No word about dogs.'), Category('Cats', 'No word about cats.')
BIRDS = Category('Birds', 'No word about birds.')


def _alarms(seed, num, false_alarms=0.0):
  return [alarms.alarm(seed, i, 'pet forum', false_alarms) for i in range(num)]


def _agreement(num, false_alarms, seed):
  taught, new = _alarms(seed, num, false_alarms), _alarms(100 + seed, 300)
  rules = alarms.induce([e.conversation for e in taught], [e.label == 'unsafe' for e in taught])
  fires = induction.where(rules, [e.conversation for e in new], world.make_judge())
  return np.mean([f == (e.probability > 0) for f, e in zip(fires, new, strict=True)])


def test_the_oracle_finds_what_is_hidden_and_noise_and_few_bits_cost():
  taught = _alarms(0, 600)
  found = alarms.induce([e.conversation for e in taught], [e.label == 'unsafe' for e in taught])
  hidden = {rule.topic: set(rule.forbidden) for rule in policy.RULE_SETS['pet forum']}
  assert {rule.topic: set(rule.forbidden) for rule in map(rules_lib.read, found)} == hidden
  many, few, noisy = (
    np.mean([_agreement(*case, seed) for seed in range(3)])
    for case in ((400, 0.0), (16, 0.0), (400, 0.5))
  )
  assert many > 0.98 > few and many > noisy > 0.6
  with pytest.raises(ValueError, match='rule_set'):
    alarms.alarm(0, 0, 'nobody')
  heard = [e.label == 'unsafe' for e in _alarms(0, 400, 0.5)]
  assert np.mean(heard) > np.mean([e.label == 'unsafe' for e in taught]) + 0.2


class Scripted:
  """Proposes what is written down, and remembers what it was asked."""

  name, concurrency = 'scripted', 1

  def __init__(self, *replies):
    self.replies, self.asked = list(replies), []

  def ask(self, request):
    self.asked.append(request)
    reply = self.replies[request.draft]
    if isinstance(reply, Exception):
      raise reply
    return reply

  def usage(self):
    return {'requests': len(self.asked)}


def _talk(word):
  return (Message('user', 'Hi.'), Message('agent', f'All about {word}.'))


WORDS = ['dogs', 'cats', 'birds', 'fish'] * 5
EXAMPLES = [
  Example(
    f'{i}', schema.SafetyConfig((DOGS,)), _talk(word), ['safe', 'unsafe'][word in 'dogs cats']
  )
  for i, word in enumerate(WORDS)
]


def _judge(talks, rules):
  pairs = zip(talks, rules, strict=True)
  return [rule.name.lower() in talk[-1].content for talk, rule in pairs]


def _induce(folder, proposer, num_shown=0, num_rounds=4):
  with journal_lib.Journal(folder / 'journal.jsonl') as done:
    return induction.induce(
      EXAMPLES, proposer, _judge, done, lambda *_: None,
      about=['x'], num_rounds=num_rounds, num_shown=num_shown, seed=0,
    )  # fmt: skip


def test_the_best_is_revised_and_a_killed_run_goes_on(tmp_path):
  silent = proposers.NoReplyError('unparsable')
  replies = ((DOGS,), (DOGS, BIRDS), silent, (DOGS, CATS))
  proposer = Scripted(*replies)
  rounds = _induce(tmp_path, proposer, num_shown=8)
  assert [one.agreement for one in rounds] == [0.75, 0.5, 1]
  # What got worse is not gone on from.
  assert [request.current for request in proposer.asked] == [(), (DOGS,), (DOGS,), (DOGS,)]
  for request in proposer.asked:
    assert len(request.bits) == 8
    wrong = [  # Half of what is shown, at least, the rules so far are wrong about.
      bit != any(_judge([talk], [rule])[0] for rule in request.current)
      for talk, bit in zip(request.conversations, request.bits, strict=True)
    ]
    assert sum(wrong) == min(4, 10 if not request.current else 5)
  lines = (tmp_path / 'journal.jsonl').read_text().splitlines(keepends=True)
  assert len(lines) == 3
  (tmp_path / 'journal.jsonl').write_text(lines[0])
  again = Scripted(*replies)
  assert _induce(tmp_path, again, num_shown=8) == rounds
  assert [request.draft for request in again.asked] == [1, 2, 3]
  # Nothing is asked again, but what nobody answered.
  finished = Scripted(*replies)
  assert _induce(tmp_path, finished, num_shown=8) == rounds and len(finished.asked) == 1
  # It ends where nothing changes.
  assert len(_induce(tmp_path / 'same', Scripted((DOGS,), (DOGS,), (CATS,)))) == 2


def test_the_stage_writes_rules_from_a_file_that_has_none(tmp_path, monkeypatch):
  path = tmp_path / 'own.jsonl'
  rows = [
    {'id': e.id, 'prompt': f'Hi {e.id}.', 'response': e.conversation[-1].content, 'label': e.label}
    for e in EXAMPLES
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  c = config_lib.load_module('augment').get_config(
    f'induce,proposer=endpoint,data=auto,path={path},judge=mine'
  )
  assert c.induce.num_shown == 24
  monkeypatch.setattr(augment, '_make_proposer', lambda *_: Scripted((DOGS, CATS)))
  monkeypatch.setattr(augment, '_make_judge', lambda *_: _judge)
  augment.run(c, tmp_path / 'work')
  assert schema.load_safety(tmp_path / 'work' / 'rules.json').categories == (DOGS, CATS)
  card = json.loads((tmp_path / 'work' / 'card.json').read_text())
  assert (
    card['agreement_held_out'] == 1 and card['counts']['rows'] + card['counts']['held_out'] == 20
  )
  assert 'agreement_with_hidden_rules' not in card  # nobody knows them


def test_the_stage_sees_through_flipped_alarms_and_asks_once(tmp_path):
  c = config_lib.load_module('augment').get_config('induce')
  c.source.num_examples, c.source.defect, c.induce.rules = 400, 'flip:p=0.1', 'pet forum'
  augment.run(c, tmp_path)
  before, card = (json.loads((tmp_path / f'{x}.json').read_text()) for x in ('rules', 'card'))
  assert card['agreement_with_hidden_rules'] > 0.95 > card['agreement_held_out'] > 0.75
  assert card['usage_of_last_run']['requests'] == card['counts']['rounds']
  augment.run(c, tmp_path)
  after, card = (json.loads((tmp_path / f'{x}.json').read_text()) for x in ('rules', 'card'))
  assert after == before and card['usage_of_last_run'] == {'requests': 0}


def test_what_cannot_be_induced_is_one_line(tmp_path):
  c = config_lib.load_module('augment').get_config('induce')
  c.source.num_examples, c.induce.eval_fraction = 40, 1.0
  assert 'must be between 0 and 1' in small.error_of(augment.run, c, tmp_path)
  c.induce.eval_fraction, c.judge = 0.5, ''
  assert 'tests rules by a judge' in small.error_of(augment.run, c, tmp_path)
  c.judge, c.source.num_examples = 'ruleworld', 1
  assert 'give more rows' in small.error_of(augment.run, c, tmp_path)
  none = requests.InduceRules((_talk('dogs'),), (False,))
  oracle = proposers.Oracle(0, 0.0, 'subset')
  with pytest.raises(proposers.NoReplyError, match='no_alarms'):
    oracle.ask(none)
