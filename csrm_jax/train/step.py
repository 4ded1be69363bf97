"""One train step for every loss: accumulate, divide once, clip, update."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from csrm_jax.core import checks, mesh as mesh_lib, tree

OPTIMIZERS = ('adamw', 'muon')

LossFn = Callable[[Any, Any], tuple[jax.Array, jax.Array, dict[str, Any]]]
# (state, batch[, frozen]) -> (state, metrics), see make_train_step.
StepFn = Callable[..., tuple['TrainState', dict[str, Any]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state that a step reads and writes; checkpoints hold exactly this pytree."""

  step: jax.Array  # int32 [], number of updates applied
  params: Any  # nested dict of arrays
  opt_state: Any


def make_schedule(
  learning_rate: float, warmup_steps: int, num_steps: int, end_lr_fraction: float
) -> optax.Schedule:
  """Returns step -> learning rate: linear warm-up, then cosine decay.

  It reaches learning_rate after warmup_steps updates, and end_lr_fraction of it after num_steps.
  """
  if not 0 <= warmup_steps < num_steps:
    raise ValueError(
      f'warmup_steps={warmup_steps} must be at least 0 and less than '
      f'num_steps={num_steps}; shorten the warm-up or train longer.'
    )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    # From 1, not 0: the first update must count.
    warmup = (step + 1) / max(warmup_steps, 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    decay = end_lr_fraction + (1 - end_lr_fraction) * cosine
    return learning_rate * jnp.where(step < warmup_steps, warmup, decay)

  return schedule


def make_optimizer(
  num_steps: int,
  *,
  lr: float,
  warmup_steps: int,
  b1: float,
  b2: float,
  weight_decay: float,
  clip_norm: float | None,
  end_lr_fraction: float,
  optimizer: str = 'adamw',
) -> optax.GradientTransformation:
  """Returns AdamW, or Muon, with clipping by global norm and a warm-up-cosine schedule.

  Weight decay is decoupled, and leaves norm scales alone. clip_norm=None switches clipping off.
  Muon (Jordan et al., 2024) orthogonalises the updates of the layers' kernels, at the root mean
  square that Adam's have (arXiv 2502.16982), so that one learning rate fits all; other parameters
  have NAdam's.
  """
  checks.one_of('optim.optimizer', optimizer, OPTIMIZERS)
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f'clip_norm={clip_norm} must be positive; None switches clipping off.')
  schedule = make_schedule(lr, warmup_steps, num_steps, end_lr_fraction)
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  if optimizer == 'muon':
    # The rate of -1 leaves the rate and its sign to the last transformation of the chain.
    scale = optax.contrib.muon(
      -1.0, adam_b1=b1, adam_b2=b2, consistent_rms=0.2, muon_weight_dimension_numbers=_muon_axes
    )
  else:
    scale = optax.scale_by_adam(b1=b1, b2=b2)
  return optax.chain(
    clip,
    scale,
    optax.add_decayed_weights(weight_decay, mask=decay_mask),
    # This keeps the current learning rate in the optimizer's state, where the train step reads
    # it.
    optax.inject_hyperparams(optax.scale_by_learning_rate)(schedule),
  )


def _muon_axes(params: Any) -> Any:
  """Returns a tree like params: the inputs and outputs of kernels of layers, None for others."""

  def axes(path, x):
    keys = [k.key for k in path]
    if 'layers' not in keys or keys[-1] != 'kernel':
      return None
    # Kernels are stacked [L, inputs, outputs]; those of attention's heads have two axes for one.
    middle = 3 if keys[-2] == 'out' and x.ndim == 4 else 2
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, middle)), tuple(range(middle, x.ndim)))

  return jax.tree_util.tree_map_with_path(axes, params)


def decay_mask(params: Any) -> Any:
  """Returns a tree of bools like params: False for norm scales."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != 'scale', params)


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first update."""
  return TrainState(step=jnp.zeros([], jnp.int32), params=params, opt_state=optimizer.init(params))


def make_step(
  loss_fn: LossFn,
  params: Any,
  mesh: jax.sharding.Mesh,
  num_steps: int,
  *,
  num_microbatches: int,
  **optim: Any,
) -> tuple[StepFn, TrainState]:
  """Returns the train step of a run of num_steps updates, and its first state.

  `optim` and num_microbatches are the section config.optim. If params are shapes, the state is
  made of shapes too, and nothing is computed.
  """
  optimizer = make_optimizer(num_steps, **optim)
  init = functools.partial(init_state, optimizer=optimizer)
  shapes = jax.eval_shape(init, params)
  shardings = mesh_lib.shardings(shapes, mesh)
  step_fn = make_train_step(loss_fn, optimizer, num_microbatches, shardings)
  if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
    return step_fn, mesh_lib.abstract(shapes, mesh)
  return step_fn, jax.device_put(init(params), shardings)


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  num_microbatches: int = 1,
  state_shardings: Any = None,
) -> StepFn:
  """Returns step(state, batch, frozen=None) -> (state, metrics), jitted.

  The state is donated. `frozen` are parameters that are not trained, such as the base of LoRA
  adapters: loss_fn gets them merged with state.params, but they have no gradients and no
  optimizer state.

  The result does not depend on the number of microbatches: sums over all of them are divided
  once. If the loss or a gradient is not finite, nothing is updated, not even the step counter,
  and metrics['train/finite'] is 0. The caller has to stop then.

  All metrics stay on the device. Scalars are train/grad_norm (before clipping), train/lr and
  train/finite. train/loss and the metrics of loss_fn are (sum, weight) pairs. mean_metrics turns
  all of them into floats.

  state_shardings is a tree like the state.
  """

  def step(state, batch, frozen=None):
    def whole_loss_fn(params, batch):
      return loss_fn(tree.merge(frozen or {}, params), batch)

    total, weight, metrics, grads = _accumulate(
      whole_loss_fn, state.params, batch, num_microbatches
    )
    # A batch without any weight has zero gradients; 1 / 0 would make them NaN.
    scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    grad_norm = optax.tree.norm(grads)
    # The norm is not finite if any gradient is not.
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = TrainState(state.step + 1, params, opt_state)
    # Chosen on the device: a branch on the host would wait for every step.
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    learning_rate = optax.tree.get(
      opt_state, 'learning_rate', filtering=lambda _, leaf: isinstance(leaf, jax.Array)
    )
    return new, metrics | {
      'train/loss': (total, weight),
      'train/grad_norm': grad_norm,
      'train/lr': learning_rate,
      'train/finite': finite.astype(jnp.float32),
    }

  # If the new state lay elsewhere than the first one, the second step would compile again.
  return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def _accumulate(loss_fn, params, batch, num_microbatches):
  """Returns float32 sums (total, weight, metrics, grads) over microbatches."""

  def compute(batch):
    def scalar_loss(params):
      total, weight, metrics = loss_fn(params, batch)
      return total, (weight, metrics)

    (total, (weight, metrics)), grads = jax.value_and_grad(scalar_loss, has_aux=True)(params)
    # Sums of many microbatches in bfloat16 would lose the small ones.
    return _to_float32((total, weight, metrics, grads))

  if num_microbatches == 1:
    return compute(batch)
  microbatches = jax.tree.map(lambda x: split_microbatches(x, num_microbatches), batch)
  first = jax.tree.map(lambda x: x[0], microbatches)
  # A scan needs sums of known shapes; eval_shape computes nothing.
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, first))

  def add(carry, microbatch):
    return jax.tree.map(jnp.add, carry, compute(microbatch)), None

  return jax.lax.scan(add, zeros, microbatches)[0]


def split_microbatches(x: jax.Array, num: int) -> jax.Array:
  """Returns [num, B/num, ...]; microbatch i holds rows i, i + num, …"""
  if x.shape[0] % num:
    raise ValueError(f'num_microbatches={num} must divide the batch size {x.shape[0]}.')
  # Strided: if rows are sharded over devices, each device keeps its own rows.
  return x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)


def _to_float32(values):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def mean_metrics(steps: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Returns {name: float} over several steps; waits for the device.

  A (sum, weight) pair becomes Σ sum / Σ weight; it is left out if the weights add up to 0. A
  scalar becomes its mean, and train/finite its minimum.
  """
  steps = jax.device_get(list(steps))
  means = {}
  for name in dict.fromkeys(name for step in steps for name in step):
    values = np.asarray([step[name] for step in steps if name in step], np.float64)
    if values.ndim == 1:
      pick = np.min if name == 'train/finite' else np.mean
      means[name] = float(pick(values))
    elif values[:, 1].sum() > 0:
      means[name] = float(values[:, 0].sum() / values[:, 1].sum())
  return means


def keep_freed_memory() -> bool:
  """Makes this process reuse freed memory (glibc only); returns whether that worked."""
  # XLA on CPU allocates its work space anew in each step. By default glibc returns it to the
  # system, and every page is faulted in again: about a third of the time of a small model's
  # step.
  trim_threshold, mmap_max, arena_max = -1, -4, -8  # numbers in malloc.h
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  return all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(arena_max, 1)])
