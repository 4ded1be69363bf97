"""Takes the comments of fields and constants as their text in the reference."""

from __future__ import annotations

import ast
import functools
import pathlib
import sys
from typing import Any

import griffe

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from csrm_jax import usage


class Comments(griffe.Extension):
  """An extension of griffe, which reads the code for mkdocstrings."""

  def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
    """Gives an attribute without docstring the comment behind or above it."""
    if attr.docstring or not isinstance(node, (ast.Assign, ast.AnnAssign)):
      return
    node.lines = _lines(attr.filepath)
    text = usage.comment_of(node)
    if text and not text.startswith(('noqa', 'type:', 'fmt:')):
      attr.docstring = griffe.Docstring(text, lineno=node.lineno, parent=attr)


@functools.cache
def _lines(path: pathlib.Path) -> list[str]:
  return path.read_text('utf-8').splitlines()
