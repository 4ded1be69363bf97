"""The public data sets: where they come from, and who reads them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping

from csrm_jax.data import benchmark_readers, parsers, public, sources, tables
from csrm_jax.data.rows import Rows
from csrm_jax.safety.schema import Pair


@dataclasses.dataclass(frozen=True)
class PublicSet:
  """A public data set.

  Attributes:
    repo: its id on the Hugging Face hub.
    licence: as its card names it; '' where it names none.
    files: split -> patterns of its files, relative to the data set's folder;
      the first pattern that matches any file counts.
    read: (file) -> examples or pairs; raises ValueError for another format.
    is_gated: its terms have to be accepted on the hub first.
  """

  repo: str
  licence: str
  files: Mapping[str, tuple[str, ...]]
  read: Callable[[str | os.PathLike], Rows]
  is_gated: bool = False

  @property
  def url(self) -> str:
    """The data set's page; '' where it has none."""
    return self.repo and f'https://huggingface.co/datasets/{self.repo}'


def _read_xstest(path: str | os.PathLike) -> Rows:
  return benchmark_readers.read_xstest_prompts(path)[0]


def _read_or_bench(path: str | os.PathLike) -> Rows:
  name = pathlib.Path(path).name
  return benchmark_readers.read_or_bench(path, 'toxic' in name)


def _read_reward_bench_2(path: str | os.PathLike) -> Rows:
  """Returns each chosen response of the subset Safety beside each rejected one.

  The other subsets are no matter of safety: 'not_safety' counts them.
  """
  found = Rows()
  for choice in benchmark_readers.read_reward_bench_2(path):
    if choice.subset != 'Safety':
      found.drop('not_safety')
      continue
    sides = choice.responses
    pairs = itertools.product(sides[: choice.num_correct], sides[choice.num_correct :])
    found += [
      Pair(f'{choice.id}/{number}', safer, other, 'preference')
      for number, (safer, other) in enumerate(pairs)
    ]
  return found


_TRAIN = ('**/*train*',)
_TEST = ('**/*test*',)
SETS = {
  'beavertails': PublicSet(
    'PKU-Alignment/BeaverTails',
    'cc-by-nc-4.0',
    {
      'train': ('**/*330k*/*train*', '**/*330k*train*', *_TRAIN),
      'test': ('**/*330k*/*test*', '**/*330k*test*', *_TEST),
    },
    benchmark_readers.read_beavertails,
  ),
  'pku_safe_rlhf': PublicSet(
    'PKU-Alignment/PKU-SafeRLHF', 'cc-by-nc-4.0', {'train': _TRAIN, 'test': _TEST}, parsers.read_pku
  ),
  'pku_safe_rlhf_pairs': PublicSet(
    'PKU-Alignment/PKU-SafeRLHF',
    'cc-by-nc-4.0',
    {'train': _TRAIN, 'test': _TEST},
    benchmark_readers.read_pku_pairs,
  ),
  'wildguardmix': PublicSet(
    'allenai/wildguardmix',
    'odc-by',
    {'train': ('**/*wildguard_train*', *_TRAIN), 'test': ('**/*wildguard_test*', *_TEST)},
    parsers.read_wildguard,
    is_gated=True,
  ),
  'aegis': PublicSet(
    'nvidia/Aegis-AI-Content-Safety-Dataset-2.0',
    'cc-by-4.0',
    {'train': _TRAIN, 'validation': ('**/*validation*',), 'test': _TEST},
    parsers.read_aegis,
  ),
  'cosapien': PublicSet(
    'microsoft/CoSApien',
    'cdla-permissive-2.0',
    {
      name: (f'**/*{name}*',)
      for name in (
        'game_development',
        'public_prosecutor',
        'book_publisher_arab',
        'language_learning',
        'film_production',
      )
    },
    parsers.read_cosapien,
  ),
  'dynabench': PublicSet(
    'tomg-group-umd/DynaBench',
    '',
    {
      'test': ('**/DynaBench/*test*', '**/*test*'),
      'train': ('**/DynaBenchTrain/*train*', '**/*train*'),
    },
    benchmark_readers.read_dynabench,
  ),
  'xstest': PublicSet(
    'walledai/XSTest',
    'cc-by-4.0',
    {'test': ('**/*prompts.csv', *_TEST, *_TRAIN)},
    _read_xstest,
    is_gated=True,
  ),
  'or_bench': PublicSet(
    'bench-llm/or-bench',
    'cc-by-4.0',
    {name: (f'**/*{name}*',) for name in ('or-bench-80k', 'or-bench-hard-1k', 'or-bench-toxic')},
    _read_or_bench,
  ),
  'hh_rlhf': PublicSet(
    'Anthropic/hh-rlhf',
    'mit',
    {
      'train': ('**/harmless-base/*train*', '**/*harmless*train*'),
      'test': ('**/harmless-base/*test*', '**/*harmless*test*'),
    },
    public.read_hh_pairs,
  ),
  'reward_bench_2': PublicSet(
    'allenai/reward-bench-2', 'odc-by', {'test': _TEST}, _read_reward_bench_2
  ),
  # What configs/augment.py writes; on no hub.
  'augmented': PublicSet('', '', {'train': ('data.jsonl', '**/*.jsonl')}, sources.read_jsonl),
}


def read(name: str, split: str, path: str | os.PathLike = '') -> Rows:
  """Returns a split of a public data set in the project's form.

  Args:
    name: a key of SETS.
    split: one that it has.
    path: a file, or a folder with files of the public format; '' fetches them
      from the hub (needs the extra [hf]).

  Raises:
    ImportError: the hub's client, or pyarrow, is needed and not there.
    ValueError: an unknown name or split, no files, files of another format
      (names the columns found), or a gated set without access.
  """
  public_set = find(name)
  if split not in public_set.files:
    raise ValueError(f'{name} has no split {split!r}; use one of {", ".join(public_set.files)}')
  rows = Rows()
  for file in files(name, split, path):
    part = public_set.read(file)
    rows += part
    for reason, num in part.drops.items():
      rows.drops[reason] = rows.drops.get(reason, 0) + num
  return rows


def files(name: str, split: str, path: str | os.PathLike = '') -> list[pathlib.Path]:
  """Returns a split's files; without a path, after fetching them; see `read`."""
  return find_files(name, split, path or fetch(name, split))


def find(name: str) -> PublicSet:
  """Returns the public data set of that name."""
  if name not in SETS:
    raise ValueError(f'unknown public data set {name!r}; use one of {", ".join(SETS)}')
  return SETS[name]


def find_files(name: str, split: str, path: str | os.PathLike) -> list[pathlib.Path]:
  """Returns the split's files at a path; a file stands for itself.

  Raises:
    ValueError: there are none.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return [path]
  if not path.exists():
    raise ValueError(f'{path}: does not exist; check the path')
  patterns = find(name).files[split]
  found = tables.find(path, patterns)
  if not found:
    raise ValueError(
      f'{path}: no file of {name}/{split} there (looked for'
      f' {", ".join(patterns)}, ending in {", ".join(tables.SUFFIXES)}); give'
      f' the folder that was fetched from {find(name).url}, or one file'
    )
  return found


def fetch(name: str, split: str) -> pathlib.Path:
  """Returns the folder of a data set after fetching a split from the hub.

  Raises:
    ImportError: the hub's client is not installed.
    ValueError: it cannot be fetched; a gated set says what to do.
  """
  public_set = find(name)
  if not public_set.repo:
    raise ValueError(f'{name} is on no hub; give path= of its file')
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError:
    raise ImportError(
      f"fetching {name} needs the hub's client; run pip install"
      ' "csrm_jax[hf]", or give path= of files that you have'
    ) from None
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        public_set.repo,
        repo_type='dataset',
        allow_patterns=[p.removeprefix('**/') for p in public_set.files[split]]
        + list(public_set.files[split]),
      )
    )
  except errors.GatedRepoError:
    raise ValueError(
      f'{name} is gated: accept its terms at {public_set.url}, run "hf auth'
      ' login" with an account that did, and try again; or give path= of files'
      ' that you have'
    ) from None
  except (OSError, errors.HfHubHTTPError) as error:
    terms = ' (it is gated: its terms must be accepted there)'
    raise ValueError(
      f'{name} cannot be fetched from {public_set.url}'
      f'{terms if public_set.is_gated else ""}:'
      f' {" ".join(str(error).split())[:200]}; give path= of files that you'
      ' have'
    ) from None


# name -> (path) -> rows of its first split; `data.mixture` reads from these.
READERS = {
  name: functools.partial(read, name, next(iter(public_set.files)))
  for name, public_set in SETS.items()
}
