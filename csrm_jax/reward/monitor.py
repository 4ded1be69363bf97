"""A monitor of streams: verdicts while a reply grows, or turn by turn, and when to stop.

monitor = csrm_jax.load(workdir).monitor(safety, alpha=0.05, safe=conversations)
stream = monitor.start(history)
for piece in pieces:
  if stream.feed(piece).alarm: …
stream.close()

An alarm is raised at the first verdict below a threshold. A stream has many verdicts, so that a
threshold for whole replies gives more false alarms than it promises: that of a monitor is fitted on
the lowest score of each stream.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from csrm_jax.core import checks
from csrm_jax.evals import thresholds
from csrm_jax.reward import scoring
from csrm_jax.safety import schema

UNITS = ('words', 'turns')
# Words without spaces between them (Chinese, or an attack) are not waited for longer than this.
_WORD = re.compile(r'\S{1,32}')

Conversation = Sequence[schema.Message]
# Examples -> scores, float32 [N] nats.
ScoreFn = Callable[[Sequence[schema.Example]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Cuts:
  """Where streams are judged: the same in calibration as in use, however pieces are cut.

  Attributes:
    unit: 'words' judges one reply as it grows, after every so many words and at its end; 'turns' a
      dialogue, at the end of each message of the agent's.
    every: How many words lie between two verdicts.
  """

  unit: str = UNITS[0]
  every: int = 4

  def __post_init__(self):
    checks.one_of('unit', self.unit, UNITS)
    if self.every < 1:
      raise ValueError(f'every is {self.every}; at least 1 word lies between two verdicts')

  def places(self, text: str, is_over: bool) -> list[int]:
    """Returns the lengths at which a reply is judged that has come so far."""
    ends = [found.end() for found in _WORD.finditer(text)]
    # The last word may go on.
    whole = [end for end in ends if end < len(text)]
    found = whole[self.every - 1 :: self.every]
    return [*found, len(text)] if is_over else found

  def prefixes(self, conversation: Conversation, is_over: bool = True) -> list[tuple]:
    """Returns the conversations that are judged while this one comes about; the last is all of it.

    Of one that is not over, the last message is a reply that grows.
    """
    *history, last = conversation
    if self.unit == 'turns':
      ends = [i for i, m in enumerate(conversation, 1) if m.role == 'agent']
      return [tuple(conversation[:end]) for end in ends if is_over or end < len(conversation)]
    places = self.places(last.content, is_over)
    return [(*history, schema.Message('agent', last.content[:n])) for n in places]


def lowest(
  score_fn: ScoreFn,
  safety: Sequence[schema.SafetyConfig],
  conversations: Sequence[Conversation],
  cuts: Cuts,
) -> np.ndarray:
  """Returns the lowest score of each stream under its rules, float32 [N] in nats."""
  asked, sizes = [], []
  for i, (rules, conversation) in enumerate(zip(safety, conversations, strict=True)):
    schema.check_conversation(conversation)
    found = cuts.prefixes(conversation)
    asked += [schema.Example(f'stream {i}/{j}', rules, part) for j, part in enumerate(found)]
    sizes.append(len(found))
  return scoring.worst(np.asarray(score_fn(asked)), sizes)


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a monitor says so far."""

  p_unsafe: float | None  # of the last verdict; None before the first
  highest: float | None  # of all
  alarm: bool  # whether one of them was at the threshold; it stays
  num_verdicts: int


@dataclasses.dataclass(frozen=True)
class Monitor:
  """Rules and a threshold for streams under them; `start` begins one."""

  score_fn: ScoreFn
  safety: schema.SafetyConfig
  cuts: Cuts = Cuts()
  fitted: thresholds.Threshold | None = None  # without it alarms are at P(unsafe) of one half

  def calibrate(
    self, safe: Sequence[Conversation], alpha: float = 0.05, method: str = thresholds.METHODS[1]
  ) -> Monitor:
    """Returns the monitor with at most a share alpha of false alarms, see thresholds.fit.

    Args:
      safe: Conversations that are known to end safe, by people and not by this model, of the kind
        that will be watched. With unit 'turns' all of their turns are safe.

    Raises:
      ValueError: There are too few for alpha.

    Source: SAFE (arXiv 2506.09937) has a conformal band over time, by its abstract; that it is one
      level, of the stream's worst verdict, is ours: the finite-sample quantile of a maximum.
    """
    found = lowest(self.score_fn, [self.safety] * len(safe), safe, self.cuts)
    fitted = thresholds.fit(np.zeros(len(safe), bool), found, alpha, method)
    return dataclasses.replace(self, fitted=fitted)

  @property
  def false_alarms(self) -> float:
    """The share of safe streams that is alarmed at most; ValueError if nothing was calibrated."""
    if self.fitted is None:
      raise ValueError(
        'this monitor was not calibrated, so nobody knows how often it raises a false alarm; give '
        'monitor(safety, safe=CONVERSATIONS), which are known to end safe'
      )
    return self.fitted.level

  @property
  def threshold(self) -> float:
    """The P(unsafe) from which on there is an alarm."""
    return self.fitted.p_unsafe if self.fitted else 0.5

  def flags(self, score: float) -> bool:
    """Returns whether a verdict of this score, in nats, is an alarm."""
    return self.fitted.flags(score) if self.fitted else score <= 0

  def start(self, history: Conversation = ()) -> Stream:
    """Returns a stream that continues these messages."""
    return Stream(self, history)


class Stream:
  """One reply that grows, or one dialogue; see Monitor."""

  def __init__(self, monitor: Monitor, history: Conversation):
    self.monitor = monitor
    self._messages, self._text, self._over = list(history), '', False
    # What came before the stream is not judged.
    self._num_before = sum(message.role == 'agent' for message in history)
    self.reading = Reading(None, None, False, 0)

  def feed(self, piece: str | schema.Message) -> Reading:
    """Returns what is known once this piece has come: text of the reply, or a whole message.

    A verdict that cannot be given is the scorer's error; what was fed stays, and is judged with the
    next piece.

    Raises:
      ValueError: The stream is over, or the piece is of the other unit.
    """
    wants = schema.Message if self.monitor.cuts.unit == 'turns' else str
    if self._over or not isinstance(piece, wants):
      what = 'is over; start another' if self._over else f'takes {wants.__name__} pieces'
      raise ValueError(f'this stream, judged by {self.monitor.cuts.unit}, {what}')
    if isinstance(piece, schema.Message):
      self._messages.append(piece)
      turns = self.monitor.cuts.prefixes(self._messages)
      return self._judge(turns[self._num_before + self.reading.num_verdicts :])
    self._text += piece
    return self._judge(self._growing(is_over=False))

  def close(self) -> Reading:
    """Returns what is known of the whole stream; the end of a reply is judged."""
    ending = self.monitor.cuts.unit == 'words' and not self._over
    reading = self._judge(self._growing(is_over=True)) if ending else self.reading
    self._over = True
    return reading

  def _growing(self, is_over: bool) -> list[tuple]:
    reply = schema.Message('agent', self._text)
    found = self.monitor.cuts.prefixes((*self._messages, reply), is_over)
    return found[self.reading.num_verdicts :]

  def _judge(self, conversations: Sequence[tuple]) -> Reading:
    if not conversations:
      return self.reading
    asked = [schema.Example('the stream', self.monitor.safety, part) for part in conversations]
    scores = np.asarray(self.monitor.score_fn(asked))
    p_unsafe, _ = scoring.probabilities(scores)
    alarm = any(map(self.monitor.flags, scores.tolist()))
    before = self.reading
    self.reading = Reading(
      p_unsafe=float(p_unsafe[-1]),
      highest=max(before.highest or 0.0, float(p_unsafe.max())),
      alarm=before.alarm or alarm,
      num_verdicts=before.num_verdicts + len(conversations),
    )
    return self.reading
