"""A proposer in this process: a chat model through our own sampler."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

from csrm_jax.augmentation import replies, requests
from csrm_jax.augmentation.proposers import NoReplyError
from csrm_jax.core import journal
from csrm_jax.models import hf, sampling
from csrm_jax.reward import backbone

# Requests that come within this time of each other share a batch.
_GATHER_S = 0.02


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is asked, and how its replies are drawn.

  Attributes:
    init: the model: a Hugging Face folder, a hub id or a .gguf file.
    dtype: of weights and activations: float32 or bfloat16.
    seed: of the draws.
    temperature: of sampling.
    top_p: only the likeliest tokens that together reach it are drawn.
    max_tokens: a reply may have.
    num_unparsable: replies that are none, before the request is dropped.
    concurrency: requests a batch, at most.
  """

  init: str
  dtype: str = 'float32'
  seed: int = 0
  temperature: float = 0.7
  top_p: float = 1.0
  max_tokens: int = 800
  num_unparsable: int = 3
  concurrency: int = 8

  def __post_init__(self):
    if not self.init:
      raise ValueError(
        "the model's init is empty; give a folder, a hub id or a .gguf file,"
        ' as in --config.model.init=...'
      )
    for name in ('num_unparsable', 'concurrency', 'max_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} is {getattr(self, name)}; it must be >= 1')


@dataclasses.dataclass
class _Asked:
  """A prompt that waits for its text."""

  ids: list[int]
  draw: int
  text: str | None = None
  error: Exception | None = None


class LocalModel:
  """Asks a language model of ours. See `proposers.Proposer`.

  Threads may share it: requests that wait at the same time are answered in
  one batch. What a request is answered follows from the request and the seed,
  not from what it shares a batch with (up to rounding).
  """

  def __init__(self, settings: Settings, cache: journal.Cache):
    """Loads the model.

    Raises:
      ImportError: a package is missing that the source needs.
      ValueError: no such model, or none that can be asked.
    """
    self._settings = settings
    self._cache = cache
    self.name = settings.init
    self.concurrency = settings.concurrency
    self._digest = hf.digest(settings.init)
    self._tokenizer = backbone.load_tokenizer(settings.init)
    self._marks = backbone.chat_marks(settings.init, self._tokenizer)
    self._sampling = sampling.Sampling(
      max_completion_length=settings.max_tokens,
      temperature=settings.temperature,
      top_p=settings.top_p,
      stop_ids=_stop_ids(self._tokenizer, self._marks[1]),
    )
    self._model, self._params = hf.load(
      settings.init, dtype=settings.dtype, param_dtype=settings.dtype
    )
    self._lock = threading.Lock()  # Of what follows.
    self._counts = collections.Counter()
    self._waiting: list[_Asked] = []
    self._turn = threading.Lock()  # One batch at a time.

  def usage(self) -> dict[str, int]:
    """Returns counts of requests, batches, tokens and cache hits."""
    with self._lock:
      counts = dict(self._counts)
    return counts | {'corrupt_cache': self._cache.num_corrupt}

  def ask(self, request: requests.Request) -> Any:
    """Returns the typed reply, from the cache where it is there.

    Raises:
      NoReplyError: 'unparsable', or 'too_long' for the model's context.
      ValueError: the model's weights are not finite.
    """
    s = self._settings
    key = replies.make_key(
      request, (self._digest, s.dtype, s.seed, s.temperature, s.top_p, s.max_tokens)
    )
    return replies.ask(request, key, self._cache, self._write, s.num_unparsable, self._count)

  def _write(self, request: requests.Request, number: int) -> str:
    ids = self._encode(request)
    if len(ids) + self._settings.max_tokens > self._model.context_length:
      raise NoReplyError('too_long', f'{len(ids)} tokens')
    # Another draw for each try; the same one whenever it is asked.
    draw = (int(requests.digest(request)[:8], 16) + number) % 2**32
    asked = _Asked(ids, draw)
    with self._lock:
      self._waiting.append(asked)
    while asked.text is None and asked.error is None:
      with self._turn:  # Others gather while a batch is at work.
        if asked.text is None and asked.error is None:
          if self.concurrency > 1:
            time.sleep(_GATHER_S)
          with self._lock:
            batch = self._waiting[: self.concurrency]
            del self._waiting[: self.concurrency]
          self._answer(batch)
    if asked.error is not None:
      raise asked.error
    return asked.text

  def _answer(self, batch: Sequence[_Asked]) -> None:
    try:
      done = sampling.generate(
        self._model,
        self._params,
        [asked.ids for asked in batch],
        self._sampling,
        seed=self._settings.seed,
        draws=[asked.draw for asked in batch],
        batch_size=self.concurrency,
      )
    except Exception as error:  # Every thread that waits must hear of it.
      for asked in batch:
        asked.error = error
      return
    self._count(
      requests=len(batch),
      batches=1,
      prompt_tokens=sum(len(asked.ids) for asked in batch),
      reply_tokens=int(done.lengths.sum()),
    )
    for i, asked in enumerate(batch):
      num = done.lengths[i] - done.stopped[i]
      asked.text = self._tokenizer.decode(done.tokens[i, :num].tolist())

  def _encode(self, request: requests.Request) -> list[int]:
    # One turn of the user: not every chat template has a system's.
    text = '\n\n'.join(m['content'] for m in requests.make_messages(request))
    tokenizer, (prefix, suffix) = self._tokenizer, self._marks
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return (
      start
      + tokenizer.encode_control(prefix)
      + tokenizer.encode(text)
      + tokenizer.encode_control(suffix)
    )

  def _count(self, **counts: int) -> None:
    with self._lock:
      self._counts.update(counts)


def _stop_ids(tokenizer: Any, suffix: str) -> tuple[int, ...]:
  """Returns the ids that end an answer.

  Beside the end of the text, a control token that closes the user's turn:
  chat models close their own with the same one.
  """
  first = tokenizer.encode_control(suffix.strip())[:1]
  is_control = bool(first) and not tokenizer.decode(first)
  return tuple({tokenizer.eos_id, *(first if is_control else ())})
