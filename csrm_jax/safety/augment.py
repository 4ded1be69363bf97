"""Configuration-targeted augmentation: a real conversation gets new rules.

Every function keeps the conversation and changes only the rules. `relabel` is the one label
rule: every change of an example's set of categories goes through it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from csrm_jax.safety.schema import Category, Example, Pair, SafetyConfig

# Replaces the rules where they are hidden: the prompt still asks for a verdict, and says nothing
# about what is allowed.
NO_RULES = SafetyConfig((Category('Safety', 'The response is safe.'),), name='no rules')


def relabel(example: Example, new_safety: SafetyConfig) -> Example:
  """Returns the example under `new_safety`, with the label that follows.

  The label is unsafe iff (violated(p) | {p+}) & p' is not empty, where p are the example's
  present rules, p' the new ones, p+ its `plus` and p- its `minus`. p' is meant to be drawn from
  p, p+ and p-. p- never makes a response unsafe.

  The label is None, never "safe", where this rule cannot know it:
  - p' has a category (or guideline) under which the example was never judged;
  - the example has no label;
  - it is unsafe for an unrecorded reason, and one of its categories is gone.

  Source: CSRM (arXiv 2605.30487), configurable category augmentation.
  """
  old, new = set(example.safety.categories), set(new_safety.categories)
  # A p+ or p- whose name is already taken by the rules is neither: it is taken off the example.
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
    # The true probability holds for one set of categories, and so may what people rated.
    probability=example.probability if new == old else None,
    ratings=example.ratings if new == old else (),
  )


def cca(
  example: Example,
  rng: np.random.Generator,
  drop_prob: float,
  plus_prob: float,
  minus_prob: float,
  shuffle: bool = False,
) -> Example:
  """Returns the example after configurable category augmentation.

  Each category is dropped with probability `drop_prob`, but one always stays. Then p+ and p- are
  inserted at random places, each with its probability, and on request all are shuffled. The
  result is labelled once. Both directions occur: dropping can turn unsafe into safe, and
  inserting p+ safe into unsafe.

  Source: CSRM (arXiv 2605.30487), configurable category augmentation.
  """
  categories = list(example.safety.categories)
  # An unsafe example whose violated categories are unknown loses none: the result would have no
  # label.
  if drop_prob > 0 and (example.label != 'unsafe' or example.violated):
    # The survivor is drawn even if it is not needed: the number of draws, and so all later random
    # numbers, must not depend on the outcome. The four draws below are made for the same reason.
    *draws, survivor = rng.random(len(categories) + 1).tolist()
    # A configuration needs a category, so one chosen at random stays when all would go.
    kept = [c for c, u in zip(categories, draws, strict=True) if u >= drop_prob]
    categories = kept or [categories[int(survivor * len(categories))]]
  if example.plus is not None or example.minus is not None:
    taken = {_key(c) for c in example.safety.categories}
    draws = rng.random(4).tolist()
    for category, prob, u, place in (
      (example.plus, plus_prob, draws[0], draws[1]),
      (example.minus, minus_prob, draws[2], draws[3]),
    ):
      if category is not None and u < prob and _key(category) not in taken:
        categories.insert(int(place * (len(categories) + 1)), category)
        taken.add(_key(category))
  if shuffle:
    draws = rng.random(len(categories))
    categories = [categories[i] for i in np.argsort(draws, kind='stable')]
  if tuple(categories) == example.safety.categories:
    return example
  safety = dataclasses.replace(example.safety, categories=tuple(categories))
  return relabel(example, safety)


def _key(category: Category) -> str:
  return category.name.strip().casefold()


def strictness_pair(
  example: Example, category_name: str, strict: Category, lenient: Category
) -> Pair:
  """Returns the same conversation under a lenient and a strict guideline.

  On each side `lenient` or `strict` takes the place of the category `category_name`. The lenient
  side is the safer one. The pair states an order and no labels: a side is "unsafe" only if
  another category is known to be violated, else its label is None.

  Source: CSRM (arXiv 2605.30487), Algorithm 1 and its pair loss.
  """
  categories, names = example.safety.categories, list(example.safety.names)
  if category_name not in names:
    raise ValueError(
      f'strictness_pair: example {example.id!r} has no category {category_name!r}; it has {names}'
    )
  if strict == lenient:
    raise ValueError(
      f'strictness_pair: example {example.id!r}: strict and lenient {category_name!r} are the same'
      ' text; give two different guidelines'
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
      ratings=(),
    )

  # The same text violates less under laxer rules. The paper's printed loss subtracts the lenient
  # score from the strict one, the opposite of its text and its tables.
  pair_id = f'{example.id}/strictness'
  return Pair(pair_id, side('lenient', lenient), side('strict', strict), 'strictness')


def hide_rules(item: Example | Pair) -> Example | Pair:
  """Returns the example or pair without its rules; labels stay."""
  # The scores of such items, compared with those under rules, show how much the rules matter.
  if isinstance(item, Pair):
    return dataclasses.replace(item, safer=hide_rules(item.safer), other=hide_rules(item.other))
  return dataclasses.replace(item, safety=NO_RULES, violated=(), plus=None, minus=None)
