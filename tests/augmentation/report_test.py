"""The report of strictness augmentation."""

import json

from matplotlib import image

from csrm_jax.augmentation import report, strictness
from csrm_jax.safety.schema import Category

PETS = Category('Pets | all', 'No pets at all.')


def candidate(strict, lenient, recalls, kept):
  a, b = (Category('Pets', f'{n} forbidden') for n in (strict, lenient))
  return strictness.Candidate(a, b, strict, lenient, 80, 80, 3, *recalls, 0.96,
                              kept)


OUTCOME = strictness.Outcome(
    PETS, 100, (Category('Cats', 'no cats at all'),),
    (candidate(2, 1, (0.5, 0.25), True), candidate(3, 1, (0.3, 0.35), False)),
    {'candidate: prose': 2})


def test_recall_is_averaged_by_intended_strictness():
  assert report.recalls(OUTCOME, kept=False) == {
      1: (0.25 + 0.35) / 2, 2: 0.5, 3: 0.3}
  assert report.recalls(OUTCOME, kept=True) == {1: 0.25, 2: 0.5}


def test_report_counts_what_was_kept_and_what_was_not(tmp_path):
  path = report.write_report(
      tmp_path, [OUTCOME], strictness.Settings(),
      is_ordered=lambda a, b: a.guideline.startswith('2'))
  text = path.read_text()
  assert '1 of 2 candidates kept' in text
  assert '| without the test | 2 | 1 | 0.500 |' in text
  assert '| with it | 1 | 1 | 1.000 |' in text
  assert 'Pets \\| all' in text
  result = json.loads((tmp_path / 'strictness.json').read_text())
  assert result['drops'] == {
      'candidate: order_not_shown': 1, 'candidate: prose': 2}
  assert len(result['categories'][0]['candidates']) == 2
  assert image.imread(tmp_path / 'strictness.png').std() > 0.01


def test_report_of_nothing(tmp_path):
  empty = strictness.Outcome(PETS, 3, (), (), {'pool_too_small': 1})
  text = report.write_report(
      tmp_path, [empty], strictness.Settings()).read_text()
  assert '0 of 0 candidates kept' in text
  assert not (tmp_path / 'strictness.png').exists()
