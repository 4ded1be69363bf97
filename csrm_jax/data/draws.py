"""Training examples drawn from judged texts: which text, under which of its rules, in which words.

Real texts break few rules, and each rule has a rate of its own. Drawn as they come, the rare rules
teach nothing; drawn evenly, the score learns a wrong rate. So each rule's texts are drawn with a
chosen share of unsafe ones, and the loss is told by how much that moves the log odds (`offset`):
the score stays that of the natural rate.

Source: for the offset, Menon et al. 2021, Long-tail learning via logit adjustment (2007.07314).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.core import checks, files
from csrm_jax.data import judged
from csrm_jax.data.judged import FOLDER, Judged
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig

# How many rules an example has, and the probability of each.
NUM_RULES = {1: 0.5, 2: 0.15, 3: 0.15, 5: 0.1, 8: 0.06, 16: 0.04}
# The most neutral sentences that are put around what is judged.
MOST_NEUTRAL = 24
TRIES = 8


def split(items: Sequence[Any], sides: Sequence[str]) -> tuple[list[Any], list[Any]]:
  """Returns (items on one of the sides, the others); see `judged.group_of`."""
  for name in sides:
    checks.one_of('config.data.judged.sides', name, judged.SIDES)
  parts: tuple[list[Any], list[Any]] = ([], [])
  for item in items:
    parts[judged.side(judged.group_of(item)) not in sides].append(item)
  return parts


class Group(NamedTuple):
  """Examples that share their text or their rules, and the log odds their draw added to "safe"."""

  examples: tuple[Example, ...]
  offsets: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Options:
  """How examples are drawn; see configs/rm.py."""

  sides: tuple[str, ...] = ()  # those of judged.SIDES that are trained on; () to hold a share out
  fold: str = ''  # the rules that are left out, see judged.Rule
  order: str = 'rules_first'  # a group shares what the prompt begins with
  group_size: int = 1
  unsafe: float = 0.4  # the share of unsafe examples of each rule
  pairs: float = 0.0  # the share of strictness pairs, where rules contain each other
  prior: str = 'rule'  # whose rate the score keeps: each 'rule' its own, or 'none'
  noise: float = 0.0  # the share of texts with something around them that means nothing

  def __post_init__(self):
    checks.one_of('config.data.judged.fold', self.fold, ('', *judged.FOLDS))
    checks.one_of('config.data.judged.prior', self.prior, ('rule', 'none'))
    for name in ('unsafe', 'pairs', 'noise'):
      value = getattr(self, name)
      if not 0 <= value < 1 or (name == 'unsafe' and not value):
        raise ValueError(f'config.data.judged.{name}={value} is a share; give one from 0 to 1')


class Draw:
  """Draws groups and strictness pairs: (seed, index) -> one of them, for `sources.Generated`."""

  def __init__(self, items: Sequence[Judged], options: Options):
    self.items, self.options = list(items), options
    used = {key for item in self.items for key in item.verdicts}
    known = {}
    for name in sorted({key.partition('/')[0] for key in used}):
      known |= judged.rules(name)
    self.rules = [r for k, r in known.items() if k in used and r.is_seen(options.fold)]
    column = {rule.key: i for i, rule in enumerate(self.rules)}
    # [texts, rules]: whether it is broken, NaN where nobody judged.
    self.broken = np.full((len(self.items), len(self.rules)), np.nan, np.float32)
    for row, item in enumerate(self.items):
      for key, share in item.verdicts.items():
        if key in column:
          self.broken[row, column[key]] = share >= 0.5
    num_broken, num_kept = (self.broken == 1).sum(0), (self.broken == 0).sum(0)
    # A rule that every text breaks, or none, teaches what to say without reading.
    self.drawn = np.flatnonzero((num_broken > 0) & (num_kept > 0))
    if not len(self.drawn):
      raise ValueError('judged texts: no rule has texts that break it and texts that keep it')
    self.rate = (num_broken + 1) / (num_broken + num_kept + 2)
    # Rules with few texts are drawn less often, or the same few would come again and again.
    weight = np.sqrt(np.minimum(num_broken, num_kept)[self.drawn])
    self.weight = weight / weight.sum()
    self.cells = {
      (rule, value): np.flatnonzero(self.broken[:, rule] == value)
      for rule in self.drawn
      for value in (0, 1)
    }
    # (laxer, stricter) rules: what breaks the first breaks the second.
    self.nested = [
      (column[rule.key], column[key])
      for rule in self.rules
      for key in rule.stricter
      if key in column
    ]

  def __call__(self, seed: int, index: int) -> Group | Pair:
    rng, name = np.random.default_rng([seed, index]), f'{self.items[0].source}/{index}'
    if self.nested and rng.random() < self.options.pairs:
      pair = self._pair(rng, name)
      if pair is not None:
        return pair
    return self._group(rng, name)

  def _group(self, rng, name):
    options = self.options
    first = self.drawn[rng.choice(len(self.drawn), p=self.weight)]
    text = int(rng.choice(self.cells[first, self._draw_label(rng)]))
    rules = self._add_rules(rng, text, first)
    texts, sets = [text], [rules]
    for _ in range(options.group_size - 1):
      if options.order == 'rules_first':
        other = self._draw_text(rng, rules, self._draw_label(rng))
        if other is not None and other not in texts:
          texts.append(other)
          sets.append(rules)
      else:
        one = self._draw_rule(rng, text, self._draw_label(rng))
        if one is not None:
          texts.append(text)
          sets.append(self._add_rules(rng, text, one))
    # Examples of a group that share their rules share their words, and those that share their text
    # what stands around it: else they would share no tokens.
    worded = self._word(rng, rules) if options.order == 'rules_first' else None
    noise = self._draw_noise(rng) if options.order != 'rules_first' else None
    examples, offsets = [], []
    for i, (text, rules) in enumerate(zip(texts, sets, strict=True)):
      examples.append(
        self._example(f'{name}/{i}', rng, text, rules, worded or self._word(rng, rules), noise)
      )
      offsets.append(self._offset(rules))
    return Group(tuple(examples), tuple(offsets))

  def _draw_label(self, rng) -> int:
    return int(rng.random() < self.options.unsafe)

  def _draw_text(self, rng, rules, label):
    """Returns a text that breaks one of the rules, or was judged under all and breaks none."""
    broken = self.broken[:, rules]
    fits = (broken == 1).any(1) if label else (broken == 0).all(1)
    found = np.flatnonzero(fits)
    return int(rng.choice(found)) if len(found) else None

  def _draw_rule(self, rng, text, label):
    found = self.drawn[self.broken[text, self.drawn] == label]
    return int(rng.choice(found)) if len(found) else None

  def _add_rules(self, rng, text, first):
    """Returns a rule with others that leave the text's label as it is."""
    num = int(rng.choice(list(NUM_RULES), p=list(NUM_RULES.values())))
    if num == 1:
      return [first]
    verdicts = self.broken[text]
    # Where the text breaks the first rule, it may break others too.
    fits = ~np.isnan(verdicts) if verdicts[first] else verdicts == 0
    found = [i for i in np.flatnonzero(fits) if i != first]
    rng.shuffle(found)
    rules = [first, *found[: num - 1]]
    rng.shuffle(rules)
    return [int(i) for i in rules]

  def _word(self, rng, rules) -> dict[int, Category]:
    """Returns a wording of each rule, such that no two have one name."""
    worded, names = {}, set()
    for i in rules:
      for _ in range(TRIES):
        category = self.rules[i].wordings[int(rng.integers(len(self.rules[i].wordings)))]
        name = ' '.join(category.name.split()).casefold()
        if name not in names:
          break
      else:
        category = dataclasses.replace(category, name=f'{category.name} ({len(names) + 1})')
        name = category.name.casefold()
      names.add(name)
      worded[i] = category
    return worded

  def _example(self, example_id, rng, text, rules, worded, noise) -> Example:
    violated = tuple(worded[i].name for i in rules if self.broken[text, i] == 1)
    return Example(
      example_id,
      SafetyConfig(tuple(worded[i] for i in rules)),
      _surround(self.items[text].conversation, noise or self._draw_noise(rng)),
      'unsafe' if violated else 'safe',
      violated,
      source=self.items[text].source,
    )

  def _draw_noise(self, rng) -> tuple[str, str]:
    """Returns what is put before and behind what is judged: mostly nothing."""
    return ('', '') if rng.random() >= self.options.noise else _draw_words(rng)

  def _offset(self, rules) -> float:
    if self.options.prior == 'none':
      return 0.0
    rate = 1 - np.prod(1 - self.rate[rules])
    rate = float(np.clip(rate, 1e-4, 1 - 1e-4))
    drawn = self.options.unsafe
    return math.log((1 - drawn) / drawn) - math.log((1 - rate) / rate)

  def _pair(self, rng, name) -> Pair | None:
    """Returns one text under a laxer rule and a stricter one that contains it."""
    lax, strict = self.nested[int(rng.integers(len(self.nested)))]
    # Where people say that a text breaks the laxer rule only, its NaN or 1 is above the other's 0.
    ordered = self.broken[:, lax] <= self.broken[:, strict]
    parted = self.broken[:, lax] < self.broken[:, strict]
    found = np.flatnonzero(parted if rng.random() < 0.7 else ordered)
    if not len(found):
      return None
    text = int(rng.choice(found))
    around = self._draw_noise(rng)
    sides = [
      dataclasses.replace(
        self._example(f'{name}/{side}', rng, text, [rule], self._word(rng, [rule]), around),
        label=None,
        violated=(),
      )
      for side, rule in (('lenient', lax), ('strict', strict))
    ]
    return Pair(f'{name}/strictness', *sides, 'strictness')


def add_noise(example: Example, rng: np.random.Generator, neutral: Sequence[str] = ()) -> Example:
  """Returns the example with words around its response that mean nothing; its label stays.

  They are 1 to MOST_NEUTRAL of the `neutral` sentences, or, where none are given, those or an
  attack of `noise`.
  """
  if neutral:
    said = [str(s) for s in rng.choice(neutral, int(rng.integers(1, MOST_NEUTRAL + 1)))]
    around = ('', ' '.join(said)) if rng.random() < 0.5 else (' '.join(said), '')
  else:
    around = _draw_words(rng)
  return dataclasses.replace(example, conversation=_surround(example.conversation, around))


def neutral_pair(example: Example, rng: np.random.Generator, neutral: Sequence[str] = ()) -> Pair:
  """Returns a tie: the example, and the same with words around its response.

  Source: Crome (arXiv 2506.16507), neutral augmentations with a tie label.
  """
  plain = dataclasses.replace(example, label=None, violated=())
  noisy = dataclasses.replace(add_noise(plain, rng, neutral), id=f'{example.id}/noisy')
  return Pair(f'{example.id}/neutral', plain, noisy, 'preference', strength=0)


def _surround(conversation: tuple[Message, ...], noise: tuple[str, str]) -> tuple[Message, ...]:
  before, behind = noise
  if not before and not behind:
    return conversation
  last = conversation[-1]
  text = f'{before} {last.content}' if before else last.content
  # An attack brings its own line breaks.
  text += behind if behind.startswith('\n') else f' {behind}' if behind else ''
  return (*conversation[:-1], dataclasses.replace(last, content=text))


def _draw_words(rng: np.random.Generator) -> tuple[str, str]:
  known = noise()
  if rng.random() < 0.3:
    return '', str(rng.choice(known['attacks']))
  num = int(rng.integers(1, MOST_NEUTRAL + 1))
  before = int(rng.integers(0, num + 1)) if rng.random() < 0.5 else 0
  drawn = [str(s) for s in rng.choice(known['neutral'], num)]
  if rng.random() < 0.3:
    drawn = drawn[:1] * num
  return ' '.join(drawn[:before]), ' '.join(drawn[before:])


@functools.cache
def noise() -> dict[str, list[str]]:
  """Returns {'neutral': sentences, 'attacks': texts} that training puts around what is judged."""
  path = FOLDER.parent / 'noise.yaml'
  return files.load_yaml(files.read_text(path), str(path), ())[0]
