"""JSON schemas of what a language model proposes, and the lengths in them.

They keep to what every service takes: all keys required, no others, null
where nothing is a reply. `without_lengths` gives the form for those that take
no lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_NAME_LENGTH = 80  # characters
MIN_GUIDELINE_LENGTH = 15  # characters
# The three sentences that are asked for, and the rewrite of a long list.
MAX_GUIDELINE_LENGTH, MAX_REWRITE_LENGTH = 600, 1200  # characters
MAX_SUBCATEGORIES = 30
# Keywords that say how long a text or a list may be.
_LENGTHS = ('minLength', 'maxLength', 'minItems', 'maxItems')


def make_object(**properties: Any) -> dict[str, Any]:
  """Returns the schema of an object that has all of these, and no others."""
  return {
    'type': 'object',
    'properties': properties,
    'required': list(properties),
    'additionalProperties': False,
  }


def _text(least: int, most: int) -> dict[str, Any]:
  # One more than is taken: a server that keeps to the schema ends a text that
  # would go on, and such a torso has to be told from a text that is whole.
  return {'type': 'string', 'minLength': least, 'maxLength': most + 1}


REWRITE = _text(MIN_GUIDELINE_LENGTH, MAX_REWRITE_LENGTH)
CATEGORY = make_object(
  name=_text(1, MAX_NAME_LENGTH), guideline=_text(MIN_GUIDELINE_LENGTH, MAX_GUIDELINE_LENGTH)
)
CATEGORY_OR_NULL = {'anyOf': [CATEGORY, {'type': 'null'}]}


def make_list(most: int = MAX_SUBCATEGORIES) -> dict[str, Any]:
  """Returns the schema of a list of one to `most` categories."""
  return {
    'type': 'array',
    'items': CATEGORY,
    'minItems': 1,
    'maxItems': min(most, MAX_SUBCATEGORIES),
  }


def without_lengths(schema: Any) -> Any:
  """Returns a schema that leaves open how long texts and lists may be."""
  if isinstance(schema, Mapping):
    return {k: without_lengths(v) for k, v in schema.items() if k not in _LENGTHS}
  if isinstance(schema, list):
    return [without_lengths(v) for v in schema]
  return schema
