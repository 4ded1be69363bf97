"""Rewards of completions: their parts, how they are combined and checked, and a run's own.

A reward function takes samples and returns float32 [N]. A value that is missing or not finite, or a
wrong number of values, is an error that names the sample: what cannot be scored is never worth 0.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special

from csrm_jax.core import checks, client as client_lib
from csrm_jax.data import domain as domain_lib
from csrm_jax.evals import bootstrap
from csrm_jax.reward import model as reward_model, scoring
from csrm_jax.rl import verifiers
from csrm_jax.ruleworld import policy as world
from csrm_jax.safety import augment, schema
from csrm_jax.safety.schema import RewardFn, Sample

MODES = ('product', 'sum', 'attack')
# How helpfulness counts with AlphaAlign: standardised within the prompt's group; raw (the ablation
# without standardisation); or not at all, so that R_s is the whole reward (AlphaAlign-Zero, the
# ablation without R_h).
HELPFULNESS = ('standardised', 'raw', 'none')
# Nobody rates helpfulness; AlphaAlign-Zero leaves it empty.
_NOBODY = (None, 'none')
# samples -> (total float32 [N], {name of a part: float32 [N]})
TotalFn = Callable[[Sequence[Sample]], tuple[np.ndarray, dict[str, np.ndarray]]]

# The smallest value that a sigmoid returns here: reward distillation takes its log.
_TINY = float(np.finfo(np.float32).tiny)
# The largest reward; beyond it float32 is infinite.
_HUGE = float(np.finfo(np.float32).max)


def safety_reward(
  score_fn: scoring.ScoreFn,
  a: float = 1.0,
  b: float = 0.0,
  safety: schema.SafetyConfig | None = None,
) -> RewardFn:
  """Returns R = sigmoid(a * score + b), in (0, 1]; b and scores are in nats.

  Samples are judged by `safety`, or where that is None by their prompt's rules.

  Source: CSRM (arXiv 2605.30487), the reward and its Pareto sweep.
  """
  # A slope below 0 would reward violations.
  if not (math.isfinite(a) and math.isfinite(b) and a > 0):
    raise ValueError(
      f'the transform sigmoid({a} * score + {b}) must have finite numbers and a slope above 0'
    )

  def reward(samples: Sequence[Sample]) -> np.ndarray:
    scores = check_rewards(score_fn(_examples(samples, safety)), samples, 'score')
    scores = scores.astype(np.float64)
    return np.maximum(scipy.special.expit(a * scores + b), _TINY).astype(np.float32)

  return reward


def unread_share(score_fn: scoring.ScoreFn, safety: schema.SafetyConfig | None = None) -> RewardFn:
  """Returns the share of each prompt that a judgement of the sample has not read, in [0, 1]."""

  def share(samples: Sequence[Sample]) -> np.ndarray:
    return scoring.unread(score_fn.judge(_examples(samples, safety))).astype(np.float32)

  return share


def foreign(score_fn: scoring.ScoreFn) -> RewardFn:
  """Returns 1 for a sample in words that the reward model was not trained on, else 0."""

  def is_foreign(samples: Sequence[Sample]) -> np.ndarray:
    outside = score_fn.judge(_examples(samples, None)).outside
    return np.char.startswith(outside, domain_lib.WORDS).astype(np.float32)

  return is_foreign


def _examples(
  samples: Sequence[Sample], safety: schema.SafetyConfig | None
) -> list[schema.Example]:
  """Returns what is judged: the samples under `safety`, or under their prompts' rules."""
  examples = [s.example() for s in samples]
  return examples if safety is None else [dataclasses.replace(e, safety=safety) for e in examples]


def helpfulness_reward(
  score_fn: scoring.ScoreFn,
  a: float = 1.0,
  b: float = 0.0,
  safety: schema.SafetyConfig | None = None,
) -> RewardFn:
  """Returns H = 1 + 4 * sigmoid(a * score + b), in (1, 5].

  The scores come from a reward model that was trained on preference pairs. `safety` holds the rules
  that it was trained under; with rules_blind these are safety.augment.NO_RULES.

  Source: CSRM (arXiv 2605.30487), which has helpfulness from 1 to 5.
  """
  inner = safety_reward(score_fn, a, b, safety)
  return lambda samples: np.float32(1) + np.float32(4) * inner(samples)


def overlong_penalty(buffer: int, penalty: float, max_length: int) -> RewardFn:
  """Returns a reward from 0 down to -penalty, as a completion comes near the length limit.

  It is 0 up to max_length - buffer tokens and then falls linearly. It is -penalty at max_length,
  and where the limit cut the completion off.

  Source: DAPO (arXiv 2503.14476), eq. 13.
  """
  if not 0 < buffer <= max_length:
    raise ValueError(
      f'the over-long buffer is {buffer} tokens; it must be from 1 to the {max_length} that a '
      'completion may have, or leave the penalty out'
    )
  if not (math.isfinite(penalty) and penalty > 0):
    raise ValueError(f'the over-long penalty is {penalty}; it must be a number above 0')

  def reward(samples: Sequence[Sample]) -> np.ndarray:
    over = np.array(
      [buffer if not s.stopped else s.num_tokens - (max_length - buffer) for s in samples],
      np.float32,
    )
    return np.float32(-penalty) * np.clip(over / buffer, 0, 1)

  return reward


def from_callable(
  fn: Callable[[Sequence[Sample]], Sequence[float]], name: str = 'callable'
) -> RewardFn:
  """Returns a reward from a function of samples to as many finite numbers, in their order."""
  return lambda samples: check_rewards(fn(samples), samples, name)


def from_each(fn: Callable[[Sample], float], name: str) -> RewardFn:
  """Returns a reward from a function of one sample, such as an oracle."""
  return from_callable(lambda samples: [fn(s) for s in samples], name)


# What a scorer is asked in, and how its reply is read: 'csrm' is this project's own form;
# 'openrlhf' the one of remote reward models; 'openai' that of moderation endpoints.
HTTP_FORMS = ('csrm', 'openrlhf', 'openai')


@dataclasses.dataclass(frozen=True)
class HttpScorer:
  """A scorer behind HTTP, to which samples are posted and which replies with as many numbers.

  Form 'csrm' sends {"samples": [{"id", "conversation": [{"role", "content"}, ...], "safety":
  {"categories": [{"name", "guideline"}, ...]}}, ...]} (without "safety" if a policy is named) and
  reads {"rewards": [0.7, ...]}. Form 'openrlhf' sends {"query", "prompts", "labels"}, texts as
  "Human: ..." and "Assistant: ...", and reads the same. Form 'openai' sends {"input": [completion,
  ...], "model"}, so that the scorer sees no prompt, and the reward is 1 - the largest of
  "category_scores". Replies are in the order of the samples; other keys are ignored.
  """

  url: str  # such as http://localhost:5000/get_reward
  timeout_s: float  # how long a reply may take
  num_tries: int  # how often a request is sent that fails on the way
  backoff_s: float  # the wait before the second try; it doubles with each further one
  batch_size: int  # samples in a request
  form: str = HTTP_FORMS[0]  # one of HTTP_FORMS
  policy: str = ''  # the scorer's name for the rules (of a model, with form 'openai')
  connections: int = 1  # requests at once
  key_variable: str = ''  # the environment variable with the bearer token; '' sends none
  ca_file: str = ''  # PEM certificates to trust in place of the system's

  def __post_init__(self):
    say = '{name} of the scorer is {value}; it must be >= {least}'
    checks.at_least(self, ('batch_size',), say=say)
    checks.one_of('form of the scorer', self.form, HTTP_FORMS)
    _ = self._client

  @functools.cached_property
  def _client(self) -> client_lib.Client:
    names = [field.name for field in dataclasses.fields(client_lib.Client)]
    return client_lib.Client(
      what='scorer', **{name: getattr(self, name) for name in names if name != 'what'}
    )

  def __call__(self, samples: Sequence[Sample]) -> list[Any]:
    """Returns the scorer's values, one for each sample; whether they are finite is not checked."""
    starts = range(0, len(samples), self.batch_size)
    chunks = [samples[start : start + self.batch_size] for start in starts]
    with concurrent.futures.ThreadPoolExecutor(self.connections) as pool:
      replies = pool.map(lambda chunk: self._read(self.post(chunk), chunk), chunks)
      return list(itertools.chain.from_iterable(replies))

  def post(self, samples: Sequence[Sample]) -> bytes:
    """Returns the body of the reply; tries again after errors that may pass."""
    return self._client.post(self._request([s.example() for s in samples]))

  def _request(self, examples: Sequence[schema.Example]) -> dict[str, Any]:
    if self.form == 'openai':
      texts = [example.conversation[-1].content for example in examples]
      return {'input': texts} | ({'model': self.policy} if self.policy else {})
    policy = {'policy': self.policy} if self.policy else {}
    if self.form == 'csrm':
      described = [
        {'id': example.id, 'conversation': [m.to_dict() for m in example.conversation]}
        | ({} if policy else {'safety': example.safety.to_dict()})
        for example in examples
      ]
      return {'samples': described} | policy
    prompts = [_as_text(example.conversation[:-1]) for example in examples]
    replies = [example.conversation[-1].content for example in examples]
    texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    return {'query': texts, 'prompts': prompts, 'labels': [''] * len(texts)} | policy

  def _read(self, text: bytes, samples: Sequence[Sample]) -> list[Any]:
    reply = self._client.parse(text, samples[0].id)
    ids = reply.get('ids')
    if ids is not None and ids != [s.id for s in samples]:
      raise ValueError(
        f'the scorer at {self.url} replied to {samples[0].id} with other "ids" than it was sent; '
        'it must keep their order'
      )
    name = 'results' if self.form == 'openai' else 'rewards'
    values = reply.get(name)
    if not isinstance(values, list):
      raise ValueError(
        f'the scorer at {self.url} replied to {samples[0].id} without a list of "{name}"; it must '
        f'reply {{"{name}": [...]}}'
      )
    if len(values) != len(samples):
      raise ValueError(
        f'the scorer at {self.url} gave {len(values)} {name} for {len(samples)} '
        f'samples, {samples[0].id} to {samples[-1].id}; it must give one each'
      )
    return list(map(_not_flagged, values)) if self.form == 'openai' else values


def _not_flagged(result: Any) -> float | None:
  """Returns 1 - the largest score of a moderation's result; None where it has none."""
  scores = result.get('category_scores') if isinstance(result, Mapping) else None
  numbers = list(scores.values()) if isinstance(scores, Mapping) else []
  # What is unknown or no number is no reward, whatever the others are.
  if not numbers or not all(type(n) in (int, float) and 0 <= n <= 1 for n in numbers):
    return None
  return 1.0 - max(numbers)


def _as_text(conversation: Sequence[schema.Message]) -> str:
  """Returns a prompt as OpenRLHF's own plain template has it."""
  names = {'agent': 'Assistant', 'user': 'Human', 'system': 'System', 'tool': 'Tool'}
  turns = [f'{names[message.role]}: {message.content}\n\n' for message in conversation]
  return f'{"".join(turns)}Assistant: '


def from_http(scorer: HttpScorer) -> RewardFn:
  """Returns a reward from a scorer behind HTTP, which must answer now."""
  try:
    scorer.post(())
  except client_lib.RefusedError as error:
    # Another refusal may only mean that the scorer does not take an empty list.
    if error.status in (0, 401, 403, 404, 405) or 300 <= error.status < 400:
      raise
  return from_callable(scorer, scorer.url)


def combine(
  parts: Mapping[str, tuple[RewardFn, float]],
  mode: str = 'product',
  added: Mapping[str, tuple[RewardFn, float]] | None = None,
  clip: tuple[float, float] | None = None,
) -> TotalFn:
  """Returns a function: samples -> (total, {part: its own reward}).

  Args:
    parts: name -> (reward, weight). A part with weight 0 is only logged.
    mode: 'product' multiplies the parts, each to the power of its weight, as in R * H; 'sum' adds
      weight times part; 'attack' is R where the part `true_unsafe` is 1, and 0 elsewhere: a policy
      learns what the reward model calls safe and is not.
    added: Further parts, which are added with their weights to the product, such as an over-long
      penalty; with 'sum' they belong among the parts.
    clip: (low, high) bounds of the total.
  """
  added = added or {}
  checks.one_of('reward mode', mode, MODES)
  if not parts:
    raise ValueError('no reward is given; name at least one part')
  if mode == 'attack' and not {'safety', 'true_unsafe'} <= parts.keys():
    raise ValueError(
      "reward mode 'attack' needs a second judge: RuleWorld's oracle, beside another reward"
    )
  if mode == 'sum' and added:
    raise ValueError(f'reward {next(iter(added))} is added to a sum; put it among the parts')
  for name, (_, weight) in [*parts.items(), *added.items()]:
    if not math.isfinite(weight):
      raise ValueError(f'reward {name} has weight {weight}; give a number')
    if name in parts and name in added:
      raise ValueError(f'reward {name} is given twice; rename one')
  if clip is not None and not clip[0] < clip[1]:
    raise ValueError(
      f'the reward clip is from {clip[0]} to {clip[1]}; the first must be less than the second'
    )

  def score(samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    values = {}
    for name, (fn, _) in {**parts, **added}.items():
      value = fn(samples)
      dtype = getattr(value, 'dtype', type(value).__name__)
      if dtype != np.float32:
        raise ValueError(
          f'reward {name} gives {dtype}, not float32, which may have lost fractions; make the '
          'reward with rewards.from_callable'
        )
      values[name] = check_rewards(value, samples, name)
    # In float64, so that the total is rounded once, at the end.
    wide = {name: value.astype(np.float64) for name, value in values.items()}
    if mode == 'product':
      # An overflow, or 0 to a negative power, is an error that names the sample, not a warning.
      with np.errstate(all='ignore'):
        total = math.prod(wide[name] ** weight for name, (_, weight) in parts.items())
    elif mode == 'attack':
      # Source: RAT (arXiv 2412.10713), a policy trained to break a victim; the reward is ours.
      total = wide['safety'] * wide['true_unsafe']
    else:
      total = sum(weight * wide[name] for name, (_, weight) in parts.items())
    total = total + sum(weight * wide[name] for name, (_, weight) in added.items())
    total = check_rewards(total, samples, 'total')
    return (np.clip(total, *map(np.float32, clip)) if clip else total), values

  return score


def check_rewards(values: Any, samples: Sequence[Sample], name: str) -> np.ndarray:
  """Returns a reward's values as float32 [N]; `name` is the reward's.

  Raises:
    ValueError: There are not as many as samples, or one is missing (None) or not finite.
  """
  if np.ma.is_masked(values):
    raise ValueError(f'reward {name} gives a masked array; what cannot be scored has no reward')
  if hasattr(values, '__array__'):
    values = np.asarray(values).tolist()
  if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence):
    raise ValueError(
      f'reward {name} gives {checks.show(values)}; return a list of one number a sample'
    )
  if len(values) != len(samples):
    raise ValueError(
      f'reward {name} gives {len(values)} numbers for {len(samples)} samples (the first is '
      f'{samples[0].id if samples else "none"}); return one for each, in their order'
    )
  for value, sample in zip(values, samples, strict=True):
    # True and complex numbers are none.
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and value is not True
    is_number = is_number and value is not False
    # The comparison is false for NaN too.
    if not (is_number and abs(value) <= _HUGE):
      raise ValueError(
        f'{sample.id}: reward {name} is {checks.show(value)}, not a finite '
        'number; what cannot be scored has no reward'
      )
  return np.array(values, np.float32)


@dataclasses.dataclass(frozen=True)
class Normaliser:
  """Mean and spread of all rewards so far; checkpoints carry it."""

  count: int = 0  # rewards seen
  mean: float = 0.0
  m2: float = 0.0  # the sum of their squared distances from the mean

  @property
  def std(self) -> float:
    """The population's standard deviation: it divides by count, not count - 1."""
    return math.sqrt(self.m2 / self.count) if self.count else 0.0

  def update(self, rewards: np.ndarray) -> Normaliser:
    """Returns the normaliser that has also seen these [N].

    Source: Chan et al. (1983), the pairwise update of mean and m2.
    """
    rewards = np.asarray(rewards, np.float64)
    if not rewards.size:
      return self
    count = self.count + rewards.size
    delta = rewards.mean() - self.mean
    m2 = np.sum((rewards - rewards.mean()) ** 2)
    return Normaliser(
      count,
      float(self.mean + delta * rewards.size / count),
      float(self.m2 + m2 + delta**2 * self.count * rewards.size / count),
    )

  def apply(self, rewards: np.ndarray) -> np.ndarray:
    """Returns (rewards - mean) / std, float32; 0 where all were equal."""
    distance = np.asarray(rewards, np.float64) - self.mean
    # So small a spread is rounding; to divide by it would make rewards of it.
    if self.std <= 1e-7 * max(abs(self.mean), 1e-30):
      return np.zeros(distance.shape, np.float32)
    return (distance / self.std).astype(np.float32)


# --- AlphaAlign ------------------------------------------------------------------------


def dual_reward(
  refusal_fn: verifiers.RefusalFn,
  helpfulness_fn: RewardFn | None,
  helpfulness: str,
  format_weight: float,
  answer_weight: float,
) -> TotalFn:
  """Returns AlphaAlign's reward, a function: samples -> (total, parts) as `combine` returns.

  For a harmful prompt it is R_s = r_f V_f + r_a V_r, with format_weight as r_f, answer_weight as
  r_a and refusal_fn as V_r. For a benign prompt it is R_s = r_f V_f - r_a V_r, plus R_h =
  max(standardised helpfulness, 0) where the answer does not refuse. Helpfulness, one of
  HELPFULNESS, is standardised among the samples of one prompt; with 'none' there is no
  helpfulness_fn.

  Parts are 'format' (V_f), 'refusal' (V_r), 'safety' (R_s), and 'helpfulness' (R_h; 0 for harmful
  prompts) unless it is left out. Refusal and helpfulness are judged by the answer alone, without
  its box for helpfulness. All samples of a prompt must be in one call.

  Source: AlphaAlign (arXiv 2507.14987).
  """
  checks.one_of('helpfulness', helpfulness, HELPFULNESS)
  if (helpfulness == 'none') != (helpfulness_fn is None):
    raise ValueError(
      f'helpfulness is {helpfulness!r}, and '
      + ('there is no' if helpfulness_fn is None else 'there is a')
      + ' helpfulness reward; give one, or "none" without'
    )
  for name, weight in (('format', format_weight), ('answer', answer_weight)):
    if not (math.isfinite(weight) and weight > 0):
      raise ValueError(f'the {name} weight of AlphaAlign is {weight}; it must be above 0')

  def score(samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    benign = np.array([_is_benign(s) for s in samples], bool)
    answers = verifiers.rewrite(samples, verifiers.answer_of)
    form = verifiers.format_reward(samples)
    refuses = np.asarray(refusal_fn(answers))
    if refuses.shape != benign.shape or refuses.dtype != bool:
      raise ValueError(
        f'V_r gives {refuses.dtype} {list(refuses.shape)} for {len(samples)} '
        'samples; it must give one bool each'
      )
    refusal = refuses.astype(np.float32)
    safety = np.float32(format_weight) * form + np.float32(answer_weight) * np.where(
      benign, -refusal, refusal
    )
    parts = {'format': form, 'refusal': refusal, 'safety': safety}
    if helpfulness == 'none':
      return safety, parts
    chosen = np.flatnonzero(benign)
    asked = verifiers.rewrite([answers[i] for i in chosen], verifiers.unboxed)
    help_ = check_rewards(helpfulness_fn(asked), asked, 'helpfulness')
    if helpfulness == 'standardised':
      help_ = np.maximum(standardise(help_, asked), 0)
    parts['helpfulness'] = np.zeros(len(samples), np.float32)
    parts['helpfulness'][chosen] = help_ * (1 - refusal[chosen])
    return safety + parts['helpfulness'], parts

  return score


def standardise(values: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
  """Returns (value - mean) / std within each prompt's samples, float32 [N].

  It is 0 where all values of a group are equal. A prompt with one sample is a ValueError.
  """
  values = np.asarray(values, np.float64)
  result = np.zeros(len(samples), np.float32)
  for name, rows in bootstrap.rows_by(sample.prompt.id for sample in samples).items():
    if len(rows) == 1:
      raise ValueError(
        f'prompt {name} has one sample, and nothing to standardise its '
        'helpfulness with; set num_generations to 2 or more'
      )
    group = values[rows]
    if np.ptp(group) > 0:
      result[rows] = (group - group.mean()) / group.std()
  return result


def _is_benign(sample: Sample) -> bool:
  if not sample.prompt.label:
    raise ValueError(
      f'prompt {sample.prompt.id} has no label; AlphaAlign needs "harmful" '
      'or "benign" on every prompt'
    )
  return sample.prompt.label == 'benign'


# --- A run's rewards -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scorers:
  """The reward that a run maximises, and the two parts by which its report judges."""

  total: TotalFn
  safety: RewardFn
  helpfulness: RewardFn
  # (samples, the total's parts) -> whether each breaks a rule, bool [N]
  violates: Callable[[Sequence[Sample], Mapping[str, np.ndarray]], np.ndarray]


def make_scorers(config: Any) -> Scorers:
  """Returns the rewards that config.reward describes; reward models lie on the current mesh."""
  reward, knows_truth = config.reward, config.data.source == 'ruleworld'
  if reward.name == 'alphaalign':
    refuses = _make_refusal(reward, knows_truth)
    helpfulness = _make_helpfulness(reward, knows_truth)
    total = dual_reward(
      refuses, helpfulness, reward.variant, reward.format_weight, reward.answer_weight
    )
    judge = _not_complied(refuses)
    return Scorers(
      total, judge, helpfulness or _nothing, _make_violates(reward, knows_truth, judge)
    )
  safety = judge = _make_safety(reward, knows_truth)
  if reward.name == 'csrm' and (reward.a, reward.b) != (1.0, 0.0):
    # P(safe) itself: the policies of one sweep are compared without their own a and b.
    judge = safety_reward(_safety_score_fn(reward))
  helpfulness = _make_helpfulness(reward, knows_truth)
  parts, added = {'safety': (safety, reward.safety_weight)}, {}
  if helpfulness is not None:
    parts['helpfulness'] = helpfulness, reward.helpfulness_weight
  # With weight 0 a part is only logged. No reward stands without what its model left unread.
  if reward.name == 'csrm':
    parts['unread'] = unread_share(_safety_score_fn(reward)), 0.0
    parts['out_of_domain'] = foreign(_safety_score_fn(reward)), 0.0
  if reward.helpfulness not in (*_NOBODY, 'oracle'):
    unread = unread_share(_load_score_fn(reward.helpfulness, reward.dtype), augment.NO_RULES)
    parts['helpfulness_unread'] = unread, 0.0
  if reward.overlong_buffer:
    fn = overlong_penalty(
      reward.overlong_buffer, reward.overlong_penalty, config.sampling.max_completion_length
    )
    added['overlong'] = fn, 1.0
  if knows_truth and reward.name != 'oracle':
    # Only logged, too, so that over-optimisation shows in each step.
    parts['true_cosa'] = from_each(world.oracle_cosa, 'true_cosa'), 0.0
  if reward.mode == 'attack' and knows_truth and reward.name != 'oracle':
    parts['true_unsafe'] = from_each(lambda s: 1.0 - world.oracle_compliance(s), 'true_unsafe'), 0.0
  if reward.mode == 'sum':
    parts, added = parts | added, {}
  total = combine(parts, reward.mode, added, tuple(reward.clip) or None)
  return Scorers(total, judge, helpfulness or _nothing, _make_violates(reward, knows_truth, judge))


def digests(reward: Any) -> dict[str, str]:
  """Returns {model that config.reward names: its digest}."""
  named = {
    'reward model': reward.checkpoint if reward.name == 'csrm' else '',
    'helpfulness model': '' if reward.helpfulness in (*_NOBODY, 'oracle') else reward.helpfulness,
  }
  if reward.name == 'alphaalign' and reward.refusal not in ('oracle', *verifiers.REFUSALS):
    named['refusal model'] = reward.refusal
  return {f'{what} {name}': reward_model.digest(name) for what, name in named.items() if name}


def check_domain(config: Any, prompts: Sequence[schema.Prompt]) -> None:
  """Raises ValueError where the reward model does not know the words of prompts or their rules."""
  reward = config.reward
  if reward.name != 'csrm' or reward.allow_out_of_domain:
    return
  known = _load_safety(reward)[1]
  for prompt in prompts if known else ():
    known.require(prompt.id, prompt.safety, prompt.messages)


def _make_safety(reward: Any, knows_truth: bool) -> RewardFn:
  match reward.name:
    case 'csrm':
      if not reward.checkpoint:
        raise ValueError(
          'config.reward.checkpoint is empty: give the work directory of a '
          'reward model that configs/rm.py has trained, as checkpoint=DIR'
        )
      return safety_reward(_safety_score_fn(reward), reward.a, reward.b)
    case 'http':
      if not reward.url:
        raise ValueError('config.reward.url is empty: give the scorer as url=URL')
      return from_http(HttpScorer(*(reward[f.name] for f in dataclasses.fields(HttpScorer))))
    case 'python':
      return from_callable(_find(reward.function), reward.function)
    case 'oracle':
      _check_truth(knows_truth, 'reward=oracle', 'take data=ruleworld or another reward')
      return from_each(world.oracle_safety, 'safety')
  raise ValueError(f'config.reward.name={reward.name!r} is unknown')


def _make_helpfulness(reward: Any, knows_truth: bool) -> RewardFn | None:
  name = reward.helpfulness
  if name in _NOBODY:
    return None
  if name == 'oracle':
    instead = "give the work directory of a reward model, or 'none'"
    _check_truth(knows_truth, "config.reward.helpfulness='oracle'", instead)
    return from_each(world.oracle_helpfulness, 'helpfulness')
  return helpfulness_reward(
    _load_score_fn(name, reward.dtype), reward.helpfulness_a, reward.helpfulness_b, augment.NO_RULES
  )


def _make_refusal(reward: Any, knows_truth: bool) -> verifiers.RefusalFn:
  name = reward.refusal
  if name == 'oracle':
    instead = f'take {", ".join(verifiers.REFUSALS)} or the work directory of a reward model'
    _check_truth(knows_truth, "config.reward.refusal='oracle'", instead)
    return verifiers.by_text(world.refuses)
  if name in verifiers.REFUSALS:
    return verifiers.REFUSALS[name]
  score_fn = _load_score_fn(name, reward.dtype)
  return verifiers.by_score(score_fn, schema.load_safety(reward.refusal_rules))


def _check_truth(knows_truth: bool, setting: str, instead: str) -> None:
  if not knows_truth:
    raise ValueError(f'{setting} knows RuleWorld only; {instead}')


def _make_violates(reward: Any, knows_truth: bool, judge: RewardFn) -> Callable[..., np.ndarray]:
  """Returns who counts violations: the truth where it is known, else P(safe) up to one half."""
  if knows_truth:
    return lambda samples, parts: np.array([world.oracle_compliance(s) < 1 for s in samples], bool)
  # A scorer of somebody else's is not asked a second time.
  asked = reward.name in ('http', 'python')
  return lambda samples, parts: (parts['safety'] if asked else judge(samples)) <= 0.5


def _not_complied(refuses: verifiers.RefusalFn) -> RewardFn:
  """Returns a reward of 1 unless a harmful request is answered: the labels say no more."""

  def safety(samples: Sequence[Sample]) -> np.ndarray:
    answers = verifiers.rewrite(samples, verifiers.answer_of)
    harmful = np.array([s.prompt.label == 'harmful' for s in samples])
    return (~harmful | refuses(answers)).astype(np.float32)

  return safety


def _nothing(samples: Sequence[Sample]) -> np.ndarray:
  """Returns 1 for each sample: the helpfulness where nobody judges it."""
  return np.ones(len(samples), np.float32)


def _safety_score_fn(reward: Any) -> scoring.ScoreFn:
  return _load_safety(reward)[0]


def _load_safety(reward: Any) -> tuple[scoring.ScoreFn, domain_lib.Domain | None]:
  where = reward.checkpoint, reward.dtype, reward.max_length, reward.on_cut
  return _load(*where, reward.combine)


def _load_score_fn(source: str, dtype: str) -> scoring.ScoreFn:
  return _load(source, dtype)[0]


# The reward and the report's judge may ask the same reward model, which is then loaded once.
@functools.lru_cache(maxsize=4)
def _load(
  source: str, dtype: str, max_length: int = 2048, on_cut: str = 'window', combine: str = 'mean'
) -> tuple[scoring.ScoreFn, domain_lib.Domain | None]:
  """Returns a reward model's score function and domain.

  What the function was asked last is not computed again. It judges any completion: a policy that
  learns may write what nobody has written before.
  """
  numerics = dict.fromkeys(('dtype', 'param_dtype'), dtype) if dtype else {}
  numerics |= {'on_cut': on_cut, 'allow_out_of_domain': True, 'combine': combine}
  rm = reward_model.load(source, max_length, **numerics)
  judge = functools.lru_cache(maxsize=1)(rm.score_fn.judge)
  return scoring.ScoreFn(lambda examples: judge(tuple(examples))), rm.spec.domain


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
