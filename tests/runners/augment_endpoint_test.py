"""The augmentation job with a language model behind an endpoint that fails."""

import collections
import json
import pathlib
import signal
import subprocess
import sys
import zlib

import pytest

from csrm_jax import config as config_lib, main
from csrm_jax.core import journal
from csrm_jax.data import forms
from csrm_jax.ruleworld import examples

pytest.importorskip('openai')
ROOT = pathlib.Path(__file__).parents[2]
CONFIG = config_lib.load_module(ROOT / 'configs' / 'augment.py')
FaultServer = config_lib.load_module(ROOT / 'tests' / 'augmentation' / 'conftest.py').FaultServer
PLUS = {'name': 'Fortune telling', 'guideline': 'No word about the future.'}
MINUS = {'name': 'Deep seas', 'guideline': 'No word about deep oceans.'}
GOOD = json.dumps({'plus': PLUS, 'minus': MINUS})


def run(c, workdir):
  main.run(c, workdir)
  card = json.loads((workdir / 'card.json').read_text())
  return forms.read(workdir / 'data.jsonl', require_label=True), card


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(folder):
  path = folder / 'rows.jsonl'
  items = [examples.training_example(5, i).to_dict() for i in range(20)]
  path.write_text(''.join(json.dumps(row | {'plus': None, 'minus': None}) + '\n' for row in items))
  return path


@pytest.fixture
def conversations(tmp_path):
  """Returns a JSONL file of twenty labelled conversations."""
  return write_rows(tmp_path)


def endpoint_config(path, url, **changes):
  c = CONFIG.get_config(f'proposer=endpoint,data=jsonl,path={path}')
  c.update_from_flattened_dict(
    {
      'endpoint.base_url': url,
      'endpoint.model': 'm',
      'endpoint.backoff_s': 0.01,
      'endpoint.num_tries': 2,
      'endpoint.num_unparsable': 2,
      'endpoint.concurrency': 4,
    }
    | changes
  )
  return c


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """Returns data.jsonl as it is where nothing fails."""
  folder = tmp_path_factory.mktemp('undisturbed')
  with FaultServer(lambda number, body: GOOD) as server:
    run(endpoint_config(write_rows(folder), server.url), folder / 'work')
  return (folder / 'work' / 'data.jsonl').read_bytes()


@pytest.mark.parametrize(
  'fault',
  [
    'stall',
    ('status', 429, {}),
    ('status', 500, {}),
    'cut',
    'hangup',
    'not json',
    'Prose.',
    GOOD[:40],
    '',
  ],
  ids=str,
)
def test_a_fault_that_passes_leaves_no_trace_in_the_data(
  conversations, tmp_path, undisturbed, fault
):
  def script(number, body):
    return fault if number in (1, 8) else GOOD

  with FaultServer(script) as server:
    # Both faults may hit one request, on a busy machine.
    c = endpoint_config(
      conversations,
      server.url,
      **{'endpoint.timeout_s': 3.0, 'endpoint.num_tries': 4, 'endpoint.num_unparsable': 3},
    )
    _, card = run(c, tmp_path / 'work')
    assert server.num_requests == 22
  usage = card['usage_of_last_run']
  assert usage.get('retries', 0) + usage.get('unparsable', 0) == 2
  assert (tmp_path / 'work' / 'data.jsonl').read_bytes() == undisturbed


def test_an_endpoint_in_trouble_loses_nothing(conversations, tmp_path):
  seen = collections.Counter()

  def script(number, body):
    text = body['messages'][1]['content']
    seen[text] += 1
    kind = zlib.crc32(text.encode()) % 4
    if kind == 1:
      return ('status', 429, {})
    return 'Prose.' if kind == 2 else GOOD

  with FaultServer(script) as server:
    c = endpoint_config(conversations, server.url)
    rows, card = run(c, tmp_path / 'a')
    assert len(rows) == 20
    assert (
      card['counts']['with_plus']
      + sum(n for reason, n in card['drops'].items() if reason.startswith('no_reply'))
      == 20
    )
    # Asked again: those that failed for a passing reason, and no other.
    passing = card['drops']['no_reply: rate_limited']
    assert passing > 0 and card['drops']['no_reply: unparsable'] > 0
    server.script = lambda number, body: GOOD
    before = server.num_requests
    rows, card = run(c, tmp_path / 'a')
    assert server.num_requests - before == passing
    assert 'no_reply: rate_limited' not in card['drops']
    assert card['model'] == 'm' and 'guideline' in str(card['prompts'])


def test_a_run_that_is_killed_asks_for_nothing_twice(conversations, tmp_path):
  """A real process, killed by the system at its twelfth request."""
  victim = []

  def script(number, body):
    if number == 11:
      victim[0].kill()
    return GOOD

  workdir = tmp_path / 'work'
  with FaultServer(script) as server:
    args = [
      sys.executable,
      '-m',
      'csrm_jax.main',
      f'--workdir={workdir}',
      f'--config={ROOT}/configs/augment.py:proposer=endpoint,data=jsonl,path={conversations}',
      '--config.endpoint.model=m',
      f'--config.endpoint.base_url={server.url}',
      '--config.endpoint.concurrency=1',
    ]
    victim.append(subprocess.Popen(args, cwd=ROOT, stderr=subprocess.DEVNULL))
    assert victim[0].wait(120) == -signal.SIGKILL
    assert server.num_requests == 12
    assert not (workdir / 'data.jsonl').exists()
    # Eight are in the journal, with their checks; three in the cache.
    assert len(read(workdir / 'journal_categories.jsonl')) == 8
    subprocess.run(args, cwd=ROOT, check=True, capture_output=True, timeout=120)
    # Again only the request that got no answer, and those that were to come.
    assert server.num_requests == 12 + 9
    asked = [body['messages'][1]['content'] for body in server.bodies]
    again = collections.Counter(asked) - collections.Counter(set(asked))
    assert list(again) == [asked[11]]
  rows = forms.read(workdir / 'data.jsonl', require_label=True)
  assert [row.id for row in rows] == [row.id for row in forms.read(conversations)]
  assert all(row.plus.name == PLUS['name'] for row in rows)


def test_the_cache_serves_another_run_without_a_server(conversations, tmp_path):
  """What could not be used costs nothing again either."""

  def script(number, body):
    text = body['messages'][1]['content']
    return 'Prose.' if zlib.crc32(text.encode()) % 4 == 0 else GOOD

  cache = {'cache': str(tmp_path / 'cache')}
  with FaultServer(script) as server:
    _, card = run(endpoint_config(conversations, server.url, **cache), tmp_path / 'a')
    num_asked = server.num_requests
  assert card['drops']['no_reply: unparsable'] == num_asked - 20 > 0
  # Nobody is there any more.
  _, again = run(endpoint_config(conversations, server.url, **cache), tmp_path / 'b')
  assert again['usage_of_last_run']['cache_hits'] == num_asked
  assert again['drops'] == card['drops']
  assert (tmp_path / 'a' / 'data.jsonl').read_bytes() == (
    tmp_path / 'b' / 'data.jsonl'
  ).read_bytes()


def test_corrupt_cache_entries_are_asked_for_again(conversations, tmp_path, undisturbed):
  cache = {'cache': str(tmp_path / 'cache')}
  with FaultServer(lambda number, body: GOOD) as server:
    c = endpoint_config(conversations, server.url, **cache)
    run(c, tmp_path / 'a')
    for path in sorted((tmp_path / 'cache').rglob('*.json'))[:3]:
      path.write_bytes(path.read_bytes()[:40])
    _, card = run(c, tmp_path / 'b')
    assert server.num_requests == 23
    assert card['paid']['requests'] == 3
    # What earlier starts of a run have paid for stays in its card.
    _, again = run(c, tmp_path / 'b')
    assert server.num_requests == 23 and again['paid'] == card['paid']
  assert card['usage_of_last_run']['corrupt_cache'] == 3
  assert (tmp_path / 'b' / 'data.jsonl').read_bytes() == undisturbed


@pytest.mark.parametrize(
  'owner, name, num_again',
  [
    (journal.files, 'write', 1),  # The reply that found no room.
    (journal.Journal, '_write', 0),
  ],
  ids=['cache', 'journal'],
)
def test_a_disk_that_is_full_on_the_way_loses_nothing(
  conversations, tmp_path, monkeypatch, undisturbed, owner, name, num_again
):
  space = iter(range(9))
  write = getattr(owner, name)

  def until_full(*args):
    if next(space, None) is None:
      raise OSError(28, 'No space left on device')
    return write(*args)

  with FaultServer(lambda number, body: GOOD) as server:
    c = endpoint_config(conversations, server.url, **{'endpoint.concurrency': 1})
    workdir = tmp_path / 'work'
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, until_full)
      with pytest.raises(OSError, match='free some space') as error:
        main.run(c, workdir)
    assert '\n' not in str(error.value)
    assert not (workdir / 'data.jsonl').exists()
    assert 5 <= server.num_requests < 20
    run(c, workdir)
    assert server.num_requests == 20 + num_again
  assert (workdir / 'data.jsonl').read_bytes() == undisturbed


@pytest.mark.parametrize(
  'fault, said',
  [
    ('hangup', 'does not answer'),
    (('status', 401, {}), r'refuses the key in \$OPENAI_API_KEY'),
    (('status', 404, {}), 'check base_url and model'),
  ],
  ids=str,
)
def test_an_endpoint_of_no_use_is_one_line_and_leaves_no_work_directory(
  conversations, tmp_path, fault, said
):
  with FaultServer(lambda number, body: fault) as server:
    with pytest.raises(ValueError, match=said) as error:
      main.run(endpoint_config(conversations, server.url), tmp_path / 'work')
    assert '\n' not in str(error.value)
  assert not (tmp_path / 'work').exists()
