"""Named tensors on disk, read one at a time: safetensors, whole or sharded.

Nothing here knows what a tensor is for. A tensor is opened for its shape and
dtype, and read when it is asked for: to look at a model costs no memory, to
load it the memory of one tensor. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from csrm_jax.core import files

WEIGHTS_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(jnp.bfloat16)}


class Tensor(NamedTuple):
  """A tensor that is not in memory yet.

  Attributes:
    shape: of what `read` returns.
    dtype: the same.
    where: the file it lies in, for errors.
    read: returns the values; nothing keeps them.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  where: str
  read: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of model.safetensors or of the shards of its index.

  Raises:
    ValueError: no weights there, a damaged file, shards that are not those of
      the index, or a tensor of numbers that are not supported.
  """
  if (folder / WEIGHTS_FILE).is_file():
    return open_file(folder / WEIGHTS_FILE)
  index = folder / INDEX_FILE
  if not index.is_file():
    raise ValueError(
      f'{folder}: cannot be read: neither {WEIGHTS_FILE} nor {INDEX_FILE} '
      'is there (only safetensors are read, never pickled weights); give a '
      'folder that save_pretrained or csrm_jax wrote.'
    )
  try:
    weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    named = {name: str(file) for name, file in weight_map.items()}
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise _unreadable(index, error) from None
  tensors = {}
  for file in sorted(set(named.values())):
    if pathlib.PurePath(file).name != file:
      raise ValueError(f'{index}: names the file {file!r} in another folder; copy the file again.')
    shard = open_file(folder / file)
    wanted = {name for name, value in named.items() if value == file}
    for name in sorted(wanted ^ set(shard)):
      what = 'is missing' if name in wanted else 'is not in the index'
      raise ValueError(f'{folder / file}: {name} {what} ({INDEX_FILE}); copy the weights again.')
    tensors |= shard
  return tensors


def read_metadata(folder: pathlib.Path) -> dict[str, str]:
  """Returns the strings in the header of a folder's (first) weights file."""
  path = folder / WEIGHTS_FILE
  if not path.is_file():
    path = min(folder.glob('model-*-of-*.safetensors'), default=path)
  with _opened(path) as file:
    return dict(file.metadata() or {})


def write(
  folder: pathlib.Path,
  tensors: Mapping[str, Tensor],
  metadata: Mapping[str, str],
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes the tensors as one file, or as shards and their index.

  Every file appears whole, the index last. One shard is in memory at a time.

  Args:
    folder: exists. It may hold the same files already, but no others of these
      names: a reader would not know which to take.
    tensors: in the order in which they are written.
    metadata: strings for the header of each file.
    max_shard_bytes: the most that one file may hold, unless one tensor is
      larger.

  Raises:
    ValueError: the folder holds other weights.
  """
  shards = _plan(tensors, max_shard_bytes)
  count = len(shards)
  if count == 1:
    names = [WEIGHTS_FILE]
  else:
    names = [f'model-{i:05}-of-{count:05}.safetensors' for i in range(1, count + 1)]
  known = {*names} | ({INDEX_FILE} if count > 1 else set())
  for path in sorted(folder.glob('model*.safetensors*')):
    if path.name not in known and path.suffix != '.tmp':
      raise ValueError(f'{path}: other weights are there already; give an empty folder.')
  for file, shard in zip(names, shards, strict=True):
    write_file(folder / file, {name: tensors[name] for name in shard}, metadata)
  if count > 1:
    index = {
      'metadata': {'total_size': sum(t.num_bytes for t in tensors.values())},
      'weight_map': {
        name: file for file, shard in zip(names, shards, strict=True) for name in shard
      },
    }
    write_json(folder / INDEX_FILE, index)


def write_file(
  path: pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
  """Writes the tensors as one safetensors file, which appears whole."""
  arrays = {name: np.ascontiguousarray(tensor.read()) for name, tensor in tensors.items()}
  header = {'format': 'pt', **metadata}
  with files.whole(path) as partial:
    safetensors.numpy.save_file(arrays, partial, metadata=header)


def digest(tensors: Mapping[str, Tensor]) -> str:
  """Returns a sha256 (hex) over names, dtypes, shapes and values.

  It does not depend on how the tensors are spread over files.
  """
  content = hashlib.sha256()
  for name in sorted(tensors):
    tensor = tensors[name]
    content.update(f'{name} {tensor.dtype} {tensor.shape}\n'.encode())
    content.update(_raw(tensor.read()))
  return content.hexdigest()


def equal(first: Tensor, second: Tensor) -> bool:
  """Returns whether two tensors hold the same bits; one in memory at a time."""
  if (first.shape, first.dtype) != (second.shape, second.dtype):
    return False
  return digest({'': first}) == digest({'': second})


def write_json(path: pathlib.Path, obj: Any) -> None:
  """Writes a JSON file that appears as a whole."""
  files.write_json(path, obj, sort_keys=True, ensure_ascii=False)


def _plan(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
  """Returns the names in each file, in order, full but for the last."""
  shards, size = [[]], 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += tensor.num_bytes
  return shards


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of one safetensors file.

  Raises:
    ValueError: as open_folder.
  """
  tensors = {}
  with _opened(path) as file:
    for name in file.keys():  # noqa: SIM118  not a dict
      part = file.get_slice(name)
      if part.get_dtype() not in _DTYPES:
        raise ValueError(
          f'{path}: {name} is stored as {part.get_dtype()}, only '
          f'{", ".join(_DTYPES)} are supported; choose weights that are not '
          'quantised.'
        )
      tensors[name] = Tensor(
        tuple(part.get_shape()),
        _DTYPES[part.get_dtype()],
        str(path),
        functools.partial(_read, path, name),
      )
  return tensors


def _read(path: pathlib.Path, name: str) -> np.ndarray:
  # Opened for each tensor: the pages of the last one go with the mapping.
  with _opened(path) as file:
    return file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  """Yields the open file; what goes wrong with it is one clear line."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      yield file
  except (OSError, safetensors.SafetensorError) as error:
    raise _unreadable(path, error) from None


def _raw(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
  reason = (str(error).splitlines() or ['no reason given'])[0]
  return ValueError(f'{path}: cannot be read ({reason}); write or copy the file again.')
