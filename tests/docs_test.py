"""What README.md and the pages of docs/ say is there: commands, knobs, files, names."""

import ast
import functools
import importlib
import json
import pathlib
import re
import shlex
import sys

import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from csrm_jax import config as config_lib, usage

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', *sorted(DOCS.rglob('*.md'))]
_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
_BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
# Jobs are named in three ways.
_JOB = re.compile(r'(?:configs/)?(\w+)(?:\.py)?(?::(.*))?', re.DOTALL)


def _commands(page):
  """Yields the words of each command of ours in a page's blocks."""
  for kind, text in _BLOCK.findall(page.read_text('utf-8')):
    if kind in ('', 'bash'):
      for line in text.replace('\\\n', '').splitlines():
        for command in re.split(r' && | \| ', line.lstrip('!%')):
          if re.match(r'(python -m csrm_jax|csrm_jax |python launch/|launch/)', command):
            yield shlex.split(command, comments=True)


def _job(word):
  """Returns the (path, argument) of a job, or None."""
  match = _JOB.fullmatch(word)
  return match and match[1] in usage.jobs() and (config_lib.CONFIGS / f'{match[1]}.py', match[2])


@functools.cache
def _all_keys():
  return set().union(*(_keys(config_lib.CONFIGS / f'{name}.py') for name in usage.jobs()))


def _keys(path):
  """Returns the dotted keys of a config file as it stands, sections among them."""
  keys = set()
  module = config_lib.load_module(path)
  jobs = 'benchmarks', 'compare', 'real', 'refusals', 'search'
  for arg in (None, *(jobs if path.stem == 'eval' else ())):
    for key in config_lib.flatten(module.get_config(arg) if arg else module.get_config()):
      parts = key.split('.')
      keys |= {'.'.join(parts[: i + 1]) for i in range(len(parts))}
  return keys


@pytest.mark.parametrize('page', PAGES, ids=_IDS)
def test_commands_of_a_page_parse(monkeypatch, page):
  for words in _commands(page):
    program, *rest = words
    if program != 'python' and '/' in program:
      assert (ROOT / program).is_file(), words
    elif program == 'python' and rest[0] != '-m':
      assert (ROOT / rest[0]).is_file(), words
    elif program == 'python' and not rest[1].startswith('csrm_jax.main'):
      assert importlib.util.find_spec(rest[1]), words
    given = [word.removeprefix('--config=') for word in words if word.startswith('--config=')]
    if program == 'csrm_jax' and rest and rest[0] != usage.DOCTOR:
      given = given or [rest[0]]
    for word in given:
      job = _job(word)
      assert job or word == 'my_rm.py', words
      if job:
        path, arg = job
        argv = ['', f'--config={path}' + (f':{arg}' if arg else '')]
        argv += [word for word in words if word.startswith('--config.')]
        # Where config_flags looks for the keys that are overridden.
        monkeypatch.setattr(sys, 'argv', argv)
        known = flags.FlagValues()
        config_flags.DEFINE_config_file('config', flag_values=known, lock_config=True)
        known(argv)
        assert known['config'].value.runner


@pytest.mark.parametrize('page', PAGES, ids=_IDS)
def test_knobs_that_a_page_names_are_there(page):
  text = page.read_text('utf-8')
  keys = _all_keys()
  named = {key.rstrip('.') for key in re.findall(r'--config\.([a-z][a-z0-9_.]*)', text)}
  assert named - {'key'} <= keys
  for name, arg in re.findall(r'`configs/(\w+)\.py:([a-z_]+)', text):
    module = config_lib.load_module(config_lib.CONFIGS / f'{name}.py')
    with pytest.raises(ValueError, match='unknown') as error:
      module.get_config('no_such_argument')
    assert arg in str(error.value), (name, arg)


@pytest.mark.parametrize('page', PAGES, ids=_IDS)
def test_blocks_of_a_page_are_what_they_say(page):
  for kind, text in _BLOCK.findall(page.read_text('utf-8')):
    if kind == 'json':
      json.loads(text)
    elif kind == 'yaml':
      yaml.safe_load(text)
    elif kind == 'python':
      for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
          module = importlib.import_module(node.module)
          for name in node.names:
            assert hasattr(module, name.name) or importlib.import_module(
              f'{node.module}.{name.name}'
            )


@pytest.mark.parametrize('page', PAGES, ids=_IDS)
def test_links_of_a_page_lead_somewhere(page):
  text = _BLOCK.sub('', page.read_text('utf-8'))
  for target in re.findall(r'\]\(([^)#\s]+)', text):
    # The reference is generated when the site is built, which then looks at such links.
    if not target.startswith('https://') and 'reference/' not in target:
      assert (page.parent / target).is_file(), target
  files = re.findall(r'`((?:csrm_jax|configs|tests|launch|docs|notebooks)/[\w./-]*)`', text)
  assert not [name for name in files if 'NAME' not in name and not (ROOT / name).exists()]


def test_every_page_is_in_the_menu_and_the_readme_is_short():
  menu = (DOCS / 'site' / 'mkdocs.yml').read_text('utf-8')
  assert not [page for page in DOCS.rglob('*.md') if f' {page.relative_to(DOCS)}\n' not in menu]
  assert len((ROOT / 'README.md').read_text('utf-8').splitlines()) <= 200


def test_the_citation_is_of_this_version():
  cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text('utf-8'))
  assert f"version='{cited['version']}'" in (ROOT / 'setup.py').read_text('utf-8')
  assert f'## {cited["version"]} ' in (DOCS / 'changelog.md').read_text('utf-8')
