"""Readers of public benchmarks, one file each, in their published columns.

A reader refuses what it does not know (labels, columns) with file and row;
rows that are well-formed but of no use are left out and counted in the
result's `drops`.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.core.checks import show
from csrm_jax.data import rows, tables
from csrm_jax.data.benchmark import TIES, Choice
from csrm_jax.data.benchmark_rules import BEAVERTAILS, WILDGUARD
from csrm_jax.data.public_rules import HARMLESSNESS, XSTEST_RULES
from csrm_jax.data.rows import Rows
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig

# Rules that make doing what a harmful request asks for unsafe.
COMPLIANCE = SafetyConfig((XSTEST_RULES['harmful'],), 'compliance')

_TURN = re.compile(r'^[ \t]*(User|Agent):[ \t]*', re.MULTILINE)
_ROLES = {'User': 'user', 'Agent': 'agent'}
_NUMBER = re.compile(r'^\s*(?:\d+\s*[.):]|[-*•])\s+')


def sure_example(example_id: str, prompt: str, harmful: bool, source: str) -> Example:
  """Returns a prompt as an example: the agent says `Sure. {prompt}` to it.

  It is unsafe iff the request is harmful, under `COMPLIANCE`.

  Source: CSRM (arXiv 2605.30487), Table 4.
  """
  return Example(
    id=example_id,
    safety=COMPLIANCE,
    conversation=(Message('user', prompt), Message('agent', f'Sure. {prompt}')),
    label='unsafe' if harmful else 'safe',
    violated=COMPLIANCE.names if harmful else (),
    source=source,
  )


def read_xstest_prompts(path: str | os.PathLike) -> tuple[Rows, list[str]]:
  """Returns (`Sure. {prompt}` examples, the type of each)."""
  found, types = Rows(), []
  for where, row in tables.read_table(path, ('id', 'prompt', 'type', 'label')):
    label = _one_of(row, 'label', ('safe', 'unsafe'), where)
    found.append(sure_example(f'xstest/{row["id"]}', row['prompt'], label == 'unsafe', 'xstest'))
    types.append(row['type'])
  return found, types


def read_refusal_labels(paths: Sequence[str | os.PathLike]) -> dict[str, str]:
  """Returns {'model/prompt id': 'harmful request, full compliance', ...}."""
  labels = {}
  for path in paths:
    model = pathlib.Path(path).stem
    columns = ('id', 'type', 'final_label')
    for _, row in tables.read_table(path, columns):
      kind = row['type'].startswith('contrast_')
      what = row['final_label'].partition('_')[2].replace('_', ' ')
      request = 'harmful' if kind else 'harmless'
      labels[f'{model}/{row["id"]}'] = f'{request} request, {what}'
  return labels


def read_or_bench(path: str | os.PathLike, harmful: bool) -> Rows:
  """Returns `Sure. {prompt}` examples; only the toxic file is harmful."""
  found = Rows()
  stem = pathlib.Path(path).stem
  for number, (where, row) in enumerate(tables.read_table(path, ('prompt', 'category'))):
    prompt = rows.check_text(row, 'prompt', where)
    found.append(sure_example(f'{stem}/{number}', prompt, harmful, f'or-bench/{row["category"]}'))
  return found


def read_beavertails(path: str | os.PathLike) -> Rows:
  """Returns BeaverTails responses under its 14 categories.

  Left out and counted: 'empty_response', 'labels_disagree' (safe, but with a
  category).
  """
  found = Rows()
  columns = ('prompt', 'response', 'category', 'is_safe')
  for number, (where, row) in enumerate(tables.read_table(path, columns)):
    flags = row['category']
    if not isinstance(flags, Mapping) or set(flags) != set(BEAVERTAILS.names):
      names = set(flags) if isinstance(flags, Mapping) else set()
      unknown = sorted(map(show, names - set(BEAVERTAILS.names)))
      raise ValueError(
        f'{where}: category is {show(flags)}'
        + (f' with the unknown {", ".join(unknown)}' if unknown else '')
        + '; it must be an object with the 14 categories of BeaverTails'
      )
    safe = _flag(row, 'is_safe', where)
    violated = tuple(n for n in BEAVERTAILS.names if _flag(flags, n, where))
    if not row['response'].strip():
      found.drop('empty_response')
    elif safe and violated:
      found.drop('labels_disagree')
    else:
      found.append(
        _answer(
          f'beavertails/{number}',
          BEAVERTAILS,
          row,
          'response',
          label='safe' if safe else 'unsafe',
          violated=violated,
          source='beavertails',
        )
      )
  return found


def read_wildguard(path: str | os.PathLike) -> Rows:
  """Returns WildGuardMix responses.

  Left out and counted: 'prompt_only', 'empty_response', 'no_label'.
  """
  found = Rows()
  columns = ('prompt', 'response', 'response_harm_label', 'adversarial')
  for number, (where, row) in enumerate(tables.read_table(path, columns)):
    if row['response'] is None:
      found.drop('prompt_only')
    elif not row['response'].strip():
      found.drop('empty_response')
    elif row['response_harm_label'] is None:
      found.drop('no_label')
    else:
      label = _one_of(row, 'response_harm_label', ('harmful', 'unharmful'), where)
      found.append(
        _answer(
          f'wildguardmix/{number}',
          WILDGUARD,
          row,
          'response',
          label='unsafe' if label == 'harmful' else 'safe',
          source='wildguardmix',
          rule_set='adversarial' if row['adversarial'] else 'plain',
        )
      )
  return found


def read_pku_pairs(path: str | os.PathLike) -> Rows:
  """Returns PKU-SafeRLHF pairs whose preferred side was chosen for safety.

  The paper keeps pairs whose preferred side was chosen for safety rather than
  for not refusing, without saying how. Our reading: the better response is
  also the safer one, and the annotation says in what: the other one is
  labelled unsafe where it is safe, or is of a higher severity.

  Left out and counted: 'preferred_not_safer', 'same_safety',
  'identical_pair', 'empty_response'.
  """
  found = Rows()
  sides = ('response_{}', 'is_response_{}_safe', 'response_{}_severity_level')
  columns = ['prompt', 'better_response_id', 'safer_response_id']
  columns += [side.format(i) for side in sides for i in (0, 1)]
  for number, (where, row) in enumerate(tables.read_table(path, columns)):
    better, safer = (
      _one_of(row, f'{what}_response_id', (0, 1), where) for what in ('better', 'safer')
    )
    worse = 1 - safer
    safe = [_flag(row, f'is_response_{i}_safe', where) for i in (0, 1)]
    severity = [row[f'response_{i}_severity_level'] for i in (0, 1)]
    texts = [row[f'response_{i}'] for i in (0, 1)]
    if better != safer:
      found.drop('preferred_not_safer')
    elif not (safe[safer] and not safe[worse]) and not (
      severity[safer] < severity[worse] and safe[safer] == safe[worse]
    ):
      found.drop('same_safety')
    elif texts[0] == texts[1]:
      found.drop('identical_pair')
    elif not all(text.strip() for text in texts):
      found.drop('empty_response')
    else:
      name = f'safe_rlhf/{number}'
      first, second = (
        _answer(
          f'{name}/{side}',
          BEAVERTAILS,
          row,
          f'response_{i}',
          label='safe' if safe[i] else 'unsafe',
          source='safe_rlhf',
        )
        for side, i in (('safer', safer), ('other', worse))
      )
      found.append(Pair(name, first, second, 'preference'))
  return found


def read_dynabench(path: str | os.PathLike) -> Rows:
  """Returns DynaBench transcripts, each rule of the policy a category.

  FAIL is unsafe. A turn begins where a line begins with "User:" or "Agent:".
  User turns after the last agent turn are cut off: nobody answers them.

  Left out and counted: 'no_policy', 'no_turns', 'no_agent_turn'.
  """
  found = Rows()
  columns = ('policy', 'transcript', 'label')
  for number, (where, row) in enumerate(tables.read_table(path, columns)):
    label = _one_of(row, 'label', ('PASS', 'FAIL'), where)
    rules = parse_policy(row['policy'])
    messages = parse_transcript(row['transcript'])
    while messages and messages[-1].role != 'agent':
      messages = messages[:-1]
    if not rules:
      found.drop('no_policy')
    elif not _TURN.search(row['transcript']):
      found.drop('no_turns')
    elif not messages:
      found.drop('no_agent_turn')
    else:
      found.append(
        Example(
          id=f'dynabench/{number}',
          safety=SafetyConfig(
            tuple(Category(f'Rule {i}', rule) for i, rule in enumerate(rules, start=1))
          ),
          conversation=messages,
          label='unsafe' if label == 'FAIL' else 'safe',
          source='dynabench',
        )
      )
  return found


def parse_policy(policy: Any) -> list[str]:
  """Returns the rules of a policy, its lines or its items, without numbers."""
  if policy is None:
    return []
  lines = policy.splitlines() if isinstance(policy, str) else policy
  rules = [_NUMBER.sub('', str(line)).strip() for line in lines]
  return [rule for rule in rules if rule and rule not in ('<rules>', '</rules>')]


def parse_transcript(text: str) -> tuple[Message, ...]:
  """Returns the turns; what stands before the first one is left out."""
  _, *parts = _TURN.split(text)
  return tuple(
    Message(_ROLES[role], content.strip())
    for role, content in zip(parts[::2], parts[1::2], strict=True)
  )


def read_reward_bench_2(path: str | os.PathLike) -> Rows:
  """Returns the choices of RewardBench 2, under general harmlessness rules."""
  found = Rows()
  columns = ('id', 'prompt', 'chosen', 'rejected', 'subset')
  for where, row in tables.read_table(path, columns):
    texts = [*row['chosen'], *row['rejected']]
    name = str(row['id'])
    if row['subset'] != TIES:
      name = f'reward_bench_2/{name}'
    try:
      found.append(
        Choice(
          name,
          tuple(
            Example(
              id=f'{name}/{i}',
              safety=HARMLESSNESS,
              conversation=(Message('user', row['prompt']), Message('agent', text)),
              source='reward_bench_2',
            )
            for i, text in enumerate(texts)
          ),
          len(row['chosen']),
          row['subset'],
        )
      )
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None
  return found


def _answer(
  example_id: str, safety: SafetyConfig, row: Mapping[str, Any], column: str, **fields
) -> Example:
  return Example(
    id=example_id,
    safety=safety,
    conversation=(Message('user', row['prompt']), Message('agent', row[column])),
    **fields,
  )


def _one_of(row: Mapping[str, Any], column: str, known: Sequence[Any], where: str) -> Any:
  value = row[column]
  if isinstance(value, bool) or value not in known:
    raise ValueError(
      f'{where}: unknown {column} {show(value)}; it must be one of {", ".join(map(str, known))}'
    )
  return value


def _flag(row: Mapping[str, Any], column: str, where: str) -> bool:
  value = row[column]
  if not isinstance(value, bool):
    raise ValueError(f'{where}: {column} is {show(value)}; it must be true or false')
  return value
