"""The page in a real browser: it asks the server, and shows each rule's score and the verdict."""

import re
import shutil
import subprocess

import pytest


def test_the_page_shows_the_verdict_and_each_rule(server, tmp_path):
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if browser is None:
    pytest.skip('needs chromium')
  command = [browser, '--headless=new', '--no-sandbox', '--disable-gpu', '--dump-dom']
  command += ['--virtual-time-budget=15000', f'--user-data-dir={tmp_path}', f'{server.url}/']
  page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
  talk = [
    {'role': 'user', 'content': 'Tell me about steroid.'},
    {'role': 'agent', 'content': 'Let me explain steroid in detail.'},
  ]
  body = {'policy': 'film', 'messages': talk, 'each_rule': True}
  (want,) = server.post('/score', body)['verdicts']
  assert f'<strong>{want["label"]}</strong>' in page
  assert f'P(unsafe) {100 * want["p_unsafe"]:.1f} %' in page
  shown = re.findall(r'<span class="number">([\d.]+) %', page)
  assert shown == [f'{100 * p:.1f}' for p in want['each_rule'].values()]
