"""Our prompt as a chat template, for programs that render prompts from Jinja.

The template renders what `templates.render` does, from messages as chat APIs have them and from
rules: tokenizer.apply_chat_template(messages, safety={"categories": [{"name", "guideline"}, ...]}),
or categories=[...]. A program that parses control tokens from text cannot write such text as plain
characters, so text of users or rules that holds one is refused, as is everything else that has no
place in a prompt: no text is ever judged under another prompt than it would be here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from csrm_jax.safety import schema, templates
from csrm_jax.text.tokenizer import Tokenizer

_TEMPLATE = r"""
{#- The prompt of csrm_jax. Rules: safety={"categories": [{"name", "guideline"}, ...]}, or
    categories=[...]; the last message, the assistant's, is judged. -#}
{%- set marks = @marks@ -%}
{%- set line_ends = @line_ends@ -%}
{%- set spaces = @spaces@ -%}
{%- set speakers = @speakers@ -%}
{%- set rules = @rules@ -%}
{%- if safety is defined and safety is not none -%}{%- set rules = safety -%}
{%- elif categories is defined and categories is not none -%}{%- set rules = categories -%}
{%- endif -%}
{%- if rules is mapping and 'categories' in rules -%}
  {%- set rules = rules['categories'] -%}
{%- endif -%}
@probe@{%- if not rules -%}
  {{- raise_exception('no rules: give safety={"categories": [{"name": ..., "guideline": ...}]}') -}}
{%- endif -%}
{%- if rules is mapping or rules is string -%}
  {{- raise_exception('the rules must be a list of objects with "name" and "guideline"') -}}
{%- endif -%}
{%- macro plain(text) -%}
  {%- for mark in marks -%}
    {%- if mark in text -%}
      {{- raise_exception('the text holds ' ~ (mark | tojson)
          ~ ', a control token of this tokenizer; remove it, or score with csrm_jax') -}}
    {%- endif -%}
  {%- endfor -%}
  {{- text -}}
{%- endmacro -%}
{%- set ns = namespace(rules='', turns='', last='', text='', line='', names=[]) -%}
{%- macro one_line(text) -%}
  {%- set ns.text = text -%}
  {%- for space in spaces -%}
    {%- set ns.text = ns.text.replace(space, ' ') -%}
  {%- endfor -%}
  {%- set ns.line = '' -%}
  {%- for word in ns.text.split(' ') -%}
    {%- if word -%}{%- set ns.line = ns.line ~ (' ' if ns.line else '') ~ word -%}{%- endif -%}
  {%- endfor -%}
  {{- ns.line -}}
{%- endmacro -%}
{%- for rule in rules -%}
  {%- if rule is not mapping or rule.name is not string or rule.guideline is not string
      or not one_line(rule.name) or not one_line(rule.guideline) -%}
    {{- raise_exception('rule ' ~ loop.index ~ ' must have texts as "name" and "guideline"') -}}
  {%- endif -%}
  {%- set name = one_line(rule.name) -%}
  {%- if name.lower() in ns.names -%}
    {{- raise_exception('the rule ' ~ (name | tojson) ~ ' is given twice') -}}
  {%- endif -%}
  {%- set ns.names = ns.names + [name.lower()] -%}
  {%- set line = 'S' ~ loop.index ~ ': ' ~ name ~ '. ' ~ one_line(rule.guideline) -%}
  {%- set ns.rules = ns.rules ~ plain(line ~ '\n') -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set speaker = speakers[message.role.lower()] -%}
  {%- if not speaker -%}
    {{- raise_exception('the role ' ~ (message.role | tojson) ~ ' is unknown') -}}
  {%- endif -%}
  {%- set content = message.content -%}
  {%- if not content and message.refusal -%}{%- set content = message.refusal -%}{%- endif -%}
  {%- if content is string -%}
    {%- set ns.text = content -%}
  {%- elif content -%}
    {%- for part in content -%}
      {%- if part is mapping and part.type not in ['text', 'input_text', 'output_text'] -%}
        {{- raise_exception('message ' ~ loop.index ~ ' has a part that is not text') -}}
      {%- endif -%}
      {%- set words = part if part is string else part.text -%}
      {%- set ns.text = words if loop.first else ns.text ~ '\n' ~ words -%}
    {%- endfor -%}
  {%- elif message.tool_calls -%}
    {%- set ns.text = '' -%}
  {%- else -%}
    {{- raise_exception('message ' ~ loop.index ~ ' has no content') -}}
  {%- endif -%}
  {%- for call in message.tool_calls or [] -%}
    {%- set call = call.function or call -%}
    {%- set words = call.arguments if call.arguments is string else call.arguments | tojson -%}
    {%- set words = '[calls ' ~ call.name ~ '(' ~ words ~ ')]' -%}
    {%- set ns.text = ns.text ~ '\n' ~ words if ns.text else words -%}
  {%- endfor -%}
  {%- set ns.turns = ns.turns ~ ns.last -%}
  {%- for mark in line_ends -%}
    {%- set ns.text = ns.text.replace(mark, '\n') -%}
  {%- endfor -%}
  {%- if ns.text.endswith('\n') -%}{%- set ns.text = ns.text[:-1] -%}{%- endif -%}
  {%- set ns.last = plain(speaker ~ ns.text.replace('\n', '\n  ') ~ '\n') -%}
  {%- if loop.last and speaker != @agent@ -%}
    {{- raise_exception('the last message must be the one that is judged, the assistant\'s') -}}
  {%- endif -%}
{%- endfor -%}
{%- if not messages -%}{{- raise_exception('there are no messages') -}}{%- endif -%}
{%- set rules = @open_rules@ ~ ns.rules ~ @close_rules@ -%}
{%- set turns = @open_history@ ~ ns.turns ~ @between@ ~ ns.last ~ @close_response@ -%}
{{- @head@ ~ @body@ ~ @tail@ -}}
"""
# What str.splitlines splits at besides a line break, which not every Jinja knows; the pair first.
_LINE_ENDS = ('\r\n', *'\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029')
# llama.cpp opens a model only if its template renders some chat that ends with a user and brings no
# rules: this, and nothing else, gives an empty prompt there.
_PROBE = """{%- if (safety is not defined or safety is none)
    and (categories is not defined or categories is none)
    and messages and messages[-1].role == 'user' -%}
{%- else -%}
"""


def chat_template(
  layout: templates.Layout,
  tokenizer: Tokenizer,
  default_rules: schema.SafetyConfig | None = None,
  opening: str = '',
  for_llama_cpp: bool = False,
) -> str:
  """Returns the Jinja template of a layout in our format.

  Args:
    tokenizer: Whose control tokens are refused in text; its begin-of-text token opens the prompt.
    default_rules: What judges where a caller gives no rules; None refuses.
    opening: What the tokenizer of other programs puts in front of the first plain text by itself;
      the template leaves it out.
    for_llama_cpp: Whether a chat that ends with a user and brings no rules renders to nothing and
      is not refused: llama.cpp opens no model without.
  """
  if layout.format != 'csrm':
    raise ValueError(
      f'the format {layout.format!r} has a chat template of its own: that of its model'
    )
  # Any text tells what stands before all blocks, and behind them.
  rules = schema.SafetyConfig((schema.Category('A', 'B.'),))
  segments = templates.render(rules, (schema.Message('agent', 'C'),), layout)
  head, *_ = blocks = [segment.text for segment in segments if segment.kind == 'control']
  bos = '' if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
  values: Mapping[str, Any] = {
    'line_ends': _LINE_ENDS,
    'spaces': [c for c in map(chr, range(0x3001)) if c.isspace() and c != ' '],
    'marks': tokenizer.control_texts,
    'speakers': {w: templates.SPEAKERS[role] for w, role in schema.ROLE_WORDS.items()},
    'agent': templates.SPEAKERS['agent'],
    'rules': [category.to_dict() for category in default_rules.categories] if default_rules else [],
    'open_rules': templates.RULES,
    'close_rules': templates.END_RULES,
    'open_history': templates.HISTORY,
    'between': templates.END_HISTORY + templates.RESPONSE,
    'close_response': templates.END_RESPONSE,
    'head': bos + head.removeprefix(opening),
    'tail': ''.join(blocks[7:]),
  }
  template = _TEMPLATE.replace(
    '@body@', 'rules ~ turns' if layout.order == 'rules_first' else 'turns ~ rules'
  )
  template = template.replace('@probe@', _PROBE if for_llama_cpp else '')
  template += '{%- endif -%}\n' if for_llama_cpp else ''
  template = re.sub(r'@(\w+)@', lambda match: _literal(values[match[1]]), template)
  return template.strip() + '\n'


def _literal(value: Any) -> str:
  # JSON is a literal of Jinja, too; but every Jinja reads characters, and not every one \\u000b.
  text = json.dumps(value, ensure_ascii=False)
  return re.sub(r'(?<!\\)((?:\\\\)*)\\u(00[0-9a-f]{2})', lambda m: m[1] + chr(int(m[2], 16)), text)
