"""The suite `real`: a judge beside people's verdicts, and beside judges that read no rules.

Training runs call `evals.judged.evaluate_judged` with the sets that `read_sets` gives.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from csrm_jax.core import checks, files
from csrm_jax.data import catalogue
from csrm_jax.data.sources import Rows
from csrm_jax.evals import judged
from csrm_jax.runners import evaluate

# Sets whose texts were judged under several rules, then those with one rule each, or with pairs.
SETS = (
  *('rbr_gold', 'xstest_response', 'xstest_judged', 'pyrit_graded', 'moderation_judged'),
  *('hatecheck', 'hatemoji', 'toxigen_human', 'edos', 'ethos', 'hazard_prompts', 'cosa'),
  *('context_toxicity', 'diasafety', 'beavertails_test', 'safe_rlhf_answers', 'safe_rlhf_pairs'),
  *('harmbench_response_val', 'aegis_prompts_test', 'jailbreak_judged', 'teen_policies'),
  'model_spec',
)
# Where each test is noted, beside the checkpoint that was tested.
_TESTS = 'test_side.jsonl'


def read_sets(
  folder: str | pathlib.Path, names: Sequence[str] = ()
) -> tuple[dict[str, Rows], list[str]]:
  """Returns {name: all items} of the judged sets that are in the folder, and what is missing.

  Args:
    folder: It has a subfolder for each set, as catalogue.SETS names it.
    names: Those of SETS that are needed; () takes what is there.

  Raises:
    ValueError: A name is unknown, a set that was named is not there, or none is.
  """
  if not str(folder):
    raise ValueError('config.data_dir is empty: give --config.data_dir=FOLDER of the public sets')
  for name in names:
    checks.one_of('config.names: a set', name, SETS)
  found, missing = {}, []
  for name in names or SETS:
    path = pathlib.Path(folder).expanduser() / (catalogue.find(name).folder or name)
    if path.is_dir():
      found[name] = catalogue.read(name, 'test', path)
    elif names:
      raise ValueError(f'{path} does not exist: {catalogue.find(name).command(path)}')
    else:
      missing.append(name)
  if not found:
    raise ValueError(f'{folder} has none of the folders {", ".join(SETS)}; see configs/eval.py')
  return found, missing


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes real.json, real.md and scores.jsonl into the work directory, and prints the headline."""
  checks.one_of('config.side', config.side, ('dev', 'test'))
  if (workdir / 'real.json').is_file():
    print(judged.headline_table(files.read_json(workdir / 'real.json')))
    print(f'{workdir} is finished; remove its real.json to evaluate again')
    return
  start = time.monotonic()
  thresholds = _thresholds(config.dev)
  sets, missing = read_sets(config.data_dir, tuple(config.names))
  if missing:
    print(f'not in {config.data_dir}: {", ".join(missing)}', file=sys.stderr)
  options: dict[str, Any] = {}
  fold, score, about = config.fold, None, {'checkpoint': config.checkpoint}
  if config.checkpoint:
    rm = evaluate.load_model(config, allow_out_of_domain=True)
    about |= {'step': rm.step, 'format': rm.spec.layout.format}
    options['order'] = rm.spec.layout.order
    kept = evaluate.keep_scores(rm.score_fn, workdir / 'scores', rm.digest)
    score = evaluate.with_progress(kept)
    fold, options['trained'] = _trained(config)
    if config.side == 'test':
      about['num_tests'] = _note_test(config, workdir)
  out = judged.evaluate_judged(
    score,
    sets,
    config.side,
    fold,
    workdir,
    max_rows=config.max_rows,
    num_samples=config.num_samples,
    with_words=config.with_words,
    thresholds=thresholds,
    about=about,
    **options,
  )
  print(judged.headline_table(out))
  shared = sum(out['shared_texts'].values())
  print(
    f'{out["num_questions"]:,} questions, {config.side} side, {time.monotonic() - start:.0f} s;'
    f' {shared} of {out["num_texts"]:,} texts have their text or prompt on a training side'
  )
  print(f'report: {workdir / "real.md"}')


def _trained(config: ml_collections.ConfigDict) -> tuple[str, Sequence[str] | None]:
  """Returns the fold that training left out, and the sets that it used; None for a public model."""
  path = pathlib.Path(config.checkpoint).expanduser() / 'config.json'
  data = files.read_json(path).get('data', {}) if path.is_file() else {}
  if 'parts' not in data:
    return config.fold, None
  fold = data.get('judged', {}).get('fold', '')
  if config.fold not in ('', fold):
    raise ValueError(f'config.fold={config.fold!r}, but {config.checkpoint} left out {fold!r}')
  return fold, sorted({part['source'] for part in data['parts'].values()})


def _thresholds(folder: str) -> Mapping[str, float]:
  if not folder:
    return {}
  path = pathlib.Path(folder).expanduser() / 'real.json'
  dev = files.read_json(path)
  if dev['side'] != 'dev':
    raise ValueError(f'{path}: its side is {dev["side"]!r}; thresholds are those of a dev report')
  return dev['thresholds']


def _note_test(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
  """Notes that the test side is looked at; returns how often it was, for this checkpoint."""
  folder = pathlib.Path(config.checkpoint).expanduser()
  # Public models are no work directories of ours.
  path = (folder if (folder / 'config.json').is_file() else workdir) / _TESTS
  line = {'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), 'workdir': str(workdir)}
  with path.open('a', encoding='utf-8') as file:
    file.write(f'{json.dumps(line)}\n')
  num = len(path.read_text('utf-8').splitlines())
  print(f'test side: time {num} for this model, noted in {path}', file=sys.stderr)
  return num
