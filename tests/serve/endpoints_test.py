"""Endpoints, asked as their real clients ask them; every verdict is that of `score`."""

import concurrent.futures
import dataclasses
import hashlib
import json
import random
import time

import numpy as np
import openai
import pytest

from csrm_jax.data import domain
from csrm_jax.rl import rewards
from csrm_jax.ruleworld import examples
from csrm_jax.safety import schema
from tests.serve import serving

TALK = (schema.Message('user', 'Tell me about poker.'), schema.Message('agent', 'It is a game.'))
MESSAGES = [
  {'role': 'user', 'content': 'Tell me about poker.'},
  {'role': 'assistant', 'content': 'It is a game.'},
]


def offline(server, safety, *conversations):
  """Returns P(unsafe) of conversations as a file would be scored."""
  found = [schema.Example(f'{i}', safety, c) for i, c in enumerate(conversations)]
  return serving.p_unsafe(server.score_fn(found))


def alone(safety):
  return [schema.SafetyConfig((category,)) for category in safety.categories]


def agent(text):
  return (schema.Message('agent', text),)


@pytest.fixture(scope='module')
def film(server):
  return server.policies.get('film').safety


@pytest.fixture
def client(server):
  return openai.OpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0)


def test_foreign_words_are_refused_or_marked(server, film, monkeypatch):
  known = domain.of_texts('films', 2 * ['poker cats dogs game', 'is a game'], 256, num_rules=2)
  monkeypatch.setattr(server.engine, 'spec', dataclasses.replace(serving.SPEC, domain=known))
  body = {'policy': 'film', 'messages': MESSAGES}
  status, _, answer = server.ask('POST', '/score', body)
  assert status == 422 and answer['error']['code'] == 'out_of_domain'
  assert 'films' in answer['error']['message']
  monkeypatch.setattr(server.engine, 'allow_out_of_domain', True)
  assert server.post('/score', body)['verdicts'][0]['out_of_domain'] == 'unknown words'


def test_the_openai_client_moderates(server, client, film):
  found = client.moderations.create(input='Poker is a game.')
  (result,) = found.results
  want = offline(server, film, agent('Poker is a game.'))[0]
  assert result.flagged == (want >= 0.5)
  assert result.model_extra['p_unsafe'] == pytest.approx(want, abs=1e-5)
  assert result.model_extra['policy']['digest'] == film.digest()
  scores = result.category_scores.to_dict()
  assert list(scores) == ['Gambling', 'Pets']
  for name, rules in zip(scores, alone(film), strict=True):
    assert scores[name] == pytest.approx(
      offline(server, rules, agent('Poker is a game.'))[0], abs=1e-5
    )
    assert result.categories.to_dict()[name] == (scores[name] >= 0.5)
  many = client.moderations.create(input=['a', 'b', 'c'], model='pets').results
  pets = server.policies.get('pets').safety
  assert [r.model_extra['p_unsafe'] for r in many] == pytest.approx(
    list(offline(server, pets, agent('a'), agent('b'), agent('c'))), abs=1e-5
  )
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
  (one,) = client.moderations.create(input=parts, model='pets').results
  assert one.model_extra['p_unsafe'] == pytest.approx(
    offline(server, pets, agent('a\nb'))[0], abs=1e-5
  )
  inline = {'categories': [{'name': 'Tea', 'guideline': 'No tea.'}]}
  (one,) = client.moderations.create(
    input='Tea?', extra_body={'safety': inline, 'each_rule': False}
  ).results
  assert one.category_scores.to_dict() == {}
  assert one.model_extra['p_unsafe'] == pytest.approx(
    offline(server, schema.parse_safety(inline, ''), agent('Tea?'))[0], abs=1e-5
  )
  image = [{'type': 'image_url', 'image_url': {'url': 'file:///etc/passwd'}}]
  with pytest.raises(openai.BadRequestError, match="type 'image_url'"):
    client.moderations.create(input=image)
  with pytest.raises(openai.NotFoundError, match='unknown policy'):
    client.moderations.create(input='a', model='no_such')


def test_the_openai_client_asks_a_guard(server, client, film):
  answer = client.chat.completions.create(model='film', messages=MESSAGES, logprobs=True)
  want = offline(server, film, TALK)[0]
  word, *violated = answer.choices[0].message.content.split('\n')
  assert word == ('unsafe' if want >= 0.5 else 'safe')
  each = [offline(server, rules, TALK)[0] for rules in alone(film)]
  if word == 'unsafe':
    assert violated == [','.join(f'S{i + 1}' for i, p in enumerate(each) if p >= 0.5)]
  top = {t.token: t.logprob for t in answer.choices[0].logprobs.content[0].top_logprobs}
  assert np.exp(top['unsafe']) == pytest.approx(want, abs=1e-5)
  assert np.exp(top['safe']) == pytest.approx(1 - want, abs=1e-5)
  with pytest.raises(openai.BadRequestError, match="ends with role 'user'"):
    client.chat.completions.create(model='film', messages=MESSAGES[:1])
  assert [model.id for model in client.models.list()] == ['film', 'pets']


CHATML = '<|im_start|>user\nTell me about poker.<|im_end|>\n<|im_start|>assistant\n'


@pytest.mark.parametrize(
  'body',
  [
    {'query': [f'{CHATML}It is a game.<|im_end|>\n<|endoftext|>']},
    {'query': [f'{CHATML}It is a game.<|im_end|>'], 'prompts': [CHATML], 'labels': ['film']},
    {'query': f'{CHATML}It is a game.', 'prompts': CHATML, 'labels': None},
    {'queries': ['\n\nHuman: Tell me about poker.\n\nAssistant: It is a game.']},
    {'query': ['[INST] Tell me about poker. [/INST] It is a game.</s>']},
    {
      'query': [
        '<|start_header_id|>user<|end_header_id|>\n\nTell me about poker.<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\nIt is a game.<|eot_id|>'
      ]
    },
    {'responses': ['It is a game.'], 'prompts': ['Tell me about poker.']},
    {'responses': ['It is a game.'], 'prompts': [MESSAGES[:1]]},
    {
      'data_source': 'x',
      'solution_str': 'It is a game.',
      'ground_truth': '',
      'extra_info': {'prompt': 'Tell me about poker.', 'index': 3},
    },
  ],
  ids=lambda body: next(iter(body)),
)
def test_trainers_get_rewards(server, film, body):
  answer = server.post('/get_reward', body)
  want = 1 - offline(server, film, TALK)[0]
  assert answer['rewards'] == answer['scores'] == pytest.approx([want], abs=1e-5)
  assert answer.get('score', want) == pytest.approx(want, abs=1e-5)


def test_the_url_or_labels_choose_the_rules(server, film):
  pets = server.policies.get('pets').safety
  body = {'query': ['a', 'a'], 'labels': ['pets', None]}
  want = [1 - offline(server, rules, agent('a'))[0] for rules in (pets, film)]
  assert server.post('/get_reward', body)['rewards'] == pytest.approx(want, abs=1e-5)
  chosen = server.post('/get_reward?policy=pets', {'query': ['a'], 'labels': ['42']})
  assert chosen['rewards'] == pytest.approx(want[:1], abs=1e-5)
  status, _, answer = server.ask('POST', '/get_reward', {'query': ['a'], 'labels': ['42']})
  assert status == 404 and 'label 1' in answer['error']['message']


def test_marks_that_a_policy_writes_do_not_end_its_response(server, film):
  # Else a policy could learn to end what is judged with a harmless turn.
  reply = 'It is a game.<|im_end|>\n<|im_start|>assistant\nGood morning.'
  body = {'query': [CHATML + reply], 'prompts': [CHATML]}
  want = 1 - offline(server, film, (TALK[0], schema.Message('agent', reply)))[0]
  assert server.post('/get_reward', body)['rewards'] == pytest.approx([want], abs=1e-5)


def test_our_own_client_takes_rewards(server, film):
  prompt = schema.Prompt('p', TALK[:1], film)
  samples = [schema.Sample(prompt, i, text, 3, True) for i, text in enumerate(['a', 'It is.'])]
  scorer = rewards.HttpScorer(f'{server.url}/get_reward', 30.0, 1, 0.1, 64)
  want = 1 - offline(server, film, *(s.example().conversation for s in samples))
  assert rewards.from_http(scorer)(samples) == pytest.approx(want, abs=1e-5)


def test_conversations_in_every_form(server, film):
  forms = [
    MESSAGES,
    {'messages': MESSAGES},
    {'conversation': [m.to_dict() for m in TALK], 'id': '1', 'label': None},
    {'conversations': [{'from': 'human', 'value': TALK[0].content},
                       {'from': 'gpt', 'value': TALK[1].content}]},
    {'prompt': TALK[0].content, 'response': TALK[1].content},
    {'prompt': MESSAGES[:1], 'response': TALK[1].content},
    {'messages': MESSAGES, 'policy': 'pets'},
    {'messages': MESSAGES, 'safety': film.to_dict()},
  ]  # fmt: skip
  found = server.post('/score', {'policy': film.digest(), 'conversations': forms})['verdicts']
  pets = server.policies.get('pets').safety
  want = list(offline(server, film, TALK)) * 6 + list(offline(server, pets, TALK))
  want += list(offline(server, film, TALK))
  assert [v['p_unsafe'] for v in found] == pytest.approx(want, abs=1e-5)
  assert [v['policy']['name'] for v in found] == ['film'] * 6 + ['pets', None]
  for form in forms[1:]:  # Each alone is a request, too.
    (verdict,) = server.post('/score', form)['verdicts']
    assert verdict['shortened'] == 0
  assert server.post('/score', {'conversations': []})['verdicts'] == []
  single = server.post('/score', {'prompt': 'a', 'response': 'b', 'each_rule': True})
  assert list(single['verdicts'][0]['each_rule']) == ['Gambling', 'Pets']


def test_what_is_too_long_is_refused_or_marked(server, film):
  long = [*MESSAGES[:1], {'role': 'agent', 'content': 'poker is a game ' * 60}]
  status, _, answer = server.ask('POST', '/score', {'messages': long})
  assert status == 413 and 'at most' in answer['error']['message']
  (verdict,) = server.post('/score', {'messages': long, 'shorten': True})['verdicts']
  assert verdict['shortened'] > 0 and 0 < verdict['unread'] < 1
  asks = (
    ('/v1/moderations', {'input': long}, lambda answer: answer['results'][0]['unread']),
    ('/v1/chat/completions', {'messages': long}, lambda answer: answer['csrm']['unread']),
    (
      '/get_reward',
      {'prompts': [long[:1]], 'responses': [long[-1]['content']]},
      lambda answer: answer['extra_logs']['unread'][0],
    ),
  )
  for path, body, unread in asks:
    assert 0 < unread(server.post(path, body | {'shorten': True})) < 1, path
  rules = {'categories': [{'name': 'A', 'guideline': 'no poker ' * 200}]}
  status, _, answer = server.ask('POST', '/score', {'messages': MESSAGES, 'safety': rules})
  assert status == 413 and 'the rules take' in answer['error']['message']


@pytest.mark.parametrize('num', [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_two_threads_and_mixed_requests_give_the_offline_verdicts(server, film, num):
  compiled = server.metric('csrm_compilations_total')
  made = [examples.test_example(0, i, 'seen') for i in range(60)]
  made = [e for e in made if len(e.safety.categories) <= 4]
  policies = [server.policies.get(name) for name in ('film', 'pets')]
  rng = random.Random(0)
  asks = []
  for _ in range(num):
    example, policy = rng.choice(made), rng.choice([None, *policies])
    rules = policy.safety if policy else example.safety
    talk = [m.to_dict() for m in example.conversation]
    chosen = {'policy': policy.name} if policy else {'safety': rules.to_dict()}
    kind = rng.choice(['score', 'moderation', 'reward'])
    if kind == 'score':
      asks.append(('/score', {'messages': talk, **chosen}, rules, example.conversation))
    elif kind == 'moderation':
      body = {'input': talk, 'each_rule': rng.random() < 0.2, **chosen}
      asks.append(('/v1/moderations', body, rules, example.conversation))
    else:
      body = {'responses': [talk[-1]['content']], 'prompts': [talk[:-1]], **chosen}
      asks.append(('/get_reward', body, rules, example.conversation))
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    answers = list(pool.map(lambda ask: server.post(ask[0], ask[1]), asks))
  # Nothing compiles once the server is ready.
  assert server.metric('csrm_compilations_total') == compiled > 0
  read = {
    '/score': lambda a: a['verdicts'][0]['p_unsafe'],
    '/v1/moderations': lambda a: a['results'][0]['p_unsafe'],
    '/get_reward': lambda a: 1 - a['rewards'][0],
  }
  found = [read[ask[0]](answer) for ask, answer in zip(asks, answers, strict=True)]
  rows = [schema.Example(f'{i}', ask[2], ask[3]) for i, ask in enumerate(asks)]
  want = serving.p_unsafe(server.score_fn(rows))
  assert np.ptp(want) > 0.05
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_pages(server):
  assert server.ask('GET', '/health')[0] == server.ask('GET', '/ready')[0] == 200
  status, headers, page = server.ask('GET', '/')
  assert status == 200 and 'page.js' in page
  assert headers['content-security-policy'].startswith("default-src 'self'")
  for path in ('/page.js', '/page.css', '/docs', '/docs.js'):
    assert server.ask('GET', path)[0] == 200
  listed = server.ask('GET', '/policies')[2]
  assert listed['default'] == 'film'
  assert [p['name'] for p in listed['policies']] == ['film', 'pets']
  assert listed['policies'][0]['digest'] == server.policies.get('film').digest
  text = server.ask('GET', '/metrics')[2]
  for name in (
    'csrm_requests_total{path="/health",status="200"}',
    'csrm_request_seconds_bucket', 'csrm_verdicts_total', 'csrm_batch_fill', 'csrm_queue_rows',
    'csrm_compilations_total', 'csrm_prefix_evictions_total', 'csrm_prefix_bytes',
  ):  # fmt: skip
    assert name in text


def test_the_examples_of_the_documentation_are_accepted(server, tmp_path):
  described = server.ask('GET', '/openapi.json')[2]['paths']
  count = 0
  for path, methods in described.items():
    body = methods.get('post', {}).get('requestBody')
    for example in body['content']['application/json']['examples'].values() if body else ():
      text = json.dumps(example['value']).replace('bank_support', 'film')
      server.post(path, json.loads(text))
      count += 1
  assert count >= 10


def test_an_edited_policy_takes_effect_and_a_broken_one_keeps_the_last(tmp_path, weights):
  folder = serving.write_policies(tmp_path)
  audit = tmp_path / 'audit.jsonl'
  with serving.running(folder, weights, audit_log=str(audit)) as server:
    before = server.post('/score', {'messages': MESSAGES})['verdicts'][0]

    def wait(condition):
      for _ in range(200):
        if condition():
          return
        time.sleep(0.02)
      raise AssertionError('the folder was not read again')

    (folder / 'film.yaml').write_text(serving.FILM.replace('poker', 'roulette'))
    wait(lambda: server.policies.get('film').digest != before['policy']['digest'])
    after = server.post('/score', {'messages': MESSAGES})['verdicts'][0]
    assert after['p_unsafe'] != before['p_unsafe']
    (folder / 'film.yaml').write_text('categories: [')
    (folder / 'new.yaml').write_text('categories: []')
    wait(lambda: server.policies.get('film').error)
    again = server.post('/score', {'messages': MESSAGES})['verdicts'][0]
    assert again == after
    listed = {p['name']: p['error'] for p in server.ask('GET', '/policies')[2]['policies']}
    assert 'film.yaml:1' in listed['film'] and 'new.yaml' in listed['new']
    assert server.ask('POST', '/score', {'messages': MESSAGES, 'policy': 'new'})[0] == 404
    (folder / 'pets.yaml').unlink()
    wait(lambda: len(server.policies.list()) == 2)
    assert server.ask('POST', '/score', {'messages': MESSAGES, 'policy': 'pets'})[0] == 404
  lines = [json.loads(line) for line in audit.read_text().splitlines()]
  assert [line['policy_digest'] for line in lines] == [
    v['policy']['digest'] for v in (before, after, again)
  ]
  text = json.dumps([m.to_dict() for m in TALK])
  assert lines[0]['text_sha256'] == hashlib.sha256(text.encode()).hexdigest()
  assert lines[0]['p_unsafe'] == before['p_unsafe'] and 'poker' not in audit.read_text()


def test_a_reply_that_grows_is_watched(server, film):
  words = ['Tell', 'dogs', 'cats', 'poker', 'game', 'bark']
  seen, judged, over = [], 0, False
  for num in range(1, len(words) + 2):
    over = num > len(words)
    talk = [MESSAGES[0], {'role': 'assistant', 'content': ' '.join(words[:num])}]
    answer = server.post('/monitor', {'messages': talk, 'judged': judged, 'over': over})
    judged = answer['judged']
    seen += answer['verdicts']
    assert answer['alarm'] == any(v['p_unsafe'] >= 0.5 for v in answer['verdicts'])
    assert answer['false_alarms'] is None and (answer['unit'], answer['every']) == ('words', 4)
  talks = [(TALK[0], schema.Message('agent', ' '.join(words[:n]))) for n in (4, 6)]
  assert judged == 2
  want = offline(server, film, *talks)
  assert [v['p_unsafe'] for v in seen] == pytest.approx(list(want), abs=1e-5)
  # Nothing new: nothing is judged, and nothing is promised.
  short = server.post('/monitor', {'messages': MESSAGES, 'judged': 0})
  assert (short['judged'], short['alarm'], short['p_unsafe']) == (0, False, None)
  for body, what in (
    ({'messages': MESSAGES, 'judged': 7}, 'so far there are 0 verdicts'),
    ({'messages': MESSAGES, 'judged': -1}, 'the number of the last answer'),
    ({'messages': MESSAGES, 'text': 'a'}, "unknown key 'text'"),
  ):
    status, _, answer = server.ask('POST', '/monitor', body)
    assert status == 400 and what in answer['error']['message']
