"""Passwords and tokens reach neither files nor messages."""

import pytest

from csrm_jax import config as config_lib, main
from csrm_jax.core import checks, client
from tests import small

SECRET = 'sesame' + 'Opens0123456789'


@pytest.mark.parametrize(
  'text',
  [
    f'http://user:{SECRET}@host:9/score',
    f'https://{SECRET}@host/score',
    f'http://host/score?a=1&api_key={SECRET}&b=2',
    f'http://host/score?X-Amz-Signature={SECRET}',
    f'Authorization: Bearer {SECRET}',
    f'hf_{SECRET}',
    f'Incorrect API key: sk-proj-{SECRET}',
  ],
)
def test_what_looks_like_a_secret_is_not_shown(text):
  assert SECRET not in checks.redact(text) and '***' in checks.redact(text)
  with pytest.raises(ValueError, match='key_variable') as error:
    checks.no_secret('the URL', text)
  assert SECRET not in str(error.value)


@pytest.mark.parametrize(
  'text',
  [
    'http://localhost:8000/v1?model=a&max_tokens',
    'gs://bucket/a@b/c',
    'org/name@main',
    'me@example.com says: token=5 is fine?',
    'the risk-assessment-of-something-long',
    '{"0": "safe", "1": "unsafe"}',
  ],
)
def test_other_text_stays(text):
  assert checks.redact(text) == text


def test_a_config_with_a_secret_is_refused_before_it_is_written(tmp_path):
  config = config_lib.ConfigDict(
    {'runner': 'train_rm', 'reward': {'url': f'http://me:{SECRET}@host/x'}, 'paths': ('a', 'b')}
  )
  error = small.error_of(main.run, config, tmp_path / 'w')
  assert error.startswith('config.reward.url holds what looks like') and SECRET not in error
  assert not (tmp_path / 'w').exists()


def test_a_service_that_repeats_its_key_is_not_quoted(monkeypatch):
  assert SECRET not in small.error_of(client.Client, f'http://host?token={SECRET}')
  monkeypatch.setenv('SERVICE_KEY', SECRET)
  asked = client.Client('http://host', key_variable='SERVICE_KEY')
  error = small.error_of(asked.parse, b'{"error": "wrong key %s"}' % SECRET.encode(), 'row 1')
  assert 'wrong key ***' in error and SECRET not in error
