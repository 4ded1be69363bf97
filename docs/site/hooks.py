"""Writes the reference of the site from the code: jobs and their knobs, metrics, modules.

MkDocs calls the functions whose names begin with on_.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
import tomllib
from typing import Any

import yaml
from mkdocs.structure import files as files_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from csrm_jax import config as config_lib, usage  # noqa: E402
from tests import readme_tables  # noqa: E402


def on_config(config: Any) -> Any:
  """Puts the generated pages into the menu."""
  section = next(entry for entry in config.nav if 'Reference' in entry)
  section['Reference'] = [
    'reference/index.md',
    {'Jobs and knobs': [{name: f'reference/configs/{name}.md'} for name in usage.jobs()]},
    'reference/metrics.md',
    {'Modules': [{name: f'reference/{name}.md'} for name in packages()]},
  ]
  return config


def on_files(files: files_lib.Files, config: Any) -> files_lib.Files:
  """Adds the generated pages."""
  pages = {'index': index(), 'metrics': metrics()}
  pages |= {f'configs/{name}': job(name) for name in usage.jobs()}
  pages |= {name: modules(name, paths) for name, paths in packages().items()}
  for name, text in pages.items():
    files.append(files_lib.File.generated(config, f'reference/{name}.md', content=text))
  return files


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Says below each table of results how its numbers were made."""
  for result in readme_tables.read_results().values():
    table = readme_tables.render(result['table'])
    if table in markdown:
      made = {key: value for key, value in result['made'].items() if value}
      lines = [f'    - {key}: {_made(key, value)}' for key, value in made.items()]
      text = '\n'.join(['', '??? note "How these numbers were made"', '', *lines, ''])
      markdown = markdown.replace(table, table + text)
  return markdown


def _made(key: str, value: Any) -> str:
  if isinstance(value, list):
    return ', '.join(map(str, value))
  return f'`{value}`' if key == 'command' else _cell(str(value))


def packages() -> dict[str, list[pathlib.Path]]:
  """Returns {folder of csrm_jax, or csrm_jax itself: its modules}, the upper layers first."""
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))
  layers = settings['tool']['importlinter']['contracts'][0]['layers']
  names = [name for layer in layers for name in re.split(r'[ |:]+', layer)]
  package = ROOT / 'csrm_jax'
  found = {'csrm_jax': [package / f'{name}.py' for name in names]}
  found |= {name: sorted((package / name).glob('*.py')) for name in names}
  found = {name: [path for path in paths if _has_public(path)] for name, paths in found.items()}
  return {name: paths for name, paths in found.items() if paths}


def _has_public(path: pathlib.Path) -> bool:
  """Returns whether a module has a function or class for others; main.py's flags are no such."""
  if not path.is_file() or path.name == '__main__.py':
    return False
  kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
  nodes = [node for node in _tree(path).body if isinstance(node, kinds)]
  return any(ast.get_docstring(node) for node in nodes if node.name[0] != '_')


def _tree(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text('utf-8'))


def _about(name: str) -> str:
  """Returns what a folder says of itself."""
  path = ROOT / 'csrm_jax' / ('' if name == 'csrm_jax' else name) / '__init__.py'
  return (ast.get_docstring(_tree(path)) or '').partition('\n')[0]


def index() -> str:
  """Returns the front page of the reference."""
  lines = ['# Reference', '', 'All of it is generated from the code.', '', '## Jobs and knobs', '']
  lines += [
    f'- [`csrm_jax {name}`](configs/{name}.md): {text}' for name, text in usage.jobs().items()
  ]
  lines += ['', '## Modules', '', 'A folder imports from those below it here, never upward.', '']
  lines += [f'- [`{name}`]({name}.md): {_about(name)}' for name in packages()]
  return '\n'.join(lines) + '\n'


def job(name: str) -> str:
  """Returns the page of a job: what its file says, its arguments, and its knobs."""
  path = config_lib.CONFIGS / f'{name}.py'
  about, arguments, knobs = usage.describe(path)
  rows = [f'| `{key}` | `{value}` | {_cell(text)} |' for key, value, text in knobs]
  return '\n'.join(
    [f'# {name}', '', _text(about), '', '## Arguments', '']
    + [f'They follow the name: `csrm_jax {name}:ARGUMENT,ARGUMENT=VALUE`.', '', _list(arguments)]
    + ['', '## Knobs', '', 'As they are without arguments; `--config.KEY=VALUE` sets one.', '']
    + ['| key | default | |', '|---|---|---|', *rows, '']
  )


def _cell(text: str) -> str:
  """Returns text in which only `code` is Markdown."""
  parts = text.split('`')
  parts[::2] = [re.sub(r'([|*<_])', r'\\\1', part) for part in parts[::2]]
  return '`'.join(parts)


def _text(text: str) -> str:
  """Returns text as Markdown: commands become blocks of code."""
  parts = []
  for part in re.split(r'\n\s*\n', text.strip()):
    if re.match('(python|launch/|bash|sbatch) ?', part):
      parts.append('```\n' + re.sub(r'(\S) {2,}', r'\1 ', part) + '\n```')
    else:
      parts.append(_cell(' '.join(part.split())))
  return '\n\n'.join(parts)


def _list(text: str) -> str:
  """Returns the arguments of a job, which a docstring names one after another, as a list."""
  text = ' '.join(text.partition('arg: ')[2].split())
  items, depth = [''], 0
  for character in text:
    depth += (character in '([{') - (character in ')]}')
    if character == ';' and not depth:
      items.append('')
    else:
      items[-1] += character
  return '\n'.join(f'- {_cell(item.strip())}' for item in items if item.strip())


def metrics() -> str:
  """Returns the page of metrics, as reports describe them."""
  texts = yaml.safe_load((ROOT / 'csrm_jax' / 'evals' / 'metrics.yaml').read_text('utf-8'))
  rows = [f'| `{key}` | {_cell(x["title"])} | {_cell(x["text"])} |' for key, x in texts.items()]
  return '\n'.join(
    [
      '# Metrics',
      '',
      'Arrows say which way is better.',
      '',
      '| key | | |',
      '|---|---|---|',
      *rows,
      '',
    ]
  )


def modules(name: str, paths: list[pathlib.Path]) -> str:
  """Returns the page of a folder; mkdocstrings fills in its modules."""
  dotted = ['.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in paths]
  dotted = [path.removesuffix('.__init__') for path in dotted]
  return '\n\n'.join([f'# {name}', _about(name), *(f'::: {path}' for path in dotted)]) + '\n'
