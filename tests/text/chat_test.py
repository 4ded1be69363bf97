"""Chat templates: what stands around a user's message, in five families."""

import json
import os
import pathlib

import pytest

from csrm_jax.text import chat

# In the manner of each family: shortened, their first lines as published.
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + \
' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}\
{% endfor %}"""
QWEN_3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' + (tools | tojson) }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.multi_step_tool and message.role == "user" and not(\
message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + \
'<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA_2 = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' + \
message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
SMOLLM_2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != \
'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant named \
SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' \
+ '\\n'}}{% endfor %}{% if add_generation_prompt %}\
{{ '<|im_start|>assistant\\n' }}{% endif %}"""
FAMILIES = {
  'llama3': (
    LLAMA_3,
    '<|begin_of_text|>',
    '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n'
    '<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n',
    '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
  ),
  'mistral': (MISTRAL, '<s>', '[INST] ', ' [/INST]'),
  'qwen3': (
    QWEN_3,
    None,
    '<|im_start|>user\n',
    '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n',
  ),
  'gemma2': (GEMMA_2, '<bos>', '<start_of_turn>user\n', '<end_of_turn>\n<start_of_turn>model\n'),
  # Its begin-of-text token is the mark of a turn, and nothing puts it in front.
  'smollm2': (
    SMOLLM_2,
    None,
    '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained'
    ' by Hugging Face<|im_end|>\n<|im_start|>user\n',
    '<|im_end|>\n<|im_start|>assistant\n',
  ),
}
SPECIAL = {'bos_token': '<|im_start|>', 'eos_token': '</s>'}


@pytest.mark.parametrize('family', FAMILIES)
def test_families(family):
  template, bos, prefix, suffix = FAMILIES[family]
  special = SPECIAL | ({'bos_token': bos} if bos else {})
  assert chat.wrap(template, special, bos) == (prefix, suffix)


@pytest.mark.parametrize('family', FAMILIES)
def test_it_is_what_transformers_renders(family):
  utils = pytest.importorskip('transformers.utils.chat_template_utils')
  template, bos, prefix, suffix = FAMILIES[family]
  special = SPECIAL | ({'bos_token': bos} if bos else {})
  text = 'Judge <this> & "that".\nAnswer safe or unsafe.'
  [rendered], _ = utils.render_jinja_template(
    conversations=[[{'role': 'user', 'content': text}]],
    chat_template=template,
    add_generation_prompt=True,
    enable_thinking=False,
    date_string='26 Jul 2024',
    **special,
  )
  assert rendered == (bos or '') + prefix + text + suffix


def test_where_no_begin_is_added_the_templates_own_stays():
  template, bos, prefix, suffix = FAMILIES['gemma2']
  assert chat.wrap(template, {'bos_token': bos}, None) == (bos + prefix, suffix)


def test_a_literal_begin_is_removed():
  template = '<s>U: {{ messages[0].content }} A:'
  assert chat.wrap(template, {}, '<s>') == ('U: ', ' A:')


USER = '{{ messages[0].content }}'


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    ('A:', 'renders a user message 0 times as it is'),
    (f'{USER}{USER}A:', 'renders a user message 2 times as it is'),
    ('{{ messages[0].content | upper }}A:', 'renders a user message 0 times'),
    (f'{{% if loop %}}{USER}', 'cannot be rendered'),
    ('{{ raise_exception("no\nuser") }}', r'cannot be rendered \(no user\)'),
    ('{{ messages[5].content }}', 'cannot be rendered'),
    ('{{ messages.__class__.__mro__ }}', 'cannot be rendered'),
    (f'U: {USER}\n', 'has nothing behind the user message'),
    (f'<s>U: <s>{USER} A:', "writes the begin-of-text token '<s>'"),
    (f'U: {USER} <s>A:', "writes the begin-of-text token '<s>'"),
  ],
)
def test_bad_templates_are_one_line(template, message):
  with pytest.raises(ValueError, match=message) as error:
    chat.wrap(template, {}, '<s>')
  assert '\n' not in str(error.value)


def test_what_transformers_adds_to_jinja_is_known():
  plain = '{% for m in messages %}<u>{{ m.content }}{% endfor %}<a>'
  marked = plain.replace('{{', '{%- generation -%}{{').replace('}}', '}}{%-endgeneration %}')
  assert chat.wrap(marked, {}, None) == chat.wrap(plain, {}, None) == ('<u>', '<a>')
  # A template that needs the date gets a fixed one; one that asks for it writes its own.
  dated = '{{ strftime_now("%d %b %Y") }} ' + plain
  assert chat.wrap(dated, {}, None) == ('26 Jul 2024 <u>', '<a>')
  asks = '{% if strftime_now is defined %}now{% else %}then{% endif %}' + plain
  assert chat.wrap(asks, {}, None) == ('then<u>', '<a>')


@pytest.mark.parametrize(
  ('suffix', 'closed'),
  [
    ('<a><think>\n', '<a><think>\n\n</think>\n\n'),
    ('<a><think>\n\n</think>\n\n\n', '<a><think>\n\n</think>\n\n'),
    ('<a><seed:think>', '<a><seed:think>\n\n</seed:think>\n\n'),
  ],
)
def test_a_thought_that_the_template_opens_is_closed(suffix, closed):
  assert chat.wrap(f'U: {USER}{suffix}', {}, None) == ('U: ', closed)


@pytest.mark.parametrize(
  'bomb',
  [
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    '{% set a = "x" * 3000000000 %}',
    '{{ "x".center(2000000) }}',
  ],
)
def test_templates_have_limits(bomb):
  with pytest.raises(ValueError, match='cannot be rendered') as error:
    chat.wrap(f'{bomb}U: {USER} A:', {}, None)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('template', [[{'template': 'x'}], ['x'], 5, {'a': 'b'}])
def test_templates_that_are_none_are_one_line(tmp_path, template):
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': template}))
  with pytest.raises(ValueError, match=r'chat template.* write'):
    chat.read(tmp_path)


def test_reading_a_folder(tmp_path):
  assert chat.read(tmp_path) == (None, {})
  settings = {
    'bos_token': {'content': '<s>'},
    'eos_token': '</s>',
    'pad_token': None,
    'chat_template': SMOLLM_2,
  }
  path = tmp_path / 'tokenizer_config.json'
  special = {'bos_token': '<s>', 'eos_token': '</s>'}
  path.write_text(json.dumps(settings))
  assert chat.read(tmp_path) == (SMOLLM_2, special)
  several = [{'name': 'tool_use', 'template': QWEN_3}, {'name': 'default', 'template': MISTRAL}]
  path.write_text(json.dumps(settings | {'chat_template': several}))
  assert chat.read(tmp_path) == (MISTRAL, special)
  path.write_text(json.dumps(settings | {'chat_template': several[:1]}))
  with pytest.raises(ValueError, match='tool_use and none that is named'):
    chat.read(tmp_path)
  # A file of its own comes first.
  (tmp_path / 'chat_template.jinja').write_text(GEMMA_2)
  assert chat.read(tmp_path) == (GEMMA_2, special)


def test_jinja2_is_an_extra(monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, 'jinja2', None)  # not installed
  with pytest.raises(ImportError, match=r'jinja2.*\[hf\]'):
    chat.wrap(SMOLLM_2, {}, None)


@pytest.mark.real
def test_smollm2():
  folder = os.environ.get('CSRM_SMOLLM2_DIR', '')
  if not folder or not pathlib.Path(folder).is_dir():
    pytest.skip('no SmolLM2; set CSRM_SMOLLM2_DIR (tests/fetch_smollm2.py)')
  template, special = chat.read(folder)
  assert chat.wrap(template, special, None) == FAMILIES['smollm2'][2:]
