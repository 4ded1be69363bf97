"""The folders are layers, as pyproject.toml lists them, and no import goes round."""

import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'csrm_jax'


def test_imports_go_downward_and_not_round():
  # The linter reads the sources of whichever csrm_jax Python finds first.
  program = (
    f'import sys; sys.path.insert(0, {str(ROOT)!r});'
    'from importlinter.cli import lint_imports;'
    'sys.exit(lint_imports(no_cache=True))'
  )
  result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_has_a_layer():
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['importlinter']
  contract = next(c for c in settings['contracts'] if c['type'] == 'layers')
  layers = set(re.findall(r'\w+', ' '.join(contract['layers'])))
  tops = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob('*.py')}
  assert {top.removesuffix('.py') for top in tops} - {'__init__'} == layers
