"""Figures of reports, as PNG files.

Every function draws the values that it is given and knows nothing of suites. Figures are
`matplotlib.figure.Figure`s without pyplot, so that no window, backend or global style of the
caller is touched. Colours are Okabe and Ito's, which people with any kind of colour vision tell
apart; line styles and markers differ too. Text of users is never parsed as mathematics.

Source: CSRM is arXiv 2605.30487; docstrings name the figure of it that is drawn.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator, PercentFormatter

from csrm_jax.core.markdown import is_number, short
from csrm_jax.evals import metrics
from csrm_jax.evals.results import Metric, Result, title_of

SAFE, UNSAFE, BEST = '#0072B2', '#D55E00', '#000000'
SERIES = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
GREY, LIGHT = '#595959', '#dddddd'
# Fewer rows than this make no curve worth looking at.
MIN_ROWS = 20
# A reliability curve ends so far from the nearest prediction.
_REACH = 0.05
_MAX_ROWS = 20
_MARKERS = 'osD^vP*X'
_LEGEND_LETTERS = 90  # how many fit beside each other in the narrowest figure


# --- Verdicts and scores ---------------------------------------------------------------


def draw_reliability(path: str | os.PathLike, labels: np.ndarray, p_unsafe: np.ndarray) -> None:
  """Writes the smoothed reliability diagram with its smECE, and that of the verdicts alone.

  The line is the share of unsafe labels near each predicted P(unsafe), thick where there are
  many predictions. The grey band is its 95% bootstrap interval. The ticks below are up to 100
  predictions (down: labelled safe, up: labelled unsafe).

  Source: Blasiok & Nakkiran, Smooth ECE, ICLR 2024; their package relplot.
  """
  import relplot

  # relplot draws from numpy's global generator, and pandas warns of its use.
  with _numpy_seed(0), warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    diagram = relplot.prepare_rel_diagram(p_unsafe, labels, num_bootstrap=100, report_CE_std=False)
  smece = diagram.pop('ce')
  # The smoothed curve runs on over ranges without predictions, of which it says nothing.
  order = np.sort(p_unsafe)
  after = np.searchsorted(order, diagram['mesh'])
  nearest = np.minimum(
    abs(order[np.maximum(after - 1, 0)] - diagram['mesh']),
    abs(order[np.minimum(after, len(order) - 1)] - diagram['mesh']),
  )
  for name in ('mu', 'lower', 'upper'):
    diagram[name] = np.where(nearest > _REACH, np.nan, diagram[name])
  figure, ax = axes(5, 5)
  # The band in one piece; relplot draws 200, which takes two seconds.
  mesh, low, high = diagram['mesh'], diagram.pop('lower'), diagram.pop('upper')
  shades = 0.6 * diagram['density'] / diagram['density'].max()
  pieces = np.flatnonzero(np.isfinite(low[:-1] + low[1:]))
  corners = [
    [(mesh[i], low[i]), (mesh[i + 1], low[i + 1]), (mesh[i + 1], high[i + 1]), (mesh[i], high[i])]
    for i in pieces
  ]
  colours = [('gray', shades[i]) for i in pieces]
  ax.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0))
  relplot.plot_rel_diagram(diagram, fig=figure, ax=ax, use_default_style=False, color=UNSAFE)
  # Line and band fade out where predictions are few: this keeps them in sight.
  ax.plot(mesh, diagram['mu'], color=UNSAFE, linewidth=0.9)
  ax.fill_between(mesh, low, high, color=GREY, alpha=0.13, linewidth=0)
  ax.set(xlabel='Predicted P(unsafe)', ylabel='Share labelled unsafe')
  ax.set(xlim=(0, 1), ylim=(0, 1), aspect='equal')
  ax.tick_params(axis='x', pad=9)  # Clear of the ticks that relplot draws there.
  box = {'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.8}
  ax.text(0.04, 0.95, f'smECE {smece:.3f}', va='top', fontsize=13, zorder=1000, bbox=box)
  # What calibration is worth without degrees.
  controls = (
    f'0.97 or 0.03: {metrics.smece_constants(labels, p_unsafe):.3f}\n'
    f'1 or 0: {metrics.smece_hard(labels, p_unsafe):.3f}'
  )
  ax.text(0.04, 0.88, controls, va='top', fontsize=9, zorder=1000, bbox=box)
  _title(ax, path, len(labels))
  save(figure, path)


def draw_scores(path: str | os.PathLike, labels: np.ndarray, scores: np.ndarray) -> None:
  """Writes a histogram of the scores for each label."""
  figure, ax = axes(5, 5)
  bins = np.histogram_bin_edges(scores, bins=40)
  for value, name, colour, hatch in (
    (0, 'labelled safe', SAFE, None),
    (1, 'labelled unsafe', UNSAFE, '////'),
  ):
    part = scores[labels == value]
    style = {'facecolor': colour, 'edgecolor': colour, 'hatch': hatch}
    ax.hist(part, bins, label=f'{name} ({len(part):,})', alpha=0.5, linewidth=0.4, **style)
  ax.axvline(0, color=BEST, linewidth=1, linestyle='--')
  ax.set(xlabel='Score, nats (below 0: judged unsafe)', ylabel='Examples')
  ax.yaxis.set_major_locator(MaxNLocator(integer=True))
  legend_above(ax, 2)
  save(figure, path)


def draw_precision_recall(
  path: str | os.PathLike, labels: np.ndarray, p_unsafe: np.ndarray, probability: np.ndarray | None
) -> None:
  """Writes precision over recall, beside the best reachable where it is known."""
  from sklearn.metrics import precision_recall_curve

  figure, ax = axes(5, 5)
  curves = [('this model', p_unsafe, UNSAFE, '-', 2.0)]
  if probability is not None:
    curves.append(('best reachable', probability, BEST, '--', 1.5))
  for name, values, colour, style, width in curves:
    precision, recall, _ = precision_recall_curve(labels, values)
    # Average precision is the area under steps, not under straight lines.
    ax.step(recall, precision, style, where='post', color=colour, linewidth=width, label=name)
  ax.axhline(np.mean(labels), color=GREY, linewidth=1, linestyle=':', label='chance')
  ax.set(xlim=(0, 1.01), ylim=(0, 1.01), aspect='equal')
  ax.set(xlabel='Recall of unsafe', ylabel='Precision')
  ax.legend(loc='lower left', frameon=False)
  _title(ax, path, len(labels))
  save(figure, path)


def draw_gaps(path: str | os.PathLike, gaps: np.ndarray, kinds: np.ndarray) -> None:
  """Writes a histogram of the score gaps of pairs, in a panel for each kind."""
  names = sorted(set(kinds.tolist()))
  figure = _figure(7, 0.7 + 2.3 * len(names))
  low, high = min(gaps.min(), -0.1), max(gaps.max(), 0.1)
  step = (high - low) / 50  # An edge at 0 keeps right and wrong apart.
  bins = step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)
  panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
  for ax, name in zip(panels, names, strict=True):
    part = gaps[kinds == name]
    for keep, colour, hatch, what in (
      (part > 0, SAFE, None, 'right order'),
      (part <= 0, UNSAFE, '////', 'wrong order or tie'),
    ):
      label = f'{what} ({keep.mean():.1%})'
      ax.hist(part[keep], bins, color=colour, hatch=hatch, alpha=0.6, label=label)
    ax.axvline(0, color=BEST, linewidth=1, linestyle='--')
    ax.set_title(f'{name}: {len(part):,} pairs', loc='left', parse_math=False)
    ax.set_ylabel('Pairs')
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    _clean(ax)
  panels[-1].set_xlabel('Score of the safer side minus the other, nats')
  save(figure, path)


def draw_rule_sets(
  path: str | os.PathLike,
  conversation: Sequence[Mapping[str, str]],
  rows: Sequence[Mapping[str, Any]],
) -> None:
  """Writes one conversation, and its reward under each rule set. Source: CSRM, Figure 6.

  `conversation` and `rows` are those of `verdicts.rule_sets`.
  """
  talk = []
  for message in conversation:
    text = f'{message["role"].capitalize()}: {message["content"]}'
    talk += _wrap(text, 9.7, 11, max_lines=4)
  rules = [_rules_text(row['rules']) for row in rows]
  line = 0.2  # inches
  heights = [line * len(talk) + 0.15]
  heights += [line * (len(text) + 1) + 0.25 for text in rules]
  figure = _figure(10.5, sum(heights) + 0.9)
  grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(1.35, 1))
  top = figure.add_subplot(grid[0, :])
  top.axis('off')
  style = {'va': 'top', 'linespacing': 1.25, 'parse_math': False}
  top.text(0, 1, '\n'.join(talk), fontsize=11, **style)
  for i, (row, text) in enumerate(zip(rows, rules, strict=True)):
    left = figure.add_subplot(grid[i + 1, 0])
    left.axis('off')
    left.text(0, 1, short(row['rule_set'], 60), weight='bold', va='top', parse_math=False)
    left.text(0, 1, '\n' + '\n'.join(text), fontsize=9.5, color='#333333', **style)
    _reward_bar(figure.add_subplot(grid[i + 1, 1]), row, i == len(rows) - 1)
  save(figure, path)


def _reward_bar(ax, row: Mapping[str, Any], last: bool) -> None:
  reward, known = 1 - row['p_unsafe'], row['probability'] is not None
  verdict, colour = ('safe', SAFE) if reward > 0.5 else ('unsafe', UNSAFE)
  ax.barh(0, reward, 0.5, color=colour, alpha=0.75)
  if known:
    ax.plot(1 - row['probability'], 0, 'D', color=BEST, clip_on=False)
  ax.axvline(0.5, color=GREY, linewidth=1, linestyle='--')
  ax.set(xlim=(0, 1), ylim=(-0.5, 0.5), yticks=[])
  ax.text(1.05, 0, f'{reward:.3f}\n{verdict}', va='center', color=colour, weight='bold')
  for side in ('top', 'right', 'left'):
    ax.spines[side].set_visible(False)
  if last:
    ax.set_xlabel('Reward = P(safe)' + ('; diamond: true P(safe)' if known else ''))
  else:
    ax.tick_params(length=0, labelbottom=False)


def _rules_text(rules: Sequence[Mapping[str, str]]) -> list[str]:
  lines = []
  for i, rule in enumerate(rules[:4]):
    lines += _wrap(f'S{i + 1}: {rule["name"]}. {rule["guideline"]}', 5.1, 9.5, max_lines=3)
  if len(rules) > 4:
    lines.append(f'and {len(rules) - 4} more')
  return lines


# --- Probes ----------------------------------------------------------------------------


def draw_policy(
  path: str | os.PathLike, rates: Mapping[str, float], true_rates: Mapping[str, float] | None = None
) -> None:
  """Writes the unsafe rate under each variant of `probes.policy`. Source: CSRM, Figure 3."""
  # In the last two the changed rule is not the one that is violated.
  variants = {
    'strict': 'rule\nstands',
    'leave_one_out': 'rule\nleft out',
    'allow': 'rule\nallows',
    'other_left_out': 'another\nleft out',
    'other_allowed': 'another\nallows',
  }
  figure, ax = axes(7, 3.8)
  x, shown = range(len(variants)), [rates[name] for name in variants]
  style = {'alpha': 0.75, 'edgecolor': 'white'}
  handles = [
    ax.bar(x[:3], shown[:3], 0.62, color=UNSAFE, label='the violated rule changes', **style),
    ax.bar(x[3:], shown[3:], 0.62, color=SAFE, hatch='////', label='another rule changes', **style),
  ]
  tops = shown
  if true_rates:
    true, style = [true_rates[name] for name in variants], {'color': BEST, 'clip_on': False}
    handles += ax.plot(x, true, 'D', markersize=6, zorder=3, label='true rate', **style)
    # The number stands above its bar, clear of the diamond.
    tops = [t if r <= t < r + 0.09 else r for r, t in zip(shown, true, strict=True)]
  for at, top, rate in zip(x, tops, shown, strict=True):
    ax.text(at, top + 0.03, f'{rate:.1%}', ha='center', va='bottom')
  ax.axhline(rates['strict'], color=GREY, linewidth=1, linestyle='--')
  ax.set_xticks(x, variants.values())
  ax.set(ylim=(0, 1.14), ylabel='Called unsafe')
  ax.yaxis.set_major_formatter(PercentFormatter(1))
  ax.grid(False, axis='x')
  legend_above(ax, 3, handles=handles)
  save(figure, path)


def draw_recall(
  path: str | os.PathLike, curve: Sequence[float], chance: Sequence[float], top_k: int
) -> None:
  """Writes the recall of retrieval over k, beside that of chance. Source: CSRM, Figure 8."""
  figure, ax = axes(5.5, 4)
  k = np.arange(1, len(curve) + 1)
  size = 4 if len(k) <= 40 else 0
  ax.plot(k, curve, color=SAFE, linewidth=2, marker='o', markersize=size, label='BM25')
  ax.plot(k, chance, color=GREY, linewidth=1.5, linestyle=':', label='at random')
  if top_k <= len(curve):
    kept = curve[top_k - 1]
    ax.plot([top_k, top_k], [0, kept], color=UNSAFE, linestyle='--')
    ax.plot(top_k, kept, 'D', color=UNSAFE, markersize=8, label=f'kept: k = {top_k}, {kept:.1%}')
  ax.set(xlim=(0.5, len(k) + 0.5), ylim=(0, 1.02))
  ax.set(xlabel='Rules kept, k', ylabel='Violated rules among them')
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.yaxis.set_major_formatter(PercentFormatter(1))
  ax.legend(loc='lower right', frameon=False)
  save(figure, path)


# --- One row of marks for each group, rule set, category or benchmark ------------------


def draw_groups(path: str | os.PathLike, groups: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes F1 of the largest groups as bars, with intervals and the best reachable."""
  known = {name: g for name, g in groups.items() if is_number(g['metrics']['f1']['value'])}
  f1s = [group['metrics']['f1'] for group in known.values()][:_MAX_ROWS]
  figure, ax = _row_axes(_group_labels(known), 1.4, 0.42, xlabel='F1, unsafe is positive')
  ax.barh(range(len(f1s)), [f1['value'] for f1 in f1s], 0.62, color=SERIES[5])
  _draw_intervals(ax, f1s, color=GREY, solid_capstyle='butt', label='95% interval')
  for y, f1 in enumerate(f1s):
    ax.text(0.012, y, f'{f1["value"]:.3f}', va='center')
  best = {y: f1['best'] for y, f1 in enumerate(f1s) if f1['best'] is not None}
  if best:
    style = {'color': BEST, 'markersize': 6, 'clip_on': False, 'label': 'best reachable'}
    ax.plot(list(best.values()), list(best), 'D', **style)
  ax.set_xlim(0, 1)
  legend_above(ax, 2)
  save(figure, path)


def draw_shares(path: str | os.PathLike, groups: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes, by rule set, the share labelled unsafe and the mean P(unsafe)."""
  figure, ax = _row_axes(_group_labels(groups), 1.4, 0.42, xlabel='Share of the texts')
  shown = list(groups.values())[:_MAX_ROWS]
  rows, style = np.arange(len(shown)), {'alpha': 0.75, 'edgecolor': 'white'}
  labelled = [group['num_unsafe'] / group['num_examples'] for group in shown]
  ax.barh(rows - 0.19, labelled, 0.36, color=GREY, label='labelled unsafe', **style)
  predicted = [group['mean_p_unsafe'] for group in shown]
  style |= {'color': UNSAFE, 'hatch': '////'}
  ax.barh(rows + 0.19, predicted, 0.36, label='mean P(unsafe)', **style)
  ax.set_xlim(0, 1)
  _percent_rows(ax)
  legend_above(ax, 2)
  save(figure, path)


def draw_contradiction(path: str | os.PathLike, categories: Sequence[Mapping[str, Any]]) -> None:
  """Writes mean rewards by category: enforce, both, allow. Source: CSRM, Figure 5."""
  shown = sorted(categories, key=lambda c: (-c['num_examples'], c['category']))[:_MAX_ROWS]
  shown.sort(key=lambda c: c['reward']['both'])
  shown.reverse()
  labels = [f'{short(c["category"], 34)} ({c["num_examples"]:,})' for c in shown]
  xlabel = 'Mean reward, P(safe); bars: either order of the clauses'
  figure, ax = _row_axes(labels, 1.5, 0.36, xlabel=xlabel)
  rewards = {name: [c['reward'][name] for c in shown] for name in shown[0]['reward']}
  rows = range(len(shown))
  ends = [rewards['enforce'], rewards['allow']]
  ax.plot(ends, [rows, rows], color='#bbbbbb', linewidth=3, zorder=1, solid_capstyle='round')
  # The two orders of the clauses, of which "both" is the mean.
  for order in ('enforce_allow', 'allow_enforce'):
    ax.plot(rewards[order], rows, '|', color=BEST, markersize=9, zorder=2)
  for name, colour, marker, label in (
    ('enforce', UNSAFE, 's', 'rule forbids'),
    ('both', BEST, 'D', 'both clauses'),
    ('allow', SAFE, 'o', 'rule allows'),
  ):
    ax.plot(rewards[name], rows, marker, color=colour, markersize=7, zorder=3, label=label)
  ax.set(xlim=(-0.02, 1.02), ylim=(len(shown) - 0.4, -0.6))
  legend_above(ax, 3)
  save(figure, path)


def draw_attacks(path: str | os.PathLike, rates: Mapping[str, Metric], num_caught: int) -> None:
  """Writes the flip rate of each suffix, with its interval."""
  xlabel = f'Turned into "safe", of {num_caught:,} caught'
  figure, ax = _row_axes(list(rates), 1.2, 0.34, xlabel=xlabel)
  _draw_intervals(ax, rates.values(), color=GREY)
  top = 0.05
  for y, rate in enumerate(rates.values()):
    known = is_number(rate['value'])  # else nothing was caught
    shown = rate['value'] if known else 0.0
    ax.barh(y, shown, 0.62, color=UNSAFE, alpha=0.75)
    end = max(shown, rate['high'] if is_number(rate['low']) else 0)
    text = f'{shown:.1%}' if known else '–'
    ax.annotate(text, (end, y), (4, 0), va='center', textcoords='offset points')
    top = max(top, end)
  ax.set_xlim(0, min(max(top * 1.15, 0.25), 1.1))  # Rates near 0 have to look small.
  _percent_rows(ax)
  save(figure, path)


def draw_comparison(
  path: str | os.PathLike, scorers: Mapping[str, Mapping[str, Result]], metric: str
) -> bool:
  """Writes one metric of every scorer by benchmark; returns False where none has it."""
  found = {
    scorer: {
      name: value
      for name, result in results.items()
      if (value := (result.metrics or {}).get(metric)) and is_number(value['value'])
    }
    for scorer, results in scorers.items()
  }
  order = dict.fromkeys(name for results in scorers.values() for name in results)
  names = [name for name in order if any(name in of for of in found.values())][:_MAX_ROWS]
  if not names:
    return False
  # The best reachable depends on the rows alone, so any scorer's will do.
  first = next(iter(found.values()))
  best = {
    y: first[n]['best'] for y, n in enumerate(names) if n in first and is_number(first[n]['best'])
  }
  xlabel = title_of(metric) + ('; bar: best reachable' if best else '')
  top, height = 1.3 + 0.2 * len(scorers), 0.2 + 0.16 * len(scorers)
  figure, ax = _series_axes(names, found, top, height, xlabel)
  for y, value in best.items():
    ax.plot([value] * 2, [y - 0.4, y + 0.4], color=BEST, linewidth=1.5)
  low, high = ax.get_xlim()
  # The axis starts at 0 unless all values are far from it.
  ax.set_xlim(0 if low < 0.3 else low, min(high, 1.02))
  legend_above(ax, min(len(scorers), 2))
  save(figure, path)
  return True


def draw_alignment(
  path: str | os.PathLike, policies: Mapping[str, Mapping[str, Metric | None]], xlabel: str
) -> None:
  """Writes a CoSA score, 0 to 5, of every policy by rule set, with its interval."""
  sets = list(next(iter(policies.values())))
  # A policy that was not asked under a rule set has None there.
  found = {policy: {s: m for s, m in of.items() if m} for policy, of in policies.items()}
  figure, ax = _series_axes(sets, found, 1.3, 0.2 + 0.14 * len(policies), xlabel)
  ax.set_xlim(0, 5)
  _name_series(ax)
  save(figure, path)


def _series_axes(
  names: Sequence[str],
  series: Mapping[str, Mapping[str, Metric]],
  top: float,
  height: float,
  xlabel: str,
):
  """Returns (figure, axes) with a row for each name, in which each series has its own line."""
  labels = [short(name, 34) for name in names]
  figure, ax = _row_axes(labels, top, height, width=7.5, xlabel=xlabel)
  step = 0.8 / len(series)
  for i, (label, found) in enumerate(series.items()):
    at = {y: found[name] for y, name in enumerate(names) if name in found}
    if not at:
      continue
    rows = [y + (i - (len(series) - 1) / 2) * step for y in at]
    colour, marker = SERIES[i % len(SERIES)], _MARKERS[i % len(_MARKERS)]
    _draw_intervals(ax, at.values(), rows, color=colour, alpha=0.5)
    values = [metric['value'] for metric in at.values()]
    style = {'color': colour, 'markersize': 7, 'clip_on': False, 'zorder': 3}
    ax.plot(values, rows, marker, label=short(label, 40), **style)
  for y in range(1, len(names)):
    ax.axhline(y - 0.5, color=LIGHT, linewidth=0.8)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.grid(False, axis='y')
  return figure, ax


def _row_axes(labels: Sequence[str], top: float, height: float, *, xlabel: str, width: float = 7):
  """Returns (figure, axes) with a row for each label, the first on top."""
  figure, ax = axes(width, top + height * len(labels))
  ax.set_yticks(range(len(labels)), labels, parse_math=False)
  ax.invert_yaxis()
  ax.set_xlabel(xlabel)
  return figure, ax


def _group_labels(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
  return [f'{short(name, 40)} ({g["num_examples"]:,})' for name, g in groups.items()][:_MAX_ROWS]


def _percent_rows(ax) -> None:
  ax.xaxis.set_major_formatter(PercentFormatter(1))
  ax.grid(False, axis='y')


def _draw_intervals(ax, metrics, rows=None, label: str = '', **style) -> None:
  """Draws a line from low to high in each row where both are known."""
  for y, metric in zip(rows or range(len(metrics)), metrics, strict=True):
    if is_number(metric['low']):
      ax.plot([metric['low'], metric['high']], [y, y], linewidth=2, label=label, **style)
      label = ''


# --- Policies and training -------------------------------------------------------------


def draw_pareto(path: str | os.PathLike, points: Sequence[Mapping[str, Any]], known: bool) -> None:
  """Writes helpfulness over safety, with the frontier of each method. Source: CSRM, Figure 4.

  Args:
    points: The points of `policy.pareto`; `own_frontier` tells whether one is on its method's.
    known: Whether they are the truth; if not, they are what the rewards say.
  """
  figure, ax = axes(7, 5)
  swept = dict.fromkeys(p['method'] for p in points if p['a'] is not None)
  # Policies without a and b come last, in black.
  methods = swept | dict.fromkeys(p['method'] for p in points)
  for i, name in enumerate(methods):
    colour = SERIES[i % len(SERIES)] if name in swept else BEST
    mine = [point for point in points if point['method'] == name]
    _draw_method(ax, short(name, 40), mine, colour, _MARKERS[i % len(_MARKERS)])
  source = 'share that break no rule' if known else 'mean P(safe)'
  level = 'true' if known else 'reward'
  ax.set(xlabel=f'Safety: {source}', ylabel=f'Helpfulness, 1 to 5 ({level})')
  ax.margins(0.08)
  _name_series(ax)
  save(figure, path)


def _draw_method(ax, name: str, points, colour: str, marker: str) -> None:
  for point in points:
    x, y = point['safety'], point['helpfulness']
    bars = [
      [[max(m['value'] - m['low'], 0)], [max(m['high'] - m['value'], 0)]]
      if is_number(m['low'])
      else None
      for m in (x, y)
    ]
    at = x['value'], y['value']
    ax.errorbar(*at, bars[1], bars[0], color=colour, alpha=0.35, linewidth=1.2)
    if point['a'] is not None:
      # a and b of the safety reward sigmoid(a * score + b).
      text = f'{point["a"]:g}, {point["b"]:+g}'
      ax.annotate(text, at, (6, 5), textcoords='offset points', fontsize=8, color=GREY)
  x, y = (np.array([p[key]['value'] for p in points]) for key in ('safety', 'helpfulness'))
  best = np.flatnonzero([point['own_frontier'] for point in points])
  best = best[np.argsort(x[best])]
  ax.plot(x[best], y[best], color=colour, linewidth=1.5, linestyle='-' if len(best) > 1 else '')
  inside = np.setdiff1d(np.arange(len(x)), best)
  ax.plot(x[best], y[best], marker, color=colour, markersize=7, label=name)
  ax.plot(x[inside], y[inside], marker, color=colour, markersize=7, fillstyle='none')


def draw_overoptimisation(
  path: str | os.PathLike, steps: Sequence[int], curves: Mapping[str, Mapping[str, Any]]
) -> None:
  """Writes the curves of `policy.overoptimisation` over training steps, with intervals."""
  # name -> (title, the least span of the axis, so that what is constant looks constant).
  shown = {
    'safety': ('Safety', 0.2),
    'helpfulness': ('Helpfulness', 0.8),
    'cosa': ('CoSA score', 0.8),
  }
  figure = _figure(3.9 * len(curves), 3.6)
  panels = figure.subplots(1, len(curves), squeeze=False)[0]
  for ax, (name, curve) in zip(panels, curves.items(), strict=True):
    title, least_range = shown[name]
    for side, colour, style, label in (
      ('proxy', UNSAFE, '--', 'reward'),
      ('oracle', SAFE, '-', 'truth'),
    ):
      value, low, high = ([m[key] for m in curve[side]] for key in ('value', 'low', 'high'))
      marker = 'o' if len(steps) < 20 else ''
      ax.plot(steps, value, style, color=colour, label=label, marker=marker, markersize=4)
      if all(map(is_number, low)):
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    if (parted := curve['parting_step']) is not None:
      label = f'part after {parted:,}'
      ax.axvline(parted, color=BEST, linewidth=1, linestyle=':', label=label)
    low, high = ax.get_ylim()
    room = max(least_range - (high - low), 0) / 2
    ax.set_ylim(low - room, high + room)
    ax.set_title(title, loc='left')
    _step_axis(ax)
    ax.legend(frameon=False, fontsize=9)
  save(figure, path)


def draw_training(path: str | os.PathLike, series: Mapping[str, Mapping[int, float]]) -> None:
  """Writes the six curves of {name: {step: value}} that tell most of a run."""
  names = sorted(series, key=_curve_order)[:6]
  columns = min(len(names), 3)
  num_rows = -(-len(names) // columns)
  figure = _figure(3.6 * columns, 0.3 + 2.6 * num_rows)
  for i, name in enumerate(names):
    ax = figure.add_subplot(num_rows, columns, i + 1)
    steps, values = zip(*sorted(series[name].items()), strict=True)
    marker = 'o' if len(steps) < 20 else ''
    ax.plot(steps, values, color=SERIES[i], linewidth=1.4, marker=marker, markersize=3)
    ax.set_title(name, loc='left', parse_math=False)
    _step_axis(ax)
  save(figure, path)


def _curve_order(name: str) -> tuple[int, int, str]:
  # These tell how an alignment goes, which its losses do not.
  first = 'reward/mean', 'kl/ref', 'policy/entropy', 'completion/mean_length'
  if name in first:
    return -1, first.index(name), name
  last = name.rpartition('/')[2]
  wanted = ('loss', 'accuracy', 'f1', 'gap', 'grad_norm', 'lr')
  rank = next((i for i, word in enumerate(wanted) if word in last), len(wanted))
  return rank, len(last), name


# --- What they are made of -------------------------------------------------------------


def _wrap(text: str, inches: float, size: float, *, max_lines: int) -> list[str]:
  """Returns lines that fit the width at a font size; what is left is cut."""
  text = ' '.join(text.split())
  # TextPath would parse what stands between dollars as mathematics.
  with _no_glyph_warnings():
    path = TextPath((0, 0), text.replace('$', 'S'), size=size)
  width = max(path.get_extents().width, 1)  # points
  # Lines differ from the average: leave some room.
  num_letters = max(int(0.94 * 72 * inches * len(text) / width), 8)
  return textwrap.wrap(text, num_letters, max_lines=max_lines, placeholder=' …')


def _figure(width: float, height: float) -> Figure:
  """Returns an empty figure; sizes are in inches."""
  return Figure(figsize=(width, height), layout='constrained')


def axes(width: float, height: float):
  """Returns (figure, axes) of a size in inches."""
  figure = _figure(width, height)
  ax = figure.add_subplot()
  _clean(ax)
  return figure, ax


def _clean(ax) -> None:
  for side in ('top', 'right'):
    ax.spines[side].set_visible(False)
  ax.grid(True, color=LIGHT, linewidth=0.6)
  ax.set_axisbelow(True)


def _title(ax, path: str | os.PathLike, num: int) -> None:
  """Says above the axes what its file is called, and of how many rows it is."""
  name = pathlib.Path(path).stem.replace('_', ' ')
  ax.set_title(f'{name}, n = {num:,}', loc='left', fontsize=10, parse_math=False)


def _step_axis(ax) -> None:
  ax.set_xlabel('Step')
  ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  _clean(ax)


def legend_above(ax, num_columns: int, **options) -> None:
  """Puts the legend above the axes."""
  place = {'loc': 'lower left', 'bbox_to_anchor': (0, 1), 'borderaxespad': 0.2}
  legend = ax.legend(ncols=num_columns, frameon=False, **place, **options)
  for text in legend.get_texts():
    text.set_parse_math(False)


def _name_series(ax) -> None:
  """Puts the legend above the axes, in as many columns as the names leave room for."""
  longest = max(map(len, ax.get_legend_handles_labels()[1]))
  legend_above(ax, min(3, max(1, _LEGEND_LETTERS // (longest + 6))))


def save(figure: Figure, path: str | os.PathLike) -> None:
  """Writes the figure as a PNG file."""
  with _no_glyph_warnings():
    figure.savefig(path, dpi=130, facecolor='white')


@contextlib.contextmanager
def _no_glyph_warnings():
  # A letter that the font lacks is drawn as a box, which is not worth a line in a log.
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Glyph .* missing from')
    yield


@contextlib.contextmanager
def _numpy_seed(seed: int):
  # The caller's own random numbers go on as if nothing was drawn.
  state = np.random.get_state()
  np.random.seed(seed)
  try:
    yield
  finally:
    np.random.set_state(state)
