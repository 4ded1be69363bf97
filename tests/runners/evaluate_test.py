import json
import pathlib
import types

import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.reward import scoring
from csrm_jax.ruleworld import examples
from csrm_jax.runners import evaluate
from tests import small

ROOT = pathlib.Path(__file__).parents[2]


def _config(tmp_path):
  row = {
    'safety': {'categories': [{'name': 'Gifts', 'guideline': 'Nobody gives anything.'}]},
    'conversation': [{'role': 'agent', 'content': 'Take this.'}],
  }
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps({'id': str(i)} | row) + '\n' for i in range(8)))
  config = config_lib.load_module(ROOT / 'configs' / 'eval.py').get_config()
  config.checkpoint, config.conversations = 'rm', str(path)
  return config


def test_scoring_a_file_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate, '_ROWS_AT_ONCE', 3)
  asked = []

  def judge(examples, progress):
    if len(asked) == 2:
      raise KeyboardInterrupt
    asked.append([e.id for e in examples])
    progress(len(examples))
    scores = np.float32([int(e.id) for e in examples])
    return scoring.Judged(scores, scores + 9, 0 * scores, scores < 0, small.unmarked(scores))

  score_fn = scoring.ScoreFn(judge)

  monkeypatch.setattr(
    evaluate,
    'load_model',
    lambda *_: types.SimpleNamespace(score_fn=score_fn, spec=None, digest=digest),
  )
  digest = 'weights'
  config = _config(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    evaluate.run(config, tmp_path)
  assert not (tmp_path / 'scored.jsonl').exists()
  # Scores that other weights gave are not taken for theirs.
  digest, asked = 'others', [['before'], ['before']]
  with pytest.raises(KeyboardInterrupt):
    evaluate.run(config, tmp_path)
  digest, asked = 'weights', [['before']]
  evaluate.run(config, tmp_path)
  assert asked == [['before'], ['6', '7']]
  rows = [json.loads(line) for line in (tmp_path / 'scored.jsonl').read_text().splitlines()]
  assert [row['id'] for row in rows] == [str(i) for i in range(8)]
  assert [row['score'] for row in rows] == list(range(8))
  assert all((row['unread'], row['cut']) == (0.0, False) for row in rows)
  assert not (tmp_path / 'scores').exists()


def test_the_loss_on_held_out_rows_is_that_of_their_labels():
  rows = [examples.test_example(0, i, 'seen') for i in range(6)]
  scores = np.float32([2.0, -1.0, 0.5, 3.0, -2.0, 1.0])

  def judge(asked, progress):
    assert list(asked) == rows
    return scoring.Judged(scores, scores + 9, 0 * scores, scores < 0, small.unmarked(scores))

  found = evaluate.measure_loss(scoring.ScoreFn(judge), rows)
  p_safe = 1 / (1 + np.exp(-scores.astype(float)))
  p_label = [p if row.label == 'safe' else 1 - p for p, row in zip(p_safe, rows, strict=True)]
  assert found['eval/loss'] == pytest.approx(-np.log(p_label).mean())
  assert found['eval/accuracy'] == np.mean(np.array(p_label) > 0.5)
