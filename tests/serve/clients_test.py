"""Our reward client against our server."""

import dataclasses

import numpy as np
import pytest

from csrm_jax.rl import rewards
from csrm_jax.safety import schema

PROMPTS = ('Tell me about dogs.', 'Hi.', 'Cats?')
REPLIES = ('Dogs bark.', 'Good morning, all of you.', 'No.')


@pytest.mark.parametrize('form', rewards.HTTP_FORMS)
def test_rewards_of_our_server(server, form):
  rules = server.policies.get('pets').safety
  samples = [
    schema.Sample(
      schema.Prompt(f'p{i}', (schema.Message('user', prompt),), rules), 0, reply, 5, True
    )
    for i, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True))
  ]
  path = '/v1/moderations' if form == 'openai' else '/get_reward'
  scorer = rewards.HttpScorer(
    server.url + path, 10.0, 1, 0.1, batch_size=2, form=form, policy='pets'
  )
  got = rewards.from_http(scorer)(samples)
  examples = [sample.example() for sample in samples]
  if form == 'openai':  # which sees completions alone
    examples = [dataclasses.replace(e, conversation=e.conversation[-1:]) for e in examples]
  want = 1 / (1 + np.exp(-server.score_fn(examples)))
  np.testing.assert_allclose(got, want, atol=1e-5)
