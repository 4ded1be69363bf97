import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.models import transformer
from csrm_jax.models.sampling import Completions, Sampling
from csrm_jax.rl import online
from csrm_jax.safety import schema

# Many stop, so that lengths differ.
MESH = mesh_lib.make_mesh(devices=jax.devices()[:1])
SAMPLING = Sampling(max_completion_length=6, temperature=0.7, stop_ids=tuple(range(0, 500, 2)))


@pytest.fixture(scope='module')
def params(policy):
  return transformer.init_params(policy.model, 0)


@pytest.fixture(scope='module')
def rolled(policy, params, prompts):
  return online.rollout(policy, params, prompts, SAMPLING, 4, seed=5)


def test_samples_of_a_prompt_lie_side_by_side(rolled, prompts):
  samples, _ = rolled
  assert [s.id for s in samples] == [f'{p.id}#{i}' for p in prompts for i in range(4)]
  assert len({s.num_tokens for s in samples}) > 1
  assert {s.stopped for s in samples} == {True, False}


def test_rows_are_prompt_and_completion(rolled, policy):
  samples, rows = rolled
  start = rows['tokens'].shape[1] - SAMPLING.max_completion_length
  for i, sample in enumerate(samples):
    ids = policy.encode(sample.prompt)
    end = start + sample.num_tokens
    assert rows['tokens'][i, start - len(ids) : start].tolist() == ids
    np.testing.assert_array_equal(
      np.flatnonzero(rows['segment_ids'][i]), np.arange(start - len(ids), end)
    )
    np.testing.assert_array_equal(
      np.flatnonzero(rows['completion_mask'][i]), np.arange(sample.num_tokens)
    )
    np.testing.assert_array_equal(
      rows['positions'][i, start - len(ids) : end], np.arange(len(ids) + sample.num_tokens)
    )
    kept = rows['tokens'][i, start : end - sample.stopped].tolist()
    assert sample.text == policy.tokenizer.decode(kept).strip()


def test_the_mask_comes_from_lengths_not_from_ids(policy):
  # The second completion is as long as any: rows have room for what was drawn, and no more.
  done = Completions(
    tokens=np.zeros((2, 3), np.int32),
    lengths=np.array([2, 3], np.int32),
    logprobs=np.zeros((2, 3), np.float32),
    stopped=np.array([False, False]),
  )
  rows = online.make_rows(policy, [[7, 0], [7, 0]], done)
  assert rows['completion_mask'].tolist() == [[1, 1, 0], [1, 1, 1]]
  assert rows['segment_ids'][0, -6:].tolist() == [0, 1, 1, 1, 1, 0]


def test_sampler_and_training_agree_at_any_temperature(rolled, policy, params):
  _, rows = rolled
  found = online.logprobs(policy.model, params, rows, 0.7)['logprobs']
  np.testing.assert_allclose(found, rows['rollout_logprobs'], atol=2e-5)
  hot = online.logprobs(policy.model, params, rows, 1.0)['logprobs']
  assert np.abs(hot - rows['rollout_logprobs']).max() > 0.01


def test_a_value_is_read_before_its_token(rolled, policy, params):
  _, rows = rolled
  head = {'kernel': jnp.linspace(-1, 1, 16), 'bias': jnp.float32(0.5)}
  out = online.logprobs(policy.model, params | {online.VALUE_HEAD: head}, rows, 0.7)
  hidden = transformer.hidden(
    policy.model, params, *(rows[name] for name in ('tokens', 'positions', 'segment_ids'))
  )
  row, place = np.argwhere(rows['completion_mask'])[-1]
  column = rows['tokens'].shape[1] - SAMPLING.max_completion_length + place
  want = hidden[row, column - 1] @ head['kernel'] + 0.5
  assert out['values'][row, place] == pytest.approx(float(want), rel=1e-5)
  assert not out['values'][rows['completion_mask'] == 0].any()
  # What comes later cannot change it: a value at the token would see it.
  other = rows['tokens'].copy()
  other[row, column] += 1
  again = online.logprobs(
    policy.model, params | {online.VALUE_HEAD: head}, rows | {'tokens': other}, 0.7
  )
  assert again['values'][row, place] == out['values'][row, place]


def test_sampling_from_adapters_is_sampling_from_their_sum(rolled, policy, params):
  _, rows = rolled
  cfg = dataclasses.replace(policy.model, lora_rank=2)
  adapted = jax.tree.map(lambda x: x + 0.05, transformer.init_params(cfg, 1))
  merged_cfg, merged = online.sampling_copy(cfg, adapted | online.init_value_head(cfg), '', MESH)
  assert not merged_cfg.lora_rank
  np.testing.assert_allclose(
    online.logprobs(merged_cfg, merged, rows, 1.0)['logprobs'],
    online.logprobs(cfg, adapted, rows, 1.0)['logprobs'],
    atol=1e-4,
  )
  half_cfg, half = online.sampling_copy(cfg, adapted, 'bfloat16', MESH)
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype('bfloat16')}
  assert half_cfg.dtype == 'bfloat16'
  with pytest.raises(ValueError, match='float16'):
    online.sampling_copy(cfg, adapted, 'float16', MESH)


def _prompt(*turns):
  roles = ('user', 'agent')
  return schema.Prompt(
    'odd',
    tuple(schema.Message(roles[i % 2], turn) for i, turn in enumerate(turns)),
    schema.SafetyConfig((schema.Category('A', 'B.'),)),
  )


def test_prompts_that_cannot_be_asked_are_named(policy, params):
  with pytest.raises(ValueError, match=r'prompt odd.*user, agent, user'):
    policy.encode(_prompt('Hi.', 'Hello.', 'Tea?'))
  joined = dataclasses.replace(policy, joins_turns=True)
  assert joined.encode(_prompt('Hi.', 'Hello.', 'Tea?'))
  with pytest.raises(ValueError, match=r'prompt odd.*context_length=96'):
    online.rollout(policy, params, [_prompt('tea ' * 100)], SAMPLING)


def test_user_text_is_never_template_text(policy, tokenizer):
  marked = dataclasses.replace(policy, marks=('', '<s>'))
  ids = marked.encode(_prompt('<s>'))
  assert ids.count(tokenizer.bos_id) == 2  # in front, and the mark
