"""Makes training data from conversations by changing their rules.

It writes workdir/data.jsonl, which configs/rm.py:data=jsonl,path=... trains on: examples with their
p+ and p- (CCA), and strictness pairs (SA). A data card and the report of strictness augmentation
come with it. Other stages write failures of a model in its place, or rules that explain labels.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from csrm_jax import config as config_lib
from csrm_jax.augmentation import (
  beam,
  categories,
  failures,
  induction,
  proposers,
  report,
  requests,
  strictness,
  weights,
)
from csrm_jax.core import checks, files, journal as journal_lib, progress
from csrm_jax.data import catalogue, forms, pipeline, sources
from csrm_jax.data.judged import Judged
from csrm_jax.reward import model as reward_model
from csrm_jax.ruleworld import alarms, defects, examples as ruleworld_examples, proposer as world
from csrm_jax.runners import align, search
from csrm_jax.safety import augment as augment_lib
from csrm_jax.safety.schema import Example, Pair, SafetyConfig

# The journal is written after so many conversations for each request that runs at once. A run that
# is killed loses no more than these.
_PIECE = 8
# Has a line for each reply of an endpoint.
_PAID = 'paid.jsonl'
PROPOSERS = ('oracle', 'endpoint', 'model')


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Augments config.source and writes the files of the module docstring into workdir."""
  start = time.monotonic()
  _check(config)
  if config.failures.model:
    _find_failures(config, workdir)
    return
  if config.induce.enabled:
    _induce(config, workdir)
    return
  examples, drops = _read(config.source, config.seed, with_pairs=bool(config.weights.rule))
  usage = collections.Counter()  # Beam's workers have proposers of their own, which report here.
  log, weighed = _make_log(workdir / 'log.jsonl'), []
  if config.weights.rule:
    examples, weighed = _weigh(config, workdir, examples, drops, log)
  proposer = _make_proposer(config, workdir)
  judge = _make_judge(config)
  made, outcomes, pairs, num_pairs = examples, [], (), 0
  with (
    journal_lib.Journal(workdir / 'journal_categories.jsonl') as done,
    journal_lib.Journal(workdir / 'journal_strictness.jsonl') as ordered,
  ):
    if config.categories.enabled:
      with _progress(len(examples), 'categories', log) as progress:
        checked = categories.propose_all(
          examples,
          lambda some: categories.propose_some(some, proposer, judge),
          _PIECE * proposer.concurrency,
          done,
          progress,
          _make_map(config, workdir, usage),
        )
      made = list(map(categories.attach, examples, checked))
      drops.update(reason for item in checked for reason in item.drops)
    if config.strictness.enabled:
      names = [field.name for field in dataclasses.fields(strictness.Settings)]
      settings = strictness.Settings(**{name: config.strictness[name] for name in names})
      pools = strictness.make_pools(examples, settings.pool_size, config.seed)
      with _progress(len(pools), 'strictness', log) as progress:
        outcomes = strictness.order_all(pools, proposer, judge, settings, ordered, progress)
      _report(workdir, config, proposer.name, outcomes, settings)
      drops.update(report.total_drops(outcomes, settings))
      pairs, num_pairs = _pairs(outcomes, pools, config.strictness.max_pairs, config.seed)
    pairs, num_pairs = itertools.chain(weighed, pairs), num_pairs + len(weighed)
    path = workdir / 'data.jsonl'
    with journal_lib.writing(path):
      digest = _write_lines(path, itertools.chain(made, pairs))
    usage.update(proposer.usage())
    card = _make_card(config, proposer.name, drops, usage) | {
      'digest': digest,
      'counts': _count(made, outcomes, num_pairs - len(weighed)),
      'paid': _sum_paid(config, workdir / _PAID),
    }
    with journal_lib.writing(workdir / 'card.json'):
      _write_card(workdir, card)
    if config.array_record:
      _prepare(workdir, path, config.beam)
  seconds = time.monotonic() - start
  log([{'event': 'done', 'time_s': round(seconds, 3), **card['counts']}])
  print(f'{len(made):,} examples and {num_pairs:,} pairs in {seconds:.1f} s: {path}')


def _check(config: ml_collections.ConfigDict) -> None:
  if config.failures.model:
    if config.failures.num_samples < 2:
      raise ValueError(
        f'config.failures.num_samples={config.failures.num_samples} must be at least 2'
      )
    if not config.judge:
      raise ValueError('failures need a second judge: give --config.judge=PATH of a reward model')
    return
  if config.induce.enabled:
    if not config.judge:
      raise ValueError('induction tests rules by a judge: give --config.judge=PATH of a model')
    checks.at_least(config.induce, ('num_rounds',))
    if not 0 < config.induce.eval_fraction < 1:
      raise ValueError(
        f'config.induce.eval_fraction={config.induce.eval_fraction} must be between 0 and 1'
      )
    return
  if not (config.categories.enabled or config.strictness.enabled or config.weights.rule):
    raise ValueError(
      'config.categories.enabled and config.strictness.enabled are both false,'
      ' and config.weights.rule is empty: nothing to do; set one'
    )
  if config.weights.rule:
    config_lib.choose('config.weights.rule', weights.WEIGHTS, config.weights.rule)
    if not config.weights.model:
      raise ValueError(
        f'config.weights.rule={config.weights.rule!r} needs a model to stand on: give'
        ' --config.weights.model=PATH of a reward model or of weights'
      )
  if config.strictness.enabled and not config.judge:
    raise ValueError(
      'strictness augmentation needs a classifier: give --config.judge=PATH of'
      ' a reward model, or --config.strictness.enabled=false'
    )


def _weigh(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  items: Sequence[Example | Pair],
  drops: collections.Counter,
  log: Callable[..., None],
) -> tuple[list[Example], list[Pair]]:
  """Returns examples and pairs as the rule of weights leaves them; writes the votes beside."""
  own = config.weights
  with (
    journal_lib.Journal(workdir / 'journal_weights.jsonl') as done,
    _progress(len(items), 'weights', log) as update,
  ):
    votes = weights.judge(
      items,
      own.model,
      done,
      update,
      num_folds=own.num_folds,
      num_members=own.num_members,
      decay=own.decay,
      seed=config.seed,
    )
  found = config_lib.choose('config.weights.rule', weights.WEIGHTS, own.rule)(votes)
  path = workdir / 'votes.jsonl'
  with journal_lib.writing(path):
    files.write(path, ''.join(json.dumps(row) + '\n' for row in weights.rows(items, votes, found)))
  made = weights.apply(items, found)
  drops['distrusted'] += len(items) - len(made)
  if not made:
    raise ValueError(f'config.weights.rule={own.rule!r} leaves no row; see {path}')
  turned = 0 if found.flip is None else int(found.flip.sum())
  print(f'weights: {turned:,} of {len(items):,} rows turned, {len(items) - len(made):,} left out')
  examples = [item for item in made if isinstance(item, Example)]
  return examples, [item for item in made if isinstance(item, Pair)]


def _find_failures(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes the failures of config.failures.model as data.jsonl, with a card."""
  own = config.failures
  rm = reward_model.load(own.model, allow_out_of_domain=True)
  judge = _make_judge(config)
  made = config_lib.load_module('rl').get_config(own.rl)
  made.seed = config.seed
  prompts = align.make_prompts(made)[0][: own.num_prompts or None]
  about = [rm.digest, config.judge, own.rl, own.num_samples]
  draw = functools.cache(lambda: search.make_sampler(made))  # weights are read where needed

  def unsafe(examples):
    asked = [(e, category) for e in examples for category in e.safety.categories]
    fires = judge([e.conversation for e, _ in asked], [category for _, category in asked])
    broken = {id(e) for (e, _), yes in zip(asked, fires, strict=True) if yes}
    return [id(e) in broken for e in examples]

  def look(group, seed):
    drawn = [[s.example() for s in of] for of in draw()(group, own.num_samples, seed)]
    scores = np.split(rm.score_fn([e for of in drawn for e in of]), len(group))
    return [failures.find(*row, unsafe) for row in zip(drawn, scores, strict=True)]

  found: list[dict[str, Any]] = []
  with (
    journal_lib.Journal(workdir / 'journal_failures.jsonl') as done,
    _progress(len(prompts), 'failures', _make_log(workdir / 'log.jsonl')) as update,
  ):
    for start in range(0, len(prompts), search.PROMPTS_AT_ONCE):
      group, seed = prompts[start : start + search.PROMPTS_AT_ONCE], config.seed + start
      key = journal_lib.key([about, seed, group])
      if key not in done:
        done.put(key, [one.to_dict() for one in look(group, seed)])
      found += done[key]
      update(len(group), [])
  rows = [row for one in found for row in one['rows']]
  counts = {name: sum(one[name] for one in found) for name in ('fooled', 'refused')}
  counts |= {'prompts': len(found), 'rows': len(rows)}
  path = workdir / 'data.jsonl'
  with journal_lib.writing(path):
    files.write(path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
    card = {'model': own.model, 'judge': config.judge, 'policy': own.rl, 'seed': config.seed}
    card |= {'num_samples': own.num_samples, 'digest': _digest(path), 'counts': counts}
    _write_card(workdir, card)
  print(
    f'of {len(found):,} prompts the best of {own.num_samples} is called safe and is not for '
    f'{counts["fooled"]:,}, the worst is called unsafe and is not for {counts["refused"]:,}: {path}'
  )


def _induce(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes the rules that explain the labels of config.source best as rules.json, with a card."""
  own, source = config.induce, config.source
  if source.name == 'ruleworld':
    made = [
      alarms.alarm(config.seed, i, own.rules, own.false_alarms) for i in range(source.num_examples)
    ]
    made = _spoil(made, source.defect, config.seed)
  else:
    made, _ = _read(source, config.seed, no_rules=True)
  taught, held_out = sources.split(made, own.eval_fraction, config.seed)
  if not taught or not held_out:
    raise ValueError(
      f'{len(taught)} labelled rows to learn from and {len(held_out)} held out; give more rows'
    )
  proposer, judge = _make_proposer(config, workdir), _make_judge(config)
  with (
    journal_lib.Journal(workdir / 'journal_induction.jsonl') as done,
    _progress(own.num_rounds, 'induction', _make_log(workdir / 'log.jsonl')) as update,
  ):
    rounds = induction.induce(
      taught,
      proposer,
      judge,
      done,
      update,
      about=[config.proposer, proposer.name, config.judge],
      num_rounds=own.num_rounds,
      num_shown=own.num_shown,
      seed=config.seed,
    )
  if not rounds:
    raise ValueError(f'no rules came in {own.num_rounds} rounds; {workdir / "log.jsonl"} says why')
  best = max(rounds, key=lambda one: one.agreement)
  fires = np.array(induction.where(best.rules, [e.conversation for e in held_out], judge))
  heard = np.array([e.label == 'unsafe' for e in held_out])
  found = {
    'agreement': best.agreement,
    'agreement_held_out': float((fires == heard).mean()),
    'agreement_of_no_rules': float((~heard).mean()),
    'missed_held_out': int((heard & ~fires).sum()),
    'false_held_out': int((fires & ~heard).sum()),
  }
  if source.name == 'ruleworld':
    broken = np.array([e.probability > 0 for e in held_out])
    found['agreement_with_hidden_rules'] = float((fires == broken).mean())
  counts = {'rows': len(taught), 'held_out': len(held_out), 'rounds': len(rounds)}
  with journal_lib.writing(workdir / 'rules.json'):
    files.write_json(
      workdir / 'rules.json', SafetyConfig(best.rules, 'induced').to_dict(), indent=1
    )
    card = {'proposer': config.proposer, 'model': proposer.name, 'judge': config.judge}
    card |= {'seed': config.seed, 'source': source.name, 'path': source.path, **found}
    card |= {'counts': counts, 'rounds': {i: one.agreement for i, one in enumerate(rounds)}}
    card |= {
      'usage_of_last_run': dict(proposer.usage()),
      'paid': _sum_paid(config, workdir / _PAID),
    }
    _write_card(workdir, card)
  print(
    f'{len(best.rules)} rules agree with {found["agreement_held_out"]:.3f} of '
    f'{len(held_out):,} held-out alarms, no rules with {found["agreement_of_no_rules"]:.3f}: '
    f'{workdir / "rules.json"}'
  )


def _count(
  made: Sequence[Example], outcomes: Sequence[strictness.Outcome], num_pairs: int
) -> dict[str, int]:
  return {
    'examples': len(made),
    'with_plus': sum(e.plus is not None for e in made),
    'with_minus': sum(e.minus is not None for e in made),
    'strictness_pairs': num_pairs,
    'categories': len(outcomes),
    'candidates_written': sum(len(o.candidates) for o in outcomes),
    'candidates_kept': sum(len(o.kept) for o in outcomes),
  }


def _read(
  source: ml_collections.ConfigDict, seed: int, with_pairs: bool = False, no_rules: bool = False
) -> tuple[list[Any], collections.Counter]:
  """Returns a source's labelled examples, and {reason: how many rows were left out}."""
  if source.name == 'ruleworld':
    # Their own p+ and p- are dropped: to propose these is the task.
    made = [
      dataclasses.replace(ruleworld_examples.training_example(seed, i), plus=None, minus=None)
      for i in range(source.num_examples)
    ]
    return _spoil(made, source.defect, seed), collections.Counter()
  if source.defect:
    raise ValueError(f"config.source.defect={source.defect!r} is for RuleWorld's data only")
  checks.lookup(source.name, ['ruleworld', *pipeline.SOURCES], 'config.source.name')
  options = forms.options(**source.own)
  if no_rules:
    options['safety'] = options['safety'] or augment_lib.NO_RULES
  rows = pipeline.read_source(source.name, source.path, require_label=False, **options)
  drops = collections.Counter(getattr(rows, 'drops', {}))
  kept = []
  for item in rows:
    if isinstance(item, Pair):
      if with_pairs:
        kept.append(item)
      else:
        drops['is_pair'] += 1
    elif isinstance(item, Judged):
      drops['has_no_rules_of_its_own'] += 1
    elif item.label is None:
      drops['no_label'] += 1
    else:
      kept.append(item)
  if not kept:
    raise ValueError(
      f'{source.path or source.name}: no labelled examples (left out:'
      f' {dict(drops)}); give a file that has some'
    )
  if 0 < source.num_examples < len(kept):
    # Not the first rows: in a sorted file these may all have one label.
    chosen = random.Random(seed).sample(range(len(kept)), source.num_examples)
    kept = [kept[i] for i in sorted(chosen)]
  return kept, drops


def _spoil(made: list[Example], defect: str, seed: int) -> list[Example]:
  """Returns RuleWorld's examples with the defect, if one is named."""
  if not defect:
    return made
  spoil = config_lib.choose('config.source.defect', defects.DEFECTS, defect)
  rng = np.random.default_rng(seed)
  return [item for item in (spoil(e, rng) for e in made) if item is not None]


def _make_proposer(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> proposers.Proposer:
  if config.proposer == 'oracle':
    return proposers.Oracle(config.seed, **config.oracle)
  cache = journal_lib.Cache(config.cache or workdir / 'cache')
  if config.proposer == 'endpoint':
    return proposers.Endpoint(cache, **config.endpoint, paid=workdir / _PAID)
  checks.lookup(config.proposer, PROPOSERS, 'config.proposer')
  return proposers.LocalModel(cache, config.seed, **config.model)


def _make_judge(config: ml_collections.ConfigDict) -> proposers.Judge | None:
  if not config.judge:
    return None
  if config.judge in ('ruleworld', 'annotator'):
    return world.make_judge(None if config.judge == 'ruleworld' else config.seed)
  model = reward_model.load(
    config.judge, format=config.judge_format, allow_out_of_domain=config.judge_allow_out_of_domain
  )

  def judge(talks, rules):
    asked = [
      Example(f'{i}', SafetyConfig((category,)), talk)
      for i, (talk, category) in enumerate(zip(talks, rules, strict=True))
    ]
    return [bool(score < 0) for score in model.score_fn(asked)]

  return judge


def _make_map(config, workdir: pathlib.Path, usage: collections.Counter) -> Callable[..., Any]:
  """Returns the function that maps work over pieces of the data: map, or Beam's."""
  if not config.beam.enabled:
    return map
  return beam.make_map(
    f'{config_lib.digest(config)} {workdir}',
    functools.partial(_make_proposer, config, workdir),
    functools.partial(_make_judge, config),
    config.beam.options,
    workdir / 'beam',
    usage.update,
  )


def _report(workdir, config, name, outcomes, settings) -> None:
  # Rules that RuleWorld's oracle has worded can be read back, so that the truth is known.
  is_known = config.proposer == 'oracle'
  slips = config.oracle.disobey if is_known else 0
  with journal_lib.writing(workdir / 'report'):
    path = report.write_report(
      workdir / 'report',
      outcomes,
      settings,
      world.truly_stricter if is_known else None,
      f'Written by {name}'
      + (f', made to disobey in {slips:.0%} of its rewrites' if slips else '')
      + f'; judged by {config.judge!r}.',
    )
  print('report:', path)


def _pairs(
  outcomes: Sequence[strictness.Outcome],
  pools: Mapping[Any, Sequence[Example]],
  max_pairs: int,
  seed: int,
) -> tuple[Iterable[Pair], int]:
  """Returns at most `max_pairs` pairs, drawn at random, and their number."""
  # Pairs are made one by one as they are written: each kept candidate meets a whole pool.
  total = sum(len(o.kept) * len(pools[o.category]) for o in outcomes)
  every = (pair for o in outcomes for pair in strictness.make_pairs(o, pools[o.category]))
  if not max_pairs or total <= max_pairs:
    return every, total
  chosen = set(random.Random(seed).sample(range(total), max_pairs))
  return (p for i, p in enumerate(every) if i in chosen), max_pairs


def _write_lines(path: pathlib.Path, items: Iterable[Example | Pair]) -> str:
  """Writes all rows or none, and returns their sha256."""
  digest = hashlib.sha256()
  with files.whole(path) as partial, partial.open('wb') as file:
    for item in items:
      line = json.dumps(item.to_dict(), ensure_ascii=False) + '\n'
      digest.update(line.encode())
      file.write(line.encode())
  return digest.hexdigest()


def _make_card(
  config: ml_collections.ConfigDict, name: str, drops: Mapping[str, int], usage: Mapping[str, float]
) -> dict[str, Any]:
  """Returns what a user of the data must know about it."""
  source = config.source
  known = catalogue.SETS[source.name].licence if source.name in catalogue.SETS else ''
  is_worded = config.proposer != 'oracle'
  prompts = {kind.__name__: task.instructions for kind, task in requests.TASKS.items()}
  return {
    'source': source.name,
    'path': source.path,
    **({'weights': config.weights.to_dict()} if config.weights.rule else {}),
    **({'defect': source.defect} if source.defect else {}),
    'source_digest': _digest(source.path) if source.path else '',
    'licence': source.licence or known,
    'proposer': config.proposer,
    'model': name,
    'judge': config.judge,
    'seed': config.seed,
    'prompts_digest': requests.prompts_digest() if is_worded else '',
    'prompts': prompts if is_worded else {},
    'drops': dict(sorted(drops.items())),
    'usage_of_last_run': dict(usage),
  }


def _sum_paid(config: ml_collections.ConfigDict, path: pathlib.Path) -> dict[str, float]:
  """Returns the replies and tokens of all starts of the run, and their cost."""
  total = collections.Counter()
  for row in files.read_log(path):
    total.update({name: num for name, num in row.items() if isinstance(num, int)})
  price = total['prompt_tokens'] * config.endpoint.price_in
  price += total['reply_tokens'] * config.endpoint.price_out
  return {**total, 'cost': price / 1e6} if total['requests'] else {}


def _write_card(workdir: pathlib.Path, card: Mapping[str, Any]) -> None:
  files.write_json(workdir / 'card.json', card, indent=1)
  files.write(workdir / 'card.md', _render_card(card))


def _render_card(card: Mapping[str, Any]) -> str:
  facts = {key: value for key, value in card.items() if not isinstance(value, Mapping)}
  lines = ['# Data card', '']
  lines += [
    f'- {key.replace("_", " ")}: {"(not given)" if value == "" else value}'
    for key, value in facts.items()
  ]
  # The prompts come last, because they are long.
  for key in sorted((k for k in card if k not in facts), key=lambda k: k == 'prompts'):
    title = key.replace('_', ' ')
    lines += ['', f'## {title[0].upper()}{title[1:]}', '']
    lines += [f'- {k}: {v}' for k, v in card[key].items()] or ['(none)']
  return '\n'.join(lines) + '\n'


def _digest(path: str) -> str:
  """Returns the sha256 of a file, or of all files in a folder."""
  root = pathlib.Path(path)
  digest = hashlib.sha256()
  for file in sorted(root.rglob('*')) if root.is_dir() else [root]:
    if file.is_file():
      digest.update(hashlib.sha256(file.read_bytes()).digest())
  return digest.hexdigest()


def _prepare(workdir: pathlib.Path, path: pathlib.Path, section: ml_collections.ConfigDict) -> None:
  # Imported here, because it takes a while and needs an extra.
  from csrm_jax.data import public_sets

  folder = workdir / 'tfds'
  shutil.rmtree(folder, ignore_errors=True)  # an earlier run may have left files there
  if section.enabled:
    public_sets.prepare_on_beam('augmented', folder, path, section.options)
  else:
    public_sets.make_builder('augmented', folder, path).download_and_prepare()


def _make_log(path: pathlib.Path) -> Callable[[Sequence[Mapping[str, Any]]], None]:
  """Returns what appends events to a JSONL file; those that an earlier start wrote are there."""

  def name(event: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in event.items() if key != 'time'})

  earlier = set(map(name, files.read_log(path)))

  def log(events: Sequence[Mapping[str, Any]]) -> None:
    now = round(time.time(), 3)
    if new := [{'time': now, **event} for event in events if name(event) not in earlier]:
      with journal_lib.writing(path):
        files.append_log(path, new)

  return log


@contextlib.contextmanager
def _progress(total: int, name: str, log: Callable[..., None]) -> Iterator[proposers.Progress]:
  """Shows a progress bar; yields a function that moves it and passes events to the log."""
  with progress.bar(total, name, 'item') as bar:

    def update(num: int, events: Sequence[Mapping[str, Any]]) -> None:
      log(events)
      bar.update(num)

    yield update
