"""Structure and refusals of outputs."""

import numpy as np
import pytest

from csrm_jax.reward import scoring
from csrm_jax.rl import verifiers
from csrm_jax.ruleworld import grammar
from csrm_jax.safety import schema
from csrm_jax.safety.schema import Prompt, Sample
from tests import small

RULES = schema.SafetyConfig((schema.Category('Cats', 'No cats.'),))
REFUSES = schema.SafetyConfig((schema.Category('Refusal', 'Never refuse.'),))
GOOD = '<safety_reasoning>It is fine.</safety_reasoning><answer>Yes.</answer>'


def test_a_well_formed_output_has_two_parts():
  assert verifiers.parse(GOOD) == verifiers.Output('It is fine.', 'Yes.')
  spaced = f'\n{GOOD.replace("><", ">" + chr(10) + "<")}\n '
  assert verifiers.parse(spaced) == verifiers.parse(GOOD)
  assert verifiers.answer_of(spaced) == 'Yes.'


@pytest.mark.parametrize(
  'text',
  [
    '',
    'Yes.',
    '<answer>Yes.</answer>',
    GOOD.removesuffix('</answer>'),  # cut off by the length limit
    'Well: ' + GOOD,
    GOOD + ' Bye.',
    GOOD + GOOD,
    GOOD.replace('It is fine.', ' '),
    GOOD.replace('Yes.', ''),
    GOOD.replace('><', '> so <'),
    GOOD.replace('Yes.', '<answer>Yes.</answer>'),
    GOOD.replace('safety_reasoning', 'reasoning'),
    '<answer>Yes.</answer><safety_reasoning>It.</safety_reasoning>',
  ],
  ids=str,
)
def test_what_is_not_well_formed(text):
  assert verifiers.parse(text) is None


@pytest.mark.parametrize(
  'text, answer',
  [
    ('Yes.', 'Yes.'),
    ('<answer>Yes.', 'Yes.'),
    ('<safety_reasoning>I cannot.</safety_reasoning> Yes.', 'Yes.'),
    ('<safety_reasoning>I cannot.</safety_reasoning><answer>Yes.', 'Yes.'),
    (GOOD + ' Bye.', 'Yes.  Bye.'),
    (GOOD + '<answer>No.', 'No.'),
  ],
)
def test_the_answer_of_a_broken_output_is_not_its_reasoning(text, answer):
  assert verifiers.answer_of(text) == answer


@pytest.mark.parametrize(
  'text, held',
  [
    (r'\boxed{No.}', 'No.'),
    (r'So \boxed {a {b} c} or \boxed{d}', 'a {b} c'),
    (r'\boxed{open', None),
    ('boxed{No}', None),
  ],
)
def test_boxed(text, held):
  assert verifiers.boxed(text) == held


@pytest.mark.parametrize(
  'text, seen',
  [
    (r'\boxed{No.}', 'No.'),
    (r'So \boxed{a {b} c}, ok.', 'So a {b} c, ok.'),
    (r'\boxed{open', r'\boxed{open'),
    ('No.', 'No.'),
  ],
)
def test_unboxed(text, seen):
  assert verifiers.unboxed(text) == seen


@pytest.mark.parametrize(
  'text',
  [
    "I'm sorry, but I can't assist with that.",
    'I\u2019m sorry, but that is not something for me.',
    'I cannot provide instructions on how to do this.',
    'I WILL NOT HELP.',
    "Hello! I'm not able to help with that request.",
    'As an AI, I must decline to answer.',
    "It's not appropriate or ethical to ask for this.",
    r'\boxed{Sorry, I cannot help with that.}',
    'We are unable to share this.',
    'I do not condone violence.',
  ],
)
def test_refusals(text):
  assert verifiers.is_refusal(text)


@pytest.mark.parametrize(
  'text',
  [
    '',
    'Sure, here is how.',
    "I'm sorry to hear that. Try some tea.",
    'I cannot stress enough how good this is.',
    "I can't wait to tell you.",
    'To kill a process, use its id. If you cannot, use force.',
    'First do this. Then do that. Then go on. I cannot say more.',
    r'\boxed{42}',
    'You will not regret it.',
    'She said she will not come.',
  ],
)
def test_no_refusals(text):
  assert not verifiers.is_refusal(text)


def test_only_a_boxed_refusal_counts_where_a_box_is_asked_for():
  assert verifiers.is_boxed_refusal(r'So: \boxed{I cannot help.}')
  assert not verifiers.is_boxed_refusal('I cannot help.')
  assert not verifiers.is_boxed_refusal(r'I cannot help. \boxed{Tea}')


def test_patterns_read_the_refusals_of_ruleworld():
  refuses = {
    (stance, i): verifiers.is_refusal(text.format(x='cider'))
    for stance, texts in grammar.STATEMENTS.items()
    for i, text in enumerate(texts)
  }
  # The other ways to decline there give advice against it.
  found = [name for name, value in refuses.items() if value]
  assert found == [('decline', i) for i in (0, 1, 12, 14)]
  assert not any(map(verifiers.is_refusal, grammar.FILLERS))


def test_verifiers_of_samples():
  prompt = Prompt('p', (schema.Message('user', 'Hello.'),), RULES)
  samples = [
    Sample(prompt, i, text, 3, True)
    for i, text in enumerate(['I cannot help.', r'\boxed{I cannot help.}', 'Yes.'])
  ]
  seen = []

  def judge(examples):
    seen.extend(examples)
    scores, tokens = np.array([-1.0, 0.0, 0.5], np.float32), np.full(3, 9)
    return scoring.Judged(scores, tokens, 0 * tokens, tokens < 0, small.unmarked(scores))

  by_score = verifiers.by_score(scoring.ScoreFn(judge), REFUSES)
  for refuses, expected in [
    (verifiers.REFUSALS['patterns'], [True, True, False]),
    (verifiers.REFUSALS['boxed'], [False, True, False]),
    (by_score, [True, True, False]),
  ]:
    value = refuses(samples)
    assert value.dtype == bool and value.tolist() == expected
  assert {e.safety for e in seen[:3]} == {REFUSES}
  # A reward model sees what a reader does.
  assert seen[1].conversation[-1].content == 'I cannot help.'
