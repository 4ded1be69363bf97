"""A profiler trace of some steps, and reports on a device whose memory is full."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

# The settings that decide how much memory a run needs, in training and in alignment.
_NEED_MEMORY = (
  *('data.batch_size', 'data.row_length', 'rollout.num_prompts', 'rollout.num_generations'),
  *('sampling.max_completion_length', 'optim.num_microbatches'),
  *('model.overrides.remat', 'policy.overrides.remat'),
  *('mesh.data', 'mesh.fsdp', 'mesh.tensor', 'mesh.num_slices'),
)


def parse_steps(text: str) -> tuple[int, int] | None:
  """Returns (first, last) of 'FIRST:LAST', or None for ''."""
  if not text:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', text)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(f"profile_steps={text!r}: give the first and the last step, as in '10:13'")
  return first, last


@contextlib.contextmanager
def trace(
  steps: tuple[int, int] | None, folder: str | os.PathLike
) -> Iterator[Callable[[int, Any], None]]:
  """Yields done(step, state), to call before the first step and after each.

  It traces the steps from the first to the last into the folder, for xprof or TensorBoard's
  profile plugin.
  """
  tracing = False

  def done(step: int, state: Any) -> None:
    nonlocal tracing
    wanted = steps is not None and steps[0] <= step + 1 <= steps[1]
    if wanted == tracing:
      return
    # Steps run asynchronously: the trace must not hold a part of the step before, or lack a part
    # of the last one.
    jax.block_until_ready(state)
    if wanted:
      jax.profiler.start_trace(str(folder))
    else:
      jax.profiler.stop_trace()
    tracing = wanted

  try:
    yield done
  finally:
    if tracing:
      jax.profiler.stop_trace()


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether a device had too little memory."""
  return isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)


def explain(error: Exception, settings: Mapping[str, Any], folder: pathlib.Path) -> str:
  """Returns one line on a full device: with which settings, and what to change.

  It also writes folder/memory_{process}.prof, a profile of what this host's devices held. The
  settings are those of a config, flat; those that do nothing in this run are None.
  """
  path = folder / f'memory_{jax.process_index()}.prof'
  jax.profiler.save_device_memory_profile(str(path))
  settings = {key: value for key, value in settings.items() if value is not None}
  lines = [f'out of memory ({" ".join(str(error).split())[:160]})']
  if numbers := ', '.join(f'{key}={settings[key]}' for key in _NEED_MEMORY if key in settings):
    lines.append(f'with {numbers} on {jax.device_count()} devices')
  if changes := ', '.join(_changes(settings)):
    lines.append(f'try, the cheapest first: {changes}')
  lines.append('configs/compile.py says before a run what fits on a TPU slice')
  return '; '.join([*lines, f'what filled the device is in {path} (for pprof)'])


def _changes(settings: Mapping[str, Any]) -> Iterator[str]:
  """Yields flags that save memory, in the order in which configs/compile.py tries them."""
  for name in ('model.overrides.remat', 'policy.overrides.remat'):
    if settings.get(name, 'full') != 'full':
      yield f'--config.{name}=full'
  if num := settings.get('optim.num_microbatches'):
    yield f'--config.optim.num_microbatches={2 * num}'
  # Only data goes across slices: fsdp and tensor share the devices of one.
  num_slices = settings.get('mesh.num_slices', 1)
  num_devices = jax.device_count() // num_slices
  if 'mesh.fsdp' in settings and num_devices > 1:
    fsdp, tensor = settings['mesh.fsdp'], settings['mesh.tensor']
    if fsdp != -1 and fsdp * tensor < num_devices:
      yield f'--config.mesh.data={num_slices} --config.mesh.fsdp=-1'
    else:
      yield f'--config.mesh.tensor={2 * tensor}'
  # A smaller batch comes last, because it changes what is learnt.
  if num := settings.get('data.batch_size'):
    yield f'--config.data.batch_size={max(1, num // 2)}'
