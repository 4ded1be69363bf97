"""Compiles a run's own programs for TPUs that need not be there, and reports.

Shapes are all that is needed: no weights, no data, no TPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from csrm_jax import config as config_lib
from csrm_jax import scoring
from csrm_jax.core import mesh as mesh_lib
from csrm_jax.core import program, roofline, topology, tree, writer
from csrm_jax.data import packing
from csrm_jax.models import config as model_config
from csrm_jax.models import lora, transformer
from csrm_jax.runners import train_rm
from csrm_jax.safety import templates
from csrm_jax.text import tokenizer as tokenizer_lib

# Any ids do: which tokens they are is no part of a program's shape.
VERBALIZERS = templates.Verbalizers(safe=(1,), unsafe=(2,))


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What one program costs; bytes and times are of one chip and one step.

  Attributes:
    name: 'train' or 'score'.
    fits: whether peak_bytes is at most hbm_bytes.
    hbm_bytes: what a chip has.
    peak_bytes: arguments, results and work space.
    param_bytes: of the parameters.
    opt_state_bytes: of the optimizer's state.
    work_bytes: activations, gradients, gathered parameters: what the compiler
      reserves beside the arguments.
    replicated_fraction: share of the parameters' bytes that each chip holds
      whole.
    flops: of the products, all chips, with what is recomputed.
    tokens: of the batch.
    collective_bytes: by kind, of whole arrays: times their turns.
    roofline: the times; None where the program does not fit.
    compile_s: how long the compiler took.
  """

  name: str
  fits: bool
  hbm_bytes: float
  peak_bytes: float
  param_bytes: int
  opt_state_bytes: int
  work_bytes: float
  replicated_fraction: float
  flops: float
  tokens: int
  collective_bytes: dict[str, int]
  roofline: roofline.Roofline | None
  compile_s: float


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Compiles config.programs of config.run, writes workdir/report."""
  if config.run.runner != 'train_rm':
    raise ValueError(
        f'target: runner {config.run.runner!r} cannot be compiled; give '
        'configs/rm.py')
  target = topology.parse(config.topology)
  results = [compile_program(name, config, target) for name in config.programs]
  advice = []
  if config.advise and not all(result.fits for result in results):
    advice = list(_advise(config, target))
  text = report(config, target, results, advice)
  content = {'topology': config.topology, 'advice': advice,
             'programs': [dataclasses.asdict(r) for r in results]}
  writer.write_atomic(workdir / 'report' / 'report.md', text)
  writer.write_atomic(workdir / 'report' / 'compile.json',
                      json.dumps(content, indent=2) + '\n')
  print(text)


def compile_program(name: str, config: ml_collections.ConfigDict,
                    target: topology.Slice) -> Compiled:
  """Returns what the program `name` of config.run costs on the slice.

  Raises:
    ImportError: no package libtpu.
    ValueError: an unknown program, or a mesh or batch that does not divide.
  """
  mesh = mesh_lib.make_mesh(
      **config.run.mesh, devices=topology.devices(target))
  model = _model(config)
  with jax.set_mesh(mesh):
    fn, args, state = _program(name, config.run, model, mesh)
    start = time.monotonic()
    try:
      compiled = fn.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
      used = _used_bytes(error)
      compiled = None
  # Outside of the mesh, where attention is made of plain products.
  flops = program.count_flops(fn, *args)
  params = getattr(state, 'params', state)
  hbm_bytes = target.chip.hbm_bytes
  arguments = program.local_bytes(args)
  found = []
  if compiled:
    memory = compiled.memory_analysis()
    found = program.collectives(compiled.as_text())
    used = (memory.argument_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes)
  sums = {kind: sum(c.num_bytes * c.turns for c in found if c.kind == kind)
          for kind in program.COLLECTIVES}
  return Compiled(
      name=name, fits=compiled is not None and used <= hbm_bytes,
      hbm_bytes=hbm_bytes, peak_bytes=used,
      param_bytes=program.local_bytes(params),
      opt_state_bytes=program.local_bytes(getattr(state, 'opt_state', ())),
      work_bytes=used - arguments,
      replicated_fraction=program.replicated_fraction(params), flops=flops,
      tokens=math.prod(args[1]['tokens'].shape),
      collective_bytes={kind: total for kind, total in sums.items() if total},
      roofline=roofline.estimate(
          flops, found, target, config.product_efficiency)
      if compiled else None,
      compile_s=time.monotonic() - start)


def _model(config: ml_collections.ConfigDict) -> model_config.ModelConfig:
  run = config.run
  vocab_size = 0
  if run.tokenizer:
    vocab_size = tokenizer_lib.load_tokenizer(run.tokenizer).vocab_size
  model = model_config.preset(
      run.model.preset, vocab_size, **run.model.overrides)
  if config.num_layers:
    model = dataclasses.replace(model, num_layers=config.num_layers)
  return model


def _program(name: str, run: ml_collections.ConfigDict,
             model: model_config.ModelConfig, mesh: jax.sharding.Mesh
             ) -> tuple[Any, tuple[Any, ...], Any]:
  """Returns (function, shapes of its arguments, shapes of what it keeps)."""
  shapes = jax.eval_shape(lambda: transformer.init_params(model, run.seed))
  batch, _ = packing.pack_rows(
      [], run.data.batch_size, run.data.row_length, run.data.max_segments)
  if name == 'train':
    trained, frozen = lora.split(shapes) if model.lora_rank else (shapes, {})
    step_fn, state = train_rm.make_step(run, model, VERBALIZERS, trained, mesh)
    frozen = mesh_lib.abstract(frozen, mesh)
    return step_fn, (state, mesh_lib.abstract_batch(batch, mesh), frozen), state
  if name == 'score':
    batch = {key: batch[key] for key in
             ('tokens', 'positions', 'segment_ids', 'verdict_index')}
    batch['verdict_index'] = batch['verdict_index'][:, :1]
    params = mesh_lib.abstract(shapes, mesh)
    fn = scoring.make_score_step(model, VERBALIZERS)
    return fn, (params, mesh_lib.abstract_batch(batch, mesh)), params
  raise ValueError(
      f'config.programs: {name!r} is unknown; there are train and score')


def _used_bytes(error: Exception) -> float:
  """Returns what a program needed that did not fit; raises other errors."""
  match = re.search(r'Used ([\d.]+)([KMG]) of', str(error))
  if not match:
    raise error
  return float(match[1]) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[match[2]]


def _changes(run: ml_collections.ConfigDict,
             target: topology.Slice) -> Iterator[dict[str, Any]]:
  """Yields changes of a run that need less memory, the cheapest first."""
  if run.model.overrides.remat != 'full':
    yield {'model.overrides.remat': 'full'}
  rows = run.data.batch_size // target.num_chips
  num = 2 * run.optim.num_microbatches
  while num <= rows:
    yield {'model.overrides.remat': 'full', 'optim.num_microbatches': num}
    num *= 2
  for tensor in (2, 4, 8):
    if tensor > run.mesh.tensor and target.num_chips % tensor == 0:
      yield {'model.overrides.remat': 'full', 'mesh.tensor': tensor}
  yield {'model.overrides.remat': 'full',
         'model.overrides.param_dtype': 'bfloat16'}


def _advise(config: ml_collections.ConfigDict,
            target: topology.Slice) -> Iterator[str]:
  """Yields what each change came to, up to the first with which it fits."""
  for change in _changes(config.run, target):
    changed = ml_collections.ConfigDict(config.to_dict())
    config_lib.set_overrides(changed.run, change)
    result = compile_program('train', changed, target)
    flags = ' '.join(f'--config.{key}={v}' for key, v in change.items())
    verdict = 'fits' if result.fits else 'does not fit'
    yield (f'`{flags}` {verdict}: {_gib(result.peak_bytes)} of '
           f'{_gib(result.hbm_bytes)} GiB a chip')
    if result.fits:
      return
  larger = [n for n in topology.names() if n.startswith(f'{target.kind}-')]
  yield f'nothing tried fits: take a larger slice than {target.name} ' \
        f'({", ".join(larger)}), or adapters (lora=16)'


def report(config: ml_collections.ConfigDict, target: topology.Slice,
           results: list[Compiled], advice: list[str]) -> str:
  """Returns the Markdown report."""
  model = _model(config)
  shapes = jax.eval_shape(lambda: transformer.init_params(model, 0))
  run = config.run
  side = 'x'.join(str(n) for n in target.shape)
  lines = [
      f'# {run.model.preset} on {target.name}', '',
      f'{target.num_chips} chips ({side}), '
      f'{tree.num_params(shapes) / 1e9:.2f}B parameters in '
      f'{model.param_dtype}, products in {model.dtype}, remat {model.remat}; '
      f'mesh {dict(run.mesh)}; {run.data.batch_size} rows of '
      f'{run.data.row_length} tokens in {run.optim.num_microbatches} '
      'microbatches.', '',
      '| of one chip | ' + ' | '.join(r.name for r in results) + ' |',
      '|---|' + '---|' * len(results)]
  for title, cell in _ROWS.items():
    lines.append(f'| {title} | ' + ' | '.join(map(cell, results)) + ' |')
  lines += ['', _assumptions(config, target), '']
  if advice:
    lines += ['To make it fit:', '', *(f'- {line}' for line in advice), '']
  return '\n'.join(lines)


def _gib(num_bytes: float) -> str:
  return f'{num_bytes / topology.GIB:.2f}'


def _step(result: Compiled) -> str:
  if result.roofline is None:
    return '–'
  times = result.roofline
  return f'{times.overlapped_s:.3f}–{times.serial_s:.3f}'


def _collectives(result: Compiled) -> str:
  return ', '.join(f'{kind} {_gib(num)}'
                   for kind, num in result.collective_bytes.items()) or 'none'


def _times(result: Compiled) -> str:
  if result.roofline is None:
    return '–'
  parts = {'products': result.roofline.compute_s,
           **result.roofline.collectives_s}
  return ', '.join(f'{name} {time_s:.3f}' for name, time_s in parts.items())


_ROWS = {
    'fits': lambda r: 'yes' if r.fits else '**no**',
    'peak, GiB': lambda r: f'{_gib(r.peak_bytes)} of {_gib(r.hbm_bytes)}',
    'parameters, GiB': lambda r: _gib(r.param_bytes),
    'optimizer, GiB': lambda r: _gib(r.opt_state_bytes),
    'activations and other work space, GiB': lambda r: _gib(r.work_bytes),
    'parameter bytes that are replicated':
        lambda r: f'{r.replicated_fraction:.3%}',
    'FLOPs of a step, all chips': lambda r: f'{r.flops:.4g}',
    'collectives, GiB a step': _collectives,
    'times, s': _times,
    'step, s (overlapped–serial)': _step,
    'limit': lambda r: r.roofline.limit if r.roofline else 'memory',
    'tokens a step': lambda r: str(r.tokens),
}


def _assumptions(config: ml_collections.ConfigDict,
                 target: topology.Slice) -> str:
  chip = target.chip
  rings = ', '.join(f'{r / 1e9:.0f}' for r in target.ring_bytes_per_s)
  return (
      f'Assumed: {chip.flops / 1e12:.0f} TFLOP/s a chip, of which products '
      f'reach {config.product_efficiency:.0%}; rings of {rings} '
      'GB/s along the sides of the slice; no latency, no waiting for data. '
      'Attention counts the products of plain XLA: a little more than the '
      'lower half of the scores.')
