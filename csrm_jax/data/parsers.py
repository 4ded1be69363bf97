"""Readers of public training sets that know which categories are violated.

They add to `data.benchmark_readers` what training needs and evaluation does
not. Each refuses category names that it does not know.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from csrm_jax.core.checks import hint, show
from csrm_jax.data import benchmark_readers, rows, tables
from csrm_jax.data.benchmark_readers import sure_example
from csrm_jax.data.rows import Rows
from csrm_jax.data.taxonomies import AEGIS, AEGIS_UNSTATED, PKU, WILDGUARD_SUBCATEGORIES
from csrm_jax.safety.schema import Category, Example, Message, SafetyConfig

_COSAPIEN_LABELS = {
  'allowed': 'safe',
  'safe': 'safe',
  'disallowed': 'unsafe',
  'partial': 'unsafe',
  'partially allowed': 'unsafe',
}


def read_wildguard(path: str | os.PathLike) -> Rows:
  """Returns WildGuardMix responses, with the category of harmful ones.

  The set annotates the prompt's subcategory; a harmful response is taken to be
  in the same. With 'others' the category is unknown. For the rest see
  `benchmark_readers.read_wildguard`.

  Raises:
    ValueError: an unknown subcategory.
  """
  found = benchmark_readers.read_wildguard(path)
  columns = ('subcategory', 'response')
  names = {}
  for number, (where, row) in enumerate(tables.read_table(path, columns)):
    name = row['subcategory']
    if name is not None:
      names[f'wildguardmix/{number}'] = _lookup(name, WILDGUARD_SUBCATEGORIES, 'subcategory', where)

  def with_category(example: Example) -> Example:
    name = names.get(example.id)
    if name is None or example.label != 'unsafe':
      return example
    return dataclasses.replace(example, violated=(name,))

  return Rows(map(with_category, found), found.drops)


def read_aegis(path: str | os.PathLike) -> Rows:
  """Returns AEGIS 2.0 responses under 21 categories.

  `violated_categories` is of prompt and response together: for an unsafe
  response it is taken as is, unless it holds only what states no rule ('Needs
  Caution', 'Other'); then the category is unknown.

  Left out and counted: 'redacted' (the prompt is not in the set),
  'prompt_only', 'empty_response', 'no_label'.

  Raises:
    ValueError: an unknown label or category.
  """
  found = Rows()
  columns = (
    'id',
    'reconstruction_id_if_redacted',
    'prompt',
    'response',
    'response_label',
    'violated_categories',
  )
  for where, row in tables.read_table(path, columns):
    names = _aegis_names(row['violated_categories'], where)
    label = row['response_label']
    if label not in ('safe', 'unsafe', None, ''):
      raise ValueError(
        f'{where}: unknown response_label {show(label)}; it must be safe, unsafe or null'
      )
    if row['reconstruction_id_if_redacted'] not in (None, '', 0):
      found.drop('redacted')
    elif row['response'] is None:
      found.drop('prompt_only')
    elif not row['response'].strip():
      found.drop('empty_response')
    elif not label:
      found.drop('no_label')
    else:
      found.append(
        _example(
          f'aegis/{row["id"]}',
          AEGIS,
          row['prompt'],
          row['response'],
          label=label,
          violated=names if label == 'unsafe' else (),
          source='aegis',
        )
      )
  return found


def read_pku(path: str | os.PathLike) -> Rows:
  """Returns both responses of PKU-SafeRLHF rows under its 19 categories.

  Left out and counted: 'empty_response', 'labels_disagree' (safe, but with a
  category).

  Raises:
    ValueError: an unknown category.
  """
  found = Rows()
  parts = 'response_{}', 'is_response_{}_safe', 'response_{}_harm_category'
  columns = ['prompt', *(part.format(i) for i in (0, 1) for part in parts)]
  for number, (where, row) in enumerate(tables.read_table(path, columns)):
    for i in (0, 1):
      text, safe, flags = (row[part.format(i)] for part in parts)
      if not isinstance(safe, bool) or not isinstance(flags, Mapping):
        raise ValueError(
          f'{where}: response {i} has is_safe {show(safe)} and harm_category'
          f' {show(flags)}; they must be true or false, and an object'
        )
      for name in flags:
        _lookup(name, dict.fromkeys(PKU.names), 'harm category', where)
      violated = tuple(name for name in PKU.names if flags.get(name))
      if not text.strip():
        found.drop('empty_response')
      elif safe and violated:
        found.drop('labels_disagree')
      else:
        found.append(
          _example(
            f'pku/{number}/{i}',
            PKU,
            row['prompt'],
            text,
            label='safe' if safe else 'unsafe',
            violated=violated,
            source='pku',
          )
        )
  return found


def read_cosapien(path: str | os.PathLike) -> Rows:
  """Returns CoSApien prompts, each under the rules of its scenario.

  The set has no responses: judged is "Sure. {prompt}", as in `sure_example`.
  A prompt that is allowed only in part counts as disallowed. The whole text
  of the scenario is one category.

  Raises:
    ValueError: an unknown type.
  """
  found = Rows()
  columns = ('prompt', 'scenario', 'type')
  for number, (where, row) in enumerate(tables.read_table(path, columns)):
    prompt = rows.check_text(row, 'prompt', where)
    kind = rows.check_text(row, 'type', where).strip().casefold()
    label = _lookup(kind, _COSAPIEN_LABELS, 'type', where)
    stem = os.path.basename(path).split('.')[0].split('-')[0]
    example = sure_example(
      f'cosapien/{stem}/{number}', prompt, label == 'unsafe', f'cosapien/{stem}'
    )
    rules = SafetyConfig((Category('Scenario', row['scenario']),), stem)
    found.append(
      dataclasses.replace(
        example,
        safety=rules,
        source='cosapien',
        violated=('Scenario',) if label == 'unsafe' else (),
      )
    )
  return found


def _aegis_names(value: Any, where: str) -> tuple[str, ...]:
  """Returns the stated categories in a comma-separated list."""
  known = dict.fromkeys((*AEGIS.names, *AEGIS_UNSTATED))
  names = [name.strip() for name in (value or '').split(',') if name.strip()]
  for name in names:
    _lookup(name, known, 'category', where)
  return tuple(dict.fromkeys(name for name in names if name not in AEGIS_UNSTATED))


def _lookup(name: Any, table: Mapping[str, Any], what: str, where: str) -> Any:
  if name not in table:
    raise ValueError(
      f'{where}: unknown {what} {show(name)}{hint(name, list(table))}; this'
      f' version knows {", ".join(table)}'
    )
  return table[name]


def _example(
  example_id: str, safety: SafetyConfig, prompt: str, response: str, **fields
) -> Example:
  talk = Message('user', prompt), Message('agent', response)
  return Example(example_id, safety, talk, **fields)
