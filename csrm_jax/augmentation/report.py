"""The report of strictness augmentation: Markdown, JSON and a picture."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import scipy.stats
from matplotlib.figure import Figure

from csrm_jax.augmentation import strictness
from csrm_jax.core import files, markdown
from csrm_jax.evals import figures
from csrm_jax.safety.schema import Category

_INTRO = """\
Training pairs show one conversation under two guidelines of the same category,
of which the *strict* one forbids more than the *lenient* one. Writing them: a
category is split into subcategories in order of severity, and a guideline is
written that forbids the first j of them, beside one that forbids the first
i < j. Rewrites often do not obey, so a pair is kept only if its order shows in
conversations: of the n that a classifier calls unsafe under the lenient one, k
are unsafe under the strict one too, and k / n is high with confidence (its
one-sided Clopper–Pearson lower bound is *bound*). *Extra* counts conversations
that are unsafe under the strict guideline only."""

_TRUTH = """\
The true order of these guidelines is known. How many pairs are truly in the
order that they claim:"""

_FIGURE = """\
Recall of unsafe conversations over the number of subcategories that a guideline was \
meant to forbid: a line that falls is a rewrite that did not obey."""

_NUM_EXAMPLES = 5
# What the reasons to drop something mean. Other reasons are a proposer's own, of which the part
# before the colon is explained.
_REASONS = {
  'candidate: too_few_unsafe': 'pairs whose lenient guideline catches too few'
  ' conversations for the test to pass at all',
  'candidate: order_not_shown': 'pairs whose strict guideline lets pass what'
  ' the lenient one catches',
  'candidate: no_difference': 'pairs whose strict guideline catches no more than the lenient one',
  'candidate: same_text': 'pairs of twice the same words',
  'pool_too_small': 'categories with too few conversations for any pair to pass; none was written',
  'conversation: uncovered': 'conversations that stay without a subcategory',
  'conversation: subcategory_limit': 'conversations without a subcategory,'
  ' after the limit was reached',
  'conversation: no_subcategory': 'conversations for which no further subcategory could be named',
  'category': 'categories given up for want of a usable reply',
  'candidate': 'pairs given up for want of a usable reply',
  'conversation': 'conversations without a subcategory for want of a usable reply',
}


def write_report(
  folder: str | os.PathLike,
  outcomes: Sequence[strictness.Outcome],
  settings: strictness.Settings,
  is_ordered: Callable[[Category, Category], bool] | None = None,
  made_by: str = '',
) -> pathlib.Path:
  """Writes strictness.md, .json and .png into a folder, made if need be; returns the first.

  Args:
    settings: The numbers that the test was made with.
    is_ordered: Says whether two guidelines (strict, lenient) are truly in order, where that is
      known. The report then says how many candidates are.
    made_by: A sentence for the reader: who wrote and who judged.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  truth = is_ordered and strictness.precision(outcomes, is_ordered)
  result = {
    'made_by': made_by,
    'settings': vars(settings),
    'num_written': sum(len(o.candidates) for o in outcomes),
    'num_kept': sum(len(o.kept) for o in outcomes),
    'drops': total_drops(outcomes, settings),
    'truth': truth,
    'categories': list(map(dataclasses.asdict, outcomes)),
  }
  files.write_json(folder / 'strictness.json', result, indent=1)
  drawn = [o for o in outcomes if o.candidates]
  if drawn:
    draw_recall(folder / 'strictness.png', drawn)
  path = folder / 'strictness.md'
  files.write(path, _render(outcomes, settings, result))
  return path


def total_drops(
  outcomes: Sequence[strictness.Outcome], settings: strictness.Settings
) -> dict[str, int]:
  """Returns how much was dropped for each reason, failed tests included."""
  total = collections.Counter()
  for outcome in outcomes:
    total.update(outcome.drops)
    total.update(
      f'candidate: {strictness.explain(c, settings)}' for c in outcome.candidates if not c.kept
    )
  return {reason: num for reason, num in sorted(total.items()) if num}


def recalls(outcome: strictness.Outcome, *, kept: bool) -> dict[int, float]:
  """Returns {number of subcategories forbidden: mean recall of unsafe conversations}.

  It is of the guidelines of kept candidates, or without `kept` of all that were written.
  """
  # The whole pool is unsafe under the standard guideline: the share called unsafe is the recall.
  values = collections.defaultdict(list)
  for c in outcome.kept if kept else outcome.candidates:
    values[c.num_strict].append(c.recall_strict)
    values[c.num_lenient].append(c.recall_lenient)
  return {num: sum(v) / len(v) for num, v in sorted(values.items())}


def draw_recall(path: str | os.PathLike, outcomes: Sequence[strictness.Outcome]) -> None:
  """Writes a picture of recall over intended strictness, with one line per category.

  On the left are all guidelines that were written, on the right those that passed the test. The
  first categories have colours, the others are grey.

  Source: CSRM (arXiv 2605.30487), Figure 3.
  """
  figure = Figure(figsize=(9, 4.2), layout='constrained', dpi=150)
  axes = figure.subplots(1, 2, sharey=True)
  for ax, kept, title in ((axes[0], False, 'as written'), (axes[1], True, 'kept by the test')):
    for i, outcome in enumerate(outcomes):
      line = recalls(outcome, kept=kept)
      has_colour = i < len(figures.SERIES)
      ax.plot(
        list(line),
        list(line.values()),
        marker='o',
        markersize=3,
        linewidth=1.3 if has_colour else 0.8,
        color=figures.SERIES[i] if has_colour else '#BBBBBB',
        zorder=2 if has_colour else 1,
        # Matplotlib sets text between two dollars as a formula, and lists no label that starts
        # with '_'.
        label=outcome.category.name.replace('$', r'\$') if has_colour else '_',
      )
    num = sum(len(o.kept if kept else o.candidates) for o in outcomes)
    ax.set_title(f'{title}: {num:,} pairs', loc='left')
    ax.set(xlabel='Subcategories forbidden (intended strictness)', ylim=(-0.02, 1.02))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('Recall of unsafe conversations')
  axes[0].legend(frameon=False, fontsize=8)
  figure.savefig(path)


def _render(
  outcomes: Sequence[strictness.Outcome], settings: strictness.Settings, result: Mapping[str, Any]
) -> str:
  def meaning(reason: str) -> str:
    return _REASONS.get(reason) or _REASONS.get(reason.split(':')[0], '')

  escape = markdown.escape
  parts = ['# Strictness augmentation', _INTRO, _summary(settings, result)]
  if result['truth']:
    parts += [_TRUTH, _truth_table(result['truth'])]
  if any(o.candidates for o in outcomes):
    parts += ['![Recall by strictness](strictness.png)', _FIGURE]
  shown = [o.kept[0] for o in outcomes if o.kept][:_NUM_EXAMPLES]
  if shown:
    rows = [(c.strict.name, c.strict.guideline, c.lenient.guideline) for c in shown]
    header = ('category', 'strict', 'lenient')
    parts += ['## Some kept pairs', markdown.table(header, [map(escape, row) for row in rows])]
  parts += [
    '## Categories',
    markdown.table(
      ('category', 'conversations', 'subcategories, most severe first', 'written', 'kept'),
      [
        (
          escape(o.category.name),
          o.pool_size,
          escape(', '.join(c.name for c in o.subcategories)),
          len(o.candidates),
          len(o.kept),
        )
        for o in outcomes
      ],
    ),
    '## What came to nothing',
    markdown.table(
      ('reason', 'times', 'what it counts'),
      [(reason, num, meaning(reason)) for reason, num in result['drops'].items()]
      or [('nothing', 0, '')],
    ),
    '## Candidates',
    markdown.table(
      ('category', 'strict: j', 'lenient: i', 'n', 'k', 'extra', 'bound', 'kept'),
      [
        (
          escape(o.category.name),
          *(c.num_strict, c.num_lenient, c.n, c.k, c.extra, f'{c.bound:.4f}'),
          'yes' if c.kept else f'no: {strictness.explain(c, settings)}',
        )
        for o in outcomes
        for c in o.candidates
      ],
    ),
  ]
  return '\n\n'.join(parts) + '\n'


def _summary(s: strictness.Settings, result: Mapping[str, Any]) -> str:
  passing = (
    n for n in range(1, s.pool_size + 1) if strictness.lower_bound(n, n, s.alpha) > s.threshold
  )
  least = next(passing, None)
  needs = 'more than the pool has' if least is None else f'{least} or more'
  return (
    f'**{result["num_kept"]:,} of {result["num_written"]:,} pairs kept.**'
    f' {result["made_by"]} A pair is kept if the bound, at confidence'
    f' {1 - s.alpha:g}, exceeds {s.threshold:g} (with k = n that takes n ='
    f' {needs}) and extra is at least {s.min_extra}. A category was tested on'
    f' up to {s.pool_size} conversations that violate it;'
    f' {s.num_subcategories} subcategories were asked for at first, and one'
    ' more for each conversation that none of them fits, up to'
    f' {s.max_subcategories}.'
  )


def _truth_table(truth: Mapping[str, int]) -> str:
  rows = []
  for name, what in (('written', 'without the test'), ('kept', 'with it')):
    num, right = truth[name], truth[f'{name}_ordered']
    share, low, high = markdown.NONE, 0.0, 1.0
    if num:
      share = f'{right / num:.3f}'
      low, high = scipy.stats.binomtest(right, num).proportion_ci(method='exact')
    rows.append((what, num, right, share, f'{low:.3f} to {high:.3f}'))
  return markdown.table(('', 'pairs', 'truly ordered', 'share', '95% interval'), rows)
