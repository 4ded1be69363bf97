"""Evaluates: scores a file, runs benchmarks, compares reports, or measures refusals.

config.runner says which: 'evaluate', 'benchmark', 'compare' or 'refusals'. Training runs use the
last section of this file to test what they have made.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm

from csrm_jax import config as config_lib
from csrm_jax.core import checks, files, progress, writer
from csrm_jax.data import benchmark, catalogue, domain, features, forms, sources, tables
from csrm_jax.data.benchmark import Benchmark
from csrm_jax.evals import bootstrap, compare, metrics, policy, report, suites, thresholds
from csrm_jax.evals.bootstrap import Measure
from csrm_jax.evals.metrics import Calibration
from csrm_jax.evals.results import Result
from csrm_jax.reward import model as reward_model, scoring
from csrm_jax.rl import refusals
from csrm_jax.ruleworld import examples as ruleworld_examples, probes
from csrm_jax.runners import show_tokens as show_tokens_lib
from csrm_jax.safety import schema, templates

# The share of held-out rows on which thresholds and calibration are fitted.
_VALIDATION_FRACTION = 0.25
# Rows of a file whose scores are kept together, so that a run that is stopped loses few.
_ROWS_AT_ONCE = 1024
# The columns of scoring.Judged.
_DTYPES = {
  'score': np.float32,
  'num_tokens': np.int64,
  'num_unread': np.int64,
  'cut': bool,
  'outside': str,
}
_HELD_OUT = '{} of the data trained on that training did not see.'


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Runs the job that config.runner names."""
  jobs = {
    'evaluate': _score_file,
    'benchmark': _run_benchmarks,
    'compare': _compare,
    'refusals': _measure_refusals,
  }
  jobs[config.runner](config, workdir)


# --- A file ----------------------------------------------------------------------------


def _score_file(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/scored.jsonl, and a report where the rows have labels.

  If it was stopped, the same command goes on with the rows that have no scores yet.
  """
  if config.table not in ('', 'csv', 'parquet'):
    raise ValueError(f"config.table={config.table!r} must be '', 'csv' or 'parquet'")
  paths = [workdir / f'scored.{suffix}' for suffix in ('jsonl', config.table) if suffix]
  examples = read_examples(config)
  rm = load_model(config, config.allow_out_of_domain)
  fitted = config.thresholds and thresholds.load(config.thresholds, rm.digest, rm.calibration)
  kept = workdir / 'scores'
  score_fn = keep_scores(rm.score_fn, kept, rm.digest)
  with progress_bar('score', len(examples)) as bar:
    starts = range(0, len(examples), _ROWS_AT_ONCE)
    parts = [score_fn.judge(examples[i : i + _ROWS_AT_ONCE], bar.update) for i in starts]
  judged = scoring.Judged(*map(np.concatenate, zip(*parts, strict=True)))
  rows = [
    {'id': example.id, **dataclasses.asdict(verdict), **_about(example)}
    for example, verdict in zip(examples, scoring.verdicts(judged), strict=True)
  ]
  if fitted:
    _set_labels(rows, examples, fitted)
  if config.categories:
    for row, parts in zip(rows, _score_categories(score_fn, examples), strict=True):
      row['category'] = max(parts, key=parts.get) if row['label'] == 'unsafe' else None
      row['categories'] = [{'name': name, 'p_unsafe': p} for name, p in parts.items()]
  for path in paths:
    tables.write_table(path, rows)
  shutil.rmtree(kept)
  print(f'{len(rows)} verdicts: {", ".join(map(str, paths))}')
  read = _Read.of(judged)
  for sentence in read.sentences():
    print(sentence, file=sys.stderr)
  if any(example.label is not None for example in examples):
    name = rm.spec.layout.format
    about = (
      f'The rows of {config.conversations}, judged by {config.checkpoint} in the format {name}.'
    )
    rows = Benchmark('file', 'classification', examples, about)
    result = suites.evaluate(lambda _: judged.score, rows, Measure())
    results = {'file': read.add_to(result)}
    summary = report.summarise(results) | {
      'num_examples': len(examples),
      'format': name,
      **dataclasses.asdict(read),
    }
    title = f'Scores of a file, format {name}'
    path = report.write_report(
      workdir / 'report', results, title=title, summary=summary, texts=config.texts
    )
    print(report.terminal_table(summary))
    print(f'report: {path}')


def _set_labels(
  rows: Sequence[dict[str, Any]], examples: Sequence[schema.Example], fitted: thresholds.Thresholds
) -> None:
  """Sets each row's label by the threshold of its rules, which stands beside it."""
  unknown = 0
  for row, example in zip(rows, examples, strict=True):
    found = fitted.by_rules.get(example.safety.digest())
    unknown += found is None
    if found:
      row['label'] = schema.LABELS[found.flags(row['score'])]
    row['threshold'] = found.p_unsafe if found else 0.5
  if unknown:
    print(f'{unknown} rows are under rules without a threshold: 0.5 was used', file=sys.stderr)


def _about(example: schema.Example) -> dict[str, Any]:
  """Returns what was judged: the text, and the rules' digest."""
  *history, last = example.conversation
  return {
    'history': [message.to_dict() for message in history],
    'response': last.content,
    'rules': example.safety.digest(),
    'true_label': example.label,
  }


def _score_categories(
  score_fn: scoring.ScoreFn, examples: Sequence[schema.Example]
) -> list[dict[str, float]]:
  """Returns {category: P(unsafe) under it alone} of each example."""

  def score(parts):
    with progress_bar('categories', len(parts)) as bar:
      starts = range(0, len(parts), _ROWS_AT_ONCE)
      return np.concatenate([score_fn(parts[i : i + _ROWS_AT_ONCE], bar.update) for i in starts])

  return scoring.by_category(score, examples)


def show_tokens(config: ml_collections.ConfigDict) -> None:
  """Prints the prompt of the first row; of its first category, if the guard reads one at a time."""
  example = read_examples(config)[0]
  source = reward_model.members(config.checkpoint)[0]
  spec, tokenizer = reward_model.describe(source, **model_options(config))
  guard = templates.GUARDS.get(spec.layout.format)
  if guard and guard.per_category:
    example = scoring.split_categories(example)[0]
  show_tokens_lib.show(example, features.Encoder(tokenizer, config.max_length, spec.layout))


def read_examples(config: ml_collections.ConfigDict) -> Sequence[schema.Example]:
  """Returns the rows of config.conversations, under config.safety if that is given."""
  if not config.conversations:
    raise ValueError('config.conversations is empty: give --config.conversations=PATH')
  options = forms.options(config.safety, config.labels, config.columns)
  safety = options['safety']
  examples = forms.read(config.conversations, split='test', **options)
  if not examples:
    raise ValueError(f'{config.conversations} has no rows')
  if any(isinstance(example, schema.Pair) for example in examples):
    raise ValueError(f'{config.conversations} holds pairs; give one conversation a row')
  if safety is None:
    return examples
  # A row that brings other rules loses its label, which was given under those.
  return [
    example
    if example.safety == safety
    else dataclasses.replace(example, safety=safety, label=None, violated=(), probability=None)
    for example in examples
  ]


# --- All benchmarks ----------------------------------------------------------------------


def _run_benchmarks(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/report, with tables, probes and figures of all suites."""
  if show_finished(workdir):
    return
  start = time.monotonic()
  todo = _all_benchmarks(config.benchmarks)
  # A benchmark measures what a model can do, also on text that it does not know; its table says so.
  rm = load_model(config, allow_out_of_domain=True, calibrated=False)
  count_opening(config.benchmarks, workdir)
  score_fn = keep_scores(rm.score_fn, workdir / 'scores', rm.digest)
  results = test(score_fn, todo, reward_model.calibration(config.checkpoint))
  name = rm.spec.layout.format
  summary = report.summarise(results) | {
    'format': name,
    'checkpoint': str(config.checkpoint),
    'time_s': time.monotonic() - start,
  }
  title = config.title or f'Evaluation of {config.checkpoint}'
  write(workdir, results, summary, title, texts=config.texts)


def _all_benchmarks(config: ml_collections.ConfigDict) -> list[Benchmark]:
  todo = []
  if config.ruleworld_examples:
    side = _ruleworld_side(config, 'config.benchmarks')
    todo += probes.benchmarks(config.ruleworld_seed, config.ruleworld_examples, side)
    unseen = next(b for b in todo if b.name == 'unseen')
    about = 'The unseen set with a neutral sentence behind safe, or behind unsafe replies only.'
    todo.append(Benchmark('spurious', 'spurious', unseen.items, about))
  if config.data_dir:
    todo += catalogue.load_benchmarks(config.data_dir, tuple(config.names))
  if not todo:
    raise ValueError(
      'nothing to evaluate: give --config.benchmarks.data_dir=FOLDER, or ruleworld_examples above 0'
    )
  return suites.prepare(benchmark.limited(item, config.max_items) for item in todo)


# --- Reports side by side ----------------------------------------------------------------


def _compare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/report from the reports of config.compare; nothing is scored again."""
  found = (_find(pathlib.Path(pattern).expanduser()) for pattern in config.compare)
  folders = list(dict.fromkeys(itertools.chain.from_iterable(found)))  # patterns may overlap
  if len(folders) < 2:
    raise ValueError(
      f'config.compare names {len(folders)} work directories: give two or '
      "more, as --config.compare=\"('/tmp/a', '/tmp/b')\""
    )
  names = [folder.name for folder in folders]
  if len(set(names)) < len(names):
    raise ValueError(
      f'config.compare: the folders are called {", ".join(names)}; a name '
      'tells the models apart, so rename one'
    )
  results = {folder.name: report.read_results(folder / 'report') for folder in folders}
  aligned = [folder for folder in folders if 'alignment' in results[folder.name]]
  if aligned:
    other = next((f for f in folders if f not in aligned), None)
    if other is not None:
      raise ValueError(
        f'config.compare: {aligned[0]} is an alignment and {other} is not; '
        'compare either policies or reward models'
      )
    runs = [_read_run(folder, results[folder.name]) for folder in folders]
    path = report.write_report(
      workdir / 'report',
      policy.compare_runs(runs, config.reference),
      title=config.title or 'Aligned policies',
      summary={'num_runs': len(folders)},
    )
  else:
    path = compare.write_comparison(
      workdir / 'report',
      results,
      title=config.title or 'Comparison',
      reference=config.reference,
      num_samples=config.num_samples,
    )
  print(f'report: {path}')


def _find(pattern: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folder, or for a pattern all folders that match and have a report."""
  if '*' not in str(pattern):
    return [pattern]
  return sorted(
    pathlib.Path(path)
    for path in glob.glob(str(pattern))
    if (pathlib.Path(path) / 'report' / 'metrics.json').is_file()
  )


def _read_run(folder: pathlib.Path, results: report.Results) -> policy.Run:
  made = config_lib.from_json(files.read_text(folder / 'config.json'))
  reward = made.reward
  name = reward.name
  if name == 'csrm':  # reward models that differ in their seed count as one reward
    name = re.sub(r'-seed\d+$', '', pathlib.Path(reward.checkpoint).name)
  elif name == 'alphaalign':
    name = f'{name}: {reward.variant}, {pathlib.Path(reward.refusal).name}'
  return policy.Run(
    made.algorithm,
    name,
    made.data.rules,
    made.seed,
    *((reward.a, reward.b) if reward.name == 'csrm' else (1.0, 0.0)),
    {which: sets[policy.ALL] for which, sets in results['alignment'].values['policies'].items()},
  )


# --- Refusals --------------------------------------------------------------------------


def _measure_refusals(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes workdir/report/report.md, which says how often V_r is right, and prints it."""
  if not config.data_dir:
    raise ValueError('config.data_dir is empty: give --config.data_dir=FOLDER, that of XSTest')
  parts = refusals.tables(config.data_dir, config.checkpoint, config.safety, config.words)
  text = '\n\n'.join(parts) + '\n'
  path = workdir / 'report' / 'report.md'
  files.write(path, text)
  print(f'{text}\nreport: {path}')


# --- Models, test sets and scores ---------------------------------------------------------


def load_model(
  config: ml_collections.ConfigDict, allow_out_of_domain: bool, calibrated: bool = True
) -> reward_model.RewardModel:
  """Returns the model that configs/eval.py names."""
  options = model_options(config)
  return reward_model.load(
    config.checkpoint,
    config.max_length,
    on_cut=config.on_cut,
    allow_out_of_domain=allow_out_of_domain,
    calibrated=calibrated,
    combine=config.combine,
    **options,
  )


def model_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the options of reward_model.load for the model that configs/eval.py names."""
  if not config.checkpoint:
    raise ValueError('config.checkpoint is empty: give --config.checkpoint=PATH')
  options = {'format': config.format, 'words': tuple(config.words), 'order': config.order}
  overrides = {name: value for name, value in config.numerics.items() if value}
  return options | overrides


def _ruleworld_side(config: ml_collections.ConfigDict, section: str) -> str:
  checks.one_of(f'{section}.ruleworld_side', config.ruleworld_side, ruleworld_examples.SIDES)
  return config.ruleworld_side


def count_opening(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Notes in the manifest how often this run has opened the rules that only tests may see."""
  if config.ruleworld_examples and config.ruleworld_side == 'test':
    before = writer.read_manifest(workdir).get('test_openings', 0)
    writer.update_manifest(workdir, {'test_openings': before + 1})


def benchmarks(
  config: ml_collections.ConfigDict, held_out: Mapping[str, Sequence[Any]]
) -> list[Benchmark]:
  """Returns what a run is tested on: RuleWorld's sets, if any, and held-out parts of its data."""
  todo = []
  if config.ruleworld_examples:
    # The seed is not the run's, so that runs with other seeds are tested on the same sets.
    side = _ruleworld_side(config, 'config.eval')
    todo = probes.basic_benchmarks(config.ruleworld_seed, config.ruleworld_examples, side)
  for name, items in held_out.items():
    # Of a tie no order is right.
    pairs = [item for item in items if isinstance(item, schema.Pair) and not item.is_tie]
    examples = [item for item in items if isinstance(item, schema.Example)]
    examples = [e for e in examples if e.label is not None or not e.ratings]
    made = []
    if examples:
      test, validation = sources.split(examples, _VALIDATION_FRACTION, seed=1)
      made.append(
        Benchmark(name, 'classification', test, _HELD_OUT.format('Rows'), validation=validation)
      )
    if pairs:  # a file with both kinds, as augmentation writes it, makes two sets
      made.append(
        Benchmark(f'{name}_pairs' if examples else name, 'pairs', pairs, _HELD_OUT.format('Pairs'))
      )
    todo += [benchmark.limited(b, config.max_examples) for b in made]
  return suites.prepare(todo)


def keep_scores(score_fn: scoring.ScoreFn, folder: pathlib.Path, weights: str) -> scoring.ScoreFn:
  """Returns a score function that keeps its answers in files of `folder`, and reads them there.

  `weights` is the digest of the model: another one in its place begins anew.
  """

  def judge(examples, progress=lambda num: None):
    asked = [weights, list(_DTYPES), *(example.to_dict() for example in examples)]
    path = folder / f'{files.digest(asked)[:16]}.json'
    if path.is_file():
      progress(len(examples))
      kept = files.read_json(path)
    else:
      judged = score_fn.judge(examples, progress)
      kept = {name: column.tolist() for name, column in judged._asdict().items()}
      folder.mkdir(exist_ok=True)
      files.write_json(path, kept, indent=None)
    return scoring.Judged(*(np.array(kept[name], dtype) for name, dtype in _DTYPES.items()))

  return scoring.ScoreFn(judge)


def check_lengths(sets: Mapping[str, Sequence[Any]], encoder: features.Encoder) -> None:
  """Checks, before training rather than after it, that all rules fit into a prompt."""
  for item in itertools.chain.from_iterable(sets.values()):
    is_pair = isinstance(item, schema.Pair)
    for example in (item.safer, item.other) if is_pair else (item,):
      features.require(features.encode(example, encoder))


def test(
  score_fn: scoring.ScoreFn,
  todo: Sequence[Benchmark],
  calibration: Calibration | None = None,
  rules_blind: bool = False,
) -> dict[str, Result]:
  """Returns {benchmark: result} for benchmarks from suites.prepare, and shows a progress bar.

  Args:
    score_fn: Returns scores in nats.
    calibration: The scorer's; calibrated figures are reported beside the raw ones.
    rules_blind: Whether the scorer was trained without rules, so that it is given none.
  """
  read: dict[str, list[_Read]] = {b.name: [] for b in todo}
  with progress_bar('evaluate', suites.num_scores(todo)) as bar:
    score = _score_once(score_fn, bar.update, rules_blind, lambda one: read[name].append(one))
    name = ''

    def start(benchmark):
      nonlocal name
      name = benchmark
      bar.set_postfix_str(benchmark)

    results = suites.run(score, todo, fitted=calibration, on_start=start)
    bar.set_postfix_str('')
  return {
    name: sum(read[name], _Read()).add_to(result) if read.get(name) else result
    for name, result in results.items()
  }


@dataclasses.dataclass(frozen=True)
class _Read:
  """How much of the prompts of a benchmark the model has read."""

  num_cut: int = 0  # prompts that did not fit into one pass
  num_unread: int = 0  # tokens that no pass read
  num_tokens: int = 0
  num_foreign: int = 0  # prompts in words that the model does not know

  @classmethod
  def of(cls, judged: scoring.Judged) -> _Read:
    foreign = np.char.startswith(judged.outside, domain.WORDS)
    columns = judged.cut, judged.num_unread, judged.num_tokens, foreign
    return cls(*(int(column.sum()) for column in columns))

  def __add__(self, other: _Read) -> _Read:
    mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
    return _Read(*(a + b for a, b in zip(mine, others, strict=True)))

  def sentences(self) -> list[str]:
    """Returns what a reader of the verdicts should know."""
    said = []
    if self.num_cut:
      share = self.num_unread / max(self.num_tokens, 1)
      said.append(
        f'{self.num_cut:,} prompts were too long for one pass; {self.num_unread:,} tokens '
        f'({share:.2%}) were not read'
      )
    if self.num_foreign:
      said.append(
        f'{self.num_foreign:,} prompts are in words that the model was not trained on: their '
        'verdicts mean nothing'
      )
    return said

  def add_to(self, result: Result) -> Result:
    """Returns the result with these counts, and a remark where something was cut."""
    return dataclasses.replace(
      result,
      counts={**result.counts, **dataclasses.asdict(self)},
      made_of=[*result.made_of, *self.sentences()],
    )


def with_progress(score_fn: scoring.ScoreFn) -> Callable[..., np.ndarray]:
  """Returns a function: examples -> scores, float32 [N] in nats, which shows a progress bar."""

  def score(examples):
    with progress_bar('evaluate', len(examples)) as bar:
      judged = score_fn.judge(examples, bar.update)
    for sentence in _Read.of(judged).sentences():
      print(sentence, file=sys.stderr)
    return judged.score

  return score


def _score_once(
  score_fn: scoring.ScoreFn,
  progress: Callable[[int], Any],
  rules_blind: bool,
  note: Callable[[_Read], Any] = lambda read: None,
) -> suites.ScoreFn:
  """Returns a score function that computes each example once: test sets share rows.

  `note` is told of each call how much was read.
  """
  known: dict[schema.Example, tuple[Any, ...]] = {}

  def score(examples):
    new = [e for e in dict.fromkeys(examples) if e not in known]
    progress(len(examples) - len(new))
    judged = score_fn.judge(new, progress)
    known.update(zip(new, zip(*judged, strict=True), strict=True))
    rows = [known[example] for example in examples]
    columns = list(zip(*rows, strict=True)) or [()] * len(_DTYPES)
    judged = scoring.Judged(*map(np.array, columns, _DTYPES.values()))
    note(_Read.of(judged))
    return judged.score

  return suites.blind(score) if rules_blind else score


def validation_rows(todo: Sequence[Benchmark]) -> list[schema.Example]:
  """Returns the labelled rows on which settings are chosen; no test set has them."""
  return list(dict.fromkeys(row for b in todo for row in b.validation if row.label is not None))


def measure_loss(
  score_fn: scoring.ScoreFn, rows: Sequence[schema.Example], rules_blind: bool = False
) -> dict[str, float]:
  """Returns eval/loss, the mean of −log P(label) in nats, and eval/accuracy at 0.5."""
  score = _score_once(score_fn, lambda num: None, rules_blind)
  # The score is the log odds of "safe".
  signs = np.where(metrics.labels_of(rows), -1.0, 1.0)
  margins = signs * suites.score(score, rows)
  return {
    'eval/loss': float(np.logaddexp(0.0, -margins).mean()),
    'eval/accuracy': float((margins > 0).mean()),
  }


def fit_calibration(
  score_fn: scoring.ScoreFn,
  todo: Sequence[Benchmark],
  workdir: pathlib.Path,
  step: int,
  rules_blind: bool = False,
) -> Calibration | None:
  """Returns the calibration fitted on development rows, and writes workdir/calibration.json.

  It says whether loaded models apply it: only if it helps on other development rows. Without rows
  of both labels it is None.
  """
  rows = validation_rows(todo)
  labels = metrics.labels_of(rows)
  if not 0 < labels.sum() < len(labels):
    return None
  with progress_bar('calibrate', len(rows)) as bar:
    scores = suites.score(_score_once(score_fn, bar.update, rules_blind), rows)
  fitted = metrics.fit_calibration(labels, scores)
  applied, reason = calibration_helps(rows, scores)
  fitted = dataclasses.replace(fitted, applied=applied, reason=reason, step=step)
  files.write_json(workdir / 'calibration.json', fitted.to_dict())
  return fitted


def calibration_helps(rows: Sequence[schema.Example], scores: np.ndarray) -> tuple[bool, str]:
  """Returns whether a fit on half of the conversations lowers NLL on the others, and in words.

  The interval of the difference, over conversations, must lie below 0.
  """
  labels, places = metrics.labels_of(rows), {row: i for i, row in enumerate(rows)}
  fitted_on, others = (
    np.array([places[row] for row in half], int) for half in sources.split(rows, 0.5, seed=2)
  )
  if any(not 0 < labels[half].sum() < len(half) for half in (fitted_on, others)):
    return False, f'{len(rows)} development rows are too few to check it on'
  part = metrics.fit_calibration(labels[fitted_on], scores[fitted_on])
  labels, scores = labels[others], scores[others]
  after, before = (
    metrics.row_nll(labels, metrics.p_unsafe_from_scores(s)) for s in (part.apply(scores), scores)
  )
  units = bootstrap.units_of([rows[i] for i in others])
  d = bootstrap.difference(metrics.mean, (after,), (before,), units)
  return d['high'] < 0, (
    f'fitted on half of the {len(rows)} development rows, it changes NLL on the others by'
    f' {d["value"]:+.3f} [{d["low"]:+.3f}, {d["high"]:+.3f}] nats'
  )


def progress_bar(name: str, total: int) -> tqdm.tqdm | progress.Lines:
  return progress.bar(total, name, 'example')


def show_finished(workdir: pathlib.Path) -> bool:
  """Returns whether the run has written its report; if so, prints the report's table."""
  folder = workdir / 'report'
  if not (folder / 'summary.json').is_file():
    return False
  summary, metrics = (
    files.read_json(folder / name, dict) for name in ('summary.json', 'metrics.json')
  )
  print(report.terminal_table(summary, metrics['suites'].get('one_conversation')))
  print(f'{workdir} is finished; remove its report/ to evaluate again')
  print(f'report: {folder / "report.md"}')
  return True


def _made_of(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the manifest of the newest start, and the versions that earlier starts had."""
  manifest = writer.read_manifest(workdir)
  starts = manifest.pop('starts', [])
  earlier = {
    f'{name} {version}'
    for start in starts
    for name, version in start['packages'].items()
    if version != manifest['packages'].get(name)
  }
  return manifest | {'num_starts': len(starts), 'other_versions_before': sorted(earlier)}


def _about_run(workdir: pathlib.Path, summary: Mapping[str, Any]) -> dict[str, str]:
  """Returns what the first page says of the model and the run; what is not known is left out."""
  config = config_lib.flatten(files.read_json(workdir / 'config.json'))
  manifest = writer.read_manifest(workdir)
  found = {
    'model': config.get('model.init') or config.get('policy.init') or config.get('checkpoint'),
    'parameters': f'{summary["num_params"]:,}' if 'num_params' in summary else '',
    'trained': f'{summary["num_trained_params"]:,}' if 'num_trained_params' in summary else '',
    'data': ', '.join(
      f'{config[f"data.parts.{name}.path"] or source} ({config[f"data.parts.{name}.weight"]:g})'
      for key, source in config.items()
      if (name := key.removeprefix('data.parts.').removesuffix('.source')) != key
      and key == f'data.parts.{name}.source'
    ),
    'steps': summary.get('num_steps', ''),
    'seed': config.get('seed', ''),
    'commit': manifest.get('commit', ''),
    'csrm_jax': manifest['packages']['csrm_jax'],
    'device': f'{manifest["num_devices"]} × {manifest["device_kind"]}',
    'time': f'{summary["time_s"]:,.0f} s' if 'time_s' in summary else '',
    'peak memory': f'{summary["peak_memory_bytes"] / 2**30:.2f} GiB'
    if summary.get('peak_memory_bytes')
    else '',
    'command': manifest.get('command', ''),
  }
  return {name: str(value) for name, value in found.items() if value not in ('', None)}


def write(
  workdir: pathlib.Path,
  results: report.Results,
  summary: Mapping[str, Any],
  title: str,
  calibration: Calibration | None = None,
  texts: bool = True,
) -> None:
  """Writes workdir/report and prints the table that a run ends with.

  Raises:
    ValueError: A suite failed; the report is written all the same.
  """
  print('writing the report', file=sys.stderr)
  path = report.write_report(
    workdir / 'report',
    results,
    title=title,
    summary=summary,
    manifest=_made_of(workdir),
    history=workdir / 'metrics.jsonl',
    about=_about_run(workdir, summary),
    calibration=calibration,
    texts=texts,
  )
  talk = results.get('one_conversation')
  print(report.terminal_table(summary, talk and talk.values))
  print(f'report: {path}')
  for failure in suites.failures(results):
    raise ValueError(f'{failure}; the report has what could be evaluated')
