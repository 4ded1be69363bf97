"""The programs that a run calls on its devices, with the shapes of their arguments."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.data import features
from csrm_jax.models import config as model_config, hf, lora, sampling as sampling_lib, transformer
from csrm_jax.reward import heads, plans, scoring
from csrm_jax.rl import algorithms, online
from csrm_jax.runners import align, train_rm
from csrm_jax.safety import templates
from csrm_jax.text import tokenizer as tokenizer_lib

# Any ids will do: a program's shape does not depend on which tokens they are.
VERBALIZERS = templates.Verbalizers(safe=(1,), unsafe=(2,))
_ROW = ('tokens', 'positions', 'segment_ids')


@dataclasses.dataclass(frozen=True)
class Program:
  """A function that a run calls on its devices; arrays are given as shapes."""

  fn: Callable[..., Any]  # jitted
  args: tuple[Any, ...]  # shapes with their shardings
  mesh: jax.sharding.Mesh
  params: Any  # the parameters that it computes with
  tokens: int  # how many tokens a call reads or adds
  judged: int = 0  # tokens of all prompts together, where they share some of those that are read
  opt_state: Any = ()
  cache: Any = ()  # keys and values, which each turn reads again, beside params
  beside: Any = ()  # what the run holds in memory for its other programs at the same time
  calls: int = 1  # how often a step of the run calls it
  turns: int = 0  # how often its loop over tokens turns; 0 where it has no loop


def named(
  config: ml_collections.ConfigDict, devices: Sequence[Any]
) -> dict[str, Callable[[], Program]]:
  """Returns the programs of config.run: name -> a function that makes it.

  `config` is made by configs/compile.py; `devices` may be descriptions of devices.
  """
  match config.run.runner:
    case 'train_rm':
      return _of_reward_model(config, devices)
    case 'align':
      return _of_alignment(config, devices)
  raise ValueError(
    f'target: runner {config.run.runner!r} cannot be compiled; give configs/rm.py or configs/rl.py'
  )


def model_of(config: ml_collections.ConfigDict) -> model_config.ModelConfig:
  """Returns the shape of the model that config.run trains."""
  run = config.run
  if run.runner == 'train_rm':
    tok = run.tokenizer and tokenizer_lib.load_tokenizer(run.tokenizer)
    vocab_size = tok.vocab_size if tok else 0
    model = model_config.preset(run.model.preset, vocab_size, **run.model.overrides)
  elif config.policy:
    model = model_config.preset(config.policy, 0, **run.policy.overrides)
  else:
    model = hf.load_config(run.policy.init, **run.policy.overrides)
  return _cut(config, model)


def _cut(config, model):
  """Returns the model with config.num_layers layers; 0 keeps all."""
  return dataclasses.replace(model, num_layers=config.num_layers or model.num_layers)


# --- Training a reward model -----------------------------------------------------------


def _of_reward_model(config, devices):
  run, model = config.run, model_of(config)
  mesh = mesh_lib.make_mesh(**run.mesh, devices=devices)

  def train():
    data, shapes = run.data, transformer.shapes(model)
    shape = features.BatchShape(
      data.batch_size, data.row_length, data.max_segments, share_prefix=data.share_prefix
    )
    batch, _ = features.pack_rows([], shape)
    trained, frozen = lora.split(shapes) if model.lora_rank else (shapes, {})
    trained = trained | heads.shapes(run.model.head, model)
    fn, state = train_rm.make_step(run, model, VERBALIZERS, trained, mesh)
    args = (state, mesh_lib.abstract_batch(batch, mesh), mesh_lib.abstract(frozen, mesh))
    judged = _num_judged(config) if data.share_prefix else 0
    return Program(fn, args, mesh, state.params, batch['tokens'].size, judged, state.opt_state)

  return {
    'train': train,
    'score': lambda: _score(model, mesh, run.data.batch_size, run.data.row_length),
  }


def _num_judged(config):
  """Returns the tokens of all prompts in a step, given the lengths that the config assumes."""
  data, shared, own = config.run.data, config.prefix_length, config.branch_length
  num = min(max(data.row_length - shared, 0) // own, data.max_segments)
  return data.batch_size * num * (shared + own)


def _score(model, mesh, rows, length, beside=(), calls=1):
  """Returns the program that scores rows, one prompt each."""
  batch = {name: np.zeros((rows, length), np.int32) for name in _ROW}
  batch['verdict_index'] = np.zeros((rows, 1), np.int32)
  params = mesh_lib.abstract(transformer.shapes(model), mesh)
  return Program(
    scoring.make_score_step(model, VERBALIZERS),
    (params, mesh_lib.abstract_batch(batch, mesh)),
    mesh,
    params,
    rows * length,
    beside=beside,
    calls=calls,
  )


# --- Aligning a policy: a step calls these ---------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Alignment:
  """What a run of alignment holds from its beginning to its end."""

  config: ml_collections.ConfigDict
  row: algorithms.Algorithm
  model: model_config.ModelConfig
  mesh: jax.sharding.Mesh
  sampling_mesh: jax.sharding.Mesh
  step_fn: Callable[..., Any]
  state: Any
  base: Any
  judge: model_config.ModelConfig | None  # a reward model
  judge_params: Any

  @property
  def run(self):
    return self.config.run

  @property
  def frozen(self):
    """The parameters under adapters: a train step holds the reference's already."""
    return self.base if self.model.lora_rank else {}

  @property
  def reference(self):
    """The reference's parameters, where they lie under no adapters."""
    return () if self.model.lora_rank else self.base


def _of_alignment(config, devices):
  held = _hold(config, devices)
  makers = {
    'prefill': _prefill,
    'decode': _decode,
    'logprobs': _logprobs,
    'update': _update,
    'score': _score_samples,
  }
  return {name: functools.partial(make, held) for name, make in makers.items()}


def _hold(config, devices):
  run, row = config.run, algorithms.get(config.run.algorithm)
  if not row.online:
    raise ValueError(
      f'algorithm={run.algorithm} has no rollouts in its steps; what is compiled are steps of an '
      'online algorithm, such as reinforce_pp'
    )
  model = model_of(config)
  online.check(run)
  mesh, sampling_mesh = align.make_meshes(run, devices)
  policy = online.Policy(model, None, ('', ''))  # no tokenizer, no marks: programs read ids only
  trained = base = transformer.shapes(model)
  if model.lora_rank:
    trained, base = lora.split(base)
  if row.needs_values:
    trained = trained | jax.eval_shape(lambda: online.init_value_head(model))
  step_fn, state = align.make_step(run, policy, trained, mesh)
  judge, judge_params = None, {}
  if config.reward_model and run.reward.name == 'csrm':
    judge = _cut(config, model_config.preset(config.reward_model, 0, dtype=model.dtype, unroll=1))
    judge_params = mesh_lib.abstract(transformer.shapes(judge), mesh)
  base = mesh_lib.abstract(base, mesh)
  return _Alignment(
    config, row, model, mesh, sampling_mesh, step_fn, state, base, judge, judge_params
  )


def _drawing(held):
  """Returns (both functions of sampling, their arguments, rows drawn, fields of a Program)."""
  run, model, mesh = held.run, held.model, held.sampling_mesh
  drawn = online.sampling_model(model, run.rollout.dtype)
  params = mesh_lib.abstract(transformer.shapes(drawn), mesh)
  parts = math.prod(mesh.shape[name] for name in mesh_lib.ROWS)
  num = online.num_rows(run)
  rows = sampling_lib.num_rows(num, online.MAX_ROWS * parts)
  # Equal prompts are read once, so the number that differ decides the shapes.
  length = held.config.prompt_length
  prompts = [(1 + i // run.rollout.num_generations,) * length for i in range(rows)]
  whole = mesh_lib.replicated(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    for name, x in sampling_lib.pad_prompts(prompts, rows, 0, drawn).items()
  }
  batch['draw'] = jax.ShapeDtypeStruct((rows,), jnp.uint32, sharding=whole)
  seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
  # A sampler holds the weights twice: as they are trained, and each layer's apart.
  beside = [held.state.opt_state, held.base, held.judge_params]
  if drawn != model or mesh != held.mesh:  # the draws read a copy of the weights
    beside.append(held.state.params)
  functions = sampling_lib.compiled(drawn, align.make_sampling(run, (1,)))
  fields = {'mesh': mesh, 'calls': -(-num // rows), 'beside': beside}
  return functions, (params, batch, None, seed), rows, fields


def _prefill(held):
  (start, _), args, _, fields = _drawing(held)
  params, batch, *_ = args
  fields['beside'].append(transformer.unstacked_shapes(params)['layers'])
  return Program(start, args, params=params, tokens=batch['tokens'].size, **fields)


def _decode(held):
  (start, go_on), args, rows, fields = _drawing(held)
  mesh, length = held.sampling_mesh, held.run.sampling.max_completion_length
  with jax.set_mesh(mesh):
    cache, rest = jax.eval_shape(start, *args)
    slots = cache['positions'].shape[1] + length - 1
    cache = jax.eval_shape(lambda cache: transformer.resize(cache, slots), cache)

  def place(x, *spec):
    spec = mesh_lib.fit(jax.P(*spec), x.shape, mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

  heads = {name: tuple(place(x, *mesh_lib.CACHE) for x in cache[name]) for name in ('key', 'value')}
  cache = {
    'positions': place(cache['positions'], mesh_lib.ROWS),
    'length': place(cache['length']),
  } | heads
  rest = {name: place(x, mesh_lib.ROWS) for name, x in rest.items()}
  limit = place(jax.ShapeDtypeStruct((), jnp.int32))
  params = transformer.unstacked_shapes(args[0])
  fields['beside'].append(args[0]['layers'])
  return Program(
    go_on,
    (params, cache, rest, args[3], limit, limit),
    params=params,
    tokens=rows * length,
    cache=heads,
    turns=length - 1,
    **fields,
  )


def _rows(held, num):
  """Returns rows of the shapes that online.make_rows gives the longest prompts."""
  length = held.run.sampling.max_completion_length
  width = length + sampling_lib.prompt_bucket(held.model, held.config.prompt_length)
  rows = {name: np.zeros((num, width), np.int32) for name in _ROW}
  return rows | {'completion_mask': np.zeros((num, length), np.float32)}


def _logprobs(held):
  """Returns the program of the policy's log-probabilities; the reference's is about the same."""
  run, model, mesh = held.run, held.model, held.mesh
  size = online.chunk(run)
  rows = _rows(held, size)
  params = mesh_lib.abstract(transformer.shapes(model), mesh) if held.frozen else held.state.params
  fn = jax.jit(lambda params, rows: online.logprobs(model, params, rows, run.sampling.temperature))
  # For the policy only where the sampler's own will not do: its weights are rounded, or a
  # critic's values are needed.
  times = online.needs_reference(run) + bool(run.rollout.dtype or held.row.needs_values)
  return Program(
    fn,
    (params, mesh_lib.abstract_batch(rows, mesh)),
    mesh,
    params,
    rows['tokens'].size,
    beside=[held.state.opt_state, held.reference, held.judge_params],
    calls=times * online.num_rows(run) // size,
  )


def _update(held):
  run, loss, state = held.run, held.run.loss, held.state
  rows = _rows(held, online.num_rows(run) // loss.num_mini_batches)
  scores = rows['completion_mask']
  batch = rows | {'old_logprobs': scores}
  if online.needs_reference(run):
    batch['ref_logprobs'] = scores
  estimate = {'rewards': scores[:, 0], 'completion_mask': scores, 'kl_penalty': scores}
  if held.row.needs_values:
    batch['old_values'] = estimate['old_values'] = scores
  found = jax.eval_shape(
    lambda batch: held.row.advantage(batch, run.rollout.num_generations, loss.gamma, loss.lam),
    estimate,
  )
  batch |= {name: np.zeros(x.shape, x.dtype) for name, x in found.items()}
  return Program(
    held.step_fn,
    (state, mesh_lib.abstract_batch(batch, held.mesh), held.frozen or None),
    held.mesh,
    state.params,
    rows['tokens'].size,
    opt_state=state.opt_state,
    beside=[held.reference, held.judge_params],
    calls=loss.num_iterations * loss.num_mini_batches,
  )


def _score_samples(held):
  run, mesh, length = held.run, held.mesh, held.config.score_length
  if held.judge is None:
    raise ValueError(
      f"reward={run.reward.name} is computed by no model; leave 'score' out of config.programs"
    )
  parts = math.prod(mesh.shape[name] for name in mesh_lib.ROWS)
  num, most = online.num_rows(run), plans.most_rows(plans.CALL_TOKENS['other'] * parts, length)
  rows = sampling_lib.num_rows(num, most)
  beside, calls = [held.state, held.base], -(-num // rows)
  return _score(held.judge, mesh, rows, length, beside=beside, calls=calls)
