"""Checkpoints of a train state together with the data iterator's state.

Orbax writes them: atomically, asynchronously, and from many hosts. This module also stores the
shape and a checksum of every leaf. So it can notice a damaged checkpoint (Orbax reads a missing
chunk as zeros) and tell it apart from a checkpoint of another model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from csrm_jax.core import checks, distributed, files, remote, tree, writer


class Restored(NamedTuple):
  """A restored checkpoint."""

  step: int
  state: Any
  data_state: dict[str, Any]


class Checkpoints:
  """The newest `keep` checkpoints of one directory."""

  def __init__(self, directory: str | os.PathLike, keep: int = 2):
    """Opens the directory; the first save creates it.

    For a local copy of a bucket, checkpoints go to the bucket itself (see core/remote). The
    remains of an interrupted save are removed by the next save, not by reading.
    """
    self.directory = remote.home(directory)
    self._workdir = pathlib.Path(directory).expanduser().absolute().parent
    self._keep = keep
    self._manager = None
    self._damaged: set[int] = set()

  def save(
    self,
    step: int,
    state: Any,
    data_state: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
  ) -> None:
    """Starts to write a checkpoint and returns when `state` may be donated.

    `data_state` and `meta` hold JSON values; `describe` returns `meta`, which describes the model.
    """
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True),
      )
    self._set_aside_damaged(step)
    latest = self._manager.latest_step()
    if latest is not None and latest >= step:
      raise ValueError(
        f'{self.directory}: cannot save step {step}, a checkpoint of step '
        f'{latest} is already there: restore it first or use an empty workdir'
      )
    named = tree.named_leaves(state)
    sums = jax.device_get(_checksums(named))
    content = {
      'data_state': dict(data_state),
      'meta': dict(meta or {}),
      'leaves': {name: [list(x.shape), str(x.dtype), int(sums[name])] for name, x in named.items()},
    }
    info = {'content': content, 'digest': _digest(content)}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(_storage_names(named)), info=ocp.args.JsonSave(info)
      ),
    )

  def restore_latest(self, abstract_state: Any, partial: bool = False) -> Restored | None:
    """Returns the newest intact checkpoint, or None where there is none, damaged or not.

    The arguments are those of `restore`.

    Raises:
      ValueError: There are checkpoints, and all are damaged.
    """
    reason = ''
    steps = self.steps()
    for step in reversed(steps):
      try:
        return self.restore(step, abstract_state, partial)
      except DamagedError as error:
        self._damaged.add(step)
        path, reason = self.directory / str(step), checks.reason(error.__cause__)
        logging.warning('skipping the damaged checkpoint %s (%s)', path, reason)
    if steps:
      raise ValueError(
        f'{self.directory}: all checkpoints there are damaged ({", ".join(map(str, steps))}; '
        f'{reason}); put back a copy of one, or move that folder and metrics.jsonl away to begin '
        'again with step 0'
      )
    return None

  def restore(self, step: int, abstract_state: Any, partial: bool = False) -> Restored:
    """Returns the checkpoint of a step.

    The leaves are laid out as in `abstract_state` (ShapeDtypeStructs or arrays), on whatever
    mesh they were written. With `partial` the checkpoint may hold more leaves than are asked
    for: this reads parameters without the optimizer's state.

    Raises:
      DamagedError: What is there is not what was saved.
      ValueError: It is a checkpoint of another model.
      OSError: It cannot be read, which is no damage.
    """
    wanted, path = tree.named_leaves(abstract_state), self.directory / str(step)
    steps = self.steps()
    content = _read_info(path, steps)['content']
    # Another model is a mistake of the user, not damage.
    self._check_same_model(step, wanted, content['leaves'], partial)
    with _reading(path, steps):
      named = self._read_state(step, wanted)
      for name, value in jax.device_get(_checksums(named)).items():
        if int(value) != content['leaves'][name][2]:
          raise ValueError(f'the bits of leaf {name!r} fail their checksum')
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), named.values())
    return Restored(step, state, content['data_state'])

  def steps(self) -> list[int]:
    """Returns the steps that have a finished checkpoint, ascending."""
    listed = self.directory.iterdir() if self.directory.is_dir() else ()
    found = {path for path in listed if path.name.isdecimal() and path.is_dir()}
    # The listing of a bucket may be late: what the run has recorded is asked for by name.
    named = {self.directory / str(step) for step in _recorded(self._workdir).values()}
    found |= {path for path in named if (path / 'info' / 'metadata').exists()}
    # A save in progress has a name of its own until its final rename, or, in a bucket, lacks a file
    # until its end.
    return sorted(int(path.name) for path in found if ocp.utils.is_checkpoint_finalized(path))

  def find_missing(self) -> str:
    """Returns a line on a saved checkpoint that is newer than all that are there, or ''."""
    last, steps = _recorded(self._workdir).get('whole', 0), self.steps()
    if not steps or last <= steps[-1]:
      return ''
    return (
      f'{self.directory}: its run has saved step {last}, and the newest checkpoint there is of '
      f'step {steps[-1]}; put the newer one back'
    )

  def wait(self) -> None:
    """Waits until the last save is on disk; raises the error that stopped it."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and ends Orbax's threads."""
    self.wait()
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def _set_aside_damaged(self, step: int) -> None:
    """Renames damaged checkpoints that stand in the way of `step`."""
    moved = sorted(s for s in self._damaged if s >= step)
    if not moved:
      return
    self._manager.wait_until_finished()
    for old in moved:
      if jax.process_index() == 0:
        target, number = self.directory / f'damaged-{old}', 1
        while target.exists():
          number += 1
          target = self.directory / f'damaged-{old}-{number}'
        (self.directory / str(old)).rename(target)
      self._damaged.discard(old)
    # No process may list the steps again before the first one has renamed them.
    distributed.sync('checkpoints set aside')
    self._manager.reload()

  def _read_state(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored = _storage_names(
      {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or here)
        for name, x in wanted.items()
      }
    )
    # A reader of its own: reading must not create the directory or clean up in it, as the
    # manager does.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      values = reader.restore(
        self.directory / str(step) / 'state',
        args=ocp.args.PyTreeRestore(
          stored,
          restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
          partial_restore=True,
        ),
      )
    return dict(zip(wanted, (values[key] for key in stored), strict=True))

  def _check_same_model(self, step, wanted, leaves, partial) -> None:
    where = f'{self.directory / str(step)}: checkpoint of another model'
    fix = 'use the config that made it, or another workdir'
    for name, leaf in wanted.items():
      if name not in leaves:
        raise ValueError(f'{where}: it has no leaf {name!r}; {fix}')
      shape, dtype, _ = leaves[name]
      if tuple(shape) != tuple(leaf.shape) or dtype != str(leaf.dtype):
        raise ValueError(
          f'{where}: leaf {name!r} is {dtype}{shape} there and '
          f'{leaf.dtype}{list(leaf.shape)} here; {fix}'
        )
    for name in leaves:
      if name not in wanted and not partial:
        raise ValueError(f'{where}: its leaf {name!r} is unknown here; {fix}')


class Saved(NamedTuple):
  """What a checkpoint says about itself."""

  step: int
  digest: str  # sha256 (hex) of its description, which holds a checksum of every leaf
  meta: dict[str, Any]


def describe(directory: str | os.PathLike, step: int | None = None) -> Saved:
  """Returns what the checkpoint of a step, or the newest one, says about itself.

  Raises:
    FileNotFoundError: There is none.
    ValueError: It is damaged, or missing. An older one is not taken in its place.
  """
  saved = Checkpoints(directory)
  steps = saved.steps()
  if not steps or step not in (None, *steps):
    raise FileNotFoundError(
      f'{saved.directory}: no readable checkpoint there'
      + (f' of step {step}; there are {", ".join(map(str, steps))}' if steps else '')
      + '; give the folder of a run that has saved one'
    )
  if step is None and (missing := saved.find_missing()):
    raise ValueError(f'{missing}, or ask for step={steps[-1]}')
  step = steps[-1] if step is None else step
  info = _read_info(saved.directory / str(step), steps)
  return Saved(step, info['digest'], info['content']['meta'])


def record(workdir: str | os.PathLike, whole: int, begun: int) -> None:
  """Notes in the manifest the newest step that is saved (0: none) and the one that is begun."""
  writer.update_manifest(workdir, {'checkpoint': {'whole': whole, 'begun': begun}})


def _recorded(workdir: pathlib.Path) -> dict[str, int]:
  found = writer.read_manifest(workdir).get('checkpoint', {})
  if not isinstance(found, dict) or not all(type(step) is int for step in found.values()):
    raise ValueError(
      f'{workdir / "manifest.json"}: checkpoint is {checks.show(found)}; remove that entry'
    )
  return found


class DamagedError(ValueError):
  """A checkpoint is not what was saved."""


@contextlib.contextmanager
def _reading(path: epath.Path, steps: Sequence[int] = ()) -> Iterator[None]:
  """Raises DamagedError for what a reader met, but OSError where nothing could be read."""
  try:
    yield
  except jax.errors.JaxRuntimeError:
    raise  # Out of memory and the like: the files are not to blame.
  except Exception as error:  # Orbax raises whatever a reader met.
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    if _DENIED.search(str(error)) or (isinstance(error, OSError) and not missing):
      raise OSError(
        f'{path}: the checkpoint cannot be read ({checks.reason(error)}); mount its volume or '
        'correct its permissions, and run the same command again'
      ) from error
    older = [other for other in steps if str(other) != path.name]
    raise DamagedError(
      f'{path}: the checkpoint is damaged ({checks.reason(error)})'
      + (f'; put back a copy of it, or ask for step={older[-1]}' if older else '')
    ) from error


# How TensorStore, which reads the arrays, reports that it may not or cannot read.
_DENIED = re.compile(r'PERMISSION_DENIED|UNAVAILABLE|UNAUTHENTICATED|DEADLINE_EXCEEDED')


def _read_info(path: epath.Path, steps: Sequence[int] = ()) -> dict[str, Any]:
  with _reading(path, steps):
    info = json.loads((path / 'info' / 'metadata').read_text('utf-8'))
    if _digest(info['content']) != info['digest']:
      raise ValueError('its description does not match its digest')
    return info


def _digest(content: Any) -> str:
  try:
    return files.digest(content, sort_keys=True, allow_nan=False)
  except TypeError as error:
    raise ValueError(f'data_state and meta must be JSON: {error}') from None


def _storage_names(named: Mapping[str, Any]) -> dict[str, Any]:
  # Slashes would become folders in some of the storage formats.
  return {name.replace('/', '.'): leaf for name, leaf in named.items()}


@jax.jit
def _checksums(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: _checksum(jnp.asarray(x)) for name, x in named.items()}


def _checksum(x: jax.Array) -> jax.Array:
  """Returns a uint32 checksum of an array's bits, the same on every mesh."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  place = jnp.zeros(bits.shape, jnp.uint32)
  # Each word is hashed together with its place, so that swapped words are noticed. Sums of
  # integers modulo 2^32 do not depend on how the array is cut over devices.
  for axis in range(bits.ndim):
    stride = math.prod(bits.shape[axis + 1 :]) % 2**32
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place += iota * jnp.uint32(stride)
  # The finaliser of MurmurHash3: every input bit moves every output bit.
  h = bits ^ (place * jnp.uint32(0x9E3779B9) + jnp.uint32(0x7F4A7C15))
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
