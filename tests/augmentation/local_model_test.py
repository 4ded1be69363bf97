"""The proposer in this process, on the weights that the package ships."""

import concurrent.futures
import json
import pathlib
import shutil

import pytest

import csrm_jax
from csrm_jax.augmentation import proposers, requests
from csrm_jax.augmentation.proposers import NoReplyError
from csrm_jax.core import journal
from csrm_jax.safety.schema import Category
from csrm_jax.text import tokenizer as tokenizer_lib
from tests.augmentation import builders

RULEWORLD = pathlib.Path(csrm_jax.__file__).parent / 'ruleworld'
PETS = Category('Pets', 'No word about pets at all.')
NAMES = ('Cats', 'Dogs', 'Emus')
GOOD = json.dumps({'guideline': 'No word about cats; dogs are fine.'})


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """Returns a folder with a model, its tokenizer, and no chat template."""
  folder = tmp_path_factory.mktemp('weights')
  shutil.copytree(RULEWORLD / 'base', folder, dirs_exist_ok=True)
  shutil.copy(RULEWORLD / 'tokenizer.model', folder)
  return folder


@pytest.fixture
def short(monkeypatch):
  """Makes prompts of a few words: what is asked does not matter here."""
  monkeypatch.setattr(
    requests,
    'make_messages',
    lambda request: [{'role': 'user', 'content': f'Tell me about {request.known[0]}.'}],
  )


def ask_for(name):
  return requests.AddSubcategory(PETS, (name,), ())


def make(weights, folder, **settings):
  settings = {
    'max_tokens': 12,
    'num_unparsable': 2,
    'concurrency': 2,
    'temperature': 1.0,
  } | settings
  return builders.local_model(journal.Cache(folder), str(weights), **settings)


def texts(asker, monkeypatch, names, threads):
  """Returns {request: what the model wrote at each try}."""
  written = {}

  def parse(request, text):
    written.setdefault(request.known[0], []).append(text)
    raise ValueError('prose')

  monkeypatch.setattr(requests, 'parse', parse)

  def ask(name):
    with pytest.raises(NoReplyError, match='prose') as error:
      asker.ask(ask_for(name))
    assert error.value.reason == 'unparsable'

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(ask, names))
  return written


def test_what_is_written_depends_on_request_and_seed_not_on_the_batch(
  weights, tmp_path, monkeypatch, short
):
  together = make(weights, tmp_path)
  found = texts(together, monkeypatch, NAMES, 3)
  # With a cache of its own: it must write anew.
  alone = texts(make(weights, tmp_path / 'alone'), monkeypatch, NAMES[::-1], 1)
  assert found == alone
  other = texts(make(weights, tmp_path, seed=1), monkeypatch, NAMES[:1], 1)
  assert other['Cats'] != found['Cats']
  # Another try is another draw, and it is text, not ids or control tokens.
  assert all(a != b for a, b in found.values())
  usage = together.usage()
  assert usage['requests'] == usage['unparsable'] == 6
  assert usage['batches'] < 6
  assert 0 < usage['reply_tokens'] <= 72


def test_a_reply_is_typed_and_cached(weights, tmp_path, monkeypatch, short):
  request = requests.WriteGuideline(PETS, (), ())
  monkeypatch.setattr(
    requests, 'make_messages', lambda request: [{'role': 'user', 'content': 'Write.'}]
  )
  asker = make(weights, tmp_path)
  tokenizer = tokenizer_lib.load_tokenizer(weights / 'tokenizer.model')
  monkeypatch.setattr(type(tokenizer), 'decode', lambda self, ids: GOOD)
  reply = asker.ask(request)
  assert reply.guideline == 'No word about cats; dogs are fine.'
  again = make(weights, tmp_path)
  assert again.ask(request) == reply
  assert again.usage() == {'cache_hits': 1, 'corrupt_cache': 0}
  warmer = make(weights, tmp_path, temperature=2.0)
  warmer.ask(request)
  assert warmer.usage()['requests'] == 1  # Other sampling, another reply.


def test_a_request_that_does_not_fit_is_dropped_alone(weights, tmp_path, monkeypatch):
  monkeypatch.setattr(
    requests, 'make_messages', lambda request: [{'role': 'user', 'content': 'cat ' * 5000}]
  )
  asker = make(weights, tmp_path)
  with pytest.raises(NoReplyError) as error:
    asker.ask(ask_for('Cats'))
  assert error.value.reason == 'too_long'


def test_an_answer_ends_where_a_chat_model_ends_its_turn(weights):
  class Chat:
    eos_id = 0

    def encode_control(self, text):
      return {'<end>\n<model>': [7, 8], ' [/INST]'.strip(): [9]}[text]

    def decode(self, ids):
      return '' if ids == [7] else '[/'

  assert set(proposers._stop_ids(Chat(), '<end>\n<model>')) == {0, 7}
  assert proposers._stop_ids(Chat(), ' [/INST]') == (0,)


def test_settings_are_checked(tmp_path):
  for change, said in (({'init': ''}, 'init is empty'), ({'concurrency': 0}, 'concurrency is 0')):
    with pytest.raises(ValueError, match=said):
      builders.local_model(journal.Cache(tmp_path), **{'init': 'x'} | change)
