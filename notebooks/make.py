"""Writes what the notebooks share into each of them: the badge, the first cells, no outputs.

python notebooks/make.py [--repository=https://github.com/ORG/csrm_jax] [--check]

The project has no public address yet: badges open an empty Colab, into which a notebook is
uploaded, and REPOSITORY in the first cell is for the address of one's copy, or a wheel. With an
address, which is kept, badges open the notebooks, and the first cell installs from there.
"""

import argparse
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
SHARED = 'shared'  # the tag of the cells that are written here
PARAMETERS = 'parameters'  # the tag of the cell whose values papermill, and our tests, replace
BADGE = 'https://colab.research.google.com/assets/colab-badge.svg'
METADATA = {
  'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
  'language_info': {'name': 'python'},
}

WITHOUT_ADDRESS = """\
Colab: the badge opens it; upload this file there (*File*, *Upload notebook*), and give the address
of your copy of the project, or a wheel of it that you have uploaded, as REPOSITORY."""

INSTALL = """\
# Installs csrm_jax where it is missing: from the checkout that this notebook lies in, or from
REPOSITORY = '{repository}'  # a git address, or a wheel's path
import importlib.util
import pathlib
import sys

if sys.version_info < (3, 11):
  raise SystemExit('csrm_jax needs Python 3.11 or newer: choose another kernel or runtime')
if importlib.util.find_spec('csrm_jax') is None:
  here = pathlib.Path.cwd()
  checkout = next((f for f in (here, *here.parents) if (f / 'csrm_jax/main.py').is_file()), None)
  if checkout:
    sys.path.append(str(checkout))
    source = f'-e "{{checkout}}[notebooks]"'
  elif REPOSITORY.endswith('.whl'):
    source = f'"{{REPOSITORY}}[notebooks]"'
  elif REPOSITORY:
    source = f'"csrm_jax[notebooks] @ git+{{REPOSITORY}}"'
  else:
    raise SystemExit('csrm_jax is not installed: set REPOSITORY above to its git address or wheel')
  %pip install --quiet {{source}}"""

CHECK = """\
def run(arguments):
  \"\"\"Runs `csrm_jax` with these arguments, as in a terminal; stops here where that fails.\"\"\"
  !"{sys.executable}" -m csrm_jax {arguments}
  if _exit_code:
    raise SystemExit(f'csrm_jax {arguments.split()[0]} has failed: its last line says why')


run('doctor notebooks')  # what computes here: TPU, GPU or CPU; or what is missing"""


def stamp(notebook: dict, name: str, repository: str) -> dict:
  """Returns the notebook with the shared cells as they are here, and without outputs."""
  badge, about = 'https://colab.research.google.com/', WITHOUT_ADDRESS
  if repository:
    path = re.sub(r'^https?://github\.com/|(\.git)?/?$', '', repository)
    badge, about = f'{badge}github/{path}/blob/main/notebooks/{name}', ''
  text = f'[![Open in Colab]({BADGE})]({badge})' + (f'\n\n{about}' if about else '')
  shared = [
    {'cell_type': 'markdown', 'source': text},
    {'cell_type': 'code', 'source': INSTALL.format(repository=repository)},
    {'cell_type': 'code', 'source': CHECK},
  ]
  own = [cell for cell in notebook['cells'] if SHARED not in cell['metadata'].get('tags', ())]
  title, *rest = own
  cells = [title, *({**cell, 'metadata': {'tags': [SHARED]}} for cell in shared), *rest]
  return {
    'cells': [_clean(cell, i) for i, cell in enumerate(cells)],
    'metadata': METADATA,
    'nbformat': 4,
    'nbformat_minor': 5,
  }


def _clean(cell: dict, number: int) -> dict:
  source = cell['source'] if isinstance(cell['source'], str) else ''.join(cell['source'])
  kept = {
    'cell_type': cell['cell_type'],
    'id': f'cell-{number}',
    'metadata': {key: value for key, value in cell['metadata'].items() if key == 'tags'},
    'source': source.splitlines(keepends=True),
  }
  return kept | ({'execution_count': None, 'outputs': []} if cell['cell_type'] == 'code' else {})


def text_of(notebook: dict) -> str:
  return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def address_of(notebook: dict) -> str:
  """Returns the address that the notebook has."""
  match = re.search(r"^REPOSITORY = '(.*?)'", ''.join(notebook['cells'][2]['source']), re.MULTILINE)
  return match[1] if match else ''


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repository', help='by default as it is')
  parser.add_argument('--check', action='store_true', help='writes nothing; 1 if it would')
  args = parser.parse_args()
  differ = []
  for path in sorted(HERE.glob('*.ipynb')):
    notebook = json.loads(path.read_text('utf-8'))
    repository = address_of(notebook) if args.repository is None else args.repository
    text = text_of(stamp(notebook, path.name, repository))
    if text != path.read_text('utf-8'):
      differ.append(path.name)
      if not args.check:
        path.write_text(text, 'utf-8')
  print('\n'.join(differ) or 'nothing to change')
  return int(args.check and bool(differ))


if __name__ == '__main__':
  sys.exit(main())
