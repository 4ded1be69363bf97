"""The layers of pyproject.toml hold, and every module has one."""

import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'csrm_jax'


def _settings():
  text = (ROOT / 'pyproject.toml').read_text()
  return tomllib.loads(text)['tool']['importlinter']


def _modules():
  """Returns {dotted name below csrm_jax: path}; a package has its name."""
  modules = {}
  for path in PACKAGE.rglob('*.py'):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    if parts[-1] == '__init__':
      parts = parts[:-1]
    if parts:
      modules['.'.join(parts)] = path
  return modules


def test_imports_go_downward():
  # The linter reads the sources of whichever csrm_jax Python finds first.
  program = (
    f'import sys; sys.path.insert(0, {str(ROOT)!r});'
    'from importlinter.cli import lint_imports;'
    'sys.exit(lint_imports(no_cache=True))'
  )
  result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_has_a_layer():
  (contract,) = _settings()['contracts']
  layers = set(re.findall(r'[\w.]+', ' '.join(contract['layers'])))
  missing = []
  for name, path in _modules().items():
    parents = {name} | {name.rsplit('.', n)[0] for n in range(1, name.count('.') + 1)}
    # A package whose modules lie in several layers may itself import nothing.
    is_spread = path.name == '__init__.py' and any(layer.startswith(f'{name}.') for layer in layers)
    if is_spread:
      assert 'import' not in path.read_text().split('"""')[-1], (
        f'{path} belongs to no layer: import its modules one by one'
      )
    elif not parents & layers:
      missing.append(name)
  assert not missing, f'no layer for {missing}: add them to [tool.importlinter] in pyproject.toml'
