"""Named tensors on disk, read one at a time: safetensors, whole or sharded.

A tensor that is opened has a shape and a dtype; its values are read when they are asked for. So
looking at a model takes no memory, and loading it the memory of one tensor. Only safetensors are
read, never pickles.
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

from csrm_jax.core import checks, files

WEIGHTS_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(jnp.bfloat16)}


class Tensor(NamedTuple):
  """A tensor that is not in memory: read returns its values and keeps none of them."""

  shape: tuple[int, ...]
  dtype: np.dtype
  where: str  # the file it lies in, for errors
  read: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of model.safetensors, or of the shards that its index names."""
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
    weight_map = files.read_json(index, dict)['weight_map']
    named = {name: str(file) for name, file in weight_map.items()}
  except (LookupError, TypeError, AttributeError) as error:
    raise _unreadable(index, error) from None
  tensors = {}
  for file in sorted(set(named.values())):
    # An index must not lead a reader out of its folder.
    if pathlib.PurePath(file).name != file or len(file) > 255 or not file.isprintable():
      raise ValueError(
        f'{index}: names the file {checks.show(file)}, which lies in another folder or has no '
        'name of a file; copy the index again.'
      )
    shard = open_file(folder / file)
    wanted = {name for name, value in named.items() if value == file}
    for name in sorted(wanted ^ set(shard)):
      what = 'is missing' if name in wanted else 'is not in the index'
      raise ValueError(f'{folder / file}: {name} {what} ({INDEX_FILE}); copy the weights again.')
    tensors |= shard
  return tensors


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of one safetensors file; errors are those of open_folder."""
  tensors = {}
  with _opened(path) as file:
    for name in file.keys():  # noqa: SIM118  not a dict
      part = file.get_slice(name)
      if part.get_dtype() not in _DTYPES:
        raise ValueError(
          f'{path}: {name} is stored as {part.get_dtype()}, only {", ".join(_DTYPES)} are '
          'supported; choose weights that are not quantised.'
        )
      tensors[name] = Tensor(
        tuple(part.get_shape()),
        _DTYPES[part.get_dtype()],
        str(path),
        functools.partial(_read, path, name),
      )
  return tensors


def _read(path: pathlib.Path, name: str) -> np.ndarray:
  # Opened for each tensor, because the pages of those before stay as long as the file is mapped.
  with _opened(path) as file:
    return file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  """Yields the open file; whatever goes wrong with it becomes a ValueError of one line."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      yield file
  except (OSError, safetensors.SafetensorError) as error:
    raise _unreadable(path, error) from None


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
  reason = (str(error).splitlines() or ['no reason given'])[0]
  return ValueError(f'{path}: cannot be read ({reason}); write or copy the file again.')


def write(
  folder: pathlib.Path,
  tensors: Mapping[str, Tensor],
  metadata: Mapping[str, str],
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes the tensors as one file, or as shards and their index.

  Every file appears whole, the index last, and has the metadata in its header. One shard is in
  memory at a time; only a single larger tensor may exceed max_shard_bytes. The folder may already
  hold files of the same names; other weights raise ValueError.
  """
  shards, size = [[]], 0  # the names in each file
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += tensor.num_bytes
  count = len(shards)
  if count == 1:
    names_of = {WEIGHTS_FILE: shards[0]}
  else:
    names_of = {f'model-{i:05}-of-{count:05}.safetensors': s for i, s in enumerate(shards, 1)}
  known = {*names_of} | ({INDEX_FILE} if count > 1 else set())
  # With other weights beside these, a reader would not know which to take.
  for path in sorted(folder.glob('model*.safetensors*')):
    if path.name not in known and path.suffix != '.tmp':
      raise ValueError(f'{path}: other weights are there already; give an empty folder.')
  for file, names in names_of.items():
    write_file(folder / file, {name: tensors[name] for name in names}, metadata)
  if count > 1:
    index = {
      'metadata': {'total_size': sum(t.num_bytes for t in tensors.values())},
      'weight_map': {name: file for file, names in names_of.items() for name in names},
    }
    write_json(folder / INDEX_FILE, index)


def write_json(path: pathlib.Path, obj: Any) -> None:
  """Writes a JSON file in the manner of transformers."""
  files.write_json(path, obj, sort_keys=True, ensure_ascii=False)


def write_file(
  path: pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
  """Writes the tensors as one safetensors file, which appears whole."""
  arrays = {name: np.ascontiguousarray(tensor.read()) for name, tensor in tensors.items()}
  # transformers refuses a file whose header names no format.
  with files.whole(path) as partial:
    safetensors.numpy.save_file(arrays, partial, metadata={'format': 'pt', **metadata})
    _sort_metadata(partial)


def _sort_metadata(path: pathlib.Path) -> None:
  """Makes one content one file: the library writes metadata in an order that it draws anew."""
  with path.open('r+b') as file:
    size = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(size))
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    data = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
    assert len(data) <= size, (len(data), size)
    file.seek(8)
    file.write(data.ljust(size))


def digest(tensors: Mapping[str, Tensor]) -> str:
  """Returns a sha256 (hex) over names, dtypes, shapes and values, however spread over files."""
  content = hashlib.sha256()
  for name in sorted(tensors):
    tensor = tensors[name]
    content.update(f'{name} {tensor.dtype} {tensor.shape}\n'.encode())
    content.update(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8))
  return content.hexdigest()


def equal(first: Tensor, second: Tensor) -> bool:
  """Returns whether two tensors hold the same bits, with one in memory at a time."""
  if (first.shape, first.dtype) != (second.shape, second.dtype):
    return False
  return digest({'': first}) == digest({'': second})
