"""Trains a configurable safety reward model, evaluates it and reports."""

from __future__ import annotations

import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import ml_collections

from csrm_jax import reward_model, scoring, training
from csrm_jax.core import mesh as mesh_lib
from csrm_jax.core import tree
from csrm_jax.data import features, mixture, packing, pipeline
from csrm_jax.evals import report
from csrm_jax.models import config as model_config
from csrm_jax.models import hf, transformer
from csrm_jax.runners import evaluation
from csrm_jax.runners import loop as loop_lib
from csrm_jax.runners import show_tokens as show_tokens_lib
from csrm_jax.safety import templates
from csrm_jax.text import tokenizer as tokenizer_lib


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Trains from the base weights, evaluates, writes workdir/report."""
  if evaluation.show_finished(workdir):
    return
  start = time.monotonic()
  tokenizer = tokenizer_lib.load_tokenizer(config.tokenizer)
  spec = _make_spec(config, tokenizer)
  parts, held_out = _read_data(config)
  evaluation.check_lengths(
      held_out, features.Encoder(tokenizer, spec.max_length, spec.layout))
  batches = _make_batches(config, tokenizer, spec.layout, parts)
  mesh = mesh_lib.make_mesh(**config.mesh)
  optimizer = training.make_optimizer(
      config.optim.lr, warmup_steps=config.optim.warmup_steps,
      num_steps=config.num_steps, b1=config.optim.b1, b2=config.optim.b2,
      weight_decay=config.optim.weight_decay,
      clip_norm=config.optim.clip_norm,
      end_lr_fraction=config.optim.end_lr_fraction)
  state = training.init_state(_init_params(config, spec.model), optimizer)
  shardings = mesh_lib.shardings(state, mesh)
  state = jax.device_put(state, shardings)
  step_fn = training.make_train_step(
      scoring.make_loss_fn(spec.model, spec.verbalizers(tokenizer),
                           config.loss.gamma, config.loss.margin),
      optimizer, config.optim.num_microbatches, shardings)
  # Data of which nothing fits ends here, before anything is written.
  first = batches.get_state()
  next(batches)
  batches.set_state(first)
  reward_model.save_tokenizer(config.tokenizer, workdir)
  setup_s = time.monotonic() - start
  with jax.set_mesh(mesh):
    loop = loop_lib.LoopConfig(config.num_steps, config.log_every,
                               config.checkpoint_every)
    state = loop_lib.train(
        loop_lib.Job(step_fn, batches, mesh, workdir, loop, spec.to_dict()),
        state)
  num_examples = batches.num_atoms
  batches.close()
  start = time.monotonic()
  trained_s = setup_s + loop_lib.elapsed_s(workdir)
  results = evaluation.evaluate(
      spec.make_score_fn(state.params, tokenizer),
      evaluation.test_sets(config.eval, held_out),
      rules_blind=config.data.rules_blind)
  summary = report.summarise(results) | {
      'time_s': trained_s + time.monotonic() - start,
      'time_train_s': trained_s,
      'peak_memory_bytes': _peak_memory_bytes(),
      'num_examples': num_examples,
      'num_params': tree.num_params(state.params),
      'num_steps': config.num_steps,
  }
  evaluation.write(workdir, results, summary, title=config.title)


def show_tokens(config: ml_collections.ConfigDict) -> None:
  """Prints the prompt of the first item that training would see."""
  tokenizer = tokenizer_lib.load_tokenizer(config.tokenizer)
  layout = _make_spec(config, tokenizer).layout
  encoder = _make_encoder(config, tokenizer, layout)
  augment_fn, seen = _make_augment(config), []

  def remember(item, rng):
    seen.append(augment_fn(item, rng))
    return seen[-1]

  _make_atoms(config, encoder, _read_data(config)[0], remember)[0]
  show_tokens_lib.show(seen[0], encoder)


def _make_spec(config: ml_collections.ConfigDict,
               tokenizer: tokenizer_lib.Tokenizer) -> reward_model.Spec:
  cfg = model_config.preset(config.model.preset, tokenizer.vocab_size,
                            **config.model.overrides)
  layout = templates.Layout(
      order=config.template.order, words=tuple(config.template.words))
  spec = reward_model.Spec(
      model=cfg, layout=layout,
      max_length=config.data.max_length,
      safe_words=tuple(config.template.safe_words),
      unsafe_words=tuple(config.template.unsafe_words),
      template_hash=templates.template_hash(layout),
      tokenizer_digest=tokenizer.digest)
  spec.verbalizers(tokenizer)  # an error here beats one after an hour
  return spec


def _read_data(config: ml_collections.ConfigDict
               ) -> tuple[dict[str, Any], dict[str, Any]]:
  parts, held_out = {}, {}
  for name, part in config.data.parts.items():
    parts[name], held_out[name] = mixture.read_part(
        part.source, part.path, config.seed, config.eval.fraction)
  return parts, {name: items for name, items in held_out.items() if items}


def _make_batches(config: ml_collections.ConfigDict,
                  tokenizer: tokenizer_lib.Tokenizer,
                  layout: templates.Layout,
                  parts: dict[str, Any]) -> pipeline.BatchIterator:
  data = config.data
  atoms = _make_atoms(config, _make_encoder(config, tokenizer, layout), parts,
                      _make_augment(config))
  shape = packing.BatchShape(data.batch_size, data.row_length,
                             data.max_segments, tokenizer.pad_id)
  identity = {
      'data': {**data.to_dict(), 'parts': {
          name: [part.source, part.weight, len(parts[name])]
          for name, part in data.parts.items()}},
      'seed': config.seed, 'tokenizer': tokenizer.digest,
      'template': templates.template_hash(layout)}
  return pipeline.batches(atoms, shape,
                          fingerprint=json.dumps(identity, sort_keys=True))


def _make_encoder(config: ml_collections.ConfigDict,
                  tokenizer: tokenizer_lib.Tokenizer,
                  layout: templates.Layout) -> features.Encoder:
  data = config.data
  return features.Encoder(tokenizer, data.max_length, layout, data.row_length,
                          data.label_pairs)


def _make_augment(config: ml_collections.ConfigDict) -> Callable[..., Any]:
  data = config.data
  return mixture.make_augment(data.drop_prob, data.plus_prob, data.minus_prob,
                              data.rules_blind)


def _make_atoms(config: ml_collections.ConfigDict, encoder: features.Encoder,
                parts: dict[str, Any], augment_fn: Callable[..., Any]
                ) -> grain.MapDataset:
  weights = {name: part.weight for name, part in config.data.parts.items()}
  return mixture.make_training_atoms(parts, weights, encoder, config.seed,
                                     augment_fn)


def _init_params(config: ml_collections.ConfigDict,
                 cfg: model_config.ModelConfig) -> Any:
  if not config.model.init:
    return transformer.init_params(cfg, config.seed)
  return hf.load_params(config.model.init, cfg)


def _peak_memory_bytes() -> int:
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024  # Linux: KiB
