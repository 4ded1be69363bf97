"""The online loop: rollout, score, advantage, update, log; and resume.

A step draws num_generations completions of each of num_prompts prompts, and
updates the policy num_iterations times with all of them. What is drawn depends
on the seed, the step and the policy only, so that a run that was killed goes on
as if it had not been.

Axes: N samples of a step.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from csrm_jax.core import (
  checkpoint,
  mesh as mesh_lib,
  preemption,
  profiling,
  remote,
  tree,
  writer as writer_lib,
)
from csrm_jax.models.config import ModelConfig
from csrm_jax.rl import algorithms, logs, objectives, rewards, rollout
from csrm_jax.rl.job import Job, Progress, Settings
from csrm_jax.safety.schema import Prompt, Sample
from csrm_jax.train import loop, step as training

# Between updates of a progress bar; a log file needs few of its lines.
BAR_INTERVAL_S = 1.0 if sys.stderr.isatty() else 10.0


def train(
  job: Job, state: training.TrainState, earlier_s: float = 0.0, setup_s: float = 0.0
) -> tuple[training.TrainState, Progress]:
  """Returns the state and progress at the end, resuming if it can.

  Args:
    job: what to do.
    state: of a fresh run, on the mesh.
    earlier_s: that earlier starts of the run took.
    setup_s: that this one has taken so far.

  Raises:
    ValueError: a reward, loss or gradient is not finite; nothing of that step
      is saved.
    preemption.Stopped: by SIGTERM, after a save.
  """
  settings, start, log_state = job.settings, 0, None
  progress = Progress(job.objective.kl_coef)
  with checkpoint.Checkpoints(job.workdir / 'checkpoints') as saved:
    restored = saved.restore_latest(mesh_lib.abstract(state, job.mesh))
    if restored is not None:
      start, state, carried = restored
      log_state = carried.pop('window', None)
      progress = Progress.from_dict(carried)
    table = logs.Table(job.workdir / 'samples.jsonl', start)
    looks = logs.Table(job.workdir / 'looks.jsonl', start if restored else -1)
    if restored is None:
      _look(job, state, 0, looks)
    log = loop.Window(earlier_s, setup_s, log_state)
    with (
      preemption.watch() as asked,
      profiling.trace(settings.profile, job.workdir / 'profile') as done,
      writer_lib.MetricsWriter(job.workdir, resume_step=start if restored else -1) as writer,
    ):
      done(start, state)
      for step in _bar(start, 0 if progress.stopped else settings.num_steps):
        state, metrics, rows = _step(job, state, progress, step)
        log.add(metrics)
        done(step, state)
        if settings.samples_every and step % settings.samples_every == 0:
          table.write(rows)
        _look(job, state, step, looks)
        stop, last = asked(step), step == settings.num_steps
        if step % settings.log_every == 0 or last:
          values = logs.renamed(log.close()) | {'kl/coef': progress.kl_coef}
          writer.write(step, values)
          progress.stopped = _why_stop(settings, progress, values)
        last = last or bool(progress.stopped)
        if step % settings.checkpoint_every == 0 or last or stop:
          with log.span('checkpoint'):
            writer.flush()
            remote.push(job.workdir)
            saved.save(step, state, progress.to_dict() | {'window': log.get_state()}, job.meta)
        if stop:
          raise preemption.Stopped(step)
        if progress.stopped:
          break
  if progress.stopped:
    print(f'stopped early: {progress.stopped}', file=sys.stderr)
  return state, progress


def make_loss_fn(
  policy: rollout.Policy,
  objective: objectives.Objective,
  temperature: float,
  value_clip: float | None = None,
  vf_coef: float = 0.0,
) -> training.LossFn:
  """Returns (params, batch) -> (total, weight, metrics), for the train step.

  Args:
    policy: what is trained.
    objective: of its log-probabilities.
    temperature: they are taken at, as in sampling.
    value_clip: of values, where params have a value head.
    vf_coef: weight of their loss.
  """

  def loss_fn(params, batch):
    out = rollout.logprobs(policy.model, params, batch, temperature)
    total, weight, metrics = objectives.policy_loss(out['logprobs'], batch, objective)
    if 'values' in out:
      loss, _, more = objectives.value_loss(  # its weight is the same
        out['values'], batch, value_clip, objective
      )
      total, metrics = total + vf_coef * loss, metrics | more
    return total, weight, metrics

  return loss_fn


def choose_prompts(prompts: Sequence[Prompt], num: int, seed: int, step: int) -> list[Prompt]:
  """Returns the prompts of step 1, 2, …: all of them once an epoch."""
  places = np.arange((step - 1) * num, step * num)
  orders = {
    epoch: _rng(seed, epoch, 'prompts').permutation(len(prompts))
    for epoch in np.unique(places // len(prompts)).tolist()
  }
  return [prompts[orders[i // len(prompts)][i % len(prompts)]] for i in places.tolist()]


def _rng(seed: int, step: int, use: str) -> np.random.Generator:
  return np.random.default_rng((seed, step, *use.encode()))


def _step(
  job: Job, state: training.TrainState, progress: Progress, step: int
) -> tuple[training.TrainState, list[dict[str, Any]], list[dict]]:
  """Returns (state, metrics of rollout and updates, lines of the table)."""
  settings, times = job.settings, [time.perf_counter()]
  samples, rows = _rollout(job, state, step)
  times.append(time.perf_counter())
  totals, parts = job.reward_fn(samples)
  totals = rewards.check_rewards(totals, samples, 'reward')
  times.append(time.perf_counter())
  measured = logs.reward_metrics(totals, parts, settings.num_generations)
  measured |= logs.completion_metrics(samples)
  if settings.normalise_rewards:
    progress.normaliser = progress.normaliser.update(totals)
  batch = _make_batch(job, state, rows, samples, totals, progress)
  if settings.rollout_dtype:
    measured |= logs.gap_metrics(
      batch['old_logprobs'], rows['rollout_logprobs'], rows['completion_mask']
    )
  updates = []
  for chosen in _mini_batches(settings, step):
    part = {name: x[chosen] for name, x in batch.items()}
    state, metrics = job.step_fn(state, mesh_lib.to_global(part, job.mesh), job.frozen or None)
    updates.append((part, metrics))
  _check_finite(updates, job.workdir, step)
  times.append(time.perf_counter())
  names = ('rollout', 'reward', 'update')
  spans = dict(zip(names, np.diff(times).tolist(), strict=True))
  measured |= {f'time/{name}_s': span for name, span in spans.items()}
  measured['time/tokens_per_s'] = sum(sample.num_tokens for sample in samples) / spans['rollout']
  table = logs.table_rows(step, samples, totals, parts, settings.num_samples)
  return state, [measured, *(metrics for _, metrics in updates)], table


def _look(job: Job, state: training.TrainState, step: int, table: logs.Table) -> None:
  """Adds metrics of held-out prompts to looks.jsonl, where it is time to."""
  every = job.settings.look_every
  if job.look_fn is None or not every or step % every:
    return
  metrics = job.look_fn(job.policy.model, tree.merge(job.frozen, state.params))
  table.write([{'step': step, 'metrics': metrics}])


def _rollout(
  job: Job, state: training.TrainState, step: int
) -> tuple[list[Sample], dict[str, np.ndarray]]:
  settings = job.settings
  model, params = rollout.sampling_copy(
    job.policy.model,
    tree.merge(job.frozen, state.params),
    settings.rollout_dtype,
    job.sampling_mesh,
  )
  prompts = choose_prompts(job.prompts, settings.num_prompts, settings.seed, step)
  return rollout.rollout(
    dataclasses.replace(job.policy, model=model),
    params,
    prompts,
    settings.sampling,
    settings.num_generations,
    int(_rng(settings.seed, step, 'rollout').integers(2**32)),
  )


def _make_batch(
  job: Job,
  state: training.TrainState,
  rows: dict[str, np.ndarray],
  samples: Sequence[Sample],
  totals: np.ndarray,
  progress: Progress,
) -> dict[str, np.ndarray]:
  """Returns what the updates of a step learn from; adapts kl_coef."""
  settings = job.settings
  if settings.rollout_dtype or job.algorithm.needs_values:
    params = tree.merge(job.frozen, state.params)
    old = _logprobs(job, job.policy.model, params, rows)
  else:  # the sampler has the same weights and the same function
    old = {'logprobs': rows['rollout_logprobs']}
  reference = _logprobs(job, *job.reference, rows)['logprobs']
  batch = {name: x for name, x in rows.items() if name != 'rollout_logprobs'}
  if settings.mask_truncated:
    stopped = np.array([sample.stopped for sample in samples])
    batch['completion_mask'] = rows['completion_mask'] * stopped[:, None]
  if settings.normalise_rewards:
    totals = progress.normaliser.apply(totals)
  kl = old['logprobs'] - reference
  in_reward = job.objective.kl_place == 'reward'
  estimate = {
    'rewards': totals,
    'completion_mask': batch['completion_mask'],
    'kl_penalty': np.float32(progress.kl_coef * in_reward) * kl,
  } | ({'old_values': old['values']} if 'values' in old else {})
  found = _advantages(
    job.algorithm.advantage, settings.num_generations, settings.gamma, settings.lam, estimate
  )
  if settings.kl_target is not None:
    mask = rows['completion_mask']
    k3 = objectives.kl_estimate(old['logprobs'], reference, 'k3')
    progress.kl_coef = algorithms.adaptive_kl(
      progress.kl_coef,
      float((k3 * mask).sum() / mask.sum()),
      settings.kl_target,
      settings.kl_horizon,
      len(samples),
    )
  batch |= {'old_logprobs': old['logprobs'], 'ref_logprobs': reference}
  batch |= {name: np.asarray(x) for name, x in found.items()}
  if 'values' in old:
    batch['old_values'] = old['values']
  return batch


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _advantages(fn, num_generations, gamma, lam, batch):
  return fn(batch, num_generations, gamma, lam)


def _logprobs(
  job: Job, model: ModelConfig, params: Any, rows: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns rollout.logprobs, as many rows at a time as in an update."""
  inputs = {name: rows[name] for name in ('tokens', 'positions', 'segment_ids', 'completion_mask')}
  settings, parts = job.settings, []
  for start in range(0, settings.num_rows, settings.chunk):
    chunk = {name: x[start : start + settings.chunk] for name, x in inputs.items()}
    parts.append(
      rollout.logprobs(
        model, params, mesh_lib.to_global(chunk, job.mesh), settings.sampling.temperature
      )
    )
  parts = jax.device_get(parts)
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _mini_batches(settings: Settings, step: int) -> Iterator[np.ndarray]:
  """Yields the rows of each update of a step."""
  num = settings.num_mini_batches
  for iteration in range(settings.num_iterations):
    order = np.arange(settings.num_rows)
    if num > 1:
      rng = _rng(settings.seed, step, f'mini batches {iteration}')
      order = rng.permutation(order)
    yield from np.split(order, num)


def _check_finite(
  updates: Sequence[tuple[dict[str, np.ndarray], dict]], workdir: pathlib.Path, step: int
) -> None:
  """Waits for the updates, and stops at the first that was not applied."""
  for batch, metrics in updates:
    if float(metrics['train/finite']) > 0:
      continue
    path = workdir / f'nonfinite_step_{step}.npz'
    np.savez(path, **batch)
    raise ValueError(
      f'step {step}: the loss or a gradient is not finite; its batch is in '
      f'{path}. Lower optim.lr or look at that batch, then run again: the '
      'last checkpoint is intact.'
    )


def _why_stop(settings: Settings, progress: Progress, values: Mapping[str, float]) -> str:
  """Returns why the run ends after this log line, or ''; keeps the best."""
  reward = values['reward/mean']
  kl = values.get('kl/ref', 0.0)  # absent where no completion counted
  if settings.stop_kl is not None and kl > settings.stop_kl:
    return f'kl/ref {kl:.4g} is above stop.kl={settings.stop_kl}'
  best = reward if progress.best_reward is None else progress.best_reward
  progress.best_reward = max(best, reward)
  drop = settings.stop_reward_drop
  if drop is not None and reward < best - drop:
    return (
      f'reward/mean {reward:.4g} is more than stop.reward_drop={drop} below its best, {best:.4g}'
    )
  return ''


def _bar(start: int, num_steps: int) -> Iterator[int]:
  """Yields the steps to do, behind a progress bar."""
  with tqdm.tqdm(
    total=num_steps,
    initial=start,
    desc='align',
    unit='step',
    dynamic_ncols=True,
    mininterval=BAR_INTERVAL_S,
  ) as bar:
    for step in range(start + 1, num_steps + 1):
      yield step
      bar.update()
