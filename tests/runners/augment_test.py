"""The augmentation job: what it writes, and that it survives."""

import collections
import json
import pathlib

import ml_collections
import numpy as np
import pytest

from csrm_jax import config as config_lib, main
from csrm_jax.core import journal
from csrm_jax.data import forms, pipeline
from csrm_jax.ruleworld import examples
from csrm_jax.runners import augment
from csrm_jax.safety.schema import Category, Example, Pair

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = config_lib.load_module(ROOT / 'configs' / 'augment.py')
RM = config_lib.load_module(ROOT / 'configs' / 'rm.py')


def config(arg='smoke', **changes):
  c = CONFIG.get_config(arg)
  # Pools of so few conversations pass no serious test.
  c.strictness.threshold, c.strictness.max_pairs = 0.5, 50
  c.update_from_flattened_dict(changes)
  return c


def run(c, workdir):
  workdir.mkdir(parents=True, exist_ok=True)
  augment.run(c, workdir)
  card = json.loads((workdir / 'card.json').read_text())
  return forms.read(workdir / 'data.jsonl', require_label=True), card


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Returns (work directory, rows, card) of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('finished')
  return workdir, *run(config(), workdir)


def test_data_is_what_a_reward_model_trains_on(finished):
  workdir, rows, card = finished
  kinds = collections.Counter(map(type, rows))
  assert kinds[Example] == 400
  assert 20 <= kinds[Pair] == card['counts']['strictness_pairs'] <= 50
  assert (
    card['counts']['with_plus']
    == sum(r.plus is not None for r in rows if isinstance(r, Example))
    > 100
  )
  assert len({row.id for row in rows}) == len(rows)
  # The conversations, rules and labels are those of the source.
  for index, row in enumerate(rows[:400]):
    source = examples.training_example(0, index)
    assert (row.safety, row.conversation, row.label) == (
      source.safety,
      source.conversation,
      source.label,
    )
  assert '1.000' in (workdir / 'report' / 'strictness.md').read_text()
  assert card['drops']['plus_not_proposed'] > 0
  facts, *sections = (workdir / 'card.md').read_text().split('\n## ')
  assert f'- digest: {card["digest"]}' in facts
  assert f'- plus_not_proposed: {card["drops"]["plus_not_proposed"]}' in (sections[0])
  events = read(workdir / 'log.jsonl')
  assert events[-1]['event'] == 'done'


@pytest.mark.parametrize('num_puts', [1, 150, 230])
def test_a_killed_run_goes_on_where_it_was(finished, tmp_path, monkeypatch, num_puts):
  count = iter(range(num_puts))
  put = journal.Journal.put

  def dying(self, key, value):
    if next(count, None) is None:
      self._file.write(b'{"key": "cut sho')  # What a kill may leave.
      raise KeyboardInterrupt
    put(self, key, value)

  with monkeypatch.context() as patch:
    patch.setattr(journal.Journal, 'put', dying)
    with pytest.raises(KeyboardInterrupt):
      run(config(), tmp_path)
  assert not (tmp_path / 'data.jsonl').exists()
  run(config(), tmp_path)
  workdir = finished[0]
  assert (tmp_path / 'data.jsonl').read_bytes() == (workdir / 'data.jsonl').read_bytes()
  events, whole = (
    [e | {'time': 0, 'time_s': 0} for e in read(d / 'log.jsonl')] for d in (tmp_path, workdir)
  )
  assert sorted(map(str, events)) == sorted(map(str, whole))
  for name in ('journal_categories.jsonl', 'journal_strictness.jsonl'):
    keys = [entry['key'] for entry in read(tmp_path / name)]
    assert len(keys) == len(set(keys)) == len(read(workdir / name))


def test_a_disk_that_is_full_at_the_end_is_one_line(tmp_path, monkeypatch):
  def full(*unused):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr('os.fsync', full)
    with pytest.raises(OSError, match=r'data.jsonl: .*nothing is lost'):
      run(config(**{'strictness.enabled': False}), tmp_path)
  assert [path.name for path in tmp_path.iterdir() if 'data' in path.name] == []
  _, card = run(config(**{'strictness.enabled': False}), tmp_path)
  assert card['usage_of_last_run'] == {'requests': 0}


def test_a_finished_run_asks_nothing_again(finished):
  workdir, _, card = finished
  before = (workdir / 'data.jsonl').read_bytes()
  _, again = run(config(), workdir)
  assert (workdir / 'data.jsonl').read_bytes() == before
  assert again['usage_of_last_run'] == {'requests': 0}
  assert again['digest'] == card['digest']


def test_array_record_files_hold_the_same_rows(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  pytest.importorskip('array_record')
  rows, card = run(config(array_record=True), tmp_path)
  found = pipeline.read_source('array_record', str(tmp_path))
  assert sorted(found, key=lambda item: item.id) == sorted(rows, key=lambda item: item.id)
  assert card['counts']['strictness_pairs'] == sum(isinstance(item, Pair) for item in found) > 0


def test_a_reward_model_trains_on_it(finished, tmp_path):
  """configs/rm.py reads what configs/augment.py wrote."""
  workdir = finished[0]
  rm = RM.get_config(f'data=augmented,path={workdir}')
  rm.num_steps = rm.log_every = rm.checkpoint_every = 2
  rm.optim.warmup_steps = 1
  rm.data.batch_size, rm.data.row_length, rm.data.max_length = 1, 512, 256
  rm.eval.max_examples = 4
  rm.model.init = ''
  rm.model.overrides = ml_collections.ConfigDict(
    {
      'num_layers': 1,
      'embed_dim': 16,
      'num_heads': 2,
      'num_kv_heads': 1,
      'head_dim': 8,
      'mlp_dim': 16,
      'unroll': 1,
    }
  )
  main.run(rm, tmp_path / 'rm')
  result = json.loads((tmp_path / 'rm' / 'report' / 'metrics.json').read_text())
  # The file holds examples and pairs: both are trained and tested on.
  assert result['suites']['file']['num_examples'] > 0
  assert result['suites']['file_pairs']['num_pairs'] > 0
  items, held_out = pipeline.read_part('augmented', str(workdir), 0, 0.2, examples.TRAINING)
  for half in (items, held_out):
    assert {type(item) for item in half} == {Example, Pair}
  # Proposals are stored, and drawn anew: p+ is in some of the rules.
  augment_fn = pipeline.make_augment(0.5, 0.5, 0.5)
  rng = np.random.default_rng(0)
  made = [item for item in items if isinstance(item, Example)]
  plus = {item.plus for item in made} - {None}
  assert any(plus & set(augment_fn(item, rng).safety.categories) for item in made)


@pytest.mark.parametrize('format', ['csrm', 'llama_guard_3'])
def test_any_guard_can_judge(tmp_path, monkeypatch, format):
  asked = []

  class Guard:
    def score_fn(self, items):
      asked.extend(items)
      # Unsafe where the rule is about pets, whatever was said.
      return np.array([1.0 - 2.0 * ('pets' in item.safety.names[0].lower()) for item in items])

  def load(path, format, allow_out_of_domain):
    assert not allow_out_of_domain
    asked.append((path, format))
    return Guard()

  monkeypatch.setattr(augment.reward_model, 'load', load)
  judge = augment._make_judge(config(judge='PATH', judge_format=format))
  talk = examples.training_example(0, 0).conversation
  rules = [Category('Pets', 'No pets.'), Category('Wine', 'No wine.')]
  assert judge([talk, talk], rules) == [True, False]
  assert asked[0] == ('PATH', format)
  # One rule at a time: the others must not sway the verdict.
  assert [item.safety.names for item in asked[1:]] == [('Pets',), ('Wine',)]


def test_some_of_a_file_are_drawn_at_random(tmp_path):
  items = [examples.training_example(5, i) for i in range(60)]
  items.sort(key=lambda item: item.label)  # As many public files are.
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(i.to_dict()) + '\n' for i in items))
  c = config(f'data=jsonl,path={path}', **{'source.num_examples': 20})
  some, _ = augment._read(c.source, 0)
  assert len(some) == 20 and {item.label for item in some} == {'safe', 'unsafe'}
  assert some == [item for item in items if item in some]  # In their order.
  assert augment._read(c.source, 0)[0] == some
  assert augment._read(c.source, 1)[0] != some
  c.source.num_examples = 99
  assert augment._read(c.source, 0)[0] == items


def test_judged_texts_have_no_rules_to_augment(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"comment": "Words.", "isHate": 0.5}\n')
  with pytest.raises(ValueError, match="'has_no_rules_of_its_own': 1"):
    augment._read(config(f'data=ethos,path={path}').source, 0)


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'source.name': 'cats'}, 'use one of ruleworld, '),
    ({'source.name': 'jsonl'}, 'has no path'),
    ({'proposer': 'me'}, 'use one of oracle, endpoint, model'),
    ({'proposer': 'model'}, "the model's init is empty"),
    ({'judge': ''}, 'needs a classifier'),
    ({'categories.enabled': False, 'strictness.enabled': False}, 'nothing to'),
  ],
)
def test_a_bad_config_is_one_line(tmp_path, changes, said):
  with pytest.raises(ValueError, match=said) as error:
    main.run(config(**changes), tmp_path / 'work')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'work').exists()
