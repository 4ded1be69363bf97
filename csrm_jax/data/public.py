"""Readers of public data sets, in their own formats, from local files.

Each brings rules that its labels answer to (`public_rules`). The same text
under other rules has another true label: that is what these sets are for.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.core import files
from csrm_jax.core.checks import show
from csrm_jax.data import rows
from csrm_jax.data.public_rules import (
  HARMLESSNESS,
  MODERATION_RULES,
  MODERATION_SEVERITY,
  MODERATION_TURN,
  XSTEST_RULES,
)
from csrm_jax.data.rows import Rows
from csrm_jax.safety import augment
from csrm_jax.safety.schema import Example, Message, Pair, SafetyConfig

XSTEST_LABELS = ('1_full_compliance', '2_full_refusal', '3_partial_refusal')

_HH_ROLES = {'Human': 'user', 'Assistant': 'agent'}
_HH_TURN = re.compile(r'\n\n(Human|Assistant):')


def read_hh_pairs(path: str | os.PathLike, safety: SafetyConfig = HARMLESSNESS) -> Rows:
  """Returns preference pairs from Anthropic HH transcripts (JSONL, .gz).

  A row has `chosen` and `rejected`: two transcripts that share all up to the
  last "\\n\\nAssistant:". Roles are parsed where a turn starts; the words
  Human and Assistant inside a turn stay as they are.

  Left out and counted: 'prompts_differ', 'empty_response', 'identical_pair'.

  Raises:
    ValueError: a missing column, or text that is no transcript.
  """
  result = Rows()
  for where, row in files.read_json_lines(path):
    rows.check_object(row, ('chosen', 'rejected'), where)
    chosen, rejected = (
      _parse_transcript(rows.check_text(row, column, where), column, where)
      for column in ('chosen', 'rejected')
    )
    if chosen[:-1] != rejected[:-1]:
      result.drop('prompts_differ')
    elif not (chosen[-1].content and rejected[-1].content):
      result.drop('empty_response')
    elif chosen[-1] == rejected[-1]:
      result.drop('identical_pair')
    else:
      name = f'hh/{_line(where)}'
      safer, other = (
        Example(f'{name}/{side}', safety, conversation, source='hh')
        for side, conversation in (('chosen', chosen), ('rejected', rejected))
      )
      result.append(Pair(name, safer, other, 'preference'))
  return result


def read_xstest(
  prompts_csv: str | os.PathLike, completions_csv: str | os.PathLike, rule: str = 'harmful'
) -> Rows:
  """Returns XSTest completions as examples under one of three rule sets.

  rule 'harmful': unsafe iff a harmful request (type contrast_*) was fully
  complied with; 'refusal': unsafe iff a harmless one was fully refused;
  'both': either. Partial refusals violate neither.

  Left out and counted: 'unknown_prompt' (not in the prompt file),
  'empty_response'.

  Raises:
    ValueError: an unknown rule, column, label or type.
  """
  keys = tuple(XSTEST_RULES) if rule == 'both' else (rule,)
  if not set(keys) <= set(XSTEST_RULES):
    raise ValueError(
      f'unknown XSTest rule {rule!r}; use one of {", ".join([*XSTEST_RULES, "both"])}'
    )
  safety = SafetyConfig(tuple(XSTEST_RULES[key] for key in keys), f'xstest/{rule}')
  prompts = _read_xstest_prompts(prompts_csv)
  model = pathlib.Path(completions_csv).stem
  result = Rows()
  columns = ('id', 'type', 'prompt', 'completion', 'final_label')
  for where, row in rows.read_csv(completions_csv, columns):
    _check_one_of(row, 'final_label', XSTEST_LABELS, where)
    known = prompts.get(row['id'].removeprefix('v2-'))
    if known is None:
      result.drop('unknown_prompt')
      continue
    for column in ('type', 'prompt'):
      if row[column].strip() != known[column].strip():
        raise ValueError(
          f'{where}: {column!r} of prompt {row["id"]} differs from the one in'
          f' {prompts_csv}; use files of one version'
        )
    if not row['completion'].strip():
      result.drop('empty_response')
      continue
    is_harmful = known['label'] == 'unsafe'
    fired = {
      'harmful': is_harmful and row['final_label'] == XSTEST_LABELS[0],
      'refusal': not is_harmful and row['final_label'] == XSTEST_LABELS[1],
    }
    violated = tuple(XSTEST_RULES[key].name for key in keys if fired[key])
    result.append(
      Example(
        id=f'{model}/{row["id"]}/{rule}',
        safety=safety,
        conversation=(Message('user', row['prompt']), Message('agent', row['completion'])),
        label='unsafe' if violated else 'safe',
        violated=violated,
        source='xstest',
        rule_set=f'xstest/{rule}',
      )
    )
  return result


def read_moderation(
  path: str | os.PathLike, categories: Sequence[str] = ('H', 'V', 'HR', 'SH')
) -> Rows:
  """Returns moderation rows as examples under a subset of the categories.

  The text is judged as the agent's response to a neutral request. The
  categories are keys of `MODERATION_RULES`: H hate, V violence, HR
  harassment, SH self-harm; H2 instead of H allows hate unless it threatens,
  V2 instead of V allows violence unless it is graphic.

  Left out and counted: 'unknown_label' (the row does not say whether one of
  the categories applies), 'empty_response'.

  Raises:
    ValueError: an unknown category, both sides of a severity order, or a
      label that is not 0 or 1.
  """
  safety = _moderation_safety(categories)
  result = Rows()
  for where, row in files.read_json_lines(path):
    labels = _moderation_labels(row, categories, where)
    if None in labels.values():
      result.drop('unknown_label')
    elif not row['prompt'].strip():
      result.drop('empty_response')
    else:
      result.append(_moderation_example(row, where, safety, labels))
  return result


def read_moderation_pairs(path: str | os.PathLike) -> Rows:
  """Returns strictness pairs from the severity orders H > H2 and V > V2.

  For each text that violates the strict rule: the text under the lenient rule
  (safer) and under the strict one, both labelled.

  Left out and counted, for each of the two orders: 'unknown_label', 'safe'
  (the strict rule does not fire), 'empty_response'.

  Raises:
    ValueError: a label that is not 0 or 1.
  """
  result = Rows()
  for where, row in files.read_json_lines(path):
    for strict, lenient in MODERATION_SEVERITY:
      labels = _moderation_labels(row, (strict, lenient), where)
      if None in labels.values():
        result.drop('unknown_label')
      elif not labels[strict]:
        result.drop('safe')
      elif not row['prompt'].strip():
        result.drop('empty_response')
      else:
        safety = _moderation_safety((strict,))
        example = _moderation_example(row, where, safety, {strict: labels[strict]})
        result.append(_moderation_pair(example, strict, lenient, labels[lenient]))
  return result


def _parse_transcript(text: str, column: str, where: str) -> tuple[Message, ...]:
  start, *parts = _HH_TURN.split(text)
  if start.strip() or parts[-2:-1] != ['Assistant']:
    raise ValueError(
      f'{where}: column {column!r} is no transcript; it must begin with'
      ' "\\n\\nHuman:" and its last turn with "\\n\\nAssistant:"'
    )
  return tuple(
    Message(_HH_ROLES[role], content.strip())
    for role, content in zip(parts[::2], parts[1::2], strict=True)
  )


def _read_xstest_prompts(path: str | os.PathLike) -> dict[str, dict[str, str]]:
  prompts = {}
  for where, row in rows.read_csv(path, ('id', 'prompt', 'type', 'label')):
    _check_one_of(row, 'label', ('safe', 'unsafe'), where)
    if row['type'].startswith('contrast_') != (row['label'] == 'unsafe'):
      raise ValueError(
        f'{where}: type {row["type"]!r} with label {row["label"]!r}; contrast_*'
        ' prompts are unsafe and all others safe'
      )
    if row['id'] in prompts:
      raise ValueError(f'{where}: id {row["id"]!r} is given twice; remove one of the rows')
    prompts[row['id']] = row
  return prompts


def _check_one_of(row: Mapping[str, Any], column: str, known: Sequence[str], where: str) -> None:
  if row[column] not in known:
    raise ValueError(
      f'{where}: unknown {column} {show(row[column])}; it must be one of {", ".join(known)}'
    )


def _moderation_safety(categories: Sequence[str]) -> SafetyConfig:
  for key in categories:
    if key not in MODERATION_RULES:
      raise ValueError(
        f'unknown moderation category {key!r}; use some of {", ".join(MODERATION_RULES)}'
      )
  for strict, lenient in MODERATION_SEVERITY:
    if strict in categories and lenient in categories:
      raise ValueError(
        f'moderation categories {strict} and {lenient} contradict each other;'
        f' {lenient} allows what {strict} forbids: choose one'
      )
  return SafetyConfig(
    tuple(MODERATION_RULES[key] for key in categories), f'moderation/{"+".join(categories)}'
  )


def _moderation_labels(row: Any, categories: Sequence[str], where: str) -> dict[str, int | None]:
  rows.check_object(row, ('prompt',), where)
  rows.check_text(row, 'prompt', where)
  labels = {}
  for key in categories:
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or value not in (0, 1)):
      raise ValueError(
        f'{where}: label {key} is {show(value)}; it must be 0 or 1, or left out where unknown'
      )
    labels[key] = value
  return labels


def _moderation_example(
  row: Mapping[str, Any], where: str, safety: SafetyConfig, labels: Mapping[str, int]
) -> Example:
  violated = tuple(MODERATION_RULES[k].name for k, v in labels.items() if v)
  return Example(
    id=f'{safety.name}/{_line(where)}',
    safety=safety,
    conversation=(Message('user', MODERATION_TURN), Message('agent', row['prompt'])),
    label='unsafe' if violated else 'safe',
    violated=violated,
    source='moderation',
    rule_set=safety.name,
  )


def _moderation_pair(example: Example, strict: str, lenient: str, fires_lenient: int) -> Pair:
  name = MODERATION_RULES[strict].name
  pair = augment.strictness_pair(example, name, MODERATION_RULES[strict], MODERATION_RULES[lenient])

  def labelled(side: Example, fires: int) -> Example:
    return dataclasses.replace(
      side,
      label='unsafe' if fires else 'safe',
      violated=(name,) if fires else (),
      rule_set=f'moderation/{strict}>{lenient}',
    )

  return dataclasses.replace(
    pair, safer=labelled(pair.safer, fires_lenient), other=labelled(pair.other, 1)
  )


def _line(where: str) -> str:
  return where.rpartition(':')[2]
