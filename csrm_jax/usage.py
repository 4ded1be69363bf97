"""The help of the command line: jobs, their arguments, and every knob with its comment.

All of it is read from the config files, which people edit; nothing is written down twice.
"""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import textwrap
from collections.abc import Iterator

from csrm_jax import config as config_lib

DOCTOR = 'doctor'
_EXAMPLE = """\
  csrm_jax rm --workdir=/tmp/rm                  trains, evaluates and reports
  csrm_jax rm:smoke --workdir=/tmp/smoke --config.optim.lr=1e-4
  csrm_jax rm --help                             the arguments and knobs of a job
  csrm_jax rm:model=smollm2_135m --print_config  the config that a run would have
  csrm_jax doctor                                what is installed here, and what is missing
  csrm_jax doctor serve hf                       fails in one line where one of these is missing

`python -m csrm_jax` is the same command, and so is `python -m csrm_jax.main --config=rm`, also with
a config file of your own in place of rm."""
# What follows the name of a key, or of a variable, in a config file.
_COMMENT = re.compile(r'#\s?(.*)')
_COLUMN, _WIDTH = 40, 110


def jobs() -> dict[str, str]:
  """Returns {job: what it does} of the config files that can be run."""
  found = {}
  for path in sorted(config_lib.CONFIGS.glob('*.py')):
    tree = ast.parse(path.read_text('utf-8'))
    if any(isinstance(node, ast.FunctionDef) and node.name == 'get_config' for node in tree.body):
      found[path.stem] = (ast.get_docstring(tree) or '').partition('\n')[0]
  return found


def overview() -> str:
  """Returns what `csrm_jax` alone prints."""
  lines = [f'  {name:10} {text}' for name, text in jobs().items()]
  return '\n'.join(['csrm_jax JOB[:ARGUMENTS] --workdir=DIR [--config.KEY=VALUE ...]', '', *lines,
                    f'  {DOCTOR:10} Looks at this machine.', '', _EXAMPLE])  # fmt: skip


def job(path: pathlib.Path, arg: str | None) -> str:
  """Returns the help of a config file: its text, arguments, and knobs with their defaults."""
  about, arguments, knobs = describe(path, arg)
  lines = []
  for key, value, text in knobs:
    knob = f'  --config.{key}={value}'
    if len(knob) < _COLUMN:
      knob, text = '', f'{knob:{_COLUMN}}{text}'
    first = {'initial_indent': '' if not knob else ' ' * _COLUMN}
    wrapped = textwrap.wrap(text, _WIDTH, subsequent_indent=' ' * _COLUMN, **first)
    lines += [line for line in (knob, *wrapped) if line.strip()]
  return '\n'.join([about, '', arguments, '', 'Knobs, as they are with these arguments:', *lines])


def describe(
  path: pathlib.Path, arg: str | None = None
) -> tuple[str, str, list[tuple[str, str, str]]]:
  """Returns a config file's text, its arguments' and the (key, default, comment) of its knobs."""
  module = config_lib.load_module(path)
  config = module.get_config(arg) if arg else module.get_config()
  about = inspect.cleandoc(module.__doc__ or '')
  arguments = inspect.cleandoc(module.get_config.__doc__ or '')
  known, knobs = comments(path), []
  for key, value in config_lib.flatten(config).items():
    if key != 'runner':  # the file says it, and no flag changes it
      text = known.get(key) or known.get(key.removeprefix('run.'), '')
      knobs.append((key, _show(value), text))
  return about, arguments, knobs


def _show(value: object) -> str:
  return "''" if value == '' else str(value)


def comments(path: pathlib.Path) -> dict[str, str]:
  """Returns {dotted key: its comment} of a config file and of those that it loads or speaks of."""
  text = re.sub(r'\n\s*# ', ' ', path.read_text('utf-8'))
  loaded = re.findall(r"(?:'|as in )(?:configs/)?(\w+\.py)", text)
  # What a loaded file loads comes first, so that it can be named there.
  files = dict.fromkeys(path.with_name(name) for name in ('common.py', *loaded, path.name))
  found: dict[str, str] = {}
  named: dict[str, ast.expr] = {}  # the dicts of both files that have a name
  for file in files:
    if not file.is_file():
      continue
    text = file.read_text('utf-8')
    lines = text.splitlines()
    tree = ast.parse(text)
    for node in ast.walk(tree):
      node.lines = lines  # a node is printed by its own file's comments
    for node in tree.body:
      if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        named[node.targets[0].id] = node.value
    for node in ast.walk(tree):
      for key, comment in _of(node, named):
        # The first is where a key is explained; parts that change it later need not say so again.
        if comment or key not in found:
          found[key] = found.get(key) or comment
  return found


def _of(node: ast.AST, named: dict[str, ast.expr]) -> Iterator[tuple[str, str]]:
  """Yields (dotted key, comment) of the keys that a statement sets."""
  if isinstance(node, ast.Assign):
    target, value = ast.unparse(node.targets[0]), node.value
    section, dot, key = target.partition('.')
    if dot and section in ('c', 'config'):  # c.source.name = ...
      yield key, comment_of(node)
      yield from _inside(value, f'{key}.', named)
    elif target == 'BASE':
      yield from _inside(value, '', named)
  if isinstance(node, ast.FunctionDef) and node.name == 'base':
    for inner in ast.walk(node):
      if isinstance(inner, ast.Return) and inner.value is not None:
        yield from _inside(inner.value, '', named)


def _inside(node: ast.expr, prefix: str, named: dict[str, ast.expr]) -> Iterator[tuple[str, str]]:
  """Yields the keys of what a value is made of: dicts, their unions, names and copies of dicts."""
  if isinstance(node, ast.Dict):
    for key, value in zip(node.keys, node.values, strict=True):
      if isinstance(key, ast.Constant):
        key.end_lineno = value.end_lineno
        yield f'{prefix}{key.value}', comment_of(key)
        yield from _inside(value, f'{prefix}{key.value}.', named)
  elif isinstance(node, ast.BinOp):
    yield from _inside(node.left, prefix, named)
    yield from _inside(node.right, prefix, named)
  elif isinstance(node, ast.Call):
    for value in node.args:
      yield from _inside(value, prefix, named)
  elif isinstance(node, (ast.Name, ast.Attribute)):
    name = node.id if isinstance(node, ast.Name) else node.attr
    if name in named:
      yield from _inside(named[name], prefix, named)
  elif isinstance(node, ast.DictComp):  # {key: arg[key] for key in common.OWN}
    yield from _inside(node.generators[0].iter, prefix, named)
  elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
    # common.OWN['safety']
    for key, comment in _inside(node.value, '', named):
      if key == node.slice.value:
        yield prefix.removesuffix('.'), comment
      elif key.startswith(f'{node.slice.value}.'):
        yield prefix + key.partition('.')[2], comment


def comment_of(node: ast.AST) -> str:
  """Returns the comment behind a node, or the one above it; `node.lines` are those of its file."""
  lines = node.lines
  behind = lines[node.end_lineno - 1][node.end_col_offset :] if node.end_lineno else ''
  # A '#' within a string would be taken for a comment; knobs have none.
  if match := _COMMENT.search(behind):
    return match[1].strip()
  above, number = [], node.lineno - 2
  while number >= 0 and (match := re.fullmatch(r'\s*#\s?(.*)', lines[number])):
    above.insert(0, match[1].strip())
    number -= 1
  return ' '.join(above)
