"""Tables in every format: what is read whole, what is absent, what is refused in one line."""

import csv
import json
import math

import pytest

from csrm_jax.data import catalogue, forms, tables
from tests.data import catalogue_test
from tests.small import error_of

BAD = [None, math.nan, 3, 1.5, True, 'x', '', 'nan', [], ['a'], [1], {}, {'a': 1}, [['a']]]
ROWS = [{'a': 'x', 'b': 1}, {'a': 'y', 'b': None}]


def to_csv(path, rows, delimiter=','):
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
  return path


def to_parquet(path, rows):
  arrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(arrow.Table.from_pylist(rows), path)
  return path


def save_to_disk(folder, rows, files=2):
  """Writes what Dataset.save_to_disk writes."""
  arrow = pytest.importorskip('pyarrow')
  folder.mkdir(parents=True)
  names = [f'data-{i:05d}-of-{files:05d}.arrow' for i in range(files)]
  for i, name in enumerate(names):
    table = arrow.Table.from_pylist(rows[i::files])
    with arrow.ipc.new_stream(str(folder / name), table.schema) as writer:
      writer.write_table(table)
  (folder / 'dataset_info.json').write_text('{}')
  state = {'_data_files': [{'filename': name} for name in names], '_indices_files': None}
  (folder / 'state.json').write_text(json.dumps(state))
  return folder


@pytest.mark.parametrize('name', catalogue_test.ROWS)
def test_no_public_reader_answers_a_cell_with_a_traceback(tmp_path, name):
  """A cell of another type is read as what it plainly is, or is one line with file and row."""
  _, file, rows = catalogue_test.ROWS[name]
  file = file.removesuffix('.xz').removesuffix('.gz')
  if file.endswith(('.csv', '.parquet', '.json')):  # JSON lines hold any cell
    file = f'{file.rpartition(".")[0]}.jsonl'
  if name == 'xstest_completions':
    catalogue_test.write(tmp_path, *catalogue_test.ROWS['xstest'][1:])
  if name == 'jailbreak_judged':
    catalogue_test.write(tmp_path, 'jailbreak_judged.csv', rows)
  path = tmp_path / file
  path.parent.mkdir(parents=True, exist_ok=True)
  for column in rows[0]:
    for value in BAD:
      path.write_text(json.dumps({**rows[0], column: value}) + '\n')
      try:
        items = catalogue.SETS[name].read(path)
      except ValueError as error:
        message = str(error)
        assert message.startswith(f'{path}:1: ') and '\n' not in message, (column, value, message)
      else:
        for item in items:
          for side in (item.safer, item.other) if hasattr(item, 'safer') else (item,):
            assert all(isinstance(m.content, str) for m in side.conversation), (column, value)


def test_chosen_and_rejected_as_plain_text_are_one_response_each(tmp_path):
  row = catalogue_test.BENCH_2 | {'chosen': 'No.', 'rejected': 'Mix flour and water.'}
  path = tmp_path / 'reward_bench_2' / 'test.jsonl'
  path.parent.mkdir()
  path.write_text(json.dumps(row) + '\n')
  (found,) = catalogue.load_benchmarks(tmp_path, ['reward_bench_2'])
  (choice,) = found.items
  assert [e.conversation[-1].content for e in choice.responses] == ['No.', 'Mix flour and water.']
  assert len(catalogue.read('reward_bench_2', 'test', path)) == 1


def test_nan_of_pandas_is_null(tmp_path):
  rows = [catalogue_test.wildguard(response=math.nan, response_harm_label=math.nan)]
  rows += [catalogue_test.wildguard()]
  path = tmp_path / 'wildguardmix' / 'wildguard_test.jsonl'
  path.parent.mkdir()
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  assert 'NaN' in path.read_text()
  (found,) = catalogue.load_benchmarks(tmp_path, ['wildguardmix'])
  assert len(found.items) == 1 and found.drops == {'prompt_only': 1}


def test_all_shards_of_a_split_are_read_with_ids_of_their_own(tmp_path):
  folder = tmp_path / 'wildguardmix' / 'test'
  for i in range(2):
    rows = [catalogue_test.wildguard(prompt=f'{i}{j}') for j in range(3)]
    to_parquet(folder / f'wildguard_test-{i:05d}-of-00002.parquet', rows)
  (found,) = catalogue.load_benchmarks(tmp_path, ['wildguardmix'])
  assert len({item.id for item in found.items}) == 6
  (folder / 'wildguard_test-00000-of-00002.parquet').unlink()
  message = error_of(catalogue.load_benchmarks, tmp_path, ['wildguardmix'])
  assert 'wildguard_test-00000-of-00002.parquet is missing' in message


def test_xstest_without_ids_is_numbered(tmp_path):
  rows = [
    {'prompt': f'p{i}', 'focus': None, 'type': 'homonyms', 'note': None, 'label': 'safe'}
    for i in range(3)
  ]
  path = to_parquet(tmp_path / 'xstest' / 'data' / 'test-00000-of-00001.parquet', rows)
  benchmarks = {b.name: b for b in catalogue.load_benchmarks(tmp_path, ['xstest'])}
  assert [e.id for e in benchmarks['xstest'].items] == ['xstest/0', 'xstest/1', 'xstest/2']
  assert len(catalogue.read('xstest', 'test', path.parents[1])) == 3


def test_a_row_that_contradicts_its_prompt_is_left_out_and_named(tmp_path, capsys):
  prompts = [
    {'id': f'{i}', 'prompt': f'p{i}', 'type': 'homonyms', 'label': 'safe'} for i in range(20)
  ]
  answers = [
    {'id': f'v2-{p["id"]}', 'type': p['type'], 'prompt': p['prompt'], 'completion': 'a'}
    | {'final_label': '1_full_compliance'}
    for p in prompts
  ]
  answers[4]['prompt'] = 'another'
  to_csv(tmp_path / 'xstest_prompts.csv', prompts)
  to_csv(tmp_path / 'a_completions.csv', answers)
  rows = catalogue.read('xstest_completions', 'test', tmp_path)
  assert len(rows) == 3 * 19 and rows.drops == {'differs_from_prompt': 3}
  said = capsys.readouterr().err
  assert 'a_completions.csv:6' in said and 'v2-4' in said and said.count('\n') == 1


@pytest.mark.parametrize('name', ['a.csv', 'a.tsv', 'semicolon.csv', 'a.json', 'a.ndjson'])
def test_text_formats(tmp_path, name):
  path = tmp_path / name
  if name.endswith(('.csv', '.tsv')):
    to_csv(path, ROWS, {'a.tsv': '\t', 'semicolon.csv': ';'}.get(name, ','))
    expected = [{'a': 'x', 'b': '1'}, {'a': 'y', 'b': ''}]
  else:
    path.write_text(json.dumps(ROWS) if name == 'a.json' else '\n'.join(map(json.dumps, ROWS)))
    path.write_text(path.read_text() + '\n')
    expected = ROWS
  assert [row for _, row in tables.read_table(path, 'ab')] == expected


def test_flags_of_a_csv_file_are_words(tmp_path):
  path = to_csv(tmp_path / 'a.csv', [{'a': 'False', 'b': 'true'}, {'a': '0', 'b': 'no'}])
  first, second = tables.iterate(path)
  assert (first.flag('a'), first.flag('b'), second.flag('a')) == (False, True, False)
  assert 'must be true or false' in error_of(second.flag, 'b')


@pytest.mark.parametrize(
  'name, text, words',
  [
    ('a.csv', 'a,b,a\n1,2,3\n', ['a.csv:1', "'a' is given twice"]),
    ('a.json', '3', ['a.json', 'list of objects']),
    ('a.json', '[' * 90_000, ['nested too deeply']),
    ('a.jsonl', '[' * 90_000 + '\n', ['a.jsonl:1', 'nested too deeply']),
    ('a.xlsx', '', ['a.xlsx', '.csv', 'save it as']),
    ('a.arrow', 'x', ['a.arrow', 'cannot be read as Arrow']),
  ],
)
def test_bad_tables_are_one_line(tmp_path, name, text, words):
  path = tmp_path / name
  path.write_text(text)
  message = error_of(lambda: list(tables.read_table(path)))
  assert all(word in message for word in words), message


def test_a_folder_of_datasets(tmp_path):
  rows = [{'a': f'{i}', 'b': math.nan if i else 1.0} for i in range(5)]
  folder = save_to_disk(tmp_path / 'one', rows)
  found = list(tables.iterate(tables.locate(folder)))
  assert sorted(row['a'] for row in found) == list('01234')
  assert [row['b'] for row in found].count(None) == 4
  assert len({row.number for row in found}) == 5
  (folder / 'data-00001-of-00002.arrow').unlink()
  assert 'data-00001-of-00002.arrow is missing' in error_of(tables.locate, folder)
  several = tmp_path / 'several'
  for split in ('train', 'test'):
    save_to_disk(several / split, rows)
  (several / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  assert {p.parent.name for p in tables.locate(several)} == {'train'}
  assert {p.parent.name for p in tables.locate(several, 'test')} == {'test'}


def test_a_folder_of_shards_and_splits(tmp_path):
  for name in ('train-00000-of-00002', 'train-00001-of-00002', 'validation-00000-of-00001'):
    to_parquet(tmp_path / 'data' / f'{name}.parquet', ROWS)
  assert [p.stem[:5] for p in tables.locate(tmp_path)] == ['train', 'train']
  assert [p.stem[:5] for p in tables.locate(tmp_path, 'test')] == ['valid']
  (tmp_path / 'data' / 'train-00001-of-00002.parquet').unlink()
  assert 'train-00001-of-00002.parquet is missing' in error_of(tables.locate, tmp_path)
  to_csv(tmp_path / 'train.csv', ROWS)
  (tmp_path / 'data' / 'train-00000-of-00002.parquet').rename(tmp_path / 'train.parquet')
  assert 'perhaps the same rows twice' in error_of(tables.locate, tmp_path)


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
  hub = pytest.importorskip('huggingface_hub')
  to_csv(tmp_path / 'train.csv', ROWS)
  asked = []
  monkeypatch.setattr(
    hub, 'snapshot_download', lambda repo, **kw: asked.append((repo, kw)) or str(tmp_path)
  )
  assert tables.locate('org/rows') == [tmp_path / 'train.csv']
  assert asked[0][0] == 'org/rows' and asked[0][1]['repo_type'] == 'dataset'

  def fail(*args, **kwargs):
    raise OSError('no\nnetwork')

  monkeypatch.setattr(hub, 'snapshot_download', fail)
  assert 'cannot be fetched' in error_of(tables.locate, 'org/rows')
  # A missing file is no id.
  assert 'check the path' in error_of(forms.read, 'org/rows.jsonl')
