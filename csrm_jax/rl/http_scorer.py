"""A reward behind HTTP: POST samples, get as many numbers.

Request: {"samples": [{"id", "conversation": [{"role", "content"}, ...],
"safety": {"categories": [{"name", "guideline"}, ...]}}, ...]}
Reply: {"rewards": [0.7, ...]}, in the order of the samples; other keys are
ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from csrm_jax.rl.types import Sample


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the scorer is called.

  Attributes:
    url: where samples are posted, as in http://localhost:5000/get_reward.
    timeout_s: without a sign of the scorer.
    num_tries: of a request that fails on the way; with back-off.
    backoff_s: before the second try; doubles with each further one.
    batch_size: samples a request.
  """
  url: str
  timeout_s: float = 60.0
  num_tries: int = 3
  backoff_s: float = 1.0
  batch_size: int = 64


def check_reachable(settings: Settings) -> None:
  """Checks that somebody answers at the URL.

  Raises:
    ValueError: nobody does.
  """
  raise NotImplementedError


def ask(settings: Settings, samples: Sequence[Sample]) -> list[Any]:
  """Returns the scorer's values, one a sample; they are not checked here.

  Raises:
    ValueError: it does not answer, refuses, or its reply is none.
  """
  raise NotImplementedError
