import json

import ml_collections
import pytest
from hypothesis import given, strategies as st

from csrm_jax import config as config_lib


def _config():
  config = ml_collections.ConfigDict()
  config.runner = 'train_rm'
  config.seed = 0
  config.optim = {'lr': 1e-3, 'betas': (0.9, 0.95), 'clip': True}
  config.data = {'path': ml_collections.config_dict.placeholder(str)}
  return config


def _parse(arg):
  return config_lib.parse_arg(
    arg,
    model='tiny',
    steps=100,
    lr=1.0,
    debug=False,
    seed=int,
    ablation=('full', 'no_cca'),
    path=None,
  )


def test_parse_arg_defaults():
  for arg in (None, '', ' '):
    assert _parse(arg).to_dict() == {
      'model': 'tiny',
      'steps': 100,
      'lr': 1.0,
      'debug': False,
      'seed': None,
      'ablation': 'full',
      'path': None,
    }


def test_parse_arg_takes_the_types_of_the_defaults():
  arg = _parse('debug,steps=5, lr=1e-3,seed=7,ablation=no_cca,path=a=b,model=')
  assert arg.debug is True
  assert arg.steps == 5 and isinstance(arg.steps, int)
  assert arg.lr == 1e-3
  assert arg.seed == 7
  assert arg.ablation == 'no_cca'
  assert arg.path == 'a=b'
  assert arg.model == ''
  assert _parse('lr=2').lr == 2.0
  assert _parse('debug=false').debug is False


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('modle=x', r"'modle' is unknown \(did you mean model.*known: model, st"),
    ('steps=1,steps=2', "'steps' is given twice"),
    ('steps=1.5', "'1.5' is not of type int"),
    ('lr=fast', "'fast' is not of type float"),
    ('debug=maybe', "'maybe' is not of type bool"),
    ('steps', "'steps' needs a value"),
    ('seed=x', "'x' is not of type int"),
    ('ablation=none', 'choose one of full, no_cca'),
    ('=1', "'' is unknown"),
  ],
)
def test_parse_arg_refuses(arg, message):
  with pytest.raises(ValueError, match=message):
    _parse(arg)


@given(st.integers(), st.floats(allow_nan=False), st.booleans())
def test_parse_arg_round_trip(steps, lr, debug):
  arg = _parse(f'steps={steps},lr={lr!r},debug={debug}')
  assert (arg.steps, arg.lr, arg.debug) == (steps, lr, debug)


def test_json_round_trip():
  config = _config()
  text = config_lib.to_json(config)
  copy = config_lib.from_json(text)
  assert copy.optim.betas == (0.9, 0.95)
  assert config_lib.diff_config(config, copy) == []
  assert config_lib.to_json(copy) == text
  assert config_lib.digest(copy) == config_lib.digest(config)


def test_json_names_what_it_cannot_hold():
  config = _config()
  config.optim.fn = print
  with pytest.raises(ValueError, match=r"'optim\.fn' holds a builtin"):
    config_lib.to_json(config)


def test_digest_follows_the_values():
  config = _config()
  config.seed = 1
  assert config_lib.digest(config) != config_lib.digest(_config())


def test_diff_config():
  new = _config()
  new.optim.lr = 5e-4
  new.extra = 'x'
  del new.seed
  assert config_lib.diff_config(_config(), new) == [
    'extra: (absent) -> "x"',
    'optim.lr: 0.001 -> 0.0005',
    'seed: 0 -> (absent)',
  ]


def test_set_overrides():
  config = _config().lock()
  config_lib.set_overrides(
    config, {'optim.lr': 1, 'seed': 3, 'data.path': 'p', 'optim.betas': (1, 1)}
  )
  assert config.optim.lr == 1.0
  assert (config.seed, config.data.path) == (3, 'p')


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('optim.lrr', 1.0, r"'optim\.lrr' does not exist \(did you mean optim\.lr"),
    ('lr', 1.0, r'did you mean optim\.lr\?'),
    ('zzz', 1.0, r"'zzz' does not exist$"),
    ('optim', 1.0, "'optim' is a section"),
    ('seed.x', 1.0, "'seed.x' does not exist"),
    ('seed', 'a', "seed='a'"),
  ],
)
def test_set_overrides_refuses(key, value, message):
  with pytest.raises(ValueError, match=message):
    config_lib.set_overrides(_config(), {key: value})


def test_load_module(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text('def get_config(arg=None):\n  return arg\n')
  assert config_lib.load_module(path).get_config('x') == 'x'
  with pytest.raises(FileNotFoundError, match=r'nope\.py does not exist'):
    config_lib.load_module(tmp_path / 'nope.py')
  with pytest.raises(ValueError, match=r'must end in \.py'):
    config_lib.load_module(path.rename(tmp_path / 'c.txt'))


def test_only_the_first_process_of_a_run_changes_its_work_directory(tmp_path):
  partial = tmp_path / '.lease.json.0123abcd.tmp'
  partial.touch()
  config_lib.prepare_workdir(tmp_path, _config(), is_first=False)
  assert list(tmp_path.iterdir()) == [partial]
  config_lib.prepare_workdir(tmp_path, _config())
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_workdir_is_resumed_with_the_same_config_only(tmp_path):
  path = config_lib.prepare_workdir(tmp_path / 'a' / 'b', _config())
  assert path == tmp_path / 'a' / 'b'
  (path / 'metrics.jsonl').write_text('{}')
  config_lib.prepare_workdir(path, _config())
  new = _config()
  new.seed = 2
  with pytest.raises(ValueError, match=r'another config: seed: 0 -> 2 \(give'):
    config_lib.prepare_workdir(path, new)
  assert config_lib.from_json((path / 'config.json').read_text()).seed == 0


def test_an_older_run_without_a_knob_goes_on_with_its_default(tmp_path):
  path = config_lib.CONFIGS / 'rm.py'
  new = config_lib.load_module(path).get_config('data=jsonl,path=a.jsonl,lora=4')
  old = config_lib.from_json(config_lib.to_json(new))
  old.data.__delattr__('share_prefix')
  old.model.__delattr__('head')
  config_lib.prepare_workdir(tmp_path, old)
  (tmp_path / 'metrics.jsonl').write_text('{}')
  source = f'{path}:data=jsonl,path=a.jsonl,lora=4'
  changed = new.copy_and_resolve_references()
  changed.model.head = 'linear'
  with pytest.raises(ValueError, match=r'another config: model\.head: "verb\w+" -> "linear" \('):
    config_lib.prepare_workdir(tmp_path, changed, source=source)
  # Of a config that comes from no file nobody knows the defaults.
  with pytest.raises(ValueError, match=r'data\.share_prefix: \(absent\) -> true; model\.head'):
    config_lib.prepare_workdir(tmp_path, new)
  config_lib.prepare_workdir(tmp_path, new, source=source)
  assert config_lib.from_json((tmp_path / 'config.json').read_text()).model.head == 'verbalizer'
  # What this version lacks would be dropped from the run.
  with pytest.raises(ValueError, match=r'model\.head: "verbalizer" -> \(absent\)'):
    config_lib.prepare_workdir(tmp_path, old, source=source)


def test_a_new_argument_is_no_default(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text(
    'from csrm_jax import config as config_lib\n'
    'def get_config(arg=None):\n'
    '  arg = config_lib.parse_arg(arg, num=1)\n'
    "  return config_lib.ConfigDict({'seed': 0, 'num': arg.num})\n"
  )
  old = config_lib.ConfigDict({'seed': 0})
  assert not config_lib.diff_config(old, config_lib.ConfigDict({'seed': 0, 'num': 1}), str(path))
  new = config_lib.ConfigDict({'seed': 0, 'num': 2})
  assert config_lib.diff_config(old, new, f'{path}:num=2') == ['num: (absent) -> 2']


def test_workdir_without_results_takes_another_config(tmp_path):
  config_lib.prepare_workdir(tmp_path, _config())
  new = _config()
  new.seed = 2
  config_lib.prepare_workdir(tmp_path, new)
  assert config_lib.from_json((tmp_path / 'config.json').read_text()).seed == 2


def test_workdir_must_be_a_usable_directory(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='is a file'):
    config_lib.make_workdir(tmp_path / 'file')
  (tmp_path / 'config.json').write_text('{"seed')
  with pytest.raises(ValueError, match='is not a config'):
    config_lib.prepare_workdir(tmp_path, _config())


def test_discard_workdir_keeps_results(tmp_path):
  path = config_lib.prepare_workdir(tmp_path / 'run', _config())
  (path / 'report').mkdir()
  config_lib.discard_workdir(path)
  assert (path / 'config.json').exists()
  (path / 'report').rmdir()
  config_lib.discard_workdir(path)
  assert not path.exists()


def test_expand_sweep():
  items = [
    {'name': f'{ablation}-lr={lr}', 'arg': f'ablation={ablation}', 'overrides': {'optim.lr': lr}}
    for ablation in ('full', 'no_cca')
    for lr in (1e-3, 1e-4)
  ]
  runs = config_lib.expand_sweep(lambda: [{'name': 'plain'}, *items])
  assert [run.name for run in runs] == [
    'plain',
    'full-lr=0.001',
    'full-lr=0.0001',
    'no_cca-lr=0.001',
    'no_cca-lr=0.0001',
  ]
  assert (runs[0].overrides, runs[0].arg) == ({}, '')
  assert runs[4].overrides == {'optim.lr': 1e-4}
  assert runs[4].arg == 'ablation=no_cca'


@pytest.mark.parametrize(
  ('items', 'message'),
  [
    ([], 'no runs'),
    ([{'overrides': {}}], 'item 0 must be a dict with a name'),
    ([{'name': 'a', 'override': {}}], 'item 0 must be'),
    ([{'name': 'a/b'}], 'cannot be a folder'),
    ([{'name': '..'}], 'cannot be a folder'),
    ([{'name': 'a'}, {'name': 'a'}], "two runs named 'a'"),
  ],
)
def test_expand_sweep_refuses(items, message):
  with pytest.raises(ValueError, match=message):
    config_lib.expand_sweep(lambda: items)


def test_an_argument_with_sections_and_braces():
  spec = {'path': '', 'labels': '', 'columns': {'label': '', 'id': ''}}
  text = "path=a.csv,labels={'0': 'safe', '1': 'unsafe'},columns.label=bad"
  arg = config_lib.parse_arg(text, **spec)
  assert arg.to_dict() == {
    'path': 'a.csv',
    'labels': "{'0': 'safe', '1': 'unsafe'}",
    'columns': {'label': 'bad', 'id': ''},
  }
  with pytest.raises(ValueError, match=r"'columns\.lable' is unknown"):
    config_lib.parse_arg('columns.lable=x', **spec)


def test_a_run_whose_config_is_gone_takes_no_other_one(tmp_path):
  config, other = ml_collections.ConfigDict({'lr': 1.0}), ml_collections.ConfigDict({'lr': 2.0})
  config_lib.prepare_workdir(tmp_path, config)
  (tmp_path / 'manifest.json').write_text(json.dumps({'config_digest': config_lib.digest(config)}))
  # What a killed process was writing is no result.
  (tmp_path / '.config.json.0a1b2c3d.tmp').write_text('{')
  config_lib.prepare_workdir(tmp_path, other)
  assert not list(tmp_path.glob('.*'))
  (tmp_path / 'config.json').rename(tmp_path / '.config.json.0a1b2c3d.tmp')
  config_lib.prepare_workdir(tmp_path, config)
  assert not list(tmp_path.glob('.*'))
  (tmp_path / 'metrics.jsonl').write_text('{}\n')
  (tmp_path / 'config.json').unlink()
  with pytest.raises(ValueError, match=r'config\.json is gone'):
    config_lib.prepare_workdir(tmp_path, other)
  config_lib.prepare_workdir(tmp_path, config)
  assert (tmp_path / 'config.json').is_file()
  (tmp_path / 'config.json').unlink()
  (tmp_path / 'manifest.json').unlink()
  with pytest.raises(ValueError, match=r'config\.json is gone'):
    config_lib.prepare_workdir(tmp_path, config)
  for text in ('[1]', '[' * 9000, ''):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=r'config\.json is not a config'):
      config_lib.prepare_workdir(tmp_path, config)


def test_a_run_of_another_clone_has_the_same_config():
  old, new = (
    config_lib.ConfigDict(
      {'model': {'init': init}, 'words': ('a',), 'reward': {'refusal_rules': rules}}
    )
    for init, rules in (
      ('/old/clone/csrm_jax/ruleworld/base', '/old/clone/configs/safety/refusal.yaml'),
      ('builtin:ruleworld/base', 'builtin:configs/safety/refusal.yaml'),
    )
  )
  assert config_lib.diff_config(old, new) == []
  old.model.init = '/data/base'
  assert len(config_lib.diff_config(old, new)) == 1
