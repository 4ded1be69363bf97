"""Figures of probes and comparisons, in the style of `figures`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from csrm_jax.evals.definitions import METRICS
from csrm_jax.evals.figures import BEST, GREY, SAFE, SERIES, UNSAFE, axes, legend_above, save, short
from csrm_jax.evals.markdown import is_number

_POLICY = (
  # (variant, what it is, is the changed rule the one that is violated)
  ('strict', 'rule\nstands', True),
  ('leave_one_out', 'rule\nleft out', True),
  ('allow', 'rule\nallows', True),
  ('other_left_out', 'another\nleft out', False),
  ('other_allowed', 'another\nallows', False),
)
_MAX_ROWS = 20
_MARKERS = 'osD^vP*X'


def draw_policy(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
  """Writes the unsafe rate under each variant of the rules.

  Source: the paper's Figure 3 shows such rates.
  """
  figure, ax = axes(7, 3.8)
  true = result['true_rates']
  for x, (name, _, target) in enumerate(_POLICY):
    rate = result['rates'][name]
    ax.bar(
      x,
      rate,
      0.62,
      color=UNSAFE if target else SAFE,
      alpha=0.75,
      hatch=None if target else '////',
      edgecolor='white',
    )
    top = rate
    if true:
      ax.plot(x, true[name], 'D', color=BEST, markersize=6, zorder=3, clip_on=False)
      # The number stands above its bar, clear of the diamond.
      top = true[name] if rate <= true[name] < rate + 0.09 else rate
    ax.text(x, top + 0.03, f'{rate:.1%}', ha='center', va='bottom')
  ax.axhline(result['rates']['strict'], color=GREY, linewidth=1, linestyle='--')
  ax.set_xticks(range(len(_POLICY)), [text for _, text, _ in _POLICY])
  ax.set(ylim=(0, 1.14), ylabel='Called unsafe')
  ax.yaxis.set_major_formatter(PercentFormatter(1))
  ax.grid(False, axis='x')
  handles = [
    Patch(facecolor=UNSAFE, alpha=0.75, label='the violated rule changes'),
    Patch(
      facecolor=SAFE, alpha=0.75, hatch='////', edgecolor='white', label='another rule changes'
    ),
  ]
  if true:
    handles.append(ax.plot([], [], 'D', color=BEST, label='true rate')[0])
  ax.legend(
    handles=handles,
    loc='lower left',
    bbox_to_anchor=(0, 1),
    ncols=3,
    frameon=False,
    borderaxespad=0.2,
  )
  save(figure, path)


def draw_contradiction(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
  """Writes mean rewards by category: enforce, both clauses, allow.

  Source: the paper's Figure 5 shows such rewards.
  """
  rows = sorted(result['categories'], key=lambda c: (-c['num_examples'], c['category']))[:_MAX_ROWS]
  rows.sort(key=lambda c: c['reward']['both'])
  figure, ax = axes(7, 1.5 + 0.36 * len(rows))
  for y, row in enumerate(rows):
    reward = row['reward']
    ax.plot(
      [reward['enforce'], reward['allow']],
      [y, y],
      color='#bbbbbb',
      linewidth=3,
      zorder=1,
      solid_capstyle='round',
    )
    # The two orders of the clauses, of which "both" is the mean.
    ax.plot(
      [reward['enforce_allow'], reward['allow_enforce']],
      [y, y],
      '|',
      color=BEST,
      markersize=9,
      zorder=2,
    )
    for name, colour, marker in (
      ('enforce', UNSAFE, 's'),
      ('both', BEST, 'D'),
      ('allow', SAFE, 'o'),
    ):
      ax.plot(
        reward[name],
        y,
        marker,
        color=colour,
        markersize=7,
        zorder=3,
        label=''
        if y
        else {'enforce': 'rule forbids', 'both': 'both clauses', 'allow': 'rule allows'}[name],
        linestyle='',
      )
  labels = [f'{short(r["category"], 34)} ({r["num_examples"]:,})' for r in rows]
  ax.set_yticks(range(len(rows)), labels, parse_math=False)
  ax.set(
    xlim=(-0.02, 1.02),
    ylim=(-0.6, len(rows) - 0.4),
    xlabel='Mean reward, P(safe); bars: either order of the clauses',
  )
  legend_above(ax, 3)
  save(figure, path)


def draw_recall(
  path: str | os.PathLike, curve: Sequence[float], chance: Sequence[float], top_k: int
) -> None:
  """Writes the retrieval recall curve over k, and chance.

  Source: the paper's Figure 8.
  """
  figure, ax = axes(5.5, 4)
  k = np.arange(1, len(curve) + 1)
  ax.plot(
    k, curve, color=SAFE, linewidth=2, marker='o', markersize=4 if len(k) <= 40 else 0, label='BM25'
  )
  ax.plot(k, chance, color=GREY, linewidth=1.5, linestyle=':', label='at random')
  if top_k <= len(curve):
    kept = curve[top_k - 1]
    ax.plot([top_k, top_k], [0, kept], color=UNSAFE, linestyle='--')
    ax.plot(top_k, kept, 'D', color=UNSAFE, markersize=8, label=f'kept: k = {top_k}, {kept:.1%}')
  ax.set(
    xlim=(0.5, len(k) + 0.5),
    ylim=(0, 1.02),
    xlabel='Rules kept, k',
    ylabel='Violated rules among them',
  )
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.yaxis.set_major_formatter(PercentFormatter(1))
  ax.legend(loc='lower right', frameon=False)
  save(figure, path)


def draw_attacks(path: str | os.PathLike, result: Mapping[str, Any]) -> None:
  """Writes the flip rate of each suffix, with its interval."""
  rates = result['rates']
  figure, ax = axes(7, 1.2 + 0.34 * len(rates))
  top = 0.05
  for y, rate in enumerate(rates.values()):
    is_known = is_number(rate['value'])  # else nothing was caught
    value = rate['value'] if is_known else 0.0
    ax.barh(y, value, 0.62, color=UNSAFE, alpha=0.75)
    end = value
    if rate['low'] is not None and np.isfinite(rate['low']):
      ax.plot([rate['low'], rate['high']], [y, y], color=GREY, linewidth=2)
      end = max(end, rate['high'])
    ax.annotate(
      f'{value:.1%}' if is_known else '–', (end, y), (4, 0), va='center', textcoords='offset points'
    )
    top = max(top, end)
  ax.set_yticks(range(len(rates)), list(rates), parse_math=False)
  ax.invert_yaxis()
  # Rates near 0 shall look like what they are.
  ax.set(
    xlim=(0, min(max(top * 1.15, 0.25), 1.1)),
    xlabel=f'Turned into "safe", of {result["num_caught"]:,} caught',
  )
  ax.xaxis.set_major_formatter(PercentFormatter(1))
  ax.grid(False, axis='y')
  save(figure, path)


def draw_shares(path: str | os.PathLike, groups: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes, by rule set, the share labelled unsafe and the mean P(unsafe)."""
  names = list(groups)[:_MAX_ROWS]
  figure, ax = axes(7, 1.4 + 0.42 * len(names))
  rows = np.arange(len(names))
  for shift, colour, hatch, text, of in (
    (-0.19, GREY, None, 'labelled unsafe', lambda g: g['num_unsafe'] / g['num_examples']),
    (0.19, UNSAFE, '////', 'mean P(unsafe)', lambda g: g['mean_p_unsafe']),
  ):
    ax.barh(
      rows + shift,
      [of(groups[name]) for name in names],
      0.36,
      color=colour,
      alpha=0.75,
      hatch=hatch,
      edgecolor='white',
      label=text,
    )
  labels = [f'{short(n, 40)} ({groups[n]["num_examples"]:,})' for n in names]
  ax.set_yticks(rows, labels, parse_math=False)
  ax.set(xlim=(0, 1), xlabel='Share of the texts')
  ax.xaxis.set_major_formatter(PercentFormatter(1))
  ax.invert_yaxis()
  ax.grid(False, axis='y')
  legend_above(ax, 2)
  save(figure, path)


def draw_comparison(
  path: str | os.PathLike, scorers: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str
) -> bool:
  """Writes one metric of every scorer by benchmark; False where none has it.

  A black bar is the best reachable, where it is known.
  """
  names = [
    name
    for name in dict.fromkeys(n for r in scorers.values() for n in r)
    if any(_value(r, name, metric) is not None for r in scorers.values())
  ][:_MAX_ROWS]
  if not names:
    return False
  step = 0.8 / len(scorers)
  figure, ax = axes(7.5, 1.3 + 0.2 * len(scorers) + (0.2 + 0.16 * len(scorers)) * len(names))
  for i, (scorer, results) in enumerate(scorers.items()):
    colour, marker = SERIES[i % len(SERIES)], _MARKERS[i % len(_MARKERS)]
    label = short(scorer, 40)
    for y, name in enumerate(names):
      found = _value(results, name, metric)
      if found is None:
        continue
      at = y + (i - (len(scorers) - 1) / 2) * step
      if found['low'] is not None and np.isfinite(found['low']):
        ax.plot([found['low'], found['high']], [at, at], color=colour, linewidth=2, alpha=0.5)
      ax.plot(
        found['value'],
        at,
        marker,
        color=colour,
        markersize=7,
        label=label,
        linestyle='',
        clip_on=False,
        zorder=3,
      )
      label = ''
      if found['best'] is not None and i == 0:
        ax.plot([found['best']] * 2, [y - 0.4, y + 0.4], color=BEST, linewidth=1.5)
  for y in range(1, len(names)):
    ax.axhline(y - 0.5, color='#dddddd', linewidth=0.8)
  ax.set_yticks(range(len(names)), [short(n, 34) for n in names], parse_math=False)
  known = any(
    found and found['best'] is not None
    for name in names
    for found in [_value(next(iter(scorers.values())), name, metric)]
  )
  ax.set(
    ylim=(-0.5, len(names) - 0.5),
    xlabel=METRICS[metric][0] + ('; bar: best reachable' if known else ''),
  )
  low, high = ax.get_xlim()
  ax.set_xlim(0 if low < 0.3 else low, min(high, 1.02))
  ax.invert_yaxis()
  ax.grid(False, axis='y')
  legend_above(ax, min(len(scorers), 2))
  save(figure, path)
  return True


def _value(results, name: str, metric: str):
  found = results.get(name, {}).get('metrics', {}).get(metric)
  if found is None or found['value'] is None or not np.isfinite(found['value']):
    return None
  return found
