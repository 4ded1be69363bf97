"""Readers of answers that were judged, each under several rules: see `judged`.

An answer's group is what it answers, so all answers to one prompt are on one side, those of other
sets too. Rows with one conversation become one, whose verdicts are their mean. A label that does
not say whether a rule is broken leaves that rule out, and so does a tie.

Rules that several sets have labels for are in rules/judged/answering.yaml and harmless.yaml.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from csrm_jax.core.checks import lookup, show
from csrm_jax.data.judged import LABELS, Judged, rules
from csrm_jax.data.public import XSTEST_LABELS
from csrm_jax.data.sources import Rows
from csrm_jax.data.tables import Files, Row, numbered, read_rows
from csrm_jax.safety.schema import (
  Category,
  Example,
  Message,
  Pair,
  SafetyConfig,
  parse_conversation,
)

# Rules that more than one set has labels for.
HARMFUL, NEEDLESS = 'answering/harmful', 'answering/needless'
NO_REFUSAL, MUST_REFUSE = 'answering/no_refusal', 'answering/must_refuse'
ANSWERS, PROMPTS = 'harmless/answers', 'harmless/prompts'

PROPOSITIONS, _TOO_RARE = map(tuple, LABELS['rbr_gold'].values())
PYRIT_CATEGORIES = LABELS['pyrit_graded']
PYRIT_LEVELS = (2, 3, 4, 5)
DIASAFETY_RULES, TEEN_POLICIES = LABELS['diasafety'], LABELS['teen_policies']
_GUARD = re.compile(r'Human user:\n(.*?)\n\nAI assistant:\n(.*)', re.DOTALL)

Parsed = tuple[Sequence[Message], Mapping[str, float]]


def _reader(
  name: str, columns: Sequence[str], parse: Callable[[Row], Parsed]
) -> Callable[[Files], Rows]:
  """Returns the reader of a set; `parse` gives the conversation and the verdicts of a row."""

  def items(row: Row):
    conversation, verdicts = parse(row)
    if not conversation[-1].content.strip():
      yield 'empty_response'
    elif not verdicts:
      yield 'no_label'
    else:
      prompt = ' '.join(m.content for m in conversation[:-1])
      group = ' '.join(prompt.casefold().split())
      yield Judged(f'{name}/{row.number}', tuple(conversation), verdicts, group, name)

  return lambda paths: _merge(read_rows(paths, columns, items))


def _merge(rows: Rows) -> Rows:
  """Returns the rows with those of one conversation as one."""
  found, same = Rows((), rows.drops), {}
  for item in rows:
    same.setdefault(item.conversation, []).append(item)
  for items in same.values():
    shares: dict[str, list[float]] = {}
    for item in items:
      for key, share in item.verdicts.items():
        shares.setdefault(key, []).append(share)
    means = {key: sum(some) / len(some) for key, some in shares.items()}
    # Of a tie nobody can say which side is right.
    verdicts = {key: mean for key, mean in means.items() if mean != 0.5}
    if verdicts:
      found.append(dataclasses.replace(items[0], verdicts=verdicts))
    else:
      found.drop('labels_disagree')
    for _ in items[1:]:
      found.drop('same_conversation')
  return found


def _talk(prompt: str, answer: str) -> tuple[Message, Message]:
  return Message('user', prompt), Message('agent', answer)


# --- Rules of their own --------------------------------------------------------------------


def _rbr(row: Row) -> Parsed:
  """Reads all statements as they are published.

  Some were not asked about every kind of answer, and then stand as false: what is said of
  suggestions, of firm advice and of solutions outside safe refusals, of apologies within them,
  and of further content outside hard refusals.
  """
  said, verdicts = row.object('propositions'), {}
  for name in said:
    lookup(name, (*PROPOSITIONS, *_TOO_RARE), 'proposition')
    is_true = said.flag(name)
    if name not in _TOO_RARE:
      verdicts[f'rbr_gold/{name}'] = float(is_true)
      verdicts[f'rbr_gold/must_{name}'] = float(not is_true)
  answer = parse_conversation(row['completion'])
  messages = parse_conversation(row['prompt']) + answer
  if not answer or answer[-1].role != 'agent':
    raise ValueError("the completion is no answer; write one message of role 'assistant'")
  return messages, verdicts


def _pyrit(row: Row) -> Parsed:
  talk = _talk(row.text('objective'), row.text('assistant_response'))
  kind = row.text('source_file').partition('/')[0]
  if kind == 'refusal_scorer':
    refused = float(row.flag('human_score'))
    return talk, {NO_REFUSAL: refused, MUST_REFUSE: 1 - refused}
  if kind == 'objective':
    return talk, {HARMFUL: float(row.flag('human_score'))}
  lookup(kind, ('harm', 'objective', 'refusal_scorer'), 'folder of source_file')
  category = row.text('harm_category').casefold()
  lookup(category, PYRIT_CATEGORIES, 'harm_category')
  # One person or three; the scores 0, .25, .5, .75 and 1 are the levels 1 to 5 of the scale.
  columns = ('human_score', *(f'human_score_{i}' for i in (1, 2, 3)))
  levels = [1 + 4 * row.amount(column) for column in columns if row.get(column) is not None]
  if not all(level in (1, *PYRIT_LEVELS) for level in levels):
    raise ValueError('a score is none of 0, 0.25, 0.5, 0.75, 1; correct it')
  return talk, {
    f'pyrit_graded/{category}_{k}': sum(level >= k for level in levels) / len(levels)
    for k in PYRIT_LEVELS
    if levels
  }


def _diasafety(row: Row) -> Parsed:
  key = lookup(row['category'], DIASAFETY_RULES, 'category')
  is_broken = row.one_of('label', ('Safe', 'Unsafe')) == 'Unsafe'
  return _talk(row.text('context'), row.text('response')), {key: float(is_broken)}


def _teen(row: Row) -> Parsed:
  key, labels = lookup(row['policy'], TEEN_POLICIES, 'policy')
  is_broken = row.one_of('response_label', labels) != labels[0]
  return _talk(row.text('prompt'), row.text('response')), {key: float(is_broken)}


# --- Rules about answering and refusing ------------------------------------------------------


def _xstest(row: Row) -> Parsed:
  kind = row.text('type')
  lookup(kind.removeprefix('contrast_'), LABELS['xstest_types'], 'type')
  is_harmful = kind.startswith('contrast_')
  talk = _talk(row.text('prompt'), row.text('completion'))
  columns = ('annotation_1', 'annotation_2', 'final_label')
  said = [row.one_of(column, XSTEST_LABELS) for column in columns]
  # Of a harmless request no answer is harmful, of a harmful one no refusal is needless.
  verdicts = {NEEDLESS if is_harmful else HARMFUL: 0.0}
  complied, refused = (said.count(label) for label in XSTEST_LABELS[:2])
  # A partial refusal may be meant by a rule about refusals or not.
  if said[-1] != XSTEST_LABELS[2]:
    share = refused / (complied + refused)
    verdicts |= {NO_REFUSAL: share, MUST_REFUSE: 1 - share}
    verdicts |= {HARMFUL: 1 - share} if is_harmful else {NEEDLESS: share}
  return talk, verdicts


def _guarded(row: Row, labels: Mapping[str, Mapping[str, float]]) -> Parsed:
  match = _GUARD.fullmatch(row.text('input'))
  if not match:
    raise ValueError('column \'input\' is not "Human user: ... AI assistant: ..."; correct it')
  words = row.text('output').split()
  label = lookup(words[-1] if words else '', labels, 'label in the column output')
  return _talk(match[1], match[2].strip()), label


def _guard(name: str, key: str) -> Callable[[Files], Rows]:
  labels = {'harmful': {key: 1.0}, 'unharmful': {key: 0.0}}
  return _reader(name, _GUARD_COLUMNS, lambda row: _guarded(row, labels))


_GUARD_COLUMNS = ('row', 'input', 'output')
# The same answers in two files. Of a refusal the labels do not say whether it was needless.
_RESPONSE_LABELS = {
  'harmful': {HARMFUL: 1.0},
  'unharmful': {HARMFUL: 0.0},
  'refusal': {NO_REFUSAL: 1.0, MUST_REFUSE: 0.0},
  'compliance': {NO_REFUSAL: 0.0, MUST_REFUSE: 1.0},
}


def _aegis(row: Row) -> Parsed:
  # These are prompts without an answer: judged is whether they may be done, see `sure_example`.
  (prompt, _), verdicts = _guarded(row, {'harmful': {PROMPTS: 1.0}, 'unharmful': {PROMPTS: 0.0}})
  return _talk(prompt.content, f'Sure. {prompt.content}'), verdicts


def read_jailbreak_judged(paths: Files) -> Rows:
  """Returns answers to jailbreaks, each as the answer to the question inside of its jailbreak.

  The questions are in question_list.csv, in the folder of the answers.
  """
  known: dict[str, str] = {}
  folder = next(iter(numbered(paths).values())).parent

  def parse(row: Row) -> Parsed:
    if not known:
      path = folder / 'question_list.csv'
      if not path.is_file():
        raise ValueError(f'{path} is missing, which has the questions; copy it there')
      rows = read_rows(path, ('index', 'text'), lambda r: [(r.name('index'), r.text('text'))])
      known.update(rows)
    question = lookup(row.name('question'), known, 'question')
    return _talk(question, row.text('Response')), {HARMFUL: float(row.flag('label'))}

  return _reader('jailbreak_judged', ('question', 'Response', 'label'), parse)(paths)


read_rbr_gold = _reader('rbr_gold', ('prompt', 'completion', 'propositions'), _rbr)
read_pyrit_graded = _reader(
  'pyrit_graded', ('objective', 'assistant_response', 'source_file'), _pyrit
)
read_diasafety = _reader('diasafety', ('context', 'response', 'category', 'label'), _diasafety)
read_teen_policies = _reader(
  'teen_policies', ('policy', 'prompt', 'response', 'response_label'), _teen
)
read_xstest_judged = _reader(
  'xstest_judged',
  ('type', 'prompt', 'completion', 'annotation_1', 'annotation_2', 'final_label'),
  _xstest,
)
read_xstest_response = _reader(
  'xstest_response', _GUARD_COLUMNS, lambda row: _guarded(row, _RESPONSE_LABELS)
)
read_beavertails_test = _guard('beavertails_test', ANSWERS)
read_harmbench_response_val = _guard('harmbench_response_val', ANSWERS)
read_safe_rlhf_answers = _guard('safe_rlhf_answers', ANSWERS)
read_aegis_prompts_test = _reader('aegis_prompts_test', _GUARD_COLUMNS, _aegis)


# --- Pairs -----------------------------------------------------------------------------------


def read_safe_rlhf_pairs(paths: Files) -> Rows:
  """Returns the two answers to each prompt of which one is safe: rows k and k + 1000."""
  safety = SafetyConfig((rules('harmless')[ANSWERS].wordings[0],), ANSWERS)
  labels = {'harmful': {ANSWERS: 1.0}, 'unharmful': {ANSWERS: 0.0}}
  rows = {}

  def parse(row: Row):
    talk, verdicts = _guarded(row, labels)
    label = 'unsafe' if verdicts[ANSWERS] else 'safe'
    violated = safety.names if verdicts[ANSWERS] else ()
    name = f'safe_rlhf_pairs/{row.name("row")}'
    rows[int(row.amount('row'))] = Example(
      name, safety, talk, label, violated, source='safe_rlhf_pairs', rule_set=ANSWERS
    )
    return ()

  found = read_rows(paths, _GUARD_COLUMNS, parse)
  for k, first in rows.items():
    second = rows.get(k + 1000)
    if second is None:
      if k - 1000 not in rows:
        found.drop('no_partner')
    elif first.conversation[:-1] != second.conversation[:-1]:
      found.drop('prompts_differ')
    elif first.label == second.label:
      found.drop('same_safety')
    else:
      safer, other = sorted((first, second), key=lambda e: e.label)
      found.append(Pair(f'safe_rlhf_pairs/{k}', safer, other, 'preference'))
  return found


def read_model_spec(paths: Files) -> Rows:
  """Returns each good answer beside each bad one, under the section that the row illustrates.

  The whole text of the section is the only rule; no run trains on it.
  """

  def parse(row: Row):
    rule = Category(row.text('section'), row.text('section_text'))
    safety = SafetyConfig((rule,), f'model_spec/{row.text("section_id")}')
    messages = parse_conversation(row['messages'])
    answers = row['responses']
    if not isinstance(answers, list) or not all(isinstance(a, Mapping) for a in answers):
      raise ValueError(f'responses is {show(answers)}; write a list of objects')
    sides: dict[str, list[Example]] = {'GOOD': [], 'BAD': []}
    for number, answer in enumerate(answers):
      answer = Row(answer, row.where, 0, 0, row.path)
      for column in ('verdict', 'content'):
        if column not in answer:
          raise ValueError(f'response {number + 1} has no {column!r}; add it')
      verdict = answer.one_of('verdict', tuple(sides))
      is_bad, text = verdict == 'BAD', answer.text('content')
      if text.strip():
        sides[verdict].append(
          Example(
            f'model_spec/{row.number}/{number}',
            safety,
            (*messages, Message('agent', text)),
            'unsafe' if is_bad else 'safe',
            safety.names if is_bad else (),
            source='model_spec',
            rule_set='model_spec/section',
          )
        )
    if not (sides['GOOD'] and sides['BAD']):
      yield 'no_pair'
    for i, (safer, other) in enumerate(itertools.product(sides['GOOD'], sides['BAD'])):
      yield Pair(f'model_spec/{row.number}/pair/{i}', safer, other, 'preference')

  return read_rows(paths, ('section_id', 'section', 'section_text', 'messages', 'responses'), parse)
