"""Runs a notebook as somebody who opens it does, in its own folder, in this environment.

python tests/run_notebook.py notebooks/1_rules_live.ipynb --folder=DIR [NAME=VALUE ...]

The values, Python literals, replace those of the cell that is tagged `parameters`. DIR gets the
pictures, as they were drawn. Nothing is needed but nbclient and ipykernel.
"""

import argparse
import ast
import base64
import pathlib
import sys


def run(path, values, timeout_s=3600):
  """Returns the notebook with its outputs; raises nbclient's error where a cell fails."""
  import nbclient
  import nbformat

  path = pathlib.Path(path)
  notebook = nbformat.read(path, as_version=4)
  (place,) = (
    i for i, cell in enumerate(notebook.cells) if 'parameters' in cell.metadata.get('tags', ())
  )
  lines = '\n'.join(f'{name} = {value!r}' for name, value in values.items())
  unknown = [n for n in values if f'\n{n} = ' not in f'\n{notebook.cells[place].source}']
  if unknown:
    raise ValueError(f'{path.name} has no parameter {", ".join(unknown)}')
  notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
  client = nbclient.NotebookClient(
    notebook,
    timeout=timeout_s,
    kernel_name='python3',
    resources={'metadata': {'path': str(path.parent)}},
  )
  return client.execute()


def pictures(notebook):
  """Returns the PNG files among the outputs, as bytes."""
  found = []
  for cell in notebook.cells:
    for output in cell.get('outputs', ()):
      if picture := output.get('data', {}).get('image/png'):
        found.append(base64.b64decode(picture))
  return found


def printed(notebook):
  """Returns the text among the outputs."""
  parts = []
  for cell in notebook.cells:
    for output in cell.get('outputs', ()):
      data = output.get('data', {})
      parts.append(output.get('text') or data.get('text/html') or data.get('text/plain', ''))
  return '\n'.join(parts)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('notebook', type=pathlib.Path)
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('values', nargs='*')
  args = parser.parse_intermixed_args()
  values = {}
  for text in args.values:
    name, _, value = text.partition('=')
    values[name] = ast.literal_eval(value)
  notebook = run(args.notebook, values)
  args.folder.mkdir(parents=True, exist_ok=True)
  for i, picture in enumerate(pictures(notebook)):
    (args.folder / f'{args.notebook.stem}-{i}.png').write_bytes(picture)
  (args.folder / f'{args.notebook.stem}.txt').write_text(printed(notebook), 'utf-8')


if __name__ == '__main__':
  sys.exit(main())
