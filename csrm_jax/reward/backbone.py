"""The tokenizer of a public model, and the marks of a chat turn that go with it.

A source is what `models.hf` takes: a Hugging Face folder, the id of one on the hub, or a .gguf
file. A tokenizer may also be given as its file alone.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from csrm_jax.core import files
from csrm_jax.models import gguf, hf
from csrm_jax.text import chat, tokenizer as tokenizer_lib

# Either the name of a source or an open one, which is looked for only once.
Name = str | os.PathLike | hf.Source

_MODELS = ('tokenizer.json', 'tokenizer.model')
# What stands beside a tokenizer.json and says how it is used.
_SETTINGS = ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')


def load_tokenizer(source: Name) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer of a source, or of a .model or tokenizer.json file."""
  with _tokenizer_file(source) as path:
    return tokenizer_lib.load_tokenizer(path)


def find_tokenizer(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns the tokenizer's model file in a folder, or None if there is none."""
  return next((path for name in _MODELS if (path := folder / name).is_file()), None)


def chat_marks(source: Name, tokenizer: tokenizer_lib.Tokenizer) -> tuple[str, str]:
  """Returns the text before and after a user's turn; ('', '') where there is no chat template."""
  with _tokenizer_file(source) as path:
    template, special_tokens = chat.read(path.parent)
    more = path.with_name('added_tokens.json')
    added = files.read_json(more, dict) if more.is_file() else {}
  if template is None:
    return '', ''
  bos = tokenizer.bos_id
  try:
    prefix, suffix = chat.wrap(
      template, special_tokens, None if bos is None else tokenizer.piece(bos)
    )
  except ValueError as error:
    raise ValueError(f'{hf.open_source(source).name}: {error}') from None
  for name, number in added.items():
    if name in prefix + suffix and tokenizer.encode_control(name) != [number]:
      raise ValueError(
        f'{hf.open_source(source).name}: added_tokens.json makes {name} of the chat template the '
        f'token {number}, which the tokenizer does not know; give the tokenizer.json of the model'
      )
  # The model was trained on prompts whose first plain text has a space in front.
  first = tokenizer.encode_control(prefix)[:1]
  # The id of a control token decodes to nothing, that of plain text to some text.
  if tokenizer.opens_with_space and (not first or tokenizer.decode(first)):
    prefix = f' {prefix}'
  return prefix, suffix


def save_tokenizer(source: Name, directory: str | os.PathLike) -> None:
  """Writes the tokenizer's model file, under Hugging Face's name, and the settings beside it."""
  directory = pathlib.Path(directory)
  with _tokenizer_file(source) as path:
    found = {f'tokenizer{path.suffix}': path}
    if path.suffix == '.json':
      found |= {name: path.with_name(name) for name in _SETTINGS}
    for name, file in found.items():
      if file.is_file():
        files.write(directory / name, file.read_bytes())


@contextlib.contextmanager
def _tokenizer_file(source: Name) -> Iterator[pathlib.Path]:
  """Yields the tokenizer's model file, among its settings."""
  source = hf.open_source(source)
  path = files.locate(source.name)
  # A tokenizer file is no source: one that is missing must not be looked for on the hub.
  if path.suffix in ('.json', '.model'):
    yield path
    return
  path = source.path
  with contextlib.ExitStack() as stack:
    if source.is_gguf:
      folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      for name, content in gguf.tokenizer_files(path).items():
        (folder / name).write_bytes(content)
      path = folder
    if found := find_tokenizer(path):
      yield found
      return
  raise ValueError(
    f'{source.name}: no {" or ".join(_MODELS)} there; give the folder that save_pretrained wrote'
  )
