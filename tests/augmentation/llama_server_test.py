"""The endpoint against a real server that keeps a small model to the schema.

It needs the package xllamacpp and, in $CSRM_SMOLLM2_DIR, what
tests/fetch_smollm2.py puts there.
"""

import os
import pathlib

import pytest

from csrm_jax.augmentation import requests
from csrm_jax.augmentation.proposers import NoReplyError
from csrm_jax.core import journal
from csrm_jax.ruleworld import examples
from csrm_jax.safety.schema import Category
from tests import small
from tests.augmentation import builders

pytest.importorskip('openai')
pytest.importorskip('xllamacpp')
MODELS = sorted(pathlib.Path(os.environ.get('CSRM_SMOLLM2_DIR', '/none')).glob('*.gguf'))
pytestmark = pytest.mark.skipif(not MODELS, reason='$CSRM_SMOLLM2_DIR has no .gguf file')
SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_parallel, params.n_ctx = 2, 6144
# Its threads wait by turning: two on a shared core take minutes.
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.api_keys = ['sesame']
server = xllamacpp.Server(params)
time.sleep(600)
"""
PETS = Category('Pets', 'No word about pets at all.')


@pytest.fixture(scope='module')
def url():
  """Returns the address of a server that is up."""
  with small.llama_server(SERVE, MODELS[0]) as address:
    yield f'{address}/v1'


@pytest.fixture
def make(url, tmp_path, monkeypatch):
  monkeypatch.setenv('TEST_KEY', 'sesame')

  def make(**settings):
    settings = {
      'key_variable': 'TEST_KEY',
      'timeout_s': 300.0,
      'num_tries': 1,
      'json_mode': 'bounded_json_schema',
    } | settings
    return builders.endpoint(journal.Cache(tmp_path), url, model='smollm2', **settings)

  return make


def test_a_choice_is_always_one_of_those_given(make):
  asker = make()
  rules = tuple(
    Category(name, f'No word about {name}.') for name in ('Cats', 'Dogs "and" wolves', 'Écureuils')
  )
  picked = asker.ask(requests.PickMostSevere(PETS, rules))
  assert picked in range(3)
  usage = asker.usage()
  assert usage['requests'] == 1 and 'unparsable' not in usage
  assert usage['prompt_tokens'] > 100 and usage['reply_tokens'] > 0
  again = make()
  assert again.ask(requests.PickMostSevere(PETS, rules)) == picked
  assert again.usage()['cache_hits'] == 1 and 'requests' not in again.usage()


def test_a_small_model_writes_what_parses(make):
  asker = make()
  for number in range(4):
    example = examples.training_example(0, number)
    try:
      reply = asker.ask(requests.ProposeCategories(example.safety, example.conversation))
    except NoReplyError as error:
      assert error.reason == 'unparsable'
      continue
    if reply.plus or reply.minus:
      return
  pytest.fail(f'no proposal: {asker.usage()}')


def test_a_wrong_key_is_one_line(make, monkeypatch):
  monkeypatch.setenv('TEST_KEY', 'wrong')
  with pytest.raises(ValueError, match=r'refuses the key in \$TEST_KEY'):
    make().ask(requests.WriteGuideline(PETS, (PETS,), ()))
