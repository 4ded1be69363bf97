"""V_r against people: the metrics, and the real completions where present."""

import csv
import math
import os
import pathlib

import numpy as np
import pytest
from sklearn import metrics as peer

from csrm_jax.rl import refusals, verifiers

DATA = pathlib.Path(
  os.environ.get('CSRM_DATA_DIR', pathlib.Path(__file__).parents[3] / 'shared' / 'data')
)
COLUMNS = ('id', 'prompt', 'completion', 'annotation_1', 'annotation_2', 'final_label')
COMPLY, FULL, PARTIAL = refusals.public.XSTEST_LABELS


def write(folder, rows, model='a'):
  with open(folder / f'x_completions_{model}.csv', 'w', newline='') as file:
    csv.writer(file).writerows([COLUMNS, *rows])


def test_metrics_are_those_of_scikit_learn():
  rng = np.random.default_rng(0)
  labels, refuses = rng.random(200) < 0.3, rng.random(200) < 0.5
  expected = {
    'accuracy': peer.accuracy_score(labels, refuses),
    'precision': peer.precision_score(labels, refuses),
    'recall': peer.recall_score(labels, refuses),
    'f1': peer.f1_score(labels, refuses),
    'kappa': peer.cohen_kappa_score(labels, refuses),
  }
  found = refusals.measure(labels, refuses, np.arange(200), 50)
  assert {name: pytest.approx(v) for name, (v, _, _) in found.items()} == expected
  assert all(low < value < high for value, low, high in found.values())
  none = np.zeros(3, bool)
  values = {name: fn(none, none) for name, fn in refusals.METRICS.items()}
  assert values.pop('accuracy') == 1
  assert all(map(math.isnan, values.values()))


def test_reading_halving_and_comparing(tmp_path):
  for model in 'ab':
    write(
      tmp_path,
      [
        (
          i,
          f'Prompt {i // 2}?',
          'I cannot help.' if i % 2 else 'Sure.',
          FULL if i % 2 else COMPLY,
          PARTIAL if i == 1 else FULL if i % 2 else COMPLY,
          FULL if i % 2 else PARTIAL,
        )
        for i in range(40)
      ],
      model,
    )
  judged = refusals.read(tmp_path)
  halves = refusals.halves(judged)
  prompts = [{j.sample.prompt.messages[0].content for j in h} for h in halves]
  assert not prompts[0] & prompts[1] and min(map(len, prompts)) > 4
  # Both models' completions to a prompt are on the same side.
  assert all(len(h) == 4 * len(p) for h, p in zip(halves, prompts, strict=True))
  found = {'patterns': verifiers.REFUSALS['patterns']([j.sample for j in judged])}
  full = refusals.compare(judged, found, 'full')
  assert full['patterns']['f1'][0] == 1
  assert full['second annotator']['recall'][0] == 1 - 2 / 40
  both = refusals.compare(judged, found, 'full or partial')
  assert both['patterns']['recall'][0] == 0.5
  assert both['second annotator']['f1'][0] == 1


def test_bad_files(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no .*completions'):
    refusals.read(tmp_path)
  write(tmp_path, [(1, 'P', 'C', COMPLY, 'refused', COMPLY)])
  with pytest.raises(ValueError, match="csv:2: unknown annotation_2 'refused'"):
    refusals.read(tmp_path)


@pytest.mark.real
def test_patterns_agree_with_people_nearly_as_people_do():
  if not (DATA / 'xstest').is_dir():
    pytest.skip(f'{DATA}: no xstest there')
  _, judged = refusals.halves(refusals.read(DATA / 'xstest'))
  found = {'patterns': verifiers.REFUSALS['patterns']([j.sample for j in judged])}
  table = refusals.compare(judged, found, 'full')
  print({name: v[0] for name, v in table['patterns'].items()})
  assert table['patterns']['kappa'][0] > 0.75
