"""The page docs/security.md names tests that are there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_each_promise_has_its_test():
  page = (ROOT / 'docs' / 'security.md').read_text()
  promised = page.split('## What is promised')[1].split('## What is not')[0]
  for promise in promised.split('\n- ')[1:]:
    named = re.findall(r'`(tests/\S+?_test\.py)', promise)
    assert named and all((ROOT / name).is_file() for name in named), promise
