"""Configuration-targeted augmentation: new rules for a real conversation.

Every function keeps the conversation and changes the rules only. There is one
label rule, `relabel`, and everything here that changes an example's set of
categories goes through it. Random choices come from a `np.random.Generator`,
so that a data pipeline can seed them per element.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from csrm_jax.safety.schema import Category, Example, Pair, SafetyConfig


def relabel(example: Example, new_safety: SafetyConfig) -> Example:
  """Returns the example under `new_safety`, with the label that follows.

  The label is unsafe iff (violated(p) | {p+}) & p' is not empty, where p are
  the example's present rules and p' the new ones. p' is meant to be drawn from
  p, p+ and p-. A p+ or p- whose name stands in p already is none, and is
  taken off the example; p- never fires.

  Where the rule cannot know, the label is None, never "safe": when p' has a
  category (or a guideline) the example was never judged under, when the
  example has no label, and when it is unsafe for an unrecorded reason and one
  of its categories is gone. The true probability of an example holds for its
  own rules only, and is kept only while the set of categories is the same.

  Source: CSRM (arXiv 2605.30487), configurable category augmentation.
  """
  old, new = set(example.safety.categories), set(new_safety.categories)
  taken = {_key(c) for c in old}
  plus, minus = (
    None if c is None or _key(c) in taken else c for c in (example.plus, example.minus)
  )
  names = {c.name for c in new & old}
  fired = [name for name in example.violated if name in names]
  if plus in new:
    fired.append(plus.name)
  if fired:
    label = 'unsafe'
  elif example.label == 'unsafe' and not example.violated:
    label = 'unsafe' if old <= new else None
  elif example.label is None or new - old - {plus, minus}:
    label = None
  else:
    label = 'safe'
  return dataclasses.replace(
    example,
    safety=new_safety,
    label=label,
    violated=tuple(fired),
    plus=plus,
    minus=minus,
    probability=example.probability if new == old else None,
  )


def drop_categories(example: Example, rng: np.random.Generator, prob: float) -> Example:
  """Returns the example with each category dropped with probability `prob`.

  One category, chosen at random, stays when all would go. An unsafe example
  whose violated categories are unknown is returned as it is, because no label
  could be given to the result.
  """
  kept = _drop(example, list(example.safety.categories), rng, prob)
  return _with_categories(example, kept)


def add_categories(
  example: Example, rng: np.random.Generator, plus_prob: float = 1.0, minus_prob: float = 1.0
) -> Example:
  """Returns the example with its p+ and p- inserted at random places.

  Each is inserted with its own probability. One that the example does not
  have, or whose name already stands in the rules, is skipped.
  """
  categories = list(example.safety.categories)
  _insert(example, categories, rng, plus_prob, minus_prob)
  return _with_categories(example, categories)


def shuffle_order(example: Example, rng: np.random.Generator) -> Example:
  """Returns the example with its categories in a random order."""
  categories = list(example.safety.categories)
  _shuffle(categories, rng)
  return _with_categories(example, categories)


def cca(
  example: Example,
  rng: np.random.Generator,
  drop_prob: float,
  plus_prob: float,
  minus_prob: float,
  shuffle: bool = False,
) -> Example:
  """Returns the example after configurable category augmentation.

  Drops categories, then inserts p+ and p-, then (on request) shuffles all of
  them, and labels the result once. Two-sided: dropping can turn unsafe into
  safe, inserting p+ safe into unsafe.

  Args:
    example: a labelled example; `plus` and `minus` are its p+ and p-.
    rng: source of all choices.
    drop_prob: probability that a category of the rules is dropped.
    plus_prob: probability that p+ is inserted.
    minus_prob: probability that p- is inserted.
    shuffle: also put the categories in a random order.

  Source: CSRM (arXiv 2605.30487), configurable category augmentation.
  """
  categories = _drop(example, list(example.safety.categories), rng, drop_prob)
  _insert(example, categories, rng, plus_prob, minus_prob)
  if shuffle:
    _shuffle(categories, rng)
  return _with_categories(example, categories)


def strictness_pair(
  example: Example, category_name: str, strict: Category, lenient: Category
) -> Pair:
  """Returns the same conversation under a lenient and a strict guideline.

  Both sides hold the example's rules with the category called
  `category_name` replaced, in its place, by `lenient` or `strict`. The safer
  side is the lenient one: the same text violates less under laxer rules. (The
  paper's printed loss subtracts the lenient score from the strict one, the
  opposite of its text and of its tables.)

  The pair states an order, not labels: a side is "unsafe" only if another
  category of the rules is known to be violated, else its label is None.

  Raises:
    ValueError: no such category, two equal guidelines, or a name that another
      category already has.

  Source: CSRM (arXiv 2605.30487), Algorithm 1 and its pair loss.
  """
  categories = example.safety.categories
  names = [c.name for c in categories]
  if category_name not in names:
    raise ValueError(
      f'strictness_pair: example {example.id!r} has no category {category_name!r}; it has {names}'
    )
  if (strict.name, strict.guideline) == (lenient.name, lenient.guideline):
    raise ValueError(
      f'strictness_pair: example {example.id!r}: strict and lenient'
      f' {category_name!r} are the same text; give two different guidelines'
    )
  place = names.index(category_name)
  others = tuple(n for n in example.violated if n != category_name)

  def side(name: str, category: Category) -> Example:
    changed = (*categories[:place], category, *categories[place + 1 :])
    return dataclasses.replace(
      example,
      id=f'{example.id}/{name}',
      safety=dataclasses.replace(example.safety, categories=changed),
      label='unsafe' if others else None,
      violated=others,
      plus=None,
      minus=None,
      probability=None,
    )

  return Pair(
    id=f'{example.id}/strictness',
    safer=side('lenient', lenient),
    other=side('strict', strict),
    kind='strictness',
  )


def _with_categories(example: Example, categories: list[Category]) -> Example:
  if tuple(categories) == example.safety.categories:
    return example
  safety = dataclasses.replace(example.safety, categories=tuple(categories))
  return relabel(example, safety)


def _drop(
  example: Example, categories: list[Category], rng: np.random.Generator, prob: float
) -> list[Category]:
  if prob <= 0 or (example.label == 'unsafe' and not example.violated):
    return categories
  # The survivor is drawn always, so that the number of draws (and with it
  # what later steps see) does not depend on the outcome.
  *draws, survivor = rng.random(len(categories) + 1).tolist()
  kept = [c for c, u in zip(categories, draws, strict=True) if u >= prob]
  return kept or [categories[int(survivor * len(categories))]]


def _insert(
  example: Example,
  categories: list[Category],
  rng: np.random.Generator,
  plus_prob: float,
  minus_prob: float,
) -> None:
  plus, minus = example.plus, example.minus
  if plus is None and minus is None:
    return
  taken = {_key(c) for c in example.safety.categories}
  draws = rng.random(4).tolist()
  for category, prob, u, place in (
    (plus, plus_prob, draws[0], draws[1]),
    (minus, minus_prob, draws[2], draws[3]),
  ):
    if category is None or u >= prob or _key(category) in taken:
      continue
    categories.insert(int(place * (len(categories) + 1)), category)
    taken.add(_key(category))


def _shuffle(categories: list[Category], rng: np.random.Generator) -> None:
  draws = rng.random(len(categories)).tolist()
  categories[:] = [c for _, _, c in sorted(zip(draws, range(len(draws)), categories, strict=True))]


def _key(category: Category) -> str:
  return category.name.strip().casefold()


# What stands in for the rules where they are hidden: it asks for a verdict,
# and says nothing about what is allowed.
NO_RULES = SafetyConfig((Category('Safety', 'The response is safe.'),), name='no rules')


def hide_rules(item: Example | Pair) -> Example | Pair:
  """Returns the example or pair without its rules; labels stay.

  The difference to scores with rules is what reading them is worth.
  """
  if isinstance(item, Pair):
    return dataclasses.replace(item, safer=hide_rules(item.safer), other=hide_rules(item.other))
  return dataclasses.replace(item, safety=NO_RULES, violated=(), plus=None, minus=None)
