"""The message of a run that has filled a device."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from csrm_jax import config as config_lib
from csrm_jax.core import profiling

# The settings that decide how much memory a run needs, in training and in alignment.
_NUMBERS = (
  'data.batch_size',
  'data.row_length',
  'rollout.num_prompts',
  'rollout.num_generations',
  'sampling.max_completion_length',
  'optim.num_microbatches',
  'model.overrides.remat',
  'policy.overrides.remat',
  'mesh.data',
  'mesh.fsdp',
  'mesh.tensor',
  'mesh.num_slices',
)


def explain(error: Exception, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
  """Returns one line that says what ran out, with which settings, and what to change.

  It also writes workdir/memory_{process}.prof, a profile of what the devices held.
  """
  # Settings that do nothing in this run are None.
  flat = {key: value for key, value in config_lib.flatten(config).items() if value is not None}
  numbers = ', '.join(f'{name}={flat[name]}' for name in _NUMBERS if name in flat)
  lines = [f'out of memory ({" ".join(str(error).split())[:160]})']
  if numbers:
    lines.append(f'with {numbers} on {jax.device_count()} devices')
  if changes := ', '.join(_changes(flat)):
    lines.append(f'try, the cheapest first: {changes}')
  lines.append('configs/compile.py says before a run what fits on a TPU slice')
  lines.append(f'what filled the device is in {profiling.save_memory_profile(workdir)} (for pprof)')
  return '; '.join(lines)


def _changes(flat: dict[str, Any]) -> Iterator[str]:
  """Yields flags that save memory, in the order in which configs/compile.py tries them."""
  for name in ('model.overrides.remat', 'policy.overrides.remat'):
    if flat.get(name, 'full') != 'full':
      yield f'--config.{name}=full'
  if 'optim.num_microbatches' in flat:
    num = 2 * flat['optim.num_microbatches']
    yield f'--config.optim.num_microbatches={num}'
  sizes = [flat.get(f'mesh.{name}') for name in ('data', 'fsdp', 'tensor')]
  slices = flat.get('mesh.num_slices', 1)
  # Only data goes across slices: fsdp and tensor share the devices of one.
  devices = jax.device_count() // slices
  if None not in sizes and devices > 1:
    if sizes[1] != -1 and sizes[1] * sizes[2] < devices:
      yield f'--config.mesh.data={slices} --config.mesh.fsdp=-1'
    else:
      yield f'--config.mesh.tensor={2 * sizes[2]}'
  # A smaller batch comes last, because it changes what is learnt.
  if 'data.batch_size' in flat:
    yield f'--config.data.batch_size={max(1, flat["data.batch_size"] // 2)}'
