"""Readers of public sets of texts, and of prompts, that people judged in many ways.

Each returns `judged.Judged`, whose verdicts are under the rules in rules/judged/SET.yaml. A text
stands as what an agent wrote after a request that says nothing, a prompt as one that the agent
takes up. Where the annotation does not say whether a rule is broken, there is no verdict.

As in `public`, unknown labels and columns are refused, and rows of no use are counted by reason.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from csrm_jax.core import files
from csrm_jax.core.checks import show
from csrm_jax.data import public, sources
from csrm_jax.data.judged import Judged
from csrm_jax.data.sources import Rows
from csrm_jax.data.tables import Files, Row, iterate, lookup, numbered, read_rows
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

# Groups that share people: what is said about one may well be said about the other.
_RELATED = tuple(
  map(
    frozenset,
    (
      ('asian', 'chinese'),
      ('asian', 'south_asian'),
      ('latino', 'mexican'),
      ('latino', 'immigrants'),
      ('muslims', 'middle_east'),
      ('lgbtq', 'gay'),
      ('lgbtq', 'trans'),
      ('immigrants', 'refugees'),
    ),
  )
)


def _about(hit: Collection[str], known: Iterable[str], unclear: Collection[str] = ()) -> dict:
  """Returns the verdicts of the rules that protect one of the known groups each."""
  unclear = {*unclear, *(group for pair in _RELATED if pair & set(hit) for group in pair)}
  return {f'group_{g}': g in hit for g in known if g in hit or g not in unclear}


# --- Moderation --------------------------------------------------------------------------

_MODERATION = {'H': ('H',), 'H2': ('H2', 'H_unless_H2'), 'V': ('V',), 'V2': ('V2', 'V_unless_V2')}
_MODERATION |= {'HR': ('HR',), 'SH': ('SH',)}


def read_moderation(path: Files) -> Rows:
  """Returns the texts of OpenAI's moderation set; a label that is left out is unknown."""

  def parse(row: Row):
    verdicts = {}
    for label, keys in _MODERATION.items():
      value = row.get(label)
      if value is None:
        continue
      if isinstance(value, bool) or value not in (0, 1):
        raise ValueError(f'label {label} is {show(value)}; it must be 0 or 1, or left out')
      verdicts |= dict.fromkeys(keys, value)
    yield _judge('moderation_judged', row.line, row.text('prompt'), verdicts)

  return read_rows(path, ('prompt',), parse)


# --- HateCheck ---------------------------------------------------------------------------

_HATECHECK_GROUPS = {
  'women': 'women',
  'trans people': 'trans',
  'gay people': 'gay',
  'black people': 'black',
  'disabled people': 'disabled',
  'Muslims': 'muslims',
  'immigrants': 'immigrants',
}
# What a functionality says of rules beside its label, in this order; '?' where it depends.
_HATECHECK_RULES = ('hate_even_quoted', 'abuse_of_anyone', 'threats', 'profanity')
_HATECHECK = {
  'derog_neg_emote_h': '1100',
  'derog_neg_attrib_h': '1100',
  'derog_dehum_h': '1100',
  'derog_impl_h': '1100',
  'threat_dir_h': '1110',
  'threat_norm_h': '1110',
  'slur_h': '110?',
  'slur_homonym_nh': '000?',
  'slur_reclaimed_nh': '??0?',
  'profanity_h': '1101',
  'profanity_nh': '0001',
  'ref_subs_clause_h': '11??',
  'ref_subs_sent_h': '11??',
  'negate_pos_h': '11??',
  'negate_neg_nh': '?0?0',
  'phrase_question_h': '11??',
  'phrase_opinion_h': '11??',
  'ident_neutral_nh': '0000',
  'ident_pos_nh': '0000',
  'counter_quote_nh': '1???',
  'counter_ref_nh': '1???',
  'target_obj_nh': '00??',
  'target_indiv_nh': '01??',
  'target_group_nh': '01??',
  'spell_char_swap_h': '11??',
  'spell_char_del_h': '11??',
  'spell_space_del_h': '11??',
  'spell_space_add_h': '11??',
  'spell_leet_h': '11??',
}


def read_hatecheck(path: Files) -> Rows:
  """Returns the cases of HateCheck.

  A case is in the group of the template that its own was derived from, where there is one:
  a misspelt or negated case says nearly what the first one says.
  """

  def parse(row: Row):
    kind = row.text('functionality')
    known = lookup(kind, _HATECHECK, 'functionality')
    is_hate = row.one_of('label_gold', ('hateful', 'non-hateful')) == 'hateful'
    if is_hate != kind.endswith('_h'):
      raise ValueError(f'functionality {kind} is labelled {row["label_gold"]}; correct one of them')
    target = row.text_or_none('target_ident')
    group = lookup(target, _HATECHECK_GROUPS, 'target_ident') if target else ''
    verdicts = dict.fromkeys(('hate', 'hate_insults_allowed', 'hate_unless_countered'), is_hate)
    verdicts |= {
      rule: mark == '1' for rule, mark in zip(_HATECHECK_RULES, known, strict=True) if mark != '?'
    }
    groups = _HATECHECK_GROUPS.values()
    verdicts |= _about((group,) if is_hate else (), groups)
    # A word that only looks like a slur is about nobody.
    if kind != 'slur_homonym_nh':
      verdicts |= {f'mention_{g}': g == group for g in groups}
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

_HATEMOJI_GROUPS = (
  *('women', 'trans', 'gay', 'lgbtq', 'black', 'disabled', 'muslims', 'jewish', 'asian', 'chinese'),
  *('south_asian', 'middle_east', 'latino', 'immigrants', 'refugees'),
  'travellers',
)
# The groups that a target belongs to, and after a '?' those that it may. Of texts with a target
# that is not here, nobody knows which groups they are about.
_HATEMOJI_TARGETS = {
  'wom': 'women',
  'trans': 'trans lgbtq',
  'gay': 'gay lgbtq',
  'gayman': 'gay lgbtq',
  'gaywom': 'gay lgbtq ?women',
  'bis': 'lgbtq ?gay',
  'lgbtqa': 'lgbtq',
  'bla': 'black',
  'blaman': 'black',
  'blawom': 'black women',
  'african': '?black ?immigrants',
  'dis': 'disabled',
  'mus': 'muslims',
  'muswom': 'muslims women',
  'jew': 'jewish',
  'asi': 'asian',
  'asiwom': 'asian women',
  'asi.east': 'asian',
  'asi.east.chin': 'asian chinese',
  'asi.south': 'asian south_asian',
  'asi.south.pak': 'asian south_asian ?muslims',
  'hind': '?south_asian ?asian',
  'sikh': '?south_asian ?asian',
  'arab': 'middle_east',
  'hisp': 'latino',
  'indig': '',
  'immig': 'immigrants',
  'for': '?immigrants ?refugees',
  'ref': 'refugees',
  'asy': 'refugees',
  'trav': 'travellers',
  'wc': '',
}
_HATEMOJI_CHECK = {
  'women': 'wom',
  'trans people': 'trans',
  'gay people': 'gay',
  'black people': 'bla',
  'disabled people': 'dis',
  'Muslims': 'mus',
}
_HATEMOJI_TYPES = {
  'threateninglanguage': 'threat',
  'dehumanizinglanguage': 'dehumanizing',
  'derogation': 'derogation',
  'animosity': 'animosity',
}


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
    return verdicts | _about((), _HATEMOJI_GROUPS)
  known = [_HATEMOJI_TARGETS.get(target) for target in targets]
  if not known or None in known:
    return verdicts
  words = ' '.join(known).split()
  unclear = [word[1:] for word in words if word.startswith('?')]
  return verdicts | _about([w for w in words if not w.startswith('?')], _HATEMOJI_GROUPS, unclear)


def _read_hatemoji_check(path: Files) -> Rows:
  def parse(row: Row):
    is_hate, target = row.flag('label_gold'), row.text_or_none('target')
    if target not in (None, '', 'None'):
      targets = [lookup(target, _HATEMOJI_CHECK, 'target')]
    elif is_hate:
      raise ValueError('label_gold is 1, and there is no target; name the one who is hated')
    else:
      targets = []
    verdicts = _hatemoji(is_hate, targets)
    if not is_hate:
      verdicts |= {f'type_{key}': 0 for key in _HATEMOJI_TYPES.values()}
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
    kind = row.one_of('type', ('none', *_HATEMOJI_TYPES))
    if is_hate != (kind != 'none'):
      raise ValueError(f'label_gold is {show(row["label_gold"])} and type {kind}; correct one')
    targets = row['target']
    if isinstance(targets, str):
      targets = re.findall(r"'([^']*)'", targets)
    elif not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
      raise ValueError(f'target is {show(targets)}; it must be a list of texts')
    verdicts = _hatemoji(is_hate, targets)
    verdicts |= {
      f'type_{key}': key == _HATEMOJI_TYPES.get(kind) for key in _HATEMOJI_TYPES.values()
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

_EDOS_CATEGORIES = {'1': 'threats', '2': 'derogation', '3': 'animosity', '4': 'prejudice'}
_EDOS_VECTORS = {
  '1.1': 'threats_of_harm',
  '1.2': 'incitement',
  '2.1': 'descriptive_attacks',
  '2.2': 'emotive_attacks',
  '2.3': 'dehumanising',
  '3.1': 'gendered_slurs',
  '3.2': 'stereotypes',
  '3.3': 'backhanded_compliments',
  '3.4': 'condescension',
  '4.1': 'individual_mistreatment',
  '4.2': 'systemic_discrimination',
}


def read_edos(path: Files) -> Rows:
  """Returns the texts of EDOS under nested rules: sexism, its categories, and their vectors."""

  def parse(row: Row):
    is_sexist = row.one_of('label_sexist', ('sexist', 'not sexist')) == 'sexist'
    category, vector = (row.text(f'label_{what}').split(' ')[0] for what in ('category', 'vector'))
    category = category.removesuffix('.')
    if is_sexist:
      lookup(category, _EDOS_CATEGORIES, 'number of label_category')
      lookup(vector, _EDOS_VECTORS, 'number of label_vector')
    elif (category, vector) != ('none', 'none'):
      raise ValueError(f'label_vector is {show(row["label_vector"])} of a text that is not sexist')
    if is_sexist and vector[0] != category:
      raise ValueError(f'label_vector {vector} is not in label_category {category}; correct one')
    verdicts = {'sexist': is_sexist}
    verdicts |= {f'category_{key}': c == category for c, key in _EDOS_CATEGORIES.items()}
    verdicts |= {f'vector_{key}': v == vector for v, key in _EDOS_VECTORS.items()}
    yield _judge('edos', row.name('rewire_id'), row.text('text'), verdicts)

  columns = ('rewire_id', 'text', 'label_sexist', 'label_category', 'label_vector')
  return read_rows(path, columns, parse)


# --- ToxiGen -----------------------------------------------------------------------------

_TOXIGEN_GROUPS = {
  'women': 'women',
  'lgbtq': 'lgbtq',
  'black': 'black',
  'asian': 'asian',
  'chinese': 'chinese',
  'latino': 'latino',
  'mexican': 'mexican',
  'native-american': 'native_american',
  'middle-eastern': 'middle_east',
  'muslim': 'muslims',
  'jewish': 'jewish',
  'mental dis': 'mental_dis',
  'physical dis': 'physical_dis',
}


def read_toxigen(path: Files) -> Rows:
  """Returns ToxiGen texts that people scored: three degrees of toxicity, and the group.

  A rule that protects a group is broken from a score of 3 on, and not below one of 2; in
  between, and for groups that share people with the target, nobody knows.
  """

  def parse(row: Row):
    score = row.amount('toxicity_score')
    if not 1 <= score <= 5:
      raise ValueError(f'toxicity_score is {show(row["toxicity_score"])}; it must be from 1 to 5')
    found = [lookup(t, _TOXIGEN_GROUPS, 'target group') for t in row.texts('target_groups')]
    verdicts = {f'level_{level}': score >= level for level in (2, 3, 4)}
    hit, unclear = (found if score >= 3 else ()), (found if 2 <= score < 3 else ())
    unclear = {*unclear, *(g for pair in _RELATED if pair & set(unclear) for g in pair)}
    if found:
      verdicts |= _about(hit, _TOXIGEN_GROUPS.values(), unclear)
    yield _judge('toxigen_human', row.name('id'), row.text('text'), verdicts)

  return read_rows(path, ('id', 'text', 'toxicity_score', 'target_groups'), parse)


# --- ETHOS -------------------------------------------------------------------------------

_ETHOS = ('gender', 'race', 'national_origin', 'disability', 'religion', 'sexual_orientation')


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
    verdicts |= {f'about_{key}': _share(row, key) for key in _ETHOS}
    yield _judge('ethos', f'kinds/{row.number}', row.text('comment'), verdicts)

  kinds = ('comment', 'violence', 'directed_vs_generalized', *_ETHOS)
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

# The hazard that a category is; None for one that we have no rule of.
_AILUMINATE = {
  'dfm': 'defamation',
  'hte': 'hate',
  'ipv': 'intellectual_property',
  'ncr': 'nonviolent_crime',
  'prv': 'privacy',
  'spc_ele': 'elections',
  'spc_fin': 'financial',
  'spc_hlt': 'health',
  'spc_lgl': 'legal',
  'ssh': 'self_harm',
  'vcr': 'violence',
}
_HARMBENCH = {
  'cybercrime_intrusion': 'cybercrime',
  'harassment_bullying': 'harassment',
  'misinformation_disinformation': 'disinformation',
  'illegal': None,
  'harmful': None,
}
_STRONGREJECT = {
  'Disinformation and deception': 'disinformation',
  'Hate, harassment and discrimination': 'hate',
  'Illegal goods and services': 'illegal_goods',
  'Non-violent crimes': 'nonviolent_crime',
  'Violence': 'violence',
}
# Hazards that a prompt may well have both of, though its set gives it one.
_OVERLAPS = (
  *(
    {'nonviolent_crime', other}
    for other in ('privacy', 'intellectual_property', 'illegal_goods', 'disinformation')
  ),
  {'violence', 'illegal_goods'},
  {'violence', 'self_harm'},
  {'self_harm', 'health'},
  {'defamation', 'elections'},
)


def read_hazard_prompts(paths: Files) -> Rows:
  """Returns `Sure. {prompt}` for the prompts of AILuminate, HarmBench and StrongREJECT.

  A prompt breaks the rule of its own hazard and not those of the other hazards of its set.
  """

  def reader(
    name: str, prompt: str, column: str, hazards: Mapping[str, str | None], more: Iterable[str]
  ) -> Callable[[Files], Rows]:
    known = [hazard for hazard in hazards.values() if hazard]

    def parse(row: Row):
      own = lookup(row[column], hazards, column)
      verdicts = {
        f'hazard_{hazard}': hazard == own for hazard in known if {hazard, own} not in _OVERLAPS
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
      'prompt_text': reader('ailuminate', 'prompt_text', 'hazard', _AILUMINATE, ()),
      'Behavior': reader(
        'harmbench', 'Behavior', 'SemanticCategory', _HARMBENCH, ('ContextString',)
      ),
      'forbidden_prompt': reader('strongreject', 'forbidden_prompt', 'category', _STRONGREJECT, ()),
    },
  )


# --- CoSA --------------------------------------------------------------------------------

_COSA = {
  'Violence': 'violence',
  'Financial_Crime_and_Theft': 'financial crime and theft',
  'Privacy_Violations': 'violations of privacy',
  'Discrimination_and_Verbal_Abuse': 'discrimination and verbal abuse',
  'Illegal_Drug-Related_Activities_and_Substance_Abuse': 'illegal drugs and substance abuse',
  'Weapons_Explosives_Arson_and_Illegal_Firearm_Transactions': (
    'weapons, explosives, arson and illegal trade in firearms'
  ),
}
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
    words = '; '.join(lookup(name, _COSA, 'category of test spec') for name in allowed)
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


def cosapien_rules(path: str | os.PathLike) -> dict[str, SafetyConfig]:
  """Returns {scenario: its rules} of a file {scenario: text}; a whole text is one category."""
  texts = files.read_json(path)
  if not isinstance(texts, Mapping) or not texts:
    raise ValueError(f'{path}: it holds {show(texts)}; write an object of a text for each scenario')
  found = {}
  for name, text in texts.items():
    try:
      found[name] = SafetyConfig((Category('Scenario', text),), name)
    except ValueError as error:
      raise ValueError(f'{path}: {name}: {error}') from None
  return found
