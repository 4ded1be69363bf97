import io
import sys

from csrm_jax.core import progress


def test_a_log_file_gets_a_plain_line_a_minute(monkeypatch):
  now = 0.0
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now)
  file = io.StringIO()
  with progress.Lines(200, 'train', 'step', initial=20, file=file) as bar:
    for _ in range(130):
      now += 1.0
      bar.update()
    bar.set_postfix_str('loss=0.5')
  lines = file.getvalue().splitlines()
  assert len(lines) == 4 and '\r' not in file.getvalue()
  assert lines[0] == 'train: goes on at 20/200 steps'
  assert lines[1] == 'train: 80/200 steps, 1.00step/s, 01:00 so far, 02:00 left'
  assert lines[3].startswith('train: 150/200 steps, ') and lines[3].endswith(', loss=0.5')


def test_a_terminal_gets_a_bar(monkeypatch):
  assert isinstance(progress.bar(2, 'x', 'row'), progress.Lines)
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
  with progress.bar(2, 'x', 'row') as bar:
    bar.update(2)
    bar.set_postfix_str('done')
  assert not isinstance(bar, progress.Lines) and bar.n == 2
