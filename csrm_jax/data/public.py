"""Readers of public data sets in their published columns, from local files.

Each brings the rules that its labels answer to (`rules/`, in our words): under other rules the
same text has another true label, and that is what these sets are for. Categories have the set's
own names, so that its annotation says which of them are violated.

A reader refuses labels, categories and columns that it does not know. Rows that are well-formed
but of no use are left out and counted under a reason, such as 'empty_response'.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from csrm_jax.core.checks import lookup, note, show
from csrm_jax.data.benchmark import TIES, Choice
from csrm_jax.data.judged import LABELS
from csrm_jax.data.sources import Rows
from csrm_jax.data.tables import Files, Row, read_rows
from csrm_jax.safety.schema import Category, Example, Message, Pair, SafetyConfig, load_safety

RULES_FOLDER = pathlib.Path(__file__).parent / 'rules'

XSTEST_LABELS = ('1_full_compliance', '2_full_refusal', '3_partial_refusal')
MODERATION_TURN = 'Please write a short text.'
MODERATION_SEVERITY = (('H', 'H2'), ('V', 'V2'))

# These labels of Aegis are no rule that anybody could state, so they do not say which category
# is violated.
_AEGIS_UNSTATED = ('Needs Caution', 'Other')
WILDGUARD_SUBCATEGORIES = LABELS['wildguard']
_HH_ROLES = {'Human': 'user', 'Assistant': 'agent'}
# Only where a turn starts: the words Human and Assistant inside a turn stay as they are.
_HH_TURN = re.compile(r'\n\n(Human|Assistant):')
_DYNABENCH_ROLES = {'User': 'user', 'Agent': 'agent'}
# A turn begins where a line begins with its speaker.
_DYNABENCH_TURN = re.compile(r'^[ \t]*(User|Agent):[ \t]*', re.MULTILINE)
_NUMBER = re.compile(r'^\s*(?:\d+\s*[.):]|[-*•])\s+')


# --- Rules -------------------------------------------------------------------------------


@functools.cache
def rules(name: str) -> SafetyConfig:
  """Returns the rules in rules/NAME.yaml."""
  return load_safety(RULES_FOLDER / f'{name}.yaml')


XSTEST_RULES: dict[str, Category] = dict(
  zip(('harmful', 'refusal'), rules('xstest').categories, strict=True)
)
# H2 and V2 are the lenient sides of H and V and have the same names: only the guideline tells
# them apart, so that a model has to read it.
_STRICT = dict(zip(('H', 'V', 'HR', 'SH'), rules('moderation').categories, strict=True))
_LENIENT = dict(zip(('H2', 'V2'), rules('moderation_lenient').categories, strict=True))
MODERATION_RULES: dict[str, Category] = {
  key: (_STRICT | _LENIENT)[key] for key in ('H', 'H2', 'V', 'V2', 'HR', 'SH')
}
# Under these rules it is unsafe to do what a harmful request asks for.
COMPLIANCE = SafetyConfig((XSTEST_RULES['harmful'],), 'compliance')


def wordings(known: Mapping[str, Category]) -> dict[Category, tuple[Category, ...]]:
  """Returns {category: the same rule in other words}, for the categories that have some."""
  others = [{c.name: c for c in rules(f'reworded_{i}').categories} for i in (1, 2)]
  return {
    category: tuple(other[category.name] for other in others)
    for key, category in known.items()
    if key not in _LENIENT
  }


# --- Sets of one judged response a row ---------------------------------------------------


def answers(
  name: str,
  label: str,
  violated: str = '',
  labels: Mapping[Any, bool | None] | None = None,
  prompt: str = 'prompt',
  response: str = 'response',
) -> Callable[[Files], Rows]:
  """Returns the reader of a set with a prompt, a response and a label in each row.

  The rows are under the rules in rules/NAME.yaml.

  Args:
    label: The column that says whether the response is safe.
    violated: The column with an object {category: true or false}; '' for none.
    labels: Maps a value of the label to whether the response is unsafe, or to None if it does
      not say. By default the label is true where the response is safe.
  """

  def read(path: Files) -> Rows:
    safety = rules(name)

    def parse(row: Row):
      names = _flagged(row, violated, safety, name) if violated else ()
      if labels is None:
        unsafe = not row.flag(label)
      else:
        unsafe = labels[row.one_of(label, tuple(labels))]
      talk = row[prompt], row[response]
      yield _answer(f'{name}/{row.number}', safety, talk, unsafe, names, name)

    return read_rows(path, [c for c in (prompt, response, violated, label) if c], parse)

  return read


def read_wildguard(path: Files, with_categories: bool = True) -> Rows:
  """Returns WildGuardMix responses, with the category of harmful ones.

  Without `with_categories`, or where the subcategory is 'others', the category is unknown.
  """
  safety = rules('wildguardmix')

  def parse(row: Row):
    # The set annotates the prompt's subcategory; a harmful response is taken to be in the same.
    category = None
    if with_categories and row['subcategory'] is not None:
      category = lookup(row['subcategory'], WILDGUARD_SUBCATEGORIES, 'subcategory')
    label = row['response_harm_label']
    # Rows without a response are left out whatever their label is.
    if row['response'] and label is not None:
      row.one_of('response_harm_label', ('harmful', 'unharmful'))
    yield _answer(
      f'wildguardmix/{row.number}',
      safety,
      (row['prompt'], row['response']),
      None if label is None else label == 'harmful',
      (category,) if category and label == 'harmful' else (),
      'wildguardmix',
      'adversarial' if row.flag('adversarial') else 'plain',
    )

  columns = ('prompt', 'response', 'response_harm_label', 'adversarial')
  return read_rows(path, (*columns, 'subcategory') if with_categories else columns, parse)


def read_aegis(path: Files) -> Rows:
  """Returns AEGIS 2.0 responses under 21 categories.

  For an unsafe response `violated_categories` is taken as it is, unless it holds only 'Needs
  Caution' or 'Other'; then the category is unknown.
  """
  safety = rules('aegis')
  known = dict.fromkeys((*safety.names, *_AEGIS_UNSTATED))

  def parse(row: Row):
    stated = (row.text_or_none('violated_categories') or '').split(',')
    names = dict.fromkeys(name.strip() for name in stated if name.strip())
    for name in names:
      lookup(name, known, 'category')
    label = row['response_label']
    if label not in ('safe', 'unsafe', None, ''):
      raise ValueError(f'unknown response_label {show(label)}; it must be safe, unsafe or null')
    # The prompts of these rows are not in the set.
    if row['reconstruction_id_if_redacted'] not in (None, '', 0):
      yield 'redacted'
      return
    unsafe = label == 'unsafe' if label else None
    # The categories are of prompt and response together: they say nothing about a safe response.
    violated = [name for name in names if unsafe and name not in _AEGIS_UNSTATED]
    talk = row['prompt'], row['response']
    yield _answer(f'aegis/{row.number}', safety, talk, unsafe, violated, 'aegis')

  columns = ('reconstruction_id_if_redacted', 'prompt', 'response', 'response_label')
  return read_rows(path, (*columns, 'violated_categories'), parse)


def read_pku(path: Files, with_severity: bool = False) -> Rows:
  """Returns both responses of PKU-SafeRLHF rows under its 19 categories.

  On request they have the rating `severity`, from 0 (safe) to 3.
  """
  safety = rules('pku')
  parts = ['response_{}', 'is_response_{}_safe', 'response_{}_harm_category']
  severity = 'response_{}_severity_level'
  columns = [*parts, severity] if with_severity else parts

  def parse(row: Row):
    for i in (0, 1):
      text, safe, flags = (part.format(i) for part in parts)
      text, safe, flags = row[text], row.flag(safe), row.object(flags)
      for name in flags:
        lookup(name, safety.names, 'harm category')
      violated = [name for name in safety.names if name in flags and flags.flag(name)]
      found = _answer(
        f'pku/{row.number}/{i}', safety, (row['prompt'], text), not safe, violated, 'pku'
      )
      if with_severity and isinstance(found, Example):
        level = row.one_of(severity.format(i), (0, 1, 2, 3))
        found = dataclasses.replace(found, ratings={'severity': level})
      yield found

  return read_rows(path, ['prompt', *(part.format(i) for i in (0, 1) for part in columns)], parse)


def _flagged(row: Row, column: str, safety: SafetyConfig, name: str) -> list[str]:
  """Returns the categories that are true in an object with exactly those of the rules."""
  flags = row.object(column)
  if set(flags) != set(safety.names):
    unknown = sorted(map(show, set(flags) - set(safety.names)))
    raise ValueError(
      f'{column} is {show(flags)}'
      + (f' with the unknown {", ".join(unknown)}' if unknown else '')
      + f'; it must be an object with the {len(safety.names)} categories of {name}'
    )
  return [n for n in safety.names if flags.flag(n)]


def _answer(
  example_id: str,
  safety: SafetyConfig,
  talk: tuple[str, str | None],
  unsafe: bool | None,
  violated: Sequence[str],
  source: str,
  rule_set: str = '',
) -> Example | str:
  """Returns (prompt, response) as an example, or why that cannot be."""
  if talk[1] is None:
    return 'prompt_only'
  if not _has_words(talk[1]):
    return 'empty_response'
  if unsafe is None:
    return 'no_label'
  # Safe, but with a category: nobody knows which of the two holds.
  if violated and not unsafe:
    return 'labels_disagree'
  return Example(
    example_id,
    safety,
    (Message('user', talk[0]), Message('agent', talk[1])),
    'unsafe' if unsafe else 'safe',
    violated,
    source=source,
    rule_set=rule_set,
  )


def _has_words(text: Any) -> bool:
  if not isinstance(text, str):
    raise ValueError(f'the response is {show(text)}, not text; correct it')
  return bool(text.strip())


# --- Prompts, judged by whether they may be answered -------------------------------------


def sure_example(example_id: str, prompt: str, harmful: bool, source: str) -> Example:
  """Returns a prompt as an example in which the agent answers `Sure. {prompt}`.

  Under `COMPLIANCE` it is unsafe exactly if the request is harmful.

  Source: CSRM (arXiv 2605.30487), Table 4.
  """
  violated = COMPLIANCE.names if harmful else ()
  return _answer(example_id, COMPLIANCE, (prompt, f'Sure. {prompt}'), harmful, violated, source)


def read_or_bench(path: Files) -> Rows:
  """Returns `Sure. {prompt}` examples; only the toxic file is harmful."""

  def parse(row: Row):
    harmful, stem = 'toxic' in row.path.name, row.path.stem
    source = f'or-bench/{row.text_or_none("category")}'
    yield sure_example(f'{stem}/{row.number}', row.text('prompt'), harmful, source)

  return read_rows(path, ('prompt', 'category'), parse)


def read_cosapien(path: Files) -> Rows:
  """Returns CoSApien prompts as `sure_example`, each under the rules of its scenario."""

  def parse(row: Row):
    stem = row.path.name.split('.')[0].split('-')[0]
    prompt, kind = row.text('prompt'), row.text('type').strip().casefold()
    unsafe = lookup(kind, LABELS['cosapien'], 'type') == 'unsafe'
    # A scenario's text is not cut into rules: the whole of it is one category.
    yield dataclasses.replace(
      sure_example(f'cosapien/{stem}/{row.number}', prompt, unsafe, 'cosapien'),
      safety=SafetyConfig((Category('Scenario', row['scenario']),), stem),
      violated=('Scenario',) if unsafe else (),
    )

  return read_rows(path, ('prompt', 'scenario', 'type'), parse)


# --- XSTest ------------------------------------------------------------------------------


def xstest_prompts(path: Files) -> dict[str, Row]:
  """Returns the rows of XSTest's prompts by id, with the label 'safe' or 'unsafe'."""
  found: dict[str, Row] = {}

  def parse(row: Row):
    row.one_of('label', ('safe', 'unsafe'))
    row.text('prompt')
    # As walledai/XSTest publishes them, rows have no ids.
    row['id'] = row.name('id') if 'id' in row else row.number
    if row.text('type').startswith('contrast_') != (row['label'] == 'unsafe'):
      raise ValueError(
        f'type {row["type"]!r} with label {row["label"]!r}; contrast_*'
        ' prompts are unsafe and all others safe'
      )
    if row['id'] in found:
      raise ValueError(f'id {row["id"]!r} is given twice; remove one of the rows')
    found[row['id']] = row
    return ()

  read_rows(path, ('prompt', 'type', 'label'), parse)
  return found


def xstest_completions(
  path: Files, columns: Sequence[str], parse: Callable[[Row], Iterable[Any]] = lambda row: (row,)
) -> Rows:
  """Returns what `parse` makes of XSTest's completions; labels in these columns are checked."""

  def checked(row: Row) -> Iterable[Any]:
    for column in columns:
      if column.startswith('annotation_') or column == 'final_label':
        row.one_of(column, XSTEST_LABELS)
    return parse(row)

  return read_rows(path, columns, checked)


def read_xstest_prompts(path: Files) -> Rows:
  """Returns `Sure. {prompt}` examples."""
  return Rows(
    sure_example(f'xstest/{row["id"]}', row['prompt'], row['label'] == 'unsafe', 'xstest')
    for row in xstest_prompts(path).values()
  )


def read_xstest(
  prompts_csv: str | os.PathLike, completions_csv: Files, rule: str = 'harmful'
) -> Rows:
  """Returns XSTest completions as examples under one of three rule sets.

  Under 'harmful' it is unsafe to comply fully with a harmful request (type contrast_*), under
  'refusal' to refuse a harmless one fully, under 'both' either. Partial refusals violate
  neither.

  Raises:
    ValueError: A rule, column, label or type is unknown, or the two files do not match.
  """
  rule_sets = {key: (key,) for key in XSTEST_RULES} | {'both': tuple(XSTEST_RULES)}
  keys = lookup(rule, rule_sets, 'XSTest rule')
  safety = SafetyConfig(tuple(XSTEST_RULES[key] for key in keys), f'xstest/{rule}')
  prompts = xstest_prompts(prompts_csv)
  num, differing = 0, []

  def parse(row: Row):
    nonlocal num
    num += 1
    name = row.name('id')
    known = prompts.get(name.removeprefix('v2-'))
    if known is None:
      yield 'unknown_prompt'
      return
    for column in ('type', 'prompt'):
      if row.text(column).strip() != known[column].strip():
        differing.append(
          f'{row.where}: {column!r} of prompt {name} differs from the one in {prompts_csv}'
        )
        yield 'differs_from_prompt'
        return
    is_harmful = known['label'] == 'unsafe'
    fired = {
      'harmful': is_harmful and row['final_label'] == XSTEST_LABELS[0],
      'refusal': not is_harmful and row['final_label'] == XSTEST_LABELS[1],
    }
    violated = tuple(XSTEST_RULES[key].name for key in keys if fired[key])
    talk = row['prompt'], row['completion']
    name = f'{row.path.stem}/{name}/{rule}'
    yield _answer(name, safety, talk, bool(violated), violated, 'xstest', f'xstest/{rule}')

  columns = ('id', 'type', 'prompt', 'completion', 'final_label')
  rows = xstest_completions(completions_csv, columns, parse)
  # Prompt v2-195 differs between the published files. Where many do, they are of two versions.
  if 10 * len(differing) > num:
    raise ValueError(f'{differing[0]}; use files of one version')
  for line in differing:
    note(f'{line}; the row is left out')
  return rows


# --- Moderation --------------------------------------------------------------------------


def read_moderation(path: Files, categories: Sequence[str] = ('H', 'V', 'HR', 'SH')) -> Rows:
  """Returns moderation rows as examples under a subset of the categories.

  The categories are keys of `MODERATION_RULES`: H hate, V violence, HR harassment, SH self-harm;
  H2 instead of H allows hate unless it threatens, V2 instead of V allows violence unless it is
  graphic. The text is judged as the agent's response to a neutral request.

  Raises:
    ValueError: A category is unknown, two contradict each other, or a label is not 0 or 1.
  """
  for key in categories:
    lookup(key, MODERATION_RULES, 'moderation category')
  for strict, lenient in MODERATION_SEVERITY:
    if strict in categories and lenient in categories:
      raise ValueError(
        f'moderation categories {strict} and {lenient} contradict each other;'
        f' {lenient} allows what {strict} forbids: choose one'
      )
  name = f'moderation/{"+".join(categories)}'
  safety = SafetyConfig(tuple(MODERATION_RULES[key] for key in categories), name)

  def parse(row: Row):
    yield _moderated(row, f'{name}/{row.line}', safety, categories, name)

  return read_rows(path, ('prompt',), parse)


def read_moderation_pairs(path: Files) -> Rows:
  """Returns strictness pairs from the severity orders H > H2 and V > V2.

  A pair is one text that violates the strict rule: under the lenient rule (safer) and under the
  strict one, both labelled.
  """

  def parse(row: Row):
    for strict, lenient in MODERATION_SEVERITY:
      name = f'moderation/{strict}/{row.line}'
      other, safer = (
        _moderated(
          row,
          f'{name}/{side}',
          SafetyConfig((MODERATION_RULES[key],), f'moderation/{strict}'),
          (key,),
          f'moderation/{strict}>{lenient}',
        )
        for side, key in (('strict', strict), ('lenient', lenient))
      )
      if 'unknown_label' in (other, safer):
        yield 'unknown_label'
      elif not row[strict]:
        yield 'safe'
      else:
        yield (
          other
          if isinstance(other, str)
          else Pair(f'{name}/strictness', safer, other, 'strictness')
        )

  return read_rows(path, ('prompt',), parse)


def _moderated(
  row: Row, example_id: str, safety: SafetyConfig, keys: Sequence[str], rule_set: str
) -> Example | str:
  """Returns the text under the rules of these keys, or why that cannot be."""
  text, violated = row.text('prompt'), []
  for key in keys:
    value = row.get(key)
    if value is not None and (isinstance(value, bool) or value not in (0, 1)):
      raise ValueError(
        f'label {key} is {show(value)}; it must be 0 or 1, or left out where unknown'
      )
    if value:
      violated.append(MODERATION_RULES[key].name)
  if any(row.get(key) is None for key in keys):
    return 'unknown_label'
  talk = MODERATION_TURN, text
  return _answer(example_id, safety, talk, bool(violated), violated, 'moderation', rule_set)


# --- Preferences -------------------------------------------------------------------------


def read_hh_pairs(path: Files, safety: SafetyConfig | None = None) -> Rows:
  """Returns preference pairs from Anthropic HH transcripts, under general harmlessness rules.

  A row has `chosen` and `rejected`: two transcripts that share all up to the last
  "\\n\\nAssistant:".
  """
  safety = safety or rules('harmlessness')

  def parse(row: Row):
    chosen, rejected = (_parse_hh(row.text(side), side) for side in ('chosen', 'rejected'))
    if chosen[:-1] != rejected[:-1]:
      yield 'prompts_differ'
    elif not (chosen[-1].content and rejected[-1].content):
      yield 'empty_response'
    elif chosen[-1] == rejected[-1]:
      yield 'identical_pair'
    else:
      name = f'hh/{row.line}'
      safer, other = (
        Example(f'{name}/{side}', safety, conversation, source='hh')
        for side, conversation in (('chosen', chosen), ('rejected', rejected))
      )
      yield Pair(name, safer, other, 'preference')

  return read_rows(path, ('chosen', 'rejected'), parse)


def _parse_hh(text: str, column: str) -> tuple[Message, ...]:
  start, *parts = _HH_TURN.split(text)
  if start.strip() or parts[-2:-1] != ['Assistant']:
    raise ValueError(
      f'column {column!r} is no transcript; it must begin with'
      ' "\\n\\nHuman:" and its last turn with "\\n\\nAssistant:"'
    )
  return _turns(parts, _HH_ROLES)


def _turns(parts: Sequence[str], roles: Mapping[str, str]) -> tuple[Message, ...]:
  """Returns the messages in [speaker, text, speaker, text, ...]."""
  return tuple(
    Message(roles[role], content.strip())
    for role, content in zip(parts[::2], parts[1::2], strict=True)
  )


def read_pku_pairs(path: Files, with_severity: bool = False) -> Rows:
  """Returns PKU-SafeRLHF pairs whose preferred side was chosen for safety.

  On request they are as strong as their severities differ, and at least 1.
  """
  safety = rules('beavertails')

  def parse(row: Row):
    better, safer = (row.one_of(f'{what}_response_id', (0, 1)) for what in ('better', 'safer'))
    worse = 1 - safer
    safe = [row.flag(f'is_response_{i}_safe') for i in (0, 1)]
    severity = [row.amount(f'response_{i}_severity_level') for i in (0, 1)]
    texts = [row[f'response_{i}'] for i in (0, 1)]
    # The paper keeps pairs whose preferred side was chosen for safety rather than for not
    # refusing, without saying how. Our reading: the better response is also the safer one, and
    # the annotation says in what: only the other one is unsafe, or that is of a higher severity.
    if better != safer:
      yield 'preferred_not_safer'
    elif not (safe[safer] and not safe[worse]) and not (
      severity[safer] < severity[worse] and safe[safer] == safe[worse]
    ):
      yield 'same_safety'
    elif texts[0] == texts[1]:
      yield 'identical_pair'
    elif not all(map(_has_words, texts)):
      yield 'empty_response'
    else:
      name = f'safe_rlhf/{row.number}'
      first, second = (
        _answer(f'{name}/{side}', safety, (row['prompt'], texts[i]), not safe[i], (), 'safe_rlhf')
        for side, i in (('safer', safer), ('other', worse))
      )
      strength = max(severity[worse] - severity[safer], 1.0) if with_severity else None
      yield Pair(name, first, second, 'preference', strength=strength)

  sides = ('response_{}', 'is_response_{}_safe', 'response_{}_severity_level')
  columns = ['prompt', 'better_response_id', 'safer_response_id']
  return read_rows(path, columns + [side.format(i) for side in sides for i in (0, 1)], parse)


def read_reward_bench_2(path: Files) -> Rows:
  """Returns the choices of RewardBench 2, under general harmlessness rules."""
  safety = rules('harmlessness')

  def parse(row: Row):
    # `Choice` reads the ids of the subset Ties.
    chosen, rejected = row.texts('chosen'), row.texts('rejected')
    name, subset = row.name('id'), row.text('subset')
    name = name if subset == TIES else f'reward_bench_2/{name}'
    responses = tuple(
      Example(
        f'{name}/{i}',
        safety,
        (Message('user', row['prompt']), Message('agent', text)),
        source='reward_bench_2',
      )
      for i, text in enumerate([*chosen, *rejected])
    )
    yield Choice(name, responses, len(chosen), subset)

  return read_rows(path, ('id', 'prompt', 'chosen', 'rejected', 'subset'), parse)


def read_reward_bench_2_pairs(path: Files) -> Rows:
  """Returns each chosen response of the subset Safety beside each rejected one."""
  found = Rows()
  for choice in read_reward_bench_2(path):
    # The other subsets have nothing to do with safety.
    if choice.subset != 'Safety':
      found.drop('not_safety')
      continue
    sides = choice.responses
    pairs = itertools.product(sides[: choice.num_correct], sides[choice.num_correct :])
    found += [
      Pair(f'{choice.id}/{number}', safer, other, 'preference')
      for number, (safer, other) in enumerate(pairs)
    ]
  return found


# --- DynaBench ---------------------------------------------------------------------------


def read_dynabench(path: Files) -> Rows:
  """Returns DynaBench transcripts, with each rule of the policy as a category; FAIL is unsafe."""

  def parse(row: Row):
    label = row.one_of('label', ('PASS', 'FAIL'))
    guidelines = _parse_policy(row['policy'])
    # What stands before the first turn is left out.
    _, *parts = _DYNABENCH_TURN.split(row.text('transcript'))
    messages = _turns(parts, _DYNABENCH_ROLES)
    # Nobody answers user turns after the last agent turn, so there is nothing to judge in them.
    while messages and messages[-1].role != 'agent':
      messages = messages[:-1]
    if not guidelines:
      yield 'no_policy'
    elif not parts:
      yield 'no_turns'
    elif not messages:
      yield 'no_agent_turn'
    else:
      categories = [Category(f'Rule {i}', text) for i, text in enumerate(guidelines, start=1)]
      yield Example(
        f'dynabench/{row.number}',
        SafetyConfig(tuple(categories)),
        messages,
        label='unsafe' if label == 'FAIL' else 'safe',
        source='dynabench',
      )

  return read_rows(path, ('policy', 'transcript', 'label'), parse)


def _parse_policy(policy: Any) -> list[str]:
  """Returns the rules of a policy, which are its lines or its items, without numbers."""
  lines = policy.splitlines() if isinstance(policy, str) else policy or []
  if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
    raise ValueError(f'the policy is {show(policy)}, not a text or a list of texts; correct it')
  found = [_NUMBER.sub('', line).strip() for line in lines]
  return [rule for rule in found if rule and rule not in ('<rules>', '</rules>')]
