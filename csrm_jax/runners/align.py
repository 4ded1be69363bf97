"""Aligns a policy to rules, by reinforcement learning or from pairs, and writes a report."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from csrm_jax.core import checks, files, journal, mesh as mesh_lib, tree
from csrm_jax.data import public, sources, tables
from csrm_jax.evals import policy as policy_eval, report
from csrm_jax.models import hf, lora, transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.models.sampling import Sampling
from csrm_jax.reward import backbone
from csrm_jax.rl import algorithms, offline, online, rewards, verifiers
from csrm_jax.ruleworld import policy as world
from csrm_jax.runners import evaluate
from csrm_jax.safety import schema
from csrm_jax.safety.schema import Prompt, Sample
from csrm_jax.train import loop as loop_lib, step as training

# The most held-out prompts that are answered during training: enough to see a trend.
_NUM_LOOKED_AT = 64
# A policy so far from where it began, in nats a token, writes another language.
_LOST_KL = 10.0
# config.policy.marks -> the text around a user's turn, where that is no chat template.
MARKS = {'plain': world.CHAT_MARKS, 'structured': world.STRUCTURED_MARKS}
_ORACLE = policy_eval.Oracle(world.oracle_compliance, world.oracle_safety, world.oracle_helpfulness)


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything that a run reads before it trains."""

  config: ml_collections.ConfigDict
  source: hf.Source  # the weights that the policy starts from
  policy: online.Policy  # the policy that is trained
  reference: tuple[ModelConfig, Any]  # the unaligned policy; its parameters lie on the mesh
  train: Sequence[Prompt]
  test: Sequence[Prompt]  # held out
  scorers: rewards.Scorers
  sampling: Sampling
  mesh: jax.sharding.Mesh  # training and rewards run on it
  sampling_mesh: jax.sharding.Mesh  # completions are drawn on it; it has the same devices
  inputs: dict[str, str]  # {weights and reward models: digest}
  setup_s: float  # the seconds that reading all this has taken


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Aligns a policy, compares it with the unaligned one, and writes workdir/report."""
  if evaluate.show_finished(workdir):
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
    results = _evaluate(setup, params, workdir)
    _export(setup, params, workdir)
  if lost := diverged(report.read_history(workdir / 'metrics.jsonl')):
    print(lost, file=sys.stderr)
    results['alignment'] = dataclasses.replace(results['alignment'], remark=lost)
  policies = results['alignment'].values['policies'].items()
  measured = {name.replace(' ', '_'): sets[policy_eval.ALL] for name, sets in policies}
  summary = report.flatten(measured) | extra
  summary |= {
    'time_s': time.monotonic() - start + earlier_s,
    'num_params': tree.num_params(params),
    'num_prompts': len(setup.train),
  }
  evaluate.write(workdir, results, summary, config.title)


def diverged(history: Mapping[str, Mapping[int, float]]) -> str:
  """Returns the sentence that marks a policy which has lost its language in training, or ''."""
  kl = history.get('kl/ref', {})
  step = max(kl, key=kl.get, default=None)
  if step is None or kl[step] <= _LOST_KL:
    return ''
  return (
    f'Diverged: at step {step} kl/ref was {kl[step]:.3g} nats a token, so that the policy had left '
    'its language, and its figures mean little. Lower optim.lr, or end such runs with stop.kl.'
  )


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
  began, source = time.monotonic(), hf.Source(config.policy.init)
  policy = make_policy(config, source)
  sampling = make_sampling(config, (policy.tokenizer.eos_id,))
  train, test = make_prompts(config)
  # Prompts that do not fit are an error here, before anything is written.
  policy.encode_all([*train, *test], sampling.max_completion_length)
  mesh, sampling_mesh = make_meshes(config)
  with jax.set_mesh(mesh):
    scorers = rewards.make_scorers(config)
  rewards.check_domain(config, [*train, *test])
  # The reference has no adapters. Where adapters are trained, its parameters are the frozen base.
  model = dataclasses.replace(policy.model, lora_rank=0)
  shardings = mesh_lib.shardings(transformer.shapes(model), mesh)
  reference = model, hf.load_params(source, model, shardings)
  inputs = {f'weights {config.policy.init}': hf.digest(source), **rewards.digests(config.reward)}
  return Setup(
    config,
    source,
    policy,
    reference,
    train,
    test,
    scorers,
    sampling,
    mesh,
    sampling_mesh,
    inputs,
    setup_s=time.monotonic() - began,
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
  judges = _judges(setup)

  def look(model: ModelConfig, params: Any) -> dict[str, Any]:
    samples = _answer(setup, model, params, setup.test[:_NUM_LOOKED_AT])
    return policy_eval.average(policy_eval.judge(samples, judges))

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
    setup.scorers.violates,
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
    setup.inputs,
  )
  pairs = offline.make_pairs(config, reference, base, prompts, completions, setup.mesh)
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
    'policy': dataclasses.asdict(setup.policy.model),
    'marks': list(setup.policy.marks),
    'tokenizer_digest': setup.policy.tokenizer.digest,
    'init': str(setup.config.policy.init),
  }
  config, prompts = setup.config, [*setup.train, *setup.test]
  name_of = config.data.path or config.data.source
  inputs = setup.inputs | {f'prompts {name_of}': journal.key(prompts)}
  return loop_lib.train(
    work,
    state,
    config,
    mesh=setup.mesh,
    workdir=workdir,
    meta=meta,
    inputs=inputs,
    setup_s=setup.setup_s,
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


def _judges(setup: Setup) -> policy_eval.Judges:
  """Returns the report's judges, with RuleWorld's oracle where it knows the prompts."""
  if setup.config.data.source == 'ruleworld':
    refuses, oracle = world.refuses, _ORACLE
  else:
    refuses, oracle = (lambda text: verifiers.is_refusal(verifiers.answer_of(text))), None
  return policy_eval.Judges(setup.scorers.safety, setup.scorers.helpfulness, refuses, oracle)


def _evaluate(setup: Setup, params: Any, workdir: pathlib.Path) -> report.Results:
  """Returns the report's results: of the policies, and of what was looked at on the way."""
  print('evaluating', file=sys.stderr)
  config, judges = setup.config, _judges(setup)
  answers = {'unaligned': _answer(setup, *setup.reference, setup.test)}
  if num := config.eval.best_of:
    many = _answer(setup, *setup.reference, setup.test, num)
    best = setup.scorers.total(many)[0].reshape(-1, num).argmax(1)
    answers[f'best of {num}'] = [many[i * num + place] for i, place in enumerate(best.tolist())]
  answers['aligned'] = _answer(setup, setup.policy.model, params, setup.test)
  name = setup.test[0].safety.name or 'rules'
  judged = {policy: {name: policy_eval.judge(some, judges)} for policy, some in answers.items()}
  about = (
    f'{len(setup.test)} held-out prompts under {name}, algorithm {config.algorithm}, reward '
    f'{config.reward.name}.'
  )
  results = {'alignment': policy_eval.alignment(judged, description=about)}
  history = {row['step']: row['metrics'] for row in files.read_log(workdir / 'looks.jsonl')}
  if judges.oracle is not None and len(history) > 1:
    results['overoptimisation'] = policy_eval.overoptimisation(
      history, f'{min(_NUM_LOOKED_AT, len(setup.test))} held-out prompts.'
    )
  return results


def _export(setup: Setup, params: Any, workdir: pathlib.Path) -> None:
  """Writes workdir/policy in Hugging Face form; policy_init of a later run reads it."""
  config = setup.config
  model, merged = online.sampling_copy(setup.policy.model, params, '', setup.mesh)
  made_by = f'csrm_jax, algorithm {config.algorithm}'
  hf.save(workdir / 'policy', model, merged, metadata={'made_by': made_by})
  backbone.save_tokenizer(config.policy.tokenizer or setup.source, workdir / 'policy')


# --- Policy and prompts ----------------------------------------------------------------


def make_policy(config: ml_collections.ConfigDict, source: hf.Source) -> online.Policy:
  """Returns the policy that config.policy describes, without its parameters."""
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
      f'{len(places["harmful"])} prompts to train on are labelled harmful and '
      f'{len(places["benign"])} benign; label some as each, or set config.data.balance=False'
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
  checks.one_of('config.data.source', data.source, ['ruleworld', *readers])
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
  def parse(row: tables.Row) -> Iterator[Prompt]:
    label = row.get('label')
    yield _prompt(row.name('id'), row.text('prompt'), safety, '' if label is None else label)

  found = tables.read_rows(path, ('id', 'prompt'), parse)
  sources.check_ids(found, path)
  return found


def _prompt(name: str, text: str, safety: schema.SafetyConfig, label: str) -> Prompt:
  return Prompt(name, (schema.Message('user', text),), safety, label)
