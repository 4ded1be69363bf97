"""Chat templates: the text that a backbone expects around a user's message.

A model's own jinja template is rendered once, with one user message that is only a marker, and
the result is cut at the marker. The parts are text of the template; conversations never go
through jinja.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.core import checks
from csrm_jax.text import tokenizer

# It survives whatever a template does to a message: strip, split, escape.
_MARKER = 'csrm0content0goes0here'
_TEMPLATE_FILE = 'chat_template.jinja'
_SPECIAL = ('bos_token', 'eos_token', 'pad_token', 'unk_token')


def wrap(template: str, special_tokens: Mapping[str, str], bos: str | None) -> tuple[str, str]:
  """Returns (prefix, suffix): the template's text around a user's message.

  The next token after the suffix is the first of the assistant's turn. `special_tokens` are
  texts of 'bos_token', 'eos_token', ... for the template. `bos` is the token that the encoder
  puts before every prompt, or None; it is removed if the template writes it too.
  """
  message = {'role': 'user', 'content': _MARKER}
  try:
    text = render(template, [message], add_generation_prompt=True, **special_tokens)
  except ImportError:
    raise
  except Exception as error:  # A template may raise anything.
    raise ValueError(
      f'the chat template cannot be rendered ({checks.reason(error)}); use the template of an '
      'instruction-tuned model, or none'
    ) from None
  if text.count(_MARKER) != 1:
    raise ValueError(
      f'the chat template renders a user message {text.count(_MARKER)} times as it is, it must do'
      ' so once; use the template of an instruction-tuned model, or none'
    )
  prefix, suffix = text.split(_MARKER)
  # Without this text the model would go on with the user's turn.
  if not suffix.strip():
    raise ValueError(
      "the chat template has nothing behind the user message that opens the assistant's turn"
      ' (add_generation_prompt); use the template of an instruction-tuned model, or none'
    )
  if bos:
    # The encoder adds it, and a prompt must hold it once.
    prefix = prefix.removeprefix(bos)
    if bos in prefix or bos in suffix:
      raise ValueError(
        f'the chat template writes the begin-of-text token {bos!r} more than once or not in front;'
        ' a prompt must hold one'
      )
  return prefix, suffix


def read(folder: str | os.PathLike) -> tuple[str | None, dict[str, str]]:
  """Returns (template or None, special tokens) of a Hugging Face folder.

  chat_template.jinja comes before tokenizer_config.json; of several templates there, the one
  named 'default' counts.
  """
  folder = pathlib.Path(folder)
  settings = tokenizer.read_settings(folder / 'tokenizer.json')
  texts = {name: tokenizer.named(settings, name) for name in _SPECIAL}
  special = {name: text for name, text in texts.items() if text is not None}
  path = folder / _TEMPLATE_FILE
  if path.is_file():
    try:
      return path.read_text(encoding='utf-8'), special
    except ValueError:
      raise ValueError(f'{path}: not UTF-8 text; copy the file again') from None
  template = settings.get('chat_template')
  if isinstance(template, list):
    named = {item['name']: item['template'] for item in template}
    if 'default' not in named:
      raise ValueError(
        f'{folder}: tokenizer_config.json has the chat templates {", ".join(named)} and none that'
        f' is named default; write the one to use to {_TEMPLATE_FILE}'
      )
    template = named['default']
  return template, special


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
  """Returns what a chat template makes of messages; it may raise any exception."""
  checks.require('jinja2', 'a chat template')
  from jinja2 import sandbox

  def raise_exception(message: str) -> None:
    raise ValueError(message)

  # These are the settings that templates are written for. strftime_now is left out: templates then
  # write a fixed date, and a prompt does not depend on the day. The sandbox is needed because a
  # template is somebody else's program.
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  environment.filters['tojson'] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  environment.globals['raise_exception'] = raise_exception
  # The first token must be the verdict; templates without thinking ignore this.
  defaults = {'enable_thinking': False, 'tools': None, 'documents': None}
  return environment.from_string(template).render(messages=messages, **defaults | variables)
