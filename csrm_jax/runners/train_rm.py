"""Trains a configurable safety reward model, evaluates it, and writes a report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import ml_collections

from csrm_jax import config as config_lib
from csrm_jax.core import checks, files, mesh as mesh_lib, tree
from csrm_jax.data import (
  catalogue,
  domain as domain_lib,
  draws,
  features,
  forms,
  judged,
  pipeline,
  sources,
)
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import judged as evals_judged, report
from csrm_jax.models import config as model_config, hf, lora, transformer
from csrm_jax.reward import backbone, heads, model as reward_model, scoring
from csrm_jax.ruleworld import defects, examples, grammar
from csrm_jax.runners import evaluate, real, show_tokens as show_tokens_lib
from csrm_jax.safety import schema, templates
from csrm_jax.text import tokenizer as tokenizer_lib
from csrm_jax.train import loop as loop_lib, losses, step as training

# The tokens that a prompt of the suite `real` may have.
_REAL_LENGTH = 2048
# More passes over the same rows teach a model to know them by heart.
MAX_PASSES = 10
# The share of words of several tokens above which data is foreign to a tokenizer made for other
# text: RuleWorld's own has 3 %, everyday English in its tokenizer about 50 %.
MAX_UNKNOWN = 0.2


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Trains from the base weights, evaluates, and writes workdir/report."""
  if evaluate.show_finished(workdir):
    return
  mesh = mesh_lib.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    _run(config, workdir, mesh)


def _run(config: ml_collections.ConfigDict, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
  start = time.monotonic()
  loop_lib.check_lengths(config)
  spec, tokenizer, source = _describe(config)
  # A config may override other fields only.
  if 'dtype' in config.model.overrides and config.model.overrides.dtype == 'auto':
    print(f'dtype=auto: {spec.model.dtype} is the faster one here', file=sys.stderr)
  parts, held_out = _read_data(config)
  _check_side_information(config, parts)
  if config.tokenizer:
    _say_unknown_words(parts, tokenizer)
  spec = dataclasses.replace(spec, domain=_measure_domain(config, spec, source, parts))
  todo = evaluate.benchmarks(config.eval, held_out)
  evaluate.check_lengths(held_out, features.Encoder(tokenizer, spec.max_length, spec.layout))
  batches = _make_batches(config, _make_encoder(config, tokenizer, spec.layout), parts)
  # Data of which nothing fits ends here, before anything is written.
  config = _count_epochs(config, parts, _atoms_per_step(batches))
  inputs = _inputs(config, spec, source, parts, held_out)
  params, frozen = _init_params(config, spec, source, mesh)
  backbone.save_tokenizer(config.tokenizer or source, workdir)

  def score_fn(params):
    return spec.make_score_fn(tree.merge(frozen, params), tokenizer)

  blind, before = config.data.rules_blind, {}
  if config.eval.zero_shot:
    kept = evaluate.keep_scores(score_fn(params), workdir / 'zero_shot', files.digest(inputs))
    before = evaluate.test(kept, todo, rules_blind=blind)
  step_fn, state = make_step(config, spec.model, spec.verbalizers(tokenizer), params, mesh)
  state = loop_lib.train(
    loop_lib.Supervised(step_fn, batches, mesh, frozen),
    state,
    config,
    mesh=mesh,
    workdir=workdir,
    meta=dataclasses.asdict(spec),
    inputs=inputs,
    setup_s=time.monotonic() - start,
    validation=_validation(config, score_fn, todo),
  )
  num_examples = batches.num_atoms
  batches.close()
  start = time.monotonic()
  trained_s = loop_lib.elapsed_s(workdir)
  score = score_fn(state.params)
  num_steps = int(state.step)  # fewer than asked for where patience ended
  evaluate.count_opening(config.eval, workdir)
  calibration = evaluate.fit_calibration(score, todo, workdir, num_steps, blind)
  results = evaluate.test(score, todo, calibration, blind) | {
    f'{name}_zero_shot': dataclasses.replace(
      result, description='The same examples before training.'
    )
    for name, result in before.items()
  }
  summary = report.summarise(results)
  if config.eval.real.data_dir:
    # Some sets have rules longer than any in training.
    longer = spec.make_score_fn(tree.merge(frozen, state.params), tokenizer, _REAL_LENGTH)
    summary |= _evaluate_real(config, spec, longer, workdir)
  summary |= {
    'time_s': trained_s + time.monotonic() - start,
    'time_train_s': trained_s,
    'peak_memory_bytes': _peak_memory_bytes(),
    'num_examples': num_examples,
    'num_params': tree.num_params(frozen) + tree.num_params(state.params),
    'num_trained_params': tree.num_params(state.params),
    'num_steps': num_steps,
  }
  evaluate.write(workdir, results, summary, config.title, calibration, config.eval.texts)


def _evaluate_real(
  config: ml_collections.ConfigDict,
  spec: reward_model.Spec,
  score_fn: scoring.ScoreFn,
  workdir: pathlib.Path,
) -> dict[str, float]:
  """Writes workdir/real, the suite of config.eval.real; returns its headline for the summary."""
  settings = config.eval.real
  out = evals_judged.evaluate_judged(
    evaluate.with_progress(score_fn),
    real.read_sets(settings.data_dir)[0],
    settings.side,
    config.data.judged.fold,
    workdir / 'real',
    order=spec.layout.order,
    trained=sorted({part.source for part in config.data.parts.values()}),
    max_rows=settings.max_rows,
    num_samples=settings.num_samples,
    with_words=settings.with_words,
  )
  print(evals_judged.headline_table(out))
  rows = {row['title']: row[evals_judged.MODEL]['value'] for row in out['headline']}
  return {f'real/{title}': value for title, value in rows.items()}


def _validation(
  config: ml_collections.ConfigDict,
  score_fn: Callable[[Any], scoring.ScoreFn],
  todo: Sequence[Benchmark],
) -> loop_lib.Validation | None:
  """Returns how the run is measured while it trains; score_fn makes one of parameters."""
  if not config.eval.every:
    return None
  rows = evaluate.validation_rows(todo)
  if not rows:
    raise ValueError(
      f'config.eval.every={config.eval.every} needs held-out rows with labels; give eval.path=FILE,'
      ' or a larger eval.fraction'
    )

  def measure(params: Any) -> dict[str, float]:
    return evaluate.measure_loss(score_fn(params), rows, config.data.rules_blind)

  return loop_lib.Validation(
    measure, config.eval.every, config.eval.keep_best, config.eval.patience
  )


def show_tokens(config: ml_collections.ConfigDict) -> None:
  """Prints the prompt of the first item that training would see."""
  spec, tokenizer, _ = _describe(config)
  encoder, seen = _make_encoder(config, tokenizer, spec.layout), []
  _make_atoms(config, encoder, _read_data(config)[0], seen.append)[0]
  show_tokens_lib.show(seen[0], encoder)


def make_step(
  config: ml_collections.ConfigDict,
  model: model_config.ModelConfig,
  verbalizers: templates.Verbalizers,
  params: Any,
  mesh: jax.sharding.Mesh,
) -> tuple[training.StepFn, training.TrainState]:
  """Returns the train step of configs/rm.py and its first state; shapes as params give shapes."""
  loss = config.loss
  loss_fn = scoring.make_loss_fn(
    *(model, verbalizers, loss.gamma, loss.margin),
    pair_loss=config_lib.choose('config.loss.pair', losses.PAIR_LOSSES, loss.pair),
    label_loss=config_lib.choose('config.loss.label', losses.LABEL_LOSSES, loss.label),
    head=config.model.head,
    rating_weight=loss.ratings,
  )
  return training.make_step(loss_fn, params, mesh, config.num_steps, **config.optim)


def _describe(
  config: ml_collections.ConfigDict,
) -> tuple[reward_model.Spec, tokenizer_lib.Tokenizer, hf.Source]:
  """Returns what is trained, its tokenizer, and the source of its first weights."""
  model, template = config.model, config.template
  if config.tokenizer:
    tokenizer, source = tokenizer_lib.load_tokenizer(config.tokenizer), hf.Source(model.init)
    cfg = model_config.preset(model.preset, tokenizer.vocab_size, **model.overrides)
    layout = templates.Layout(words=tuple(template.words))
  else:
    if not model.init:
      raise ValueError(
        'config.tokenizer and config.model.init are both empty: give the '
        'weights of a public model as init=..., or a tokenizer'
      )
    source = reward_model.public_model(model.init) or model.init
    spec, tokenizer = reward_model.describe(source, words=tuple(template.words), **model.overrides)
    cfg, layout, source = spec.model, spec.layout, hf.open_source(source)
  layout = dataclasses.replace(layout, order=template.order)
  spec = reward_model.Spec(
    model=cfg,
    layout=layout,
    max_length=config.data.max_length,
    safe_words=tuple(template.safe_words),
    unsafe_words=tuple(template.unsafe_words),
    template_hash=templates.template_hash(layout),
    tokenizer_digest=tokenizer.digest,
    head=model.head,
  )
  heads.get(spec.head)
  spec.verbalizers(tokenizer)  # a word that is not one token is an error now, not after an hour
  if spec.model.lora_rank:
    if not model.init:
      raise ValueError(
        f'config.model.overrides.lora_rank is {spec.model.lora_rank}, but '
        'model.init is empty: adapters need weights; give them as init=...'
      )
    spec = dataclasses.replace(spec, base=str(model.init), base_digest=hf.digest(source))
  return spec, tokenizer, source


def _read_data(config: ml_collections.ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (parts to train on, {name: items to test on})."""
  parts, held_out, options = {}, {}, forms.options(**config.data.own)
  fraction = 0.0 if config.eval.path else config.eval.fraction
  data = config.data
  drawn = draws.Options(order=config.template.order, group_size=data.group_size, **data.judged)
  for name, part in config.data.parts.items():
    parts[name], rest = pipeline.read_part(
      part.source,
      part.path,
      config.seed,
      fraction,
      examples.TRAINING,
      drawn,
      data.allow_tests,
      **options,
    )
    # The suite `real` asks about judged texts.
    held_out[name] = [item for item in rest if not isinstance(item, judged.Judged)]
  if config.eval.path:
    test = forms.read(config.eval.path, require_label=True, split='test', **options)
    held_out['test'] = test
    for name, items in parts.items():
      if not isinstance(items, sources.Generated) and (num := sources.num_shared(test, items)):
        checks.note(
          f'{num} of {len(test)} texts of {config.eval.path} are in the data {name!r} too'
        )
  return parts, {name: items for name, items in held_out.items() if items}


def _inputs(
  config: ml_collections.ConfigDict,
  spec: reward_model.Spec,
  source: hf.Source,
  parts: dict[str, Any],
  held_out: dict[str, Any],
) -> dict[str, str]:
  """Returns {what the run reads: its digest}."""
  inputs = {}
  for name, part in config.data.parts.items():
    if not isinstance(parts[name], sources.Generated):
      items = itertools.chain(parts[name], held_out.get(name, ()))
      inputs[f'data {part.path or part.source}'] = sources.digest(items)
  if config.eval.path:
    inputs[f'test data {config.eval.path}'] = sources.digest(held_out['test'])
  if config.model.init:
    inputs[f'weights {config.model.init}'] = spec.base_digest or hf.digest(source)
  return inputs


def _measure_domain(
  config: ml_collections.ConfigDict,
  spec: reward_model.Spec,
  source: hf.Source,
  parts: dict[str, Any],
) -> domain_lib.Domain:
  """Returns what is trained on, from a sample of the parts; the first weights may know more."""
  used = {name: part for name, part in config.data.parts.items() if part.weight > 0}
  # What is generated takes a while to make, and shows soon all that it has.
  in_world = {name for name, part in used.items() if part.source in examples.TRAINING}
  # Public sets have names, files of one's own only a path.
  names = {
    'RuleWorld' if n in in_world else part.source if part.source in catalogue.SETS else part.path
    for n, part in used.items()
  }
  before = spec.domain or (domain_lib.read(source.path) if config.model.init else None)
  return domain_lib.measure(
    ', '.join(sorted(names)),
    [
      e
      for n in used
      for e in domain_lib.sample(parts[n], 200 if isinstance(parts[n], sources.Generated) else 2000)
    ],
    spec.max_length,
    before.words if before else (),
    domain_lib.BACKBONE_LEAST if config.model.init and before is None else 0.0,
  )


def _say_unknown_words(parts: dict[str, Any], tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Says where a tokenizer that was made for other text spells many words of the data."""
  for name, items in parts.items():
    if isinstance(items, sources.Generated):
      continue
    sides = [getattr(item, 'safer', item) for item in sources.spread(items, 200)]
    texts = [m.content for side in sides for m in side.conversation]
    texts += [rule.guideline for rule in {r for side in sides for r in side.safety.categories}]
    words = [word for text in texts for word in re.findall(r'[^\W\d_]+', text.lower())]
    unknown = sum(len(tokenizer.encode(f' {word}')) > 1 for word in words) / max(len(words), 1)
    if unknown > MAX_UNKNOWN:
      checks.note(
        f'{unknown:.0%} of the words of {name!r} are unknown to the tokenizer of this model, which'
        ' learns little from words that it spells; name a backbone that knows them, as in'
        ' model=smollm2_135m,lora=16'
      )


def _atoms_per_step(batches: pipeline.BatchIterator, num: int = 4) -> float:
  """Returns how many examples and pairs a step takes, from the first batches."""
  first = batches.get_state()
  for _ in range(num):
    next(batches)
  rate = batches.num_atoms / num
  batches.set_state(first)
  return rate


def _count_epochs(
  config: ml_collections.ConfigDict, parts: dict[str, Any], rate: float
) -> ml_collections.ConfigDict:
  """Returns the config with the steps of its epochs; says so where data is passed too often."""
  weights = {name: part.weight for name, part in config.data.parts.items() if part.weight > 0}
  # The steps of one pass over each part that has an end.
  steps = {
    name: len(parts[name]) * sum(weights.values()) / (weight * rate)
    for name, weight in weights.items()
    if not isinstance(parts[name], sources.Generated)
  }
  if config.epochs:
    if not config.epochs > 0 or not steps:
      raise ValueError(
        f'config.epochs={config.epochs}: it is above 0 and counts passes over files; give num_steps'
        ' for generated data'
      )
    config = config.copy_and_resolve_references()
    with config.unlocked():
      config.num_steps = max(math.ceil(config.epochs * max(steps.values())), 1)
      config.optim.warmup_steps = min(config.optim.warmup_steps, config.num_steps // 10)
    checks.note(f'epochs={config.epochs:g}: {config.num_steps} steps')
  for name, one in steps.items():
    if config.num_steps > MAX_PASSES * one:
      checks.note(
        f'{config.num_steps} steps pass the {len(parts[name])} rows of {name!r}'
        f' {config.num_steps / one:.0f} times; epochs=3 takes {math.ceil(3 * one)} steps'
      )
  return config


def _make_batches(
  config: ml_collections.ConfigDict, encoder: features.Encoder, parts: dict[str, Any]
) -> pipeline.BatchIterator:
  data, tokenizer = config.data, encoder.tokenizer
  atoms = _make_atoms(config, encoder, parts)
  shape = features.BatchShape(
    data.batch_size,
    data.row_length,
    data.max_segments,
    tokenizer.pad_id,
    data.share_prefix,
    any(isinstance(getattr(items, 'make', None), draws.Draw) for items in parts.values()),
    has_order=bool(_reads_of_pairs(config)),
    num_targets=len(encoder.targets),
  )
  read = {name: [part.source, part.weight, len(parts[name])] for name, part in data.parts.items()}
  # A resumed run must see the same data: its position means nothing in other data.
  identity = {
    'data': data.to_dict() | {'parts': read},
    'seed': config.seed,
    'tokenizer': tokenizer.digest,
    'template': templates.template_hash(encoder.layout),
  }
  return pipeline.batches(atoms, shape, fingerprint=json.dumps(identity, sort_keys=True))


def _reads_of_pairs(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  return losses.PAIR_READS.get(config.loss.pair.partition(':')[0], ())


def _check_side_information(config: ml_collections.ConfigDict, parts: dict[str, Any]) -> None:
  """Says where data brings more than loss and head read; ValueError where they read what is not
  there."""
  read, wanted = _reads_of_pairs(config), set(heads.get(config.model.head).ratings)
  # What is generated is rated and graded by one defect alone.
  is_graded = config.data.defect.startswith('scale')
  rated, found = {'severity'} if is_graded else set(), {'strength'} if is_graded else set()
  for name, items in parts.items():
    if isinstance(items, sources.Generated):
      continue
    for item in items:
      if isinstance(item, schema.Example):
        own = {rating for rating, _ in item.ratings}
        rated |= own
        if item.label is None and not wanted & own:
          raise ValueError(
            f'{item.id}: no label, and model.head={config.model.head} learns none of its ratings;'
            ' add a label, or name them as in model.head=ratings:names=A+B'
          )
    pairs = [item for item in items if isinstance(item, schema.Pair)]
    for what, num in {
      'tie': sum(pair.is_tie for pair in pairs),
      'strength': sum(bool(pair.strength) for pair in pairs),
      'soft': sum(pair.soft != 1 for pair in pairs),
    }.items():
      found |= {what} if num else set()
      able = [one for one, reads in losses.PAIR_READS.items() if what in reads]
      if num and what not in read:
        left = 'and is left out' if what == 'tie' else 'that is not read'
        checks.note(
          f'{num} pairs of {name!r} have a {what} {left}: loss.pair={config.loss.pair}; '
          f'{" and ".join(able)} read it'
        )
  if missing := sorted(wanted - rated):
    raise ValueError(
      f'model.head={config.model.head} learns the rating {missing[0]!r}, which no row has; there '
      f'are {", ".join(sorted(rated)) or "none"} (data.own.columns.ratings names columns)'
    )
  if 'strength' in read and 'strength' not in found:
    checks.note(f'no pair has a strength: loss.pair={config.loss.pair} takes 1 for all')


def _make_encoder(
  config: ml_collections.ConfigDict, tokenizer: tokenizer_lib.Tokenizer, layout: templates.Layout
) -> features.Encoder:
  data = config.data
  muted = tuple(data.muted_pairs)
  for kind in muted:
    checks.one_of('config.data.muted_pairs', kind, schema.PAIR_KINDS)
  return features.Encoder(
    *(tokenizer, data.max_length, layout, data.row_length, data.label_pairs, data.share_prefix),
    muted_pairs=muted,
    keep_ties='tie' in _reads_of_pairs(config),
    targets=heads.get(config.model.head).ratings,
  )


def _make_atoms(
  config: ml_collections.ConfigDict,
  encoder: features.Encoder,
  parts: dict[str, Any],
  look: Callable[[Any], Any] = lambda item: None,
) -> grain.MapDataset:
  """Returns the atoms that training packs; `look` is called with each augmented item."""
  data = config.data
  apply = pipeline.make_augment(data.drop_prob, data.plus_prob, data.minus_prob, data.rules_blind)
  spoil = data.defect and config_lib.choose('config.data.defect', defects.DEFECTS, data.defect)
  in_world = all(part.source in examples.TRAINING for part in data.parts.values())
  if spoil and not in_world:
    raise ValueError(f"config.data.defect={data.defect!r} is for RuleWorld's data; leave it empty")
  for name in ('noise', 'neutral_pairs'):
    if not 0 <= data[name] <= 1:
      raise ValueError(f'config.data.{name}={data[name]} is a share; give one from 0 to 1')
  if data.neutral_pairs and not encoder.keep_ties:
    raise ValueError(f'config.data.neutral_pairs makes ties, which loss.pair={config.loss.pair} '
                     'does not know; set it to soft')  # fmt: skip
  # The suite `padding` has the first sentence: what is tested is never trained on.
  neutral = grammar.FILLERS[1:] if in_world else ()

  def augment(item, rng):
    item = apply(item, rng)
    item = spoil(item, rng) if spoil else item
    if isinstance(item, schema.Example):
      if data.noise and rng.random() < data.noise:
        item = draws.add_noise(item, rng, neutral)
      elif data.neutral_pairs and rng.random() < data.neutral_pairs:
        item = draws.neutral_pair(item, rng, neutral)
    if item is not None:
      look(item.examples[0] if isinstance(item, draws.Group) else item)
    return item

  weights = {name: part.weight for name, part in data.parts.items()}
  return pipeline.make_training_atoms(
    parts, weights, encoder, config.seed, augment, data.group_size
  )


def _init_params(
  config: ml_collections.ConfigDict,
  spec: reward_model.Spec,
  source: hf.Source,
  mesh: jax.sharding.Mesh,
) -> tuple[Any, Any]:
  """Returns (trained, frozen) parameters on the mesh; with adapters the base is frozen."""
  shardings = mesh_lib.shardings(transformer.shapes(spec.model), mesh)
  own = heads.init(spec.head, spec.model, config.seed)
  own = jax.device_put(own, mesh_lib.shardings(own, mesh))
  if spec.base:
    adapters = lora.init(spec.model, config.seed)
    adapters = jax.device_put(adapters, mesh_lib.shardings(adapters, mesh))
    # The base is not hashed again here: _describe has done so.
    return adapters | own, hf.load_params(source, spec.model, shardings)
  if config.model.init:
    return hf.load_params(source, spec.model, shardings) | own, {}
  params = transformer.init_params(spec.model, config.seed)
  return jax.device_put(params, shardings) | own, {}


def _peak_memory_bytes() -> int:
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  try:
    import resource
  except ImportError:  # Windows does not say.
    return 0
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024  # Linux: KiB
