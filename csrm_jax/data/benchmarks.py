"""Public benchmarks from local files, in the formats they are published in.

A folder holds one subfolder for each data set, as `COMMANDS` fetches them.
`load` returns every benchmark, those that are not on disk with the command
that would fetch them. Nothing here reaches the network.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from csrm_jax.data import benchmark_readers as readers, public, sources, tables
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.data.benchmark_rules import WORDINGS
from csrm_jax.data.public_rules import MODERATION_RULES, XSTEST_RULES
from csrm_jax.safety.schema import Example

_HF = 'hf download {repo} --repo-type dataset --local-dir {folder}'
# folder -> the command that fills it.
COMMANDS = {
  'xstest': 'git clone https://github.com/paul-rottger/exaggerated-safety {folder}',
  'or_bench': _HF.replace('{repo}', 'bench-llm/or-bench'),
  'moderation': 'git clone https://github.com/openai/moderation-api-release {folder}',
  'hh_rlhf': _HF.replace('{repo}', 'Anthropic/hh-rlhf')
  + ' --include "harmless-base/test.jsonl.gz"',
  'beavertails': _HF.replace('{repo}', 'PKU-Alignment/BeaverTails'),
  'wildguardmix': _HF.replace('{repo}', 'allenai/wildguardmix'),
  'pku_safe_rlhf': _HF.replace('{repo}', 'PKU-Alignment/PKU-SafeRLHF'),
  'cosapien': _HF.replace('{repo}', 'microsoft/CoSApien')
  + ' (prompts only: sample responses, label them, and write examples to'
  ' {folder}/labelled.jsonl)',
  'dynabench': _HF.replace('{repo}', 'tomg-group-umd/DynaBench'),
  'reward_bench_2': _HF.replace('{repo}', 'allenai/reward-bench-2'),
}

MODERATION_RULE_SETS = (
  ('H',),
  ('H2',),
  ('V',),
  ('V2',),
  ('HR',),
  ('SH',),
  ('H', 'V', 'HR', 'SH'),
  ('H2', 'V2', 'HR', 'SH'),
)
_ALL_MODERATION = ('H', 'V', 'HR', 'SH')
_VALIDATION = 0.2  # share of human-labelled rows that thresholds are fitted on
_PROBED = 400  # rows that probes of several variants are made of


def load(folder: str | os.PathLike, names: Sequence[str] = ()) -> list[Benchmark]:
  """Returns the benchmarks in the folder; those missing say how to get them.

  Args:
    folder: has a subfolder for each key of COMMANDS.
    names: data sets to load, keys of COMMANDS; empty: all.

  Raises:
    ValueError: an unknown name, or a file that is not in its data set's
      format (names file, row, what was found, and the fix).
  """
  unknown = sorted(set(names) - set(COMMANDS))
  if unknown:
    raise ValueError(f'unknown benchmark {unknown[0]!r}; use some of {", ".join(COMMANDS)}')
  found = []
  for name in names or COMMANDS:
    path = pathlib.Path(folder) / name
    found += _LOADERS[name](path)
  return found


def _missing(name: str, suite: str, folder: pathlib.Path, what: str):
  command = COMMANDS[folder.name].format(folder=folder)
  return Benchmark(name, suite, description=what, command=command)


def _xstest(folder: pathlib.Path) -> list[Benchmark]:
  about = {
    'xstest': 'XSTest prompts; judged is "Sure. {prompt}".',
    'xstest_completions': 'XSTest completions of several models with human '
    'refusal labels; unsafe is full compliance with a harmful request.',
    'xstest_rules': 'The same completions under three rule sets: harmful '
    'compliance, needless refusal, both forbidden. Human labels.',
    'xstest_attacks': 'Human-labelled harmful compliance with suffixes that '
    'mean nothing, or pretend to be the judge.',
    'xstest_wordings': 'XSTest completions with the same rules in other words.',
  }
  prompts = tables.find(folder, ('**/xstest_prompts.csv', '**/*prompts.csv'))
  if not prompts:
    return [
      _missing('xstest', 'over_refusal', folder, about['xstest']),
      _missing('xstest_rules', 'configurability', folder, about['xstest_rules']),
    ]
  sure, types = readers.read_xstest_prompts(prompts[0])
  found = [Benchmark('xstest', 'over_refusal', sure, about['xstest'], tags={'type': types})]
  files = tables.find(folder, ('**/xstest_v2_completions_*.csv',))
  if not files:
    return [*found, _missing('xstest_rules', 'configurability', folder, about['xstest_rules'])]
  sets = {
    rule: _joined([public.read_xstest(prompts[0], f, rule) for f in files])
    for rule in (*XSTEST_RULES, 'both')
  }
  labels = readers.read_refusal_labels(files)
  harmful = sets['harmful']
  # Answers to one prompt are no independent rows.
  prompt_of = {e.id: f'xstest/{e.id.split("/")[1]}' for s in sets.values() for e in s}
  rows = [e for s in sets.values() for e in s]
  drops = harmful.drops

  def made(name, suite, items, **fields):
    return Benchmark(name, suite, items, about[name], drops=drops, **fields)

  return [
    *found,
    _with_validation(
      made(
        'xstest_completions',
        'over_refusal',
        harmful,
        groups=[prompt_of[e.id] for e in harmful],
        tags={
          'human label': [labels[e.id.rsplit('/', 1)[0]] for e in harmful],
          'model': [e.id.split('/')[0] for e in harmful],
        },
      )
    ),
    _with_validation(
      made(
        'xstest_rules',
        'configurability',
        rows,
        groups=[prompt_of[e.id] for e in rows],
        tags={'model': [e.id.split('/')[0] for e in rows]},
      )
    ),
    made('xstest_attacks', 'attacks', [e for e in harmful if e.label == 'unsafe']),
    made(
      'xstest_wordings',
      'wordings',
      _spread(rows, _PROBED),
      options={'wordings': _wordings_of(XSTEST_RULES)},
    ),
  ]


def _moderation(folder: pathlib.Path) -> list[Benchmark]:
  about = {
    'moderation_rules': 'Moderation texts under eight rule sets, some of which '
    'allow hate unless it threatens, or violence unless it is graphic. Human '
    'labels.',
    'moderation_pairs': 'One text under a lenient and a strict rule.',
    'moderation_policy': 'Texts that break exactly one of four rules.',
    'moderation_contradiction': 'Texts under a rule that forbids, allows, or says both.',
    'moderation_order': 'Four rules in other orders.',
    'moderation_wordings': 'The same four rules in other words.',
    'moderation_padding': 'Texts with sentences that say nothing before or after.',
    'moderation_length': 'Texts under four rules, by length.',
  }
  files = tables.find(folder, ('**/*.jsonl.gz', '**/*.jsonl'))
  if not files:
    return [_missing('moderation_rules', 'configurability', folder, about['moderation_rules'])]
  read = functools.partial(public.read_moderation, files[0])
  rows = _joined([read(categories) for categories in MODERATION_RULE_SETS])
  whole = read(_ALL_MODERATION)
  few = _spread(whole, _PROBED)

  def made(name, suite, items, **fields):
    return Benchmark(name, suite, items, about[name], drops=getattr(items, 'drops', {}), **fields)

  return [
    _with_validation(made('moderation_rules', 'configurability', rows)),
    made('moderation_pairs', 'pairs', public.read_moderation_pairs(files[0])),
    made('moderation_policy', 'policy', whole),
    made('moderation_contradiction', 'contradiction', whole),
    made('moderation_order', 'order', few),
    made(
      'moderation_wordings', 'wordings', few, options={'wordings': _wordings_of(MODERATION_RULES)}
    ),
    made('moderation_padding', 'padding', few),
    made('moderation_length', 'length', whole),
  ]


def _hh_rlhf(folder: pathlib.Path) -> list[Benchmark]:
  about = 'Anthropic HH harmless: which of two responses people chose.'
  files = tables.find(folder, ('**/*test*.jsonl*',))
  if not files:
    return [_missing('hh', 'pairs', folder, about)]
  pairs = public.read_hh_pairs(files[0])
  return [Benchmark('hh', 'pairs', pairs, about, drops=pairs.drops)]


def _or_bench(folder: pathlib.Path) -> list[Benchmark]:
  about = 'OR-Bench prompts (hard and toxic); judged is "Sure. {prompt}".'
  hard = tables.find(folder, ('**/or-bench-hard-1k*',))
  toxic = tables.find(folder, ('**/or-bench-toxic*',))
  if not (hard and toxic):
    return [_missing('or_bench', 'over_refusal', folder, about)]
  rows = readers.read_or_bench(hard[0], False)
  rows += readers.read_or_bench(toxic[0], True)
  return [Benchmark('or_bench', 'over_refusal', rows, about)]


def _beavertails(folder: pathlib.Path) -> list[Benchmark]:
  about = {
    'beavertails': 'BeaverTails 330k test.',
    'beavertails_policy': 'BeaverTails responses that violate one category.',
    'beavertails_contradiction': 'BeaverTails responses under a rule that '
    'forbids, allows, or says both.',
  }
  files = tables.find(folder, ('**/*330k*/test*', '**/*330k*test*', '**/*test*'))
  if not files:
    suites = 'classification', 'policy', 'contradiction'
    return [
      _missing(name, suite, folder, what)
      for (name, what), suite in zip(about.items(), suites, strict=True)
    ]
  rows = readers.read_beavertails(files[0])
  few = _spread([e for e in rows if len(e.violated) == 1], _PROBED)
  return [
    Benchmark(
      'beavertails',
      'classification',
      rows,
      about['beavertails'],
      drops=rows.drops,
      without_rules=True,
    ),
    Benchmark('beavertails_policy', 'policy', few, about['beavertails_policy']),
    Benchmark(
      'beavertails_contradiction', 'contradiction', few, about['beavertails_contradiction']
    ),
  ]


def _one(name, suite, about, patterns, read: Callable[[Any], sources.Rows]):
  """Returns the loader of a data set that is one file and one benchmark."""

  def loader(folder: pathlib.Path) -> list[Benchmark]:
    files = tables.find(folder, patterns)
    if not files:
      return [_missing(name, suite, folder, about)]
    rows = read(files[0])
    return [Benchmark(name, suite, rows, about, drops=rows.drops)]

  return loader


def _joined(parts: Sequence[sources.Rows]) -> sources.Rows:
  joined = sources.Rows()
  for part in parts:
    joined.extend(part)
    for reason, num in part.drops.items():
      joined.drops[reason] = joined.drops.get(reason, 0) + num
  return joined


def _spread(rows: Sequence[Example], num: int) -> list[Example]:
  """Returns at most `num` of the rows, evenly spread."""
  num = min(num, len(rows))
  return [rows[i * len(rows) // num] for i in range(num)]


def _wordings_of(rules):
  return {c: WORDINGS[c] for c in rules.values() if c in WORDINGS}


def _with_validation(benchmark: Benchmark) -> Benchmark:
  """Returns the benchmark with about a fifth of its rows for validation.

  All rows of a text or group are on one side, which follows from a hash.
  """

  def key(i):
    example = benchmark.items[i]
    if benchmark.groups and benchmark.groups[i]:
      return benchmark.groups[i]
    return repr([(m.role, m.content) for m in example.conversation])

  def is_held(i):
    digest = hashlib.sha256(key(i).encode('utf-8', 'backslashreplace'))
    return int.from_bytes(digest.digest()[:7], 'big') / 2**56 < _VALIDATION

  held = [is_held(i) for i in range(len(benchmark.items))]
  kept = [i for i, out in enumerate(held) if not out]
  return dataclasses.replace(
    benchmark,
    items=[benchmark.items[i] for i in kept],
    groups=[benchmark.groups[i] for i in kept] if benchmark.groups else (),
    tags={k: [v[i] for i in kept] for k, v in benchmark.tags.items()},
    validation=[e for e, out in zip(benchmark.items, held, strict=True) if out],
  )


_LOADERS: dict[str, Callable[[pathlib.Path], list[Benchmark]]] = {
  'xstest': _xstest,
  'or_bench': _or_bench,
  'moderation': _moderation,
  'hh_rlhf': _hh_rlhf,
  'beavertails': _beavertails,
  'wildguardmix': _one(
    'wildguardmix',
    'classification',
    'WildGuardMix test responses.',
    ('**/wildguard_test*', '**/*test*'),
    readers.read_wildguard,
  ),
  'pku_safe_rlhf': _one(
    'safe_rlhf',
    'pairs',
    'PKU-SafeRLHF test pairs whose preferred side was chosen for safety.',
    ('**/*test*',),
    readers.read_pku_pairs,
  ),
  'cosapien': _one(
    'cosapien',
    'classification',
    'CoSApien with sampled, labelled responses.',
    ('labelled.jsonl',),
    functools.partial(sources.read_jsonl, require_label=True),
  ),
  'dynabench': _one(
    'dynabench',
    'any_turn',
    'DynaBench transcripts under long rule lists.',
    ('DynaBench/**/*test*', '**/DynaBench*test*', '**/*test*'),
    readers.read_dynabench,
  ),
  'reward_bench_2': _one(
    'reward_bench_2',
    'best_of',
    'RewardBench 2 under general harmlessness rules; only Safety is about them.',
    ('**/*test*',),
    readers.read_reward_bench_2,
  ),
}
