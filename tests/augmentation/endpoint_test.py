"""The endpoint against a server that fails in every way it can."""

import concurrent.futures
import json
import socket
import time

import pytest

from csrm_jax.augmentation import proposers, requests
from csrm_jax.augmentation.proposers import NoReplyError
from csrm_jax.core import client, journal
from csrm_jax.safety.schema import Category
from tests.augmentation import builders

pytest.importorskip('openai')

PETS = Category('Pets', 'No word about pets at all.')
CATS = Category('Cats', 'No word about cats at all.')
GOOD = json.dumps({'guideline': 'No word about cats; dogs are fine.'})
BUSY = ('status', 429, {})
BROKEN = ('status', 500, {})


def ask_for(number=0):
  return requests.WriteGuideline(PETS, (CATS,), (), number)


@pytest.fixture
def make(tmp_path, monkeypatch):
  """Returns an endpoint at a server, quick to try again."""
  monkeypatch.setenv('TEST_KEY', 'sesame')

  def make(url, **settings):
    settings = {
      'num_tries': 3,
      'backoff_s': 0.01,
      'timeout_s': 5.0,
      'key_variable': 'TEST_KEY',
    } | settings
    return builders.endpoint(journal.Cache(tmp_path / 'cache'), url, **settings)

  return make


def scripted(*answers):
  """Returns a script that gives these in turn, and the last one for ever."""
  return lambda number, body: answers[min(number, len(answers) - 1)]


def test_a_reply_is_typed_and_cached(make, fault_server):
  with fault_server(scripted(GOOD)) as server:
    asker = make(server.url, price_in=3.0, price_out=15.0)
    reply = asker.ask(ask_for())
    assert reply == Category('Pets', 'No word about cats; dogs are fine.')
    assert server.keys == ['Bearer sesame']
    (body,) = server.bodies
    schema = body['response_format']['json_schema']['schema']
    assert schema['required'] == ['guideline']
    assert 'Forbidden:\n- Cats' in body['messages'][1]['content']
    usage = asker.usage()
    assert usage['prompt_tokens'] == 10 and usage['reply_tokens'] == 5
    assert abs(usage['cost'] - (10 * 3 + 5 * 15) / 1e6) < 1e-12
    again = make(server.url)
    assert again.ask(ask_for()) == reply
    assert again.usage()['cache_hits'] == 1
    assert again.ask(ask_for(1)) == reply  # Another draft is another request.
    assert server.num_requests == 2


@pytest.mark.parametrize(
  'fault', [BUSY, BROKEN, ('status', 503, {}), 'cut', 'hangup', 'not json', 'stall'], ids=str
)
def test_a_fault_on_the_way_is_tried_again(make, fault_server, fault):
  with fault_server(scripted(fault, fault, GOOD)) as server:
    asker = make(server.url, timeout_s=0.5)
    assert asker.ask(ask_for()).name == 'Pets'
    assert server.num_requests == 3
    assert asker.usage()['retries'] == 2


@pytest.mark.parametrize(
  'fault, reason',
  [
    (BUSY, 'rate_limited'),
    (BROKEN, 'server_error'),
    ('cut', 'connection'),
    ('stall', 'timeout'),
    ('drip', 'timeout'),
    ('endless', 'connection'),
    (b'[' * 200_000, 'connection'),
  ],
  ids=lambda what: str(what)[:20],
)
def test_a_fault_that_stays_drops_the_request(make, fault_server, fault, reason, monkeypatch):
  monkeypatch.setattr(client, 'MAX_REPLY_BYTES', 2**22)
  with fault_server(scripted(GOOD, fault)) as server:
    asker = make(server.url, timeout_s=0.3)
    asker.ask(ask_for())
    with pytest.raises(NoReplyError) as error:
      asker.ask(ask_for(1))
    assert error.value.reason == reason
    assert reason in proposers.TRANSIENT
    assert server.num_requests == 4


def test_waits_grow_and_heed_the_server(make, fault_server):
  wait = ('status', 429, {'Retry-After': '0.6'})
  with fault_server(scripted(BROKEN, BROKEN, wait, GOOD)) as server:
    make(server.url, num_tries=4, backoff_s=0.1).ask(ask_for())
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
  assert gaps[0] >= 0.05 and gaps[1] >= 0.1 and gaps[2] >= 0.6


@pytest.mark.parametrize(
  'text',
  [
    'Sure! Here is a guideline: no cats.',
    '',
    '[]',
    '{"guideline": 3}',
    '{"guideline": ""}',
    '{"rule": "No word about cats."}',
    f'Of course. {GOOD}',
    '{"guideline": "No word about ca',
    '[' * 9999,
    '{"guideline": "short"}',
    '{"guideline": "No word about cats \ud800."}',
    '{"guideline": "No word about cats.", "guideline": "Cats are fine."}',
  ],
)
def test_prose_is_asked_again_then_dropped_never_guessed(make, fault_server, text):
  with fault_server(scripted(text)) as server:
    asker = make(server.url, num_unparsable=2)
    with pytest.raises(NoReplyError) as error:
      asker.ask(ask_for())
    assert error.value.reason == 'unparsable'
    assert server.num_requests == 2
    assert asker.usage()['unparsable'] == 2
    # Another seed, so that it is not the same reply again.
    assert [b['seed'] for b in server.bodies] == [0, 1]
    # A rerun pays for further tries only; an empty text may be a slip.
    again = make(server.url, num_unparsable=3)
    with pytest.raises(NoReplyError):
      again.ask(ask_for())
    num_paid = 1 if text else 3
    assert server.num_requests == 2 + num_paid
    assert again.usage().get('cache_hits', 0) == 3 - num_paid


MESSAGE = {'role': 'assistant', 'content': GOOD}


@pytest.mark.parametrize(
  'body',
  [
    5,
    'x',
    [],
    {},
    {'choices': 'x'},
    {'choices': [5]},
    {'choices': [{'message': None}]},
    {'choices': [{'message': {'content': [GOOD]}}]},
    {'choices': [{'message': {'content': {'guideline': 'No cats.'}}}]},
    {'error': {'message': 'overloaded'}, 'usage': 'much'},
  ],
  ids=str,
)
def test_a_reply_in_no_form_at_all_is_as_prose(make, fault_server, body):
  with fault_server(scripted(json.dumps(body).encode())) as server:
    asker = make(server.url, num_unparsable=1)
    with pytest.raises(NoReplyError) as error:
      asker.ask(ask_for())
  assert error.value.reason == 'unparsable'


@pytest.mark.parametrize('num', ['5', None, True, -1, 10**400, [1], 1.5], ids=lambda x: str(x)[:9])
def test_counts_that_are_none_cost_nothing(make, fault_server, num):
  body = {'choices': [{'message': MESSAGE}], 'usage': {'prompt_tokens': num}}
  with fault_server(scripted(json.dumps(body).encode())) as server:
    asker = make(server.url, price_in=1.0)
    assert asker.ask(ask_for()).name == 'Pets'
    assert asker.usage()['cost'] == 0


def test_a_redirect_is_not_followed(make, fault_server):
  with fault_server(scripted(('status', 307, {'Location': '/v1/chat/completions'}))) as server:
    with pytest.raises(ValueError, match='status 307'):
      make(server.url).ask(ask_for())
    assert server.num_requests == 1


def test_a_good_reply_after_prose_counts(make, fault_server):
  with fault_server(scripted('Hm.', f'```json\n{GOOD}\n```')) as server:
    assert make(server.url).ask(ask_for()).name == 'Pets'


@pytest.mark.parametrize(
  'code, said',
  [
    (401, 'refuses the key in $TEST_KEY (status 401'),
    (403, 'refuses the key'),
    (404, 'check base_url and model'),
    (400, 'try json_mode="text"'),
  ],
)
def test_what_no_request_can_pass_is_one_line_at_once(make, fault_server, code, said):
  with fault_server(scripted(('status', code, {}))) as server:
    asker = make(server.url)
    for _ in range(2):
      with pytest.raises(ValueError) as error:
        asker.ask(ask_for())
      assert said in str(error.value) and '\n' not in str(error.value)
    assert server.num_requests == 1
    assert 'sesame' not in str(error.value)


def test_a_service_that_takes_no_lengths_is_one_line(make, fault_server):
  def script(number, body):
    is_bounded = 'maxLength' in json.dumps(body['response_format'])
    return ('status', 400, {}) if is_bounded else GOOD

  with fault_server(script) as server:
    with pytest.raises(ValueError, match='try json_mode="json_schema"'):
      make(server.url, json_mode='bounded_json_schema').ask(ask_for())
    assert make(server.url).ask(ask_for()).name == 'Pets'


def test_a_reply_that_was_cut_is_counted(make, fault_server):
  with fault_server(scripted('{"guideline": "No wo', GOOD)) as server:
    server.finish_reason = 'length'
    asker = make(server.url)
    asker.ask(ask_for())
    assert asker.usage()['cut_at_max_tokens'] == 2


def test_a_request_refused_later_is_dropped_alone(make, fault_server):
  with fault_server(scripted(GOOD, ('status', 400, {}), GOOD)) as server:
    asker = make(server.url)
    asker.ask(ask_for())
    with pytest.raises(NoReplyError) as error:
      asker.ask(ask_for(1))
    assert error.value.reason == 'refused_request'
    assert asker.ask(ask_for(2)).name == 'Pets'


def test_an_endpoint_that_is_down_is_one_line(make):
  with socket.socket() as sock:  # A free port, and nobody there.
    sock.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{sock.getsockname()[1]}/v1'
  start = time.monotonic()
  with pytest.raises(ValueError) as error:
    make(url).ask(ask_for())
  assert url in str(error.value) and '\n' not in str(error.value)
  assert 'run the same command again' in str(error.value)
  assert time.monotonic() - start < 20


def test_an_endpoint_that_dies_stops_the_run(make, fault_server):
  with fault_server(scripted(GOOD, BROKEN)) as server:
    asker = make(server.url, num_tries=1)
    asker.ask(ask_for())
    for number in range(1, 10):
      with pytest.raises(NoReplyError):
        asker.ask(ask_for(number))
    with pytest.raises(ValueError, match='10 requests in a row'):
      asker.ask(ask_for(10))
    assert asker.ask(ask_for()).name == 'Pets'  # The cache still answers.


def test_no_more_requests_at_once_than_the_limit(make, fault_server):
  with fault_server(scripted(GOOD), delay_s=0.05) as server:
    asker = make(server.url, concurrency=3)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
      replies = list(pool.map(lambda n: asker.ask(ask_for(n)), range(12)))
    assert len(replies) == server.num_requests == 12
    assert 1 < server.most_at_once <= 3


@pytest.mark.parametrize(
  'damage',
  [
    lambda data: data[:-9],
    lambda data: b'',
    lambda data: b'\xff' + data,
    lambda data: data.replace(b'cats', b'bats'),
    lambda data: b'[1]',
  ],
)
def test_a_corrupt_cache_entry_is_counted_and_fetched_again(make, fault_server, tmp_path, damage):
  with fault_server(scripted(GOOD)) as server:
    first = make(server.url).ask(ask_for())
    (path,) = (tmp_path / 'cache').rglob('*.json')
    path.write_bytes(damage(path.read_bytes()))
    asker = make(server.url)
    assert asker.ask(ask_for()) == first
    assert asker.usage()['corrupt_cache'] == 1
    assert server.num_requests == 2
    assert make(server.url).ask(ask_for()) == first
    assert server.num_requests == 2


def test_a_full_disk_is_one_line(make, fault_server, monkeypatch):
  def full(path, content):
    raise OSError(28, 'No space left on device')

  with fault_server(scripted(GOOD)) as server:
    monkeypatch.setattr(journal.files, 'write', full)
    with pytest.raises(OSError, match='free some space') as error:
      make(server.url).ask(ask_for())
    assert 'No space left' in str(error.value)


def test_settings_are_checked(tmp_path):
  for change, said in (
    ({'model': ''}, 'model is empty'),
    ({'json_mode': 'xml'}, "json_mode is 'xml'"),
    ({'num_tries': 0}, 'num_tries is 0'),
  ):
    with pytest.raises(ValueError, match=said):
      builders.endpoint(journal.Cache(tmp_path), **change)
