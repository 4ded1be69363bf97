import json

import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.core import writer


def _lines(path):
  return [json.loads(x) for x in (path / 'metrics.jsonl').open()]


def test_lines_hold_the_step_and_exact_floats(tmp_path):
  value = np.float32(0.1)
  with writer.MetricsWriter(tmp_path) as w:
    w.write(1, {'train/loss': value, 'train/lr': jnp.float32(3.0)})
    w.write(np.int64(2), {'train/loss': 1})
  lines = _lines(tmp_path)
  assert lines[0] == {'step': 1, 'train/loss': float(value), 'train/lr': 3.0}
  assert lines[1] == {'step': 2, 'train/loss': 1.0}


def test_a_value_that_is_not_finite_is_valid_json(tmp_path):
  with writer.MetricsWriter(tmp_path) as w:
    w.write(1, {'a': float('nan'), 'b': float('inf')})
  assert _lines(tmp_path) == [{'step': 1, 'a': None, 'b': None}]


def test_lines_are_there_without_a_flush(tmp_path):
  w = writer.MetricsWriter(tmp_path)
  w.write(1, {'a': 1.0})
  assert _lines(tmp_path) == [{'step': 1, 'a': 1.0}]
  w.close()


def test_resume_gives_the_file_of_an_uninterrupted_run(tmp_path):
  def run(path, first, last, resume_step):
    with writer.MetricsWriter(path, resume_step) as w:
      for step in range(first, last + 1):
        w.write(step, {'train/loss': 1 / step})

  run(tmp_path / 'whole', 1, 9, -1)
  run(tmp_path / 'cut', 1, 7, -1)
  # Killed while it wrote: the last line lacks its end.
  with (tmp_path / 'cut' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 8, "train/lo')
  run(tmp_path / 'cut', 5, 9, 4)
  whole, cut = ((tmp_path / name / 'metrics.jsonl').read_bytes() for name in ('whole', 'cut'))
  assert whole == cut


@pytest.mark.parametrize(('resume_step', 'kept'), [(None, 3), (-1, 0), (2, 2)])
def test_what_resume_keeps(tmp_path, resume_step, kept):
  with writer.MetricsWriter(tmp_path) as w:
    for step in (1, 2, 3):
      w.write(step, {'a': step})
  writer.MetricsWriter(tmp_path, resume_step).close()
  assert len(_lines(tmp_path)) == kept


def test_tensorboard_files_are_written(tmp_path):
  with writer.MetricsWriter(tmp_path, resume_step=3) as w:
    w.write(4, {'a/b': 1.0})
  assert list(tmp_path.glob('events.out.tfevents.*'))


def test_manifest_is_json_and_grows(tmp_path):
  writer.add_start(tmp_path, {'runner': 'first'})
  writer.add_start(tmp_path, {'runner': 'second'})
  writer.update_manifest(tmp_path, {'template_hash': 'x'})
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  assert manifest['packages']['jax']
  assert manifest['num_devices'] >= 1
  assert manifest['template_hash'] == 'x'
  first, second = manifest['starts']
  assert first['runner'] == 'first' and 'template_hash' not in first
  assert second.items() <= manifest.items() and second['template_hash'] == 'x'


def test_a_manifest_that_is_none_is_one_line(tmp_path):
  (tmp_path / 'manifest.json').write_text('[]')
  with pytest.raises(ValueError, match=r'manifest\.json: it holds a list of 0, .* move it away'):
    writer.add_start(tmp_path, {})
