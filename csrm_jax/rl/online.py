"""Online RL: rollout, score, advantage, update.

A step draws num_generations completions of each of num_prompts prompts, and updates the policy
num_iterations times with all of them. The draws depend on the seed, the step and the policy only,
so that a run that was killed goes on as if it had not been.

A row is a prompt, padded on the left, and its completion, padded on the right, so that all
completions begin in one column.

Axes: N samples (prompts x num_generations, a prompt's samples side by side), C tokens of the
longest completion, T = prompt + C tokens of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import checks, files, mesh as mesh_lib, tree
from csrm_jax.models import lora, sampling as sampling_lib, transformer
from csrm_jax.models.config import DTYPES, ModelConfig
from csrm_jax.models.sampling import Completions, Sampling
from csrm_jax.rl import algorithms, objectives, rewards
from csrm_jax.safety.schema import Prompt, Sample
from csrm_jax.text.tokenizer import Tokenizer
from csrm_jax.train import loop, step as training

# The most completions that are drawn at once on each part that rows are cut into, which bounds the
# memory of the key-value cache.
MAX_ROWS = 256
# Rows have room for this share of the longest completion that is allowed, the least that will do:
# each is compiled once.
SHARES = (1 / 4, 1 / 2, 1)
# The arrays of rows that log-probabilities depend on.
READ = ('tokens', 'positions', 'segment_ids', 'completion_mask')
# The critic's parameters beside the decoder's: they read a value off the final hidden state.
VALUE_HEAD = 'value_head'

# (model, parameters) -> {name: a Metric of evals}, on held-out prompts
LookFn = Callable[[ModelConfig, Any], dict[str, Any]]

# Metrics of the train step -> the names under which users of RL look for them.
_NAMES = {'train/lr': 'optim/lr', 'train/grad_norm': 'optim/grad_norm', 'train/loss': 'loss'}


# --- The policy and its completions ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Policy:
  """What completions are drawn from, without the parameters."""

  model: ModelConfig
  tokenizer: Tokenizer
  # The template text that opens a user's turn, and the text that closes it and opens the answer.
  # Control tokens in it count as such, unlike those in a message.
  marks: tuple[str, str]
  # Whether turns follow each other with nothing but these marks between them. A chat template may
  # want more, and then only single turns are taken.
  joins_turns: bool = False

  def encode(self, prompt: Prompt) -> list[int]:
    """Returns the ids that a completion of the prompt continues.

    Turns that this policy cannot be asked with are a ValueError.
    """
    roles = [message.role for message in prompt.messages]
    num = len(roles) // 2 if self.joins_turns else 0
    if roles != ['user', 'agent'] * num + ['user']:
      raise ValueError(
        f'prompt {prompt.id}: its turns are {", ".join(roles) or "none"}; '
        'this policy is asked with one turn of the user'
        + (', or with turns that alternate' if self.joins_turns else '')
      )
    tokenizer, (prefix, suffix) = self.tokenizer, self.marks
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for message in prompt.messages:
      is_user = message.role == 'user'
      # What a user writes never becomes a control token; the marks around it may.
      ids += tokenizer.encode_control(prefix) if is_user else []
      ids += tokenizer.encode(message.content)
      ids += tokenizer.encode_control(suffix) if is_user else []
    return ids

  def encode_all(self, prompts: Sequence[Prompt], max_completion_length: int) -> list[list[int]]:
    """Returns the ids of each prompt; a ValueError names one that leaves no room for an answer."""
    encoded = [self.encode(prompt) for prompt in prompts]
    most = self.model.context_length - max_completion_length
    for prompt, ids in zip(prompts, encoded, strict=True):
      if len(ids) > most:
        raise ValueError(
          f'prompt {prompt.id} has {len(ids)} tokens, which with '
          f'max_completion_length={max_completion_length} are more than '
          f'context_length={self.model.context_length}; shorten either'
        )
    return encoded


def rollout(
  policy: Policy,
  params: Any,
  prompts: Sequence[Prompt],
  sampling: Sampling,
  num_generations: int = 1,
  seed: int = 0,
) -> tuple[list[Sample], dict[str, np.ndarray]]:
  """Returns (samples, rows) of num_generations completions of each prompt.

  Rows are tokens, positions, segment_ids int32 [N,T]; completion_mask float32 [N,C], 1 on the
  completion, its stop token included; rollout_logprobs float32 [N,C], the sampler's own, equal to
  sampling.token_logprobs. All are 0 elsewhere. C is one of SHARES of max_completion_length.

  The parameters may hold a value head. The seed lies in [0, 2**32).
  """
  encoded = policy.encode_all(prompts, sampling.max_completion_length)
  asked = [ids for ids in encoded for _ in range(num_generations)]
  params = decoder_params(params)
  batch_size = MAX_ROWS * mesh_lib.num_row_parts(params)
  done = sampling_lib.generate(
    policy.model, params, asked, sampling, seed=seed, batch_size=batch_size
  )
  return make_samples(policy, prompts, done), make_rows(policy, asked, done)


def make_samples(policy: Policy, prompts: Sequence[Prompt], done: Completions) -> list[Sample]:
  """Returns the completions as samples, as many of each prompt, a prompt's side by side."""
  num = len(done.lengths) // max(len(prompts), 1)
  return [
    Sample(prompts[i // num], i % num, _decode(policy, done, i), int(length), bool(done.stopped[i]))
    for i, length in enumerate(done.lengths)
  ]


def make_rows(
  policy: Policy, asked: Sequence[Sequence[int]], done: Completions
) -> dict[str, np.ndarray]:
  """Returns the rows that `rollout` describes, for the ids of prompts and their completions."""
  num, most = done.tokens.shape
  C = next(C for C in (math.ceil(share * most) for share in SHARES) if done.lengths.max() <= C)
  starts = np.array([len(ids) for ids in asked], np.int64)
  # A bucket rather than the longest prompt: few shapes, so few programs to compile.
  width = sampling_lib.prompt_bucket(policy.model, starts.max())
  tokens = np.zeros((num, width + C), np.int32)
  for i, ids in enumerate(asked):
    tokens[i, width - starts[i] : width] = ids
  tokens[:, width:] = done.tokens[:, :C]
  # The mask comes from lengths, not from ids: a completion may hold the padding or stop id.
  place = np.arange(width + C) - (width - starts)[:, None]
  inside = (place >= 0) & (place < (starts + done.lengths)[:, None])
  return {
    'tokens': np.where(inside, tokens, 0),
    'positions': np.where(inside, place, 0).astype(np.int32),
    'segment_ids': inside.astype(np.int32),
    'completion_mask': inside[:, width:].astype(np.float32),
    'rollout_logprobs': np.where(inside[:, width:], done.logprobs[:, :C], 0),
  }


def _decode(policy: Policy, done: Completions, i: int) -> str:
  length = done.lengths[i] - done.stopped[i]  # without the stop token
  return policy.tokenizer.decode(done.tokens[i, :length].tolist()).strip()


def decoder_params(params: Any) -> Any:
  """Returns the parameters without the value head."""
  return {name: leaf for name, leaf in params.items() if name != VALUE_HEAD}


def init_value_head(cfg: ModelConfig) -> dict[str, Any]:
  """Returns a float32 value head, whose value is 0 until it is trained."""
  return {
    VALUE_HEAD: {
      'kernel': jnp.zeros((cfg.embed_dim,), jnp.float32),
      'bias': jnp.zeros((), jnp.float32),
    }
  }


@functools.partial(jax.jit, static_argnums=(0, 3))
def logprobs(
  cfg: ModelConfig, params: Any, rows: dict[str, jax.Array], temperature: float
) -> dict[str, jax.Array]:
  """Returns logprobs and, with a value head, values, float32 [N,C], for the rows of `rollout`.

  Both are 0 off the completion. Like a log-probability, a value belongs to the token that follows
  the state it is read off.
  """
  decoder, mask = decoder_params(params), rows['completion_mask']
  hidden = transformer.hidden(cfg, decoder, rows['tokens'], rows['positions'], rows['segment_ids'])
  start = rows['tokens'].shape[1] - mask.shape[1]
  # The states that predict the completion's tokens: no logits are computed for the prompt's.
  before = hidden[:, start - 1 : -1]
  scores = sampling_lib.hidden_logprobs(
    cfg, decoder, before, rows['tokens'][:, start:], temperature
  )
  result = {'logprobs': scores * mask}
  if VALUE_HEAD in params:
    head = params[VALUE_HEAD]
    values = before.astype(jnp.float32) @ head['kernel'] + head['bias']
    result['values'] = values * mask
  return result


def all_logprobs(
  cfg: ModelConfig,
  params: Any,
  rows: Mapping[str, np.ndarray],
  temperature: float,
  size: int,
  mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
  """Returns what `logprobs` returns, computed for `size` rows at a time, spread over the mesh."""
  num, parts = len(rows['tokens']), []
  for start in range(0, num, size):
    part = {name: rows[name][start : start + size] for name in READ}
    missing = size - len(part['tokens'])
    part = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in part.items()}
    parts.append(logprobs(cfg, params, mesh_lib.to_global(part, mesh), temperature))
  parts = jax.device_get(parts)
  return {name: np.concatenate([part[name] for part in parts])[:num] for name in parts[0]}


def sampling_copy(
  cfg: ModelConfig, params: Any, dtype: str, mesh: jax.sharding.Mesh
) -> tuple[ModelConfig, Any]:
  """Returns the model and parameters to sample from: adapters merged, in `dtype`, on `mesh`.

  An empty dtype leaves weights and activations as they are. Weights that are so already are not
  copied.
  """
  plain, params = sampling_model(cfg, dtype), decoder_params(params)
  if cfg.lora_rank:
    params = lora.merge(cfg, params)
  if dtype:
    params = _cast(params, dtype)
  return plain, jax.device_put(params, mesh_lib.shardings(params, mesh))


def sampling_model(cfg: ModelConfig, dtype: str) -> ModelConfig:
  """Returns the model of sampling_copy."""
  fields = {}
  if dtype:
    if dtype not in DTYPES:
      raise ValueError(f'rollout dtype {dtype!r} must be empty or one of {", ".join(DTYPES)}')
    fields = {'dtype': dtype, 'param_dtype': dtype}
  return dataclasses.replace(cfg, lora_rank=0, **fields)


@functools.partial(jax.jit, static_argnums=1)
def _cast(params, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), params)


# --- A run -----------------------------------------------------------------------------


def check(config: Any) -> None:
  """Checks the numbers of an online run's config; raises ValueError."""
  checks.at_least(config.rollout, ('num_prompts', 'num_generations'))
  checks.at_least(config.loss, ('num_iterations', 'num_mini_batches', 'kl_horizon'))
  checks.at_least(config.optim, ('num_microbatches',))
  num_mini_batches = config.loss.num_mini_batches
  num_microbatches = config.optim.num_microbatches
  if num_rows(config) % (num_mini_batches * num_microbatches):
    raise ValueError(
      f'num_prompts x num_generations = {num_rows(config)} samples do not divide into '
      f'num_mini_batches={num_mini_batches} of num_microbatches={num_microbatches}'
    )
  if not config.sampling.temperature:
    raise ValueError(
      'temperature=0 always draws the same completion, from which nothing '
      'is learnt; give one above 0'
    )


def needs_reference(config: Any) -> bool:
  """Returns whether a step needs the reference's log-probabilities: whether a KL counts."""
  return bool(config.loss.kl_coef) or config.stop.kl is not None


def num_rows(config: Any) -> int:
  """Returns N, the samples of a step."""
  return config.rollout.num_prompts * config.rollout.num_generations


def chunk(config: Any) -> int:
  """Returns how many rows go through the model at once."""
  return num_rows(config) // (config.loss.num_mini_batches * config.optim.num_microbatches)


def make_loss_fn(config: Any, policy: Policy) -> training.LossFn:
  """Returns (params, batch) -> (total, weight, metrics), for the train step."""
  loss, objective = config.loss, algorithms.make_objective(config)

  def loss_fn(params, batch):
    out = logprobs(policy.model, params, batch, config.sampling.temperature)
    total, weight, metrics = objectives.policy_loss(out['logprobs'], batch, objective)
    if 'values' in out:
      # Both losses have the same weight, so their totals may be added.
      error, _, more = objectives.value_loss(out['values'], batch, loss.value_clip, objective)
      total, metrics = total + loss.vf_coef * error, metrics | more
    return total, weight, metrics

  return loss_fn


@dataclasses.dataclass
class Online:
  """The work of an online run; see loop.Work."""

  config: Any  # as in configs/rl.py
  policy: Policy  # the policy that is trained
  frozen: Mapping[str, Any]  # its parameters that are not trained; {} where all are
  reference: tuple[ModelConfig, Any]  # the policy from which the KL is measured
  prompts: Sequence[Prompt]  # each step takes the next ones; each epoch has its own order
  reward_fn: rewards.TotalFn
  step_fn: training.StepFn
  sampling: Sampling
  mesh: jax.sharding.Mesh  # batches are spread over it
  sampling_mesh: jax.sharding.Mesh  # completions are drawn on it; it has the same devices
  workdir: pathlib.Path  # where samples.jsonl and looks.jsonl are written
  look_fn: LookFn | None = None  # measures held-out prompts
  # (samples, parts of their reward) -> whether each breaks a rule, bool [N]
  violates: Callable[..., np.ndarray] | None = None
  # Carried from step to step:
  normaliser: rewards.Normaliser = dataclasses.field(default_factory=rewards.Normaliser)
  violations: tuple[int, int] = (0, 0)  # so far, and among how many samples
  best_reward: float | None = None  # the highest reward/mean of a log line
  stopped: str = ''  # why the run ended early

  def __post_init__(self):
    self.algorithm = algorithms.get(self.config.algorithm)
    self.objective = algorithms.make_objective(self.config)
    self.kl_coef = self.objective.kl_coef  # kl_target adapts it during the run

  def begin(self, state, step, carried) -> None:
    # A killed run may have written rows of steps after its last checkpoint, which come again.
    resume_step = -1 if carried is None else step
    for name in ('samples.jsonl', 'looks.jsonl'):
      files.cut_log(self.workdir / name, resume_step)
    if carried is None:
      self._look(state, 0)
    else:
      self.kl_coef = carried['kl_coef']
      self.normaliser = rewards.Normaliser(**carried['normaliser'])
      # A run of an earlier version counts from here on.
      self.violations = tuple(carried.get('violations', (0, 0)))
      self.best_reward, self.stopped = carried['best_reward'], carried['stopped']

  def get_state(self) -> dict[str, Any]:
    return {
      'kl_coef': self.kl_coef,
      'normaliser': dataclasses.asdict(self.normaliser),
      'violations': list(self.violations),
      'best_reward': self.best_reward,
      'stopped': self.stopped,
    }

  def step(self, state, step, log):
    config, times = self.config, [time.perf_counter()]
    samples, rows = self._rollout(state, step)
    times.append(time.perf_counter())
    totals, parts = self.reward_fn(samples)
    totals = rewards.check_rewards(totals, samples, 'reward')
    if self.violates is not None:
      broken, seen = self.violations
      self.violations = broken + int(self.violates(samples, parts).sum()), seen + len(samples)
    times.append(time.perf_counter())
    measured = reward_metrics(totals, parts, config.rollout.num_generations)
    measured |= _completion_metrics(samples)
    if config.loss.normalise_rewards:
      self.normaliser = self.normaliser.update(totals)
    batch = self._make_batch(state, rows, samples, totals)
    if config.rollout.dtype:
      # The distance between training's log-probabilities and the sampler's own, in nats.
      gap = np.abs(batch['old_logprobs'] - rows['rollout_logprobs'])[rows['completion_mask'] > 0]
      measured['sampler/logprob_gap_mean'] = float(gap.mean())
      measured['sampler/logprob_gap_max'] = float(gap.max())
    updates = []
    for chosen in self._mini_batches(step):
      part = {name: x[chosen] for name, x in batch.items()}
      state, metrics = self.step_fn(state, mesh_lib.to_global(part, self.mesh), self.frozen or None)
      updates.append((part, metrics))
    # Checked at once, so that samples of a step that was not applied are not written.
    loop.check_finite(self.workdir, step, updates)
    times.append(time.perf_counter())
    spans = dict(zip(('rollout', 'reward', 'update'), np.diff(times).tolist(), strict=True))
    measured |= {f'time/{name}_s': span for name, span in spans.items()}
    measured['time/tokens_per_s'] = sum(one.num_tokens for one in samples) / spans['rollout']
    log.add([measured, *(metrics for _, metrics in updates)])
    every = config.rollout.samples_every
    if every and step % every == 0:
      rows = _table_rows(step, samples, totals, parts, config.rollout.num_samples)
      _append(self.workdir / 'samples.jsonl', rows)
    self._look(state, step)
    return state, ()

  def line(self, log) -> dict[str, float]:
    values = {_NAMES.get(name, name): value for name, value in log.close().items()}
    del values['train/finite']
    values['kl/coef'] = self.kl_coef
    if self.violations[1]:
      # What learning costs, as the review of safe RL (arXiv 2205.10330) asks.
      values['violations/per_1000'] = 1000 * self.violations[0] / self.violations[1]
    self.stopped = self._why_stop(values)
    return values

  def _why_stop(self, values: Mapping[str, float]) -> str:
    """Returns why the run ends after this log line, or ''; updates best_reward."""
    stop, reward = self.config.stop, values['reward/mean']
    kl = values.get('kl/ref', 0.0)  # absent where no completion counted, or no KL
    if stop.kl is not None and kl > stop.kl:
      return f'kl/ref {kl:.4g} is above stop.kl={stop.kl}'
    best = reward if self.best_reward is None else self.best_reward
    self.best_reward = max(best, reward)
    if stop.reward_drop is not None and reward < best - stop.reward_drop:
      return (
        f'reward/mean {reward:.4g} is more than stop.reward_drop={stop.reward_drop} '
        f'below its best, {best:.4g}'
      )
    return ''

  def _look(self, state: training.TrainState, step: int) -> None:
    """Adds metrics of held-out prompts to looks.jsonl, every eval.every steps."""
    every = self.config.eval.every
    if self.look_fn is None or not every or step % every:
      return
    metrics = self.look_fn(self.policy.model, tree.merge(self.frozen, state.params))
    _append(self.workdir / 'looks.jsonl', [{'step': step, 'metrics': metrics}])

  def _rollout(self, state, step: int) -> tuple[list[Sample], dict[str, np.ndarray]]:
    draws, seed = self.config.rollout, self.config.seed
    model, params = sampling_copy(
      self.policy.model, tree.merge(self.frozen, state.params), draws.dtype, self.sampling_mesh
    )
    return rollout(
      dataclasses.replace(self.policy, model=model),
      params,
      choose_prompts(self.prompts, draws.num_prompts, seed, step),
      self.sampling,
      draws.num_generations,
      int(_rng(seed, step, 'rollout').integers(2**32)),
    )

  def _make_batch(self, state, rows, samples, totals) -> dict[str, np.ndarray]:
    """Returns the batch that the updates of a step learn from; adapts kl_coef."""
    config, loss = self.config, self.config.loss
    if config.rollout.dtype or self.algorithm.needs_values:
      old = self._logprobs(self.policy.model, tree.merge(self.frozen, state.params), rows)
    else:  # the sampler has the same weights and the same function: a forward pass is saved
      old = {'logprobs': rows['rollout_logprobs']}
    reference = {}
    if needs_reference(config):
      reference = {'ref_logprobs': self._logprobs(*self.reference, rows)['logprobs']}
    batch = {name: x for name, x in rows.items() if name != 'rollout_logprobs'}
    if loss.mask_truncated:
      stopped = np.array([sample.stopped for sample in samples])
      batch['completion_mask'] = rows['completion_mask'] * stopped[:, None]
    if loss.normalise_rewards:
      totals = self.normaliser.apply(totals)
    in_reward = self.objective.kl_place == 'reward'
    kl = old['logprobs'] - reference.get('ref_logprobs', old['logprobs'])
    values = {'old_values': old['values']} if 'values' in old else {}
    estimate = {
      'rewards': totals,
      'completion_mask': batch['completion_mask'],
      'kl_penalty': np.float32(self.kl_coef * in_reward) * kl,
    }
    found = _advantages(
      self.algorithm.advantage,
      config.rollout.num_generations,
      loss.gamma,
      loss.lam,
      estimate | values,
    )
    if loss.kl_target is not None:
      # After the advantages: only the next step's samples see the new coefficient. It is measured
      # on all tokens, even where mask_truncated leaves some out of the loss.
      mask = rows['completion_mask']
      k3 = objectives.kl_estimate(old['logprobs'], reference['ref_logprobs'], 'k3')
      self.kl_coef = algorithms.adaptive_kl(
        self.kl_coef,
        float((k3 * mask).sum() / mask.sum()),
        loss.kl_target,
        loss.kl_horizon,
        len(samples),
      )
    batch |= {'old_logprobs': old['logprobs']} | reference
    return batch | {name: np.asarray(x) for name, x in found.items()} | values

  def _logprobs(self, model: ModelConfig, params: Any, rows) -> dict[str, np.ndarray]:
    temperature = self.sampling.temperature
    return all_logprobs(model, params, rows, temperature, chunk(self.config), self.mesh)

  def _mini_batches(self, step: int) -> Iterator[np.ndarray]:
    """Yields the rows of each update of a step."""
    num = self.config.loss.num_mini_batches
    for iteration in range(self.config.loss.num_iterations):
      order = np.arange(num_rows(self.config))
      if num > 1:
        order = _rng(self.config.seed, step, f'mini batches {iteration}').permutation(order)
      yield from np.split(order, num)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _advantages(fn, num_generations, gamma, lam, batch):
  return fn(batch, num_generations, gamma, lam)


def choose_prompts(prompts: Sequence[Prompt], num: int, seed: int, step: int) -> list[Prompt]:
  """Returns the prompts of a step, which counts from 1; an epoch has each prompt once."""
  chosen = shuffled((step - 1) * num, num, len(prompts), (seed,), b'prompts')
  return [prompts[i] for i in chosen]


def shuffled(start: int, num: int, size: int, seed: tuple[int, ...], use: bytes = b'') -> list[int]:
  """Returns places start to start + num of endless epochs of range(size), each in its own order."""
  orders = {
    epoch: np.random.default_rng((*seed, epoch, *use)).permutation(size).tolist()
    for epoch in range(start // size, (start + num - 1) // size + 1)
  }
  return [orders[place // size][place % size] for place in range(start, start + num)]


def _rng(seed: int, step: int, use: str) -> np.random.Generator:
  return np.random.default_rng((seed, step, *use.encode()))


def reward_metrics(
  totals: np.ndarray, parts: Mapping[str, np.ndarray], num_generations: int
) -> dict[str, float]:
  """Returns reward/mean, reward/std, the same for each part, and reward/zero_std_frac.

  The last is the fraction of prompts whose samples all have the same reward, so that a group
  baseline learns nothing from them. It is absent where a prompt has one sample.
  """
  metrics = {}
  if num_generations > 1:
    groups = totals.reshape(-1, num_generations)
    metrics['reward/zero_std_frac'] = (groups.max(1) == groups.min(1)).mean()
  named = {f'reward/{name}': values for name, values in parts.items()}
  for name, values in ({'reward': totals} | named).items():
    metrics |= {f'{name}/mean': values.mean(), f'{name}/std': values.std()}
  return {name: float(value) for name, value in metrics.items()}


def _completion_metrics(samples: Sequence[Sample]) -> dict[str, float]:
  lengths = np.array([sample.num_tokens for sample in samples])
  return {
    'completion/mean_length': float(lengths.mean()),
    'completion/min_length': float(lengths.min()),
    'completion/max_length': float(lengths.max()),
    'completion/truncated_frac': float(np.mean([not sample.stopped for sample in samples])),
  }


def _table_rows(step, samples: Sequence[Sample], totals, parts, num: int) -> list[dict[str, Any]]:
  """Returns `num` lines for samples.jsonl, spread evenly over the step's samples."""
  chosen = np.unique(np.linspace(0, len(samples) - 1, num).astype(int))
  return [
    {
      'step': step,
      'id': samples[i].id,
      'rules': samples[i].prompt.safety.name,
      'prompt': [m.to_dict() for m in samples[i].prompt.messages],
      'completion': samples[i].text,
      'num_tokens': samples[i].num_tokens,
      'stopped': samples[i].stopped,
      'reward': float(totals[i]),
      'parts': {name: float(values[i]) for name, values in parts.items()},
    }
    for i in chosen.tolist()
  ]


def _append(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  with path.open('a', encoding='utf-8') as file:
    file.write(text)
