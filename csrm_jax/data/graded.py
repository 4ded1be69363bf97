"""Readers of public sets whose labels are grades: ratings of answers, strengths of preferences.

Answers that are rated, not judged by rules, stand under none (`safety.augment.NO_RULES`) and have
no label: a head with these ratings learns from them, and pairs are ordered by which answer is
better. So a helpfulness reward is trained, see `rl.rewards.helpfulness_reward`.
"""

from __future__ import annotations

import itertools

from csrm_jax.core.checks import show
from csrm_jax.data.sources import Rows
from csrm_jax.data.tables import Files, Row, as_amount, read_rows
from csrm_jax.safety.augment import NO_RULES
from csrm_jax.safety.schema import Example, Message, Pair

HELPSTEER = ('helpfulness', 'correctness', 'coherence', 'complexity', 'verbosity')
ULTRAFEEDBACK = ('helpfulness', 'honesty', 'instruction_following', 'truthfulness')


def read_helpsteer2(path: Files) -> Rows:
  """Returns HelpSteer2's answers with their five ratings, 0 to 4."""

  def parse(row: Row):
    ratings = {name: row.amount(name) for name in HELPSTEER}
    yield _rated(f'helpsteer2/{row.number}', row['prompt'], row['response'], ratings, 'helpsteer2')

  return read_rows(path, ('prompt', 'response', *HELPSTEER), parse)


def read_helpsteer2_pairs(path: Files) -> Rows:
  """Returns the training split of HelpSteer2-Preference: strengths 1 to 3, and ties.

  A strength above 0 prefers the second answer.
  """

  def parse(row: Row):
    if row.one_of('split', ('train', 'validation')) == 'validation':
      yield 'validation'
      return
    strength = row.one_of('preference_strength', tuple(range(-3, 4)))
    sides = [
      _rated(f'helpsteer2/{row.number}/{i}', row['prompt'], row[f'response_{i}'], {}, 'helpsteer2')
      for i in (1, 2)
    ]
    yield from _pair(f'helpsteer2/{row.number}', sides if strength < 0 else sides[::-1], strength)

  columns = 'split', 'prompt', 'response_1', 'response_2', 'preference_strength'
  return read_rows(path, columns, parse)


def read_ultrafeedback(path: Files) -> Rows:
  """Returns UltraFeedback's answers with the ratings, 1 to 5, of those aspects that have one."""
  return read_rows(
    path,
    ('instruction', 'completions'),
    lambda row: (
      _rated(f'ultrafeedback/{row.number}/{i}', row['instruction'], text, ratings, 'ultrafeedback')
      for i, (text, ratings) in enumerate(_completions(row))
    ),
  )


def read_ultrafeedback_pairs(path: Files) -> Rows:
  """Returns every two of UltraFeedback's answers to a prompt, by the mean of their ratings.

  Its difference is the strength; equal means are ties. Answers that lack an aspect are left out.
  """

  def parse(row: Row):
    known = [(text, rated) for text, rated in _completions(row) if len(rated) == len(ULTRAFEEDBACK)]
    means = [sum(rated.values()) / len(rated) for _, rated in known]
    if len(known) < 2:
      yield 'not_rated'
    for i, j in itertools.combinations(range(len(known)), 2):
      best = (i, j) if means[i] >= means[j] else (j, i)
      name = f'ultrafeedback/{row.number}/{i}-{j}'
      sides = [
        _rated(f'{name}/{k}', row['instruction'], known[k][0], known[k][1], 'ultrafeedback')
        for k in best
      ]
      yield from _pair(name, sides, means[i] - means[j])

  return read_rows(path, ('instruction', 'completions'), parse)


def _completions(row: Row) -> list[tuple[str, dict[str, float]]]:
  """Returns (text, ratings by aspect) of each answer; 'N/A' is no rating."""
  answers = row['completions']
  if not isinstance(answers, list):
    raise ValueError(f'completions is {show(answers)}; it must be a list of objects')
  found = []
  for i, answer in enumerate(answers):
    try:
      aspects = answer['annotations']
      ratings = {name: aspects[name]['Rating'] for name in ULTRAFEEDBACK}
      text = answer['response']
    except (KeyError, TypeError) as error:
      raise ValueError(
        f'completion {i + 1} has no {error}; give UltraFeedback as published'
      ) from None
    known = {name: value for name, value in ratings.items() if value not in (None, 'N/A')}
    found.append(
      (text, {name: as_amount(value, f'Rating of {name}') for name, value in known.items()})
    )
  return found


def _rated(
  name: str, prompt: str, response: str | None, ratings: dict[str, float], source: str
) -> Example | str:
  """Returns an answer with its ratings, or why that cannot be."""
  for what, text in (('prompt', prompt), ('response', response)):
    if text is not None and not isinstance(text, str):
      raise ValueError(f'the {what} is {show(text)}, not text; correct it')
  if not (response or '').strip():
    return 'empty_response'
  talk = Message('user', prompt), Message('agent', response)
  return Example(name, NO_RULES, talk, ratings=ratings, source=source)


def _pair(name: str, sides: list[Example | str], strength: float):
  """Yields the pair (better, other), or why there is none."""
  for side in sides:
    if isinstance(side, str):
      yield side
      return
  if sides[0].conversation == sides[1].conversation:
    yield 'identical_pair'
  else:
    yield Pair(name, *sides, 'preference', strength=abs(strength))
