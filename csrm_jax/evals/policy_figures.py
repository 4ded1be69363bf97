"""Figures of the evaluation of policies, in the style of `figures`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from csrm_jax.evals.definitions import METRICS
from csrm_jax.evals.figures import BEST, GREY, SAFE, SERIES, UNSAFE, axes, legend_above, save, short
from csrm_jax.evals.markdown import is_number
from csrm_jax.evals.policy import knows_truth, shown
from csrm_jax.evals.policy_sweeps import frontier

_MARKERS = 'osD^vP*X'
_LEGEND_LETTERS = 90  # beside each other, in the narrowest figure
_TITLES = {'safety': 'Safety', 'helpfulness': 'Helpfulness', 'cosa': 'CoSA score'}
_LEAST_RANGE = {'safety': 0.2, 'helpfulness': 0.8, 'cosa': 0.8}


def draw_alignment(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
  """Writes the CoSA score of every policy by rule set, with its interval."""
  policies = result['policies']
  sets = shown(next(iter(policies.values())))
  metric = 'true_cosa' if knows_truth(policies) else 'cosa'
  step = 0.8 / len(policies)
  figure, ax = axes(7.5, 1.3 + (0.2 + 0.14 * len(policies)) * len(sets))
  for i, (policy, found) in enumerate(policies.items()):
    colour = SERIES[i % len(SERIES)]
    at = np.arange(len(sets)) + (i - (len(policies) - 1) / 2) * step
    known = [j for j, name in enumerate(sets) if found[name]]
    for y, name in ((at[j], sets[j]) for j in known):
      if is_number(found[name][metric]['low']):
        ax.plot(
          [found[name][metric][side] for side in ('low', 'high')],
          [y, y],
          color=colour,
          linewidth=2,
          alpha=0.5,
        )
    ax.plot(
      [found[sets[j]][metric]['value'] for j in known],
      at[known],
      _MARKERS[i % len(_MARKERS)],
      color=colour,
      markersize=7,
      label=short(policy, 40),
      clip_on=False,
      zorder=3,
    )
  for y in range(1, len(sets)):
    ax.axhline(y - 0.5, color='#dddddd', linewidth=0.8)
  ax.set_yticks(range(len(sets)), [short(name, 34) for name in sets], parse_math=False)
  ax.set(xlim=(0, 5), ylim=(-0.5, len(sets) - 0.5), xlabel=METRICS[metric][0])
  ax.invert_yaxis()
  ax.grid(False, axis='y')
  _name_series(ax)
  save(figure, path)


def draw_pareto(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
  """Writes helpfulness over safety, the frontier of each method as a line.

  Numbers beside points are a and b of sigmoid(a * score + b).

  Source: the paper's Figure 4.
  """
  figure, ax = axes(7, 5)
  points = result['points']
  swept = dict.fromkeys(p['method'] for p in points if p['a'] is not None)
  names = [*swept, *(n for n in dict.fromkeys(p['method'] for p in points) if n not in swept)]
  for i, name in enumerate(names):
    mine = [p for p in points if p['method'] == name]
    colour = SERIES[i % len(SERIES)] if name in swept else BEST
    _draw_method(ax, name, mine, colour, _MARKERS[i % len(_MARKERS)])
  source = 'share that break no rule' if result['true'] else 'mean P(safe)'
  level = 'true' if result['true'] else 'reward'
  ax.set(xlabel=f'Safety: {source}', ylabel=f'Helpfulness, 1 to 5 ({level})')
  ax.margins(0.08)
  _name_series(ax)
  save(figure, path)


def _draw_method(ax, name: str, points, colour: str, marker: str) -> None:
  x, y = (np.array([p[key]['value'] for p in points]) for key in ('safety', 'helpfulness'))
  for point in points:
    bars = []
    for key in ('safety', 'helpfulness'):
      metric = point[key]
      found = is_number(metric['low'])
      bars.append(
        [[max(metric['value'] - metric['low'], 0)], [max(metric['high'] - metric['value'], 0)]]
        if found
        else None
      )
    ax.errorbar(
      point['safety']['value'],
      point['helpfulness']['value'],
      xerr=bars[0],
      yerr=bars[1],
      color=colour,
      alpha=0.35,
      linewidth=1.2,
    )
    if point['a'] is not None:
      ax.annotate(
        f'{point["a"]:g}, {point["b"]:+g}',
        (point['safety']['value'], point['helpfulness']['value']),
        (6, 5),
        textcoords='offset points',
        fontsize=8,
        color=GREY,
      )
  # Its own frontier: what another method reaches does not cut the line.
  best = np.flatnonzero(frontier(list(zip(x, y, strict=True))))
  best = best[np.argsort(x[best])]
  ax.plot(x[best], y[best], color=colour, linewidth=1.5, linestyle='-' if len(best) > 1 else '')
  inside = np.setdiff1d(np.arange(len(x)), best)
  ax.plot(x[best], y[best], marker, color=colour, markersize=7, label=short(name, 40))
  ax.plot(x[inside], y[inside], marker, color=colour, markersize=7, fillstyle='none')


def draw_overoptimisation(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
  """Writes reward and truth over training steps, with their intervals.

  A dashed line is where they part.
  """
  curves = result['curves']
  steps = result['steps']
  figure = Figure(figsize=(3.9 * len(curves), 3.6), layout='constrained')
  panels = figure.subplots(1, len(curves), squeeze=False)[0]
  for ax, (name, curve) in zip(panels, curves.items(), strict=True):
    for side, colour, style, label in (
      ('proxy', UNSAFE, '--', 'reward'),
      ('oracle', SAFE, '-', 'truth'),
    ):
      found = curve[side]
      ax.plot(
        steps,
        [m['value'] for m in found],
        style,
        color=colour,
        label=label,
        marker='o' if len(steps) < 20 else '',
        markersize=4,
      )
      if all(is_number(m['low']) for m in found):
        ax.fill_between(
          steps,
          [m['low'] for m in found],
          [m['high'] for m in found],
          color=colour,
          alpha=0.15,
          linewidth=0,
        )
    if curve['parting_step'] is not None:
      ax.axvline(
        curve['parting_step'],
        color=BEST,
        linewidth=1,
        linestyle=':',
        label=f'part after {curve["parting_step"]:,}',
      )
    low, high = ax.get_ylim()
    room = max(_LEAST_RANGE[name] - (high - low), 0) / 2
    ax.set_ylim(low - room, high + room)  # What is constant shall look so.
    ax.set_title(_TITLES[name], loc='left')
    ax.set_xlabel('Step')
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for edge in ('top', 'right'):
      ax.spines[edge].set_visible(False)
    ax.grid(True, color='#dddddd', linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9)
  save(figure, path)


def _name_series(ax) -> None:
  """Puts the names above the axes, in as many columns as they leave room for."""
  longest = max(map(len, ax.get_legend_handles_labels()[1]))
  legend_above(ax, min(3, max(1, _LEGEND_LETTERS // (longest + 6))))
  for text in ax.get_legend().get_texts():
    text.set_parse_math(False)


# suite -> (draw(path, result), caption).
FIGURES = {
  'alignment': (draw_alignment, 'CoSA score of each policy by rule set, with its 95% interval.'),
  'pareto': (
    draw_pareto,
    'Safety and helpfulness of policies, each trained with the reward '
    'sigmoid(a · score + b); beside a point stand a and b. Lines join the '
    'policies of a method that no other of it beats in both.',
  ),
  'overoptimisation': (
    draw_overoptimisation,
    'What the reward says and what is true, on the same prompts, over '
    'training steps; bands are 95% intervals.',
  ),
}
