"""Chat templates: the text that a backbone expects around a user's message.

A model's own jinja template is rendered once, with one user message that is only a marker, and
the result is cut at the marker. The parts are text of the template; conversations never go
through jinja.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.core import checks, files
from csrm_jax.text import tokenizer

# It survives whatever a template does to a message: strip, split, escape.
_MARKER = 'csrm0content0goes0here'
_TEMPLATE_FILE = 'chat_template.jinja'
# A template that others wrote is rendered with these limits.
_SECONDS, _BYTES, _MAX_TEXT = 2, 1 << 29, 1 << 20
# What transformers adds to jinja: a tag around the assistant's text, which changes nothing here.
_TAG = re.compile(r'\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}')
_ASKS_FOR_DATE = re.compile(r'strftime_now\s+is\s+(not\s+)?defined')
_DATE = datetime.datetime(2024, 7, 26)
# A span in which a model thinks before it answers.
_THOUGHT = re.compile(r'<([\w:|]*(?:think|thought|reason)[\w:|]*)>')
_SPECIAL = ('bos_token', 'eos_token', 'pad_token', 'unk_token')


def wrap(template: str, special_tokens: Mapping[str, str], bos: str | None) -> tuple[str, str]:
  """Returns (prefix, suffix): the template's text around a user's message.

  The next token after the suffix is the first of the assistant's turn. `special_tokens` are
  texts of 'bos_token', 'eos_token', ... for the template. `bos` is the token that the encoder
  puts before every prompt, or None; it is removed if the template writes it too.
  """
  try:
    text = _render_apart(template, tuple(special_tokens.items()))
  except ValueError as error:
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
  suffix = _close_thought(suffix)
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
      return files.read_text(path), special
    except ValueError:
      raise ValueError(f'{path}: not UTF-8 text; copy the file again') from None
  template = settings.get('chat_template')
  if isinstance(template, list):
    try:
      named = {item['name']: item['template'] for item in template}
    except (TypeError, KeyError):
      raise ValueError(
        f'{folder}: tokenizer_config.json has a list of chat templates without names; write the '
        f'one to use to {_TEMPLATE_FILE}'
      ) from None
    if 'default' not in named:
      raise ValueError(
        f'{folder}: tokenizer_config.json has the chat templates {", ".join(named)} and none that'
        f' is named default; write the one to use to {_TEMPLATE_FILE}'
      )
    template = named['default']
  if not isinstance(template, (str, type(None))):
    raise ValueError(
      f'{folder}: the chat template in tokenizer_config.json is {checks.show(template)}, not text; '
      f'write it to {_TEMPLATE_FILE}'
    )
  return template, special


def _close_thought(suffix: str) -> str:
  """Returns the suffix with the thought closed that it opens: the answer follows it."""
  for tag in sorted(set(_THOUGHT.findall(suffix))):
    if suffix.count(f'<{tag}>') > suffix.count(f'</{tag}>'):
      checks.note(f'the chat template opens a thought, <{tag}>; it is left empty')
      suffix = suffix.rstrip('\n') + f'\n\n</{tag}>\n\n'
  return suffix


@functools.lru_cache(maxsize=16)
def _render_apart(template: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
  """Returns what a template makes of a marker, in a process with limits on time and memory.

  A template is somebody else's program. Jinja's sandbox keeps it from this machine, but not from
  loops and texts without end.
  """
  checks.require('jinja2', 'a chat template')
  done, reply = None, {}
  try:
    done = subprocess.run(
      [sys.executable, '-P', '-c', 'from csrm_jax.text import chat; chat.answer()'],
      input=json.dumps([template, dict(special_tokens)]).encode(),
      capture_output=True,
      env=os.environ | {'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)},
      timeout=15 * _SECONDS,  # A busy machine may need long to begin.
    )
    reply = json.loads(done.stdout)
  except (subprocess.TimeoutExpired, ValueError):  # Killed, it replies nothing.
    if done and b'Error' in done.stderr:
      raise ValueError(done.stderr.decode(errors='replace').strip().splitlines()[-1]) from None
    raise ValueError(f'it takes more than {_SECONDS} s or {_BYTES >> 20} MiB') from None
  if 'error' in reply:
    raise ValueError(reply['error'])
  return reply['text']


def answer() -> None:
  """Renders the template that stdin holds, and prints the text or why there is none."""
  template, special_tokens = json.load(sys.stdin)
  checks.require('jinja2', 'a chat template')
  try:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
  except (ImportError, ValueError, OSError):
    pass  # Where there are no such limits, that of the caller holds.
  try:
    message = {'role': 'user', 'content': _MARKER}
    text = render(template, [message], add_generation_prompt=True, **special_tokens)
    reply = {'text': text}
    if len(text) > _MAX_TEXT:
      reply = {'error': f'it writes {len(text):,} characters around one message'}
  except Exception as error:  # A template may raise anything.
    reply = {'error': checks.reason(error)}
  print(json.dumps(reply))


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
  """Returns what a chat template makes of messages; it may raise any exception."""
  checks.require('jinja2', 'a chat template')
  from jinja2 import sandbox

  def raise_exception(message: str) -> None:
    raise ValueError(message)

  # These are the settings that templates are written for. The sandbox is needed because a template
  # is somebody else's program.
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  environment.filters['tojson'] = lambda value, ensure_ascii=False, **options: json.dumps(
    value, ensure_ascii=ensure_ascii, **options
  )
  environment.globals['raise_exception'] = raise_exception
  # A prompt must not depend on the day. Templates that ask for the date write a fixed one without.
  if not _ASKS_FOR_DATE.search(template):
    environment.globals['strftime_now'] = _DATE.strftime
  # The first token must be the verdict; templates without thinking ignore this.
  defaults = {'enable_thinking': False, 'tools': None, 'documents': None}
  template = _TAG.sub(_plain_tag, template)
  return environment.from_string(template).render(messages=messages, **defaults | variables)


def _plain_tag(match: re.Match[str]) -> str:
  before, end, after = match.groups()
  return f'{{%{before} {"endif" if end else "if true"} {after}%}}'
