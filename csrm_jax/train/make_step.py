"""The train step of a run, of its parameters or their shapes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import ml_collections

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.train import step as training


def make(
  optim: ml_collections.ConfigDict,
  num_updates: int,
  loss_fn: training.LossFn,
  params: Any,
  mesh: jax.sharding.Mesh,
) -> tuple[training.StepFn, training.TrainState]:
  """Returns the train step, and the first state; of params' shapes, its shapes.

  Args:
    optim: as in configs/rm.py and configs/rl.py.
    num_updates: of the whole run, for the learning rate.
    loss_fn: what the step minimises.
    params: what is trained of the parameters, or the shapes of it.
    mesh: of the state.
  """
  optimizer = training.make_optimizer(
    optim.lr,
    warmup_steps=optim.warmup_steps,
    num_steps=num_updates,
    b1=optim.b1,
    b2=optim.b2,
    weight_decay=optim.weight_decay,
    clip_norm=optim.clip_norm,
    end_lr_fraction=optim.end_lr_fraction,
  )
  init = functools.partial(training.init_state, optimizer=optimizer)
  shapes = jax.eval_shape(init, params)
  shardings = mesh_lib.shardings(shapes, mesh)
  step_fn = training.make_train_step(loss_fn, optimizer, optim.num_microbatches, shardings)
  if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
    return step_fn, mesh_lib.abstract(shapes, mesh)
  return step_fn, jax.device_put(init(params), shardings)
