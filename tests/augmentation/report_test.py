"""The report of strictness augmentation."""

import dataclasses
import json

import pytest
from matplotlib import image

from csrm_jax.augmentation import report, strictness
from csrm_jax.safety.schema import Category
from tests.augmentation import builders

PETS = Category('Pets | all', 'No pets at all.')


def candidate(strict, lenient, recalls, kept):
  a, b = (Category('Pets', f'{n} forbidden') for n in (strict, lenient))
  bound = 0.96 if kept else 0.91
  return strictness.Candidate(
    a, b, strict, lenient, 80, 80 if kept else 78, 3, *recalls, bound, kept
  )


OUTCOME = strictness.Outcome(
  PETS,
  100,
  (Category('Cats', 'no cats at all'),),
  (candidate(2, 1, (0.5, 0.25), True), candidate(3, 1, (0.3, 0.35), False)),
  {'candidate: prose': 2},
)


def test_recall_is_averaged_by_intended_strictness():
  assert report.recalls(OUTCOME, kept=False) == {1: (0.25 + 0.35) / 2, 2: 0.5, 3: 0.3}
  assert report.recalls(OUTCOME, kept=True) == {1: 0.25, 2: 0.5}


def test_report_counts_what_was_kept_and_what_was_not(tmp_path):
  path = report.write_report(
    tmp_path, [OUTCOME], builders.settings(), is_ordered=lambda a, b: a.guideline.startswith('2')
  )
  text = path.read_text()
  assert '1 of 2 pairs kept' in text
  assert 'with k = n that takes n = 59 or more' in text
  # Each reason is explained, and a pair is shown in its own words.
  assert '| candidate: order_not_shown | 1 | pairs whose strict' in text
  assert '| candidate: prose | 2 | pairs given up for want' in text
  assert '| Pets | 2 forbidden | 1 forbidden |' in text
  assert '| 0.9100 | no: order_not_shown |' in text
  assert '| without the test | 2 | 1 | 0.500 |' in text
  assert '| with it | 1 | 1 | 1.000 |' in text
  assert 'Pets \\| all' in text
  result = json.loads((tmp_path / 'strictness.json').read_text())
  assert result['drops'] == {'candidate: order_not_shown': 1, 'candidate: prose': 2}
  assert len(result['categories'][0]['candidates']) == 2
  assert image.imread(tmp_path / 'strictness.png').std() > 0.01


@pytest.mark.parametrize(
  'n, bound, extra, why',
  [
    (80, 0.96, 3, ''),
    (58, 0.9496, 9, 'too_few_unsafe'),
    (80, 0.91, 9, 'order_not_shown'),
    (80, 0.96, 0, 'no_difference'),
  ],
)
def test_why_a_pair_was_not_kept(n, bound, extra, why):
  item = dataclasses.replace(candidate(2, 1, (0.5, 0.2), not why), n=n, bound=bound, extra=extra)
  assert strictness.explain(item, builders.settings()) == why


def test_report_of_nothing(tmp_path):
  empty = strictness.Outcome(PETS, 3, (), (), {'pool_too_small': 1})
  text = report.write_report(tmp_path, [empty], builders.settings()).read_text()
  assert '0 of 0 pairs kept' in text
  assert not (tmp_path / 'strictness.png').exists()
