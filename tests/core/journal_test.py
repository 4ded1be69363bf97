"""The journal of a run: nothing lost, nothing doubled."""

import pytest

from csrm_jax.core import journal


def test_what_was_put_is_there_again(tmp_path):
  path = tmp_path / 'deep' / 'journal.jsonl'
  with journal.Journal(path) as j:
    j.put('a', {'x': [1, None, 'ü\u2028\n']})
    j.put('b', None)
    j.put('a', 2)
  with journal.Journal(path) as j:
    assert len(j) == 2 and 'b' in j and 'c' not in j
    assert j['a'] == 2 and j['b'] is None


@pytest.mark.parametrize('cut', [1, 5, 20])
def test_a_line_cut_short_is_done_anew(tmp_path, cut):
  path = tmp_path / 'journal.jsonl'
  with journal.Journal(path) as j:
    j.put('a', 1)
    j.put('bbbbbbbb', 2)
  path.write_bytes(path.read_bytes()[:-cut])
  with journal.Journal(path) as j:
    assert 'a' in j and 'bbbbbbbb' not in j
    j.put('bbbbbbbb', 3)
  with journal.Journal(path) as j:
    assert (j['a'], j['bbbbbbbb']) == (1, 3)


def test_a_damaged_line_is_named(tmp_path):
  path = tmp_path / 'journal.jsonl'
  with journal.Journal(path) as j:
    j.put('a', 1)
  path.write_text(path.read_text() + 'hello\n')
  with pytest.raises(ValueError, match=r'journal.jsonl:2: .*remove that line'):
    journal.Journal(path)


def test_every_changed_byte_of_a_line_is_noticed(tmp_path):
  path = tmp_path / 'journal.jsonl'
  with journal.Journal(path) as j:
    j.put('verdicts', '0110é')
  good = path.read_bytes()
  for place in range(len(good) - 1):
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    with pytest.raises(ValueError, match=r'journal.jsonl:1: .*remove that line'):
      journal.Journal(path)
  path.write_bytes(good)
  with journal.Journal(path) as j:
    assert j['verdicts'] == '0110é'


def test_one_process_at_a_time(tmp_path):
  path = tmp_path / 'journal.jsonl'
  with journal.Journal(path), pytest.raises(ValueError, match='another process'):
    journal.Journal(path)
  journal.Journal(path).close()


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
  path = tmp_path / 'journal.jsonl'

  class Full:
    """A file with room for ten more bytes."""

    def __init__(self, file):
      self.file = file

    def write(self, data):
      if self.file.seek(0, 2) > 40:
        raise OSError(28, 'No space left on device')
      return self.file.write(data[:10])

    def __getattr__(self, name):
      return getattr(self.file, name)

  with journal.Journal(path) as j:
    j.put('a', 'x' * 8)
    whole = path.read_bytes()
    monkeypatch.setattr(j, '_file', Full(j._file))
    with pytest.raises(OSError, match='free some space'):
      j.put('b', 'x' * 100)
    assert path.read_bytes() == whole
    assert 'b' not in j
