import os

import pytest

from csrm_jax.core import files


def test_write_replaces_and_makes_folders(tmp_path):
  path = tmp_path / 'a' / 'b.json'
  files.write(path, 'old')
  files.write(path, b'new')
  assert path.read_text() == 'new'
  assert os.listdir(path.parent) == ['b.json']
  path.with_name('usual').write_text('')
  assert path.stat().st_mode == path.with_name('usual').stat().st_mode


def test_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
  path = tmp_path / 'f'
  files.write(path, 'old')

  def fail(*unused):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    files.write(path, 'new')
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['f']


def test_whole_folder_moves_all_files_or_none(tmp_path):
  path = tmp_path / 'report'
  path.mkdir()
  (path / 'notes').write_text('mine')
  with pytest.raises(OSError), files.whole_folder(path, last='b') as partial:
    (partial / 'a').write_text('1')
    raise OSError
  assert os.listdir(path) == ['notes'] and os.listdir(tmp_path) == ['report']
  with files.whole_folder(path, last='a') as partial:
    (partial / 'a').write_text('1')
    (partial / 'b').write_text('2')
  assert sorted(os.listdir(path)) == ['a', 'b', 'notes']


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
  context = [files.whole(tmp_path / 'a' / 'b.json'), files.whole_folder(tmp_path / 'c', 'x')]
  for one in context:
    one.__enter__()
  (tmp_path / '.mine.tmp').write_text('')
  assert len(list(tmp_path.rglob('*.tmp'))) == 3
  files.remove_partial(tmp_path)
  assert [path.name for path in tmp_path.rglob('*.tmp')] == ['.mine.tmp']


def test_a_log_is_read_without_what_a_kill_left(tmp_path):
  path = tmp_path / 'log.jsonl'
  assert files.read_log(path) == []
  files.cut_log(path, 1)
  assert not path.exists()
  path.write_text('{"step": 1}\nrubbish\n[1]\n{"step": 2,  "a": 1}\n{"step": 2}\n{"step": 3, "a')
  assert files.read_log(path) == [{'step': 1}, {'step': 2, 'a': 1}, {'step': 2}]
  files.cut_log(path, 2)
  assert path.read_text() == '{"step": 1}\n{"step": 2,  "a": 1}\n{"step": 2}\n'
  files.cut_log(path, 1)
  assert path.read_text() == '{"step": 1}\n'
  path.write_text('5\n{"step": "1"}\n{"step": null}\n{"step": 1}\n' + '[' * 9000 + '\n{"cut')
  files.append_log(path, [{'step': 2}])
  assert path.read_text().endswith('[[\n{"step": 2}\n')
  files.cut_log(path, 2)
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
