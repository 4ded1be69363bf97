"""The TFDS builder of the public data sets; TensorFlow itself is not needed.

  builder = public_sets.make_builder('beavertails', path=..., data_dir=...)
  builder.download_and_prepare()
  items = public_sets.Prepared('beavertails', 'train', data_dir)  # for grain

Files are read one after the other here, or each where Beam sends it; both write the same rows.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from csrm_jax.core import checks

try:
  import tensorflow_datasets as tfds
except ImportError:
  raise ImportError(
    f'ArrayRecord files need tensorflow_datasets; {checks.install("tfds")}'
  ) from None

from csrm_jax.data import catalogue
from csrm_jax.data.judged import Judged
from csrm_jax.safety.schema import Example, Pair

VERSION = '1.0.0'
# What a row is read as; the name is in its column `kind`.
_KINDS = {'example': Example, 'pair': Pair, 'judged': Judged}
_DROPS = 'drops'  # Namespace of Beam's counters, before /SPLIT.


class PublicSets(tfds.core.GeneratorBasedBuilder):
  """The items of one public data set, a config for each."""

  VERSION = tfds.core.Version(VERSION)
  BUILDER_CONFIGS = [  # noqa: RUF012
    tfds.core.BuilderConfig(name=name, description=public_set.url)
    for name, public_set in catalogue.SETS.items()
  ]

  def __init__(self, *, path: str = '', on_beam: bool = False, **kwargs: Any):
    self._path = path
    self._on_beam = on_beam
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    name = self.builder_config.name
    public_set = catalogue.find(name)
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'{name} in the form of csrm_jax: one item a row, as JSON.',
      homepage=public_set.url or None,
      license=public_set.licence or None,
      metadata=tfds.core.MetadataDict(),
      # Rules differ in number and conversations in turns: as JSON a row is one string, and the
      # schema's own parser checks it.
      features=tfds.features.FeaturesDict(
        {column: tfds.features.Text() for column in ('id', 'kind', 'row')}
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager  # The hub's client has a cache of its own.
    name = self.builder_config.name
    splits, missing = {}, []
    # Filled while rows are written, or from Beam's counters after it.
    drops = self.info.metadata['drops'] = {}
    for split in catalogue.find(name).files:
      try:
        found = catalogue.find_files(name, split, self._path)
      except ValueError as error:
        if not self._path:
          raise
        missing.append(error)  # A folder may hold some of the splits.
        continue
      files = list(enumerate(map(str, found)))
      drops[split] = collections.Counter()
      word = split.replace('-', '_')  # ArrayRecord's split names are words.
      if self._on_beam:
        import apache_beam

        convert = functools.partial(_convert, name, functools.partial(_count_on_beam, split))
        splits[word] = (
          apache_beam.Create(files)
          | 'Spread' >> apache_beam.Reshuffle()
          | 'Convert' >> apache_beam.FlatMap(convert)
        )
      else:
        convert = functools.partial(_convert, name, drops[split].update)
        splits[word] = itertools.chain.from_iterable(map(convert, files))
    if not splits:
      raise missing[0]
    return splits

  def _generate_examples(self) -> None:
    raise NotImplementedError  # TFDS wants it; splits bring their own.

  def _process_pipeline_result(self, pipeline_result: Any) -> None:
    drops = self.info.metadata['drops']
    for result in pipeline_result.metrics().query()['counters']:
      space, _, split = result.key.metric.namespace.partition('/')
      if space == _DROPS:
        drops[split][result.key.metric.name] = result.result


def _convert(
  name: str, count: Callable[[Mapping[str, int]], Any], file: tuple[int, str]
) -> Iterator[tuple[str, dict[str, str]]]:
  """Yields (key, row) for all that is in a file, and counts its drops."""
  number, path = file
  rows = catalogue.find(name).read({number: pathlib.Path(path)})
  count(rows.drops)
  for place, item in enumerate(rows):
    kind = next(kind for kind, form in _KINDS.items() if isinstance(item, form))
    # Keys say where a row goes: they are the same in one process or many.
    yield f'{number}/{place}', {'id': item.id, 'kind': kind, 'row': json.dumps(item.to_dict())}


def _count_on_beam(split: str, drops: Mapping[str, int]) -> None:
  import apache_beam

  for reason, num in drops.items():
    apache_beam.metrics.Metrics.counter(f'{_DROPS}/{split}', reason).inc(num)


def make_builder(
  name: str, data_dir: str | os.PathLike, path: str | os.PathLike = '', on_beam: bool = False
) -> PublicSets:
  """Returns the builder of a public data set (a key of `catalogue.SETS`), for ArrayRecord files.

  Without a path it fetches the files from the hub. With `on_beam` it converts on Apache Beam,
  which `prepare_on_beam` starts.
  """
  catalogue.find(name)
  return PublicSets(
    config=name,
    data_dir=os.fspath(data_dir),
    path=os.fspath(path),
    on_beam=on_beam,
    file_format='array_record',
  )


def prepare_on_beam(
  name: str, data_dir: str | os.PathLike, path: str | os.PathLike = '', options: Sequence[str] = ()
) -> None:
  """Converts a public data set on Apache Beam; the files are those of `make_builder`.

  Workers read `path` and write to `data_dir`. Beam's options, such as '--runner=DataflowRunner',
  are given as texts; without any, all is done in this process.

  Raises:
    ImportError: Beam is not installed.
    ValueError: The name is unknown, or files are missing or bad.
  """
  try:
    from apache_beam.options import pipeline_options
  except ImportError:
    raise ImportError(f'converting on Apache Beam needs it; {checks.install("beam")}') from None
  make_builder(name, data_dir, path, on_beam=True).download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      beam_options=pipeline_options.PipelineOptions(list(options))
    )
  )


class Prepared(Sequence):
  """A split of a prepared data set: items by index, read from disk."""

  def __init__(self, name: str, split: str, data_dir: str | os.PathLike):
    """Opens the files; raises ValueError if they are not there."""
    try:
      self._rows = make_builder(name, data_dir).as_data_source(split=split)
    except (AssertionError, FileNotFoundError, KeyError) as error:
      reason = ' '.join(str(error).split())[:200]
      raise ValueError(
        f'{data_dir}: {name}/{split} is not prepared there ({reason}); call'
        ' make_builder(...).download_and_prepare() first'
      ) from None

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Example | Pair | Judged:
    if not 0 <= index < len(self):
      raise IndexError(f'row {index} of {len(self)}')
    return parse(self._rows[index])


def read_prepared(folder: str | os.PathLike) -> Prepared:
  """Returns the first split of the one prepared data set below a folder.

  Raises:
    ValueError: There is none, or there are several.
  """
  found = sorted(pathlib.Path(folder).rglob('dataset_info.json'))
  if len(found) != 1:
    raise ValueError(
      f'{folder}: {len(found) or "no"} prepared data sets below it; give the'
      ' folder of one, as configs/augment.py:array_record or make_builder(...)'
      '.download_and_prepare() wrote it'
    )
  # DATA_DIR/public_sets/NAME/VERSION/dataset_info.json
  name, data_dir = found[0].parents[1].name, found[0].parents[3]
  (split, *_) = make_builder(name, data_dir).info.splits
  return Prepared(name, split, data_dir)


def parse(row: Mapping[str, Any]) -> Example | Pair | Judged:
  """Returns the item in a row of a prepared data set."""
  obj, kind = json.loads(row['row']), row['kind']
  kind = kind.decode() if isinstance(kind, bytes) else kind
  return _KINDS[kind].from_dict(obj, f'row {obj["id"]}')
