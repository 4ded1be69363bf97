"""Bad input through the command line: one line, exit code 2, nothing left.

Each case is the command line of a process of its own, forked from one that has
the imports behind it.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# The shipped config with a backbone of seconds, and as `wide` another one.
_CONFIG = """
import ml_collections

from csrm_jax import config as config_lib

RM = config_lib.load_module({rm!r})


def get_config(arg=None):
  wide = (arg or '').endswith('wide')
  c = RM.get_config((arg or '').removesuffix('wide').rstrip(','))
  c.num_steps = c.log_every = c.checkpoint_every = 1
  c.optim.warmup_steps = 0
  c.data.batch_size = 1
  c.eval.ruleworld_examples = 0
  c.model.init = ''
  c.model.overrides = ml_collections.ConfigDict(dict(
      num_layers=1, embed_dim=32 if wide else 16, num_heads=2,
      num_kv_heads=1, head_dim=8, mlp_dim=16, unroll=1))
  return c
"""

RULES = {'categories': [{'name': 'Wine', 'guideline': 'No wine.'}]}
GOOD = {
  'id': '1',
  'safety': RULES,
  'label': 'safe',
  'conversation': [
    {'role': 'user', 'content': 'Hello.'},
    {'role': 'agent', 'content': 'Good day.'},
  ],
}


@dataclasses.dataclass(frozen=True)
class Ended:
  """What a process left behind."""

  code: int
  out: str
  err: str


@pytest.fixture(scope='module')
def server():
  env = {'JAX_PLATFORMS': 'cpu', 'PYTHONWARNINGS': 'ignore', 'PYTHONPATH': str(ROOT)}
  with subprocess.Popen(
    # Not this folder, whose names would hide others, but the root is on the path.
    [sys.executable, '-P', ROOT / 'tests' / 'freeze.py', '--serve'],
    env=os.environ | env,
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:
    process.stdout.readline()  # where the package lies
    yield process
    process.stdin.close()


def _run(server, args, folder):
  files = [folder / name for name in ('stdout', 'stderr')]
  case = {'args': args, 'folder': str(folder), 'files': list(map(str, files))}
  server.stdin.write(json.dumps(case) + '\n')
  server.stdin.flush()
  code = int(server.stdout.readline())
  return Ended(code, *(file.read_text() for file in files))


@pytest.fixture
def command(server, tmp_path):
  """Runs the command line in tmp_path; returns an Ended."""

  def run(*args):
    return _run(server, args, tmp_path)

  return run


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'tiny.py'
  path.write_text(_CONFIG.format(rm=str(ROOT / 'configs' / 'rm.py')))
  return path


@pytest.fixture(scope='module')
def trained(server, config_file, tmp_path_factory):
  """Returns the work directory of a finished run."""
  folder = tmp_path_factory.mktemp('trained')
  ended = _run(server, [f'--config={config_file}', '--workdir=rm'], folder)
  assert ended.code == 0, ended.err
  return folder / 'rm'


def _assert_refused(ended, *parts, workdir=None):
  """Checks exit code, the one line and that no work directory is there."""
  assert ended.code == 2, ended.err
  assert ended.out == ''
  assert ended.err.startswith('error: ') and ended.err.count('\n') == 1
  for part in parts:
    assert part in ended.err, ended.err
  if workdir is not None:
    assert not workdir.exists()


def _write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def _user_last(row):
  return row | {'conversation': row['conversation'][:1]}


def _without(row, column):
  return {key: value for key, value in row.items() if key != column}


def _rules(*names):
  return {'categories': [{'name': name, 'guideline': 'No.'} for name in names]}


BAD_ROWS = {
  'unknown label': (
    GOOD | {'label': 'harmless'},
    ["unknown label 'harmless'", 'use "safe", "unsafe"'],
  ),
  'no label': (_without(GOOD, 'label'), ['no label', 'remove the row']),
  'empty category list': (
    GOOD | {'safety': {'categories': []}},
    ['the category list is empty', 'needs at least one'],
  ),
  'duplicate category names': (
    GOOD | {'safety': _rules('Wine', ' wine ')},
    ["' wine ' is used twice", 'rename one'],
  ),
  'ends with the user': (_user_last(GOOD), ['ends with role', 'end it with the agent']),
  'missing column': (_without(GOOD, 'conversation'), ['"conversation" is missing', 'add it']),
  'misspelt column': (_without(GOOD, 'label') | {'lable': 'safe'}, ['lable', 'label']),
  'missing rules file': (GOOD | {'safety': 'no.yaml'}, ['no.yaml', 'check the path']),
}


@pytest.mark.parametrize('name', BAD_ROWS)
def test_bad_rows_of_training_data(command, tmp_path, config_file, name):
  row, parts = BAD_ROWS[name]
  _write(tmp_path / 'rows.jsonl', [GOOD, GOOD | {'id': '2'}, row])
  ended = command(f'--config={config_file}:data=jsonl,path=rows.jsonl', '--workdir=w')
  _assert_refused(ended, 'rows.jsonl:3', *parts, workdir=tmp_path / 'w')


BAD_BYTES = {
  'invalid utf-8': (
    json.dumps(GOOD).encode().replace(b'Hello', b'H\xe9llo') + b'\n',
    ['0xe9 is not valid UTF-8', 'save the file as UTF-8'],
  ),
  'truncated line': (json.dumps(GOOD).encode()[:-30], ['cut short', 'remove that line']),
  'not json': (b'{"id": 1,}\n{}\n', ['not valid JSON', 'one JSON object']),
}


@pytest.mark.parametrize('name', BAD_BYTES)
@pytest.mark.parametrize('runner', ['train', 'eval'])
def test_bad_bytes(command, tmp_path, config_file, runner, name):
  data, parts = BAD_BYTES[name]
  good = json.dumps(GOOD).encode() + b'\n'
  (tmp_path / 'rows.jsonl').write_bytes(good + data)
  if runner == 'train':
    args = [f'--config={config_file}:data=jsonl,path=rows.jsonl']
  else:
    args = [
      f'--config={ROOT}/configs/eval.py',
      '--config.checkpoint=none',
      '--config.conversations=rows.jsonl',
    ]
  ended = command(*args, '--workdir=w')
  _assert_refused(ended, 'rows.jsonl:2', *parts, workdir=tmp_path / 'w')


BAD_YAML = {
  'empty category list': ('categories: []\n', ['rules.yaml', 'is empty']),
  'duplicate category names': (
    'categories:\n- name: A\n  guideline: x\n- name: a\n  guideline: y\n',
    ['rules.yaml:4', 'used twice', 'rename one'],
  ),
  'missing guideline': ('categories:\n- name: A\n', ['rules.yaml:2', '"guideline"', 'add it']),
  'not yaml': ('categories: [\n', ['rules.yaml:', 'not valid YAML']),
}


@pytest.mark.parametrize('name', BAD_YAML)
def test_bad_rules_of_the_eval_command(command, tmp_path, name):
  text, parts = BAD_YAML[name]
  (tmp_path / 'rules.yaml').write_text(text)
  _write(tmp_path / 'rows.jsonl', [GOOD])
  ended = command(
    f'--config={ROOT}/configs/eval.py',
    '--config.checkpoint=none',
    '--config.safety=rules.yaml',
    '--config.conversations=rows.jsonl',
    '--workdir=w',
  )
  _assert_refused(ended, *parts, workdir=tmp_path / 'w')


_EVAL = f'--config={ROOT}/configs/eval.py'
BAD_FLAGS = {
  'no such config key': (
    ['{config}', '--config.optim.lrate=1'],
    ["config key 'optim.lrate' does not exist", 'optim.lr'],
  ),
  'no such config argument': (['{config}:ablatoin=no_sa'], ["'ablatoin' is unknown", 'ablation']),
  'no such ablation': (['{config}:ablation=no_ccb'], ['ablation=no_ccb', 'no_cca']),
  'a value of another type': (['{config}', '--config.optim.lr=high'], ['optim.lr', 'high']),
  'no such config file': (['--config=no.py'], ['no.py does not exist']),
  'no such data file': (['{config}:data=jsonl,path=no.jsonl'], ['no.jsonl', 'check the path']),
  'no data path': (['{config}:data=jsonl'], ['has no path', 'path=FILE']),
  'no such public data': (['{config}:data=public,data_dir=no'], ['no/hh_rlhf', 'check the path']),
  'no such tokenizer': (['{config}', '--config.tokenizer=no.model'], ['no.model', 'check']),
  'no such base weights': (
    ['{config}', '--config.model.init=no'],
    ['no: does not exist', 'folder'],
  ),
  'base weights of another backbone': (
    ['{config}', '--config.model.init={base}'],
    ['weights of another backbone', 'make them equal'],
  ),
  'no such preset': (['{config}', '--config.model.preset=huge'], ["'huge'", 'tiny']),
  'no checkpoint named': (
    [_EVAL, '--config.conversations=rows.jsonl'],
    ['config.checkpoint is empty', '--config.checkpoint=PATH'],
  ),
  'no such checkpoint': (
    [_EVAL, '--config.checkpoint=no', '--config.conversations=rows.jsonl'],
    ['/no', 'checkpoint'],
  ),
  'no such conversations': (
    [_EVAL, '--config.checkpoint=no', '--config.conversations=no.jsonl'],
    ['no.jsonl', 'check the path'],
  ),
  'no such rules': (
    [
      _EVAL,
      '--config.checkpoint=no',
      '--config.safety=no.yaml',
      '--config.conversations=rows.jsonl',
    ],
    ['no.yaml', 'check the path'],
  ),
}


@pytest.mark.parametrize('name', BAD_FLAGS)
def test_bad_flags(command, tmp_path, config_file, name):
  args, parts = BAD_FLAGS[name]
  _write(tmp_path / 'rows.jsonl', [GOOD])
  base = ROOT / 'csrm_jax' / 'ruleworld' / 'base'
  args = [
    arg.replace('{config}', f'--config={config_file}').replace('{base}', str(base)) for arg in args
  ]
  ended = command(*args, '--workdir=w')
  _assert_refused(ended, *parts, workdir=tmp_path / 'w')


def test_resuming_with_another_backbone(command, trained, config_file, tmp_path):
  workdir = tmp_path / 'w'
  shutil.copytree(trained, workdir)
  shutil.rmtree(workdir / 'report')
  ended = command(f'--config={config_file}:wide', '--workdir=w')
  _assert_refused(ended, 'config.json', 'embed_dim: 16 -> 32')
  (workdir / 'config.json').unlink()
  before = _content(workdir / 'checkpoints')
  ended = command(f'--config={config_file}:wide', '--workdir=w')
  _assert_refused(ended, 'config.json is gone', 'another --workdir')
  (workdir / 'manifest.json').unlink()
  ended = command(f'--config={config_file}:wide', '--workdir=w')
  _assert_refused(ended, 'config.json is gone', 'another --workdir')
  assert _content(workdir / 'checkpoints') == before


def test_scoring_with_a_checkpoint_of_another_backbone(command, trained, tmp_path):
  shutil.copytree(trained, tmp_path / 'rm')
  path = tmp_path / 'rm' / 'checkpoints' / '1' / 'info' / 'metadata'
  path.write_text(re.sub(r'("embed_dim": )16', r'\g<1>32', path.read_text()))
  _write(tmp_path / 'rows.jsonl', [GOOD])
  ended = command(
    _EVAL, '--config.checkpoint=rm', '--workdir=w', '--config.conversations=rows.jsonl'
  )
  last = ended.err.splitlines()[-1]
  assert ended.code == 2 and last.startswith('error: ') and 'checkpoint' in last
  assert not (tmp_path / 'w').exists()


def test_scoring_with_another_tokenizer(command, trained, tmp_path):
  shutil.copytree(trained, tmp_path / 'rm')
  path = tmp_path / 'rm' / 'tokenizer.model'
  path.write_bytes(path.read_bytes()[:1000])
  _write(tmp_path / 'rows.jsonl', [GOOD])
  ended = command(
    _EVAL, '--config.checkpoint=rm', '--workdir=w', '--config.conversations=rows.jsonl'
  )
  _assert_refused(ended, 'rm/tokenizer.model', workdir=tmp_path / 'w')


def test_rules_too_long_for_the_model(command, trained, config_file, tmp_path):
  long = {'categories': [{'name': f'Wine {i}', 'guideline': 'No wine. ' * 50} for i in range(24)]}
  rows = [GOOD | {'id': str(i), 'safety': long} for i in range(20)]
  _write(tmp_path / 'rows.jsonl', rows)
  parts = ['rules_too_long', 'shorten the rules']
  ended = command(
    _EVAL,
    f'--config.checkpoint={trained}',
    '--workdir=w',
    '--config.conversations=rows.jsonl',
    '--config.max_length=256',
    '--config.allow_out_of_domain=True',
  )
  last = ended.err.splitlines()[-1]  # below the progress bar
  assert ended.code == 2 and all(part in last for part in parts), ended.err
  assert not (tmp_path / 'w').exists()
  ended = command(f'--config={config_file}:data=jsonl,path=rows.jsonl', '--workdir=w')
  note, error = ended.err.splitlines(keepends=True)
  assert note.startswith('note: ') and 'unknown to the tokenizer' in note
  _assert_refused(dataclasses.replace(ended, err=error), *parts, workdir=tmp_path / 'w')


def test_pairs_where_conversations_are_scored(command, tmp_path):
  side = _without(GOOD, 'label')
  pair = {'id': '1', 'kind': 'preference', 'safer': side, 'other': side}
  _write(tmp_path / 'rows.jsonl', [pair])
  ended = command(
    _EVAL, '--config.checkpoint=no', '--workdir=w', '--config.conversations=rows.jsonl'
  )
  _assert_refused(ended, 'rows.jsonl holds pairs', workdir=tmp_path / 'w')


def test_a_process_of_its_own(tmp_path):
  """One case without the fork: a fresh interpreter behaves the same."""
  _write(tmp_path / 'rows.jsonl', [GOOD | {'label': 'harmless'}])
  result = subprocess.run(
    [
      sys.executable,
      '-m',
      'csrm_jax.main',
      f'--workdir={tmp_path}/w',
      f'--config=configs/rm.py:data=jsonl,path={tmp_path}/rows.jsonl',
    ],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  _assert_refused(
    Ended(result.returncode, result.stdout, result.stderr),
    'rows.jsonl:1',
    'unknown label',
    workdir=tmp_path / 'w',
  )


def _content(folder):
  return {path: path.read_bytes() for path in folder.glob('**/*') if path.is_file()}


# Own data through the command line.


def test_two_rows_with_one_id(command, tmp_path):
  _write(tmp_path / 'rows.jsonl', [GOOD, GOOD | {'id': '2'}, GOOD | {'label': 'unsafe'}])
  ended = command(
    _EVAL, '--config.checkpoint=none', '--workdir=w', '--config.conversations=rows.jsonl'
  )
  _assert_refused(ended, 'rows.jsonl:3', "'1'", 'rows.jsonl:1', workdir=tmp_path / 'w')


def test_a_table_of_anothers_form_is_trained_on_and_scored(command, trained, config_file, tmp_path):
  rows = [['q', 'a', 'bad', 'why'], ['Wine?', 'Drink wine.', '1', 'Wine'], ['Hi.', 'Hi.', '0', '']]
  for name, copies in (('train.csv', 4), ('test.csv', 1)):
    text = [rows[0], *([f'{i} {row[0]}', *row[1:]] for i in range(copies) for row in rows[1:])]
    (tmp_path / name).write_text(''.join(','.join(row) + '\n' for row in text))
  (tmp_path / 'rules.md').write_text('# Bar\n\n## Wine\nNo wine.\n\n## Beer\nNo beer.\n')
  columns = {'prompt': 'q', 'response': 'a', 'label': 'bad', 'violated': 'why'}
  more = ''.join(f',columns.{ours}={theirs}' for ours, theirs in columns.items())
  ended = command(
    f"--config={config_file}:data=auto,path=train.csv,safety=rules.md,epochs=11{more},labels={{'0':"
    " 'safe', '1': 'unsafe'}",
    '--config.eval.path=test.csv',
    '--workdir=w',
  )
  assert ended.code == 0, ended.err
  said = [
    "8 rows in the form 'response'",
    'epochs=11: ',
    "pass the 8 rows of 'file' ",
    'Wine, Beer',
  ]
  assert all(part in ended.err for part in said), ended.err
  summary = json.loads((tmp_path / 'w' / 'report' / 'metrics.json').read_text())
  assert 'test' in summary['suites']
  ended = command(
    _EVAL,
    f'--config.checkpoint={trained}',
    '--config.conversations=test.csv',
    '--config.safety=rules.md',
    *(f'--config.columns.{ours}={theirs}' for ours, theirs in columns.items()),
    "--config.labels={'0': 'safe', '1': 'unsafe'}",
    '--config.categories=True',
    '--config.table=csv',
    '--config.allow_out_of_domain=True',
    '--workdir=scored',
  )
  assert ended.code == 0, ended.err
  lines = (tmp_path / 'scored' / 'scored.jsonl').read_text().splitlines()
  first, second = map(json.loads, lines)
  assert (first['id'], first['response'], first['true_label']) == (
    'test.csv:2',
    'Drink wine.',
    'unsafe',
  )
  assert first['history'] == [{'role': 'user', 'content': '0 Wine?'}]
  assert first['rules'] == second['rules'] and len(first['rules']) == 64
  assert [part['name'] for part in first['categories']] == ['Wine', 'Beer']
  assert first['category'] in ('Wine', 'Beer', None)
  assert len((tmp_path / 'scored' / 'scored.csv').read_text().splitlines()) == 3
