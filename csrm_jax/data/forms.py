"""Data of one's own, in the forms that people have it in, as examples and pairs.

`FORMS` is the table of forms. A row is in the first one whose columns it has; what it gives is
the project's own form, which `csrm_jax.safety.schema` documents. Labels, names of columns and
rules that rows do not bring come from the caller.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from csrm_jax.core import files
from csrm_jax.core.checks import note, show
from csrm_jax.data import tables
from csrm_jax.data.sources import Rows
from csrm_jax.safety import schema
from csrm_jax.safety.schema import Example, Pair, SafetyConfig

# What else people call them; the first that is there counts.
_SYNONYMS = {
  'prompt': ('instruction', 'question', 'query', 'user_prompt'),
  'response': ('completion', 'output', 'answer', 'reply', 'model_response'),
}
_NESTED = ('safety', 'conversation', 'messages', 'conversations', 'plus', 'minus', 'safer', 'other')
_NESTED += ('prompt', 'response', 'chosen', 'rejected', 'violated', 'ratings')
_LOOKS_VIOLATED = re.compile('violat|categor|rule|polic|flag', re.IGNORECASE)
_LOOKS_LABEL = re.compile('label|safe|toxic|harm|verdict|complian|judg', re.IGNORECASE)
# Only where a turn starts: the words Human and Assistant inside a turn stay as they are.
_HH_TURN = re.compile(r'\n\n(Human|Assistant):')
DROP = 'drop'
_ABSENT = ('', 'nan', 'NaN')
_OPTIONAL = (*schema.EXAMPLE_COLUMNS, *schema.PAIR_SIDE, 'system', 'input')
_NUMBERS = ('probability', *schema.PAIR_SIDE)

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
  """A form of rows; `make` gives the columns of our own form, where they differ."""

  about: str
  columns: Sequence[str]
  make: Callable[[Fields], Fields]


def _pair(row: Fields) -> Fields:
  sides = {}
  for side, column in (('safer', 'chosen'), ('other', 'rejected')):
    talk = _talk(row, row[column])
    sides[side] = {'id': f'{row["id"]}/{column}', 'safety': row.get('safety'), 'conversation': talk}
  return {'kind': 'preference', **sides}


def _talk(row: Fields, reply: Any) -> Any:
  """Returns a list of messages: those of the row's prompt, and the reply."""
  prompt = row.get('prompt')
  if isinstance(reply, str):
    if prompt is None and reply.startswith('\n\nHuman:'):
      _, *parts = _HH_TURN.split(reply)
      return [
        {'role': role, 'content': text.strip()}
        for role, text in zip(parts[::2], parts[1::2], strict=True)
      ]
    reply = [{'role': 'agent', 'content': reply}]
  elif not isinstance(reply, list):
    raise ValueError(f'the response is {show(reply)}; write text or a list of messages')
  elif schema.role_of(reply) != 'agent':
    return reply  # The whole conversation: its prompt is in it.
  if prompt is None:
    prompt = []
  if isinstance(prompt, str):
    more = row.get('input')  # of Alpaca's rows
    text = f'{prompt}\n{more}' if isinstance(more, str) and more.strip() else prompt
    prompt = [{'role': 'user', 'content': text}]
  if not isinstance(prompt, list):
    raise ValueError(f'the prompt is {show(prompt)}; write text or a list of messages')
  return [*_system(row), *prompt, *reply]


def _system(row: Fields) -> list[Fields]:
  return [{'role': 'system', 'content': row['system']}] if row.get('system') else []


def _with_system(row: Fields, talk: Any) -> Any:
  return [*_system(row), *talk] if isinstance(talk, list) else talk


FORMS = {
  'pairs': Form('pairs of this project', ('safer', 'other'), lambda row: {}),
  'conversation': Form('rows of this project', ('conversation',), lambda row: {}),
  'messages': Form(
    'OpenAI messages',
    ('messages',),
    lambda row: {'conversation': _with_system(row, row['messages'])},
  ),
  'conversations': Form(
    'ShareGPT conversations',
    ('conversations',),
    lambda row: {'conversation': _with_system(row, row['conversations'])},
  ),
  'preference': Form('preferences: chosen is safer', ('chosen', 'rejected'), _pair),
  'response': Form(
    'prompt and response',
    ('prompt', 'response'),
    lambda row: {'conversation': _talk(row, row['response'])},
  ),
}
_OWN = ('pairs', 'conversation')


def read(
  path: str | os.PathLike,
  safety: SafetyConfig | None = None,
  require_label: bool = False,
  columns: Mapping[str, str] | None = None,
  labels: Mapping[str, str] | None = None,
  split: str = 'train',
) -> Rows:
  """Returns the examples, or the pairs, of files in any of the FORMS.

  A path given as a row's `safety` is relative to its file's folder, and within it. A row
  without an id has 'file:row'. Where the form is not our own, a line on stderr says which it is.

  Args:
    path: A file in any format of `tables`, a folder, a `datasets` folder or a hub id.
    safety: The rules of rows that bring none.
    require_label: Refuse examples that have neither label nor ratings, as training does.
    columns: {our column: the column's name there}; '' for our name.
    labels: {value there: 'safe', 'unsafe' or 'drop'}, see `parse_labels`.
    split: Which split of a folder or of a set on the hub.

  Raises:
    ValueError: A row is bad; the message names file, line and fix.
  """
  paths = tables.locate(path, split)
  root = pathlib.Path(path) if pathlib.Path(path).is_dir() else paths[0].parent
  columns = {ours: theirs for ours, theirs in (columns or {}).items() if theirs}
  found, seen, used = Rows(), {}, collections.Counter()
  for row in tables.iterate(paths):
    try:
      fields = _rename(row, columns)
      if fields.get('id') is None:
        file = row.path.relative_to(root) if row.path.is_relative_to(root) else row.path.name
        fields['id'] = f'{file}:{row.line.rpartition(".")[2]}'
      else:
        fields['id'] = tables.as_name(fields['id'], 'id')
      form = _form(fields)
      label = _label(fields.pop('label', None), labels)
    except ValueError as error:
      raise ValueError(f'{row.where}: {error}') from None
    except RecursionError:
      raise ValueError(f'{row.where}: nested too deeply; flatten it') from None
    if label == DROP:
      found.drop('label')
      continue
    if label is not None:
      fields['label'] = label
    item = _parse(form, fields, row, safety, columns)
    if isinstance(item, Example):
      # What is rated can be learnt from without a label.
      if require_label and item.label is None and not item.ratings:
        raise ValueError(f'{row.where}: {_no_label(row)}')
      if not item.violated:
        _mention_violated(row, fields, item)
    first = seen.setdefault(item.id, row.where)
    if first != row.where:
      raise ValueError(
        f'{row.where}: the id {item.id!r} is that of {first} too; results are joined by ids: give'
        ' each row its own, or none (then it is file:row)'
      )
    used[form] += 1
    found.append(item)
  _say(path, used)
  return found


def options(safety: str, labels: str, columns: Mapping[str, str]) -> dict[str, Any]:
  """Returns what `read` takes, of the section of a run config that says how files are read."""
  rules = schema.load_safety(safety) if safety else None
  return {'safety': rules, 'columns': dict(columns), 'labels': parse_labels(labels)}


def parse_labels(text: str) -> dict[str, str]:
  """Returns {value: 'safe', 'unsafe' or 'drop'} of "{'0': 'safe', '1': 'unsafe'}"; {} of ''."""
  if not text:
    return {}
  try:
    obj = ast.literal_eval(text)
    if not isinstance(obj, dict) or not obj:
      raise ValueError
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    raise ValueError(
      f"labels={text[:80]}: write what your values mean, as in labels={{'0': 'safe', '1':"
      " 'unsafe'}"
    ) from None
  for value in obj.values():
    if value not in (*schema.LABELS, DROP):
      raise ValueError(f"labels: {show(value)} must be 'safe', 'unsafe' or '{DROP}' (no such rows)")
  return {_word(key): value for key, value in obj.items()}


# --- A row -------------------------------------------------------------------------------


def _rename(row: tables.Row, columns: Mapping[str, str]) -> Fields:
  """Returns the cells that are not absent, under our names, with JSON text parsed."""
  cells = dict(row)
  names = columns.get('ratings', '').split('+')
  if len(names) > 1 or isinstance(row.get(names[0]), (int, float)):
    # Columns of numbers, which keep their names.
    known = {name: row[name] for name in names if row.get(name) not in (None, *_ABSENT)}
    cells['ratings'] = {name: tables.as_amount(value, name) for name, value in known.items()}
    columns = {**columns, 'ratings': 'ratings'} if set(names) <= set(row) else columns
  for ours, theirs in columns.items():
    if theirs not in cells:
      raise ValueError(
        f'columns.{ours}={theirs}: no such column (found: {", ".join(map(str, row))[:200]}); name'
        ' one of these'
      )
  is_text = bool({'.csv', '.tsv'} & set(row.path.suffixes))  # all cells are text
  fields = {}
  for name, value in cells.items():
    if name not in columns or columns[name] == name:
      fields[name] = value
  fields |= {ours: cells[theirs] for ours, theirs in columns.items()}
  fields = {
    name: _cell(name, value)
    for name, value in fields.items()
    # In CSV an empty cell is absent; but a blank response is one all the same.
    if value is not None and not (is_text and value in _ABSENT and name in _OPTIONAL)
  }
  for ours, others in _SYNONYMS.items():
    for other in others:
      if ours not in fields and other in fields:
        fields[ours] = fields[other]
  return fields


def _cell(name: str, value: Any) -> Any:
  if name in _NESTED and isinstance(value, str) and value[:2] in ('{"', '[{', '["', '[]'):
    try:
      value = json.loads(value, object_pairs_hook=files.unique_keys(f'column {name!r}'))
    except json.JSONDecodeError as error:
      # Text of a conversation may begin like this.
      if name in ('prompt', 'response', 'chosen', 'rejected', 'violated'):
        return value
      raise ValueError(f'column {name!r} is not valid JSON ({error.msg}); correct it') from None
  if name in _NUMBERS and isinstance(value, str):
    value = tables.as_amount(value, name)
  return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
  # A Parquet struct has all its fields; those a row does not have are null.
  if isinstance(value, Mapping):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [_without_nulls(v) for v in value]
  return value


def _form(fields: Fields) -> str:
  if 'safer' in fields or 'other' in fields:
    return 'pairs'
  for name, form in FORMS.items():
    if all(column in fields for column in form.columns):
      return name
  known = '; '.join(f'{" and ".join(f.columns)} ({f.about})' for f in FORMS.values())
  raise ValueError(
    f'column "conversation" is missing (found: {", ".join(map(str, fields))[:200]}); add it, or the'
    f' columns of another form: {known}. columns.response=NAME, for example, says which column is'
    ' meant'
  )


def _label(value: Any, labels: Mapping[str, str] | None) -> Any:
  if value is None:
    return None
  if labels:
    word = _word(value)
    if word not in labels:
      raise ValueError(
        f'label {show(value)} is not among those of labels ({", ".join(labels)}); add what it means'
      )
    return labels[word]
  if value not in schema.LABELS:
    raise ValueError(
      f'unknown label {show(value)}; use "safe", "unsafe" or null, or say what your values mean,'
      " as in labels={'0': 'safe', '1': 'unsafe'}"
    )
  return value


def _word(value: Any) -> str:
  # 1, 1.0, '1' and True, 'true' are written by different programs for the same thing.
  text = str(value).strip().casefold()
  return text.removesuffix('.0') if isinstance(value, (float, str)) else text


def _parse(
  form: str,
  fields: Fields,
  row: tables.Row,
  safety: SafetyConfig | None,
  columns: Mapping[str, str],
) -> Any:
  options = {'safety': safety, 'root': row.path.parent}
  if form not in _OWN:
    # A weight in data of others may be a person's: only a column that was named is meant.
    unnamed = set(schema.SIDE_COLUMNS) - set(columns)
    fields = {k: v for k, v in fields.items() if k not in unnamed}
  try:
    if form in ('pairs', 'preference'):
      made = FORMS[form].make(fields)
      if form == 'pairs':
        fields.pop('label', None)
      else:
        fields = {k: v for k, v in fields.items() if k in ('id', *schema.PAIR_SIDE)}
      return Pair.from_dict(fields | made, row.where, **options)
    made = FORMS[form].make(fields)
    if 'violated' in fields:
      fields['violated'] = _names(fields['violated'])
    if form not in _OWN:
      # Other columns are not ours, whatever they are called.
      fields = {k: v for k, v in fields.items() if k in schema.EXAMPLE_COLUMNS}
      for name in ('source', 'rule_set'):
        if not isinstance(fields.get(name), str):
          fields.pop(name, None)
    return Example.from_dict(fields | made, row.where, **options)
  except ValueError as error:
    where = '' if str(error).startswith(row.where) else f'{row.where}: '
    raise ValueError(f'{where}{error}') from None
  except RecursionError:
    raise ValueError(f'{row.where}: nested too deeply; flatten it') from None


def _names(value: Any) -> Any:
  """Returns the names in a list, in "A; B", or those that are true in an object."""
  if isinstance(value, str):
    return [name.strip() for name in re.split('[;|]', value) if name.strip()]
  if isinstance(value, Mapping):
    return [name for name, flag in value.items() if tables.as_flag(flag, name)]
  return value


# --- What is said about rows ---------------------------------------------------------------


def _no_label(row: tables.Row) -> str:
  near = [name for name in row if isinstance(name, str) and _LOOKS_LABEL.search(name)]
  near = [name for name in near if name != 'label']
  said = 'no label; write "label": "safe" or "unsafe", or remove the row'
  if near:
    said += f'; if {show(near[0])} is the label, give columns.label={near[0]}'
  return said


def _mention_violated(row: tables.Row, fields: Fields, item: Example) -> None:
  """Says which column may name the violated categories, where nothing does."""
  if fields.get('violated') is not None:
    return
  names = {name.casefold() for name in item.safety.names}
  for column, value in row.items():
    if column in schema.EXAMPLE_COLUMNS or not isinstance(column, str):
      continue
    values = value if isinstance(value, list) else re.split('[;|,]', str(value))
    if any(str(v).strip().casefold() in names for v in values) or (
      _LOOKS_VIOLATED.search(column) and item.label == 'unsafe'
    ):
      note(
        f'{row.path}: column {column!r} looks like the violated categories; if it is, give'
        f' columns.violated={column}'
      )


def _say(path: str | os.PathLike, used: Mapping[str, int]) -> None:
  for name, num in used.items():
    if name not in _OWN:
      note(f'{path}: {num} rows in the form {name!r} ({FORMS[name].about})')
