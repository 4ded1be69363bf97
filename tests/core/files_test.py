import gzip
import lzma
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


def test_only_regular_files_are_read(tmp_path):
  os.mkfifo(tmp_path / 'pipe.yaml')
  (tmp_path / 'zero.yaml').symlink_to('/dev/zero')
  for name in ('pipe.yaml', 'zero.yaml'):
    with pytest.raises(ValueError, match=rf'{name}: is no regular file'):
      files.read_text(tmp_path / name)


@pytest.mark.parametrize(('suffix', 'pack'), [('gz', gzip.compress), ('xz', lzma.compress)])
def test_a_file_unpacks_to_so_much_only(tmp_path, monkeypatch, suffix, pack):
  monkeypatch.setattr(files, '_UNPACKED_LEAST', 1000)
  path = tmp_path / f'a.jsonl.{suffix}'
  path.write_bytes(pack(b' ' * 500_000))
  with pytest.raises(ValueError, match=r'unpacks to more than .* unpack it first'):
    files.read_text(path)
  path.write_bytes(pack(b' ' * 1000))
  assert files.read_text(path) == ' ' * 1000


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('[' * 9000, 'nested too deeply'),
    ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
    ('9' * 5000, 'too many digits'),
    ('[1]', 'it holds a list of 1 and not an object'),
    ('{"a"', 'not valid JSON'),
  ],
)
def test_json_of_any_file_has_one_set_of_errors(tmp_path, text, said):
  path = tmp_path / 'a.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=rf'^{path}:.*{said}'):
    files.read_json(path, dict)


def test_yaml_of_megabytes_is_refused_at_once():
  with pytest.raises(ValueError, match='characters of YAML'):
    files.load_yaml('- a\n' * 300_000, 'a.yaml', ())


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
