"""The device loop of the server: rows of fixed shapes, compiled before the first request.

A prompt is one conversation under one set of rules. What the rules come to is read once, and kept
as keys and values (a prefix); a row of a batch holds what follows one prefix: prompts, one after
another, in which shared first tokens stand once (see data.sharing). Rows may stand under different
rules. Programs are compiled for all shapes ahead of time and called as they are, so that nothing
can compile later; each batch gets the shape that suits what waits.

Any thread may encode and submit; one thread forms batches and asks the device.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.core import mesh as mesh_lib
from csrm_jax.data import features, sharing
from csrm_jax.evals.metrics import Calibration
from csrm_jax.models import transformer
from csrm_jax.reward import combiners, heads, model as reward_model, plans, scoring
from csrm_jax.safety import schema, templates
from csrm_jax.text.tokenizer import Tokenizer

# Rule sets whose tokens are remembered; what they take on the device is bounded in bytes.
_MAX_RULE_SETS = 4096
# How fast the known pace of the device follows that of the last batch.
_SMOOTHING = 0.1
# A batch is chosen among so many times the tokens that it may hold.
_LOOK_AHEAD = 2
# How many rows a batch may have: a full one, this part of it, this part of that, ... and 1.
_ROWS_STEP = 16
# Batches that fail in a row before the engine counts as broken.
_MAX_FAILURES = 3

Key = tuple[int, int]  # (prefix length, row length)
Shape = tuple[int, int, int]  # both, and the number of rows
Prefix = tuple[dict[str, jax.Array], ...]  # of each member
_BATCH = ('tokens', 'positions', 'segment_ids', 'ends')


_COMPILED = '/jax/core/compile/backend_compile_duration'


@functools.cache
def _compilations() -> list[float]:
  """Returns the list that grows with each program this process compiles."""
  seconds: list[float] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, duration, **_: seconds.append(duration) if name == _COMPILED else None
  )
  return seconds


def num_compilations() -> int:
  """Returns how many programs this process has compiled since it was first asked."""
  return len(_compilations())


class TooLongError(ValueError):
  """Rules or a conversation do not fit into the lengths that are compiled."""


class NotReadyError(Exception):
  """The engine still compiles, or was closed."""


class OverloadedError(Exception):
  """The queue is as long as the deadline allows; try again after `retry_s` seconds."""

  def __init__(self, retry_s: float):
    super().__init__(f'the queue is full; try again in {retry_s:.0f} s')
    self.retry_s = retry_s


class LateError(Exception):
  """The device could not take an accepted request in time."""


@dataclasses.dataclass(frozen=True)
class Lengths:
  """The shapes that are compiled, in tokens.

  Attributes:
    prefix: What rules may come to; a set is padded to the next of these.
    row: What may follow the rules, likewise.
    max_length: What both may come to together.
    call_tokens: About how many go through the model at once; 0 for the device's default.
  """

  prefix: tuple[int, ...]
  row: tuple[int, ...]
  max_length: int
  call_tokens: int = 0

  def __post_init__(self):
    for name in ('prefix', 'row'):
      values = tuple(sorted(set(getattr(self, name))))
      if not values or values[0] < 1:
        raise ValueError(f'the {name} lengths are {values}; give at least one, none below 1')
      object.__setattr__(self, name, values)
    if self.max_length < 2 or self.call_tokens < 0:
      raise ValueError(
        f'max_length is {self.max_length} and call_tokens {self.call_tokens}; the first must be '
        'above 1, the second not below 0'
      )

  def pairs(self) -> list[Key]:
    """Returns the pairs of lengths that some prompt of at most max_length tokens needs."""
    pairs = [list(zip((0, *lengths), lengths, strict=False)) for lengths in (self.prefix, self.row)]
    # Shorter prompts than one more than both shorter lengths need a smaller pair.
    return [
      (prefix, row)
      for (less, prefix), (fewer, row) in itertools.product(*pairs)
      if less + fewer + 2 <= self.max_length
    ]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class RuleSet:
  """Rules as the model reads them, before any conversation."""

  tokens: np.ndarray  # int32, the BOS first if there is one
  num_segments: int  # how many segments of the template they are
  length: int  # the prefix length they are padded to
  digest: bytes


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Row:
  """One conversation under one set of rules, ready for the device."""

  rules: RuleSet
  tokens: np.ndarray  # int32, what follows the rules
  length: int  # the shortest row length that holds them
  num_cut: int  # tokens that were cut out to make it fit
  outside: str = ''  # what is unlike the training data, see domain.Domain.marks
  unread: float = 0.0  # the share of the prompt's tokens that were cut out

  @property
  def key(self) -> Key:
    return self.rules.length, self.length


@dataclasses.dataclass(eq=False, slots=True)
class _Job:
  """The rows of one request."""

  future: concurrent.futures.Future
  scores: np.ndarray
  num_left: int
  start: float


Item = tuple[Row, _Job, int]  # and which of the job's rows it is


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
  """What goes to the device at once; there may be fewer rows than the shape has."""

  shape: Shape
  rows: list[list[Item]]


@dataclasses.dataclass
class Stats:
  """What has happened so far; /metrics shows it."""

  num_rows: int = 0  # conversations under rules that were scored
  num_tokens: int = 0  # their tokens behind the rules
  num_places: int = 0  # tokens that the batches had room for
  num_batches: int = 0
  num_prefixes_read: int = 0
  num_prefix_hits: int = 0
  num_evictions: int = 0
  num_failures: int = 0  # batches that failed
  num_late: int = 0
  num_cancelled: int = 0
  num_programs: int = 0
  warm_up_s: float = 0.0


class Engine:
  """Scores rows; see the module."""

  def __init__(
    self,
    spec: reward_model.Spec,
    params: Any,
    tokenizer: Tokenizer,
    lengths: Lengths,
    *,
    prefix_bytes: int,
    wait_s: float,
    deadline_s: float,
    allow_out_of_domain: bool = False,
    calibration: Calibration | None = None,
    others: Sequence[tuple[Any, Calibration | None]] = (),
    combine: str = 'mean',
  ):
    """Takes a model; `start` compiles.

    Args:
      prefix_bytes: What read rules may take on the device; those used longest ago go first.
      wait_s: How long a batch waits for more rows while the device is idle.
      deadline_s: Requests that would wait longer are refused; those that waited twice as long fail.
      allow_out_of_domain: Whether text is judged that is in words foreign to the model.
      calibration: What all scores are changed by.
      others: Parameters of further models of this spec, with their calibrations.
      combine: What is made of all their scores, see reward.combiners.
    """
    self.spec, self.tokenizer, self.lengths = spec, tokenizer, lengths
    self.allow_out_of_domain = allow_out_of_domain
    self._calibrations = [calibration, *(fitted for _, fitted in others)]
    self._join = combiners.choose(combine)
    guard = templates.GUARDS.get(spec.layout.format)
    self.per_category = bool(guard and guard.per_category)
    self.prefix_bytes, self.wait_s, self.deadline_s = prefix_bytes, wait_s, deadline_s
    self.stats, self.ready, self.broken = Stats(), False, ''
    self.rule_set = functools.lru_cache(_MAX_RULE_SETS)(self._read_rules)
    self._params = params, *(other for other, _ in others)
    self._bodies = tuple(map(heads.body, self._params))
    num_compilations()  # It counts from here on.
    with mesh_lib.of(params):
      kind = 'cpu' if mesh_lib.platform() == 'cpu' else 'other'
      keys = plans.costs_of(spec.model, kind).keys
    call_tokens = lengths.call_tokens or plans.CALL_TOKENS[kind]
    self._call_tokens = call_tokens * mesh_lib.num_row_parts(params)
    # The places of each shape, each weighed by how much it attends to.
    self._work: dict[Shape, float] = {
      (prefix, length, rows): rows * length * (1 + (prefix + length / 2) / keys)
      for prefix, length in lengths.pairs()
      for rows in _row_counts(self._call_tokens, length)
    }
    self._programs: dict[Any, Any] = {}  # shape or prefix length -> compiled
    self._call_s, self._place_s = 0.0, 0.0  # what a batch takes, and each of its places more
    self._row_s: dict[Key, float] = {}  # a row's share of a full batch
    self._pace, self._settled = 1.0, 0.0  # how many times as long batches take now
    self._prefixes: collections.OrderedDict[bytes, Prefix] = collections.OrderedDict()
    self._queues = {prefix: collections.deque() for prefix in lengths.prefix}
    self._queued_s, self._changed = 0.0, threading.Condition()
    self._closed, self._failures = False, 0
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

  # --- Encoding ------------------------------------------------------------------------

  def _read_rules(self, safety: schema.SafetyConfig) -> RuleSet:
    # Any conversation tells which segments come before it.
    probe = schema.Message('user', 'x'), schema.Message('agent', 'x')
    segments = templates.render(safety, probe, self.spec.layout)
    kinds = [segment.kind for segment in segments]
    stop = next(i for i, kind in enumerate(kinds) if kind in ('history', 'response'))
    rules = [i for i in range(stop) if kinds[i] == 'rules']
    stop = rules[-1] + 1 if rules else stop
    tokens = list(
      itertools.chain.from_iterable(features.segment_tokens(segments[:stop], self.tokenizer))
    )
    if self.tokenizer.bos_id is not None:
      tokens = [self.tokenizer.bos_id, *tokens]
    length = next((n for n in self.lengths.prefix if n >= len(tokens)), None)
    if length is None:
      raise TooLongError(
        f'the rules take {len(tokens)} tokens, this server reads at most {self.lengths.prefix[-1]};'
        ' shorten them or keep the most relevant categories'
      )
    array = np.array(tokens, np.int32)
    return RuleSet(array, stop, length, hashlib.sha256(array.tobytes()).digest())

  def check(self, safety: schema.SafetyConfig) -> None:
    """Raises TooLongError for rules that are too long, together or one alone."""
    alone = [schema.SafetyConfig((category,)) for category in safety.categories]
    for rules in alone if self.per_category else (safety, *alone):
      self.rule_set(rules)

  def encode(
    self, safety: schema.SafetyConfig, conversation: Sequence[schema.Message], cut: bool = False
  ) -> Row:
    """Returns the row of a conversation; one that is too long is cut only if `cut`.

    Raises:
      ValueError: It does not end with the agent's message.
      TooLongError: The rules, or both, do not fit.
      OutOfDomainError: The words are foreign to the model.
    """
    domain = self.spec.domain
    if domain and not self.allow_out_of_domain:
      domain.require('this request', safety, conversation)
    rules = self.rule_set(safety)
    segments = templates.render(safety, conversation, self.spec.layout)
    parts = features.segment_tokens(segments[rules.num_segments :], self.tokenizer)
    size, num_cut = sum(map(len, parts)), 0
    room = min(self.lengths.max_length - len(rules.tokens), self.lengths.row[-1])
    if size > room:
      if not cut:
        raise TooLongError(
          f'the conversation takes {size} tokens beside the {len(rules.tokens)} of its rules, and '
          f'at most {max(room, 0)} fit; shorten it, or ask for "shorten": true'
        )
      limit = len(rules.tokens) + room
      whole = features.encode_segments(segments, self.tokenizer, limit)
      if isinstance(whole, features.Dropped):
        raise TooLongError(f'{whole.reason}: {whole.detail}')
      parts, num_cut = whole.tokens[rules.num_segments :], whole.num_cut
    tokens = np.fromiter(itertools.chain.from_iterable(parts), np.int32)
    length = next(n for n in self.lengths.row if n >= len(tokens))
    total = len(rules.tokens) + size
    marks = domain.marks(safety, conversation, total) if domain else ''
    return Row(rules, tokens, length, num_cut, marks, num_cut / total)

  # --- The queue -----------------------------------------------------------------------

  @property
  def queued_s(self) -> float:
    """The seconds that the device will take for all rows that wait."""
    return self._queued_s * self._pace

  @property
  def num_queued(self) -> int:
    return sum(map(len, self._queues.values()))

  @property
  def prefix_cache_bytes(self) -> int:
    return sum(map(_num_bytes, list(self._prefixes.values())))

  def check_room(self, cost_s: float = 0.0) -> None:
    """Raises what `submit` does where rows that take cost_s would find no room."""
    if not self.ready or self._closed:
      raise NotReadyError('the server is not ready; wait until /ready says so')
    wait_s = (self._queued_s + cost_s) * self._pace
    # Whatever its size, a request is taken where nothing waits.
    if self._queued_s > 0 and wait_s > self.deadline_s:
      raise OverloadedError(max(wait_s - self.deadline_s, 1.0))

  def submit(self, rows: Sequence[Row]) -> concurrent.futures.Future:
    """Returns the future scores of the rows, float32 [N] in nats, all finite.

    A future that is cancelled in time costs nothing. It fails with LateError, or with the error of
    the device.

    Raises:
      NotReadyError, OverloadedError: Nothing was queued.
    """
    job = _Job(
      concurrent.futures.Future(), np.zeros(len(rows), np.float32), len(rows), time.monotonic()
    )
    with self._changed:
      cost = sum(self._row_s.get(row.key, 0.0) for row in rows)
      self.check_room(cost)
      self._queued_s += cost
      for place, row in enumerate(rows):
        self._queues[row.rules.length].append((row, job, place))
      self._changed.notify()
    return job.future

  def _take(self, is_busy: bool) -> _Batch | None:
    """Returns the next batch; None if nothing waits, or only a little and the device is busy.

    Waits for rows unless the device is busy.
    """
    with self._changed:
      while True:
        now = time.monotonic()
        heads = [(queue[0][1].start, prefix) for prefix, queue in self._queues.items() if queue]
        if heads:
          start, prefix = min(heads)
          waited = now - start
          if self._closed or self._is_full(prefix) or (not is_busy and waited >= self.wait_s):
            return self._pop(prefix, now)
          if not is_busy:
            self._changed.wait(self.wait_s - waited)
            continue
        if is_busy or self._closed:
          return None
        self._changed.wait()

  def _is_full(self, prefix: int) -> bool:
    room = self._call_tokens
    for row, _, _ in self._queues[prefix]:
      room -= len(row.tokens)
      if room <= 0:
        return True
    return False

  def _pop(self, prefix: int, now: float) -> _Batch:
    """Returns a batch with the row that waited longest, and what goes well with it."""
    queue, found, num_tokens = self._queues[prefix], [], 0
    while queue and num_tokens < _LOOK_AHEAD * self._call_tokens:
      row, job, _ = item = queue.popleft()
      if job.future.done():
        self.stats.num_cancelled += job.future.cancelled()
      elif now - job.start > 2 * self.deadline_s:
        self.stats.num_late += 1
        _fail(job, LateError(f'the request waited more than {2 * self.deadline_s:g} s'))
      else:
        found.append(item)
        num_tokens += len(row.tokens)
        continue
      self._queued_s -= self._row_s[row.key]
    shape, rows = self._choose(prefix, [row for row, _, _ in found])
    taken = {i for row in rows for i in row}
    queue.extendleft(found[i] for i in reversed(range(len(found))) if i not in taken)
    self._queued_s -= sum(self._row_s[found[i][0].key] for i in taken)
    if not self.num_queued:
      self._queued_s = 0.0
    return _Batch(shape, [[found[i] for i in row] for row in rows])

  def _choose(self, prefix: int, waiting: Sequence[Row]) -> tuple[Shape, list[list[int]]]:
    """Returns the shape that scores most tokens a second, and who of those waiting is in each row.

    The first of them is in any case.
    """
    best, rate = ((prefix, 0, 0), []), 0.0
    num_tokens = sum(len(row.tokens) for row in waiting)
    seconds = {
      shape: self._call_s + self._place_s * work
      for shape, work in self._work.items()
      if waiting and shape[0] == prefix and shape[1] >= waiting[0].length
    }

    def most(shape):  # tokens a second, if nothing is shared
      return min(shape[1] * shape[2], num_tokens) / seconds[shape]

    for shape in sorted(seconds, key=most, reverse=True):
      if rate and most(shape) <= rate:
        break
      rows = _fill(waiting, *shape[1:])
      here = sum(len(waiting[i].tokens) for row in rows for i in row) / seconds[shape]
      if here > rate:
        best, rate = (shape, rows), here
    return best

  # --- The device ----------------------------------------------------------------------

  def start(self) -> None:
    """Begins to compile, in the background; `ready` is true when it is done."""
    self._thread.start()

  def wait_until_ready(self, timeout_s: float | None = None) -> None:
    """Waits until all programs are compiled; raises what went wrong."""
    with self._changed:
      self._changed.wait_for(lambda: self.ready or self.broken, timeout_s)
    if not self.ready:
      raise NotReadyError(self.broken or 'the engine is not ready yet')

  def close(self) -> None:
    """Scores all that was accepted, and ends."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
    if self._thread.ident:
      self._thread.join()

  def _run(self) -> None:
    try:
      with mesh_lib.of(self._params):
        self._warm_up()
        self._loop()
    except Exception as error:  # The loop must not end silently: /health says that it did.
      logging.getLogger(__name__).exception('the engine stopped: %s', type(error).__name__)
      with self._changed:
        self.broken = self.broken or f'{type(error).__name__}: {error}'
        self.ready = False
        waiting = [item for queue in self._queues.values() for item in queue]
        for _, job, _ in waiting:
          _fail(job, error)
        self._changed.notify_all()

  def _warm_up(self) -> None:
    start = time.monotonic()
    wanted: list[Any] = sorted({prefix for prefix, _, _ in self._work})
    wanted += self._work
    # The compiler leaves the interpreter to others.
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
      for name, program in zip(wanted, pool.map(self._compile, wanted), strict=True):
        self._programs[name] = program
        self.stats.num_programs += 1
    self._measure()
    self.stats.warm_up_s = time.monotonic() - start
    with self._changed:
      self.ready = True
      self._changed.notify_all()

  def _measure(self) -> None:
    """Finds what batches take from the least one and the largest."""
    work, seconds = self._work, []
    shapes = [choose(work, key=work.get) for choose in (min, max)]
    for prefix, length, count in shapes:
      rules, times = RuleSet(np.ones(1, np.int32), 0, prefix, b''), []
      rows = [[Row(rules, np.ones(1, np.int32), length, 0)]] * count
      prefixes = [self._read(rules)] * count
      for _ in range(2):  # The first call also finds its memory.
        before = time.monotonic()
        np.asarray(self._compute((prefix, length, count), rows, prefixes))
        times.append(time.monotonic() - before)
      seconds.append(min(times))
    (little, much), (few, many) = seconds, (work[shape] for shape in shapes)
    # There may be one shape, or noise.
    grows = many > few and much > little
    self._place_s = (much - little) / (many - few) if grows else much / many
    self._call_s = max(little - self._place_s * few, 0.0)
    # The last shape of a key has the most rows.
    self._row_s = {
      shape[:2]: (self._call_s + self._place_s * places) / shape[2]
      for shape, places in work.items()
    }

  def _compile(self, wanted: Any) -> Any:
    """Returns the program of a shape, or of a prefix length alone."""
    cfg = self.spec.model

    def read(bodies, *rows):
      return tuple(transformer.read_prefix(cfg, body, *rows) for body in bodies)

    with mesh_lib.of(self._params):
      # Every device of a mesh has all prefixes; rows are cut between them.
      mesh = jax.sharding.get_mesh()
      everywhere = None if mesh.empty else mesh_lib.replicated(mesh)
      shape_of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=everywhere)
      program = jax.jit(read, out_shardings=everywhere)
      if isinstance(wanted, int):
        return program.lower(self._bodies, *[shape_of((1, wanted))] * 3).compile()
      prefix, length, rows = wanted
      kept = jax.eval_shape(program, self._bodies, *[shape_of((1, prefix))] * 3)
      batch = {name: shape_of((rows, length)) for name in _BATCH}
      batch['verdict_index'] = shape_of((rows, plans.num_slots(length)))
      verbalizers = self.spec.verbalizers(self.tokenizer)
      compute = jax.jit(functools.partial(_score_rows, cfg, verbalizers, self.spec.head))
      return compute.lower(self._params, batch, (kept,) * rows).compile()

  def _loop(self) -> None:
    pending: collections.deque = collections.deque()
    while True:
      batch = self._take(is_busy=bool(pending))
      if batch and batch.rows:
        with self._reported(batch):
          pending.append((batch, time.monotonic(), self._dispatch(batch)))
      elif not pending and self._closed and not self.num_queued:
        return
      # One batch may be on its way while the next is made.
      if pending and (len(pending) > 1 or not batch):
        batch, start, scores = pending.popleft()
        with self._reported(batch):
          self._settle(batch, start, np.asarray(scores))
          self._failures, self.broken = 0, ''

  @contextlib.contextmanager
  def _reported(self, batch: _Batch) -> Iterator[None]:
    """Fails the jobs of a batch, and only these, with what goes wrong within."""
    try:
      yield
    except Exception as error:  # A batch that fails must not end the loop.
      logging.getLogger(__name__).error('a batch failed: %s', type(error).__name__)
      self.stats.num_failures += 1
      self._failures += 1
      if self._failures >= _MAX_FAILURES:
        self.broken = 'the device fails'
      for _, job, _ in itertools.chain.from_iterable(batch.rows):
        _fail(job, error)

  def _dispatch(self, batch: _Batch) -> jax.Array:
    rows = [[row for row, _, _ in items] for items in batch.rows]
    return self._compute(batch.shape, rows, [self._prefix(row[0].rules) for row in rows])

  def _settle(self, batch: _Batch, start: float, scores: np.ndarray) -> None:
    # The device began when it was asked, or when it was done with the batch before.
    now = time.monotonic()
    seconds, self._settled = now - max(start, self._settled), now
    expected = self._call_s + self._place_s * self._work[batch.shape]
    self._pace += _SMOOTHING * (seconds / expected - self._pace)
    items = list(itertools.chain.from_iterable(batch.rows))
    self.stats.num_batches += 1
    self.stats.num_rows += len(items)
    self.stats.num_tokens += sum(len(row.tokens) for row, _, _ in items)
    self.stats.num_places += batch.shape[1] * batch.shape[2]
    scores = self._combine(scores)
    found = [
      score for row, own in zip(batch.rows, scores, strict=False) for score in own[: len(row)]
    ]
    for (_, job, place), score in zip(items, found, strict=True):
      if not np.isfinite(score):
        _fail(job, ValueError('a score is not a finite number; look at the weights'))
        continue
      job.scores[place] = score
      job.num_left -= 1
      if not job.num_left:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # It was cancelled.
          job.future.set_result(job.scores)

  def _combine(self, scores: np.ndarray) -> np.ndarray:
    """Returns the scores [B,S], given those of each member, [M,B,S]."""
    each = [
      fitted.apply(row) if fitted else row
      for row, fitted in zip(scores, self._calibrations, strict=True)
    ]
    return self._join(np.stack(each)) if len(each) > 1 else each[0]

  def _prefix(self, rules: RuleSet) -> Prefix:
    """Returns the keys and values of rules; those used last are kept."""
    found = self._prefixes.get(rules.digest)
    if found is not None:
      self._prefixes.move_to_end(rules.digest)
      self.stats.num_prefix_hits += 1
      return found
    found = self._read(rules)
    self.stats.num_prefixes_read += 1
    self._prefixes[rules.digest] = found
    while len(self._prefixes) > 1 and self.prefix_cache_bytes > self.prefix_bytes:
      self._prefixes.popitem(last=False)
      self.stats.num_evictions += 1
    return found

  def _read(self, rules: RuleSet) -> Prefix:
    num, padding = len(rules.tokens), (0, rules.length - len(rules.tokens))
    tokens, used = (np.pad(x, padding)[None] for x in (rules.tokens, np.ones(num, np.int32)))
    positions = np.arange(rules.length, dtype=np.int32)[None]
    return self._programs[rules.length](self._bodies, tokens, positions, used)

  def _compute(
    self, shape: Shape, rows: Sequence[Sequence[Row]], prefixes: list[Prefix]
  ) -> jax.Array:
    """Returns each member's scores of a batch, [M, rows, slots]; a row continues its prefix."""
    _, length, count = shape
    batch = {name: np.zeros((count, length), np.int32) for name in _BATCH}
    batch['verdict_index'] = np.zeros((count, plans.num_slots(length)), np.int32)
    for r, row in enumerate(rows):
      read = sharing.walk([one.tokens for one in row])
      sharing.write(batch, r, read, len(row[0].rules.tokens))
    prefixes = [*prefixes, *[prefixes[0]] * (count - len(rows))]
    return self._programs[shape](self._params, batch, tuple(prefixes))


# --- The seam to the model -------------------------------------------------------------


def _score_rows(
  cfg, verbalizers, head: str, members, batch, prefixes: tuple[Prefix, ...]
) -> jax.Array:
  """Returns each member's scores, [M,B,S] in nats, of the prompts of each row.

  Row b continues prefix b.
  """
  axes, scores = {'key': 1, 'value': 1, 'segment_ids': 0}, []
  for m, params in enumerate(members):
    prefix = {
      name: jnp.concatenate([prefix[m][name] for prefix in prefixes], axis)
      for name, axis in axes.items()
    }
    safe, unsafe = scoring.verdict_logprobs(cfg, params, batch, verbalizers, prefix, head)
    scores.append(safe - unsafe)
  return mesh_lib.constrain(jnp.stack(scores))


def _row_counts(call_tokens: int, length: int) -> tuple[int, ...]:
  """Returns how many rows a batch may have, the fewest first."""
  counts = {1}
  most = plans.most_rows(call_tokens, length)
  while most > 1:
    counts.add(most)
    most //= _ROWS_STEP
  return tuple(sorted(counts))


def _fill(waiting: Sequence[Row], length: int, count: int) -> list[list[int]]:
  """Returns who of those waiting stands in each of at most `count` rows; first come, first served.

  A row is for one set of rules.
  """
  rows: list[list[int]] = []
  rooms: list[int] = []
  by_rules: dict[bytes, list[int]] = {}
  slots, left = plans.num_slots(length), count * length
  for i, new in enumerate(waiting):
    tokens, own = new.tokens, by_rules.setdefault(new.rules.digest, [])
    for r in own:
      # What it shares with the last one is no more than what it shares with all of them.
      size = len(tokens) - sharing.num_common(tokens, waiting[rows[r][-1]].tokens)
      if size <= rooms[r] and len(rows[r]) < slots:
        rows[r].append(i)
        break
    else:
      if len(rows) == count or len(tokens) > length:
        continue
      r, size = len(rows), len(tokens)
      rows.append([i])
      rooms.append(length)
      own.append(r)
    rooms[r] -= size
    left -= size
    if not left:
      break
  return rows


def _num_bytes(prefix: Prefix) -> int:
  return sum(array.nbytes for array in jax.tree.leaves(prefix))


def _fail(job: _Job, error: Exception) -> None:
  with contextlib.suppress(concurrent.futures.InvalidStateError):  # It was cancelled, or failed.
    job.future.set_exception(error)
