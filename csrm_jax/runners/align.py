"""Aligns a policy to rules by reinforcement learning, and reports."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm

from csrm_jax.core import mesh as mesh_lib, tree
from csrm_jax.evals import policy as policy_eval, report
from csrm_jax.models import hf, lora, transformer
from csrm_jax.models.config import ModelConfig
from csrm_jax.models.sampling import Sampling
from csrm_jax.reward import backbone
from csrm_jax.rl import algorithms, job, learner, logs, offline, rollout
from csrm_jax.runners import align_setup, align_step
from csrm_jax.safety.schema import Prompt, Sample
from csrm_jax.train import loop as loop_lib

# Samples of a look at held-out prompts, at most: enough to see a trend.
_NUM_LOOKED_AT = 64


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run has read before it begins.

  Attributes:
    policy: what is trained.
    reference: the unaligned policy: its model, and its parameters on the mesh.
    train: prompts.
    test: held-out prompts.
    scorers: rewards.
    sampling: of completions.
    mesh: of devices.
    sampling_mesh: of the same devices, that completions are drawn on.
    began: time.monotonic() before anything was read.
  """

  policy: rollout.Policy
  reference: tuple[ModelConfig, Any]
  train: Sequence[Prompt]
  test: Sequence[Prompt]
  scorers: align_setup.Scorers
  sampling: Sampling
  mesh: jax.sharding.Mesh
  sampling_mesh: jax.sharding.Mesh
  began: float


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Aligns, compares with the unaligned policy, writes workdir/report."""
  if _show_finished(workdir):
    return
  if jax.process_count() > 1:
    raise ValueError(
      f'{jax.process_count()} processes: alignment runs in one, on all of '
      "its devices; start it once, or give each process's run its --workdir"
    )
  start, earlier_s = time.monotonic(), loop_lib.elapsed_s(workdir)
  algorithm = algorithms.get(config.algorithm)
  align_setup.check_idle(config)
  if algorithm.online:
    # An error here beats one after loading weights.
    align_step.make_objective(config)
  setup = _set_up(config)
  with jax.set_mesh(setup.mesh):
    train = _train_online if algorithm.online else _train_offline
    params, extra = train(config, setup, workdir)
    results, measured = _evaluate(config, setup, params, workdir)
    _export(config, setup, params, workdir)
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


def _set_up(config: ml_collections.ConfigDict) -> Setup:
  began = time.monotonic()
  policy = align_setup.make_policy(config)
  sampling = align_step.make_sampling(config, (policy.tokenizer.eos_id,))
  train, test = align_setup.make_prompts(config)
  # What does not fit ends here, before anything is written.
  policy.encode_all([*train, *test], sampling.max_completion_length)
  mesh, sampling_mesh = align_step.make_meshes(config)
  with jax.set_mesh(mesh):
    scorers = align_setup.make_scorers(config)
  model = dataclasses.replace(policy.model, lora_rank=0)
  shapes = jax.eval_shape(lambda: transformer.init_params(model, 0))
  params = hf.load_params(config.policy.init, model, mesh_lib.shardings(shapes, mesh))
  return Setup(policy, (model, params), train, test, scorers, sampling, mesh, sampling_mesh, began)


def _init_params(
  config: ml_collections.ConfigDict, setup: Setup
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (trained, frozen) parameters of the policy."""
  base = setup.reference[1]
  if setup.policy.model.lora_rank:
    params, frozen = lora.init(setup.policy.model, config.seed), base
  else:
    # A copy: the step donates its state, and the reference stays.
    params, frozen = jax.tree.map(lambda x: x.copy(), base), {}
  if algorithms.get(config.algorithm).needs_values:
    params = params | rollout.init_value_head(setup.policy.model)
  return params, frozen


def _train_online(
  config: ml_collections.ConfigDict, setup: Setup, workdir: pathlib.Path
) -> tuple[Any, dict[str, Any]]:
  """Returns (all parameters of the aligned policy, summary)."""
  settings = align_step.make_settings(config, setup.sampling)
  params, frozen = _init_params(config, setup)
  step_fn, state = align_step.make_step(
    config,
    align_step.make_loss_fn(config, setup.policy, setup.sampling.temperature),
    params,
    setup.mesh,
  )
  work = job.Job(
    setup.policy,
    frozen,
    setup.reference,
    algorithms.get(config.algorithm),
    align_step.make_objective(config),
    setup.train,
    setup.scorers.total,
    step_fn,
    setup.mesh,
    setup.sampling_mesh,
    workdir,
    settings,
    _describe(config, setup),
    _make_look(config, setup),
  )
  state, progress = learner.train(
    work, state, loop_lib.elapsed_s(workdir), time.monotonic() - setup.began
  )
  return rollout.decoder_params(tree.merge(frozen, state.params)), {
    'num_updates': int(state.step),
    'stopped': progress.stopped or None,
  }


def _train_offline(
  config: ml_collections.ConfigDict, setup: Setup, workdir: pathlib.Path
) -> tuple[Any, dict[str, Any]]:
  """Returns (all parameters of the aligned policy, summary)."""
  pairs = config.pairs
  settings = offline.Settings(
    pairs.num_samples, pairs.num_best, pairs.num_parallel, setup.sampling, config.seed
  )
  loss = algorithms.get(config.algorithm).loss
  params, frozen = _init_params(config, setup)
  model, copy = rollout.sampling_copy(*setup.reference, '', setup.sampling_mesh)
  reference = dataclasses.replace(setup.policy, model=model)
  prompts = setup.train[: pairs.num_prompts]
  with tqdm.tqdm(
    total=len(prompts), desc='sample', unit='prompt', mininterval=loop_lib.BAR_INTERVAL_S
  ) as bar:
    completions = offline.sample(
      reference,
      copy,
      prompts,
      setup.scorers.total,
      settings,
      workdir / 'completions.jsonl',
      bar.update,
    )
  rows = offline.make_pairs(
    reference, setup.reference[1], prompts, completions, settings, chunk=2 * pairs.batch_size
  )
  if config.algorithm == 'distillation' and rows['reward'].min() <= 0:
    raise ValueError(
      f'a reward is {rows["reward"].min():.4g}, and distillation takes its '
      'logarithm; use rewards above 0, such as mode=product'
    )
  batches = offline.PairBatches(rows, pairs.batch_size, config.seed)
  step_fn, state = align_step.make_step(
    config,
    offline.make_loss_fn(
      setup.policy, loss, pairs.beta, setup.sampling.temperature, pairs.nll_coef
    ),
    params,
    setup.mesh,
  )
  state = loop_lib.train(
    loop_lib.Supervised(step_fn, batches, setup.mesh, frozen or None),
    state,
    config,
    mesh=setup.mesh,
    workdir=workdir,
    meta=_describe(config, setup),
    setup_s=time.monotonic() - setup.began,
  )
  found = offline.describe(completions, rows)
  return tree.merge(frozen, state.params), {f'pairs/{name}': value for name, value in found.items()}


def _describe(config: ml_collections.ConfigDict, setup: Setup) -> dict[str, Any]:
  """Returns what a checkpoint says of itself."""
  return {
    'policy': setup.policy.model.to_dict(),
    'marks': list(setup.policy.marks),
    'tokenizer_digest': setup.policy.tokenizer.digest,
    'init': str(config.policy.init),
  }


def _make_look(config: ml_collections.ConfigDict, setup: Setup) -> job.LookFn:
  """Returns parameters -> metrics of held-out prompts, as in evals.policy."""
  judges = setup.scorers.judges(config.data.source == 'ruleworld')
  prompts = setup.test[:_NUM_LOOKED_AT]

  def look(model: ModelConfig, params: Any) -> dict[str, Any]:
    samples = _answer(setup, model, params, prompts)
    return policy_eval.measured(policy_eval.judge(samples, judges))

  return look


def _answer(
  setup: Setup, model: ModelConfig, params: Any, prompts: Sequence[Prompt], num: int = 1
) -> list[Sample]:
  """Returns `num` samples of each prompt; the same seed for all policies."""
  model, params = rollout.sampling_copy(model, params, '', setup.sampling_mesh)
  policy = dataclasses.replace(setup.policy, model=model)
  samples, _ = rollout.rollout(policy, params, prompts, setup.sampling, num, seed=0)
  return samples


def _evaluate(
  config: ml_collections.ConfigDict, setup: Setup, params: Any, workdir: pathlib.Path
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (results of the report, {policy: its metrics})."""
  print('evaluating', file=sys.stderr)
  judges = setup.scorers.judges(config.data.source == 'ruleworld')
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
  history = logs.read_looks(workdir / 'looks.jsonl')
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
  """Returns {'aligned/true_cosa': value, …} with intervals."""
  flat = {}
  for policy, found in measured.items():
    for name, metric in found.items():
      key = f'{policy.replace(" ", "_")}/{name}'
      flat[key] = metric['value']
      flat[f'{key}_low'], flat[f'{key}_high'] = metric['low'], metric['high']
  return flat


def _export(
  config: ml_collections.ConfigDict, setup: Setup, params: Any, workdir: pathlib.Path
) -> None:
  """Writes workdir/policy, in Hugging Face's form, for the next run or user."""
  model, merged = rollout.sampling_copy(setup.policy.model, params, '', setup.mesh)
  hf.save(
    workdir / 'policy',
    model,
    merged,
    metadata={'made_by': f'csrm_jax, algorithm {config.algorithm}'},
  )
  backbone.save_tokenizer(config.policy.tokenizer or config.policy.init, workdir / 'policy')


def _show_finished(workdir: pathlib.Path) -> bool:
  path = workdir / 'report' / 'summary.json'
  if not path.is_file():
    return False
  _print_table(json.loads(path.read_text()))
  print(f'{workdir} is finished; remove its report/ to evaluate again')
  return True


def _print_table(summary: dict[str, Any]) -> None:
  """Prints what a run ends with: a row a metric, a column a policy."""
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
