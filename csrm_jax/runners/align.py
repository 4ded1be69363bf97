"""Aligns a policy to rules, by reinforcement learning or from pairs, and writes a report."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from csrm_jax.core import files, mesh as mesh_lib, tree
from csrm_jax.data import public, sources
from csrm_jax.evals import policy as policy_eval, report
from csrm_jax.models import hf, lora, transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.models.sampling import Sampling
from csrm_jax.reward import backbone, model as reward_model
from csrm_jax.rl import algorithms, offline, online, rewards, verifiers
from csrm_jax.ruleworld import policy as world
from csrm_jax.safety import augment, schema
from csrm_jax.safety.schema import Prompt, RewardFn, Sample
from csrm_jax.train import loop as loop_lib, step as training

# The most held-out prompts that are answered during training: enough to see a trend.
_NUM_LOOKED_AT = 64
# config.policy.marks -> the text around a user's turn, where that is no chat template.
MARKS = {'plain': world.CHAT_MARKS, 'structured': world.STRUCTURED_MARKS}
_ORACLE = policy_eval.Oracle(world.oracle_compliance, world.oracle_safety, world.oracle_helpfulness)


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything that a run reads before it trains."""

  config: ml_collections.ConfigDict
  policy: online.Policy  # the policy that is trained
  reference: tuple[ModelConfig, Any]  # the unaligned policy; its parameters lie on the mesh
  train: Sequence[Prompt]
  test: Sequence[Prompt]  # held out
  scorers: Scorers
  sampling: Sampling
  mesh: jax.sharding.Mesh  # training and rewards run on it
  sampling_mesh: jax.sharding.Mesh  # completions are drawn on it; it has the same devices
  began: float  # time.monotonic() before anything was read

  @property
  def knows_truth(self) -> bool:
    """Whether RuleWorld's oracle can judge: it knows its own prompts only."""
    return self.config.data.source == 'ruleworld'


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Aligns a policy, compares it with the unaligned one, and writes workdir/report."""
  if _show_finished(workdir):
    return
  if jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes: alignment runs in one, on all of '
      "its devices; start it once, or give each process's run its --workdir"
    )
  start, earlier_s = time.monotonic(), loop_lib.elapsed_s(workdir)
  _check(config)
  setup = _set_up(config)
  with jax.set_mesh(setup.mesh):
    is_online = algorithms.get(config.algorithm).online
    params, extra = (_train_online if is_online else _train_offline)(setup, workdir)
    results, measured = _evaluate(setup, params, workdir)
    _export(setup, params, workdir)
  summary = (
    _flatten(measured)
    | extra
    | {
      'time_s': time.monotonic() - start + earlier_s,
      'num_params': tree.num_params(params),
      'num_prompts': len(setup.train),
    }
  )
  manifest = json.loads((workdir / 'manifest.json').read_text())
  path = report.write_report(
    workdir / 'report',
    results,
    title=config.title,
    summary=summary,
    manifest=manifest,
    history=workdir / 'metrics.jsonl',
  )
  _print_table(summary)
  print(f'report: {path}')


def _check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for settings that do not go together, before weights are loaded."""
  algorithms.check_idle(config)
  loop_lib.check_lengths(config)
  if algorithms.get(config.algorithm).online:
    algorithms.make_objective(config)
    online.check(config)
  else:
    offline.check(config)


def _set_up(config: ml_collections.ConfigDict) -> Setup:
  began = time.monotonic()
  policy = make_policy(config)
  sampling = make_sampling(config, (policy.tokenizer.eos_id,))
  train, test = make_prompts(config)
  # Prompts that do not fit are an error here, before anything is written.
  policy.encode_all([*train, *test], sampling.max_completion_length)
  mesh, sampling_mesh = make_meshes(config)
  with jax.set_mesh(mesh):
    scorers = make_scorers(config)
  # The reference has no adapters. Where adapters are trained, its parameters are the frozen base.
  model = dataclasses.replace(policy.model, lora_rank=0)
  shardings = mesh_lib.shardings(transformer.shapes(model), mesh)
  params = hf.load_params(config.policy.init, model, shardings)
  reference = model, params
  return Setup(
    config, policy, reference, train, test, scorers, sampling, mesh, sampling_mesh, began
  )


# --- Training --------------------------------------------------------------------------


def make_meshes(
  config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None
) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
  """Returns the meshes of training and of sampling, over the same devices; by default over all."""
  tensor, num_slices = config.sampling.tensor, config.mesh.num_slices
  # Completions are drawn from copies of the weights that are cut by heads only: weights that are
  # cut over fsdp would have to be gathered for every token.
  return (
    mesh_lib.make_mesh(**config.mesh, devices=devices),
    mesh_lib.make_mesh(tensor=tensor, num_slices=num_slices, devices=devices),
  )


def make_sampling(config: ml_collections.ConfigDict, stop_ids: tuple[int, ...]) -> Sampling:
  """Returns how completions are drawn."""
  knobs = {name: value for name, value in config.sampling.items() if name != 'tensor'}
  return Sampling(**knobs, stop_ids=stop_ids)


def make_step(
  config: ml_collections.ConfigDict, policy: online.Policy, params: Any, mesh: jax.sharding.Mesh
) -> tuple[training.StepFn, training.TrainState]:
  """Returns the train step and its first state; see training.make_step."""
  loss_fn, num_updates = offline.make_loss_fn, config.num_steps
  if algorithms.get(config.algorithm).online:
    loss_fn = online.make_loss_fn
    num_updates *= config.loss.num_iterations * config.loss.num_mini_batches
  return training.make_step(loss_fn(config, policy), params, mesh, num_updates, **config.optim)


def _init_params(setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (trained, frozen) parameters of the policy."""
  model, base = setup.policy.model, setup.reference[1]
  if model.lora_rank:
    params, frozen = lora.init(model, setup.config.seed), base
  else:
    # A copy, because the train step donates its state and the reference must stay.
    params, frozen = jax.tree.map(lambda x: x.copy(), base), {}
  if algorithms.get(setup.config.algorithm).needs_values:
    params = params | online.init_value_head(model)
  return params, frozen


def _train_online(setup: Setup, workdir: pathlib.Path) -> tuple[Any, dict[str, Any]]:
  """Returns (all parameters of the aligned policy, a part of the summary)."""
  params, frozen = _init_params(setup)
  step_fn, state = make_step(setup.config, setup.policy, params, setup.mesh)
  judges = setup.scorers.judges(setup.knows_truth)

  def look(model: ModelConfig, params: Any) -> dict[str, Any]:
    samples = _answer(setup, model, params, setup.test[:_NUM_LOOKED_AT])
    return policy_eval.measured(policy_eval.judge(samples, judges))

  work = online.Online(
    setup.config,
    setup.policy,
    frozen,
    setup.reference,
    setup.train,
    setup.scorers.total,
    step_fn,
    setup.sampling,
    setup.mesh,
    setup.sampling_mesh,
    workdir,
    look,
  )
  state = _train(setup, work, state, workdir, 'align')
  return online.decoder_params(tree.merge(frozen, state.params)), {
    'num_updates': int(state.step),
    'stopped': work.stopped or None,
  }


def _train_offline(setup: Setup, workdir: pathlib.Path) -> tuple[Any, dict[str, Any]]:
  """Returns (all parameters of the aligned policy, a part of the summary)."""
  config, (model, base) = setup.config, setup.reference
  params, frozen = _init_params(setup)
  model, copy = online.sampling_copy(model, base, '', setup.sampling_mesh)
  reference = dataclasses.replace(setup.policy, model=model)
  prompts = setup.train[: config.pairs.num_prompts]
  completions = offline.sample(
    config,
    reference,
    copy,
    prompts,
    setup.scorers.total,
    setup.sampling,
    workdir / 'completions.jsonl',
  )
  pairs = offline.make_pairs(config, reference, base, prompts, completions)
  if config.algorithm == 'distillation' and pairs['reward'].min() <= 0:
    raise ValueError(
      f'a reward is {pairs["reward"].min():.4g}, and distillation takes its '
      'logarithm; use rewards above 0, such as mode=product'
    )
  batches = offline.PairBatches(pairs, config.pairs.batch_size, config.seed)
  step_fn, state = make_step(config, setup.policy, params, setup.mesh)
  work = loop_lib.Supervised(step_fn, batches, setup.mesh, frozen or None)
  state = _train(setup, work, state, workdir, 'train')
  found = offline.describe(completions, pairs)
  return tree.merge(frozen, state.params), {f'pairs/{name}': value for name, value in found.items()}


def _train(
  setup: Setup, work: loop_lib.Work, state: training.TrainState, workdir: pathlib.Path, name: str
) -> training.TrainState:
  meta = {
    'policy': setup.policy.model.to_dict(),
    'marks': list(setup.policy.marks),
    'tokenizer_digest': setup.policy.tokenizer.digest,
    'init': str(setup.config.policy.init),
  }
  return loop_lib.train(
    work,
    state,
    setup.config,
    mesh=setup.mesh,
    workdir=workdir,
    meta=meta,
    setup_s=time.monotonic() - setup.began,
    name=name,
  )


# --- The report ------------------------------------------------------------------------


def _answer(
  setup: Setup, model: ModelConfig, params: Any, prompts: Sequence[Prompt], num: int = 1
) -> list[Sample]:
  """Returns `num` samples of each prompt, in the precision of training."""
  model, params = online.sampling_copy(model, params, '', setup.sampling_mesh)
  policy = dataclasses.replace(setup.policy, model=model)
  # All policies draw with one seed, so that chance differs less between them.
  samples, _ = online.rollout(policy, params, prompts, setup.sampling, num, seed=0)
  return samples


def _evaluate(
  setup: Setup, params: Any, workdir: pathlib.Path
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (the report's results, {policy: its metrics})."""
  print('evaluating', file=sys.stderr)
  config, judges = setup.config, setup.scorers.judges(setup.knows_truth)
  answers = {'unaligned': _answer(setup, *setup.reference, setup.test)}
  if config.eval.best_of:
    many = _answer(setup, *setup.reference, setup.test, config.eval.best_of)
    answers[f'best of {config.eval.best_of}'] = _best(
      many, setup.scorers.total(many)[0], config.eval.best_of
    )
  answers['aligned'] = _answer(setup, setup.policy.model, params, setup.test)
  name = setup.test[0].safety.name or 'rules'
  judged = {
    policy: {name: policy_eval.judge(samples, judges)} for policy, samples in answers.items()
  }
  results = {
    'alignment': policy_eval.alignment(
      judged,
      description=f'{len(setup.test)} held-out prompts under {name}, '
      f'algorithm {config.algorithm}, reward {config.reward.name}.',
    )
  }
  history = {row['step']: row['metrics'] for row in files.read_log(workdir / 'looks.jsonl')}
  if judges.oracle is not None and len(history) > 1:
    results['overoptimisation'] = policy_eval.overoptimisation(
      history, f'{min(_NUM_LOOKED_AT, len(setup.test))} held-out prompts.'
    )
  measured = results['alignment'].values['policies']
  return results, {policy: sets[policy_eval.ALL] for policy, sets in measured.items()}


def _best(samples: Sequence[Sample], totals: np.ndarray, num: int) -> list[Sample]:
  """Returns the best of each prompt's samples, by the reward."""
  chosen = totals.reshape(-1, num).argmax(1)
  return [samples[i * num + best] for i, best in enumerate(chosen.tolist())]


def _flatten(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
  """Returns {'aligned/true_cosa': value, …}, with the bounds of each interval."""
  flat = {}
  for policy, found in measured.items():
    for name, metric in found.items():
      key = f'{policy.replace(" ", "_")}/{name}'
      flat[key] = metric['value']
      flat[f'{key}_low'], flat[f'{key}_high'] = metric['low'], metric['high']
  return flat


def _export(setup: Setup, params: Any, workdir: pathlib.Path) -> None:
  """Writes workdir/policy in Hugging Face form; policy_init of a later run reads it."""
  config = setup.config
  model, merged = online.sampling_copy(setup.policy.model, params, '', setup.mesh)
  made_by = f'csrm_jax, algorithm {config.algorithm}'
  hf.save(workdir / 'policy', model, merged, metadata={'made_by': made_by})
  backbone.save_tokenizer(config.policy.tokenizer or config.policy.init, workdir / 'policy')


def _show_finished(workdir: pathlib.Path) -> bool:
  path = workdir / 'report' / 'summary.json'
  if not path.is_file():
    return False
  _print_table(json.loads(path.read_text()))
  print(f'{workdir} is finished; remove its report/ to evaluate again')
  return True


def _print_table(summary: dict[str, Any]) -> None:
  """Prints the table that a run ends with: metrics as rows, policies as columns."""
  names = [
    key.removeprefix('aligned/')
    for key in summary
    if key.startswith('aligned/') and not key.endswith(('_low', '_high'))
  ]
  policies = list(
    dict.fromkeys(
      key.partition('/')[0] for key in summary if '/' in key and key.partition('/')[2] in names
    )
  )
  print(f'{"":20}' + ''.join(f'{policy:>14}' for policy in policies))
  for name in names:
    values = (summary[f'{policy}/{name}'] for policy in policies)
    print(f'{name:20}' + ''.join(f'{value:14.3f}' for value in values))


# --- Policy and prompts ----------------------------------------------------------------


def make_policy(config: ml_collections.ConfigDict) -> online.Policy:
  """Returns the policy that config.policy describes, without its parameters."""
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
  return online.Policy(
    model, tokenizer, (prefix + config.policy.instruction, suffix), joins_turns=name != 'chat'
  )


def make_prompts(config: ml_collections.ConfigDict) -> tuple[list[Prompt], list[Prompt]]:
  """Returns (prompts to train on, held-out prompts)."""
  train, test = _read_prompts(config)
  return (_balance(train) if config.data.balance else train), test


def _balance(prompts: Sequence[Prompt]) -> list[Prompt]:
  """Returns as many prompts of either label: the last of the more frequent one are left out."""
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
  # Prompts without a label stay: AlphaAlign refuses them by name.
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
  # Prompts are split as the examples of a reward model are, by a hash of the text: the same text is
  # held out whatever else is in the file.
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
    return schema.SafetyConfig(tuple(public.XSTEST_RULES.values()), 'xstest/both')
  raise ValueError('config.data.rules is empty: give a YAML or JSON file of rules as rules=FILE')


def _read_xstest(path: pathlib.Path, safety: schema.SafetyConfig) -> list[Prompt]:
  if path.is_dir():
    found = sorted(path.glob('**/xstest_prompts.csv'))
    if not found:
      raise FileNotFoundError(f'{path}: no xstest_prompts.csv there')
    path = found[0]
  labels = {'unsafe': 'harmful', 'safe': 'benign'}
  return [
    _prompt(f'xstest/{row["id"]}', row['prompt'], safety, labels[row['label']])
    for row in public.xstest_prompts(path).values()
  ]


def _read_jsonl(path: pathlib.Path, safety: schema.SafetyConfig) -> list[Prompt]:
  def parse(row: sources.Row) -> Iterator[Prompt]:
    yield _prompt(str(row['id']), row.text('prompt'), safety, row.get('label') or '')

  return sources.read_rows(path, ('id', 'prompt'), parse)


def _prompt(name: str, text: str, safety: schema.SafetyConfig, label: str) -> Prompt:
  return Prompt(name, (schema.Message('user', text),), safety, label)


# --- Rewards ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scorers:
  """The reward that a run maximises, and the two parts by which the report judges."""

  total: rewards.TotalFn
  safety: RewardFn
  helpfulness: RewardFn

  def judges(self, knows_truth: bool) -> policy_eval.Judges:
    """Returns the report's judges, with RuleWorld's oracle among them where it knows the truth."""
    refuses = (
      world.refuses
      if knows_truth
      else (lambda text: verifiers.is_refusal(verifiers.answer_of(text)))
    )
    return policy_eval.Judges(
      self.safety, self.helpfulness, refuses, _ORACLE if knows_truth else None
    )


def make_scorers(config: ml_collections.ConfigDict) -> Scorers:
  """Returns the rewards that config.reward describes; reward models lie on the current mesh."""
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
    # With weight 0 it is only logged, so that over-optimisation shows in each step.
    parts['true_cosa'] = rewards.from_each(world.oracle_cosa, 'true_cosa'), 0.0
  if reward.mode == 'sum':
    parts, added = parts | added, {}
  total = rewards.combine(parts, reward.mode, added, tuple(reward.clip) or None)
  return Scorers(total, _judge_safety(reward, safety), helpfulness or _nothing)


def _judge_safety(reward: Any, safety: RewardFn) -> RewardFn:
  """Returns P(safe): policies of one sweep are compared without their own a and b."""
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
    """Returns 1 unless a harmful request is answered: the labels say no more."""
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


# The reward and the report's judge may ask the same reward model, which is then loaded once.
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
  """Returns 1 for each sample: the helpfulness where nobody judges it."""
  return np.ones(len(samples), np.float32)
