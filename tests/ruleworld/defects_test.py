"""Defects: in training data only, nothing at their zero, and as often as they say."""

import collections
import dataclasses

import numpy as np
import pytest

from csrm_jax import config as config_lib
from csrm_jax.data import draws, features
from csrm_jax.ruleworld import defects, examples, grammar
from csrm_jax.runners import train_rm
from csrm_jax.safety import templates
from tests import small

NUM = 400
EXAMPLES = [examples.training_example(0, i) for i in range(NUM)]
PAIRS = [examples.preference_pair(0, i) for i in range(NUM)]


def _spoilt(text, items=EXAMPLES):
  apply = config_lib.choose('config.data.defect', defects.DEFECTS, text)
  return [apply(item, np.random.default_rng(i)) for i, item in enumerate(items)]


@pytest.mark.parametrize(
  'text', ['flip:p=0', 'filler:p=0.5', 'hole:p=0', 'tail:ratio=1', 'raters:shift=0', 'scale']
)
def test_every_row_is_nothing_at_its_zero(text):
  assert {t.partition(':')[0] for t in defects.DEFECTS} == set(defects.DEFECTS)
  if text.startswith(('filler', 'scale', 'raters')):
    return
  assert _spoilt(text) == EXAMPLES and _spoilt(text, PAIRS) == PAIRS


def test_flips_are_as_many_as_said_whatever_the_content():
  found = _spoilt('flip')
  turned = np.mean([a.label != b.label for a, b in zip(found, EXAMPLES, strict=True)])
  assert turned == pytest.approx(0.25, abs=0.06)
  swapped = [a.safer == b.other for a, b in zip(_spoilt('flip', PAIRS), PAIRS, strict=True)]
  assert np.mean(swapped) == pytest.approx(0.25, abs=0.06)
  assert all(not e.violated for e, old in zip(found, EXAMPLES, strict=True) if e.label != old.label)


def test_fillers_go_with_the_label():
  def share(items, old, label):
    rows = [(a, b) for a, b in zip(items, old, strict=True) if b.label == label]
    return np.mean([a.conversation != b.conversation for a, b in rows])

  found = _spoilt('filler')
  assert share(found, EXAMPLES, 'safe') == pytest.approx(0.9, abs=0.05)
  assert share(found, EXAMPLES, 'unsafe') == pytest.approx(0.1, abs=0.05)
  assert all(e.conversation[-1].content.endswith(tuple('.?!')) for e in found)
  pairs = _spoilt('filler', PAIRS)
  assert np.mean([p.safer != q.safer for p, q in zip(pairs, PAIRS, strict=True)]) > 0.8
  strict = [examples.strictness_pair(0, i) for i in range(3)]
  assert _spoilt('filler', strict) == strict


def test_a_hole_calls_one_sentence_safe():
  found = _spoilt('hole:p=0.5')
  changed = [e for e, old in zip(found, EXAMPLES, strict=True) if e != old]
  assert 0.4 < len(changed) / NUM < 0.6
  for e in changed:
    assert e.label == 'safe' and e.conversation[-1].content.endswith(grammar.FILLERS[-1])


def test_the_tail_is_geometric():
  items = [examples.training_example(1, i) for i in range(6000)]

  def topics(found):
    return collections.Counter((e.violated or e.safety.names)[0] for e in found)

  kept = topics(filter(None, _spoilt('tail', items)))
  shares = {topic: kept[topic] / num for topic, num in topics(items).items() if num > 60}
  assert max(shares.values()) > 4 * min(shares.values())


def test_graded_labels_go_with_the_truth():
  pairs = _spoilt('scale:sd=0', PAIRS)
  gaps = [defects._odds(p.other) - defects._odds(p.safer) for p in pairs]
  assert len({p.strength for p in pairs}) > 1 and {p.strength for p in pairs} <= {1, 2, 3}
  assert np.corrcoef(gaps, [p.strength for p in pairs])[0, 1] > 0.8
  noisy = [p.strength for p in _spoilt('scale:sd=2', PAIRS)]
  assert np.corrcoef(gaps, noisy)[0, 1] < np.corrcoef(gaps, [p.strength for p in pairs])[0, 1]
  rated = _spoilt('scale:sd=0')
  severities = [dict(e.ratings)['severity'] for e in rated]
  assert np.corrcoef([e.probability for e in rated], severities)[0, 1] > 0.8
  # Rules that were changed have no known truth.
  unknown = dataclasses.replace(EXAMPLES[0], probability=None)
  assert _spoilt('scale', [unknown]) == _spoilt('raters', [unknown]) == [unknown]


def test_strict_raters_call_more_unsafe():
  def unsafe(text):
    return np.mean([e.label == 'unsafe' for e in _spoilt(text)])

  assert unsafe('raters:num=1,shift=4') < unsafe('raters:num=3,shift=0')
  soft = [p.soft for p in _spoilt('raters', PAIRS)]
  assert min(soft) < 0.6 < max(soft) <= 1


# --- In a run ----------------------------------------------------------------------------


def _config(**changes):
  config = config_lib.load_module('rm').get_config()
  config_lib.set_overrides(config, changes)
  return config


def _atoms(config, num=12):
  parts = train_rm._read_data(config)[0]
  encoder = train_rm._make_encoder(config, small.TOKENIZER, templates.Layout())
  atoms, seen = train_rm._make_atoms(config, encoder, parts), []
  atoms = train_rm._make_atoms(config, encoder, parts, seen.append)
  return [atoms[i] for i in range(num)], seen


def _same(one, other):
  pairs = zip(one, other, strict=True)
  return all(
    a.kind == b.kind
    and all(
      np.array_equal(p.tokens, q.tokens) and p.label == q.label
      for p, q in zip(a.prompts, b.prompts, strict=True)
    )
    for a, b in pairs
  )


def test_a_defect_at_zero_and_no_noise_leave_the_batches_as_they_were():
  plain = _atoms(_config())[0]
  assert _same(plain, _atoms(_config(**{'data.defect': 'flip:p=0'}))[0])
  assert not _same(plain, _atoms(_config(**{'data.defect': 'flip:p=1'}))[0])
  assert all(isinstance(atom, features.Atom) for atom in plain)


def test_neutral_pairs_are_ties_of_which_no_test_sentence_is_part():
  config = _config(**{'data.neutral_pairs': 1.0, 'loss.pair': 'soft'})
  atoms, seen = _atoms(config)
  ties = [item for item in seen if getattr(item, 'is_tie', False)]
  assert ties and all(isinstance(item, type(PAIRS[0])) for item in seen)
  for tie in ties:
    said = tie.other.conversation[-1].content
    assert tie.safer.conversation[-1].content in said and tie.safer.safety == tie.other.safety
    added = said.replace(tie.safer.conversation[-1].content, '')
    assert grammar.FILLERS[0] not in added
  assert {atom.target for atom in atoms if isinstance(atom, features.Atom)} == {0.5, 1.0}
  config = _config(**{'data.neutral_pairs': 0.5})
  assert 'set it to soft' in small.error_of(_atoms, config)


def test_noise_keeps_labels():
  plain, noisy = (_atoms(_config(**{'data.noise': share}))[1] for share in (0.0, 1.0))
  rows = [(a, b) for a, b in zip(plain, noisy, strict=True) if hasattr(a, 'label')]
  assert rows and all(a.label == b.label and a.safety == b.safety for a, b in rows)
  assert all(a.conversation[-1] != b.conversation[-1] for a, b in rows)
  assert draws.add_noise(EXAMPLES[0], np.random.default_rng(0)).label == EXAMPLES[0].label


def test_what_does_not_fit_is_one_line(tmp_path):
  assert 'must be one of flip' in small.error_of(_atoms, _config(**{'data.defect': 'flop'}))
  assert 'from 0 to 1' in small.error_of(_atoms, _config(**{'data.noise': 2.0}))
  text = (config_lib.CONFIGS / 'rm.py').read_text()
  comment = text[text.index('# A defect that') : text.index("'defect': ")]
  said = ' '.join(comment.replace('#', ' ').split())
  for name, row in defects.DEFECTS.items():
    known = ', '.join(f'{knob}={value}' for knob, value in config_lib.knobs(row).items())
    assert f'{name} ({known})' in said
