"""The chat template renders what `templates.render` does, and refuses the rest."""

import pytest

from csrm_jax.safety import jinja, schema, templates
from csrm_jax.text import chat
from tests import small

pytest.importorskip('jinja2')
RULES = schema.SafetyConfig(
  (
    schema.Category('Two  words', 'Line\none,\u2028line two. "Quotes" and {{ braces }} {% if %}.'),
    schema.Category('東京 😀', "It's 100 %."),
  )
)
TALK = (
  {'role': 'developer', 'content': 'Obey.'},
  {'role': 'user', 'content': 'a\r\nb\u2028c\x85d\x0be\n\n'},
  {
    'role': 'Assistant',
    'content': None,
    'tool_calls': [{'function': {'name': 'f', 'arguments': {'ä': 1}}}],
  },
  {
    'role': 'tool',
    'content': [{'type': 'text', 'text': 'x'}, {'type': 'input_text', 'text': ' y'}, 'z'],
  },
  {'role': 'user', 'content': ''},
  {
    'role': 'assistant',
    'content': 'Answer\n  </RULE>\n{{ raise }}\n',
    'tool_calls': [{'name': 'g', 'arguments': '{}'}],
  },
)
LAYOUTS = (
  templates.Layout(),
  templates.Layout(order='conversation_first', words=('Yes', 'No')),
  templates.Layout(chat_prefix='[INST] ', chat_suffix=' [/INST]'),
)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_prompt_is_ours(layout):
  template = jinja.chat_template(layout, small.TOKENIZER)
  for talk in (TALK, TALK[-1:], TALK[1:3]):
    ours = templates.render(RULES, schema.parse_conversation(talk), layout)
    want = '<s>' + templates.render_text(ours)
    assert chat.render(template, talk, safety=RULES.to_dict()) == want
    assert chat.render(template, talk, categories=RULES.to_dict()['categories']) == want
    default = jinja.chat_template(layout, small.TOKENIZER, RULES)
    assert chat.render(default, talk) == want


@pytest.mark.parametrize(
  'messages,variables,message',
  [
    (TALK, {}, 'no rules'),
    (TALK, {'safety': []}, 'no rules'),
    (TALK, {'safety': {'categories': []}}, 'no rules'),
    (TALK, {'safety': {'Cats': 'No cats.'}}, 'must be a list'),
    (TALK, {'categories': 'No cats.'}, 'must be a list'),
    (TALK, {'categories': [{'name': 'Cats'}]}, 'rule 1 must have'),
    (TALK, {'categories': [{'name': 'Cats', 'guideline': ' '}]}, 'rule 1 must have'),
    (TALK, {'categories': [{'name': n, 'guideline': 'No.'} for n in ('A b', 'a  B')]}, 'twice'),
    ((), {'safety': RULES.to_dict()}, 'no messages'),
    (TALK[:2], {'safety': RULES.to_dict()}, "the assistant's"),
    ([{'role': 'judge', 'content': ''}], {'safety': RULES.to_dict()}, 'role "judge" is unknown'),
    ([{'role': 'agent', 'content': None}], {'safety': RULES.to_dict()}, 'no content'),
    (
      [{'role': 'agent', 'content': [{'type': 'image_url', 'image_url': 'x'}]}],
      {'safety': RULES.to_dict()},
      'not text',
    ),
    ([{'role': 'agent', 'content': 'a <s> b'}], {'safety': RULES.to_dict()}, 'control token'),
    ([{'role': 'agent', 'content': '<RULES>'}], {'safety': RULES.to_dict()}, 'control token'),
    (TALK, {'categories': [{'name': '</s>', 'guideline': 'No.'}]}, 'control token'),
  ],
)
def test_what_is_no_prompt_of_ours_is_refused(messages, variables, message):
  template = jinja.chat_template(templates.Layout(), small.TOKENIZER, RULES)
  if not variables:
    template = jinja.chat_template(templates.Layout(), small.TOKENIZER)
  with pytest.raises(ValueError, match=message):
    chat.render(template, messages, **variables)


def test_guards_have_their_own():
  layout = templates.Layout('llama_guard_3')
  assert 'of its own' in small.error_of(jinja.chat_template, layout, small.TOKENIZER)
