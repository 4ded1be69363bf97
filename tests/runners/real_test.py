"""The suite `real` as a run: from sets in a folder to its report."""

import json
import os
import pathlib
import types

import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.data import catalogue
from csrm_jax.reward import scoring
from csrm_jax.runners import evaluate, real
from csrm_jax.safety import templates
from tests import small
from tests.evals import judged_test

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = config_lib.load_module(ROOT / 'configs' / 'eval.py')


def test_a_run_scores_once_and_notes_that_it_saw_the_test_side(tmp_path, monkeypatch, capsys):
  calls = []

  def judge(examples, progress):
    calls.append(len(examples))
    progress(len(examples))
    scores = np.float32(judged_test.truth(examples))
    return scoring.Judged(scores, 9 + 0 * scores, 0 * scores, scores > 9, 0 * scores)

  spec = types.SimpleNamespace(layout=templates.Layout(order='conversation_first'))
  model = types.SimpleNamespace(
    score_fn=scoring.ScoreFn(judge), spec=spec, step=3, digest='weights'
  )
  monkeypatch.setattr(evaluate, 'load_model', lambda config, allow_out_of_domain: model)
  monkeypatch.setattr(real, 'read_sets', lambda *_: ({'made': judged_test.ITEMS}, ['other']))
  monkeypatch.setattr(real.judged.judged, 'rules', lambda _: judged_test.RULES)
  rm = tmp_path / 'rm'
  rm.mkdir()
  trained = {'judged': {'fold': '0'}, 'parts': {'made': {'source': 'made'}}}
  (rm / 'config.json').write_text(json.dumps({'data': trained}))
  found = {}
  for side in ('dev', 'test'):
    config = CONFIG.get_config(f'real,checkpoint={rm},data_dir=x,side={side}')
    config.with_words, config.num_samples = False, 2
    config.dev = '' if side == 'dev' else str(tmp_path / 'dev')
    workdir = tmp_path / side
    workdir.mkdir()
    real.run(config, workdir)
    found[side] = json.loads((workdir / 'real.json').read_text())
    real.run(config, workdir)  # it is finished
    assert 'is finished' in capsys.readouterr().out
  # A run asks its questions, then caught violations with words around them.
  assert calls[::2] == [found[side]['num_questions'] for side in ('dev', 'test')]
  # What training left out is read from the run.
  assert found['test']['fold'] == '0' and found['test']['trained'] == ['made']
  assert found['test']['num_tests'] == 1 and 'num_tests' not in found['dev']
  assert len((rm / 'test_side.jsonl').read_text().splitlines()) == 1
  seen = found['test']['sets']['made']['numbers']['seen']['model']
  assert seen['f1_tuned']['value'] == 1


def test_bad_input_is_one_line(tmp_path):
  assert 'data_dir' in small.error_of(real.read_sets, '')
  assert 'rbr' in small.error_of(real.read_sets, tmp_path)
  assert 'rbr_gold' in small.error_of(real.read_sets, tmp_path, ('rbr_gold',))
  assert 'rbr_gold' in small.error_of(real.read_sets, tmp_path, ('rbr',))
  assert 'real' in small.error_of(CONFIG.get_config, 'side=test')
  assert set(real.SETS) <= set(catalogue.SETS)


@pytest.mark.real
def test_words_reach_the_levels_of_real_sets(tmp_path):
  default = pathlib.Path(__file__).parents[3] / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('CSRM_DATA_DIR', default))
  names = ('rbr_gold', 'moderation_judged', 'model_spec')
  if not (folder / 'rbr_gold').is_dir():
    pytest.skip(f'no data sets in {folder}; set CSRM_DATA_DIR to their folder')
  config = CONFIG.get_config(f'real,data_dir={folder},side=test')
  config.names = names
  real.run(config, tmp_path)
  out = json.loads((tmp_path / 'real.json').read_text())
  numbers = {name: out['sets'][name]['numbers'] for name in names}
  assert numbers['rbr_gold']['seen']['tfidf']['auroc']['value'] > 0.8
  assert numbers['rbr_gold']['seen']['text_blind']['flip']['value'] == 0.5
  assert 'unseen' in numbers['moderation_judged'] and 'seen' not in numbers['model_spec']
  assert sum(out['shared_texts'].values()) == 0
