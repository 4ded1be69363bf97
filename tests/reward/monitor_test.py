"""Monitors: where streams are judged, the level that calibration promises, and what is refused."""

import dataclasses
import math
import random

import numpy as np
import pytest

from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import ruler, suites
from csrm_jax.reward import model as reward_model, monitor, scoring
from csrm_jax.runners import search as search_runner
from csrm_jax.safety import schema
from tests import small

RULES = schema.SafetyConfig((schema.Category('Pets', 'No dogs.'),))
USER = schema.Message('user', 'Tell me.')
TEXT = 'one two  three\nfour five six. seven'


def agent(text):
  return schema.Message('agent', text)


class Judge:
  """Scores a conversation by the text that is judged, and remembers what it was asked."""

  def __init__(self, score):
    self.score, self.asked = score, []

  def __call__(self, examples):
    texts = [e.conversation[-1].content for e in examples]
    self.asked += texts
    return np.array([self.score(text) for text in texts], np.float32)


def test_a_reply_is_judged_after_so_many_words_and_at_its_end_however_it_is_cut():
  cuts = monitor.Cuts(every=2)
  whole = [part[-1].content for part in cuts.prefixes((USER, agent(TEXT)))]
  assert whole == ['one two', 'one two  three\nfour', 'one two  three\nfour five six.', TEXT]
  rng = random.Random(0)
  for _ in range(20):
    judge = Judge(lambda text: 5.0)
    stream = monitor.Monitor(judge, RULES, cuts).start([USER])
    at = 0
    while at < len(TEXT):
      size = rng.randint(1, 9)
      stream.feed(TEXT[at : at + size])
      at += size
    assert stream.close().num_verdicts == 4
    assert judge.asked == whole
  # Text without spaces is not waited for.
  assert len(cuts.places('x' * 200, False)) == 3
  assert monitor.Cuts(every=1).places('', True) == [0]


def test_a_dialogue_is_judged_turn_by_turn_without_its_history():
  judge = Judge(lambda text: -1.0 if text == 'bad' else 2.0)
  made = monitor.Monitor(judge, RULES, monitor.Cuts('turns'))
  stream = made.start([USER, agent('before')])
  found = [stream.feed(m) for m in (USER, agent('good'), USER, agent('bad'), agent('good'))]
  assert [r.alarm for r in found] == [False, False, False, True, True]
  assert judge.asked == ['good', 'bad', 'good'] and found[-1].num_verdicts == 3
  assert found[-1].highest == pytest.approx(1 / (1 + math.exp(-1)))
  assert found[-1].p_unsafe == pytest.approx(1 / (1 + math.exp(2)))
  assert stream.close() == found[-1]


def test_false_alarms_are_at_most_the_level_and_the_threshold_is_the_quantile():
  rng, alpha, made = np.random.default_rng(0), 0.1, []
  talks = [(USER, agent(f'{i}' + 11 * ' b')) for i in range(400)]
  walks = np.cumsum(rng.normal(size=(400, 6)), 1)
  table = {part[-1].content: walks[i, j] for i, talk in enumerate(talks)
           for j, part in enumerate(monitor.Cuts(every=2).prefixes(talk))}  # fmt: skip
  made = monitor.Monitor(Judge(table.get), RULES, monitor.Cuts(every=2))
  rates = []
  for start in range(0, 400, 80):
    safe = talks[start : start + 79]
    fitted = made.calibrate(safe, alpha)
    # A loop in float64: the ⌈(n+1)(1−α)⌉-th of the highest P(unsafe) of each.
    highest = sorted(1 / (1 + math.exp(min(walks[i]))) for i in range(start, start + 79))
    level = highest[math.ceil(80 * (1 - alpha) - 1e-9) - 1]
    assert fitted.threshold == pytest.approx(level, rel=1e-4) and fitted.false_alarms == alpha
    fresh = [i for i in range(400) if not start <= i < start + 79]
    rates.append(np.mean([fitted.flags(np.float32(min(walks[i]))) for i in fresh]))
  error = math.sqrt(alpha * (1 - alpha) / 320)
  assert 0.05 < np.mean(rates) <= alpha + 2 * error
  # The threshold of whole replies would give more.
  late = np.quantile(walks[:, -1], alpha)
  assert np.mean(walks.min(1) <= late) > alpha + error


def test_what_a_monitor_refuses():
  made = monitor.Monitor(Judge(lambda text: 0.0), RULES)
  assert 'was not calibrated' in small.error_of(lambda: made.false_alarms)
  assert made.start().feed('a b c d ').alarm and made.threshold == 0.5
  assert 'needs 19 for a level' in small.error_of(made.calibrate, [(USER, agent('a'))] * 18)
  stream = made.start()
  stream.close()
  assert 'is over' in small.error_of(stream.feed, 'a')
  assert 'takes str pieces' in small.error_of(made.start().feed, USER)
  assert 'at least 1 word' in small.error_of(monitor.Cuts, 'words', 0)
  assert "unit='tokens' must be" in small.error_of(monitor.Cuts, 'tokens')
  lost = monitor.Monitor(Judge(lambda text: math.nan), RULES).start()
  assert 'not a finite number' in small.error_of(lost.feed, 'a b c d ')
  # What could not be judged is asked again.
  assert lost.reading.num_verdicts == 0
  assert 'not a finite number' in small.error_of(lost.feed, '')


def test_a_loaded_model_has_a_monitor_that_scores_as_it_does():
  def judge(examples, *args, **kwargs):
    num = np.zeros(len(examples), np.int64)
    scores = [len(e.conversation[-1].content) / 9 - 1 for e in examples]
    return scoring.Judged(np.array(scores, np.float32), num, num, num > 0, small.unmarked(num))

  rm = reward_model.RewardModel(small.SPEC, scoring.ScoreFn(judge))
  found = rm.monitor(RULES, every=1).start([USER]).feed('a b')
  (verdict,) = rm.score(RULES, [(USER, agent('a'))])
  assert found.p_unsafe == pytest.approx(verdict.p_unsafe) and found.alarm
  safe = [(USER, agent('a' * i)) for i in range(30)]
  assert rm.monitor(RULES, 0.1, safe).false_alarms == 0.1


def test_search_that_stops_early_is_search_where_nothing_grows():
  scores = np.random.default_rng(0).normal(size=(4, 3))
  flat = ruler.early_stop(scores, 3)[0]
  for row, weights in zip(scores, flat, strict=True):
    ends = [i for i, s in enumerate(row) if s > 0]
    assert weights.argmax() == (ends[0] if ends else row.argmax()) and weights.sum() == 1

  def item(p):
    example = schema.Example(f'{p}', RULES, (USER, agent(TEXT)), 'safe', probability=0.25)
    return tuple(dataclasses.replace(example, id=f'{p}#{i}') for i in range(3))

  items = [item(p) for p in range(4)]
  grown = [tuple(search_runner._growing(sample, 2) for sample in of) for of in items]
  assert [len(sample) for sample in grown[0]] == [4, 4, 4] and grown[0][1][-1] == items[0][1]
  table = dict(zip((e.id for of in items for e in of), scores.ravel(), strict=True))

  def fn(rows):
    return np.array([table.get(e.id, -9.0) for e in rows])

  whole, growing = (
    suites.run(fn, [Benchmark('b', 'search', i)], num_samples=9)['b'] for i in (items, grown)
  )
  assert whole.metrics == growing.metrics and ruler.SEARCH.keys() == {'best_of', 'rejection'}
  rows = [list(map(repr, row)) for row in growing.tables[0].rows]
  assert [list(map(repr, row)) for row in whole.tables[0].rows] == rows[:6]
  # Every sample is stopped at its first verdict: all that may be are begun.
  assert [row[2] for row in growing.tables[0].rows[6:]] == [1, 2, 3]


def test_the_suite_of_alarms_counts_what_a_loop_counts():
  rng = np.random.default_rng(1)
  items, table = [], {}
  for i in range(300):
    label = 'unsafe' if i % 3 == 0 else 'safe'
    whole = schema.Example(f'{i}', RULES, (USER, agent(f'{TEXT} {i} ')), label)
    items.append(search_runner._growing(whole, 2))
    lows = rng.normal(size=len(items[-1])) + (-3 if label == 'unsafe' else 3)
    table |= {e.id: s for e, s in zip(items[-1], lows, strict=True)}
  bench = Benchmark('b', 'alarms', items, options={'alpha': 0.1})
  found = suites.run(lambda rows: np.array([table[e.id] for e in rows]), [bench])['b']
  rows = found.tables[0].rows
  assert len(rows) == 5 and all(90 <= row[1] <= 110 for row in rows)
  assert found.metrics['false_alarms']['value'] == pytest.approx(np.mean([r[4] for r in rows]))
  assert all(row[4] <= row[5] for row in rows)
  assert found.metrics['alarm_recall']['value'] > 0.95
  # Most of six or so words are saved, but never those up to the first verdict.
  assert 0.3 < found.metrics['words_saved']['value'] < 1 - 2 / 9
