"""What an alignment run is made of: policy, prompts, rewards, judges."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from csrm_jax import config as config_lib
from csrm_jax.core import files
from csrm_jax.data import rows, sources
from csrm_jax.data.public_rules import XSTEST_RULES
from csrm_jax.evals import policy as policy_eval
from csrm_jax.models import hf
from csrm_jax.reward import backbone, model as reward_model
from csrm_jax.rl import rewards, rollout, verifiers
from csrm_jax.ruleworld import policy as world
from csrm_jax.safety import augment, schema
from csrm_jax.safety.schema import Prompt, RewardFn, Sample

# What stands around a user's turn, but for a chat template.
MARKS = {'plain': world.CHAT_MARKS, 'structured': world.STRUCTURED_MARKS}
_ORACLE = policy_eval.Oracle(world.oracle_compliance, world.oracle_safety, world.oracle_helpfulness)


def check_idle(config: ml_collections.ConfigDict) -> None:
  """Checks that no knob was turned that does nothing in this run.

  Raises:
    ValueError: one was; the message says what would make it do something.
  """
  reward, is_world = config.reward, config.data.source == 'ruleworld'
  idle = {  # key -> (left at this, does it do nothing, what it needs)
    'data.eval_fraction': (0.2, is_world, 'prompts from a file'),
    'data.eval_seed': (1, not is_world, 'data.source=ruleworld'),
    'policy.overrides.lora_alpha': (16.0, not config.policy.overrides.lora_rank, 'lora_rank'),
  }
  if 'helpfulness' in reward:
    known = reward.helpfulness in ('none', 'oracle')
    for name, value in (('a', 1.0), ('b', 0.0)):
      idle[f'reward.helpfulness_{name}'] = (value, known, 'a reward model as reward.helpfulness')
  if 'overlong_buffer' in reward:
    idle['reward.overlong_penalty'] = (1.0, not reward.overlong_buffer, 'reward.overlong_buffer')
    idle['reward.helpfulness_weight'] = (1.0, reward.helpfulness == 'none', 'reward.helpfulness')
  if 'loss' in config:
    idle['loss.kl_horizon'] = (10_000, config.loss.kl_target is None, 'loss.kl_target')
  values = config_lib.flatten(config)
  for key, (value, is_idle, needs) in idle.items():
    if is_idle and values[key] != value:
      raise ValueError(
        f'config.{key}={values[key]} does nothing without {needs}; leave it at {value}'
      )


def make_policy(config: ml_collections.ConfigDict) -> rollout.Policy:
  """Returns the policy that config.policy describes, without its parameters.

  Raises:
    ValueError: marks that there are not, or a tokenizer of another model.
  """
  source = config.policy.init
  model = hf.load_config(source, **config.policy.overrides)
  tokenizer = backbone.load_tokenizer(config.policy.tokenizer or source)
  if tokenizer.vocab_size > model.vocab_size:
    raise ValueError(
      f'config.policy.tokenizer has {tokenizer.vocab_size} ids, the policy '
      f'{model.vocab_size}; give the tokenizer of the policy'
    )
  name = config.policy.marks
  if name == 'chat':
    prefix, suffix = backbone.chat_marks(source, tokenizer)
  elif name in MARKS:
    prefix, suffix = MARKS[name]
  else:
    raise ValueError(f'config.policy.marks={name!r} must be chat or one of {", ".join(MARKS)}')
  return rollout.Policy(
    model, tokenizer, (prefix + config.policy.instruction, suffix), joins_turns=name != 'chat'
  )


def make_prompts(config: ml_collections.ConfigDict) -> tuple[list[Prompt], list[Prompt]]:
  """Returns (prompts to train on, held-out ones).

  Raises:
    ValueError: an unknown source or rule set, no prompts, or none to balance
      others with.
  """
  train, test = _read_prompts(config)
  return (_balance(train) if config.data.balance else train), test


def _balance(prompts: Sequence[Prompt]) -> list[Prompt]:
  """Returns the prompts without the last of the more frequent label."""
  places = {
    label: [i for i, p in enumerate(prompts) if p.label == label] for label in ('harmful', 'benign')
  }
  num = min(map(len, places.values()))
  if not num:
    raise ValueError(
      f'{len(places["harmful"])} prompts to train on are labelled harmful '
      f'and {len(places["benign"])} benign; label some as each, or set '
      'config.data.balance=False'
    )
  surplus = {i for some in places.values() for i in some[num:]}
  return [p for i, p in enumerate(prompts) if i not in surplus]


def _read_prompts(config: ml_collections.ConfigDict) -> tuple[list[Prompt], list[Prompt]]:
  data, num_test = config.data, config.eval.num_prompts
  if data.source == 'ruleworld':
    return (
      world.prompts(config.seed, data.num_prompts, data.rules, 'train'),
      world.prompts(data.eval_seed, num_test, data.rules, 'test'),
    )
  readers = {'xstest': _read_xstest, 'jsonl': _read_jsonl}
  if data.source not in readers:
    raise ValueError(
      f'config.data.source={data.source!r} must be one of ruleworld, {", ".join(readers)}'
    )
  if not data.path:
    raise ValueError(
      f'config.data.path is empty: give the prompts of data={data.source} '
      'as data_dir=FOLDER or path=FILE'
    )
  found = readers[data.source](pathlib.Path(data.path), _load_rules(data))
  examples = {
    schema.Example(p.id, p.safety, (*p.messages, schema.Message('agent', ''))): p for p in found
  }
  halves = sources.split(list(examples), data.eval_fraction, config.seed)
  train, test = ([examples[e] for e in half] for half in halves)
  if not train or not test:
    raise ValueError(
      f'{data.path}: {len(train)} prompts to train on and {len(test)} held '
      'out; give more prompts, or another config.data.eval_fraction'
    )
  return train[: data.num_prompts], test[:num_test]


def _load_rules(data: ml_collections.ConfigDict) -> schema.SafetyConfig:
  if data.rules:
    return schema.load_safety(data.rules)
  if data.source == 'xstest':
    return schema.SafetyConfig(tuple(XSTEST_RULES.values()), 'xstest/both')
  raise ValueError('config.data.rules is empty: give a YAML or JSON file of rules as rules=FILE')


def _read_xstest(path: pathlib.Path, safety: schema.SafetyConfig) -> list[Prompt]:
  if path.is_dir():
    found = sorted(path.glob('**/xstest_prompts.csv'))
    if not found:
      raise FileNotFoundError(f'{path}: no xstest_prompts.csv there')
    path = found[0]
  labels = {'unsafe': 'harmful', 'safe': 'benign'}
  prompts = []
  for where, row in rows.read_csv(path, ('id', 'prompt', 'label')):
    if row['label'] not in labels:
      raise ValueError(f'{where}: label {row["label"]!r} must be safe or unsafe')
    prompts.append(_prompt(f'xstest/{row["id"]}', row['prompt'], safety, labels[row['label']]))
  return prompts


def _read_jsonl(path: pathlib.Path, safety: schema.SafetyConfig) -> list[Prompt]:
  prompts = []
  for where, row in files.read_json_lines(path):
    rows.check_object(row, ('id', 'prompt'), where)
    text = rows.check_text(row, 'prompt', where)
    prompts.append(_prompt(str(row['id']), text, safety, row.get('label') or ''))
  return prompts


def _prompt(name: str, text: str, safety: schema.SafetyConfig, label: str) -> Prompt:
  return Prompt(name, (schema.Message('user', text),), safety, label)


@dataclasses.dataclass(frozen=True)
class Scorers:
  """What a run maximises, and who judges what came of it.

  Attributes:
    total: the reward.
    safety: its safety part, for the report.
    helpfulness: its other part.
  """

  total: rewards.TotalFn
  safety: RewardFn
  helpfulness: RewardFn

  def judges(self, knows_truth: bool) -> policy_eval.Judges:
    """Returns the judges of the report; with RuleWorld's oracle, or not."""
    refuses = (
      world.refuses
      if knows_truth
      else (lambda text: verifiers.is_refusal(verifiers.answer_of(text)))
    )
    return policy_eval.Judges(
      self.safety, self.helpfulness, refuses, _ORACLE if knows_truth else None
    )


def make_scorers(config: ml_collections.ConfigDict) -> Scorers:
  """Returns the rewards that config.reward describes.

  Reward models lie on the mesh that jax.set_mesh has set.

  Raises:
    FileNotFoundError: no reward model there.
    ValueError: it cannot be used, or settings that do not fit.
  """
  reward = config.reward
  knows_truth = config.data.source == 'ruleworld'
  if reward.name == 'alphaalign':
    return _make_alphaalign(reward, knows_truth)
  safety = _make_safety(reward, knows_truth)
  helpfulness = _make_helpfulness(reward, knows_truth)
  parts = {'safety': (safety, reward.safety_weight)}
  if helpfulness is not None:
    parts['helpfulness'] = helpfulness, reward.helpfulness_weight
  added = {}
  if reward.overlong_buffer:
    fn = rewards.overlong_penalty(
      reward.overlong_buffer, reward.overlong_penalty, config.sampling.max_completion_length
    )
    added['overlong'] = fn, 1.0
  if knows_truth and reward.name != 'oracle':
    # Weight 0: only logged, so that over-optimisation shows in each step.
    parts['true_cosa'] = rewards.from_each(world.oracle_cosa, 'true_cosa'), 0.0
  if reward.mode == 'sum':
    parts, added = parts | added, {}
  total = rewards.combine(parts, reward.mode, added, tuple(reward.clip) or None)
  return Scorers(total, _judge_safety(reward, safety), helpfulness or _nothing)


def _judge_safety(reward: Any, safety: RewardFn) -> RewardFn:
  """Returns P(safe): the reward without the sweep's a and b."""
  if reward.name == 'csrm' and (reward.a, reward.b) != (1.0, 0.0):
    return rewards.safety_reward(_load_score_fn(reward.checkpoint, reward.max_length))
  return safety


def _make_safety(reward: ml_collections.ConfigDict, knows_truth: bool) -> RewardFn:
  if reward.name == 'csrm':
    if not reward.checkpoint:
      raise ValueError(
        'config.reward.checkpoint is empty: give the work directory of a '
        'reward model that configs/rm.py has trained, as checkpoint=DIR'
      )
    score_fn = _load_score_fn(reward.checkpoint, reward.max_length)
    return rewards.safety_reward(score_fn, reward.a, reward.b)
  if reward.name == 'http':
    if not reward.url:
      raise ValueError('config.reward.url is empty: give the scorer as url=URL')
    return rewards.from_http(
      rewards.HttpScorer(
        reward.url, reward.timeout_s, reward.num_tries, reward.backoff_s, reward.batch_size
      )
    )
  if reward.name == 'python':
    return rewards.from_callable(_find(reward.function), reward.function)
  if reward.name != 'oracle':
    raise ValueError(f'config.reward.name={reward.name!r} is unknown')
  _check_truth(knows_truth, 'reward=oracle', 'take data=ruleworld or another reward')
  return rewards.from_each(world.oracle_safety, 'safety')


def _make_helpfulness(reward: ml_collections.ConfigDict, knows_truth: bool) -> RewardFn | None:
  name = reward.helpfulness
  if name == 'none':
    return None
  if name != 'oracle':
    return rewards.helpfulness_reward(
      _load_score_fn(name), reward.helpfulness_a, reward.helpfulness_b, augment.NO_RULES
    )
  _check_truth(
    knows_truth,
    "config.reward.helpfulness='oracle'",
    "give the work directory of a reward model, or 'none'",
  )
  return rewards.from_each(world.oracle_helpfulness, 'helpfulness')


def _make_alphaalign(reward: ml_collections.ConfigDict, knows_truth: bool) -> Scorers:
  refuses = _make_refusal(reward, knows_truth)
  helpfulness = None if reward.variant == 'none' else _make_helpfulness(reward, knows_truth)
  total = verifiers.dual_reward(
    refuses, helpfulness, reward.variant, reward.format_weight, reward.answer_weight
  )

  def safety(samples: Sequence[Sample]) -> np.ndarray:
    """1 unless a harmful request is answered: all that the labels say."""
    answers = [dataclasses.replace(s, text=verifiers.answer_of(s.text)) for s in samples]
    harmful = np.array([s.prompt.label == 'harmful' for s in samples])
    return (~harmful | refuses(answers)).astype(np.float32)

  return Scorers(total, safety, helpfulness or _nothing)


def _make_refusal(reward: ml_collections.ConfigDict, knows_truth: bool) -> verifiers.RefusalFn:
  name = reward.refusal
  if name == 'oracle':
    _check_truth(
      knows_truth,
      "config.reward.refusal='oracle'",
      f'take {", ".join(verifiers.REFUSALS)} or the work directory of a reward model',
    )
    return verifiers.by_text(world.refuses)
  if name in verifiers.REFUSALS:
    return verifiers.REFUSALS[name]
  return verifiers.by_score(_load_score_fn(name), schema.load_safety(reward.refusal_rules))


def _check_truth(knows_truth: bool, setting: str, instead: str) -> None:
  if not knows_truth:
    raise ValueError(f'{setting} knows RuleWorld only; {instead}')


@functools.lru_cache(maxsize=4)
def _load_score_fn(source: str, max_length: int = 2048) -> Callable[..., Any]:
  return reward_model.load(source, max_length).score_fn


def _find(name: str) -> Callable[..., Any]:
  module, _, attribute = name.partition(':')
  try:
    fn = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f'config.reward.function={name!r} cannot be imported ({error}); write '
      'module:name of a function of samples'
    ) from None
  if not callable(fn):
    raise ValueError(f'config.reward.function={name!r} is no function')
  return fn


def _nothing(samples: Sequence[Sample]) -> np.ndarray:
  """Helpfulness where nobody judges it."""
  return np.ones(len(samples), np.float32)
