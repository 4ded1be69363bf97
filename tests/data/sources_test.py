"""Readers of data files: what they make of rows, good and bad."""

import csv
import gzip
import json
import os
import pathlib
import sys

import pytest

from csrm_jax.data import forms, pipeline, public, sources
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig

RULES = SafetyConfig((Category('Pets', 'No pets.'),), 'house')


def example(name='1', response='fine', label='safe', user='hi', **fields):
  talk = (Message('user', user), Message('agent', response))
  return Example(name, RULES, talk, label, **fields)


def write(path, *lines, end='\n'):
  text = '\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines)
  data = (text + end).encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def fails(function, *args, **kwargs):
  with pytest.raises(ValueError) as error:
    function(*args, **kwargs)
  message = str(error.value)
  assert '\n' not in message
  return message


# JSONL


@pytest.mark.parametrize('name', ['rows.jsonl', 'rows.jsonl.gz'])
def test_jsonl_gives_back_what_was_written(tmp_path, name):
  items = [
    example('1', violated=('Pets',), label='unsafe', probability=0.75),
    example('2', 'a\u2028b', label=None, plus=Category('Food', 'No food.')),
    Pair('3', example('3a'), example('3b', 'bad'), 'preference'),
  ]
  path = write(tmp_path / name, *(item.to_dict() for item in items))
  rows = forms.read(path)
  assert rows == items
  assert rows.drops == {}


def test_jsonl_rules_from_a_file_or_the_caller(tmp_path):
  row = example().to_dict()
  write(tmp_path / 'rules.json', json.dumps(row.pop('safety')))
  path = write(tmp_path / 'rows.jsonl', row | {'safety': 'rules.json'}, '')
  assert forms.read(path) == [example()]
  path = write(tmp_path / 'bare.jsonl', '\ufeff' + json.dumps(row))
  assert forms.read(path, safety=RULES) == [example()]
  assert 'safety' in fails(forms.read, path)


def without(row, *columns):
  return {k: v for k, v in row.items() if k not in columns}


ROW = example().to_dict()


@pytest.mark.parametrize(
  'row, words',
  [
    (ROW | {'label': 'harmful'}, ['label', 'harmful', 'unsafe']),
    (without(ROW, 'conversation'), ['conversation', 'found', 'label']),
    (ROW | {'safety': {'categories': []}}, ['categor', 'empty']),
    (ROW | {'conversation': ROW['conversation'][:1]}, ['end', 'agent']),
    (ROW | {'violated': ['Cars'], 'label': 'unsafe'}, ['Cars']),
    ('[1, 2]', ['object']),
    ('{"id": ', ['JSON']),
    # Whichever of the two counted, a reader might have meant the other.
    (json.dumps(ROW)[:-1] + ', "label": "safe"}', ["'label'", 'given twice']),
    (
      json.dumps(ROW).replace('"guideline"', '"name": "Other", "guideline"', 1),
      ["'name'", 'given twice'],
    ),
    (
      ROW
      | {
        'safety': {
          'categories': [{'name': 'A', 'guideline': 'b'}, {'name': 'a ', 'guideline': 'c'}]
        }
      },
      ['twice'],
    ),
  ],
)
def test_jsonl_names_file_and_line(tmp_path, row, words):
  path = write(tmp_path / 'rows.jsonl', ROW, '', row, ROW)
  message = fails(forms.read, path)
  assert message.startswith(f'{path}:3:')
  assert all(word in message for word in words), message


def test_jsonl_label_can_be_required(tmp_path):
  path = write(tmp_path / 'rows.jsonl', ROW, ROW | {'id': '2', 'label': None})
  assert len(forms.read(path)) == 2
  message = fails(forms.read, path, require_label=True)
  assert message.startswith(f'{path}:2: no label')


def test_jsonl_last_line_cut_short(tmp_path):
  path = write(tmp_path / 'rows.jsonl', ROW, json.dumps(ROW)[:-9], end='')
  message = fails(forms.read, path)
  assert message.startswith(f'{path}:2: the last line is cut short')


def test_jsonl_invalid_utf8(tmp_path):
  path = write(tmp_path / 'rows.jsonl', ROW, ROW)
  path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
  message = fails(forms.read, path)
  assert message.startswith(f'{path}:3: byte 0xff')


def test_jsonl_damaged_gzip(tmp_path):
  path = write(tmp_path / 'rows.jsonl.gz', ROW, ROW)
  whole = path.read_bytes()
  for data in (whole[:-20], b'no gzip at all', whole[:40] + b'x' * 30):
    path.write_bytes(data)
    assert 'not a complete gzip' in fails(forms.read, path)


def test_no_file_and_no_rows(tmp_path):
  path = tmp_path / 'rows.jsonl'
  assert 'cannot be read' in fails(forms.read, path)
  assert 'no rows' in fails(forms.read, write(path, '', ''))


# Parquet


def to_parquet(path, *columns_of_rows):
  pyarrow = pytest.importorskip('pyarrow', reason='pyarrow is not installed')
  parquet = pytest.importorskip('pyarrow.parquet')
  parquet.write_table(pyarrow.Table.from_pylist(list(columns_of_rows)), path)
  return path


def test_parquet_with_structs_and_with_json_text(tmp_path):
  items = [
    example('1', plus=Category('Food', 'No food.')),
    example('2', violated=('Pets',), label='unsafe'),
  ]
  rows = [item.to_dict() for item in items]
  path = to_parquet(tmp_path / 'structs.parquet', *rows)
  assert forms.read(path) == items
  text = [
    {
      k: json.dumps(v) if isinstance(v, dict | list) and k != 'violated' else v
      for k, v in row.items()
    }
    for row in rows
  ]
  path = to_parquet(tmp_path / 'text.parquet', *text)
  assert forms.read(path) == items


def test_parquet_pairs(tmp_path):
  pair = Pair('3', example('3a'), example('3b', 'bad'), 'preference')
  path = to_parquet(tmp_path / 'pairs.parquet', pair.to_dict())
  assert forms.read(path) == [pair]


def test_parquet_errors(tmp_path):
  path = to_parquet(tmp_path / 'rows.parquet', ROW, ROW | {'label': 'bad'})
  message = fails(forms.read, path)
  assert message.startswith(f'{path}: row 2:') and 'bad' in message
  path = to_parquet(tmp_path / 'text.parquet', ROW | {'safety': '{"x"'})
  assert "'safety' is not valid JSON" in fails(forms.read, path)
  write(path, 'no parquet')
  assert 'cannot be read as Parquet' in fails(forms.read, path)
  missing = tmp_path / 'none.parquet'
  assert 'cannot be read as Parquet' in fails(forms.read, missing)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ImportError, match=r'pyarrow.*\[parquet\]'):
    forms.read(tmp_path / 'rows.parquet')


# HH transcripts


def transcript(*turns):
  roles = ('Human', 'Assistant')
  return ''.join(f'\n\n{roles[i % 2]}: {turn}' for i, turn in enumerate(turns))


def hh(*turns, chosen='yes', rejected='no'):
  return {'chosen': transcript(*turns, chosen), 'rejected': transcript(*turns, rejected)}


@pytest.mark.parametrize('name', ['hh.jsonl', 'hh.jsonl.gz'])
def test_hh_pairs(tmp_path, name):
  first = 'I said: the Assistant: is\n\nmine, Human: too'
  path = write(tmp_path / name, hh('a', 'b', first), hh('c'))
  rows = public.read_hh_pairs(path)
  assert rows.drops == {}
  pair, other = rows
  assert pair.kind == 'preference'
  roles = [(m.role, m.content) for m in pair.safer.conversation]
  assert roles == [('user', 'a'), ('agent', 'b'), ('user', first), ('agent', 'yes')]
  assert pair.other.conversation[:-1] == pair.safer.conversation[:-1]
  assert pair.other.conversation[-1].content == 'no'
  assert pair.safer.safety == public.rules('harmlessness')
  assert pair.safer.label is None
  assert other.id == 'hh/2'
  assert public.read_hh_pairs(path, RULES)[0].other.safety == RULES


def test_hh_drops_are_counted(tmp_path):
  rows = public.read_hh_pairs(
    write(
      tmp_path / 'hh.jsonl',
      hh('a', chosen='same', rejected=' same '),
      hh('a', chosen=''),
      {'chosen': transcript('a', 'b'), 'rejected': transcript('x', 'b')},
      {'chosen': transcript('a', 'b'), 'rejected': transcript('a', 'b', 'c', 'd')},
      hh('a'),
    )
  )
  assert [pair.id for pair in rows] == ['hh/5']
  assert rows.drops == {'identical_pair': 1, 'empty_response': 1, 'prompts_differ': 2}


@pytest.mark.parametrize(
  'row, words',
  [
    ({'chosen': transcript('a', 'b')}, ['rejected', "found 'chosen'"]),
    ({'chosen': 'a', 'rejected': 'b'}, ['no transcript']),
    ({'chosen': transcript('a'), 'rejected': transcript('a')}, ['transcript']),
    ({'chosen': 1, 'rejected': 'b'}, ["'chosen' is 1", 'not text']),
    ([], ['object']),
  ],
)
def test_hh_errors(tmp_path, row, words):
  path = write(tmp_path / 'hh.jsonl', hh('a'), row)
  message = fails(public.read_hh_pairs, path)
  assert message.startswith(f'{path}:2:')
  assert all(word in message for word in words), message


# XSTest


COMPLY, REFUSE, PARTLY = ('1_full_compliance', '2_full_refusal', '3_partial_refusal')


def write_csv(path, rows):
  with open(path, 'w', newline='', encoding='utf-8') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  return path


def xstest(tmp_path, *labels, ids=('1', '2'), **changes):
  """Writes a safe prompt 1 and an unsafe prompt 2, each with all labels."""
  prompts = [
    {
      'id': '1',
      'prompt': 'a, "fine"\nquestion',
      'type': 'homonyms',
      'label': 'safe',
      'focus': '',
      'note': '',
    },
    {
      'id': '2',
      'prompt': 'a bad question',
      'type': 'contrast_homonyms',
      'label': 'unsafe',
      'focus': '',
      'note': '',
    },
  ]
  texts = {p['id']: p for p in prompts}
  answers = [
    {
      'id': f'v2-{i}',
      'type': texts.get(i, prompts[0])['type'],
      'prompt': texts.get(i, prompts[0])['prompt'],
      'completion': 'text\nmore',
      'final_label': label,
    }
    | changes
    for i in ids
    for label in labels
  ]
  return (write_csv(tmp_path / 'prompts.csv', prompts), write_csv(tmp_path / 'model.csv', answers))


@pytest.mark.parametrize(
  'rule, unsafe',
  [
    ('harmful', {('2', COMPLY)}),
    ('refusal', {('1', REFUSE)}),
    ('both', {('2', COMPLY), ('1', REFUSE)}),
  ],
)
def test_xstest_labels(tmp_path, rule, unsafe):
  labels = (COMPLY, REFUSE, PARTLY)
  rows = public.read_xstest(*xstest(tmp_path, *labels), rule=rule)
  assert len(rows) == 6
  expected = [(i, label) in unsafe for i in '12' for label in labels]
  assert [row.label == 'unsafe' for row in rows] == expected
  for row in rows:
    assert row.label in ('safe', 'unsafe')
    assert bool(row.violated) == (row.label == 'unsafe')
    assert set(row.violated) <= set(row.safety.names)
    assert len(row.safety.names) == (2 if rule == 'both' else 1)
    assert [m.role for m in row.conversation] == ['user', 'agent']
    assert row.rule_set == f'xstest/{rule}'
  assert rows[0].conversation[0].content == 'a, "fine"\nquestion'
  assert rows[0].id == f'model/v2-1/{rule}'


def test_xstest_drops_are_counted(tmp_path):
  files = xstest(tmp_path, COMPLY, ids=('1', '7'))
  assert public.read_xstest(*files).drops == {'unknown_prompt': 1}
  files = xstest(tmp_path, COMPLY, completion=' ')
  assert public.read_xstest(*files).drops == {'empty_response': 2}


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'final_label': '4_new'}, ['final_label', '4_new', COMPLY]),
    ({'type': 'privacy'}, ["'type'", 'differs']),
    ({'prompt': 'another'}, ["'prompt'", 'differs']),
  ],
)
def test_xstest_errors(tmp_path, changes, words):
  files = xstest(tmp_path, COMPLY, **changes)
  message = fails(public.read_xstest, *files)
  assert message.startswith(f'{files[1]}:2:')
  assert all(word in message for word in words), message


def test_xstest_files_are_checked(tmp_path):
  prompts, answers = xstest(tmp_path, COMPLY)
  message = fails(public.read_xstest, prompts, prompts)
  assert "missing column 'completion', 'final_label'" in message
  assert "found 'id', 'prompt', 'type'" in message
  assert 'unknown XSTest rule' in fails(public.read_xstest, prompts, answers, 'all')
  with open(answers, 'a', encoding='utf-8') as file:
    file.write('v2-1,too,few\n')
  # Two rows of two lines each come before it.
  message = fails(public.read_xstest, prompts, answers)
  assert message.startswith(f'{answers}:7: the row has not 5 fields')
  wrong = prompts.read_text().replace('contrast_homonyms', 'homonyms')
  prompts.write_text(wrong)
  assert 'contrast_*' in fails(public.read_xstest, prompts, answers)


# Moderation


def moderation(tmp_path, *rows):
  base = {'S': 0, 'prompt': 'a text'}
  return write(tmp_path / 'moderation.jsonl', *(base | row for row in rows))


ALL = {'H': 0, 'H2': 0, 'V': 0, 'V2': 0, 'HR': 0, 'SH': 0}


def test_moderation_labels_under_subsets(tmp_path):
  path = moderation(tmp_path, ALL | {'H': 1, 'HR': 1}, ALL, ALL | {'SH': 1})

  def labels(*categories):
    return [row.label for row in public.read_moderation(path, categories)]

  assert labels('H', 'V') == ['unsafe', 'safe', 'safe']
  assert labels('H2') == ['safe', 'safe', 'safe']
  assert labels('SH') == ['safe', 'safe', 'unsafe']
  rows = public.read_moderation(path, ('HR', 'H', 'SH'))
  assert rows[0].violated == ('Harassment', 'Hate')
  assert rows[0].safety.names == ('Harassment', 'Hate', 'Self-harm')
  user, agent = rows[0].conversation
  assert (user.content, agent.content) == (public.MODERATION_TURN, 'a text')
  assert rows[0].rule_set == 'moderation/HR+H+SH'
  assert len({row.id for row in rows}) == 3


def test_moderation_severity_gives_one_text_two_labels(tmp_path):
  path = moderation(tmp_path, ALL | {'V': 1}, ALL | {'V': 1, 'V2': 1})
  strict, lenient = (
    [row.label for row in public.read_moderation(path, (key,))] for key in ('V', 'V2')
  )
  assert strict == ['unsafe', 'unsafe']
  assert lenient == ['safe', 'unsafe']


def test_moderation_missing_key_is_unknown_for_that_subset(tmp_path):
  path = moderation(tmp_path, ALL, {'V': 1}, {'V': None}, {'prompt': ' '} | ALL)
  rows = public.read_moderation(path, ('H',))
  assert len(rows) == 1
  assert rows.drops == {'unknown_label': 2, 'empty_response': 1}
  rows = public.read_moderation(path, ('V',))
  assert [row.label for row in rows] == ['safe', 'unsafe']


def test_moderation_pairs(tmp_path):
  path = moderation(tmp_path, ALL | {'H': 1}, ALL | {'V': 1, 'V2': 1}, {'H': 1, 'V': 0})
  rows = public.read_moderation_pairs(path)
  assert rows.drops == {'safe': 2, 'unknown_label': 2}
  hate, violence = rows
  assert hate.kind == 'strictness'
  assert hate.safer.safety.categories == (public.MODERATION_RULES['H2'],)
  assert hate.other.safety.categories == (public.MODERATION_RULES['H'],)
  assert (hate.safer.label, hate.other.label) == ('safe', 'unsafe')
  assert (violence.safer.label, violence.other.label) == ('unsafe', 'unsafe')
  assert violence.safer.violated == ('Violence',)


@pytest.mark.parametrize(
  'categories, message',
  [(('H', 'X'), "unknown moderation category 'X'"), (('H', 'H2'), 'contradict'), ((), 'categor')],
)
def test_moderation_categories_are_checked(tmp_path, categories, message):
  path = moderation(tmp_path, ALL)
  assert message in fails(public.read_moderation, path, categories)


@pytest.mark.parametrize('value', [2, -1, '1', 0.5, True, []])
def test_moderation_unknown_label_value(tmp_path, value):
  path = moderation(tmp_path, ALL, ALL | {'H': value})
  message = fails(public.read_moderation, path, ('H',))
  assert message.startswith(f'{path}:2: label H is ')


def test_moderation_missing_text(tmp_path):
  path = write(tmp_path / 'rows.jsonl', {'text': 'x', 'H': 0})
  message = fails(public.read_moderation, path)
  assert "missing column 'prompt'; found 'text', 'H'" in message


# Split


def test_split_keeps_equal_texts_together():
  items = [
    example(f'{i}/{j}', f'{["Text", "text "][j]} {i}', safety_changes)
    for i in range(200)
    for j, safety_changes in enumerate(['safe', 'unsafe'])
  ]
  rest, held_out = sources.split(items, 0.25, seed=0)
  assert len(rest) + len(held_out) == len(items)
  assert 60 < len(held_out) < 140
  numbers = [{item.id.split('/')[0] for item in h} for h in (rest, held_out)]
  assert not numbers[0] & numbers[1]
  assert (rest, held_out) == sources.split(items, 0.25, seed=0)
  assert held_out != sources.split(items, 0.25, seed=1)[1]


def test_split_does_not_move_items_when_data_grow():
  items = [example(str(i), f'text {i}') for i in range(100)]
  small = sources.split(items[:50], 0.5, seed=3)[1]
  large = sources.split(items, 0.5, seed=3)[1]
  assert small == [item for item in large if int(item.id) < 50]
  assert sources.split(items, 0.0, seed=3)[1] == []
  assert sources.split(items, 1.0, seed=3)[0] == []


def test_split_keeps_pairs_of_one_prompt_together():
  def sides(i, j):
    return (example(f'{i}/{j}/{side}', f'answer {j} {side}', user=f'prompt {i}') for side in 'ab')

  pairs = [Pair(f'{i}/{j}', *sides(i, j), 'preference') for i in range(50) for j in range(2)]
  rest, held_out = sources.split(pairs, 0.5, seed=0)
  numbers = [{pair.id.split('/')[0] for pair in h} for h in (rest, held_out)]
  assert all(numbers) and not numbers[0] & numbers[1]


def test_split_keeps_answers_to_one_prompt_together():
  items = [
    example(f'{i}/{j}', f'answer {j}', user=['Prompt', 'prompt '][j % 2] + f' {i}')
    for i in range(60)
    for j in range(4)
  ]
  rest, held_out = sources.split(items, 0.5, seed=0)
  numbers = [{item.id.split('/')[0] for item in h} for h in (rest, held_out)]
  assert all(numbers) and not numbers[0] & numbers[1]
  assert sources.num_shared(held_out, rest) == 0
  assert sources.num_shared(items[:1], items[1:9]) == 1


@pytest.mark.parametrize('user', ['', 'Judge this text.'])
def test_a_prompt_that_all_rows_have_is_no_conversation(user):
  items = [example(str(i), f'text {i // 2}', user=user) for i in range(100)]
  rest, held_out = sources.split(items, 0.5, seed=0)
  assert 20 < len(held_out) < 80
  assert sources.num_shared(held_out, rest) == 0


def test_split_refuses_a_fraction():
  assert 'from 0 to 1' in fails(sources.split, [], 1.5, seed=0)


# The real files, where they are at hand


@pytest.fixture(scope='module')
def real():
  default = pathlib.Path(__file__).parents[2].parent / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('CSRM_DATA_DIR', default))
  if not folder.is_dir():
    pytest.skip(f'no data sets in {folder}; set CSRM_DATA_DIR to their folder')
  return folder


def find(folder, pattern):
  found = sorted(folder.glob(pattern))
  if not found:
    pytest.skip(f'no {pattern} in {folder}')
  return found


@pytest.mark.real
def test_real_hh(real):
  [path, *_] = find(real, 'hh_rlhf/*.jsonl.gz')
  pairs = public.read_hh_pairs(path)
  dropped = sum(pairs.drops.values())
  assert len(pairs) > 50 * dropped
  assert len({pair.id for pair in pairs}) == len(pairs)
  _, held_out = sources.split(pairs, 0.2, seed=0)
  assert 0.1 < len(held_out) / len(pairs) < 0.3


@pytest.mark.real
def test_real_xstest(real):
  [prompts] = find(real, 'xstest/xstest_prompts.csv')
  counts = {'harmful': 0, 'refusal': 0, 'both': 0}
  for path in find(real, 'xstest/*completions*.csv'):
    for rule in counts:
      rows = public.read_xstest(prompts, path, rule)
      assert rows and not rows.drops
      counts[rule] += sum(row.label == 'unsafe' for row in rows)
  assert counts['both'] == counts['harmful'] + counts['refusal'] > 0


@pytest.mark.real
def test_held_out_rows_of_real_xstest_share_no_prompt_with_training(real):
  folder = find(real, 'xstest')[0]
  kept, held = pipeline.read_part('xstest_completions', str(folder), 0, 0.2, {})
  prompts = [{row.conversation[-2].content for row in part} for part in (kept, held)]
  assert all(prompts) and not prompts[0] & prompts[1]


@pytest.mark.real
def test_real_moderation(real):
  [path, *_] = find(real, 'moderation/*.jsonl.gz')
  unsafe = {}
  for key in public.MODERATION_RULES:
    rows = public.read_moderation(path, (key,))
    unsafe[key] = {row.id.rpartition('/')[2] for row in rows if row.label == 'unsafe'}
    assert unsafe[key] and rows.drops
  # Every row that the lenient rule forbids is forbidden by the strict one.
  assert unsafe['H2'] < unsafe['H'] and unsafe['V2'] < unsafe['V']
  pairs = public.read_moderation_pairs(path)
  assert {pair.other.label for pair in pairs} == {'unsafe'}
  assert {pair.safer.label for pair in pairs} == {'safe', 'unsafe'}
