"""How a language model's words become a reply: cached, parsed, asked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from csrm_jax.augmentation import requests
from csrm_jax.augmentation.journal import Cache
from csrm_jax.augmentation.proposers import NoReplyError


def make_key(request: requests.Request, sampling: Sequence[Any]) -> str:
  """Returns the sha256 (hex) of what is asked of whom; see `Cache`.

  Args:
    request: what is asked.
    sampling: the model, and all that says how its replies are drawn.
  """
  content = [*sampling, requests.make_messages(request)]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def ask(
  request: requests.Request,
  key: str,
  cache: Cache,
  write: Callable[[requests.Request, int], str],
  num_tries: int,
  count: Callable[..., None],
) -> Any:
  """Returns the typed reply, from the cache where it is there.

  A text that does not parse is never repaired: another one is asked for.

  Args:
    request: what is asked.
    key: of the cache.
    cache: gets the text of a reply that parses.
    write: (request, number of the try) -> a text of the model.
    num_tries: at most.
    count: called with what is to be added to the counts, by name.

  Raises:
    NoReplyError: 'unparsable', or what `write` raises.
  """
  text = cache.get(key)
  if text is not None:
    try:
      reply = requests.parse(request, text)
    except ValueError:
      pass  # Stored under laxer rules: ask again.
    else:
      count(cache_hits=1)
      return reply
  problem = None
  for number in range(num_tries):
    text = write(request, number)
    try:
      reply = requests.parse(request, text)
    except ValueError as error:
      problem = error
      count(unparsable=1)
      continue
    cache.put(key, text)
    return reply
  raise NoReplyError('unparsable', str(problem))
