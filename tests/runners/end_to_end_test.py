"""The command line from start to report, in small runs of the shipped configs.

The runs of the `smoke` config are processes of their own, as a user starts
them; what they share is the folder of compiled programs.
"""

import dataclasses
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

import csrm_jax
from csrm_jax import config as config_lib, main
from csrm_jax.core import checkpoint, tree
from csrm_jax.data import forms, sources
from csrm_jax.models import config as model_config, hf, lora, transformer
from csrm_jax.reward import model as reward_model, scoring
from csrm_jax.ruleworld import examples, lexicon
from csrm_jax.safety import schema
from csrm_jax.text import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[2]
RM, EVAL = (config_lib.load_module(ROOT / 'configs' / name) for name in ('rm.py', 'eval.py'))
SUMMARY_KEYS = (
  *(
    f'{split}/{name}'
    for split in ('seen', 'unseen', 'new_topics', 'new_wordings', 'degree')
    for name in ('f1', 'f1_best', 'auprc', 'auprc_best', 'smece', 'prob_error')
  ),
  'pairs/accuracy',
  'pairs/accuracy_best',
  'pairs/score_gap',
  'flip/consistency',
  'time_s',
  'peak_memory_bytes',
  'num_examples',
  'num_params',
)
MEASURED = ('time_s', 'time_train_s', 'peak_memory_bytes')


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Starts the smoke run in a work directory; returns its Popen."""
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
  }

  def start(workdir):
    return subprocess.Popen(
      [
        sys.executable,
        '-m',
        'csrm_jax.main',
        '--config=configs/rm.py:smoke',
        f'--workdir={workdir}',
      ],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture(scope='module')
def finished(start, tmp_path_factory):
  """Returns (workdir, stdout, stderr) of an uninterrupted smoke run."""
  workdir = tmp_path_factory.mktemp('finished') / 'rm'
  return workdir, *_finish(start(workdir))


def _finish(process):
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  return out, err


def _summary(workdir):
  return json.loads((workdir / 'report' / 'summary.json').read_text())


def _metrics(workdir):
  """Returns the lines of metrics.jsonl without what a clock says."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {name: value for name, value in json.loads(line).items() if not name.startswith('time/')}
    for line in lines
  ]


def _state(workdir):
  """Returns the bits of the last checkpoint: parameters, moments, data."""
  folder = workdir / 'checkpoints'
  step = max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
  info = json.loads((folder / str(step) / 'info' / 'metadata').read_text())
  leaves = {
    name: jax.ShapeDtypeStruct(tuple(shape), dtype)
    for name, (shape, dtype, _) in info['content']['leaves'].items()
  }
  with checkpoint.Checkpoints(folder) as saved:
    restored = saved.restore_latest(leaves)
  assert restored.step == step
  arrays = {name: np.asarray(leaf).tobytes() for name, leaf in restored.state.items()}
  # The clock's part of it: 'window', what goodput counts.
  data_state = {name: value for name, value in restored.data_state.items() if name != 'window'}
  return arrays, data_state


def _assert_same_run(workdir, other):
  assert _metrics(workdir) == _metrics(other)
  assert _state(workdir) == _state(other)
  ours, theirs = _summary(workdir), _summary(other)
  for name in MEASURED:
    assert ours.pop(name) > 0 and theirs.pop(name) > 0
  assert ours == theirs


@pytest.mark.slow
def test_a_run_writes_all_it_promises(finished):
  workdir, out, err = finished
  summary = _summary(workdir)
  for key in SUMMARY_KEYS:
    assert math.isfinite(summary[key]), key
  assert summary['num_steps'] == len(_metrics(workdir)) * 5 == 20
  config = json.loads((workdir / 'config.json').read_text())
  assert config['num_steps'] == 20
  manifest = json.loads((workdir / 'manifest.json').read_text())
  assert manifest['runner'] == 'train_rm' and manifest['packages']['jax']
  report = (workdir / 'report' / 'report.md').read_text()
  images = re.findall(r'\]\(([^)]+\.png)\)', report)
  assert images
  for image in images:
    data = (workdir / 'report' / image).read_bytes()
    assert data.startswith(b'\x89PNG')

  assert 'F1, unseen rules' in out and 'One conversation under' in out
  assert out.endswith(f'report: {workdir}/report/report.md\n')
  assert 'train: 20/20 steps' in err and 'evaluate' in err
  assert not re.search(r'^[IWE]\d{4} ', err, re.MULTILINE), err
  assert all(len(line) < 120 for line in re.split('[\r\n]', err)), err


@pytest.mark.slow
def test_the_same_command_again_finishes_at_once(finished, start):
  workdir, out, _ = finished
  before = {path: path.stat().st_mtime_ns for path in workdir.glob('**/*') if path.is_file()}
  again, err = _finish(start(workdir))
  assert again.split('\n')[:15] == out.split('\n')[:15]  # the table
  assert 'is finished' in again
  assert 'step' not in err
  rewritten = ('config.json', 'manifest.json')
  for path, time_ns in before.items():
    assert path.name in rewritten or path.stat().st_mtime_ns == time_ns


@pytest.mark.slow
def test_killed_twice_equals_one_run(finished, start, tmp_path):
  workdir = tmp_path / 'rm'
  rng = random.Random(0)
  # Before the checkpoint of step 10, and after it.
  for lines in (rng.randint(0, 1), rng.randint(2, 3)):
    process = start(workdir)
    path = workdir / 'metrics.jsonl'
    give_up = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < give_up:
      if path.exists() and path.read_bytes().count(b'\n') >= lines:
        break
      time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  assert (workdir / 'checkpoints' / '10').is_dir()
  _, err = _finish(start(workdir))
  assert ' 10/20' in err  # where the bar starts
  _assert_same_run(workdir, finished[0])


@pytest.mark.slow
def test_a_truncated_checkpoint_is_skipped(finished, start, tmp_path):
  workdir = tmp_path / 'rm'
  shutil.copytree(finished[0], workdir)
  shutil.rmtree(workdir / 'report')
  files = [path for path in (workdir / 'checkpoints' / '20').glob('**/*') if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  _, err = _finish(start(workdir))
  assert f'skipping the damaged checkpoint {workdir}/checkpoints/20' in err
  _assert_same_run(workdir, finished[0])


@pytest.mark.slow
def test_another_config_is_one_line_with_the_difference(finished):
  config = RM.get_config('smoke')
  config.optim.lr = 2e-3
  config.seed = 1
  before = (finished[0] / 'config.json').read_bytes()
  with pytest.raises(ValueError) as raised:
    main.run(config, finished[0])
  message = str(raised.value)
  assert 'optim.lr: 0.0003 -> 0.002; seed: 0 -> 1' in message
  assert '\n' not in message
  assert (finished[0] / 'config.json').read_bytes() == before


def _tiny(arg=''):
  """Returns a config of a model and a run that take seconds."""
  config = RM.get_config(arg)
  config.num_steps = config.log_every = config.checkpoint_every = 2
  config.optim.warmup_steps = 1
  config.data.batch_size = 2
  config.eval.ruleworld_examples = min(config.eval.ruleworld_examples, 12)
  config.model.init = ''
  config.model.overrides = ml_collections.ConfigDict(
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
  return config


@pytest.mark.parametrize('side', ['dev', 'test'])
def test_a_run_reads_the_topics_of_tests_only_when_asked_and_counts_it(side, tmp_path, monkeypatch):
  made, make_example = [], examples.make_example

  def keep(*args, **fields):
    made.append(make_example(*args, **fields))
    return made[-1]

  monkeypatch.setattr(examples, 'make_example', keep)
  config = _tiny()
  assert config.eval.ruleworld_side == 'dev'
  config.eval.ruleworld_side = side
  main.run(config, tmp_path)
  texts = [c.name + c.guideline for e in made for c in e.safety.categories]
  texts += [m.content for e in made for m in e.conversation]
  said = {word for text in texts for word in re.findall(r'[a-z]+', text.lower())}
  kept = {
    word
    for topic in map(lexicon.topic_named, lexicon.TEST)
    for word in (topic.name.lower(), *topic.subcategories, *sum(topic.phrases, ()))
  }
  assert bool(said & kept) == (side == 'test')
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  assert manifest.get('test_openings', 0) == (side == 'test')


@pytest.mark.parametrize(
  'ablation',
  [
    name if name == 'rules_blind' else pytest.param(name, marks=pytest.mark.slow)
    for name in tuple(RM.ABLATIONS)[1:]
  ],
)
def test_ablations_run(ablation, tmp_path):
  config = _tiny(f'ablation={ablation}')
  assert config_lib.diff_config(_tiny(), config)
  config.eval.ruleworld_examples = 4
  main.run(config, tmp_path)
  assert math.isfinite(_summary(tmp_path)['unseen/prob_error'])


@pytest.mark.slow
def test_lora_trains_and_saves_adapters_only(tmp_path):
  config = _tiny()
  tokenizer = tokenizer_lib.load_tokenizer(config.tokenizer)
  cfg = model_config.preset('tiny', tokenizer.vocab_size, **config.model.overrides)
  base = transformer.init_params(cfg, 1)
  hf.save(tmp_path / 'base', cfg, base)
  config.model.init = str(tmp_path / 'base')
  config.model.overrides.lora_rank = 2
  config.optim.lr = 0.1
  config.eval.ruleworld_examples = 2
  config.eval.zero_shot = True
  workdir = tmp_path / 'rm'
  main.run(config, workdir)

  meta = checkpoint.describe(workdir / 'checkpoints').meta
  spec = reward_model.Spec.from_dict(meta)
  adapters = lora.init(spec.model, config.seed)
  with checkpoint.Checkpoints(workdir / 'checkpoints') as saved:
    trained = saved.restore_latest({'params': adapters}, partial=True).state['params']
  summary = _summary(workdir)
  assert summary['num_trained_params'] == tree.num_params(trained)
  assert summary['num_params'] == tree.num_params(base) + tree.num_params(trained)
  # What was evaluated before training is the base, to which new adapters add
  # nothing; what was trained is not.
  rows = [examples.test_example(2000, i, 'unseen') for i in range(2)]
  loaded = csrm_jax.load(workdir).score_fn(rows)
  before = dataclasses.replace(spec, model=cfg).make_score_fn(base, tokenizer)(rows)
  assert np.abs(loaded - before).max() > 0.01
  for scores, name in ((loaded, 'unseen'), (before, 'unseen_zero_shot')):
    p_unsafe = 1 / (1 + np.exp(scores))
    np.testing.assert_allclose(
      summary[f'{name}/prob_error'],
      np.abs(p_unsafe - [row.probability for row in rows]).mean(),
      atol=1e-5,
    )

  # Other weights under the adapters would change every score.
  hf.save(tmp_path / 'base', cfg, transformer.init_params(cfg, 2))
  with pytest.raises(ValueError, match='were trained on') as raised:
    csrm_jax.load(workdir)
  assert '\n' not in str(raised.value)


def test_lora_without_weights_to_adapt_is_an_error(tmp_path):
  config = _tiny()
  config.model.overrides.lora_rank = 2
  with pytest.raises(ValueError, match='adapters need weights'):
    main.run(config, tmp_path / 'rm')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('tiny') / 'rm'
  main.run(_tiny(), workdir)
  return workdir


def _write_rows(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def _rows(num):
  """Returns labelled RuleWorld examples as rows of a JSONL file."""
  return [examples.test_example(0, i, 'seen').to_dict() for i in range(num)]


def test_eval_command_and_api_agree(tiny, tmp_path):
  rows = [{'id': row['id'], 'conversation': row['conversation']} for row in _rows(5)]
  config = EVAL.get_config()
  config.checkpoint = str(tiny)
  config.safety = str(ROOT / 'configs' / 'safety' / 'hospital.yaml')
  config.conversations = str(_write_rows(tmp_path / 'c.jsonl', rows))
  with pytest.raises(ValueError, match=r'of the rules are unknown .* trained on RuleWorld'):
    main.run(config, tmp_path / 'scored')  # The model knows RuleWorld only.
  config.allow_out_of_domain = True
  main.run(config, tmp_path / 'scored')
  lines = (tmp_path / 'scored' / 'scored.jsonl').read_text().splitlines()
  scored = [json.loads(line) for line in lines]
  assert [row['id'] for row in scored] == [row['id'] for row in rows]

  conversations = [schema.parse_conversation(row['conversation']) for row in rows]
  rm = csrm_jax.load(tiny, allow_out_of_domain=True)
  verdicts = rm.score(schema.load_safety(config.safety), conversations)
  assert all('unknown words' in verdict.out_of_domain for verdict in verdicts)
  names = [field.name for field in dataclasses.fields(scoring.Verdict)]
  assert [scoring.Verdict(**{k: row[k] for k in names}) for row in scored] == verdicts


def test_eval_command_reports_on_labels(tiny, tmp_path):
  config = EVAL.get_config()
  config.checkpoint = str(tiny)
  config.conversations = str(_write_rows(tmp_path / 'c.jsonl', _rows(24)))
  main.run(config, tmp_path / 'scored')
  summary = _summary(tmp_path / 'scored')
  assert math.isfinite(summary['file/f1']) and summary['num_examples'] == 24


def test_eval_command_counts_and_marks_what_was_not_read(tiny, tmp_path, capsys):
  rows = _rows(3)
  rows[1]['conversation'][-1]['content'] = 'I hope that helps. ' * 400 + 'A heist.'
  config = EVAL.get_config()
  config.checkpoint, config.max_length, config.on_cut = str(tiny), 512, 'mark'
  config.conversations = str(_write_rows(tmp_path / 'c.jsonl', rows))
  main.run(config, tmp_path / 'scored')
  lines = (tmp_path / 'scored' / 'scored.jsonl').read_text().splitlines()
  scored = [json.loads(line) for line in lines]
  assert [row['cut'] for row in scored] == [False, True, False]
  assert [row['unread'] > 0 for row in scored] == [False, True, False]
  num_unread = scored[1]['num_unread']
  summary = _summary(tmp_path / 'scored')
  assert (summary['num_cut'], summary['num_unread']) == (1, num_unread)
  said = f'1 prompts were too long for one pass; {num_unread:,} tokens'
  assert said in capsys.readouterr().err
  assert said in (tmp_path / 'scored' / 'report' / 'report.md').read_text()


@pytest.mark.slow
def test_all_benchmarks_and_their_comparison(tiny, tmp_path):
  other = _tiny()
  other.seed = 1
  main.run(other, tmp_path / 'other')
  for name, checkpoint_dir in (('a', tiny), ('b', tmp_path / 'other')):
    config = EVAL.get_config('benchmarks')
    config.checkpoint = str(checkpoint_dir)
    config.benchmarks.ruleworld_examples = 12
    config.benchmarks.data_dir = str(tmp_path / 'nothing')
    main.run(config, tmp_path / name)
  report = (tmp_path / 'a' / 'report' / 'report.md').read_text()
  assert 'Skipped' in report and 'Sure. {prompt}' in report
  for key in ('unseen/f1', 'policy/strict', 'attacks/any_flip'):
    found = [k for k in _summary(tmp_path / 'a') if k.startswith(key[:6])]
    assert found, key
  config = EVAL.get_config('compare')
  config.compare = (str(tmp_path / 'a'), str(tmp_path / 'b'))
  main.run(config, tmp_path / 'both')
  assert (tmp_path / 'both' / 'report' / 'report.md').is_file()


def test_a_moved_work_directory_loads(tiny, tmp_path):
  moved = tmp_path / 'elsewhere'
  shutil.copytree(tiny, moved)
  # What config.json says of this machine's folders is not needed.
  config = json.loads((moved / 'config.json').read_text())
  config['tokenizer'] = config['model']['init'] = '/nowhere'
  (moved / 'config.json').write_text(json.dumps(config))
  example = examples.test_example(0, 0, 'seen')
  verdicts = [
    csrm_jax.load(folder).score(example.safety, [example.conversation]) for folder in (tiny, moved)
  ]
  assert verdicts[0] == verdicts[1]


def test_a_run_on_jsonl(tmp_path):
  path = _write_rows(tmp_path / 'rows.jsonl', _rows(100))
  config = _tiny(f'data=jsonl,path={path}')
  main.run(config, tmp_path / 'rm')
  summary = _summary(tmp_path / 'rm')
  assert math.isfinite(summary['file/f1'])
  _, held_out = sources.split(forms.read(path), config.eval.fraction, config.seed)
  # A part of what is held out fits thresholds and calibration.
  test, validation = sources.split(held_out, 0.25, seed=1)
  assert test and validation and len(held_out) < 100
  path = tmp_path / 'rm' / 'report' / 'metrics.json'
  suite = json.loads(path.read_text())['suites']['file']
  assert suite['num_examples'] == len(test)


@pytest.mark.real
@pytest.mark.slow
def test_a_run_on_public_data(tmp_path):
  default = ROOT.parent / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('CSRM_DATA_DIR', default))
  if not folder.is_dir():
    pytest.skip(f'no data sets in {folder}; set CSRM_DATA_DIR to their folder')
  main.run(_tiny(f'data=public,data_dir={folder}'), tmp_path)
  summary = _summary(tmp_path)
  for key in ('xstest_completions/f1', 'moderation/f1', 'moderation_pairs/accuracy', 'hh/accuracy'):
    assert math.isfinite(summary[key]), key
