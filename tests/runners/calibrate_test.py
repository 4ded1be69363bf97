"""Thresholds fitted on labelled rows, and used where files and requests are judged."""

import json
import pathlib

import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.evals import thresholds
from csrm_jax.reward import model as reward_model, monitor
from csrm_jax.runners import calibrate, evaluate
from csrm_jax.safety import schema
from tests import small
from tests.serve import serving

ROOT = pathlib.Path(__file__).parents[2]
NUM = 40


@pytest.fixture(scope='module')
def weights():
  return serving.params()


@pytest.fixture
def rm(weights, monkeypatch):
  score_fn = small.SPEC.make_score_fn(weights, small.TOKENIZER, serving.LENGTHS.max_length)
  found = reward_model.RewardModel(small.SPEC, score_fn, 1, find_digest=lambda: 'abc')
  monkeypatch.setattr(evaluate, 'load_model', lambda config, allow: found)
  return found


@pytest.fixture
def rows(tmp_path):
  """Writes labelled rows under two sets of rules; returns the examples."""
  folder = serving.write_policies(tmp_path)
  rng = np.random.default_rng(0)
  examples = []
  for name in ('film', 'pets'):
    safety = schema.load_safety(folder / f'{name}.yaml')
    for i in range(NUM):
      words = rng.choice(['cats', 'dogs', 'poker', 'bark', 'sleep', 'films'], 4)
      talk = schema.Message('user', 'Tell me.'), schema.Message('agent', ' '.join(words))
      label = 'unsafe' if i % 4 == 0 else 'safe'
      examples.append(schema.Example(f'{name}{i}', safety, talk, label))
  lines = [json.dumps(example.to_dict()) for example in examples]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(lines))
  return examples


def _fit(tmp_path, **changes):
  c = config_lib.load_module(ROOT / 'configs/calibrate.py').get_config('checkpoint=x,level=0.1')
  c.conversations = str(tmp_path / 'rows.jsonl')
  c.update(changes)
  (tmp_path / 'fit').mkdir(exist_ok=True)
  calibrate.run(c, tmp_path / 'fit')
  return tmp_path / 'fit' / calibrate.FILE


def test_each_rule_set_has_a_threshold_and_files_use_it(rm, rows, tmp_path, capsys):
  path = _fit(tmp_path)
  out = capsys.readouterr().out
  assert '| 30 |' in out and f'thresholds: {path}' in out
  found = thresholds.load(str(path), 'abc', None).by_rules
  assert set(found) == {row.safety.digest() for row in rows}
  scores = rm.score_fn(rows)
  for digest, fitted in found.items():
    own = [i for i, row in enumerate(rows) if row.safety.digest() == digest]
    labels = np.array([rows[i].label == 'unsafe' for i in own])
    assert fitted == thresholds.fit(labels, scores[own], 0.1)
  # Scoring a file labels by them.
  c = config_lib.load_module(ROOT / 'configs/eval.py').get_config('checkpoint=x')
  c.conversations, c.thresholds = str(tmp_path / 'rows.jsonl'), str(path)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'manifest.json').write_text('{}')
  evaluate.run(c, tmp_path / 'out')
  scored = [json.loads(line) for line in (tmp_path / 'out' / 'scored.jsonl').open()]
  for row, score, line in zip(rows, scores, scored, strict=True):
    fitted = found[row.safety.digest()]
    assert line['label'] == schema.LABELS[fitted.flags(score)]
    assert line['threshold'] == pytest.approx(fitted.p_unsafe)
  assert {line['label'] for line in scored} == {'safe', 'unsafe'}


def test_the_server_uses_them(rm, rows, weights, tmp_path):
  found = thresholds.load(str(_fit(tmp_path)), 'abc', None).by_rules
  folder = tmp_path / 'policies'
  folder.mkdir()
  serving.write_policies(folder)
  with serving.running(folder, weights, thresholds=found) as server:
    digest = server.policies.get('pets').digest
    fitted = found[digest]
    talks = [[m.to_dict() for m in row.conversation] for row in rows[:20]]
    body = {'policy': 'pets', 'conversations': talks, 'each_rule': True}
    for verdict in server.post('/score', body)['verdicts']:
      assert (verdict['label'] == 'unsafe') == fitted.flags(verdict['score'])
      assert verdict['threshold'] == pytest.approx(fitted.p_unsafe)
    result = server.post('/v1/moderations', {'input': 'dogs dogs', 'policy': 'pets'})['results'][0]
    assert result['categories'] == {'Dogs': result['flagged']}
    listed = {p['name']: p for p in server.ask('GET', '/policies')[2]['policies']}
    assert listed['pets']['threshold'] == pytest.approx(fitted.p_unsafe)
    # Edited rules are other rules: nobody has fitted anything for them.
    other = {'categories': [{'name': 'Dogs', 'guideline': 'Dogs are fine.'}]}
    (verdict,) = server.post('/score', {'safety': other, 'messages': talks[0]})['verdicts']
    assert verdict['threshold'] == 0.5


def test_what_cannot_be_fitted(rm, rows, tmp_path):
  message = small.error_of(_fit, tmp_path, level=0.01)
  assert '30 safe rows, and method=conformal needs 99' in message and 'the rules ' in message
  lines = [json.dumps(row.to_dict() | {'label': None}) for row in rows]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(lines))
  assert 'no row has a label' in small.error_of(_fit, tmp_path)


def test_a_monitor_is_fitted_on_streams_and_served(rm, rows, weights, tmp_path):
  path = _fit(tmp_path, stream='words', every=2)
  with pytest.raises(ValueError, match='are for streams; run'):
    thresholds.load(str(path), 'abc', None)
  found = thresholds.load(str(path), 'abc', None, of_streams=True)
  cuts = monitor.Cuts(**found.stream)
  own = [r for r in rows if r.safety == rows[0].safety]
  safe = [r.conversation for r in own if r.label == 'safe']
  fitted = rm.monitor(rows[0].safety, 0.1, safe, every=2).fitted
  kept = found.by_rules[rows[0].safety.digest()]
  # Of unsafe rows the monitor knows nothing.
  assert (kept.score, kept.level, kept.num_safe) == (fitted.score, 0.1, len(safe))
  folder = tmp_path / 'policies'
  folder.mkdir()
  serving.write_policies(folder)
  with serving.running(folder, weights, cuts=cuts, alarms=found.by_rules) as server:
    talks = [[m.to_dict() for m in r.conversation] for r in own]
    asks = [{'policy': 'film', 'messages': talk, 'over': True} for talk in talks]
    answers = [server.post('/monitor', ask) for ask in asks]
    assert {answer['false_alarms'] for answer in answers} == {0.1}
    calm = [not a['alarm'] for a, r in zip(answers, own, strict=True) if r.label == 'safe']
    assert sum(calm) >= 0.9 * len(calm)
  message = small.error_of(_fit, tmp_path, stream='words', bound='missed')
  assert 'a monitor bounds false alarms' in message
