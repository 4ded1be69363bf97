"""Readers of public sets of texts, and of prompts, that people judged in many ways.

Each returns `judged.Judged`, whose verdicts are under the rules in rules/judged/SET.yaml. A text
stands as what an agent wrote after a request that says nothing, a prompt as one that the agent
takes up. Where the annotation does not say whether a rule is broken, there is no verdict.

As in `public`, unknown labels and columns are refused, and rows of no use are counted by reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from csrm_jax.core.checks import lookup, show
from csrm_jax.data import public, sources
from csrm_jax.data.judged import LABELS, Judged
from csrm_jax.data.sources import Rows
from csrm_jax.data.tables import Files, Row, iterate, numbered, read_rows
from csrm_jax.safety.schema import Category, Message, SafetyConfig

# Requests before a text; its hash chooses one, so that none of them says anything.
TURNS = (
  public.MODERATION_TURN,
  'Please write something.',
  'Say whatever you like.',
  'Write a message that one could post.',
  'What would you like to say?',
  'Give me a comment.',
)


# --- What the readers share --------------------------------------------------------------


def _judge(
  name: str,
  row_id: str,
  text: str,
  verdicts: Mapping[str, float],
  group: str = '',
  conversation: tuple[Message, ...] = (),
) -> Judged | str:
  """Returns a judged text, or why it is of no use.

  Args:
    name: The set; verdicts have keys without it.
    group: By default the text itself.
    conversation: By default the text after one of TURNS.
  """
  if not text.strip():
    return 'empty_text'
  if not verdicts:
    return 'nothing_judged'
  if not conversation:
    turn = TURNS[int(sources.hash_unit(text) * len(TURNS))]
    conversation = (Message('user', turn), Message('agent', text))
  verdicts = {f'{name}/{key}': float(share) for key, share in verdicts.items()}
  return Judged(f'{name}/{row_id}', conversation, verdicts, group or text, name)


def _share(row: Row, column: str) -> float:
  share = row.amount(column)
  if not 0 <= share <= 1:
    raise ValueError(f'{column} is {show(row[column])}; it must be from 0 to 1')
  return share


def _read_each(paths: Files, readers: Mapping[str, Callable[[Files], Rows]]) -> Rows:
  """Returns the rows of files that differ in form, which a column of each tells apart."""
  parts = []
  for number, path in numbered(paths).items():
    first = next(iterate(path))
    column = next((column for column in readers if column in first), None)
    if column is None:
      raise ValueError(
        f'{first.where}: none of the columns {", ".join(map(repr, readers))} is there, one of which'
        f' tells what the file is; found {", ".join(map(repr, first))}'
      )
    parts.append(readers[column]({number: path}))
  return sources.join(parts)


# --- Groups of people --------------------------------------------------------------------

# Groups that share people.
_RELATED = tuple(map(frozenset, LABELS['related']))


def _about(hit: Collection[str], known: Iterable[str], unclear: Collection[str] = ()) -> dict:
  """Returns the verdicts of the rules that protect one of the known groups each."""
  unclear = {*unclear, *(group for pair in _RELATED if pair & set(hit) for group in pair)}
  return {f'group_{g}': g in hit for g in known if g in hit or g not in unclear}


# --- Moderation --------------------------------------------------------------------------


def read_moderation(path: Files) -> Rows:
  """Returns the texts of OpenAI's moderation set; a label that is left out is unknown."""

  def parse(row: Row):
    verdicts = {}
    for label, keys in LABELS['moderation'].items():
      value = row.get(label)
      if value is None:
        continue
      if isinstance(value, bool) or value not in (0, 1):
        raise ValueError(f'label {label} is {show(value)}; it must be 0 or 1, or left out')
      verdicts |= dict.fromkeys(keys, value)
    yield _judge('moderation_judged', row.line, row.text('prompt'), verdicts)

  return read_rows(path, ('prompt',), parse)


# --- HateCheck ---------------------------------------------------------------------------

_HATECHECK = LABELS['hatecheck']


def read_hatecheck(path: Files) -> Rows:
  """Returns the cases of HateCheck.

  A case is in the group of the template that its own was derived from, where there is one:
  a misspelt or negated case says nearly what the first one says.
  """

  def parse(row: Row):
    kind = row.text('functionality')
    known = lookup(kind, _HATECHECK['functionalities'], 'functionality')
    is_hate = row.one_of('label_gold', ('hateful', 'non-hateful')) == 'hateful'
    if is_hate != kind.endswith('_h'):
      raise ValueError(f'functionality {kind} is labelled {row["label_gold"]}; correct one of them')
    target = row.text_or_none('target_ident')
    groups = _HATECHECK['groups']
    group = lookup(target, groups, 'target_ident') if target else ''
    verdicts = dict.fromkeys(('hate', 'hate_insults_allowed', 'hate_unless_countered'), is_hate)
    verdicts |= {
      rule: mark == '1'
      for rule, mark in zip(_HATECHECK['rules'], known, strict=True)
      if mark != '?'
    }
    verdicts |= _about((group,) if is_hate else (), groups.values())
    # A word that only looks like a slur is about nobody.
    if kind != 'slur_homonym_nh':
      verdicts |= {f'mention_{g}': g == group for g in groups.values()}
    # Cases that are derived from slurs have them, too.
    is_slur = kind.startswith(('slur_h', 'slur_reclaimed')) or 'SLUR' in row.text('case_templ')
    is_slur &= kind != 'slur_homonym_nh'
    verdicts['slurs'] = is_slur
    if not (is_slur and kind.startswith('counter_')):
      verdicts['slurs_unless_reclaimed'] = is_slur and is_hate
    # Where some are missing, a number may have become 12.0.
    root = row.name('ref_templ_id' if row['ref_templ_id'] else 'templ_id').removesuffix('.0')
    name, text = row.name('case_id'), row.text('test_case')
    yield _judge('hatecheck', name, text, verdicts, f'hatecheck/template {root}')

  columns = ('functionality', 'case_id', 'test_case', 'label_gold', 'target_ident', 'templ_id')
  return read_rows(path, (*columns, 'ref_templ_id', 'case_templ'), parse)


# --- Hatemoji ----------------------------------------------------------------------------

_HATEMOJI = LABELS['hatemoji']


def read_hatemoji(paths: Files) -> Rows:
  """Returns the texts of HatemojiCheck and HatemojiBuild.

  Groups are the cases of one template with all their variants, and texts with what they were
  made from.
  """
  return _read_each(paths, {'test_group_id': _read_hatemoji_check, 'matched_text': _read_hatemoji})


def _hatemoji(is_hate: bool, targets: Iterable[str]) -> dict[str, float]:
  """Returns the verdicts of a text with these targets, without its type."""
  verdicts: dict[str, float] = {'hate': is_hate}
  if not is_hate:
    return verdicts | _about((), _HATEMOJI['groups'])
  known = [_HATEMOJI['targets'].get(target) for target in targets]
  if not known or None in known:
    return verdicts
  words = ' '.join(known).split()
  unclear = [word[1:] for word in words if word.startswith('?')]
  return verdicts | _about(
    [w for w in words if not w.startswith('?')], _HATEMOJI['groups'], unclear
  )


def _read_hatemoji_check(path: Files) -> Rows:
  def parse(row: Row):
    is_hate, target = row.flag('label_gold'), row.text_or_none('target')
    if target not in (None, '', 'None'):
      targets = [lookup(target, _HATEMOJI['check'], 'target')]
    elif is_hate:
      raise ValueError('label_gold is 1, and there is no target; name the one who is hated')
    else:
      targets = []
    verdicts = _hatemoji(is_hate, targets)
    if not is_hate:
      verdicts |= {f'type_{key}': 0 for key in _HATEMOJI['types'].values()}
    group = f'hatemojicheck/{row.name("test_group_id")}'
    yield _judge('hatemoji', f'check/{row.name("case_id")}', row.text('text'), verdicts, group)

  return read_rows(path, ('case_id', 'test_group_id', 'text', 'target', 'label_gold'), parse)


def _read_hatemoji(path: Files) -> Rows:
  above: dict[str, str] = {}  # text -> another of its group

  def first(text: str) -> str:
    text = ' '.join(text.casefold().split())
    while text in above:
      text = above[text]
    return text

  def parse(row: Row):
    is_hate = row.flag('label_gold')
    kind = row.one_of('type', ('none', *_HATEMOJI['types']))
    if is_hate != (kind != 'none'):
      raise ValueError(f'label_gold is {show(row["label_gold"])} and type {kind}; correct one')
    targets = row['target']
    if isinstance(targets, str):
      targets = re.findall(r"'([^']*)'", targets)
    elif not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
      raise ValueError(f'target is {show(targets)}; it must be a list of texts')
    verdicts = _hatemoji(is_hate, targets)
    verdicts |= {
      f'type_{key}': key == _HATEMOJI['types'].get(kind) for key in _HATEMOJI['types'].values()
    }
    text, (a, b) = (
      row.text('text'),
      sorted(map(first, (row.text('text'), row.text('matched_text')))),
    )
    if a != b:
      above[b] = a
    yield _judge('hatemoji', f'build/{row.name("entry_id")}', text, verdicts)

  columns = ('entry_id', 'text', 'type', 'target', 'label_gold', 'matched_text')
  rows = read_rows(path, columns, parse)
  return Rows((dataclasses.replace(row, group=first(row.group)) for row in rows), rows.drops)


# --- EDOS --------------------------------------------------------------------------------


def read_edos(path: Files) -> Rows:
  """Returns the texts of EDOS under nested rules: sexism, its categories, and their vectors."""
  categories, vectors = LABELS['edos'].values()

  def parse(row: Row):
    is_sexist = row.one_of('label_sexist', ('sexist', 'not sexist')) == 'sexist'
    category, vector = (row.text(f'label_{what}').split(' ')[0] for what in ('category', 'vector'))
    category = category.removesuffix('.')
    if is_sexist:
      lookup(category, categories, 'number of label_category')
      lookup(vector, vectors, 'number of label_vector')
    elif (category, vector) != ('none', 'none'):
      raise ValueError(f'label_vector is {show(row["label_vector"])} of a text that is not sexist')
    if is_sexist and vector[0] != category:
      raise ValueError(f'label_vector {vector} is not in label_category {category}; correct one')
    verdicts = {'sexist': is_sexist}
    verdicts |= {f'category_{key}': c == category for c, key in categories.items()}
    verdicts |= {f'vector_{key}': v == vector for v, key in vectors.items()}
    yield _judge('edos', row.name('rewire_id'), row.text('text'), verdicts)

  columns = ('rewire_id', 'text', 'label_sexist', 'label_category', 'label_vector')
  return read_rows(path, columns, parse)


# --- ToxiGen -----------------------------------------------------------------------------


def read_toxigen(path: Files) -> Rows:
  """Returns ToxiGen texts that people scored: three degrees of toxicity, and the group.

  A rule that protects a group is broken from a score of 3 on, and not below one of 2; in
  between, and for groups that share people with the target, nobody knows.
  """
  groups = LABELS['toxigen']

  def parse(row: Row):
    score = row.amount('toxicity_score')
    if not 1 <= score <= 5:
      raise ValueError(f'toxicity_score is {show(row["toxicity_score"])}; it must be from 1 to 5')
    found = [lookup(t, groups, 'target group') for t in row.texts('target_groups')]
    verdicts = {f'level_{level}': score >= level for level in (2, 3, 4)}
    hit, unclear = (found if score >= 3 else ()), (found if 2 <= score < 3 else ())
    unclear = {*unclear, *(g for pair in _RELATED if pair & set(unclear) for g in pair)}
    if found:
      verdicts |= _about(hit, groups.values(), unclear)
    yield _judge('toxigen_human', row.name('id'), row.text('text'), verdicts)

  return read_rows(path, ('id', 'text', 'toxicity_score', 'target_groups'), parse)


# --- ETHOS -------------------------------------------------------------------------------


def read_ethos(paths: Files) -> Rows:
  """Returns the comments of ETHOS, with the share of people who say that they are hateful.

  Those of the second file are hateful, and were judged by what and whom the hate is about.
  """

  def parse_binary(row: Row):
    verdicts = {'hate': _share(row, 'isHate')}
    yield _judge('ethos', f'binary/{row.number}', row.text('comment'), verdicts)

  def parse_kinds(row: Row):
    directed = _share(row, 'directed_vs_generalized')
    verdicts = {'violence': _share(row, 'violence'), 'directed': directed}
    verdicts |= {'generalised': 1 - directed}
    verdicts |= {f'about_{key}': _share(row, key) for key in LABELS['ethos']}
    yield _judge('ethos', f'kinds/{row.number}', row.text('comment'), verdicts)

  kinds = ('comment', 'violence', 'directed_vs_generalized', *LABELS['ethos'])
  return _read_each(
    paths,
    {
      'isHate': lambda path: read_rows(path, ('comment', 'isHate'), parse_binary),
      'violence': lambda path: read_rows(path, kinds, parse_kinds),
    },
  )


# --- Toxicity in context -----------------------------------------------------------------


def read_context_toxicity(path: Files) -> Rows:
  """Returns each comment twice: after the comment that it answers, and alone.

  The share is that of the people who read it so; those who were unsure count half.
  """

  def parse(row: Row):
    text, parent = row.text('text'), row.text('parent_text')
    # Comments on one comment are one group.
    for kind, talk in ('ic', (Message('user', parent), Message('agent', text))), ('oc', ()):
      if talk and not parent.strip():
        yield 'empty_parent'
        continue
      share = _mean_code(row, f'tox_codes_{kind}')
      if share == 0.5:
        yield 'as_many_say_yes_as_no'
        continue
      name = f'{row.number}/{kind}'
      yield _judge('context_toxicity', name, text, {'toxic': share}, parent or text, talk)

  return read_rows(path, ('text', 'parent_text', 'tox_codes_oc', 'tox_codes_ic'), parse)


def _mean_code(row: Row, column: str) -> float:
  codes = re.fullmatch(r'\[([\d. ]*)\]', ' '.join(row.text(column).split()))
  values = (
    [float(code) for code in codes[1].split() if code in ('0.', '0.5', '1.')] if codes else []
  )
  if not values or len(values) != len(codes[1].split()):
    raise ValueError(
      f'{column} is {show(row[column])}; it must be like "[0. 0.5 1.]", a number for each person'
    )
  return sum(values) / len(values)


# --- Prompts of one hazard each ----------------------------------------------------------


def read_hazard_prompts(paths: Files) -> Rows:
  """Returns `Sure. {prompt}` for the prompts of AILuminate, HarmBench and StrongREJECT.

  A prompt breaks the rule of its own hazard and not those of the other hazards of its set; of
  hazards that go together nobody knows.
  """
  ailuminate, harmbench, strongreject = LABELS['hazards'].values()
  overlaps = [set(pair) for pair in LABELS['overlaps']]

  def reader(
    name: str, prompt: str, column: str, hazards: Mapping[str, str | None], more: Iterable[str]
  ) -> Callable[[Files], Rows]:
    known = [hazard for hazard in hazards.values() if hazard]

    def parse(row: Row):
      own = lookup(row[column], hazards, column)
      verdicts = {
        f'hazard_{hazard}': hazard == own for hazard in known if {hazard, own} not in overlaps
      }
      text = row.text(prompt)
      context = row.text_or_none('ContextString') if 'ContextString' in more else ''
      request = f'{context}\n\n{text}' if context else text
      talk = Message('user', request), Message('agent', f'Sure. {text}')
      yield _judge('hazard_prompts', f'{name}/{row.number}', text, verdicts, text, talk)

    return lambda path: read_rows(path, (prompt, column, *more), parse)

  return _read_each(
    paths,
    {
      'prompt_text': reader('ailuminate', 'prompt_text', 'hazard', ailuminate, ()),
      'Behavior': reader(
        'harmbench', 'Behavior', 'SemanticCategory', harmbench, ('ContextString',)
      ),
      'forbidden_prompt': reader('strongreject', 'forbidden_prompt', 'category', strongreject, ()),
    },
  )


# --- CoSA --------------------------------------------------------------------------------

# What the prompt asks for: allowed risks, some that are not allowed, or no allowed one.
_SITUATIONS = (1, 2, 3)


def read_cosa(path: Files) -> Rows:
  """Returns CoSAlign's prompts as `Sure. {prompt}` examples, each under its own rule.

  These are no `Judged`: what is allowed differs from row to row.
  """

  def parse(row: Row):
    # The dot stands between categories, and for a hyphen.
    spec = row.text('test spec').replace('Drug.Related', 'Drug-Related')
    allowed = [] if spec == 'safe' else spec.split('.')
    words = '; '.join(lookup(name, LABELS['cosa'], 'category of test spec') for name in allowed)
    guideline = (
      f'Requests that involve the following may be answered: {words}. Requests that involve any'
      ' other harm must not be.'
      if words
      else 'Requests that involve any harm must not be answered. All other requests may be.'
    )
    unsafe = row.one_of('situation', _SITUATIONS) != 1
    if not row.text('prompt').strip():
      yield 'empty_prompt'
      return
    example = public.sure_example(f'cosa/{row.number}', row.text('prompt'), unsafe, 'cosa')
    safety = SafetyConfig((Category('Scope', guideline),), 'cosa')
    yield dataclasses.replace(
      example, safety=safety, violated=safety.names if unsafe else (), rule_set=spec
    )

  return read_rows(path, ('test spec', 'prompt', 'situation'), parse)
