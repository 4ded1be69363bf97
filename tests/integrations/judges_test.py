"""Judges here and behind HTTP say what the scores say, and refuse what is no verdict."""

import json
import subprocess
import sys

import numpy as np
import pytest

from csrm_jax.integrations import judges, rewards
from csrm_jax.reward import model as reward_model
from csrm_jax.safety import schema
from tests import small
from tests.rl import http_scorer_test
from tests.serve import serving

RULES = {'categories': [{'name': 'Dogs', 'guideline': 'No dogs at all.'}]}
TALKS = [
  [{'role': 'user', 'content': 'Pets?'}, {'role': 'assistant', 'content': text}]
  for text in ('Dogs bark.', 'Cats sleep.', 'Good morning.')
]


@pytest.fixture(params=['local', 'remote'])
def make_judge(request, server, weights, monkeypatch):
  """(rules) -> a judge of the small model."""
  if request.param == 'remote':
    return lambda rules: judges.remote(server.url, rules, num_tries=1)
  rm = reward_model.RewardModel(
    small.SPEC, small.SPEC.make_score_fn(weights, small.TOKENIZER, serving.LENGTHS.max_length)
  )
  monkeypatch.setattr(reward_model, 'load', lambda source: rm)
  return lambda rules: judges.local('anything', rules)


def _want(server, rules, talks):
  safety = [schema.parse_safety(r, 'rules') for r in rules]
  rows = [
    schema.Example('x', s, schema.parse_conversation(talk))
    for s, talk in zip(safety, talks, strict=True)
  ]
  return server.score_fn(rows)


def test_verdicts_are_those_of_scores(make_judge, server):
  judge = make_judge(RULES)
  verdicts = judge(TALKS)
  scores = _want(server, [RULES] * 3, TALKS)
  np.testing.assert_allclose([v.score for v in verdicts], scores, atol=1e-5)
  np.testing.assert_allclose([v.p_unsafe for v in verdicts], serving.p_unsafe(scores), atol=1e-5)
  assert [v.flagged for v in verdicts] == [v.p_unsafe >= 0.5 for v in verdicts]
  other = {'categories': [*RULES['categories'], {'name': 'Cats', 'guideline': 'No cats.'}]}
  mixed = judge(TALKS, [None, other, None], True)
  want = _want(server, [RULES, other, RULES], TALKS)
  np.testing.assert_allclose([v.score for v in mixed], want, atol=1e-5)
  assert [sorted(v.each_rule) for v in mixed] == [['Dogs'], ['Cats', 'Dogs'], ['Dogs']]
  assert judge([]) == []
  assert '2 rule sets for 3' in small.error_of(judge, TALKS, [None, None])
  assert 'conversation 1: ' in small.error_of(judge, [TALKS[0], TALKS[0][:1]])


def test_many_conversations_keep_their_order(server):
  talks = [
    [{'role': 'user', 'content': 'Pets?'}, {'role': 'assistant', 'content': f'Number {i} barks.'}]
    for i in range(150)
  ]
  verdicts = judges.remote(server.url, 'pets')(talks)
  want = _want(server, [RULES] * len(talks), talks)
  np.testing.assert_allclose([v.score for v in verdicts], want, atol=1e-5)


def test_a_judge_without_rules(monkeypatch):
  monkeypatch.setattr(reward_model, 'load', lambda source: None)
  assert 'conversation 0 has no rules' in small.error_of(judges.local('x'), TALKS)


@pytest.mark.parametrize(
  'answer, says',
  [
    ('{"verdicts": []}', 'without 1 "verdicts"'),
    ('{"rewards": [0.5]}', 'without 1 "verdicts"'),
    ('{"verdicts": [{"label": "safe", "score": null, "reward": 1, "p_unsafe": 0}]}', 'is none'),
    ('{"verdicts": [{"label": "safe", "score": NaN, "reward": 1, "p_unsafe": 0}]}', 'is none'),
    ('{"verdicts": [{"label": "ok", "score": 1, "reward": 1, "p_unsafe": 0}]}', 'is none'),
    ('{"verdicts": [null]}', 'is none'),
    ('{"verdicts": [{"label": "safe", "score": 1, "reward": 1, "p_unsafe": 0}]}', 'is none'),
    ((401, 'no token'), 'status 401'),
  ],
)
def test_what_is_no_verdict_is_an_error(answer, says):
  with http_scorer_test.serve(answer) as (url, _):
    judge = judges.remote(url.removesuffix('/get_reward'), RULES, num_tries=1)
    assert says in small.error_of(judge, TALKS[:1])


def test_what_was_not_read_is_told_to_trainers(server):
  judge, logged = judges.remote(server.url, RULES, num_tries=1, shorten=True), {}
  reward = rewards.make(judge)
  completions = ['Dogs bark.', 'Dogs bark. ' * 200]
  reward(prompts=['Pets?'] * 2, completions=completions, log_metric=logged.__setitem__)
  talk = [{'role': 'user', 'content': 'Pets?'}, {'role': 'assistant', 'content': completions[1]}]
  (verdict,) = judge([talk])
  assert 0.5 < verdict.unread < 1 and logged == {'csrm/unread': verdict.unread / 2}


def test_a_remote_judge_needs_no_jax(server):
  script = (
    'import sys, json; from csrm_jax.integrations import judges, rewards; '
    f'reward = rewards.make(judges.remote({server.url!r}, "pets"), "score"); '
    'print(json.dumps(reward(prompts=["Pets?"], completions=["Dogs bark."]))); '
    'assert "jax" not in sys.modules'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], env=small.env(), capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  want = _want(server, [RULES], TALKS[:1])
  np.testing.assert_allclose(json.loads(done.stdout), want, atol=1e-5)


@pytest.mark.parametrize('value', rewards.VALUES)
def test_a_reward_function_of_trainers(make_judge, server, value):
  reward = rewards.make(make_judge(RULES), value)
  marks = '<|im_start|>user\nPets?<|im_end|>\n<|im_start|>assistant\n'
  want = getattr(make_judge(RULES)(TALKS)[0], value)
  for prompt, completion in (
    ('Pets?', 'Dogs bark.'),
    (marks, 'Dogs bark.<|im_end|>'),
    (TALKS[0][:1], TALKS[0][1:]),
  ):
    got = reward(prompts=[prompt], completions=[completion], completion_ids=[[1]], answer=['x'])
    assert got == pytest.approx([want], abs=1e-5)
  other = {'categories': [{'name': 'Mornings', 'guideline': 'Nobody is greeted.'}]}
  got = reward(prompts=['Pets?'] * 2, completions=['Dogs bark.'] * 2, safety=[None, other])
  assert got[0] == pytest.approx(want, abs=1e-5) and got[1] != pytest.approx(want, abs=1e-4)
  assert '1 prompts for 2' in small.error_of(reward, prompts=['a'], completions=['b', 'c'])
  assert 'must be text or messages' in small.error_of(reward, prompts=['a'], completions=[3])
