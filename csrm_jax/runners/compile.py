"""Compiles a run's own programs for a slice of TPUs, and reports memory and time.

It needs shapes only: no weights, no data, no TPU.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections

from csrm_jax import config as config_lib
from csrm_jax.core import files, markdown, program, topology, tree
from csrm_jax.models import transformer
from csrm_jax.runners import programs


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What one program costs; bytes and times are for one chip and one call."""

  name: str
  fits: bool  # whether peak_bytes and beside_bytes together are at most hbm_bytes
  hbm_bytes: float  # the memory of a chip
  peak_bytes: float  # arguments, results and work space
  param_bytes: int
  opt_state_bytes: int
  cache_bytes: int  # keys and values
  # Activations, gradients and gathered parameters: memory that is reserved beside the arguments.
  work_bytes: float
  beside_bytes: int  # what the run holds for its other programs at the same time
  replicated_fraction: float  # the share of parameter bytes that each chip holds whole
  flops: float  # FLOPs of the products on all chips, recomputed ones included
  tokens: int  # tokens that a call reads or adds
  judged: int  # tokens of all prompts together, where they share some; else 0
  calls: int  # calls in a step of the run
  collective_bytes: dict[str, int]  # for each kind, the bytes of whole arrays times their turns
  roofline: program.Roofline | None  # None where the program does not fit
  compile_s: float

  @property
  def held_bytes(self) -> float:
    """The memory that the run needs on a chip while this program runs."""
    return self.peak_bytes + self.beside_bytes


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Compiles config.programs of config.run and writes workdir/report."""
  target = topology.parse(config.topology)
  results = []
  for name in config.programs:
    print(f'compiling {name}', file=sys.stderr, flush=True)
    results.append(compile_program(name, config, target))
  advice = []
  if config.advise and not all(result.fits for result in results):
    advice = list(_advise(config, target))
  text = report(config, target, results, advice)
  content = {
    'topology': config.topology,
    'advice': advice,
    'programs': [dataclasses.asdict(r) for r in results],
  }
  files.write(workdir / 'report' / 'report.md', text)
  files.write_json(workdir / 'report' / 'compile.json', content)
  print(text)


def compile_program(
  name: str, config: ml_collections.ConfigDict, target: topology.Slice
) -> Compiled:
  """Returns what the program `name` of config.run costs on the slice."""
  makers = programs.named(config, topology.devices(target))
  if name not in makers:
    raise ValueError(f'config.programs: {name!r} is unknown; there are {", ".join(makers)}')
  made = makers[name]()
  start = time.monotonic()
  with jax.set_mesh(made.mesh):
    try:
      compiled = made.fn.lower(*made.args).compile()
    except jax.errors.JaxRuntimeError as error:
      # The compiler refuses a program that does not fit; its message says what it would need.
      used, compiled = _used_bytes(error), None
  compile_s = time.monotonic() - start
  found = []
  if compiled:
    memory = compiled.memory_analysis()
    found = program.collectives(compiled.as_text(), made.turns or 1)
    parts = ('argument', 'output', 'temp', 'generated_code')
    used = sum(getattr(memory, f'{part}_size_in_bytes') for part in parts)
    used -= memory.alias_size_in_bytes  # outputs that lie in the memory of donated arguments
  # Traced outside of the mesh, where attention consists of plain products that can be counted.
  flops = program.count_flops(made.fn, *made.args, turns=made.turns)
  sizes = {
    key: program.local_bytes(getattr(made, key))
    for key in ('params', 'opt_state', 'cache', 'beside', 'args')
  }
  moved = {
    kind: total
    for kind in program.COLLECTIVES
    if (total := sum(c.num_bytes * c.turns for c in found if c.kind == kind))
  }
  fits = used + sizes['beside'] <= target.chip.hbm_bytes
  read_bytes = max(made.turns, 1) * (sizes['params'] + sizes['cache'])
  times = program.estimate(flops, read_bytes, found, target, config.product_efficiency)
  return Compiled(
    name=name,
    fits=fits,
    hbm_bytes=target.chip.hbm_bytes,
    peak_bytes=used,
    param_bytes=sizes['params'],
    opt_state_bytes=sizes['opt_state'],
    cache_bytes=sizes['cache'],
    work_bytes=used - sizes['args'],
    beside_bytes=sizes['beside'],
    replicated_fraction=program.replicated_fraction(made.params),
    flops=flops,
    tokens=made.tokens,
    judged=made.judged,
    calls=made.calls,
    collective_bytes=moved,
    roofline=times if found or fits else None,
    compile_s=compile_s,
  )


def _used_bytes(error: Exception) -> float:
  """Returns the bytes that a program needs which does not fit; raises other errors again."""
  match = re.search(r'Used ([\d.]+)([KMG]) of', str(error))
  if not match:
    raise error
  return float(match[1]) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[match[2]]


def _changes(run: ml_collections.ConfigDict, target: topology.Slice) -> Iterator[dict[str, Any]]:
  """Yields changes of a run that save memory, the cheapest first."""
  full = {'model.overrides.remat': 'full'}
  if run.model.overrides.remat != 'full':
    yield full
  rows = run.data.batch_size // target.num_chips
  num = 2 * run.optim.num_microbatches
  while num <= rows:
    yield full | {'optim.num_microbatches': num}
    num *= 2
  for tensor in (2, 4, 8):
    if tensor > run.mesh.tensor and target.num_chips % tensor == 0:
      yield full | {'mesh.tensor': tensor}
  yield full | {'model.overrides.param_dtype': 'bfloat16'}


def _advise(config: ml_collections.ConfigDict, target: topology.Slice) -> Iterator[str]:
  """Yields a line for each change, up to the first with which training fits."""
  for change in _changes(config.run, target) if 'train' in config.programs else ():
    changed = ml_collections.ConfigDict(config.to_dict())
    config_lib.set_overrides(changed.run, change)
    result = compile_program('train', changed, target)
    flags = ' '.join(f'--config.{key}={v}' for key, v in change.items())
    verdict = 'fits' if result.fits else 'does not fit'
    yield f'`{flags}` {verdict}: {_gib(result.peak_bytes)} of {_gib(result.hbm_bytes)} GiB a chip'
    if result.fits:
      return
  larger = [n for n in topology.names() if n.startswith(f'{target.kind}-')]
  yield f'take a larger slice than {target.name} ({", ".join(larger)}), or adapters (lora=16)'


def report(
  config: ml_collections.ConfigDict,
  target: topology.Slice,
  results: list[Compiled],
  advice: list[str],
) -> str:
  """Returns the report in Markdown."""
  model = programs.model_of(config)
  shapes = transformer.shapes(model)
  name, step = _described(config)
  side = 'x'.join(str(n) for n in target.shape)
  num = f'{target.num_slices} x ' if target.num_slices > 1 else ''
  rows = [(title, *map(cell, results)) for title, cell in _ROWS.items()]
  lines = [
    f'# {name} on {target.name}',
    '',
    f'{target.num_chips} chips ({num}{side}), {tree.num_params(shapes) / 1e9:.2f}B parameters in '
    f'{model.param_dtype}, products in {model.dtype}, remat {model.remat}; '
    f'mesh {dict(config.run.mesh)}; {step} in {config.run.optim.num_microbatches} microbatches.',
    '',
    markdown.table(['of one chip', *(r.name for r in results)], rows),
    '',
    *_whole_step(results),
    _assumptions(config, target),
    '',
  ]
  if advice:
    lines += ['To make it fit:', '', *(f'- {line}' for line in advice), '']
  return '\n'.join(lines)


def _described(config: ml_collections.ConfigDict) -> tuple[str, str]:
  """Returns (the model's name, what a step of its run computes)."""
  run = config.run
  if run.runner == 'train_rm':
    step = f'{run.data.batch_size} rows of {run.data.row_length} tokens'
    if run.data.share_prefix:
      step += (
        f', in each of which prompts share {config.prefix_length} tokens and have '
        f'{config.branch_length} of their own,'
      )
    return run.model.preset, step
  judge = f' under {config.reward_model}' if config.reward_model else ''
  draws = run.rollout
  return f'{config.policy or run.policy.init}{judge}', (
    f'{draws.num_prompts} prompts of {config.prompt_length} tokens x {draws.num_generations} '
    f'completions of {run.sampling.max_completion_length}, drawn from copies on '
    f'{run.sampling.tensor} chips each, updates'
  )


def _whole_step(results: Sequence[Compiled]) -> Iterator[str]:
  """Yields lines on all calls of a step together, where there are several."""
  if all(r.calls == 1 for r in results):
    return
  most = max(results, key=lambda r: r.held_bytes)
  yield (
    f'The run holds most during {most.name}: {_gib(most.held_bytes)} of {_gib(most.hbm_bytes)} GiB.'
  )
  if all(r.roofline for r in results):
    low, high = (
      sum(r.calls * getattr(r.roofline, name) for r in results)
      for name in ('overlapped_s', 'serial_s')
    )
    yield f'A step of all calls takes {low:.2f}–{high:.2f} s.'
  yield ''


def _gib(num_bytes: float) -> str:
  return f'{num_bytes / topology.GIB:.2f}'


def _times(times: program.Roofline) -> str:
  parts = {'products': times.compute_s, 'memory': times.memory_s, **times.collectives_s}
  return ', '.join(f'{name} {time_s:.3f}' for name, time_s in parts.items())


_ROWS = {
  'fits': lambda r: 'yes' if r.fits else '**no**',
  'peak of the program, GiB': lambda r: _gib(r.peak_bytes),
  'parameters, GiB': lambda r: _gib(r.param_bytes),
  'optimizer, GiB': lambda r: _gib(r.opt_state_bytes),
  'keys and values, GiB': lambda r: _gib(r.cache_bytes),
  'activations and other work space, GiB': lambda r: _gib(r.work_bytes),
  'held beside it by the run, GiB': lambda r: _gib(r.beside_bytes),
  'peak of the run, GiB': lambda r: f'{_gib(r.held_bytes)} of {_gib(r.hbm_bytes)}',
  'parameter bytes that are replicated': lambda r: f'{r.replicated_fraction:.3%}',
  'FLOPs, all chips': lambda r: f'{r.flops:.4g}',
  'collectives, GiB': lambda r: (
    ', '.join(f'{kind} {_gib(num)}' for kind, num in r.collective_bytes.items()) or 'none'
  ),
  'times, s': lambda r: _times(r.roofline) if r.roofline else markdown.NONE,
  'time, s (overlapped–serial)': lambda r: (
    f'{r.roofline.overlapped_s:.3f}–{r.roofline.serial_s:.3f}' if r.roofline else markdown.NONE
  ),
  'limit': lambda r: r.roofline.limit if r.roofline else 'memory',
  'tokens read or added': lambda r: str(r.tokens),
  'tokens judged': lambda r: str(r.judged or r.tokens),
  'FLOPs a judged token': lambda r: f'{r.flops / (r.judged or r.tokens):.4g}',
  'calls a step': lambda r: str(r.calls),
}


def _assumptions(config: ml_collections.ConfigDict, target: topology.Slice) -> str:
  chip = target.chip
  rings = ', '.join(f'{r / 1e9:.0f}' for r in target.ring_bytes_per_s)
  return (
    f'Assumed: {chip.flops / 1e12:.0f} TFLOP/s a chip, of which products reach '
    f'{config.product_efficiency:.0%}; rings of {rings} GB/s along the sides of a slice, '
    f'{chip.dcn_bytes_per_s / 1e9:.2f} GB/s a chip between slices, '
    f'{chip.hbm_bytes_per_s / 1e12:.2f} TB/s of memory; no latency, no waiting for data. Attention '
    'counts the products of plain XLA: a little more than the lower half of the scores.'
  )
