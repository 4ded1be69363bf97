import dataclasses
import json

import pytest

from csrm_jax.safety.templates import FORMATS, GUARDS, Layout


def test_a_layout_survives_json():
  layout = Layout(
    order='conversation_first', words=('Yes', 'No'), chat_prefix='<user>', chat_suffix='<agent>'
  )
  text = json.dumps(dataclasses.asdict(layout))
  assert Layout.from_dict(json.loads(text)) == layout != Layout()


def test_every_format_but_ours_is_a_guard():
  assert ('csrm', *GUARDS) == FORMATS


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'format': 'guard'}, "unknown format 'guard'; use one of csrm"),
    ({'order': 'rules'}, 'unknown order \'rules\'; use "rules_first"'),
    ({'words': ('Yes',)}, 'give two different ones'),
    ({'words': ('No', 'No')}, 'give two different ones'),
    ({'words': ('safe', 'un safe')}, "'un safe' is not one word"),
    ({'words': ('', 'unsafe')}, "'' is not one word"),
    ({'chat_prefix': '[INST]'}, 'give both or none'),
  ],
)
def test_bad_values_are_one_line(fields, message):
  with pytest.raises(ValueError) as caught:
    Layout(**fields)
  assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda obj: obj.pop('order'), "'order' is missing"),
    (lambda obj: obj.update(colour=1), "'colour' is unknown"),
  ],
)
def test_fields_of_another_version_are_refused(change, message):
  obj = dataclasses.asdict(Layout())
  change(obj)
  with pytest.raises(ValueError, match=message):
    Layout.from_dict(obj)
