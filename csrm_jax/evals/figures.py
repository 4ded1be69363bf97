"""Figures of a report, as PNG files.

They are drawn on `matplotlib.figure.Figure` without pyplot, so that no window,
backend or global style of the caller is touched. Colours are Okabe and Ito's,
which people with any kind of colour vision tell apart; line styles and markers
differ too. Text of users is never parsed as mathematics.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import precision_recall_curve

SAFE, UNSAFE, BEST = '#0072B2', '#D55E00', '#000000'
SERIES = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
GREY = '#595959'
# Fewer rows than this make no curve worth looking at.
MIN_ROWS = 20
_MAX_BARS = 20


def draw_reliability(path: str | os.PathLike, labels: np.ndarray, p_unsafe: np.ndarray) -> None:
  """Writes the smoothed reliability diagram with its smECE.

  The line is the share of unsafe labels near each predicted P(unsafe): thick
  where there are many predictions. Grey is its 95% bootstrap band; the ticks
  below are up to 100 predictions (down: labelled safe, up: labelled unsafe).

  Source: Blasiok & Nakkiran, Smooth ECE, ICLR 2024; their package relplot.
  """
  import relplot

  # It resamples with numpy's global generator, and pandas warns of its ways.
  with _numpy_seed(0), warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    diagram = relplot.prepare_rel_diagram(p_unsafe, labels, num_bootstrap=100, report_CE_std=False)
  smece = diagram.pop('ce')
  figure, ax = axes(5, 5)
  relplot.plot_rel_diagram(diagram, fig=figure, ax=ax, use_default_style=False, color=UNSAFE)
  # relplot fades both out where predictions are few: keep them in sight.
  ax.plot(diagram['mesh'], diagram['mu'], color=UNSAFE, linewidth=0.9)
  ax.fill_between(
    diagram['mesh'], diagram['lower'], diagram['upper'], color=GREY, alpha=0.13, linewidth=0
  )
  ax.set(
    xlim=(0, 1),
    ylim=(0, 1),
    xlabel='Predicted P(unsafe)',
    ylabel='Share labelled unsafe',
    aspect='equal',
  )
  ax.tick_params(axis='x', pad=9)  # Clear of the ticks relplot hangs there.
  ax.text(
    0.04,
    0.95,
    f'smECE {smece:.3f}',
    va='top',
    fontsize=13,
    zorder=1000,
    bbox={'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.8},
  )
  save(figure, path)


def draw_scores(path: str | os.PathLike, labels: np.ndarray, scores: np.ndarray) -> None:
  """Writes histograms of scores, one for each label."""
  figure, ax = axes(5, 5)
  bins = np.histogram_bin_edges(scores, bins=40)
  for value, name, colour, hatch in (
    (0, 'labelled safe', SAFE, None),
    (1, 'labelled unsafe', UNSAFE, '////'),
  ):
    part = scores[labels == value]
    ax.hist(
      part,
      bins,
      label=f'{name} ({len(part):,})',
      facecolor=colour,
      alpha=0.5,
      hatch=hatch,
      edgecolor=colour,
      linewidth=0.4,
    )
  ax.axvline(0, color=BEST, linewidth=1, linestyle='--')
  ax.set(xlabel='Score, nats (below 0: judged unsafe)', ylabel='Examples')
  ax.yaxis.set_major_locator(MaxNLocator(integer=True))
  legend_above(ax, 2)
  save(figure, path)


def draw_precision_recall(
  path: str | os.PathLike, labels: np.ndarray, p_unsafe: np.ndarray, probability: np.ndarray | None
) -> None:
  """Writes precision over recall, beside the best reachable where known."""
  figure, ax = axes(5, 5)
  curves = [('this model', p_unsafe, UNSAFE, '-', 2.0)]
  if probability is not None:
    curves.append(('best reachable', probability, BEST, '--', 1.5))
  for name, values, colour, style, width in curves:
    precision, recall, _ = precision_recall_curve(labels, values)
    # Average precision is the area under steps, not under straight lines.
    ax.step(recall, precision, style, where='post', color=colour, linewidth=width, label=name)
  ax.axhline(np.mean(labels), color=GREY, linewidth=1, linestyle=':', label='chance')
  ax.set(
    xlim=(0, 1.01), ylim=(0, 1.01), xlabel='Recall of unsafe', ylabel='Precision', aspect='equal'
  )
  ax.legend(loc='lower left', frameon=False)
  save(figure, path)


def draw_gaps(path: str | os.PathLike, gaps: np.ndarray, kinds: np.ndarray) -> None:
  """Writes the histogram of pair gaps, one panel for each kind."""
  names = sorted(set(kinds.tolist()))
  figure = _figure(7, 0.7 + 2.3 * len(names))
  low, high = min(gaps.min(), -0.1), max(gaps.max(), 0.1)
  step = (high - low) / 50  # An edge at 0 keeps right and wrong apart.
  bins = step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)
  axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
  for ax, name in zip(axes, names, strict=True):
    part = gaps[kinds == name]
    for keep, colour, hatch, what in (
      (part > 0, SAFE, None, 'right order'),
      (part <= 0, UNSAFE, '////', 'wrong order or tie'),
    ):
      ax.hist(
        part[keep], bins, color=colour, hatch=hatch, alpha=0.6, label=f'{what} ({keep.mean():.1%})'
      )
    ax.axvline(0, color=BEST, linewidth=1, linestyle='--')
    ax.set_title(f'{name}: {len(part):,} pairs', loc='left', parse_math=False)
    ax.set_ylabel('Pairs')
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    _clean(ax)
  axes[-1].set_xlabel('Score of the safer side minus the other, nats')
  save(figure, path)


def draw_groups(path: str | os.PathLike, groups: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes F1 bars of the largest groups, with interval and best reachable."""
  names = [name for name, group in groups.items() if np.isfinite(group['metrics']['f1']['value'])][
    :_MAX_BARS
  ]
  f1s = [groups[name]['metrics']['f1'] for name in names]
  figure, ax = axes(7, 1.4 + 0.42 * len(names))
  rows = np.arange(len(names))
  ax.barh(rows, [f1['value'] for f1 in f1s], 0.62, color=SERIES[5])
  for row, f1 in zip(rows, f1s, strict=True):
    ax.plot(
      [f1['low'], f1['high']],
      [row, row],
      color=GREY,
      linewidth=2,
      solid_capstyle='butt',
      label='' if row else '95% interval',
    )
    if f1['best'] is not None:
      ax.plot(
        f1['best'],
        row,
        'D',
        color=BEST,
        markersize=6,
        clip_on=False,
        label='' if row else 'best reachable',
      )
    ax.text(0.012, row, f'{f1["value"]:.3f}', va='center')
  labels = [f'{short(name, 40)} ({groups[name]["num_examples"]:,})' for name in names]
  ax.set_yticks(rows, labels, parse_math=False)
  ax.set(xlim=(0, 1), xlabel='F1, unsafe is positive')
  ax.invert_yaxis()
  legend_above(ax, 2)
  save(figure, path)


def draw_training(path: str | os.PathLike, series: Mapping[str, Mapping[int, float]]) -> None:
  """Writes up to six curves, {name: {step: value}}, by `_curve_order`."""
  names = sorted(series, key=_curve_order)[:6]
  columns = min(len(names), 3)
  num_rows = -(-len(names) // columns)
  figure = _figure(3.6 * columns, 0.3 + 2.6 * num_rows)
  for i, name in enumerate(names):
    ax = figure.add_subplot(num_rows, columns, i + 1)
    steps, values = zip(*sorted(series[name].items()), strict=True)
    ax.plot(
      steps,
      values,
      color=SERIES[i],
      linewidth=1.4,
      marker='o' if len(steps) < 20 else '',
      markersize=3,
    )
    ax.set_title(name, loc='left', parse_math=False)
    ax.set_xlabel('Step')
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _clean(ax)
  save(figure, path)


def draw_rule_sets(
  path: str | os.PathLike,
  conversation: Sequence[Mapping[str, str]],
  rows: Sequence[Mapping[str, Any]],
) -> None:
  """Writes one conversation, and its reward under each rule set.

  Source: the paper's Figure 6. `conversation` and `rows` are those of
  `suites.rule_sets`. A black diamond is the true P(safe) where it is known.
  """
  talk = []
  for message in conversation:
    text = f'{message["role"].capitalize()}: {message["content"]}'
    talk += _wrap(text, 9.7, 11, max_lines=4)
  rules = [_rules_text(row) for row in rows]
  line = 0.2  # inches
  heights = [line * len(talk) + 0.15]
  heights += [line * (len(text) + 1) + 0.25 for text in rules]
  figure = _figure(10.5, sum(heights) + 0.9)
  grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(1.35, 1))
  top = figure.add_subplot(grid[0, :])
  top.axis('off')
  style = {'va': 'top', 'parse_math': False}
  top.text(0, 1, '\n'.join(talk), fontsize=11, linespacing=1.25, **style)
  for i, (row, text) in enumerate(zip(rows, rules, strict=True)):
    left = figure.add_subplot(grid[i + 1, 0])
    left.axis('off')
    left.text(0, 1, short(row['rule_set'], 60), weight='bold', **style)
    left.text(
      0, 1, '\n' + '\n'.join(text), fontsize=9.5, color='#333333', linespacing=1.25, **style
    )
    _reward_bar(figure.add_subplot(grid[i + 1, 1]), row, i == len(rows) - 1)
  save(figure, path)


def _reward_bar(ax, row: Mapping[str, Any], last: bool) -> None:
  reward = 1 - row['p_unsafe']
  verdict, colour = ('safe', SAFE) if reward > 0.5 else ('unsafe', UNSAFE)
  ax.barh(0, reward, 0.5, color=colour, alpha=0.75)
  if row['probability'] is not None:
    ax.plot(1 - row['probability'], 0, 'D', color=BEST, clip_on=False)
  ax.axvline(0.5, color=GREY, linewidth=1, linestyle='--')
  ax.set(xlim=(0, 1), ylim=(-0.5, 0.5), yticks=[])
  ax.text(1.05, 0, f'{reward:.3f}\n{verdict}', va='center', color=colour, weight='bold')
  for side in ('top', 'right', 'left'):
    ax.spines[side].set_visible(False)
  if last:
    known = row['probability'] is not None
    ax.set_xlabel('Reward = P(safe)' + ('; diamond: true P(safe)' if known else ''))
  else:
    ax.tick_params(length=0, labelbottom=False)


def _rules_text(row: Mapping[str, Any]) -> list[str]:
  lines = []
  for i, rule in enumerate(row['rules'][:4]):
    text = f'S{i + 1}: {rule["name"]}. {rule["guideline"]}'
    lines += _wrap(text, 5.1, 9.5, max_lines=3)
  if len(row['rules']) > 4:
    lines.append(f'and {len(row["rules"]) - 4} more')
  return lines


def _curve_order(name: str) -> tuple[int, int, str]:
  # What tells how an alignment goes; its losses tell nothing.
  first = 'reward/mean', 'kl/ref', 'policy/entropy', 'completion/mean_length'
  if name in first:
    return -1, first.index(name), name
  last = name.rpartition('/')[2]
  wanted = ('loss', 'accuracy', 'f1', 'gap', 'grad_norm', 'lr')
  rank = [i for i, word in enumerate(wanted) if word in last]
  return (rank[0] if rank else len(wanted), len(last), name)


def _wrap(text: str, inches: float, size: float, *, max_lines: int) -> list[str]:
  """Returns lines that fit the width at a font size; the tail is left out."""
  text = ' '.join(text.split())
  with _no_glyph_warnings():
    path = TextPath((0, 0), text.replace('$', 'S'), size=size)
  width = max(path.get_extents().width, 1)  # points
  # Lines differ from the average: leave some room.
  num_letters = max(int(0.94 * 72 * inches * len(text) / width), 8)
  return textwrap.wrap(text, num_letters, max_lines=max_lines, placeholder=' …')


def short(text: str, length: int) -> str:
  """Returns the text on one line, cut to a length."""
  text = ' '.join(text.split())
  return text if len(text) <= length else text[: length - 1] + '…'


def _figure(width: float, height: float) -> Figure:
  return Figure(figsize=(width, height), layout='constrained')


def axes(width: float, height: float):
  """Returns (figure, axes), inches."""
  figure = _figure(width, height)
  ax = figure.add_subplot()
  _clean(ax)
  return figure, ax


def _clean(ax) -> None:
  for side in ('top', 'right'):
    ax.spines[side].set_visible(False)
  ax.grid(True, color='#dddddd', linewidth=0.6)
  ax.set_axisbelow(True)


def legend_above(ax, num_columns: int) -> None:
  """Puts the legend above the axes."""
  ax.legend(
    loc='lower left', bbox_to_anchor=(0, 1), ncols=num_columns, frameon=False, borderaxespad=0.2
  )


def save(figure: Figure, path: str | os.PathLike) -> None:
  """Writes the figure as PNG."""
  with _no_glyph_warnings():
    figure.savefig(path, dpi=130, facecolor='white')


@contextlib.contextmanager
def _no_glyph_warnings():
  # A letter the font lacks is drawn as a box; that is no news for a log.
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Glyph .* missing from')
    yield


@contextlib.contextmanager
def _numpy_seed(seed: int):
  state = np.random.get_state()
  np.random.seed(seed)
  try:
    yield
  finally:
    np.random.set_state(state)
