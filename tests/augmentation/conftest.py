"""Proposers and judges with nothing behind them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from csrm_jax.augmentation import proposers


@dataclasses.dataclass
class Scripted:
  """Answers with what `reply(request)` gives; a word is a NoReplyError."""

  reply: Callable[[Any], Any]
  name: str = 'scripted'
  concurrency: int = 1

  def __post_init__(self):
    self.asked = []

  def ask(self, request):
    self.asked.append(request)
    reply = self.reply(request)
    if isinstance(reply, str):
      raise proposers.NoReplyError(reply)
    return reply

  def usage(self):
    return {'requests': len(self.asked)}


@pytest.fixture
def scripted():
  return Scripted
