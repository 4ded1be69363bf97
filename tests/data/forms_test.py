"""Rows in the forms that people have, as examples and pairs."""

import csv
import json

import pytest

from csrm_jax.data import forms
from csrm_jax.safety.schema import Category, SafetyConfig
from tests.data import tables_test
from tests.small import error_of

RULES = SafetyConfig((Category('Funds', 'No funds.'), Category('Pets', 'No pets.')), 'bank')
ASK, REPLY = 'Which fund?', 'The red fund.'
TALK = [('user', ASK), ('agent', REPLY)]
SHAREGPT = [{'from': 'human', 'value': ASK}, {'from': 'gpt', 'value': REPLY}]
OPENAI = [{'role': 'user', 'content': ASK}, {'role': 'assistant', 'content': REPLY}]


def write(path, *rows):
  if path.suffix == '.csv':
    with path.open('w', newline='') as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  else:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def read(tmp_path, *rows, name='rows.jsonl', **options):
  return forms.read(write(tmp_path / name, *rows), RULES, **options)


def talk(item):
  return [(m.role, m.content) for m in item.conversation]


@pytest.mark.parametrize(
  'row, form',
  [
    ({'messages': OPENAI}, 'OpenAI'),
    ({'conversations': SHAREGPT}, 'ShareGPT'),
    ({'conversation': SHAREGPT}, ''),
    ({'prompt': ASK, 'response': REPLY}, 'prompt and response'),
    ({'prompt': OPENAI[:1], 'completion': OPENAI[1:]}, 'prompt and response'),
    ({'instruction': ASK, 'input': '', 'output': REPLY}, 'prompt and response'),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': ASK}]}, OPENAI[1]]},
      'OpenAI',
    ),
  ],
)
def test_a_conversation_in_every_form(tmp_path, capsys, row, form):
  (example,) = read(tmp_path, row | {'label': 'unsafe', 'violated': ['Funds']})
  assert talk(example) == TALK
  assert (example.id, example.label, example.violated) == ('rows.jsonl:1', 'unsafe', ('Funds',))
  said = capsys.readouterr().err
  assert form in said and said.count('\n') == bool(form)


SIDES = 'The red fund.', 'Ask an adviser.'


@pytest.mark.parametrize(
  'row',
  [
    {'prompt': ASK, 'chosen': SIDES[1], 'rejected': SIDES[0]},
    {
      'prompt': OPENAI[:1],
      'chosen': [{'role': 'assistant', 'content': SIDES[1]}],
      'rejected': [{'role': 'assistant', 'content': SIDES[0]}],
    },
    # TRL's implicit form, and UltraFeedback's, which has the prompt twice.
    *(
      more
      | {
        'chosen': [OPENAI[0], {'role': 'assistant', 'content': SIDES[1]}],
        'rejected': [OPENAI[0], {'role': 'assistant', 'content': SIDES[0]}],
      }
      for more in ({}, {'prompt': ASK})
    ),
    {
      side: f'\n\nHuman: {ASK}\n\nAssistant: {text}'
      for side, text in zip(('rejected', 'chosen'), SIDES, strict=True)
    },
  ],
)
def test_preferences_in_every_form(tmp_path, row):
  (pair,) = read(tmp_path, row)
  assert (pair.kind, pair.id) == ('preference', 'rows.jsonl:1')
  assert talk(pair.safer) == [('user', ASK), ('agent', SIDES[1])]
  assert talk(pair.other) == [('user', ASK), ('agent', SIDES[0])]
  assert pair.safer.safety == RULES


def test_systems_and_tools(tmp_path):
  call = {'type': 'function', 'function': {'name': 'find', 'arguments': '{"what": "fund"}'}}
  (example,) = read(
    tmp_path,
    {
      'messages': [
        {'role': 'developer', 'content': 'Be brief.'},
        OPENAI[0],
        {'role': 'assistant', 'content': None, 'tool_calls': [call]},
        {'role': 'tool', 'content': 'red', 'tool_call_id': '1'},
        {'role': 'assistant', 'content': None, 'refusal': 'No.'},
      ]
    },
  )
  assert talk(example) == [
    ('system', 'Be brief.'),
    ('user', ASK),
    ('agent', '[calls find({"what": "fund"})]'),
    ('tool', 'red'),
    ('agent', 'No.'),
  ]
  (example,) = read(tmp_path, {'system': 'Be brief.', 'conversations': SHAREGPT})
  assert talk(example) == [('system', 'Be brief.'), *TALK]


@pytest.mark.parametrize('name', ['rows.csv', 'rows.parquet', 'rows.jsonl'])
def test_columns_and_labels_of_other_names(tmp_path, name):
  rows = [
    {'q': ASK, 'a': REPLY, 'bad': 1, 'why': 'Funds; Pets', 'key': 7},
    {'q': 'Hi, "you"\nthere', 'a': 'Hello.', 'bad': 0, 'why': None, 'key': 8},
    {'q': 'Hi', 'a': 'nan', 'bad': 2, 'why': None, 'key': 9},
  ]
  path = tmp_path / name
  tables_test.to_parquet(path, rows) if name.endswith('parquet') else write(path, *rows)
  columns = {'prompt': 'q', 'response': 'a', 'label': 'bad', 'violated': 'why', 'id': 'key'}
  labels = forms.parse_labels("{'0': 'safe', 1: 'unsafe', '2': 'drop'}")
  found = forms.read(path, RULES, True, columns, labels)
  assert [(e.id, e.label, e.violated) for e in found] == [
    ('7', 'unsafe', ('Funds', 'Pets')),
    ('8', 'safe', ()),
  ]
  assert found.drops == {'label': 1}
  assert talk(found[0]) == TALK


def test_rows_of_a_table_with_text_of_json(tmp_path):
  row = {'messages': json.dumps(OPENAI), 'label': 'safe', 'probability': '0.25', 'violated': ''}
  (example,) = read(tmp_path, row, name='rows.csv')
  assert talk(example) == TALK and example.probability == 0.25
  (same,) = forms.read(
    tables_test.to_parquet(tmp_path / 'rows.parquet', [row | {'id': 3.0}]), RULES
  )
  assert (talk(same), same.id) == (TALK, '3')


def test_a_folder_of_files_has_ids_of_its_own(tmp_path):
  for name in ('a', 'b'):
    write(tmp_path / f'{name}.jsonl', {'prompt': ASK, 'response': REPLY})
  assert [e.id for e in forms.read(tmp_path, RULES)] == ['a.jsonl:1', 'b.jsonl:1']


def test_a_column_that_looks_like_violated_is_mentioned_once(tmp_path, capsys):
  row = {'prompt': ASK, 'response': REPLY, 'label': 'unsafe', 'harm': 'funds'}
  read(tmp_path, row, row)
  said = capsys.readouterr().err
  assert said.count('columns.violated=harm') == 1


@pytest.mark.parametrize(
  'row, options, words',
  [
    ({'id': '1', 'prompt': ASK, 'response': REPLY}, {}, ["id '1' is that of", 'rows.jsonl:1 too']),
    ({'text': ASK}, {}, ['"conversation" is missing', 'found: text', 'columns.response=NAME']),
    ({'prompt': ASK, 'response': 3}, {}, ['response is 3', 'text or a list']),
    ({'prompt': 3, 'response': REPLY}, {}, ['prompt is 3']),
    ({'chosen': 'a', 'rejected': {'b': 1}}, {}, ['response is a dict']),
    ({'messages': 'hi'}, {}, ["'hi'", 'list of messages']),
    ({'messages': OPENAI[:1]}, {}, ['ends with role', 'agent']),
    (
      {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}, OPENAI[1]]},
      {},
      ['message 1', 'image_url', 'no place here'],
    ),
    ({'messages': [{'role': 'judge', 'content': ''}]}, {}, ["unknown role 'judge'"]),
    ({'prompt': ASK, 'response': REPLY, 'label': 0}, {}, ['unknown label 0', "labels={'0'"]),
    (
      {'prompt': ASK, 'response': REPLY, 'label': 3},
      {'labels': {'0': 'safe', '1': 'unsafe'}},
      ['label 3', '0, 1', 'add what it means'],
    ),
    (
      {'prompt': ASK, 'response': REPLY, 'toxic': 1},
      {'require_label': True},
      ['no label', 'columns.label=toxic'],
    ),
    (
      {'prompt': ASK, 'response': REPLY},
      {'columns': {'label': 'bad'}},
      ['columns.label=bad', 'prompt, response'],
    ),
    (
      {'prompt': ASK, 'response': REPLY, 'label': 'unsafe', 'violated': 'Fund'},
      {},
      ["'Fund'", "did you mean 'Funds'"],
    ),
    ({'prompt': ASK, 'response': REPLY, 'id': []}, {}, ["'id' is a list"]),
  ],
)
def test_bad_rows_are_one_line_with_place_and_fix(tmp_path, row, options, words):
  first = {'id': '1', 'prompt': ASK, 'response': REPLY, 'label': 'safe'}
  if 'label' in (options.get('columns') or {}):
    first |= {'bad': 'safe'}
  if 'labels' in options:
    first |= {'label': 0}
  message = error_of(read, tmp_path, first, row, **options)
  assert message.startswith(f'{tmp_path}/rows.jsonl:2: '), message
  assert all(word in message for word in words), message


@pytest.mark.parametrize('text', ['0', "{'0': 'fine'}", '{', '{}', "['safe']"])
def test_labels_that_say_nothing(text):
  assert 'labels' in error_of(forms.parse_labels, text)
