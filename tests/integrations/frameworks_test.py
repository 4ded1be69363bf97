"""Rewards and verdicts inside the frameworks that call them, each where it is installed."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from csrm_jax.integrations import guardrail, inspect, judges, rewards
from csrm_jax.safety import schema
from tests.integrations.judges_test import RULES, TALKS


def _score(server, talk):
  rules = schema.parse_safety(RULES, 'rules')
  return server.score_fn([schema.Example('x', rules, schema.parse_conversation(talk))])[0]


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.slow
@pytest.mark.parametrize('is_chat', [True, False])
def test_steps_of_trl(server, tmp_path, is_chat):
  trl = pytest.importorskip('trl')
  transformers = pytest.importorskip('transformers')
  datasets = pytest.importorskip('datasets')
  from tests.text import parity_test

  spec, _, _, eos = parity_test.FAMILIES['smollm2']()
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / 'tokenizer.json'), eos_token=eos, pad_token='<|endoftext|>'
  )
  tokenizer.chat_template = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
  )
  shape = {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}
  policy = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      **shape, intermediate_size=16, vocab_size=len(tokenizer), num_key_value_heads=2
    )
  )
  texts = ['Tell me about dogs.', 'Hello.', 'Cats?', 'Good night.']
  prompts = [[{'role': 'user', 'content': text}] if is_chat else text for text in texts]
  rules = ['pets', 'film', 'pets', 'film']
  calls = []
  reward = rewards.make(judges.remote(server.url), rules_column='policy')

  def watched(prompts, completions, **columns):
    calls.append((prompts, completions, columns['policy'], reward(prompts, completions, **columns)))
    return calls[-1][-1]

  args = trl.GRPOConfig(
    output_dir=str(tmp_path),
    max_steps=3,
    per_device_train_batch_size=4,
    num_generations=2,
    max_completion_length=8,
    report_to=[],
    use_cpu=True,
    save_strategy='no',
    logging_steps=1,
  )
  trainer = trl.GRPOTrainer(
    model=policy,
    reward_funcs=watched,
    args=args,
    train_dataset=datasets.Dataset.from_dict({'prompt': prompts, 'policy': rules}),
    processing_class=tokenizer,
  )
  trainer.train()
  assert trainer.state.global_step == 3 and len(calls) == 3
  logged = [row['reward'] for row in trainer.state.log_history if 'reward' in row]
  np.testing.assert_allclose(logged, [np.mean(values) for *_, values in calls], rtol=1e-4)
  for asked, replies, policies, values in calls:
    for prompt, reply, name, value in zip(asked, replies, policies, values, strict=True):
      talk = schema.parse_conversation(rewards.conversation(prompt, reply))
      example = schema.Example('x', server.policies.get(name).safety, talk)
      assert value == pytest.approx(_sigmoid(server.score_fn([example])[0]), abs=1e-5)


def test_any_guardrail(server):
  base = pytest.importorskip('any_guardrail')
  guard = guardrail.make(judges.remote(server.url), RULES)
  result = guard.validate('Pets?', 'Dogs bark.')
  want = 1 - _sigmoid(_score(server, TALKS[0]))
  assert isinstance(result, base.GuardrailOutput) and isinstance(guard, base.base.Guardrail)
  assert result.score == pytest.approx(want, abs=1e-5) and result.valid == (want < 0.5)
  assert [part.name for part in result.categories] == ['Dogs']
  assert guard.validate(TALKS[0]).score == pytest.approx(want, abs=1e-5)
  alone = 1 - _sigmoid(_score(server, TALKS[0][1:]))
  assert guard.validate('Dogs bark.').score == pytest.approx(alone, abs=1e-5)
  assert json.loads(result.model_dump_json())['usage']['model_id'] == 'csrm_jax'


def test_inspect(server, tmp_path):
  inspect_ai = pytest.importorskip('inspect_ai')
  from inspect_ai.dataset import Sample
  from inspect_ai.model import ChatMessageAssistant, ModelOutput
  from inspect_ai.solver import solver

  @solver
  def answers():
    async def solve(state, generate):
      del generate  # whose token counts need the network
      state.messages.append(ChatMessageAssistant(content='Dogs bark.'))
      state.output = ModelOutput.from_content('mockllm/model', 'Dogs bark.')
      return state

    return solve

  task = inspect_ai.Task(
    dataset=[Sample('Pets?', metadata={'safety': RULES}), Sample('Pets?')],
    solver=answers(),
    scorer=inspect.compliance(judges.remote(server.url, 'pets'), each_rule=True),
  )
  (log,) = inspect_ai.eval(task, model='mockllm/model', log_dir=str(tmp_path), display='none')
  assert log.status == 'success', log.error
  want = _sigmoid(_score(server, TALKS[0]))
  for sample in log.samples:
    score = sample.scores['csrm_compliance']
    assert score.value == pytest.approx(want, abs=1e-5) and score.answer == 'Dogs bark.'
    assert set(score.metadata['each_rule']) == {'Dogs'} and score.metadata['unread'] == 0


def _openrlhf(monkeypatch, server):
  from csrm_jax.integrations import openrlhf

  openrlhf._judge.cache_clear()
  monkeypatch.setenv('CSRM_JAX_SOURCE', server.url)
  monkeypatch.setenv('CSRM_JAX_RULES', 'pets')
  return openrlhf


PROMPT = '<|im_start|>user\nPets?<|im_end|>\n<|im_start|>assistant\n'


def test_openrlhf_reward_file(server, monkeypatch):
  pytest.importorskip('torch')
  module = _openrlhf(monkeypatch, server)
  found = module.reward_func([f'{PROMPT}Dogs bark.<|im_end|>'], [PROMPT], ['label'])
  want = _score(server, TALKS[0])
  assert found['rewards'].tolist() == pytest.approx([_sigmoid(want)], abs=1e-5)
  assert found['extra_logs']['score_nats'].tolist() == pytest.approx([want], abs=1e-5)
  assert found['extra_logs']['unread'].tolist() == [0]


def test_openrlhf_does_not_go_on_without_a_reward(server, monkeypatch):
  import asyncio

  module = _openrlhf(monkeypatch, server)
  monkeypatch.setenv('CSRM_JAX_RULES', 'no such policy')

  async def generate():  # as OpenRLHF's SingleTurnAgentExecutor asks
    try:
      await asyncio.to_thread(module.reward_func, [f'{PROMPT}Dogs bark.'], [PROMPT], [''])
    except Exception:
      return 'a sample without a reward'

  with pytest.raises(module.NoRewardError, match=r'this run ends: .*no such policy'):
    asyncio.run(generate())


@pytest.mark.parametrize('how', ['file', 'url'])
def test_openrlhf_executor(server, monkeypatch, how):
  """OpenRLHF's own code asks for the rewards of a rollout."""
  if not importlib.util.find_spec('openrlhf'):
    pytest.skip('no openrlhf')
  import asyncio

  from openrlhf.utils import agent

  module = _openrlhf(monkeypatch, server)
  url = module.__file__ if how == 'file' else f'{server.url}/get_reward?policy=pets'
  executor = agent.SingleTurnAgentExecutor(url)
  fetch = executor._fetch_rewards_via_func if how == 'file' else executor._fetch_rewards_via_http
  (found,) = asyncio.run(fetch([f'{PROMPT}Dogs bark.<|im_end|>'], [PROMPT], ['']))
  (value,) = found['rewards']
  assert float(value) == pytest.approx(_sigmoid(_score(server, TALKS[0])), abs=1e-5)


def test_tunix_reward_manager(server):
  """Tunix's own code calls the reward function."""
  if not importlib.util.find_spec('tunix'):
    pytest.skip('no tunix')
  import dataclasses

  from tunix.rl import reward_manager

  @dataclasses.dataclass
  class Config:
    temperature: float = 1.0

  manager = reward_manager.SequenceRewardManager(
    rewards.make(judges.remote(server.url, 'pets')), Config()
  )
  found = manager(prompts=['Pets?'], completions=['Dogs bark.'], answer=['x'])
  assert found['rewards'].tolist() == pytest.approx([_sigmoid(_score(server, TALKS[0]))], abs=1e-5)
  assert 'tunix' in sys.modules
