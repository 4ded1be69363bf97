"""The suite `real`: texts that people judged under many rules, measured rule by rule.

`evaluate_judged` scores all sets in one call of a score function, puts judges that read no rules
beside it, and writes what it finds. Reports of several runs, with the run as the unit:

python -m csrm_jax.evals.judged RUN1 RUN2 ...
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.core import checks, files, markdown
from csrm_jax.data import judged
from csrm_jax.data.judged import Judged, Rule
from csrm_jax.evals import bootstrap, metrics, padding, questions, results, words
from csrm_jax.evals.bootstrap import Measure
from csrm_jax.evals.questions import OTHER, SAFER, SINGLE, UNION, Item, Question
from csrm_jax.evals.results import Metric

MODEL = 'model'
ALL = 'all'  # all sets together
# Rules with fewer texts of a class have no AUROC, AUPRC or F1 of their own.
FEWEST = 5
# The texts that are asked of each rule, and of each union: about 6,000 and 14,000 questions in all.
MAX_ROWS = {'dev': 40, 'test': 100}
_UNION_TEXTS = {'dev': 1, 'test': 3}
# smECE is slow, and its interval is rough whatever the number of draws.
_SMECE_SAMPLES = 20


class Row(NamedTuple):
  """A row of the headline table: which number of which set, and what to aim at."""

  title: str
  set: str
  split: str
  metric: str
  aim: float | None = None
  above: float | None = None  # the aim is this far above TF-IDF on the same texts
  lower: bool = False  # lower is better


_REAL = results.load('real')
HEADLINE = tuple(Row(**row) for row in _REAL['headline'])
TITLES: Mapping[str, str] = _REAL['titles']  # of what the tables of the sets show, in this order


# --- Measures ------------------------------------------------------------------------------


def macro(fn: Callable[..., float], labels: np.ndarray, p: np.ndarray, rules: np.ndarray) -> float:
  """Returns the mean over rules of fn(labels, p) of each; nan where it is so for all.

  Rules of which fn is nan, as AUROC is in a draw with one class, are left out.
  """
  order = np.argsort(rules, kind='stable')
  ends = np.flatnonzero(np.diff(rules[order])) + 1
  values = np.array([fn(labels[rows], p[rows]) for rows in np.split(order, ends) if len(rows)])
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else math.nan


# {kind of pairs of rules: (split, metric)}
_NEGATED = 10
_FLIPS = {
  0: ('seen', 'flip'),
  1: ('mixed', 'flip'),
  2: ('unseen', 'flip'),
  _NEGATED: ('seen', 'flip_negated'),
  _NEGATED + 2: ('unseen', 'flip_negated'),
}


class Flips(NamedTuple):
  """The texts that break one rule and keep another, F of them, for K pairs of rules.

  A pair of rules has two directions: its first rule is broken and its second kept, or the reverse.
  """

  broken: np.ndarray  # int64 [F]: the question whose rule the text breaks
  kept: np.ndarray  # int64 [F]: that whose rule it keeps
  group: np.ndarray  # int64 [F]
  column: np.ndarray  # int64 [F]: 2 * pair + direction
  sets: np.ndarray  # int64 [K]: the set of each pair, whose pairs are averaged first
  # int64 [K]: how many of the two rules are unseen; and _NEGATED where one demands what the other
  # forbids.
  kinds: np.ndarray

  def wins(self, p: np.ndarray) -> np.ndarray:
    """Returns whether P(unsafe) is higher where the rule is broken, float64 [F]; a tie is .5."""
    broken, kept = p[self.broken], p[self.kept]
    return np.where(np.isnan(broken + kept), np.nan, (broken > kept) + 0.5 * (broken == kept))


def flips_of(asked: Sequence[Question]) -> Flips:
  """Returns the flips among single questions.

  A rule that demands what another forbids is nearly always broken where that one is seldom so: it
  is compared with that one only.
  """
  singles = [i for i, q in enumerate(asked) if q.part == SINGLE]
  duties = questions.negated(asked[i].rules[0] for i in singles)
  rows, groups, kinds = [], {}, {}
  for of_text in bootstrap.rows_by(asked[i].text for i in singles).values():
    for i, j in itertools.product([singles[row] for row in of_text], repeat=2):
      broken, kept = asked[i], asked[j]
      if broken.example.label == 'safe' or kept.example.label == 'unsafe':
        continue
      one, other = broken.rules[0], kept.rules[0]
      is_negated = duties.get(one) == other or duties.get(other) == one
      if not is_negated and (one in duties or other in duties):
        continue
      pair = broken.example.source, *sorted((one, other))
      kinds[pair] = (not broken.is_seen) + (not kept.is_seen) + _NEGATED * is_negated
      rows.append((i, j, groups.setdefault(broken.group, len(groups)), pair, one > other))
  numbers = {pair: k for k, pair in enumerate(kinds)}
  sets = {name: i for i, name in enumerate(dict.fromkeys(name for name, *_ in kinds))}
  found = [(i, j, group, 2 * numbers[pair] + second) for i, j, group, pair, second in rows]
  return Flips(
    *np.array(found, np.int64).reshape(-1, 4).T,
    np.array([sets[name] for name, *_ in kinds], np.int64),
    np.array([*kinds.values()], np.int64),
  )


def balanced_flip(wins: np.ndarray, columns: np.ndarray, sets: np.ndarray) -> float:
  """Returns how often P(unsafe) is higher under the rule that a text breaks than under a kept one.

  Of each pair of rules both directions count the same, so that a judge that knows the rules and
  not the text has exactly one half; pairs with one direction only are left out. The mean over
  pairs of each set, and over sets. The arguments are as in `Flips`.
  """
  won, total = (
    np.bincount(columns, weights, 2 * len(sets)).reshape(-1, 2) for weights in (wins, None)
  )
  use = (total > 0).all(1)
  if not use.any():
    return math.nan
  right = (won[use] / total[use]).mean(1)
  return float(np.mean([right[sets[use] == s].mean() for s in np.unique(sets[use])]))


def measure(
  asked: Sequence[Question],
  p: np.ndarray,
  num_samples: int = 0,
  threshold: float | None = None,
  flips: Flips | None = None,
) -> dict[str, dict[str, Metric]]:
  """Returns {split: {metric: {value, low, high}}} of one judge on one set, or on all.

  Args:
    p: P(unsafe) of the questions, [N]; a split with nan is left out.
    num_samples: Draws of groups for an interval; 0 for none.
    threshold: On P(unsafe), fitted on other rows, for `f1_tuned`.
    flips: Those of the questions, where they are known already.
  """
  found: dict[str, dict[str, Metric]] = {}
  units = _numbered(q.group for q in asked)
  m = Measure(units, num_samples)
  for name, rows in splits(asked).items():
    if len(rows) and not np.isnan(p[rows]).any():
      some = [asked[i] for i in rows]
      of_split = _MEASURES.get(name, _of_singles)
      found[name] = of_split(some, p[rows], m.over(units[rows]), threshold)
  flips = flips or flips_of(asked)
  wins, fn = flips.wins(p), functools.partial(balanced_flip, sets=flips.sets)
  for kind, (name, metric) in _FLIPS.items():
    rows = np.flatnonzero(flips.kinds[flips.column // 2] == kind)
    if len(rows) and not np.isnan(wins[rows]).any():
      of_groups = m.over(flips.group)
      found.setdefault(name, {})[metric] = of_groups(fn, wins, flips.column, rows=rows)
  # Real data do not know the best; None is what is not a number.
  return {
    name: {
      metric: {
        key: None if cell[key] is None or math.isnan(cell[key]) else float(cell[key])
        for key in ('value', 'low', 'high')
      }
      for metric, cell in cells.items()
    }
    for name, cells in found.items()
  }


def splits(asked: Sequence[Question]) -> dict[str, np.ndarray]:
  """Returns {split: rows}."""
  part = np.array([q.part for q in asked], np.str_)
  seen, held = (np.array([getattr(q, n) for q in asked], bool) for n in ('is_seen', 'is_held'))
  levels = np.array([q.level >= 0 for q in asked], bool)
  duties = questions.negated(q.rules[0] for q in asked)
  duty = np.array([q.rules[0] in duties for q in asked], bool)
  single, union = part == SINGLE, part == UNION
  masks = {
    'seen': single & seen,
    'seen, known words': single & seen & ~held,
    'seen, held words': single & seen & held,
    'seen, must not': single & seen & ~duty & duty.any(),
    'unseen': single & ~seen,
    'levels': single & seen & levels,
    'unseen levels': single & ~seen & levels,
    'unions': union & seen,
    'unions with unseen': union & ~seen,
    'pairs': np.isin(part, (SAFER, OTHER)),
  }
  return {name: np.flatnonzero(mask) for name, mask in masks.items()}


def _numbered(keys) -> np.ndarray:
  return np.unique(list(keys), return_inverse=True)[1]


def _labels(asked: Sequence[Question]) -> np.ndarray:
  return metrics.labels_of([q.example for q in asked])


def measurable(labels: np.ndarray, rules: np.ndarray) -> np.ndarray:
  """Returns the rows of rules with at least FEWEST texts of each class."""
  unsafe, total = np.bincount(rules, labels), np.bincount(rules)
  return np.flatnonzero((np.minimum(unsafe, total - unsafe) >= FEWEST)[rules])


def _verdicts(threshold: float | None) -> dict[str, Callable[..., float]]:
  """Returns {metric: (labels, p) -> value} of verdicts and of their order."""
  fns = {name: getattr(metrics, name) for name in ('auroc', 'auprc', 'f1')}
  if threshold is not None:
    fns['f1_tuned'] = functools.partial(metrics.f1, threshold=threshold)
  return fns


def _of_singles(
  asked, p, m: Measure, threshold: float | None, all_words: bool = False
) -> dict[str, Metric]:
  """Measures single rules; of `all_words` their calibration too with care, which is slow."""
  labels, rules = _labels(asked), _numbered(q.rules[0] for q in asked)
  rows = measurable(labels, rules)
  found = {
    name: m(functools.partial(macro, fn), labels, p, rules, rows=rows)
    for name, fn in _verdicts(threshold).items()
  }
  found['brier'] = m(functools.partial(macro, metrics.brier), labels, p, rules)
  found |= _pooled(labels, p, m if all_words else dataclasses.replace(m, num_samples=0))
  if all_words and len({q.example.source for q in asked}) == 1:
    found['smece'] = m(functools.partial(macro, metrics.smece), labels, p, rules, num_samples=0)
  return found


def _pooled(labels, p, m: Measure) -> dict[str, Metric]:
  num = min(m.num_samples, _SMECE_SAMPLES)
  return {
    'smece_pooled': m(metrics.smece, labels, p, centred=True, num_samples=num),
    'brier_pooled': m(metrics.brier, labels, p),
  }


def _of_levels(asked, p, m: Measure, threshold: float | None) -> dict[str, Metric]:
  """Measures rules that lie within each other: those of one level together, and their order."""
  del threshold
  labels, levels = _labels(asked), np.array([q.level for q in asked])
  fn = functools.partial(macro, metrics.auroc)
  found = {'level_auroc': m(fn, labels, p, levels, rows=measurable(labels, levels))}
  ordered, grades, groups = [], [], []
  for rows in bootstrap.rows_by(q.text for q in asked).values():
    values = {asked[i].rules[0]: p[i] for i in rows}
    pairs = [
      (p[i], values[strict]) for i in rows for strict in asked[i].stricter if strict in values
    ]
    if pairs:
      ordered.append(all(lenient <= strict for lenient, strict in pairs))
      grades.append((np.mean(p[rows]), np.mean([asked[i].share for i in rows])))
      groups.append(m.units[rows[0]])
  if ordered:
    over = m.over(np.array(groups))
    found['monotone'] = over(metrics.mean, np.array(ordered, np.float64))
    found['spearman'] = over(metrics.spearman, *np.array(grades).T)
  return found


def _of_unions(asked, p, m: Measure, threshold: float | None) -> dict[str, Metric]:
  labels = _labels(asked)
  found = {name: m(fn, labels, p) for name, fn in _verdicts(threshold).items()}
  return found | _pooled(labels, p, m)


def _of_pairs(asked, p, m: Measure, threshold: float | None) -> dict[str, Metric]:
  del threshold
  # The sides of a pair stand beside each other.
  half = dataclasses.replace(m, units=m.units[::2])
  return {'accuracy': half(metrics.pair_accuracy, -p[::2], -p[1::2])}


_of_all_words = functools.partial(_of_singles, all_words=True)
_MEASURES = {
  'seen': _of_all_words,
  'unseen': _of_all_words,
  'levels': _of_levels,
  'unseen levels': _of_levels,
  'unions': _of_unions,
  'unions with unseen': _of_unions,
  'pairs': _of_pairs,
}


def own_or(asked: Sequence[Question], p: np.ndarray) -> np.ndarray:
  """Returns what the judge's verdicts on single rules make of unions, [N]; nan where not asked."""
  single = {
    (q.text, q.rules[0]): value for q, value in zip(asked, p, strict=True) if q.part == SINGLE
  }
  return np.array(
    [
      1 - math.prod(1 - single.get((q.text, key), math.nan) for key in q.rules)
      if q.part == UNION
      else math.nan
      for q in asked
    ]
  )


# --- The suite -------------------------------------------------------------------------------


def evaluate_judged(
  score_fn: Callable[..., np.ndarray] | None,
  sets: Mapping[str, Sequence[Item]],
  side: str = 'dev',
  fold: str = '',
  out_dir: str | os.PathLike | None = None,
  *,
  trained: Collection[str] | None = None,
  known: Callable[[str], Mapping[str, Rule]] | None = None,
  order: str = 'rules_first',
  max_rows: int = -1,
  num_samples: int = 200,
  with_words: bool = True,
  thresholds: Mapping[str, float] | None = None,
  about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the numbers of the suite, and writes them.

  In out_dir: real.json, real.md and scores.jsonl, one line a question, without its text.

  Args:
    score_fn: Examples -> scores, [N] nats; called for all questions, then for caught violations
      with words around them (see `padding`). None measures the other judges alone.
    sets: {name: texts and pairs} of all sides; judges that count words are fitted on 'train'.
    side: 'dev' or 'test'.
    fold: The rules that training left out; see `judged.Rule`.
    trained: The sets that the model was trained on; None for all. Others may share their rules.
    known: Returns {key: rule} of a file of rules by its name, the first part of keys; None for
      judged.rules.
    order: What the scorer's prompts begin with: 'rules_first' or 'conversation_first'.
    max_rows: The texts that are asked of each rule; 0 for all, below 0 for MAX_ROWS.
    num_samples: Draws for an interval of the scorer's numbers.
    with_words: Whether to fit the judges of `words`.
    thresholds: {set: threshold} that the report of another side found.
    about: More facts, for the report.

  Raises:
    ValueError: The side is unknown, a score is not finite, or there is nothing to ask.
  """
  checks.one_of('side', side, judged.SIDES[1:])
  if max_rows < 0:
    max_rows = MAX_ROWS[side]
  rules = {name: questions.rules_of(items, known or judged.rules) for name, items in sets.items()}
  may_train = {k for of in rules.values() for k, rule in of.items() if rule.is_seen(fold)}
  seen = may_train & {
    k for name in rules if trained is None or name in trained for k in rules[name]
  }
  asked = {
    name: questions.ask(
      name,
      questions.on_side(items, rules[name], side),
      rules[name],
      seen=seen,
      max_rows=max_rows,
      union_texts=_UNION_TEXTS[side],
    )
    for name, items in sets.items()
  }
  asked = {name: some for name, some in asked.items() if some}
  if not asked:
    raise ValueError(f'no judged texts on the side {side}: give data sets that have some')
  train = {name: questions.on_side(sets[name], rules[name], 'train') for name in asked}
  flat = [q for some in asked.values() for q in some]
  judges: dict[str, dict[str, np.ndarray]] = {name: {} for name in asked}
  scores = None
  if score_fn is not None:
    scores = questions.in_order(flat, score_fn, order)
    scores = metrics.check_finite(scores, [q.example.id for q in flat])
    p_unsafe = metrics.p_unsafe_from_scores(scores)
    ends = np.cumsum([len(some) for some in asked.values()])[:-1]
    for name, p in zip(asked, np.split(p_unsafe, ends), strict=True):
      judges[name] = {MODEL: p, 'own_or': own_or(asked[name], p)}
  if with_words:
    overall = _overall_rate(train, may_train)
    for name, some in asked.items():
      judges[name] |= words.judge(some, train[name], may_train & set(rules[name]), overall)
  found = _numbers(asked, judges, num_samples, thresholds or {})
  around = {}
  if score_fn is not None:
    rows = [i for i, q in enumerate(flat) if q.part == SINGLE and q.is_seen]
    around = padding.measure([flat[i].example for i in rows], scores[rows], score_fn)
  if around:
    worst = {'neutral': padding.worst(around, '16'), 'attacks': padding.worst(around, 'attack')}
    found['sets'][ALL]['numbers']['around'] = {
      MODEL: {name: {'value': value, 'low': None, 'high': None} for name, value in worst.items()}
    }
  everything = [item for items in train.values() for item in items]
  out = {
    **(about or {}),
    'side': side,
    'fold': fold,
    'trained': None if trained is None else sorted(trained),
    'max_rows': max_rows,
    'num_questions': len(flat),
    'num_texts': len({q.text for q in flat}),
    'questions': files.digest([[q.example.id, q.example.safety.digest()] for q in flat]),
    'shared_texts': {name: questions.num_shared(some, everything) for name, some in asked.items()},
    'drops': {name: dict(getattr(sets[name], 'drops', {})) for name in asked},
    'around': around,
    **found,
  }
  out['headline'] = headline(out['sets'])
  if out_dir is not None:
    _write(pathlib.Path(out_dir), out, flat, scores)
  return out


def _overall_rate(train: Mapping[str, Sequence[Item]], keys: Collection[str]) -> float:
  texts = [item for items in train.values() for item in items if isinstance(item, Judged)]
  broken = [share >= 0.5 for t in texts for key, share in t.verdicts.items() if key in keys]
  return float(np.mean(broken)) if broken else math.nan


def _numbers(asked, judges, num_samples: int, thresholds: Mapping[str, float]) -> dict[str, Any]:
  """Returns {'sets': {set: counts and the numbers of each judge}, 'thresholds': …}."""
  everything = {ALL: [q for some in asked.values() for q in some]} | asked
  names = list(dict.fromkeys(name for of_set in judges.values() for name in of_set))
  judges = {ALL: {n: np.concatenate([j[n] for j in judges.values()]) for n in names}} | judges
  found, fitted = {}, {}
  for name, some in everything.items():
    numbers: dict[str, dict[str, Any]] = {}
    flips = flips_of(some)
    for judge, p in judges[name].items():
      num = num_samples if judge == MODEL else 0
      threshold = thresholds.get(name) if judge == MODEL else None
      for split, cells in measure(some, p, num, threshold, flips).items():
        numbers.setdefault(split, {})[judge] = cells
    found[name] = {'counts': counts(some), 'numbers': numbers}
    if MODEL in judges[name]:
      rows = splits(some)['seen']
      labels = _labels([some[i] for i in rows])
      if labels.any():
        fitted[name] = metrics.best_threshold(labels, judges[name][MODEL][rows])
      if name != ALL:
        found[name]['rules'] = _by_rule(some, judges[name][MODEL])
  return {'sets': found, 'thresholds': fitted}


def counts(asked: Sequence[Question]) -> dict[str, dict[str, Any]]:
  """Returns {split: how many questions, texts, groups and rules, and the share of unsafe ones}."""
  found = {}
  for name, rows in splits(asked).items():
    if not len(rows):
      continue
    some = [asked[i] for i in rows]
    labels, rules = _labels(some), _numbered(' + '.join(q.rules) for q in some)
    num_rules = int(rules.max()) + 1
    found[name] = {
      'questions': len(some),
      'texts': len({q.text for q in some}),
      'groups': len({q.group for q in some}),
      'rules': num_rules,
      'rules_too_rare': num_rules - len(np.unique(rules[measurable(labels, rules)])),
      'unsafe': float(labels.mean()),
    }
  return found


def _by_rule(asked: Sequence[Question], p: np.ndarray) -> dict[str, dict[str, Any]]:
  labels = _labels(asked)
  return {
    key: {
      'num': len(rows),
      'unsafe': int(labels[rows].sum()),
      'mean_p_unsafe': float(p[rows].mean()),
      'seen': asked[rows[0]].is_seen,
      **{
        name: None if math.isnan(value := getattr(metrics, name)(labels[rows], p[rows])) else value
        for name in ('auroc', 'auprc')
      },
    }
    for key, rows in bootstrap.rows_by(
      q.rules[0] if q.part == SINGLE else '' for q in asked
    ).items()
    if key
  }


def _write(folder: pathlib.Path, out: Mapping[str, Any], asked, scores) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  if scores is not None:
    lines = [
      {
        'id': q.example.id,
        'set': q.example.source,
        'rules': q.rules,
        'part': q.part,
        'held_words': q.is_held,
        'seen': q.is_seen,
        'label': q.example.label,
        'share': None if math.isnan(q.share) else q.share,
        'score': float(score),
      }
      for q, score in zip(asked, scores, strict=True)
    ]
    files.write(folder / 'scores.jsonl', ''.join(f'{json.dumps(line)}\n' for line in lines))
  files.write(folder / 'real.md', to_markdown(out))
  # Last: where it is, all is written.
  files.write_json(folder / 'real.json', out)


# --- Tables ----------------------------------------------------------------------------------


def headline(sets: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the rows of HEADLINE that have a number: title, each judge's metric, and the aim."""
  rows = []
  for row in HEADLINE:
    judges = sets.get(row.set, {}).get('numbers', {}).get(row.split, {})
    cells = {name: found[row.metric] for name, found in judges.items() if row.metric in found}
    if not cells:
      continue
    aim = row.aim
    tfidf = cells.get('tfidf', {}).get('value')
    if row.above is not None:
      aim = None if tfidf is None else tfidf + row.above
    ours = cells.get(MODEL, {}).get('value')
    # What is only to be beaten is not reached by a tie.
    is_met = None
    if ours is not None and aim is not None:
      gap = aim - ours if row.lower else ours - aim
      is_met = gap > 0 if row.above == 0 else gap >= 0
    rows.append({'title': row.title, 'aim': aim, 'lower': row.lower, 'is_met': is_met, **cells})
  return rows


def headline_table(out: Mapping[str, Any]) -> str:
  """Returns the table of the headline in Markdown."""
  header = ['', 'model', 'TF-IDF + LR', 'rule-blind', 'text-blind', 'aim', '']
  rows = []
  for row in out['headline']:
    sign = '≤' if row['lower'] else '≥'
    cells = [_cell(row.get(name)) for name in (MODEL, 'tfidf', 'rule_blind', 'text_blind')]
    aim = '' if row['aim'] is None else f'{sign} {row["aim"]:.3f}'
    met = {None: '', True: 'met', False: 'missed'}[row['is_met']]
    rows.append([row['title'], *cells, aim, met])
  return markdown.table(header, rows)


def to_markdown(out: Mapping[str, Any]) -> str:
  """Returns the whole report in Markdown."""
  shared = sum(out['shared_texts'].values())
  parts = [
    f'# Suite real, {out["side"]} side',
    f'{out["num_questions"]:,} questions; at most {out["max_rows"] or "all"} texts a rule. '
    f'Rules left out of training: fold {out["fold"]!r}, those that no run trains on, and those of '
    'sets that this one was not trained on. '
    f'Intervals are 95 % bootstrap intervals over prompts. Of {out["num_texts"]:,} texts '
    f'{shared} have their text or prompt on the training side of some set.',
    headline_table(out),
  ]
  for name, of_set in out['sets'].items():
    parts.append(f'## {markdown.escape(name)}')
    for split, judges in of_set['numbers'].items():
      about = of_set['counts'].get(split, {})
      names = [n for n in TITLES if any(n in cells for cells in judges.values())]
      rows = [
        [judge.replace('_', '-'), *(_cell(cells.get(n)) for n in names)]
        for judge, cells in judges.items()
      ]
      said = ''
      if about:
        said = (
          f': {about["questions"]:,} questions on {about["texts"]:,} texts of {about["groups"]:,}'
          f' groups under {about["rules"]} rules, {about["unsafe"]:.1%} unsafe'
        )
        if about['rules_too_rare'] and 'auroc' in names:
          said += f'; {about["rules_too_rare"]} rules have too few texts of a class to be ranked'
      parts += [f'**{split}**{said}', markdown.table(['', *(TITLES[n] for n in names)], rows)]
  return '\n\n'.join(parts) + '\n'


def _cell(metric: Mapping[str, Any] | None) -> str:
  if metric is None or metric['value'] is None:
    return markdown.NONE
  text = markdown.number(metric['value'])
  if metric.get('low') is None:
    return text
  return f'{text} [{markdown.number(metric["low"])}, {markdown.number(metric["high"])}]'


# --- Several runs ----------------------------------------------------------------------------


def aggregate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the mean over runs of each number of the model, with its 95 % t-interval.

  The run is the unit: seeds, or folds that left out other rules. Other judges keep the mean.

  Raises:
    ValueError: There are fewer than two runs, or they were asked different questions.
  """
  if len(runs) < 2:
    raise ValueError(f'{len(runs)} runs: an interval over runs needs two or more')
  for name in ('side', 'questions'):
    values = {run[name] for run in runs}
    if len(values) > 1:
      raise ValueError(
        f'the runs differ in {name!r} ({", ".join(sorted(values))}): evaluate all on the same side,'
        ' with the same data and max_rows'
      )
  sets: dict[str, Any] = {}
  for name in runs[0]['sets']:
    sets[name] = {'counts': runs[0]['sets'][name]['counts'], 'numbers': {}}
    cells: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
      for split, judges in run['sets'][name]['numbers'].items():
        for judge, of_judge in judges.items():
          for metric, cell in of_judge.items():
            if cell['value'] is not None:
              cells.setdefault((split, judge, metric), []).append(cell['value'])
    for (split, judge, metric), values in cells.items():
      # A number that some runs lack is no mean over the runs.
      if len(values) == len(runs):
        mean, half = bootstrap.mean_and_interval(values)
        low, high = (mean - half, mean + half) if judge == MODEL else (None, None)
        numbers = sets[name]['numbers'].setdefault(split, {}).setdefault(judge, {})
        numbers[metric] = {'value': mean, 'low': low, 'high': high}
  same = ('side', 'max_rows', 'num_questions', 'num_texts', 'questions', 'shared_texts')
  out = {'num_runs': len(runs), **{key: runs[0][key] for key in same}, 'sets': sets}
  out['fold'] = ', '.join(sorted({run['fold'] for run in runs}))
  out['headline'] = headline(sets)
  return out


def main(paths: Sequence[str]) -> None:
  """Prints the headline of one run, or the mean of several."""
  if not paths:
    raise ValueError('give work directories of configs/eval.py:real, or their real.json')
  found = [pathlib.Path(path).expanduser() for path in paths]
  runs = [files.read_json(path / 'real.json' if path.is_dir() else path) for path in found]
  out = runs[0] if len(runs) == 1 else aggregate(runs)
  print(f'{out["side"]} side, {out.get("num_runs", 1)} runs\n\n{headline_table(out)}')


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except (ValueError, OSError) as error:
    print('error:', error, file=sys.stderr)
    sys.exit(2)
