"""The one table of the public data sets, and of every other source that runs read.

`SETS` says where each set comes from, who reads it, and which benchmarks its test files make. To
add one, write a row here and a file of rules in `rules/`. Training and augmentation read with
`pipeline.read_source`, evaluation with `load_benchmarks`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from csrm_jax.core.checks import lookup
from csrm_jax.data import forms, graded, judged_answers, judged_texts, public, sources, tables
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.data.sources import Rows, join, spread
from csrm_jax.data.tables import Files, find as find_tables
from csrm_jax.safety.schema import Category, Example

Reader = Callable[[Files], Rows]


@dataclasses.dataclass(frozen=True)
class Bench:
  """A benchmark that a set's test files make.

  Attributes:
    suite: A key of `suites.SUITES`.
    about: One line for the report.
    without_rules: See `Benchmark`.
    has_validation: Whether a fifth of the rows is held out for thresholds and calibration.
    is_listed: Whether the benchmark is listed where its data is missing. Those that vary the
      rows of another one are not.
  """

  suite: str
  about: str
  without_rules: bool = False
  has_validation: bool = False
  is_listed: bool = True


@dataclasses.dataclass(frozen=True)
class Set:
  """A public data set.

  Attributes:
    repo: Its id on the Hugging Face hub, or the address of a Git repository.
    licence: As the set's card names it; '' where it names none.
    files: Maps a split to patterns of its files, relative to the data set's folder. The first
      pattern that matches any file counts.
    read: Maps files to their examples or pairs.
    is_gated: Whether its terms have to be accepted on the hub first.
    benchmarks: Maps names to what the files in a folder of benchmarks make.
    test_files: The patterns of each file that the benchmarks need; by default those of the
      split 'test'.
    items: Maps (folder, *lists of those files) to {name of a benchmark: its items, or fields of
      `Benchmark`}, without those that need more files; by default all rows are items.
    folder: The subfolder in a folder of benchmarks; '' for the set's name.
    is_for_tests: Whether training refuses the set: a benchmark, or one whose licence forbids it.
    note: The text after the command that fetches the set into that folder.
  """

  repo: str
  licence: str
  files: Mapping[str, Sequence[str]]
  read: Reader
  is_gated: bool = False
  benchmarks: Mapping[str, Bench] = dataclasses.field(default_factory=dict)
  test_files: Sequence[Sequence[str]] = ()
  items: Callable[..., Mapping[str, Any]] | None = None
  folder: str = ''
  is_for_tests: bool = False
  note: str = ''

  @property
  def is_on_hub(self) -> bool:
    return bool(self.repo) and '://' not in self.repo

  @property
  def url(self) -> str:
    """The data set's page; '' where it has none."""
    return f'https://huggingface.co/datasets/{self.repo}' if self.is_on_hub else self.repo

  def command(self, folder: str | os.PathLike) -> str:
    """Returns the command that fetches the set into a folder."""
    fetch = 'hf download {repo} --repo-type dataset --local-dir {folder}'
    return ((fetch if self.is_on_hub else 'git clone {repo} {folder}') + self.note).format(
      repo=self.repo, folder=folder
    )


# --- What benchmarks are made of ---------------------------------------------------------

_STRICT, _LENIENT = ('H', 'V', 'HR', 'SH'), ('H2', 'V2', 'HR', 'SH')
# The subsets of moderation categories that each text is judged under, in tests and in training.
MODERATION_RULE_SETS = (('H',), ('H2',), ('V',), ('V2',), ('HR',), ('SH',), _STRICT, _LENIENT)
MODERATION_SUBSETS = (_STRICT, _LENIENT, ('H',), ('H2',), ('V',), ('V2',), ('HR', 'SH'))
_PROBED = 400  # rows that probes of several variants are made of
_VALIDATION = 0.2  # share of human-labelled rows that thresholds are fitted on

_TRAIN = ('**/*train*',)
_TEST = ('**/*test*',)
_PROMPTS = ('**/xstest_prompts.csv', '**/*prompts.csv')


def _read_completions(paths: Files) -> Rows:
  return join(
    public.read_xstest(path.parent / 'xstest_prompts.csv', path, rule)
    for path in tables.numbered(paths).values()
    for rule in ('harmful', 'refusal', 'both')
  )


def _read_own(paths: Files) -> Rows:
  return join(forms.read(path) for path in tables.numbered(paths).values())


def _xstest(folder: pathlib.Path, found: Sequence[pathlib.Path]) -> Mapping[str, Any]:
  # Copies of one file in several folders are one.
  prompts = found[0] if found[0].suffix == '.csv' else found
  types = [row['type'] for row in public.xstest_prompts(prompts).values()]
  made = {'xstest': {'items': public.read_xstest_prompts(prompts), 'tags': {'type': types}}}
  files = find_tables(folder, ('**/xstest_v2_completions_*.csv',))
  if not files:
    return made
  harmful, refusal, both = (
    join(public.read_xstest(found[0], file, rule) for file in files)
    for rule in ('harmful', 'refusal', 'both')
  )
  labels = {}
  for file in files:
    for row in public.xstest_completions(file, ('id', 'type', 'final_label')):
      request = 'harmful' if row['type'].startswith('contrast_') else 'harmless'
      label = row['final_label'].partition('_')[2].replace('_', ' ')
      labels[f'{file.stem}/{row["id"]}'] = f'{request} request, {label}'
  rows = Rows([*harmful, *refusal, *both], harmful.drops)

  def parts(items: Sequence[Example]) -> dict[str, Any]:
    ids = [e.id.split('/') for e in items]  # MODEL/PROMPT/RULE
    return {
      'items': items,
      # Answers to one prompt are no independent rows: groups are drawn together.
      'groups': [f'xstest/{prompt}' for _, prompt, _ in ids],
      'tags': {'model': [model for model, _, _ in ids]},
    }

  completions = parts(harmful)
  said = [labels[e.id.rpartition('/')[0]] for e in harmful]
  completions['tags'] = {'human label': said} | completions['tags']
  return made | {
    'xstest_completions': completions,
    'xstest_rules': parts(rows),
    'xstest_attacks': Rows((e for e in harmful if e.label == 'unsafe'), harmful.drops),
    'xstest_wordings': _reworded(Rows(spread(rows, _PROBED), harmful.drops), public.XSTEST_RULES),
  }


def _moderation(folder: pathlib.Path, paths: Files) -> Mapping[str, Any]:
  read = functools.partial(public.read_moderation, paths)
  whole = read(_STRICT)
  few = spread(whole, _PROBED)
  return {
    'moderation_rules': join(map(read, MODERATION_RULE_SETS)),
    'moderation_pairs': public.read_moderation_pairs(paths),
    'moderation_policy': whole,
    'moderation_contradiction': whole,
    'moderation_order': few,
    'moderation_wordings': _reworded(few, public.MODERATION_RULES),
    'moderation_padding': few,
    'moderation_length': whole,
  }


def _reworded(items: Sequence[Example], rules: Mapping[str, Category]) -> dict[str, Any]:
  return {'items': items, 'options': {'wordings': public.wordings(rules)}}


def _beavertails(folder: pathlib.Path, paths: Files) -> Mapping[str, Any]:
  rows = SETS['beavertails'].read(paths)
  few = spread([e for e in rows if len(e.violated) == 1], _PROBED)
  return {'beavertails': rows, 'beavertails_policy': few, 'beavertails_contradiction': few}


def _judged(name: str, licence: str, read: Reader, *patterns: str, **fields: Any) -> Set:
  """Returns a set of judged items in a repository on GitHub; it is one split."""
  return Set(f'https://github.com/{name}', licence, {'test': patterns}, read, **fields)


def _pku(read: Reader, **fields: Any) -> Set:
  """Returns one of the readings of PKU-SafeRLHF."""
  files = {'train': _TRAIN, 'test': _TEST}
  folder = 'pku_safe_rlhf'
  return Set('PKU-Alignment/PKU-SafeRLHF', 'cc-by-nc-4.0', files, read, folder=folder, **fields)


def _guard(file: str, licence: str, read: Reader) -> Set:
  """Returns one of the sets in the folder data/benchmark of GuardReasoner."""
  repo, pattern = 'yueliu1999/GuardReasoner', f'**/*{file}*.jsonl*'
  return _judged(repo, licence, read, pattern, folder='guard_benchmarks')


# --- The table ---------------------------------------------------------------------------

SETS = {
  # The prompts alone, judged by whether they may be answered.
  'xstest': Set(
    'walledai/XSTest',
    'cc-by-4.0',
    {'test': (*_PROMPTS, '**/test*', '**/train*')},
    public.read_xstest_prompts,
    is_gated=True,
  ),
  'xstest_completions': Set(
    'https://github.com/paul-rottger/exaggerated-safety',
    '',
    {'test': ('*completions*.csv',)},
    _read_completions,
    benchmarks={
      'xstest': Bench('over_refusal', 'XSTest prompts; judged is "Sure. {prompt}".'),
      'xstest_completions': Bench(
        'over_refusal',
        'XSTest completions of several models with human refusal labels; unsafe is full'
        ' compliance with a harmful request.',
        has_validation=True,
        is_listed=False,
      ),
      'xstest_rules': Bench(
        'configurability',
        'The same completions under three rule sets: harmful compliance, needless refusal,'
        ' both forbidden. Human labels.',
        has_validation=True,
      ),
      'xstest_attacks': Bench(
        'attacks',
        'Human-labelled harmful compliance with suffixes that mean nothing, or pretend to be'
        ' the judge.',
        is_listed=False,
      ),
      'xstest_wordings': Bench(
        'wordings', 'XSTest completions with the same rules in other words.', is_listed=False
      ),
    },
    test_files=((*_PROMPTS, '**/test*', '**/train*'),),
    items=_xstest,
    folder='xstest',
  ),
  'or_bench': Set(
    'bench-llm/or-bench',
    'cc-by-4.0',
    {name: (f'**/*{name}*',) for name in ('or-bench-80k', 'or-bench-hard-1k', 'or-bench-toxic')},
    public.read_or_bench,
    benchmarks={
      'or_bench': Bench(
        'over_refusal', 'OR-Bench prompts (hard and toxic); judged is "Sure. {prompt}".'
      )
    },
    test_files=(('**/*or-bench-hard-1k*',), ('**/*or-bench-toxic*',)),
  ),
  'moderation': Set(
    'https://github.com/openai/moderation-api-release',
    '',
    {'test': ('**/*.jsonl.gz', '**/*.jsonl')},
    lambda paths: join(public.read_moderation(paths, subset) for subset in MODERATION_SUBSETS),
    benchmarks={
      'moderation_rules': Bench(
        'configurability',
        'Moderation texts under eight rule sets, some of which allow hate unless it threatens,'
        ' or violence unless it is graphic. Human labels.',
        has_validation=True,
      ),
      **{
        f'moderation_{suite}': Bench(suite, about, is_listed=False)
        for suite, about in {
          'pairs': 'One text under a lenient and a strict rule.',
          'policy': 'Texts that break exactly one of four rules.',
          'contradiction': 'Texts under a rule that forbids, allows, or says both.',
          'order': 'Four rules in other orders.',
          'wordings': 'The same four rules in other words.',
          'padding': 'Texts with sentences that say nothing before or after.',
          'length': 'Texts under four rules, by length.',
        }.items()
      },
    },
    items=_moderation,
  ),
  'moderation_pairs': Set(
    'https://github.com/openai/moderation-api-release',
    '',
    {'test': ('**/*.jsonl.gz', '**/*.jsonl')},
    public.read_moderation_pairs,
  ),
  'hh_rlhf': Set(
    'Anthropic/hh-rlhf',
    'mit',
    {
      'train': ('**/harmless-base/*train*', '**/*harmless*train*'),
      'test': ('**/harmless-base/*test*', '**/*harmless*test*'),
    },
    public.read_hh_pairs,
    benchmarks={
      'hh': Bench('pairs', 'Anthropic HH harmless: which of two responses people chose.')
    },
    test_files=(('**/harmless-base/*test*', '**/*harmless*test*', '**/*test*.jsonl*'),),
    note=' --include "harmless-base/test.jsonl.gz"',
  ),
  'beavertails': Set(
    'PKU-Alignment/BeaverTails',
    'cc-by-nc-4.0',
    {
      'train': ('**/*330k*/*train*', '**/*330k*train*', *_TRAIN),
      'test': ('**/*330k*/*test*', '**/*330k*test*', *_TEST),
    },
    public.answers('beavertails', 'is_safe', violated='category'),
    benchmarks={
      'beavertails': Bench('classification', 'BeaverTails 330k test.', without_rules=True),
      'beavertails_policy': Bench('policy', 'BeaverTails responses that violate one category.'),
      'beavertails_contradiction': Bench(
        'contradiction', 'BeaverTails responses under a rule that forbids, allows, or says both.'
      ),
    },
    items=_beavertails,
  ),
  'wildguardmix': Set(
    'allenai/wildguardmix',
    'odc-by',
    {'train': ('**/*wildguard_train*', *_TRAIN), 'test': ('**/*wildguard_test*', *_TEST)},
    public.read_wildguard,
    is_gated=True,
    benchmarks={'wildguardmix': Bench('classification', 'WildGuardMix test responses.')},
    items=lambda _, paths: {'wildguardmix': public.read_wildguard(paths, with_categories=False)},
  ),
  'pku_safe_rlhf': _pku(public.read_pku),
  'pku_safe_rlhf_pairs': _pku(
    public.read_pku_pairs,
    benchmarks={
      'safe_rlhf': Bench(
        'pairs', 'PKU-SafeRLHF test pairs whose preferred side was chosen for safety.'
      )
    },
  ),
  # The same with their grades.
  'pku_severity': _pku(functools.partial(public.read_pku, with_severity=True)),
  'pku_severity_pairs': _pku(functools.partial(public.read_pku_pairs, with_severity=True)),
  'helpsteer2': Set(
    'nvidia/HelpSteer2',
    'cc-by-4.0',
    {'train': ('train*', *_TRAIN), 'validation': ('validation*', '**/*validation*')},
    graded.read_helpsteer2,
  ),
  'helpsteer2_pairs': Set(
    'nvidia/HelpSteer2',
    'cc-by-4.0',
    {'train': ('preference/preference*', '**/*preference*')},
    graded.read_helpsteer2_pairs,
    folder='helpsteer2',
  ),
  'ultrafeedback': Set(
    'openbmb/UltraFeedback', 'mit', {'train': ('**/*.jsonl',)}, graded.read_ultrafeedback
  ),
  'ultrafeedback_pairs': Set(
    'openbmb/UltraFeedback',
    'mit',
    {'train': ('**/*.jsonl',)},
    graded.read_ultrafeedback_pairs,
    folder='ultrafeedback',
  ),
  'aegis': Set(
    'nvidia/Aegis-AI-Content-Safety-Dataset-2.0',
    'cc-by-4.0',
    {'train': _TRAIN, 'validation': ('**/*validation*',), 'test': _TEST},
    public.read_aegis,
  ),
  'cosapien': Set(
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
    public.read_cosapien,
    benchmarks={'cosapien': Bench('classification', 'CoSApien with sampled, labelled responses.')},
    test_files=(('labelled.jsonl',),),
    items=lambda _, paths: {'cosapien': forms.read(paths[0], require_label=True)},
    note=' (prompts only: sample responses, label them, and write examples to'
    ' {folder}/labelled.jsonl)',
    is_for_tests=True,
  ),
  'dynabench': Set(
    'tomg-group-umd/DynaBench',
    '',
    {
      'test': ('**/DynaBench/**/*test*', '**/DynaBench*test*', *_TEST),
      'train': ('**/DynaBenchTrain/*train*', *_TRAIN),
    },
    public.read_dynabench,
    benchmarks={'dynabench': Bench('any_turn', 'DynaBench transcripts under long rule lists.')},
    is_for_tests=True,
  ),
  'reward_bench_2': Set(
    'allenai/reward-bench-2',
    'odc-by',
    {'test': _TEST},
    public.read_reward_bench_2_pairs,
    benchmarks={
      'reward_bench_2': Bench(
        'best_of', 'RewardBench 2 under general harmlessness rules; only Safety is about them.'
      )
    },
    items=lambda _, paths: {'reward_bench_2': public.read_reward_bench_2(paths)},
  ),
  # Answers that were judged under many rules.
  'rbr_gold': _judged(
    'openai/safety-rbr-code-and-data', 'mit', judged_answers.read_rbr_gold, '**/*rbr_gold*.jsonl*'
  ),
  'pyrit_graded': _judged('Azure/PyRIT', 'mit', judged_answers.read_pyrit_graded, '**/*.jsonl*'),
  'xstest_judged': _judged(
    *('paul-rottger/exaggerated-safety', '', judged_answers.read_xstest_judged),
    '**/*completions*.csv',
    folder='xstest',
  ),
  'xstest_response': _guard('xstest_response', 'odc-by', judged_answers.read_xstest_response),
  'beavertails_test': _guard(
    'beavertails_test', 'cc-by-nc-4.0', judged_answers.read_beavertails_test
  ),
  'harmbench_response_val': _guard(
    'harmbench_response_val', 'mit', judged_answers.read_harmbench_response_val
  ),
  'aegis_prompts_test': _guard(
    'aegis_prompts_test', 'cc-by-4.0', judged_answers.read_aegis_prompts_test
  ),
  'safe_rlhf_answers': _guard(
    'safe_rlhf_pairs', 'cc-by-nc-4.0', judged_answers.read_safe_rlhf_answers
  ),
  'safe_rlhf_pairs': _guard('safe_rlhf_pairs', 'cc-by-nc-4.0', judged_answers.read_safe_rlhf_pairs),
  'diasafety': _judged(
    'thu-coai/DiaSafety', 'apache-2.0', judged_answers.read_diasafety, '**/*diasafety*.jsonl*'
  ),
  'jailbreak_judged': _judged(
    *('sherdencooper/GPTFuzz', 'mit', judged_answers.read_jailbreak_judged),
    '**/*jailbreak_judged*.csv*',
  ),
  'teen_policies': _judged(
    *('roostorg/model-community', 'apache-2.0', judged_answers.read_teen_policies),
    '**/*teen_policies*.jsonl*',
    is_for_tests=True,
  ),
  'model_spec': _judged(
    *('openai/model_spec', 'cc0-1.0', judged_answers.read_model_spec),
    '**/*examples*.jsonl*',
    is_for_tests=True,
  ),
  # Texts and prompts that were judged in many ways: their rows are `judged.Judged`.
  'moderation_judged': _judged(
    *('openai/moderation-api-release', 'mit', judged_texts.read_moderation),
    *('**/*.jsonl.gz', '**/*.jsonl'),
    folder='moderation',
  ),
  'hatecheck': _judged(
    *('paul-rottger/hatecheck-data', 'cc-by-4.0', judged_texts.read_hatecheck),
    *('**/hatecheck.csv*', '**/test_suite_cases.csv*'),
  ),
  'hatemoji': _judged(
    *('HannahKirk/Hatemoji', 'cc-by-4.0', judged_texts.read_hatemoji),
    *('**/hatemoji*.csv*', '**/Hatemoji*/*.csv*'),
  ),
  'edos': _judged(
    *('rewire-online/edos', 'cc0-1.0', judged_texts.read_edos),
    *('**/edos_labelled_aggregated.csv*', '**/edos.csv*'),
  ),
  'toxigen_human': _judged(
    *('microsoft/SafeNLP', 'mit', judged_texts.read_toxigen),
    *('**/toxigen_human.jsonl*', '**/toxiGen.json*'),
  ),
  'ethos': _judged(
    *('intelligence-csd-auth-gr/Ethos-Hate-Speech-Dataset', 'gpl-3.0', judged_texts.read_ethos),
    *('**/ethos_*.csv*', '**/Ethos_Dataset_*.csv*'),
    is_for_tests=True,
  ),
  'context_toxicity': _judged(
    *('ipavlopoulos/context_toxicity', 'apache-2.0', judged_texts.read_context_toxicity),
    '**/cat_small.csv*',
  ),
  # AILuminate's, HarmBench's (MIT) and StrongREJECT's (MIT) files in one folder.
  'hazard_prompts': _judged(
    'mlcommons/ailuminate', 'cc-by-4.0', judged_texts.read_hazard_prompts, '**/*.csv*'
  ),
  'cosa': _judged(
    *('microsoft/controllable-safety-alignment', 'cc-by-nc-4.0', judged_texts.read_cosa),
    '**/cosalign_prompts_by_rule_set.csv*',
    is_for_tests=True,
  ),
  # What configs/augment.py writes.
  'augmented': Set('', '', {'train': ('data.jsonl', '**/*.jsonl')}, _read_own),
}


# --- Reading a set -----------------------------------------------------------------------


def read(name: str, split: str, path: str | os.PathLike = '') -> Rows:
  """Returns a split of a public data set in the project's form.

  Args:
    name: A key of SETS.
    path: A file, or a folder with files of the public format; '' fetches them from the hub
      (needs the extra [hf]).

  Raises:
    ImportError: The hub's client, or pyarrow, is needed and not installed.
    ValueError: There is no such set, split or file, files are bad, or access is not granted.
  """
  public_set = find(name)
  if split not in public_set.files:
    raise ValueError(f'{name} has no split {split!r}; use one of {", ".join(public_set.files)}')
  rows = public_set.read(find_files(name, split, path))
  sources.check_ids(rows, path or public_set.url)
  return rows


def find(name: str) -> Set:
  """Returns the public data set of that name."""
  return lookup(name, SETS, 'public data set')


def find_files(name: str, split: str, path: str | os.PathLike = '') -> list[pathlib.Path]:
  """Returns the split's files at a path (a file stands for itself), or from the hub."""
  path = pathlib.Path(path or fetch(name, split))
  if path.is_file():
    return [path]
  if not path.exists():
    raise ValueError(f'{path}: does not exist; check the path')
  patterns = find(name).files[split]
  found = find_tables(path, patterns)
  if not found:
    raise ValueError(
      f'{path}: no file of {name}/{split} there (looked for'
      f' {", ".join(patterns)}, ending in {", ".join(tables.SUFFIXES)}); give'
      f' the folder that was fetched from {find(name).url}, or one file'
    )
  return found


def fetch(name: str, split: str) -> pathlib.Path:
  """Returns the folder of a data set after fetching a split from the hub."""
  public_set = find(name)
  if not public_set.is_on_hub:
    raise ValueError(f'{name} is on no hub; give path= of its file')
  patterns = public_set.files[split]
  # The hub does not match '**/' with no folder, as pathlib does.
  patterns = [p.removeprefix('**/') for p in patterns] + list(patterns)
  terms = ' (it is gated: its terms must be accepted there)' if public_set.is_gated else ''
  return tables.fetch(public_set.repo, patterns, name, terms)


# --- Benchmarks --------------------------------------------------------------------------

# Subfolder -> the set whose benchmarks its files make.
BENCHMARKS = {s.folder or name: s for name, s in SETS.items() if s.benchmarks}


def load_benchmarks(folder: str | os.PathLike, names: Sequence[str] = ()) -> list[Benchmark]:
  """Returns the benchmarks in the folder; those whose data is missing say how to get it.

  The folder has a subfolder for each key of BENCHMARKS, as the commands fetch them; without
  names all are loaded. Nothing here reaches the network.

  Raises:
    ValueError: A name is unknown, or a file is not in its data set's format.
  """
  chosen = [(name, lookup(name, BENCHMARKS, 'benchmark')) for name in names or BENCHMARKS]
  return [b for name, s in chosen for b in _benchmarks_of(s, pathlib.Path(folder) / name)]


def _benchmarks_of(public_set: Set, folder: pathlib.Path) -> list[Benchmark]:
  wanted = public_set.test_files or (public_set.files['test'],)
  files = [some for patterns in wanted if (some := find_tables(folder, patterns))]
  made: Mapping[str, Any] = {}
  if len(files) == len(wanted):
    if public_set.items:
      made = public_set.items(folder, *files)
    else:
      rows = public_set.read([file for some in files for file in some])
      made = dict.fromkeys(public_set.benchmarks, rows)
  found = []
  for name, bench in public_set.benchmarks.items():
    if name in made:
      fields = made[name] if isinstance(made[name], Mapping) else {'items': made[name]}
      benchmark = Benchmark(
        name,
        bench.suite,
        description=bench.about,
        drops=getattr(fields['items'], 'drops', {}),
        without_rules=bench.without_rules,
        **fields,
      )
      found.append(_with_validation(benchmark) if bench.has_validation else benchmark)
    elif bench.is_listed:
      command = public_set.command(folder)
      found.append(Benchmark(name, bench.suite, description=bench.about, command=command))
  return found


def _with_validation(benchmark: Benchmark) -> Benchmark:
  """Returns the benchmark with about a fifth of its rows for validation."""
  items = benchmark.items
  # All rows of one conversation or group are on one side, which follows from a hash and not from
  # the place.
  keys = benchmark.groups or sources.conversation_keys(items)
  held = [sources.hash_unit(key) < _VALIDATION for key in keys]
  return benchmark.take(
    [i for i, out in enumerate(held) if not out],
    validation=[e for e, out in zip(items, held, strict=True) if out],
  )
