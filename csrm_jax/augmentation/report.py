"""The report of strictness augmentation: Markdown, JSON and a picture."""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import scipy.stats
from matplotlib.figure import Figure

from csrm_jax.augmentation import strictness
from csrm_jax.core import writer
from csrm_jax.evals import figures, markdown
from csrm_jax.safety.schema import Category

_INTRO = """\
For each category a proposer writes pairs of guidelines, of which the *strict*
one is meant to forbid more. A pair is kept only if that shows in real
conversations: of the n that a classifier calls unsafe under the lenient one,
k are unsafe under the strict one too, and the one-sided Clopper–Pearson lower
bound of k / n exceeds the threshold. *Extra* counts conversations that are
unsafe under the strict guideline only."""


def write_report(
  folder: str | os.PathLike,
  outcomes: Sequence[strictness.Outcome],
  settings: strictness.Settings,
  is_ordered: Callable[[Category, Category], bool] | None = None,
) -> pathlib.Path:
  """Writes strictness.md, .json and .png; returns the first.

  Args:
    folder: made if it is not there.
    outcomes: one for each category.
    settings: those of the test.
    is_ordered: the true order of two guidelines, where it is known: the
      report then says how many candidates are truly ordered.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  truth = is_ordered and strictness.precision(outcomes, is_ordered)
  result = {
    'settings': vars(settings),
    'num_written': sum(len(o.candidates) for o in outcomes),
    'num_kept': sum(len(o.kept) for o in outcomes),
    'drops': total_drops(outcomes),
    'truth': truth,
    'categories': [outcome.to_dict() for outcome in outcomes],
  }
  writer.write_atomic(
    folder / 'strictness.json', json.dumps(result, indent=1) + '\n'
  )
  drawn = [o for o in outcomes if o.candidates]
  if drawn:
    draw_recall(folder / 'strictness.png', drawn)
  path = folder / 'strictness.md'
  writer.write_atomic(path, _render(outcomes, result, bool(drawn)))
  return path


def total_drops(outcomes: Sequence[strictness.Outcome]) -> dict[str, int]:
  """Returns all drops by reason, failed tests included."""
  total = collections.Counter()
  for outcome in outcomes:
    total.update(outcome.drops)
    total['candidate: order_not_shown'] += sum(
      not c.kept for c in outcome.candidates
    )
  return {reason: num for reason, num in sorted(total.items()) if num}


def recalls(
  outcome: strictness.Outcome, *, kept: bool
) -> dict[int, float]:
  """Returns {number of subcategories forbidden: mean recall of unsafe cases}.

  With `kept`, of the guidelines of kept candidates only; else of all that were
  written. The pool is unsafe under the standard guideline, so the share called
  unsafe is the recall.
  """
  values = collections.defaultdict(list)
  for c in outcome.kept if kept else outcome.candidates:
    values[c.num_strict].append(c.recall_strict)
    values[c.num_lenient].append(c.recall_lenient)
  return {num: sum(v) / len(v) for num, v in sorted(values.items())}


def draw_recall(
  path: str | os.PathLike, outcomes: Sequence[strictness.Outcome]
) -> None:
  """Writes recall over intended strictness, one line a category.

  Left all guidelines that were written, right those that passed the test; at
  most six categories have colours, the others are grey.

  Source: CSRM (arXiv 2605.30487), Figure 3.
  """
  figure = Figure(figsize=(9, 4.2), layout='constrained', dpi=150)
  axes = figure.subplots(1, 2, sharey=True)
  for ax, kept, title in (
    (axes[0], False, 'as written'), (axes[1], True, 'kept by the test')
  ):
    for i, outcome in enumerate(outcomes):
      line = recalls(outcome, kept=kept)
      has_colour = i < len(figures.SERIES)
      ax.plot(
        list(line), list(line.values()), marker='o', markersize=3,
        linewidth=1.3 if has_colour else 0.8,
        color=figures.SERIES[i] if has_colour else '#BBBBBB',
        zorder=2 if has_colour else 1,
        label=outcome.category.name.replace('$', r'\$') if has_colour else '_',
      )
    num = sum(len(o.kept if kept else o.candidates) for o in outcomes)
    ax.set_title(f'{title}: {num:,} pairs', loc='left')
    ax.set(
      xlabel='Subcategories forbidden (intended strictness)', ylim=(-0.02, 1.02)
    )
    ax.xaxis.get_major_locator().set_params(integer=True)
    for side in ('top', 'right'):
      ax.spines[side].set_visible(False)
  axes[0].set_ylabel('Recall of unsafe conversations')
  axes[0].legend(frameon=False, fontsize=8)
  figure.savefig(path)


def _render(
  outcomes: Sequence[strictness.Outcome],
  result: Mapping[str, Any],
  is_drawn: bool,
) -> str:
  parts = ['# Strictness augmentation', _INTRO]
  settings = ', '.join(f'{k} {v}' for k, v in result['settings'].items())
  parts.append(
    f'{result["num_kept"]:,} of {result["num_written"]:,} candidates kept'
    f' ({settings}).'
  )
  if result['truth']:
    parts.append(_truth_table(result['truth']))
  if is_drawn:
    parts.append(
      '![Recall by strictness](strictness.png)\n\nRecall of unsafe'
      ' conversations over the number of subcategories that a guideline was'
      ' meant to forbid: a line that falls is a rewrite that did not obey.'
    )
  parts += ['## Categories', _table(
    ('category', 'conversations', 'subcategories, most severe first',
     'written', 'kept'),
    [(markdown.escape(o.category.name), o.pool_size,
      markdown.escape(', '.join(c.name for c in o.subcategories)),
      len(o.candidates), len(o.kept)) for o in outcomes],
  )]
  parts += ['## What came to nothing', _table(
    ('reason', 'times'), list(result['drops'].items()) or [('nothing', 0)]
  )]
  parts += ['## Candidates', _table(
    ('category', 'strict', 'lenient', 'n', 'k', 'extra', 'bound', 'kept'),
    [(markdown.escape(o.category.name), c.num_strict, c.num_lenient, c.n, c.k,
      c.extra, f'{c.bound:.4f}', 'yes' if c.kept else 'no')
     for o in outcomes for c in o.candidates],
  )]
  return '\n\n'.join(parts) + '\n'


def _truth_table(truth: Mapping[str, int]) -> str:
  rows = []
  for name, what in (('written', 'without the test'), ('kept', 'with it')):
    num, right = truth[name], truth[f'{name}_ordered']
    low, high = _interval(right, num)
    share = f'{right / num:.3f}' if num else markdown.NONE
    rows.append((what, num, right, share, f'{low:.3f} to {high:.3f}'))
  return _table(
    ('', 'pairs', 'truly ordered', 'share', '95% interval'), rows
  )


def _interval(k: int, n: int) -> tuple[float, float]:
  if not n:
    return 0.0, 1.0
  return scipy.stats.binomtest(k, n).proportion_ci(method='exact')


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
