"""Checkpoints of a train state together with the data iterator's state.

Orbax writes them: atomically, asynchronously, and from many hosts. This module also stores the
shape and a checksum of every leaf. So it can notice a damaged checkpoint (Orbax reads a missing
chunk as zeros) and tell it apart from a checkpoint of another model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from csrm_jax.core import checks, distributed, files, remote, tree


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

    `data_state` and `meta` hold JSON values; `read_meta` returns `meta`, which describes the
    model.
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
    """Returns the newest intact checkpoint, or None where there is none.

    The leaves are laid out as in `abstract_state` (ShapeDtypeStructs or arrays), on whatever
    mesh they were written. With `partial` the checkpoint may hold more leaves than are asked
    for: this reads parameters without the optimizer's state.
    """
    wanted = tree.named_leaves(abstract_state)
    for step in reversed(self.steps()):
      try:
        content = _read_info(self.directory / str(step))
      except (ValueError, KeyError, TypeError, OSError) as error:
        self._warn(step, error)
        continue
      # Another model is a mistake of the user, not damage: it must stop the run, so it is
      # checked outside the `try` blocks.
      self._check_same_model(step, wanted, content['leaves'], partial)
      try:
        named = self._read_state(step, wanted)
        for name, value in jax.device_get(_checksums(named)).items():
          if int(value) != content['leaves'][name][2]:
            raise ValueError(f'the bits of leaf {name!r} fail their checksum')
      except jax.errors.JaxRuntimeError:
        raise  # Out of memory and the like: the files are not to blame.
      except Exception as error:  # Orbax raises whatever a reader met.
        self._warn(step, error)
        continue
      state = jax.tree.unflatten(jax.tree.structure(abstract_state), named.values())
      return Restored(step, state, content['data_state'])
    return None

  def steps(self) -> list[int]:
    """Returns the steps that have a finished checkpoint, ascending."""
    if not self.directory.is_dir():
      return []
    # A save in progress has a name of its own until its final rename, or, in a bucket, lacks a file
    # until its end.
    return sorted(
      int(path.name)
      for path in self.directory.iterdir()
      if path.name.isdecimal() and path.is_dir() and ocp.utils.is_checkpoint_finalized(path)
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

  def _warn(self, step: int, error: Exception) -> None:
    self._damaged.add(step)
    path = self.directory / str(step)
    logging.warning('skipping the damaged checkpoint %s (%s)', path, checks.reason(error))


def read_meta(directory: str | os.PathLike) -> dict[str, Any]:
  """Returns the newest checkpoint's `meta`; raises a FileNotFoundError if there is none."""
  saved = Checkpoints(directory)
  directory = saved.directory
  # The newest description that is intact: the leaves are not read here.
  for step in reversed(saved.steps()):
    try:
      return _read_info(directory / str(step))['meta']
    except (ValueError, KeyError, TypeError, OSError) as error:
      logging.warning('cannot read the checkpoint %s/%d (%s)', directory, step, error)
  raise FileNotFoundError(
    f'{directory}: no readable checkpoint there; give the folder of a run that has saved one'
  )


def _read_info(path: epath.Path) -> dict[str, Any]:
  info = json.loads((path / 'info' / 'metadata').read_text('utf-8'))
  if _digest(info['content']) != info['digest']:
    raise ValueError('its description does not match its digest')
  return info['content']


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
