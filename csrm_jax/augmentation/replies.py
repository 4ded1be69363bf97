"""How a language model's words become a reply: cached, parsed, asked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from csrm_jax.augmentation import requests
from csrm_jax.augmentation.proposers import NoReplyError
from csrm_jax.core.journal import Cache


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

  A text that does not parse is never repaired: another one is asked for. It is
  cached all the same, so that a rerun costs nothing; an empty one, which may
  be a slip of the service, is not.

  Args:
    request: what is asked.
    key: of the cache.
    cache: gets the texts, each try's under its own key.
    write: (request, number of the try) -> a text of the model.
    num_tries: at most.
    count: called with what is to be added to the counts, by name.

  Raises:
    NoReplyError: 'unparsable', or what `write` raises.
  """
  problem = None
  for number in range(num_tries):
    entry = f'{key}-{number}' if number else key
    text = cache.get(entry)
    if text is not None:
      count(cache_hits=1)
    else:
      text = write(request, number)
      if text.strip():
        cache.put(entry, text)
    try:
      return requests.parse(request, text)
    except ValueError as error:
      problem = error
      count(unparsable=1)
  raise NoReplyError('unparsable', str(problem))
